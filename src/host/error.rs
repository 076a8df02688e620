//! What attaching volumes to this host and looking at them can fail with; the texts are what users
//! see.

use std::io;
use std::path::PathBuf;

use rustix::io::Errno;

use super::holders::names;
use crate::fence::GuardError;
use crate::fuse::{self, FuseError};
use crate::kernel::MountError;
use crate::sys::holders::Holder;
use crate::volume::{OptionsError, VolumeName};
use nfs::address::Share;
use nfs::probe::ReachError;

/// An error of this host; the text says what happened, at which step, and what to do next.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HostError {
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error(transparent)]
    Fuse(#[from] FuseError),
    #[error(transparent)]
    Guard(#[from] GuardError),
    #[error(transparent)]
    Reach(Box<ReachError>),
    #[error("this host has no data path. {kernel}. {fuse}")]
    NoDataPath {
        kernel: Box<MountError>,
        fuse: Box<FuseError>,
    },
    #[error("{0}; leave it out, or set data_path=kernel")]
    FuseOptions(fuse::OptionError),
    #[error(
        "share {0}: the FUSE data path speaks NFSv3, which the server does not offer; enable \
         NFSv3 on it, or use data_path=kernel on a host whose kernel has NFS"
    )]
    FuseNeedsV3(Share),
    #[error("the options of the admin mount: {0}")]
    AdminOptions(OptionsError),
    #[error("volume {0} was unmounted by somebody else as soon as it was mounted; try again")]
    Vanished(VolumeName),
    #[error(
        "volume {name}: no other host gets it yet, because not all that was written is known to be \
         on the server, or something still uses it here. It is let go of as soon as that ends: {source}"
    )]
    Kept {
        name: VolumeName,
        #[source]
        source: Box<MountError>,
    },
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
    #[error(
        "volume {0} is still held by a container that outlived its engine's record of it; stop \
         that first (`nfsvol abort {0}` frees it by force)"
    )]
    LeftToContainers(VolumeName),
    #[error(
        "volume {0} was mounted a moment ago for a container that is being started; try again in \
         half a minute, or stop the container"
    )]
    Starting(VolumeName),
    #[error("another nfsvol runs with the state directory {}; stop it first, or name another (--state-dir)", .0.display())]
    Running(PathBuf),
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

impl From<ReachError> for HostError {
    fn from(error: ReachError) -> Self {
        Self::Reach(Box::new(error))
    }
}

impl HostError {
    /// Makes an error of what the system said while this was done to the state directory.
    pub(crate) fn state<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::State {
            what,
            source: source.into(),
        }
    }

    /// Whether the same call may succeed later without anybody changing anything.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Reach(error) => error.is_transient(),
            Self::Fuse(error) => RETRIED
                .iter()
                .chain(&[Errno::TIMEDOUT])
                .any(|e| e.raw_os_error() == error.errno()),
            Self::Vanished(_) | Self::Guard(GuardError::Fencing(_)) => true,
            Self::Mount(error) => {
                error.is_unresponsive()
                    || error.errno().is_some_and(|errno| RETRIED.contains(&errno))
            }
            _ => false,
        }
    }
}
