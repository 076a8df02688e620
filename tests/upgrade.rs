//! An upgrade of the daemon from an earlier commit (BASELINE in the Makefile) with volumes attached, on both
//! data paths: what serves them goes on, and the new daemon lets go of it. `make test-long` runs it.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, ensure};
use lab::ganesha::LONG_LEASE;
use lab::{
    Call, DataPath, Export, Ganesha, Lab, Nfsvol, Node, PATIENCE, Part, Result, before, calls,
    trial, wait_for,
};
use serde_json::Value;

const EXPORT: &str = "/srv/upgrade";
/// A guard fences after half of it, and guests are slow.
const SESSION: Duration = Duration::from_secs(40);
const VOLUMES: [(&str, &[(&str, &str)]); 2] =
    [("shared", &[]), ("one", &[("access", "exclusive")])];
/// Appends line by line, until a write fails.
const WRITER: &str = "n=0; while :; do
    n=$((n+1)); echo $n | dd of=PLACE/log oflag=append conv=notrunc,fsync 2>/dev/null || exit 1
done";

fn main() -> ExitCode {
    lab::main!(|| {
        let fuse = &[Part::Before, Part::Ganesha, Part::Fuse];
        let kernel = &[Part::Before, Part::Ganesha, Part::Fuse, Part::Guest];
        vec![
            trial("fuse", fuse, |lab| upgrade(lab, DataPath::Fuse)),
            trial("kernel", kernel, |lab| upgrade(lab, DataPath::Kernel)),
        ]
    })
}

/// The processes that serve volumes, and those that watch them.
fn attendants(node: &Node) -> Result<Vec<String>> {
    let found = node.sh("pgrep -f '[ ](fuse-worker|kernel-guard)' || true")?;
    Ok(found.lines().map(str::to_owned).collect())
}

fn upgrade(lab: &'static Lab, data_path: DataPath) -> Result {
    let (word, node) = match data_path {
        DataPath::Fuse => ("fuse", Node::machine(lab, "fuse-a")?),
        DataPath::Kernel => ("kernel", Node::guest(lab, "kernel-a")?),
    };
    let nas = Ganesha::start_leasing(
        lab,
        &format!("{word}-nas"),
        &[Export::new(EXPORT)],
        LONG_LEASE,
    )?;
    let (share, session) = (nas.share(EXPORT), format!("{}s", SESSION.as_secs()));
    let args = [
        "--share",
        &share,
        "--session",
        &session,
        "--poll",
        "1s",
        "--data-path",
    ];
    let ours = [&args[..], &[word]].concat();
    let others = [&args[..], &["fuse", "--mount-deadline", "4s"]].concat();
    let other = Node::machine(lab, &format!("{word}-b"))?;
    let _other = Nfsvol::start(&other, &others, &[])?;
    let before = Nfsvol::start_binary(&node, &before(), &ours, &[])?;
    let ok = |call| calls::one(&node, call)?.ok();
    let lines = |volume: &str| {
        let log = nas.local(EXPORT).join(volume).join("log");
        std::fs::read_to_string(log).map_or(0, |text| text.lines().count())
    };
    let write_on = |volume: &str| {
        let written = lines(volume);
        wait_for(&format!("{volume} to be written to"), PATIENCE, || {
            lines(volume) > written + 5
        })
    };
    let mut writers = Vec::new();
    for (volume, options) in VOLUMES {
        ok(Call::create(volume, options))?;
        let answer: Value = ok(Call::mount(volume, "writer"))?;
        let place = answer["Mountpoint"].as_str().context("no mount point")?;
        let script = WRITER.replace("PLACE", place);
        writers.push(node.spawn(&format!("writer-{volume}"), &["sh", "-c", &script])?);
        write_on(volume)?;
    }
    let serving = attendants(&node)?;
    ensure!(!serving.is_empty());

    before.process().stop()?;
    let after = Nfsvol::start(&node, &ours, &[])?;
    // For longer than the right that the daemon before has told of.
    std::thread::sleep(SESSION * 3 / 4);
    for (volume, _) in VOLUMES {
        write_on(volume)?;
        let refused = calls::one(&other, Call::remove(volume))?.fails()?;
        ensure!(refused.contains(node.name()), "{refused}");
    }
    ensure!(
        attendants(&node)? == serving,
        "{serving:?} are {:?}",
        attendants(&node)?
    );
    let refused = calls::one(&other, Call::mount("one", "other"))?.fails()?;
    ensure!(refused.contains("exclusive"), "{refused}");

    for (writer, (volume, _)) in writers.iter().zip(VOLUMES) {
        writer.kill()?;
        ok(Call::unmount(volume, "writer"))?;
    }
    wait_for("what served the volumes to end", PATIENCE, || {
        attendants(&node).is_ok_and(|left| left.is_empty())
    })?;
    calls::one(&other, Call::mount("one", "other"))?.ok()?;
    calls::one(&other, Call::unmount("one", "other"))?.ok()?;
    for (volume, _) in VOLUMES {
        wait_for(&format!("{volume} to be removed"), PATIENCE, || {
            let removed = calls::one(&other, Call::remove(volume));
            removed.is_ok_and(|answer| answer.status == 200)
        })?;
    }
    after.process().stop()
}
