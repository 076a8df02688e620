//! Turns with an exclusive volume.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use anyhow::{anyhow, ensure};
use lab::{Call, Lab, Result};

use crate::{Host, fresh, nas};

/// How often whoever has the volume may have it again, until the other has got it. Without turns it is
/// as often as it likes.
const AGAIN: usize = 10;

/// A host that mounts again at once does not keep the volume from one that waits.
pub(crate) fn turns(lab: &'static Lab) -> Result {
    let nas = nas(lab)?;
    let (a, b) = (
        Host::start(lab, nas, "turns", "a")?,
        Host::start(lab, nas, "turns", "b")?,
    );
    let volume = fresh("turns");
    a.ok(Call::create(&volume, &[("access", "exclusive")]))?;
    let (waits, done) = (AtomicBool::new(false), AtomicBool::new(false));
    let had = AtomicUsize::new(0);
    thread::scope(|scope| {
        let greedy = scope.spawn(|| -> Result {
            while !done.load(Ordering::Relaxed) {
                a.ok(Call::mount(&volume, "greedy"))?;
                had.fetch_add(1, Ordering::Relaxed);
                waits.store(true, Ordering::Relaxed);
                a.ok(Call::unmount(&volume, "greedy"))?;
            }
            Ok(())
        });
        while !waits.load(Ordering::Relaxed) && !greedy.is_finished() {
            thread::yield_now();
        }
        let before = had.load(Ordering::Relaxed);
        let waited = (|| {
            b.ok(Call::mount(&volume, "patient"))?;
            let again = had.load(Ordering::Relaxed) - before;
            ensure!(again <= AGAIN, "{again} times");
            b.ok(Call::unmount(&volume, "patient"))
        })();
        done.store(true, Ordering::Relaxed);
        greedy.join().map_err(|_| anyhow!("a panic"))??;
        waited.map(drop)
    })
}
