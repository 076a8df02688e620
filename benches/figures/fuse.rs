//! The FUSE data path, beside sshfs, nfs-cp and the export directory itself, all on one server.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, anyhow};
use lab::ganesha::{MOUNT_PORT, NFS_PORT};
use lab::{
    Call, Export, Ganesha, Lab, Nfsvol, Node, Part, Process, Proxy, Result, Shared, calls, trial,
    wait_for,
};
use libtest_mimic::Trial;

use crate::load;
use crate::report::{Report, Samples, Target};
use crate::socket::serve;

const EXPORT: &str = "/srv/bench";
const NEEDS: &[Part] = &[Part::Ganesha, Part::Fuse];
const ROUNDS: usize = 3;
/// Size of the large file.
const MEGABYTES: u64 = 512;
/// How far away the far server is, each way.
const FAR: Duration = Duration::from_millis(1);
/// Blocks of 4 KiB that are read out of the large file.
const READS: u64 = 100_000;
const READERS: &str = "8";
const WRITERS: &str = "4";
/// Writes of each writer.
const WRITES: &str = "1000";
const FILES: &str = "2000";

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        // The first: a worker that nothing was asked of.
        trial("fuse_rest", NEEDS, rest),
        trial("fuse_stream", NEEDS, stream),
        trial("fuse_far", NEEDS, far),
        trial("fuse_random", NEEDS, random),
        trial("fuse_sync", NEEDS, sync),
        trial("fuse_files", NEEDS, files),
        trial("fuse_loaded", NEEDS, loaded),
    ]
}

/// One server; on the same computer, nfsvol with its volumes and an sshfs mount.
struct Bench {
    server: Ganesha,
    proxy: Proxy,
    host: &'static Node,
    _nfsvol: Nfsvol<'static>,
    _sshd: Process<'static>,
    /// Files that nfs-cp has made: it wants each to be new.
    copies: AtomicU32,
}

static BENCH: Shared<Bench> = Shared::new();

fn bench(lab: &'static Lab) -> Result<&'static Bench> {
    BENCH.get(|| Bench::start(lab))
}

fn mebibytes(count: u64) -> f64 {
    (count * load::MIB) as f64 / 1e6
}

impl Bench {
    fn start(lab: &'static Lab) -> Result<Self> {
        let server = Ganesha::start(lab, "bench-nas", &[Export::new(EXPORT)])?;
        let proxy = Proxy::start(lab, "bench-way", &server.ip(), &[NFS_PORT, MOUNT_PORT])?;
        proxy.delay(FAR);
        // Between them is the loopback device only: no bridge, no firewall.
        let host = server.node();
        let ports = format!("port={NFS_PORT},mountport={MOUNT_PORT}");
        let share = server.share(EXPORT);
        let more = ["--data-path", "fuse", "--mount-options", &ports];
        let nfsvol = serve(host, &share, &more)?;
        let nas = server.node();
        nas.sh(&format!("mkdir {EXPORT}/ssh {EXPORT}/itself {EXPORT}/cp"))?;
        let keys = host.dir().join("ssh");
        let keys = keys.display();
        nas.sh(&format!(
            "mkdir -p {keys} /run/sshd
             ssh-keygen -q -t ed25519 -N '' -f {keys}/host
             ssh-keygen -q -t ed25519 -N '' -f {keys}/user"
        ))?;
        let hostkey = format!("HostKey={keys}/host");
        let users = format!("AuthorizedKeysFile={keys}/user.pub");
        let mut argv = vec!["/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null"];
        for option in [
            &hostkey,
            &users,
            "StrictModes=no",
            "PermitRootLogin=yes",
            "Subsystem=sftp /usr/lib/openssh/sftp-server",
        ] {
            argv.extend(["-o", option]);
        }
        let sshd = nas.spawn("sshd", &argv)?;
        let bench = Self {
            server,
            proxy,
            host,
            _nfsvol: nfsvol,
            _sshd: sshd,
            copies: AtomicU32::new(0),
        };
        bench.host.sh(&format!("mkdir {}", bench.sshfs()))?;
        wait_for("sshfs", Duration::from_secs(30), || {
            bench.remount_sshfs().is_ok()
        })?;
        Ok(bench)
    }

    fn sshfs(&self) -> String {
        self.host.dir().join("sshfs").display().to_string()
    }

    fn remount_sshfs(&self) -> Result {
        let dir = self.host.dir();
        let dir = dir.display();
        self.host.sh(&format!(
            "umount {mount} 2>/dev/null || :
             sshfs -o IdentityFile={dir}/ssh/user,StrictHostKeyChecking=no,UserKnownHostsFile=/dev/null \
               root@{ip}:{EXPORT}/ssh {mount} </dev/null >/dev/null 2>{dir}/logs/sshfs.log",
            mount = self.sshfs(),
            ip = self.server.ip(),
        ))?;
        Ok(())
    }

    /// Mounts a volume of this name, made now if there is none; answers where.
    fn mount(&self, name: &str, options: &[(&str, &str)]) -> Result<String> {
        calls::one(self.host, Call::create(name, options))?.ok()?;
        let mounted = calls::one(self.host, Call::mount(name, "bench"))?.ok()?;
        Ok(mounted["Mountpoint"]
            .as_str()
            .context("no mount point")?
            .to_owned())
    }

    fn unmount(&self, name: &str) -> Result {
        calls::one(self.host, Call::unmount(name, "bench"))?
            .ok()
            .map(drop)
    }

    fn far(&self) -> Result<String> {
        let share = format!("{}:{EXPORT}", self.proxy.ip());
        self.mount("far", &[("share", &share)])
    }

    /// The process that serves the volume that was mounted last.
    fn worker(&self) -> Result<String> {
        self.host.sh("pgrep -n -x nfsvol")
    }

    /// Seconds of a processor that the worker and the server have spent so far.
    fn spent(&self) -> Result<[f64; 2]> {
        let worker = load::one(self.host, &["spent", &self.worker()?])?;
        let nas = self.server.node();
        let server = load::one(nas, &["spent", &nas.sh("pgrep -x ganesha.nfsd")?])?;
        Ok([worker, server])
    }

    /// Seconds that nfs-cp takes from memory to a new file of the server.
    fn copy_there(&self, ip: &str) -> Result<f64> {
        let bytes = MEGABYTES * load::MIB;
        self.host.sh(&format!(
            "[ -e /run/large ] || head -c {bytes} /dev/urandom >/run/large"
        ))?;
        let number = self.copies.fetch_add(1, Ordering::Relaxed);
        load::command(self.host, &["nfs-cp", "/run/large", &url(ip, number)])
    }

    /// And back into memory.
    fn copy_back(&self, ip: &str) -> Result<f64> {
        let number = self.copies.load(Ordering::Relaxed) - 1;
        let took = load::command(self.host, &["nfs-cp", &url(ip, number), "/run/back"])?;
        let bytes = MEGABYTES * load::MIB;
        self.host.sh(&format!(
            "[ $(stat -c %s /run/back) = {bytes} ]; rm /run/back"
        ))?;
        Ok(took)
    }
}

fn url(ip: &str, number: u32) -> String {
    format!(
        "nfs://{ip}{EXPORT}/cp/large.{number}\
         ?version=3&nfsport={NFS_PORT}&mountport={MOUNT_PORT}"
    )
}

/// Runs each contender once a round; answers what each measured.
fn turns(contenders: &[(&str, &dyn Fn() -> Result<f64>)]) -> Result<Vec<Samples>> {
    let mut samples = vec![Vec::new(); contenders.len()];
    for _ in 0..ROUNDS {
        for ((name, contender), samples) in contenders.iter().zip(&mut samples) {
            samples.push(contender().with_context(|| (*name).to_owned())?);
        }
    }
    Ok(contenders
        .iter()
        .zip(&samples)
        .map(|((name, _), samples)| Samples::new(name, samples))
        .collect())
}

fn stream(lab: &'static Lab) -> Result {
    let bench = bench(lab)?;
    let report = Report::of("fuse_stream")?;
    let volume = bench.mount("stream", &[])?;
    let size = MEGABYTES.to_string();
    let rate = |seconds: f64| mebibytes(MEGABYTES) / seconds;
    let (host, nas) = (bench.host, bench.server.node());
    let file = |dir: &str| format!("{dir}/large");
    let [own, ssh, itself] = [
        file(&volume),
        file(&bench.sshfs()),
        file(&format!("{EXPORT}/itself")),
    ];
    let write = |node: &Node, path: &str| load::one(node, &["write", path, &size]).map(rate);
    let read = |node: &Node, path: &str| load::one(node, &["read", path]).map(rate);
    let ip = bench.server.ip();
    let written = turns(&[
        ("nfsvol", &|| write(host, &own)),
        ("sshfs", &|| write(host, &ssh)),
        ("nfs-cp", &|| bench.copy_there(&ip).map(rate)),
        ("export directory", &|| write(nas, &itself)),
    ])?;
    note_stream(&report, "sequential write, fsync", 300.0, &written, 5.0)?;
    let read = turns(&[
        ("nfsvol", &|| read(host, &own)),
        ("sshfs", &|| read(host, &ssh)),
        ("nfs-cp", &|| bench.copy_back(&ip).map(rate)),
        ("export directory", &|| {
            load::one(nas, &["read-warm", &itself]).map(rate)
        }),
    ])?;
    note_stream(&report, "sequential cold read", 500.0, &read, 0.0)?;
    bench.unmount("stream")
}

fn note_stream(
    report: &Report,
    what: &str,
    least: f64,
    contenders: &[Samples],
    times_sshfs: f64,
) -> Result {
    let own = &contenders[0];
    report.note(
        what,
        "MB/s",
        Target::AtLeast(least),
        own,
        Some(&contenders[3]),
    )?;
    let beside_sshfs = match times_sshfs {
        0.0 => Target::None,
        times => Target::TimesPeer(times),
    };
    report.note(what, "MB/s", beside_sshfs, own, Some(&contenders[1]))?;
    report.note(
        what,
        "MB/s",
        Target::TimesPeer(0.9),
        own,
        Some(&contenders[2]),
    )
}

fn far(lab: &'static Lab) -> Result {
    let bench = bench(lab)?;
    let report = Report::of("fuse_far")?;
    let path = format!("{}/large", bench.far()?);
    let size = MEGABYTES.to_string();
    let rate = |seconds: f64| mebibytes(MEGABYTES) / seconds;
    let host = bench.host;
    let ip = bench.proxy.ip();
    let written = turns(&[
        ("nfsvol", &|| {
            load::one(host, &["write", &path, &size]).map(rate)
        }),
        ("nfs-cp", &|| bench.copy_there(ip).map(rate)),
    ])?;
    let read = turns(&[
        ("nfsvol", &|| load::one(host, &["read", &path]).map(rate)),
        ("nfs-cp", &|| bench.copy_back(ip).map(rate)),
    ])?;
    for (what, samples) in [
        ("sequential write, fsync, 1 ms each way", written),
        ("sequential cold read, 1 ms each way", read),
    ] {
        let (own, peer) = (&samples[0], &samples[1]);
        report.note(what, "MB/s", Target::AtLeast(300.0), own, Some(peer))?;
    }
    bench.unmount("far")
}

fn random(lab: &'static Lab) -> Result {
    let bench = bench(lab)?;
    let report = Report::of("fuse_random")?;
    let volume = bench.mount("random", &[])?;
    let (host, nas) = (bench.host, bench.server.node());
    let size = MEGABYTES.to_string();
    let (own, ssh) = (
        format!("{volume}/large"),
        format!("{}/random", bench.sshfs()),
    );
    let itself = format!("{EXPORT}/itself/random");
    load::one(host, &["write", &own, &size])?;
    nas.sh(&format!(
        "cp {EXPORT}/random/large {itself}; ln -f {itself} {EXPORT}/ssh/random"
    ))?;
    let rate = |node: &Node, path: &str, count: u64| {
        load::one(node, &["random", path, READERS, &count.to_string()])
    };
    let spent = Mutex::new([const { Vec::new() }; 2]);
    let samples = turns(&[
        ("nfsvol", &|| {
            let before = bench.spent()?;
            let rate = rate(host, &own, READS)?;
            let after = bench.spent()?;
            let mut spent = spent.lock().map_err(|_| anyhow!("a contender panicked"))?;
            for (place, spent) in spent.iter_mut().enumerate() {
                spent.push((after[place] - before[place]) / READS as f64 * 1e6);
            }
            Ok(rate)
        }),
        ("sshfs", &|| rate(host, &ssh, READS / 10)),
    ])?;
    let (own, peer) = (&samples[0], &samples[1]);
    let what = "random 4 KiB reads, 8 readers";
    report.note(what, "/s", Target::AtLeast(30_000.0), own, Some(peer))?;
    // What bounds it: two processors carry these, the kernel's part in the readers, and the load.
    let [worker, server] = &*spent.lock().map_err(|_| anyhow!("a contender panicked"))?;
    report.note(
        "processor time a read, worker beside server",
        "µs",
        Target::None,
        &Samples::new("nfsvol", worker),
        Some(&Samples::new("nfs-ganesha", server)),
    )?;
    bench.unmount("random")
}

fn sync(lab: &'static Lab) -> Result {
    let bench = bench(lab)?;
    let report = Report::of("fuse_sync")?;
    let volume = bench.mount("sync", &[])?;
    let (host, nas) = (bench.host, bench.server.node());
    let rate = |node: &Node, dir: &str| load::one(node, &["sync", dir, WRITERS, WRITES]);
    let samples = turns(&[
        ("nfsvol", &|| rate(host, &volume)),
        ("sshfs", &|| rate(host, &bench.sshfs())),
        ("export directory", &|| {
            rate(nas, &format!("{EXPORT}/itself"))
        }),
    ])?;
    let what = "4 KiB write + fsync, 4 writers";
    let own = &samples[0];
    report.note(what, "/s", Target::AtLeast(3_000.0), own, Some(&samples[2]))?;
    report.note(what, "/s", Target::None, own, Some(&samples[1]))?;
    bench.unmount("sync")
}

fn files(lab: &'static Lab) -> Result {
    let bench = bench(lab)?;
    let report = Report::of("fuse_files")?;
    let (host, nas) = (bench.host, bench.server.node());
    let checkout = env!("CARGO_MANIFEST_DIR");
    let tar = host.dir().join("tree.tar");
    let tar = tar.to_str().context("the path is not UTF-8")?;
    host.sh(&format!(
        "tar -C {checkout} -cf {tar} src tests docs Cargo.lock README.md"
    ))?;
    let sshfs = bench.sshfs();
    let itself = format!("{EXPORT}/itself");
    let mut samples = [const { [const { Vec::new() }; 3] }; 3];
    let mut synced = Vec::new();
    let [creates, lists, untars] = &mut samples;
    for round in 0..ROUNDS {
        for column in 0..3 {
            let (node, dir) = match column {
                0 => (host, bench.mount("files", &[])?),
                1 => (host, sshfs.clone()),
                _ => (nas, itself.clone()),
            };
            let new = format!("{dir}/new.{round}");
            creates[column].push(load::one(node, &["create", &new, FILES])?);
            // Nothing of it may be known on this host.
            match column {
                0 => {
                    bench.unmount("files")?;
                    bench.mount("files", &[])?;
                }
                1 => bench.remount_sshfs()?,
                _ => {}
            }
            lists[column].push(load::command(node, &["ls", "-l", &new])?);
            let tree = format!("{dir}/tree.{round}");
            node.sh(&format!("mkdir {tree}"))?;
            untars[column].push(load::command(node, &["tar", "-C", &tree, "-xf", tar])?);
            if column == 0 {
                bench.unmount("files")?;
            }
        }
        // What closing durably costs without any network.
        let tree = format!("{itself}/synced.{round}");
        nas.sh(&format!("mkdir {tree}; tar -C {tree} -xf {tar}"))?;
        synced.push(load::one(
            nas,
            &["copy-synced", &tree, &format!("{tree}.copy")],
        )?);
    }
    let whats = [
        "create 2,000 files",
        "ls -l of them, cold",
        "untar a source tree",
    ];
    for (what, columns) in whats.iter().zip(&samples) {
        let own = Samples::new("nfsvol", &columns[0]);
        let ssh = Samples::new("sshfs", &columns[1]);
        let itself = Samples::new("export directory", &columns[2]);
        report.note(what, "s", Target::TimesPeer(2.0), &own, Some(&ssh))?;
        report.note(what, "s", Target::None, &own, Some(&itself))?;
    }
    // What bounds it: a file that was closed is durable.
    let own = Samples::new("nfsvol", &samples[2][0]);
    let synced = Samples::new("export directory, each file synced", &synced);
    report.note(whats[2], "s", Target::None, &own, Some(&synced))
}

/// A worker that has nothing to do.
fn rest(lab: &'static Lab) -> Result {
    let bench = bench(lab)?;
    let report = Report::of("fuse_rest")?;
    let volume = bench.mount("rest", &[])?;
    bench.host.sh(&format!(
        "echo kept >{volume}/file; ls -l {volume}; cat {volume}/file"
    ))?;
    let worker = bench.worker()?;
    let mut processor = Vec::new();
    for _ in 0..ROUNDS {
        processor.push(load::one(bench.host, &["cpu", &worker, "10"])?);
    }
    let held = load::one(bench.host, &["memory", &worker])?;
    let held = Samples::new("nfsvol", &[held]);
    let processor = Samples::new("nfsvol", &processor);
    report.note(
        "worker at rest, resident",
        "MiB",
        Target::AtMost(8.0),
        &held,
        None,
    )?;
    report.note(
        "worker at rest, processor",
        "%",
        Target::AtMost(0.1),
        &processor,
        None,
    )?;
    bench.unmount("rest")
}

/// The most that a worker holds in memory under all of the loads above at once.
fn loaded(lab: &'static Lab) -> Result {
    let bench = bench(lab)?;
    let report = Report::of("fuse_loaded")?;
    let volume = bench.mount("loaded", &[])?;
    let host = bench.host;
    let size = MEGABYTES.to_string();
    let large = format!("{volume}/large");
    let more = format!("{volume}/more");
    let dir = format!("{volume}/new");
    load::one(host, &["write", &large, &size])?;
    load::one(host, &["read", &large])?;
    std::thread::scope(|scope| {
        let (large, more, dir, volume) = (&large, &more, &dir, &volume);
        let size = &size;
        let loads: [Vec<&str>; 4] = [
            vec!["read", large],
            vec!["write", more, size],
            vec!["create", dir, FILES],
            vec!["sync", volume, WRITERS, "100"],
        ];
        let threads = loads.map(|load| scope.spawn(move || load::one(host, &load)));
        for thread in threads {
            thread.join().ok().context("a thread panicked")??;
        }
        anyhow::Ok(())
    })?;
    load::one(host, &["random", &large, READERS, "20000"])?;
    let worker = bench.worker()?;
    let held = load::on(host, &["memory", &worker])?;
    let most = Samples::new("nfsvol", &[held[1]]);
    let what = "worker under all loads, most resident";
    report.note(what, "MiB", Target::AtMost(96.0), &most, None)?;
    // It lets go of its buffers when there has been nothing to do for a while.
    std::thread::sleep(Duration::from_secs(12));
    let held = load::one(host, &["memory", &worker])?;
    let held = Samples::new("nfsvol", &[held]);
    let what = "worker at rest after that, resident";
    report.note(what, "MiB", Target::None, &held, None)?;
    bench.unmount("loaded")
}
