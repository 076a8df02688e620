//! A mount of an exclusive volume's own.
//!
//! It has a superblock of its own (`nosharecache`), so that what its containers wrote can be
//! thrown away without touching other volumes of the share. Nothing here is taken away lazily: as
//! long as the kernel may still send something for the volume, its mount can be seen.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::bind;
use super::error::{MountError, Step};
use super::path::KernelPath;
use super::shares::{UNMOUNT_WAIT, local};
use crate::sys::mountinfo::DeviceId;
use crate::volume::VolumeName;

/// Where the kernel's client looks for a server that names no port.
const NFS_PORT: u16 = 2049;

/// The mounts of an exclusive volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnMount {
    /// Of the volume, where containers get it from.
    pub place: PathBuf,
    /// Of the share.
    pub share_place: PathBuf,
    /// Of the superblock.
    pub device: DeviceId,
    pub server: Option<SocketAddr>,
}

/// What the names of exclusive volumes' share mounts begin with; no other has a dot in it.
const OWN: &str = "own.";

pub(super) fn own_key(volume: &VolumeName) -> String {
    format!("{OWN}{volume}")
}

pub(super) fn is_own_key(key: &str) -> bool {
    key.starts_with(OWN)
}

impl KernelPath {
    /// What is mounted of a volume that was attached as its own.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn own_mount(&self, volume: &VolumeName) -> Result<Option<OwnMount>, MountError> {
        let share_place = self.0.shares.join(own_key(volume));
        let info = self.0.mountinfo()?;
        Ok(info.at(&share_place).map(|entry| OwnMount {
            place: self.mountpoint(volume),
            device: entry.device,
            server: entry.addr().map(|addr| {
                let port = entry
                    .super_option("port")
                    .and_then(|port| port.parse().ok());
                SocketAddr::new(addr, port.unwrap_or(NFS_PORT))
            }),
            share_place,
        }))
    }

    /// Takes a volume's mount away from where containers get it, after all that was written is on
    /// the server; with a `flush` of zero nothing was written.
    ///
    /// # Errors
    /// When it is not within `flush`, or when a process of this host works below the mount; then
    /// it stays.
    pub async fn withdraw_own(
        &self,
        volume: &VolumeName,
        flush: Duration,
    ) -> Result<(), MountError> {
        let deadline = Instant::now() + flush + UNMOUNT_WAIT;
        let _volume = self.0.lock_volume(volume, deadline).await?;
        let Some(own) = self.own_mount(volume)? else {
            return Ok(());
        };
        let key = own_key(volume);
        let state = self.0.state(&key, &key);
        if !flush.is_zero() {
            self.flush(&state, volume, &own.share_place, flush).await?;
        }
        fail::fail_point!("unmount.flushed", |_| crate::failpoint::die());
        let place = own.place.clone();
        self.take_away(volume, place).await
    }

    /// Takes away the rest of a volume's own mount.
    ///
    /// # Errors
    /// When something still uses it.
    pub async fn unmount_own(&self, volume: &VolumeName) -> Result<(), MountError> {
        let place = self.0.shares.join(own_key(volume));
        self.take_away(volume, place).await
    }

    async fn take_away(&self, volume: &VolumeName, place: PathBuf) -> Result<(), MountError> {
        let key = own_key(volume);
        let state = self.0.state(&key, &key);
        let target = place.clone();
        let unmounted = state
            .unmounts
            .run(Step::Unmount, Instant::now() + UNMOUNT_WAIT, move |_| {
                bind::take_away(&target, false)
                    .map_err(|errno| local(Step::Unmount, &target, errno))
            })
            .await;
        match unmounted {
            Err(error) if error.errno() == Some(Errno::BUSY) => Err(MountError::Volume {
                volume: volume.clone(),
                what: "unmounting it",
                errno: Errno::BUSY,
                hint: "a process of this host works below its mount point: `fuser -m` names it",
            }),
            Err(error) if self.0.mountinfo()?.at(&place).is_some() => Err(error),
            Ok(()) | Err(_) => {
                let _ = std::fs::remove_dir(&place);
                Ok(())
            }
        }
    }
}
