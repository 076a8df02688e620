//! Single sequences that chance meets rarely, on one host and a server without faults.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use nfs3_types::nfs3::{NFS_PROGRAM, createhow3, nfsstat3, sattr3};
use tokio::sync::oneshot;

use crate::fuse::error::Errno;
use crate::fuse::fs::{Entry, Found, Fs, Kernel, OpenFile};
use crate::fuse::hidden::Hidden;
use crate::fuse::known::Forgetting;
use crate::fuse::options::FuseOptions;
use crate::fuse::write::{Quick, WriteTo};
use crate::mutant::{Mutant, put_back};
use nfs::rpc::nfs3::{FileHandle, Nfs3};
use nfs::rpc::{Cred, Settings};

use super::dice::Dice;
use super::kernel::Caches;
use super::network::{Dialer, Link};
use super::server::{Habits, Server};
use super::{World, disk};

const APPEND: i32 = libc::O_WRONLY | libc::O_APPEND;

pub(super) struct Bench {
    pub(super) fs: Arc<Fs>,
    pub(super) cred: Cred,
    pub(super) link: Arc<Link>,
    pub(super) server: Arc<Server>,
    _run: tempfile::TempDir,
    _world: Arc<World>,
}

impl Bench {
    pub(super) async fn new(habits: Habits) -> Self {
        Self::over(habits, Arc::new(Caches::default())).await
    }

    async fn over(habits: Habits, kernel: Arc<dyn Kernel>) -> Self {
        let world = Arc::new(World::default());
        let server = Server::new(habits, Dice(1), Arc::clone(&world), 4096);
        world.server.set(Arc::downgrade(&server)).unwrap();
        let mut settings = Settings::new(([192, 0, 2, 1], 2049).into());
        settings.io_timeout = Some(Duration::from_secs(60));
        let link = Link::new(0, Arc::clone(&server), 0);
        let nfs = Nfs3::over(&settings, Dialer(Arc::clone(&link))).unwrap();
        let root = FileHandle::new(&disk::ROOT.to_be_bytes()).unwrap();
        let run = tempfile::tempdir().unwrap();
        let hidden = Hidden::new(run.path(), "simulated");
        let fs = Fs::start(nfs, root, FuseOptions::default(), kernel, hidden);
        Self {
            fs: fs.await.unwrap(),
            cred: Cred::root(),
            link,
            server,
            _run: run,
            _world: world,
        }
    }

    /// A new file, open under a number.
    pub(super) async fn create(&self, name: &[u8], flags: i32) -> (Entry, Arc<OpenFile>, u64) {
        let made = self.fs.create(&self.cred, 1, name, 0o644, flags);
        let (entry, opened) = made.await.unwrap();
        (entry, self.fs.file(opened.fh).unwrap(), opened.fh)
    }

    /// Another host makes an empty file.
    pub(super) fn made_elsewhere(&self, name: &[u8]) {
        let how = createhow3::UNCHECKED(sattr3::default());
        let mut disk = self.server.disk.lock().unwrap();
        disk.create(disk::ROOT, name, &how).unwrap();
    }

    pub(super) fn write(&self, file: &OpenFile, offset: u64, data: &[u8]) -> Quick {
        self.fs.write_quick(file, to(file, offset), data)
    }

    /// What the server has of a file.
    pub(super) fn content(&self, file: &OpenFile) -> Option<Vec<u8>> {
        let id = file.inode.state().attr().fileid;
        let disk = self.server.disk.lock().unwrap();
        disk.content(id).map(|(_, current)| current.to_vec())
    }
}

pub(super) fn to(file: &OpenFile, offset: u64) -> WriteTo {
    WriteTo {
        offset,
        flags: file.flags,
        from_pages: false,
    }
}

/// A file is written, comes to rest, is forgotten, looked up anew and written again.
async fn forgotten_and_written() -> Result<(), String> {
    let bench = Bench::new(Habits::default()).await;
    let (fs, cred) = (&bench.fs, &bench.cred);
    let (entry, file, fh) = bench.create(b"file", libc::O_WRONLY).await;
    assert!(matches!(bench.write(&file, 0, b"old"), Quick::Done));
    fs.release(fh).await;
    drop(file);
    fs.forget(entry.ino, 1);
    let found = fs.lookup(cred, 1, b"file").await.unwrap();
    assert!(matches!(found, Found::Entry(again) if again.ino == entry.ino));
    tokio::time::sleep(Duration::from_millis(500)).await;
    let opened = fs.open(cred, entry.ino, libc::O_WRONLY).await.unwrap();
    let file = fs.file(opened.fh).unwrap();
    assert!(matches!(bench.write(&file, 0, b"new"), Quick::Done));
    // The first one's task has ended by now, the second one's has not begun.
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!(bench.content(&file), Some(b"old".to_vec()));
    let checked = fs.check_held();
    fs.sync_everything().await;
    checked
}

#[tokio::test(start_paused = true)]
async fn a_file_that_is_written_again_is_synced_at_the_end() {
    assert_eq!(forgotten_and_written().await, Ok(()));
    let _back = put_back(Mutant::DirtyByNodeId);
    assert!(forgotten_and_written().await.is_err());
}

#[tokio::test(start_paused = true)]
async fn nothing_is_appended_behind_the_end_of_all_files() {
    let bench = Bench::new(Habits::default()).await;
    let (_, file, _) = bench.create(b"log", APPEND).await;
    let mut attr = file.inode.state().attr();
    for size in [u64::MAX, u64::MAX - 2, (1 << 63) - 2] {
        attr.size = size;
        bench.fs.absorb(&file.inode, attr, bench.fs.tick());
        let written = bench.write(&file, 0, b"line");
        assert!(
            matches!(written, Quick::Failed(Errno(libc::EFBIG))),
            "{written:?}"
        );
        let written = bench.fs.write(&file, to(&file, 0), b"line").await;
        assert_eq!(written, Err(Errno(libc::EFBIG)));
    }
}

/// The kernel sends a large asynchronous append in parts, at once. The first one finds that the end
/// of the file is not known and asks; the second comes when a look at the file has brought it.
async fn append_in_parts() -> Option<Vec<u8>> {
    let bench = Bench::new(Habits::default()).await;
    let (_, file, _) = bench.create(b"log", APPEND).await;
    let (fs, inode) = (&bench.fs, &file.inode);
    inode.state().cached.expire(fs.tick());
    bench.link.hold(true);
    let part = |offset, data: &'static [u8]| {
        let (fs, file) = (Arc::clone(fs), Arc::clone(&file));
        tokio::spawn(async move { fs.write(&file, to(&file, offset), data).await })
    };
    assert!(matches!(bench.write(&file, 0, b"one, "), Quick::Wait));
    let first = part(0, b"one, ");
    tokio::time::sleep(Duration::from_millis(1)).await;
    let attr = inode.state().attr();
    fs.absorb(inode, attr, fs.tick());
    let second = match bench.write(&file, 5, b"two") {
        Quick::Wait => Some(part(5, b"two")),
        other => {
            assert!(matches!(other, Quick::Done), "{other:?}");
            None
        }
    };
    tokio::time::sleep(Duration::from_millis(1)).await;
    bench.link.hold(false);
    for part in std::iter::once(first).chain(second) {
        assert_eq!(part.await.unwrap(), Ok(()));
    }
    fs.sync_everything().await;
    bench.content(&file)
}

#[tokio::test(start_paused = true)]
async fn the_parts_of_one_append_keep_their_order() {
    assert_eq!(append_in_parts().await, Some(b"one, two".to_vec()));
    let _back = put_back(Mutant::AppendsAskBeforeTheirTurn);
    assert_eq!(append_in_parts().await, Some(b"twoone, ".to_vec()));
}

/// A file is put out of the way of a rename, which then fails, and so does the call `then`. Returns
/// the name that the file has when it was closed.
async fn failed_rename(then: Option<NFS_PROGRAM>) -> Option<Vec<u8>> {
    let habits = Habits {
        no_links: true,
        ..Habits::default()
    };
    let bench = Bench::new(habits).await;
    let (fs, cred) = (&bench.fs, &bench.cred);
    let (_, _, new) = bench.create(b"new", libc::O_WRONLY).await;
    fs.release(new).await;
    let (_, file, open) = bench.create(b"file", libc::O_WRONLY).await;
    let fails = Some(nfsstat3::NFS3ERR_IO);
    let rename = NFS_PROGRAM::NFSPROC3_RENAME;
    let orders = [(rename, None), (rename, fails)].into_iter();
    let orders = orders.chain(then.map(|call| (call, fails)));
    bench.server.orders.lock().unwrap().extend(orders);
    let renamed = fs.rename(cred, (1, b"new"), (1, b"file"), 0).await;
    assert_eq!(renamed, Err(Errno(libc::EIO)));
    assert!(bench.server.orders.lock().unwrap().is_empty());
    fs.release(open).await;
    let id = file.inode.state().attr().fileid;
    let disk = bench.server.disk.lock().unwrap();
    let names = disk.names(disk::ROOT).unwrap();
    let name = names.into_iter().find(|(_, of, _)| *of == id);
    name.map(|(name, ..)| name)
}

#[tokio::test(start_paused = true)]
async fn the_target_of_a_rename_that_fails_is_never_deleted() {
    for then in [NFS_PROGRAM::NFSPROC3_LOOKUP, NFS_PROGRAM::NFSPROC3_RENAME] {
        let then = Some(then);
        let name = failed_rename(then).await.unwrap();
        assert!(name.starts_with(b".nfs"), "{name:?}");
        let _back = put_back(Mutant::RenameOfUnknownOutcomeDeletes);
        assert_eq!(failed_rename(then).await, None);
    }
    assert_eq!(failed_rename(None).await, Some(b"file".to_vec()));
    let _back = put_back(Mutant::FailedRenameDeletes);
    assert_eq!(failed_rename(None).await, None);
}

/// What is read of a file that was replaced while it was open, by a rename whose answer was lost;
/// and how many names are left when it is closed.
async fn unanswered_rename() -> (Result<bytes::Bytes, Errno>, usize) {
    let bench = Bench::new(Habits::default()).await;
    let (fs, cred) = (&bench.fs, &bench.cred);
    let (_, _, new) = bench.create(b"new", libc::O_WRONLY).await;
    fs.release(new).await;
    let (_, file, open) = bench.create(b"file", libc::O_RDWR).await;
    assert!(matches!(bench.write(&file, 0, b"old"), Quick::Done));
    fs.fsync(open).await.unwrap();
    let silence = |procedures: &[NFS_PROGRAM]| {
        *bench.server.unanswered.lock().unwrap() = procedures.to_vec();
    };
    silence(&[NFS_PROGRAM::NFSPROC3_RENAME]);
    let renamed = fs.rename(cred, (1, b"new"), (1, b"file"), 0).await;
    assert_eq!(renamed, Err(Errno(libc::ETIMEDOUT)));
    silence(&[]);
    let read = fs.read(&file, 0, 16).await;
    fs.release(open).await;
    let disk = bench.server.disk.lock().unwrap();
    (read, disk.names(disk::ROOT).unwrap().len())
}

#[tokio::test(start_paused = true)]
async fn what_a_rename_may_have_replaced_stays_until_it_is_closed() {
    let (read, names) = unanswered_rename().await;
    assert_eq!((read.as_deref(), names), (Ok(&b"old"[..]), 1));
    let _back = put_back(Mutant::UnansweredRenamesAreRefused);
    assert_eq!(unanswered_rename().await.0, Err(Errno(libc::ESTALE)));
}

/// Lets a server ask for patience once, in answer to a procedure.
pub(super) fn busy_once(bench: &Bench, procedure: NFS_PROGRAM) {
    let busy = (procedure, Some(nfsstat3::NFS3ERR_JUKEBOX));
    bench.server.orders.lock().unwrap().push_back(busy);
}

/// What an open of a replaced file comes to, sent by the kernel before that, while the hidden name is
/// removed because it was closed; and what is read then.
async fn open_beside_the_last_close() -> Result<Result<(), Errno>, Errno> {
    let bench = Bench::new(Habits::default()).await;
    let (fs, cred) = (&bench.fs, &bench.cred);
    let (entry, _, first) = bench.create(b"file", libc::O_RDWR).await;
    let (_, _, new) = bench.create(b"new", libc::O_WRONLY).await;
    fs.release(new).await;
    fs.rename(cred, (1, b"new"), (1, b"file"), 0).await.unwrap();
    busy_once(&bench, NFS_PROGRAM::NFSPROC3_REMOVE);
    let open = async {
        tokio::time::sleep(Duration::from_millis(10)).await;
        fs.open(cred, entry.ino, libc::O_RDONLY).await
    };
    let ((), opened) = tokio::join!(fs.release(first), open);
    let file = fs.file(opened?.fh).unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    Ok(fs.read(&file, 0, 16).await.map(drop))
}

#[tokio::test(start_paused = true)]
async fn what_is_open_is_not_removed_by_an_earlier_close() {
    let stale = Errno(libc::ESTALE);
    // Where an open fails so the kernel looks the name up again.
    assert_eq!(open_beside_the_last_close().await, Err(stale));
    let _back = put_back(Mutant::HiddenGoesUnseen);
    assert_eq!(open_beside_the_last_close().await, Ok(Err(stale)));
}

/// What is read of an open file that a rename replaces, after an answer to a look at its name that an
/// earlier rename has overtaken: the name led to another file, or to none.
async fn read_beside_an_old_answer(led_somewhere: bool) -> Result<Vec<u8>, Errno> {
    let bench = Bench::new(Habits::default()).await;
    let (fs, cred) = (&bench.fs, &bench.cred);
    let names = [&b"file"[..], b"new1", b"new2"];
    for name in &names[usize::from(!led_somewhere)..] {
        let (_, file, open) = bench.create(name, libc::O_WRONLY).await;
        assert!(matches!(bench.write(&file, 0, name), Quick::Done));
        fs.release(open).await;
    }
    let late = (NFS_PROGRAM::NFSPROC3_LOOKUP, Duration::from_secs(1));
    bench.server.late.lock().unwrap().push_back(late);
    let look = {
        let (fs, cred) = (Arc::clone(fs), cred.clone());
        tokio::spawn(async move { fs.lookup(&cred, 1, b"file").await.map(|_| ()) })
    };
    tokio::time::sleep(Duration::from_millis(10)).await;
    let to = (1, &b"file"[..]);
    fs.rename(cred, (1, b"new1"), to, 0).await?;
    let Found::Entry(entry) = fs.lookup(cred, 1, b"file").await? else {
        panic!("it was renamed to that name");
    };
    look.await.unwrap()?;
    let opened = fs.open(cred, entry.ino, libc::O_RDONLY).await?;
    fs.rename(cred, (1, b"new2"), to, 0).await?;
    fs.read(&fs.file(opened.fh)?, 0, 16)
        .await
        .map(|read| read.to_vec())
}

/// The same of a new file that is unlinked, after an answer that there was none.
async fn read_of_a_new_file_beside_an_old_answer() -> Result<Vec<u8>, Errno> {
    let bench = Bench::new(Habits::default()).await;
    let (fs, cred) = (&bench.fs, &bench.cred);
    busy_once(&bench, NFS_PROGRAM::NFSPROC3_CREATE);
    let late = (NFS_PROGRAM::NFSPROC3_LOOKUP, Duration::from_secs(1));
    bench.server.late.lock().unwrap().push_back(late);
    let look = async {
        tokio::time::sleep(Duration::from_millis(10)).await;
        fs.lookup(cred, 1, b"file").await
    };
    let ((_, file, open), absent) = tokio::join!(bench.create(b"file", libc::O_RDWR), look);
    assert!(matches!(absent, Ok(Found::Absent(_))));
    assert!(matches!(bench.write(&file, 0, b"new"), Quick::Done));
    fs.fsync(open).await?;
    fs.unlink(cred, 1, b"file").await?;
    fs.read(&file, 0, 16).await.map(|read| read.to_vec())
}

#[tokio::test(start_paused = true)]
async fn an_old_answer_takes_no_open_file_away() {
    let stale = Err(Errno(libc::ESTALE));
    assert_eq!(
        read_of_a_new_file_beside_an_old_answer().await,
        Ok(b"new".to_vec())
    );
    for led_somewhere in [true, false] {
        let read = read_beside_an_old_answer(led_somewhere).await;
        assert_eq!(read, Ok(b"new1".to_vec()));
        let _back = put_back(Mutant::OldAnswersName);
        let read = read_beside_an_old_answer(led_somewhere).await;
        assert_eq!(read, stale);
    }
    let _back = put_back(Mutant::OldAnswersName);
    assert_eq!(read_of_a_new_file_beside_an_old_answer().await, stale);
}

/// What becomes of the second try of an open whose file was replaced before, while the server lets
/// the next rename to the same name wait. The first try was an open, or a look at the attributes.
async fn open_between_renames(looks: bool) -> Result<(), Errno> {
    let bench = Bench::new(Habits::default()).await;
    let (fs, cred) = (&bench.fs, &bench.cred);
    let mut first = None;
    for name in [b"file", b"new1", b"new2"] {
        let (entry, _, open) = bench.create(name, libc::O_WRONLY).await;
        fs.release(open).await;
        first.get_or_insert(entry.ino);
    }
    let to = (1, &b"file"[..]);
    fs.rename(cred, (1, b"new1"), to, 0).await.unwrap();
    busy_once(&bench, NFS_PROGRAM::NFSPROC3_RENAME);
    let rename = {
        let (fs, cred) = (Arc::clone(fs), cred.clone());
        tokio::spawn(async move { fs.rename(&cred, (1, b"new2"), to, 0).await })
    };
    tokio::time::sleep(Duration::from_millis(10)).await;
    let late = if looks {
        fs.too_late(fs.getattr(cred, first.unwrap()).await)
            .await
            .err()
    } else {
        let opened = fs.open(cred, first.unwrap(), libc::O_RDONLY).await;
        fs.too_late(opened).await.err()
    };
    assert_eq!(late, Some(Errno(libc::ESTALE)));
    let Found::Entry(again) = fs.lookup(cred, 1, b"file").await.unwrap() else {
        panic!("the name is there all the time");
    };
    rename.await.unwrap().unwrap();
    let opened = fs.open(cred, again.ino, libc::O_RDONLY).await;
    opened.map(|_| ())
}

#[tokio::test(start_paused = true)]
async fn an_open_that_came_too_late_is_not_late_again() {
    for looks in [false, true] {
        assert_eq!(open_between_renames(looks).await, Ok(()));
        for fault in [Mutant::LateOpensDoNotWait, Mutant::LateLooksAreForgotten] {
            let _back = put_back(fault);
            let opened = open_between_renames(looks).await;
            assert_eq!(opened, Err(Errno(libc::ESTALE)), "{fault:?}");
        }
    }
}

/// Whether an empty directory is there, under whatever name, after it was moved to a free name by a
/// rename whose answer was lost.
async fn unanswered_move() -> bool {
    let bench = Bench::new(Habits::default()).await;
    let (fs, cred) = (&bench.fs, &bench.cred);
    let moved = fs.mkdir(cred, 1, b"dir", 0o755).await.unwrap().attr.fileid;
    *bench.server.unanswered.lock().unwrap() = vec![NFS_PROGRAM::NFSPROC3_RENAME];
    let (from, to) = ((1, &b"dir"[..]), (1, &b"new"[..]));
    let renamed = fs.rename(cred, from, to, libc::RENAME_NOREPLACE).await;
    assert_eq!(renamed, Err(Errno(libc::ETIMEDOUT)));
    let disk = bench.server.disk.lock().unwrap();
    let names = disk.names(disk::ROOT).unwrap();
    names.iter().any(|(_, id, _)| *id == moved)
}

#[tokio::test(start_paused = true)]
async fn a_directory_that_a_rename_may_have_moved_is_not_deleted() {
    assert!(unanswered_move().await);
    let _back = put_back(Mutant::UnansweredRenamesAreRefused);
    assert!(!unanswered_move().await);
}

/// What an open with O_CREAT comes to where the name was taken `times` times when it was to be made,
/// and free whenever it was looked up.
async fn made_where_others_come_and_go(times: usize) -> Result<(), Errno> {
    let bench = Bench::new(Habits::default()).await;
    let taken = (NFS_PROGRAM::NFSPROC3_CREATE, Some(nfsstat3::NFS3ERR_EXIST));
    bench
        .server
        .orders
        .lock()
        .unwrap()
        .extend([taken].repeat(times));
    let made = bench
        .fs
        .create(&bench.cred, 1, b"file", 0o644, libc::O_WRONLY);
    made.await.map(|_| ())
}

#[tokio::test(start_paused = true)]
async fn a_name_that_comes_and_goes_is_made_or_looked_up_anew() {
    assert_eq!(made_where_others_come_and_go(3).await, Ok(()));
    let stale = Err(Errno(libc::ESTALE));
    assert_eq!(made_where_others_come_and_go(100).await, stale);
    // What is no file is looked up by the kernel.
    let bench = Bench::new(Habits::default()).await;
    let made = bench.server.disk.lock().unwrap().mkdir(disk::ROOT, b"dir");
    assert!(made.is_ok());
    let made = bench
        .fs
        .create(&bench.cred, 1, b"dir", 0o644, libc::O_WRONLY);
    assert_eq!(made.await.map(|_| ()), stale);
}

/// A kernel that drops no page: somebody has it locked.
#[derive(Debug, Default)]
struct Locked(Mutex<Vec<oneshot::Sender<()>>>);

impl Kernel for Locked {
    fn drop_attributes(&self, _: u64) {}
    fn drop_pages(&self, _: u64) {}
    fn drop_range(&self, _: u64, _: u64, _: u64, done: oneshot::Sender<()>) {
        self.0.lock().unwrap().push(done);
    }
    fn forget_unused(&self, _: Forgetting) {}
}

/// What two appends come to that go past pages which cannot be dropped, if they end within a day.
async fn appends_past_locked_pages() -> Vec<Option<Result<(), Errno>>> {
    let bench = Bench::over(Habits::default(), Arc::<Locked>::default()).await;
    let fs = &bench.fs;
    let (entry, file, open) = bench.create(b"log", libc::O_RDWR).await;
    assert!(matches!(bench.write(&file, 0, b"page"), Quick::Done));
    fs.fsync(open).await.unwrap();
    let opened = fs.open(&bench.cred, entry.ino, APPEND).await.unwrap();
    let log = fs.file(opened.fh).unwrap();
    let mut ends = Vec::new();
    for line in [b"one, ", b"two, "] {
        assert!(matches!(bench.write(&log, 4, line), Quick::Wait));
        let append = fs.write(&log, to(&log, 4), line);
        let a_day = Duration::from_secs(24 * 3600);
        ends.push(tokio::time::timeout(a_day, append).await.ok());
    }
    ends
}

#[tokio::test(start_paused = true)]
async fn an_append_past_a_page_that_stays_locked_ends() {
    let timed_out = Some(Err(Errno(libc::ETIMEDOUT)));
    assert_eq!(appends_past_locked_pages().await, [timed_out; 2]);
    let _back = put_back(Mutant::WaitsNeverEnd);
    assert_eq!(appends_past_locked_pages().await[0], None);
}
