//! `nfsvol repair`.

use super::{Driver, DriverError};
use crate::api::daemon::RepairOutcome;
use crate::api::{Repair, Repaired};
use crate::home::CatalogError;
use crate::volume::VolumeName;
use nfs::admin::Admin;

impl Driver {
    /// Puts back what is torn on the home share, or says what would be (`dry_run`): a line for each.
    pub(super) async fn repair(
        &self,
        Repair { name, dry_run }: Repair,
    ) -> Result<Vec<Repaired>, DriverError> {
        let only = name.map(|name| name.parse::<VolumeName>()).transpose()?;
        let home = self.shares.home().await?;
        let home = home.ok_or(CatalogError::NoHome("what is to be repaired"))?;
        let mut lines = Vec::new();
        match self.catalog.repair_format(&home, dry_run).await {
            Ok(false) => {}
            Ok(true) => lines.push(line("format.json", dry_run, Ok(()))),
            Err(refused @ CatalogError::Unproven(_)) => {
                lines.push(line("format.json", dry_run, Err(refused.into())));
                // Without it nothing says which share this is.
                return Ok(lines);
            }
            Err(error) => return Err(error.into()),
        }
        for (name, _) in self.catalog.torn(&home, only.as_ref()).await? {
            let done = self.put_back(&home, &name, dry_run).await;
            lines.push(line(&format!("volume {name}"), dry_run, done));
        }
        Ok(lines)
    }

    async fn put_back(
        &self,
        home: &Admin,
        name: &VolumeName,
        dry_run: bool,
    ) -> Result<(), DriverError> {
        let _lock = self.host.lock(name).await;
        let on = match self.catalog.get(name).filter(|known| known.made.is_some()) {
            Some(known) => self.shares.data(&known.options).await?,
            None => home.clone(),
        };
        Ok(self.catalog.put_back(home, &on, name, dry_run).await?)
    }
}

fn line(what: &str, dry_run: bool, done: Result<(), DriverError>) -> Repaired {
    Repaired {
        what: what.to_owned(),
        outcome: match &done {
            Err(_) => RepairOutcome::Refused,
            Ok(()) if dry_run => RepairOutcome::Possible,
            Ok(()) => RepairOutcome::Done,
        },
        reason: done.err().map(|error| error.to_string()),
    }
}
