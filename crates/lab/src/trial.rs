//! A trial: named, skipped where the machine lacks a part, ended when it hangs, and told with the
//! logs of all that ran beside it when it fails.

use std::sync::{OnceLock, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::{anyhow, bail};
use libtest_mimic::{Completion, Failed, Trial};

use super::part::missing;
use super::{Lab, Part, Result};

/// Set to 1, trials run their long versions (`make test-long`).
const LONG: &str = "NFSVOL_TEST_LONG";
/// How many times as long the limits are then.
const LONG_TIMES: u32 = 6;
/// A trial that has not ended after this long hangs: it is reported as failed, the others go on. The
/// longest takes 5 minutes on two processors, and 9 beside other work.
const TRIAL_LIMIT: Duration = Duration::from_secs(20 * 60);

/// Whether the long versions of trials are asked for.
pub fn long() -> bool {
    std::env::var(LONG).is_ok_and(|value| value == "1")
}

pub(crate) fn patience(limit: Duration) -> Duration {
    if long() { limit * LONG_TIMES } else { limit }
}

/// A named trial. Skipped with the reason when the machine lacks one of its parts, or failed
/// when `NFSVOL_TEST_REQUIRE_ALL=1`.
pub fn trial<F>(name: impl Into<String>, needs: &'static [Part], body: F) -> Trial
where
    F: FnOnce(&'static Lab) -> Result + Send + 'static,
{
    let name = name.into();
    let shown = name.clone();
    Trial::ignorable_test(name, move || {
        let root: &[Part] = &[Part::Root];
        if let Some(reason) = missing(root).or_else(|| missing(needs)) {
            if std::env::var("NFSVOL_TEST_REQUIRE_ALL").is_ok_and(|value| value == "1") {
                return Err(Failed::from(format!("cannot run here: {reason}")));
            }
            return Ok(Completion::ignored_with(reason));
        }
        let lab = Lab::get()?;
        let before = lab.log_sizes();
        let outcome = within(patience(TRIAL_LIMIT), &shown, move || body(lab));
        match outcome {
            Ok(()) => Ok(Completion::Completed),
            Err(error) => Err(Failed::from(format!(
                "{error:#}\n{}",
                lab.logs_since(&before)
            ))),
        }
    })
}

/// Runs `body` in a thread of its own, so that what hangs is reported instead of waited for.
fn within(limit: Duration, name: &str, body: impl FnOnce() -> Result + Send + 'static) -> Result {
    let (sender, receiver) = mpsc::channel();
    let thread = thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let outcome = body();
            // The receiver has gone when the limit passed first.
            let _ = sender.send(outcome);
        })?;
    match receiver.recv_timeout(limit) {
        Ok(outcome) => outcome,
        Err(mpsc::RecvTimeoutError::Timeout) => bail!("did not end within {limit:?}"),
        Err(mpsc::RecvTimeoutError::Disconnected) => match thread.join() {
            Err(panic) => Err(anyhow!(
                "panicked: {}",
                panic
                    .downcast_ref::<String>()
                    .map(String::as_str)
                    .or_else(|| panic.downcast_ref::<&str>().copied())
                    .unwrap_or("(no message)")
            )),
            Ok(()) => bail!("ended without an outcome"),
        },
    }
}

/// A part that several trials share: started by the first one that asks, and its failure told
/// to each of them.
#[derive(Debug)]
pub struct Shared<T>(OnceLock<std::result::Result<T, String>>);

impl<T> Shared<T> {
    #[allow(clippy::new_without_default)]
    pub const fn new() -> Self {
        Self(OnceLock::new())
    }

    /// The shared part, started now if it was not yet.
    pub fn get(&self, start: impl FnOnce() -> Result<T>) -> Result<&T> {
        self.0
            .get_or_init(|| start().map_err(|error| format!("{error:#}")))
            .as_ref()
            .map_err(|error| anyhow!("a shared part did not start: {error}"))
    }
}
