//! The attendant's side: to be found, and to leave.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;

use super::{LOCK, SOCKET, lock, talk};

/// What an attendant holds while it serves. Dropping it leaves nothing behind.
#[derive(Debug)]
pub(crate) struct Post {
    dir: PathBuf,
    name: String,
    /// The kernel lets go of it with the process.
    _lock: File,
}

impl Post {
    /// Becomes an attendant of a directory: from now on daemons find this process, and wait for
    /// what the listener hears.
    ///
    /// # Errors
    /// Any error of the file system, with what to do about it.
    pub(crate) fn take(dir: &Path) -> io::Result<(Self, UnixListener)> {
        Self::try_to_take(dir).map_err(|error| {
            let what = format!(
                "{}: {error}; free space or repair it, then try again",
                dir.display()
            );
            io::Error::new(error.kind(), what)
        })
    }

    fn try_to_take(dir: &Path) -> io::Result<(Self, UnixListener)> {
        let (name, lock) = take_new(dir)?;
        let post = Self {
            dir: dir.to_owned(),
            name,
            _lock: lock,
        };
        let (_dir, path) = talk::socket_path(dir, &format!("{}.{SOCKET}", post.name))?;
        let listener = UnixListener::bind(path)?;
        Ok((post, listener))
    }

    /// As what [`super::living`] finds this process.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Post {
    fn drop(&mut self) {
        // The lock goes last: without it, what is left of the socket would be an earlier release's.
        for suffix in [SOCKET, LOCK] {
            let _ = std::fs::remove_file(self.dir.join(format!("{}.{suffix}", self.name)));
        }
    }
}

/// A lock under a name of its own.
fn take_new(dir: &Path) -> io::Result<(String, File)> {
    loop {
        let name = format!("{:016x}", getrandom::u64()?);
        let path = dir.join(format!("{name}.{LOCK}"));
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        // A daemon that looked before the lock was taken believes that nobody holds it, and
        // removes it.
        if lock::take(&file)? && path.try_exists()? {
            writeln!(file, "{} {}", std::process::id(), namespace())?;
            return Ok((name, file));
        }
    }
}

/// In which process ids count.
pub(super) fn namespace() -> String {
    std::fs::read_link("/proc/self/ns/pid")
        .map(|name| name.display().to_string())
        .unwrap_or_default()
}
