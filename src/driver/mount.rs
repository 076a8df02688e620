//! Mount and Unmount.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::{Driver, DriverError};
use crate::home::Catalog;
use crate::host::HostError;
use crate::kernel::MountError;
use crate::mutant::{self, Mutant};
use crate::volume::{Access, DataPath, Record, Right, VolumeName};
use nfs::address::Share;
use nfs::admin::Admin;

/// How long before its deadline a Mount stops trying, so that its own error is the answer.
const MARGIN: Duration = Duration::from_secs(2);
/// Pauses between the tries of a Mount whose share does not answer: from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LAST_PAUSE: Duration = Duration::from_secs(2);
/// How long a Mount waits for the home share's word on a volume whose data is on another share.
pub(super) const HOME_WAIT: Duration = Duration::from_millis(250);

impl Driver {
    pub(super) async fn mount_volume(
        &self,
        name: &VolumeName,
        id: &str,
        deadline: Instant,
    ) -> Result<PathBuf, DriverError> {
        if id.is_empty() {
            return Err(DriverError::NoId);
        }
        let last_try = deadline.checked_sub(MARGIN).unwrap_or(deadline);
        let _lock = self.host.lock(name).await;
        let mut pause = FIRST_PAUSE;
        let mut before = None;
        loop {
            let tried = self.try_mount(name, id, last_try);
            let tried = tokio::time::timeout_at((last_try + MARGIN / 2).into(), tried).await;
            let error = match tried {
                // The share fell silent in the middle of the last try, perhaps after the claim.
                Err(_) => {
                    self.membership.tell_soon();
                    return Err(before.unwrap_or_else(|| DriverError::Late(name.clone())));
                }
                Ok(Err(error)) => error,
                Ok(Ok(mountpoint)) => {
                    self.fresh
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .remove(name);
                    return Ok(mountpoint);
                }
            };
            if !error.is_transient() || Instant::now() + pause >= last_try {
                return Err(error);
            }
            tracing::warn!(volume = %name, %error, "mount failed; trying again until the deadline");
            before = Some(error);
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    #[tracing::instrument(level = "debug", skip_all)]
    async fn try_mount(
        &self,
        name: &VolumeName,
        id: &str,
        deadline: Instant,
    ) -> Result<PathBuf, DriverError> {
        let record = self.find(name).await?;
        let record = record.ok_or_else(|| DriverError::Absent(name.clone()))?;
        let share = self.catalog.share_of(&record.options)?.clone();
        let (record, home) = self.current(record, &share).await?;
        // Whoever made the record: its host may allow more than this one.
        self.check_allowed(&record.options, &record.data_dir)?;
        let share = self.catalog.share_of(&record.options)?.clone();
        let fence = self
            .membership
            .hold(home.as_ref(), &record, deadline)
            .await?;
        let mountpoint = self.mount_held(&record, &share, id, fence, deadline).await;
        if mountpoint.is_err() {
            self.membership.let_go(name).await;
        }
        self.membership.tell_soon();
        mountpoint
    }

    /// Mounts a volume that the other hosts know this one to hold.
    async fn mount_held(
        &self,
        record: &Record,
        share: &Share,
        id: &str,
        fence: Option<Right>,
        deadline: Instant,
    ) -> Result<PathBuf, DriverError> {
        let name = &record.name;
        let contact = self.shares.contact(share, &record.options);
        let reached = contact.reach().await?;
        let on = self.shares.admin(&contact).await?;
        // The kernel looks for the data directory anyway, and says whether it is there.
        if self.host.paths().choose_for(&record.options)?.path == DataPath::Fuse {
            Catalog::ready(&on, record).await?;
        }
        fail::fail_point!("mount.ready", |_| crate::failpoint::die());
        let options = self.shares.mount_options(&record.options);
        let attach = || {
            let options = options.clone();
            let paths = self.host.paths();
            paths.attach(record, share, &reached, options, fence, deadline)
        };
        let attached = match attach().await {
            Err(HostError::Mount(MountError::DataDirMissing { .. })) => {
                Catalog::ready(&on, record).await?;
                attach().await
            }
            // The server has changed its mind since it was reached: asked again, it says why.
            Err(refused @ HostError::Mount(MountError::Refused { .. })) => {
                Catalog::ready(&on, record).await?;
                Err(refused)
            }
            attached => attached,
        };
        let how = attached.inspect_err(|_| contact.doubt())?;
        if fence.is_some() && how.data_path == DataPath::Fuse {
            self.membership.prolong_one(name).await;
        }
        if let Some(fence) = fence.filter(|_| how.data_path == DataPath::Kernel)
            && let Err(error) = self.membership.guard(name, fence).await
        {
            self.host.paths().detach(name, Duration::ZERO).await?;
            return Err(error);
        }
        fail::fail_point!("mount.attached", |_| crate::failpoint::die());
        let mountpoint = how.mountpoint.clone();
        if let Err(source) = self.host.attachments().add(name, how.clone(), id) {
            if self.host.attachments().get(name).is_none() {
                self.host.paths().detach(name, Duration::ZERO).await?;
            }
            return Err(HostError::state("writing the attachment")(source).into());
        }
        fail::fail_point!("mount.written", |_| crate::failpoint::die());
        Ok(mountpoint)
    }

    /// The record as the home share has it now. A volume whose data is on another share is not
    /// held up by the home share's troubles, unless it is exclusive: only its word that the volume
    /// is gone counts.
    #[tracing::instrument(level = "debug", skip_all)]
    pub(super) async fn current(
        &self,
        record: Arc<Record>,
        share: &Share,
    ) -> Result<(Arc<Record>, Option<Admin>), DriverError> {
        let Some(contact) = self.shares.home_contact() else {
            return Ok((record, None));
        };
        let name = record.name.clone();
        let fetch = async {
            let home = self.shares.admin(&contact).await?.scoped();
            Ok::<_, DriverError>((self.catalog.revalidate(&home, &name).await?, home))
        };
        // The right to an exclusive volume is on the home share, so its Mount waits for that one.
        let is_exclusive = record.options.access == Access::Exclusive;
        let waits = (is_exclusive && !mutant::is_on(Mutant::ExclusiveWaitsNoLonger))
            || *share == contact.share;
        let fetched = if waits {
            fetch.await
        } else if contact.is_down() {
            return Ok((record, None));
        } else {
            match tokio::time::timeout(HOME_WAIT, fetch).await {
                Ok(Ok(fetched)) => Ok(fetched),
                // Asked again when it has answered a poll: one Mount waits for it, not each.
                Ok(Err(_)) | Err(_) => {
                    contact.heard(false);
                    return Ok((record, None));
                }
            }
        };
        match fetched? {
            (Some(record), home) => Ok((record, Some(home))),
            (None, _) => Err(DriverError::Absent(name)),
        }
    }

    pub(super) async fn unmount_volume(
        &self,
        name: &VolumeName,
        id: &str,
    ) -> Result<(), DriverError> {
        let _lock = self.host.lock(name).await;
        let Some(held) = self.host.attachments().get(name) else {
            return Ok(());
        };
        let last = held.attachments.iter().filter(|a| a.id != id).count() == 0
            && held.attachments.len() == 1;
        // Unmounted first: after a crash in between, the attachment is still there to be let go.
        if last {
            let detached = self.host.detach(name).await;
            if detached.is_err() && !mutant::is_on(Mutant::FailedUnmountStays) {
                // Docker does not ask again; `settle` and `reconcile` do.
                self.host.attachments().remove(name, id);
                self.membership.tell_soon();
            }
            detached?;
            fail::fail_point!("unmount.detached", |_| crate::failpoint::die());
        }
        self.host.attachments().remove(name, id);
        fail::fail_point!("unmount.forgotten", |_| crate::failpoint::die());
        if last {
            self.membership.let_go(name).await;
        }
        self.membership.tell_soon();
        Ok(())
    }
}
