//! The file system in a simulated world, against a model.
//!
//! Two hosts, each a model of a kernel over [`Fs`] over [`Nfs3`], work on one server. Programs of
//! both read, write, append, sync, truncate, link, rename and delete the same files and are killed;
//! connections break before and after the server acts, messages are held back and calls overtake
//! each other; the server forgets what was not committed. Every answer is checked ([`model`]), and
//! in the end the disk that the server's power left behind.
//!
//! What is varied: mount options (`sync`, `noac`, `actimeo=0`, `nconnect`), `io_timeout` with a
//! server that is silent for longer, the kernel's generation, the server's sizes, latency, memory
//! of calls, and what it refuses (NOSPC, IO, JUKEBOX, links), cuts short (READ, WRITE) or leaves
//! out (attributes). What is judged: every byte and size that a program sees, and the errors that
//! it is told ([`model`]); that each listing shows what was there all the time, once, and that a
//! file is made with O_EXCL once ([`names`]); that a rename that fails changes no name; that every
//! operation ends, with `io_timeout` each request within a few times that; that the memory counted
//! is the memory held; that no WRITE lands after a newer one; and in the end the disk. What chance
//! finds too seldom is in [`scenarios`].
//!
//! The seed decides all that happens. `NFSVOL_SIM_SEEDS=FIRST..END` says which seeds are tried
//! (`0..2000` otherwise), `NFSVOL_SIM_SEED=SEED` runs a single one and prints what happened.
//!
//! Known limits: files are small, and so are pages and what may be held; one directory; no shared
//! maps; no glue and no real kernel ([`kernel`] is a model). Where calls time out, neither a cut is
//! judged that did, because the server may still carry it out, nor a write before an fsync or close
//! that reported no error. Where the kernel itself takes
//! a file's end from an answer that was overtaken, the end is not judged either.

#![allow(
    clippy::unwrap_used,
    reason = "a value that is not there fails the test"
)]

mod actors;
mod data;
#[path = "../../crates/nfs/tests/simulation/dice.rs"]
mod dice;
#[allow(dead_code, reason = "shared with tests/simulation")]
#[path = "../../crates/nfs/tests/simulation/disk.rs"]
mod disk;
mod kernel;
mod kills;
mod model;
mod mutants;
mod names;
mod network;
mod plan;
mod pressure;
#[path = "../../crates/nfs/tests/simulation/procedures.rs"]
mod procedures;
mod process;
mod scenarios;
mod server;
mod steps;

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use nfs::rpc::Settings;
use nfs::rpc::nfs3::{FileHandle, Nfs3};

use super::fs::Fs;
use super::hidden::Hidden;
use super::options::FuseOptions;
use super::write::Bounds;
use actors::{Actor, hammer};
use kernel::{Caches, GENERATIONS, Host};
use model::{Model, View};
use names::Names;
use network::{Dialer, Link};
use plan::Plan;
use process::Process;
use server::{Server, words};

const SEEDS: Range<u64> = 0..2000;
/// After all trouble, and after all files were closed, nothing is held any more within this time.
const REST: Duration = Duration::from_secs(900);

/// States that some seed has to reach, or the simulation proves less than it seems to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Seen {
    CommitRefused,
    Crash,
    CutShort,
    DurableWrite,
    ErrorTold,
    Exclusive,
    Forgotten,
    Hammered,
    Killed,
    Listed,
    Lost,
    PageUsed,
    PagesDropped,
    PagesKept,
    Remembered,
    RenameRefused,
    SyncedByReader,
    TimedOut,
    WriteRefused,
    WriterWaited,
}

const ALL_SEEN: [Seen; 20] = [
    Seen::CommitRefused,
    Seen::Crash,
    Seen::CutShort,
    Seen::DurableWrite,
    Seen::ErrorTold,
    Seen::Exclusive,
    Seen::Forgotten,
    Seen::Hammered,
    Seen::Killed,
    Seen::Listed,
    Seen::Lost,
    Seen::PageUsed,
    Seen::PagesDropped,
    Seen::PagesKept,
    Seen::Remembered,
    Seen::RenameRefused,
    Seen::SyncedByReader,
    Seen::TimedOut,
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
    names: Mutex<Names>,
    start: OnceLock<tokio::time::Instant>,
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
            let now = tokio::time::Instant::now();
            let since = now.duration_since(*self.start.get_or_init(|| now));
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

    fn server(&self) -> Arc<Server> {
        let server = self.server.get().and_then(std::sync::Weak::upgrade);
        server.unwrap()
    }

    fn has_no_links(&self) -> bool {
        self.server().habits.no_links
    }

    /// Whether a rename may be carried out when its caller has been gone for long, and move what
    /// has the name by then: one that has timed out, or the hiding of a file, repeated on a server
    /// that has neither links nor a memory of calls.
    fn renames_late(&self) -> bool {
        let habits = &self.server().habits;
        self.model.is_in_doubt() || (habits.no_links && !habits.remembers)
    }

    /// Whether the server refuses calls now and then.
    fn is_faulty(&self) -> bool {
        let habits = &self.server().habits;
        habits.refuse_rename + habits.refuse_write + habits.refuse_commit > 0
    }

    /// What names lead to on the server.
    fn names(&self, names: &[&[u8]]) -> Vec<Option<u64>> {
        let server = self.server();
        let disk = server.disk.lock().unwrap();
        let look = |name: &&[u8]| disk.lookup(disk::ROOT, name).ok();
        names.iter().map(look).collect()
    }
}

/// In so many times `io_timeout` every request ends: it makes a few calls, one after the other.
const ENDS_IN_TIMEOUTS: u64 = 15;

/// What happened, line by line.
type Trace = Vec<String>;

/// Lines of a trace that are kept.
const TRACE: usize = 4000;

/// Its clock goes on when everybody waits.
fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap()
}

/// One run: what it has seen and how many calls were served, or why it failed and what happened.
fn simulate(seed: u64, traced: bool) -> Result<(BTreeSet<Seen>, Trace), (String, Trace)> {
    let runtime = runtime();
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
    let trace = world.trace.as_ref();
    let trace = trace.map(|trace| trace.lock().unwrap().drain(..).collect());
    let trace = trace.unwrap_or_default();
    match failure {
        None => Ok((std::mem::take(&mut *world.seen.lock().unwrap()), trace)),
        Some(failure) => Err((failure, trace)),
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
    if plan.io_timeout > 0 {
        world.model.doubt();
    }
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
            // Where an append went whose program was killed is seen here first.
            world.model.seen(file, 0, &all);
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
    let words = format!("{},io_timeout={}", plan.options(), plan.io_timeout);
    let (options, _) = FuseOptions::of(&words.parse().unwrap()).unwrap();
    let mut settings = Settings::new(([192, 0, 2, 1], 2049).into());
    settings.io_timeout = options.deadline();
    settings.nconnect = 1 + usize::try_from(plan.dice.below(2)).unwrap();
    let nfs = Nfs3::over(&settings, Dialer(Arc::clone(link))).unwrap();
    let root = FileHandle::new(&disk::ROOT.to_be_bytes()).unwrap();
    let caches = Arc::new(Caches::default());
    let run_dir = directory.join(number.to_string());
    std::fs::create_dir(&run_dir).unwrap();
    let mut fs = loop {
        let hidden = Hidden::new(&run_dir, "simulated");
        let kernel = Arc::clone(&caches);
        // The start may time out as well.
        let started = Fs::start(nfs.clone(), root, options.clone(), kernel, hidden);
        if let Ok(fs) = started.await {
            break fs;
        }
    };
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
    let mut end = tokio::time::Instant::now() + plan.trouble;
    if plan.io_timeout > 0 {
        silence(plan, links).await;
        end = tokio::time::Instant::now() + plan.trouble;
    }
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

/// For much longer than `io_timeout` the server says nothing, or loses whatever it is told.
async fn silence(plan: &mut Plan, links: &[Arc<Link>]) {
    tokio::time::sleep(Duration::from_millis(plan.dice.below(1500))).await;
    let times = u64::from(plan.io_timeout) * 1000;
    let length = Duration::from_millis(times * (ENDS_IN_TIMEOUTS + plan.dice.below(10)));
    let silent = plan.habits.lose < 1000;
    for link in links {
        link.hold(silent);
    }
    tokio::time::sleep(length).await;
    for link in links {
        link.hold(false);
    }
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

//= test 1813-3.3.21-verf
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
                        Ok((states, _)) => seen.lock().unwrap().extend(states),
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

#[test]
fn a_seed_runs_the_same_way_each_time() {
    // One without faults, with faults, with timeouts.
    for seed in [1, 2, 3, 5] {
        let run = || {
            simulate(seed, true)
                .map(|(_, trace)| trace)
                .unwrap_or_else(|(_, trace)| trace)
        };
        let (one, other) = (run(), run());
        let same = one.iter().zip(&other).take_while(|(a, b)| a == b).count();
        assert!(
            one == other,
            "seed {seed}, line {same}: {:?} and {:?}",
            one.get(same),
            other.get(same)
        );
    }
}
