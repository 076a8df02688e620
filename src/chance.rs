//! Random numbers and the time of day: what makes two runs of one thing differ. A test may put a
//! source of its own in their place, for its thread. And the time since the boot.

mod sys;

use std::time::{SystemTime, UNIX_EPOCH};

pub(crate) use sys::since_boot;

/// 64 random bits.
///
/// # Errors
/// When the kernel gives no random bytes (getrandom(2)).
pub(crate) fn bits() -> Result<u64, getrandom::Error> {
    #[cfg(test)]
    if let Some(bits) = source::bits() {
        return Ok(bits);
    }
    getrandom::u64()
}

/// Seconds since 1970 by this host's clock.
pub(crate) fn host_time() -> u64 {
    #[cfg(test)]
    if let Some(secs) = source::secs() {
        return secs;
    }
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

#[cfg(test)]
pub(crate) use source::{Source, replace};

#[cfg(test)]
mod source {
    use std::cell::Cell;

    /// What a host draws in a run that is to be repeated exactly.
    #[derive(Debug, Clone, Copy)]
    pub(crate) struct Source {
        /// No two hosts have one.
        pub(crate) host: u64,
        pub(crate) drawn: u64,
        pub(crate) secs: u64,
    }

    thread_local! {
        static HERE: Cell<Option<Source>> = const { Cell::new(None) };
    }

    /// Puts another source in place; returns the one that was there.
    pub(crate) fn replace(source: Option<Source>) -> Option<Source> {
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
