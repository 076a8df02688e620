//! The same trials on an older and a newer kernel, whose FUSE differs: each in a guest that mounts the
//! server's export, in which this test binary runs them.
//!
//! What the server has is looked at by the guest's own NFS client, which remembers nothing.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use lab::process::Task;
use lab::{Lab, Linux, Node, Part, Result, trial};
use libtest_mimic::{Arguments, Trial};

use crate::host::{EXPORT, Served};
use crate::{apps, consistency, durability, ganesha, model};

const OLDER: &[Part] = &[Part::Ganesha, Part::Fuse, Part::Guest, Part::Judges];
const NEWER: &[Part] = &[
    Part::Ganesha,
    Part::Fuse,
    Part::Guest,
    Part::Judges,
    Part::NewerLinux,
];
/// The role of this binary in a guest.
const ROLE: &str = "fuse-in-guest";
/// A fault that is put back in guests too (`src/mutant.rs`).
const MUTANT: &str = "NFSVOL_MUTANT";
/// Only the trials of a guest whose names contain this.
const FILTER: &str = "NFSVOL_GUEST_TRIALS";
/// Where a guest sees what the server has.
const SEEN: &str = "/mnt/server";
/// Against a hang of all trials in a guest, which take 4 to 6 minutes, and 8 beside other work.
const LIMIT: Duration = Duration::from_secs(18 * 60);
/// Trials that a guest is not asked for: they do not depend on the kernel, or ask little more of it than
/// those that stay, and take a guest minutes, because each process that begins costs it milliseconds.
const LEFT_OUT: &[&str] = &[
    "a_listing_goes_on_while_the_directory_changes",
    "model_with_small_calls",
    "git_clone_and_fsck",
    "a_compile",
    "locks_between_processes_of_a_host",
    // Starts a server of its own in the lab's network, which a guest cannot.
    "where_the_server_squashes_it_decides",
    // Slows the way to the server down by a proxy in the lab's network.
    "stat_and_close_end_while_others_overwrite",
];
/// Of how many random sequences a guest tries one.
const FEWER: u32 = 5;

/// How many of `cases` are tried here.
pub(crate) fn share_of(cases: u32) -> u32 {
    if IN_GUEST.load(Ordering::Relaxed) {
        cases / FEWER
    } else {
        cases
    }
}

static IN_GUEST: AtomicBool = AtomicBool::new(false);

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("the_same_on_linux_6_1", OLDER, |lab| {
            inside(lab, "older", Linux::V6_1)
        }),
        trial("the_same_on_linux_7_2", NEWER, |lab| {
            inside(lab, "newer", Linux::V7_2)
        }),
    ]
}

fn inside(lab: &'static Lab, name: &str, linux: Linux) -> Result {
    let (nas, guest) = (ganesha(lab)?, Node::guest_of(lab, name, linux)?);
    // A directory for each guest: trials make the same names.
    let export = format!("{EXPORT}/{name}");
    std::fs::create_dir_all(nas.local(&export))?;
    guest.sh(&format!(
        "mkdir {SEEN}; mount -i -t nfs \
         -o nolock,noac,lookupcache=none,vers=3,addr={ip},proto=tcp,mountproto=tcp,port=2049,mountport=20048 \
           {ip}:{export} {SEEN}",
        ip = nas.ip()
    ))?;
    let exe = std::env::current_exe()?;
    let exe = exe.to_str().context("the path of the test binary")?;
    let filter = std::env::var(FILTER).unwrap_or_default();
    let output = guest.run_task(&Task {
        limit: Some(LIMIT),
        env: std::env::var(MUTANT)
            .map(|mutant| (MUTANT.to_owned(), mutant))
            .into_iter()
            .collect(),
        ..Task::new(&[exe, ROLE, &nas.ip(), &export, &filter])
    })?;
    let (took, kernel) = (output.took, guest.sh("uname -r")?);
    let said = output.ok()?;
    let summary = said.lines().find(|line| line.starts_with("test result"));
    lab::note(format!(
        "in a guest with Linux {kernel}: {} ({took:.0?})",
        summary.context(said.clone())?
    ));
    guest.power_off()
}

/// The server as a guest sees it.
pub(crate) struct Seen {
    ip: String,
    export: String,
}

impl Served for Seen {
    fn ip(&self) -> String {
        self.ip.clone()
    }

    fn export(&self) -> String {
        self.export.clone()
    }

    fn local(&self, path: &str) -> PathBuf {
        PathBuf::from(path.replacen(EXPORT, SEEN, 1))
    }
}

/// Runs the trials of a guest if the process was started for that.
pub(crate) fn as_guest() -> Option<ExitCode> {
    let args: Vec<String> = std::env::args().collect();
    let [_, role, ip, export, filter] = args.as_slice() else {
        return None;
    };
    (role == ROLE).then(|| {
        run(ip, export, filter).unwrap_or_else(|error| {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        })
    })
}

fn run(ip: &str, export: &str, filter: &str) -> Result<ExitCode> {
    IN_GUEST.store(true, Ordering::Relaxed);
    Lab::visit(lab::tried!(), std::path::Path::new("/tmp"))?;
    let seen: &dyn Served = Box::leak(Box::new(Seen {
        ip: ip.to_owned(),
        export: export.to_owned(),
    }));
    crate::NAS.get(|| Ok(seen))?;
    let mut trials = model::trials();
    trials.extend(consistency::trials());
    trials.extend(apps::trials());
    trials.extend(durability::trials());
    trials.push(apps::judged());
    trials.retain(|trial| !LEFT_OUT.contains(&trial.name()));
    let arguments = Arguments {
        test_threads: Some(1),
        filter: (!filter.is_empty()).then(|| filter.to_owned()),
        ..Arguments::default()
    };
    Ok(libtest_mimic::run(&arguments, trials).exit_code())
}
