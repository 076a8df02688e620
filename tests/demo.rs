//! The demonstrations that users run first: they succeed, and leave nothing behind.

use std::collections::BTreeSet;
use std::process::ExitCode;

use anyhow::ensure;
use lab::{Lab, Nfsvol, Node, Part, Result, trial};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/demo.sh");

fn main() -> ExitCode {
    lab::main!(|| {
        vec![
            trial("without_docker", &[Part::Fuse], without_docker),
            trial("with_docker", &[Part::Docker, Part::Fuse], with_docker),
        ]
    })
}

/// What a demonstration could leave: processes, mounts, network links, control groups. Not those
/// that have ended, whom whoever took them over has not counted yet.
fn traces(node: &Node) -> Result<String> {
    node.sh(
        "ps -eo args | grep -E '[n]fsvol (serve|fuse|embedded)|[d]ockerd|[c]ontainerd' | grep -v '<defunct>' || true
         cut -d' ' -f3- /proc/self/mountinfo; ip -o link | cut -d: -f2
         find /sys/fs/cgroup -name 'nfsvol-demo*'",
    )
}

fn unchanged(before: &str, after: &str) -> Result {
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
    let (before, after) = (lines(before), lines(after));
    let differ: Vec<&String> = before.symmetric_difference(&after).collect();
    ensure!(differ.is_empty(), "left or gone: {differ:#?}");
    Ok(())
}

fn without_docker(lab: &'static Lab) -> Result {
    let node = Node::machine(lab, "one")?;
    let before = traces(&node)?;
    let said = node.ok(&[Nfsvol::binary(), "demo"])?;
    ensure!(said.contains("Nothing is left behind"), "{said}");
    unchanged(&before, &traces(&node)?)
}

fn with_docker(lab: &'static Lab) -> Result {
    let node = Node::machine(lab, "two")?;
    let before = traces(&node)?;
    let said = node.ok(&[SCRIPT, Nfsvol::binary()])?;
    ensure!(
        said.contains("3 bells") && said.contains("Done in"),
        "{said}"
    );
    unchanged(&before, &traces(&node)?)?;
    // In the middle of its second step, as by Ctrl-C.
    let output = node.sh(&format!(
        "{SCRIPT} {} >/srv/out 2>&1 &
         until grep -q 'volume create' /srv/out; do sleep 0.1; done
         kill -TERM $!; wait $! || echo ended with $?",
        Nfsvol::binary()
    ))?;
    ensure!(output.contains("ended with"), "{output}");
    ensure!(!node.sh("cat /srv/out")?.contains("Done in"));
    unchanged(&before, &traces(&node)?)
}
