//! The listening socket: handed over by systemd, or made here.
//!
//! A socket made here has mode 0600 from its first moment on, replaces a file that nobody answers
//! on, and is removed at the end unless another process has put its own in that place. One handed
//! over stays: systemd listens on, so clients wait while the service restarts.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{PidfdFlags, PidfdGetfdFlags};
use tokio::net::{UnixListener, UnixStream};

/// Connections that wait to be accepted. The kernel caps it at net.core.somaxconn (4096).
const BACKLOG: i32 = 1024;

/// How long two daemons that start at once may wait for each other; making a socket takes
/// microseconds.
const DIRECTORY_LOCK: Duration = Duration::from_secs(5);

/// How long to try whether somebody answers on a socket that is there already. A connection to a
/// local listener is made at once or not at all.
const PROBE: Duration = Duration::from_secs(2);

/// Why there is no socket to listen on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error(
        "another process answers on {0}: is nfsvol running already? Stop it first \
         (systemctl stop nfsvol), or choose another --socket"
    )]
    Taken(PathBuf),
    #[error("{0} exists and is not a socket: move it away, or choose another --socket")]
    NotASocket(PathBuf),
    #[error("another process has held the directory of {0} locked for 5 s: try again")]
    Locked(PathBuf),
    #[error("the socket path {0} is too long: Linux allows 107 bytes, choose a shorter --socket")]
    Long(PathBuf),
    #[error("cannot {step} {path}")]
    Step {
        step: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(
        "systemd handed over {0} sockets, nfsvol takes one: see ListenStream= in nfsvol.socket"
    )]
    Several(usize),
    #[error("cannot use the socket that systemd handed over")]
    HandedOver(#[source] io::Error),
}

/// A socket to serve on.
#[derive(Debug)]
pub struct Listener {
    pub(super) socket: UnixListener,
    made: Option<Made>,
}

/// A child that a killed daemon was just starting holds its socket until it runs its own program:
/// so often, and after such pauses, a socket that seems taken is looked at again.
const STALE_TRIES: u32 = 5;
const STALE_PAUSE: Duration = Duration::from_millis(50);

/// The file of a socket that was made here, as it was then.
#[derive(Debug)]
struct Made {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Listener {
    /// Takes the socket that systemd handed over, or makes one at `path`.
    ///
    /// # Errors
    /// [`ListenError`]; nothing has changed then, but for directories that were missing.
    pub async fn open(path: &Path) -> Result<Self, ListenError> {
        if let Some(socket) = handed_over()? {
            return Ok(Self { socket, made: None });
        }
        let at = |step, source: Errno| ListenError::Step {
            step,
            path: path.to_owned(),
            source: source.into(),
        };
        let directory = make_directory(path)?;
        // Without the lock, two that start at once could both find the old socket stale, and the
        // second would remove the first one's. Dropping the descriptor gives it back.
        let lock = rustix::fs::open(
            &directory,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|error| at("open the directory of", error))?;
        let locked = async {
            loop {
                match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                    Err(Errno::WOULDBLOCK) => tokio::time::sleep(Duration::from_millis(10)).await,
                    other => break other,
                }
            }
        };
        tokio::time::timeout(DIRECTORY_LOCK, locked)
            .await
            .map_err(|_| ListenError::Locked(path.to_owned()))?
            .map_err(|error| at("lock the directory of", error))?;

        let mut tries = 1..=STALE_TRIES;
        while let Err(error) = remove_stale(path).await {
            if !matches!(error, ListenError::Taken(_)) || tries.next().is_none() {
                return Err(error);
            }
            tokio::time::sleep(STALE_PAUSE).await;
        }

        let address = SocketAddrUnix::new(path).map_err(|_| ListenError::Long(path.to_owned()))?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(|error| at("make the socket", error))?;
        // bind(2) gives the file the mode of the socket (unix_bind in net/unix/af_unix.c), so it
        // is never open to others, whatever the umask.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)
            .map_err(|error| at("set the mode of", error))?;
        rustix::net::bind(&socket, &address).map_err(|error| at("bind", error))?;
        rustix::net::listen(&socket, BACKLOG).map_err(|error| at("listen on", error))?;
        let file = std::fs::symlink_metadata(path).map_err(|source| ListenError::Step {
            step: "look at",
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            socket: register(socket).map_err(|source| ListenError::Step {
                step: "listen on",
                path: path.to_owned(),
                source,
            })?,
            made: Some(Made {
                path: path.to_owned(),
                device: file.dev(),
                inode: file.ino(),
            }),
        })
    }

    /// Whether the socket outlives this process, with whoever waits on it.
    pub(super) fn is_handed_over(&self) -> bool {
        self.made.is_none()
    }

    /// Removes the file, so that no new client comes, if it is still the one made here.
    pub(super) fn remove(&mut self) {
        let Some(made) = self.made.take() else { return };
        let ours = std::fs::symlink_metadata(&made.path)
            .is_ok_and(|file| (file.dev(), file.ino()) == (made.device, made.inode));
        if ours && let Err(error) = std::fs::remove_file(&made.path) {
            tracing::warn!(path = %made.path.display(), %error, "cannot remove the socket");
        }
    }
}

/// A socket that is dropped unserved leaves no file behind either.
impl Drop for Listener {
    fn drop(&mut self) {
        self.remove();
    }
}

fn register(socket: OwnedFd) -> io::Result<UnixListener> {
    let socket = std::os::unix::net::UnixListener::from(socket);
    socket.set_nonblocking(true)?;
    // Fails for anything but a Unix socket.
    socket.local_addr()?;
    UnixListener::from_std(socket)
}

/// The socket that systemd passed (sd_listen_fds(3)), if it did.
fn handed_over() -> Result<Option<UnixListener>, ListenError> {
    let descriptors: Vec<_> = sd_notify::listen_fds()
        .map_err(ListenError::HandedOver)?
        .collect();
    let [descriptor] = descriptors[..] else {
        return match descriptors.len() {
            0 => Ok(None),
            several => Err(ListenError::Several(several)),
        };
    };
    // A number can be turned into an owned descriptor safely only by asking the kernel for a copy.
    let copy = || {
        let own = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
        rustix::process::pidfd_getfd(own, descriptor, PidfdGetfdFlags::empty())
    };
    copy()
        .map_err(io::Error::from)
        .and_then(register)
        .map(Some)
        .map_err(ListenError::HandedOver)
}

fn make_directory(socket: &Path) -> Result<PathBuf, ListenError> {
    let directory = match socket.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(directory)
        .map_err(|source| ListenError::Step {
            step: "make the directory",
            path: directory.to_owned(),
            source,
        })?;
    Ok(directory.to_owned())
}

/// Removes a socket file that nobody listens on.
async fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let at = |step| {
        move |source| ListenError::Step {
            step,
            path: path.to_owned(),
            source,
        }
    };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(at("look at")(error)),
        Ok(file) if !file.file_type().is_socket() => {
            return Err(ListenError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match tokio::time::timeout(PROBE, UnixStream::connect(path)).await {
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(at("remove the stale socket"))
        }
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // A connection, a full queue (EAGAIN) and silence all mean that somebody is there.
        _ => Err(ListenError::Taken(path.to_owned())),
    }
}
