//! What can go wrong on the kernel data path, said with its step and a next step.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use rustix::io::Errno;

use crate::volume::{NfsVersion, VolumeName};
use nfs::address::{Share, SharePath};

/// The steps from a reached server to a bound volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Mounting the share.
    MountShare,
    /// Opening the data directory below the mounted share.
    OpenDirectory,
    /// Binding the data directory to the volume's mount point.
    Bind,
    /// Writing back what the volume's containers wrote.
    Flush,
    /// Taking a mount away.
    Unmount,
    /// Asking whether a mount still answers.
    Check,
}

impl Step {
    /// At most 15 bytes, the kernel's limit for a thread's name.
    pub(super) fn thread_name(self) -> &'static str {
        match self {
            Self::MountShare => "mount-share",
            Self::OpenDirectory => "mount-open",
            Self::Bind => "mount-bind",
            Self::Flush => "mount-flush",
            Self::Unmount => "mount-unmount",
            Self::Check => "mount-check",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MountShare => "mount the share",
            Self::OpenDirectory => "open the data directory",
            Self::Bind => "bind the data directory",
            Self::Flush => "write back",
            Self::Unmount => "unmount",
            Self::Check => "check",
        })
    }
}

/// One NFS version that was tried, and what the kernel said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    pub version: NfsVersion,
    pub errno: Errno,
    /// The kernel's own words, where its NFS client had any.
    pub detail: String,
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NFSv{}: {}", self.version, meaning(self.errno))?;
        if self.detail.is_empty() {
            Ok(())
        } else {
            write!(f, " ({})", self.detail)
        }
    }
}

/// An error of the kernel data path.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    #[error("kernel data path: {reason}; {hint}")]
    NoKernelNfs { reason: String, hint: &'static str },

    #[error(
        "mount {share}: server {addr} answers neither NFSv3 nor NFSv4 as asked for ({asked}); \
             next: name a version that the server has, for example -o options=nfsvers=3"
    )]
    NoCommonVersion {
        share: Share,
        addr: IpAddr,
        asked: String,
    },

    #[error("mount {share} from {addr}: {}; next: {}", join(.attempts), next_step(.attempts))]
    Refused {
        share: Share,
        addr: IpAddr,
        attempts: Vec<Attempt>,
    },

    #[error(
        "mount {share}: this kernel does not take the option {option:?} ({detail}); \
             next: create the volume without it, or use a newer kernel"
    )]
    Option {
        share: Share,
        option: String,
        detail: String,
    },

    #[error(
        "{share}: \"{path}\" is a symbolic link, and a data directory is never looked for behind \
             one (ELOOP); next: name the directory itself with -o subdir="
    )]
    Symlink { share: Share, path: SharePath },

    #[error(
        "{share}: \"{path}\" is the root of another file system on the server (EXDEV); \
             next: name it as the share, for example -o share={share}/{path}"
    )]
    NestedExport { share: Share, path: SharePath },

    #[error("{share}: the data directory \"{path}\" does not exist")]
    DataDirMissing { share: Share, path: SharePath },

    #[error(
        "{share}: \"{path}\" is not a directory; next: move the file aside, or choose another \
             directory with -o subdir="
    )]
    NotADirectory { share: Share, path: SharePath },

    #[error("{share}: opening \"{path}\": {}; next: {}", meaning(*.errno), directory_hint(*.errno))]
    Directory {
        share: Share,
        path: SharePath,
        errno: Errno,
    },

    #[error(
        "{share}: the server no longer knows what was mounted (ESTALE), again after a fresh \
             mount; next: see on the server whether the export was replaced or withdrawn"
    )]
    Stale { share: Share },

    #[error(
        "{share}: no answer from the server within {after:.1?} (step: {step}); next: see \
             whether the server is up; the volume's data is untouched, and the call can be repeated"
    )]
    Timeout {
        share: String,
        step: Step,
        after: Duration,
    },

    #[error(
        "{share}: the server is not responding: an earlier call (step: {step}) has waited for \
             {since:.0?}; next: bring the server back, and calls work again by themselves"
    )]
    Busy {
        share: String,
        step: Step,
        since: Duration,
    },

    #[error("volume {volume}: {what}: {}; next: {hint}", meaning(*.errno))]
    Volume {
        volume: VolumeName,
        what: &'static str,
        errno: Errno,
        hint: &'static str,
    },

    #[error("{step}: {what}: {source}")]
    Local {
        step: Step,
        what: String,
        source: io::Error,
    },
}

impl MountError {
    /// The kernel's error number, where one is at the bottom of this.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::NoKernelNfs { .. } => Some(Errno::NODEV),
            Self::NoCommonVersion { .. } => Some(Errno::PROTONOSUPPORT),
            Self::Refused { attempts, .. } => attempts.last().map(|attempt| attempt.errno),
            Self::Option { .. } => Some(Errno::INVAL),
            Self::Symlink { .. } => Some(Errno::LOOP),
            Self::NestedExport { .. } => Some(Errno::XDEV),
            Self::DataDirMissing { .. } => Some(Errno::NOENT),
            Self::NotADirectory { .. } => Some(Errno::NOTDIR),
            Self::Directory { errno, .. } | Self::Volume { errno, .. } => Some(*errno),
            Self::Stale { .. } => Some(Errno::STALE),
            Self::Timeout { .. } => Some(Errno::TIMEDOUT),
            Self::Busy { .. } => Some(Errno::BUSY),
            Self::Local { source, .. } => Errno::from_io_error(source),
        }
    }

    /// Whether the server did not answer, so that the same call may succeed later.
    #[must_use]
    pub fn is_unresponsive(&self) -> bool {
        match self {
            Self::Timeout { .. } | Self::Busy { .. } => true,
            Self::Refused { .. } => self.errno() == Some(Errno::TIMEDOUT),
            _ => false,
        }
    }
}

fn join(attempts: &[Attempt]) -> String {
    attempts
        .iter()
        .map(Attempt::to_string)
        .collect::<Vec<_>>()
        .join("; ")
}

/// An error number in the words of NFS.
fn meaning(errno: Errno) -> String {
    let text = match errno {
        Errno::ACCESS => "the server denied access",
        Errno::PERM => "the server did not permit it",
        Errno::NOENT => "the server has no such export",
        Errno::PROTONOSUPPORT => "the server does not speak this version",
        Errno::CONNREFUSED => "the server refused the connection",
        Errno::TIMEDOUT => "the server did not answer in time",
        Errno::HOSTUNREACH | Errno::NETUNREACH => "no route to the server",
        Errno::STALE => "the server no longer knows the export",
        Errno::NODEV => "this kernel's NFS client does not have this version",
        Errno::INVAL => "the kernel or the server refused the parameters",
        Errno::IO => "input/output error",
        _ => return io::Error::from(errno).to_string(),
    };
    format!("{text} ({})", name(errno))
}

/// The symbolic name of the numbers that appear above.
fn name(errno: Errno) -> &'static str {
    match errno {
        Errno::ACCESS => "EACCES",
        Errno::PERM => "EPERM",
        Errno::NOENT => "ENOENT",
        Errno::PROTONOSUPPORT => "EPROTONOSUPPORT",
        Errno::CONNREFUSED => "ECONNREFUSED",
        Errno::TIMEDOUT => "ETIMEDOUT",
        Errno::HOSTUNREACH => "EHOSTUNREACH",
        Errno::NETUNREACH => "ENETUNREACH",
        Errno::STALE => "ESTALE",
        Errno::NODEV => "ENODEV",
        Errno::INVAL => "EINVAL",
        _ => "EIO",
    }
}

/// What to do about a share that could not be mounted: the most telling attempt decides.
fn next_step(attempts: &[Attempt]) -> &'static str {
    let any = |errnos: &[Errno]| {
        attempts
            .iter()
            .any(|attempt| errnos.contains(&attempt.errno))
    };
    if let Some(way_out) = super::trap::way_out(attempts) {
        way_out
    } else if any(&[Errno::NOENT]) {
        "see which exports the server has for this host (showmount -e SERVER); with NFSv4 alone, paths begin at its pseudo root"
    } else if any(&[Errno::ACCESS, Errno::PERM]) {
        "allow this host in the server's exports, and check sec= (exportfs -v on a Linux server)"
    } else if any(&[
        Errno::TIMEDOUT,
        Errno::HOSTUNREACH,
        Errno::NETUNREACH,
        Errno::CONNREFUSED,
    ]) {
        "see whether the NFS service runs, and whether a firewall drops its ports"
    } else if any(&[Errno::NODEV]) {
        "load the kernel's NFS modules (modprobe nfsv3; modprobe nfsv4), or use -o data_path=fuse"
    } else if any(&[Errno::PROTONOSUPPORT]) {
        "choose a version that the server has with -o options=nfsvers="
    } else {
        "the kernel's log (dmesg) may say more"
    }
}

fn directory_hint(errno: Errno) -> &'static str {
    match errno {
        Errno::ACCESS | Errno::PERM => {
            "the export squashes root: let its anonymous user search the directories above, or export with no_root_squash"
        }
        Errno::IO | Errno::TIMEDOUT => "see whether the server is up; the call can be repeated",
        _ => "see the directory on the server",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_lists_what_was_tried_and_a_next_step() {
        let attempt = |version, errno, detail: &str| Attempt {
            version,
            errno,
            detail: detail.to_owned(),
        };
        let error = MountError::Refused {
            share: "nas:/export".parse().unwrap(),
            addr: "10.0.0.1".parse().unwrap(),
            attempts: vec![
                attempt(NfsVersion::V4_2, Errno::PROTONOSUPPORT, ""),
                attempt(NfsVersion::V3, Errno::ACCESS, "NFS: mount denied"),
            ],
        };
        assert_eq!(
            error.to_string(),
            "mount nas:/export from 10.0.0.1: NFSv4.2: the server does not speak this version \
             (EPROTONOSUPPORT); NFSv3: the server denied access (EACCES) (NFS: mount denied); \
             next: allow this host in the server's exports, and check sec= (exportfs -v on a \
             Linux server)"
        );
        assert_eq!(error.errno(), Some(Errno::ACCESS));
    }

    #[test]
    fn a_symlink_is_named_with_its_errno() {
        let error = MountError::Symlink {
            share: "nas:/export".parse().unwrap(),
            path: SharePath::parse("a/b").unwrap(),
        };
        assert!(error.to_string().contains("symbolic link") && error.to_string().contains("ELOOP"));
    }
}
