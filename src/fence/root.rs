//! A directory of the volume's file system that the guard keeps open: through it the file system is
//! synced, and while it is open `umount -f` ends calls without unmounting.
//!
//! Opening it may wait for the server, or fail for a moment (no memory). So it is a thread that does it,
//! and each look at a directory that is not open takes what the last try gave, or begins another one.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, openat, statx};

use super::Task;
use crate::sys::mountinfo::DeviceId;

#[derive(Debug)]
pub(super) struct Root {
    place: PathBuf,
    device: DeviceId,
    opened: Option<Arc<OwnedFd>>,
    /// What a try that is under way will give.
    under_way: Option<Receiver<io::Result<OwnedFd>>>,
}

impl Root {
    /// Not open yet.
    pub(super) fn of(task: &Task) -> Self {
        Self {
            place: task.share_place.clone(),
            device: task.device,
            opened: None,
            under_way: None,
        }
    }

    /// The directory, if it is open. Waits so long for a try.
    pub(super) fn get(&mut self, patience: Duration) -> Option<Arc<OwnedFd>> {
        if self.opened.is_none() {
            match self.try_to_open(patience) {
                Ok(root) => self.opened = root.map(Arc::new),
                Err(error) => tracing::debug!(%error, "the volume's directory does not open"),
            }
        }
        self.opened.clone()
    }

    fn try_to_open(&mut self, patience: Duration) -> io::Result<Option<OwnedFd>> {
        let under_way = match self.under_way.take() {
            Some(under_way) => under_way,
            None => {
                let (tell, told) = mpsc::channel();
                let (place, device) = (self.place.clone(), self.device);
                std::thread::Builder::new()
                    .name("guard-open".to_owned())
                    .spawn(move || {
                        let _ = tell.send(open(&place, device));
                    })?;
                told
            }
        };
        match under_way.recv_timeout(patience) {
            Ok(opened) => opened.map(Some),
            Err(RecvTimeoutError::Timeout) => {
                self.under_way = Some(under_way);
                Ok(None)
            }
            Err(RecvTimeoutError::Disconnected) => Err(io::ErrorKind::Other.into()),
        }
    }

    pub(super) fn is_open(&self) -> bool {
        self.opened.is_some()
    }

    pub(super) fn close(&mut self) {
        self.opened = None;
        self.under_way = None;
    }
}

fn open(place: &Path, device: DeviceId) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = openat(CWD, place, flags, Mode::empty())?;
    let at = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = statx(&root, "", at, StatxFlags::INO)?;
    match (stat.stx_dev_major, stat.stx_dev_minor) == (device.major, device.minor) {
        true => Ok(root),
        false => Err(io::Error::other("another file system is mounted there")),
    }
}
