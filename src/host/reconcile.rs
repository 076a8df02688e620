//! What the kernel's mount namespaces show, against what was written down.
//!
//! Docker's Mount and Unmount calls do not balance: a dockerd that was killed sends no Unmount,
//! and Mount again with the same ID (docs/DESIGN.md, "On each host"). So attachments of an earlier
//! engine that no process holds are dropped; one that a process holds is never dropped, and a
//! volume that a process holds is never removed.

use std::io;
use std::time::Duration;

use super::Host;
use super::attachments::Attachment;
use super::holders::START_GRACE;
use crate::kernel::MountedVolume;
use crate::mutant::{self, Mutant};
use crate::sys::holders;
use crate::volume::VolumeName;

/// How often attachments are compared with the kernel's mount namespaces.
pub(crate) const RECONCILE_EVERY: Duration = Duration::from_secs(60);
/// After the engine started, its old containers end within this time; then they are looked at.
const ENGINE_SETTLED: Duration = Duration::from_secs(25);
/// The ID of all mounts by Podman, which counts them itself. Each of its commands activates the
/// plugin, so that says nothing of an engine's start, and `podman volume mount` shows no process.
pub(crate) const PODMAN: &str = "2f73349cfc4630255319c6c8dfc1b46a8996ace9d14d8e07563b165915918ec2";

impl Host {
    /// Looks at once, and then whenever the engine has started or some time has passed.
    pub(crate) async fn keep_reconciled(&self, exists: impl Fn(&VolumeName) -> bool) {
        loop {
            self.reconcile(&exists).await;
            tokio::select! {
                () = tokio::time::sleep(RECONCILE_EVERY) => {}
                () = self.engine_started.notified() => {
                    tokio::time::sleep(ENGINE_SETTLED).await;
                }
            }
        }
    }

    /// Drops attachments that nothing stands behind, unmounts volumes without attachments, and
    /// forgets those that are gone.
    pub(crate) async fn reconcile(&self, exists: impl Fn(&VolumeName) -> bool) {
        let epoch = self.attachments.epoch();
        for (name, held) in self.attachments.all() {
            // Docker sends no Unmount for a volume that it was told is gone.
            let gone = !exists(&name);
            let is_podmans =
                |a: &Attachment| a.id == PODMAN && !mutant::is_on(Mutant::CommandsAreEngines);
            let earlier = |a: &Attachment| a.epoch != epoch && !is_podmans(a);
            let stale = |a: &Attachment| (gone || earlier(a)) && a.age() >= START_GRACE;
            if !held.attachments.iter().any(stale) {
                continue;
            }
            // A call for the volume is under way: it knows better, and this comes again.
            let Some(_lock) = self.try_lock(&name) else {
                continue;
            };
            let marks = vec![held.how.held];
            if !matches!(self.marked(&name, marks.clone()), Ok(found) if found.is_empty()) {
                continue;
            }
            // A copy by the engine, or a process that works in the volume by the host's own mount.
            let used = tokio::task::block_in_place(|| holders::in_use(&marks));
            if !matches!(used, Ok(false)) {
                continue;
            }
            let left = self.attachments.retain(&name, |a| !stale(a));
            tracing::info!(volume = %name, left, "attachments that nothing stands behind dropped");
            if left == 0 {
                self.unmount_unattached(&name).await;
            }
        }
        match self.paths.mounted() {
            Ok(mounted) => self.unmount_all_unattached(&mounted).await,
            Err(error) => tracing::warn!(%error, "mounts not looked at"),
        }
        self.forget_removed(exists);
    }

    /// Removes what volumes that are gone have left in the state directory.
    fn forget_removed(&self, exists: impl Fn(&VolumeName) -> bool) {
        let mut left = self.paths.logged();
        left.extend(self.guarded());
        for name in left {
            let Some(_lock) = self.try_lock(&name) else {
                continue;
            };
            let used = self.attachments.get(&name).is_some() || self.paths.is_served(&name);
            if used || exists(&name) {
                continue;
            }
            let of_guards = std::fs::remove_dir_all(self.paths.guards().run_dir(&name));
            for removed in [self.paths.forget(&name), of_guards] {
                if let Err(error) = removed
                    && error.kind() != io::ErrorKind::NotFound
                {
                    tracing::warn!(volume = %name, %error, "its processes' logs are not removed");
                }
            }
        }
    }

    /// Volumes that guards have written logs of.
    fn guarded(&self) -> Vec<VolumeName> {
        let entries = std::fs::read_dir(self.settings.state_dir.join("guard"));
        let names = entries.into_iter().flatten().flatten();
        names
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect()
    }

    async fn unmount_all_unattached(&self, mounted: &[MountedVolume]) {
        for MountedVolume { volume, .. } in mounted {
            if self.attachments.get(volume).is_some() {
                continue;
            }
            let Some(_lock) = self.try_lock(volume) else {
                continue;
            };
            if self.attachments.get(volume).is_none() {
                tracing::info!(%volume, "mounted without an attachment: unmounted");
                self.unmount_unattached(volume).await;
            }
        }
    }

    async fn unmount_unattached(&self, name: &VolumeName) {
        if let Err(error) = self.detach(name).await {
            tracing::warn!(volume = %name, %error, "not unmounted");
        }
    }
}
