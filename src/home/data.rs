//! Data directories: made aside with their owner and mode, put in place by one RENAME, and moved
//! away only while they are the very directories that the driver made.
//!
//! A crash between the record and the RENAME leaves `tmp/<id>.data`, by which [`place`] knows
//! that an absent directory was never there, rather than lost.

use super::error::CatalogError;
use super::share;
use crate::layout;
use crate::mutant::{self, Mutant};
use crate::volume::options::OWN_DIR;
use crate::volume::{Owner, Record, VolumeName};
use nfs::address::SharePath;
use nfs::admin::{Admin, AdminError, AdminErrorKind, Attr, Kind, Made};

/// Parents of a data directory and directories of ours: passable by everybody.
const DIR_MODE: u32 = 0o755;

/// A data directory made aside.
#[derive(Debug, Clone, Copy)]
pub(super) struct Prepared {
    pub(super) fileid: u64,
    /// When it was made by the server's clock, in seconds since 1970.
    pub(super) at: u64,
    /// The server made root somebody else (root_squash).
    pub(super) squashed: bool,
}

fn aside(id: &str) -> SharePath {
    layout::tmp().join(&format!("{id}.data"))
}

/// Makes the data directory aside, unless one is in place already (`None`: it was found).
pub(super) async fn prepare(
    admin: &Admin,
    name: &VolumeName,
    id: &str,
    dir: &SharePath,
    owner: Owner,
) -> Result<Option<Prepared>, CatalogError> {
    if exists(admin, dir).await? {
        return Ok(None);
    }
    let path = aside(id);
    // Nobody else's until its owner is set.
    let mode = match (owner.uid, owner.gid) {
        (0, 0) => owner.mode,
        _ => owner.mode & 0o700,
    };
    let made = match admin.mkdir(&path, mode).await {
        Err(error) if matches!(error.kind, AdminErrorKind::NotFound) => {
            share::ensure(admin).await?;
            admin.mkdir(&path, mode).await?
        }
        made => made?,
    };
    let before = match made {
        Made::New(attr) => attr,
        Made::Exists => {
            let there = admin.attr(&path).await?;
            there.ok_or_else(|| CatalogError::Unsettled(name.clone()))?
        }
    };
    fail::fail_point!("create.made", |_| crate::failpoint::die());
    let attr = match give(admin, &path, dir, owner, before).await {
        Ok(attr) => attr,
        Err(error) => {
            share::discard(admin, &path).await;
            return Err(error);
        }
    };
    Ok(Some(Prepared {
        fileid: attr.fileid,
        at: attr.mtime.secs,
        squashed: attr.uid != owner.uid,
    }))
}

/// Sets owner and mode. A server that squashes root refuses: that is an error only when the user
/// asked for an owner.
async fn give(
    admin: &Admin,
    path: &SharePath,
    dir: &SharePath,
    owner: Owner,
    before: Attr,
) -> Result<Attr, CatalogError> {
    if (before.uid, before.gid, before.mode) == (owner.uid, owner.gid, owner.mode) {
        return Ok(before);
    }
    let refused = match admin
        .set_owner(path, owner.uid, owner.gid, owner.mode)
        .await
    {
        Ok(attr) => return Ok(attr),
        Err(error) if matches!(error.kind, AdminErrorKind::Access(_)) => error,
        Err(error) => return Err(error.into()),
    };
    tracing::debug!(error = %refused, "owner not set");
    if (owner.uid, owner.gid) != (0, 0) {
        let share = admin.share().to_string();
        let Owner { uid, gid, mode } = owner;
        return Err(CatalogError::Squashed {
            share,
            path: dir.clone(),
            uid,
            gid,
            mode,
        });
    }
    Ok(admin
        .set_owner(path, before.uid, before.gid, owner.mode)
        .await?)
}

/// Where a data directory stands after [`place`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Placed {
    /// In place, as the record says.
    There,
    /// In place with another `fileid`, which goes into the record: made anew because the share
    /// spans file systems, or numbered anew by a server whose numbers follow the path.
    Remade(u64),
    /// Somebody else's directory came first; the record must not claim it.
    Found,
}

/// A directory that was just renamed into its place.
async fn placed(admin: &Admin, record: &Record) -> Result<Placed, CatalogError> {
    if mutant::is_on(Mutant::FileIdOfBeforeTheRename) {
        return Ok(Placed::There);
    }
    let there = admin.attr(&record.data_dir).await?;
    Ok(
        match there.filter(|attr| record.made != Some(attr.fileid)) {
            Some(attr) => Placed::Remade(attr.fileid),
            None => Placed::There,
        },
    )
}

/// Puts the directory that was made aside in its place; harmless when it is there already.
pub(super) async fn place(admin: &Admin, record: &Record) -> Result<Placed, CatalogError> {
    let from = aside(&record.id);
    let dir = &record.data_dir;
    match admin
        .rename(&from, dir)
        .await
        .map_err(|e| (e.kind.clone(), e))
    {
        Ok(()) => placed(admin, record).await,
        Err((AdminErrorKind::Exists, _)) => {
            share::discard(admin, &from).await;
            Ok(Placed::Found)
        }
        Err((AdminErrorKind::NotFound, error)) => {
            if let Some(attr) = admin.attr(dir).await? {
                return Ok(
                    if record.made == Some(attr.fileid) || record.made.is_none() {
                        Placed::There
                    } else {
                        Placed::Found
                    },
                );
            }
            if admin.attr(&from).await?.is_none() {
                return Err(gone(admin, record));
            }
            make_parents(admin, dir).await?;
            fail::fail_point!("create.parents", |_| crate::failpoint::die());
            admin.rename(&from, dir).await.map_err(|_| error)?;
            placed(admin, record).await
        }
        Err((AdminErrorKind::CrossDevice, _)) => {
            let made = admin.mkdir(dir, record.options.owner.mode & 0o700).await?;
            share::discard(admin, &from).await;
            let Made::New(before) = made else {
                return Ok(Placed::Found);
            };
            Ok(Placed::Remade(
                give(admin, dir, dir, record.options.owner, before)
                    .await?
                    .fileid,
            ))
        }
        Err((_, error)) => Err(error.into()),
    }
}

/// Removes what [`prepare`] made.
pub(super) async fn discard_prepared(admin: &Admin, id: &str) {
    share::discard(admin, &aside(id)).await;
}

/// The error for a data directory that was in place and is not any more.
pub(super) fn gone(admin: &Admin, record: &Record) -> CatalogError {
    CatalogError::DataGone {
        name: record.name.clone(),
        share: admin.share().to_string(),
        path: record.data_dir.clone(),
    }
}

/// The error for a directory that was to be found.
pub(super) fn absent(admin: &Admin, name: &VolumeName, path: &SharePath) -> CatalogError {
    CatalogError::NoDirectory {
        name: name.clone(),
        share: admin.share().to_string(),
        path: path.clone(),
    }
}

/// Whether anybody has put something into the directory that was made for a volume; `None` if that
/// directory is not there.
pub(super) async fn is_used(on: &Admin, record: &Record) -> Result<Option<bool>, AdminError> {
    let there = on.attr(&record.data_dir).await?;
    if there.is_none_or(|attr| record.made != Some(attr.fileid)) {
        return Ok(None);
    }
    let entries = on.list(&record.data_dir).await?;
    Ok(Some(entries.is_some_and(|entries| !entries.is_empty())))
}

/// Whether the data directory is in place.
pub(super) async fn exists(admin: &Admin, dir: &SharePath) -> Result<bool, CatalogError> {
    match admin.attr(dir).await? {
        None => Ok(false),
        Some(attr) if attr.kind == Kind::Dir => Ok(true),
        Some(_) => {
            let share = admin.share().to_string();
            Err(CatalogError::NotADirectory {
                share,
                path: dir.clone(),
            })
        }
    }
}

/// Makes the directories above `path` that are absent.
pub(super) async fn make_parents(admin: &Admin, path: &SharePath) -> Result<(), CatalogError> {
    let mut at = SharePath::root();
    for part in path.parent().components() {
        at = at.join(part);
        admin.mkdir(&at, DIR_MODE).await?;
    }
    Ok(())
}

/// Where the data of a volume is that is being removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Away {
    /// In the trash, moved by this call.
    Moved,
    /// There already, moved by another call: by one that was cut off, or by a host that is further on.
    There,
    /// Where it was, or gone.
    Stays,
}

/// Moves the data directory to `to`, if it is the one that the driver made.
pub(super) async fn move_away(
    admin: &Admin,
    record: &Record,
    to: &SharePath,
) -> Result<Away, CatalogError> {
    debug_assert_eq!(to.components().next(), Some(OWN_DIR));
    let Some(made) = record.made else {
        return Ok(Away::Stays);
    };
    let already = async || match admin.attr(to).await {
        Ok(there) => Ok(there.map_or(Away::Stays, |_| Away::There)),
        Err(error) => Err(error.into()),
    };
    let there = admin.attr(&record.data_dir).await?;
    let is_made = |attr: Attr| attr.fileid == made && attr.kind == Kind::Dir;
    if !there.is_some_and(is_made) {
        // Left over from a crash before the directory was put in place.
        discard_prepared(admin, &record.id).await;
    }
    let before = match there {
        Some(attr) if is_made(attr) => attr,
        Some(_) => {
            tracing::warn!(volume = %record.name, share = %admin.share(), path = %record.data_dir,
                "the data stays: its directory is not the one that was made for the volume \
                 (brought back from a backup?). The next volume of this name finds it");
            return Ok(Away::Stays);
        }
        None => return already().await,
    };
    match admin.rename(&record.data_dir, to).await {
        Ok(()) => moved(admin, record, to, before).await,
        // Another host finished first, or the reply was lost.
        Err(error) if matches!(error.kind, AdminErrorKind::NotFound) => already().await,
        Err(error) => Err(error.into()),
    }
}

/// Looks at what was moved: a host that was held up may have moved a directory that another one
/// has made meanwhile, and puts that back. A server whose numbers follow the path gives a new one
/// to the same directory, whose other attributes are as they were.
pub(super) async fn moved(
    admin: &Admin,
    record: &Record,
    to: &SharePath,
    before: Attr,
) -> Result<Away, CatalogError> {
    let what = |attr: &Attr| (attr.mtime, attr.mode, attr.uid, attr.gid, attr.nlink);
    match admin.attr(to).await? {
        Some(attr)
            if attr.fileid != before.fileid
                && what(&attr) != what(&before)
                && !mutant::is_on(Mutant::RemovedUnseen) =>
        {
            tracing::warn!(volume = %record.name, path = %record.data_dir,
                "made anew by another host during its removal: put back");
            admin.rename(to, &record.data_dir).await?;
            Ok(Away::Stays)
        }
        Some(_) => Ok(Away::Moved),
        None => Ok(Away::Stays),
    }
}

/// Puts data back that was moved away from a volume which stays, if it is there still: a restore may have
/// moved it already.
pub(super) async fn put_back(
    admin: &Admin,
    record: &Record,
    trashed: &SharePath,
) -> Result<(), CatalogError> {
    // Looked up anew: the entry that this call knows may be on its way to be deleted.
    let admin = admin.scoped();
    if admin.attr(&record.data_dir).await?.is_some() {
        return Ok(());
    }
    tracing::warn!(volume = %record.name, path = %record.data_dir,
        "restored by another host during its removal: put back");
    match admin.rename(trashed, &record.data_dir).await {
        Err(error) if matches!(error.kind, AdminErrorKind::NotFound) => Ok(()),
        moved => Ok(moved?),
    }
}
