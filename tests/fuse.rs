//! The FUSE data path on real parts: nfs-ganesha, /dev/fuse, workers as processes of their own.
//!
//! The test binary is also the worker's program.

#[path = "fuse/apps.rs"]
mod apps;
#[path = "fuse/consistency.rs"]
mod consistency;
#[path = "fuse/durability.rs"]
mod durability;
#[path = "fuse/faults.rs"]
mod faults;
#[path = "fuse/guests.rs"]
mod guests;
#[path = "fuse/host.rs"]
mod host;
#[path = "fuse/hostile.rs"]
mod hostile;
#[path = "fuse/memory.rs"]
mod memory;
#[path = "fuse/model.rs"]
mod model;
#[path = "fuse/odd.rs"]
mod odd;
#[path = "fuse/ports.rs"]
mod ports;
#[path = "fuse/squash.rs"]
mod squash;

use std::process::ExitCode;

use host::{ATTACH, EXPORT, Host, Served};
use lab::{Export, Ganesha, Lab, Part, Result, Shared, trial};
use libtest_mimic::Trial;

const NEEDS: &[Part] = &[Part::Ganesha, Part::Fuse];

static GANESHA: Shared<Ganesha> = Shared::new();
/// The server that trials use: that one, or the one that a guest was told of.
static NAS: Shared<&'static dyn Served> = Shared::new();

fn main() -> ExitCode {
    if let Some(code) = host::as_worker() {
        return code;
    }
    if let Some(code) = guests::as_guest() {
        return code;
    }
    lab::main!(|| {
        let mut trials = Vec::new();
        trials.extend(model::trials());
        trials.extend(consistency::trials());
        trials.extend(apps::trials());
        trials.extend(durability::trials());
        trials.extend(faults::trials());
        trials.extend(hostile::trials());
        trials.extend(odd::trials());
        trials.extend(memory::trials());
        trials.extend(ports::trials());
        trials.extend(squash::trials());
        trials.extend(guests::trials());
        trials
    })
}

fn fuse_trial<F>(name: &str, body: F) -> Trial
where
    F: FnOnce(&'static Lab) -> Result + Send + 'static,
{
    trial(name, NEEDS, body)
}

fn ganesha(lab: &'static Lab) -> Result<&'static Ganesha> {
    GANESHA.get(|| Ganesha::start(lab, "fusenas", &[Export::new(EXPORT)]))
}

fn nas(lab: &'static Lab) -> Result<&'static dyn Served> {
    NAS.get(|| Ok(ganesha(lab)?)).copied()
}
