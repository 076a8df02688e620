//! The settings of a volume's FUSE data path, in the words of NFS mount options (nfs(5)).

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::volume::MountOptions;
use crate::volume::mount_options::{OnFuse, Word};

/// The most data in one READ or WRITE call, in bytes: the most that FUSE hands over at once.
pub(crate) const MAX_IO: u32 = 1 << 20;
/// The least data in one READ or WRITE call, in bytes.
const MIN_IO: u32 = 4096;

/// How long attributes are trusted, what a call carries, when it is given up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FuseOptions {
    /// Attributes of a file are trusted for this many seconds at least …
    pub acregmin: u32,
    /// … and at most; the time doubles while the file does not change.
    pub acregmax: u32,
    /// The same for directories, whose names are trusted as long.
    pub acdirmin: u32,
    pub acdirmax: u32,
    /// Every write is on the server before it returns.
    pub sync: bool,
    /// Bytes in one READ call; the server's preference when absent.
    pub rsize: Option<u32>,
    /// Bytes in one WRITE call; the server's preference when absent.
    pub wsize: Option<u32>,
    /// Parallel connections, 1 to 16.
    pub nconnect: u32,
    /// Seconds until a request without an answer fails; 0 waits for ever.
    pub io_timeout: u32,
    /// Programs on the volume cannot be run.
    pub noexec: bool,
    /// Connections come from any port, not from one below 1024.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub noresvport: bool,
}

impl Default for FuseOptions {
    /// The kernel client's cache times, and ten minutes for a request: longer than a server's
    /// restart or failover takes.
    fn default() -> Self {
        Self {
            acregmin: 3,
            acregmax: 60,
            acdirmin: 30,
            acdirmax: 60,
            sync: false,
            rsize: None,
            wsize: None,
            nconnect: 1,
            io_timeout: 600,
            noexec: false,
            noresvport: false,
        }
    }
}

/// Why a mount option cannot be used with the FUSE data path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    #[error("option {0:?} is not known to the FUSE data path")]
    Unknown(String),
    #[error(
        "option {option:?} needs the kernel's NFS client: {reason}; leave it out, or say \
         data_path=kernel for hosts whose kernel has one"
    )]
    Kernel {
        option: String,
        reason: &'static str,
    },
}

impl FuseOptions {
    /// What mount options ask for. Returns warnings for those that change nothing here.
    ///
    /// # Errors
    /// [`OptionError`] for options that ask for what NFSv3 in user space cannot give.
    pub fn of(mount: &MountOptions) -> Result<(Self, Vec<String>), OptionError> {
        let mut options = Self::default();
        let mut warnings = Vec::new();
        for (word, on_fuse) in mount.for_fuse() {
            let option = word.to_string();
            match on_fuse {
                OnFuse::Kept => options.take(word),
                OnFuse::Only(value, _) if word.value.as_deref() == Some(value) => {}
                OnFuse::Only(_, reason) | OnFuse::Never(reason) => {
                    return Err(OptionError::Kernel { option, reason });
                }
                OnFuse::NoEffect => {
                    warnings.push(format!(
                        "option {option:?} has no effect on the FUSE data path"
                    ));
                }
                OnFuse::IoTimeout => warnings.push(format!(
                    "option {option:?} has no effect on the FUSE data path: io_timeout={} s says \
                     when a request fails",
                    options.io_timeout
                )),
                OnFuse::LocksHere => warnings.push(
                    "locks work between the containers of this host, not across hosts".to_owned(),
                ),
                OnFuse::No => return Err(OptionError::Unknown(option)),
            }
        }
        options.acregmax = options.acregmax.max(options.acregmin);
        options.acdirmax = options.acdirmax.max(options.acdirmin);
        Ok((options, warnings))
    }

    fn take(&mut self, word: &Word) {
        let number = word.number().unwrap_or_default();
        let size = || Some(number.clamp(MIN_IO, MAX_IO) / MIN_IO * MIN_IO);
        match word.name {
            "acregmin" => self.acregmin = number,
            "acregmax" => self.acregmax = number,
            "acdirmin" => self.acdirmin = number,
            "acdirmax" => self.acdirmax = number,
            "actimeo" => {
                (self.acregmin, self.acregmax) = (number, number);
                (self.acdirmin, self.acdirmax) = (number, number);
            }
            "noac" => {
                (self.acregmin, self.acregmax) = (0, 0);
                (self.acdirmin, self.acdirmax) = (0, 0);
                self.sync = true;
            }
            "sync" => self.sync = true,
            "rsize" => self.rsize = size(),
            "wsize" => self.wsize = size(),
            "nconnect" => self.nconnect = number,
            "io_timeout" => self.io_timeout = number,
            "noexec" => self.noexec = true,
            "noresvport" => self.noresvport = true,
            // So it is anyway.
            _ => {}
        }
    }

    /// Deadline of one request; `None` waits for ever.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        (self.io_timeout > 0).then(|| Duration::from_secs(self.io_timeout.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<(FuseOptions, Vec<String>), OptionError> {
        FuseOptions::of(&text.parse().unwrap())
    }

    #[test]
    fn the_words_of_nfs_set_the_caches() {
        let (options, warnings) = of("nfsvers=3,nolock,actimeo=7,rsize=70000,nconnect=4").unwrap();
        assert_eq!((options.acregmin, options.acdirmax), (7, 7));
        assert_eq!(options.rsize, Some(69632));
        assert_eq!(options.nconnect, 4);
        assert!(warnings.is_empty());
        let (options, _) = of("noresvport").unwrap();
        assert!(options.noresvport && !FuseOptions::default().noresvport);
        assert_eq!(of("").unwrap(), (FuseOptions::default(), Vec::new()));
    }

    #[test]
    fn no_attribute_cache_means_synchronous_writes() {
        let (options, _) = of("noac").unwrap();
        assert!(options.sync);
        assert_eq!(options.acregmax, 0);
    }

    #[test]
    fn what_user_space_cannot_give_is_refused_by_name() {
        for word in [
            "nfsvers=4.1",
            "sec=krb5p",
            "proto=rdma",
            "sec=sys:krb5",
            "suid",
            "dev",
            "xprtsec=tls",
            "write=eager",
            "namlen=100",
            "context=system_u:object_r:nfs_t:s0",
        ] {
            let error = of(word).unwrap_err();
            assert!(matches!(error, OptionError::Kernel { .. }), "{word}");
            let told = error.to_string();
            assert!(
                told.contains(word) && told.contains("data_path=kernel"),
                "{told}"
            );
        }
    }

    #[test]
    fn what_proc_mounts_shows_is_taken() {
        let (options, _) = of(
            "rw,relatime,vers=3,rsize=131072,wsize=131072,namlen=255,hard,nolock,\
            proto=tcp,timeo=600,retrans=2,sec=sys,mountvers=3,mountport=20048,mountproto=udp,\
            local_lock=all,seclabel",
        )
        .unwrap();
        assert_eq!(options.rsize, Some(131_072));
        let (_, warnings) = of("max_connect=2,lazytime,strictatime,diratime,migration").unwrap();
        assert_eq!(warnings.len(), 5, "{warnings:?}");
        let (_, warnings) =
            of("dirsync,nolazytime,nofsc,nosoftreval,write=lazy,xprtsec=none").unwrap();
        assert!(warnings.is_empty(), "{warnings:?}");
    }

    #[test]
    fn what_changes_nothing_is_warned_about() {
        let (_, warnings) = of("soft,timeo=50,io_timeout=7").unwrap();
        assert_eq!(warnings.len(), 2);
        assert!(warnings[0].contains("io_timeout=7 s"));
    }
}
