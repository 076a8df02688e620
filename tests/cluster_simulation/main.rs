//! The cluster's protocol in simulated time: three hosts that mount, let go of, remove and make
//! volumes, while they are killed, stopped, rebooted and cut off from the server, their clocks
//! run at different rates, the server's clock jumps, answers get lost after the server acted, and
//! calls arrive after their caller gave up.
//!
//! Looked at by somebody who sees all at once: no byte of an exclusive volume reaches the server
//! after another host has got it; no volume is removed under a host that lives; no record is
//! lost; and when the faults end every host can have every volume. Two runs in which a part of
//! the protocol is switched off show that the look bites.
//!
//! A run is a function of its seed. `NFSVOL_SIM_SEEDS=FIRST..END` says which are tried (`0..2000`
//! otherwise), `NFSVOL_SIM_SEED=SEED` runs one, as printed by a failure.

#![allow(clippy::unwrap_used, reason = "what is not there fails the test")]

mod disk;
mod host;
mod model;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use disk::{Disk, Link, OP_DEADLINE, Weather};
use host::{Host, SimEnv};
use model::Model;

const SEEDS: Range<u64> = 0..2000;
const HOSTS: [&str; 3] = ["alpha", "beta", "gamma"];
const EXCLUSIVE: [&str; 2] = ["db", "queue"];
const VOLUMES: [&str; 3] = ["db", "queue", "web"];
const SESSION: Duration = Duration::from_secs(30);
/// For this long things go wrong.
const TROUBLE: Duration = Duration::from_secs(300);

/// Random numbers that depend on the seed only (SplitMix64).
#[derive(Debug, Clone)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.roll() % limit.max(1)
    }

    fn fork(&mut self) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self(self.roll())))
    }
}

/// Parts of the protocol that a run may do without.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Switches {
    /// Workers stop sending when their right has ended.
    pub(crate) fencing: bool,
    /// A mount takes intents to remove the volume away.
    pub(crate) forestall: bool,
}

const WHOLE: Switches = Switches {
    fencing: true,
    forestall: true,
};

#[derive(Debug, Default)]
struct Outcome {
    wrong: Vec<String>,
    grants: u64,
    removals: u64,
    writes: u64,
    ops: u64,
}

fn simulate(seed: u64, switches: Switches) -> Outcome {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap()
        .block_on(run(seed, switches))
}

async fn run(seed: u64, switches: Switches) -> Outcome {
    let mut dice = Dice(seed);
    let disk = Arc::new(Mutex::new(Disk::new()));
    let model = Arc::new(Mutex::new(Model::default()));
    let mishaps = dice.below(15);
    let hosts: Vec<Host> = HOSTS
        .iter()
        .map(|name| {
            let own = dice.fork();
            // No two rates differ by more than 5 %.
            let rate = 975_610 + u32::try_from(dice.below(48_780)).unwrap();
            let env = SimEnv {
                began: Instant::now(),
                rate,
                offset: Duration::from_secs(dice.below(100_000)),
                dice: Arc::clone(&own),
            };
            let weather = Weather {
                mishaps,
                ..Weather::default()
            };
            let link = Link {
                disk: Arc::clone(&disk),
                model: Arc::clone(&model),
                weather: Arc::new(Mutex::new(weather)),
                dice: own,
                deadline: OP_DEADLINE,
            };
            Host::new(name, env, link, switches)
        })
        .collect();
    let mut daemons: BTreeMap<usize, tokio::task::JoinHandle<()>> = BTreeMap::new();
    for (number, host) in hosts.iter().enumerate() {
        daemons.insert(number, tokio::spawn(host.clone().daemon()));
    }
    let began = Instant::now();
    let mut jumped = began;
    while began.elapsed() < TROUBLE {
        sleep(Duration::from_millis(dice.below(12_000))).await;
        let number = usize::try_from(dice.below(3)).unwrap();
        let host = &hosts[number];
        // Around the times at which rights end and sessions are ended.
        let long = Duration::from_millis(dice.below(60_000));
        match dice.below(7) {
            fault @ (0 | 1) => {
                if let Some(daemon) = daemons.remove(&number) {
                    daemon.abort();
                    let _ = daemon.await;
                }
                if fault == 1 {
                    host.power_off();
                }
                let host = host.clone();
                let long = if dice.below(2) == 0 { long } else { long / 20 };
                daemons.insert(
                    number,
                    tokio::spawn(async move {
                        sleep(long).await;
                        host.daemon().await;
                    }),
                );
            }
            2 | 3 => {
                let weather = Arc::clone(&host.link.weather);
                weather.lock().unwrap().cut = true;
                tokio::spawn(async move {
                    sleep(long).await;
                    weather.lock().unwrap().cut = false;
                });
            }
            4 | 5 => {
                host.link.weather.lock().unwrap().paused_until = Some(Instant::now() + long);
            }
            // Two jumps that cancel each other between two renewals would not be seen.
            _ if jumped.elapsed() > SESSION => {
                jumped = Instant::now();
                let jump = i64::try_from(dice.below(120_000)).unwrap() - 60_000;
                disk.lock().unwrap().ahead += jump;
            }
            _ => {}
        }
    }
    // All is well again.
    for host in &hosts {
        let mut weather = host.link.weather.lock().unwrap();
        *weather = Weather::default();
    }
    for daemon in daemons.values() {
        daemon.abort();
    }
    sleep(SESSION * 2).await;
    let mut members = Vec::new();
    for host in &hosts {
        host.link.weather.lock().unwrap().cut = false;
        members.push(Arc::new(host.last_daemon().await));
    }
    for (host, member) in hosts.iter().zip(&members) {
        if let Err(wrong) = host.use_all(member).await {
            model.lock().unwrap().wrong.push(wrong);
        }
    }
    let mut model = model.lock().unwrap();
    let disk = disk.lock().unwrap();
    if std::env::var("NFSVOL_SIM_SEED").is_ok() {
        println!("{}", disk.tree());
    }
    let mut records: Vec<String> = disk.names(".nfsvol/trash");
    for volume in VOLUMES {
        let record = disk.file(&format!(".nfsvol/volumes/{volume}/record.json"));
        records.extend(record.map(|id| String::from_utf8(id.to_vec()).unwrap()));
    }
    let lost: Vec<String> = model
        .made
        .iter()
        .filter(|id| !records.contains(id))
        .cloned()
        .collect();
    if !lost.is_empty() {
        model.wrong.push(format!("records are lost: {lost:?}"));
    }
    Outcome {
        wrong: std::mem::take(&mut model.wrong),
        grants: model.grants,
        removals: model.removals,
        writes: model.writes,
        ops: disk.ops,
    }
}

/// Runs these seeds on all processors; stops at the first that goes wrong.
fn search(seeds: Range<u64>, switches: Switches) -> (Outcome, Option<(u64, Vec<String>)>) {
    let next = AtomicU64::new(seeds.start);
    let found = Mutex::new(None);
    let total = Mutex::new(Outcome::default());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || found.lock().unwrap().is_some() {
                        return;
                    }
                    let outcome = simulate(seed, switches);
                    if !outcome.wrong.is_empty() {
                        *found.lock().unwrap() = Some((seed, outcome.wrong));
                        return;
                    }
                    let mut total = total.lock().unwrap();
                    total.grants += outcome.grants;
                    total.removals += outcome.removals;
                    total.writes += outcome.writes;
                    total.ops += outcome.ops;
                }
            });
        }
    });
    (total.into_inner().unwrap(), found.into_inner().unwrap())
}

#[test]
fn one_writer_and_no_removal_under_a_holder() {
    if let Ok(seed) = std::env::var("NFSVOL_SIM_SEED") {
        let outcome = simulate(seed.parse().expect("NFSVOL_SIM_SEED is a number"), WHOLE);
        println!("{outcome:#?}");
        assert!(outcome.wrong.is_empty());
        return;
    }
    let seeds = std::env::var("NFSVOL_SIM_SEEDS").map_or(SEEDS, |range| {
        let (first, end) = range.split_once("..").expect("FIRST..END");
        first.parse().unwrap()..end.parse().unwrap()
    });
    let (total, wrong) = search(seeds.clone(), WHOLE);
    println!("seeds {seeds:?}: {total:?}");
    if let Some((seed, wrong)) = wrong {
        panic!("{wrong:#?}\nrun it alone with NFSVOL_SIM_SEED={seed}");
    }
    let many = seeds.end - seeds.start;
    assert!(
        total.grants > many && total.removals > many / 4 && total.writes > many,
        "little happened: {total:?}"
    );
}

#[test]
fn without_fencing_two_hosts_write() {
    let switches = Switches {
        fencing: false,
        ..WHOLE
    };
    let (_, wrong) = search(0..200, switches);
    let (seed, wrong) = wrong.expect("no run found what fencing is for");
    println!("seed {seed}: {wrong:?}");
    assert!(
        wrong.iter().any(|wrong| wrong.contains("wrote to")),
        "{wrong:?}"
    );
}

#[test]
fn without_taking_intents_away_volumes_are_removed_under_their_holders() {
    let switches = Switches {
        forestall: false,
        ..WHOLE
    };
    let (_, wrong) = search(0..2000, switches);
    let (seed, wrong) = wrong.expect("no run found what intents are for");
    println!("seed {seed}: {wrong:?}");
    assert!(
        wrong.iter().any(|wrong| wrong.contains("removed")),
        "{wrong:?}"
    );
}
