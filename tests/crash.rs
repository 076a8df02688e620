//! Crashes: the daemon is killed at every step of its calls, at random moments and by a full disk,
//! the engine is killed as well; the next start repairs, nothing is lost and nothing is leaked.

#[path = "crash/any_moment.rs"]
mod any_moment;
#[path = "crash/full_disk.rs"]
mod full_disk;
#[path = "crash/points.rs"]
mod points;
#[path = "crash/share.rs"]
mod share;
#[path = "crash/world.rs"]
mod world;

use std::process::ExitCode;

fn main() -> ExitCode {
    lab::main!(|| {
        let mut trials = points::trials();
        trials.extend(any_moment::trials());
        trials.extend(full_disk::trials());
        trials
    })
}
