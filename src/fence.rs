//! The fence of an exclusive volume on the kernel data path.
//!
//! The kernel's NFS client knows no right that ends. So for each such volume there is a *guard*, a
//! process that outlives the daemon as a FUSE worker does: the daemon prolongs the right at each
//! renewal of the host's session, and when the right has ended, the guard takes the volume away
//! from this host ([`end`]): its processes are killed, what they wrote and the server does not
//! have yet is thrown away, and what TCP has yet is thrown away too.
//!
//! Invariants:
//! - no container gets an exclusive volume that no guard watches;
//! - a guard that has begun to fence goes on to the end, whatever the daemon says;
//! - while a volume's own superblock is mounted, its hold is not let go of.
//!
//! Known limits: this takes a moment, so it is begun early ([`crate::cluster::Times`]), and is not
//! as exact as the FUSE worker's fence; a host that is stopped as a whole may send what it had
//! under way when it wakes, before the guard has run. docs/SEMANTICS.md tells users.
//!
//! | module | job |
//! |---|---|
//! | `process` | the guard |
//! | `end` | what it does when the right has ended |
//! | `root` | the directory of the volume that it keeps open |
//! | `cut` | ending this host's connections to a server |

mod cut;
mod end;
pub(crate) mod process;
mod root;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::attendant::{self, Attendant};
use crate::sys::files::write_whole;
use crate::sys::mountinfo::DeviceId;
use crate::volume::Right;
use crate::volume::VolumeName;

/// The name of the hidden subcommand that runs [`process::run`].
pub(crate) const SUBCOMMAND: &str = "kernel-guard";
/// What the last fence of a volume did; in its guard's directory.
const FENCED: &str = "fenced.json";
/// How long a guard may take to answer.
const ANSWER: Duration = Duration::from_secs(2);
/// How long a fence that somebody waits for may take.
const FENCE_TIME: Duration = Duration::from_secs(20);

/// Why a volume could not be guarded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GuardError {
    #[error("volume {volume}: {step}: {source}; its guard's log is {log}", log = .log.display())]
    Start {
        volume: VolumeName,
        step: &'static str,
        log: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "volume {0} is being fenced: what this host had of it is taken away; try again in a moment"
    )]
    Fencing(VolumeName),
    #[error(
        "access=exclusive on the kernel data path needs TCP (not proto=rdma), whose connections \
         can be cut; use data_path=fuse, or another proto"
    )]
    NotTcp,
    #[error(
        "access=exclusive on the kernel data path needs CAP_KILL and CAP_NET_ADMIN, which a managed \
         plugin does not have; use data_path=fuse, or run nfsvol as a service"
    )]
    NoRights,
}

/// Whether the effective capabilities of a `/proc/PID/status` let a process kill containers and
/// end connections.
fn may_fence(status: &str) -> bool {
    const KILL: u64 = 1 << 5;
    const NET_ADMIN: u64 = 1 << 12;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let set = line.and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
    set.is_some_and(|set| set & (KILL | NET_ADMIN) == KILL | NET_ADMIN)
}

/// What a guard watches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Task {
    pub volume: VolumeName,
    /// Where containers get the volume from.
    pub place: PathBuf,
    /// Where its share is mounted.
    pub share_place: PathBuf,
    /// Of the volume's own superblock.
    pub device: DeviceId,
    pub server: Option<SocketAddr>,
    /// Docker's engine.
    pub docker: PathBuf,
    /// Of which it is an attendant.
    pub run_dir: PathBuf,
    pub fence: Right,
}

/// What the daemon asks of a guard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Ask {
    Status,
    /// The volume may be used until this time (see [`Right::until`]).
    Prolong(u64),
    /// The volume is used no more.
    Leave,
    /// Take it away now.
    Fence,
}

/// How a guard is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    Watching { device: DeviceId, until: u64 },
    Fencing,
}

/// What a fence did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fenced {
    /// Seconds since 1970 by this host's clock.
    pub at: u64,
    /// The containers that were stopped.
    pub containers: Vec<String>,
    /// How many of their processes the guard itself had to kill.
    pub killed: usize,
    /// Until nothing could be sent for the volume any more.
    pub took_ms: u64,
    /// Whether that was before another host may have taken the volume.
    pub in_time: bool,
    /// The host has its right again, and has started containers anew whose restart policy says so.
    #[serde(default)]
    pub settled: bool,
    /// What could not be done.
    pub troubles: Vec<String>,
}

async fn ask(guard: &Attendant, ask: Ask) -> io::Result<State> {
    guard.ask(&ask, ANSWER).await
}

/// The guards of a host, seen from the daemon.
#[derive(Debug, Clone)]
pub(crate) struct Guards {
    state_dir: PathBuf,
    program: PathBuf,
    docker: PathBuf,
}

impl Guards {
    /// `program` is nfsvol's own executable; `docker` the engine's socket.
    #[must_use]
    pub(crate) fn new(state_dir: &Path, program: &Path, docker: &Path) -> Self {
        Self {
            state_dir: state_dir.to_owned(),
            program: program.to_owned(),
            docker: docker.to_owned(),
        }
    }

    #[must_use]
    pub(crate) fn docker(&self) -> &Path {
        &self.docker
    }

    /// Of which a volume's guard is an attendant, with its log and report.
    #[must_use]
    pub(crate) fn run_dir(&self, volume: &VolumeName) -> PathBuf {
        self.state_dir.join("guard").join(volume.as_str())
    }

    /// The guards of a volume, answering or not.
    fn living(&self, volume: &VolumeName) -> Vec<Attendant> {
        attendant::living(&self.run_dir(volume))
    }

    /// Whether a guard watches or fences the volume, answering or not.
    #[must_use]
    pub(crate) fn has(&self, volume: &VolumeName) -> bool {
        !self.living(volume).is_empty()
    }

    /// How the volume's guard is, if there is one that answers.
    pub(crate) async fn state(&self, volume: &VolumeName) -> Option<State> {
        for guard in self.living(volume) {
            if let Ok(state) = ask(&guard, Ask::Status).await {
                return Some(state);
            }
        }
        None
    }

    /// Has a volume's mount watched, by the guard that does it already or by a new one.
    ///
    /// # Errors
    /// When none can be started, or when one is taking the volume away.
    #[tracing::instrument(level = "debug", skip_all)]
    pub(crate) async fn watch(&self, task: &Task) -> Result<(), GuardError> {
        for guard in self.living(&task.volume) {
            let prolong = Ask::Prolong(task.fence.until);
            match ask(&guard, prolong).await {
                Ok(State::Watching { device, .. }) if device == task.device => return Ok(()),
                // Of an earlier mount, whose containers may not go on.
                Ok(State::Watching { .. }) => {
                    let _ = ask(&guard, Ask::Fence).await;
                    self.ended(&task.volume, Instant::now() + FENCE_TIME)
                        .await?;
                }
                Ok(State::Fencing) | Err(_) => {
                    return Err(GuardError::Fencing(task.volume.clone()));
                }
            }
        }
        self.start(task).await
    }

    async fn start(&self, task: &Task) -> Result<(), GuardError> {
        let log = task.run_dir.join("log");
        let failed = |step| {
            let (volume, log) = (task.volume.clone(), log.clone());
            move |source| GuardError::Start {
                volume,
                step,
                log,
                source,
            }
        };
        let started = failed("start its guard");
        let told = failed("tell its guard what to watch");
        std::fs::create_dir_all(&task.run_dir).map_err(failed("make its guard's directory"))?;
        let _ = std::fs::remove_file(task.run_dir.join(FENCED));
        let spawned = || {
            let log = std::fs::File::options()
                .create(true)
                .append(true)
                .open(&log)?;
            attendant::command(&self.program, SUBCOMMAND, log).spawn()
        };
        let mut child = spawned().map_err(started)?;
        let conversation = async {
            attendant::give(&mut child, task).await?;
            let started: Result<(), String> = attendant::hear(&mut child).await?;
            started.map_err(io::Error::other)
        };
        let answer = tokio::time::timeout(FENCE_TIME, conversation).await;
        let answer = answer.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        if let Err(error) = answer {
            let _ = child.kill().await;
            return Err(told(error));
        }
        Ok(())
    }

    /// Tells the volume's guards until when it may be used; whether one goes on watching.
    pub(crate) async fn prolong(&self, volume: &VolumeName, until: u64) -> bool {
        let mut watched = false;
        for guard in self.living(volume) {
            let state = ask(&guard, Ask::Prolong(until)).await;
            watched |= matches!(state, Ok(State::Watching { .. }));
        }
        watched
    }

    /// Ends the guards of a volume that is used no more.
    ///
    /// # Errors
    /// When one is taking the volume away.
    pub(crate) async fn leave(&self, volume: &VolumeName) -> Result<(), GuardError> {
        for guard in self.living(volume) {
            let _ = ask(&guard, Ask::Leave).await;
        }
        self.ended(volume, Instant::now() + ANSWER).await
    }

    /// Takes a volume away from this host now. `mounted` is what is there without a guard.
    ///
    /// # Errors
    /// When it takes too long; the guard goes on then.
    pub(crate) async fn fence(
        &self,
        volume: &VolumeName,
        mounted: Option<Task>,
    ) -> Result<(), GuardError> {
        match mounted {
            Some(task) if !self.has(volume) => self.start(&task).await?,
            _ => {}
        }
        for guard in self.living(volume) {
            let _ = ask(&guard, Ask::Fence).await;
        }
        self.ended(volume, Instant::now() + FENCE_TIME).await
    }

    /// Makes sure that a volume can be guarded: waits while a guard takes it away.
    ///
    /// # Errors
    /// When it has not ended by then; [`GuardError::NoRights`].
    #[tracing::instrument(level = "debug", skip_all)]
    pub(crate) async fn settled(
        &self,
        volume: &VolumeName,
        deadline: Instant,
    ) -> Result<(), GuardError> {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        if !may_fence(&status) {
            return Err(GuardError::NoRights);
        }
        match self.state(volume).await {
            Some(State::Watching { .. }) => Ok(()),
            Some(State::Fencing) | None => self.ended(volume, deadline).await,
        }
    }

    async fn ended(&self, volume: &VolumeName, deadline: Instant) -> Result<(), GuardError> {
        match attendant::gone(&self.run_dir(volume), deadline).await {
            true => Ok(()),
            false => Err(GuardError::Fencing(volume.clone())),
        }
    }

    /// What the last fence of a volume did, unless it was mounted since.
    #[must_use]
    pub(crate) fn fenced(&self, volume: &VolumeName) -> Option<Fenced> {
        let json = std::fs::read(self.run_dir(volume).join(FENCED)).ok()?;
        serde_json::from_slice(&json).ok()
    }

    /// The volumes that were fenced and not settled since.
    #[must_use]
    pub(crate) fn unsettled(&self) -> Vec<(VolumeName, Fenced)> {
        let Ok(entries) = std::fs::read_dir(self.state_dir.join("guard")) else {
            return Vec::new();
        };
        let names = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok());
        let names = names.filter_map(|name| name.parse::<VolumeName>().ok());
        names
            .filter_map(|name| Some((name.clone(), self.fenced(&name)?)))
            .filter(|(_, fenced)| !fenced.settled)
            .collect()
    }

    /// Notes that the host goes on after a fence.
    ///
    /// # Errors
    /// Any error of the file system.
    pub(crate) fn settle(&self, volume: &VolumeName, fenced: &Fenced) -> io::Result<()> {
        let settled = Fenced {
            settled: true,
            ..fenced.clone()
        };
        let report = self.run_dir(volume).join(FENCED);
        write_whole(&report, &serde_json::to_vec_pretty(&settled)?)
    }

    /// What this host lacks to fence well, for who mounts a volume.
    pub(crate) async fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let asked = crate::docker::engine::ask(&self.docker, hyper::Method::GET, "/version");
        if let Err(error) = tokio::time::timeout(ANSWER, asked).await.map_or_else(
            |_| Err("no answer".to_owned()),
            |answer| answer.map_err(|error| format!("{error:#}")),
        ) {
            warnings.push(format!(
                "Docker's engine is not at {} ({error}): if this host is cut off, it kills the \
                 processes of the volume's containers itself; --docker-socket names another place",
                self.docker.display()
            ));
        }
        if let Err(error) = cut::try_to_destroy() {
            warnings.push(format!(
                "this kernel does not let nfsvol end connections ({error}): after this host was \
                 cut off, its other volumes on the same server may wait up to 3 minutes longer"
            ));
        }
        warnings
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutant::{self, Mutant};

    #[test]
    fn a_managed_plugin_may_not_fence() {
        assert!(may_fence("Name:\tx\nCapEff:\t000001ffffffffff\n"));
        // CAP_SYS_ADMIN, CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH: config.json.
        assert!(!may_fence("CapEff:\t0000000000280004\n"));
        assert!(!may_fence(""));
    }

    /// After a power failure: a socket whose number is that of another volume's guard.
    #[tokio::test]
    async fn what_is_left_of_a_guard_names_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let guards = Guards::new(dir.path(), dir.path(), dir.path());
        let db: VolumeName = "db".parse().unwrap();
        let run_dir = guards.run_dir(&db);
        std::fs::create_dir_all(&run_dir).unwrap();
        let mut other = std::process::Command::new("sh")
            .args(["-c", "read waiting", SUBCOMMAND])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // Until it is the shell, whose command line names a guard.
        let cmdline = format!("/proc/{}/cmdline", other.id());
        while !std::fs::read_to_string(&cmdline)
            .unwrap()
            .contains(SUBCOMMAND)
        {
            std::thread::sleep(Duration::from_millis(5));
        }
        let socket = run_dir.join(format!("{}.sock", other.id()));
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        let back = mutant::put_back(Mutant::AttendantByNumber);
        let waits_for_the_other = guards.leave(&db).await;
        assert!(matches!(waits_for_the_other, Err(GuardError::Fencing(_))));
        drop(back);
        guards.leave(&db).await.unwrap();
        assert!(!guards.has(&db) && !socket.exists());
        drop(other.stdin.take());
        other.wait().unwrap();
    }
}
