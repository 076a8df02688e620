//! The worker: a process that serves one volume.
//!
//! It is a session of its own and takes no notice of the daemon's end, so that a restart or an
//! upgrade of nfsvol does not touch running containers. It ends when the last mount of its file
//! system is gone, in whatever mount namespace that is, or when it is told to abort; whoever waits
//! for it is freed then, because the kernel sees the last descriptor of /dev/fuse close.
//!
//! Known limits: a service manager that ends all processes of nfsvol's service ends the workers
//! too (systemd: `KillMode=process`); a worker's memory is lost with it, and with it what was
//! written in the last second but not synced, as with a kernel's crash.

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tracing::Instrument;

use crate::attendant::{self, Post, receive, send};
use crate::mutant::{self, Mutant};
use crate::sys::mountinfo::{MountEntry, MountInfo};
use crate::telemetry;
use nfs::rpc::connector::TcpConnector;
use nfs::rpc::mountd::{Mountd, Ports};
use nfs::rpc::nfs3::{FileHandle, FileKind, Nfs3};
use nfs::rpc::{Cred, Settings};

use super::caches::Caches;
use super::control::{Command, Report, Served, Started, Task, Traffic, WorkerStatus};
use super::fence::{FencedConnector, RightEnd};
use super::fs::Fs;
use super::glue::{Glue, Load};
use super::hidden::{self, Hidden};
use super::rights;

/// The name of the hidden subcommand that runs [`run`].
pub const SUBCOMMAND: &str = "fuse-worker";
/// Between which bounds the kernel's read-ahead for the mount is, in KiB. More than a stream needs
/// costs whoever maps a file: the kernel reads as much around each page that is missing.
const READ_AHEAD_KIB: RangeInclusive<u128> = 2048..=8192;
/// `oom_score_adj`: taken when nothing else is left. Its memory is bounded, and without it all
/// containers that use the volume have to be started again.
const OOM_SCORE: i16 = -900;
/// How long a client of the control socket may take to say what it wants.
const COMMAND_TIME: Duration = Duration::from_secs(5);
/// How long the server may take to say whether the volume's directory is still the same.
pub(super) const CHECK_TIME: Duration = Duration::from_secs(2);
/// How long a worker without requests keeps memory for the next ones, about.
const REST_AFTER: Duration = Duration::from_secs(5);
/// The type of the mounts, as mountinfo shows it.
pub(super) const FSTYPE: &str = crate::sys::mountinfo::FUSE_FSTYPE;

/// Why a worker did not start, or ended.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {source}")]
pub struct WorkerError {
    pub step: &'static str,
    #[source]
    pub source: io::Error,
}

trait Step<T> {
    fn step(self, step: &'static str) -> Result<T, WorkerError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: &'static str) -> Result<T, WorkerError> {
        self.map_err(|e| WorkerError {
            step,
            source: e.into(),
        })
    }
}

fn nfs<T>(result: Result<T, nfs::rpc::NfsError>) -> io::Result<T> {
    result.map_err(|e| io::Error::new(io::Error::from_raw_os_error(e.errno()).kind(), e))
}

/// Serves the volume that standard input names, until its last mount is gone. This is what the
/// subcommand does; the process is to end when it returns.
///
/// # Errors
/// [`WorkerError`] when it cannot start; the daemon has been told by then.
pub fn run() -> Result<(), WorkerError> {
    let mut text = String::new();
    io::stdin()
        .read_to_string(&mut text)
        .step("read the task")?;
    let task: Task = serde_json::from_str(&text).step("read the task")?;
    // Fails if there is a log already, which is as good.
    let _ = telemetry::init_bounded();
    attendant::detach().step("leave the working directory")?;
    attendant::spare(OOM_SCORE);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .step("start the runtime")?;
    let span = tracing::info_span!("worker", volume = %task.volume);
    let result = runtime.block_on(serve(&task).instrument(span));
    if let Err(error) = &result {
        let failed = Started::Failed {
            step: error.step.to_owned(),
            error: error.source.to_string(),
            errno: error.source.raw_os_error().unwrap_or(libc::EIO),
        };
        // Whoever started it may be gone, and then nobody wants to know.
        let _ = attendant::tell(&failed);
    }
    runtime.shutdown_background();
    result
}

/// What a worker has before it mounts.
struct Begun {
    nfs: Nfs3,
    export: FileHandle,
    root: FileHandle,
    caches: Arc<Caches>,
    fs: Arc<Fs>,
    /// How long a small call took.
    round_trip: Duration,
}

/// Asks the server for all that a mount needs. `worker` is this attendant's name.
async fn begin(
    task: &Task,
    worker: &str,
    right: Option<&Arc<RightEnd>>,
) -> Result<Begun, WorkerError> {
    let nfs = connect(task, right).await?;
    let export = ask_for_export(task).await?;
    let root = find_root(task, &nfs, &export).await?;
    let caches = Caches::start().step("start a thread")?;
    let options = task.options.clone();
    let hidden = Hidden::new(&task.run_dir, worker);
    let fs = Fs::start(nfs.clone(), root, options, Arc::clone(&caches) as _, hidden).await;
    let fs = self::nfs(fs).step("ask the server about the volume's directory")?;

    // The catalog's directory is closed to others, where the volume's may be open to all.
    let began = Instant::now();
    let found = nfs.lookup(&Cred::root(), &export, b".nfsvol").await;
    let round_trip = began.elapsed();
    if let Ok(found) = found
        && rights::beyond_mode_bits(&nfs, &found.handle).await
    {
        fs.let_server_decide();
    }
    Ok(Begun {
        nfs,
        export,
        root,
        caches,
        fs,
        round_trip,
    })
}

/// Answers the daemon before the volume is served: the right may end sooner than the start, which
/// then waits for it. Who asks anything else has no answer, at once.
async fn hear_of_the_right(listener: &UnixListener, right: Option<&RightEnd>) -> Infallible {
    loop {
        let Ok((mut stream, _)) = listener.accept().await else {
            tokio::time::sleep(COMMAND_TIME).await;
            continue;
        };
        let command = tokio::time::timeout(COMMAND_TIME, receive(&mut stream)).await;
        let (Ok(Ok(Command::Prolong(until))), Some(right)) = (command, right) else {
            continue;
        };
        if mutant::is_on(Mutant::StartHearsNothing) {
            continue;
        }
        right.prolong(until);
        let _ = send(&mut stream, &Report::Done).await;
    }
}

async fn serve(task: &Task) -> Result<(), WorkerError> {
    let (post, listener) = Post::take(&task.run_dir).step("be found again")?;
    let right = task.fence.map(|fence| Arc::new(RightEnd::new(fence.until)));
    let begun = tokio::select! {
        begun = begin(task, post.name(), right.as_ref()) => begun?,
        never = hear_of_the_right(&listener, right.as_deref()) => match never {},
    };
    let Begun {
        nfs,
        export,
        root,
        caches,
        fs,
        round_trip,
    } = begun;
    let load = Arc::new(Load::default());
    let (device, answers) = mount(task, fs.server_decides())?;
    let glue = Glue::new(Arc::clone(&fs), Arc::clone(&load), answers);
    let (ended_tx, mut ended) = oneshot::channel();
    let acl = fuser::SessionACL::All;
    let session = fuser::Session::from_fd(glue, device, acl, fuser::Config::default());
    let session = match session {
        Ok(session) => session,
        Err(error) => {
            let _ = rustix::mount::unmount(&task.mountpoint, UnmountFlags::DETACH);
            return Err(error).step("begin with FUSE");
        }
    };
    caches.connect(session.notifier());
    std::thread::Builder::new()
        .name("session".to_owned())
        .stack_size(64 * 1024)
        .spawn(move || {
            let _ = ended_tx.send(session.run());
        })
        .step("start a thread")?;

    let ours = our_mount(&task.mountpoint).step("read mountinfo")?;
    if let Some(mount) = &ours {
        caches.is_mounted(mount.clone());
    }
    let mut warnings = Vec::new();
    if fs.server_decides() {
        warnings.push(
            "the server does not go by mode bits (all_squash, or an access control list): it \
             decides what each user may do, files may belong to others than who made them, and \
             chown may be refused"
                .to_owned(),
        );
    }
    if let Err(error) = raise_read_ahead(ours.as_ref(), round_trip) {
        warnings.push(format!(
            "the kernel's read-ahead stays at 128 KiB, so sequential reads are slow: {error}"
        ));
    }
    if let Err(error) = attendant::tell(&Started::Ready { warnings }) {
        // The daemon was killed, and the next one may have mounted the volume as well: our mount
        // must not stay on top of that one.
        if ours.is_some() && our_mount(&task.mountpoint).is_ok_and(|top| top == ours) {
            let _ = rustix::mount::unmount(&task.mountpoint, UnmountFlags::DETACH);
        }
        return Err(error).step("report");
    }
    attendant::close_standard_streams();

    let (run_dir, cleaning) = (task.run_dir.clone(), nfs.clone());
    tokio::spawn(async move { hidden::clean(&run_dir, &cleaning).await });
    tokio::spawn(rest(Arc::clone(&load)));

    let (abort_tx, mut abort) = mpsc::channel(1);
    let control = Arc::new(Control {
        task: task.clone(),
        nfs,
        export,
        root,
        fs: Arc::clone(&fs),
        load,
        leaving: AtomicBool::new(false),
        right,
        abort: abort_tx,
    });
    tokio::spawn(Arc::clone(&control).listen(listener));
    let mut terminate = signal(SignalKind::terminate()).step("watch for signals")?;
    let _hangup = signal(SignalKind::hangup()).step("watch for signals")?;
    let ended = loop {
        tokio::select! {
            ended = &mut ended => break Some(ended),
            _ = abort.recv() => break None,
            // The containers decide how long the volume is needed, not whoever stops services.
            _ = terminate.recv() => fs.sync_everything().await,
        }
    };
    // Until what was written is on the server, the volume is not free.
    control.leaving.store(true, Ordering::Relaxed);
    let finished = async {
        if ended.is_some() {
            fs.finish().await;
        }
        ended
    };
    let ended = tokio::select! {
        ended = finished => ended,
        _ = abort.recv() => None,
    };
    match ended {
        None => tracing::warn!("aborted"),
        Some(Ok(Err(error))) => return Err(error).step("serve FUSE"),
        Some(_) => {}
    }
    Ok(())
}

/// Lets go of memory whenever the load has ended, and of what the start needed.
async fn rest(load: Arc<Load>) {
    let (mut seen, mut rested) = (0, false);
    loop {
        tokio::time::sleep(REST_AFTER).await;
        let requests = load.requests.load(Ordering::Relaxed);
        if requests != seen {
            (seen, rested) = (requests, false);
        } else if !rested && load.under_way.load(Ordering::Relaxed) == 0 {
            super::sys::release_memory();
            super::sys::release_program();
            rested = true;
        }
    }
}

fn settings(task: &Task) -> Settings {
    let mut settings = Settings::new(SocketAddr::new(task.addr, task.nfs_port));
    settings.reserved_port = !task.options.noresvport;
    settings.nconnect = task.options.nconnect as usize;
    settings.io_timeout = task.options.deadline();
    settings.machine_name = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    settings
}

async fn connect(task: &Task, right: Option<&Arc<RightEnd>>) -> Result<Nfs3, WorkerError> {
    let connected = match (right, task.fence) {
        (Some(right), Some(fence)) => {
            let settings = settings(task);
            let connector = FencedConnector {
                inner: TcpConnector::new(settings.reserved_port),
                right: Arc::clone(right),
                under_way: Duration::from_millis(fence.under_way.into()),
            };
            Nfs3::over(&settings, connector)
        }
        _ => Nfs3::connect(settings(task)).await,
    };
    connected
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))
        .step("set up the NFS client")
}

async fn ask_for_export(task: &Task) -> Result<FileHandle, WorkerError> {
    let settings = settings(task);
    let mountd = Mountd::new(&settings, || TcpConnector::new(settings.reserved_port));
    let ports = Ports {
        nfs: Some(task.nfs_port),
        mount: Some(task.mount_port),
        mapper: None,
    };
    let mounted = mountd
        .mount(ports, task.share.export())
        .await
        .map_err(|e| io::Error::new(io::Error::from_raw_os_error(e.errno()).kind(), e))
        .step("ask the server for the export")?;
    Ok(mounted.root)
}

/// The handle of the volume's directory. No symlink is followed below the export.
async fn find_root(
    task: &Task,
    nfs: &Nfs3,
    export: &FileHandle,
) -> Result<FileHandle, WorkerError> {
    let cred = Cred::root();
    let mut handle = *export;
    for name in task.dir.components() {
        let found = self::nfs(nfs.lookup(&cred, &handle, name.as_bytes()).await)
            .step("find the volume's directory")?;
        let attr = match found.attr {
            Some(attr) => attr,
            None => self::nfs(nfs.getattr(&cred, &found.handle).await)
                .step("find the volume's directory")?,
        };
        if attr.kind != FileKind::Directory {
            let error = io::Error::new(
                io::ErrorKind::NotADirectory,
                format!("{name} in {} is not a directory", task.dir),
            );
            return Err(error).step("find the volume's directory");
        }
        handle = found.handle;
    }
    Ok(handle)
}

/// Mounts, and returns the descriptor through which the kernel's requests come, twice: fuser keeps
/// one to itself.
fn mount(task: &Task, server_decides: bool) -> Result<(rustix::fd::OwnedFd, File), WorkerError> {
    use std::os::fd::AsRawFd;
    let device = File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .step("open /dev/fuse")?;
    let answers = device.try_clone().step("open /dev/fuse")?;
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
    if task.readonly {
        flags |= MountFlags::RDONLY;
    }
    if task.options.noexec {
        flags |= MountFlags::NOEXEC;
    }
    let data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other{}",
        device.as_raw_fd(),
        if server_decides {
            ""
        } else {
            ",default_permissions"
        }
    );
    let data = std::ffi::CString::new(data).step("mount")?;
    let source = if task.dir.is_root() {
        task.share.to_string()
    } else {
        format!("{}/{}", task.share, task.dir)
    };
    rustix::mount::mount(source, &task.mountpoint, FSTYPE, flags, data.as_c_str()).step("mount")?;
    Ok((device.into(), answers))
}

/// Our mount at a place; of several on top of each other, the topmost.
pub(super) fn our_mount(point: &Path) -> io::Result<Option<MountEntry>> {
    let info = MountInfo::read_below(point)?;
    Ok(info
        .at(point)
        .filter(|mount| mount.fstype == FSTYPE)
        .cloned())
}

/// Without this the kernel reads ahead 128 KiB: FUSE's INIT cannot ask for more than the kernel
/// offers.
fn raise_read_ahead(mount: Option<&MountEntry>, round_trip: Duration) -> io::Result<()> {
    let mount = mount
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the mount is not in mountinfo"))?;
    let path = format!("/sys/class/bdi/{}/read_ahead_kb", mount.device);
    std::fs::write(path, read_ahead_kib(round_trip).to_string())
}

/// What is on its way at 1 GB/s in four round trips: the server takes its time too.
fn read_ahead_kib(round_trip: Duration) -> u128 {
    let kib = (4 * round_trip.as_micros()).next_power_of_two();
    kib.clamp(*READ_AHEAD_KIB.start(), *READ_AHEAD_KIB.end())
}

/// Answers the daemon.
struct Control {
    task: Task,
    nfs: Nfs3,
    export: FileHandle,
    root: FileHandle,
    fs: Arc<Fs>,
    load: Arc<Load>,
    leaving: AtomicBool,
    right: Option<Arc<RightEnd>>,
    abort: mpsc::Sender<()>,
}

impl Control {
    async fn listen(self: Arc<Self>, listener: UnixListener) {
        loop {
            let Ok((mut stream, _)) = listener.accept().await else {
                // Out of descriptors, at worst; later there may be some.
                tokio::time::sleep(COMMAND_TIME).await;
                continue;
            };
            let control = Arc::clone(&self);
            tokio::spawn(async move {
                let command = tokio::time::timeout(COMMAND_TIME, receive(&mut stream)).await;
                if let Ok(Ok(command)) = command {
                    let report = control.obey(command).await;
                    let _ = send(&mut stream, &report).await;
                }
            });
        }
    }

    async fn obey(&self, command: Command) -> Report {
        match command {
            Command::Status => return Report::Status(Box::new(self.status())),
            Command::Check => {
                let served = tokio::time::timeout(CHECK_TIME, self.served()).await;
                return Report::Served(served.unwrap_or(Served::Unknown));
            }
            Command::Prolong(until) => {
                if let Some(right) = &self.right {
                    right.prolong(until);
                }
            }
            Command::Flush => self.fs.sync_everything().await,
            Command::Leave => self.leaving.store(true, Ordering::Relaxed),
            Command::Abort => {
                let _ = self.abort.try_send(());
            }
        }
        Report::Done
    }

    /// Whether the volume's name leads to the directory that is served.
    async fn served(&self) -> Served {
        let cred = Cred::root();
        let ours = match self.nfs.getattr(&cred, &self.root).await {
            Ok(attr) => attr,
            Err(error) if error.errno() == libc::ESTALE => return Served::Outdated,
            Err(_) => return Served::Unknown,
        };
        let Ok(found) = find_root(&self.task, &self.nfs, &self.export).await else {
            return Served::Unknown;
        };
        match self.nfs.getattr(&cred, &found).await {
            Ok(named) if (named.fsid, named.fileid) == (ours.fsid, ours.fileid) => Served::Current,
            Ok(_) => Served::Outdated,
            Err(_) => Served::Unknown,
        }
    }

    fn status(&self) -> WorkerStatus {
        let rpc = self.nfs.traffic();
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        WorkerStatus {
            pid: std::process::id(),
            alive: true,
            task: self.task.clone(),
            leaving: self.leaving.load(Ordering::Relaxed),
            rss: resident(),
            nodes: self.fs.inodes.len(),
            open_files: self
                .fs
                .files
                .lock()
                .unwrap_or_else(|e| e.into_inner())
                .len(),
            unsaved: self.fs.room.bytes(),
            requests: self.load.requests.load(Ordering::Relaxed),
            under_way: self.load.under_way.load(Ordering::Relaxed),
            interrupted: self.load.interrupted.load(Ordering::Relaxed),
            last_error: self.load.last_error(),
            traffic: Traffic {
                reads: count(&self.load.reads),
                read_bytes: count(&self.load.read_bytes),
                writes: count(&self.load.writes),
                written_bytes: count(&self.load.written_bytes),
                rpcs: rpc.calls,
                repeated_rpcs: rpc.repeated,
            },
        }
    }
}

/// Resident memory of this process, in bytes; 0 if /proc does not say.
fn resident() -> u64 {
    std::fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|text| text.split(' ').nth(1)?.parse::<u64>().ok())
        .map_or(0, |pages| pages * rustix::param::page_size() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_far_away_is_read_ahead_further() {
        let of = |micros| read_ahead_kib(Duration::from_micros(micros));
        assert_eq!(
            [of(100), of(500), of(1000), of(2100), of(100_000)],
            [2048, 2048, 4096, 8192, 8192]
        );
    }
}
