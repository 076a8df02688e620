//! Answers to nfsvol's own command line.

use serde_json::{Value, json};

use super::{Driver, DriverError};
use crate::catalog::{Catalog, CatalogError, Known, TrashEntry};
use crate::nfs::admin::Admin;
use crate::plugin::{Ask, Purge};
use crate::volume::{DataPath, VolumeName};

impl Driver {
    pub(super) async fn answer(&self, question: Ask) -> Result<Value, DriverError> {
        match question {
            Ask::Ls => {
                self.look_soon().await;
                let records = self.catalog.list();
                Ok(records
                    .iter()
                    .map(|record| self.volume_line(record))
                    .collect())
            }
            Ask::Inspect { name } => self.inspect(&name.parse()?).await,
            Ask::Status => Ok(self.daemon_status()),
            Ask::TrashLs => {
                let home = self.trash_share().await?;
                Ok(json!(self.catalog.trash(&home).await?))
            }
            Ask::Restore { name, rename } => {
                let rename = rename.map(|r| r.parse::<VolumeName>()).transpose()?;
                self.restore(&name, rename).await
            }
            Ask::TrashPurge(purge) => self.purge(purge).await,
            Ask::Abort { name } => self.abort(&name.parse()?).await,
            Ask::Adopt(adoption) => self.adopt(adoption).await,
        }
    }

    async fn inspect(&self, name: &VolumeName) -> Result<Value, DriverError> {
        self.look_soon().await;
        match self.look_up(name).await {
            Known::Here(record) => Ok(json!({
                "name": record.name,
                "created": record.created,
                "mountpoint": self.mountpoint(name),
                "status": self.volume_status(&record).await,
            })),
            Known::Absent => Err(CatalogError::Absent(name.clone()).into()),
            Known::Unknown => {
                self.home().await?;
                Err(CatalogError::Absent(name.clone()).into())
            }
        }
    }

    /// Frees everybody who waits for a volume whose server is away.
    async fn abort(&self, name: &VolumeName) -> Result<Value, DriverError> {
        let held = self.attachments.get(name);
        let by_kernel = held.is_some_and(|held| held.how.data_path == DataPath::Kernel);
        if by_kernel && !self.paths.is_own(name) {
            return Err(DriverError::AbortByKernel(name.clone()));
        }
        self.paths.abort(name).await?;
        Ok(json!({ "aborted": name }))
    }

    async fn trash_share(&self) -> Result<Admin, DriverError> {
        self.home()
            .await?
            .ok_or_else(|| CatalogError::NoHome("the trash").into())
    }

    async fn restore(
        &self,
        wanted: &str,
        rename: Option<VolumeName>,
    ) -> Result<Value, DriverError> {
        let home = self.trash_share().await?;
        let entry = self.catalog.find_in_trash(&home, wanted).await?;
        let name = rename.as_ref().unwrap_or(&entry.name);
        let _lock = self.locks.lock(name).await;
        let on = self.data_admin(&entry.record.options).await?;
        let record = self
            .catalog
            .restore(&home, &on, &entry, rename.as_ref())
            .await?;
        self.watch.trash_changed();
        Ok(json!({ "name": record.name, "entry": entry.entry, "removed": entry.removed }))
    }

    async fn purge(&self, purge: Purge) -> Result<Value, DriverError> {
        let home = self.trash_share().await?;
        let entries: Vec<TrashEntry> = match purge {
            Purge::All => self.catalog.trash(&home).await?,
            Purge::Name(name) => {
                let newest = self.catalog.find_in_trash(&home, &name).await?;
                let mut entries = self.catalog.trash(&home).await?;
                entries
                    .retain(|e| e.entry == name || (newest.entry != name && e.name == newest.name));
                entries
            }
        };
        for entry in &entries {
            let on = self.data_admin(&entry.record.options).await?;
            if on.share() != home.share() {
                Catalog::purge(&on, &entry.entry).await?;
            }
            Catalog::purge(&home, &entry.entry).await?;
        }
        self.watch.trash_changed();
        Ok(json!({ "purged": entries.iter().map(|e| &e.entry).collect::<Vec<_>>() }))
    }
}
