//! Calls counted and timed, by name and outcome.
//!
//! Invariant: names and outcomes are this program's own words, so their number is fixed; nothing
//! that a client sends becomes a label.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

/// Upper bounds of the buckets, in seconds: Get and List take less than a millisecond, mounting
/// some hundred, and 120 s is how long Docker waits.
const BUCKETS: [f64; 15] = [
    0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 50.0, 120.0,
];

/// A call's name.
pub(crate) type Name = [(&'static str, String); 1];
/// A call's name and how it ended.
pub(crate) type NameOutcome = [(&'static str, String); 2];

/// What is counted of calls. Clones count together.
#[derive(Debug, Clone)]
pub struct Calls {
    pub total: Family<NameOutcome, Counter>,
    pub seconds: Family<Name, Histogram, fn() -> Histogram>,
    pub running: Gauge<i64>,
}

impl Default for Calls {
    fn default() -> Self {
        Self {
            total: Family::default(),
            seconds: Family::new_with_constructor(|| Histogram::new(BUCKETS)),
            running: Gauge::default(),
        }
    }
}

impl Calls {
    /// A call begins.
    #[must_use]
    pub fn begin(&self, name: &'static str) -> Measured {
        self.running.inc();
        Measured {
            calls: self.clone(),
            name,
        }
    }

    /// A request was refused before it was a call; `None` for one to an unknown path.
    pub fn refused(&self, name: Option<&'static str>) {
        self.count(name.unwrap_or("unknown"), "refused");
    }

    fn count(&self, name: &'static str, outcome: &str) {
        let labels = [
            ("call", name.to_owned()),
            ("outcome", outcome.replace(' ', "_")),
        ];
        self.total.get_or_create(&labels).inc();
    }
}

/// A call that has begun.
#[derive(Debug)]
pub struct Measured {
    calls: Calls,
    name: &'static str,
}

impl Measured {
    /// The call has ended, once.
    pub fn end(&self, outcome: &str, took: Duration) {
        self.calls.running.dec();
        let seconds = took.as_secs_f64();
        let labels = [("call", self.name.to_owned())];
        self.calls.seconds.get_or_create(&labels).observe(seconds);
        self.calls.count(self.name, outcome);
    }
}
