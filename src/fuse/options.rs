//! The settings of a volume's FUSE data path, in the words of NFS mount options (nfs(5)).

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The most data in one READ or WRITE call, in bytes: the most that FUSE hands over at once.
pub const MAX_IO: u32 = 1 << 20;
/// The least data in one READ or WRITE call, in bytes.
const MIN_IO: u32 = 4096;
/// Parallel connections at most, as with the kernel's client.
const MAX_CONNECTIONS: u32 = 16;

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
    #[error("option {option:?}: {expected}")]
    Value {
        option: String,
        expected: &'static str,
    },
    #[error("option {option:?} needs the kernel's NFS client: {reason}")]
    Kernel {
        option: String,
        reason: &'static str,
    },
}

impl FuseOptions {
    /// Reads NFS mount options. Returns warnings for those that change nothing here.
    ///
    /// # Errors
    /// [`OptionError`] for options that are unknown, out of range, or ask for what NFSv3 in user
    /// space cannot give.
    pub fn from_words<'a>(
        words: impl IntoIterator<Item = &'a str>,
    ) -> Result<(Self, Vec<String>), OptionError> {
        let mut options = Self::default();
        let mut warnings = Vec::new();
        for word in words.into_iter().map(str::trim).filter(|w| !w.is_empty()) {
            if let Some(warning) = options.take(word)? {
                warnings.push(warning);
            }
        }
        options.acregmax = options.acregmax.max(options.acregmin);
        options.acdirmax = options.acdirmax.max(options.acdirmin);
        Ok((options, warnings))
    }

    fn take(&mut self, word: &str) -> Result<Option<String>, OptionError> {
        let (key, value) = word.split_once('=').unwrap_or((word, ""));
        let bad = |expected| OptionError::Value {
            option: word.to_owned(),
            expected,
        };
        let kernel = |reason| OptionError::Kernel {
            option: word.to_owned(),
            reason,
        };
        let seconds = || value.parse::<u32>().map_err(|_| bad("a number of seconds"));
        let size = || {
            value
                .parse::<u32>()
                .map(|n| n.clamp(MIN_IO, MAX_IO) / MIN_IO * MIN_IO)
                .map_err(|_| bad("a number of bytes"))
        };
        match key {
            "acregmin" => self.acregmin = seconds()?,
            "acregmax" => self.acregmax = seconds()?,
            "acdirmin" => self.acdirmin = seconds()?,
            "acdirmax" => self.acdirmax = seconds()?,
            "actimeo" => {
                let all = seconds()?;
                (self.acregmin, self.acregmax) = (all, all);
                (self.acdirmin, self.acdirmax) = (all, all);
            }
            "noac" => {
                (self.acregmin, self.acregmax) = (0, 0);
                (self.acdirmin, self.acdirmax) = (0, 0);
                self.sync = true;
            }
            "ac" | "async" | "cto" => {}
            "sync" => self.sync = true,
            "rsize" => self.rsize = Some(size()?),
            "wsize" => self.wsize = Some(size()?),
            "nconnect" => {
                self.nconnect = value
                    .parse()
                    .ok()
                    .filter(|n| (1..=MAX_CONNECTIONS).contains(n))
                    .ok_or_else(|| bad("1 to 16"))?;
            }
            "io_timeout" => self.io_timeout = seconds()?,
            "noexec" => self.noexec = true,
            "exec" => self.noexec = false,
            "noresvport" => self.noresvport = true,
            "resvport" => self.noresvport = false,
            "vers" | "nfsvers" if value == "3" => {}
            "v3" | "nfsvers3" => {}
            "vers" | "nfsvers" | "v4" | "v4.0" | "v4.1" | "v4.2" | "minorversion" => {
                return Err(kernel("the FUSE data path speaks NFS version 3"));
            }
            "sec" if value == "sys" => {}
            "sec" => return Err(kernel("the FUSE data path authenticates with sec=sys")),
            "proto" | "mountproto" if matches!(value, "tcp" | "tcp6") => {}
            "proto" | "mountproto" => return Err(kernel("the FUSE data path uses TCP")),
            "tcp" | "nolock" | "local_lock" | "hard" | "nosuid" | "nodev" | "rw" | "ro"
            | "addr" | "port" | "mountport" | "noacl" | "_netdev" => {}
            "soft" | "softerr" | "timeo" | "retrans" | "softreval" | "intr" | "nointr" | "bg"
            | "fg" | "retry" => {
                return Ok(Some(format!(
                    "option {word:?} has no effect on the FUSE data path: io_timeout={} s says \
                     when a request fails",
                    self.io_timeout
                )));
            }
            "lock" => {
                return Ok(Some(
                    "locks work between the containers of this host, not across hosts".to_owned(),
                ));
            }
            "noatime" | "nodiratime" | "relatime" | "lookupcache" | "nocto" | "acl" | "fsc"
            | "nordirplus" | "rdirplus" | "sharecache" | "nosharecache" => {
                return Ok(Some(format!(
                    "option {word:?} has no effect on the FUSE data path"
                )));
            }
            _ => return Err(OptionError::Unknown(word.to_owned())),
        }
        Ok(None)
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

    #[test]
    fn the_words_of_nfs_set_the_caches() {
        let (options, warnings) =
            FuseOptions::from_words("nfsvers=3,nolock,actimeo=7,rsize=70000,nconnect=4".split(','))
                .unwrap();
        assert_eq!((options.acregmin, options.acdirmax), (7, 7));
        assert_eq!(options.rsize, Some(69632));
        assert_eq!(options.nconnect, 4);
        assert!(warnings.is_empty());
        let (options, _) = FuseOptions::from_words(["noresvport"]).unwrap();
        assert!(options.noresvport && !FuseOptions::default().noresvport);
    }

    #[test]
    fn no_attribute_cache_means_synchronous_writes() {
        let (options, _) = FuseOptions::from_words(["noac"]).unwrap();
        assert!(options.sync);
        assert_eq!(options.acregmax, 0);
    }

    #[test]
    fn what_user_space_cannot_give_is_refused_by_name() {
        for word in ["nfsvers=4.1", "sec=krb5p", "proto=rdma"] {
            let error = FuseOptions::from_words([word]).unwrap_err();
            assert!(matches!(error, OptionError::Kernel { .. }), "{word}");
            assert!(error.to_string().contains(word));
        }
        assert!(FuseOptions::from_words(["frobnicate"]).is_err());
        assert!(FuseOptions::from_words(["nconnect=17"]).is_err());
    }

    #[test]
    fn what_changes_nothing_is_warned_about() {
        let (_, warnings) = FuseOptions::from_words(["soft", "timeo=50"]).unwrap();
        assert_eq!(warnings.len(), 2);
        assert!(warnings[0].contains("io_timeout"));
    }
}
