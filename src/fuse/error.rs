//! How an operation of the file system fails: with an errno.

use nfs::rpc::NfsError;

/// A positive `libc` error number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Errno(pub(super) i32);

impl From<NfsError> for Errno {
    fn from(error: NfsError) -> Self {
        Self(error.errno())
    }
}

pub(super) type Result<T> = std::result::Result<T, Errno>;
