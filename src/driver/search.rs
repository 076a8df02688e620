//! Small cases of the protocol between hosts, exhaustively: two hosts, a few calls each, one fault.
//!
//! The calls are the real ones ([`super::membership::together`], the catalog, the cluster, directory operations
//! over NFSv3), on a server in memory (`server`). Each NFS call is a point at which either host may be
//! the next, and at which the fault of the case may come (`world`): all orders are tried, by running
//! again and again from the start, each time another way. A state that was seen before, the disk and
//! all that each host was told, is not gone on from again; and a call that touches nothing that the
//! other host ever changes, and changes nothing that it ever touches, is made at once: whenever it is
//! made, all else is the same. Of two calls that can be swapped only one order is tried where both lead
//! to one state (sleep sets). So the search is complete: what `checks` asks holds in every state
//! that can be reached.
//!
//! Known limits: what takes longer than some seconds is searched only when it is asked for
//! (`cargo test --features failpoints --lib driver::search -- --ignored`), most faults among it; there are no two faults in
//! a run; between faults clocks stand still, so sessions end only by a pause; the server is as NFSv3
//! has it, without caches and with stamps finer than any two changes.

mod at_once;
mod calls;
mod checks;
mod disk;
mod server;
mod steps;
mod wires;
mod world;

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Instant;

pub(super) use self::at_once::AtOnce;
use self::calls::Do;
use self::steps::Step;
use self::world::World;
use crate::mutant::{self, Mutant};

/// What may go wrong, once in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// A connection breaks before or after the server has carried out a call.
    Break,
    /// A call is carried out after its host has given it up.
    Late,
    /// A host is stopped for so many seconds.
    Pause(u64),
    /// A host is stopped for ever.
    Death,
    /// The server loses so many of its last changes.
    Forget(usize),
}

/// Less than a right lasts, and more than a session.
const PAUSES: [Fault; 2] = [Fault::Pause(10), Fault::Pause(40)];

/// What there is before a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    Nothing,
    /// A volume with a user's data.
    Volume,
    Exclusive,
    /// A removed volume with a user's data.
    Trash,
}

/// Two hosts and what their users do.
#[derive(Debug, Clone, Copy)]
struct Case {
    start: Start,
    /// What each host has done before.
    before: [&'static [Do]; 2],
    calls: [&'static [Do]; 2],
    faults: &'static [Fault],
}

/// What a search came to.
#[derive(Debug, Default)]
struct Found {
    states: usize,
    /// Of the hosts from the start.
    runs: usize,
    rounds: usize,
    /// States in which all calls had ended.
    ends: usize,
    /// What is wrong, and how it came to that.
    wrong: Option<String>,
}

/// Before a search so many ways are gone by chance: they show most of what the hosts touch.
const WALKS: u64 = 64;

/// A moment of a run: what may happen next, and which of it is being tried.
struct Fork {
    steps: Vec<Step>,
    at: usize,
    /// Calls that sleep here: what they lead to is reached by another way.
    asleep: Vec<Step>,
}

impl Fork {
    /// What sleeps after the step that is being tried: what was tried here before, or slept, and can
    /// be swapped with it.
    fn after(&self, world: &World) -> Vec<Step> {
        let step = self.steps[self.at];
        let before = self.asleep.iter().chain(&self.steps[..self.at]);
        before
            .filter(|other| world.can_be_swapped(step, **other))
            .copied()
            .collect()
    }
}

/// Searches all of a case. What the hosts touch is found out by the search itself: as long as there is
/// more of it than was known, it is done again.
fn search(case: &Case) -> Found {
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    let dir = dir.unwrap();
    let mut searcher = Searcher {
        case,
        start: World::before(case, dir.path()),
        seen: HashSet::new(),
        ends: HashSet::new(),
        way: Vec::new(),
        found: Found::default(),
    };
    (0..WALKS).for_each(|walk| searcher.wander(walk));
    loop {
        searcher.start.touched().grew = false;
        searcher.all_ways();
        let grew = searcher.start.touched().grew;
        if searcher.found.wrong.is_some() || !grew {
            return searcher.found;
        }
    }
}

struct Searcher<'a> {
    case: &'a Case,
    start: World,
    seen: HashSet<u64>,
    ends: HashSet<u64>,
    way: Vec<Fork>,
    found: Found,
}

impl Searcher<'_> {
    /// One way to an end.
    fn wander(&self, walk: u64) {
        let mut world = self.start.begin(self.case);
        for turn in 0_u64.. {
            let steps = world.steps();
            if steps.is_empty() || world.stuck().is_some() {
                break;
            }
            let mut hasher = DefaultHasher::new();
            (walk, turn).hash(&mut hasher);
            let drawn = usize::try_from(hasher.finish() % steps.len() as u64);
            world.take(steps[drawn.unwrap()]);
        }
    }

    fn all_ways(&mut self) {
        self.seen.clear();
        self.found.rounds += 1;
        loop {
            self.found.runs += 1;
            if let Err(wrong) = self.run() {
                self.found.wrong = Some(format!("{wrong}\n{}", self.story()));
                break;
            }
            while let Some(last) = self.way.last_mut() {
                last.at += 1;
                if last.at < last.steps.len() {
                    break;
                }
                self.way.pop();
            }
            if self.way.is_empty() {
                break;
            }
        }
        self.found.states = self.seen.len();
    }

    /// Goes the way so far, and on from there to its end or to a state that was seen before.
    fn run(&mut self) -> Result<(), String> {
        let mut world = self.start.begin(self.case);
        let mut asleep: Vec<Step> = Vec::new();
        for (number, fork) in self.way.iter().enumerate() {
            if number + 1 == self.way.len() {
                asleep = fork.after(&world);
            }
            world.take(fork.steps[fork.at]);
        }
        loop {
            world.check_holders()?;
            if !self.seen.insert(world.key()) {
                return Ok(());
            }
            if let Some(host) = world.stuck() {
                return Err(format!("a call of {} does not end", world::NAMES[host]));
            }
            let mut steps = world.steps();
            if steps.is_empty() {
                self.found.ends += 1;
                return match self.ends.insert(world.end_key()) {
                    true => world.check_end(),
                    false => Ok(()),
                };
            }
            let slept = std::mem::take(&mut asleep);
            steps.retain(|step| !slept.contains(step));
            let Some(first) = steps.first().copied() else {
                return Ok(());
            };
            let fork = Fork {
                steps,
                at: 0,
                asleep: slept,
            };
            asleep = fork.after(&world);
            self.way.push(fork);
            world.take(first);
        }
    }

    /// What happened on a way, for people.
    fn story(&self) -> String {
        let mut world = self.start.begin(self.case);
        world.story = Some(Vec::new());
        for fork in &self.way {
            world.take(fork.steps[fork.at]);
        }
        let mut story = world.story.take().unwrap_or_default();
        story.push(format!("{:#?}", world.facts.lock().unwrap().results));
        story.extend(world.disk().paths());
        story.join("\n")
    }
}

/// Searches all of a case, with each of these faults.
fn holds(name: &str, case: Case) {
    let began = Instant::now();
    let found = search(&case);
    println!(
        "{name}: {} states, {} ends, {} runs in {} rounds, {:.1} s",
        found.states,
        found.ends,
        found.runs,
        found.rounds,
        began.elapsed().as_secs_f64()
    );
    if let Some(wrong) = found.wrong {
        panic!("{name}: {wrong}");
    }
    assert!(
        found.ends > 1 && found.states > found.ends,
        "little was tried: {found:?}"
    );
}

/// The same finds a mended fault that is put back.
fn finds(mutant: Mutant, case: Case) {
    let _back = mutant::put_back(mutant);
    let found = search(&case);
    let wrong = found
        .wrong
        .unwrap_or_else(|| panic!("{mutant:?} is not found"));
    let first = wrong.lines().next().unwrap_or_default();
    println!("{mutant:?}: after {} runs: {first}", found.runs);
}

const CLAIMS: Case = Case {
    start: Start::Exclusive,
    before: [&[], &[]],
    calls: [&[Do::Mount("db")], &[Do::Mount("db")]],
    faults: &[],
};

const CLAIM_CYCLE: Case = Case {
    before: [&[Do::Mount("db"), Do::Unmount("db")], &[]],
    calls: [
        &[Do::Mount("db")],
        &[Do::Mount("db"), Do::Unmount("db"), Do::Mount("db")],
    ],
    ..CLAIMS
};

const NOTHING: Case = Case {
    start: Start::Nothing,
    before: [&[], &[]],
    calls: [&[], &[]],
    faults: &[],
};
const VOLUME: Case = Case {
    start: Start::Volume,
    ..NOTHING
};
const TRASH: Case = Case {
    start: Start::Trash,
    ..NOTHING
};

/// Cases that are searched whole: without a fault, and with each fault at every point. Each of these
/// is searched with each test run (`quick`), or when it is asked for (`long`: `--ignored`).
macro_rules! cases {
    ($($name:ident($none:ident $breaks:ident $late:ident $stops:ident $pauses:ident $forgets:ident):
        $from:expr, $a:expr, $b:expr;)*) => {
        $(
            mod $name {
                use super::*;
                use super::Do::*;

                pub(super) const CASE: Case = Case { calls: [&$a, &$b], ..$from };

                cases!(@$none without_faults, &[], $name);
                cases!(@$breaks a_connection_breaks, &[Fault::Break], $name);
                cases!(@$late a_call_is_late, &[Fault::Late], $name);
                cases!(@$stops a_host_stops, &[Fault::Death], $name);
                cases!(@$pauses a_host_pauses, &PAUSES, $name);
                // Each by itself: the more it forgets, the more of what was before is part of a state.
                cases!(@$forgets the_server_forgets_one, &[Fault::Forget(1)], $name);
                cases!(@$forgets the_server_forgets_two, &[Fault::Forget(2)], $name);
                cases!(@$forgets the_server_forgets_four, &[Fault::Forget(4)], $name);
                cases!(@$forgets the_server_forgets_eight, &[Fault::Forget(8)], $name);
            }
        )*
    };
    (@quick $($case:tt)*) => { cases!(@test [] $($case)*); };
    (@long $($case:tt)*) => { cases!(@test [#[ignore = "takes long"]] $($case)*); };
    (@test [$($attribute:tt)*] $test:ident, $faults:expr, $name:ident) => {
        #[test]
        $($attribute)*
        fn $test() {
            let name = concat!(stringify!($name), "::", stringify!($test));
            holds(name, Case { faults: $faults, ..CASE });
        }
    };
}

const HELD: Case = Case {
    before: [&[Do::Mount("db")], &[]],
    ..VOLUME
};

cases! {
    claim_claim(quick long long long long long):
        CLAIMS, [Mount("db")], [Mount("db")];
    claim_cycle(long long long long long long):
        CLAIM_CYCLE, [Mount("db")], [Mount("db"), Unmount("db"), Mount("db")];
    create_create(quick long long quick long long):
        NOTHING, [Create("db")], [Create("db")];
    create_remove(quick long long long long long):
        NOTHING, [Create("db")], [Remove("db")];
    mount_remove(quick long long long long long):
        VOLUME, [Mount("db")], [Remove("db")];
    remove_remove(long long long long long long):
        VOLUME, [Remove("db")], [Remove("db"), Create("db")];
    remove_restore(long long long long long long):
        VOLUME, [Remove("db")], [Remove("db"), Restore("db")];
    unmount_remove(long long long long long long):
        HELD, [Unmount("db")], [Remove("db")];
    restore_create(long long long long long long):
        TRASH, [Restore("db")], [Create("db")];
    restore_remove(quick long long quick long long):
        TRASH, [Restore("db")], [Remove("db")];
    restore_restore(long long long long long long):
        TRASH, [Restore("db")], [Restore("db")];
    restore_as(long long long long long long):
        TRASH, [RestoreAs("db", "web")], [Restore("db")];
    recreate_remove(long long long long long long):
        TRASH, [Recreate("db")], [Remove("db")];
    remove_recreate(long long long long long long):
        VOLUME, [Remove("db"), Recreate("db")], [Mount("db")];
    create_in_remove(long long long long long long):
        VOLUME, [CreateIn("web", "db")], [Remove("db")];
    claim_remove(long long long long long long):
        CLAIMS, [Mount("db")], [Remove("db")];
    claim_first_restore(long long long long long long):
        CLAIMS, [Mount("db")], [Remove("db"), Restore("db"), Mount("db")];
    claim_restore(long long long long long long):
        CLAIM_CYCLE, [Mount("db")], [Remove("db"), Restore("db"), Mount("db")];
}

#[test]
fn claims_find_what_is_put_back() {
    finds(Mutant::EpochMadeAnewWins, CLAIM_CYCLE);
}

#[test]
fn restores_find_what_is_put_back() {
    finds(Mutant::RestoresShareADirectory, restore_as::CASE);
}

#[test]
#[ignore = "takes long"]
fn restored_claims_find_what_is_put_back() {
    finds(Mutant::RestoredClaimsBeginAnew, claim_restore::CASE);
    finds(Mutant::ClaimsAreNotLookedFor, claim_first_restore::CASE);
}
