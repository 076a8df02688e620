//! Crashes: the daemon is killed at every step of its calls, at random moments and by a full disk,
//! the engine is killed as well; the next start repairs, nothing is lost and nothing is leaked.

mod lab;
#[path = "crash/points.rs"]
mod points;
#[path = "crash/share.rs"]
mod share;
#[path = "crash/world.rs"]
mod world;

use std::process::ExitCode;

fn main() -> ExitCode {
    lab::main(points::trials)
}
