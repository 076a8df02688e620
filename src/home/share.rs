//! The catalog's directories on the home share.
//!
//! Invariants: a volume appears and disappears by one RENAME of its whole directory, so nobody
//! ever sees a half-made record; who won a race is decided by the `id` in the record, so a lost
//! reply never makes the winner think that it lost.

use super::error::CatalogError;
use super::local::Stamp;
use crate::cluster::removal::{self as mark, Bound};
use crate::layout::{self, FORMAT, Format, README, RECORD, REMOVING, TrashName};
use crate::mutant::{self, Mutant};
use crate::volume::{MAX_RECORD, Record, RecordError, VolumeName, json};
use nfs::address::SharePath;
use nfs::admin::{Admin, AdminError, AdminErrorKind, Attr, Kind};

/// Directories of the catalog: readable by everybody, since the records hold no secrets.
const DIR_MODE: u32 = 0o755;

/// Whether a record became the volume's.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Published {
    Won,
    Lost,
}

/// Makes `.nfsvol/` complete, for a share that is about to hold something of ours.
pub(super) async fn ensure(admin: &Admin) -> Result<(), CatalogError> {
    init(admin).await?;
    // Never `volumes/`: its absence would mean that all records are lost.
    for dir in [layout::tmp(), layout::trash()] {
        admin.mkdir(&dir, DIR_MODE).await?;
    }
    Ok(())
}

/// Makes `.nfsvol/` where it is absent, and returns the share's id.
pub(super) async fn init(admin: &Admin) -> Result<String, CatalogError> {
    if let Some(id) = share_id(admin).await? {
        return Ok(id);
    }
    let id = layout::random_id().map_err(CatalogError::state("random bytes"))?;
    // Prepared aside and renamed: of two hosts that come first, one wins and both use its id.
    let new = layout::own_aside(&id);
    let prepared = prepare(admin, &new, id).await;
    fail::fail_point!("home.aside", |_| crate::failpoint::die());
    let made = match prepared {
        Ok(()) => admin.rename(&new, &layout::own()).await,
        Err(error) => Err(error),
    };
    fail::fail_point!("home.made", |_| crate::failpoint::die());
    if made.is_ok() {
        sweep_aside(admin).await;
    } else {
        discard(admin, &new).await;
    }
    match (share_id(admin).await?, made) {
        (Some(id), _) => Ok(id),
        (None, Err(error)) => Err(error.into()),
        (None, Ok(())) => Err(foreign(admin, "it vanished as soon as it was made")),
    }
}

/// Makes what is to become `.nfsvol/`.
async fn prepare(admin: &Admin, new: &SharePath, id: String) -> Result<(), AdminError> {
    admin.mkdir(new, DIR_MODE).await?;
    for dir in ["volumes", "hosts", "trash", "tmp"] {
        admin.mkdir(&new.join(dir), DIR_MODE).await?;
    }
    admin
        .create_new(&new.join("README"), README.as_bytes())
        .await?;
    let format = Format {
        format: FORMAT,
        share_id: id,
    };
    admin
        .create_new(&new.join("format.json"), &json(&format))
        .await?;
    Ok(())
}

/// Deletes what others prepared to become `.nfsvol/`: a crash left it, or its host finds now that
/// it came second.
async fn sweep_aside(admin: &Admin) {
    let entries = admin.list(&SharePath::root()).await.unwrap_or_default();
    for entry in entries.unwrap_or_default() {
        if let Some(aside) = entry.name.to_str().and_then(layout::as_own_aside) {
            discard(admin, &aside).await;
        }
    }
}

/// The id in `.nfsvol/format.json`; `None` when there is no `.nfsvol/`.
pub(super) async fn share_id(admin: &Admin) -> Result<Option<String>, CatalogError> {
    let file = layout::format_file();
    let json = match admin.read(&file, MAX_RECORD).await? {
        Some(json) => json,
        None if admin.attr(&layout::own()).await?.is_none() => return Ok(None),
        // Another host may have put `.nfsvol/` there, whole, between the two looks.
        None => admin
            .read(&file, MAX_RECORD)
            .await?
            .ok_or_else(|| foreign(admin, "it is missing although .nfsvol/ is there"))?,
    };
    let format: Format = serde_json::from_slice(&json).map_err(|source| CatalogError::Torn {
        share: admin.share().to_string(),
        source,
    })?;
    if format.format != FORMAT {
        let reason = format!(
            "format {} is unknown to this nfsvol; upgrade this host",
            format.format
        );
        return Err(foreign(admin, &reason));
    }
    Ok(Some(format.share_id))
}

fn foreign(admin: &Admin, reason: &str) -> CatalogError {
    CatalogError::Format {
        share: admin.share().to_string(),
        reason: reason.to_owned(),
    }
}

/// Puts the record of a new volume on the share.
pub(super) async fn publish(admin: &Admin, record: &Record) -> Result<Published, CatalogError> {
    let new = layout::tmp().join(&record.id);
    admin.mkdir(&new, DIR_MODE).await?;
    fail::fail_point!("create.drafted", |_| crate::failpoint::die());
    admin.draft(&new.join(RECORD), &record.to_json()).await?;
    fail::fail_point!("create.prepared", |_| crate::failpoint::die());
    let renamed = admin.rename(&new, &layout::volume(&record.name)).await;
    match renamed {
        Ok(()) => Ok(Published::Won),
        // The reply may have been lost after the server acted: the record tells.
        Err(error) => match read(admin, &record.name).await {
            Ok(Some(there)) if there.id == record.id => Ok(Published::Won),
            Ok(Some(_)) => {
                discard(admin, &new).await;
                Ok(Published::Lost)
            }
            _ if matches!(error.kind, AdminErrorKind::Exists) => {
                discard(admin, &new).await;
                Ok(Published::Lost)
            }
            _ => Err(error.into()),
        },
    }
}

/// Deletes a directory and all in it; a daemon that stops meanwhile leaves the rest to a sweep.
pub(super) async fn delete_tree(admin: &Admin, path: &SharePath) -> Result<(), AdminError> {
    admin.remove_tree(path, &|| true).await.map(drop)
}

/// Removes what was prepared in `tmp/`; what stays is swept later.
pub(super) async fn discard(admin: &Admin, path: &SharePath) {
    if let Err(error) = delete_tree(admin, path).await {
        tracing::warn!(%error, "left in tmp/ until it is swept");
    }
}

/// The record of a volume, from the share.
pub(super) async fn read(admin: &Admin, name: &VolumeName) -> Result<Option<Record>, CatalogError> {
    let Some(json) = admin.read(&layout::record_file(name), MAX_RECORD).await? else {
        return Ok(None);
    };
    let record = Record::from_json(name, &json).map_err(|source| CatalogError::Record {
        name: name.clone(),
        source,
    })?;
    Ok(Some(record))
}

/// Makes sure that a record is still its volume's.
///
/// # Errors
/// [`CatalogError::Absent`] when another volume has the name, or none.
pub(super) async fn check_same(admin: &Admin, record: &Record) -> Result<(), CatalogError> {
    match read(admin, &record.name).await? {
        Some(there) if there.id == record.id => Ok(()),
        _ => Err(CatalogError::Absent(record.name.clone())),
    }
}

/// As [`read`], of a volume that this host knows: what has a directory is not absent, with or
/// without a record in it.
pub(super) async fn read_known(
    admin: &Admin,
    name: &VolumeName,
) -> Result<Option<Record>, CatalogError> {
    for _ in 0..2 {
        let record = read(admin, name).await?;
        // It may have come between the two looks.
        if record.is_some() || admin.attr(&layout::volume(name)).await?.is_none() {
            return Ok(record);
        }
    }
    Err(CatalogError::Record {
        name: name.clone(),
        source: RecordError::Missing,
    })
}

/// Replaces the record of a volume that this host is still making, or that is torn.
pub(super) async fn rewrite(admin: &Admin, record: &Record) -> Result<(), CatalogError> {
    admin
        .write(&layout::record_file(&record.name), &record.to_json())
        .await?;
    Ok(())
}

/// The volume's trash entry when somebody has begun to remove it.
pub(super) async fn removal(
    admin: &Admin,
    record: &Record,
) -> Result<Option<TrashName>, AdminError> {
    removal_in(admin, &layout::volume(&record.name), record).await
}

/// The same of a volume whose directory of the catalog is this one now.
pub(super) async fn removal_in(
    admin: &Admin,
    dir: &SharePath,
    record: &Record,
) -> Result<Option<TrashName>, AdminError> {
    let marker = admin.attr(&dir.join(REMOVING)).await?;
    Ok(marker.map(|attr| TrashName::of(record, attr.mtime)))
}

/// Marks the volume as being removed, if it is not yet; any host may finish from here.
pub(super) async fn begin_removal(
    admin: &Admin,
    host: &str,
    record: &Record,
) -> Result<TrashName, CatalogError> {
    let name = &record.name;
    if let Some(entry) = removal(admin, record).await? {
        return Ok(entry);
    }
    let nonce = layout::random_id().map_err(CatalogError::state("random bytes"))?;
    let by = layout::remover(host, chance::host_time());
    mark::announce(admin, name, &nonce, &by).await?;
    // After the intent, which a volume that takes this one's place does not have.
    if !mutant::is_on(Mutant::MarkedUnseen)
        && let Err(error) = check_same(admin, record).await
    {
        mark::withdraw(admin, name, &nonce).await;
        return Err(error);
    }
    if mark::bind(admin, name, &nonce).await? == Bound::Withdrawn {
        return Err(CatalogError::Unsettled(name.clone()));
    }
    let entry = removal(admin, record).await?;
    entry.ok_or_else(|| CatalogError::Absent(name.clone()))
}

/// Takes the mark of a removal away from a volume that is to stay.
pub(super) async fn unmark(
    admin: &Admin,
    record: &Record,
    mark: &TrashName,
) -> Result<(), AdminError> {
    let (removing, aside) = (
        layout::removing(&record.name),
        layout::tmp().join(&format!("{}.unmarked", record.id)),
    );
    match admin.rename(&removing, &aside).await {
        Err(error) if matches!(error.kind, AdminErrorKind::NotFound) => return Ok(()),
        moved => moved?,
    }
    let moved = admin.attr(&aside).await?;
    match moved.is_some_and(|moved| TrashName::of(record, moved.mtime) == *mark) {
        true => discard(admin, &aside).await,
        // Removed and restored meanwhile, and being removed again.
        false => admin.rename(&aside, &removing).await?,
    }
    Ok(())
}

/// Fails where the directory of all records is away, as while a backup is put back: nothing is known of any
/// of them then.
pub(super) async fn has_volumes(admin: &Admin) -> Result<(), CatalogError> {
    match volumes_attr(admin).await? {
        Some(_) => Ok(()),
        None => Err(no_volumes(admin)),
    }
}

fn no_volumes(admin: &Admin) -> CatalogError {
    foreign(admin, "volumes/ is missing beside it")
}

/// The volumes on the share, with the stamps of their directories.
pub(super) async fn list(admin: &Admin) -> Result<Vec<(VolumeName, Stamp)>, CatalogError> {
    let Some(entries) = admin.list(&layout::volumes()).await? else {
        return Err(no_volumes(admin));
    };
    let mut volumes = Vec::with_capacity(entries.len());
    for entry in entries {
        let Some(name) = entry
            .name
            .to_str()
            .and_then(|n| n.parse::<VolumeName>().ok())
        else {
            continue;
        };
        let attr = match entry.attr {
            Some(attr) => attr,
            None => match admin.attr(&layout::volume(&name)).await? {
                Some(attr) => attr,
                None => continue,
            },
        };
        if attr.kind == Kind::Dir {
            volumes.push((name, Stamp::from(&attr)));
        }
    }
    Ok(volumes)
}

/// The attributes of `volumes/`, which change whenever a volume comes or goes.
pub(super) async fn volumes_attr(admin: &Admin) -> Result<Option<Attr>, AdminError> {
    admin.attr(&layout::volumes()).await
}
