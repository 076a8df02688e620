//! Volumes that move between hosts, and what a host at rest costs its home share.

use std::io::Read;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lab::docker::{DOCKER, IMAGE};
use lab::ganesha::{MOUNT_PORT, NFS_PORT};
use lab::{
    Call, DataPath, Export, Ganesha, Host, Lab, Nfsvol, Node, Part, Proxy, Result, calls, trial,
    wait_for,
};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::report::{Report, Samples, Target};
use crate::socket::serve;

/// Moves there and back of each contender.
const MOVES: usize = 4;
/// Hosts that are killed.
const KILLS: usize = 3;
/// The session time that users have unless they set another.
const SESSION: Duration = Duration::from_secs(30);
/// How long a container may take to start.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a host at rest is watched, and how many volumes it has at last.
const WATCHED: Duration = Duration::from_secs(60);
const VOLUMES: usize = 1000;
/// Two polls of the catalog and what follows from them.
const SETTLED: Duration = Duration::from_secs(25);
/// A service that ends when it is asked to.
const SERVICE: &str = "trap 'exit 0' TERM; date >/data/file; sync /data/file; touch /tmp/ready
    while :; do sleep 1 & wait $!; done";

const DOCKER_AND_FUSE: &[Part] = &[Part::Docker, Part::Ganesha, Part::Fuse];
const FUSE: &[Part] = &[Part::Ganesha, Part::Fuse];

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("cluster_move", DOCKER_AND_FUSE, clean_move),
        trial("cluster_killed", FUSE, killed),
        trial("cluster_rest", &[Part::Ganesha], rest),
    ]
}

/// Starts the service on a host and answers its container, once it has written.
fn service(host: &Host, volume: &[&str]) -> Result<String> {
    let mut args = vec!["run", "-d", "--network=host"];
    args.extend(volume);
    args.extend([IMAGE, "sh", "-c", SERVICE]);
    let container = host.engine().ok(&args)?;
    wait_for("the service to write", PATIENCE, || {
        let ready = host
            .engine()
            .docker(&["exec", &container, "test", "-e", "/tmp/ready"]);
        ready.is_ok_and(|output| output.code == 0)
    })?;
    Ok(container)
}

/// Reads the file in a new container; seconds until its first byte is here.
fn first_byte(host: &Host, volume: &[&str]) -> Result<f64> {
    let began = Instant::now();
    let mut run = Command::new(DOCKER)
        .args(["-H", host.engine().url(), "run", "--rm", "--network=host"])
        .args(volume)
        .args([IMAGE, "cat", "/data/file"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut byte = [0];
    let read = run
        .stdout
        .take()
        .context("no output")?
        .read_exact(&mut byte);
    let took = began.elapsed();
    let ended = run.wait()?;
    read.with_context(|| format!("docker run ended with {ended}"))?;
    Ok(took.as_secs_f64())
}

/// The daemon's own log: each call with how long it took.
struct Log<'a> {
    host: &'a Host,
    seen: usize,
}

impl<'a> Log<'a> {
    fn at_its_end(host: &'a Host) -> Self {
        let seen = host.nfsvol().process().log().len();
        Self { host, seen }
    }

    /// Seconds that the calls since then took, up to and with the first `last`.
    fn until(&self, last: &str) -> Result<f64> {
        let log = self.host.nfsvol().process().log();
        let mut sum = 0.0;
        for line in log.get(self.seen..).unwrap_or_default().lines() {
            let Ok(line) = serde_json::from_str::<Value>(line) else {
                continue;
            };
            if let (Some(call), Some(ms)) = (line["call"].as_str(), line["ms"].as_f64()) {
                sum += ms / 1e3;
                if call == last {
                    return Ok(sum);
                }
            }
        }
        anyhow::bail!("no {last} in the log of {}", self.host.node().name())
    }
}

fn clean_move(lab: &'static Lab) -> Result {
    const EXPORT: &str = "/srv/move";
    let report = Report::of("cluster_move")?;
    let server = Ganesha::start(lab, "move-nas", &[Export::new(EXPORT)])?;
    let share = server.share(EXPORT);
    let start = |name| {
        let serve = ["--log", "debug", "--log-format", "json"];
        Host::start_with(lab, name, DataPath::Fuse, &share, &serve, &[])
    };
    let hosts = [start("move-a")?, start("move-b")?];
    hosts[0].ok("volume create -d nfsvol -o access=exclusive db")?;
    for host in &hosts {
        // The engine's own volume holds the file already: it does not move.
        host.engine().ok(&[
            "run",
            "--rm",
            "-v",
            "own:/data",
            IMAGE,
            "cp",
            "/etc/passwd",
            "/data/file",
        ])?;
    }
    let shared = ["--volume-driver=nfsvol", "-v", "db:/data"];
    let own = ["-v", "own:/data"];
    let (mut moves, mut shares, mut engine) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..2 * MOVES {
        let (a, b) = (&hosts[round % 2], &hosts[(round + 1) % 2]);
        for (volume, times) in [(&shared[..], &mut moves), (&own[..], &mut engine)] {
            let container = service(a, volume)?;
            let logs = (Log::at_its_end(a), Log::at_its_end(b));
            let began = Instant::now();
            a.engine().ok(&["stop", &container])?;
            let stopped = began.elapsed().as_secs_f64();
            let read = first_byte(b, volume)?;
            times.push(stopped + read);
            if volume.len() == shared.len() {
                shares.push(logs.0.until("Unmount")? + logs.1.until("Mount")?);
            }
            a.engine().ok(&["rm", "-f", &container])?;
        }
    }
    let own = Samples::new("the engine's own volume, which stays", &engine);
    report.note(
        "docker stop on A to the first byte on B",
        "s",
        Target::None,
        &Samples::new("nfsvol", &moves),
        Some(&own),
    )?;
    report.note(
        "of that, in the calls of the driver",
        "s",
        Target::AtMost(0.5),
        &Samples::new("nfsvol", &shares),
        None,
    )?;
    for host in &hosts {
        host.node().power_off()?;
    }
    server.stop()
}

/// A host with nfsvol alone.
struct Machine {
    node: &'static Node,
    nfsvol: Nfsvol<'static>,
}

impl Machine {
    fn ok(&self, call: Call) -> Result<Value> {
        calls::one(self.node, call)?.ok()
    }

    fn mount(&self, volume: &str) -> Result<String> {
        let mounted = self.ok(Call::mount(volume, "bench"))?;
        let place = mounted["Mountpoint"].as_str();
        Ok(place.context("no mount point")?.to_owned())
    }
}

fn killed(lab: &'static Lab) -> Result {
    const EXPORT: &str = "/srv/killed";
    let report = Report::of("cluster_killed")?;
    let server = Ganesha::start(lab, "killed-nas", &[Export::new(EXPORT)])?;
    let share = server.share(EXPORT);
    let session = format!("{}s", SESSION.as_secs());
    let start = |name| -> Result<Machine> {
        let node: &'static Node = Box::leak(Box::new(Node::machine(lab, name)?));
        let nfsvol = serve(
            node,
            &share,
            &["--data-path", "fuse", "--session", &session],
        )?;
        Ok(Machine { node, nfsvol })
    };
    let machines = [start("killed-a")?, start("killed-b")?];
    machines[0].ok(Call::create("db", &[("access", "exclusive")]))?;
    let place = machines[0].mount("db")?;
    machines[0]
        .node
        .sh(&format!("echo 0 >{place}/file; sync {place}/file"))?;
    let mut samples = Vec::new();
    for round in 0..KILLS {
        let (a, b) = (&machines[round % 2], &machines[(round + 1) % 2]);
        // Not just after a renewal, nor just before one.
        thread::sleep(SESSION / 6 + SESSION / 10);
        a.node.power_off()?;
        let died = Instant::now();
        let place = b.mount("db")?;
        let read = b.node.sh(&format!("cat {place}/file"))?;
        samples.push(died.elapsed().as_secs_f64());
        ensure!(read == round.to_string(), "{read}");
        b.node.sh(&format!(
            "echo {} >{place}/file; sync {place}/file",
            round + 1
        ))?;
        a.node.boot()?;
        a.nfsvol.up()?;
    }
    let most = SESSION.as_secs_f64() + 3.0;
    report.note(
        "a host is killed to its exclusive volume read elsewhere, session 30 s",
        "s",
        Target::AtMost(most),
        &Samples::new("nfsvol", &samples),
        None,
    )?;
    for machine in machines {
        machine.node.power_off()?;
    }
    server.stop()
}

fn rest(lab: &'static Lab) -> Result {
    const EXPORT: &str = "/srv/rest";
    let report = Report::of("cluster_rest")?;
    let server = Ganesha::start(lab, "rest-nas", &[Export::new(EXPORT)])?;
    let ports = [NFS_PORT, MOUNT_PORT];
    let proxy = Proxy::start(lab, "rest-way", &server.ip(), &ports)?;
    let node: &'static Node = Box::leak(Box::new(Node::machine(lab, "rest-host")?));
    let options = format!("port={NFS_PORT},mountport={MOUNT_PORT}");
    let share = format!("{}:{EXPORT}", proxy.ip());
    let _nfsvol = serve(node, &share, &["--mount-options", &options])?;
    for volumes in [1, VOLUMES] {
        let there = calls::one(node, Call::list())?.ok()?["Volumes"]
            .as_array()
            .map_or(0, Vec::len);
        let name = format!("of-{volumes}-{{n}}");
        for answer in calls::all(node, &[Call::create(&name, &[]).times(volumes - there)])? {
            answer.ok()?;
        }
        thread::sleep(SETTLED);
        proxy.take_calls()?;
        thread::sleep(WATCHED);
        let calls: u64 = proxy.take_calls()?.values().sum();
        report.note(
            &format!("RPCs of a host at rest a minute, {volumes} volumes"),
            "calls",
            Target::AtMost(30.0),
            &Samples::new("nfsvol", &[calls as f64]),
            None,
        )?;
    }
    node.power_off()?;
    server.stop()
}
