//! A virsh at a terminal of the test's own.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::process::Child;
use std::time::{Duration, Instant};

use super::livepointd::Daemon;

/// A virsh in the background, whose output goes to a file.
pub struct Background {
    pub child: Child,
}

impl Drop for Background {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// Returns whether a terminal still shows by itself what is typed.
fn termios_echoes(terminal: &fs::File) -> bool {
    use rustix::termios::{LocalModes, tcgetattr};
    tcgetattr(terminal)
        .unwrap()
        .local_modes
        .contains(LocalModes::ECHO)
}

/// A virsh console at a terminal of the test's own.
pub struct Terminal {
    _virsh: Background,
    master: fs::File,
    seen: String,
}

impl Terminal {
    pub fn open(daemon: &Daemon, args: &[&str]) -> Self {
        use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let slave = fs::OpenOptions::new()
            .read(true)
            .write(true)
            // Or it could become the terminal that controls this test.
            .custom_flags(libc::O_NOCTTY)
            .open(name.to_str().unwrap())
            .unwrap();
        let child = daemon
            .virsh_without_limit(args)
            .stdin(slave.try_clone().unwrap())
            .stdout(slave.try_clone().unwrap())
            .stderr(slave)
            .spawn()
            .unwrap();
        Self {
            _virsh: Background { child },
            master: master.into(),
            seen: String::new(),
        }
    }

    /// Waits until virsh passes on what is typed: it throws away what came before it was ready.
    pub fn attach(&mut self) {
        self.wait("Escape character");
        let start = Instant::now();
        while termios_echoes(&self.master) {
            assert!(start.elapsed() < Duration::from_secs(60), "{:?}", self.seen);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn type_in(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).unwrap();
    }

    pub fn wait(&mut self, text: &str) {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let start = Instant::now();
        while !self.seen.contains(text) {
            let seen = &self.seen;
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "no {text:?} in {seen:?}"
            );
            let mut fds = [PollFd::new(&self.master, PollFlags::IN)];
            let second = Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            };
            if poll(&mut fds, Some(&second)).unwrap() == 0 {
                continue;
            }
            let mut bytes = [0; 4096];
            // An error: the other side is gone, so that nothing more comes.
            let count = self.master.read(&mut bytes).unwrap_or(0);
            self.seen
                .push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
    }
}
