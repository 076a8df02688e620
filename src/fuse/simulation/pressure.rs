//! Short memory, and threads beside each other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::fuse::open::{Opening, Target};
use crate::fuse::write::{Bounds, Quick};
use crate::mutant::{Mutant, put_back};

use super::server::Habits;
use super::steps::{Bench, to};

/// What may be held, in bytes.
const HELD: usize = 64 << 10;

/// A host with little memory, whose server does not answer.
async fn silent() -> Bench {
    let mut bench = Bench::new(Habits::default()).await;
    Arc::get_mut(&mut bench.fs).unwrap().bounds = Bounds {
        file: HELD,
        all: HELD,
        ..Bounds::default()
    };
    bench
}

/// How many single bytes are taken, each apart from the others, before a writer has to wait.
async fn bytes_taken() -> u64 {
    let bench = silent().await;
    let (_, file, _) = bench.create(b"file", libc::O_WRONLY).await;
    bench.link.hold(true);
    let taken = |n: &u64| matches!(bench.write(&file, 2 * n, b"x"), Quick::Done);
    (0..10_000).take_while(taken).count() as u64
}

#[tokio::test(start_paused = true)]
async fn tiny_writes_count_as_what_they_take() {
    assert!((100..=HELD as u64 / 200).contains(&bytes_taken().await));
    let _back = put_back(Mutant::PiecesCostNothing);
    assert_eq!(bytes_taken().await, 10_000);
}

/// How many of the files are touched that are open, and of which nothing is held, when a writer of
/// another file waits for memory.
async fn files_walked() -> usize {
    let bench = silent().await;
    let mut idle = Vec::new();
    for n in 0..20 {
        let name = format!("idle{n}");
        idle.push(bench.create(name.as_bytes(), libc::O_RDWR).await.1);
    }
    let (_, file, _) = bench.create(b"file", libc::O_WRONLY).await;
    let (_, other, _) = bench.create(b"other", libc::O_WRONLY).await;
    bench.link.hold(true);
    let part = vec![b'x'; HELD / 2 + 1];
    assert!(matches!(bench.write(&file, 0, &part), Quick::Done));
    let (fs, held) = (Arc::clone(&bench.fs), part);
    let waits = tokio::spawn(async move { fs.write(&other, to(&other, 0), held).await });
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert!(!waits.is_finished());
    let touched = idle.iter().filter(|file| file.inode.state().data.is_some());
    touched.count()
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_memory_looks_at_what_is_held_only() {
    assert_eq!(files_walked().await, 0);
    let _back = put_back(Mutant::WaitersWalkAllFiles);
    assert_eq!(files_walked().await, 20);
}

/// Whether a name of a file is taken away as of one that nobody has open, while another thread has
/// it open, which has waited for those that take names away.
async fn taken_while_open(fault: Option<Mutant>) -> bool {
    const ROUNDS: usize = 20_000;
    let bench = Bench::new(Habits::default()).await;
    let (_, file, open) = bench.create(b"file", libc::O_RDWR).await;
    bench.fs.release(open).await;
    let (fs, inode, cred) = (&bench.fs, &file.inode, &bench.cred);
    let (is_open, over) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                let opening = Opening::new(fs, inode, cred);
                while inode.state().going > 0 {
                    thread::yield_now();
                }
                is_open.store(true, Ordering::SeqCst);
                thread::yield_now();
                is_open.store(false, Ordering::SeqCst);
                drop(opening);
                thread::yield_now();
            }
        });
        let _back = fault.map(put_back);
        let taken = (0..ROUNDS).any(|_| {
            let target = Target::of(fs, Arc::clone(inode), cred);
            matches!(target, Target::Closed(_)) && is_open.load(Ordering::SeqCst)
        });
        over.store(true, Ordering::SeqCst);
        taken
    })
}

#[tokio::test]
async fn no_open_comes_between_the_look_at_a_target_and_its_end() {
    assert!(!taken_while_open(None).await);
    assert!(taken_while_open(Some(Mutant::TargetsInTwoSteps)).await);
}
