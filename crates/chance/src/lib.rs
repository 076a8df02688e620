//! Random numbers and the time of day: what makes two runs of one thing differ. A simulation may put a
//! source of its own in their place, for its thread (feature `replaced`). And the time since the boot.
//!
//! ```
//! # #[cfg(feature = "replaced")]
//! # {
//! use chance::Source;
//!
//! let drawn = || {
//!     let before = chance::replace(Some(Source { host: 1, drawn: 0, secs: 1_000 }));
//!     let drawn = (chance::bits().unwrap(), chance::host_time());
//!     chance::replace(before);
//!     drawn
//! };
//! assert_eq!(drawn(), drawn());
//! # }
//! assert_ne!(chance::bits().unwrap(), chance::bits().unwrap());
//! assert!(chance::since_boot() <= chance::since_boot());
//! ```
//!
//! Invariant: without the feature, which no release has, nothing is replaced.
//!
//! Known limit: the time since the boot is the kernel's, also in a simulation.

mod sys;

use std::time::{SystemTime, UNIX_EPOCH};

pub use sys::since_boot;

/// Why there are no random numbers.
pub type Error = getrandom::Error;

/// 64 random bits.
///
/// # Errors
/// When the kernel gives no random bytes (getrandom(2)).
pub fn bits() -> Result<u64, Error> {
    #[cfg(feature = "replaced")]
    if let Some(bits) = source::bits() {
        return Ok(bits);
    }
    getrandom::u64()
}

/// Seconds since 1970 by this host's clock.
#[must_use]
pub fn host_time() -> u64 {
    #[cfg(feature = "replaced")]
    if let Some(secs) = source::secs() {
        return secs;
    }
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

#[cfg(feature = "replaced")]
pub use source::{Source, replace};

#[cfg(feature = "replaced")]
mod source {
    use std::cell::Cell;

    /// What a host draws in a run that is to be repeated exactly.
    #[derive(Debug, Clone, Copy)]
    pub struct Source {
        /// No two hosts have one.
        pub host: u64,
        /// How many numbers it has drawn.
        pub drawn: u64,
        /// What its clock shows.
        pub secs: u64,
    }

    thread_local! {
        static HERE: Cell<Option<Source>> = const { Cell::new(None) };
    }

    /// Puts another source in place; returns the one that was there.
    pub fn replace(source: Option<Source>) -> Option<Source> {
        HERE.replace(source)
    }

    pub(super) fn bits() -> Option<u64> {
        let mut source = HERE.get()?;
        source.drawn += 1;
        HERE.set(Some(source));
        // The host's number in front, so that names are different in their first digits.
        Some((source.host << 60) + (source.drawn << 32) + source.drawn)
    }

    pub(super) fn secs() -> Option<u64> {
        Some(HERE.get()?.secs)
    }
}
