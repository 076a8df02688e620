//! The embedded server's own process: one per directory, which outlives the daemon.
//!
//! Clients (the workers of the FUSE data path, kernel mounts) stay connected while the daemon is
//! restarted or upgraded, so the server must not be part of it. The daemon calls [`ensure`],
//! which adopts the process that runs or starts one. All is kept below
//! `<state>/embedded/<id of the directory>/`:
//!
//! | file | job |
//! |---|---|
//! | `server` | locked by the process while it serves; then holds its address |
//! | `port` | the port of the last time, taken again: clients reconnect to it |
//! | `key` | seals the handles |
//! | `log` | what a process that the daemon started has to say |
//!
//! The process ends by SIGTERM, and never by itself: it cannot know that no container needs it.

use std::fs::{File, OpenOptions};
use std::hash::Hasher;
#[expect(
    deprecated,
    reason = "the one hash of the standard library that stays the same between releases"
)]
use std::hash::SipHasher;
use std::io::{self, Read, Seek, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use embedded::{EmbeddedError, EmbeddedServer, Settings, serve, serve_on};
use tokio::time::Instant;

use crate::attendant::{self, POLL, lock};

/// The name of the hidden subcommand that runs [`run`].
pub(crate) const SUBCOMMAND: &str = "embedded-server";
/// How long a started server may take to serve. It needs milliseconds; a host under load needs
/// more, and Mount waits for it.
const START_TIME: Duration = Duration::from_secs(10);
/// How long a server waits for the lock, which [`ensure`] of another daemon may hold for a moment.
const LOCK_TIME: Duration = Duration::from_secs(2);
/// The ports tried on loopback. Below 1024, so that no user can take the port while the server is
/// away and be believed to be the server; below 300, where no NFS client binds its own end.
const PORTS: std::ops::RangeInclusive<u16> = 230..=299;

/// Why a directory is not served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LocalServerError {
    #[error(transparent)]
    Server(#[from] EmbeddedError),
    #[error("embedded server: another process serves {dir}")]
    Running { dir: PathBuf },
    #[error("embedded server: the process that is to serve {dir} did not start: {why}")]
    Start { dir: PathBuf, why: String },
}

/// What the process is asked to do.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    /// The directory to serve.
    pub(crate) dir: PathBuf,
    /// Where to listen; by default on loopback, at the port of the last time.
    pub(crate) listen: Vec<SocketAddr>,
    /// The state directory of nfsvol.
    pub(crate) state_dir: PathBuf,
    /// Serve also clients whose port is 1024 or above.
    pub(crate) any_client_port: bool,
}

/// The address at which `dir` is served, by a process that runs already or that is started now
/// as `program embedded-server --state-dir STATE DIR`. A directory that is not there is made.
///
/// # Errors
/// [`LocalServerError::Start`] with the last lines of its log, after at most [`START_TIME`].
pub(crate) async fn ensure(
    program: &Path,
    dir: &Path,
    state_dir: &Path,
) -> Result<SocketAddr, LocalServerError> {
    std::fs::create_dir_all(dir).map_err(|source| EmbeddedError::Directory {
        dir: dir.to_owned(),
        source,
    })?;
    let place = Place::of(state_dir, &real(dir)?)?;
    let deadline = Instant::now() + START_TIME;
    let mut child = None;
    loop {
        match place.holder()? {
            Holder::Serving(addr) => return Ok(addr),
            Holder::Starting => {}
            Holder::Nobody => match &mut child {
                None => child = Some(place.start(program, dir, state_dir)?),
                Some(child) => {
                    // It may have lost to another daemon's: then somebody holds the lock soon.
                    let ended = child.try_wait().map_err(|source| place.failed(source))?;
                    if let Some(status) = ended {
                        let why = format!("{status}: {}", place.last_words());
                        return Err(place.not_started(dir, why));
                    }
                }
            },
        }
        if Instant::now() >= deadline {
            let why = format!("not serving after {START_TIME:?}: {}", place.last_words());
            return Err(place.not_started(dir, why));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Serves until `stop` is ready. This is what the subcommand does.
///
/// # Errors
/// [`LocalServerError::Running`] when another process serves the directory; else those of [`serve`].
pub(crate) async fn run(
    options: &Options,
    stop: impl Future<Output = ()>,
) -> Result<(), LocalServerError> {
    let dir = real(&options.dir)?;
    let place = Place::of(&options.state_dir, &dir)?;
    let mut lock = place.lock(&dir).await?;
    let settings = Settings {
        state_dir: place.0.clone(),
        privileged_only: !options.any_client_port,
    };
    // The path as the user wrote it is what clients mount.
    let server = if options.listen.is_empty() {
        place.serve_where_last(&options.dir, &settings).await?
    } else {
        serve_on(&options.dir, &options.listen, &settings).await?
    };
    let failed = |source| place.failed(source);
    writeln!(lock, "{}", server.addr).map_err(failed)?;
    stop.await;
    server.shutdown().await;
    Ok(())
}

/// The directory's one name.
fn real(dir: &Path) -> Result<PathBuf, EmbeddedError> {
    dir.canonicalize()
        .map_err(|source| EmbeddedError::Directory {
            dir: dir.to_owned(),
            source,
        })
}

/// Who holds a directory's lock.
enum Holder {
    Nobody,
    Starting,
    Serving(SocketAddr),
}

/// The state of one served directory.
#[derive(Debug)]
struct Place(PathBuf);

impl Place {
    fn of(state_dir: &Path, dir: &Path) -> Result<Self, EmbeddedError> {
        #[expect(deprecated, reason = "see the import")]
        let mut hasher = SipHasher::new();
        hasher.write(dir.as_os_str().as_bytes());
        let place = Self(
            state_dir
                .join("embedded")
                .join(format!("{:016x}", hasher.finish())),
        );
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&place.0)
            .map_err(|source| place.failed(source))?;
        Ok(place)
    }

    fn failed(&self, source: io::Error) -> EmbeddedError {
        EmbeddedError::State {
            path: self.0.clone(),
            source,
        }
    }

    fn open_lock(&self) -> io::Result<File> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(self.0.join("server"))
    }

    fn holder(&self) -> Result<Holder, EmbeddedError> {
        let look = || {
            let mut file = self.open_lock()?;
            if !lock::is_held(&file)? {
                return Ok(Holder::Nobody);
            }
            let mut text = String::new();
            file.read_to_string(&mut text)?;
            // Without its newline the address may be half written.
            let addr = text.strip_suffix('\n').and_then(|text| text.parse().ok());
            Ok(addr.map_or(Holder::Starting, Holder::Serving))
        };
        look().map_err(|source| self.failed(source))
    }

    /// Takes the lock and empties the file.
    async fn lock(&self, dir: &Path) -> Result<File, LocalServerError> {
        let failed = |source| self.failed(source);
        let mut file = self.open_lock().map_err(failed)?;
        let deadline = Instant::now() + LOCK_TIME;
        loop {
            if lock::take(&file).map_err(failed)? {
                break;
            }
            if Instant::now() >= deadline {
                return Err(LocalServerError::Running {
                    dir: dir.to_owned(),
                });
            }
            tokio::time::sleep(POLL).await;
        }
        file.set_len(0)
            .and_then(|()| file.rewind())
            .map_err(failed)?;
        Ok(file)
    }

    /// Serves on loopback, at the last port if it can be had.
    async fn serve_where_last(
        &self,
        dir: &Path,
        settings: &Settings,
    ) -> Result<EmbeddedServer, EmbeddedError> {
        let file = self.0.join("port");
        let last: Option<u16> = std::fs::read_to_string(&file)
            .ok()
            .and_then(|text| text.trim().parse().ok());
        let mut result = None;
        for port in last.into_iter().chain(PORTS) {
            let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            match serve(dir, listen, settings).await {
                Ok(server) => {
                    if last.is_some_and(|last| last != port) {
                        tracing::warn!(
                            port,
                            ?last,
                            "the port of the last time is taken: what is mounted from it stays \
                             without a server until it is mounted again"
                        );
                    }
                    std::fs::write(&file, format!("{port}\n")).map_err(|e| self.failed(e))?;
                    return Ok(server);
                }
                // Taken: the next one.
                Err(error @ EmbeddedError::Listen { .. }) => result = Some(error),
                Err(error) => return Err(error),
            }
        }
        // PORTS is not empty, so there was an error.
        Err(result.unwrap_or(EmbeddedError::Nowhere))
    }

    fn start(
        &self,
        program: &Path,
        dir: &Path,
        state_dir: &Path,
    ) -> Result<tokio::process::Child, LocalServerError> {
        let start = || {
            let log = OpenOptions::new()
                .create(true)
                .write(true)
                .truncate(true)
                .mode(0o600)
                .open(self.0.join("log"))?;
            let output = log.try_clone()?;
            attendant::command(program, SUBCOMMAND, log)
                .arg("--detach")
                .arg("--state-dir")
                .arg(state_dir)
                .arg("--")
                .arg(dir)
                .current_dir("/")
                .stdin(Stdio::null())
                .stdout(output)
                .spawn()
        };
        start().map_err(|source| {
            self.not_started(dir, format!("cannot run {}: {source}", program.display()))
        })
    }

    fn not_started(&self, dir: &Path, why: String) -> LocalServerError {
        LocalServerError::Start {
            dir: dir.to_owned(),
            why: format!("{why} (its log: {})", self.0.join("log").display()),
        }
    }

    /// The end of the log.
    fn last_words(&self) -> String {
        let log = std::fs::read(self.0.join("log")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let tail: Vec<&str> = log.lines().rev().take(3).collect();
        tail.into_iter().rev().collect::<Vec<_>>().join("; ")
    }
}

/// Leaves the session of whoever started the process, so that the end of a terminal or of the
/// daemon's process group does not reach it.
pub(crate) fn detach() {
    // The daemon has started this process in the root directory.
    let _ = attendant::detach();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_process_serves_a_directory_and_its_port_stays() {
        if !rustix::process::geteuid().is_root() {
            assert!(
                std::env::var_os("NFSVOL_TEST_REQUIRE_ALL").is_none(),
                "needs root"
            );
            return;
        }
        let (dir, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let options = Options {
            dir: dir.path().to_owned(),
            listen: Vec::new(),
            state_dir: state.path().to_owned(),
            any_client_port: false,
        };
        // No program is needed as long as one serves.
        let none = Path::new("/nonexistent");
        let missing = ensure(none, dir.path(), state.path()).await.unwrap_err();
        assert!(missing.to_string().contains("/nonexistent"), "{missing}");
        let mut ports = Vec::new();
        for _ in 0..2 {
            let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
            let first = options.clone();
            let task =
                tokio::spawn(async move { run(&first, async { drop(stopped.await) }).await });
            let place = Place::of(state.path(), &real(dir.path()).unwrap()).unwrap();
            while !matches!(place.holder().unwrap(), Holder::Serving(_)) {
                tokio::time::sleep(POLL).await;
                assert!(!task.is_finished());
            }
            let addr = ensure(none, dir.path(), state.path()).await.unwrap();
            assert!(addr.ip().is_loopback() && addr.port() < 1024, "{addr}");
            ports.push(addr.port());
            let second = run(&options, std::future::pending()).await.unwrap_err();
            assert!(
                matches!(second, LocalServerError::Running { .. }),
                "{second}"
            );
            stop.send(()).unwrap();
            task.await.unwrap().unwrap();
            assert!(matches!(place.holder().unwrap(), Holder::Nobody));
        }
        assert_eq!(ports[0], ports[1]);
    }
}
