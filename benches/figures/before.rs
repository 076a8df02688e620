//! The FUSE data path beside that of an earlier commit, in turns on one server: `BASELINE=COMMIT`.
//!
//! Each has a host of its own, and after each round the figures of both are from the same minute; who
//! goes first changes from round to round, because the server is busy yet with what the first one did.
//! Calls to the server and the worker's processor time are noted besides, because they depend less on
//! what else the machine does.

use std::time::Duration;

use anyhow::{Context, ensure};
use lab::ganesha::{MOUNT_PORT, NFS_PORT};
use lab::{Call, Export, Ganesha, Lab, Nfsvol, Node, Part, Proxy, Result, calls, trial};
use libtest_mimic::Trial;

use crate::load;
use crate::report::{Report, Samples, Target};

const EXPORT: &str = "/srv/before";
/// The binary of that commit, which `make bench` builds.
const BASELINE: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/target/bench/baseline/release/nfsvol"
);
/// Even, so that each side goes first as often as the other.
const ROUNDS: usize = 8;
/// Size of the large file.
const MEGABYTES: u64 = 256;
/// Blocks of 4 KiB that are read out of it.
const READS: &str = "20000";
const READERS: &str = "8";
const WRITERS: &str = "4";
const WRITES: &str = "500";
const FILES: &str = "1000";
/// How far away the far server is, each way.
const FAR: Duration = Duration::from_millis(1);
/// Metrics show what was so within this time.
const SHOWN: Duration = Duration::from_millis(1100);
/// Files that a mount knows beside which a stream is measured.
const KNOWN: usize = 200_000;

pub(crate) fn trials() -> Vec<Trial> {
    vec![trial("fuse_before", &[Part::Ganesha, Part::Fuse], before)]
}

/// A host with one of the two binaries.
struct Side {
    node: &'static Node,
    nfsvol: Nfsvol<'static>,
    name: &'static str,
}

impl Side {
    fn start(
        lab: &'static Lab,
        server: &Ganesha,
        name: &'static str,
        binary: &str,
    ) -> Result<Self> {
        let node: &'static Node = Box::leak(Box::new(Node::machine(lab, name)?));
        let ports = format!("port={NFS_PORT},mountport={MOUNT_PORT}");
        let share = server.share(EXPORT);
        let args = [
            "--share",
            &share,
            "--log",
            "warn",
            "--data-path",
            "fuse",
            "--mount-options",
            &ports,
        ];
        let nfsvol = Nfsvol::start_binary(node, binary, &args, &[])?;
        Ok(Self { node, nfsvol, name })
    }

    /// Mounts a volume that both hosts do not share.
    fn mount(&self, volume: &str, options: &[(&str, &str)]) -> Result<String> {
        let volume = format!("{volume}-{}", self.name);
        calls::one(self.node, Call::create(&volume, options))?.ok()?;
        let mounted = calls::one(self.node, Call::mount(&volume, "bench"))?.ok()?;
        let place = mounted["Mountpoint"].as_str();
        Ok(place.context("no mount point")?.to_owned())
    }

    fn unmount(&self, volume: &str) -> Result {
        let volume = format!("{volume}-{}", self.name);
        calls::one(self.node, Call::unmount(&volume, "bench"))?
            .ok()
            .map(drop)
    }

    /// Seconds of a processor that the worker which was started last has spent.
    fn spent(&self) -> Result<f64> {
        let worker = self.node.sh("pgrep -n -x nfsvol")?;
        load::one(self.node, &["spent", &worker])
    }
}

/// Calls to the server of all FUSE volumes that are mounted there.
pub(crate) fn rpcs(nfsvol: &Nfsvol<'_>) -> Result<f64> {
    std::thread::sleep(SHOWN);
    let metrics = nfsvol.metrics()?;
    let lines = metrics
        .lines()
        .filter(|line| line.starts_with("nfsvol_volume_rpcs_total"));
    let count = |line: &str| line.rsplit(' ').next().and_then(|n| n.parse::<f64>().ok());
    lines.map(|line| count(line).context(line.to_owned())).sum()
}

/// What is measured: a figure's name and unit, the volume's options, and how, in the mounted directory
/// in this round.
type Measured<'a> = (
    &'a str,
    &'a str,
    &'a [(&'a str, &'a str)],
    &'a dyn Fn(&Side, &str, usize) -> Result<f64>,
);

fn before(lab: &'static Lab) -> Result {
    ensure!(
        std::path::Path::new(BASELINE).exists(),
        "{BASELINE} is absent: `make bench` builds it"
    );
    let report = Report::of("fuse_before")?;
    let server = Ganesha::start(lab, "before-nas", &[Export::new(EXPORT)])?;
    let proxy = Proxy::start(lab, "before-far", &server.ip(), &[NFS_PORT, MOUNT_PORT])?;
    proxy.delay(FAR);
    let sides = [
        Side::start(lab, &server, "now", Nfsvol::binary())?,
        Side::start(lab, &server, "before", BASELINE)?,
    ];
    let size = MEGABYTES.to_string();
    let rate = |seconds: f64| (MEGABYTES * load::MIB) as f64 / 1e6 / seconds;
    let write = |side: &Side, dir: &str, _| {
        load::one(side.node, &["write", &format!("{dir}/large"), &size]).map(rate)
    };
    let read = |side: &Side, dir: &str, _| {
        load::one(side.node, &["read", &format!("{dir}/large")]).map(rate)
    };
    let random = |side: &Side, dir: &str, _| {
        load::one(
            side.node,
            &["random", &format!("{dir}/large"), READERS, READS],
        )
    };
    let sync = |side: &Side, dir: &str, _| load::one(side.node, &["sync", dir, WRITERS, WRITES]);
    let create = |side: &Side, dir: &str, round| {
        load::one(side.node, &["create", &format!("{dir}/new.{round}"), FILES])
    };
    let tar = lab.dir().join("tree.tar");
    let tar = tar.to_str().context("the path is not UTF-8")?;
    let checkout = env!("CARGO_MANIFEST_DIR");
    lab::process::sh(&format!("tar -C {checkout} -cf {tar} src tests docs"))?.ok()?;
    let untar = |side: &Side, dir: &str, round| {
        let tree = format!("{dir}/tree.{round}");
        side.node.sh(&format!("mkdir {tree}"))?;
        load::command(side.node, &["tar", "-C", &tree, "-xf", tar])
    };
    let small = [("options", "wsize=65536")];
    let share = format!("{}:{EXPORT}", proxy.ip());
    // No portmapper answers there.
    let ports = format!("wsize=65536,port={NFS_PORT},mountport={MOUNT_PORT}");
    let far = [("options", ports.as_str()), ("share", share.as_str())];
    let figures: &[Measured<'_>] = &[
        ("sequential write, fsync", "MB/s", &[], &write),
        ("sequential cold read", "MB/s", &[], &read),
        ("random 4 KiB reads, 8 readers", "/s", &[], &random),
        ("4 KiB write + fsync, 4 writers", "/s", &[], &sync),
        ("create 1,000 files", "s", &[], &create),
        ("untar a source tree", "s", &[], &untar),
        ("sequential write, wsize=65536", "MB/s", &small, &write),
        (
            "sequential write, wsize=65536, 1 ms each way",
            "MB/s",
            &far,
            &write,
        ),
    ];
    for (number, figure) in figures.iter().enumerate() {
        let volume = ["plain", "small", "far"][figure.2.len()];
        let least = if figure.2.is_empty() { 0.95 } else { 2.0 };
        beside(&report, &sides, volume, figure, least)
            .with_context(|| format!("figure {number}"))?;
    }
    known(&report, &sides[0], &server)
}

/// Both in turns; the ratio is the median of the rounds' own.
fn beside(
    report: &Report,
    sides: &[Side; 2],
    volume: &str,
    &(what, unit, options, measure): &Measured<'_>,
    least: f64,
) -> Result {
    let mut samples = [const { Vec::new() }; 2];
    let mut counts = [const { Vec::new() }; 2];
    let mut spent = [const { Vec::new() }; 2];
    for round in 0..ROUNDS {
        for place in [round % 2, 1 - round % 2] {
            let side = &sides[place];
            let dir = side.mount(volume, options)?;
            let (calls, processor) = (rpcs(&side.nfsvol)?, side.spent()?);
            samples[place].push(measure(side, &dir, round)?);
            spent[place].push(1e3 * (side.spent()? - processor));
            counts[place].push(rpcs(&side.nfsvol)? - calls);
            side.unmount(volume)?;
        }
    }
    let [own, old] = [0, 1].map(|place| Samples::new(sides[place].name, &samples[place]));
    report.note_rounds(what, unit, Target::TimesPeer(least), &own, &old)?;
    let [own, old] = [0, 1].map(|place| Samples::new(sides[place].name, &counts[place]));
    let calls = format!("{what}: calls to the server");
    report.note(&calls, "calls", Target::None, &own, Some(&old))?;
    let [own, old] = [0, 1].map(|place| Samples::new(sides[place].name, &spent[place]));
    let processor = format!("{what}: processor time of the worker");
    report.note(&processor, "ms", Target::None, &own, Some(&old))
}

/// A stream through a mount that knows many files, beside one through a mount that knows none.
fn known(report: &Report, side: &Side, server: &Ganesha) -> Result {
    side.mount("known", &[])?;
    side.unmount("known")?;
    let local = server.local(EXPORT).join(format!("known-{}", side.name));
    for n in 0..KNOWN {
        std::fs::File::create(local.join(format!("file-{n:06}")))?;
    }
    let size = MEGABYTES.to_string();
    let stream = |dir: &str| -> Result<f64> {
        let took = load::one(side.node, &["write", &format!("{dir}/large"), &size])?;
        Ok((MEGABYTES * load::MIB) as f64 / 1e6 / took)
    };
    let (mut many, mut none) = (Vec::new(), Vec::new());
    let dir = side.mount("known", &[])?;
    side.node
        .run_task(&lab::process::Task {
            limit: Some(Duration::from_secs(300)),
            ..lab::process::Task::new(&["sh", "-euc", &format!("ls -l {dir} | wc -l")])
        })?
        .ok()?;
    for _ in 0..ROUNDS {
        many.push(stream(&dir)?);
        let fresh = side.mount("plain", &[])?;
        none.push(stream(&fresh)?);
        side.unmount("plain")?;
    }
    side.unmount("known")?;
    let what = "sequential write, 200,000 files known";
    let (many, none) = (
        Samples::new("known", &many),
        Samples::new("fresh mount", &none),
    );
    report.note_rounds(what, "MB/s", Target::TimesPeer(0.9), &many, &none)
}
