//! Why a directory operation on a share failed.

use std::fmt;
use std::time::Duration;

use rustix::io::Errno;

use crate::address::SharePath;
use crate::probe::ReachError;

/// Which of the two refusals a server gave; NFS keeps them apart (RFC 1813 section 2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// EACCES: the permission bits or the export forbid it.
    Access,
    /// EPERM: only the owner or a privileged user may do it.
    Owner,
}

/// The kinds of failure.
#[derive(Debug, Clone, PartialEq)]
pub enum AdminErrorKind {
    /// The object, or a directory on the way to it, does not exist.
    NotFound,
    /// Something with that name is there already.
    Exists,
    NotEmpty,
    NotADirectory,
    /// A symbolic link is on the way (or is the object): links are never followed.
    Symlink,
    Access(Refusal),
    ReadOnly,
    NoSpace,
    Quota,
    /// The server no longer knows the file handle.
    Stale,
    CrossDevice,
    /// A file longer than this limit in bytes, or a directory with more entries than it.
    TooLarge(usize),
    /// An earlier operation on the share has not come back, or the server asked to try later.
    Busy,
    /// No answer within the deadline. A change may still take effect at the server.
    TimedOut(Duration),
    /// The connection broke in the middle of a change: it may or may not have taken effect.
    Unknown,
    Reach(ReachError),
    /// The answer made no sense.
    Protocol(String),
    /// Any other errno.
    Other(i32),
}

impl From<Errno> for AdminErrorKind {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::NOENT => Self::NotFound,
            Errno::EXIST => Self::Exists,
            Errno::NOTEMPTY => Self::NotEmpty,
            Errno::NOTDIR => Self::NotADirectory,
            Errno::LOOP => Self::Symlink,
            Errno::ACCESS => Self::Access(Refusal::Access),
            Errno::PERM => Self::Access(Refusal::Owner),
            Errno::ROFS => Self::ReadOnly,
            Errno::NOSPC => Self::NoSpace,
            Errno::DQUOT => Self::Quota,
            Errno::STALE => Self::Stale,
            Errno::XDEV => Self::CrossDevice,
            Errno::BUSY => Self::Busy,
            other => Self::Other(other.raw_os_error()),
        }
    }
}

/// A failed operation: what was tried, where, and why it failed.
#[derive(Debug, Clone, PartialEq)]
pub struct AdminError {
    /// The operation, in words that follow "could not".
    pub op: &'static str,
    pub share: String,
    pub path: SharePath,
    pub kind: AdminErrorKind,
}

impl AdminError {
    /// The errno that a system call would have given.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match &self.kind {
            AdminErrorKind::NotFound => Errno::NOENT,
            AdminErrorKind::Exists => Errno::EXIST,
            AdminErrorKind::NotEmpty => Errno::NOTEMPTY,
            AdminErrorKind::NotADirectory => Errno::NOTDIR,
            AdminErrorKind::Symlink => Errno::LOOP,
            AdminErrorKind::Access(Refusal::Access) => Errno::ACCESS,
            AdminErrorKind::Access(Refusal::Owner) => Errno::PERM,
            AdminErrorKind::ReadOnly => Errno::ROFS,
            AdminErrorKind::NoSpace => Errno::NOSPC,
            AdminErrorKind::Quota => Errno::DQUOT,
            AdminErrorKind::Stale => Errno::STALE,
            AdminErrorKind::CrossDevice => Errno::XDEV,
            AdminErrorKind::TooLarge(_) => Errno::FBIG,
            AdminErrorKind::Busy => Errno::BUSY,
            AdminErrorKind::TimedOut(_) => Errno::TIMEDOUT,
            AdminErrorKind::Unknown => Errno::CONNRESET,
            AdminErrorKind::Protocol(_) => Errno::PROTO,
            AdminErrorKind::Reach(error) => return error.errno(),
            AdminErrorKind::Other(errno) => return *errno,
        }
        .raw_os_error()
    }

    /// Whether the same operation may well succeed later without anybody changing a setting.
    /// After such an error a change may have taken effect: look before repeating it.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match &self.kind {
            AdminErrorKind::Busy
            | AdminErrorKind::TimedOut(_)
            | AdminErrorKind::Unknown
            | AdminErrorKind::Stale => true,
            AdminErrorKind::Reach(error) => error.is_transient(),
            _ => false,
        }
    }

    /// Whether the share answers, but takes no change from this host.
    #[must_use]
    pub fn takes_no_change(&self) -> bool {
        matches!(
            self.kind,
            AdminErrorKind::ReadOnly
                | AdminErrorKind::NoSpace
                | AdminErrorKind::Quota
                | AdminErrorKind::Access(_)
        )
    }

    /// What happened, without what to do next.
    #[must_use]
    pub fn message(&self) -> String {
        Told(self).to_string()
    }

    /// What to do next, where something can be said.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        Some(match &self.kind {
            AdminErrorKind::Access(Refusal::Access) => {
                "the server maps root to another user (root_squash) that may not write here: \
                 give that user the directory, or export with no_root_squash"
            }
            AdminErrorKind::Access(Refusal::Owner) => {
                "the server maps root to another user (root_squash), who may not change owners: \
                 export with no_root_squash, or leave uid, gid and mode out"
            }
            AdminErrorKind::ReadOnly => "export the share read-write (`rw` in exports(5))",
            AdminErrorKind::NoSpace => "free space on the server, or empty the trash",
            AdminErrorKind::Quota => "raise the quota of the user that the server maps root to",
            AdminErrorKind::Symlink => {
                "a symbolic link on the share is never followed: replace it by a directory"
            }
            AdminErrorKind::CrossDevice => {
                "both places must be on one file system of the server; a nested export is another"
            }
            AdminErrorKind::Stale => "the export changed on the server; the next try looks anew",
            AdminErrorKind::Busy | AdminErrorKind::TimedOut(_) => {
                "look at the server's load and log; the operation is safe to repeat"
            }
            AdminErrorKind::Unknown => "the operation is safe to repeat",
            AdminErrorKind::Reach(error) => return error.hint(),
            _ => return None,
        })
    }
}

/// Without what to do next.
struct Told<'a>(&'a AdminError);

impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let AdminError { op, path, .. } = self.0;
        if let AdminErrorKind::Reach(error) = &self.0.kind {
            return write!(f, "could not {op} {path}: {}", error.message());
        }
        write!(f, "share {}: could not {op} {path}: ", self.0.share)?;
        match &self.0.kind {
            AdminErrorKind::NotFound => f.write_str("no such file or directory")?,
            AdminErrorKind::Exists => f.write_str("the name is taken")?,
            AdminErrorKind::NotEmpty => f.write_str("the directory is not empty")?,
            AdminErrorKind::NotADirectory => f.write_str("not a directory")?,
            AdminErrorKind::Symlink => f.write_str("a symbolic link is in the way")?,
            AdminErrorKind::Access(Refusal::Access) => f.write_str("permission denied")?,
            AdminErrorKind::Access(Refusal::Owner) => f.write_str("operation not permitted")?,
            AdminErrorKind::ReadOnly => f.write_str("the share is read-only")?,
            AdminErrorKind::NoSpace => f.write_str("no space left on the share")?,
            AdminErrorKind::Quota => f.write_str("the disk quota is used up")?,
            AdminErrorKind::Stale => f.write_str("the file handle is stale")?,
            AdminErrorKind::CrossDevice => {
                f.write_str("the places are on different file systems")?
            }
            AdminErrorKind::TooLarge(limit) => write!(f, "larger than the limit of {limit}")?,
            AdminErrorKind::Busy => f.write_str("an earlier operation has not come back yet")?,
            AdminErrorKind::TimedOut(after) => {
                write!(f, "no answer within {} ms", after.as_millis())?;
            }
            AdminErrorKind::Unknown => f.write_str(
                "the connection broke in the middle of the call, so its outcome is not known",
            )?,
            AdminErrorKind::Protocol(text) => write!(f, "the server's answer is wrong: {text}")?,
            AdminErrorKind::Other(errno) => {
                f.write_str(&std::io::Error::from_raw_os_error(*errno).to_string())?;
            }
            AdminErrorKind::Reach(_) => {}
        }
        Ok(())
    }
}

impl fmt::Display for AdminError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let AdminErrorKind::Reach(error) = &self.kind {
            return write!(f, "could not {} {}: {error}", self.op, self.path);
        }
        Told(self).fmt(f)?;
        match self.hint() {
            Some(hint) => write!(f, "; {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for AdminError {}
