//! The FUSE data path on real parts: nfs-ganesha, /dev/fuse, workers as processes of their own.
//!
//! The test binary is also the worker's program.

#[path = "fuse/apps.rs"]
mod apps;
#[path = "fuse/consistency.rs"]
mod consistency;
#[path = "fuse/durability.rs"]
mod durability;
#[path = "fuse/faults.rs"]
mod faults;
#[path = "fuse/hostile.rs"]
mod hostile;
mod lab;
#[path = "fuse/model.rs"]
mod model;

use std::fs;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use lab::{Export, Ganesha, Lab, Part, Result, Shared, trial};
use libtest_mimic::Trial;
use nfsvol::fuse::worker::{self, SUBCOMMAND};
use nfsvol::fuse::{Attach, FuseOptions, FusePath, WorkerStatus};
use nfsvol::nfs::address::SharePath;
use nfsvol::volume::VolumeName;
use tokio::runtime::Runtime;

const EXPORT: &str = "/srv/fuse";
const NEEDS: &[Part] = &[Part::Ganesha, Part::Fuse];
/// How long an attach may take on a loaded machine.
const ATTACH: Duration = Duration::from_secs(30);

static NAS: Shared<Ganesha> = Shared::new();

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(SUBCOMMAND) {
        return match worker::run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error}");
                ExitCode::FAILURE
            }
        };
    }
    lab::main(|| {
        let mut trials = Vec::new();
        trials.extend(model::trials());
        trials.extend(consistency::trials());
        trials.extend(apps::trials());
        trials.extend(durability::trials());
        trials.extend(faults::trials());
        trials.extend(hostile::trials());
        trials
    })
}

fn fuse_trial<F>(name: &str, body: F) -> Trial
where
    F: FnOnce(&'static Lab) -> Result + Send + 'static,
{
    trial(name, NEEDS, body)
}

fn nas(lab: &'static Lab) -> Result<&'static Ganesha> {
    NAS.get(|| Ganesha::start(lab, "fusenas", &[Export::new(EXPORT)]))
}

/// One host's view of a directory of the export, as its daemon sees it.
struct Host {
    path: FusePath,
    runtime: Runtime,
    volume: VolumeName,
    attach: Attach,
    mountpoint: PathBuf,
    _state: tempfile::TempDir,
}

impl Host {
    /// Mounts `dir` of the server's export, which is made if it is not there.
    fn mount(server: &Ganesha, dir: &str, options: &str) -> Result<Self> {
        Self::mount_at(&server.ip(), server, dir, options)
    }

    /// As [`Self::mount`], of a server that is reached at another address.
    fn mount_at(ip: &str, server: &Ganesha, dir: &str, options: &str) -> Result<Self> {
        let local = server.local(EXPORT).join(dir);
        fs::create_dir_all(&local)?;
        let state = tempfile::tempdir()?;
        let (options, _) = FuseOptions::from_words(options.split(','))?;
        let volume: VolumeName = dir.parse()?;
        let attach = Attach {
            share: server.share(EXPORT).parse()?,
            addr: ip.parse()?,
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

    fn status(&self) -> Result<WorkerStatus> {
        self.runtime
            .block_on(self.path.status(&self.volume))
            .context("no worker answers")
    }

    fn detach(&self) -> Result {
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
