//! A volume on the FUSE data path as one host's daemon attaches it, with a worker process of its own.

// One part of several test binaries, each of which uses some of it.
#![allow(dead_code)]

use std::fs;
use std::net::IpAddr;
use std::ops::Deref;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lab::{Ganesha, PATIENCE, Result};
use nfs::address::SharePath;
use nfsvol::doors::fuse::worker::{self, SUBCOMMAND};
use nfsvol::doors::fuse::{Attach, FuseOptions, FusePath, WorkerStatus};
use nfsvol::doors::volume::VolumeName;
use tokio::runtime::Runtime;

/// What the tests' server exports.
pub(crate) const EXPORT: &str = "/srv/fuse";
/// The deadline of an attach that has to succeed.
pub(crate) const ATTACH: Duration = PATIENCE;

/// Runs as a volume's worker if the process was started to be one.
pub(crate) fn as_worker() -> Option<ExitCode> {
    if std::env::args().nth(1).as_deref() != Some(SUBCOMMAND) {
        return None;
    }
    let ended = worker::run();
    if let Err(error) = &ended {
        eprintln!("{error}");
    }
    Some(ended.map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS))
}

/// An NFS server, and where its files are to be seen without nfsvol.
pub(crate) trait Served: Send + Sync {
    fn ip(&self) -> String;
    /// What is to be mounted of it.
    fn export(&self) -> String {
        EXPORT.to_owned()
    }
    /// Where a path of it is to be seen.
    fn local(&self, path: &str) -> PathBuf;
}

impl Served for Ganesha {
    fn ip(&self) -> String {
        Self::ip(self)
    }

    fn local(&self, path: &str) -> PathBuf {
        Self::local(self, path)
    }
}

/// One host's view of a directory of the export, as its daemon sees it.
pub(crate) struct Host {
    pub(crate) path: FusePath,
    pub(crate) runtime: Runtime,
    pub(crate) volume: VolumeName,
    pub(crate) attach: Attach,
    mountpoint: PathBuf,
    pub(crate) _state: tempfile::TempDir,
}

impl Host {
    /// Mounts `dir` of the server's export, which is made if it is not there.
    pub(crate) fn mount(server: &dyn Served, dir: &str, options: &str) -> Result<Self> {
        Self::mount_at(&server.ip(), server, dir, options)
    }

    /// As [`Self::mount`], of a server that is reached at another address.
    pub(crate) fn mount_at(
        ip: &str,
        server: &dyn Served,
        dir: &str,
        options: &str,
    ) -> Result<Self> {
        let local = server.local(EXPORT).join(dir);
        fs::create_dir_all(&local)?;
        let state = tempfile::tempdir()?;
        let (options, _) = FuseOptions::of(&options.parse()?)?;
        let volume: VolumeName = dir.parse()?;
        let attach = Attach {
            share: format!("{}:{}", server.ip(), server.export()).parse()?,
            addr: ip.parse::<IpAddr>()?,
            nfs_port: 2049,
            mount_port: 20048,
            volume: volume.clone(),
            dir: SharePath::parse(dir)?,
            readonly: false,
            options,
            fence: None,
        };
        let mount_root = state.path().join("mnt");
        let path = FusePath::new(&mount_root, state.path(), &std::env::current_exe()?);
        let runtime = Runtime::new()?;
        let deadline = Instant::now() + ATTACH;
        let attached = runtime.block_on(path.attach(attach.clone(), deadline))?;
        Ok(Self {
            path,
            runtime,
            volume,
            attach,
            mountpoint: attached.mountpoint,
            _state: state,
        })
    }

    pub(crate) fn status(&self) -> Result<WorkerStatus> {
        self.runtime
            .block_on(self.path.status(&self.volume))
            .context("no worker answers")
    }

    /// Runs a bash script in a bind mount of the volume, which is what containers get of it: the mount
    /// point itself lies in a directory that only root enters. The script may name `$place`.
    pub(crate) fn script(&self, script: &str) -> Result {
        let place = tempfile::tempdir_in("/run")?;
        fs::set_permissions(place.path(), PermissionsExt::from_mode(0o755))?;
        let script = format!(
            "set -e; place={place}
mount --bind {mount} $place; trap 'cd /; umount $place' EXIT; cd $place
{script}",
            mount = self.display(),
            place = place.path().display(),
        );
        let output = std::process::Command::new("bash")
            .args(["-xc", &script])
            .output()?;
        ensure!(
            output.status.success(),
            "{}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    pub(crate) fn detach(&self) -> Result {
        let flush = Duration::from_secs(10);
        Ok(self
            .runtime
            .block_on(self.path.detach(&self.volume, flush))?)
    }
}

/// The mounted directory.
impl Deref for Host {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.mountpoint
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.runtime.block_on(self.path.abort(&self.volume));
        let _ = self.detach();
    }
}
