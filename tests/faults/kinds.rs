//! The faults: how each begins and ends, and what the calls answer meanwhile.

use anyhow::Context;
use lab::{Export, Ganesha, Node, Result};

/// A server that can fail.
pub(crate) struct Faulty {
    pub(crate) server: Ganesha,
    /// Its name in the lab, by which shares are named where names matter.
    pub(crate) name: String,
}

/// What a call answers while the fault lasts.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Answer {
    Works,
    /// It fails, and the error holds each of these words; of `a|b` either.
    Fails(&'static [&'static str]),
}
use Answer::{Fails, Works};

/// What a process sees that has the volume mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Held {
    /// It works again by itself when the fault has ended.
    Recovers,
    /// What it holds is gone for good (ESTALE): new attachments work, and Status names it.
    IsStale,
}

pub(crate) struct Fault {
    pub(crate) name: &'static str,
    /// Whether shares are named by the server's name instead of its address.
    pub(crate) by_name: bool,
    /// What the server needs for it, before it holds anything.
    pub(crate) prepare: fn(&Ganesha) -> Result,
    /// The node is the host whose volumes are on the server.
    pub(crate) begin: fn(&Faulty, &Node) -> Result,
    pub(crate) end: fn(&Faulty, &Node) -> Result,
    pub(crate) create: Answer,
    pub(crate) mount: Answer,
    pub(crate) remove: Answer,
    pub(crate) held: Held,
}

/// Where every server's volumes are.
pub(crate) const EXPORT: &str = "/srv/volumes";
/// Always there beside it, so that a server without [`EXPORT`] still runs.
const OTHER: &str = "/srv/other";

/// What a healthy server exports.
pub(crate) fn exports() -> Vec<Export> {
    vec![Export::new(OTHER), Export::new(EXPORT)]
}

/// Starts the server again with its export changed.
fn with(faulty: &Faulty, change: impl FnOnce(Export) -> Export) -> Result {
    let exports = [Export::new(OTHER), change(Export::new(EXPORT))];
    faulty.server.restart(Some(&exports))
}

fn healthy_again(faulty: &Faulty, _: &Node) -> Result {
    with(faulty, |export| export)
}

/// What becomes of packets to the server's ports.
fn packets(faulty: &Faulty, rule: &str) -> Result {
    let script = format!("iptables {rule}");
    faulty.server.node().sh(&script).map(drop)
}

const DROP: &str = "INPUT -p tcp -m multiport --dports 111,2049,20048 -j DROP";
const REJECT: &str =
    "INPUT -p tcp -m multiport --dports 111,2049,20048 -j REJECT --reject-with tcp-reset";

/// A call that the server's end cut off in the middle was not refused: both are true then.
const REFUSED: &[&str] = &["refused|the connection broke", ";"];
const SILENT: &[&str] = &["no answer", ";"];

pub(crate) const FAULTS: &[Fault] = &[
    Fault {
        name: "stopped",
        by_name: false,
        prepare: nothing,
        begin: |faulty, _| faulty.server.freeze(),
        end: |faulty, _| faulty.server.thaw(),
        create: Fails(SILENT),
        mount: Fails(SILENT),
        remove: Fails(SILENT),
        held: Held::Recovers,
    },
    Fault {
        name: "killed",
        by_name: false,
        prepare: nothing,
        begin: |faulty, _| faulty.server.kill(),
        end: |faulty, _| faulty.server.up(),
        create: Fails(REFUSED),
        mount: Fails(REFUSED),
        remove: Fails(REFUSED),
        held: Held::Recovers,
    },
    Fault {
        name: "refusing",
        by_name: false,
        prepare: nothing,
        begin: |faulty, _| packets(faulty, &format!("-I {REJECT}")),
        end: |faulty, _| packets(faulty, &format!("-D {REJECT}")),
        create: Fails(REFUSED),
        mount: Fails(REFUSED),
        remove: Fails(REFUSED),
        held: Held::Recovers,
    },
    Fault {
        name: "port_dropped",
        by_name: false,
        prepare: nothing,
        begin: |faulty, _| packets(faulty, &format!("-I {DROP}")),
        end: |faulty, _| packets(faulty, &format!("-D {DROP}")),
        create: Fails(SILENT),
        mount: Fails(SILENT),
        remove: Fails(SILENT),
        held: Held::Recovers,
    },
    Fault {
        name: "export_withdrawn",
        by_name: false,
        prepare: nothing,
        begin: |faulty, _| faulty.server.restart(Some(&[Export::new(OTHER)])),
        end: healthy_again,
        create: Fails(&["no such export", OTHER]),
        mount: Fails(&["no such export", OTHER]),
        remove: Fails(&["no such export", OTHER]),
        held: Held::Recovers,
    },
    Fault {
        name: "other_ids",
        by_name: false,
        prepare: nothing,
        begin: |faulty, _| with(faulty, |export| Export { fsid: 77, ..export }),
        end: |_, _| Ok(()),
        create: Works,
        mount: Works,
        remove: Works,
        held: Held::IsStale,
    },
    Fault {
        name: "dns_failing",
        by_name: true,
        prepare: nothing,
        begin: |faulty, host| {
            let script = format!(
                "grep -v ' {}' /etc/hosts >/run/hosts; mount --bind /run/hosts /etc/hosts",
                faulty.name
            );
            host.sh(&script).map(drop)
        },
        end: |_, host| host.sh("umount /etc/hosts").map(drop),
        // What needs no new look at the name goes on.
        create: Works,
        mount: Fails(&["resolve", ";"]),
        remove: Works,
        held: Held::Recovers,
    },
    Fault {
        name: "root_squash",
        by_name: false,
        prepare: nothing,
        begin: |faulty, _| with(faulty, |export| export.squash("root_squash")),
        end: healthy_again,
        create: Fails(&["root_squash", "permission denied"]),
        mount: Works,
        remove: Fails(&["root_squash", "permission denied"]),
        held: Held::Recovers,
    },
    Fault {
        name: "share_full",
        by_name: false,
        prepare: small_disk,
        begin: |faulty, _| {
            // ext4 keeps some blocks for directories, after those for data are gone.
            let fill = format!(
                "mkdir {EXPORT}/filler; cd {EXPORT}/filler; cat /dev/zero >data || true; sync -f .
                 n=0; while mkdir $n; do n=$((n+1)); done; cat /dev/zero >>data || true"
            );
            faulty.server.node().sh(&fill).map(drop)
        },
        end: |faulty, _| {
            let clear = format!("rm -r {EXPORT}/filler");
            faulty.server.node().sh(&clear).map(drop)
        },
        create: Fails(&["no space left", "free space"]),
        mount: Works,
        // The trash needs a directory.
        remove: Fails(&["no space left", "free space"]),
        held: Held::Recovers,
    },
    Fault {
        name: "read_only",
        by_name: false,
        prepare: nothing,
        begin: |faulty, _| with(faulty, Export::read_only),
        end: healthy_again,
        create: Fails(&["read-only", "read-write"]),
        mount: Works,
        remove: Fails(&["read-only", "read-write"]),
        held: Held::Recovers,
    },
];

fn nothing(_: &Ganesha) -> Result {
    Ok(())
}

/// Puts a small disk below the export.
fn small_disk(server: &Ganesha) -> Result {
    server
        .node()
        .sh(&format!(
            "truncate -s 24M /srv/small; mkfs.ext4 -qF -m 0 /srv/small
             mount -o loop /srv/small {EXPORT}; rmdir {EXPORT}/lost+found"
        ))
        .context("a small disk for the export")?;
    server.restart(None)
}
