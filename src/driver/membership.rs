//! This host's part in the cluster: its session, what it tells the others it holds, and what is
//! refused because of what they hold.
//!
//! Invariant: a volume of the home share that Docker was given is held on the share first, and is
//! let go of there only when no process of this host has it any more.

mod hold;
mod leave;
mod session;
mod settle;
pub(super) mod together;
mod turns;

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use self::together::{Together, Ways};
use self::turns::Turns;
use super::attachments::Attachments;
use super::config::Config;
use super::elsewhere::Elsewhere;
use super::{Driver, DriverError};
use crate::chance::since_boot;
use crate::cluster::{Env, Holding, Host, Member, MemberError, Times, layout};
use crate::home::Catalog;
use crate::kernel::Holder;
use crate::nfs::address::SharePath;
use crate::nfs::admin::Admin;
use crate::sys::files::write_durably;
use crate::volume::{VolumeName, VolumeOptions};

/// A random id of this state directory; in it.
const ID_FILE: &str = "host-id";
/// A container that was given a volume has it in its mount namespace after this time.
pub(super) const STARTED: Duration = Duration::from_secs(3);
/// How long `ls` and `inspect` wait for what the other hosts hold now.
pub(super) const LOOK_WAIT: Duration = Duration::from_millis(250);
/// Volumes that are unmounted within this time are let go of by one document. In it a Remove on
/// another host waits ([`super::together`]) rather than being refused.
pub(super) const LEAVE_TOGETHER: Duration = Duration::from_millis(50);

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
pub(super) struct Cluster {
    pub(super) member: Member<HostEnv>,
    /// When this driver only asks a share: it is no member then.
    aside: bool,
    /// Something was mounted or unmounted: the others are told soon what holds what.
    pub(super) changed: tokio::sync::Notify,
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
    pub(super) left: tokio::sync::Notify,
    turns: Turns,
}

impl Cluster {
    pub(super) fn open(
        config: &Config,
        attachments: &Attachments,
        catalog: &Catalog,
    ) -> Result<Self, DriverError> {
        // From here on they do not fail: the kernel's generator is ready.
        getrandom::u64().map_err(|error| DriverError::State {
            what: "random numbers",
            source: error.into(),
        })?;
        let id = host_id(config).map_err(|source| DriverError::State {
            what: ID_FILE,
            source,
        })?;
        // No host's name begins with a dot: one that only asks sees them all.
        let aside = config.session.is_none();
        let name = if aside {
            ".aside".to_owned()
        } else {
            layout::host_name(&config.host)
        };
        let host = Host {
            name,
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
        Ok(Self {
            member: Member::new(host, times, HostEnv, using),
            aside,
            changed: tokio::sync::Notify::new(),
            unanswered: AtomicU64::new(0),
            begun: tokio::sync::Notify::new(),
            tend: tokio::sync::Notify::new(),
            view: Mutex::default(),
            leaving: Mutex::default(),
            left: tokio::sync::Notify::new(),
            turns: Turns::default(),
        })
    }

    /// The directories that a host asks for at every turn.
    pub(super) fn frame(&self) -> [SharePath; 2] {
        [layout::hosts(), layout::host_dir(&self.member.host().name)]
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

/// How people know a process that holds a volume.
pub(super) fn describe(holder: &Holder) -> String {
    match &holder.container_id {
        Some(id) => format!("container {}", id.get(..12).unwrap_or(id)),
        None => format!("process {} ({})", holder.pid, holder.comm),
    }
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

impl Ways for Driver {
    async fn home(&self) -> Result<Option<Admin>, DriverError> {
        Self::home(self).await
    }

    async fn data(
        &self,
        home: Option<&Admin>,
        options: &VolumeOptions,
    ) -> Result<Admin, DriverError> {
        self.scoped_data(home, options).await
    }

    fn may_be_held(&self, name: &VolumeName) -> bool {
        self.cluster.elsewhere().of(name).next().is_some()
    }
}

impl Driver {
    /// What this host does together with others.
    pub(super) fn together(&self) -> Together<'_, HostEnv, Self> {
        Together {
            catalog: &self.catalog,
            member: &self.cluster.member,
            ways: self,
            aside: self.cluster.aside,
        }
    }

    /// Looks at what the other hosts hold.
    pub(super) async fn look(&self, home: &Admin) -> Result<(), DriverError> {
        let looked = self.cluster.member.look(home).await;
        if !matches!(looked, Ok(()) | Err(MemberError::Unreadable(_))) {
            return Ok(looked?);
        }
        let others = self.cluster.member.others();
        let view = others
            .into_iter()
            .filter(|other| {
                let times = Times::new(Duration::from_millis(other.doc.session_ms));
                other.silent < times.expire()
            })
            .map(|other| other.doc)
            .collect();
        *self
            .cluster
            .view
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Arc::new(Elsewhere::new(view));
        Ok(looked?)
    }

    /// A look for somebody who waits for the answer.
    pub(super) async fn look_soon(&self) {
        let look = async {
            if let Some(home) = self.home().await? {
                self.look(&home).await?;
            }
            Ok::<_, DriverError>(())
        };
        // The last look has to do.
        let _ = tokio::time::timeout(LOOK_WAIT, look).await;
    }
}
