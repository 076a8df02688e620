//! The procedures of NFS version 3 (RFC 1813 section 3.3): arguments in, reply out.

use nfs3_types::nfs3::{
    ACCESS3res, ACCESS3resfail, ACCESS3resok, COMMIT3res, COMMIT3resfail, COMMIT3resok, CREATE3res,
    CREATE3resfail, CREATE3resok, FSF3_CANSETTIME, FSF3_HOMOGENEOUS, FSF3_LINK, FSF3_SYMLINK,
    FSINFO3res, FSINFO3resfail, FSINFO3resok, FSSTAT3res, FSSTAT3resfail, FSSTAT3resok,
    GETATTR3res, GETATTR3resok, LINK3res, LINK3resfail, LINK3resok, LOOKUP3res, LOOKUP3resfail,
    LOOKUP3resok, NFS_PROGRAM, PATHCONF3res, PATHCONF3resfail, PATHCONF3resok, READ3res,
    READ3resfail, READLINK3res, READLINK3resfail, READLINK3resok, REMOVE3res, REMOVE3resfail,
    REMOVE3resok, RENAME3res, RENAME3resfail, RENAME3resok, SETATTR3res, SETATTR3resfail,
    SETATTR3resok, WRITE3res, WRITE3resfail, WRITE3resok, createhow3, createverf3, entry3,
    entryplus3, filename3, nfspath3, nfsstat3, nfstime3, post_op_attr, post_op_fh3, pre_op_attr,
    sattrguard3, stable_how, wcc_attr, wcc_data, writeverf3,
};
use nfs3_types::xdr_codec::{Opaque, Pack, Void};

use super::export::{Entry, Export, Node};
use super::xdr::{Args, Caller, Garbage};

/// The most bytes of one READ or WRITE.
pub(super) const MAX_DATA: u32 = 1 << 20;
/// The most bytes of one listing; larger wishes are cut down to it.
const MAX_LISTING: u32 = 256 * 1024;
/// What follows the entries of a listing: the end of the list, and whether the directory ended.
const LISTING_END: usize = 4 + 4;
/// The most names of one file that are promised; ext4, the most frugal, allows 65,000.
const LINK_MAX: u32 = 65_000;

type Result<T> = std::result::Result<T, nfsstat3>;

/// Why a call gets no reply of its procedure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    NoSuchProcedure,
    Garbage,
}

impl From<Garbage> for Refusal {
    fn from(Garbage: Garbage) -> Self {
        Self::Garbage
    }
}

/// Packs a value; writing to memory cannot fail, and no value here exceeds 4 GiB.
pub(super) fn put(out: &mut Vec<u8>, value: &impl Pack) {
    let packed = value.pack(out);
    debug_assert!(packed.is_ok());
}

fn attributes(export: &Export, node: &Node) -> post_op_attr {
    export
        .attributes(node)
        .map_or(post_op_attr::None, post_op_attr::Some)
}

/// A file whose attributes before and after the call are part of the reply.
struct Watched<'a> {
    export: &'a Export,
    node: Result<Node>,
    before: pre_op_attr,
}

impl<'a> Watched<'a> {
    fn new(export: &'a Export, handle: &[u8]) -> Self {
        let node = export.node(handle);
        let before = node
            .as_ref()
            .map_err(|&error| error)
            .and_then(|node| export.attributes(node));
        Self {
            export,
            node,
            before: before.map_or(pre_op_attr::None, |attributes| {
                pre_op_attr::Some(wcc_attr {
                    size: attributes.size,
                    mtime: attributes.mtime,
                    ctime: attributes.ctime,
                })
            }),
        }
    }

    fn node(&self) -> Result<&Node> {
        self.node.as_ref().map_err(|&error| error)
    }

    fn wcc(&self) -> wcc_data {
        let after = self.node().map(|node| attributes(self.export, node));
        wcc_data {
            before: self.before,
            after: after.unwrap_or(post_op_attr::None),
        }
    }
}

/// Answers one call: appends the procedure's result to `out`.
///
/// # Errors
/// [`Refusal`] for an unknown procedure or undecodable arguments; nothing was done then.
pub(super) fn call(
    export: &Export,
    procedure: u32,
    mut args: Args<'_>,
    caller: &Caller,
    out: &mut Vec<u8>,
) -> std::result::Result<(), Refusal> {
    use NFS_PROGRAM as P;
    let procedure = P::try_from(procedure).map_err(|_| Refusal::NoSuchProcedure)?;
    let a = &mut args;
    match procedure {
        P::NFSPROC3_NULL => a.end()?,
        P::NFSPROC3_GETATTR => put(out, &getattr(export, a)?),
        P::NFSPROC3_SETATTR => put(out, &setattr(export, a, caller)?),
        P::NFSPROC3_LOOKUP => put(out, &lookup(export, a, caller)?),
        P::NFSPROC3_ACCESS => put(out, &access(export, a, caller)?),
        P::NFSPROC3_READLINK => put(out, &readlink(export, a)?),
        P::NFSPROC3_READ => read(export, a, caller, out)?,
        P::NFSPROC3_WRITE => put(out, &write(export, a, caller)?),
        P::NFSPROC3_CREATE => put(out, &create(export, a, caller)?),
        P::NFSPROC3_MKDIR => put(out, &mkdir(export, a, caller)?),
        P::NFSPROC3_SYMLINK => put(out, &symlink(export, a, caller)?),
        P::NFSPROC3_MKNOD => put(out, &mknod(export, a, caller)?),
        P::NFSPROC3_REMOVE => put(out, &remove(export, a, caller, false)?),
        P::NFSPROC3_RMDIR => put(out, &remove(export, a, caller, true)?),
        P::NFSPROC3_RENAME => put(out, &rename(export, a, caller)?),
        P::NFSPROC3_LINK => put(out, &link(export, a, caller)?),
        P::NFSPROC3_READDIR => readdir(export, a, caller, false, out)?,
        P::NFSPROC3_READDIRPLUS => readdir(export, a, caller, true, out)?,
        P::NFSPROC3_FSSTAT => put(out, &fsstat(export, a)?),
        P::NFSPROC3_FSINFO => put(out, &fsinfo(export, a)?),
        P::NFSPROC3_PATHCONF => put(out, &pathconf(export, a)?),
        P::NFSPROC3_COMMIT => put(out, &commit(export, a)?),
    }
    Ok(())
}

type Reply<T> = std::result::Result<T, Garbage>;

fn getattr(export: &Export, a: &mut Args<'_>) -> Reply<GETATTR3res> {
    let handle = a.handle()?;
    a.end()?;
    let found = export
        .node(handle)
        .and_then(|node| export.attributes(&node));
    Ok(match found {
        Ok(obj_attributes) => GETATTR3res::Ok(GETATTR3resok { obj_attributes }),
        Err(error) => GETATTR3res::Err((error, Void)),
    })
}

fn setattr(export: &Export, a: &mut Args<'_>, caller: &Caller) -> Reply<SETATTR3res> {
    let (handle, to, guard) = (a.handle()?, a.sattr()?, a.guard()?);
    a.end()?;
    let object = Watched::new(export, handle);
    let unchanged =
        |guard: &nfstime3| matches!(&object.before, pre_op_attr::Some(b) if b.ctime == *guard);
    let done = match &guard {
        sattrguard3::Some(guard) if object.node.is_ok() && !unchanged(guard) => {
            Err(nfsstat3::NFS3ERR_NOT_SYNC)
        }
        _ => object.node().and_then(|node| export.set(node, &to, caller)),
    };
    let obj_wcc = object.wcc();
    Ok(match done {
        Ok(()) => SETATTR3res::Ok(SETATTR3resok { obj_wcc }),
        Err(error) => SETATTR3res::Err((error, SETATTR3resfail { obj_wcc })),
    })
}

fn lookup(export: &Export, a: &mut Args<'_>, caller: &Caller) -> Reply<LOOKUP3res> {
    let (handle, name) = (a.handle()?, a.name()?);
    a.end()?;
    let dir = export.node(handle);
    let dir_attributes = dir
        .as_ref()
        .map_or(post_op_attr::None, |dir| attributes(export, dir));
    let found = dir.and_then(|dir| {
        let node = export.lookup(&dir, name, caller)?;
        Ok((export.handle(&node)?, attributes(export, &node)))
    });
    Ok(match found {
        Ok((object, obj_attributes)) => LOOKUP3res::Ok(LOOKUP3resok {
            object,
            obj_attributes,
            dir_attributes,
        }),
        Err(error) => LOOKUP3res::Err((error, LOOKUP3resfail { dir_attributes })),
    })
}

fn access(export: &Export, a: &mut Args<'_>, caller: &Caller) -> Reply<ACCESS3res> {
    let (handle, wanted) = (a.handle()?, a.u32()?);
    a.end()?;
    let granted = export.node(handle).and_then(|node| {
        let access = export.access(&node, wanted, caller)?;
        Ok(ACCESS3resok {
            obj_attributes: attributes(export, &node),
            access,
        })
    });
    Ok(match granted {
        Ok(ok) => ACCESS3res::Ok(ok),
        Err(error) => ACCESS3res::Err((error, ACCESS3resfail::default())),
    })
}

fn readlink(export: &Export, a: &mut Args<'_>) -> Reply<READLINK3res<'static>> {
    let handle = a.handle()?;
    a.end()?;
    let read = export.node(handle).and_then(|node| {
        let target = export.readlink(&node)?;
        Ok(READLINK3resok {
            symlink_attributes: attributes(export, &node),
            data: nfspath3(Opaque::owned(target)),
        })
    });
    Ok(match read {
        Ok(ok) => READLINK3res::Ok(ok),
        Err(error) => READLINK3res::Err((error, READLINK3resfail::default())),
    })
}

/// READ packs its own reply, so that the data goes from the file into it without a copy.
fn read(export: &Export, a: &mut Args<'_>, caller: &Caller, out: &mut Vec<u8>) -> Reply<()> {
    let (handle, offset, count) = (a.handle()?, a.u64()?, a.u32()?.min(MAX_DATA));
    a.end()?;
    let start = out.len();
    let done = export.node(handle).and_then(|node| {
        if offset
            .checked_add(count.into())
            .is_none_or(|end| i64::try_from(end).is_err())
        {
            return Err(nfsstat3::NFS3ERR_INVAL);
        }
        put(out, &nfsstat3::NFS3_OK);
        put(out, &attributes(export, &node));
        let lengths = out.len();
        // count, end of file, length of the data
        out.extend_from_slice(&[0; 12]);
        let data = out.len();
        out.resize(data + count as usize, 0);
        let (len, eof) = export.read(&node, offset, &mut out[data..], caller)?;
        out.truncate(data + len);
        out.resize(data + len.next_multiple_of(4), 0);
        // At most MAX_DATA.
        let len = u32::try_from(len).unwrap_or(MAX_DATA);
        out[lengths..lengths + 4].copy_from_slice(&len.to_be_bytes());
        out[lengths + 4..lengths + 8].copy_from_slice(&u32::from(eof).to_be_bytes());
        out[lengths + 8..lengths + 12].copy_from_slice(&len.to_be_bytes());
        Ok(())
    });
    if let Err(error) = done {
        out.truncate(start);
        put(out, &READ3res::Err((error, READ3resfail::default())));
    }
    Ok(())
}

fn write(export: &Export, a: &mut Args<'_>, caller: &Caller) -> Reply<WRITE3res> {
    let (handle, offset, count) = (a.handle()?, a.u64()?, a.u32()?);
    let stable = match a.u32()? {
        0 => stable_how::UNSTABLE,
        1 => stable_how::DATA_SYNC,
        2 => stable_how::FILE_SYNC,
        _ => return Err(Garbage),
    };
    let data = a.opaque(MAX_DATA as usize)?;
    a.end()?;
    // The count decides; data beyond it is ignored (RFC 1813 section 3.3.7).
    let data = data.get(..count as usize).ok_or(Garbage)?;
    let file = Watched::new(export, handle);
    // Taken before the write: if the verifier changes meanwhile, the client writes once more
    // than needed, instead of once less.
    let verifier = export.verifier();
    let done = file.node().and_then(|node| {
        if offset
            .checked_add(count.into())
            .is_none_or(|end| i64::try_from(end).is_err())
        {
            return Err(nfsstat3::NFS3ERR_FBIG);
        }
        export.write(node, offset, data, stable, caller)
    });
    let file_wcc = file.wcc();
    Ok(match done {
        Ok(()) => WRITE3res::Ok(WRITE3resok {
            file_wcc,
            count,
            committed: stable,
            verf: writeverf3(verifier),
        }),
        Err(error) => WRITE3res::Err((error, WRITE3resfail { file_wcc })),
    })
}

fn commit(export: &Export, a: &mut Args<'_>) -> Reply<COMMIT3res> {
    let (handle, _offset, _count) = (a.handle()?, a.u64()?, a.u32()?);
    a.end()?;
    let file = Watched::new(export, handle);
    let done = file.node().and_then(|node| export.commit(node));
    let file_wcc = file.wcc();
    Ok(match done {
        Ok(()) => COMMIT3res::Ok(COMMIT3resok {
            file_wcc,
            verf: writeverf3(export.verifier()),
        }),
        Err(error) => COMMIT3res::Err((error, COMMIT3resfail { file_wcc })),
    })
}

/// The reply of CREATE, MKDIR, SYMLINK and MKNOD, which RFC 1813 gives one layout.
fn made(dir: &Watched<'_>, made: Result<Node>) -> CREATE3res {
    let dir_wcc = dir.wcc();
    match made.and_then(|node| Ok((dir.export.handle(&node)?, attributes(dir.export, &node)))) {
        Ok((handle, obj_attributes)) => CREATE3res::Ok(CREATE3resok {
            obj: post_op_fh3::Some(handle),
            obj_attributes,
            dir_wcc,
        }),
        Err(error) => CREATE3res::Err((error, CREATE3resfail { dir_wcc })),
    }
}

fn create(export: &Export, a: &mut Args<'_>, caller: &Caller) -> Reply<CREATE3res> {
    let (handle, name) = (a.handle()?, a.name()?);
    let how = match a.u32()? {
        0 => createhow3::UNCHECKED(a.sattr()?),
        1 => createhow3::GUARDED(a.sattr()?),
        2 => createhow3::EXCLUSIVE(createverf3(a.verifier()?)),
        _ => return Err(Garbage),
    };
    a.end()?;
    let dir = Watched::new(export, handle);
    let node = dir
        .node()
        .and_then(|node| export.create(node, name, &how, caller));
    Ok(made(&dir, node))
}

fn mkdir(export: &Export, a: &mut Args<'_>, caller: &Caller) -> Reply<CREATE3res> {
    let (handle, name, set) = (a.handle()?, a.name()?, a.sattr()?);
    a.end()?;
    let dir = Watched::new(export, handle);
    let node = dir
        .node()
        .and_then(|node| export.mkdir(node, name, &set, caller));
    Ok(made(&dir, node))
}

fn symlink(export: &Export, a: &mut Args<'_>, caller: &Caller) -> Reply<CREATE3res> {
    let (handle, name, set, target) = (a.handle()?, a.name()?, a.sattr()?, a.name()?);
    a.end()?;
    let dir = Watched::new(export, handle);
    let node = dir
        .node()
        .and_then(|node| export.symlink(node, name, target, &set, caller));
    Ok(made(&dir, node))
}

fn mknod(export: &Export, a: &mut Args<'_>, caller: &Caller) -> Reply<CREATE3res> {
    let (handle, name, what) = (a.handle()?, a.name()?, a.mknod()?);
    a.end()?;
    let dir = Watched::new(export, handle);
    let node = dir
        .node()
        .and_then(|node| export.mknod(node, name, &what, caller));
    Ok(made(&dir, node))
}

/// REMOVE and RMDIR, which have one layout.
fn remove(
    export: &Export,
    a: &mut Args<'_>,
    caller: &Caller,
    directory: bool,
) -> Reply<REMOVE3res> {
    let (handle, name) = (a.handle()?, a.name()?);
    a.end()?;
    let dir = Watched::new(export, handle);
    let done = dir
        .node()
        .and_then(|node| export.remove(node, name, directory, caller));
    let dir_wcc = dir.wcc();
    Ok(match done {
        Ok(()) => REMOVE3res::Ok(REMOVE3resok { dir_wcc }),
        Err(error) => REMOVE3res::Err((error, REMOVE3resfail { dir_wcc })),
    })
}

fn rename(export: &Export, a: &mut Args<'_>, caller: &Caller) -> Reply<RENAME3res> {
    let (from, old, to, new) = (a.handle()?, a.name()?, a.handle()?, a.name()?);
    a.end()?;
    let (from, to) = (Watched::new(export, from), Watched::new(export, to));
    let done = from
        .node()
        .and_then(|f| export.rename((f, old), (to.node()?, new), caller));
    let (fromdir_wcc, todir_wcc) = (from.wcc(), to.wcc());
    Ok(match done {
        Ok(()) => RENAME3res::Ok(RENAME3resok {
            fromdir_wcc,
            todir_wcc,
        }),
        Err(error) => RENAME3res::Err((
            error,
            RENAME3resfail {
                fromdir_wcc,
                todir_wcc,
            },
        )),
    })
}

fn link(export: &Export, a: &mut Args<'_>, caller: &Caller) -> Reply<LINK3res> {
    let (file, dir, name) = (a.handle()?, a.handle()?, a.name()?);
    a.end()?;
    let (file, dir) = (export.node(file), Watched::new(export, dir));
    let done = file
        .as_ref()
        .map_err(|&error| error)
        .and_then(|file| export.link(file, dir.node()?, name, caller));
    let file_attributes = file.map_or(post_op_attr::None, |file| attributes(export, &file));
    let linkdir_wcc = dir.wcc();
    Ok(match done {
        Ok(()) => LINK3res::Ok(LINK3resok {
            file_attributes,
            linkdir_wcc,
        }),
        Err(error) => LINK3res::Err((
            error,
            LINK3resfail {
                file_attributes,
                linkdir_wcc,
            },
        )),
    })
}

/// READDIR, and READDIRPLUS with `plus`. Entries go into the reply as they are read.
fn readdir(
    export: &Export,
    a: &mut Args<'_>,
    caller: &Caller,
    plus: bool,
    out: &mut Vec<u8>,
) -> Reply<()> {
    let (handle, cookie, _verifier) = (a.handle()?, a.u64()?, a.verifier()?);
    // READDIRPLUS bounds the names (dircount) and the whole reply (maxcount) apart.
    let names = if plus {
        a.u32()?.min(MAX_LISTING) as usize
    } else {
        usize::MAX
    };
    let count = a.u32()?.min(MAX_LISTING) as usize;
    a.end()?;
    let start = out.len();
    let dir = export.node(handle);
    let dir_attributes = dir
        .as_ref()
        .map_or(post_op_attr::None, |dir| attributes(export, dir));
    let listed = dir.and_then(|dir| {
        put(out, &nfsstat3::NFS3_OK);
        put(out, &dir_attributes);
        // Cookies are always good, so their verifier never changes (RFC 1813 section 3.3.16).
        out.extend_from_slice(&[0; 8]);
        let room = start + count.saturating_sub(LISTING_END);
        let (mut any, mut named) = (false, 0);
        let ended = export.list(&dir, cookie, caller, |entry| {
            let before = out.len();
            put(out, &true);
            if plus {
                put(out, &entry_plus(export, &dir, entry, caller));
            } else {
                put(out, &bare(entry));
            }
            named += bare(entry).packed_size();
            let fits = out.len() <= room && named <= names;
            if fits {
                any = true;
            } else {
                out.truncate(before);
            }
            fits
        })?;
        if !any && !ended {
            return Err(nfsstat3::NFS3ERR_TOOSMALL);
        }
        put(out, &false);
        put(out, &ended);
        Ok(())
    });
    if let Err(error) = listed {
        out.truncate(start);
        put(out, &error);
        put(out, &dir_attributes);
    }
    Ok(())
}

fn bare<'a>(entry: &Entry<'a>) -> entry3<'a> {
    entry3 {
        fileid: entry.fileid,
        name: filename3(Opaque::borrowed(entry.name)),
        cookie: entry.cookie,
    }
}

/// The entry with attributes and handle, or without them where they cannot be had (the entry has
/// just gone, or is a mount point): the client then asks by name.
fn entry_plus<'a>(
    export: &Export,
    dir: &Node,
    entry: &Entry<'a>,
    caller: &Caller,
) -> entryplus3<'a> {
    let found = if entry.name == b".." {
        Err(nfsstat3::NFS3ERR_NOENT)
    } else {
        export.lookup(dir, entry.name, caller)
    };
    let (name_attributes, name_handle) = match found {
        Ok(node) => (
            attributes(export, &node),
            export
                .handle(&node)
                .map_or(post_op_fh3::None, post_op_fh3::Some),
        ),
        Err(_) => (post_op_attr::None, post_op_fh3::None),
    };
    entryplus3 {
        fileid: entry.fileid,
        name: filename3(Opaque::borrowed(entry.name)),
        cookie: entry.cookie,
        name_attributes,
        name_handle,
    }
}

fn fsstat(export: &Export, a: &mut Args<'_>) -> Reply<FSSTAT3res> {
    let handle = a.handle()?;
    a.end()?;
    let space = export.node(handle).and_then(|node| {
        let space = export.space(&node)?;
        Ok(FSSTAT3resok {
            obj_attributes: attributes(export, &node),
            tbytes: space.f_blocks.saturating_mul(space.f_frsize),
            fbytes: space.f_bfree.saturating_mul(space.f_frsize),
            abytes: space.f_bavail.saturating_mul(space.f_frsize),
            tfiles: space.f_files,
            ffiles: space.f_ffree,
            afiles: space.f_favail,
            invarsec: 0,
        })
    });
    Ok(match space {
        Ok(ok) => FSSTAT3res::Ok(ok),
        Err(error) => FSSTAT3res::Err((error, FSSTAT3resfail::default())),
    })
}

fn fsinfo(export: &Export, a: &mut Args<'_>) -> Reply<FSINFO3res> {
    let handle = a.handle()?;
    a.end()?;
    Ok(match export.node(handle) {
        Ok(node) => FSINFO3res::Ok(FSINFO3resok {
            obj_attributes: attributes(export, &node),
            rtmax: MAX_DATA,
            rtpref: MAX_DATA,
            rtmult: 4096,
            wtmax: MAX_DATA,
            wtpref: MAX_DATA,
            wtmult: 4096,
            dtpref: 64 * 1024,
            maxfilesize: i64::MAX.cast_unsigned(),
            time_delta: nfstime3 {
                seconds: 0,
                nseconds: 1,
            },
            properties: FSF3_LINK | FSF3_SYMLINK | FSF3_HOMOGENEOUS | FSF3_CANSETTIME,
        }),
        Err(error) => FSINFO3res::Err((error, FSINFO3resfail::default())),
    })
}

fn pathconf(export: &Export, a: &mut Args<'_>) -> Reply<PATHCONF3res> {
    let handle = a.handle()?;
    a.end()?;
    let limits = export.node(handle).and_then(|node| {
        let space = export.space(&node)?;
        Ok(PATHCONF3resok {
            obj_attributes: attributes(export, &node),
            linkmax: LINK_MAX,
            name_max: u32::try_from(space.f_namemax).unwrap_or(u32::MAX),
            no_trunc: true,
            chown_restricted: true,
            case_insensitive: false,
            case_preserving: true,
        })
    });
    Ok(match limits {
        Ok(ok) => PATHCONF3res::Ok(ok),
        Err(error) => PATHCONF3res::Err((error, PATHCONF3resfail::default())),
    })
}
