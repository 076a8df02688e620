//! What becomes of volumes, and of those on another server, when an NFS server fails: one set of
//! faults ([`kinds`]), each on both data paths.
//!
//! Each fault has a server of its own. On the FUSE data path this is the *home* share of a machine
//! of its own. On the kernel's, one guest has volumes on all of them, and another home share; they
//! fail at once. So every fault is seen at both places that a share can have.

#[path = "faults/kinds.rs"]
mod kinds;
#[path = "faults/scenario.rs"]
mod scenario;
#[path = "faults/squash.rs"]
mod squash;
#[path = "faults/v4_only.rs"]
mod v4_only;

use std::process::ExitCode;

use kinds::FAULTS;
use lab::{Part, trial};
use scenario::{DataPath, Scenario};

const FUSE: &[Part] = &[Part::Ganesha, Part::Fuse];
const KERNEL: &[Part] = &[Part::Ganesha, Part::Guest];

fn main() -> ExitCode {
    lab::main!(|| {
        let mut trials = Vec::new();
        for fault in FAULTS {
            let name = format!("{}_at_home", fault.name);
            trials.push(trial(name, FUSE, move |lab| {
                Scenario::at_home(lab, DataPath::Fuse, fault)?.run()
            }));
        }
        trials.push(trial("all_at_once_elsewhere", KERNEL, |lab| {
            Scenario::elsewhere(lab, DataPath::Kernel, FAULTS)?.run()
        }));
        trials.push(trial(
            "a_server_with_only_v4_is_a_home",
            KERNEL,
            v4_only::works,
        ));
        trials.push(trial(
            "only_v4_needs_the_kernel",
            &[Part::Ganesha],
            v4_only::needs_the_kernel,
        ));
        trials.push(trial(
            "root_squash_honours_what_the_server_allows",
            FUSE,
            squash::allows,
        ));
        trials
    })
}
