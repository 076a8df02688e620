//! What each procedure does to the disk, from its arguments to its results, with `nfs3_types` alone.

use nfs3_types::nfs3::*;
use nfs3_types::xdr_codec::{List, Opaque, Pack, Unpack};

use super::disk::{Disk, Id};

#[expect(clippy::too_many_lines, reason = "one arm for each procedure")]
pub(crate) fn carry_out(disk: &mut Disk, procedure: u32, mut input: &[u8], out: &mut Vec<u8>) {
    let input = &mut input;
    match NFS_PROGRAM::try_from(procedure).unwrap() {
        NFS_PROGRAM::NFSPROC3_NULL => {}
        NFS_PROGRAM::NFSPROC3_GETATTR => {
            let id = id(&take::<GETATTR3args>(input).object);
            let attr = disk.attr(id).ok_or(nfsstat3::NFS3ERR_STALE);
            put(
                out,
                attr.map(|obj_attributes| GETATTR3resok { obj_attributes }),
                || nfs3_types::xdr_codec::Void,
            );
        }
        NFS_PROGRAM::NFSPROC3_SETATTR => {
            let args = take::<SETATTR3args>(input);
            let id = id(&args.object);
            let before = disk.wcc(id);
            let done = disk.set(id, &args.new_attributes);
            let wcc = || wcc(disk, id, before);
            put(out, done.map(|()| SETATTR3resok { obj_wcc: wcc() }), || {
                SETATTR3resfail { obj_wcc: wcc() }
            });
        }
        NFS_PROGRAM::NFSPROC3_LOOKUP => {
            let what = take::<LOOKUP3args<'_>>(input).what;
            let dir = id(&what.dir);
            let found = disk.lookup(dir, what.name.as_ref());
            let found = found.map(|id| LOOKUP3resok {
                object: handle(id),
                obj_attributes: post(disk, id),
                dir_attributes: post(disk, dir),
            });
            put(out, found, || LOOKUP3resfail {
                dir_attributes: post(disk, dir),
            });
        }
        NFS_PROGRAM::NFSPROC3_READLINK => {
            let id = id(&take::<READLINK3args>(input).symlink);
            let target = disk.readlink(id).map(|target| READLINK3resok {
                symlink_attributes: post(disk, id),
                data: target.into(),
            });
            put(out, target, READLINK3resfail::default);
        }
        NFS_PROGRAM::NFSPROC3_READ => {
            let args = take::<READ3args>(input);
            let id = id(&args.file);
            let read = disk.read(id, args.offset, args.count);
            let read = read.map(|(data, eof)| READ3resok {
                file_attributes: post(disk, id),
                count: u32::try_from(data.len()).unwrap(),
                eof,
                data: Opaque::owned(data),
            });
            put(out, read, READ3resfail::default);
        }
        NFS_PROGRAM::NFSPROC3_WRITE => {
            let args = take::<WRITE3args<'_>>(input);
            let id = id(&args.file);
            assert_eq!(args.count as usize, args.data.len());
            let before = disk.wcc(id);
            let written = disk.write(id, args.offset, &args.data, args.stable);
            let written = written.map(|()| WRITE3resok {
                file_wcc: wcc(disk, id, before),
                count: args.count,
                committed: args.stable,
                verf: writeverf3(disk.verifier()),
            });
            put(out, written, WRITE3resfail::default);
        }
        NFS_PROGRAM::NFSPROC3_COMMIT => {
            let id = id(&take::<COMMIT3args>(input).file);
            let before = disk.wcc(id);
            let done = disk.commit(id).map(|()| COMMIT3resok {
                file_wcc: wcc(disk, id, before),
                verf: writeverf3(disk.verifier()),
            });
            put(out, done, || COMMIT3resfail {
                file_wcc: wcc_data::default(),
            });
        }
        NFS_PROGRAM::NFSPROC3_CREATE => {
            let args = take::<CREATE3args<'_>>(input);
            let dir = id(&args.where_.dir);
            let made = disk.create(dir, args.where_.name.as_ref(), &args.how);
            made_reply(disk, dir, made, out);
        }
        NFS_PROGRAM::NFSPROC3_MKDIR => {
            let args = take::<MKDIR3args<'_>>(input);
            let dir = id(&args.where_.dir);
            let made = disk.mkdir(dir, args.where_.name.as_ref());
            made_reply(disk, dir, made, out);
        }
        NFS_PROGRAM::NFSPROC3_SYMLINK => {
            let args = take::<SYMLINK3args<'_>>(input);
            let dir = id(&args.where_.dir);
            let target = args.symlink.symlink_data.as_ref();
            let made = disk.symlink(dir, args.where_.name.as_ref(), target);
            made_reply(disk, dir, made, out);
        }
        NFS_PROGRAM::NFSPROC3_REMOVE => {
            let what = take::<REMOVE3args<'_>>(input).object;
            let dir = id(&what.dir);
            let before = disk.wcc(dir);
            let done = disk.remove(dir, what.name.as_ref());
            let wcc = || wcc(disk, dir, before);
            put(out, done.map(|()| REMOVE3resok { dir_wcc: wcc() }), || {
                REMOVE3resfail { dir_wcc: wcc() }
            });
        }
        NFS_PROGRAM::NFSPROC3_RMDIR => {
            let what = take::<RMDIR3args<'_>>(input).object;
            let dir = id(&what.dir);
            let before = disk.wcc(dir);
            let done = disk.rmdir(dir, what.name.as_ref());
            let wcc = || wcc(disk, dir, before);
            put(out, done.map(|()| RMDIR3resok { dir_wcc: wcc() }), || {
                RMDIR3resfail { dir_wcc: wcc() }
            });
        }
        NFS_PROGRAM::NFSPROC3_RENAME => {
            let args = take::<RENAME3args<'_, '_>>(input);
            let (from, to) = (id(&args.from.dir), id(&args.to.dir));
            let (old, new) = (disk.wcc(from), disk.wcc(to));
            let done = disk.rename((from, args.from.name.as_ref()), (to, args.to.name.as_ref()));
            let done = done.map(|()| RENAME3resok {
                fromdir_wcc: wcc(disk, from, old),
                todir_wcc: wcc(disk, to, new),
            });
            put(out, done, RENAME3resfail::default);
        }
        NFS_PROGRAM::NFSPROC3_LINK => {
            let args = take::<LINK3args<'_>>(input);
            let (file, dir) = (id(&args.file), id(&args.link.dir));
            let done = disk.link(file, dir, args.link.name.as_ref());
            let done = done.map(|()| LINK3resok {
                file_attributes: post(disk, file),
                linkdir_wcc: wcc(disk, dir, None),
            });
            put(out, done, || LINK3resfail {
                file_attributes: post(disk, file),
                linkdir_wcc: wcc_data::default(),
            });
        }
        NFS_PROGRAM::NFSPROC3_READDIRPLUS => {
            let args = take::<READDIRPLUS3args>(input);
            let dir = id(&args.dir);
            let names = disk.names(dir);
            let listed = names.map(|names| {
                let rest = names.into_iter().filter(|(_, _, at)| *at > args.cookie);
                let mut entries: Vec<_> = rest
                    .map(|(name, id, cookie)| entryplus3 {
                        fileid: id,
                        name: name.into(),
                        cookie,
                        name_attributes: post(disk, id),
                        name_handle: if disk.mute {
                            Nfs3Option::None
                        } else {
                            Nfs3Option::Some(handle(id))
                        },
                    })
                    .collect();
                let eof = entries.len() <= 3;
                entries.truncate(3);
                READDIRPLUS3resok {
                    dir_attributes: post(disk, dir),
                    cookieverf: cookieverf3([7; 8]),
                    reply: dirlistplus3 {
                        entries: List(entries),
                        eof,
                    },
                }
            });
            put(out, listed, READDIRPLUS3resfail::default);
        }
        NFS_PROGRAM::NFSPROC3_ACCESS => {
            let args = take::<ACCESS3args>(input);
            let id = id(&args.object);
            let there = disk.attr(id).ok_or(nfsstat3::NFS3ERR_STALE);
            let granted = there.map(|_| ACCESS3resok {
                obj_attributes: post(disk, id),
                access: args.access,
            });
            put(out, granted, ACCESS3resfail::default);
        }
        NFS_PROGRAM::NFSPROC3_FSINFO => {
            let sizes = disk.sizes;
            let info = FSINFO3resok {
                obj_attributes: Nfs3Option::None,
                rtmax: sizes,
                rtpref: sizes,
                rtmult: 1,
                wtmax: sizes,
                wtpref: sizes,
                wtmult: 1,
                dtpref: sizes,
                maxfilesize: 1 << 40,
                time_delta: nfstime3 {
                    seconds: 1,
                    nseconds: 0,
                },
                properties: 0x1b,
            };
            put(out, Ok(info), FSINFO3resfail::default);
        }
        other => panic!("the simulation has no {other}"),
    }
}

pub(crate) fn take<T: Unpack>(input: &mut &[u8]) -> T {
    let (value, _) = T::unpack(input).expect("the client sends what nfs3_types reads");
    value
}

fn put<T: Pack, E: Pack>(out: &mut Vec<u8>, done: Result<T, nfsstat3>, fail: impl Fn() -> E) {
    let result = match done {
        Ok(ok) => Nfs3Result::Ok(ok),
        Err(status) => Nfs3Result::Err((status, fail())),
    };
    result.pack(out).unwrap();
}

fn made_reply(disk: &Disk, dir: Id, made: Result<Id, nfsstat3>, out: &mut Vec<u8>) {
    let made = made.map(|id| CREATE3resok {
        obj: Nfs3Option::Some(handle(id)),
        obj_attributes: post(disk, id),
        dir_wcc: wcc(disk, dir, None),
    });
    put(out, made, CREATE3resfail::default);
}

pub(crate) fn id(handle: &nfs_fh3) -> Id {
    let bytes = handle.data.as_ref().try_into();
    Id::from_be_bytes(bytes.expect("the client uses handles of this server only"))
}

pub(crate) fn handle(id: Id) -> nfs_fh3 {
    nfs_fh3 {
        data: Opaque::owned(id.to_be_bytes().to_vec()),
    }
}

fn post(disk: &Disk, id: Id) -> post_op_attr {
    let told = disk.attr(id).filter(|_| !disk.mute);
    told.map_or(Nfs3Option::None, Nfs3Option::Some)
}

fn wcc(disk: &Disk, id: Id, before: Option<wcc_attr>) -> wcc_data {
    let before = before.filter(|_| !disk.mute);
    wcc_data {
        before: before.map_or(Nfs3Option::None, Nfs3Option::Some),
        after: post(disk, id),
    }
}
