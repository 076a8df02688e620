//! A volume of Docker's `local` driver becomes one of nfsvol's: by a record for the same directory, or
//! by a copy.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, Mode, OFlags};

use super::{Copied, Copier, LocalVolume, local_volumes, measure};
use crate::api::volumes::AdoptOutcome;
use crate::api::{Adopt, Client};
use crate::docker::wire::{Create, Mount, Unmount};
use crate::volume::VolumeName;

/// Who holds the new volume while it is filled. Always the same, so that the next run lets go of
/// what one that was killed held.
const HOLDER: &str = "nfsvol-migrate";

/// Makes the record, or with `dry_run` finds out whether it could be made.
pub(crate) async fn take_over(
    client: &mut Client,
    volume: &LocalVolume,
    name: &str,
    dry_run: bool,
) -> anyhow::Result<AdoptOutcome> {
    name.parse::<VolumeName>()?;
    let ask = Adopt {
        name: name.to_owned(),
        opts: volume.options.clone(),
        overlap: true,
        dry_run,
    };
    let adopted = client.ask(&ask).await?;
    if !adopted.differences.is_empty() {
        bail!(
            "volume {name} of that directory exists with other options ({}); use it as it is, or \
             choose another name (--as)",
            adopted.differences.join("; ")
        );
    }
    Ok(adopted.outcome)
}

/// Who is told how far a copy is.
pub(crate) trait Progress: Send + Sync {
    /// Something begins that goes through this many bytes.
    fn begin(&self, doing: &'static str, bytes: u64);
    /// So many more are done.
    fn done(&self, bytes: u64);
}

/// Copying a directory of this host into a new volume.
pub(crate) struct Copying<'a> {
    /// Socket of the daemon.
    pub(crate) socket: &'a Path,
    /// Socket of Docker's engine.
    pub(crate) docker: &'a Path,
    /// Of the new volume.
    pub(crate) options: BTreeMap<String, String>,
    pub(crate) stop: Arc<AtomicBool>,
    pub(crate) progress: Arc<dyn Progress>,
}

impl Copying<'_> {
    /// Copies a volume into a new one called `name`, and compares: what was done, and the bytes.
    pub(crate) async fn copy(
        &self,
        volume: &LocalVolume,
        name: &str,
    ) -> anyhow::Result<(Copied, u64)> {
        if volume.is_nfs() {
            bail!("it lies on an NFS server already; `nfsvol migrate` takes it over as it is");
        }
        if let Some(mounted) = volume.mounts() {
            bail!("{}", no_directory(&volume.name, &mounted));
        }
        check_unused(volume)?;
        let _source = alone(&volume.mountpoint)?;
        let to = self.mount(name).await?;
        let work = Work {
            from: volume.mountpoint.clone(),
            to,
            source: format!("{} of {}", volume.name, host_name()),
            stop: self.stop.clone(),
            progress: self.progress.clone(),
        };
        let outcome = tokio::task::spawn_blocking(move || work.run()).await?;
        // The connection may be too old by now.
        let mut client = Client::connect(self.socket).await?;
        let let_go = client.ask(&unmount(name)).await;
        let outcome = outcome?;
        let_go?;
        let now = local_volumes(self.docker).await?;
        check_unused(LocalVolume::named(&now, &volume.name)?).with_context(|| {
            format!(
                "the copy is complete, but its source may have changed meanwhile; remove volume \
                 {name} before it is copied again"
            )
        })?;
        Ok(outcome)
    }

    /// Makes the new volume, or finds the one of an earlier run, and mounts it.
    async fn mount(&self, name: &str) -> anyhow::Result<PathBuf> {
        let mut client = Client::connect(self.socket).await?;
        let create = Create {
            name: name.to_owned(),
            opts: Some(self.options.clone()),
        };
        client.ask(&create).await?;
        client.ask(&unmount(name)).await?;
        let mount = Mount {
            name: name.to_owned(),
            id: HOLDER.to_owned(),
        };
        Ok(client.ask(&mount).await?.mountpoint)
    }
}

/// Why a volume can be neither taken over nor copied: its files are in its directory only while a
/// container runs, so what is copied without one would be nothing.
pub(crate) fn no_directory(name: &str, mounted: &str) -> String {
    format!(
        "volume {name} is no directory of Docker's own: its driver mounts {mounted} for each container. \
         If that lies on an NFS server, make a volume of it (`nfsvol adopt`); else make an empty one, \
         docker volume create -d nfsvol NEW, and have a container copy it: docker run --rm -v \
         {name}:/from:ro -v NEW:/to busybox cp -a /from/. /to"
    )
}

fn unmount(name: &str) -> Unmount {
    Unmount {
        name: name.to_owned(),
        id: HOLDER.to_owned(),
    }
}

/// The directory, which nobody else copies for as long as it is kept.
fn alone(directory: &Path) -> anyhow::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let source = rustix::fs::open(directory, flags, Mode::empty())
        .with_context(|| format!("opening {} (as root?)", directory.display()))?;
    if rustix::fs::flock(&source, FlockOperation::NonBlockingLockExclusive).is_err() {
        bail!("another `nfsvol migrate --copy` of it is under way");
    }
    Ok(source)
}

fn check_unused(volume: &LocalVolume) -> anyhow::Result<()> {
    let up: Vec<&str> = volume.up().collect();
    match up.is_empty() {
        true => Ok(()),
        false => bail!(
            "running containers use it ({}); stop them, so that nothing changes while it is copied",
            up.join(", ")
        ),
    }
}

fn host_name() -> String {
    let name = rustix::system::uname();
    name.nodename().to_string_lossy().into_owned()
}

/// What blocks: copying and comparing.
struct Work {
    from: PathBuf,
    to: PathBuf,
    source: String,
    stop: Arc<AtomicBool>,
    progress: Arc<dyn Progress>,
}

impl Work {
    fn run(&self) -> anyhow::Result<(Copied, u64)> {
        let (from, to) = (&*self.from, &*self.to);
        check_mounted(to)?;
        let (_, bytes) = measure(from)?;
        let progress = |done| self.progress.done(done);
        let copier = Copier {
            progress: &progress,
            stop: &self.stop,
        };
        self.progress.begin("copying", bytes);
        copier.begin(to, &self.source)?;
        let copied = copier.copy(from, to)?;
        self.progress.begin("comparing", bytes);
        copier.verify(from, to, copied.links_left == 0)?;
        copier.finish(from, to)?;
        Ok((copied, bytes))
    }
}

/// A daemon in a managed plugin mounts where nobody else sees it: copying would fill this host.
fn check_mounted(to: &Path) -> anyhow::Result<()> {
    let device = |path: &Path| rustix::fs::stat(path).map(|found| found.st_dev);
    let parent = to.parent().unwrap_or(to);
    match (device(to), device(parent)) {
        (Ok(volume), Ok(host)) if volume != host => Ok(()),
        _ => bail!(
            "the new volume's mount point {} cannot be seen from here; run this where the daemon \
             runs, on the host itself",
            to.display()
        ),
    }
}
