//! Confining the process of a domain: which files it can still open, which system calls it can
//! make, and as whom.
//!
//! A process is confined once all that its machine needs of the host is open, before there is a
//! thread: every thread inherits it. From then on whoever takes over the process by way of a
//! device has guest memory, the open descriptors, and what is named here. Nothing of it can be
//! undone.

mod calls;
mod files;
mod user;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

pub use calls::Forbidden;
pub use user::User;

use super::DomainFiles;
use crate::sys::userfault;

/// How long a thread that has ended may still be seen.
const GONE_TIMEOUT: Duration = Duration::from_secs(10);

/// How to confine a process.
#[derive(Clone, Debug, Default)]
pub struct Confinement {
    /// What becomes of system calls that no part of a machine makes; `None` lets all be made.
    pub calls: Option<Forbidden>,
    /// Whether only files that the domain names can be opened (Landlock).
    pub files: bool,
    /// Directories that images may be written to, where `files` is set.
    pub image_dirs: Vec<PathBuf>,
    /// Whom the process runs as.
    pub user: Option<User>,
}

impl Confinement {
    /// Returns whether anything is confined.
    pub fn is_any(&self) -> bool {
        self.calls.is_some() || self.files || self.user.is_some()
    }

    /// Confines this process, which must have one thread. What the kernel does not have is told as
    /// a warning and left out, but for the user.
    ///
    /// # Errors
    ///
    /// There is more than one thread, or the kernel refuses.
    pub fn apply(&self, domain: &DomainFiles) -> io::Result<()> {
        if !self.is_any() {
            return Ok(());
        }
        wait_for_one_thread()?;
        if let Some(images) = &domain.images {
            self.make_directory(images)?;
        }
        // A user may not open it; the context that comes of it belongs to this process all the same.
        if let Err(error) = userfault::keep_device() {
            log::debug!("/dev/userfaultfd: {error}");
        }
        self.apply_to_thread(domain)
    }

    /// Makes a directory that the process is to write, if it is not there, and gives it to the user
    /// that it will run as.
    fn make_directory(&self, path: &Path) -> io::Result<()> {
        if path.is_dir() {
            return Ok(());
        }
        let named = |error| io::Error::other(format!("{}: {error}", path.display()));
        fs::create_dir_all(path).map_err(named)?;
        match &self.user {
            Some(user) => user.take_over(path).map_err(named),
            None => Ok(()),
        }
    }

    /// Confines the calling thread, and those that it starts.
    fn apply_to_thread(&self, domain: &DomainFiles) -> io::Result<()> {
        // Paths are looked up with the rights from before.
        let rules = self
            .files
            .then(|| files::Rules::new(domain, &self.image_dirs));
        let kept = user::allow_priorities()?;
        if let Some(user) = &self.user {
            user.become_it()?;
        }
        user::drop_capabilities(kept)?;
        rustix::thread::set_no_new_privs(true)?;
        if let Some(rules) = rules {
            rules.enforce()?;
        }
        if let Some(forbidden) = self.calls {
            calls::forbid(forbidden)?;
        }
        Ok(())
    }
}

/// Waits until the threads that read the image are gone, which they are soon after they are joined.
fn wait_for_one_thread() -> io::Result<()> {
    let start = Instant::now();
    loop {
        let threads = fs::read_dir("/proc/self/task")?.count();
        if threads == 1 {
            return Ok(());
        }
        if start.elapsed() > GONE_TIMEOUT {
            let why = format!("the process has {threads} threads already");
            return Err(io::Error::other(why));
        }
        thread::sleep(Duration::from_millis(1));
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;
    use std::process::Command;

    use super::*;

    fn domain(read: &Path, write: &Path) -> DomainFiles {
        DomainFiles {
            name: "d".to_owned(),
            read: vec![read.to_owned()],
            write: vec![write.to_owned()],
            images: None,
        }
    }

    /// Runs `work` in a thread that is confined. Other threads are not.
    fn confined<T: Send + 'static>(
        confinement: Confinement,
        domain: DomainFiles,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        let thread = thread::spawn(move || {
            confinement.apply_to_thread(&domain).unwrap();
            work()
        });
        thread.join().unwrap()
    }

    #[test]
    fn a_confined_thread_opens_what_its_domain_names_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["kernel", "disk", "other"] {
            fs::write(path(name), "before").unwrap();
        }
        fs::create_dir(path("images")).unwrap();
        fs::create_dir(path("own")).unwrap();
        let confinement = Confinement {
            files: true,
            image_dirs: vec![path("images")],
            ..Confinement::default()
        };
        let (kernel, disk, other) = (path("kernel"), path("disk"), path("other"));
        let (image, moved) = (path("images/new"), path("images/moved"));
        let own_image = path("own/new");
        let outside = path("outside");
        let mut files = domain(&kernel, &disk);
        files.images = Some(path("own"));
        confined(confinement, files, move || {
            assert_eq!(fs::read_to_string(&kernel).unwrap(), "before");
            fs::write(&disk, "after").unwrap();
            fs::write(&image, "image").unwrap();
            fs::rename(&image, &moved).unwrap();
            fs::remove_file(&moved).unwrap();
            fs::write(&own_image, "image").unwrap();
            fs::remove_file(&own_image).unwrap();
            // A kernel without Landlock lets all of this through, which the log says.
            if !files::is_supported() {
                println!("skipped: this kernel has no Landlock");
                return;
            }
            let denied = |result: io::Result<()>| {
                assert_eq!(result.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
            };
            denied(fs::write(&kernel, "after"));
            denied(fs::read(&other).map(drop));
            denied(fs::write(&outside, "new"));
            denied(fs::remove_file(&other));
            denied(fs::read("/etc/passwd").map(drop));
            denied(fs::read_dir("/").map(drop));
            denied(fs::rename(&disk, &outside));
        });
    }

    #[test]
    fn a_confined_thread_runs_no_program_and_reaches_no_network() {
        let confinement = Confinement {
            calls: Some(Forbidden::Refuse),
            ..Confinement::default()
        };
        let nothing = Path::new("/dev/null");
        confined(confinement, domain(nothing, nothing), || {
            // Threads, files and time are as before.
            let child = thread::spawn(|| fs::read("/etc/passwd").unwrap().len());
            assert!(child.join().unwrap() > 0);
            let refused = |error: io::Error| {
                assert_eq!(error.raw_os_error(), Some(libc::ENOSYS), "{error}");
            };
            refused(std::net::TcpListener::bind("127.0.0.1:0").unwrap_err());
            refused(std::os::unix::net::UnixDatagram::unbound().unwrap_err());
            assert!(Command::new("/bin/true").status().is_err());
            let parent = rustix::process::getppid().unwrap();
            refused(
                rustix::process::test_kill_process(parent)
                    .unwrap_err()
                    .into(),
            );
        });
    }

    #[test]
    fn a_confined_thread_has_no_capability_left_but_for_its_priority() {
        let confinement = Confinement {
            files: true,
            ..Confinement::default()
        };
        let nothing = Path::new("/dev/null");
        let status = confined(confinement, domain(nothing, nothing), || {
            fs::read_to_string("/proc/thread-self/status").unwrap()
        });
        let has = |key: &str, value: &str| status.contains(&format!("{key}:\t{value}\n"));
        for key in ["CapPrm", "CapEff"] {
            let is_nice = has(key, "0000000000800000");
            assert!(is_nice || has(key, "0000000000000000"), "{status}");
        }
        assert!(has("NoNewPrivs", "1"), "{status}");
    }

    #[test]
    fn a_thread_of_another_user_owns_what_it_makes() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: only root can become another user");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let user = User::named("nobody").unwrap();
        user.take_over(dir.path()).unwrap();
        let file = dir.path().join("file");
        let confinement = Confinement {
            user: Some(user.clone()),
            ..Confinement::default()
        };
        let nothing = Path::new("/dev/null");
        confined(confinement, domain(nothing, nothing), move || {
            fs::write(&file, "").unwrap();
            assert_eq!(fs::metadata(&file).unwrap().uid(), user.uid());
            assert!(fs::read("/etc/shadow").is_err());
        });
    }

    #[test]
    fn a_user_that_is_not_there_is_named() {
        let error = User::named("no-such-user").unwrap_err();
        assert!(error.to_string().contains("no-such-user"), "{error}");
    }
}
