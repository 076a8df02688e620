//! The file system in a simulated world, against a model.
//!
//! Two hosts, each a model of a kernel over [`Fs`] over [`Nfs3`], work on one server. Programs of
//! both read, write, append, sync, truncate, link, rename and delete the same files and are killed;
//! connections break before and after the server acts, messages are held back and calls overtake
//! each other; the server forgets what was not committed. Every answer is checked ([`model`]), and
//! in the end the disk that the server's power left behind.
//!
//! The seed decides what happens, but for the order in which tokio polls the branches of a
//! `select!`: now and then a seed takes another way. `NFSVOL_SIM_SEEDS=FIRST..END` says which seeds are tried
//! (`0..2000` otherwise), `NFSVOL_SIM_SEED=SEED` runs a single one and prints what happened.
//!
//! Known limits: files are small, and so are pages and what may be held; one directory; no shared
//! maps; calls have no deadline. What a SETATTR of unknown outcome leaves behind is not judged,
//! because the server may still carry it out. Where the kernel itself takes a file's end from an
//! answer that was overtaken, the end is not judged either ([`kernel`]).

#![allow(
    clippy::unwrap_used,
    reason = "a value that is not there fails the test"
)]

mod actors;
mod data;
#[path = "../../tests/simulation/dice.rs"]
mod dice;
#[allow(dead_code, reason = "shared with tests/simulation")]
#[path = "../../tests/simulation/disk.rs"]
mod disk;
mod kernel;
mod model;
mod network;
#[path = "../../tests/simulation/procedures.rs"]
mod procedures;
mod process;
mod server;
mod steps;

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use crate::mutant::{Mutant, put_back};
use crate::nfs::rpc::Settings;
use crate::nfs::rpc::nfs3::{FileHandle, Nfs3};

use super::fs::Fs;
use super::hidden::Hidden;
use super::options::FuseOptions;
use super::write::Bounds;
use actors::{Actor, hammer};
use dice::Dice;
use kernel::{Caches, GENERATIONS, Host};
use model::{Model, View};
use network::Link;
use process::Process;
use server::{Habits, Server, words};

const SEEDS: Range<u64> = 0..2000;
/// Faults happen, and programs begin something, for this long in most runs, and in one of
/// [`LONG_ONE_IN`].
const TROUBLE: Duration = Duration::from_millis(2500);
const LONG_TROUBLE: Duration = Duration::from_secs(12);
const LONG_ONE_IN: u64 = 32;
/// After that, and after all files were closed, nothing is held any more within this time.
const REST: Duration = Duration::from_secs(900);

/// States that some seed has to reach, or the simulation proves less than it seems to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Seen {
    Crash,
    DurableWrite,
    Forgotten,
    Hammered,
    Killed,
    PageUsed,
    PagesDropped,
    PagesKept,
    Remembered,
    RenameRefused,
    SyncedByReader,
    WriteRefused,
    WriterWaited,
}

const ALL_SEEN: [Seen; 13] = [
    Seen::Crash,
    Seen::DurableWrite,
    Seen::Forgotten,
    Seen::Hammered,
    Seen::Killed,
    Seen::PageUsed,
    Seen::PagesDropped,
    Seen::PagesKept,
    Seen::Remembered,
    Seen::RenameRefused,
    Seen::SyncedByReader,
    Seen::WriteRefused,
    Seen::WriterWaited,
];

/// What everybody in one run shares.
#[derive(Debug, Default)]
struct World {
    model: Model,
    server: OnceLock<std::sync::Weak<Server>>,
    calm: AtomicBool,
    failure: Mutex<Option<String>>,
    failed: tokio::sync::Notify,
    seen: Mutex<BTreeSet<Seen>>,
    /// What happened, when it is to be told.
    trace: Option<Mutex<VecDeque<String>>>,
}

impl World {
    fn is_troubled(&self) -> bool {
        !self.calm.load(Ordering::Relaxed)
    }

    fn saw(&self, what: Seen) {
        self.seen.lock().unwrap().insert(what);
    }

    fn note(&self, what: impl FnOnce() -> String) {
        if let Some(trace) = &self.trace {
            let now = tokio::time::Instant::now().into_std();
            static START: OnceLock<std::time::Instant> = OnceLock::new();
            let since = now.duration_since(*START.get_or_init(|| now));
            let mut trace = trace.lock().unwrap();
            trace.push_back(format!("{:9.3} {}", since.as_secs_f64(), what()));
            if trace.len() > TRACE {
                trace.pop_front();
            }
        }
    }

    /// The first failure counts.
    fn fail(&self, what: String) {
        self.note(|| format!("FAILED: {what}"));
        self.failure.lock().unwrap().get_or_insert(what);
        self.failed.notify_one();
    }

    fn has_failed(&self) -> bool {
        self.failure.lock().unwrap().is_some()
    }

    fn demand(&self, checked: Result<(), String>, what: impl FnOnce() -> String) {
        if let Err(error) = checked {
            self.fail(format!("{}: {error}", what()));
        }
    }

    /// The bytes held are the sum over the files.
    fn check_held(&self, host: &Host) {
        self.demand(host.fs.check_held(), || format!("host {}", host.number));
    }

    fn has_no_links(&self) -> bool {
        let server = self.server.get().and_then(std::sync::Weak::upgrade);
        server.is_some_and(|server| server.habits.no_links)
    }

    /// What names lead to on the server.
    fn names(&self, names: &[&[u8]]) -> Vec<Option<u64>> {
        let server = self
            .server
            .get()
            .and_then(std::sync::Weak::upgrade)
            .unwrap();
        let disk = server.disk.lock().unwrap();
        let look = |name: &&[u8]| disk.lookup(disk::ROOT, name).ok();
        names.iter().map(look).collect()
    }
}

/// Lines of a trace that are kept.
const TRACE: usize = 4000;

/// What a run was given by its seed.
struct Plan {
    dice: Dice,
    habits: Habits,
    latency: u64,
    hammers: bool,
    kills: bool,
    faults: bool,
    actors: usize,
    trouble: Duration,
}

impl Plan {
    fn new(seed: u64) -> Self {
        let mut dice = Dice(seed);
        let hammers = seed % 16 == 7;
        let long = seed.is_multiple_of(LONG_ONE_IN);
        let faults = !hammers && dice.below(4) != 0;
        let mut often = |most: u64| if faults { dice.below(most) } else { 0 };
        let habits = Habits {
            break_before: often(40),
            break_after: often(40),
            jukebox: often(20),
            answer_twice: often(50),
            refuse_rename: often(2) * 150,
            refuse_write: often(4) / 3 * 30,
            no_links: often(3) == 1,
            slowness: 0,
            remembers: often(2) == 0,
        };
        let slowness = if dice.below(3) == 0 { 150 } else { 20 };
        Self {
            habits: Habits {
                slowness: if hammers { 40 } else { slowness },
                ..habits
            },
            latency: if hammers { 60 } else { dice.below(20) },
            hammers,
            kills: faults,
            faults,
            actors: 2 + usize::from(long),
            trouble: if long { LONG_TROUBLE } else { TROUBLE },
            dice,
        }
    }
}

/// One run: what it has seen and how many calls were served, or why it failed and what happened.
fn simulate(seed: u64, traced: bool) -> Result<BTreeSet<Seen>, (String, Vec<String>)> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    let world = Arc::new(World {
        trace: traced.then(Mutex::default),
        ..World::default()
    });
    runtime.block_on(async {
        tokio::select! {
            biased;
            () = world.failed.notified() => {}
            () = run(Plan::new(seed), &world) => {}
        }
    });
    drop(runtime);
    let failure = world.failure.lock().unwrap().take();
    match failure {
        None => Ok(std::mem::take(&mut *world.seen.lock().unwrap())),
        Some(failure) => {
            let trace = world.trace.as_ref();
            let trace = trace.map(|trace| trace.lock().unwrap().drain(..).collect());
            Err((failure, trace.unwrap_or_default()))
        }
    }
}

async fn run(mut plan: Plan, world: &Arc<World>) {
    let sizes = 512 << plan.dice.below(3);
    let server = Server::new(
        plan.habits.clone(),
        plan.dice.fork(),
        Arc::clone(world),
        sizes,
    );
    world.server.set(Arc::downgrade(&server)).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let mut hosts = Vec::new();
    for number in 0..2 {
        let link = Link::new(number, Arc::clone(&server), plan.latency);
        let host = host(number, &link, &mut plan, world, directory.path()).await;
        hosts.push((host, link));
    }
    let mut tasks = tokio::task::JoinSet::new();
    let mut processes = Vec::new();
    if plan.hammers {
        let every = Duration::from_millis(25);
        tasks.spawn(hammer(Arc::clone(&hosts[0].0), Arc::clone(world), every));
    } else {
        for (host, _) in &hosts {
            for index in 0..plan.actors {
                let process = Arc::new(Mutex::new(Process::new(host)));
                processes.push(Arc::clone(&process));
                let actor = Actor {
                    host: Arc::clone(host),
                    dice: plan.dice.fork(),
                    leads: index == 0,
                    process,
                };
                tasks.spawn(actor.run(Arc::clone(world)));
            }
        }
    }
    let links: Vec<_> = hosts.iter().map(|(_, link)| Arc::clone(link)).collect();
    trouble(&mut plan, world, &server, &links, &processes).await;
    while let Some(ended) = tasks.join_next().await {
        if ended.is_err() {
            return world.fail("a program panicked".to_owned());
        }
    }
    for (host, _) in &hosts {
        rest(world, host).await;
    }
    server.crash();
    let disk = server.disk.lock().unwrap();
    for file in world.model.files() {
        if let Some((stable, _)) = disk.content(file) {
            let all: Vec<u64> = words(stable).collect();
            let checked = world.model.check(file, View::Disk, 0, &all, true);
            world.demand(checked, || {
                format!("file {file} on the crashed disk: {all:?}")
            });
        }
    }
}

async fn host(
    number: usize,
    link: &Arc<Link>,
    plan: &mut Plan,
    world: &Arc<World>,
    directory: &std::path::Path,
) -> Arc<Host> {
    let mut settings = Settings::new(([192, 0, 2, 1], 2049).into());
    settings.io_timeout = None;
    settings.nconnect = 1 + usize::try_from(plan.dice.below(2)).unwrap();
    let nfs = Nfs3::over(&settings, Arc::clone(link)).unwrap();
    let root = FileHandle::new(&disk::ROOT.to_be_bytes()).unwrap();
    let caches = Arc::new(Caches::default());
    let run_dir = directory.join(number.to_string());
    std::fs::create_dir(&run_dir).unwrap();
    let hidden = Hidden::new(&run_dir, "simulated");
    let options = FuseOptions::default();
    let kernel = Arc::clone(&caches);
    let mut fs = Fs::start(nfs, root, options, kernel, hidden).await.unwrap();
    // Little, so that writers have to wait.
    let all = 2048 << plan.dice.below(4);
    Arc::get_mut(&mut fs).unwrap().bounds = Bounds {
        file: all * 3 / 4,
        all,
        commit: all / 4,
        known: 1 << plan.dice.below(4),
    };
    let generation = GENERATIONS[usize::try_from(plan.dice.below(3)).unwrap()];
    let host = Host::new(number, fs, generation, Arc::clone(world));
    caches.connect(&host);
    host
}

/// Faults, one after the other, and killed programs.
async fn trouble(
    plan: &mut Plan,
    world: &World,
    server: &Server,
    links: &[Arc<Link>],
    processes: &[Arc<Mutex<Process>>],
) {
    let end = tokio::time::Instant::now() + plan.trouble;
    while plan.faults && tokio::time::Instant::now() < end {
        let pause = plan.dice.below(1500);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        let dice = &mut plan.dice;
        let length = Duration::from_millis(dice.below(4000) * (dice.below(100) + 1) / 100);
        match dice.below(4) {
            0 => {
                world.note(|| "the server crashes".to_owned());
                server.crash();
                tokio::time::sleep(length / 4).await;
                server.start();
            }
            // Without a memory, a call that was held back and repeated meanwhile could be carried
            // out after its successors; see the limits in `nfs3.rs`.
            1 if plan.habits.remembers => {
                let link = &links[usize::try_from(dice.below(2)).unwrap()];
                world.note(|| format!("the link of host {} is held for {length:?}", link.host));
                link.hold(true);
                tokio::time::sleep(length).await;
                link.hold(false);
            }
            _ if plan.kills && !processes.is_empty() => {
                let chosen = dice.below(processes.len() as u64);
                let process = &processes[usize::try_from(chosen).unwrap()];
                world.note(|| format!("program {chosen} is killed"));
                process
                    .lock()
                    .unwrap()
                    .killed
                    .store(true, Ordering::Relaxed);
            }
            _ => {}
        }
    }
    tokio::time::sleep_until(end).await;
    world.calm.store(true, Ordering::Relaxed);
}

/// All files are closed: soon nothing is held any more.
async fn rest(world: &World, host: &Host) {
    let end = tokio::time::Instant::now() + REST;
    let busy = || host.fs.room.bytes() > 0 || !host.fs.dirty().is_empty();
    while busy() {
        if tokio::time::Instant::now() > end {
            let (number, held) = (host.number, host.fs.room.bytes());
            return world.fail(format!("host {number} comes to no rest, {held} bytes held"));
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    world.check_held(host);
}

/// The seeds that the environment names.
fn seeds() -> Range<u64> {
    std::env::var("NFSVOL_SIM_SEEDS").map_or(SEEDS, |range| {
        let (first, end) = range.split_once("..").expect("FIRST..END");
        first.parse().unwrap()..end.parse().unwrap()
    })
}

#[test]
fn nothing_is_lost_and_everything_ends() {
    if let Ok(seed) = std::env::var("NFSVOL_SIM_SEED") {
        if let Err((failure, trace)) = simulate(seed.parse().unwrap(), true) {
            panic!("{}\n{failure}", trace.join("\n"));
        }
        return;
    }
    let seeds = seeds();
    let next = AtomicU64::new(seeds.start);
    let failed = AtomicUsize::new(0);
    let seen = Mutex::new(BTreeSet::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || failed.load(Ordering::Relaxed) > 3 {
                        return;
                    }
                    match simulate(seed, false) {
                        Ok(states) => seen.lock().unwrap().extend(states),
                        Err((failure, _)) => {
                            eprintln!("NFSVOL_SIM_SEED={seed}: {failure}");
                            failed.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
    });
    assert_eq!(failed.into_inner(), 0, "seeds failed; see above");
    let seen = seen.into_inner().unwrap();
    let never: Vec<_> = ALL_SEEN.iter().filter(|s| !seen.contains(s)).collect();
    assert!(never.is_empty(), "no seed has seen {never:?}");
}

/// The mended faults that the seeds of `make test` find when they are put back.
const FOUND: [Mutant; 12] = [
    Mutant::CreateTellsOldAttributes,
    Mutant::HeldLeaksBesideReads,
    Mutant::FsyncOfWritersOnly,
    Mutant::FlagsOfTheOpen,
    Mutant::SetattrHidesOthers,
    Mutant::WriteHidesOthers,
    Mutant::HeirsTakeOverMarks,
    Mutant::AppendsKeepPages,
    Mutant::AppendsWaitForTheirPage,
    Mutant::DirtyByNodeId,
    Mutant::OpenInFlightIsNone,
    Mutant::FailedRenameDeletes,
];

#[test]
fn each_mended_fault_is_found_when_it_is_put_back() {
    let next = AtomicUsize::new(0);
    let missed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(mutant) = FOUND.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let _back = put_back(*mutant);
                    let mut seeds = SEEDS;
                    let found = seeds.find_map(|seed| Some((seed, simulate(seed, false).err()?.0)));
                    match found {
                        Some((seed, failure)) => println!("{mutant:?}: seed {seed}: {failure}"),
                        None => missed.lock().unwrap().push(*mutant),
                    }
                }
            });
        }
    });
    let missed = missed.into_inner().unwrap();
    assert!(missed.is_empty(), "no seed finds {missed:?}");
}
