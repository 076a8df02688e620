//! Removing volumes, and what can be done with removed ones.
//!
//! Invariants: every step is one RENAME or one exclusive CREATE, each step may be repeated by any
//! host, and the name is free once the last one is done. A volume's removal:
//!
//! 1. MKDIR `volumes/<name>/removing.<nonce>`, then RENAME to `removing` ([`crate::cluster::removal`]);
//!    its mtime names the trash entry;
//! 2. MKDIR `trash/<entry>`;
//! 3. RENAME the data directory to `trash/<entry>/data`, if the driver made it;
//! 4. RENAME `volumes/<name>` to `trash/<entry>/volume`.
//!
//! [`super::restore`] goes backwards. Purging first renames the entry into `tmp/`, so that nobody restores
//! what is being deleted; what a crash leaves there is swept.
//!
//! Known limits: a removal that was held up takes the data of a volume that another host has restored meanwhile, sees
//! that, and puts it back: if its host dies in between, or cannot reach the server, the data stays in the entry, where
//! nobody lists it, and Mount refuses the volume. A server that has forgotten a removal's mark has the
//! volume again, though Remove has said that it is gone. A purge of what another host has just begun to restore deletes
//! the data that has not moved yet; that restore fails.

use std::time::Duration;

use super::data::{self, Away};
use super::error::CatalogError;
use super::{restore, share};
use crate::layout::{self, REMOVING, RESTORED_FROM, TRASH_DATA, TRASH_VOLUME, TrashName};
use crate::mutant::{self, Mutant};
use crate::volume::{MAX_RECORD, OnRemove, Record, VolumeName};
use nfs::address::SharePath;
use nfs::admin::{Admin, AdminError, AdminErrorKind};

/// What lies in `tmp/` longer than this was left by a crash; nothing takes near as long to make.
pub(super) const LEFT_OVER: Duration = Duration::from_secs(3600);
/// Entries of the trash that are read at once: enough to hide the round trip, little for the server.
const READS_AT_ONCE: usize = 8;
/// Entries of `tmp/` that are being deleted.
const PURGE_PREFIX: &str = "purge.";

/// A removed volume.
#[derive(Debug, Clone)]
pub(crate) struct TrashEntry {
    /// The entry's name in the trash; what `restore` takes to name exactly this one.
    pub entry: String,
    pub name: VolumeName,
    /// RFC 3339, by the server's clock.
    pub removed: String,
    /// Seconds since 1970 of `removed`.
    pub removed_secs: u64,
    pub record: Record,
    /// Where the record lies: [`TRASH_VOLUME`] in the entry, or what a restore has taken.
    pub(super) at: SharePath,
}

impl TrashEntry {
    fn new(name: &TrashName, at: SharePath, record: Record) -> Self {
        Self {
            entry: name.entry(),
            removed: layout::rfc3339(name.removed),
            removed_secs: name.removed,
            name: name.volume.clone(),
            record,
            at,
        }
    }

    /// Whether no restore has taken it.
    pub(super) fn is_whole(&self) -> bool {
        self.at.name() == TRASH_VOLUME
    }

    /// Whether a Create with other options has begun to bring it back: its record may have these by then.
    pub(super) fn is_recreated(&self) -> bool {
        self.at.name().starts_with(layout::RECREATING) && !mutant::is_on(Mutant::RecreatesBeginAnew)
    }

    /// Whether it is not kept at all. What is taken may have other options than it was removed with.
    pub(super) fn is_deleted(&self) -> bool {
        self.record.on_remove == OnRemove::Delete
            && (self.is_whole() || mutant::is_on(Mutant::TakenIsDeletedAtOnce))
    }

    /// Whether its data was moved into it, or may have been.
    pub(crate) fn holds_data(&self) -> bool {
        self.record.moves_data() || (!self.is_whole() && self.record.made.is_some())
    }
}

/// A removed volume by the name of its entry alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Trashed {
    pub entry: String,
    pub name: VolumeName,
    /// Seconds since 1970 by the server's clock.
    pub removed_secs: u64,
}

/// Moves a volume whose removal has begun to the trash. `home` holds its record, `on` its data, if
/// that is to be moved. Whether it is there now; otherwise another host has finished the removal, and
/// the volume was restored since, or is about to be.
pub(super) async fn finish_removal(
    home: &Admin,
    on: Option<&Admin>,
    record: &Record,
    entry: &TrashName,
) -> Result<bool, CatalogError> {
    make_dir(home, &entry.path()).await?;
    fail::fail_point!("remove.entry", |_| crate::failpoint::die());
    let trashed = entry.path().join(TRASH_DATA);
    if let Some(on) = on {
        if on.share() != home.share() {
            make_dir(on, &entry.path()).await?;
        }
        let away = data::move_away(on, record, &trashed).await?;
        if away != Away::Stays
            && !goes_on(home, record, entry).await?
            && (away == Away::Moved || is_back(home, record).await?)
        {
            data::put_back(on, record, &trashed).await?;
            leave(home, on, entry).await;
            return Ok(false);
        }
    }
    fail::fail_point!("remove.data", |_| crate::failpoint::die());
    let volume = layout::volume(&record.name);
    let Err(error) = home.rename(&volume, &entry.path().join(TRASH_VOLUME)).await else {
        return match look_at_moved(home, record, entry).await? {
            Moved::Removed => Ok(true),
            // Its mark was taken away, or it was restored.
            Moved::Stays => {
                if let Some(on) = on {
                    data::put_back(on, record, &trashed).await?;
                    leave(home, on, entry).await;
                }
                Ok(false)
            }
            Moved::Another => Ok(false),
        };
    };
    // Another host finished, or the reply was lost: then the name is free or taken anew.
    match share::read(home, &record.name).await {
        Ok(Some(there)) if there.id == record.id && goes_on(home, record, entry).await? => {
            Err(error.into())
        }
        Ok(_) => Ok(what_was_moved(home, record, entry).await? == Moved::Removed),
        Err(_) => Err(error.into()),
    }
}

/// Whether a removal is still going on, or was finished by another host and not undone: a host that is held
/// up does not see that the volume was restored by its id, or by that of its directory.
async fn goes_on(home: &Admin, record: &Record, entry: &TrashName) -> Result<bool, AdminError> {
    if mutant::is_on(Mutant::RestoredIsRemovedAgain) {
        return Ok(true);
    }
    // Looked up anew: what this call has looked up may be in the trash by now.
    let home = home.scoped();
    let is_marked = share::removal(&home, record).await?.as_ref() == Some(entry);
    Ok(is_marked || home.attr(&entry.path().join(TRASH_VOLUME)).await?.is_some())
}

/// Whether the volume is there, restored. What lies in its entry otherwise is on its way out: to be deleted, or
/// to where another host restores it.
async fn is_back(home: &Admin, record: &Record) -> Result<bool, CatalogError> {
    let there = share::read(&home.scoped(), &record.name).await?;
    let is_back = there.is_some_and(|there| there.id == record.id);
    Ok(is_back || mutant::is_on(Mutant::DataGoesBackUnasked))
}

/// Removes an entry that this host has made in vain.
async fn leave(home: &Admin, on: &Admin, entry: &TrashName) {
    for admin in [home, on] {
        let _ = admin.remove_dir(&entry.path()).await;
    }
}

/// What a removal finds that it has moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moved {
    Removed,
    /// The volume itself, whose removal is not this one any more.
    Stays,
    Another,
}

/// Looks at the record that was moved: a host that was held up may have moved that of a volume
/// that was made or restored meanwhile, and puts it back.
pub(super) async fn look_at_moved(
    home: &Admin,
    record: &Record,
    entry: &TrashName,
) -> Result<Moved, CatalogError> {
    let moved = entry.path().join(TRASH_VOLUME);
    let found = what_was_moved(home, record, entry).await?;
    if found == Moved::Removed {
        return Ok(found);
    }
    tracing::warn!(volume = %record.name,
        "made anew or restored by another host during its removal: put back");
    match home.rename(&moved, &layout::volume(&record.name)).await {
        // Not there any more: it was removed, and is being restored. Or the name was taken in between: then it
        // stays in the trash.
        Err(error)
            if matches!(
                error.kind,
                AdminErrorKind::NotFound | AdminErrorKind::Exists | AdminErrorKind::NotEmpty
            ) =>
        {
            Ok(Moved::Another)
        }
        back => Ok(back.map(|()| found)?),
    }
}

async fn what_was_moved(
    home: &Admin,
    record: &Record,
    entry: &TrashName,
) -> Result<Moved, CatalogError> {
    let moved = entry.path().join(TRASH_VOLUME);
    if mutant::is_on(Mutant::RemovedUnseen) {
        return Ok(Moved::Removed);
    }
    if !is_in(home, &moved, record).await? {
        return Ok(Moved::Another);
    }
    let mark = share::removal_in(home, &moved, record).await?;
    Ok(
        match mark.as_ref() == Some(entry) || mutant::is_on(Mutant::RestoredIsRemovedAgain) {
            true => Moved::Removed,
            false => Moved::Stays,
        },
    )
}

/// Whether a directory holds a volume's record. One that cannot be read is nobody's.
pub(super) async fn is_in(
    home: &Admin,
    dir: &SharePath,
    record: &Record,
) -> Result<bool, CatalogError> {
    match record_in(home, dir, &record.name).await {
        Ok(there) => Ok(there.is_some_and(|there| there.id == record.id)),
        Err(CatalogError::Record { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Puts the data of a volume without a record on the share into its share's trash.
pub(super) async fn remove_local(
    on: &Admin,
    record: &Record,
) -> Result<Option<TrashName>, CatalogError> {
    if record.on_remove == OnRemove::Retain || record.made.is_none() {
        return Ok(None);
    }
    let entry = match begun_local(on, record).await? {
        Some(begun) => begun,
        None => {
            let now = now(on).await?;
            TrashName::at(record, now)
        }
    };
    make_dir(on, &entry.path()).await?;
    fail::fail_point!("remove.local-entry", |_| crate::failpoint::die());
    let volume = entry.path().join(TRASH_VOLUME);
    on.mkdir(&volume, 0o755).await?;
    on.write(&volume.join(layout::RECORD), &record.to_json())
        .await?;
    fail::fail_point!("remove.local-record", |_| crate::failpoint::die());
    data::move_away(on, record, &entry.path().join(TRASH_DATA)).await?;
    fail::fail_point!("remove.local-data", |_| crate::failpoint::die());
    Ok(Some(entry))
}

/// The entry of a removal by [`remove_local`] that a crash interrupted.
async fn begun_local(on: &Admin, record: &Record) -> Result<Option<TrashName>, CatalogError> {
    let entries = on.list(&layout::trash()).await?.unwrap_or_default();
    let mut names = entries
        .iter()
        .filter_map(|entry| entry.name.to_str().and_then(TrashName::parse));
    Ok(names.find(|name| *name == TrashName::at(record, name.removed)))
}

/// Makes sure that a share answers and takes a directory, before a volume is marked as removed:
/// one whose removal cannot be finished would be of no use to anybody until it can.
pub(super) async fn try_out(admin: &Admin, record: &Record) -> Result<(), CatalogError> {
    let path = layout::tmp().join(&format!("{}.removal", record.id));
    make_dir(admin, &path).await?;
    admin.remove_dir(&path).await?;
    Ok(())
}

/// Makes a directory in `.nfsvol/`, which may be absent.
async fn make_dir(admin: &Admin, path: &SharePath) -> Result<(), CatalogError> {
    match admin.mkdir(path, 0o755).await {
        Err(error) if matches!(error.kind, AdminErrorKind::NotFound) => {
            share::ensure(admin).await?;
            admin.mkdir(path, 0o755).await?;
        }
        made => {
            made?;
        }
    }
    Ok(())
}

/// The server's clock, seconds since 1970.
pub(super) async fn now(admin: &Admin) -> Result<u64, CatalogError> {
    match admin.touch(&layout::tmp()).await {
        Err(error) if matches!(error.kind, AdminErrorKind::NotFound) => {
            share::ensure(admin).await?;
            Ok(admin.touch(&layout::tmp()).await?.mtime.secs)
        }
        attr => Ok(attr?.mtime.secs),
    }
}

/// What is in the trash of a share, oldest first.
pub(super) async fn list(home: &Admin) -> Result<Vec<TrashEntry>, CatalogError> {
    let names = entry_names(home).await?;
    let mut entries: Vec<TrashEntry> = read(home, names).await.into_iter().flatten().collect();
    entries.sort_by(|a, b| (a.removed_secs, &a.entry).cmp(&(b.removed_secs, &b.entry)));
    Ok(entries)
}

/// The entries of the trash of a share: one listing.
pub(super) async fn entry_names(home: &Admin) -> Result<Vec<TrashName>, CatalogError> {
    let listed = home.list(&layout::trash()).await?.unwrap_or_default();
    let names = listed.iter().filter_map(|entry| entry.name.to_str());
    Ok(names.filter_map(TrashName::parse).collect())
}

/// The names of what is in the trash of a share, oldest first: one listing, no record is read.
pub(super) async fn names(home: &Admin) -> Result<Vec<Trashed>, CatalogError> {
    let listed = home.list(&layout::trash()).await?.unwrap_or_default();
    let names = listed.iter().filter_map(|entry| entry.name.to_str());
    let mut names: Vec<Trashed> = names
        .filter_map(TrashName::parse)
        .map(|name| Trashed {
            entry: name.entry(),
            removed_secs: name.removed,
            name: name.volume,
        })
        .collect();
    names.sort_by_key(|trashed| trashed.removed_secs);
    Ok(names)
}

/// Reads entries, in their order; `None` for one without a readable record: data of a volume whose
/// record is in the home share's trash, a removal under way, or a restore that was cut off at its
/// last step.
pub(super) async fn read(home: &Admin, names: Vec<TrashName>) -> Vec<Option<TrashEntry>> {
    let mut entries = Vec::with_capacity(names.len());
    let mut names = names.into_iter().peekable();
    while names.peek().is_some() {
        let mut reads = tokio::task::JoinSet::new();
        let from = entries.len();
        for (at, name) in names.by_ref().take(READS_AT_ONCE).enumerate() {
            let home = home.clone();
            reads.spawn(async move { (at, read_one(&home, name).await) });
            entries.push(None);
        }
        while let Some(read) = reads.join_next().await {
            if let Ok((at, entry)) = read {
                entries[from + at] = entry;
            }
        }
    }
    entries
}

async fn read_one(home: &Admin, name: TrashName) -> Option<TrashEntry> {
    match entry(home, &name).await {
        Ok(found) => found,
        Err(error) => {
            tracing::warn!(entry = name.entry(), %error, "unreadable trash entry");
            None
        }
    }
}

/// An entry with its record; `None` if that is not in it.
async fn entry(home: &Admin, name: &TrashName) -> Result<Option<TrashEntry>, CatalogError> {
    let found = restore::find(home, name).await?;
    Ok(found.map(|(at, record)| TrashEntry::new(name, at, record)))
}

/// Of the volumes of this name the one that was removed last, if its record can be read.
pub(super) async fn last_of(
    home: &Admin,
    name: &VolumeName,
) -> Result<Option<TrashEntry>, CatalogError> {
    let listed = home.list(&layout::trash()).await?.unwrap_or_default();
    // Of two in one second the one that was changed last.
    let of_name = listed.iter().filter_map(|there| {
        let entry = TrashName::parse(there.name.to_str()?)?;
        (entry.volume == *name).then(|| (entry, there.attr.map(|attr| attr.mtime)))
    });
    match of_name.max_by_key(|(entry, changed)| (entry.removed, *changed)) {
        Some((last, _)) => entry(home, &last).await,
        None => Ok(None),
    }
}

/// Whether the data of a removed volume lies in its entry.
pub(super) async fn has_data(on: &Admin, entry: &TrashEntry) -> Result<bool, AdminError> {
    let data = layout::trash().join(&entry.entry).join(TRASH_DATA);
    Ok(on.attr(&data).await?.is_some())
}

/// Takes away an entry that a crash left empty.
pub(super) async fn clear_bare(home: &Admin, name: &TrashName) -> Result<(), CatalogError> {
    restore::clear(home, &name.path()).await?;
    match home.remove_dir(&name.path()).await {
        Err(error) if !matches!(error.kind, AdminErrorKind::NotEmpty) => Err(error.into()),
        _ => Ok(()),
    }
}

/// When an entry was removed by its remover's clock, in seconds since 1970, if that was noted.
pub(super) async fn removers_time(
    home: &Admin,
    entry: &TrashEntry,
) -> Result<Option<u64>, CatalogError> {
    let mut at = entry.at.clone();
    while let Some(entries) = home.list(&at).await? {
        if entries.iter().any(|entry| entry.name == REMOVING) {
            let by = home.list(&at.join(REMOVING)).await?.unwrap_or_default();
            let times = by.iter().filter_map(|entry| entry.name.to_str());
            return Ok(times.filter_map(layout::removers_time).next());
        }
        at = at.join(RESTORED_FROM);
    }
    Ok(None)
}

/// The record in a directory of the trash, under whatever name.
pub(super) async fn record_in(
    home: &Admin,
    dir: &SharePath,
    name: &VolumeName,
) -> Result<Option<Record>, CatalogError> {
    let Some(json) = home.read(&dir.join(layout::RECORD), MAX_RECORD).await? else {
        return Ok(None);
    };
    let record = Record::from_json(&named(name, &json), &json);
    Ok(Some(record.map_err(|source| CatalogError::Record {
        name: name.clone(),
        source,
    })?))
}

/// The name that a record in an entry of `volume` bears: a restore under another one that was cut
/// off has written that.
pub(super) fn named(volume: &VolumeName, json: &[u8]) -> VolumeName {
    #[derive(serde::Deserialize)]
    struct Named {
        name: VolumeName,
    }
    match serde_json::from_slice(json) {
        Ok(Named { name }) if !mutant::is_on(Mutant::TrashKnowsOneName) => name,
        _ => volume.clone(),
    }
}

/// The newest entry called `wanted`: a volume's name or an entry's. Reads no other's record.
pub(super) async fn find(home: &Admin, wanted: &str) -> Result<TrashEntry, CatalogError> {
    let mut names = entry_names(home).await?;
    names.sort_by_key(|name| std::cmp::Reverse(name.removed));
    let is_wanted = |name: &&TrashName| name.volume.as_str() == wanted || name.entry() == wanted;
    for name in names.iter().filter(is_wanted) {
        if let Some(found) = read_one(home, name.clone()).await {
            return Ok(found);
        }
    }
    let score = |name: &TrashName| strsim::jaro_winkler(name.volume.as_str(), wanted);
    let nearest = names.iter().filter(|name| score(name) > 0.75);
    let nearest = nearest.max_by(|a, b| score(a).total_cmp(&score(b)));
    Err(CatalogError::NotInTrash {
        name: wanted.to_owned(),
        nearest: nearest.map(|name| name.volume.to_string()),
    })
}

/// Removes what is left of an entry that was restored.
pub(super) async fn clear(admin: &Admin, entry: &TrashEntry) {
    let path = layout::trash().join(&entry.entry);
    let cleared = async {
        restore::clear(admin, &path).await?;
        admin.remove_dir(&path).await
    };
    if let Err(error) = cleared.await
        && !matches!(error.kind, AdminErrorKind::NotFound)
    {
        tracing::warn!(entry = entry.entry, %error, "restored, but its trash entry stays");
    }
}

/// Deletes an entry for good. A crash on the way leaves the rest to [`super::sweep`].
pub(super) async fn purge(admin: &Admin, entry: &str) -> Result<(), CatalogError> {
    let aside = layout::tmp().join(&format!("{PURGE_PREFIX}{entry}"));
    match admin.rename(&layout::trash().join(entry), &aside).await {
        Err(error) if !matches!(error.kind, AdminErrorKind::NotFound) => return Err(error.into()),
        _ => {}
    }
    fail::fail_point!("purge.renamed", |_| crate::failpoint::die());
    delete(admin, &aside).await
}

/// Deletes a tree, or says that the server does not let the driver do so.
pub(super) async fn delete(admin: &Admin, path: &SharePath) -> Result<(), CatalogError> {
    share::delete_tree(admin, path)
        .await
        .map_err(|error| match error.kind {
            AdminErrorKind::Access(_) => CatalogError::NotDeletable {
                share: admin.share().to_string(),
                path: path.clone(),
                source: error.into(),
            },
            _ => error.into(),
        })
}
