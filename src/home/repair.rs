//! `nfsvol repair`: what a server's power failure has torn is put back from this host's copy.
//!
//! Invariants: nothing is written that this host cannot prove. A record goes back only into the very
//! directory of the catalog that it was read from, and not if its data or its entry in the trash
//! says that the volume was removed. `format.json` goes back only on a share on which something else
//! shows that it is the one that this host knows.
//!
//! Known limits: a host knows what it has read. A record that no host has a copy of is not made up,
//! nor is one whose whole directory is gone: that looks as if the volume had been removed. Of a
//! volume that was made or restored since its last poll a host does not know the directory.

use super::{Catalog, CatalogError, share, trash};
use crate::layout::{self, FORMAT, Format, claims};
use crate::volume::{Record, VolumeName, json};
use nfs::admin::Admin;

/// Records that are read at once.
const READS_AT_ONCE: usize = 8;

fn unproven(reason: &str) -> CatalogError {
    CatalogError::Unproven(reason.to_owned())
}

impl Catalog {
    /// Puts `format.json` back where it is torn; whether it is. With `dry` nothing is written.
    ///
    /// # Errors
    /// [`CatalogError::Unproven`] where this may be another share than the one that this host knows.
    pub(crate) async fn repair_format(
        &self,
        home: &Admin,
        dry: bool,
    ) -> Result<bool, CatalogError> {
        match share::share_id(home).await {
            Err(CatalogError::Torn { .. }) => {}
            Err(error) => return Err(error),
            Ok(None) => return Err(CatalogError::NoCatalog(home.share().to_string())),
            Ok(Some(_)) => return self.verify(home).await.map(|()| false),
        }
        let known = self.sync.lock().await.known_share();
        let share_id = known.ok_or_else(|| unproven("this host has never known the share's id"))?;
        if !self.knows_share(home).await? {
            return Err(unproven(
                "no volume of this host's copy is there, so it may be another share",
            ));
        }
        if !dry {
            let format = Format {
                format: FORMAT,
                share_id,
            };
            home.write(&layout::format_file(), &json(&format)).await?;
            tracing::warn!(share = %home.share(), "format.json put back");
        }
        Ok(true)
    }

    /// Whether something beside its id says that a share is the one that the copy is of.
    async fn knows_share(&self, home: &Admin) -> Result<bool, CatalogError> {
        let listed = share::list(home).await?;
        for (name, _) in &listed {
            if let Some(known) = self.copies.get(name)
                && let Ok(Some(there)) = share::read(home, name).await
                && there.id == known.record.id
            {
                return Ok(true);
            }
        }
        let own = layout::host_dir(&layout::host_name(&self.host));
        let nothing_to_confuse = listed.is_empty() && self.copies.len() == 0;
        Ok(nothing_to_confuse && home.attr(&own).await?.is_some())
    }

    /// The volumes whose record on the share cannot be read, of all or of one, and why.
    ///
    /// # Errors
    /// What the share answered.
    pub(crate) async fn torn(
        &self,
        home: &Admin,
        only: Option<&VolumeName>,
    ) -> Result<Vec<(VolumeName, CatalogError)>, CatalogError> {
        let listed = share::list(home).await?.into_iter().map(|(name, _)| name);
        let names: Vec<_> = listed
            .filter(|name| only.is_none_or(|only| only == name))
            .collect();
        if let Some(only) = only.filter(|_| names.is_empty()) {
            return Err(CatalogError::Absent(only.clone()));
        }
        let mut torn = Vec::new();
        for some in names.chunks(READS_AT_ONCE) {
            let mut reads = tokio::task::JoinSet::new();
            for name in some.iter().cloned() {
                let home = home.clone();
                reads.spawn(async move { (share::read_known(&home, &name).await, name) });
            }
            while let Some(read) = reads.join_next().await {
                match read {
                    Ok((Err(error @ CatalogError::Record { .. }), name)) => {
                        torn.push((name, error))
                    }
                    Ok((Err(error), _)) => return Err(error),
                    Ok((Ok(_), _)) | Err(_) => {}
                }
            }
        }
        torn.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(torn)
    }

    /// Puts the torn record of a volume back, on a share that [`Self::repair_format`] has seen to. `on`
    /// is the share of its data. With `dry` it is only looked whether that can be done.
    ///
    /// # Errors
    /// [`CatalogError::Unproven`] where it may have been another volume's record.
    pub(crate) async fn put_back(
        &self,
        home: &Admin,
        on: &Admin,
        name: &VolumeName,
        dry: bool,
    ) -> Result<(), CatalogError> {
        match share::read_known(home, name).await {
            Err(CatalogError::Record { source, .. }) if source.is_damage() => {}
            Err(error) => return Err(error),
            // Another host was faster.
            Ok(_) => return Ok(()),
        }
        let record = self.to_put_back(home, on, name).await?;
        if !dry {
            share::rewrite(home, &record).await?;
            self.sync.lock().await.note(name, &Ok(Some(record)));
            tracing::warn!(volume = %name, "its record is put back from this host's copy");
        }
        Ok(())
    }

    async fn to_put_back(
        &self,
        home: &Admin,
        on: &Admin,
        name: &VolumeName,
    ) -> Result<Record, CatalogError> {
        let known = self.copies.get(name);
        let copy =
            known.ok_or_else(|| unproven("this host has no copy of it; try another host"))?;
        let record = copy.record.as_ref();
        let volume = home.attr(&layout::volume(name)).await?;
        let volume = volume.ok_or_else(|| CatalogError::Absent(name.clone()))?;
        let is_read_from = copy
            .stamp
            .is_some_and(|stamp| stamp.fileid() == volume.fileid);
        if !is_read_from && home.attr(&claims(name, &record.id)).await?.is_none() {
            return Err(unproven(
                "its directory in .nfsvol/volumes is another one than this host has read: the \
                 volume was removed and made anew",
            ));
        }
        // A removal that has begun goes on with the record; it may have moved the data already.
        if share::removal(home, record).await?.is_some() {
            return Ok(record.clone());
        }
        let is_removed = |entry: &layout::TrashName| {
            entry.volume == *name && record.id.starts_with(&entry.random)
        };
        if trash::entry_names(home).await?.iter().any(is_removed) {
            return Err(unproven("the trash says that this host's copy was removed"));
        }
        if let Some(made) = record.made {
            let data = on.attr(&record.data_dir).await?;
            if data.is_none_or(|data| data.fileid != made) {
                return Err(unproven(
                    "its data directory is not the one that this host's copy is of",
                ));
            }
        }
        Ok(record.clone())
    }
}
