//! Every word that nfs(5) knows, and what the driver makes of it.

use std::fmt;

use super::OptionsError;

/// A suggestion less alike than this (Jaro-Winkler, 0 to 1) would only mislead.
const LEAST_LIKENESS: f64 = 0.75;

/// What a known word asks for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
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
pub(super) const GROUP_VERS: &str = "nfsvers";
pub(super) const GROUP_PROTO: &str = "proto";
pub(super) const GROUP_RETRY: &str = "hard";

/// Every known word: its name, the group in which the last word wins, and its kind.
/// Sources: nfs(5) of nfs-utils 2.6, mount(8), fs/nfs/fs_context.c of Linux 6.
pub(super) const WORDS: &[(&str, &str, Kind)] = {
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

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Word {
    pub(super) name: &'static str,
    pub(super) value: Option<String>,
    /// Not for the kernel's superblock: an attribute of the volume's own mount, or a setting of
    /// the FUSE data path.
    pub(super) attribute: bool,
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)?;
        self.value
            .as_ref()
            .map_or(Ok(()), |value| write!(f, "={value}"))
    }
}

/// One word: `None` when it has no effect.
pub(super) fn parse(text: &str) -> Result<Option<(&'static str, Word)>, OptionsError> {
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
