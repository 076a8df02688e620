//! Create, and what this host refuses to make.

use std::sync::PoisonError;

use super::{Driver, DriverError};
use crate::fuse::FuseOptions;
use crate::home::{CatalogError, Creation};
use crate::host::HostError;
use crate::mutant::{self, Mutant};
use crate::volume::options::is_own_dir;
use crate::volume::{Access, DataPath, VolumeName, VolumeOptions};
use nfs::address::SharePath;

impl Driver {
    /// Whether a volume with these options may be made and mounted on this host.
    pub(super) fn check_allowed(
        &self,
        options: &VolumeOptions,
        data_dir: &SharePath,
    ) -> Result<(), DriverError> {
        let share = self.catalog.share_of(options)?;
        if !self.config.allows(share) {
            return Err(DriverError::NotAllowed(share.clone()));
        }
        let refused = options.mount.as_ref();
        if let Some(word) = refused.and_then(|mount| self.config.refused_option(mount)) {
            return Err(DriverError::OptionNotAllowed(word));
        }
        // By whatever name of its server, and by whatever export and path.
        let parts = share.export().split('/').chain(data_dir.components());
        match parts.into_iter().any(is_own_dir) {
            true => Err(DriverError::OwnDirectory(share.clone(), data_dir.clone())),
            false => Ok(()),
        }
    }

    /// Refuses options before any server is asked: they would be refused at every Mount, here at least.
    pub(super) fn check_options(
        &self,
        name: &VolumeName,
        options: &VolumeOptions,
    ) -> Result<(), DriverError> {
        self.check_allowed(options, &options.data_dir(name)?)?;
        if options.access == Access::Exclusive && self.config.share.is_none() {
            return Err(CatalogError::NoHome("access=exclusive").into());
        }
        let paths = self.host.paths();
        let exclusive = options.access == Access::Exclusive
            && paths.asked(options.data_path) != DataPath::Kernel;
        let here = paths.choose_for(options);
        let by_fuse = here.is_ok_and(|choice| choice.path == DataPath::Fuse);
        if options.data_path == DataPath::Fuse || exclusive || by_fuse {
            let words = self.shares.mount_options(options);
            FuseOptions::of(&words).map_err(HostError::FuseOptions)?;
        }
        Ok(())
    }

    pub(super) async fn create_volume(
        &self,
        name: &VolumeName,
        options: VolumeOptions,
    ) -> Result<Creation, DriverError> {
        self.check_options(name, &options)?;
        let _lock = self.host.lock(name).await;
        let home = self.shares.scoped_home().await?;
        let on = self.shares.scoped_data(home.as_ref(), &options).await?;
        let default = self.config.on_remove;
        let made = self.membership.together();
        let made = made.make(home.as_ref(), &on, name, &options, default);
        let creation = made.await?;
        fail::fail_point!("create.kept", |_| crate::failpoint::die());
        if matches!(creation, Creation::Recreated(_)) {
            self.watch.trash_changed();
        }
        let mut fresh = self.fresh.lock().unwrap_or_else(PoisonError::into_inner);
        match &creation {
            Creation::Recreated(record) if mutant::is_on(Mutant::RecreatesAreUndone) => {
                fresh.insert(name.clone(), record.id.clone())
            }
            Creation::New(record) => fresh.insert(name.clone(), record.id.clone()),
            Creation::Existing(_) | Creation::Recreated(_) => fresh.remove(name),
        };
        Ok(creation)
    }

    pub(super) async fn take_back(&self, name: &VolumeName) {
        let _lock = self.host.lock(name).await;
        let id = self
            .fresh
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(name);
        let Some(record) = self
            .catalog
            .get(name)
            .filter(|r| Some(&r.id) == id.as_ref())
        else {
            return;
        };
        match (
            self.shares.home().await,
            self.shares.data(&record.options).await,
        ) {
            (Ok(home), Ok(on)) => {
                self.membership
                    .together()
                    .undo(home.as_ref(), &on, &record)
                    .await
            }
            (Err(error), _) | (_, Err(error)) => {
                tracing::warn!(volume = %name, %error, "a Create nobody heard of could not be undone");
            }
        }
    }
}
