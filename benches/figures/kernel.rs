//! The kernel data path in a guest: volumes by an engine's API, and throughput.

use anyhow::Context;
use lab::docker::{Engine, IMAGE};
use lab::{Call, Export, Ganesha, Lab, Node, Part, Result, calls, trial};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::docker::Cycle;
use crate::load;
use crate::report::{Report, Samples, Target};
use crate::socket::serve;

const VOLUMES: usize = 500;
/// Volumes in one container, so that the engine's work for containers does not hide the drivers'.
const TOGETHER: usize = 25;
/// Of throughput; each contender is in each place of the order equally often.
const ROUNDS: usize = 12;
const MEGABYTES: &str = "128";
const PLAIN: [&str; 2] = ["/tmp/plain", "/tmp/plain-again"];
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

/// Fresh files through nfsvol's mount and through two plain ones, each first, second and last in
/// turn. The second plain mount has nfsvol's read-ahead: it shows what that does to a read, and by how
/// much equals differ in a write.
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
    // Superblocks and connections of their own, or the kernel would hand out nfsvol's.
    for dir in PLAIN {
        guest.sh(&format!(
            "mkdir -p {dir}
             mount -i -t nfs -o addr={ip},vers=3,nosharecache,{OPTIONS} {share}/volume {dir}",
            ip = server.ip(),
            share = server.share(EXPORT),
        ))?;
    }
    guest.sh(&format!(
        "ahead() {{ echo /sys/class/bdi/$(mountpoint -d $1)/read_ahead_kb; }}
         cat $(ahead {volume}) >$(ahead {})",
        PLAIN[1]
    ))?;
    let places = [volume, PLAIN[0], PLAIN[1]];
    let mut writes = [const { Vec::new() }; 3];
    let mut reads = [const { Vec::new() }; 3];
    let bytes: f64 = MEGABYTES.parse::<f64>()? * 1.048_576;
    for round in 0..=ROUNDS {
        for turn in 0..places.len() {
            // Both directions, so that nobody always follows the same one.
            let place = match round % 2 {
                0 => (round / 2 + turn) % places.len(),
                _ => (round / 2 + places.len() - turn) % places.len(),
            };
            let path = format!("{}/{round}-{place}", places[place]);
            let written = load::one(guest, &["write", &path, MEGABYTES])?;
            let read = load::one(guest, &["read", &path])?;
            guest.sh(&format!("rm {path}"))?;
            // The first round warms the server and the guest up.
            if round > 0 {
                writes[place].push(bytes / written);
                reads[place].push(bytes / read);
            }
        }
    }
    for (what, rates) in [
        ("sequential write, fsync", &writes),
        ("sequential cold read", &reads),
    ] {
        let [own, plain, again] = rates;
        let plain = Samples::new("plain mount", plain);
        report.note_rounds(
            what,
            "MB/s",
            Target::TimesPeer(0.97),
            &Samples::new("nfsvol", own),
            &plain,
        )?;
        report.note_rounds(
            &format!("{what}: a plain mount with nfsvol's read-ahead"),
            "MB/s",
            Target::None,
            &Samples::new("plain mount", again),
            &plain,
        )?;
    }
    guest.power_off()?;
    server.stop()
}
