//! One walk over more files than a worker may know: what it holds then, and what a file costs.

use std::fs::{self, File};
use std::time::Duration;

use anyhow::{Context, ensure};
use lab::process::Task;
use lab::{Call, Export, Ganesha, Lab, Node, Part, Result, calls, trial};
use libtest_mimic::Trial;

use crate::before::rpcs;
use crate::load;
use crate::report::{Report, Samples, Target};
use crate::socket::serve;

const EXPORT: &str = "/srv/walk";
const DIRECTORIES: usize = 1000;
const FILES: usize = 1000;
/// The walk's own limit: 2 ms a file.
const LIMIT: Duration = Duration::from_secs((DIRECTORIES * FILES / 500) as u64);

pub(crate) fn trials() -> Vec<Trial> {
    vec![trial("fuse_walk", &[Part::Ganesha, Part::Fuse], walk)]
}

fn walk(lab: &'static Lab) -> Result {
    let report = Report::of("fuse_walk")?;
    let server = Ganesha::start(lab, "walk-nas", &[Export::new(EXPORT)])?;
    let node: &'static Node = Box::leak(Box::new(Node::machine(lab, "walk-host")?));
    let nfsvol = serve(node, &server.share(EXPORT), &["--data-path", "fuse"])?;
    calls::one(node, Call::create("walked", &[]))?.ok()?;
    for directory in 0..DIRECTORIES {
        let directory = server.local(EXPORT).join(format!("walked/{directory}"));
        fs::create_dir(&directory)?;
        for file in 0..FILES {
            File::create(directory.join(file.to_string()))?;
        }
    }
    let mounted = calls::one(node, Call::mount("walked", "bench"))?.ok()?;
    let place = mounted["Mountpoint"].as_str().context("no mount point")?;
    let worker = node.sh("pgrep -n -x nfsvol")?;
    let spent = || load::one(node, &["spent", &worker]);
    let before = spent()?;
    let find = Task {
        limit: Some(LIMIT),
        ..Task::new(&[
            "sh",
            "-euc",
            &format!("find {place} -type f -printf '%s\\n' | wc -l"),
        ])
    };
    let found = node.run_task(&find)?.ok()?;
    ensure!(
        found.trim() == (DIRECTORIES * FILES).to_string(),
        "{found} files were found"
    );
    let each = 1e6 / (DIRECTORIES * FILES) as f64;
    let micros = Samples::new("nfsvol", &[each * (spent()? - before)]);
    let what = "walk over 1,000,000 files, processor time of the worker a file";
    report.note(what, "µs", Target::None, &micros, None)?;
    let calls = Samples::new("nfsvol", &[rpcs(&nfsvol)? / (DIRECTORIES * FILES) as f64]);
    let what = "walk over 1,000,000 files, calls a file";
    report.note(what, "calls", Target::None, &calls, None)?;
    let held = load::on(node, &["memory", &worker])?;
    let what = "walk over 1,000,000 files, worker, most resident";
    let most = Samples::new("nfsvol", &[held[1]]);
    report.note(what, "MiB", Target::AtMost(96.0), &most, None)?;
    calls::one(node, Call::unmount("walked", "bench"))?
        .ok()
        .map(drop)
}
