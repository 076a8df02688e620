//! This host's part in the cluster: its session, what it tells the others it holds, and what is
//! refused because of what they hold.
//!
//! Invariant: a volume of the home share that Docker was given is held on the share first, and is
//! let go of there only when no process of this host has it any more.
//!
//! | module | job |
//! |---|---|
//! | [`hold`] | taking a volume, before it is mounted |
//! | [`leave`] | letting go of it |
//! | [`settle`] | making true what the others are told |
//! | [`session`] | renewing the session and the rights that it gives |
//! | [`together`] | what calls do on the shares that other hosts see |
//! | [`turns`] | taking turns with an exclusive volume |

mod hold;
mod leave;
mod session;
mod settle;
pub(super) mod together;
mod turns;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use self::together::{Together, Ways};
use self::turns::Turns;
use super::DriverError;
use super::config::Config;
use super::elsewhere::Elsewhere;
use super::shares::Shares;
use crate::cluster::{Env, Holding, Host as Identity, Member, MemberError, Times};
use crate::home::Catalog;
use crate::host::{Host, HostError};
use crate::layout;
use crate::sys::files::write_durably;
use crate::volume::{VolumeName, VolumeOptions};
use chance::since_boot;
use nfs::address::SharePath;
use nfs::admin::Admin;

/// A random id of this state directory; in it.
const ID_FILE: &str = "host-id";
/// A container that was given a volume has it in its mount namespace after this time.
pub(super) const STARTED: Duration = Duration::from_secs(3);
/// How long `ls` and `inspect` wait for what the other hosts hold now.
pub(super) const LOOK_WAIT: Duration = Duration::from_millis(250);

/// The host's clock that goes on while it is suspended, and its random numbers.
#[derive(Debug)]
pub(super) struct HostEnv;

impl Env for HostEnv {
    fn now(&self) -> Duration {
        since_boot()
    }

    fn nonce(&self) -> String {
        let number = getrandom::u64().expect("there were random numbers at the start");
        format!("{number:016x}")
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Membership {
    /// What is mounted here, which volumes there are, and how the home share is reached.
    host: Arc<Host>,
    catalog: Arc<Catalog>,
    shares: Arc<Shares>,
    /// Where Docker's engine listens, for containers that are started again.
    docker_socket: PathBuf,
    member: Member<HostEnv>,
    /// When this driver only asks a share: it is no member then.
    aside: bool,
    /// Something was mounted or unmounted: the others are told soon what holds what.
    changed: tokio::sync::Notify,
    /// Renewals in a row that were not answered.
    unanswered: AtomicU64,
    /// A session has begun, and its first renewal is due.
    begun: tokio::sync::Notify,
    /// A renewal has left something to be done.
    tend: tokio::sync::Notify,
    /// The last words on other hosts' holds.
    view: Mutex<Arc<Elsewhere>>,
    /// Volumes that were unmounted, and since when: the others are told together.
    leaving: Mutex<BTreeMap<VolumeName, Instant>>,
    /// Something is in `leaving`.
    left: tokio::sync::Notify,
    turns: Turns,
    /// Counts the polls of the home share.
    turn: AtomicUsize,
}

impl Membership {
    pub(super) fn open(
        config: &Config,
        (host, catalog, shares): (Arc<Host>, Arc<Catalog>, Arc<Shares>),
    ) -> Result<Self, DriverError> {
        // From here on they do not fail: the kernel's generator is ready.
        getrandom::u64().map_err(HostError::state("random numbers"))?;
        let id = host_id(config).map_err(HostError::state(ID_FILE))?;
        let attachments = host.attachments();
        let me = Identity {
            name: name(config),
            id,
            boot: attachments.boot_id().to_owned(),
        };
        let using = attachments.all().into_iter().filter_map(|(name, _)| {
            let record = catalog
                .get(&name)
                .filter(|_| !catalog.is_only_here(&name))?;
            Some((name, record.options.access))
        });
        let times = Times::new(config.session.unwrap_or_default());
        let member = Member::new(me, times, HostEnv, using);
        Ok(Self {
            host,
            catalog,
            shares,
            docker_socket: config.docker_socket.clone(),
            member,
            aside: config.session.is_none(),
            changed: tokio::sync::Notify::new(),
            unanswered: AtomicU64::new(0),
            begun: tokio::sync::Notify::new(),
            tend: tokio::sync::Notify::new(),
            view: Mutex::default(),
            leaving: Mutex::default(),
            left: tokio::sync::Notify::new(),
            turns: Turns::default(),
            turn: AtomicUsize::new(0),
        })
    }

    fn leaving(&self) -> MutexGuard<'_, BTreeMap<VolumeName, Instant>> {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the other hosts that live hold, as of the last look.
    pub(super) fn elsewhere(&self) -> Arc<Elsewhere> {
        let view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&view)
    }

    /// What this host holds.
    pub(super) fn holds(&self) -> Arc<BTreeMap<VolumeName, crate::cluster::Hold>> {
        self.member.held()
    }
}

/// What the other hosts call this one. No host's name begins with a dot: one that only asks sees
/// them all.
fn name(config: &Config) -> String {
    match config.session {
        Some(_) => layout::host_name(&config.host),
        None => ".aside".to_owned(),
    }
}

/// The directories that a host asks for at every turn.
pub(super) fn frame(config: &Config) -> [SharePath; 2] {
    [layout::hosts(), layout::host_dir(&name(config))]
}

fn host_id(config: &Config) -> std::io::Result<String> {
    let path = config.state_dir.join(ID_FILE);
    match std::fs::read_to_string(&path) {
        Ok(id) if !id.trim().is_empty() => return Ok(id.trim().to_owned()),
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let id = HostEnv.nonce();
    write_durably(&path, id.as_bytes())?;
    Ok(id)
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Hosts and what holds a volume there, for an error.
pub(super) fn names(holdings: &[Holding]) -> String {
    let names: Vec<String> = holdings
        .iter()
        .map(|holding| {
            let host = &holding.host;
            match holding.hold.holders.as_slice() {
                [] => format!("host {host}"),
                holders => format!("host {host} ({})", holders.join(", ")),
            }
        })
        .collect();
    names.join(", ")
}

impl Ways for Membership {
    async fn home(&self) -> Result<Option<Admin>, DriverError> {
        self.shares.home().await
    }

    async fn data(
        &self,
        home: Option<&Admin>,
        options: &VolumeOptions,
    ) -> Result<Admin, DriverError> {
        self.shares.scoped_data(home, options).await
    }

    fn may_be_held(&self, name: &VolumeName) -> bool {
        self.elsewhere().of(name).next().is_some()
    }
}

impl Membership {
    /// What the other hosts call this one.
    pub(super) fn name(&self) -> &str {
        &self.member.host().name
    }

    /// Whether its session gives it rights now, and for how long from now.
    pub(super) fn has_right(&self) -> bool {
        self.member.has_right()
    }

    pub(super) fn right_left(&self) -> Duration {
        self.member.right_until().saturating_sub(self.member.now())
    }

    /// Something was mounted or unmounted: the others are told soon what holds what.
    pub(super) fn tell_soon(&self) {
        self.changed.notify_one();
    }

    /// What this host does together with others.
    pub(super) fn together(&self) -> Together<'_, HostEnv, Self> {
        Together {
            catalog: &self.catalog,
            member: &self.member,
            ways: self,
            aside: self.aside,
        }
    }

    /// Looks every other time, and more rarely the more hosts there are to list.
    pub(super) async fn look_in_turn(&self, home: &Admin) -> Result<(), DriverError> {
        let hosts = self.elsewhere().hosts().count();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        match turn.is_multiple_of(2 + hosts / 100) {
            true => self.look(home).await,
            false => Ok(()),
        }
    }

    /// Looks at what the other hosts hold.
    pub(super) async fn look(&self, home: &Admin) -> Result<(), DriverError> {
        let looked = self.member.look(home).await;
        if !matches!(looked, Ok(()) | Err(MemberError::Unreadable(_))) {
            return Ok(looked?);
        }
        let others = self.member.others();
        let view = others
            .into_iter()
            .filter(|other| {
                let times = Times::new(Duration::from_millis(other.doc.session_ms));
                other.silent < times.expire()
            })
            .map(|other| other.doc)
            .collect();
        *self.view.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(Elsewhere::new(view));
        Ok(looked?)
    }

    /// A look for somebody who waits for the answer.
    pub(super) async fn look_soon(&self) {
        let look = async {
            if let Some(home) = self.shares.home().await? {
                self.look(&home).await?;
            }
            Ok::<_, DriverError>(())
        };
        // The last look has to do.
        let _ = tokio::time::timeout(LOOK_WAIT, look).await;
    }
}
