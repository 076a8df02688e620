//! Two hosts and a server, at one moment of a run.

use std::collections::BTreeMap;
use std::future::Future;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Waker};
use std::time::Duration;

use tokio::runtime::Runtime;

use super::calls::{Do, Facts, Parts};
use super::disk::Disk;
use super::server::Call;
use super::steps::{AllTouched, Mishap};
use super::wires::{Clock, Link, Shared, Wires};
use super::{Case, Fault, Start, checks};
use crate::cluster::Env;
use chance::{self, Source};

/// How long a host that waits for nothing but the time waits at once.
pub(super) const TURN: Duration = Duration::from_millis(200);
/// A call that waits so many turns does not end.
pub(super) const TURNS: u32 = 100;
/// Between two renewals.
const RENEW: u64 = 5;
/// The host whose calls are made after a run.
pub(super) const FRESH: usize = 2;
/// The names of the hosts.
pub(super) const NAMES: [&str; 3] = ["alpha", "beta", "gamma"];

/// A host with its daemon.
pub(super) struct Host {
    runtime: Runtime,
    pub(super) source: Source,
    pub(super) clock: Clock,
    pub(super) parts: Arc<Parts>,
    pub(super) task: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    pub(super) dead: bool,
    pub(super) turns: u32,
    /// Of all that it was answered: what it is depends on nothing else.
    history: u64,
}

pub(super) struct World {
    pub(super) wires: Shared,
    pub(super) hosts: Vec<Host>,
    pub(super) facts: Arc<Mutex<Facts>>,
    pub(super) faults: &'static [Fault],
    pub(super) start: Start,
    /// What went wrong, if it did.
    pub(super) fault: Option<Mishap>,
    pub(super) late: Option<Call>,
    /// What happened, for people.
    pub(super) story: Option<Vec<String>>,
    state_dir: std::path::PathBuf,
    /// What the hosts touch in any run.
    pub(super) touched: Arc<Mutex<AllTouched>>,
    /// The run has begun, and has not ended.
    is_open: bool,
}

fn runtime() -> Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_time().start_paused(true).build().unwrap()
}

fn link(host: usize, wires: &Shared) -> Arc<Link> {
    let wires = Arc::clone(wires);
    Arc::new(Link { host, wires })
}

/// The disk at the start of a run.
pub(super) fn prepare(start: Start, state_dir: &std::path::Path) -> Disk {
    let mut world = World::empty(start, &[], Disk::new(), state_dir);
    let host = world.open_host("setup", 9);
    world.alone(host, move |parts| async move { parts.prepare(start).await });
    world.wires().disk.settle();
    if start != Start::Nothing {
        world.wires().disk.put_file("db", checks::OF_A_USER);
    }
    if start == Start::Trash {
        world.alone(host, |parts| async move { parts.prepare_trash().await });
    }
    world.disk()
}

impl World {
    fn empty(
        start: Start,
        faults: &'static [Fault],
        disk: Disk,
        state_dir: &std::path::Path,
    ) -> Self {
        let wires = Wires {
            disk,
            waiting: BTreeMap::new(),
            next: 0,
            dials: [0; 3],
            before: None,
        };
        Self {
            wires: Arc::new(Mutex::new(wires)),
            hosts: Vec::new(),
            facts: Arc::default(),
            faults,
            start,
            fault: None,
            late: None,
            story: None,
            state_dir: state_dir.to_owned(),
            touched: Arc::default(),
            is_open: false,
        }
    }

    /// The hosts of a case before its calls.
    pub(super) fn before(case: &Case, state_dir: &std::path::Path) -> Self {
        let disk = prepare(case.start, state_dir);
        let mut world = Self::empty(case.start, case.faults, disk, state_dir);
        for _ in 0..2 {
            world.add_host();
        }
        for (host, first) in case.before.into_iter().enumerate() {
            world.alone(host, |parts| async move { parts.all(first).await });
        }
        world
    }

    /// Another world that is as this one is.
    fn copy(&self) -> Self {
        let disk = self.disk();
        let mut world = Self::empty(self.start, self.faults, disk, &self.state_dir);
        world.touched = Arc::clone(&self.touched);
        world.facts = Arc::new(Mutex::new(self.facts.lock().unwrap().clone()));
        for (number, host) in self.hosts.iter().enumerate() {
            let runtime = runtime();
            let entered = runtime.enter();
            let clock = Clock(Arc::new(host.clock.0.load(Ordering::Relaxed).into()));
            let link = link(number, &world.wires);
            let parts = host
                .parts
                .copy(link, clock.clone(), Arc::clone(&world.facts));
            drop(entered);
            world
                .hosts
                .push(Host::new(runtime, host.source, clock, parts));
        }
        world
    }

    /// The start of a run.
    pub(super) fn begin(&self, case: &Case) -> Self {
        let mut world = self.copy();
        for (host, calls) in case.calls.into_iter().enumerate() {
            let parts = Arc::clone(&world.hosts[host].parts);
            world.hosts[host].task = Some(Box::pin(async move { parts.all(calls).await }));
        }
        world.wires().before = (world.forgets() > 0).then(Vec::new);
        world.is_open = true;
        for host in 0..world.hosts.len() {
            world.go_on(host);
        }
        world
    }

    /// How many changes the server may forget.
    fn forgets(&self) -> usize {
        let faults = self.faults.iter().map(|fault| match fault {
            Fault::Forget(changes) => *changes,
            _ => 0,
        });
        faults.max().unwrap_or(0)
    }

    /// What hosts have been seen to touch.
    pub(super) fn touched(&self) -> MutexGuard<'_, AllTouched> {
        self.touched.lock().unwrap()
    }

    /// A host whose daemon starts.
    pub(super) fn add_host(&mut self) -> usize {
        let number = self.hosts.len();
        let host = self.open_host(NAMES[number], number as u64);
        self.alone(host, |parts| async move { parts.begin().await });
        host
    }

    /// Adds a host, whose random numbers are its own.
    fn open_host(&mut self, name: &str, random: u64) -> usize {
        let number = self.hosts.len();
        let runtime = runtime();
        let entered = runtime.enter();
        let clock = self.hosts.first().map_or_else(Clock::default, |first| {
            Clock(Arc::new(first.clock.0.load(Ordering::Relaxed).into()))
        });
        let source = Source {
            host: random + 1,
            drawn: 0,
            secs: 1_795_000_000,
        };
        let before = chance::replace(Some(source));
        let parts = Parts::new(
            number,
            name,
            link(number, &self.wires),
            clock.clone(),
            &self.state_dir,
            Arc::clone(&self.facts),
        );
        let source = chance::replace(before).unwrap();
        drop(entered);
        self.facts.lock().unwrap().hosts.push(BTreeMap::new());
        self.hosts.push(Host::new(runtime, source, clock, parts));
        self.hosts.len() - 1
    }

    pub(super) fn wires(&self) -> MutexGuard<'_, Wires> {
        self.wires.lock().unwrap()
    }

    /// The run has ended: what comes now is not searched.
    pub(super) fn close(&mut self) {
        self.is_open = false;
    }

    pub(super) fn disk(&self) -> Disk {
        self.wires().disk.clone()
    }

    /// Lets a host work until it waits for the server or for a time.
    pub(super) fn go_on(&mut self, host: usize) {
        let Some(mut task) = self.hosts[host].task.take() else {
            return;
        };
        if !self.poll(host, &mut task) {
            self.hosts[host].task = Some(task);
        }
    }

    /// Whether the task has ended.
    fn poll(&mut self, host: usize, task: &mut Pin<Box<dyn Future<Output = ()> + Send>>) -> bool {
        let host = &mut self.hosts[host];
        let _entered = host.runtime.enter();
        let before = chance::replace(Some(host.source));
        let mut context = Context::from_waker(Waker::noop());
        let mut ended = task.as_mut().poll(&mut context).is_ready();
        // What reads several records at once has tasks.
        for _ in 0..2 {
            if !ended && host.runtime.metrics().num_alive_tasks() > 0 {
                host.runtime.block_on(tokio::task::yield_now());
                ended = task.as_mut().poll(&mut context).is_ready();
            }
        }
        host.source = chance::replace(before).unwrap();
        ended
    }

    /// Has a host do something while nobody else does anything. Whether it came to an end: it does
    /// not if it needs what another task of the host has.
    pub(super) fn alone<F: Future<Output = ()> + Send + 'static>(
        &mut self,
        host: usize,
        what: impl FnOnce(Arc<Parts>) -> F,
    ) -> bool {
        let mut task: Pin<Box<dyn Future<Output = ()> + Send>> =
            Box::pin(what(Arc::clone(&self.hosts[host].parts)));
        let first = self.wires().next;
        let mut turns = 0;
        loop {
            if self.poll(host, &mut task) {
                return true;
            }
            let next = {
                let wires = self.wires();
                wires
                    .waiting
                    .range(first..)
                    .next()
                    .map(|(number, _)| *number)
            };
            match next {
                Some(number) => self.answer(number),
                None if turns < TURNS => {
                    turns += 1;
                    self.advance(host, TURN);
                }
                None => return false,
            }
        }
    }

    pub(super) fn advance(&mut self, host: usize, time: Duration) {
        let host = &self.hosts[host];
        host.clock.pass(time);
        host.runtime.block_on(tokio::time::advance(time));
    }

    /// The server carries out a call.
    pub(super) fn carry_out(&self, call: &Call) -> Vec<u8> {
        let mut wires = self.wires();
        if self.is_open {
            let touched = call.touches(&wires.disk);
            self.touched.lock().unwrap().note(call.host, touched);
        }
        let before = match &wires.before {
            Some(_) if !call.only_asks() => Some(wires.disk.clone()),
            _ => None,
        };
        let reply = call.carry_out(&mut wires.disk);
        if let (Some(before), Some(kept)) = (before, wires.before.as_mut()) {
            kept.push(before);
        }
        reply
    }

    pub(super) fn call(&self, number: u64) -> Call {
        self.wires().waiting[&number].call.clone()
    }

    pub(super) fn answer(&mut self, number: u64) {
        let reply = self.carry_out(&self.call(number));
        self.reply(number, Ok(reply));
    }

    pub(super) fn reply(&mut self, number: u64, reply: io::Result<Vec<u8>>) {
        let mut wires = self.wires.lock().unwrap();
        let wires = &mut *wires;
        let waiting = wires.waiting.get_mut(&number).unwrap();
        let told = reply
            .as_ref()
            .map(|reply| waiting.call.told(&wires.disk, reply));
        self.hosts[waiting.call.host].note(told.ok());
        waiting.reply = Some(reply);
        waiting.waker.wake_by_ref();
    }

    /// Time passes; hosts that live renew their sessions, but for one that is stopped.
    pub(super) fn pass(&mut self, secs: u64, stopped: Option<usize>) {
        for _ in 0..secs / RENEW {
            self.wires().disk.secs += RENEW;
            for host in &self.hosts {
                host.clock.pass(Duration::from_secs(RENEW));
            }
            for host in 0..self.hosts.len() {
                if Some(host) != stopped && !self.hosts[host].dead {
                    self.alone(host, |parts| async move { parts.beat().await });
                }
            }
        }
    }

    /// Equal for equal states.
    pub(super) fn key(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        let wires = self.wires();
        wires.disk.hash().hash(&mut hasher);
        wires.disk.secs.hash(&mut hasher);
        self.late.hash(&mut hasher);
        self.fault.is_some().hash(&mut hasher);
        for host in &self.hosts {
            (host.history, host.dead, host.clock.now()).hash(&mut hasher);
        }
        if let (None, Some(before)) = (self.fault, &wires.before) {
            for disk in before.iter().rev().take(self.forgets()) {
                disk.hash().hash(&mut hasher);
            }
        }
        hasher.finish()
    }

    /// As [`key`](Self::key), of what counts when all calls have ended.
    pub(super) fn end_key(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        let wires = self.wires();
        (wires.disk.hash(), wires.disk.secs).hash(&mut hasher);
        format!("{:?} {:?}", self.fault, self.facts.lock().unwrap().results).hash(&mut hasher);
        hasher.finish()
    }

    /// A host whose call does not end.
    pub(super) fn stuck(&self) -> Option<usize> {
        self.hosts.iter().position(|host| host.turns >= TURNS)
    }

    /// Runs calls on a host by itself; the last result.
    pub(super) fn does(&mut self, host: usize, what: Do) -> Result<(), String> {
        let ended = self.alone(host, move |parts| async move { parts.one(what).await });
        if !ended {
            return Err(format!("{what:?} does not end"));
        }
        let facts = self.facts.lock().unwrap();
        facts.results.last().unwrap().2.clone().map(drop)
    }
}

impl Host {
    fn new(runtime: Runtime, source: Source, clock: Clock, parts: Parts) -> Self {
        Self {
            runtime,
            source,
            clock,
            parts: Arc::new(parts),
            task: None,
            dead: false,
            turns: 0,
            history: 0,
        }
    }

    pub(super) fn note(&mut self, told: Option<u64>) {
        let mut hasher = DefaultHasher::new();
        (self.history, told).hash(&mut hasher);
        self.history = hasher.finish();
    }
}
