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
//! no value holds a comma, a quote, white space or a control character, so no option can smuggle
//! in another one.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use rustix::mount::MountAttrFlags;
use serde::{Deserialize, Serialize};

/// The longest option text, in bytes: mount(2) passes at most one page of data.
const MAX_TEXT: usize = 2048;
/// A suggestion less alike than this (Jaro-Winkler, 0 to 1) would only mislead.
const LEAST_LIKENESS: f64 = 0.75;

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

/// What a known word asks for.
#[derive(Debug, Clone, Copy)]
enum Kind {
    /// A word of the superblock without a value.
    Flag,
    /// A word of the superblock with a whole number in this range.
    Number(u32, u32),
    /// A word of the superblock with one of these values.
    OneOf(&'static [&'static str]),
    /// `sec=`: one or more of these, separated by colons.
    Colons(&'static [&'static str]),
    /// A word of the superblock with plain text (labels, a cache tag).
    Text,
    /// `nfsvers=`.
    Version,
    /// `v3`, `v4.1`, ...: `nfsvers=` in one word.
    ShortVersion(&'static str),
    /// `proto=`.
    Proto,
    /// `tcp`, `rdma`: `proto=` in one word.
    ShortProto,
    /// An attribute of the volume's own mount.
    Attribute,
    /// A whole number in this range for the FUSE data path, which the kernel is not told.
    Fuse(u32, u32),
    /// The kernel's default or a word for mount(8) only: accepted, no effect.
    Dropped,
    /// Refused, with the reason.
    Refused(&'static str),
}

const UDP: &str = "the Linux client has no NFS over UDP since 5.6, and it corrupts data on fast networks; leave it out for TCP";
const FROM_SHARE: &str =
    "the driver resolves the server itself at every mount; name it in the share";
const CALLBACK: &str = "the kernel finds its own callback address";
const GROUP_VERS: &str = "nfsvers";
const GROUP_PROTO: &str = "proto";
const GROUP_RETRY: &str = "hard";

/// Every known word: its name, the group in which the last word wins, and its kind.
/// Sources: nfs(5) of nfs-utils 2.6, mount(8), fs/nfs/fs_context.c of Linux 6.
const WORDS: &[(&str, &str, Kind)] = {
    use Kind::{
        Attribute, Colons, Dropped, Flag, Fuse, Number, OneOf, Proto, Refused, ShortProto,
        ShortVersion, Text, Version,
    };
    const U32: u32 = i32::MAX as u32;
    &[
        ("nfsvers", GROUP_VERS, Version),
        ("vers", GROUP_VERS, Version),
        ("v3", GROUP_VERS, ShortVersion("3")),
        ("v4", GROUP_VERS, ShortVersion("4")),
        ("v4.0", GROUP_VERS, ShortVersion("4.0")),
        ("v4.1", GROUP_VERS, ShortVersion("4.1")),
        ("v4.2", GROUP_VERS, ShortVersion("4.2")),
        (
            "minorversion",
            GROUP_VERS,
            Refused("write nfsvers=4.1 or nfsvers=4.2"),
        ),
        // What happens when the server does not answer.
        ("hard", GROUP_RETRY, Flag),
        ("soft", GROUP_RETRY, Flag),
        ("softerr", GROUP_RETRY, Flag),
        ("softreval", "softreval", Flag),
        ("nosoftreval", "softreval", Flag),
        ("timeo", "timeo", Number(1, U32)),
        ("retrans", "retrans", Number(0, U32)),
        // Transfer sizes, connections.
        ("rsize", "rsize", Number(1024, 1 << 30)),
        ("wsize", "wsize", Number(1024, 1 << 30)),
        ("nconnect", "nconnect", Number(1, 16)),
        ("max_connect", "max_connect", Number(1, 16)),
        ("proto", GROUP_PROTO, Proto),
        ("tcp", GROUP_PROTO, ShortProto),
        ("rdma", GROUP_PROTO, ShortProto),
        ("udp", GROUP_PROTO, Refused(UDP)),
        ("port", "port", Number(1, 65_535)),
        ("resvport", "resvport", Flag),
        ("noresvport", "resvport", Flag),
        ("xprtsec", "xprtsec", OneOf(&["none", "tls", "mtls"])),
        (
            "sec",
            "sec",
            Colons(&["none", "sys", "krb5", "krb5i", "krb5p"]),
        ),
        // Caches.
        ("ac", "ac", Flag),
        ("noac", "ac", Flag),
        ("acregmin", "acregmin", Number(0, U32)),
        ("acregmax", "acregmax", Number(0, U32)),
        ("acdirmin", "acdirmin", Number(0, U32)),
        ("acdirmax", "acdirmax", Number(0, U32)),
        ("actimeo", "actimeo", Number(0, U32)),
        ("cto", "cto", Flag),
        ("nocto", "cto", Flag),
        (
            "lookupcache",
            "lookupcache",
            OneOf(&["all", "none", "pos", "positive"]),
        ),
        ("rdirplus", "rdirplus", Flag),
        ("nordirplus", "rdirplus", Flag),
        ("sharecache", "sharecache", Flag),
        ("nosharecache", "sharecache", Flag),
        ("fsc", "fsc", Flag),
        ("nofsc", "fsc", Flag),
        ("write", "write", OneOf(&["lazy", "eager", "wait"])),
        ("sync", "sync", Flag),
        ("async", "sync", Flag),
        ("dirsync", "dirsync", Flag),
        ("lazytime", "lazytime", Flag),
        ("nolazytime", "lazytime", Flag),
        // NFSv3: mountd and locks.
        ("mountport", "mountport", Number(1, 65_535)),
        ("mountproto", "mountproto", OneOf(&["tcp", "tcp6"])),
        ("mountvers", "mountvers", OneOf(&["3"])),
        ("namlen", "namlen", Number(1, 255)),
        ("lock", "lock", Flag),
        ("nolock", "lock", Flag),
        (
            "local_lock",
            "local_lock",
            OneOf(&["all", "flock", "posix", "none"]),
        ),
        ("acl", "acl", Flag),
        ("noacl", "acl", Flag),
        // NFSv4.
        ("migration", "migration", Flag),
        ("nomigration", "migration", Flag),
        ("trunkdiscovery", "trunkdiscovery", Flag),
        ("notrunkdiscovery", "trunkdiscovery", Flag),
        // SELinux labels.
        ("context", "context", Text),
        ("fscontext", "fscontext", Text),
        ("defcontext", "defcontext", Text),
        ("rootcontext", "rootcontext", Text),
        // The volume's own mount.
        ("ro", "ro", Attribute),
        ("rw", "ro", Attribute),
        ("suid", "suid", Attribute),
        ("nosuid", "suid", Attribute),
        ("dev", "dev", Attribute),
        ("nodev", "dev", Attribute),
        ("exec", "exec", Attribute),
        ("noexec", "exec", Attribute),
        ("relatime", "atime", Attribute),
        ("noatime", "atime", Attribute),
        ("strictatime", "atime", Attribute),
        ("diratime", "diratime", Attribute),
        ("nodiratime", "diratime", Attribute),
        ("io_timeout", "io_timeout", Fuse(0, U32)),
        // Words of /etc/fstab and mount(8).
        ("defaults", "", Dropped),
        ("atime", "", Dropped),
        ("norelatime", "", Dropped),
        ("nostrictatime", "", Dropped),
        ("_netdev", "", Dropped),
        ("auto", "", Dropped),
        ("noauto", "", Dropped),
        ("nofail", "", Dropped),
        ("user", "", Dropped),
        ("nouser", "", Dropped),
        ("users", "", Dropped),
        ("owner", "", Dropped),
        ("group", "", Dropped),
        ("bg", "", Dropped),
        ("fg", "", Dropped),
        ("retry", "", Dropped),
        ("comment", "", Dropped),
        ("intr", "", Dropped),
        ("nointr", "", Dropped),
        // What the driver decides.
        ("addr", "", Refused(FROM_SHARE)),
        ("mountaddr", "", Refused(FROM_SHARE)),
        ("mounthost", "", Refused(FROM_SHARE)),
        ("clientaddr", "", Refused(CALLBACK)),
        ("source", "", Refused(FROM_SHARE)),
        (
            "sloppy",
            "",
            Refused("unknown words are never passed over in silence"),
        ),
        (
            "remount",
            "",
            Refused("a volume's options are fixed when it is created"),
        ),
        ("bind", "", Refused("the share is an NFS export")),
        ("rbind", "", Refused("the share is an NFS export")),
    ]
};

/// Checked mount options with the driver's defaults: `hard,nodev,nosuid`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MountOptions {
    /// By group, so that the last of several words about one thing wins, as in mount(8).
    words: BTreeMap<&'static str, Word>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Word {
    name: &'static str,
    value: Option<String>,
    /// Not for the kernel's superblock: an attribute of the volume's own mount, or a setting of
    /// the FUSE data path.
    attribute: bool,
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)?;
        self.value
            .as_ref()
            .map_or(Ok(()), |value| write!(f, "={value}"))
    }
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
    pub(super) fn lock_word(&self) -> Option<&'static str> {
        match self.words.get("lock") {
            Some(word) => Some(word.name),
            None if self.words.contains_key("local_lock") => None,
            None => Some("nolock"),
        }
    }

    /// The words for the kernel's NFS superblock, without those that depend on the server's
    /// address (`proto`, `port`, `mountport`) and without the version.
    pub(super) fn superblock(&self) -> impl Iterator<Item = (&'static str, Option<&str>)> {
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
    pub(super) fn of_the_first_mount(&self) -> impl Iterator<Item = (&'static str, &str)> {
        ["timeo", "retrans", "nconnect", "max_connect"]
            .into_iter()
            .filter_map(|name| Some((name, self.value(name)?)))
    }

    /// The attributes of the volume's own mount.
    pub(super) fn attributes(&self) -> MountAttrFlags {
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

    fn print(&self, keep: impl Fn(&Word) -> bool) -> String {
        let mut words: Vec<String> = self
            .words
            .values()
            .filter(|word| keep(word))
            .map(Word::to_string)
            .collect();
        words.sort_unstable();
        words.join(",")
    }
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
        if text.contains(['"', '\'', '\\']) {
            return Err(OptionsError::Characters("a quote or a backslash"));
        }
        let mut options = Self::default();
        for text in text.split(',').filter(|word| !word.is_empty()) {
            if let Some((group, word)) = parse(text)? {
                options.words.insert(group, word);
            }
        }
        Ok(options)
    }
}

/// One word: `None` when it has no effect.
fn parse(text: &str) -> Result<Option<(&'static str, Word)>, OptionsError> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (text, None),
    };
    if name.starts_with("x-") || name.starts_with("X-") {
        return Ok(None);
    }
    let Some(&(name, group, kind)) = WORDS.iter().find(|(known, ..)| *known == name) else {
        return Err(OptionsError::Unknown {
            word: name.to_owned(),
            nearest: nearest(name),
        });
    };
    let refuse = |expected: String| OptionsError::Value {
        word: name,
        value: value.unwrap_or_default().to_owned(),
        expected,
    };
    let word = |name, value: Option<&str>, attribute| {
        Ok(Some((
            group,
            Word {
                name,
                value: value.map(str::to_owned),
                attribute,
            },
        )))
    };
    let one_of = |values: &[&str]| refuse(format!("one of {}", values.join(", ")));
    match (kind, value) {
        (Kind::Refused(reason), _) => Err(OptionsError::Refused { word: name, reason }),
        (Kind::Dropped, _) => Ok(None),
        // `fsc` is the one flag that may name something: the cache's tag.
        (Kind::Flag, Some(tag)) if name == "fsc" && is_plain(tag) => word(name, Some(tag), false),
        (Kind::Flag | Kind::Attribute | Kind::ShortVersion(_) | Kind::ShortProto, Some(_)) => {
            Err(refuse("no value".to_owned()))
        }
        (Kind::Flag, None) => word(name, None, false),
        (Kind::Attribute, None) => word(name, None, true),
        (Kind::ShortVersion(version), None) => word(GROUP_VERS, Some(version), false),
        (Kind::ShortProto, None) => word(GROUP_PROTO, Some(name), false),
        (Kind::Number(least, most) | Kind::Fuse(least, most), value) => {
            match value.map(str::parse::<u32>) {
                Some(Ok(number)) if (least..=most).contains(&number) => {
                    let fuse = matches!(kind, Kind::Fuse(..));
                    word(name, Some(number.to_string().as_str()), fuse)
                }
                _ => Err(refuse(format!("a whole number from {least} to {most}"))),
            }
        }
        (Kind::OneOf(values), value) => match value {
            Some(value) if values.contains(&value) => word(name, Some(value), false),
            _ => Err(one_of(values)),
        },
        (Kind::Colons(values), value) => match value {
            Some(value) if value.split(':').all(|part| values.contains(&part)) => {
                word(name, Some(value), false)
            }
            _ => Err(one_of(values)),
        },
        (Kind::Version, value) => match value {
            Some(version @ ("3" | "4" | "4.0" | "4.1" | "4.2")) => {
                word(GROUP_VERS, Some(version), false)
            }
            _ => Err(one_of(&["3", "4", "4.0", "4.1", "4.2"])),
        },
        // The 6 of tcp6 and rdma6 is decided by the address that the server is reached at.
        (Kind::Proto, value) => match value {
            Some("tcp" | "tcp6") => word(GROUP_PROTO, Some("tcp"), false),
            Some("rdma" | "rdma6") => word(GROUP_PROTO, Some("rdma"), false),
            Some("udp" | "udp6") => Err(OptionsError::Refused {
                word: name,
                reason: UDP,
            }),
            _ => Err(one_of(&["tcp", "rdma"])),
        },
        (Kind::Text, value) => match value {
            Some(value) if is_plain(value) => word(name, Some(value), false),
            _ => Err(refuse("letters, digits and _ . : - only".to_owned())),
        },
    }
}

fn is_plain(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b':' | b'-'))
}

/// The known word most like this one, never one that would be refused as well.
fn nearest(name: &str) -> Option<&'static str> {
    WORDS
        .iter()
        .filter(|(_, _, kind)| !matches!(kind, Kind::Refused(_)))
        .map(|(known, ..)| (strsim::jaro_winkler(known, name), *known))
        .filter(|(likeness, _)| *likeness >= LEAST_LIKENESS)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| known)
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
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> MountOptions {
        text.parse().unwrap()
    }

    fn error(text: &str) -> String {
        text.parse::<MountOptions>().unwrap_err().to_string()
    }

    #[test]
    fn the_safe_defaults_hold_until_written_otherwise() {
        assert_eq!(parse("").to_string(), "hard,nodev,nosuid");
        assert_eq!(parse("suid,dev,soft").to_string(), "dev,soft,suid");
        assert!(parse("softerr").is_soft() && !parse("").is_soft());
    }

    #[test]
    fn the_last_word_about_one_thing_wins() {
        assert_eq!(
            parse("vers=3,rw,v4.1,ro,tcp,proto=rdma6").to_string(),
            "hard,nfsvers=4.1,nodev,nosuid,proto=rdma,ro"
        );
    }

    #[test]
    fn words_of_fstab_have_no_effect() {
        assert_eq!(
            parse("_netdev,nofail,x-systemd.automount,retry=2,bg,defaults,intr"),
            MountOptions::default()
        );
    }

    #[test]
    fn a_misspelt_word_is_refused_with_the_nearest_one() {
        assert_eq!(
            error("nconect=4"),
            "mount option \"nconect\" is not known to nfs(5); did you mean \"nconnect\"?"
        );
        assert_eq!(error("zzz"), "mount option \"zzz\" is not known to nfs(5)");
        assert!(error("adr=1.2.3.4").contains("not known"));
    }

    #[test]
    fn values_out_of_range_are_refused_with_the_range() {
        assert_eq!(
            error("nconnect=17"),
            "mount option nconnect=17: expected a whole number from 1 to 16"
        );
        assert_eq!(
            error("nfsvers=2"),
            "mount option nfsvers=2: expected one of 3, 4, 4.0, 4.1, 4.2"
        );
        for bad in [
            "timeo=",
            "timeo",
            "ro=1",
            "sec=krb5:none2",
            "port=70000",
            "rsize=-1",
            "hard=1",
        ] {
            assert!(bad.parse::<MountOptions>().is_err(), "{bad}");
        }
    }

    #[test]
    fn what_the_driver_decides_cannot_be_smuggled_in() {
        for bad in [
            "addr=10.0.0.9",
            "ro,clientaddr=1.2.3.4",
            "mountaddr=1.2.3.4",
            "mounthost=evil",
            "source=evil:/",
            "minorversion=1",
            "context=\"a,addr=1.2.3.4\"",
            "context=a'b",
            "ro\0,rw",
            "ro\nrw",
            "ro, rw",
            "udp",
            "proto=udp",
        ] {
            assert!(bad.parse::<MountOptions>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn versions_are_tried_from_the_best() {
        let tried = |text: &str| {
            parse(text)
                .versions()
                .iter()
                .map(|v| v.as_str())
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(tried(""), "4.2 4.1 4.0 3");
        assert_eq!(tried("nfsvers=4"), "4.2 4.1 4.0");
        assert_eq!(tried("v4.1"), "4.1");
    }

    #[test]
    fn attributes_belong_to_the_bind_and_not_to_the_share() {
        let readonly = parse("ro,noexec,timeo=50");
        assert_eq!(readonly.share_key(), parse("timeo=50,suid").share_key());
        assert_ne!(readonly.share_key(), parse("timeo=51").share_key());
        assert!(readonly.attributes().contains(
            MountAttrFlags::MOUNT_ATTR_RDONLY
                | MountAttrFlags::MOUNT_ATTR_NOEXEC
                | MountAttrFlags::MOUNT_ATTR_NOSUID
        ));
        let words: Vec<_> = parse("vers=3,port=1,lock,timeo=50,ro")
            .superblock()
            .map(|w| w.0)
            .collect();
        assert_eq!(words, ["hard", "timeo"]);
    }

    #[test]
    fn locks_of_nfs3_stay_on_the_host_unless_asked_for() {
        assert_eq!(parse("").lock_word(), Some("nolock"));
        assert_eq!(parse("lock").lock_word(), Some("lock"));
        assert_eq!(parse("local_lock=flock").lock_word(), None);
    }

    #[test]
    fn every_word_is_listed_once() {
        for (index, (name, ..)) in WORDS.iter().enumerate() {
            assert!(
                WORDS
                    .iter()
                    .skip(index + 1)
                    .all(|(other, ..)| other != name),
                "{name}"
            );
        }
    }

    fn word() -> impl Strategy<Value = String> {
        prop_oneof![
            (0..WORDS.len()).prop_map(|index| WORDS[index].0.to_owned()),
            ((0..WORDS.len()), "[0-9a-z:.,= \"]{0,5}")
                .prop_map(|(index, value)| format!("{}={value}", WORDS[index].0)),
            ((0..WORDS.len()), 1u32..20)
                .prop_map(|(index, value)| format!("{}={value}", WORDS[index].0)),
        ]
    }

    proptest! {
        #[test]
        fn what_is_accepted_prints_to_an_equal_value(words in prop::collection::vec(word(), 0..6)) {
            if let Ok(options) = words.join(",").parse::<MountOptions>() {
                let printed = options.to_string();
                prop_assert_eq!(printed.parse::<MountOptions>().unwrap(), options.clone());
                for (name, value) in options.superblock() {
                    prop_assert!(name != "addr" && name != "source");
                    prop_assert!(!value.unwrap_or_default().contains(','));
                }
            }
        }

        #[test]
        fn any_text_is_options_or_an_error(text in "\\PC{0,80}") {
            if let Ok(options) = text.parse::<MountOptions>() {
                prop_assert_eq!(options.to_string().parse::<MountOptions>().unwrap(), options);
            }
        }
    }
}
