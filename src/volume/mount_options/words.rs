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
    /// A word of the superblock with a label, which stands in quotes where it holds a comma.
    Label,
    /// `nfsvers=`.
    Version,
    /// `minorversion=`: the other half of `nfsvers=4`.
    Minor,
    /// `v3`, `v4.1`, ...: `nfsvers=` in one word.
    ShortVersion(&'static str),
    /// `proto=`.
    Proto,
    /// `tcp`, `rdma`: `proto=` in one word.
    ShortProto,
    /// `mountproto=`.
    MountProto,
    /// An attribute of the volume's own mount.
    Attribute,
    /// A whole number in this range for the FUSE data path, which the kernel is not told.
    Fuse(u32, u32),
    /// The kernel's default or a word for mount(8) only: accepted, no effect.
    Dropped,
    /// Refused, with the reason.
    Refused(&'static str),
}

/// What the FUSE data path makes of a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnFuse {
    /// It is obeyed, or says what is so anyway.
    Kept,
    /// Only this value is so; any other needs the kernel's client, with the reason.
    Only(&'static str, &'static str),
    /// It needs the kernel's client, with the reason.
    Never(&'static str),
    /// It changes nothing, which users are told.
    NoEffect,
    /// The same: `io_timeout` says when a request fails.
    IoTimeout,
    /// Locks do not reach other hosts, which users are told.
    LocksHere,
    /// [`parse`] lets nobody see it.
    No,
}

const VERSION_3: &str = "the FUSE data path speaks NFS version 3";
const SEC_SYS: &str = "the FUSE data path authenticates with sec=sys";
const TCP: &str = "the FUSE data path uses TCP";
const UDP: &str = "the Linux client has no NFS over UDP since 5.6, and it corrupts data on fast networks; leave it out for TCP";
const TLS: &str = "the FUSE data path does not encrypt";
const WRITES: &str = "the FUSE data path decides itself when data goes out";
const LABELS: &str = "the FUSE data path has no labels of SELinux";
const LENGTH: &str = "the FUSE data path takes names as long as the server does";
const ATTRIBUTES: &str = "a FUSE mount is nosuid and nodev";
const FROM_SHARE: &str = "the driver finds the server itself at every mount; leave it out, and name the server in the \
    share (in the local driver's form, o=addr=)";
const CALLBACK: &str = "the kernel finds its own callback address; leave it out";
pub(super) const GROUP_VERS: &str = "nfsvers";
pub(super) const GROUP_MINOR: &str = "minorversion";
pub(super) const GROUP_PROTO: &str = "proto";
pub(super) const GROUP_RETRY: &str = "hard";

/// Every known word: its name, the group in which the last word wins, its kind, and what the FUSE data
/// path makes of it.
/// Sources: nfs(5) of nfs-utils 2.6, mount(8), fs/nfs/fs_context.c of Linux 6.
pub(super) const WORDS: &[(&str, &str, Kind, OnFuse)] = {
    use Kind::{
        Attribute, Colons, Dropped, Flag, Fuse, Label, Minor, MountProto, Number, OneOf, Proto,
        Refused, ShortProto, ShortVersion, Version,
    };
    use OnFuse::{IoTimeout, Kept, LocksHere, Never, No, NoEffect, Only};
    const U32: u32 = i32::MAX as u32;
    &[
        ("nfsvers", GROUP_VERS, Version, Only("3", VERSION_3)),
        ("vers", GROUP_VERS, Version, Only("3", VERSION_3)),
        ("v3", GROUP_VERS, ShortVersion("3"), No),
        ("v4", GROUP_VERS, ShortVersion("4"), No),
        ("v4.0", GROUP_VERS, ShortVersion("4.0"), No),
        ("v4.1", GROUP_VERS, ShortVersion("4.1"), No),
        ("v4.2", GROUP_VERS, ShortVersion("4.2"), No),
        ("minorversion", GROUP_MINOR, Minor, No),
        // What happens when the server does not answer.
        ("hard", GROUP_RETRY, Flag, Kept),
        ("soft", GROUP_RETRY, Flag, IoTimeout),
        ("softerr", GROUP_RETRY, Flag, IoTimeout),
        ("softreval", "softreval", Flag, IoTimeout),
        ("nosoftreval", "softreval", Flag, Kept),
        ("timeo", "timeo", Number(1, U32), IoTimeout),
        ("retrans", "retrans", Number(0, U32), IoTimeout),
        // Transfer sizes, connections.
        ("rsize", "rsize", Number(1024, 1 << 30), Kept),
        ("wsize", "wsize", Number(1024, 1 << 30), Kept),
        ("nconnect", "nconnect", Number(1, 16), Kept),
        ("max_connect", "max_connect", Number(1, 16), NoEffect),
        ("proto", GROUP_PROTO, Proto, Only("tcp", TCP)),
        ("tcp", GROUP_PROTO, ShortProto, No),
        ("rdma", GROUP_PROTO, ShortProto, No),
        ("udp", GROUP_PROTO, Refused(UDP), No),
        ("port", "port", Number(1, 65_535), Kept),
        ("resvport", "resvport", Flag, Kept),
        ("noresvport", "resvport", Flag, Kept),
        (
            "xprtsec",
            "xprtsec",
            OneOf(&["none", "tls", "mtls"]),
            Only("none", TLS),
        ),
        (
            "sec",
            "sec",
            Colons(&["none", "sys", "krb5", "krb5i", "krb5p"]),
            Only("sys", SEC_SYS),
        ),
        // Caches.
        ("ac", "ac", Flag, Kept),
        ("noac", "ac", Flag, Kept),
        ("acregmin", "acregmin", Number(0, U32), Kept),
        ("acregmax", "acregmax", Number(0, U32), Kept),
        ("acdirmin", "acdirmin", Number(0, U32), Kept),
        ("acdirmax", "acdirmax", Number(0, U32), Kept),
        ("actimeo", "actimeo", Number(0, U32), Kept),
        ("cto", "cto", Flag, Kept),
        ("nocto", "cto", Flag, NoEffect),
        (
            "lookupcache",
            "lookupcache",
            OneOf(&["all", "none", "pos", "positive"]),
            NoEffect,
        ),
        ("rdirplus", "rdirplus", Flag, NoEffect),
        ("nordirplus", "rdirplus", Flag, NoEffect),
        ("sharecache", "sharecache", Flag, NoEffect),
        ("nosharecache", "sharecache", Flag, NoEffect),
        ("fsc", "fsc", Flag, NoEffect),
        ("nofsc", "fsc", Flag, Kept),
        (
            "write",
            "write",
            OneOf(&["lazy", "eager", "wait"]),
            Only("lazy", WRITES),
        ),
        ("sync", "sync", Flag, Kept),
        ("async", "sync", Flag, Kept),
        // The server has a change of a directory before it is answered, by either data path.
        ("dirsync", "dirsync", Flag, Kept),
        ("lazytime", "lazytime", Flag, NoEffect),
        ("nolazytime", "lazytime", Flag, Kept),
        // NFSv3: mountd and locks.
        ("mountport", "mountport", Number(1, 65_535), Kept),
        // The worker speaks to mountd by the address that the server is reached at.
        ("mountproto", "mountproto", MountProto, Kept),
        ("mountvers", "mountvers", OneOf(&["3"]), Kept),
        ("namlen", "namlen", Number(1, 255), Only("255", LENGTH)),
        ("lock", "lock", Flag, LocksHere),
        ("nolock", "lock", Flag, Kept),
        (
            "local_lock",
            "local_lock",
            OneOf(&["all", "flock", "posix", "none"]),
            Kept,
        ),
        ("acl", "acl", Flag, NoEffect),
        ("noacl", "acl", Flag, Kept),
        // NFSv4.
        ("migration", "migration", Flag, NoEffect),
        ("nomigration", "migration", Flag, Kept),
        ("trunkdiscovery", "trunkdiscovery", Flag, NoEffect),
        ("notrunkdiscovery", "trunkdiscovery", Flag, Kept),
        // SELinux labels.
        ("context", "context", Label, Never(LABELS)),
        ("fscontext", "fscontext", Label, Never(LABELS)),
        ("defcontext", "defcontext", Label, Never(LABELS)),
        ("rootcontext", "rootcontext", Label, Never(LABELS)),
        // The volume's own mount.
        ("ro", "ro", Attribute, Kept),
        ("rw", "ro", Attribute, Kept),
        ("suid", "suid", Attribute, Never(ATTRIBUTES)),
        ("nosuid", "suid", Attribute, Kept),
        ("dev", "dev", Attribute, Never(ATTRIBUTES)),
        ("nodev", "dev", Attribute, Kept),
        ("exec", "exec", Attribute, Kept),
        ("noexec", "exec", Attribute, Kept),
        ("relatime", "atime", Attribute, NoEffect),
        ("noatime", "atime", Attribute, NoEffect),
        ("strictatime", "atime", Attribute, NoEffect),
        ("diratime", "diratime", Attribute, NoEffect),
        ("nodiratime", "diratime", Attribute, NoEffect),
        ("io_timeout", "io_timeout", Fuse(0, U32), Kept),
        // Words of /etc/fstab and mount(8).
        ("defaults", "", Dropped, No),
        ("atime", "", Dropped, No),
        ("norelatime", "", Dropped, No),
        ("nostrictatime", "", Dropped, No),
        ("_netdev", "", Dropped, No),
        // What /proc/mounts shows on hosts with SELinux.
        ("seclabel", "", Dropped, No),
        ("auto", "", Dropped, No),
        ("noauto", "", Dropped, No),
        ("nofail", "", Dropped, No),
        ("user", "", Dropped, No),
        ("nouser", "", Dropped, No),
        ("users", "", Dropped, No),
        ("owner", "", Dropped, No),
        ("group", "", Dropped, No),
        ("bg", "", Dropped, No),
        ("fg", "", Dropped, No),
        ("retry", "", Dropped, No),
        ("comment", "", Dropped, No),
        ("intr", "", Dropped, No),
        ("nointr", "", Dropped, No),
        // What the driver decides.
        ("addr", "", Refused(FROM_SHARE), No),
        ("mountaddr", "", Refused(FROM_SHARE), No),
        ("mounthost", "", Refused(FROM_SHARE), No),
        ("clientaddr", "", Refused(CALLBACK), No),
        ("source", "", Refused(FROM_SHARE), No),
        (
            "sloppy",
            "",
            Refused("unknown words are never passed over in silence"),
            No,
        ),
        (
            "remount",
            "",
            Refused("a volume's options are fixed when it is created"),
            No,
        ),
        ("bind", "", Refused("the share is an NFS export"), No),
        ("rbind", "", Refused("the share is an NFS export"), No),
    ]
};

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Word {
    pub(crate) name: &'static str,
    pub(crate) value: Option<String>,
    /// Not for the kernel's superblock: an attribute of the volume's own mount, or a setting of
    /// the FUSE data path.
    pub(super) attribute: bool,
}

impl Word {
    /// Its value, if that is a number.
    pub(crate) fn number(&self) -> Option<u32> {
        self.value.as_ref()?.parse().ok()
    }

    pub(super) fn on_fuse(&self) -> OnFuse {
        let row = WORDS.iter().find(|(name, ..)| *name == self.name);
        row.map_or(OnFuse::No, |(.., on_fuse)| *on_fuse)
    }
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)?;
        match &self.value {
            None => Ok(()),
            Some(value) if value.contains(',') => write!(f, "=\"{value}\""),
            Some(value) => write!(f, "={value}"),
        }
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
    let Some(&(name, group, kind, _)) = WORDS.iter().find(|(known, ..)| *known == name) else {
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
        (Kind::Minor, value) => match value {
            Some(minor @ ("0" | "1" | "2")) => word(name, Some(minor), false),
            _ => Err(one_of(&["0", "1", "2"])),
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
        // How mountd is asked changes nothing about the mount; lines of /proc/mounts often say udp.
        (Kind::MountProto, value) => match value {
            Some("tcp" | "tcp6") => word(name, value, false),
            Some("udp" | "udp6") => Ok(None),
            _ => Err(one_of(&["tcp", "tcp6", "udp", "udp6"])),
        },
        (Kind::Label, value) => match value.and_then(label) {
            Some(value) => word(name, Some(value), false),
            None => Err(refuse(
                "letters, digits and _ . : - only, and commas in double quotes".to_owned(),
            )),
        },
    }
}

/// A label without its quotes.
fn label(value: &str) -> Option<&str> {
    let quoted = value.strip_prefix('"').and_then(|v| v.strip_suffix('"'));
    match quoted {
        Some(inner) => inner.split(',').all(is_plain).then_some(inner),
        None => is_plain(value).then_some(value),
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
        .filter(|(_, _, kind, _)| !matches!(kind, Kind::Refused(_)))
        .map(|(known, ..)| (strsim::jaro_winkler(known, name), *known))
        .filter(|(likeness, _)| *likeness >= LEAST_LIKENESS)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| known)
}
