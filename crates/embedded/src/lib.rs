//! An NFSv3 server for one machine: a local directory over loopback, with the port mapper and MOUNT on
//! the same port. A program that needs an NFS server has one without asking for anything else, and
//! moves to a real one by changing an address.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
//! # let (dir, state) = (tempfile::tempdir()?, tempfile::tempdir()?);
//! use embedded::{EmbeddedError, Settings, serve};
//!
//! let settings = Settings {
//!     state_dir: state.path().to_owned(),
//!     privileged_only: true,
//! };
//! match serve(dir.path(), "127.0.0.1:0".parse()?, &settings).await {
//!     Ok(server) => {
//!         assert!(server.addr.port() > 0);
//!         server.shutdown().await;
//!     }
//!     // It runs as root only.
//!     Err(error) => assert!(matches!(error, EmbeddedError::NotRoot)),
//! }
//! # Ok(())
//! # })
//! # }
//! ```
//!
//! It is not offered as a production server: one directory of one host, no high availability,
//! no Kerberos, no quotas, no locks between hosts; and it says so when it starts.
//!
//! What a client may rely on:
//! - Handles are the kernel's own, sealed with a key that is kept in the state directory: they
//!   survive renames and restarts, cannot be made up, and are STALE when the file is gone.
//! - MKDIR, exclusive CREATE (a retransmission finds its own file), GUARDED, RENAME and LINK are
//!   atomic, as the file system below makes them; what changes names is on disk before the
//!   answer; UNSTABLE writes are on disk after COMMIT, whose verifier changes at each start.
//! - Each call runs as its AUTH_UNIX user and groups: owners are right and the kernel checks
//!   permissions. Root stays root.
//! - A call that is sent again because a connection broke gets its first answer again.
//!
//! Known limits: attributes set by SETATTR are on disk with the next COMMIT of the file, not at
//! once; a mount below the directory is not entered.
//!
//! Who is trusted: on loopback, whoever can bind a port below 1024 of this host's network
//! namespace, which is root, and a container with `--network host` and CAP_NET_BIND_SERVICE.
//! Any other client is refused.
//!
//! Why not the `nfs3_server` crate (0.11), whose sister `nfs3_types` packs the replies here: its
//! file systems hear neither the caller nor the mode of a new directory, GUARDED is two steps,
//! handles and write verifier are one number (either handles die at a restart, or lost writes go
//! unnoticed), a repeated call is dropped, REMOVE and RMDIR are one, and there is no LINK, no
//! MKNOD and no true FSSTAT.

mod export;
mod handle;
mod identity;
mod nfs;
mod replay;
mod server;
mod sys;
mod xdr;

use std::io;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use export::Export;
use handle::Key;
use server::Service;

/// How long to wait before accepting again when the host is out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long a stopping server waits for the calls under way.
const SHUTDOWN_TIME: Duration = Duration::from_secs(5);
/// The name of the file in the state directory that holds the key of the handles.
const KEY_FILE: &str = "key";

/// Why the embedded server could not start.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    #[error("embedded server: cannot use the directory {dir}: {source}")]
    Directory { dir: PathBuf, source: io::Error },
    #[error(
        "embedded server: the file system of {dir} has no file handles that last (overlayfs and \
         some others have none); use a directory on ext4, XFS, Btrfs or tmpfs"
    )]
    NoHandles { dir: PathBuf },
    #[error("embedded server: it runs as root only (CAP_DAC_READ_SEARCH and CAP_SETUID)")]
    NotRoot,
    #[error("embedded server: cannot listen on {addr}: {source}")]
    Listen { addr: SocketAddr, source: io::Error },
    #[error("embedded server: no address to listen on")]
    Nowhere,
    #[error("embedded server: its state in {path} cannot be read or written: {source}")]
    State { path: PathBuf, source: io::Error },
}

/// How to serve.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where the key of the handles is kept; made when absent.
    pub state_dir: PathBuf,
    /// Refuse clients whose port is 1024 or above. Anything else than `true` trusts every user
    /// who can reach the port with root's rights on the directory.
    pub privileged_only: bool,
}

/// A running server; dropping it leaves it running until [`EmbeddedServer::shutdown`].
#[derive(Debug)]
pub struct EmbeddedServer {
    /// Where portmap, MOUNT and NFS are answered.
    pub addr: SocketAddr,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl EmbeddedServer {
    /// Stops accepting, answers the calls under way, and closes: within [`SHUTDOWN_TIME`], even
    /// if a client does not read its answers.
    pub async fn shutdown(self) {
        self.stop.cancel();
        let _ = tokio::time::timeout(SHUTDOWN_TIME, self.tasks.wait()).await;
    }
}

/// [`serve_on`] one address.
///
/// # Errors
/// As there.
pub async fn serve(
    dir: &Path,
    listen: SocketAddr,
    settings: &Settings,
) -> Result<EmbeddedServer, EmbeddedError> {
    serve_on(dir, &[listen], settings).await
}

/// Serves `dir` on each of `listen` (port 0: any free port). The port mapper tells clients the
/// port of the first: with 2049 and 111, they need to be told none.
///
/// Sets the umask of the process to 0: the modes of new files come from clients, which have
/// applied their own. Meant for a process of its own.
///
/// # Errors
/// [`EmbeddedError`], before anything is served.
pub async fn serve_on(
    dir: &Path,
    listen: &[SocketAddr],
    settings: &Settings,
) -> Result<EmbeddedServer, EmbeddedError> {
    let key = key(&settings.state_dir)?;
    let service_dir = dir.to_owned();
    // A new verifier at each start: what was UNSTABLE then is sent again.
    let mut verifier = [0; 8];
    getrandom::fill(&mut verifier).map_err(|error| EmbeddedError::State {
        path: "/dev/urandom".into(),
        source: io::Error::other(error),
    })?;
    let export =
        Export::open(dir, key, u64::from_ne_bytes(verifier)).map_err(|source| {
            match source.raw_os_error() {
                Some(libc::EOPNOTSUPP | libc::EOVERFLOW) => {
                    EmbeddedError::NoHandles { dir: service_dir }
                }
                Some(libc::EPERM) => EmbeddedError::NotRoot,
                _ => EmbeddedError::Directory {
                    dir: service_dir,
                    source,
                },
            }
        })?;
    let mut listeners = Vec::new();
    for &addr in listen {
        let failed = |source| EmbeddedError::Listen { addr, source };
        let listener = TcpListener::bind(addr).await.map_err(failed)?;
        listeners.push((listener.local_addr().map_err(failed)?, listener));
    }
    let &(addr, _) = listeners.first().ok_or(EmbeddedError::Nowhere)?;
    rustix::process::umask(rustix::fs::Mode::empty());
    let service = Arc::new(Service {
        export,
        replies: Default::default(),
        paths: paths(dir),
        port: addr.port(),
        privileged_only: settings.privileged_only,
    });
    let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
    for (_, listener) in listeners {
        let service = Arc::clone(&service);
        tasks.spawn(accept(listener, service, stop.clone(), tasks.clone()));
    }
    tasks.close();
    tracing::warn!(
        dir = %dir.display(), %addr,
        "serving a local directory with the embedded NFS server, which is for one machine and \
         for trying things out: use a real NFS server in production"
    );
    Ok(EmbeddedServer { addr, stop, tasks })
}

async fn accept(
    listener: TcpListener,
    service: Arc<Service>,
    stop: CancellationToken,
    tasks: TaskTracker,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                // Only costs time if it fails.
                let _ = stream.set_nodelay(true);
                tasks.spawn(server::connection(
                    Arc::clone(&service),
                    stream,
                    peer,
                    stop.clone(),
                ));
            }
            Err(error) => {
                tracing::warn!(%error, "embedded server: cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// The paths by which clients may mount the directory: as given, and as it really is.
fn paths(dir: &Path) -> Vec<Vec<u8>> {
    let mut paths = vec![dir.to_owned()];
    paths.extend(dir.canonicalize().ok().filter(|real| real != dir));
    let trim = |path: PathBuf| {
        let bytes = path.as_os_str().as_bytes();
        let end = bytes
            .iter()
            .rposition(|&byte| byte != b'/')
            .map_or(0, |last| last + 1);
        bytes[..end].to_vec()
    };
    paths.into_iter().map(trim).collect()
}

/// The key of the handles: read, or made once and kept.
fn key(state_dir: &Path) -> Result<Key, EmbeddedError> {
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    let path = state_dir.join(KEY_FILE);
    let failed = |source| EmbeddedError::State {
        path: path.clone(),
        source,
    };
    match std::fs::read(&path) {
        Ok(bytes) => {
            let bytes = bytes
                .try_into()
                .map_err(|_| failed(io::Error::new(io::ErrorKind::InvalidData, "not 16 bytes")))?;
            return Ok(Key::from_bytes(bytes));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| failed(io::Error::other(error)))?;
    let temporary = state_dir.join("key.new");
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(state_dir)
        .map_err(failed)?;
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(failed)?;
    io::Write::write_all(&mut file, &bytes)
        .and_then(|()| file.sync_all())
        .and_then(|()| std::fs::rename(&temporary, &path))
        .map_err(failed)?;
    Ok(Key::from_bytes(bytes))
}

#[cfg(test)]
mod tests;
