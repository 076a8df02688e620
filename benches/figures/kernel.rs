//! The kernel data path in a guest: volumes by an engine's API, and throughput.

use anyhow::Context;
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::docker::Cycle;
use crate::lab::docker::{Engine, IMAGE};
use crate::lab::{Call, Export, Ganesha, Lab, Node, Part, Result, calls, trial};
use crate::load;
use crate::report::{Report, Samples, Target};
use crate::socket::serve;

const VOLUMES: usize = 500;
/// Volumes in one container, so that the engine's work for containers does not hide the drivers'.
const TOGETHER: usize = 25;
const ROUNDS: usize = 5;
const MEGABYTES: &str = "256";
/// What both contenders mount with.
const OPTIONS: &str = "nolock,proto=tcp,mountproto=tcp,port=2049,mountport=20048,nosuid,nodev";

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "engine",
            &[Part::Ganesha, Part::Guest, Part::Docker],
            engine,
        ),
        trial("kernel", &[Part::Ganesha, Part::Guest], throughput),
    ]
}

/// A cycle through the engine's API, beside the `local` driver with NFS, and beside the `local`
/// driver without, which shows what the engine itself takes.
fn engine(lab: &'static Lab) -> Result {
    const EXPORT: &str = "/srv/engine";
    let report = Report::of("engine")?;
    let server = Ganesha::start(lab, "engine-nas", &[Export::new(EXPORT)])?;
    server.node().sh(&format!(
        "mkdir {EXPORT}/local; cd {EXPORT}/local; seq 0 {VOLUMES} | xargs mkdir"
    ))?;
    let guest: &'static Node = Box::leak(Box::new(Node::guest(lab, "engine-host")?));
    let engine = Engine::start(lab, guest)?;
    let options = format!("nfsvers=3,{OPTIONS}");
    let _nfsvol = serve(guest, &server.share(EXPORT), &["--mount-options", &options])?;
    let nfs = json!({
        "type": "nfs",
        "o": format!("addr={},vers=3,{OPTIONS}", server.ip()),
        "device": format!(":{EXPORT}/local/{{n}}"),
    });
    let contenders = [
        ("nfsvol", "nfsvol", json!({})),
        ("local, type=nfs", "local", nfs),
        ("local, no NFS", "local", json!({})),
    ];
    let mut results = Vec::new();
    for (name, driver, options) in contenders {
        results.push((name, cycles(guest, driver, options)?));
    }
    let steps = [
        "create",
        "attach + detach, container",
        "attach + detach",
        "remove",
    ];
    let per_volume = |times: &[f64]| times.iter().sum::<f64>() / VOLUMES as f64 * 1e3;
    let (_, own) = &results[0];
    for (name, peer) in &results[1..] {
        let target = match *name {
            "local, type=nfs" => Target::TimesPeer(2.0),
            _ => Target::None,
        };
        report.note(
            "cycle of a volume, by the engine's API",
            "ms",
            target,
            &Samples::new("nfsvol", &[per_volume(own)]),
            Some(&Samples::new(name, &[per_volume(peer)])),
        )?;
        for (step, what) in steps.iter().enumerate() {
            let what = match step {
                1 => "of it, the container",
                2 => "of it, attach + detach",
                _ => &format!("of it, {what}"),
            };
            report.note(
                what,
                "ms",
                Target::None,
                &Samples::new("nfsvol", &[per_volume(&own[step..=step])]),
                Some(&Samples::new(name, &[per_volume(&peer[step..=step])])),
            )?;
        }
    }
    engine.dockerd().stop()?;
    guest.power_off()?;
    server.stop()
}

fn cycles(guest: &Node, driver: &str, options: Value) -> Result<Vec<f64>> {
    let cycle = Cycle {
        driver: driver.to_owned(),
        options,
        volumes: VOLUMES,
        together: TOGETHER,
        image: IMAGE.to_owned(),
    };
    let script = serde_json::to_string(&cycle)?;
    load::on(guest, &["docker", "/run/docker.sock", &script])
}

/// The same file through nfsvol's mount and through a plain one, in turns.
fn throughput(lab: &'static Lab) -> Result {
    const EXPORT: &str = "/srv/kernel";
    let report = Report::of("kernel")?;
    let server = Ganesha::start(lab, "kernel-nas", &[Export::new(EXPORT)])?;
    let guest: &'static Node = Box::leak(Box::new(Node::guest(lab, "kernel-host")?));
    let options = format!("nfsvers=3,{OPTIONS}");
    let _nfsvol = serve(guest, &server.share(EXPORT), &["--mount-options", &options])?;
    calls::one(guest, Call::create("volume", &[]))?.ok()?;
    let mounted = calls::one(guest, Call::mount("volume", "bench"))?.ok()?;
    let volume = mounted["Mountpoint"].as_str().context("no mount point")?;
    // A superblock of its own, or the kernel would hand out nfsvol's.
    guest.sh(&format!(
        "mkdir -p /tmp/plain {EXPORT}
         mount -i -t nfs -o addr={ip},vers=3,nosharecache,{OPTIONS} {share}/volume /tmp/plain",
        ip = server.ip(),
        share = server.share(EXPORT),
    ))?;
    let mut rates = [const { Vec::new() }; 4];
    for _ in 0..ROUNDS {
        for (place, dir) in [volume, "/tmp/plain"].into_iter().enumerate() {
            let path = format!("{dir}/{place}");
            let rate = |seconds: f64| MEGABYTES.parse().map(|n: f64| n * 1.048_576 / seconds);
            rates[place].push(rate(load::one(guest, &["write", &path, MEGABYTES])?)?);
            rates[place + 2].push(rate(load::one(guest, &["read", &path])?)?);
        }
    }
    for (what, [own, plain]) in [
        ("sequential write, fsync", [&rates[0], &rates[1]]),
        ("sequential cold read", [&rates[2], &rates[3]]),
    ] {
        report.note(
            what,
            "MB/s",
            Target::TimesPeer(0.97),
            &Samples::new("nfsvol", own),
            Some(&Samples::new("plain mount", plain)),
        )?;
    }
    guest.power_off()?;
    server.stop()
}
