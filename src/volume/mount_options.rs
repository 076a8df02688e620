//! NFS mount options as a user writes them: `nfsvers=4.1,nconnect=4,sec=krb5p,ro`.
//!
//! Every word is checked against nfs(5), so that a typo is told at `docker volume create`, with
//! the nearest valid word, and not at the first mount. The words fall into four kinds:
//! those of the NFS superblock, which volumes on one share mount have in common; those of the
//! single mount (`ro`, `nosuid`, ...), which become attributes of the volume's own bind; those
//! that only mean something in /etc/fstab, which are dropped; and those that would take away
//! from the driver what it decides itself (`addr=`, `clientaddr=`, ...), which are refused.
//!
//! Invariants: the printed form is sorted, holds the defaults, and parses back to an equal value;
//! no value holds a quote, white space or a control character, nor a comma but in a label of SELinux,
//! which is printed in quotes then, so no option can smuggle in another one.

mod words;

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use rustix::mount::MountAttrFlags;
use serde::{Deserialize, Serialize};

use self::words::{GROUP_MINOR, GROUP_PROTO, GROUP_RETRY, GROUP_VERS, parse};
pub(crate) use self::words::{OnFuse, Word};

/// The longest option text, in bytes: mount(2) passes at most one page of data.
const MAX_TEXT: usize = 2048;

/// Why mount options were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    #[error("mount option {word:?} is not known to nfs(5){}", suggestion(.nearest))]
    Unknown {
        word: String,
        nearest: Option<&'static str>,
    },
    #[error("mount option {word}={value}: expected {expected}")]
    Value {
        word: &'static str,
        value: String,
        expected: String,
    },
    #[error("mount option {word} is refused: {reason}")]
    Refused {
        word: &'static str,
        reason: &'static str,
    },
    #[error(
        "mount options hold {0}; a word is NAME or NAME=VALUE, and words are separated by commas"
    )]
    Characters(&'static str),
    #[error("mount options are longer than 2,048 bytes")]
    Long,
}

fn suggestion(nearest: &Option<&'static str>) -> String {
    nearest.map_or_else(String::new, |word| format!("; did you mean {word:?}?"))
}

/// A protocol version that the kernel can mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NfsVersion {
    V3,
    V4_0,
    V4_1,
    V4_2,
}

impl NfsVersion {
    /// As in the kernel's `vers=` option.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V3 => "3",
            Self::V4_0 => "4.0",
            Self::V4_1 => "4.1",
            Self::V4_2 => "4.2",
        }
    }

    #[must_use]
    pub fn is_v4(self) -> bool {
        self != Self::V3
    }
}

impl fmt::Display for NfsVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Checked mount options with the driver's defaults: `hard,nodev,nosuid`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MountOptions {
    /// By group, so that the last of several words about one thing wins, as in mount(8).
    words: BTreeMap<&'static str, Word>,
}

impl Default for MountOptions {
    fn default() -> Self {
        let word = |name, attribute| Word {
            name,
            value: None,
            attribute,
        };
        Self {
            words: BTreeMap::from([
                (GROUP_RETRY, word("hard", false)),
                ("suid", word("nosuid", true)),
                ("dev", word("nodev", true)),
            ]),
        }
    }
}

impl MountOptions {
    fn value(&self, group: &str) -> Option<&str> {
        self.words.get(group)?.value.as_deref()
    }

    fn has(&self, group: &str, name: &str) -> bool {
        self.words.get(group).is_some_and(|word| word.name == name)
    }

    /// The version asked for, as written: `3`, `4`, `4.0`, `4.1`, `4.2`.
    #[must_use]
    pub fn nfsvers(&self) -> Option<&str> {
        self.value(GROUP_VERS)
    }

    /// The same without a version.
    pub(super) fn of_any_version(mut self) -> Self {
        self.words.remove(GROUP_VERS);
        self
    }

    /// Makes `nfsvers=4.1` of `vers=4,minorversion=1`.
    fn join_versions(&mut self) -> Result<(), OptionsError> {
        let Some(minor) = self.words.remove(GROUP_MINOR) else {
            return Ok(());
        };
        let whole = format!("4.{}", minor.value.as_deref().unwrap_or_default());
        let given = self.nfsvers().unwrap_or("4").to_owned();
        if given != "4" && given != whole {
            return Err(OptionsError::Value {
                word: minor.name,
                value: minor.value.unwrap_or_default(),
                expected: format!("what nfsvers={given} says too; leave one of them out"),
            });
        }
        let version = Word {
            name: GROUP_VERS,
            value: Some(whole),
            attribute: false,
        };
        self.words.insert(GROUP_VERS, version);
        Ok(())
    }

    /// The same for a superblock of the volume's own, which shares no cache with other mounts.
    #[must_use]
    pub fn unshared(mut self) -> Self {
        let word = Word {
            name: "nosharecache",
            value: None,
            attribute: false,
        };
        self.words.insert("sharecache", word);
        self
    }

    /// The versions to try, best first: one if the user named one, all of NFSv4 for
    /// `nfsvers=4`, and all otherwise.
    #[must_use]
    pub fn versions(&self) -> &'static [NfsVersion] {
        use NfsVersion::{V3, V4_0, V4_1, V4_2};
        match self.nfsvers() {
            Some("3") => &[V3],
            Some("4.0") => &[V4_0],
            Some("4.1") => &[V4_1],
            Some("4.2") => &[V4_2],
            Some(_) => &[V4_2, V4_1, V4_0],
            None => &[V4_2, V4_1, V4_0, V3],
        }
    }

    /// The NFS port, where the user knows better than the port mapper.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        self.value("port")?.parse().ok()
    }

    /// The port of mountd, where the user knows better than the port mapper.
    #[must_use]
    pub fn mountport(&self) -> Option<u16> {
        self.value("mountport")?.parse().ok()
    }

    /// Whether the user asked for RDMA in place of TCP.
    #[must_use]
    pub fn is_rdma(&self) -> bool {
        self.value(GROUP_PROTO) == Some("rdma")
    }

    /// Whether calls to a silent server fail after a while (`soft`, `softerr`), so that an
    /// application can lose writes.
    #[must_use]
    pub fn is_soft(&self) -> bool {
        !self.has(GROUP_RETRY, "hard")
    }

    #[must_use]
    pub fn is_readonly(&self) -> bool {
        self.has("ro", "ro")
    }

    /// The word about locks for an NFSv3 mount. Without one of the user's own it is `nolock`: the
    /// server's lock manager needs rpc.statd on this host, and mounting without it can hang.
    pub(crate) fn lock_word(&self) -> Option<&'static str> {
        match self.words.get("lock") {
            Some(word) => Some(word.name),
            None if self.words.contains_key("local_lock") => None,
            None => Some("nolock"),
        }
    }

    /// The words for the kernel's NFS superblock, without those that depend on the server's
    /// address (`proto`, `port`, `mountport`) and without the version.
    pub(crate) fn superblock(&self) -> impl Iterator<Item = (&'static str, Option<&str>)> {
        self.words
            .iter()
            .filter(|(group, word)| {
                !word.attribute
                    && !matches!(
                        **group,
                        GROUP_VERS | GROUP_PROTO | "port" | "mountport" | "mountproto" | "lock"
                    )
            })
            .map(|(_, word)| (word.name, word.value.as_deref()))
    }

    /// What decides whether two volumes can have one share mount: all words but the attributes
    /// of the single mount, sorted.
    #[must_use]
    pub fn share_key(&self) -> String {
        self.print(|word| !word.attribute)
    }

    /// The words that the kernel takes from the first of several mounts of one server or file
    /// system, whatever the later ones say (nfs(5), `sharecache`; `nconnect`).
    pub(crate) fn of_the_first_mount(&self) -> impl Iterator<Item = (&'static str, &str)> {
        ["timeo", "retrans", "nconnect", "max_connect"]
            .into_iter()
            .filter_map(|name| Some((name, self.value(name)?)))
    }

    /// The attributes of the volume's own mount.
    pub(crate) fn attributes(&self) -> MountAttrFlags {
        let mut flags = MountAttrFlags::empty();
        for (group, name, flag) in [
            ("ro", "ro", MountAttrFlags::MOUNT_ATTR_RDONLY),
            ("suid", "nosuid", MountAttrFlags::MOUNT_ATTR_NOSUID),
            ("dev", "nodev", MountAttrFlags::MOUNT_ATTR_NODEV),
            ("exec", "noexec", MountAttrFlags::MOUNT_ATTR_NOEXEC),
            ("atime", "noatime", MountAttrFlags::MOUNT_ATTR_NOATIME),
            (
                "atime",
                "strictatime",
                MountAttrFlags::MOUNT_ATTR_STRICTATIME,
            ),
            (
                "diratime",
                "nodiratime",
                MountAttrFlags::MOUNT_ATTR_NODIRATIME,
            ),
        ] {
            if self.has(group, name) {
                flags |= flag;
            }
        }
        flags
    }

    /// All words, in the order in which they are printed, and what the FUSE data path makes of them.
    pub(crate) fn for_fuse(&self) -> Vec<(&Word, OnFuse)> {
        let mut words: Vec<&Word> = self.words.values().collect();
        words.sort_unstable();
        let with_use = |word: &Word| word.on_fuse();
        words
            .into_iter()
            .map(|word| (word, with_use(word)))
            .collect()
    }

    fn print(&self, keep: impl Fn(&Word) -> bool) -> String {
        self.printed(keep).join(",")
    }

    /// All words as they are printed, in that order.
    pub(crate) fn texts(&self) -> Vec<String> {
        self.printed(|_| true)
    }

    fn printed(&self, keep: impl Fn(&Word) -> bool) -> Vec<String> {
        let kept = self.words.values().filter(|word| keep(word));
        let mut words: Vec<String> = kept.map(Word::to_string).collect();
        words.sort_unstable();
        words
    }
}

/// The words of a text: a comma within double quotes separates nothing.
pub(super) fn split(text: &str) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    text.split(move |ch| {
        quoted ^= ch == '"';
        ch == ',' && !quoted
    })
}

impl fmt::Display for MountOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.print(|_| true))
    }
}

impl FromStr for MountOptions {
    type Err = OptionsError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() > MAX_TEXT {
            return Err(OptionsError::Long);
        }
        if text.chars().any(char::is_control) {
            return Err(OptionsError::Characters("a control character"));
        }
        if text.chars().any(char::is_whitespace) {
            return Err(OptionsError::Characters("white space"));
        }
        if text.contains(['\'', '\\']) {
            return Err(OptionsError::Characters("a single quote or a backslash"));
        }
        if !text.matches('"').count().is_multiple_of(2) {
            return Err(OptionsError::Characters("a quote that does not end"));
        }
        let mut options = Self::default();
        for text in split(text).filter(|word| !word.is_empty()) {
            if text.contains('"') && !text.contains("context=") {
                return Err(OptionsError::Characters(
                    "a quote (only labels may stand in quotes)",
                ));
            }
            if let Some((group, word)) = parse(text)? {
                options.words.insert(group, word);
            }
        }
        options.join_versions()?;
        Ok(options)
    }
}

impl TryFrom<String> for MountOptions {
    type Error = OptionsError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<MountOptions> for String {
    fn from(options: MountOptions) -> Self {
        options.to_string()
    }
}

#[cfg(test)]
mod tests;
