//! An NFSv3 server in memory: the procedures that directory operations use, from the bytes of their
//! arguments to those of their results, and what each of them touches on the [`Disk`].

use std::collections::BTreeMap;

use nfs3_types::nfs3::*;
use nfs3_types::xdr_codec::{List, Opaque, Pack, Unpack, Void};

use super::disk::{Disk, Id, Kind, ROOT, Status, hash_of};

fn is_temporary(name: &str) -> bool {
    name.starts_with(".nfsvol-tmp-")
}

/// A part of the disk.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Key {
    Name(Id, String),
    /// All names in a directory.
    Names(Id),
    Attr(Id),
    Data(Id),
}

/// What a call sees, and what it changes. Calls of which none changes what the other touches may
/// be swapped.
#[derive(Debug, Default)]
pub(super) struct Touched {
    pub(super) seen: Vec<Key>,
    pub(super) changed: Vec<Key>,
}

impl Touched {
    fn sees(&mut self, key: Key) {
        self.seen.push(key);
    }

    fn changes(&mut self, key: Key) {
        self.changed.push(key);
    }

    /// A name in a directory begins or ends, or gets another object; `gone` is the one it had.
    fn entry(&mut self, disk: &Disk, dir: Id, name: &str, gone: Option<Id>) {
        self.changes(Key::Name(dir, name.to_owned()));
        // Nobody looks at the temporary files of others.
        if dir != disk.hosts || !is_temporary(name) {
            self.changes(Key::Names(dir));
        }
        if !disk.is_quiet(dir) {
            self.changes(Key::Attr(dir));
        }
        if let Some(gone) = gone {
            self.changes(Key::Attr(gone));
            self.changes(Key::Data(gone));
            self.changes(Key::Names(gone));
        }
    }
}

/// A call of a host.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Call {
    pub(super) host: usize,
    pub(super) procedure: u32,
    pub(super) args: Vec<u8>,
    /// A LOOKUP of which only the handle counts.
    pub(super) walks: bool,
}

fn take<T: Unpack>(args: &[u8]) -> T {
    T::unpack(&mut &*args).unwrap().0
}

fn put<T: Pack, E: Pack>(done: Status<T>, fail: E) -> Vec<u8> {
    let result = match done {
        Ok(ok) => Nfs3Result::Ok(ok),
        Err(status) => Nfs3Result::Err((status, fail)),
    };
    let mut out = Vec::new();
    result.pack(&mut out).unwrap();
    out
}

fn id(handle: &nfs_fh3) -> Id {
    Id::from_be_bytes(handle.data.as_ref().try_into().unwrap())
}

fn handle(id: Id) -> nfs_fh3 {
    nfs_fh3 {
        data: Opaque::owned(id.to_be_bytes().to_vec()),
    }
}

pub(super) fn root() -> nfs_fh3 {
    handle(ROOT)
}

/// The directory and the name that a call is about.
fn entry(what: &diropargs3<'_>) -> (Id, String) {
    let name = String::from_utf8(what.name.as_ref().to_vec()).unwrap();
    (id(&what.dir), name)
}

impl Call {
    fn program(&self) -> NFS_PROGRAM {
        NFS_PROGRAM::try_from(self.procedure).unwrap()
    }

    /// The object, or the directory and the name in it; of a RENAME the source.
    fn target(&self) -> (Id, Option<String>) {
        use NFS_PROGRAM as P;
        let args = &self.args;
        let named = |what: &diropargs3<'_>| {
            let (dir, name) = entry(what);
            (dir, Some(name))
        };
        match self.program() {
            P::NFSPROC3_GETATTR => (id(&take::<GETATTR3args>(args).object), None),
            P::NFSPROC3_SETATTR => (id(&take::<SETATTR3args>(args).object), None),
            P::NFSPROC3_READ => (id(&take::<READ3args>(args).file), None),
            P::NFSPROC3_WRITE => (id(&take::<WRITE3args<'_>>(args).file), None),
            P::NFSPROC3_READDIRPLUS => (id(&take::<READDIRPLUS3args>(args).dir), None),
            P::NFSPROC3_LOOKUP => named(&take::<LOOKUP3args<'_>>(args).what),
            P::NFSPROC3_CREATE => named(&take::<CREATE3args<'_>>(args).where_),
            P::NFSPROC3_MKDIR => named(&take::<MKDIR3args<'_>>(args).where_),
            P::NFSPROC3_REMOVE => named(&take::<REMOVE3args<'_>>(args).object),
            P::NFSPROC3_RMDIR => named(&take::<RMDIR3args<'_>>(args).object),
            P::NFSPROC3_RENAME => named(&take::<RENAME3args<'_, '_>>(args).from),
            other => panic!("the server has no {other}"),
        }
    }

    /// What the call sees, and what it changes.
    pub(super) fn touches(&self, disk: &Disk) -> Touched {
        use NFS_PROGRAM as P;
        let (at, name) = self.target();
        let name = name.unwrap_or_default();
        let mut touched = Touched::default();
        let found = disk.lookup(at, &name).ok();
        match self.program() {
            P::NFSPROC3_GETATTR => touched.sees(Key::Attr(at)),
            P::NFSPROC3_READ => touched.sees(Key::Data(at)),
            P::NFSPROC3_SETATTR => touched.changes(Key::Attr(at)),
            P::NFSPROC3_WRITE => {
                touched.changes(Key::Attr(at));
                touched.changes(Key::Data(at));
            }
            P::NFSPROC3_LOOKUP => {
                touched.sees(Key::Name(at, name));
                if let Some(found) = found.filter(|_| !self.walks) {
                    touched.sees(Key::Attr(found));
                }
            }
            P::NFSPROC3_READDIRPLUS => {
                touched.sees(Key::Names(at));
                let shown = self.shown(disk, at).unwrap_or_default();
                for (_, id) in shown.into_iter().filter(|_| disk.are_stamps_seen(at)) {
                    touched.sees(Key::Attr(id));
                }
            }
            P::NFSPROC3_RENAME => {
                let (to, new) = entry(&take::<RENAME3args<'_, '_>>(&self.args).to);
                let there = disk.lookup(to, &new).ok();
                // On a copy of the disk, to see whether it will be done.
                if let Err(status) = disk.clone().rename((at, &name), (to, &new)) {
                    touched.sees(Key::Name(at, name));
                    if status != nfsstat3::NFS3ERR_NOENT {
                        touched.sees(Key::Name(to, new));
                    }
                    if let Some(there) = there {
                        touched.sees(Key::Names(there));
                    }
                    return touched;
                }
                touched.entry(disk, at, &name, None);
                touched.entry(disk, to, &new, there.filter(|there| Some(*there) != found));
                if at == to {
                    touched.sees(Key::Attr(to));
                }
            }
            P::NFSPROC3_REMOVE | P::NFSPROC3_RMDIR => match found {
                None => touched.sees(Key::Name(at, name)),
                Some(found) if disk.entries(found).is_ok_and(|below| !below.is_empty()) => {
                    touched.sees(Key::Name(at, name));
                    touched.sees(Key::Names(found));
                }
                found => touched.entry(disk, at, &name, found),
            },
            // What is there already is not made.
            _ if found.is_some() => touched.sees(Key::Name(at, name)),
            _ => touched.entry(disk, at, &name, None),
        }
        touched
    }

    /// Whether the call changes nothing on the disk.
    pub(super) fn only_asks(&self) -> bool {
        use NFS_PROGRAM as P;
        matches!(
            self.program(),
            P::NFSPROC3_GETATTR | P::NFSPROC3_READ | P::NFSPROC3_READDIRPLUS | P::NFSPROC3_LOOKUP
        )
    }

    /// What a host learns from an answer, as a hash. Of what it walks through it takes the handle, of
    /// most listings the names and kinds.
    pub(super) fn told(&self, disk: &Disk, reply: &[u8]) -> u64 {
        use NFS_PROGRAM as P;
        let is_ok = reply.starts_with(&[0; 4]);
        match self.program() {
            // The status, and a handle with its length.
            P::NFSPROC3_LOOKUP if self.walks && is_ok => hash_of(&reply[..16]),
            P::NFSPROC3_READDIRPLUS if is_ok && !disk.are_stamps_seen(self.target().0) => {
                let shown = self.shown(disk, self.target().0).unwrap_or_default();
                let kinds = shown.iter().map(|(_, id)| disk.entries(*id).is_ok());
                hash_of((&shown, kinds.collect::<Vec<bool>>()))
            }
            _ => hash_of(reply),
        }
    }

    /// For people.
    pub(super) fn describe(&self, disk: &Disk) -> String {
        let (dir, name) = self.target();
        let path = |dir: Id, name: Option<String>| {
            let path = disk.path_of(dir);
            name.map_or_else(|| path.clone(), |name| format!("{path}/{name}"))
        };
        let to = match self.program() {
            NFS_PROGRAM::NFSPROC3_RENAME => {
                let (dir, name) = entry(&take::<RENAME3args<'_, '_>>(&self.args).to);
                format!(" to {}", path(dir, Some(name)))
            }
            _ => String::new(),
        };
        let program = format!("{:?}", self.program());
        let program = program.trim_start_matches("NFSPROC3_").to_owned();
        format!("{program} {}{to}", path(dir, name))
    }

    /// Does it; the bytes of the answer.
    pub(super) fn carry_out(&self, disk: &mut Disk) -> Vec<u8> {
        use NFS_PROGRAM as P;
        let args = &self.args;
        let (at, name) = self.target();
        let name = name.unwrap_or_default();
        match self.program() {
            P::NFSPROC3_GETATTR => {
                let attr = disk.attr(at).ok_or(nfsstat3::NFS3ERR_STALE);
                put(
                    attr.map(|obj_attributes| GETATTR3resok { obj_attributes }),
                    Void,
                )
            }
            P::NFSPROC3_SETATTR => {
                let set = disk.set(at, &take::<SETATTR3args>(args).new_attributes);
                let obj_wcc = after(disk, at);
                put(
                    set.map(|()| SETATTR3resok { obj_wcc }),
                    SETATTR3resfail::default(),
                )
            }
            P::NFSPROC3_LOOKUP => {
                let found = disk.lookup(at, &name).map(|id| LOOKUP3resok {
                    object: handle(id),
                    obj_attributes: disk.post(id),
                    dir_attributes: Nfs3Option::None,
                });
                put(found, LOOKUP3resfail::default())
            }
            P::NFSPROC3_READ => {
                let read = disk.get(at).and_then(|inode| match &inode.kind {
                    Kind::File(bytes) => Ok(READ3resok {
                        file_attributes: Nfs3Option::None,
                        count: u32::try_from(bytes.len()).unwrap(),
                        eof: true,
                        data: Opaque::owned(bytes.clone()),
                    }),
                    Kind::Dir(_) => Err(nfsstat3::NFS3ERR_ISDIR),
                });
                put(read, READ3resfail::default())
            }
            P::NFSPROC3_WRITE => {
                let args = take::<WRITE3args<'_>>(args);
                let offset = usize::try_from(args.offset).unwrap();
                let done = disk.write(at, offset, &args.data).map(|()| WRITE3resok {
                    file_wcc: after(disk, at),
                    count: args.count,
                    committed: args.stable,
                    verf: writeverf3::default(),
                });
                put(done, WRITE3resfail::default())
            }
            P::NFSPROC3_CREATE => {
                let how = take::<CREATE3args<'_>>(args).how;
                let made = match disk.make(self.host, at, &name, Kind::File(Vec::new()), 0o644) {
                    Err(nfsstat3::NFS3ERR_EXIST) if matches!(how, createhow3::UNCHECKED(_)) => {
                        disk.lookup(at, &name)
                    }
                    made => made,
                };
                made_reply(disk, made)
            }
            P::NFSPROC3_MKDIR => {
                let attributes = take::<MKDIR3args<'_>>(args).attributes;
                let mode = match attributes.mode {
                    Nfs3Option::Some(mode) => mode,
                    Nfs3Option::None => 0o755,
                };
                let made = disk.make(self.host, at, &name, Kind::Dir(BTreeMap::new()), mode);
                made_reply(disk, made)
            }
            P::NFSPROC3_REMOVE => {
                let dir_wcc = wcc_data::default;
                let done = disk.remove(at, &name, false);
                let done = done.map(|()| REMOVE3resok { dir_wcc: dir_wcc() });
                put(done, REMOVE3resfail { dir_wcc: dir_wcc() })
            }
            P::NFSPROC3_RMDIR => {
                let dir_wcc = wcc_data::default;
                let done = disk.remove(at, &name, true);
                let done = done.map(|()| RMDIR3resok { dir_wcc: dir_wcc() });
                put(done, RMDIR3resfail { dir_wcc: dir_wcc() })
            }
            P::NFSPROC3_RENAME => {
                let (to, new) = entry(&take::<RENAME3args<'_, '_>>(args).to);
                let done = disk.rename((at, &name), (to, &new));
                let done = done.map(|()| RENAME3resok {
                    fromdir_wcc: wcc_data::default(),
                    // Who moves something elsewhere does not look at it.
                    todir_wcc: if at == to {
                        after(disk, to)
                    } else {
                        wcc_data::default()
                    },
                });
                put(done, RENAME3resfail::default())
            }
            P::NFSPROC3_READDIRPLUS => put(self.listed(disk, at), READDIRPLUS3resfail::default()),
            other => panic!("the server has no {other}"),
        }
    }

    /// The entries that a host sees in a directory.
    fn shown(&self, disk: &Disk, dir: Id) -> Status<Vec<(String, Id)>> {
        let entries = disk.entries(dir)?.iter();
        let shown = entries.filter(|(name, _)| dir != disk.hosts || !is_temporary(name));
        Ok(shown.map(|(name, id)| (name.clone(), *id)).collect())
    }

    fn listed(&self, disk: &Disk, dir: Id) -> Status<READDIRPLUS3resok<'static>> {
        let entries = self.shown(disk, dir)?.into_iter();
        let entries = entries.enumerate().map(|(at, (name, id))| entryplus3 {
            fileid: id,
            name: name.into_bytes().into(),
            cookie: at as u64 + 1,
            name_attributes: disk.post(id),
            name_handle: Nfs3Option::None,
        });
        Ok(READDIRPLUS3resok {
            dir_attributes: Nfs3Option::None,
            cookieverf: cookieverf3::default(),
            reply: dirlistplus3 {
                entries: List(entries.collect()),
                eof: true,
            },
        })
    }
}

fn after(disk: &Disk, id: Id) -> wcc_data {
    wcc_data {
        before: Nfs3Option::None,
        after: disk.post(id),
    }
}

fn made_reply(disk: &Disk, made: Status<Id>) -> Vec<u8> {
    let made = made.map(|id| CREATE3resok {
        obj: Nfs3Option::Some(handle(id)),
        obj_attributes: disk.post(id),
        dir_wcc: wcc_data::default(),
    });
    put(made, CREATE3resfail::default())
}
