//! Making volumes of directories that are there, with the data that they hold.
//!
//! Invariants: nothing is made but the record, and the directory counts as found, so no Remove ever
//! moves or deletes it.

use std::sync::Arc;

use super::create::Source;
use super::{Catalog, CatalogError, Creation, data, share};
use crate::layout;
use crate::volume::record::FORMAT;
use crate::volume::{OnRemove, Record, VolumeName, VolumeOptions};
use nfs::admin::Admin;

/// What became of a directory.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Adopted {
    /// A volume was made of it. `None`: nothing keeps one from being made.
    New(Option<Arc<Record>>),
    /// It is that volume's directory already.
    Existing(Arc<Record>),
}

impl Catalog {
    /// Makes a volume of the directory that `options` name, or finds it made, whatever its other
    /// options are. With `dry_run` it only looks.
    ///
    /// # Errors
    /// [`CatalogError::NoDirectory`], [`CatalogError::Different`] when the name belongs to another
    /// directory, [`CatalogError::Overlap`] unless `overlap` allows it, and what the share answered.
    /// Nothing was made then.
    pub(crate) async fn adopt(
        &self,
        home: Option<&Admin>,
        on: &Admin,
        name: &VolumeName,
        options: &VolumeOptions,
        default_on_remove: OnRemove,
        (overlap, dry_run): (bool, bool),
    ) -> Result<Adopted, CatalogError> {
        let existing = match home {
            Some(home) => self.fetch(home, name).await?,
            None => self.get(name),
        };
        let draft = Record {
            format: FORMAT,
            name: name.clone(),
            id: String::new(),
            created: layout::rfc3339(0),
            created_by: self.host.clone(),
            options: options.clone(),
            data_dir: options.data_dir(name)?,
            on_remove: default_on_remove,
            made: None,
            squashed: false,
            recreated: None,
        };
        let removing = match (home, &existing) {
            (Some(home), Some(record)) => share::removal(home, record).await?.is_some(),
            _ => false,
        };
        if let Some(record) = existing.filter(|_| !removing) {
            let place =
                |record: &Record| (record.share(self.home()).cloned(), record.data_dir.clone());
            if place(&record) == place(&draft) {
                return Ok(Adopted::Existing(record));
            }
            return Err(CatalogError::Different {
                name: name.clone(),
                differences: record.options.differences(options),
                created_by: record.created_by.clone(),
                created: record.created.clone(),
            });
        }
        if !overlap && let Some(other) = self.overlapping(&draft).await.first() {
            return Err(CatalogError::Overlap {
                path: draft.data_dir,
                other: other.name.clone(),
                other_path: other.data_dir.clone(),
            });
        }
        if dry_run {
            return match data::exists(on, &draft.data_dir).await? {
                true => Ok(Adopted::New(None)),
                false => Err(data::absent(on, name, &draft.data_dir)),
            };
        }
        let made = self.create_from(home, on, name, options, default_on_remove, Source::Find);
        Ok(match made.await? {
            Creation::New(record) => Adopted::New(Some(record)),
            Creation::Existing(record) | Creation::Recreated(record) => Adopted::Existing(record),
        })
    }
}
