//! Programs that are killed in the middle of a change of names, which the server carries out later.

use std::sync::Arc;
use std::time::Duration;

use nfs3_types::nfs3::NFS_PROGRAM;

use crate::fuse::error::Errno;
use crate::fuse::fs::{Change, Found};
use crate::fuse::write::Quick;
use crate::mutant::{Mutant, put_back};
use nfs::rpc::nfs3::SetAttr;

use super::disk;
use super::server::Habits;
use super::steps::{Bench, busy_once, to};

/// Begins an operation whose program is killed while the server lets it wait.
async fn kill(operation: impl Future<Output = Result<(), Errno>> + Send + 'static) {
    let operation = tokio::spawn(operation);
    tokio::time::sleep(Duration::from_millis(10)).await;
    operation.abort();
    assert!(operation.await.is_err());
}

/// Whether an open of a file ends while the server lets the rename of a killed program wait that
/// replaces it, and what it comes to.
async fn open_beside_a_killed_rename() -> (bool, Result<(), Errno>) {
    let bench = Bench::new(Habits::default()).await;
    let mut first = None;
    for name in [b"file", b"new1"] {
        let (entry, _, open) = bench.create(name, libc::O_WRONLY).await;
        bench.fs.release(open).await;
        first.get_or_insert(entry.ino);
    }
    busy_once(&bench, NFS_PROGRAM::NFSPROC3_RENAME);
    let (fs, cred) = (Arc::clone(&bench.fs), bench.cred.clone());
    kill(async move { fs.rename(&cred, (1, b"new1"), (1, b"file"), 0).await }).await;
    let (fs, cred) = (Arc::clone(&bench.fs), bench.cred.clone());
    let open = tokio::spawn(async move { fs.open(&cred, first.unwrap(), libc::O_RDONLY).await });
    tokio::time::sleep(Duration::from_millis(10)).await;
    (open.is_finished(), open.await.unwrap().map(|_| ()))
}

#[tokio::test(start_paused = true)]
async fn opens_wait_for_a_rename_whose_program_was_killed() {
    let stale = Err(Errno(libc::ESTALE));
    assert_eq!(open_beside_a_killed_rename().await, (false, stale));
    let _back = put_back(Mutant::KilledRenamesAreForgotten);
    assert_eq!(open_beside_a_killed_rename().await, (true, Ok(())));
}

/// What takes the name `file` away, its program being killed.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Killed {
    Rename,
    Unlink,
    Rmdir,
}

/// What brings the name next.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Next {
    Create,
    Rename,
    RenameNoReplace,
    Mkdir,
}

/// The file ids that `file` leads to on the server, at once after the second change and a minute later,
/// when the first one has been carried out.
async fn changed_twice(killed: Killed, next: Next) -> [Option<u64>; 2] {
    let bench = Bench::new(Habits::default()).await;
    for name in [&b"new1"[..], b"new2"] {
        let (_, _, open) = bench.create(name, libc::O_WRONLY).await;
        bench.fs.release(open).await;
    }
    if killed == Killed::Unlink {
        let (_, _, open) = bench.create(b"file", libc::O_WRONLY).await;
        bench.fs.release(open).await;
    }
    if killed == Killed::Rmdir {
        bench
            .fs
            .mkdir(&bench.cred, 1, b"file", 0o755)
            .await
            .unwrap();
    }
    busy_once(
        &bench,
        match killed {
            Killed::Rename => NFS_PROGRAM::NFSPROC3_RENAME,
            Killed::Unlink => NFS_PROGRAM::NFSPROC3_REMOVE,
            Killed::Rmdir => NFS_PROGRAM::NFSPROC3_RMDIR,
        },
    );
    let (fs, cred) = (Arc::clone(&bench.fs), bench.cred.clone());
    kill(async move {
        match killed {
            Killed::Rename => fs.rename(&cred, (1, b"new1"), (1, b"file"), 0).await,
            Killed::Unlink => fs.unlink(&cred, 1, b"file").await,
            Killed::Rmdir => fs.rmdir(&cred, 1, b"file").await,
        }
    })
    .await;
    let (fs, cred) = (&bench.fs, &bench.cred);
    let (from, to) = ((1, &b"new2"[..]), (1, &b"file"[..]));
    // Refused is as good: the first one came before it.
    let _ = match next {
        Next::Create => {
            let flags = libc::O_WRONLY | libc::O_EXCL;
            fs.create(cred, 1, b"file", 0o644, flags).await.map(|_| ())
        }
        Next::Rename => fs.rename(cred, from, to, 0).await,
        Next::RenameNoReplace => fs.rename(cred, from, to, libc::RENAME_NOREPLACE).await,
        Next::Mkdir => fs.mkdir(cred, 1, b"file", 0o755).await.map(|_| ()),
    };
    let there = || {
        let disk = bench.server.disk.lock().unwrap();
        let names = disk.names(disk::ROOT).unwrap();
        let file = names.iter().find(|(name, ..)| name == b"file");
        file.map(|(_, id, _)| *id)
    };
    let then = there();
    tokio::time::sleep(Duration::from_secs(60)).await;
    [then, there()]
}

#[tokio::test(start_paused = true)]
async fn a_killed_change_of_a_name_undoes_no_later_one() {
    for (killed, next) in [
        (Killed::Rename, Next::Create),
        (Killed::Rename, Next::Rename),
        (Killed::Unlink, Next::Create),
        (Killed::Unlink, Next::Rename),
        (Killed::Unlink, Next::RenameNoReplace),
        (Killed::Rmdir, Next::Mkdir),
    ] {
        let [then, later] = changed_twice(killed, next).await;
        assert_eq!(then, later, "{killed:?} {next:?}");
        assert!(then.is_some(), "{killed:?} {next:?}");
        let _back = put_back(Mutant::KilledRenamesReplaceLater);
        let [then, later] = changed_twice(killed, next).await;
        assert_ne!(then, later, "{killed:?} {next:?}, put back");
    }
}

/// What the server has under the names of a directory, and how long they are.
fn sizes(bench: &Bench) -> Vec<(String, usize)> {
    let disk = bench.server.disk.lock().unwrap();
    let names = disk.names(disk::ROOT).unwrap();
    let size = |id: &u64| disk.content(*id).map_or(0, |(_, current)| current.len());
    let named =
        |(name, id, _): &(Vec<u8>, u64, _)| (String::from_utf8_lossy(name).into(), size(id));
    names.iter().map(named).collect()
}

/// `mv new file` is killed, and a program writes `new` anew: what the server has in the end.
async fn written_anew_after_a_killed_rename() -> Vec<(String, usize)> {
    let bench = Bench::new(Habits::default()).await;
    let (fs, cred) = (&bench.fs, &bench.cred);
    let (_, _, open) = bench.create(b"file", libc::O_WRONLY).await;
    fs.release(open).await;
    let (new, file, open) = bench.create(b"new", libc::O_WRONLY).await;
    assert!(matches!(bench.write(&file, 0, b"precious"), Quick::Done));
    fs.release(open).await;
    busy_once(&bench, NFS_PROGRAM::NFSPROC3_RENAME);
    let (of, who) = (Arc::clone(fs), cred.clone());
    kill(async move { of.rename(&who, (1, b"new"), (1, b"file"), 0).await }).await;
    // fuse_rename_common at EINTR: the kernel forgets both.
    fs.forget(new.ino, 1);
    // open(O_CREAT | O_TRUNC)
    match fs.lookup(cred, 1, b"new").await.unwrap() {
        Found::Absent(_) => {
            bench.create(b"new", libc::O_WRONLY).await;
        }
        Found::Entry(entry) => {
            // The kernel believes that for a while.
            tokio::time::sleep(entry.name_trusted / 2).await;
            let opened = fs.open(cred, entry.ino, libc::O_WRONLY).await.unwrap();
            let set = SetAttr {
                size: Some(0),
                ..SetAttr::default()
            };
            let fh = Some(opened.fh);
            fs.setattr(cred, entry.ino, Change { set, fh })
                .await
                .unwrap();
        }
    }
    sizes(&bench)
}

#[tokio::test(start_paused = true)]
async fn what_a_killed_rename_moves_is_not_found_under_its_old_name() {
    let after = |file| vec![("file".to_owned(), file), ("new".to_owned(), 0)];
    assert_eq!(written_anew_after_a_killed_rename().await, after(8));
    let _back = put_back(Mutant::LooksPassKilledChanges);
    assert_eq!(written_anew_after_a_killed_rename().await, after(0)[..1]);
}

/// Whether a file that is made in a directory, after a program was killed that renames another one to
/// that name and the kernel has forgotten the directory, is there in the end. It may be refused.
async fn made_in_a_forgotten_directory() -> bool {
    let bench = Bench::new(Habits::default()).await;
    let (fs, cred) = (&bench.fs, &bench.cred);
    let dir = fs.mkdir(cred, 1, b"dir", 0o755).await.unwrap();
    let made = fs.create(cred, dir.ino, b"new", 0o644, libc::O_WRONLY);
    let (new, opened) = made.await.unwrap();
    fs.release(opened.fh).await;
    busy_once(&bench, NFS_PROGRAM::NFSPROC3_RENAME);
    let (of, who, at) = (Arc::clone(fs), cred.clone(), dir.ino);
    kill(async move { of.rename(&who, (at, b"new"), (at, b"file"), 0).await }).await;
    fs.forget(new.ino, 1);
    fs.forget(dir.ino, 1);
    let Ok(Found::Entry(dir)) = fs.lookup(cred, 1, b"dir").await else {
        panic!("it is there");
    };
    let flags = libc::O_RDWR | libc::O_EXCL;
    let Ok((_, opened)) = fs.create(cred, dir.ino, b"file", 0o644, flags).await else {
        return true;
    };
    let file = fs.file(opened.fh).unwrap();
    assert!(matches!(bench.write(&file, 0, b"made"), Quick::Done));
    fs.fsync(opened.fh).await.unwrap();
    tokio::time::sleep(Duration::from_secs(60)).await;
    bench.content(&file).is_some()
}

#[tokio::test(start_paused = true)]
async fn a_directory_whose_names_change_is_not_forgotten() {
    assert!(made_in_a_forgotten_directory().await);
    let _back = put_back(Mutant::ChangedDirsAreForgotten);
    assert!(!made_in_a_forgotten_directory().await);
}

/// Whether an open of a file that the kernel has forgotten, and looked up anew, ends before the call
/// of a killed program that takes the file away, and is worth nothing then.
async fn opened_in_vain(unlink: bool) -> bool {
    let bench = Bench::new(Habits::default()).await;
    let (fs, cred) = (&bench.fs, &bench.cred);
    let (entry, file, open) = bench.create(b"file", libc::O_WRONLY).await;
    fs.release(open).await;
    drop(file);
    let (_, _, open) = bench.create(b"new", libc::O_WRONLY).await;
    fs.release(open).await;
    let (of, who) = (Arc::clone(fs), cred.clone());
    if unlink {
        busy_once(&bench, NFS_PROGRAM::NFSPROC3_REMOVE);
        kill(async move { of.unlink(&who, 1, b"file").await }).await;
    } else {
        busy_once(&bench, NFS_PROGRAM::NFSPROC3_RENAME);
        kill(async move { of.rename(&who, (1, b"new"), (1, b"file"), 0).await }).await;
    }
    fs.forget(entry.ino, 1);
    let Ok(Found::Entry(again)) = fs.lookup(cred, 1, b"file").await else {
        return false;
    };
    let opened = fs.open(cred, again.ino, libc::O_RDWR).await.unwrap();
    tokio::time::sleep(Duration::from_secs(60)).await;
    let file = fs.file(opened.fh).unwrap();
    fs.read(&file, 0, 16).await.is_err()
}

#[tokio::test(start_paused = true)]
async fn what_a_killed_program_takes_away_is_not_opened_meanwhile() {
    for unlink in [true, false] {
        assert!(!opened_in_vain(unlink).await);
        let _back = put_back(Mutant::LooksPassKilledChanges);
        assert!(opened_in_vain(unlink).await);
    }
}

/// How long an unlink takes in one directory beside a rename in another one that the server lets wait,
/// and an ESTALE anywhere.
async fn unlink_beside_a_slow_rename() -> Duration {
    let bench = Bench::new(Habits::default()).await;
    let (fs, cred) = (&bench.fs, &bench.cred);
    let one = fs.mkdir(cred, 1, b"one", 0o755).await.unwrap();
    let made = fs
        .create(cred, one.ino, b"new", 0o644, libc::O_WRONLY)
        .await;
    fs.release(made.unwrap().1.fh).await;
    let (_, _, open) = bench.create(b"file", libc::O_WRONLY).await;
    fs.release(open).await;
    for _ in 0..8 {
        busy_once(&bench, NFS_PROGRAM::NFSPROC3_RENAME);
    }
    let rename = fs.rename(cred, (one.ino, b"new"), (one.ino, b"old"), 0);
    let rest = async {
        tokio::time::sleep(Duration::from_millis(10)).await;
        let stale = fs.too_late(Err::<(), _>(Errno(libc::ESTALE)));
        let unlink = async {
            tokio::time::sleep(Duration::from_millis(10)).await;
            let began = tokio::time::Instant::now();
            fs.unlink(cred, 1, b"file").await.unwrap();
            began.elapsed()
        };
        tokio::join!(stale, unlink).1
    };
    let (renamed, took) = tokio::join!(rename, rest);
    renamed.unwrap();
    took
}

#[tokio::test(start_paused = true)]
async fn a_slow_rename_and_a_late_look_hold_no_other_unlink_up() {
    // Of the simulated time, in which nothing but the server takes any.
    assert!(unlink_beside_a_slow_rename().await < Duration::from_millis(100));
}

/// Whether a listing tells as known a name that was renamed between two of its answers.
async fn lists_an_old_name_as_known() -> bool {
    let bench = Bench::new(Habits::default()).await;
    let (fs, cred) = (&bench.fs, &bench.cred);
    for name in [&b"a"[..], b"log"] {
        let (_, _, open) = bench.create(name, libc::O_WRONLY).await;
        fs.release(open).await;
    }
    let dir = crate::fuse::dir::OpenDir::new(fs.inodes.get(1).unwrap());
    let mut last = 0;
    let first = |item: &crate::fuse::dir::Item, _| {
        let before = item.name != b"log"[..];
        last = if before { item.cookie } else { last };
        before
    };
    fs.list(cred, &dir, 0, first).await.unwrap();
    fs.rename(cred, (1, b"log"), (1, b"log.1"), 0)
        .await
        .unwrap();
    let mut known = false;
    let second = |item: &crate::fuse::dir::Item, asked| {
        known |= item.name == b"log"[..] && !dir.is_bare(item, asked);
        true
    };
    fs.list(cred, &dir, last, second).await.unwrap();
    known
}

#[tokio::test(start_paused = true)]
async fn a_listing_does_not_bring_old_names_back() {
    assert!(!lists_an_old_name_as_known().await);
    let _back = put_back(Mutant::ListingsOutliveChanges);
    assert!(lists_an_old_name_as_known().await);
}

/// A file is to be cut to nothing.
fn cut() -> Change {
    let mut change = Change::default();
    change.set.size = Some(0);
    change
}

/// The server lets the next SETATTR wait, while other calls pass it.
fn hold_a_cut(bench: &Bench) {
    let held = (NFS_PROGRAM::NFSPROC3_SETATTR, Duration::from_secs(30));
    bench.server.held.lock().unwrap().push_back(held);
}

/// What the server has in the end of a file that a killed program cuts, and to which another one writes
/// before the server gets to that.
async fn written_after_a_killed_cut(flags: i32) -> Option<Vec<u8>> {
    let bench = Bench::new(Habits::default()).await;
    let fs = &bench.fs;
    let (entry, file, open) = bench.create(b"file", flags).await;
    assert!(matches!(bench.write(&file, 0, b"older"), Quick::Done));
    fs.fsync(open).await.unwrap();
    hold_a_cut(&bench);
    let (of, who) = (Arc::clone(fs), bench.cred.clone());
    kill(async move { of.setattr(&who, entry.ino, cut()).await.map(|_| ()) }).await;
    fs.write(&file, to(&file, 0), b"new").await.unwrap();
    fs.fsync(open).await.unwrap();
    tokio::time::sleep(Duration::from_secs(60)).await;
    bench.content(&file)
}

#[tokio::test(start_paused = true)]
async fn a_killed_cut_takes_nothing_that_is_written_later() {
    for flags in [libc::O_WRONLY, libc::O_WRONLY | libc::O_APPEND] {
        let new = Some(b"new".to_vec());
        assert_eq!(written_after_a_killed_cut(flags).await, new);
        let _back = put_back(Mutant::KilledCutsComeLater);
        let lost = Some(Vec::new());
        assert_eq!(written_after_a_killed_cut(flags).await, lost);
    }
}

/// The same of a file that another host has made, where the cut belongs to an open that was to make it.
async fn written_after_a_killed_create() -> Option<Vec<u8>> {
    let bench = Bench::new(Habits::default()).await;
    let (fs, cred) = (&bench.fs, &bench.cred);
    bench.made_elsewhere(b"file");
    hold_a_cut(&bench);
    let (of, who) = (Arc::clone(fs), cred.clone());
    let flags = libc::O_WRONLY | libc::O_TRUNC;
    kill(async move {
        let made = of.create(&who, 1, b"file", 0o644, flags);
        made.await.map(|_| ())
    })
    .await;
    let Ok(Found::Entry(entry)) = fs.lookup(cred, 1, b"file").await else {
        panic!("it is there");
    };
    let opened = fs.open(cred, entry.ino, libc::O_WRONLY).await.unwrap();
    let file = fs.file(opened.fh).unwrap();
    fs.write(&file, to(&file, 0), b"new").await.unwrap();
    fs.fsync(opened.fh).await.unwrap();
    tokio::time::sleep(Duration::from_secs(60)).await;
    bench.content(&file)
}

#[tokio::test(start_paused = true)]
async fn a_killed_open_cuts_nothing_that_is_written_later() {
    let new = Some(b"new".to_vec());
    assert_eq!(written_after_a_killed_create().await, new);
    let _back = put_back(Mutant::KilledCutsComeLater);
    assert_eq!(written_after_a_killed_create().await, Some(Vec::new()));
}

/// How many files are known when a program was killed in an open that was to make a file which another
/// host had made.
async fn known_after_a_killed_create() -> usize {
    let bench = Bench::new(Habits::default()).await;
    bench.made_elsewhere(b"file");
    let held = (NFS_PROGRAM::NFSPROC3_ACCESS, Duration::from_secs(30));
    bench.server.held.lock().unwrap().push_back(held);
    let (fs, cred) = (Arc::clone(&bench.fs), bench.cred.clone());
    kill(async move {
        let made = fs.create(&cred, 1, b"file", 0o644, libc::O_WRONLY);
        made.await.map(|_| ())
    })
    .await;
    bench.fs.inodes.len()
}

#[tokio::test(start_paused = true)]
async fn the_kernel_is_owed_no_file_that_it_was_not_told_of() {
    assert_eq!(known_after_a_killed_create().await, 1, "the root");
}
