//! Each operation as its NFS calls.

use nfs3_types::nfs3::{
    CREATE3args, CREATE3resfail, CREATE3resok, FSSTAT3args, FSSTAT3resfail, FSSTAT3resok,
    MKDIR3args, MKDIR3resfail, MKDIR3resok, NFS_PROGRAM, Nfs3Option, READ3args, READ3resfail,
    READ3resok, REMOVE3args, REMOVE3resfail, REMOVE3resok, RENAME3args, RENAME3resfail,
    RENAME3resok, RMDIR3args, RMDIR3resfail, RMDIR3resok, SETATTR3args, SETATTR3resfail,
    SETATTR3resok, WRITE3args, WRITE3resfail, WRITE3resok, createhow3, createverf3, fattr3,
    nfs_fh3, nfsstat3, sattr3, set_atime, set_mtime, stable_how,
};
use nfs3_types::xdr_codec::{Opaque, Pack, Unpack};
use rustix::io::Errno;

use super::session::{Effect, Fault, Session, checked, entry};
use super::{AdminErrorKind, Attr, DirEntry, Kind, Made, Outcome, SharePath, Space, present};
use crate::admin::{FILE_MODE, MAX_ENTRIES, temporary_name};

impl Session<'_> {
    pub(in crate::admin) async fn attr(&mut self, path: &SharePath) -> Outcome<Option<Attr>> {
        Ok(present(self.object(path).await)?.map(|(_, attr)| attr))
    }

    pub(in crate::admin) async fn mkdir(&mut self, path: &SharePath, mode: u32) -> Outcome<Made> {
        if path.is_root() {
            return Ok(Made::Exists);
        }
        let mode = mode & 0o7777;
        let dir = self.dir(&path.parent()).await?;
        let args = MKDIR3args {
            where_: entry(&dir, path.name().as_bytes()),
            attributes: sattr3 {
                mode: Nfs3Option::Some(mode),
                ..sattr3::default()
            },
        };
        let mkdir = NFS_PROGRAM::NFSPROC3_MKDIR;
        let made: MKDIR3resok = match self
            .call::<_, _, MKDIR3resfail>(mkdir, &args, Effect::Once)
            .await
        {
            Err(Fault::Status(nfsstat3::NFS3ERR_EXIST)) => return Ok(Made::Exists),
            made => made?,
        };
        let (handle, attr) = match made.obj {
            Nfs3Option::Some(handle) => {
                let handle = checked(handle)?;
                let attr = self.attr_or_ask(made.obj_attributes, &handle).await?;
                (handle, attr)
            }
            Nfs3Option::None => self.lookup(&dir, path.name().as_bytes()).await?,
        };
        self.v3.keep_handle(path, &handle);
        if mode & !attr.mode == 0 {
            return Ok(Made::New(attr));
        }
        // mkdir(2) on the server drops setuid and setgid.
        let all = sattr3 {
            mode: Nfs3Option::Some(attr.mode | mode),
            ..sattr3::default()
        };
        Ok(Made::New(self.setattr(&handle, all).await?))
    }

    pub(in crate::admin) async fn set_owner(
        &mut self,
        path: &SharePath,
        uid: u32,
        gid: u32,
        mode: u32,
    ) -> Outcome<Attr> {
        let (handle, mut attr) = self.object(path).await?;
        match attr.kind {
            Kind::Dir | Kind::File => {}
            Kind::Symlink => return Err(AdminErrorKind::Symlink),
            Kind::Other => return Err(Errno::INVAL.into()),
        }
        if (attr.uid, attr.gid) != (uid, gid) {
            let owner = sattr3 {
                uid: Nfs3Option::Some(uid),
                gid: Nfs3Option::Some(gid),
                ..sattr3::default()
            };
            attr = self.setattr(&handle, owner).await?;
        }
        if attr.mode != mode & 0o7777 {
            let mode = sattr3 {
                mode: Nfs3Option::Some(mode & 0o7777),
                ..sattr3::default()
            };
            attr = self.setattr(&handle, mode).await?;
        }
        Ok(attr)
    }

    pub(in crate::admin) async fn create_new(
        &mut self,
        path: &SharePath,
        contents: &[u8],
        verifier: u64,
    ) -> Outcome<Made> {
        if path.is_root() {
            return Ok(Made::Exists);
        }
        let dir = self.dir(&path.parent()).await?;
        let name = path.name().as_bytes();
        let Some(file) = self.create(&dir, name, verifier).await? else {
            return Ok(Made::Exists);
        };
        match self.fill(&file, contents).await {
            Ok(attr) => Ok(Made::New(attr)),
            Err(error) => {
                // It is ours, and without its contents it is of no use to anybody.
                let _ = self.unlink(&dir, name).await;
                Err(error)
            }
        }
    }

    pub(in crate::admin) async fn draft(
        &mut self,
        path: &SharePath,
        contents: &[u8],
    ) -> Outcome<()> {
        let dir = self.dir(&path.parent()).await?;
        let file = self.create_alone(&dir, path.name().as_bytes()).await?;
        self.write_all(&file, contents).await?;
        Ok(())
    }

    pub(in crate::admin) async fn write(
        &mut self,
        path: &SharePath,
        contents: &[u8],
    ) -> Outcome<Attr> {
        if path.is_root() {
            return Err(AdminErrorKind::Exists);
        }
        let dir = self.dir(&path.parent()).await?;
        let temporary = temporary_name()?;
        let name = temporary.as_bytes();
        let file = self.create_alone(&dir, name).await?;
        let written = match self.put_contents(&file, contents).await {
            Ok(attr) => {
                self.put_in_place(&dir, name, path.name().as_bytes(), attr)
                    .await
            }
            Err(error) => Err(error),
        };
        if written.is_err() {
            let _ = self.unlink(&dir, name).await;
        }
        written
    }

    async fn put_in_place(
        &mut self,
        dir: &nfs_fh3,
        temporary: &[u8],
        name: &[u8],
        attr: Attr,
    ) -> Outcome<Attr> {
        match self.rename_entry(dir, temporary, dir, name).await {
            // The file's number tells whether it is the one in place.
            Err(AdminErrorKind::Unknown) => match self.lookup(dir, name).await {
                Ok((_, there)) if there.fileid == attr.fileid => Ok(attr),
                _ => Err(AdminErrorKind::Unknown),
            },
            renamed => renamed.map(|_| attr),
        }
    }

    pub(in crate::admin) async fn read(
        &mut self,
        path: &SharePath,
        limit: usize,
    ) -> Outcome<Option<Vec<u8>>> {
        let file = match self.v3.handle_of(path) {
            Some(file) => file,
            None => {
                let Some((file, attr)) = present(self.object(path).await)? else {
                    return Ok(None);
                };
                match attr.kind {
                    Kind::File => {}
                    Kind::Symlink => return Err(AdminErrorKind::Symlink),
                    Kind::Dir => return Err(Errno::ISDIR.into()),
                    Kind::Other => return Err(Errno::INVAL.into()),
                }
                file
            }
        };
        let mut contents = Vec::new();
        loop {
            let room = u32::try_from(limit - contents.len()).unwrap_or(u32::MAX);
            let args = READ3args {
                file: file.clone(),
                offset: contents.len() as u64,
                // One byte more than allowed tells whether there is more.
                count: room.saturating_add(1).min(self.route.read),
            };
            let read = NFS_PROGRAM::NFSPROC3_READ;
            let got: READ3resok<'_> = self
                .call::<_, _, READ3resfail>(read, &args, Effect::Repeatable)
                .await?;
            //= 1813-3.3.6-short: “If the server returns less than the count requested and eof set
            //= to FALSE, the client should issue another READ to get the remaining data.”
            contents.extend_from_slice(&got.data);
            if contents.len() > limit {
                return Err(AdminErrorKind::TooLarge(limit));
            }
            if got.eof {
                return Ok(Some(contents));
            }
            if got.data.is_empty() {
                return Err(AdminErrorKind::Protocol(
                    "READ: no data before the end".to_owned(),
                ));
            }
        }
    }

    pub(in crate::admin) async fn rename(
        &mut self,
        from: &SharePath,
        to: &SharePath,
    ) -> Outcome<()> {
        if from.is_root() || to.is_root() {
            return Err(AdminErrorKind::Busy);
        }
        let from_dir = self.dir(&from.parent()).await?;
        let to_dir = self.dir(&to.parent()).await?;
        self.v3.forget(from);
        self.v3.forget(to);
        let (old, new) = (from.name().as_bytes(), to.name().as_bytes());
        self.rename_entry(&from_dir, old, &to_dir, new).await?;
        Ok(())
    }

    pub(in crate::admin) async fn rename_within(
        &mut self,
        path: &SharePath,
        from: &str,
        to: &str,
    ) -> Outcome<Attr> {
        let dir = self.dir(path).await?;
        let (old, new) = (from.as_bytes(), to.as_bytes());
        let after = self.rename_entry(&dir, old, &dir, new).await?;
        self.attr_or_ask(after, &dir).await
    }

    pub(in crate::admin) async fn remove_file(&mut self, path: &SharePath) -> Outcome<bool> {
        if path.is_root() {
            return Err(AdminErrorKind::Busy);
        }
        let Some(dir) = present(self.dir(&path.parent()).await)? else {
            return Ok(false);
        };
        let name = path.name().as_bytes();
        // Some servers let root REMOVE a directory, so look first (RFC 1813 section 3.3.12).
        match present(self.lookup(&dir, name).await)? {
            None => Ok(false),
            Some((_, attr)) if attr.kind == Kind::Dir => Err(Errno::ISDIR.into()),
            Some(_) => self.unlink(&dir, name).await,
        }
    }

    pub(in crate::admin) async fn unlink_file(&mut self, path: &SharePath) -> Outcome<bool> {
        if path.is_root() {
            return Err(AdminErrorKind::Busy);
        }
        let Some(dir) = present(self.dir(&path.parent()).await)? else {
            return Ok(false);
        };
        self.unlink(&dir, path.name().as_bytes()).await
    }

    pub(in crate::admin) async fn remove_dir(&mut self, path: &SharePath) -> Outcome<bool> {
        if path.is_root() {
            return Err(AdminErrorKind::Busy);
        }
        let Some(dir) = present(self.dir(&path.parent()).await)? else {
            return Ok(false);
        };
        self.v3.forget(path);
        self.rmdir(&dir, path.name().as_bytes()).await
    }

    pub(in crate::admin) async fn list(
        &mut self,
        path: &SharePath,
    ) -> Outcome<Option<Vec<DirEntry>>> {
        let Some(dir) = present(self.dir(path).await)? else {
            return Ok(None);
        };
        present(self.entries(&dir, MAX_ENTRIES, true).await)
    }

    pub(in crate::admin) async fn touch(&mut self, path: &SharePath) -> Outcome<Attr> {
        let (handle, _) = self.object(path).await?;
        let now = sattr3 {
            mtime: set_mtime::SET_TO_SERVER_TIME,
            ..sattr3::default()
        };
        self.setattr(&handle, now).await
    }

    pub(in crate::admin) async fn space(&mut self) -> Outcome<Space> {
        let args = FSSTAT3args::from(self.route.root.clone());
        let fsstat = NFS_PROGRAM::NFSPROC3_FSSTAT;
        let found: FSSTAT3resok = self
            .call::<_, _, FSSTAT3resfail>(fsstat, &args, Effect::Repeatable)
            .await?;
        Ok(Space {
            total: found.tbytes,
            free: found.fbytes,
            available: found.abytes,
        })
    }

    /// Makes a file that must not exist; None when it does. The verifier lets the server see
    /// that a repeated call is the same one (RFC 1813 section 3.3.8), so it may be repeated.
    async fn create(
        &mut self,
        dir: &nfs_fh3,
        name: &[u8],
        verifier: u64,
    ) -> Outcome<Option<nfs_fh3>> {
        let exclusive = createhow3::EXCLUSIVE(createverf3(verifier.to_be_bytes()));
        let made = match self
            .create_call(dir, name, exclusive, Effect::Repeatable)
            .await
        {
            // A server without EXCLUSIVE: GUARDED is as atomic, but not repeatable.
            Err(Fault::Status(nfsstat3::NFS3ERR_NOTSUPP)) => {
                let guarded = createhow3::GUARDED(sattr3::default());
                self.create_call(dir, name, guarded, Effect::Once).await
            }
            made => made,
        };
        match made {
            Err(Fault::Status(nfsstat3::NFS3ERR_EXIST)) => Ok(None),
            Err(error) => Err(error.into()),
            Ok(Nfs3Option::Some(handle)) => checked(handle).map(Some),
            Ok(Nfs3Option::None) => Ok(Some(self.lookup(dir, name).await?.0)),
        }
    }

    /// Makes a file under a name that nobody else uses, so the call may be repeated, and needs no
    /// verifier that would have to be taken out of the attributes again.
    async fn create_alone(&mut self, dir: &nfs_fh3, name: &[u8]) -> Outcome<nfs_fh3> {
        let how = createhow3::UNCHECKED(sattr3 {
            mode: Nfs3Option::Some(FILE_MODE),
            ..sattr3::default()
        });
        match self.create_call(dir, name, how, Effect::Repeatable).await? {
            Nfs3Option::Some(handle) => checked(handle),
            Nfs3Option::None => Ok(self.lookup(dir, name).await?.0),
        }
    }

    async fn create_call(
        &mut self,
        dir: &nfs_fh3,
        name: &[u8],
        how: createhow3,
        effect: Effect,
    ) -> Result<Nfs3Option<nfs_fh3>, Fault> {
        let args = CREATE3args {
            where_: entry(dir, name),
            how,
        };
        let create = NFS_PROGRAM::NFSPROC3_CREATE;
        let made: CREATE3resok = self
            .call::<_, _, CREATE3resfail>(create, &args, effect)
            .await?;
        Ok(made.obj)
    }

    /// Gives a new file its contents, mode and times. An exclusive CREATE left its verifier in
    /// the attributes, so they are always set.
    async fn fill(&mut self, file: &nfs_fh3, contents: &[u8]) -> Outcome<Attr> {
        self.write_all(file, contents).await?;
        let attributes = sattr3 {
            mode: Nfs3Option::Some(FILE_MODE),
            atime: set_atime::SET_TO_SERVER_TIME,
            mtime: set_mtime::SET_TO_SERVER_TIME,
            ..sattr3::default()
        };
        //= 1813-3.3.8-setattr: “Once the client has performed a successful exclusive create, it
        //= must issue a SETATTR to set the correct file attributes.”
        self.setattr(file, attributes).await
    }

    /// Gives a new file its contents.
    async fn put_contents(&mut self, file: &nfs_fh3, contents: &[u8]) -> Outcome<Attr> {
        let after = self.write_all(file, contents).await?;
        self.attr_or_ask(after, file).await
    }

    /// Writes from the beginning, onto stable storage; the attributes afterwards, if the server
    /// tells.
    async fn write_all(&mut self, file: &nfs_fh3, contents: &[u8]) -> Outcome<Nfs3Option<fattr3>> {
        let (mut written, mut after) = (0, Nfs3Option::None);
        while written < contents.len() {
            //= 1813-3.3.7-wtmax: “The size of data must be less than or equal to the value of the
            //= wtmax field”
            let most = (contents.len() - written).min(self.route.write as usize);
            let part = &contents[written..written + most];
            let args = WRITE3args {
                file: file.clone(),
                offset: written as u64,
                count: u32::try_from(part.len()).unwrap_or(u32::MAX),
                stable: stable_how::FILE_SYNC,
                data: Opaque::borrowed(part),
            };
            let write = NFS_PROGRAM::NFSPROC3_WRITE;
            let done: WRITE3resok = self
                .call::<_, _, WRITE3resfail>(write, &args, Effect::Repeatable)
                .await?;
            if done.count == 0 || done.count as usize > part.len() {
                return Err(AdminErrorKind::Protocol(format!(
                    "WRITE: {} bytes done",
                    done.count
                )));
            }
            //= 1813-3.3.7-committed: “If stable was FILE_SYNC, then committed must also be
            //= FILE_SYNC: anything else constitutes a protocol violation.”
            if done.committed != stable_how::FILE_SYNC {
                return Err(AdminErrorKind::Protocol(
                    "WRITE: not on stable storage".to_owned(),
                ));
            }
            //= 1813-3.3.7-short: “If the server writes less than count bytes, the client should
            //= issue another WRITE to write the remaining data.”
            written += done.count as usize;
            after = done.file_wcc.after;
        }
        Ok(after)
    }

    async fn setattr(&mut self, handle: &nfs_fh3, new_attributes: sattr3) -> Outcome<Attr> {
        let args = SETATTR3args {
            object: handle.clone(),
            new_attributes,
            guard: Nfs3Option::None,
        };
        let setattr = NFS_PROGRAM::NFSPROC3_SETATTR;
        let done: SETATTR3resok = self
            .call::<_, _, SETATTR3resfail>(setattr, &args, Effect::Repeatable)
            .await?;
        self.attr_or_ask(done.obj_wcc.after, handle).await
    }

    /// The attributes of the target's directory afterwards, if the server tells.
    async fn rename_entry(
        &mut self,
        from_dir: &nfs_fh3,
        from: &[u8],
        to_dir: &nfs_fh3,
        to: &[u8],
    ) -> Outcome<Nfs3Option<fattr3>> {
        let args = RENAME3args {
            from: entry(from_dir, from),
            to: entry(to_dir, to),
        };
        let rename = NFS_PROGRAM::NFSPROC3_RENAME;
        match self
            .call::<_, RENAME3resok, RENAME3resfail>(rename, &args, Effect::Once)
            .await
        {
            Ok(done) => Ok(done.todir_wcc.after),
            // Both directories were found before, so these speak of the target alone.
            Err(Fault::Status(
                nfsstat3::NFS3ERR_EXIST
                | nfsstat3::NFS3ERR_NOTEMPTY
                | nfsstat3::NFS3ERR_ISDIR
                | nfsstat3::NFS3ERR_NOTDIR,
            )) => Err(AdminErrorKind::Exists),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) async fn unlink(&mut self, dir: &nfs_fh3, name: &[u8]) -> Outcome<bool> {
        let args = REMOVE3args {
            object: entry(dir, name),
        };
        self.remove::<_, REMOVE3resok, REMOVE3resfail>(NFS_PROGRAM::NFSPROC3_REMOVE, &args)
            .await
    }

    pub(super) async fn rmdir(&mut self, dir: &nfs_fh3, name: &[u8]) -> Outcome<bool> {
        let args = RMDIR3args {
            object: entry(dir, name),
        };
        let rmdir = NFS_PROGRAM::NFSPROC3_RMDIR;
        match self
            .remove::<_, RMDIR3resok, RMDIR3resfail>(rmdir, &args)
            .await
        {
            // POSIX lets rmdir(2) say so of a directory that is not empty.
            Err(AdminErrorKind::Exists) => Err(AdminErrorKind::NotEmpty),
            removed => removed,
        }
    }

    async fn remove<C, T, E>(&mut self, procedure: NFS_PROGRAM, args: &C) -> Outcome<bool>
    where
        C: Pack + Send + Sync,
        T: Unpack,
        E: Unpack,
    {
        let removed = self.call::<C, T, E>(procedure, args, Effect::Once).await;
        Ok(present(removed.map_err(AdminErrorKind::from))?.is_some())
    }
}
