//! A lock that tells whether its holder lives.

use std::fs::File;
use std::io;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

fn try_to(file: &File, operation: FlockOperation) -> io::Result<bool> {
    match flock(file, operation) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Takes the lock, unless somebody has it; it is held until the file is closed.
///
/// # Errors
/// When the file system has no locks.
pub(crate) fn take(file: &File) -> io::Result<bool> {
    try_to(file, FlockOperation::NonBlockingLockExclusive)
}

/// Whether somebody holds the lock. If not, nobody takes it until the file is closed.
///
/// # Errors
/// When the file system has no locks.
pub(crate) fn is_held(file: &File) -> io::Result<bool> {
    try_to(file, FlockOperation::NonBlockingLockShared).map(|free| !free)
}
