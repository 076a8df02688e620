//! The daemon's side: starting workers, finding those that run, and ending them.
//!
//! What is known is not kept in the daemon but asked of the workers and of mountinfo, so that a
//! daemon that was restarted knows as much as the one before it. For each volume there is a
//! directory `<state>/fuse/<volume>/` whose attendants (src/attendant.rs) are its workers, and their
//! `log`.
//!
//! No function here makes a system call on a mounted volume: it would wait for the worker.

use std::io;
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::mount::UnmountFlags;

use crate::attendant::{self, Attendant};
use crate::sys::mountinfo::{DeviceId, MountInfo};
use crate::volume::VolumeName;
use nfs::address::{Share, SharePath};

use super::control::{Command, Report, Served, Started, Task, WorkerStatus};
use super::options::FuseOptions;
use super::worker::{CHECK_TIME, FSTYPE, SUBCOMMAND, our_mount};
use crate::volume::Right;

/// How long a worker may take to say how it is. It answers in microseconds, unless it is stopped.
const STATUS_TIME: Duration = Duration::from_secs(2);
/// How long to wait for the end of a worker that was told to end, or killed.
const END_TIME: Duration = Duration::from_secs(2);
/// A worker that asks the server answers this much later than the server may.
const CHECK_SLACK: Duration = Duration::from_millis(20);
/// Free memory that a worker keeps for its next buffers, in bytes: what it may have in flight.
const BUFFERS_KEPT: &str = "33554432";
/// Larger than the buffer of a READ or WRITE, and smaller than fuser's, most of which is never
/// touched and needs no memory as long as it is mapped by itself; in bytes.
const BEYOND_BUFFERS: &str = "4194304";

/// Why the FUSE data path could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum FuseError {
    #[error("/dev/fuse cannot be opened ({0}): load the fuse module, or give nfsvol the device")]
    Unavailable(#[source] io::Error),
    #[error("volume {volume}: {step}: {error}")]
    Worker {
        volume: VolumeName,
        step: String,
        error: String,
        errno: i32,
    },
    #[error(
        "volume {volume}: the worker did not mount it in time; its log is {log}", log = .log.display()
    )]
    Late { volume: VolumeName, log: PathBuf },
    #[error(
        "volume {0} is mounted with other options or from another place; it has to be unmounted \
         everywhere on this host first"
    )]
    Different(VolumeName),
    #[error("volume {volume}: {step}: {source}")]
    Io {
        volume: VolumeName,
        step: &'static str,
        #[source]
        source: io::Error,
    },
}

impl FuseError {
    /// The errno (a positive `libc` constant) that comes nearest.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Unavailable(error) | Self::Io { source: error, .. } => {
                error.raw_os_error().unwrap_or(libc::EIO)
            }
            Self::Worker { errno, .. } => *errno,
            Self::Late { .. } => libc::ETIMEDOUT,
            Self::Different(_) => libc::EBUSY,
        }
    }
}

/// What to attach.
#[derive(Debug, Clone)]
pub struct Attach {
    pub share: Share,
    /// The server's address.
    pub addr: IpAddr,
    pub nfs_port: u16,
    pub mount_port: u16,
    pub volume: VolumeName,
    /// The volume's directory below the share.
    pub dir: SharePath,
    pub readonly: bool,
    pub options: FuseOptions,
    /// For an exclusive volume.
    pub fence: Option<Right>,
}

/// A volume that is mounted.
#[derive(Debug, Clone)]
pub struct Attached {
    pub mountpoint: PathBuf,
    pub nfs_version: &'static str,
    pub addr: IpAddr,
    pub warnings: Vec<String>,
}

/// A worker that lives, and what it said; `None` if it did not answer in time.
#[derive(Debug, Clone)]
pub struct Surveyed {
    pub volume: VolumeName,
    pub status: Option<WorkerStatus>,
}

/// The FUSE data path of a host.
#[derive(Debug, Clone)]
pub struct FusePath {
    mount_root: PathBuf,
    state_dir: PathBuf,
    program: PathBuf,
}

impl FusePath {
    /// `program` is nfsvol's own executable, which is run again as the worker.
    #[must_use]
    pub fn new(mount_root: &Path, state_dir: &Path, program: &Path) -> Self {
        Self {
            mount_root: mount_root.to_owned(),
            state_dir: state_dir.to_owned(),
            program: program.to_owned(),
        }
    }

    /// Whether this host has FUSE.
    ///
    /// # Errors
    /// [`FuseError::Unavailable`].
    pub fn available() -> Result<(), FuseError> {
        std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .map(drop)
            .map_err(FuseError::Unavailable)
    }

    /// Where a volume is mounted.
    #[must_use]
    pub fn mountpoint(&self, volume: &VolumeName) -> PathBuf {
        self.mount_root.join("volumes").join(volume.as_str())
    }

    fn run_dir(&self, volume: &VolumeName) -> PathBuf {
        self.state_dir.join("fuse").join(volume.as_str())
    }

    /// Where a volume's workers write their log.
    #[must_use]
    pub fn log(&self, volume: &VolumeName) -> PathBuf {
        self.run_dir(volume).join("log")
    }

    /// Mounts a volume: by the worker that serves it already, or by a new one.
    ///
    /// # Errors
    /// [`FuseError`]; nothing is left mounted then, and no worker.
    #[tracing::instrument(level = "debug", skip_all)]
    pub async fn attach(&self, attach: Attach, deadline: Instant) -> Result<Attached, FuseError> {
        Self::available()?;
        let volume = attach.volume.clone();
        let io = |step| {
            let volume = volume.clone();
            move |source| FuseError::Io {
                volume,
                step,
                source,
            }
        };
        let task = Task {
            mountpoint: self.mountpoint(&volume),
            run_dir: self.run_dir(&volume),
            volume: attach.volume,
            share: attach.share,
            dir: attach.dir,
            addr: attach.addr,
            nfs_port: attach.nfs_port,
            mount_port: attach.mount_port,
            readonly: attach.readonly,
            options: attach.options,
            fence: attach.fence,
        };
        let attached = |addr, warnings| Attached {
            mountpoint: task.mountpoint.clone(),
            nfs_version: "3",
            addr,
            warnings,
        };
        let mounted = our_mount(&task.mountpoint).map_err(io("read mountinfo"))?;
        if mounted.is_some() {
            match self.serving(&volume).await {
                Some(worker) if worker.status.task.serves(&task) => {
                    if !worker.is_outdated(task.addr).await {
                        return Ok(attached(worker.status.task.addr, Vec::new()));
                    }
                    tracing::warn!(%volume, "what is mounted is outdated; mounting it anew");
                    worker.leave().await;
                    unmount_all(&task.mountpoint).map_err(io("unmount what is outdated"))?;
                }
                Some(_) => return Err(FuseError::Different(volume)),
                // Its worker is gone, or hangs: whoever holds the mount has lost it.
                None => {
                    unmount_all(&task.mountpoint).map_err(io("unmount what a dead worker left"))?
                }
            }
        }
        make_dir(&task.mountpoint).map_err(io("make the mount point"))?;
        make_dir(&task.run_dir).map_err(io("make the state directory"))?;
        let warnings = self.start(&task, deadline).await?;
        Ok(attached(task.addr, warnings))
    }

    #[tracing::instrument(level = "debug", skip_all)]
    async fn start(&self, task: &Task, deadline: Instant) -> Result<Vec<String>, FuseError> {
        let volume = &task.volume;
        let io = |source| FuseError::Io {
            volume: volume.clone(),
            step: "start the worker",
            source,
        };
        let path = self.log(volume);
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(io)?;
        let mut child = attendant::command(&self.program, SUBCOMMAND, log)
            // One arena, whose buffers are used again while there is load: fresh memory would have
            // to be cleared by the kernel each time. At rest the worker lets go of it.
            .env("MALLOC_ARENA_MAX", "1")
            .env("MALLOC_MMAP_THRESHOLD_", BEYOND_BUFFERS)
            .env("MALLOC_TRIM_THRESHOLD_", BUFFERS_KEPT)
            .spawn()
            .map_err(io)?;
        fail::fail_point!("fuse.started", |_| crate::failpoint::die());
        let conversation = async {
            attendant::give(&mut child, task).await?;
            fail::fail_point!("fuse.told", |_| crate::failpoint::die());
            attendant::hear::<Started>(&mut child).await
        };
        let answer = tokio::time::timeout_at(deadline.into(), conversation).await;
        let error = match answer {
            Ok(Ok(Started::Ready { warnings })) => return Ok(warnings),
            Ok(Ok(Started::Failed { step, error, errno })) => FuseError::Worker {
                volume: volume.clone(),
                step,
                error,
                errno,
            },
            Ok(Err(source)) => io(io::Error::new(
                source.kind(),
                format!(
                    "it ended without a word ({source}); its log is {}",
                    path.display()
                ),
            )),
            Err(_) => FuseError::Late {
                volume: volume.clone(),
                log: path,
            },
        };
        // It has failed or is late: neither it nor its mount may stay.
        let _ = tokio::time::timeout(END_TIME, child.kill()).await;
        let _ = unmount_all(&task.mountpoint);
        Err(error)
    }

    /// Tells a volume's workers until when they may use an exclusive volume.
    pub async fn prolong(&self, volume: &VolumeName, until: u64) {
        for worker in self.living(volume) {
            // One that does not hear this stops sending.
            let _ = ask(&worker, Command::Prolong(until), STATUS_TIME).await;
        }
    }

    /// Whether any process serves the volume, also one that is stopped and does not answer.
    #[must_use]
    pub fn has_worker(&self, volume: &VolumeName) -> bool {
        !self.living(volume).is_empty()
    }

    /// The workers of a volume, answering or not.
    fn living(&self, volume: &VolumeName) -> Vec<Attendant> {
        attendant::living(&self.run_dir(volume))
    }

    /// All workers of a volume that answer: the one that is mounted on the host, and those that
    /// only containers still hold.
    async fn workers(&self, volume: &VolumeName) -> Vec<Worker> {
        let mut found = Vec::new();
        for attendant in self.living(volume) {
            if let Ok(Report::Status(status)) = ask(&attendant, Command::Status, STATUS_TIME).await
            {
                found.push(Worker {
                    attendant,
                    status: *status,
                });
            }
        }
        found
    }

    /// Asks the workers of some volumes, all at once.
    pub async fn survey(&self, volumes: &[VolumeName], within: Duration) -> Vec<Surveyed> {
        let mut asked = tokio::task::JoinSet::new();
        for volume in volumes {
            for worker in self.living(volume) {
                let volume = volume.clone();
                asked.spawn(async move {
                    let said = ask(&worker, Command::Status, within).await;
                    let status = match said {
                        Ok(Report::Status(status)) => Some(*status),
                        _ => None,
                    };
                    Surveyed { volume, status }
                });
            }
        }
        asked.join_all().await
    }

    /// The worker that serves the volume's mount on the host.
    async fn serving(&self, volume: &VolumeName) -> Option<Worker> {
        let workers = self.workers(volume).await;
        workers.into_iter().find(|worker| !worker.status.leaving)
    }

    /// How a volume's worker is; `None` if there is none and nothing is mounted.
    pub async fn status(&self, volume: &VolumeName) -> Option<WorkerStatus> {
        let worker = self.serving(volume).await?;
        Some(worker.status)
    }

    /// Volumes that are mounted on this host by the FUSE data path, with a worker or without.
    #[must_use]
    pub fn mounted(&self) -> Vec<VolumeName> {
        let root = self.mount_root.join("volumes");
        let mut volumes: Vec<VolumeName> = MountInfo::read_below(&root)
            .unwrap_or_default()
            .entries
            .iter()
            .filter(|mount| mount.fstype == FSTYPE)
            .filter_map(|mount| {
                mount
                    .mountpoint
                    .strip_prefix(&root)
                    .ok()?
                    .to_str()?
                    .parse()
                    .ok()
            })
            .collect();
        volumes.sort();
        volumes.dedup();
        volumes
    }

    /// Volumes that workers have written logs of.
    #[must_use]
    pub fn logged(&self) -> Vec<VolumeName> {
        let entries = std::fs::read_dir(self.state_dir.join("fuse"));
        let names = entries.into_iter().flatten().flatten();
        names
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect()
    }

    /// Removes the logs of a volume that is gone, as its workers are.
    ///
    /// # Errors
    /// What the file system said.
    pub fn forget(&self, volume: &VolumeName) -> io::Result<()> {
        std::fs::remove_dir_all(self.run_dir(volume))
    }

    /// Whether containers still hold a mount of the volume that the host has let go of.
    pub async fn is_left_to_containers(&self, volume: &VolumeName) -> bool {
        self.workers(volume)
            .await
            .iter()
            .any(|worker| worker.status.leaving)
    }

    /// After a start of the daemon: the volumes whose workers live, and those that have lost
    /// theirs. The former need nothing to be done.
    pub async fn adopt(&self) -> (Vec<WorkerStatus>, Vec<VolumeName>) {
        let (mut alive, mut dead) = (Vec::new(), Vec::new());
        for volume in self.mounted() {
            match self.serving(&volume).await {
                Some(worker) => alive.push(worker.status),
                None => dead.push(volume),
            }
        }
        (alive, dead)
    }

    /// Takes a volume's mount away from the host, after what was written is on the server or
    /// `flush` has passed. The worker goes on for containers that still hold the mount, and ends
    /// with the last of them.
    ///
    /// # Errors
    /// [`FuseError::Io`] when the mount cannot be taken away. What is not mounted is fine.
    #[tracing::instrument(level = "debug", skip_all)]
    pub async fn detach(&self, volume: &VolumeName, flush: Duration) -> Result<(), FuseError> {
        if let Some(worker) = self.serving(volume).await {
            // A server that is away must not keep the volume mounted.
            let _ = ask(&worker.attendant, Command::Flush, flush).await;
            worker.leave().await;
            fail::fail_point!("fuse.left", |_| crate::failpoint::die());
        }
        let mountpoint = self.mountpoint(volume);
        unmount_all(&mountpoint).map_err(|source| FuseError::Io {
            volume: volume.clone(),
            step: "unmount",
            source,
        })?;
        fail::fail_point!("fuse.taken", |_| crate::failpoint::die());
        // It is empty unless something went wrong, and then it has to stay.
        let _ = std::fs::remove_dir(&mountpoint);
        Ok(())
    }

    /// Ends a volume's workers at once: every process that waits for one is freed, and the volume
    /// fails for all who hold it. Written data that was not synced may be lost.
    ///
    /// # Errors
    /// [`FuseError::Io`] when a worker lives on in spite of SIGKILL.
    pub async fn abort(&self, volume: &VolumeName) -> Result<(), FuseError> {
        if let Ok(Some(mount)) = our_mount(&self.mountpoint(volume)) {
            abort_connection(mount.device);
        }
        for worker in self.living(volume) {
            let _ = ask(&worker, Command::Abort, STATUS_TIME).await;
            if !worker.ends(END_TIME).await && !worker.kill(END_TIME).await {
                return Err(FuseError::Io {
                    volume: volume.clone(),
                    step: "end the worker",
                    source: io::ErrorKind::TimedOut.into(),
                });
            }
        }
        Ok(())
    }
}

/// A worker that has answered.
#[derive(Debug)]
struct Worker {
    attendant: Attendant,
    status: WorkerStatus,
}

impl Worker {
    /// Whether it serves what the server no longer knows, or knows as another volume's, or waits
    /// for the server at an address (`addr` is the one of now) where it no longer is. A server that
    /// does not answer otherwise says nothing about that.
    #[tracing::instrument(level = "debug", skip_all)]
    async fn is_outdated(&self, addr: IpAddr) -> bool {
        match ask(&self.attendant, Command::Check, CHECK_TIME + CHECK_SLACK).await {
            Ok(Report::Served(Served::Current)) => false,
            Ok(Report::Served(Served::Outdated)) => true,
            // An earlier release's worker does not know the question.
            _ => self.status.task.addr != addr,
        }
    }

    async fn leave(&self) {
        // One that does not answer is of no use to those who hold its mount either.
        let _ = ask(&self.attendant, Command::Leave, STATUS_TIME).await;
    }
}

async fn ask(worker: &Attendant, command: Command, patience: Duration) -> io::Result<Report> {
    worker.ask(&command, patience).await
}

/// Makes a directory that only root can enter, with its parents.
fn make_dir(path: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(path)
}

/// Takes away every mount of ours at a place: as usual if nothing on the host uses it, else so
/// that it goes away when it is no longer used.
fn unmount_all(mountpoint: &Path) -> io::Result<()> {
    while our_mount(mountpoint)?.is_some() {
        match rustix::mount::unmount(mountpoint, UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(rustix::io::Errno::INVAL) => return Ok(()), // somebody else was faster
            Err(_) => {
                let flags = UnmountFlags::NOFOLLOW | UnmountFlags::DETACH;
                rustix::mount::unmount(mountpoint, flags)?;
            }
        }
    }
    Ok(())
}

/// Makes the kernel give up a FUSE connection. Not possible everywhere (`fusectl` may not be
/// mounted); ending the worker does the same.
fn abort_connection(device: DeviceId) {
    // The kernel names a connection after the minor number, with 20 bits; the major is 0.
    let path = format!("/sys/fs/fuse/connections/{}/abort", device.minor);
    let _ = std::fs::write(path, "1");
}
