//! More FUSE volumes of one server on one host than a host has reserved source ports for: those that
//! are not used give theirs back, and have one again as soon as they need it.
//!
//! 60 volumes in `make test`, 500 in `make test-long`.

use std::process::ExitCode;

use anyhow::{Context, ensure};
use lab::{
    Call, Export, Ganesha, Lab, Nfsvol, Node, PATIENCE, Part, Result, calls, trial, wait_for,
};

const NEEDS: &[Part] = &[Part::Ganesha, Part::Fuse];
const EXPORT: &str = "/srv/many";
const FEW: usize = 60;
const MANY: usize = 500;
/// Ports from 665 to 1023 are those that a client may take (`sunrpc.min_resvport`).
const RESERVED: usize = 1023 - 665 + 1;
const _: () = assert!(MANY > RESERVED, "too few to show anything");

fn main() -> ExitCode {
    lab::main!(|| vec![trial("idle_volumes_keep_no_port", NEEDS, many)])
}

fn many(lab: &'static Lab) -> Result {
    let count = if lab::long() { MANY } else { FEW };
    let server = Ganesha::start(lab, "many-nas", &[Export::new(EXPORT)])?;
    let node: &'static Node = Box::leak(Box::new(Node::machine(lab, "many-host")?));
    let args = ["--share", &server.share(EXPORT), "--data-path", "fuse"];
    let _nfsvol = Nfsvol::start(node, &args, &[])?;
    let mut places = Vec::new();
    for n in 0..count {
        let name = format!("volume-{n}");
        calls::one(node, Call::create(&name, &[]))?.ok()?;
        let mounted = calls::one(node, Call::mount(&name, "holder"))?.ok()?;
        let place = mounted["Mountpoint"].as_str().context("no mount point")?;
        places.push(place.to_owned());
    }
    let each = |what: &str| {
        let script = format!("for place in {}; do {what}; done", places.join(" "));
        node.sh(&script)
    };
    each("echo first >$place/file; sync $place/file")?;
    // Its own daemon keeps some.
    let connections = || -> Result<usize> {
        let shown = node
            .sh("cat /proc/net/tcp /proc/net/tcp6 | awk '$4 == \"01\" && $3 ~ /:0801$/' | wc -l")?;
        Ok(shown.parse()?)
    };
    let least = connections()?;
    // One without calls is closed after 15 to 30 s.
    wait_for("idle connections to be closed", PATIENCE, || {
        connections().is_ok_and(|left| left < 10)
    })
    .with_context(|| format!("{least} at first, {:?} at the end", connections()))?;
    let read = each("cat $place/file; echo second >>$place/file; sync $place/file")?;
    ensure!(
        read.lines().count() == count,
        "{} files are read",
        read.lines().count()
    );
    for n in 0..count {
        calls::one(node, Call::unmount(&format!("volume-{n}"), "holder"))?.ok()?;
    }
    let local = server.local(EXPORT);
    for n in 0..count {
        let file = local.join(format!("volume-{n}/file"));
        let text = std::fs::read_to_string(&file)?;
        ensure!(text == "first\nsecond\n", "{}: {text:?}", file.display());
    }
    lab::note(format!(
        "{count} volumes, {least} connections after the first writes"
    ));
    Ok(())
}
