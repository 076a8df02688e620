//! How a procedure of NFSv3 fails.

use nfs3_types::nfs3::nfsstat3;

use crate::rpc::RpcError;

/// The statuses of RFC 1813 section 2.6.
pub type Nfs3Status = nfsstat3;

/// Why a procedure did not succeed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NfsError {
    /// The server said so.
    #[error("{0}")]
    Status(Nfs3Status),
    /// The server said so, but to a repetition: the connection was lost in the middle, the first
    /// call may have been carried out, and this status may be only its consequence. See each
    /// procedure of [`super::Nfs3`] for what it may mean there.
    #[error("{0}, in answer to a call that was repeated after a lost connection")]
    Uncertain(Nfs3Status),
    /// The server answered with a number that RFC 1813 does not know.
    #[error("the server answered with the unknown status {0}")]
    UnknownStatus(u32),
    #[error(transparent)]
    Rpc(#[from] RpcError),
}

impl NfsError {
    /// The status, certain or not.
    #[must_use]
    pub fn status(&self) -> Option<Nfs3Status> {
        match self {
            Self::Status(status) | Self::Uncertain(status) => Some(*status),
            Self::UnknownStatus(_) | Self::Rpc(_) => None,
        }
    }

    /// The errno (a positive `libc` constant) that an application should see.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Status(status) | Self::Uncertain(status) => status_errno(*status),
            Self::UnknownStatus(_) => libc::EIO,
            Self::Rpc(error) => error.errno(),
        }
    }
}

/// The errno (a positive `libc` constant) of a status: as the kernel's client maps them
/// (`nfs_stat_to_errno`), but without its private errnos.
pub(crate) fn status_errno(status: Nfs3Status) -> i32 {
    use nfsstat3 as s;
    match status {
        s::NFS3ERR_PERM => libc::EPERM,
        s::NFS3ERR_NOENT => libc::ENOENT,
        s::NFS3ERR_NXIO => libc::ENXIO,
        s::NFS3ERR_ACCES => libc::EACCES,
        s::NFS3ERR_EXIST => libc::EEXIST,
        s::NFS3ERR_XDEV => libc::EXDEV,
        s::NFS3ERR_NODEV => libc::ENODEV,
        s::NFS3ERR_NOTDIR => libc::ENOTDIR,
        s::NFS3ERR_ISDIR => libc::EISDIR,
        s::NFS3ERR_INVAL | s::NFS3ERR_BADTYPE => libc::EINVAL,
        s::NFS3ERR_FBIG => libc::EFBIG,
        s::NFS3ERR_NOSPC => libc::ENOSPC,
        s::NFS3ERR_ROFS => libc::EROFS,
        s::NFS3ERR_MLINK => libc::EMLINK,
        s::NFS3ERR_NAMETOOLONG => libc::ENAMETOOLONG,
        s::NFS3ERR_NOTEMPTY => libc::ENOTEMPTY,
        s::NFS3ERR_DQUOT => libc::EDQUOT,
        s::NFS3ERR_STALE | s::NFS3ERR_BADHANDLE => libc::ESTALE,
        s::NFS3ERR_REMOTE => libc::EREMOTE,
        s::NFS3ERR_NOTSUPP => libc::EOPNOTSUPP,
        // Retried until the deadline; what is left then is a server too busy to answer.
        s::NFS3ERR_JUKEBOX => libc::ETIMEDOUT,
        // An error without an error is one of the server's.
        s::NFS3_OK
        | s::NFS3ERR_IO
        | s::NFS3ERR_NOT_SYNC
        | s::NFS3ERR_BAD_COOKIE
        | s::NFS3ERR_TOOSMALL
        | s::NFS3ERR_SERVERFAULT => libc::EIO,
    }
}

/// The status behind a number.
pub(super) fn status(number: u32) -> Option<Nfs3Status> {
    use nfs3_types::xdr_codec::Unpack;
    nfsstat3::unpack(&mut number.to_be_bytes().as_ref())
        .ok()
        .map(|(status, _)| status)
}
