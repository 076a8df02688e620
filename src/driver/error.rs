//! What a call to the driver can fail with; the texts are what users see.

use super::membership;
use crate::cluster::{Holding, MemberError};
use crate::home::CatalogError;
use crate::host::HostError;
use crate::local_server::LocalServerError;
use crate::volume::name::NameError;
use crate::volume::{OptionError, VolumeName};
use nfs::address::{Share, SharePath};
use nfs::admin::AdminError;
use nfs::probe::ReachError;

/// An error of a call; the text says what happened, at which step, and what to do next.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DriverError {
    #[error(transparent)]
    Name(#[from] NameError),
    #[error(transparent)]
    Options(#[from] OptionError),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    Reach(Box<ReachError>),
    #[error(transparent)]
    Host(#[from] HostError),
    #[error(transparent)]
    Embedded(#[from] LocalServerError),
    #[error(
        "no such volume: {0}; it may have been removed by another host: `nfsvol trash ls` lists \
         what can be restored"
    )]
    Absent(VolumeName),
    #[error(transparent)]
    Cluster(#[from] MemberError),
    #[error(
        "volume {name} is in use by {}; stop that first. If the host is dead, its hold ends by \
         itself within {} s", membership::names(.holdings), longest(.holdings)
    )]
    HeldElsewhere {
        name: VolumeName,
        holdings: Vec<Holding>,
    },
    #[error(
        "volume {name} is exclusive and {} has it since {}; this host waited until its deadline. \
         Stop it there; if that host is dead, it is free within {} s", membership::names(std::slice::from_ref(.holding)),
        crate::layout::rfc3339(.holding.hold.since), .holding.left.as_secs() + 1
    )]
    Taken {
        name: VolumeName,
        holding: Box<Holding>,
    },
    #[error("the mount ID is empty: a client of the volume plugin protocol sends one")]
    NoId,
    #[error("share {0} is not among those that --allow-share permits on this host")]
    NotAllowed(Share),
    #[error(
        "mount option {0} is not among those that --allow-option permits volumes on this host; leave \
         it out, or have it allowed"
    )]
    OptionNotAllowed(String),
    #[error(
        "share {0} with directory {1} lies in a directory .nfsvol, which belongs to the driver; name \
         another directory"
    )]
    OwnDirectory(Share, SharePath),
    #[error(
        "share {0}: its server speaks only NFSv4, for which this host's kernel needs an NFS client, \
         and it has none; load its modules (modprobe nfsv4), or enable NFSv3 on the server"
    )]
    OnlyV4(Share),
    #[error(
        "volume {0} is mounted by the kernel's NFS client, which nothing can abort: stop its \
         containers; `umount -f` on its share may end their waiting"
    )]
    AbortByKernel(VolumeName),
    #[error("volume {0} is not mounted on this host; `nfsvol ls` shows where it is")]
    NotMounted(VolumeName),
    #[error(
        "volume {0}: its share did not answer before the deadline (--mount-deadline); look at the \
         server's load and log: the call is safe to repeat"
    )]
    Late(VolumeName),
}

/// How long, in seconds, until all of these are over if their hosts are dead.
fn longest(holdings: &[Holding]) -> u64 {
    let left = holdings.iter().map(|holding| holding.left).max();
    left.map_or(0, |left| left.as_secs() + 1)
}

impl From<ReachError> for DriverError {
    fn from(error: ReachError) -> Self {
        Self::Reach(Box::new(error))
    }
}

impl From<AdminError> for DriverError {
    fn from(error: AdminError) -> Self {
        CatalogError::from(error).into()
    }
}

impl DriverError {
    /// Whether the same call may succeed later without anybody changing anything.
    #[must_use]
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Catalog(error) => error.is_transient(),
            Self::Reach(error) => error.is_transient(),
            Self::Host(error) => error.is_transient(),
            Self::Cluster(error) => error.is_transient(),
            _ => false,
        }
    }
}
