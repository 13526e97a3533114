//! What a built-in guest prints on its serial line, read while it runs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

/// How often the log is read while something is waited for.
const POLL: Duration = Duration::from_millis(5);

/// A guest's serial output, in a file that a domain's process appends to.
#[derive(Debug)]
pub(super) struct ConsoleLog {
    path: PathBuf,
}

impl ConsoleLog {
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns what was printed so far, whole lines only.
    pub fn text(&self) -> anyhow::Result<String> {
        let bytes = fs::read(&self.path)
            .with_context(|| format!("could not read {}", self.path.display()))?;
        let end = bytes
            .iter()
            .rposition(|&byte| byte == b'\n')
            .map_or(0, |at| at + 1);
        Ok(String::from_utf8_lossy(&bytes[..end]).replace('\r', ""))
    }

    /// Waits until a line fits, and returns it; fails when `alive` says that nothing more comes.
    pub fn wait_line(
        &self,
        what: &str,
        timeout: Duration,
        mut alive: impl FnMut() -> anyhow::Result<bool>,
        fits: impl Fn(&str) -> bool,
    ) -> anyhow::Result<String> {
        let start = Instant::now();
        loop {
            // Read after the check: a process that has ended has printed everything.
            let last_look = !alive()?;
            let text = self.text()?;
            if let Some(line) = text.lines().find(|line| fits(line)) {
                return Ok(line.to_owned());
            }
            if last_look {
                bail!("the guest ended before it printed {what}; it printed:\n{text}");
            }
            if start.elapsed() > timeout {
                bail!("the guest did not print {what} in {} s", timeout.as_secs());
            }
            std::thread::sleep(POLL);
        }
    }
}

/// Returns the `key=value` pairs of a line.
pub(super) fn pairs(line: &str) -> BTreeMap<&str, &str> {
    line.split_whitespace()
        .filter_map(|word| word.split_once('='))
        .collect()
}

/// Returns a numeric value of a line, by key.
pub(super) fn number<T: std::str::FromStr>(line: &str, key: &str) -> anyhow::Result<T> {
    pairs(line)
        .get(key)
        .and_then(|value| value.parse().ok())
        .with_context(|| format!("the guest's line has no number {key}: {line}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_found_among_words() {
        let line = "tick cpu=0 tsc=12345 pass=7 done";
        assert_eq!(number::<u64>(line, "tsc").unwrap(), 12345);
        assert!(number::<u64>(line, "gap").is_err());
    }

    #[test]
    fn a_line_that_is_not_whole_yet_is_not_seen() {
        let dir = tempfile::tempdir().unwrap();
        let log = ConsoleLog::new(dir.path().join("log"));
        fs::write(log.path(), "one\r\ntw").unwrap();
        assert_eq!(log.text().unwrap(), "one\n");
        let missing = log.wait_line("two", Duration::from_secs(1), || Ok(false), |l| l == "two");
        assert!(missing.unwrap_err().to_string().contains("ended before"));
    }
}
