//! For tests: what RFC 1813 allows a server to do, and few do: to read and write less than it is
//! asked for, to keep nothing on disk before a COMMIT, to hide its verifier in the attributes.

use std::sync::Arc;

use nfs3_types::nfs3::{
    ACCESS3args, ACCESS3resok, COMMIT3resok, CREATE3args, CREATE3resok, FSINFO3resok, GETATTR3args,
    GETATTR3resok, NFS_PROGRAM as Proc, Nfs3Option, READ3args, READ3resok, SETATTR3args,
    SETATTR3resok, WRITE3args, WRITE3resok, createhow3, fattr3, ftype3, nfs_fh3, nfsstat3,
    nfstime3, stable_how, wcc_data, writeverf3,
};
use nfs3_types::xdr_codec::{Opaque, Unpack};

use super::fs::OpenFile;
use super::inode::ROOT;
use super::scripted::{Answers, PackAll, World, attributes, ok, refuse};
use super::write::WriteTo;
use nfs::rpc::Cred;

/// The number of the one file there is.
const FILE: u64 = 7;
/// The most in one READ and in one WRITE, in bytes.
const MOST_READ: u32 = 1000;
const MOST_WRITTEN: u32 = 700;

/// One file, and the calls that came.
#[derive(Debug, Default)]
struct Server {
    data: Vec<u8>,
    on_disk: Vec<u8>,
    mode: u32,
    calls: Vec<Proc>,
}

impl Server {
    fn file(&self) -> fattr3 {
        fattr3 {
            mode: self.mode,
            size: self.data.len() as u64,
            ..attributes(FILE, ftype3::NF3REG)
        }
    }

    fn wcc(&self) -> wcc_data {
        wcc_data {
            after: Nfs3Option::Some(self.file()),
            ..wcc_data::default()
        }
    }

    fn count(&self, procedure: Proc) -> usize {
        self.calls.iter().filter(|call| **call == procedure).count()
    }

    /// At most half of what is wanted, and no more of it than there is.
    fn read(&self, args: &READ3args) -> READ3resok<'static> {
        assert!(args.count <= MOST_READ);
        let from = self.data.len().min(usize::try_from(args.offset).unwrap());
        let to = self.data.len().min(from + args.count.div_ceil(2) as usize);
        READ3resok {
            file_attributes: Nfs3Option::None,
            count: u32::try_from(to - from).unwrap(),
            eof: to == self.data.len(),
            data: Opaque::owned(self.data[from..to].to_vec()),
        }
    }

    /// At most half of what is sent, and into memory.
    fn write(&mut self, args: &WRITE3args<'_>) -> WRITE3resok {
        assert!(args.count <= MOST_WRITTEN);
        let count = args.count.div_ceil(2);
        let from = usize::try_from(args.offset).unwrap();
        let to = from + count as usize;
        self.data.resize(self.data.len().max(to), 0);
        self.data[from..to].copy_from_slice(&args.data[..count as usize]);
        WRITE3resok {
            file_wcc: self.wcc(),
            count,
            committed: stable_how::UNSTABLE,
            verf: writeverf3([3; 8]),
        }
    }

    /// An exclusive one leaves its verifier in the mode and in the times.
    fn create(&mut self, args: &CREATE3args<'_>) -> CREATE3resok {
        self.mode = match &args.how {
            createhow3::EXCLUSIVE(verifier) => u32::from(verifier.0[0]) | 0o4000,
            createhow3::UNCHECKED(set) | createhow3::GUARDED(set) => mode(&set.mode),
        };
        let handle = Opaque::owned(FILE.to_be_bytes().to_vec());
        CREATE3resok {
            obj: Nfs3Option::Some(nfs_fh3 { data: handle }),
            obj_attributes: Nfs3Option::Some(self.file()),
            dir_wcc: wcc_data::default(),
        }
    }
}

fn mode(set: &Nfs3Option<u32>) -> u32 {
    match set {
        Nfs3Option::Some(mode) => *mode,
        Nfs3Option::None => 0,
    }
}

fn take<T: Unpack>(mut input: &[u8]) -> T {
    T::unpack(&mut input).unwrap().0
}

impl Answers for Server {
    fn answer(&mut self, procedure: Proc, input: &[u8], out: &mut Vec<u8>) {
        self.calls.push(procedure);
        match procedure {
            Proc::NFSPROC3_GETATTR => {
                let root = take::<GETATTR3args>(input).object.data.as_ref() == ROOT.to_be_bytes();
                let obj_attributes = match root {
                    true => attributes(ROOT, ftype3::NF3DIR),
                    false => self.file(),
                };
                ok(out).pack_all(&GETATTR3resok { obj_attributes });
            }
            Proc::NFSPROC3_FSINFO => ok(out).pack_all(&information()),
            Proc::NFSPROC3_ACCESS => ok(out).pack_all(&ACCESS3resok {
                obj_attributes: Nfs3Option::None,
                access: take::<ACCESS3args>(input).access,
            }),
            Proc::NFSPROC3_CREATE => ok(out).pack_all(&self.create(&take(input))),
            Proc::NFSPROC3_SETATTR => {
                self.mode = mode(&take::<SETATTR3args>(input).new_attributes.mode);
                let obj_wcc = self.wcc();
                ok(out).pack_all(&SETATTR3resok { obj_wcc });
            }
            Proc::NFSPROC3_READ => ok(out).pack_all(&self.read(&take(input))),
            Proc::NFSPROC3_WRITE => {
                let done = self.write(&take(input));
                ok(out).pack_all(&done);
            }
            Proc::NFSPROC3_COMMIT => {
                self.on_disk = self.data.clone();
                ok(out).pack_all(&COMMIT3resok {
                    file_wcc: self.wcc(),
                    verf: writeverf3([3; 8]),
                });
            }
            _ => refuse(out, nfsstat3::NFS3ERR_NOTSUPP),
        }
    }
}

fn information() -> FSINFO3resok {
    FSINFO3resok {
        obj_attributes: Nfs3Option::None,
        rtmax: MOST_READ,
        rtpref: MOST_READ,
        rtmult: 1,
        wtmax: MOST_WRITTEN,
        wtpref: MOST_WRITTEN,
        wtmult: 1,
        dtpref: 4096,
        maxfilesize: 1 << 40,
        time_delta: nfstime3::default(),
        properties: 0,
    }
}

/// A file that is made and opened with these flags.
async fn open(world: &World<Server>, flags: i32) -> (u64, Arc<OpenFile>) {
    let cred = Cred::root();
    let made = world.fs.create(&cred, ROOT, b"file", 0o640, flags);
    let (entry, opened) = made.await.unwrap();
    assert_eq!(entry.attr.mode, 0o640, "{:?}", entry.attr);
    (opened.fh, world.fs.file(opened.fh).unwrap())
}

async fn write(world: &World<Server>, (fh, file): &(u64, Arc<OpenFile>), data: &[u8]) {
    let to = WriteTo {
        offset: 0,
        flags: file.flags,
        from_pages: false,
    };
    world.fs.write(file, to, data).await.unwrap();
    world.fs.fsync(*fh).await.unwrap();
}

//= test 1813-3.3.6-rtmax
//= test 1813-3.3.6-short
//= test 1813-3.3.7-wtmax
//= test 1813-3.3.7-short
//= test 1813-3.3.19-fsinfo
#[tokio::test(start_paused = true)]
async fn short_answers_are_gone_on_from() {
    let world = World::new(Server::default()).await;
    assert_eq!(world.server.lock().unwrap().count(Proc::NFSPROC3_FSINFO), 1);
    let data: Vec<u8> = (0..5000u32).map(|n| n.to_be_bytes()[3] ^ 5).collect();
    let file = open(&world, libc::O_RDWR).await;
    write(&world, &file, &data).await;
    assert!(world.server.lock().unwrap().data == data, "all is written");
    for (offset, size) in [(0, 5000u32), (4000, 5000), (1, 1000), (4999, 1)] {
        let read = world.fs.read(&file.1, u64::from(offset), size).await;
        let (from, to) = (offset as usize, (offset + size) as usize);
        let expected = &data[from..data.len().min(to)];
        assert!(read.unwrap() == expected, "{size} bytes at {offset}");
    }
}

//= test 1813-3.3.7-committed
//= test 1813-3.3.21-dirty
#[tokio::test(start_paused = true)]
async fn what_is_not_on_disk_is_not_durable_whatever_was_asked_for() {
    let world = World::new(Server::default()).await;
    let file = open(&world, libc::O_RDWR).await;
    // One byte goes out in one call, which asks for FILE_SYNC.
    for data in [&b"x"[..], &[7; 3000]] {
        write(&world, &file, data).await;
        assert_eq!(world.server.lock().unwrap().on_disk, data);
    }
}

//= test 1813-3.3.8-setattr
//= test 1813-3.3.8-attributes
#[tokio::test(start_paused = true)]
async fn an_exclusive_creation_gives_the_file_its_attributes() {
    let world = World::new(Server::default()).await;
    open(&world, libc::O_RDWR | libc::O_EXCL).await;
    let server = world.server.lock().unwrap();
    assert_eq!(server.mode, 0o640);
    let made = [Proc::NFSPROC3_CREATE, Proc::NFSPROC3_SETATTR];
    assert_eq!(server.calls[server.calls.len() - 2..], made);
}
