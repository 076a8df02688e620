//! Figures, their targets and their peers: `target/bench/summary.json` and a table of it.

use std::fs;
use std::path::PathBuf;

use anyhow::Context;
use comfy_table::{Table, presets};
use lab::Result;
use serde::{Deserialize, Serialize};

/// What a figure has to be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Target {
    AtLeast(f64),
    AtMost(f64),
    /// This many times as good as the peer.
    TimesPeer(f64),
    /// Told for orientation.
    None,
}

/// The samples of one contender.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Samples {
    name: String,
    median: f64,
    samples: Vec<f64>,
}

impl Samples {
    pub(crate) fn new(name: &str, samples: &[f64]) -> Self {
        Self {
            name: name.to_owned(),
            median: median(samples),
            samples: samples.to_vec(),
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Figure {
    trial: String,
    name: String,
    unit: String,
    target: Target,
    measured: Samples,
    peer: Option<Samples>,
    /// Above 1 where nfsvol is better than the peer.
    ratio: Option<f64>,
    /// `None` where there is no target.
    met: Option<bool>,
    /// Processes that wanted a processor in the minute before (/proc/loadavg).
    load: f64,
}

#[derive(Default, Serialize, Deserialize)]
struct Summary {
    processors: usize,
    kernel: String,
    figures: Vec<Figure>,
}

fn file() -> PathBuf {
    PathBuf::from(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/target/bench/summary.json"
    ))
}

impl Summary {
    fn read() -> Result<Self> {
        let path = file();
        let text = fs::read(&path).with_context(|| path.display().to_string())?;
        Ok(serde_json::from_slice(&text)?)
    }

    fn write(&self) -> Result {
        let path = file();
        fs::create_dir_all(path.parent().context("no parent")?)?;
        let aside = path.with_extension("new");
        fs::write(&aside, serde_json::to_vec_pretty(self)?)?;
        Ok(fs::rename(aside, path)?)
    }
}

/// A new summary if the whole of it is measured, or the last one to replace parts of.
pub(crate) fn begin(whole: bool) -> Result {
    let mut summary = Summary::read().unwrap_or_default();
    if whole {
        summary.figures.clear();
    }
    summary.processors = std::thread::available_parallelism()?.get();
    summary.kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?
        .trim()
        .to_owned();
    summary.write()
}

/// The figures of one trial.
pub(crate) struct Report(&'static str);

impl Report {
    /// Forgets what an earlier run of the trial noted.
    pub(crate) fn of(trial: &'static str) -> Result<Self> {
        let mut summary = Summary::read()?;
        summary.figures.retain(|figure| figure.trial != trial);
        summary.write()?;
        Ok(Self(trial))
    }

    /// Notes a figure. A unit of time or of memory is better when it is smaller.
    pub(crate) fn note(
        &self,
        name: &str,
        unit: &str,
        target: Target,
        measured: &Samples,
        peer: Option<&Samples>,
    ) -> Result {
        let ratio = peer.map(|peer| better(unit, measured.median, peer.median));
        self.put(name, unit, target, measured, peer, ratio)
    }

    /// As [`note`](Self::note), of rounds in which both had their turn: the ratio is the median of
    /// the rounds' own, so what disturbs both in one round counts for nothing.
    pub(crate) fn note_rounds(
        &self,
        name: &str,
        unit: &str,
        target: Target,
        measured: &Samples,
        peer: &Samples,
    ) -> Result {
        let rounds = measured.samples.iter().zip(&peer.samples);
        let ratios: Vec<f64> = rounds
            .map(|(own, other)| better(unit, *own, *other))
            .collect();
        let ratio = Some(median(&ratios));
        self.put(name, unit, target, measured, Some(peer), ratio)
    }

    fn put(
        &self,
        name: &str,
        unit: &str,
        target: Target,
        measured: &Samples,
        peer: Option<&Samples>,
        ratio: Option<f64>,
    ) -> Result {
        let met = match target {
            Target::AtLeast(least) => Some(measured.median >= least),
            Target::AtMost(most) => Some(measured.median <= most),
            Target::TimesPeer(times) => ratio.map(|ratio| ratio >= times),
            Target::None => None,
        };
        let load = fs::read_to_string("/proc/loadavg")?;
        let mut summary = Summary::read()?;
        summary.figures.push(Figure {
            trial: self.0.to_owned(),
            name: name.to_owned(),
            unit: unit.to_owned(),
            target,
            measured: measured.clone(),
            peer: peer.cloned(),
            ratio,
            met,
            load: load
                .split(' ')
                .next()
                .and_then(|n| n.parse().ok())
                .unwrap_or(0.0),
        });
        summary.write()
    }
}

/// How many times as good `own` is as `other`.
fn better(unit: &str, own: f64, other: f64) -> f64 {
    let small_is_good = ["µs", "ms", "s", "MiB", "%"].contains(&unit);
    if small_is_good {
        other / own
    } else {
        own / other
    }
}

/// Prints the table.
pub(crate) fn show() -> Result {
    let summary = Summary::read()?;
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header([
        "trial", "figure", "unit", "target", "nfsvol", "peer", "peer's", "ratio", "met",
    ]);
    for figure in &summary.figures {
        let peer = figure.peer.as_ref();
        table.add_row([
            figure.trial.clone(),
            figure.name.clone(),
            figure.unit.clone(),
            match figure.target {
                Target::AtLeast(n) => format!("≥ {}", short(n)),
                Target::AtMost(n) => format!("≤ {}", short(n)),
                Target::TimesPeer(n) => format!("≥ {n} × peer"),
                Target::None => String::new(),
            },
            short(figure.measured.median),
            peer.map_or_else(String::new, |peer| peer.name.clone()),
            peer.map_or_else(String::new, |peer| short(peer.median)),
            figure
                .ratio
                .map_or_else(String::new, |ratio| format!("{ratio:.2}")),
            match figure.met {
                Some(true) => "yes",
                Some(false) => "NO",
                None => "",
            }
            .to_owned(),
        ]);
    }
    println!(
        "Medians, on {} processors, Linux {}. A ratio above 1 means that nfsvol is better.\n{table}",
        summary.processors, summary.kernel
    );
    Ok(())
}

fn short(value: f64) -> String {
    if value >= 100.0 {
        format!("{value:.0}")
    } else if value >= 1.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.3}")
    }
}

pub(crate) fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}
