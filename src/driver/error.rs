//! What a call to the driver can fail with; the texts are what users see.

use std::io;

use rustix::io::Errno;

use super::membership;
use crate::cluster::{Holding, MemberError};
use crate::fence::GuardError;
use crate::fuse::{self, FuseError};
use crate::home::CatalogError;
use crate::kernel::{Holder, MountError};
use crate::local_server::LocalServerError;
use crate::nfs::address::{Share, SharePath};
use crate::nfs::admin::AdminError;
use crate::nfs::probe::ReachError;
use crate::volume::name::NameError;
use crate::volume::{OptionError, OptionsError, VolumeName};

/// An error of a call; the text says what happened, at which step, and what to do next.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    #[error(transparent)]
    Name(#[from] NameError),
    #[error(transparent)]
    Options(#[from] OptionError),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    Reach(Box<ReachError>),
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error(transparent)]
    Embedded(#[from] LocalServerError),
    #[error(
        "no such volume: {0}; it may have been removed by another host: `nfsvol trash ls` lists \
         what can be restored"
    )]
    Absent(VolumeName),
    #[error("volume {name} is in use by {}; stop that first", names(.holders))]
    InUse {
        name: VolumeName,
        holders: Vec<Holder>,
    },
    #[error(
        "volume {name} shows the same directory as volume {other}, which is mounted here; stop what \
         uses that first"
    )]
    SameDirectory { name: VolumeName, other: String },
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
        crate::home::rfc3339(.holding.hold.since), .holding.left.as_secs() + 1
    )]
    Taken {
        name: VolumeName,
        holding: Box<Holding>,
    },
    #[error(
        "volume {0} was mounted a moment ago for a container that is being started; try again in \
         half a minute, or stop the container"
    )]
    Starting(VolumeName),
    #[error("another nfsvol runs with the state directory {}; stop it first, or name another (--state-dir)", .0.display())]
    Running(std::path::PathBuf),
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
    #[error("the options of the admin mount: {0}")]
    AdminOptions(OptionsError),
    #[error("this host has no data path. {kernel}. {fuse}")]
    NoDataPath {
        kernel: Box<MountError>,
        fuse: Box<FuseError>,
    },
    #[error(transparent)]
    Fuse(#[from] FuseError),
    #[error(transparent)]
    Guard(#[from] GuardError),
    #[error(
        "volume {name}: no other host gets it yet, because not all that was written is known to be \
         on the server, or something still uses it here. It is let go of as soon as that ends: {source}"
    )]
    Kept {
        name: VolumeName,
        #[source]
        source: Box<MountError>,
    },
    #[error("{0}; leave it out, or set data_path=kernel")]
    FuseOptions(fuse::OptionError),
    #[error(
        "share {0}: the FUSE data path speaks NFSv3, which the server does not offer; enable \
         NFSv3 on it, or use data_path=kernel on a host whose kernel has NFS"
    )]
    FuseNeedsV3(Share),
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
    #[error("volume {0} was unmounted by somebody else as soon as it was mounted; try again")]
    Vanished(VolumeName),
    #[error(
        "volume {0} is still held by a container that outlived its engine's record of it; stop \
         that first (`nfsvol abort {0}` frees it by force)"
    )]
    LeftToContainers(VolumeName),
    #[error("state directory: {what}: {source}; free space or repair it, then try again")]
    State {
        what: &'static str,
        source: io::Error,
    },
}

/// What mount(2) answers while a server starts or moves.
const RETRIED: [Errno; 6] = [
    Errno::CONNREFUSED,
    Errno::CONNRESET,
    Errno::HOSTUNREACH,
    Errno::NETUNREACH,
    Errno::STALE,
    Errno::AGAIN,
];

/// How long, in seconds, until all of these are over if their hosts are dead.
fn longest(holdings: &[Holding]) -> u64 {
    let left = holdings.iter().map(|holding| holding.left).max();
    left.map_or(0, |left| left.as_secs() + 1)
}

fn names(holders: &[Holder]) -> String {
    let mut names: Vec<String> = holders.iter().map(membership::describe).collect();
    names.sort();
    names.dedup();
    names.join(", ")
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
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Catalog(error) => error.is_transient(),
            Self::Reach(error) => error.is_transient(),
            Self::Fuse(error) => RETRIED
                .iter()
                .chain(&[Errno::TIMEDOUT])
                .any(|e| e.raw_os_error() == error.errno()),
            Self::Vanished(_) | Self::Guard(GuardError::Fencing(_)) => true,
            Self::Cluster(error) => error.is_transient(),
            Self::Mount(error) => {
                error.is_unresponsive()
                    || error.errno().is_some_and(|errno| RETRIED.contains(&errno))
            }
            _ => false,
        }
    }
}
