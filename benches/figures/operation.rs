//! What who runs a host waits for: a managed plugin that is enabled, and `nfsvol doctor`.

use std::time::Instant;

use lab::docker::{Engine, IMAGE};
use lab::{Export, Ganesha, Lab, Nfsvol, Node, Part, Result, trial};
use libtest_mimic::Trial;

use crate::report::{Report, Samples, Target};

const ROUNDS: usize = 5;
/// A dead server is waited for.
const DEAD_ROUNDS: usize = 3;

pub(crate) fn trials() -> Vec<Trial> {
    let plugin_parts: &[Part] = &[Part::Docker, Part::Ganesha, Part::Fuse];
    vec![
        trial("plugin", plugin_parts, plugin),
        trial("doctor", &[Part::Ganesha], doctor),
    ]
}

/// From `docker plugin enable` to the files of a volume, read by `docker cp` out of a container that
/// never runs.
fn plugin(lab: &'static Lab) -> Result {
    let report = Report::of("plugin")?;
    let server = Ganesha::start(lab, "plugin-nas", &[Export::new("/srv/plugin")])?;
    let node: &'static Node = Box::leak(Box::new(Node::machine(lab, "plugin-host")?));
    let engine = Engine::start(lab, node)?;
    engine.managed_plugin()?;
    let share = format!("NFSVOL_SHARE={}", server.share("/srv/plugin"));
    engine.ok(&["plugin", "set", "nfsvol", &share])?;
    let mut samples = Vec::new();
    for _ in 0..ROUNDS {
        let began = Instant::now();
        engine.ok(&["plugin", "enable", "nfsvol"])?;
        let create = [
            "create",
            "--volume-driver",
            "nfsvol",
            "-v",
            "db:/data",
            IMAGE,
        ];
        let container = engine.ok(&create)?;
        engine.ok(&["cp", &format!("{container}:/data/."), "-"])?;
        samples.push(began.elapsed().as_secs_f64());
        engine.ok(&["rm", "-v", &container])?;
        engine.ok(&["plugin", "disable", "-f", "nfsvol"])?;
    }
    report.note(
        "docker plugin enable to a volume's files",
        "s",
        Target::AtMost(2.0),
        &Samples::new("nfsvol", &samples),
        None,
    )?;
    node.power_off()?;
    server.stop()
}

fn doctor(lab: &'static Lab) -> Result {
    let report = Report::of("doctor")?;
    let server = Ganesha::start(lab, "doctor-nas", &[Export::new("/srv/doctor")])?;
    let node = Node::machine(lab, "doctor-host")?;
    let share = server.share("/srv/doctor");
    let times = |rounds: usize| -> Result<Vec<f64>> {
        let doctor = [Nfsvol::binary(), "doctor", "--json", &share];
        let run = |_| Ok(node.run(&doctor)?.took.as_secs_f64());
        (0..rounds).map(run).collect()
    };
    for (what, most, rounds, dead) in [
        ("a healthy share", 1.0, ROUNDS, false),
        ("a server that does not answer", 10.0, DEAD_ROUNDS, true),
    ] {
        if dead {
            server.freeze()?;
        }
        report.note(
            &format!("nfsvol doctor on {what}"),
            "s",
            Target::AtMost(most),
            &Samples::new("nfsvol", &times(rounds)?),
            None,
        )?;
    }
    server.thaw()?;
    node.power_off()?;
    server.stop()
}
