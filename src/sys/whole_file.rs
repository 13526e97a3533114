//! Files that are written whole or not at all.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;

/// Replaces a file: whoever reads it, also after a crash, finds the old content or the new one. Blocks
/// until it is on stable storage.
///
/// # Errors
///
/// The file beside it, `NAME.new`, cannot be written, or take its name.
pub fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = path.with_file_name(name);
    let mut file = File::create(&new)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    sync_dir_of(path)
}

/// Makes the name of a file durable.
pub fn sync_dir_of(path: &Path) -> io::Result<()> {
    let dir = path.parent().filter(|dir| *dir != Path::new(""));
    File::open(dir.unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f.json");
        write(&file, b"one").unwrap();
        write(&file, b"two").unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        write(&dir.path().join("none/f"), b"three").unwrap_err();
    }
}
