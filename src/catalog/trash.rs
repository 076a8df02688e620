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
//! Restoring goes backwards. Purging first renames the entry into `tmp/`, so that nobody restores
//! what is being deleted; what a crash leaves there is swept.

use std::time::Duration;

use serde::Serialize;

use super::data;
use super::error::CatalogError;
use super::layout::{self, TRASH_DATA, TRASH_VOLUME, TrashName};
use super::share;
use crate::cluster::layout::REMOVING;
use crate::nfs::address::SharePath;
use crate::nfs::admin::{Admin, AdminErrorKind};
use crate::volume::{MAX_RECORD, OnRemove, Record, RecordError, VolumeName};

/// What lies in `tmp/` longer than this was left by a crash; nothing takes near as long to make.
const LEFT_OVER: Duration = Duration::from_secs(3600);
/// Entries of `tmp/` that are being deleted.
const PURGE_PREFIX: &str = "purge.";

/// A removed volume.
#[derive(Debug, Clone, Serialize)]
pub struct TrashEntry {
    /// The entry's name in the trash; what `restore` takes to name exactly this one.
    pub entry: String,
    pub name: VolumeName,
    /// RFC 3339, by the server's clock.
    pub removed: String,
    /// Seconds since 1970 of `removed`.
    #[serde(skip)]
    pub removed_secs: u64,
    pub record: Record,
}

/// A removed volume by the name of its entry alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trashed {
    pub entry: String,
    pub name: VolumeName,
    /// Seconds since 1970 by the server's clock.
    pub removed_secs: u64,
}

/// Moves a volume whose removal has begun to the trash. `home` holds its record, `on` its data.
pub(super) async fn finish_removal(
    home: &Admin,
    on: &Admin,
    record: &Record,
    entry: &TrashName,
) -> Result<(), CatalogError> {
    make_dir(home, &entry.path()).await?;
    fail::fail_point!("remove.entry", |_| crate::failpoint::die());
    if record.on_remove != OnRemove::Retain {
        if on.share() != home.share() {
            make_dir(on, &entry.path()).await?;
        }
        data::move_away(on, record, &entry.path().join(TRASH_DATA)).await?;
    }
    fail::fail_point!("remove.data", |_| crate::failpoint::die());
    let volume = layout::volume(&record.name);
    match home.rename(&volume, &entry.path().join(TRASH_VOLUME)).await {
        Ok(()) => Ok(()),
        // Another host finished, or the reply was lost: then the name is free or taken anew.
        Err(error) => match share::read(home, &record.name).await {
            Ok(Some(there)) if there.id == record.id => Err(error.into()),
            Ok(_) => Ok(()),
            Err(_) => Err(error.into()),
        },
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
    Ok(scan(home).await?.0)
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

/// What is in the trash of a share, oldest first, and the entries that hold no record.
async fn scan(home: &Admin) -> Result<(Vec<TrashEntry>, Vec<TrashName>), CatalogError> {
    let (mut entries, mut bare) = (Vec::new(), Vec::new());
    for entry in home.list(&layout::trash()).await?.unwrap_or_default() {
        let Some(name) = entry.name.to_str().and_then(TrashName::parse) else {
            continue;
        };
        match record_of(home, &name).await {
            Ok(Some(record)) => entries.push(TrashEntry {
                entry: name.entry(),
                name: name.volume.clone(),
                removed: layout::rfc3339(name.removed),
                removed_secs: name.removed,
                record,
            }),
            // Data of a volume whose record is in the home share's trash, a removal under way, or
            // a restore that a crash interrupted at its last step.
            Ok(None) => bare.push(name),
            Err(error) => tracing::warn!(entry = name.entry(), %error, "unreadable trash entry"),
        }
    }
    entries.sort_by(|a, b| (a.removed_secs, &a.entry).cmp(&(b.removed_secs, &b.entry)));
    Ok((entries, bare))
}

/// The entries that were removed more than `age` ago. Takes away those that a crash left empty.
pub(super) async fn expired(home: &Admin, age: Duration) -> Result<Vec<TrashEntry>, CatalogError> {
    let now = now(home).await?;
    let older = |removed: u64, age: Duration| now.saturating_sub(removed) > age.as_secs();
    let (mut entries, bare) = scan(home).await?;
    for name in bare.iter().filter(|name| older(name.removed, LEFT_OVER)) {
        match home.remove_dir(&name.path()).await {
            Err(error) if !matches!(error.kind, AdminErrorKind::NotEmpty) => {
                return Err(error.into());
            }
            _ => {}
        }
    }
    entries.retain(|e| e.record.on_remove == OnRemove::Delete || older(e.removed_secs, age));
    Ok(entries)
}

async fn record_of(home: &Admin, entry: &TrashName) -> Result<Option<Record>, CatalogError> {
    let file = entry.path().join(TRASH_VOLUME).join(layout::RECORD);
    let Some(json) = home.read(&file, MAX_RECORD).await? else {
        return Ok(None);
    };
    let record = Record::from_json(&entry.volume, &json);
    Ok(Some(record.map_err(|source| wrong(&entry.volume, source))?))
}

fn wrong(name: &VolumeName, source: RecordError) -> CatalogError {
    CatalogError::Record {
        name: name.clone(),
        source,
    }
}

/// The newest entry called `wanted`: a volume's name or an entry's.
pub(super) async fn find(home: &Admin, wanted: &str) -> Result<TrashEntry, CatalogError> {
    let entries = list(home).await?;
    if let Some(found) = entries
        .iter()
        .rev()
        .find(|e| e.name.as_str() == wanted || e.entry == wanted)
    {
        return Ok(found.clone());
    }
    let score = |e: &TrashEntry| strsim::jaro_winkler(e.name.as_str(), wanted);
    let nearest = entries.iter().filter(|e| score(e) > 0.75);
    let nearest = nearest.max_by(|a, b| score(a).total_cmp(&score(b)));
    Err(CatalogError::NotInTrash {
        name: wanted.to_owned(),
        nearest: nearest.map(|e| e.name.to_string()),
    })
}

/// Brings an entry's data back to `record.data_dir`; `record` may bear a new name.
pub(super) async fn restore_data(
    on: &Admin,
    entry: &TrashEntry,
    record: &Record,
) -> Result<(), CatalogError> {
    let from = layout::trash().join(&entry.entry).join(TRASH_DATA);
    if on.attr(&from).await?.is_none() {
        // Retained or found directories never moved; a restore that crashed has moved it already.
        return match on.attr(&record.data_dir).await? {
            Some(attr) if record.made.is_none_or(|made| made == attr.fileid) => Ok(()),
            _ => Err(data::gone(on, record)),
        };
    }
    if on.attr(&record.data_dir).await?.is_some() {
        let share = on.share().to_string();
        return Err(CatalogError::PathTaken {
            share,
            path: record.data_dir.clone(),
        });
    }
    data::make_parents(on, &record.data_dir).await?;
    on.rename(&from, &record.data_dir).await?;
    Ok(())
}

/// Brings an entry's record back; its data is in place.
pub(super) async fn restore_record(
    home: &Admin,
    entry: &TrashEntry,
    record: &Record,
) -> Result<(), CatalogError> {
    let volume = layout::trash().join(&entry.entry).join(TRASH_VOLUME);
    for entry in home.list(&volume).await?.unwrap_or_default() {
        // The mark, and intents that came too late to be one.
        if let Some(name) = entry.name.to_str().filter(|n| n.starts_with(REMOVING)) {
            share::delete_tree(home, &volume.join(name)).await?;
        }
    }
    if *record != entry.record {
        home.write(&volume.join(layout::RECORD), &record.to_json())
            .await?;
    }
    match home.rename(&volume, &layout::volume(&record.name)).await {
        Ok(()) => {}
        Err(error) => match share::read(home, &record.name).await? {
            Some(there) if there.id == record.id => {}
            Some(_) => return Err(CatalogError::NameTaken(record.name.clone())),
            None => return Err(error.into()),
        },
    }
    Ok(())
}

/// Removes what is left of an entry that was restored.
pub(super) async fn clear(admin: &Admin, entry: &TrashEntry) {
    let path = layout::trash().join(&entry.entry);
    if let Err(error) = admin.remove_dir(&path).await
        && !matches!(error.kind, AdminErrorKind::NotFound)
    {
        tracing::warn!(entry = entry.entry, %error, "restored, but its trash entry stays");
    }
}

/// Deletes an entry for good. A crash on the way leaves the rest to [`sweep`].
pub(super) async fn purge(admin: &Admin, entry: &str) -> Result<(), CatalogError> {
    let aside = layout::tmp().join(&format!("{PURGE_PREFIX}{entry}"));
    match admin.rename(&layout::trash().join(entry), &aside).await {
        Err(error) if !matches!(error.kind, AdminErrorKind::NotFound) => return Err(error.into()),
        _ => {}
    }
    fail::fail_point!("purge.renamed", |_| crate::failpoint::die());
    share::delete_tree(admin, &aside).await?;
    Ok(())
}

/// Deletes what crashes left in `tmp/`. `unplaced` says whether `tmp/<id>.data` still waits to be
/// put in place. Returns how many entries were removed.
pub(super) async fn sweep(
    admin: &Admin,
    unplaced: impl Fn(&str) -> bool,
) -> Result<usize, CatalogError> {
    let now = now(admin).await?;
    let mut swept = 0;
    for entry in admin.list(&layout::tmp()).await?.unwrap_or_default() {
        let Some(name) = entry.name.to_str() else {
            continue;
        };
        let path: SharePath = layout::tmp().join(name);
        let attr = match entry.attr {
            Some(attr) => Some(attr),
            None => admin.attr(&path).await?,
        };
        let Some(attr) = attr else { continue };
        let old = now.saturating_sub(attr.mtime.secs) > LEFT_OVER.as_secs();
        let waiting = name.strip_suffix(".data").is_some_and(&unplaced);
        if old && !waiting {
            share::delete_tree(admin, &path).await?;
            swept += 1;
        }
    }
    Ok(swept)
}
