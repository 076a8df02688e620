//! Acting as the caller: the thread takes the caller's user and groups for the time of one
//! operation, and the kernel checks permissions as it does for any local process.
//!
//! Limit: AUTH_UNIX is believed, as every NFS server with `sec=sys` does, and root stays root
//! (`no_root_squash`): Docker gives files in a new volume to their owners.

use rustix::io::Errno;
use rustix::thread::{Gid, Uid, set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use super::xdr::Caller;

/// The caller's identity, given back when dropped.
#[derive(Debug)]
#[must_use]
pub(super) struct Acting {
    switched: bool,
}

impl Acting {
    /// This thread acts as root, whose privileges are the process's own.
    pub(super) fn root() -> Self {
        Self { switched: false }
    }

    /// Takes the caller's user and groups.
    ///
    /// # Errors
    /// `EPERM` when the process is not root, `EINVAL` for the id that means "none" (2³²-1).
    pub(super) fn caller(caller: &Caller) -> Result<Self, Errno> {
        if (caller.uid, caller.gid) == (0, 0) {
            return Ok(Self::root());
        }
        if caller.uid == u32::MAX || caller.gid == u32::MAX || caller.groups.contains(&u32::MAX) {
            return Err(Errno::INVAL);
        }
        let groups: Vec<Gid> = caller.groups.iter().map(|&g| Gid::from_raw(g)).collect();
        // From here on a failure part-way is put right by the drop.
        let acting = Self { switched: true };
        set_thread_groups(&groups)?;
        set_thread_res_gid(None, Gid::from_raw(caller.gid), None)?;
        if caller.uid != 0 {
            set_thread_res_uid(None, Uid::from_raw(caller.uid), None)?;
        }
        Ok(acting)
    }
}

impl Drop for Acting {
    fn drop(&mut self) {
        if !self.switched {
            return;
        }
        let restored = set_thread_res_uid(None, rustix::process::getuid(), None)
            .and_then(|()| set_thread_res_gid(None, rustix::process::getgid(), None))
            .and_then(|()| set_thread_groups(&[]));
        // Without root there was nothing to take, and nothing is to be given back.
        if let Err(error) = restored
            && rustix::process::getuid().is_root()
        {
            // The next operation on this thread would run as the wrong user.
            tracing::error!(%error, "cannot become root again; ending the process");
            std::process::abort();
        }
    }
}
