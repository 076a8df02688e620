//! `/proc/PID/mountinfo` (proc_pid_mountinfo(5)): the one place where mounts are looked up,
//! because reading it never waits for a server.
//!
//! Invariant: parsing is pure and total; a line that does not have the documented form is left
//! out, never guessed at.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The type of the FUSE data path's mounts.
pub(crate) const FUSE_FSTYPE: &str = "fuse.nfsvol";

/// A device number as mountinfo and /sys/class/bdi print it: `0:53`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DeviceId {
    pub major: u32,
    pub minor: u32,
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// One mounted file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MountEntry {
    pub id: u64,
    pub parent: u64,
    pub device: DeviceId,
    /// The path inside the file system that is mounted. NFS always says `/`.
    pub root: String,
    pub mountpoint: PathBuf,
    /// Of the single mount: `rw,nosuid,nodev,relatime`.
    pub options: String,
    pub fstype: String,
    /// For NFS the server and the path of the mounted directory: `nas:/export/db`.
    pub source: String,
    /// Of the superblock: `rw,vers=4.2,rsize=1048576,...,addr=10.0.0.1`.
    pub super_options: String,
}

/// A directory, named by its file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    device: DeviceId,
    path: PathBuf,
}

impl Place {
    /// Whether it is an entry of a directory.
    #[must_use]
    pub(crate) fn is_in(&self, dir: &Self) -> bool {
        self.device == dir.device && self.path.parent() == Some(&dir.path)
    }
}

impl MountEntry {
    fn place(&self, path: &Path) -> Option<Place> {
        let below = path.strip_prefix(&self.mountpoint).ok()?;
        Some(Place {
            device: self.device,
            path: Path::new(&self.root).join(below),
        })
    }

    /// Whether the kernel's NFS client serves this mount.
    #[must_use]
    pub(crate) fn is_nfs(&self) -> bool {
        self.fstype == "nfs" || self.fstype == "nfs4"
    }

    /// Whether a worker of the FUSE data path serves this mount.
    #[must_use]
    pub(crate) fn is_fuse(&self) -> bool {
        self.fstype == FUSE_FSTYPE
    }

    /// Whether the single mount has this option (`ro`, `nosuid`, ...).
    #[must_use]
    pub(crate) fn has_option(&self, name: &str) -> bool {
        self.options.split(',').any(|word| word == name)
    }

    /// The server's address, for NFS.
    #[must_use]
    pub(crate) fn addr(&self) -> Option<IpAddr> {
        self.super_option("addr")?.parse().ok()
    }

    /// The value of an option of the superblock: `super_option("vers")` is `4.2`.
    #[must_use]
    pub(crate) fn super_option(&self, name: &str) -> Option<&str> {
        self.super_options
            .split(',')
            .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }
}

/// The mounts that a process sees, in the order in which they were mounted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct MountInfo {
    pub entries: Vec<MountEntry>,
}

impl MountInfo {
    /// Reads the mounts of this process at and below a directory.
    ///
    /// # Errors
    /// When /proc is not mounted or not readable.
    pub(crate) fn read_below(directory: &Path) -> io::Result<Self> {
        let text = std::fs::read("/proc/self/mountinfo")?;
        // Most hosts have hundreds of other mounts: a cheap look before the full parse.
        let mut info = Self::parse_lines(&String::from_utf8_lossy(&text), |line| {
            line.contains(escaped(directory).as_str())
        });
        info.entries
            .retain(|entry| entry.mountpoint.starts_with(directory));
        Ok(info)
    }

    /// Parses the whole text of a mountinfo file.
    #[must_use]
    pub(crate) fn parse(text: &str) -> Self {
        Self::parse_lines(text, |_| true)
    }

    pub(crate) fn parse_lines(text: &str, keep: impl Fn(&str) -> bool) -> Self {
        Self {
            entries: text
                .lines()
                .filter(|line| keep(line))
                .filter_map(parse_line)
                .collect(),
        }
    }

    /// The directory that a path stands for, as its file system names it: a place that is the
    /// same in every namespace and behind every bind. What is mounted at the path itself is not
    /// looked into.
    #[must_use]
    pub(crate) fn place_of(&self, path: &Path) -> Option<Place> {
        let below =
            |entry: &&MountEntry| entry.mountpoint != path && path.starts_with(&entry.mountpoint);
        // Later mounts cover earlier ones, longer mount points lie within shorter ones.
        let host = self
            .entries
            .iter()
            .filter(below)
            .max_by_key(|entry| entry.mountpoint.as_os_str().len())?;
        host.place(path)
    }

    /// The directory that a mount covers.
    #[must_use]
    pub(crate) fn covered(&self, mount: &MountEntry) -> Option<Place> {
        self.entries
            .iter()
            .find(|entry| entry.id == mount.parent)?
            .place(&mount.mountpoint)
    }

    /// What is mounted at a place; with several mounts on top of each other, the topmost.
    #[must_use]
    pub(crate) fn at(&self, mountpoint: &Path) -> Option<&MountEntry> {
        self.entries
            .iter()
            .rev()
            .find(|entry| entry.mountpoint == mountpoint)
    }
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
fn parse_line(line: &str) -> Option<MountEntry> {
    let mut fields = line.split(' ');
    let id = fields.next()?.parse().ok()?;
    let parent = fields.next()?.parse().ok()?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let device = DeviceId {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
    };
    let root = unescape(fields.next()?);
    let mountpoint = unescape(fields.next()?);
    let options = fields.next()?.to_owned();
    // Zero or more optional fields (`shared:7`, `master:1`, ...) up to a lone dash.
    fields.find(|field| *field == "-")?;
    let fstype = unescape(fields.next()?);
    let source = unescape(fields.next()?);
    let super_options = unescape(fields.next().unwrap_or_default());
    if !mountpoint.starts_with('/') {
        return None;
    }
    Some(MountEntry {
        id,
        parent,
        device,
        root,
        mountpoint: mountpoint.into(),
        options,
        fstype,
        source,
        super_options,
    })
}

/// The kernel writes blank, tab, newline, backslash and (in sources) `#` as `\` and three octal
/// digits.
pub(crate) fn unescape(field: &str) -> String {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let [first, tail @ ..] = rest {
        match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..]) => {
                bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = tail;
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A path as mountinfo prints it.
fn escaped(path: &Path) -> String {
    let mut text = String::new();
    for ch in path.to_string_lossy().chars() {
        match ch {
            ' ' | '\t' | '\n' | '\\' => text.push_str(&format!("\\{:03o}", ch as u32)),
            _ => text.push(ch),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NFS: &str = "412 31 0:53 / /var/lib/nfsvol/mnt/volumes/db rw,nosuid,nodev,relatime \
        shared:7 master:1 - nfs4 nas:/export/my\\040db rw,vers=4.2,rsize=1048576,addr=10.77.0.1";

    #[test]
    fn a_bind_of_an_nfs_directory_is_read() {
        let info = MountInfo::parse(&format!(
            "{NFS}\n22 1 8:1 / / rw - ext4 /dev/sda1 rw\nnonsense\n\n1 2 x:y / / rw - a b c\n"
        ));
        assert_eq!(info.entries.len(), 2);
        let bind = info
            .at(Path::new("/var/lib/nfsvol/mnt/volumes/db"))
            .unwrap();
        assert!(bind.is_nfs() && bind.has_option("nosuid") && !bind.has_option("ro"));
        assert_eq!(bind.source, "nas:/export/my db");
        assert_eq!(bind.device.to_string(), "0:53");
        assert_eq!(bind.super_option("vers"), Some("4.2"));
        assert_eq!(bind.super_option("addr"), Some("10.77.0.1"));
        assert_eq!(bind.super_option("rsiz"), None);
    }

    #[test]
    fn the_topmost_of_stacked_mounts_counts() {
        let info =
            MountInfo::parse("5 1 0:9 / /a rw - tmpfs one rw\n6 5 0:10 / /a rw - tmpfs two rw");
        assert_eq!(info.at(Path::new("/a")).unwrap().source, "two");
    }

    #[test]
    fn one_directory_is_one_place_behind_every_bind() {
        let info = MountInfo::parse(
            "35 1 98:0 / /mnt rw - ext4 /dev/a rw\n43 1 98:0 /nfsvol /var/lib/nfsvol rw - ext4 /dev/a rw\n\
             57 43 0:43 / /var/lib/nfsvol/v/db rw - nfs4 nas:/db rw\n58 35 0:43 / /mnt/nfsvol/v/db rw - nfs4 nas:/db rw\n\
             59 1 0:43 / /data rw - nfs4 nas:/db rw",
        );
        let own = info.place_of(Path::new("/var/lib/nfsvol/v/db")).unwrap();
        assert_eq!(
            info.place_of(Path::new("/mnt/nfsvol/v/db")),
            Some(own.clone())
        );
        let covered: Vec<_> = info
            .entries
            .iter()
            .map(|entry| info.covered(entry))
            .collect();
        assert_eq!(covered[2..], [Some(own.clone()), Some(own), None]);
    }

    #[test]
    fn the_mounts_of_this_process_are_found_below_a_directory() {
        let info = MountInfo::read_below(Path::new("/proc")).unwrap();
        assert_eq!(info.at(Path::new("/proc")).unwrap().fstype, "proc");
        assert!(
            info.entries
                .iter()
                .all(|entry| entry.mountpoint.starts_with("/proc"))
        );
    }

    fn kernel_escape(text: &str, more: &[char]) -> String {
        let mut out = escaped(Path::new(text));
        for ch in more {
            out = out.replace(*ch, &format!("\\{:03o}", *ch as u32));
        }
        out
    }

    proptest! {
        #[test]
        fn names_with_blanks_and_backslashes_come_back(
            name in "[a-z \\\\\t\nä#]{1,20}",
            tags in prop::collection::vec("(shared|master):[0-9]{1,3}", 0..3),
        ) {
            let mut tags = tags.join(" ");
            if !tags.is_empty() { tags.push(' '); }
            let line = format!(
                "7 1 0:41 / {} rw,relatime {tags}- nfs4 {} rw,addr=1.2.3.4",
                kernel_escape(&format!("/mnt/{name}"), &[]),
                kernel_escape(&format!("nas:/{name}"), &['#']),
            );
            let info = MountInfo::parse(&line);
            prop_assert_eq!(info.entries.len(), 1);
            prop_assert_eq!(&info.entries[0].mountpoint, &PathBuf::from(format!("/mnt/{name}")));
            prop_assert_eq!(&info.entries[0].source, &format!("nas:/{name}"));
        }

        #[test]
        fn any_text_is_parsed_without_harm(text in "[0-9a-z:/ \\\\,=\n-]{0,200}") {
            let info = MountInfo::parse(&text);
            prop_assert!(info.entries.len() <= text.lines().count());
        }
    }
}
