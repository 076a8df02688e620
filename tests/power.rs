//! Power failures in the middle of load: guests with disks of their own are killed and booted again
//! from the same images, and what they had not written to their disks is gone.
//!
//! First the server: the Linux kernel's, with an export that is `sync` and one that is `async`, each
//! the home share of hosts. Then a host, with its daemon, its FUSE workers and its state
//! directory. Nothing is restarted but what lost its power.
//!
//! What is looked at after each cut (`load` says what the hosts do meanwhile):
//! - every host goes on: it writes, takes and hands over the exclusive volume, makes new volumes;
//! - no volume is lost: each host lists every one that any host of its share was told is there;
//! - on `sync`, every write whose fsync was answered is in the file, in its order;
//! - the workers of the other hosts, and of the other volumes, are the processes that they were;
//! - of an exclusive volume's writers none wrote between two writes of another.
//!
//! An `async` export forgets what it answered in its last seconds, so of what was made and written there
//! counts what is older than [`FORGOTTEN`], or than the last sync(1) on the server, which comes before every
//! other cut; volumes of the rest are repaired, or made again. What is written until all hosts go on
//! again does not count either: whose the exclusive volume is, is settled by then.
//!
//! `NFSVOL_POWER_ASYNC=1` exports everything `async`: then the first cuts lose volumes and fsyncs that count,
//! and the trial of the server fails with their names.
//!
//! Known limits: both exports are on one disk, whose journal the `sync` one keeps short: what the
//! `async` one forgets is mostly the bytes of files, not their names.

#[path = "power/load.rs"]
mod load;

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result as Anyhow, anyhow, ensure};
use lab::{Knfsd, Lab, Node, PATIENCE, Part, Result, trial, wait_for};
use load::{Host, Load};

/// How much load there is between two cuts.
const BETWEEN: Duration = Duration::from_secs(4);
/// A cut comes at another moment of the load each time.
const STAGGER: Duration = Duration::from_millis(370);
/// What the file system of an `async` export may forget: xfs writes its log within 30 s, and data
/// within 35 s.
const FORGOTTEN: Duration = Duration::from_secs(40);

/// Set for a server that forgets what it must not.
const ALL_ASYNC: &str = "NFSVOL_POWER_ASYNC";

fn main() -> ExitCode {
    lab::main!(|| {
        let parts = &[Part::Guest, Part::Knfsd, Part::Fuse];
        vec![
            trial("a_server_without_power_loses_nothing", parts, server),
            trial("a_host_without_power_loses_nothing", parts, host),
            trial("what_is_lost_would_be_seen", &[], load::judges),
        ]
    })
}

fn cuts() -> usize {
    if lab::long() { 20 } else { 3 }
}

/// How a share's server treats what it has answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Sync,
    Async,
}

impl Kind {
    fn export(self) -> &'static str {
        match self {
            Self::Sync => "/export/sync",
            Self::Async => "/export/async",
        }
    }
}

struct World {
    server: Knfsd,
    hosts: &'static [Host],
    load: &'static Load,
}

fn server(lab: &'static Lab) -> Result {
    let server = serve(lab, "power-nas")?;
    let mut hosts = Vec::new();
    for (name, kind) in [
        ("power-a", Kind::Sync),
        ("power-b", Kind::Sync),
        ("power-c", Kind::Async),
        ("power-f", Kind::Async),
    ] {
        hosts.push(Host::start(Node::machine(lab, name)?, &server, kind)?);
    }
    under_load(server, hosts, World::cut_server)
}

fn host(lab: &'static Lab) -> Result {
    let server = serve(lab, "power-nas-2")?;
    let lives = Node::machine(lab, "power-d")?;
    let cut = Node::guest(lab, "power-e")?;
    let hosts = vec![
        Host::start(lives, &server, Kind::Sync)?,
        Host::start(cut, &server, Kind::Sync)?,
    ];
    under_load(server, hosts, World::cut_host)
}

fn serve(lab: &'static Lab, name: &str) -> Result<Knfsd> {
    let exports = [Kind::Sync, Kind::Async].map(|kind| {
        let forgets = kind == Kind::Async || std::env::var_os(ALL_ASYNC).is_some();
        let options = if forgets { "async" } else { "sync" };
        (kind.export(), options)
    });
    Knfsd::start_exporting(lab, name, "512M", &exports)
}

/// The threads of the load.
type Running = Vec<JoinHandle<()>>;

fn under_load(
    server: Knfsd,
    hosts: Vec<Host>,
    cuts: impl FnOnce(&World, &mut Running) -> Result,
) -> Result {
    // The load's threads outlive a host's boot.
    let hosts: &'static [Host] = Vec::leak(hosts);
    let load: &'static Load = Box::leak(Box::new(Load::begin(hosts)?));
    let world = World {
        server,
        hosts,
        load,
    };
    let mut running: Vec<_> = hosts.iter().flat_map(|host| load.run(host)).collect();
    let result = world.begun().and_then(|()| cuts(&world, &mut running));
    for host in hosts {
        host.stop();
    }
    result?;
    for work in running {
        work.join().map_err(|_| anyhow!("a load panicked"))?;
    }
    lab::note(world.load.summary());
    world.history()
}

impl World {
    fn begun(&self) -> Result {
        self.goes_on("begin")
    }

    /// When the server had everything on its disk: what was made before is there.
    fn synced(&self) -> Anyhow<Instant> {
        let at = Instant::now();
        self.server.node().sh("sync")?;
        Ok(at)
    }

    fn cut_server(&self, _: &mut Running) -> Result {
        let mut on_disk = self.synced()?;
        for cut in 0..cuts() {
            if cut % 2 == 1 {
                on_disk = self.synced()?;
            }
            thread::sleep(BETWEEN + STAGGER * u32::try_from(cut)?);
            let before = self.workers(self.hosts)?;
            let at = Instant::now();
            self.server.reboot()?;
            on_disk = on_disk.max(at.checked_sub(FORGOTTEN).unwrap_or(on_disk));
            let forgotten = self.load.forget(Kind::Async, on_disk, Instant::now());
            self.goes_on(&format!("go on after cut {cut} of the server"))?;
            self.load
                .forget_writes(Kind::Async, on_disk, Instant::now());
            let hosts = self.hosts.iter().filter(|host| host.kind == Kind::Async);
            self.load
                .make_again(&hosts.collect::<Vec<_>>(), &forgotten)?;
            let now = self.workers(self.hosts)?;
            ensure!(
                now == before,
                "workers {before:?} are {now:?} after cut {cut}"
            );
            self.nothing_is_lost()?;
        }
        Ok(())
    }

    /// Cuts the last host.
    fn cut_host(&self, running: &mut Running) -> Result {
        let (last, others) = self.hosts.split_last().context("no host")?;
        for cut in 0..cuts() {
            thread::sleep(BETWEEN + STAGGER * u32::try_from(cut)?);
            let before = self.workers(others)?;
            last.power_off()?;
            self.go_on(others, &format!("go on beside the dead host {cut}"))?;
            last.boot()?;
            // What was asked before the cut may wait for its answer for long; nobody waits for it.
            running.truncate(others.len() * load::WORKS);
            running.extend(self.load.run(last));
            self.goes_on(&format!("go on after cut {cut} of a host"))?;
            let now = self.workers(others)?;
            ensure!(
                now == before,
                "workers {before:?} are {now:?} after cut {cut}"
            );
            self.nothing_is_lost()?;
        }
        Ok(())
    }

    /// The processes that serve the volumes that stay mounted.
    fn workers(&self, of: &[Host]) -> Anyhow<Vec<(String, u64)>> {
        of.iter()
            .map(|host| Ok((host.name().to_owned(), host.worker()?)))
            .collect()
    }

    fn goes_on(&self, what: &str) -> Result {
        self.go_on(self.hosts, what)
    }

    /// Waits until each of these hosts has done again all that it does.
    fn go_on(&self, hosts: &[Host], what: &str) -> Result {
        let since = Instant::now();
        for host in hosts {
            let done = || self.load.goes_on(host, since);
            wait_for(&format!("{} to {what}", host.name()), PATIENCE, done)
                .with_context(|| self.load.last_words(host))?;
        }
        lab::note(format!("{what}: {:?}", since.elapsed()));
        Ok(())
    }

    /// Each host lists every volume that it can count on.
    fn nothing_is_lost(&self) -> Result {
        self.load.nothing_failed()?;
        for host in self.hosts {
            let wanted = self.load.volumes(host.kind);
            let mut missing = Vec::new();
            let found = wait_for("volumes", PATIENCE, || {
                let listed = host.listed().unwrap_or_default();
                missing.clone_from(&wanted);
                missing.retain(|name| !listed.contains(name));
                missing.is_empty()
            });
            found.with_context(|| format!("{} has lost {missing:?}", host.name()))?;
        }
        Ok(())
    }

    fn history(&self) -> Result {
        let kinds: BTreeSet<Kind> = self.hosts.iter().map(|host| host.kind).collect();
        for host in self.hosts {
            self.load.check_file(&self.server, host.kind, &host.own())?;
        }
        for kind in kinds {
            self.load.check_file(&self.server, kind, load::EXCLUSIVE)?;
            self.load.one_writer(kind)?;
        }
        Ok(())
    }
}
