//! `nfsvol adopt` and `nfsvol migrate`: volumes of directories that are there.

use serde_json::{Value, json};

use super::{Driver, DriverError};
use crate::docker::Adoption;
use crate::home::Adopted;
use crate::volume::{VolumeName, VolumeOptions};

impl Driver {
    /// Makes the volume; the answer says whether it was there (`outcome`), and in which options it
    /// differs from those that were asked for then.
    pub(super) async fn adopt(&self, adoption: Adoption) -> Result<Value, DriverError> {
        let name: VolumeName = adoption.name.parse()?;
        let options = VolumeOptions::parse(&adoption.opts)?;
        self.check_options(&name, &options)?;
        let _lock = self.locks.lock(&name).await;
        let home = self.home().await?;
        if let Some(home) = &home {
            // Other hosts may have made volumes of the same directories.
            self.catalog.catch_up(home).await?;
        }
        let on = self.data_admin(&options).await?;
        let default = self.config.on_remove;
        let how = (adoption.overlap, adoption.dry_run);
        let adopted = self
            .catalog
            .adopt(home.as_ref(), &on, &name, &options, default, how)
            .await?;
        let (outcome, differences) = match &adopted {
            Adopted::New(None) => ("possible", Vec::new()),
            Adopted::New(Some(_)) => ("made", Vec::new()),
            Adopted::Existing(record) => ("exists", record.options.differences(&options)),
        };
        Ok(json!({
            "name": name,
            "share": on.share(),
            "data_dir": options.data_dir(&name)?,
            "outcome": outcome,
            "differences": differences,
        }))
    }
}
