//! The daemon's side: find attendants, ask them, wait for their end, end them.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{LOCK, POLL, SOCKET, lock, post, talk};
use crate::mutant::{self, Mutant};

/// An attendant that lived when it was seen.
#[derive(Debug, Clone)]
pub(crate) struct Attendant {
    dir: PathBuf,
    name: String,
}

/// The attendants of a directory, answering or not. What others have left is removed.
#[must_use]
pub(crate) fn living(dir: &Path) -> Vec<Attendant> {
    let entries = std::fs::read_dir(dir);
    let names: BTreeSet<String> = entries
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let file = entry.ok()?.file_name().into_string().ok()?;
            let (name, suffix) = file.rsplit_once('.')?;
            matches!(suffix, LOCK | SOCKET).then(|| name.to_owned())
        })
        .collect();
    names
        .into_iter()
        .map(|name| Attendant {
            dir: dir.to_owned(),
            name,
        })
        .filter(Attendant::lives)
        .collect()
}

/// Whether the attendant of this name lives.
#[must_use]
pub(crate) fn lives(dir: &Path, name: &str) -> bool {
    let attendant = Attendant {
        dir: dir.to_owned(),
        name: name.to_owned(),
    };
    attendant.lives()
}

/// Waits until a directory has no attendant; whether it has none. They may go on as processes
/// after they have left their post.
pub(crate) async fn gone(dir: &Path, deadline: Instant) -> bool {
    while !living(dir).is_empty() {
        if Instant::now() >= deadline {
            return false;
        }
        tokio::time::sleep(POLL).await;
    }
    true
}

impl Attendant {
    fn file(&self, suffix: &str) -> PathBuf {
        self.dir.join(format!("{}.{suffix}", self.name))
    }

    /// Whether it lives. What one that is gone has left is removed.
    fn lives(&self) -> bool {
        let file = match File::open(self.file(LOCK)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return self.listens(),
            Err(_) => return true,
        };
        // What cannot be told is believed to live.
        let lives = lock::is_held(&file).unwrap_or(true);
        if !lives {
            // While the file is open nobody else takes its lock. The lock goes last, see `Post`.
            self.remove(&[SOCKET, LOCK]);
        }
        lives
    }

    /// Whether one of the first release, which holds no lock, lives: one that is stopped takes
    /// connections too, and none is made with what a process has left.
    fn listens(&self) -> bool {
        if mutant::is_on(Mutant::AttendantByNumber) {
            return is_one_of_ours(&self.name);
        }
        let refused = matches!(self.connect(), Err(Errno::CONNREFUSED | Errno::NOENT));
        if refused {
            self.remove(&[SOCKET]);
        }
        !refused
    }

    fn remove(&self, suffixes: &[&str]) {
        for suffix in suffixes {
            // What stays is looked at again by the next one.
            let _ = std::fs::remove_file(self.file(suffix));
        }
    }

    /// A connection, without waiting for one.
    fn connect(&self) -> Result<OwnedFd, Errno> {
        let failed = |error: io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
        let name = format!("{}.{SOCKET}", self.name);
        let (_dir, path) = talk::socket_path(&self.dir, &name).map_err(failed)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
        let socket = rustix::net::socket_with(family, kind, flags, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(socket)
    }

    /// Asks it one thing.
    ///
    /// # Errors
    /// When it has not answered in time.
    pub(crate) async fn ask<A: Serialize, B: DeserializeOwned>(
        &self,
        said: &A,
        patience: Duration,
    ) -> io::Result<B> {
        let socket = format!("{}.{SOCKET}", self.name);
        talk::exchange(&self.dir, &socket, said, patience).await
    }

    /// The number of its process: by its own word, or the kernel's.
    fn pid(&self) -> Option<Pid> {
        let number = match std::fs::read_to_string(self.file(LOCK)) {
            Ok(text) => {
                let (pid, namespace) = text.strip_suffix('\n')?.split_once(' ')?;
                (namespace == post::namespace()).then_some(pid)?.parse()
            }
            Err(_) if mutant::is_on(Mutant::AttendantByNumber) => self.name.parse(),
            Err(_) => return Some(sockopt::socket_peercred(self.connect().ok()?).ok()?.pid),
        };
        Pid::from_raw(number.ok()?)
    }

    /// Its process. A number may be another's by now; but if this one lives after the pidfd was
    /// opened, it was its own.
    pub(super) fn process(&self) -> Option<OwnedFd> {
        let process = pidfd_open(self.pid()?, PidfdFlags::NONBLOCK).ok()?;
        self.lives().then_some(process)
    }

    /// Waits for its end; whether it has ended.
    pub(crate) async fn ends(&self, within: Duration) -> bool {
        if let Some(process) = self.process() {
            // A thread that only waits; it ends with the time.
            let _ = tokio::task::spawn_blocking(move || wait_for(&process, within)).await;
            return !self.lives();
        }
        let deadline = Instant::now() + within;
        while self.lives() && Instant::now() < deadline {
            tokio::time::sleep(POLL).await;
        }
        !self.lives()
    }

    /// SIGKILL; whether it has ended then.
    pub(crate) async fn kill(&self, within: Duration) -> bool {
        if let Some(process) = self.process() {
            let _ = pidfd_send_signal(process, Signal::KILL);
        }
        self.ends(within).await
    }
}

/// Waits until a process has ended, which makes its pidfd readable.
fn wait_for(process: &OwnedFd, within: Duration) {
    let within = Timespec::try_from(within).ok();
    let mut polled = [PollFd::new(process, PollFlags::IN)];
    // Who waits looks at the lock then.
    let _ = poll(&mut polled, within.as_ref());
}

/// The fault: whether a number is that of any worker or guard.
fn is_one_of_ours(pid: &str) -> bool {
    const OURS: [&[u8]; 2] = [b"fuse-worker", b"kernel-guard"];
    std::fs::read(format!("/proc/{pid}/cmdline"))
        .is_ok_and(|line| line.split(|b| *b == 0).any(|word| OURS.contains(&word)))
}
