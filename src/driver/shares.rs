//! The shares that this host has to do with: how each is reached, its admin path, its health.
//!
//! Invariants: one share's trouble is kept in its own [`Contact`], so it never delays a call for
//! another; a share that just answered is not probed again for [`FRESH`].

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::DriverError;
use super::config::Config;
use crate::api::daemon::Health;
use crate::home::CatalogError;
use crate::host::{Host, HostError};
use crate::kernel::MountError;
use crate::layout;
use crate::local_server;
use crate::volume::{MountOptions, VolumeOptions};
use chance::host_time;
use nfs::address::{Server, Share, SharePath};
use nfs::admin::{Admin, AdminSettings, Space};
use nfs::probe::{self, Breaker, Ports, Reached};

/// How long a successful probe is good for: a burst of Mounts probes once.
const FRESH: Duration = Duration::from_secs(5);
/// The longest that one probe of a share takes, all steps together. dockerd's shortest patience
/// is 60 s, and Mount tries again.
const PROBE_DEADLINE: Duration = Duration::from_secs(10);

/// One share and what is known of it.
#[derive(Debug)]
pub(super) struct Contact {
    pub(super) share: Share,
    given: Ports,
    state_dir: PathBuf,
    breaker: Breaker,
    /// Held while probing, so that calls that come together probe once.
    probing: tokio::sync::Mutex<()>,
    state: Mutex<State>,
    /// RPCs of admin paths that were replaced by newer ones.
    spent: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    reached: Option<(Reached, Instant)>,
    admin: Option<(Ports, Admin)>,
    health: Health,
    /// It said nothing of use when it was asked last, by a call that can do without it.
    silent: bool,
}

impl Contact {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn health(&self) -> Health {
        self.state().health.clone()
    }

    /// RPCs for directory operations so far, over NFSv3 in user space.
    pub(super) fn rpcs(&self) -> u64 {
        let state = self.state();
        let now = state.admin.as_ref().map_or(0, |(_, a)| a.rpc_count());
        self.spent.load(Ordering::Relaxed) + now
    }

    /// Whether the last look at the share failed, or it was silent since the last answer.
    pub(super) fn is_down(&self) -> bool {
        let state = self.state();
        state.silent || state.health.healthy == Some(false)
    }

    /// Notes whether the share answered who can do without it.
    pub(super) fn heard(&self, answered: bool) {
        self.state().silent = !answered;
    }

    /// Notes why a look at the share failed.
    fn failed(&self, error: &impl ToString) {
        let mut state = self.state();
        state.health.healthy = Some(false);
        state.health.error = Some(error.to_string());
        state.reached = None;
    }

    /// The ports to reach the share at; for an embedded share its server is started first.
    async fn ports(&self) -> Result<Ports, DriverError> {
        if *self.share.server() != Server::Embedded {
            return Ok(self.given);
        }
        let program = std::env::current_exe().map_err(HostError::state("finding this program"))?;
        let dir = Path::new(self.share.export());
        let addr = local_server::ensure(&program, dir, &self.state_dir).await?;
        Ok(Ports {
            nfs: Some(addr.port()),
            mount: Some(addr.port()),
        })
    }

    fn fresh(&self) -> Option<Reached> {
        let state = self.state();
        let (reached, at) = state.reached.as_ref()?;
        (at.elapsed() < FRESH).then(|| reached.clone())
    }

    /// Reaches the share step by step, or fails at once while its breaker is open.
    #[tracing::instrument(level = "debug", skip_all)]
    pub(super) async fn reach(&self) -> Result<Reached, DriverError> {
        if let Some(reached) = self.fresh() {
            return Ok(reached);
        }
        let _probing = self.probing.lock().await;
        if let Some(reached) = self.fresh() {
            return Ok(reached);
        }
        let ports = self.ports().await?;
        let probed = self
            .breaker
            .run(probe::probe(&self.share, ports, PROBE_DEADLINE))
            .await;
        match probed {
            Ok(reached) => {
                let mut state = self.state();
                state.silent = false;
                state.health.healthy = Some(true);
                state.health.error = None;
                state.health.last_answer = Some(host_time());
                state.health.rtt_ms = Some(reached.rtt.as_secs_f64() * 1e3);
                state.health.address = Some(reached.addr.to_string());
                state.reached = Some((reached.clone(), Instant::now()));
                Ok(reached)
            }
            Err(error) => {
                self.failed(&error);
                Err(error.into())
            }
        }
    }

    /// Notes that the share did not do what a fresh probe promised, so that it is probed anew.
    pub(super) fn doubt(&self) {
        self.state().reached = None;
    }

    /// A look at the share for its health: one or two RPCs.
    pub(super) async fn check(&self, admin: Result<Admin, DriverError>) {
        let admin = match admin {
            Ok(admin) => admin,
            Err(error) => return self.failed(&error),
        };
        let began = Instant::now();
        let space: Result<Space, _> = admin.space().await;
        match space {
            Ok(space) => {
                let mut state = self.state();
                state.silent = false;
                state.health.healthy = Some(true);
                state.health.error = None;
                state.health.last_answer = Some(host_time());
                state.health.rtt_ms = Some(began.elapsed().as_secs_f64() * 1e3);
                state.health.bytes_total = Some(space.total);
                state.health.bytes_available = Some(space.available);
            }
            Err(error) => self.failed(&error),
        }
    }
}

#[cfg(test)]
impl Contact {
    /// Somebody else is reaching the share for so long.
    pub(super) async fn reached_after(&self, time: Duration, reached: Reached) {
        let _probing = self.probing.lock().await;
        tokio::time::sleep(time).await;
        self.state().reached = Some((reached, Instant::now()));
    }
}

/// A share, and the ports of NFS and MOUNT that its volumes name.
type Key = (Share, Option<u16>, Option<u16>);

/// All shares of this host.
#[derive(Debug)]
pub(super) struct Shares {
    contacts: Mutex<HashMap<Key, Arc<Contact>>>,
    /// The home share, and how shares are mounted whose volumes do not say.
    home: Option<Share>,
    mount_options: MountOptions,
    /// Mounts what is reached by NFSv4 only.
    host: Arc<Host>,
    op_deadline: Duration,
    state_dir: PathBuf,
    /// Directories of every share whose handles are kept.
    frame: Vec<SharePath>,
}

impl Shares {
    pub(super) fn new(config: &Config, host: Arc<Host>, frame: &[SharePath]) -> Self {
        Self {
            contacts: Mutex::default(),
            home: config.share.clone(),
            mount_options: config.mount_options.clone(),
            host,
            op_deadline: config.op_deadline,
            state_dir: config.state_dir.clone(),
            frame: layout::frame().iter().chain(frame).cloned().collect(),
        }
    }

    /// The mount options of a volume on this host.
    pub(super) fn mount_options(&self, volume: &VolumeOptions) -> MountOptions {
        let own = || self.mount_options.clone();
        volume.mount.clone().unwrap_or_else(own)
    }

    /// The contact to the share of a volume.
    pub(super) fn contact(&self, share: &Share, volume: &VolumeOptions) -> Arc<Contact> {
        self.contact_by(share, &self.mount_options(volume))
    }

    /// The contact to the home share, or to one that no volume names any more.
    pub(super) fn contact_without_volume(&self, share: &Share) -> Arc<Contact> {
        self.contact_by(share, &self.mount_options)
    }

    pub(super) fn home_contact(&self) -> Option<Arc<Contact>> {
        Some(self.contact_without_volume(self.home.as_ref()?))
    }

    /// The admin path to the home share, where there is one.
    pub(super) async fn home(&self) -> Result<Option<Admin>, DriverError> {
        match self.home_contact() {
            Some(contact) => Ok(Some(self.admin(&contact).await?)),
            None => Ok(None),
        }
    }

    /// The same for one call.
    pub(super) async fn scoped_home(&self) -> Result<Option<Admin>, DriverError> {
        Ok(self.home().await?.map(|home| home.scoped()))
    }

    /// The admin path to the share of a volume's data.
    pub(super) async fn data(&self, volume: &VolumeOptions) -> Result<Admin, DriverError> {
        let share = volume.share.as_ref().or(self.home.as_ref());
        let share = share.ok_or(CatalogError::NoShare)?;
        self.admin(&self.contact(share, volume)).await
    }

    /// The same for the call that has this home share.
    pub(super) async fn scoped_data(
        &self,
        home: Option<&Admin>,
        volume: &VolumeOptions,
    ) -> Result<Admin, DriverError> {
        let on = self.data(volume).await?;
        Ok(match home.filter(|home| home.is_same_way(&on)) {
            Some(home) => home.clone(),
            None => on.scoped(),
        })
    }

    /// The contact to a share, by the ports that the mount options name.
    fn contact_by(&self, share: &Share, options: &MountOptions) -> Arc<Contact> {
        let ports = Ports {
            nfs: options.port(),
            mount: options.mountport(),
        };
        let mut contacts = self.contacts.lock().unwrap_or_else(PoisonError::into_inner);
        let contact = contacts
            .entry((share.clone(), ports.nfs, ports.mount))
            .or_insert_with(|| {
                Arc::new(Contact {
                    share: share.clone(),
                    given: ports,
                    state_dir: self.state_dir.clone(),
                    breaker: Breaker::default(),
                    probing: tokio::sync::Mutex::default(),
                    state: Mutex::default(),
                    spent: AtomicU64::new(0),
                })
            });
        contact.clone()
    }

    /// Forgets shares that nothing needs any more.
    pub(super) fn keep(&self, is_needed: impl Fn(&Share) -> bool) {
        let mut contacts = self.contacts.lock().unwrap_or_else(PoisonError::into_inner);
        contacts.retain(|(share, ..), contact| {
            // A call has it.
            Arc::strong_count(contact) > 1 || is_needed(share)
        });
    }

    pub(super) fn all(&self) -> Vec<Arc<Contact>> {
        let contacts = self.contacts.lock().unwrap_or_else(PoisonError::into_inner);
        contacts.values().cloned().collect()
    }

    /// The admin path to a share: NFSv3 in user space, or over a kernel mount for a server
    /// that speaks only NFSv4.
    #[tracing::instrument(level = "debug", skip_all)]
    pub(super) async fn admin(&self, contact: &Contact) -> Result<Admin, DriverError> {
        // Also starts an embedded server that has ended.
        let ports = contact.ports().await?;
        if let Some((known, admin)) = &contact.state().admin
            && *known == ports
            && !admin.is_stale()
        {
            return Ok(admin.clone());
        }
        let reached = contact.reach().await?;
        let settings = AdminSettings {
            op_deadline: self.op_deadline,
            nfs_port: ports.nfs,
            mount_port: ports.mount,
            ..AdminSettings::default()
        };
        let admin = if reached.v3 {
            let admin = Admin::v3(contact.share.clone(), settings);
            admin.keep_handles(&self.frame);
            admin
        } else {
            let paths = self.host.paths();
            let mounted = paths.mount_for_admin(&contact.share, &reached).await;
            let dir = mounted.map_err(|error| match (error, &reached.v3_error) {
                (HostError::Mount(MountError::NoKernelNfs { .. }), None) => {
                    DriverError::OnlyV4(contact.share.clone())
                }
                (HostError::Mount(MountError::NoKernelNfs { .. }), Some(why)) => why.clone().into(),
                (error, _) => error.into(),
            })?;
            Admin::mounted(contact.share.clone(), dir, settings)
        };
        let old = contact.state().admin.replace((ports, admin.clone()));
        let spent = old.map_or(0, |(_, old)| old.rpc_count());
        contact.spent.fetch_add(spent, Ordering::Relaxed);
        Ok(admin)
    }
}
