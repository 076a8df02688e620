//! The users of one host: processes that make, use and remove volumes as dockerd and containers do.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lab::{Call, Nfsvol, Result, calls};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub(crate) const ROLE: &str = "churn-user";
/// Who is in an exclusive volume has a file of this name and its own in it.
const INSIDE: &str = "inside.";
/// The longest that a user keeps a volume.
const KEPT: u64 = 300;

/// Between two calls while the server is away.
const AWAY: Duration = Duration::from_millis(20);

/// Answers that say what is so: another user was faster, or has the volume.
const TRUE_ANSWERS: [(&str, &str); 7] = [
    ("Create", "removed and created again faster"),
    ("Mount", "no such volume"),
    ("Mount", "unmounted by somebody else"),
    ("Mount", "keeps changing"),
    ("Remove", "keeps changing"),
    ("Remove", "is in use by"),
    ("Remove", "was mounted a moment ago"),
];

/// What the users of one host are to do.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) hosts: Vec<String>,
    /// This host's place among them.
    pub(crate) number: usize,
    pub(crate) lanes: u64,
    pub(crate) volumes: u64,
    pub(crate) seconds: u64,
    /// There is a file here while the server may be away.
    pub(crate) away: PathBuf,
}

/// What they did, and what was not as it should be.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) creates: u64,
    pub(crate) uses: u64,
    pub(crate) removes: u64,
    /// Answers that say what is so, by call and text.
    pub(crate) refusals: BTreeMap<String, u64>,
    pub(crate) used: BTreeSet<String>,
    /// Files that are on the server for good.
    pub(crate) written: BTreeSet<String>,
    pub(crate) wrong: Vec<String>,
}

impl Report {
    pub(crate) fn add(&mut self, other: Self) {
        self.creates += other.creates;
        self.uses += other.uses;
        self.removes += other.removes;
        for (text, count) in other.refusals {
            *self.refusals.entry(text).or_default() += count;
        }
        self.used.extend(other.used);
        self.written.extend(other.written);
        self.wrong.extend(other.wrong);
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "made {}, used {}, removed {}, files {}; refused {:?}",
            self.creates,
            self.uses,
            self.removes,
            self.written.len(),
            self.refusals
        )
    }
}

/// The name of a volume; every fourth one is exclusive.
pub(crate) fn volume(n: u64) -> String {
    match n % 4 {
        0 => format!("one{n}"),
        _ => format!("all{n}"),
    }
}

fn is_exclusive(volume: &str) -> bool {
    volume.starts_with("one")
}

pub(crate) fn options(volume: &str) -> &'static [(&'static str, &'static str)] {
    if is_exclusive(volume) {
        &[("access", "exclusive")]
    } else {
        &[]
    }
}

/// Random numbers that depend on the seed only (SplitMix64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit.max(1)
    }
}

/// `churn-user`: reads a plan from standard input, writes the report to standard output.
pub(crate) fn main() -> ExitCode {
    let plan: Plan = match serde_json::from_reader(std::io::stdin()) {
        Ok(plan) => plan,
        Err(error) => {
            eprintln!("no plan: {error}");
            return ExitCode::FAILURE;
        }
    };
    let mut all = Report::default();
    thread::scope(|scope| {
        let plan = &plan;
        let lanes: Vec<_> = (0..plan.lanes)
            .map(|lane| scope.spawn(move || User::new(plan, lane).work()))
            .collect();
        for lane in lanes {
            match lane.join() {
                Ok(report) => all.add(report),
                Err(_) => all.wrong.push("a user panicked".to_owned()),
            }
        }
    });
    println!("{}", serde_json::json!(all));
    ExitCode::SUCCESS
}

struct User<'a> {
    plan: &'a Plan,
    /// `<host>.<lane>`, in the names of its files.
    name: String,
    dice: Dice,
    /// Its part of the volumes: it uses each of these at least once.
    own: std::iter::StepBy<std::ops::Range<u64>>,
    connection: calls::Connection,
    report: Report,
}

impl<'a> User<'a> {
    fn new(plan: &'a Plan, lane: u64) -> Self {
        let number = plan.number as u64 * plan.lanes + lane;
        let all = plan.hosts.len() * usize::try_from(plan.lanes).unwrap_or(1);
        Self {
            plan,
            name: format!("{}.{lane}", plan.hosts[plan.number]),
            // Another stream for each.
            dice: Dice(plan.seed ^ (number << 48)),
            own: (number..plan.volumes).step_by(all),
            connection: calls::Connection::new(Nfsvol::SOCKET),
            report: Report::default(),
        }
    }

    fn work(mut self) -> Report {
        let began = Instant::now();
        let time = Duration::from_secs(self.plan.seconds);
        loop {
            let next = if self.dice.below(2) == 0 {
                self.own.next()
            } else {
                None
            };
            let over = began.elapsed() > time;
            let (n, used) = match next.or_else(|| over.then(|| self.own.next()).flatten()) {
                Some(n) => (n, true),
                None if over => return self.report,
                None => (self.dice.below(self.plan.volumes), false),
            };
            let volume = volume(n);
            let done = match self.dice.below(10) {
                _ if used => self.use_until_used(&volume),
                0..=5 => self.use_it(&volume).map(drop),
                6 => self.create(&volume).map(drop),
                _ => self.remove(&volume),
            };
            if let Err(error) = done {
                self.report
                    .wrong
                    .push(format!("{}: {volume}: {error:#}", self.name));
            }
        }
    }

    /// The answer to a call, or none when it says that another user, or the server, is in the way.
    fn ask(&mut self, kind: &str, call: Call) -> Result<Option<Value>> {
        let away = self.plan.away.exists();
        let answer = self.connection.make(&call);
        if answer.status == 200 {
            return Ok(Some(answer.body));
        }
        let away = away || self.plan.away.exists();
        let text = answer.clone().fails()?;
        let known = TRUE_ANSWERS
            .iter()
            .find(|(of, part)| *of == kind && text.contains(part))
            .map(|(_, part)| *part)
            .or_else(|| away.then_some("the server is away"));
        let Some(known) = known else {
            return answer.ok().map(Some);
        };
        let count = self.report.refusals.entry(format!("{kind}: {known}"));
        *count.or_default() += 1;
        if away {
            thread::sleep(AWAY);
        }
        Ok(None)
    }

    fn create(&mut self, volume: &str) -> Result<bool> {
        let call = Call::create(volume, options(volume));
        let made = self.ask("Create", call)?.is_some();
        self.report.creates += u64::from(made);
        Ok(made)
    }

    fn remove(&mut self, volume: &str) -> Result {
        let gone = self.ask("Remove", Call::remove(volume))?.is_some();
        self.report.removes += u64::from(gone);
        Ok(())
    }

    fn use_until_used(&mut self, volume: &str) -> Result {
        while !self.use_it(volume)? {
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Makes a volume, mounts it, works in it, unmounts it; false if somebody was in the way.
    fn use_it(&mut self, volume: &str) -> Result<bool> {
        if !self.create(volume)? {
            return Ok(false);
        }
        let file = format!("{}.{}", self.name, self.report.uses);
        let Some(mounted) = self.ask("Mount", Call::mount(volume, &file))? else {
            return Ok(false);
        };
        let place = mounted["Mountpoint"].as_str().context("no mount point")?;
        let kept = Duration::from_millis(self.dice.below(KEPT));
        let worked = work_in(Path::new(place), volume, &self.name, &file, kept);
        let unmounted = self.ask("Unmount", Call::unmount(volume, &file));
        worked.context("inside")?;
        self.report.written.insert(file);
        ensure!(unmounted?.is_some(), "not unmounted");
        self.report.uses += 1;
        self.report.used.insert(volume.to_owned());
        Ok(true)
    }
}

/// Writes a file that stays; makes sure that in an exclusive volume there is no other host.
fn work_in(place: &Path, volume: &str, user: &str, file: &str, kept: Duration) -> Result {
    let (host, _) = user.split_once('.').context("no host")?;
    let inside = place.join(format!("{INSIDE}{user}"));
    let alone = || -> Result {
        for entry in fs::read_dir(place)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let other = name
                .strip_prefix(INSIDE)
                .filter(|other| !other.starts_with(host));
            ensure!(other.is_none(), "{user} meets {other:?}");
        }
        Ok(())
    };
    let exclusive = is_exclusive(volume);
    if exclusive {
        alone()?;
        File::create_new(&inside)?.sync_all()?;
    }
    let mut written = File::create_new(place.join(file))?;
    written.write_all(file.as_bytes())?;
    written.sync_all()?;
    drop(written);
    thread::sleep(kept);
    ensure!(
        fs::read(place.join(file))? == file.as_bytes(),
        "{file} is not what was written"
    );
    if exclusive {
        alone()?;
        fs::remove_file(&inside)?;
    }
    Ok(())
}
