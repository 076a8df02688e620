//! What a run is given by its seed.

use std::time::Duration;

use super::dice::Dice;
use super::server::Habits;

/// Faults happen, and programs begin something, for this long in most runs, and in one of
/// [`LONG_ONE_IN`].
const TROUBLE: Duration = Duration::from_millis(2500);
const LONG_TROUBLE: Duration = Duration::from_secs(12);
const LONG_ONE_IN: u64 = 32;
/// In one run of so many calls time out.
const TIMED_ONE_IN: u64 = 8;
/// `io_timeout` there, in seconds.
const IO_TIMEOUT: u32 = 1;

pub(super) struct Plan {
    pub(super) dice: Dice,
    pub(super) habits: Habits,
    pub(super) latency: u64,
    pub(super) hammers: bool,
    pub(super) kills: bool,
    pub(super) faults: bool,
    pub(super) actors: usize,
    pub(super) trouble: Duration,
    /// `io_timeout`; 0 for none.
    pub(super) io_timeout: u32,
}

impl Plan {
    pub(super) fn new(seed: u64) -> Self {
        let mut dice = Dice(seed);
        let hammers = seed % 16 == 7;
        let long = seed.is_multiple_of(LONG_ONE_IN);
        let timed = seed % TIMED_ONE_IN == 3;
        let faults = timed || (!hammers && dice.below(4) != 0);
        let mut often = |most: u64| if faults { dice.below(most) } else { 0 };
        let habits = Habits {
            break_before: often(40),
            break_after: often(40),
            jukebox: often(20),
            answer_twice: often(50),
            refuse_rename: often(2) * 150,
            refuse_write: often(4) / 3 * 30,
            refuse_commit: often(6) / 5 * 100,
            cut_short: often(3) / 2 * 200,
            mute: often(4) / 3 * 300,
            lose: match (timed, often(4)) {
                (true, 0) => 1000,
                (_, 1) => 100,
                _ => 0,
            },
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
            io_timeout: if timed { IO_TIMEOUT } else { 0 },
            dice,
        }
    }

    /// One without faults.
    pub(super) fn calm() -> Self {
        Self {
            dice: Dice(0),
            habits: Habits::default(),
            latency: 1,
            hammers: true,
            kills: false,
            faults: false,
            actors: 0,
            trouble: TROUBLE,
            io_timeout: 0,
        }
    }

    /// The mount options of a host.
    pub(super) fn options(&mut self) -> &'static str {
        match self.dice.below(if self.hammers { 1 } else { 12 }) {
            9 => "sync",
            10 => "actimeo=0",
            11 => "noac",
            _ => "",
        }
    }
}
