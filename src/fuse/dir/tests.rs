//! Listings of a server that has one directory and habits of its own.

use std::collections::BTreeSet;

use nfs3_types::nfs3::{
    FSINFO3resok, GETATTR3resok, NFS_PROGRAM as Proc, Nfs3Option, READDIR3args, READDIR3resok,
    READDIRPLUS3args, READDIRPLUS3resok, cookieverf3, dirlist3, dirlistplus3, entry3, entryplus3,
    filename3, ftype3, nfs_fh3, nfsstat3, nfstime3,
};
use nfs3_types::xdr_codec::{List, Opaque, Unpack};

use super::*;
use crate::fuse::inode::ROOT;
use crate::fuse::scripted::{Answers, PackAll, World, attributes, ok, refuse};
use crate::mutant::put_back;

/// The file id of the directory's `.`; the entries follow.
const FILE_ID: u64 = 1 << 63 | 100;
/// Entries in one answer.
const PAGE: usize = 7;

/// What a server does otherwise than most.
#[derive(Debug, Clone, Copy, Default)]
struct Habits {
    /// READDIRPLUS is NOTSUPP.
    names_only: bool,
    /// READDIRPLUS tells names and file ids of entries whose number this divides.
    bare: Option<usize>,
    /// A cookie is good until the directory changes.
    strict: bool,
    /// It changes before each call.
    busy: bool,
    /// Behind so many entries it answers with none, and that more follow.
    stuck: Option<u64>,
}

#[derive(Debug, Default)]
struct Disk {
    names: Vec<Vec<u8>>,
    habits: Habits,
    changes: u64,
    /// Calls by procedure.
    calls: Vec<Proc>,
}

impl Disk {
    fn with(count: usize, habits: Habits) -> Self {
        let names = (0..count).map(|n| format!("name{n:04}").into_bytes());
        Self {
            names: names.collect(),
            habits,
            ..Self::default()
        }
    }

    fn make(&mut self, name: &str) {
        self.names.insert(0, name.as_bytes().to_vec());
        self.changes += 1;
    }

    fn remove(&mut self, name: &[u8]) {
        self.names.retain(|known| known != name);
        self.changes += 1;
    }

    fn verifier(&self) -> cookieverf3 {
        cookieverf3((1 + self.changes).to_be_bytes())
    }

    /// The entries behind a cookie: `.`, then the names.
    fn page(
        &mut self,
        cookie: u64,
        verifier: cookieverf3,
    ) -> std::result::Result<(Vec<usize>, bool), nfsstat3> {
        if self.habits.busy {
            self.changes += 1;
        }
        if self.habits.strict && cookie != 0 && verifier != self.verifier() {
            return Err(nfsstat3::NFS3ERR_BAD_COOKIE);
        }
        if self.habits.stuck.is_some_and(|at| cookie >= at) {
            return Ok((Vec::new(), false));
        }
        let from = usize::try_from(cookie).unwrap();
        let all = self.names.len() + 1;
        let to = all.min(from + PAGE);
        Ok(((from..to).collect(), to == all))
    }

    fn name(&self, n: usize) -> entry3<'static> {
        let name = n.checked_sub(1).map_or(&b"."[..], |n| &self.names[n]);
        entry3 {
            fileid: FILE_ID + n as u64,
            name: filename3(Opaque::owned(name.to_vec())),
            cookie: n as u64 + 1,
        }
    }

    fn plus(&self, n: usize) -> entryplus3<'static> {
        let entry3 {
            fileid,
            name,
            cookie,
        } = self.name(n);
        let bare = self.habits.bare.is_some_and(|by| n.is_multiple_of(by));
        let (name_attributes, name_handle) = if bare {
            (Nfs3Option::None, Nfs3Option::None)
        } else {
            let handle = Opaque::owned(fileid.to_be_bytes().to_vec());
            (
                Nfs3Option::Some(attributes(fileid, ftype3::NF3REG)),
                Nfs3Option::Some(nfs_fh3 { data: handle }),
            )
        };
        entryplus3 {
            fileid,
            name,
            cookie,
            name_attributes,
            name_handle,
        }
    }
}

impl Answers for Disk {
    fn answer(&mut self, procedure: Proc, mut input: &[u8], out: &mut Vec<u8>) {
        self.calls.push(procedure);
        match procedure {
            Proc::NFSPROC3_GETATTR => {
                ok(out).pack_all(&GETATTR3resok {
                    obj_attributes: attributes(ROOT, ftype3::NF3DIR),
                });
            }
            Proc::NFSPROC3_FSINFO => ok(out).pack_all(&information()),
            Proc::NFSPROC3_READDIRPLUS if self.habits.names_only => {
                refuse(out, nfsstat3::NFS3ERR_NOTSUPP);
            }
            Proc::NFSPROC3_READDIRPLUS => {
                let (args, _) = READDIRPLUS3args::unpack(&mut input).unwrap();
                match self.page(args.cookie, args.cookieverf) {
                    Ok((page, eof)) => ok(out).pack_all(&READDIRPLUS3resok {
                        dir_attributes: Nfs3Option::None,
                        cookieverf: self.verifier(),
                        reply: dirlistplus3 {
                            entries: List(page.iter().map(|n| self.plus(*n)).collect()),
                            eof,
                        },
                    }),
                    Err(status) => refuse(out, status),
                }
            }
            Proc::NFSPROC3_READDIR => {
                let (args, _) = READDIR3args::unpack(&mut input).unwrap();
                match self.page(args.cookie, args.cookieverf) {
                    Ok((page, eof)) => ok(out).pack_all(&READDIR3resok {
                        dir_attributes: Nfs3Option::None,
                        cookieverf: self.verifier(),
                        reply: dirlist3 {
                            entries: List(page.iter().map(|n| self.name(*n)).collect()),
                            eof,
                        },
                    }),
                    Err(status) => refuse(out, status),
                }
            }
            // None of the others is needed to list a directory.
            _ => refuse(out, nfsstat3::NFS3ERR_NOTSUPP),
        }
    }
}

fn information() -> FSINFO3resok {
    FSINFO3resok {
        obj_attributes: Nfs3Option::None,
        rtmax: 4096,
        rtpref: 4096,
        rtmult: 1,
        wtmax: 4096,
        wtpref: 4096,
        wtmult: 1,
        dtpref: 4096,
        maxfilesize: 1 << 40,
        time_delta: nfstime3::default(),
        properties: 0,
    }
}

impl World<Disk> {
    fn open(&self) -> OpenDir {
        OpenDir::new(self.fs.inode(ROOT).unwrap())
    }

    /// Up to `most` entries behind `offset`, as one request of the kernel gets them.
    async fn some(&self, dir: &OpenDir, offset: u64, most: usize) -> Result<Vec<Item>> {
        let mut items = Vec::new();
        let cred = Cred::root();
        let take = |item: &Item, _| {
            if items.len() == most {
                return false;
            }
            items.push(item.clone());
            true
        };
        self.fs.list(&cred, dir, offset, take).await?;
        Ok(items)
    }

    /// All of a directory, by requests for `most` entries, of which the program behind the kernel
    /// has room for `taken` each time.
    async fn all(&self, most: usize, taken: usize) -> Result<Vec<Item>> {
        let dir = self.open();
        let (mut all, mut offset) = (Vec::<Item>::new(), 0);
        loop {
            let mut some = self.some(&dir, offset, most).await?;
            some.truncate(taken);
            let Some(last) = some.last() else {
                return Ok(all);
            };
            offset = last.cookie;
            all.append(&mut some);
        }
    }

    fn count(&self, procedure: Proc) -> usize {
        let disk = self.server.lock().unwrap();
        let calls = disk.calls.iter();
        calls.filter(|call| **call == procedure).count()
    }
}

fn names(items: &[Item]) -> BTreeSet<Vec<u8>> {
    let names: BTreeSet<_> = items.iter().map(|item| item.name.to_vec()).collect();
    assert_eq!(names.len(), items.len(), "a name came twice");
    names
}

#[tokio::test]
async fn a_server_without_readdirplus_is_asked_by_readdir_from_then_on() {
    let habits = Habits {
        names_only: true,
        ..Habits::default()
    };
    let world = World::new(Disk::with(40, habits)).await;
    for _ in 0..3 {
        let all = world.all(4, 4).await.unwrap();
        assert_eq!(names(&all).len(), 41);
        assert!(all[1..].iter().all(|item| item.kind().is_none()));
    }
    assert_eq!(world.count(Proc::NFSPROC3_READDIRPLUS), 1);

    let _back = put_back(Mutant::ReaddirplusOnly);
    let world = World::new(Disk::with(40, habits)).await;
    assert_eq!(world.all(4, 4).await.unwrap_err(), Errno(libc::EOPNOTSUPP));
}

//= test 1813-3.3.17-bare
#[tokio::test]
async fn entries_that_the_server_tells_nothing_of_are_listed() {
    let habits = Habits {
        bare: Some(3),
        ..Habits::default()
    };
    let world = World::new(Disk::with(40, habits)).await;
    let all = world.all(100, 100).await.unwrap();
    assert_eq!(names(&all).len(), 41);
    for (n, item) in all.iter().enumerate() {
        assert_eq!(item.is_bare(), n != 0 && n % 3 == 0, "{item:?}");
        assert_eq!(item.ino, if n == 0 { ROOT } else { 100 + n as u64 });
    }
    // Nobody is asked about them.
    assert_eq!(world.count(Proc::NFSPROC3_LOOKUP), 0);
}

#[tokio::test]
async fn what_a_program_has_no_room_for_is_not_asked_for_again() {
    let world = World::new(Disk::with(40, Habits::default())).await;
    let all = world.all(5, 2).await.unwrap();
    assert_eq!(names(&all).len(), 41);
    assert_eq!(
        world.count(Proc::NFSPROC3_READDIRPLUS),
        41usize.div_ceil(PAGE)
    );
}

#[tokio::test]
async fn a_listing_goes_back_and_begins_again() {
    let world = World::new(Disk::with(40, Habits::default())).await;
    let dir = world.open();
    let first = world.some(&dir, 0, 3).await.unwrap();
    let later = world.some(&dir, 30, 100).await.unwrap();
    assert_eq!(later[0].name, "name0029");
    let back = world.some(&dir, first[1].cookie, 100).await.unwrap();
    assert_eq!(back[0].name, first[2].name);
    world.server.lock().unwrap().make("new");
    let again = world.some(&dir, 0, 3).await.unwrap();
    assert_eq!(again[1].name, "new");
}

const STRICT: Habits = Habits {
    names_only: false,
    bare: None,
    strict: true,
    busy: false,
    stuck: None,
};

/// Lists by requests for `most` entries while somebody makes a file after each; what was there
/// before is to be listed once.
async fn listed_while_others_make_files(world: &World<Disk>, most: usize) -> Result<usize> {
    let dir = world.open();
    let (mut all, mut offset) = (Vec::<Item>::new(), 0);
    loop {
        let some = world.some(&dir, offset, most).await?;
        let Some(last) = some.last() else { break };
        offset = last.cookie;
        all.extend(some);
        let name = format!("made{}", all.len());
        world.server.lock().unwrap().make(&name);
    }
    let listed = names(&all);
    Ok(listed
        .iter()
        .filter(|name| name.starts_with(b"name"))
        .count())
}

//= test 1813-3.3.16-cookie
#[tokio::test]
async fn a_lost_cookie_is_no_end() {
    for most in [3, PAGE, 100] {
        let world = World::new(Disk::with(60, STRICT)).await;
        let listed = listed_while_others_make_files(&world, most).await;
        assert_eq!(listed.unwrap(), 60);
    }
    let _back = put_back(Mutant::BadCookieEnds);
    let world = World::new(Disk::with(60, STRICT)).await;
    let listed = listed_while_others_make_files(&world, 3).await;
    assert_eq!(listed.unwrap_err(), Errno(libc::EIO));
}

#[tokio::test]
async fn everything_is_removed_where_that_loses_the_cookie() {
    let world = World::new(Disk::with(100, STRICT)).await;
    let dir = world.open();
    let mut offset = 0;
    loop {
        let some = world.some(&dir, offset, 5).await.unwrap();
        let Some(last) = some.last() else { break };
        offset = last.cookie;
        for item in some {
            world.server.lock().unwrap().remove(&item.name);
        }
    }
    assert!(world.server.lock().unwrap().names.is_empty());
}

#[tokio::test]
async fn a_cookie_that_is_lost_all_the_time_is_an_error() {
    let busy = Habits {
        busy: true,
        ..STRICT
    };
    let world = World::new(Disk::with(60, busy)).await;
    assert_eq!(world.all(5, 5).await.unwrap_err(), Errno(libc::EIO));
    let calls = world.count(Proc::NFSPROC3_READDIRPLUS);
    assert!(calls < 4 * BEGINNINGS as usize, "{calls}");

    // Nobody knows what was handed out before the place that a program goes to.
    let world = World::new(Disk::with(60, STRICT)).await;
    let dir = world.open();
    world.some(&dir, 0, 3).await.unwrap();
    world.server.lock().unwrap().make("new");
    let error = world.some(&dir, 30, 3).await.unwrap_err();
    assert_eq!(error, Errno(libc::EIO));
}

//= test 1813-3.3.16-end
#[tokio::test]
async fn an_answer_without_entries_is_not_the_end_unless_it_says_so() {
    let stuck = Habits {
        stuck: Some(20),
        ..Habits::default()
    };
    let world = World::new(Disk::with(40, stuck)).await;
    assert_eq!(world.all(5, 5).await.unwrap_err(), Errno(libc::EIO));

    let _back = put_back(Mutant::EmptyAnswersEnd);
    let world = World::new(Disk::with(40, stuck)).await;
    assert_eq!(names(&world.all(5, 5).await.unwrap()).len(), 3 * PAGE);
}

#[tokio::test]
async fn names_that_cannot_be_are_left_out() {
    let mut disk = Disk::with(40, Habits::default());
    let odd = [&b"a/b"[..], b"a\0b", b"", &[b'x'; 256]];
    // Some whole answers of them, and one in the end.
    for n in 0..3 * PAGE {
        disk.names.insert(10, odd[n % odd.len()].to_vec());
    }
    disk.names.push(odd[0].to_vec());
    disk.names.push(vec![b'y'; 255]);
    disk.names.push(odd[3].to_vec());
    let world = World::new(disk).await;
    for most in [3, PAGE, 100] {
        let all = world.all(most, most).await.unwrap();
        assert_eq!(names(&all).len(), 1 + 40 + 1);
    }
}

#[test]
fn cookies_in_circles_are_noticed() {
    for (lead, cycle) in [(0u64, 1u64), (3, 5), (100, 17)] {
        let mut watch = Watch::default();
        let noticed = (0..10_000u64)
            .map(|i| {
                if i < lead {
                    i
                } else {
                    lead + (i - lead) % cycle
                }
            })
            .position(|cookie| watch.repeats(cookie));
        assert!(
            noticed.is_some_and(|n| n < 1000),
            "{lead} {cycle} {noticed:?}"
        );
    }
}

#[test]
fn cookies_that_only_go_on_are_fine() {
    let mut watch = Watch::default();
    assert!((0..100_000).all(|cookie| !watch.repeats(cookie)));
}
