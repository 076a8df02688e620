//! What the hosts do all the time, and what they were told: each writes into a volume of its own that
//! stays mounted, takes an exclusive volume in turns with the others, and makes volumes.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lab::{Call, Knfsd, Lab, Nfsvol, Node, PATIENCE, Result, calls, wait_for};
use serde_json::Value;

use crate::Kind;

/// The exclusive volume of each share.
pub(crate) const EXCLUSIVE: &str = "turns";
/// What a host does side by side.
pub(crate) const WORKS: usize = 3;
/// Ends within the time that a server needs to boot.
const SESSION: &str = "6s";
/// Writes to the exclusive volume in one turn.
const TURN: usize = 3;
/// After a turn. A host that mounts again at once keeps the volume, and nobody else gets it.
const AFTER_TURN: Duration = Duration::from_secs(2);
/// Between two writes.
const PAUSE: Duration = Duration::from_millis(100);
/// More than a host takes until it loses its power: each turn has a number of its own.
const TURNS_A_BOOT: usize = 100_000;
/// Between two volumes made.
const RARELY: Duration = Duration::from_secs(1);

/// A host of one share.
pub(crate) struct Host {
    node: &'static Node,
    nfsvol: Nfsvol<'static>,
    pub(crate) kind: Kind,
    /// Counts its boots: what was asked before the last one may wait for an answer for long.
    boots: AtomicUsize,
}

impl Host {
    pub(crate) fn start(node: Node, server: &Knfsd, kind: Kind) -> Result<Self> {
        let node: &'static Node = Box::leak(Box::new(node));
        let share = format!("{}:{}", server.ip(), kind.export());
        let mut args = vec!["--share", &share, "--data-path", "fuse", "--poll", "500ms"];
        args.extend(["--session", SESSION, "--mount-deadline", "60s"]);
        Ok(Self {
            node,
            nfsvol: Nfsvol::start(node, &args, &[])?,
            kind,
            boots: AtomicUsize::new(0),
        })
    }

    pub(crate) fn name(&self) -> &str {
        self.node.name()
    }

    /// The volume that only this host mounts.
    pub(crate) fn own(&self) -> String {
        format!("own-{}", self.name())
    }

    pub(crate) fn power_off(&self) -> Result {
        self.boots.fetch_add(1, Ordering::Relaxed);
        self.node.power_off()
    }

    /// Ends its load.
    pub(crate) fn stop(&self) {
        self.boots.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn boot(&self) -> Result {
        self.node.boot()?;
        self.nfsvol.up()
    }

    fn ok(&self, call: Call) -> Result<Value> {
        calls::one(self.node, call)?.ok()
    }

    fn mount(&self, volume: &str) -> Result<String> {
        let answer = self.ok(Call::mount(volume, "load"))?;
        let place = answer["Mountpoint"].as_str().context("no mount point")?;
        Ok(place.to_owned())
    }

    /// Appends a line to the volume's log; answered when the server has it.
    fn write(&self, place: &str, line: &str) -> Result {
        let script =
            format!("echo {line} | dd of={place}/log oflag=append conv=notrunc,fsync 2>/dev/null");
        self.node.sh(&script).map(drop)
    }

    pub(crate) fn listed(&self) -> Result<Vec<String>> {
        let answer = self.ok(Call::list())?;
        let volumes = answer["Volumes"].as_array().context("no list")?;
        let names = volumes.iter().filter_map(|volume| volume["Name"].as_str());
        Ok(names.map(str::to_owned).collect())
    }

    /// The process that serves its own volume.
    pub(crate) fn worker(&self) -> Result<u64> {
        let mut pid = None;
        let what = format!("the worker of {} to answer", self.own());
        // Get waits for a moment only, and a guest is slow.
        wait_for(&what, PATIENCE, || {
            let answer = self.ok(Call::get(&self.own())).unwrap_or_default();
            pid = answer["Volume"]["Status"]["worker"]["pid"].as_u64();
            pid.is_some()
        })?;
        pid.context(what)
    }
}

/// A write that was answered: by whom, in which of its turns, and when.
#[derive(Clone, Debug, PartialEq)]
struct Write {
    host: String,
    turn: usize,
    line: String,
    at: Instant,
}

#[derive(Default)]
struct Done {
    /// By share and volume.
    writes: BTreeMap<(bool, String), Vec<Write>>,
    /// By share: each volume that was made, and when.
    made: BTreeMap<(bool, String), Instant>,
    /// By host: when it made its last volume, and what it was told last.
    last_made: BTreeMap<String, Instant>,
    last_words: BTreeMap<String, String>,
    /// Writes that failed on hosts that always had power.
    failed: Vec<String>,
}

/// Of a host, the how manyth time, until it is to stop.
type Work = fn(&Load, &Host, usize, &dyn Fn() -> bool) -> Result;

/// What was done by whom.
#[derive(Default)]
pub(crate) struct Load {
    done: Mutex<Done>,
}

fn key(kind: Kind, volume: &str) -> (bool, String) {
    (kind == Kind::Sync, volume.to_owned())
}

impl Load {
    /// Makes the volumes.
    pub(crate) fn begin(hosts: &[Host]) -> Result<Self> {
        let load = Self::default();
        for host in hosts {
            load.make(host, &host.own(), &[])?;
            load.make(host, EXCLUSIVE, &[("access", "exclusive")])?;
            wait_for("the exclusive volume", PATIENCE, || host.listed().is_ok())?;
        }
        Ok(load)
    }

    fn done(&self) -> std::sync::MutexGuard<'_, Done> {
        self.done.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn make(&self, host: &Host, name: &str, options: &[(&str, &str)]) -> Result {
        host.ok(Call::create(name, options))?;
        let mut done = self.done();
        let now = Instant::now();
        done.made.entry(key(host.kind, name)).or_insert(now);
        done.last_made.insert(host.name().to_owned(), now);
        Ok(())
    }

    /// Starts what a host does until it loses its power, or is stopped.
    pub(crate) fn run(&'static self, host: &'static Host) -> Vec<JoinHandle<()>> {
        let boot = host.boots.load(Ordering::Relaxed);
        let works: [(Duration, Work); WORKS] = [
            (PAUSE, Self::write_own),
            (AFTER_TURN, Self::take_turn),
            (RARELY, Self::make_one),
        ];
        let work = |(pause, work): (Duration, Work)| {
            thread::spawn(move || {
                let stopped = || host.boots.load(Ordering::Relaxed) != boot;
                let mut turn = boot * TURNS_A_BOOT;
                while !stopped() {
                    turn += 1;
                    if let Err(error) = work(self, host, turn, &stopped) {
                        let words = format!("{error:#}");
                        self.done().last_words.insert(host.name().to_owned(), words);
                    }
                    thread::sleep(pause);
                }
            })
        };
        works.map(work).into()
    }

    /// Writes into the host's own volume until a write fails, as one does when the host itself was
    /// without power. No server's end may do that.
    fn write_own(&self, host: &Host, turn: usize, stopped: &dyn Fn() -> bool) -> Result {
        let place = host.mount(&host.own())?;
        for number in 0.. {
            if stopped() {
                break;
            }
            let written = self.write(host, &host.own(), &place, turn, number);
            if let Err(error) = written {
                if host.boots.load(Ordering::Relaxed) == 0 {
                    self.done().failed.push(format!("{error:#}"));
                }
                return Err(error);
            }
            thread::sleep(PAUSE);
        }
        Ok(())
    }

    fn write(&self, host: &Host, volume: &str, place: &str, turn: usize, number: usize) -> Result {
        let line = format!("{}-{turn}-{number}", host.name());
        host.write(place, &line)?;
        let write = Write {
            host: host.name().to_owned(),
            turn,
            line,
            at: Instant::now(),
        };
        let mut done = self.done();
        let writes = done.writes.entry(key(host.kind, volume)).or_default();
        writes.push(write);
        Ok(())
    }

    fn take_turn(&self, host: &Host, turn: usize, _: &dyn Fn() -> bool) -> Result {
        let place = host.mount(EXCLUSIVE)?;
        let mut written = Ok(());
        for number in 0..TURN {
            written = self.write(host, EXCLUSIVE, &place, turn, number);
            if written.is_err() {
                break;
            }
        }
        host.ok(Call::unmount(EXCLUSIVE, "load"))?;
        written
    }

    fn make_one(&self, host: &Host, turn: usize, _: &dyn Fn() -> bool) -> Result {
        self.make(host, &format!("made-{}-{turn}", host.name()), &[])
    }

    /// Whether a host has written to both volumes and made one since then.
    pub(crate) fn goes_on(&self, host: &Host, since: Instant) -> bool {
        let done = self.done();
        let wrote = |volume: &str| {
            let writes = done.writes.get(&key(host.kind, volume));
            let mut last = writes.into_iter().flatten().rev();
            last.any(|write| write.host == host.name() && write.at > since)
        };
        wrote(&host.own()) && wrote(EXCLUSIVE) && done.last_made.get(host.name()) > Some(&since)
    }

    /// No write failed on a host that always had power.
    pub(crate) fn nothing_failed(&self) -> Result {
        let done = self.done();
        ensure!(done.failed.is_empty(), "writes failed: {:?}", done.failed);
        Ok(())
    }

    pub(crate) fn last_words(&self, host: &Host) -> String {
        let words = self.done().last_words.get(host.name()).cloned();
        let logs = "tail -n 5 /var/lib/nfsvol/fuse/*/log; ps -eo pid,stat,etimes,args";
        let logs = host.node.sh(logs);
        format!(
            "{} was told last: {words:?}; its workers: {logs:?}",
            host.name()
        )
    }

    /// The volumes of a share that were made.
    pub(crate) fn volumes(&self, kind: Kind) -> Vec<String> {
        let done = self.done();
        let made = done.made.keys();
        made.filter(|(sync, _)| *sync == (kind == Kind::Sync))
            .map(|(_, name)| name.clone())
            .collect()
    }

    /// Does not count on what was made after `since` and before a share's server lost its power; the
    /// volumes that it may have forgotten.
    pub(crate) fn forget(&self, kind: Kind, since: Instant, cut: Instant) -> Vec<String> {
        let mut names = Vec::new();
        self.done().made.retain(|(sync, name), at| {
            let stays = *sync != (kind == Kind::Sync) || *at <= since || *at > cut;
            if !stays {
                names.push(name.clone());
            }
            stays
        });
        names
    }

    /// Does not count on what was written in this time.
    pub(crate) fn forget_writes(&self, kind: Kind, since: Instant, until: Instant) {
        let mut done = self.done();
        let writes = done.writes.iter_mut();
        for (_, writes) in writes.filter(|((sync, _), _)| *sync == (kind == Kind::Sync)) {
            writes.retain(|write| write.at <= since || write.at > until);
        }
    }

    /// Whatever a server forgot of volumes, or tore: repaired, or made again, they are there. Of one whose Create
    /// the failure cut off nobody has a copy: it is nobody's loss.
    pub(crate) fn make_again(&self, hosts: &[&Host], names: &[String]) -> Result {
        let mut last = None;
        for host in hosts {
            // Of what one has no copy, another one has.
            last = Some((host, host.nfsvol.command(&["repair", "--yes"])?));
        }
        let (host, repaired) = last.context("no host")?;
        let left: Vec<&str> = repaired
            .stdout
            .lines()
            .filter(|line| line.contains("not put back"))
            .filter_map(|line| line.split_whitespace().nth(1))
            .collect();
        let answered = |name: &str| {
            names.iter().any(|forgotten| forgotten == name)
                || self.done().made.keys().any(|(_, made)| made == name)
        };
        ensure!(
            repaired.code == 0 || !left.is_empty() && !left.iter().any(|name| answered(name)),
            "{repaired:?}"
        );
        for name in names.iter().filter(|name| name.starts_with("made-")) {
            host.ok(Call::create(name, &[]))?;
        }
        Ok(())
    }

    pub(crate) fn summary(&self) -> String {
        let done = self.done();
        let writes: usize = done.writes.values().map(Vec::len).sum();
        format!("{writes} writes answered, {} volumes made", done.made.len())
    }

    /// Every write that counts is in the volume's log, and in the order of the answers.
    pub(crate) fn check_file(&self, server: &Knfsd, kind: Kind, volume: &str) -> Result {
        let path = format!("/srv{}/{volume}/log", kind.export());
        let text = server.node().sh(&format!("cat {path}"))?;
        let done = self.done();
        let writes = done.writes.get(&key(kind, volume));
        let lost = lost(&text, writes.context("nothing was written")?);
        ensure!(
            lost.is_none(),
            "{volume}: {lost:?} is lost, or in another place"
        );
        Ok(())
    }

    /// Between two writes of one turn nobody else's was answered.
    pub(crate) fn one_writer(&self, kind: Kind) -> Result {
        let done = self.done();
        let writes = done.writes.get(&key(kind, EXCLUSIVE));
        let second = second_writer(writes.context("nobody had it")?);
        ensure!(
            second.is_none(),
            "{kind:?}: {second:?} came after a write of another's"
        );
        Ok(())
    }
}

/// The first write that is not in a log, behind those before it.
fn lost<'a>(text: &str, writes: &'a [Write]) -> Option<&'a Write> {
    let mut lines = text.lines();
    writes
        .iter()
        .find(|write| !lines.any(|line| line == write.line))
}

/// The first write of a turn in which another one has written.
fn second_writer(writes: &[Write]) -> Option<&Write> {
    let mut turns: Vec<(&str, usize)> = Vec::new();
    let mut sorted: Vec<&Write> = writes.iter().collect();
    sorted.sort_by_key(|write| write.at);
    sorted.into_iter().find(|write| {
        let turn = (write.host.as_str(), write.turn);
        let is_next = turns.last() != Some(&turn);
        let was_before = is_next && turns.contains(&turn);
        turns.push(turn);
        was_before
    })
}

/// What is looked for in a history is found.
pub(crate) fn judges(_: &'static Lab) -> Result {
    let began = Instant::now();
    let write = |(at, (host, turn)): (u64, (&str, usize))| Write {
        host: host.to_owned(),
        turn,
        line: format!("{host}-{turn}-{at}"),
        at: began + Duration::from_millis(at),
    };
    let all = |turns: &[(&str, usize)]| {
        (0..)
            .zip(turns.iter().copied())
            .map(write)
            .collect::<Vec<_>>()
    };
    let good = all(&[("a", 1), ("a", 1), ("b", 1), ("b", 1), ("a", 2)]);
    let text = |order: &[usize]| {
        order
            .iter()
            .map(|at| format!("{}\n", good[*at].line))
            .collect::<String>()
    };
    ensure!(second_writer(&good).is_none());
    ensure!(lost(&text(&[0, 1, 2, 3, 4]), &good).is_none());
    ensure!(lost(&text(&[0, 1, 3, 4]), &good) == Some(&good[2]));
    ensure!(lost(&text(&[0, 2, 1, 3, 4]), &good) == Some(&good[2]));
    ensure!(lost(&format!("{}\0{}", text(&[0]), text(&[1, 2, 3, 4])), &good) == Some(&good[1]));
    let two = all(&[("a", 1), ("b", 1), ("a", 1)]);
    ensure!(second_writer(&two) == Some(&two[2]));
    Ok(())
}
