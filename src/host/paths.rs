//! The data paths: which one carries a volume, and mounting by it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::attachments::How;
use super::{HostError, Settings};
use crate::fence::{Fenced, GuardError, Guards, State, Task};
use crate::fuse::{self, FuseOptions, FusePath};
use crate::kernel::{
    self, Endpoint, KernelPath, KernelSettings, MountError, MountedVolume, OwnMount,
};
use crate::sys::holders::Mark;
use crate::sys::users;
use crate::volume::{Access, DataPath, MountOptions, Record, Right, VolumeName, VolumeOptions};
use nfs::address::Share;
use nfs::admin::MOUNT_OPTIONS;
use nfs::probe::Reached;

/// How long making the admin mount of an NFSv4-only share may take.
const ADMIN_MOUNT_DEADLINE: Duration = Duration::from_secs(20);

/// How long the last processes of a container may take to end after its engine has let go of it.
const USERS_END: Duration = Duration::from_millis(500);
const USERS_LOOK: Duration = Duration::from_millis(20);

/// The data path that carries a volume, and why that one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Choice {
    /// [`DataPath::Kernel`] or [`DataPath::Fuse`].
    pub(crate) path: DataPath,
    pub(crate) reason: &'static str,
}

/// The data paths of this host.
#[derive(Debug)]
pub(crate) struct Paths {
    kernel: KernelPath,
    fuse: FusePath,
    guards: Guards,
    default: DataPath,
}

impl Paths {
    pub(crate) fn open(settings: &Settings) -> Result<Self, HostError> {
        let (root, state_dir) = (&settings.mount_root, &settings.state_dir);
        let of_kernel = KernelSettings {
            idle_unmount: settings.idle_unmount,
            ..KernelSettings::default()
        };
        let kernel = KernelPath::new(root, of_kernel)?;
        let program = std::env::current_exe().map_err(HostError::state("finding this program"))?;
        Ok(Self {
            kernel,
            fuse: FusePath::new(root, state_dir, &program),
            guards: Guards::new(state_dir, &program, &settings.docker_socket),
            default: settings.data_path,
        })
    }

    /// The data path of a volume that asks for `wanted`.
    ///
    /// # Errors
    /// What this host lacks, and what to do about it.
    pub(crate) fn choose(&self, wanted: DataPath) -> Result<Choice, HostError> {
        let (asked, reason) = match wanted {
            DataPath::Auto => (self.default, "the daemon is set to it"),
            named => (named, "the volume asks for it"),
        };
        match asked {
            DataPath::Kernel => {
                KernelPath::kernel_has_nfs()?;
                Ok(Choice {
                    path: DataPath::Kernel,
                    reason,
                })
            }
            DataPath::Fuse => {
                FusePath::available()?;
                Ok(Choice {
                    path: DataPath::Fuse,
                    reason,
                })
            }
            DataPath::Auto => {
                let Err(no_kernel) = KernelPath::kernel_has_nfs() else {
                    let reason = "auto: this kernel has an NFS client";
                    return Ok(Choice {
                        path: DataPath::Kernel,
                        reason,
                    });
                };
                FusePath::available().map_err(|no_fuse| HostError::NoDataPath {
                    kernel: Box::new(no_kernel),
                    fuse: Box::new(no_fuse),
                })?;
                let reason =
                    "auto: this kernel has no NFS client, or none that this process may use";
                Ok(Choice {
                    path: DataPath::Fuse,
                    reason,
                })
            }
        }
    }

    /// Which data path is asked for, by a volume or else by the daemon.
    pub(crate) fn asked(&self, wanted: DataPath) -> DataPath {
        match wanted {
            DataPath::Auto => self.default,
            named => named,
        }
    }

    /// The data path of a volume. Where there is a choice, an exclusive one goes by FUSE.
    ///
    /// # Errors
    /// As [`choose`](Self::choose).
    pub(crate) fn choose_for(&self, options: &VolumeOptions) -> Result<Choice, HostError> {
        let wanted = options.data_path;
        let is_free = self.asked(wanted) == DataPath::Auto;
        if options.access != Access::Exclusive || !is_free {
            return self.choose(wanted);
        }
        Ok(match FusePath::available() {
            Ok(()) => Choice {
                path: DataPath::Fuse,
                reason: "auto: access=exclusive, and FUSE fences exactly",
            },
            Err(_) => Choice {
                reason: "auto: this host has no /dev/fuse",
                ..self.choose(wanted)?
            },
        })
    }

    /// Mounts a volume; what is mounted rightly already is left as it is.
    #[tracing::instrument(level = "debug", skip_all)]
    pub(crate) async fn attach(
        &self,
        record: &Record,
        share: &Share,
        reached: &Reached,
        options: MountOptions,
        fence: Option<Right>,
        deadline: Instant,
    ) -> Result<How, HostError> {
        match self.choose_for(&record.options)?.path {
            DataPath::Fuse => {
                self.attach_by_fuse(record, share, reached, &options, fence, deadline)
                    .await
            }
            DataPath::Auto | DataPath::Kernel => {
                let own = fence.is_some();
                let options = match own {
                    true if options.is_rdma() => return Err(GuardError::NotTcp.into()),
                    true => options.unshared(),
                    false => options,
                };
                if own {
                    self.guards.settled(&record.name, deadline).await?;
                }
                let attach = kernel::Attach {
                    own,
                    volume: record.name.clone(),
                    share: share.clone(),
                    endpoint: endpoint(reached),
                    options,
                    dir: record.data_dir.clone(),
                    readonly: record.options.access == Access::Readonly,
                };
                let mut attached = self.kernel.attach(attach, deadline).await?;
                if own {
                    attached.warnings.extend(self.guards.warnings().await);
                }
                Ok(How {
                    share: share.clone(),
                    data_path: DataPath::Kernel,
                    mountpoint: attached.mountpoint,
                    nfs_version: attached.nfs_version,
                    address: attached.addr,
                    held: Mark::Source(attached.source),
                    warnings: attached.warnings,
                })
            }
        }
    }

    async fn attach_by_fuse(
        &self,
        record: &Record,
        share: &Share,
        reached: &Reached,
        options: &MountOptions,
        fence: Option<Right>,
        deadline: Instant,
    ) -> Result<How, HostError> {
        let Some(mount_port) = reached.mount_port.filter(|_| reached.v3) else {
            return Err(match &reached.v3_error {
                Some(error) => error.clone().into(),
                None => HostError::FuseNeedsV3(share.clone()),
            });
        };
        let (fuse_options, mut warnings) =
            FuseOptions::of(options).map_err(HostError::FuseOptions)?;
        let attach = fuse::Attach {
            share: share.clone(),
            addr: reached.addr,
            nfs_port: reached.nfs_port,
            mount_port,
            volume: record.name.clone(),
            dir: record.data_dir.clone(),
            readonly: record.options.access == Access::Readonly || options.is_readonly(),
            options: fuse_options,
            fence,
        };
        let attached = self.fuse.attach(attach, deadline).await?;
        warnings.extend(attached.warnings);
        let mounted = self.kernel.mounted()?;
        let held = mounted
            .iter()
            .find(|m| m.volume == record.name)
            .map(MountedVolume::held);
        Ok(How {
            share: share.clone(),
            data_path: DataPath::Fuse,
            mountpoint: attached.mountpoint,
            nfs_version: attached.nfs_version.to_owned(),
            address: Some(attached.addr),
            held: held.ok_or_else(|| HostError::Vanished(record.name.clone()))?,
            warnings,
        })
    }

    /// Has an exclusive volume watched that the kernel's client has mounted.
    ///
    /// # Errors
    /// When it cannot be; it must not be given to a container then.
    pub(crate) async fn guard(&self, name: &VolumeName, fence: Right) -> Result<(), HostError> {
        let own = self.kernel.own_mount(name)?;
        let own = own.ok_or_else(|| HostError::Vanished(name.clone()))?;
        Ok(self.guards.watch(&self.task(name, own, fence)).await?)
    }

    fn task(&self, name: &VolumeName, own: OwnMount, fence: Right) -> Task {
        Task {
            volume: name.clone(),
            place: own.place,
            share_place: own.share_place,
            device: own.device,
            server: own.server,
            docker: self.guards.docker().to_owned(),
            run_dir: self.guards.run_dir(name),
            fence,
        }
    }

    fn own_mount(&self, name: &VolumeName) -> Option<OwnMount> {
        self.kernel.own_mount(name).ok().flatten()
    }

    /// Unmounts a volume from this host, having flushed it for at most `flush`; containers that
    /// still hold it keep their own mounts.
    #[tracing::instrument(level = "debug", skip_all)]
    pub(crate) async fn detach(&self, name: &VolumeName, flush: Duration) -> Result<(), HostError> {
        // What is mounted by FUSE is let go by its worker; nothing is left for the kernel then.
        if self.fuse.mounted().contains(name) {
            self.fuse.detach(name, flush).await?;
        }
        match self.own_mount(name) {
            Some(own) => self.detach_own(name, own, flush).await,
            None => {
                self.kernel.detach(name, flush).await?;
                Ok(())
            }
        }
    }

    /// What has not reached the server keeps an exclusive volume mounted, and with that held.
    async fn detach_own(
        &self,
        name: &VolumeName,
        own: OwnMount,
        flush: Duration,
    ) -> Result<(), HostError> {
        let kept = |source: MountError| HostError::Kept {
            name: name.clone(),
            source: Box::new(source),
        };
        self.kernel.withdraw_own(name, flush).await.map_err(kept)?;
        let deadline = Instant::now() + USERS_END;
        let places = [own.place.as_path(), own.share_place.as_path()];
        while !tokio::task::block_in_place(|| users::users(own.device, &places))
            .is_ok_and(|found| found.is_empty())
        {
            if Instant::now() > deadline {
                // A container that outlived its engine's record of it: its guard goes on.
                return Ok(());
            }
            tokio::time::sleep(USERS_LOOK).await;
        }
        self.guards.leave(name).await?;
        self.kernel.unmount_own(name).await.map_err(kept)
    }

    /// Whether containers hold a FUSE mount of the volume that this host has let go of.
    pub(crate) async fn is_left_to_containers(&self, name: &VolumeName) -> bool {
        self.fuse.is_left_to_containers(name).await
    }

    /// Tells an exclusive volume's workers and guards until when it may be used; whether one
    /// listens, if the volume needs one.
    pub(crate) async fn prolong(&self, name: &VolumeName, until: u64) -> bool {
        self.fuse.prolong(name, until).await;
        let watched = self.guards.prolong(name, until).await;
        watched || self.guards.has(name) || self.own_mount(name).is_none()
    }

    /// Whether a process serves the volume by FUSE, answering or not, or this host still has an
    /// exclusive volume by the kernel's client.
    pub(crate) fn is_served(&self, name: &VolumeName) -> bool {
        self.fuse.has_worker(name) || self.guards.has(name) || self.is_own(name)
    }

    /// Whether the volume is mounted as an exclusive one, by the kernel's client.
    pub(crate) fn is_own(&self, name: &VolumeName) -> bool {
        self.own_mount(name).is_some()
    }

    /// What the last fence of a volume did, unless it was mounted since.
    pub(crate) fn fenced(&self, name: &VolumeName) -> Option<Fenced> {
        self.guards.fenced(name)
    }

    /// How the guard of a volume is.
    pub(crate) async fn guard_state(&self, name: &VolumeName) -> Option<State> {
        self.guards.state(name).await
    }

    pub(crate) fn guards(&self) -> &Guards {
        &self.guards
    }

    /// Volumes that FUSE workers have written logs of.
    pub(crate) fn logged(&self) -> Vec<VolumeName> {
        self.fuse.logged()
    }

    /// Removes the logs of a volume that is gone.
    pub(crate) fn forget(&self, name: &VolumeName) -> std::io::Result<()> {
        self.fuse.forget(name)
    }

    /// How a volume's FUSE worker is.
    pub(crate) async fn worker(&self, name: &VolumeName) -> Option<fuse::WorkerStatus> {
        self.fuse.status(name).await
    }

    /// How the FUSE workers of some volumes are.
    pub(crate) async fn survey(
        &self,
        names: &[VolumeName],
        within: Duration,
    ) -> Vec<fuse::Surveyed> {
        self.fuse.survey(names, within).await
    }

    /// What the kernel's NFS client has carried, by mount; nothing if /proc does not tell in time.
    pub(crate) async fn traffic(&self, within: Duration) -> Vec<kernel::ShareTraffic> {
        let kernel = self.kernel.clone();
        let read = tokio::task::spawn_blocking(move || kernel.traffic());
        match tokio::time::timeout(within, read).await {
            Ok(Ok(Ok(traffic))) => traffic,
            _ => Vec::new(),
        }
    }

    /// Frees every process that waits for a volume's FUSE worker, by ending the worker; an
    /// exclusive volume of the kernel's client is taken away from this host.
    pub(crate) async fn abort(&self, name: &VolumeName) -> Result<(), HostError> {
        self.fuse.abort(name).await?;
        let now = Right {
            until: 0,
            under_way: 0,
        };
        let mounted = self.own_mount(name).map(|own| self.task(name, own, now));
        Ok(self.guards.fence(name, mounted).await?)
    }

    /// Mounts an NFSv4-only share for the admin path.
    pub(crate) async fn mount_for_admin(
        &self,
        share: &Share,
        reached: &Reached,
    ) -> Result<PathBuf, HostError> {
        // The words are a constant of ours, so they always parse.
        let options = MOUNT_OPTIONS.parse().map_err(HostError::AdminOptions)?;
        let deadline = Instant::now() + ADMIN_MOUNT_DEADLINE;
        let mounted = self
            .kernel
            .mount_for_admin(share, endpoint(reached), options, deadline);
        Ok(mounted.await?)
    }

    /// Where a volume is, or would be, mounted.
    pub(crate) fn mountpoint(&self, name: &VolumeName) -> PathBuf {
        self.kernel.mountpoint(name)
    }

    /// Where shares are mounted.
    pub(crate) fn shares_dir(&self) -> PathBuf {
        self.kernel.shares_dir()
    }

    /// The volumes that the kernel shows as mounted, by either data path.
    pub(crate) fn mounted(&self) -> Result<Vec<MountedVolume>, MountError> {
        self.kernel.mounted()
    }

    /// Unmounts shares that no volume uses.
    pub(crate) async fn shutdown(&self) {
        self.kernel.shutdown().await;
    }
}

fn endpoint(reached: &Reached) -> Endpoint {
    Endpoint {
        addr: reached.addr,
        nfs_port: reached.nfs_port,
        mount_port: reached.mount_port,
        v3: reached.v3,
        v4: reached.v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(default: DataPath, options: &[(&str, &str)]) -> Result<Choice, HostError> {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = Settings::aside(dir.path());
        settings.data_path = default;
        let options = options
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        let options = VolumeOptions::parse(&options).unwrap();
        Paths::open(&settings).unwrap().choose_for(&options)
    }

    #[test]
    fn an_exclusive_volume_goes_by_fuse_unless_somebody_says_kernel() {
        let exclusive = ("access", "exclusive");
        let auto = choice(DataPath::Auto, &[exclusive]);
        if FusePath::available().is_ok() {
            assert_eq!(auto.unwrap().path, DataPath::Fuse);
        } else if KernelPath::kernel_has_nfs().is_ok() {
            assert_eq!(auto.unwrap().path, DataPath::Kernel);
        } else {
            assert!(matches!(auto, Err(HostError::NoDataPath { .. })));
        }
        for said in [
            choice(DataPath::Auto, &[exclusive, ("data_path", "kernel")]),
            choice(DataPath::Kernel, &[exclusive]),
        ] {
            match KernelPath::kernel_has_nfs() {
                Ok(()) => assert_eq!(said.unwrap().path, DataPath::Kernel),
                Err(_) => assert!(matches!(said, Err(HostError::Mount(_)))),
            }
        }
    }
}
