//! Reading directories, and removing trees by the handles that reading gives.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use nfs3_types::nfs3::{
    NFS_PROGRAM, Nfs3Option, READDIRPLUS3args, READDIRPLUS3resfail, READDIRPLUS3resok, cookieverf3,
    nfs_fh3, nfsstat3,
};

use super::session::{Effect, Fault, Session, attr_of};
use super::{AdminErrorKind, DirEntry, Kind, Outcome, SharePath, V3, present};
use crate::nfs::admin::tree::Tree;

/// How much of a directory is asked for at a time, in bytes: some 1,500 entries for a listing,
/// some 300 where no more are used.
const LIST_BYTES: u32 = 256 * 1024;
const PAGE_BYTES: u32 = 48 * 1024;
/// How often a listing begins anew because the directory changed under its cookie.
const LIST_ROUNDS: u32 = 3;

impl Session<'_> {
    /// Reads a directory: all of it up to `limit` entries, or with `whole` unset just so many.
    pub(super) async fn entries(
        &mut self,
        dir: &nfs_fh3,
        limit: usize,
        whole: bool,
    ) -> Outcome<Vec<DirEntry>> {
        let mut entries = Vec::new();
        let (mut cookie, mut cookieverf) = (0, cookieverf3::default());
        let mut rounds = 0;
        let bytes = if whole { LIST_BYTES } else { PAGE_BYTES };
        loop {
            let args = READDIRPLUS3args {
                dir: dir.clone(),
                cookie,
                cookieverf,
                dircount: bytes,
                maxcount: bytes,
            };
            let readdir = NFS_PROGRAM::NFSPROC3_READDIRPLUS;
            let page = self
                .call::<_, _, READDIRPLUS3resfail>(readdir, &args, Effect::Repeatable)
                .await;
            let page: READDIRPLUS3resok<'_> = match page {
                Err(Fault::Status(nfsstat3::NFS3ERR_BAD_COOKIE)) if rounds < LIST_ROUNDS => {
                    rounds += 1;
                    entries.clear();
                    (cookie, cookieverf) = (0, cookieverf3::default());
                    continue;
                }
                page => page?,
            };
            cookieverf = page.cookieverf;
            let before = cookie;
            for found in page.reply.entries.into_inner() {
                cookie = found.cookie;
                let name = found.name.0.into_owned();
                if name == b"." || name == b".." {
                    continue;
                }
                if name.is_empty() || name.contains(&b'/') || name.contains(&0) {
                    let text = format!("READDIRPLUS: the name {:?}", OsStr::from_bytes(&name));
                    return Err(AdminErrorKind::Protocol(text));
                }
                if entries.len() == limit {
                    return match whole {
                        true => Err(AdminErrorKind::TooLarge(limit)),
                        false => Ok(entries),
                    };
                }
                entries.push(DirEntry {
                    name: OsString::from_vec(name),
                    attr: match &found.name_attributes {
                        Nfs3Option::Some(attr) => Some(attr_of(attr)),
                        Nfs3Option::None => None,
                    },
                });
            }
            if page.reply.eof {
                return Ok(entries);
            }
            if cookie == before {
                return Err(AdminErrorKind::Protocol(
                    "READDIRPLUS: no way forward".to_owned(),
                ));
            }
        }
    }

    /// Up to `limit` entries with their kinds, also where the server leaves attributes out.
    async fn page(&mut self, dir: &nfs_fh3, limit: usize) -> Outcome<Vec<(OsString, Kind)>> {
        let entries = present(self.entries(dir, limit, false).await)?.unwrap_or_default();
        let mut page = Vec::with_capacity(entries.len());
        for DirEntry { name, attr } in entries {
            let attr = match attr {
                Some(attr) => Some(attr),
                None => present(self.lookup(dir, name.as_bytes()).await)?.map(|(_, attr)| attr),
            };
            if let Some(attr) = attr {
                page.push((name, attr.kind));
            }
        }
        Ok(page)
    }

    async fn enter(&mut self, dir: &nfs_fh3, name: &[u8]) -> Outcome<Option<nfs_fh3>> {
        let found = present(self.lookup(dir, name).await)?;
        Ok(found.and_then(|(handle, attr)| (attr.kind == Kind::Dir).then_some(handle)))
    }
}

/// A tree is removed by handles, so names that no path can hold, and directories that are
/// renamed meanwhile, are no obstacle. A stale handle is a directory that is gone.
impl Tree for V3 {
    type Dir = nfs_fh3;

    async fn parent(&self, path: &SharePath) -> Outcome<Option<nfs_fh3>> {
        self.forget(path);
        self.parent_handle(&path.parent()).await
    }

    async fn enter(&self, dir: &nfs_fh3, name: &OsStr) -> Outcome<Option<nfs_fh3>> {
        self.within(async { Session::open(self).await?.enter(dir, name.as_bytes()).await })
            .await
    }

    async fn page(&self, dir: &nfs_fh3, limit: usize) -> Outcome<Vec<(OsString, Kind)>> {
        let page = self
            .within(async { Session::open(self).await?.page(dir, limit).await })
            .await;
        match page {
            Err(AdminErrorKind::Stale) => Ok(Vec::new()),
            page => page,
        }
    }

    async fn unlink(&self, dir: &nfs_fh3, name: &OsStr) -> Outcome<bool> {
        let name = name.as_bytes();
        self.within(async { Session::open(self).await?.unlink(dir, name).await })
            .await
    }

    async fn rmdir(&self, dir: &nfs_fh3, name: &OsStr) -> Outcome<bool> {
        let name = name.as_bytes();
        self.within(async { Session::open(self).await?.rmdir(dir, name).await })
            .await
    }
}
