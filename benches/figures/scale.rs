//! A home share of 10,000 volumes and 500 hosts: what a person waits for, and what this host owes to
//! the others meanwhile. The volumes and hosts are documents that the trial writes.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use lab::process::Output;
use lab::{Call, Export, Ganesha, Lab, Node, Part, Result, calls, trial, wait_for};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::load;
use crate::report::{Report, Samples, Target};
use crate::socket::serve;

const EXPORT: &str = "/srv/scale";
const VOLUMES: usize = 10_000;
const HOSTS: usize = 500;
/// So many hosts hold volumes, and so many each.
const HOLDERS: usize = 300;
const HELD: usize = 30;
const ROUNDS: usize = 5;
/// Ten people look at the status page, which asks anew each 5 s.
const TABS: usize = 10;
const METRICS: &str = "127.0.0.1:9911";
const PAGE: &str = "/status.json?find=";
/// As short as one may be, so that a minute has many renewals.
const SESSION: &str = "6s";
/// How long renewals are watched, in seconds.
const WATCHED: &str = "60";
/// A host that is new reads 10,000 records.
const FOLLOWED: Duration = Duration::from_secs(280);

pub(crate) fn trials() -> Vec<Trial> {
    vec![trial("scale", &[Part::Ganesha], scale)]
}

fn scale(lab: &'static Lab) -> Result {
    let report = Report::of("scale")?;
    let server = Ganesha::start(lab, "scale-nas", &[Export::new(EXPORT)])?;
    let node: &'static Node = Box::leak(Box::new(Node::machine(lab, "scale-host")?));
    let args = ["--metrics", METRICS, "--session", SESSION];
    let nfsvol = serve(node, &server.share(EXPORT), &args)?;
    calls::one(node, Call::create("pattern", &[]))?.ok()?;
    let own = server.local(EXPORT).join(".nfsvol");
    write_documents(&own)?;
    wait_for("all volumes to be listed", FOLLOWED, || {
        thread::sleep(Duration::from_secs(2));
        let shown = nfsvol.command(&["ls", "--json"]);
        shown.and_then(listed).is_ok_and(|count| count > VOLUMES)
    })?;

    let note = |what: &str, unit, target, samples: &[f64]| {
        let samples = Samples::new("nfsvol", samples);
        report.note(what, unit, target, &samples, None)
    };
    let ls = || -> Result<Vec<f64>> {
        let took = (0..ROUNDS).map(|_| {
            let output = nfsvol.command(&["ls"])?;
            let took = output.took;
            output.ok()?;
            Ok(took.as_secs_f64())
        });
        took.collect()
    };
    let page = |tabs: usize, rounds: usize, pause: &str| {
        let (tabs, rounds) = (tabs.to_string(), rounds.to_string());
        load::on(node, &["page", METRICS, PAGE, &tabs, &rounds, pause])
    };
    note(
        "ls of 10,000 volumes on 500 hosts",
        "s",
        Target::AtMost(0.5),
        &ls()?,
    )?;
    note(
        "status page of them",
        "s",
        Target::AtMost(0.5),
        &page(1, ROUNDS, "0")?,
    )?;
    let hosts = own.join("hosts").join(node.name());
    let renewals = || load::on(node, &["renewals", &hosts.display().to_string(), WATCHED]);
    let rest = renewals()?;
    let (busy, seen) = thread::scope(|scope| {
        let tabs = scope.spawn(|| page(TABS, 12, "5"));
        let busy = renewals();
        (busy, tabs.join())
    });
    let seen = seen.ok().context("a thread panicked")??;
    note(
        "status page in one of ten tabs",
        "s",
        Target::AtMost(0.5),
        &seen,
    )?;
    note(
        "between two renewals at rest, p99",
        "s",
        Target::None,
        &rest,
    )?;
    let most = Target::AtMost(2.0 * rest[0]);
    note(
        "between two renewals beside ten tabs, p99",
        "s",
        most,
        &busy?,
    )?;
    node.power_off()?;
    server.stop()
}

fn listed(output: Output) -> Result<usize> {
    let volumes: Value = serde_json::from_str(&output.ok()?)?;
    Ok(volumes.as_array().context("no list")?.len())
}

/// Records like the one that nfsvol has made, and hosts that are there and hold some of them.
fn write_documents(own: &Path) -> Result {
    let pattern = fs::read(own.join("volumes/pattern/record.json"))?;
    let pattern: Value = serde_json::from_slice(&pattern)?;
    let volume = |n: usize| format!("v{n}");
    for n in 0..VOLUMES {
        let mut record = pattern.clone();
        record["name"] = json!(volume(n));
        record["data_dir"] = json!(volume(n));
        record["id"] = json!(format!("{n:032x}"));
        let dir = own.join("volumes").join(volume(n));
        fs::create_dir(&dir)?;
        fs::write(dir.join("record.json"), record.to_string())?;
    }
    for n in 0..HOSTS {
        let host = format!("host{n}");
        let dir = own.join("hosts").join(&host);
        fs::create_dir(&dir)?;
        fs::write(dir.join("alive.0.1"), "")?;
        let hold = |k: usize| {
            let hold = json!({
                "nonce": format!("{:016x}", n * 100 + k), "access": "shared",
                "since": 1_795_000_000, "holders": ["container 0123456789ab"],
            });
            (volume((n * HELD + k) % VOLUMES), hold)
        };
        let held = if n < HOLDERS { HELD } else { 0 };
        let holds: serde_json::Map<_, _> = (0..held).map(hold).collect();
        let document = json!({
            "format": 1, "host": host, "id": n.to_string(), "boot": "b", "session": "0",
            "session_ms": 3_600_000, "holds": holds,
        });
        let file = own.join("hosts").join(format!("{host}.1.json"));
        fs::write(file, document.to_string())?;
    }
    Ok(())
}
