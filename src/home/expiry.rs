//! Which entries of a trash have been there for long enough.
//!
//! Invariant: no clock decides that was not watched. An entry is old when the clocks of its
//! remover, of the server and of this host agree that it is, or when this host has itself seen it
//! for so long, by a clock of its own that goes on while the host sleeps.
//!
//! Known limit: what this host has seen counts from one look to the next within a boot, so a host
//! that is booted often sees less than has passed.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::error::CatalogError;
use crate::layout::TrashName;
use crate::mutant::{self, Mutant};
use nfs::address::Share;

/// Where [`Seen`] is kept in the state directory.
pub(super) const FILE: &str = "trash.json";
/// The kernel's name for this boot (random(4)).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Clocks that differ by no more agree: hosts that follow the time at all are within seconds.
const AGREE: Duration = Duration::from_secs(300);

/// What this host has seen in the trash of each share.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Seen {
    boot: String,
    /// Of each share, by its address.
    shares: BTreeMap<String, Looks>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Looks {
    /// Seconds since the boot at the last look.
    at: u64,
    entries: BTreeMap<String, Entry>,
}

/// One entry as this host knows it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// For how many seconds it was seen.
    pub(super) seen: u64,
    /// It is to be deleted whatever its age; `None` until its record was read.
    pub(super) at_once: Option<bool>,
}

impl Seen {
    /// Reads what was seen; what another boot has seen stays seen.
    pub(super) fn load(state_dir: &Path) -> Result<Self, CatalogError> {
        let boot =
            std::fs::read_to_string(BOOT_ID).map_err(CatalogError::state("the boot's id"))?;
        // Damaged: as if nothing had been seen, which only keeps things longer.
        let kept = std::fs::read(state_dir.join(FILE)).ok();
        let mut seen: Self = kept
            .and_then(|json| serde_json::from_slice(&json).ok())
            .unwrap_or_default();
        if seen.boot != boot.trim() {
            boot.trim().clone_into(&mut seen.boot);
            for looks in seen.shares.values_mut() {
                looks.at = since_boot();
            }
        }
        Ok(seen)
    }

    /// Notes what lies in the trash of a share at `at` seconds since the boot.
    pub(super) fn look(&mut self, share: &Share, at: u64, there: &[TrashName]) {
        let looks = self.shares.entry(share.to_string()).or_default();
        let since = at.saturating_sub(looks.at);
        looks.at = at;
        let mut before = std::mem::take(&mut looks.entries);
        for name in there.iter().map(TrashName::entry) {
            let entry = match before.remove(&name) {
                Some(entry) => Entry {
                    seen: entry.seen + since,
                    ..entry
                },
                None => Entry::default(),
            };
            looks.entries.insert(name, entry);
        }
    }

    pub(super) fn entry(&mut self, share: &Share, name: &TrashName) -> &mut Entry {
        let looks = self.shares.entry(share.to_string()).or_default();
        looks.entries.entry(name.entry()).or_default()
    }

    /// Remembers a share whose trash holds something of this host's.
    pub(super) fn note(&mut self, share: &Share) {
        self.shares.entry(share.to_string()).or_default();
    }

    /// The shares whose trash was looked at, or holds something of this host's.
    pub(super) fn shares(&self) -> Vec<Share> {
        let shares = self.shares.keys();
        shares.filter_map(|share| share.parse().ok()).collect()
    }

    /// Forgets a share whose trash is empty.
    pub(super) fn forget_empty(&mut self, share: &Share) {
        let share = share.to_string();
        if self
            .shares
            .get(&share)
            .is_some_and(|l| l.entries.is_empty())
        {
            self.shares.remove(&share);
        }
    }

    pub(super) fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).expect("strings, numbers and maps with string keys")
    }
}

/// The clocks at one look at a trash, in seconds since 1970.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clocks {
    pub(super) server: u64,
    pub(super) host: u64,
}

impl Clocks {
    /// Whether the server's clock is to be believed now.
    pub(super) fn agree(self) -> bool {
        agree(self.server, self.host) || mutant::is_on(Mutant::TrashTrustsTheServersClock)
    }

    /// Whether an entry may be old by the clocks; the remover's is then asked as well.
    pub(super) fn may_be_old(self, name: &TrashName, age: Duration) -> bool {
        self.agree() && self.server.saturating_sub(name.removed) > age.as_secs()
    }
}

/// Whether the time that an entry bears, by the server's clock, is that of its remover's clock and
/// not before the volume was made.
pub(super) fn is_true(name: &TrashName, removers: Option<u64>, created: u64) -> bool {
    let true_by_remover = removers.is_some_and(|removers| agree(removers, name.removed));
    (true_by_remover && created <= name.removed + AGREE.as_secs())
        || mutant::is_on(Mutant::TrashTrustsTheServersClock)
}

fn agree(one: u64, other: u64) -> bool {
    one.abs_diff(other) <= AGREE.as_secs()
}

/// Seconds since the boot, also while the host slept.
pub(super) fn since_boot() -> u64 {
    chance::since_boot().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(removed: u64) -> TrashName {
        TrashName {
            volume: "db".parse().unwrap(),
            removed,
            random: "01234567".to_owned(),
        }
    }

    const NOW: u64 = 1_795_000_000;
    const WEEK: Duration = Duration::from_secs(7 * 86_400);

    #[test]
    fn a_clock_that_jumps_makes_nothing_old() {
        let true_now = Clocks {
            server: NOW,
            host: NOW + 2,
        };
        // Removed while the server believed that it was the year 2000.
        let wrong = name(946_857_600);
        assert!(true_now.may_be_old(&wrong, WEEK));
        assert!(!is_true(&wrong, Some(NOW - 60), NOW - 999));
        assert!(!is_true(&wrong, None, 0), "nobody can tell");
        // Both believed it: the volume was made later than it was removed.
        assert!(!is_true(&wrong, Some(946_857_600), NOW - 999));
        // The server jumps ahead for a minute.
        let ahead = Clocks {
            server: NOW + WEEK.as_secs() * 2,
            host: NOW,
        };
        let fresh = name(NOW - 60);
        assert!(!ahead.may_be_old(&fresh, WEEK));
        let old = name(NOW - WEEK.as_secs() - 60);
        assert!(true_now.may_be_old(&old, WEEK));
        assert!(is_true(&old, Some(old.removed + 3), old.removed - 999));
    }

    #[test]
    fn the_servers_clock_alone_is_found_out() {
        let _back = mutant::put_back(Mutant::TrashTrustsTheServersClock);
        let ahead = Clocks {
            server: NOW + WEEK.as_secs() * 2,
            host: NOW,
        };
        assert!(ahead.may_be_old(&name(NOW - 60), WEEK));
    }

    #[test]
    fn what_is_seen_again_and_again_grows_old() {
        let share: Share = "nas:/export".parse().unwrap();
        let mut seen = Seen::default();
        let entry = name(946_857_600);
        for (at, expected) in [(1000, 0), (4600, 3600), (4700, 3700)] {
            seen.look(&share, at, std::slice::from_ref(&entry));
            assert_eq!(seen.entry(&share, &entry).seen, expected);
        }
        seen.look(&share, 9000, &[]);
        seen.look(&share, 9900, std::slice::from_ref(&entry));
        assert_eq!(seen.entry(&share, &entry).seen, 0, "another of its name");
    }
}
