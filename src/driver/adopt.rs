//! `nfsvol adopt` and `nfsvol migrate`: volumes of directories that are there.

use super::{Driver, DriverError};
use crate::api::Adopt;
use crate::api::volumes::{AdoptOutcome, Adopted};
use crate::home;
use crate::volume::{VolumeName, VolumeOptions};

impl Driver {
    /// Makes the volume, or finds it made.
    pub(super) async fn adopt(&self, ask: Adopt) -> Result<Adopted, DriverError> {
        let name: VolumeName = ask.name.parse()?;
        let options = VolumeOptions::parse(&ask.opts)?;
        self.check_options(&name, &options)?;
        let _lock = self.host.lock(&name).await;
        let home = self.shares.home().await?;
        if let Some(home) = &home {
            // Other hosts may have made volumes of the same directories.
            self.catalog.catch_up(home).await?;
        }
        let on = self.shares.data(&options).await?;
        let default = self.config.on_remove;
        let how = (ask.overlap, ask.dry_run);
        let adopted = self
            .catalog
            .adopt(home.as_ref(), &on, &name, &options, default, how)
            .await?;
        let (outcome, differences) = match &adopted {
            home::Adopted::New(None) => (AdoptOutcome::Possible, Vec::new()),
            home::Adopted::New(Some(_)) => (AdoptOutcome::Made, Vec::new()),
            home::Adopted::Existing(record) => {
                (AdoptOutcome::Exists, record.options.differences(&options))
            }
        };
        Ok(Adopted {
            share: on.share().clone(),
            data_dir: options.data_dir(&name)?,
            name,
            outcome,
            differences,
        })
    }
}
