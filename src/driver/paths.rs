//! The data paths: which one carries a volume, and mounting by it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::DriverError;
use super::attachments::How;
use crate::config::Config;
use crate::fuse::{self, Fence, FuseOptions, FusePath};
use crate::mount::{
    self, Endpoint, Held, KernelPath, KernelSettings, MountError, MountOptions, MountedVolume,
};
use crate::nfs::address::Share;
use crate::nfs::admin::MOUNT_OPTIONS;
use crate::nfs::probe::Reached;
use crate::volume::{Access, DataPath, Record, VolumeName};

/// How long making the admin mount of an NFSv4-only share may take.
const ADMIN_MOUNT_DEADLINE: Duration = Duration::from_secs(20);

/// The data path that carries a volume, and why that one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Choice {
    /// [`DataPath::Kernel`] or [`DataPath::Fuse`].
    pub(super) path: DataPath,
    pub(super) reason: &'static str,
}

/// The data paths of this host.
#[derive(Debug)]
pub(super) struct Paths {
    kernel: KernelPath,
    fuse: FusePath,
    default: DataPath,
}

impl Paths {
    pub(super) fn open(config: &Config) -> Result<Self, DriverError> {
        let settings = KernelSettings {
            idle_unmount: config.idle_unmount,
            ..KernelSettings::default()
        };
        let kernel = KernelPath::new(&config.mount_root, settings)?;
        let program = std::env::current_exe().map_err(|source| DriverError::State {
            what: "finding this program",
            source,
        })?;
        Ok(Self {
            kernel,
            fuse: FusePath::new(&config.mount_root, &config.state_dir, &program),
            default: config.data_path,
        })
    }

    /// The data path of a volume that asks for `wanted`.
    ///
    /// # Errors
    /// What this host lacks, and what to do about it.
    pub(super) fn choose(&self, wanted: DataPath) -> Result<Choice, DriverError> {
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
                FusePath::available().map_err(|no_fuse| DriverError::NoDataPath {
                    kernel: Box::new(no_kernel),
                    fuse: Box::new(no_fuse),
                })?;
                let reason = "auto: this kernel has no NFS client";
                Ok(Choice {
                    path: DataPath::Fuse,
                    reason,
                })
            }
        }
    }

    /// The data path of a volume: only FUSE can be fenced.
    ///
    /// # Errors
    /// As [`choose`](Self::choose).
    pub(super) fn choose_for(&self, record: &Record) -> Result<Choice, DriverError> {
        if record.options.access != Access::Exclusive {
            return self.choose(record.options.data_path);
        }
        FusePath::available()?;
        Ok(Choice {
            path: DataPath::Fuse,
            reason: "access=exclusive: only FUSE can be fenced",
        })
    }

    /// Mounts a volume; what is mounted rightly already is left as it is.
    pub(super) async fn attach(
        &self,
        record: &Record,
        share: &Share,
        reached: &Reached,
        options: MountOptions,
        fence: Option<Fence>,
        deadline: Instant,
    ) -> Result<How, DriverError> {
        match self.choose_for(record)?.path {
            DataPath::Fuse => {
                self.attach_by_fuse(record, share, reached, &options, fence, deadline)
                    .await
            }
            DataPath::Auto | DataPath::Kernel => {
                let attach = mount::Attach {
                    volume: record.name.clone(),
                    share: share.clone(),
                    endpoint: endpoint(reached),
                    options,
                    dir: record.data_dir.clone(),
                    readonly: record.options.access == Access::Readonly,
                };
                let attached = self.kernel.attach(attach, deadline).await?;
                Ok(How {
                    share: share.clone(),
                    data_path: DataPath::Kernel,
                    mountpoint: attached.mountpoint,
                    nfs_version: attached.nfs_version,
                    address: attached.addr,
                    held: Held::Source(attached.source),
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
        fence: Option<Fence>,
        deadline: Instant,
    ) -> Result<How, DriverError> {
        let Some(mount_port) = reached.mount_port.filter(|_| reached.v3) else {
            return Err(match &reached.v3_error {
                Some(error) => error.clone().into(),
                None => DriverError::FuseNeedsV3(share.clone()),
            });
        };
        let text = options.to_string();
        let (fuse_options, mut warnings) =
            FuseOptions::from_words(text.split(',')).map_err(DriverError::FuseOptions)?;
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
            held: held.ok_or_else(|| DriverError::Vanished(record.name.clone()))?,
            warnings,
        })
    }

    /// Unmounts a volume from this host, having flushed it for at most `flush`; containers that
    /// still hold it keep their own mounts.
    pub(super) async fn detach(
        &self,
        name: &VolumeName,
        flush: Duration,
    ) -> Result<(), DriverError> {
        // What is mounted by FUSE is let go by its worker; nothing is left for the kernel then.
        if self.fuse.mounted().contains(name) {
            self.fuse.detach(name, flush).await?;
        }
        self.kernel.detach(name, flush).await?;
        Ok(())
    }

    /// Whether containers hold a FUSE mount of the volume that this host has let go of.
    pub(super) async fn is_left_to_containers(&self, name: &VolumeName) -> bool {
        self.fuse.is_left_to_containers(name).await
    }

    /// Tells an exclusive volume's workers until when they may use it.
    pub(super) async fn prolong(&self, name: &VolumeName, until: u64) {
        self.fuse.prolong(name, until).await;
    }

    /// Whether a process serves the volume by FUSE, answering or not.
    pub(super) fn has_worker(&self, name: &VolumeName) -> bool {
        self.fuse.has_worker(name)
    }

    /// Volumes that FUSE workers have written logs of.
    pub(super) fn logged(&self) -> Vec<VolumeName> {
        self.fuse.logged()
    }

    /// Removes the logs of a volume that is gone.
    pub(super) fn forget(&self, name: &VolumeName) -> std::io::Result<()> {
        self.fuse.forget(name)
    }

    /// How a volume's FUSE worker is.
    pub(super) async fn worker(&self, name: &VolumeName) -> Option<fuse::WorkerStatus> {
        self.fuse.status(name).await
    }

    /// How the FUSE workers of some volumes are.
    pub(super) async fn survey(
        &self,
        names: &[VolumeName],
        within: Duration,
    ) -> Vec<fuse::Surveyed> {
        self.fuse.survey(names, within).await
    }

    /// What the kernel's NFS client has carried, by mount; nothing if /proc does not tell in time.
    pub(super) async fn traffic(&self, within: Duration) -> Vec<mount::ShareTraffic> {
        let kernel = self.kernel.clone();
        let read = tokio::task::spawn_blocking(move || kernel.traffic());
        match tokio::time::timeout(within, read).await {
            Ok(Ok(Ok(traffic))) => traffic,
            _ => Vec::new(),
        }
    }

    /// Frees every process that waits for a volume's FUSE worker, by ending the worker.
    pub(super) async fn abort(&self, name: &VolumeName) -> Result<(), DriverError> {
        Ok(self.fuse.abort(name).await?)
    }

    /// Mounts an NFSv4-only share for the admin path.
    pub(super) async fn mount_for_admin(
        &self,
        share: &Share,
        reached: &Reached,
    ) -> Result<PathBuf, DriverError> {
        // The words are a constant of ours, so they always parse.
        let options = MOUNT_OPTIONS.parse().map_err(DriverError::AdminOptions)?;
        let deadline = Instant::now() + ADMIN_MOUNT_DEADLINE;
        let mounted = self
            .kernel
            .mount_for_admin(share, endpoint(reached), options, deadline);
        Ok(mounted.await?)
    }

    /// Where a volume is, or would be, mounted.
    pub(super) fn mountpoint(&self, name: &VolumeName) -> PathBuf {
        self.kernel.mountpoint(name)
    }

    /// The volumes that the kernel shows as mounted, by either data path.
    pub(super) fn mounted(&self) -> Result<Vec<MountedVolume>, MountError> {
        self.kernel.mounted()
    }

    /// Unmounts shares that no volume uses.
    pub(super) async fn shutdown(&self) {
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
