//! `/proc/self/mountstats`: what the kernel's NFS client has carried, for each mount.
//!
//! The kernel counts by superblock: the volumes of one share, mounted with the same options, are
//! binds of one NFS mount and have one set of figures together. Reading them asks no server.
//!
//! Invariant: parsing is pure and total; what does not have the known form is left out.

use std::time::Duration;

use crate::sys::mountinfo::unescape;

/// The figures of one mount point, since it was mounted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MountStats {
    pub mountpoint: String,
    /// The server and the mounted directory: `nas:/export`.
    pub source: String,
    /// Bytes that came from and went to the server.
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub reads: u64,
    pub writes: u64,
    /// Operations that are neither.
    pub others: u64,
    /// Transmissions beyond the first of each operation.
    pub repeated: u64,
    /// Operations that met a major timeout.
    pub timeouts: u64,
    /// The round trips of all operations, added up.
    pub rtt: Duration,
}

/// Reads the NFS mounts out of the text of a mountstats file.
#[must_use]
pub(crate) fn parse(text: &str) -> Vec<MountStats> {
    let mut found: Vec<MountStats> = Vec::new();
    // The mount that the lines at hand belong to, and whether its list of operations has begun.
    let (mut within, mut operations) = (false, false);
    for line in text.lines() {
        if let Some(head) = line.strip_prefix("device ") {
            let mount = head_of(head);
            (within, operations) = (mount.is_some(), false);
            found.extend(mount);
            continue;
        }
        let Some(mount) = found.last_mut().filter(|_| within) else {
            continue;
        };
        let line = line.trim_start();
        if let Some(bytes) = line.strip_prefix("bytes:") {
            // Read and written by applications, the same by O_DIRECT, then from and to the server.
            let mut numbers = numbers(bytes).skip(4);
            mount.read_bytes = numbers.next().unwrap_or(0);
            mount.written_bytes = numbers.next().unwrap_or(0);
        } else if line.starts_with("per-op statistics") {
            operations = true;
        } else if operations && let Some((name, rest)) = line.split_once(':') {
            count(mount, name, rest);
        }
    }
    found
}

/// `nas:/export mounted on /mnt with fstype nfs4 statvers=1.1`
fn head_of(text: &str) -> Option<MountStats> {
    let (source, rest) = text.split_once(" mounted on ")?;
    let (mountpoint, rest) = rest.split_once(" with fstype ")?;
    rest.starts_with("nfs").then(|| MountStats {
        source: unescape(source),
        mountpoint: unescape(mountpoint),
        ..MountStats::default()
    })
}

/// `READ: 5 6 0 720 5242972 0 12 13 0`: operations, transmissions, major timeouts, bytes sent and
/// received, and milliseconds queued, on the way and in all (Linux net/sunrpc/stats.c).
fn count(mount: &mut MountStats, name: &str, rest: &str) {
    let all: Vec<u64> = numbers(rest).collect();
    let [done, sent, timeouts, _, _, _, rtt, ..] = all[..] else {
        return;
    };
    match name {
        "READ" => mount.reads += done,
        "WRITE" => mount.writes += done,
        _ => mount.others += done,
    }
    mount.repeated += sent.saturating_sub(done);
    mount.timeouts += timeouts;
    mount.rtt += Duration::from_millis(rtt);
}

fn numbers(text: &str) -> impl Iterator<Item = u64> {
    text.split_ascii_whitespace().map_while(|n| n.parse().ok())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Of Linux 6.1, shortened.
    const TEXT: &str = "\
device proc mounted on /proc with fstype proc
device nas:/ex\\040port mounted on /var/lib/nfsvol/mnt/shares/1f with fstype nfs4 statvers=1.1
\topts:\trw,vers=4.2,rsize=1048576,addr=10.77.0.1
\tage:\t45
\tevents:\t38 12 0 0 5 9 1
\tbytes:\t11 22 0 0 5242880 4096 1280 1
\tRPC iostats version: 1.1  p/v: 100003/4 (nfs)
\txprt:\ttcp 0 1 2 0 3 120 120 0 140 0 2 20 20
\tper-op statistics
\t        NULL: 1 1 0 44 24 0 0 0 0
\t        READ: 5 6 1 720 5242972 0 12 13 0
\t       WRITE: 1 1 0 4300 160 0 3 3 0
\t     GETATTR: 9 9 0 1500 2100 0 5 6 0

device tmpfs mounted on /run with fstype tmpfs
\tbytes:\t9 9 9 9 9 9 9 9
device nas:/old mounted on /mnt with fstype nfs statvers=1.1
\tbytes:\t1 2 3 4 5 6
";

    #[test]
    fn the_kernels_figures_are_read() {
        let found = parse(TEXT);
        let first = MountStats {
            mountpoint: "/var/lib/nfsvol/mnt/shares/1f".to_owned(),
            source: "nas:/ex port".to_owned(),
            read_bytes: 5_242_880,
            written_bytes: 4096,
            reads: 5,
            writes: 1,
            others: 10,
            repeated: 1,
            timeouts: 1,
            rtt: Duration::from_millis(20),
        };
        assert_eq!(found[0], first);
        assert_eq!(found.len(), 2);
        assert_eq!((found[1].read_bytes, found[1].written_bytes), (5, 6));
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_harm(text in "(device |bytes:|per-op|READ: |nfs|[0-9 :\n\t-]){0,60}") {
            prop_assert!(parse(&text).len() <= text.lines().count());
        }
    }
}
