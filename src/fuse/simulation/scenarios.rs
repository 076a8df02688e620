//! What chance finds too seldom, or cannot judge: one thing after the other, and what comes of it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nfs3_types::nfs3::{NFS_PROGRAM, createhow3, sattr3, stable_how};

use crate::fuse::error::{Errno, Result};
use crate::mutant::{Mutant, put_back};

use super::disk::ROOT;
use super::kernel::Host;
use super::network::Link;
use super::plan::Plan;
use super::process::Process;
use super::server::Server;
use super::{World, host, runtime};

/// Everything that was sent has been answered after this time.
const SETTLED: Duration = Duration::from_secs(10);

/// A host on a server without faults.
struct Scene {
    host: Arc<Host>,
    link: Arc<Link>,
    server: Arc<Server>,
    _run: tempfile::TempDir,
}

impl Scene {
    /// On one that is otherwise.
    async fn with(change: impl FnOnce(&mut Plan)) -> Self {
        let world = Arc::new(World::default());
        let mut plan = Plan::calm();
        change(&mut plan);
        let server = Server::new(
            plan.habits.clone(),
            plan.dice.fork(),
            Arc::clone(&world),
            4096,
        );
        world.server.set(Arc::downgrade(&server)).unwrap();
        let link = Link::new(0, Arc::clone(&server), plan.latency);
        let run = tempfile::tempdir().unwrap();
        let host = host(0, &link, &mut plan, &world, run.path()).await;
        Self {
            host,
            link,
            server,
            _run: run,
        }
    }

    /// Another host makes a file, or makes it this long.
    fn foreign(&self, name: &[u8], size: usize) {
        let how = createhow3::UNCHECKED(sattr3::default());
        let mut disk = self.server.disk.lock().unwrap();
        let file = disk.create(ROOT, name, &how).unwrap();
        disk.write(file, 0, &vec![1; size], stable_how::FILE_SYNC)
            .unwrap();
    }

    /// How long a file is on the server, in bytes.
    fn size(&self, name: &[u8]) -> usize {
        let disk = self.server.disk.lock().unwrap();
        let file = disk.lookup(ROOT, name).unwrap();
        disk.content(file).unwrap().1.len()
    }
}

/// A log is cut, which the server does and does not answer, and then appended to.
async fn append_after_a_lost_cut() -> usize {
    let scene = Scene::with(|plan| plan.io_timeout = 1).await;
    let logger = Process::new(&scene.host);
    let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_APPEND;
    let log = logger.open(b"log", flags).await.unwrap();
    logger.write(&log, 0, 10).await.unwrap();
    logger.fsync(&log).await.unwrap();
    let silence = |calls: &[NFS_PROGRAM]| *scene.server.unanswered.lock().unwrap() = calls.to_vec();
    silence(&[NFS_PROGRAM::NFSPROC3_SETATTR]);
    let cut = Process::new(&scene.host).truncate(b"log", 0).await;
    assert_eq!(cut, Err(Errno(libc::ETIMEDOUT)));
    silence(&[]);
    logger.write(&log, 0, 1).await.unwrap();
    logger.fsync(&log).await.unwrap();
    scene.size(b"log")
}

#[test]
fn an_append_after_a_lost_cut_leaves_no_hole() {
    let size = || runtime().block_on(append_after_a_lost_cut());
    assert_eq!(size(), 8);
    let _back = put_back(Mutant::LostCallsChangeNothing);
    assert_eq!(size(), 88, "the fault is back");
}

/// A program is killed in a close whose WRITE is on the wire, and another one writes the same
/// words; again and again, on a server that takes its time for each call.
async fn writes_beside_a_killed_close() -> Option<String> {
    const ROUNDS: usize = 20;
    let scene = Scene::with(|plan| plan.habits.slowness = 50).await;
    let flags = libc::O_RDWR | libc::O_CREAT;
    let other = Process::new(&scene.host);
    let file = other.open(b"data", flags).await.unwrap();
    for _ in 0..ROUNDS {
        let process = Process::new(&scene.host);
        let closed = process.open(b"data", flags).await.unwrap();
        process.write(&closed, 0, 4).await.unwrap();
        scene.link.hold(true);
        process.killed.store(true, Ordering::Relaxed);
        assert_eq!(process.close(closed).await, Err(Errno(libc::EINTR)));
        other.write(&file, 0, 4).await.unwrap();
        let freed = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            scene.link.hold(false);
        };
        let (synced, ()) = tokio::join!(other.fsync(&file), freed);
        synced.unwrap();
        tokio::time::sleep(SETTLED).await;
    }
    scene.host.world.failure.lock().unwrap().take()
}

#[test]
fn a_killed_close_takes_nothing_back() {
    let failure = || runtime().block_on(writes_beside_a_killed_close());
    assert_eq!(failure(), None);
    let _back = put_back(Mutant::KilledCallsAreTakenBack);
    let told = failure().expect("the fault is back");
    assert!(told.contains("a WRITE of host 0 puts"), "{told}");
}

/// An fsync on a server that loses whatever was written before each COMMIT.
async fn sync_that_never_settles() -> Result<()> {
    let scene = Scene::with(|plan| {
        plan.habits.lose = 1000;
        plan.habits.slowness = 50;
        plan.io_timeout = 1;
    })
    .await;
    let process = Process::new(&scene.host);
    let flags = libc::O_RDWR | libc::O_CREAT;
    let file = process.open(b"data", flags).await.unwrap();
    for place in [0, 100] {
        process.write(&file, place, 4).await.unwrap();
    }
    process.fsync(&file).await
}

#[test]
fn a_wait_in_which_nothing_moves_ends() {
    let synced = || runtime().block_on(sync_that_never_settles());
    assert_eq!(synced(), Err(Errno(libc::ETIMEDOUT)));
    let _back = put_back(Mutant::WaitsNeverEnd);
    assert_ne!(synced(), Err(Errno(libc::ETIMEDOUT)), "the fault is back");
}

/// What an fsync of a descriptor for reading tells when the server refuses every WRITE.
async fn sync_by_a_reader() -> Result<()> {
    let scene = Scene::with(|plan| plan.habits.refuse_write = 1000).await;
    let process = Process::new(&scene.host);
    let flags = libc::O_WRONLY | libc::O_CREAT;
    let writer = process.open(b"data", flags).await.unwrap();
    let reader = process.open(b"data", libc::O_RDONLY).await.unwrap();
    process.write(&writer, 0, 4).await.unwrap();
    process.fsync(&reader).await
}

#[test]
fn a_reader_that_syncs_hears_of_the_error() {
    let synced = || runtime().block_on(sync_by_a_reader());
    assert!(synced().is_err());
    let _back = put_back(Mutant::ErrorsForWritersOnly);
    assert_eq!(synced(), Ok(()), "the fault is back");
}

/// How often two things are tried beside each other, until they meet in the way that matters.
const MEETINGS: usize = 100;

/// Two looks at a file, and what another host changes meanwhile: whether the kernel goes on to trust
/// a size that it was told before the newer one.
async fn looks_beside_a_change() -> bool {
    let scene = Scene::with(|plan| plan.habits.slowness = 20).await;
    let process = Process::new(&scene.host);
    scene.foreign(b"data", 0);
    let node = process.look_up(b"data", false).await.unwrap();
    for size in 1..=MEETINGS {
        // What was known is trusted no more.
        tokio::time::sleep(Duration::from_secs(100)).await;
        let change = async {
            tokio::time::sleep(Duration::from_millis(10)).await;
            scene.foreign(b"data", size);
        };
        let looks = (process.refresh(&node), process.refresh(&node));
        let (one, other, ()) = tokio::join!(looks.0, looks.1, change);
        let newest = one.unwrap().0.max(other.unwrap().0);
        if node.is_valid() && node.size() < newest {
            return true;
        }
    }
    false
}

#[test]
fn the_kernel_does_not_trust_the_older_of_two_answers() {
    let trusts = || runtime().block_on(looks_beside_a_change());
    assert!(!trusts());
    let _back = put_back(Mutant::KernelMissesChanges);
    assert!(trusts(), "the fault is back");
}

/// A file is made that another host has made first, and is about to write: whether the kernel was
/// told an older size than the file system has heard.
async fn create_beside_a_write() -> bool {
    let scene = Scene::with(|plan| plan.habits.slowness = 20).await;
    let process = Process::new(&scene.host);
    for round in 0..MEETINGS {
        let name = format!("data{round}");
        scene.foreign(name.as_bytes(), 0);
        let write = async {
            tokio::time::sleep(Duration::from_millis(30)).await;
            scene.foreign(name.as_bytes(), 8);
        };
        let begun = scene.host.world.model.now();
        let flags = libc::O_RDWR | libc::O_CREAT;
        let create = process.create(name.as_bytes(), flags, begun);
        let (file, ()) = tokio::join!(create, write);
        let file = file.unwrap();
        let heard = file.file.inode.state().attr().size;
        let told = (file.node.is_valid(), file.node.size());
        process.close(file).await.unwrap();
        if told.0 && told.1 < heard {
            return true;
        }
    }
    false
}

#[test]
fn a_create_tells_what_was_heard_last() {
    let old = || runtime().block_on(create_beside_a_write());
    assert!(!old());
    let _back = put_back(Mutant::CreateTellsOldAttributes);
    assert!(old(), "the fault is back");
}
