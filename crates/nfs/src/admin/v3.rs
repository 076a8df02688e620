//! The operations over NFSv3 in user space.
//!
//! The share is reached when it is first needed, and again after a failure; then its address,
//! ports and root handle are kept. An operation borrows a connection of a small pool, or makes
//! one, and gives it back if all its calls were answered. A call whose connection broke is sent
//! once more on another when that can do no harm; a MKDIR, RENAME, REMOVE or RMDIR is not, since
//! the repetition of a call that had succeeded would report its own work as somebody else's:
//! such an operation ends in [`AdminErrorKind::Unknown`].
//!
//! Paths are walked by LOOKUP, component by component. Handles of directories are kept only for
//! the places named by [`keep_handles`](super::Admin::keep_handles), which nobody renames: a
//! handle stays valid when its directory is renamed by another host, and would then quietly
//! lead to the wrong place. One call of a user may keep what it found for itself
//! ([`scoped`](super::Admin::scoped)): for it a directory is then what it was when the call came
//! to it, as if it had been opened.

mod dir;
mod ops;
mod session;
#[cfg(feature = "simulated")]
pub mod simulated;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nfs3_types::nfs3::nfs_fh3;
use nfs3_types::rpc::opaque_auth;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

pub(super) use self::session::Session;
use super::present;
use super::{AdminErrorKind, AdminSettings, Attr, DirEntry, Kind, Made, Space, random};
use crate::address::{Share, SharePath};
use crate::connect::{MAX_TRANSFER, Meter, Wire, credential};
use crate::probe::{Breaker, Cause, Ports, ReachError, Step, reach};

type Outcome<T> = Result<T, AdminErrorKind>;

/// How long an idle connection is kept. Longer than a burst of calls, shorter than what servers
/// and firewalls allow, and soon enough to give a reserved port back.
const IDLE: Duration = Duration::from_secs(15);
/// How long a kept directory handle is used before it is looked up again, in case that an
/// administrator did rename what nobody renames.
const HANDLE_AGE: Duration = Duration::from_secs(60);
/// The longest time for reaching a server, as a part of an operation's deadline; the rest is for
/// the operation, and lets the step that failed be told instead of a bare time-out.
const REACH_SHARE: u32 = 4;
const OF: u32 = 5;

#[derive(Debug)]
pub(super) struct V3 {
    shared: Arc<Shared>,
    /// The handles that one user of [`scoped`](Self::scoped) has found.
    own: Option<Mutex<HashMap<SharePath, nfs_fh3>>>,
}

/// What all users of a share's admin path share.
#[derive(Debug)]
struct Shared {
    share: Share,
    settings: AdminSettings,
    breaker: Breaker,
    credential: opaque_auth<'static>,
    meter: Meter,
    /// Connections made so far.
    dials: AtomicU64,
    /// How long a kept handle is used ([`HANDLE_AGE`]).
    handle_age: Duration,
    /// How long a connection without calls is kept ([`IDLE`]).
    idle_age: Duration,
    slots: Semaphore,
    /// The server has no READDIRPLUS.
    plain_listing: AtomicBool,
    /// Held while the share is being reached, so that one does it for all who wait.
    reaching: tokio::sync::Mutex<()>,
    state: Mutex<State>,
    /// In place of connections.
    #[cfg(feature = "simulated")]
    simulated: Option<simulated::Simulated>,
}

/// Where the share is, and what is kept of it.
#[derive(Debug, Default)]
struct State {
    route: Option<Arc<Route>>,
    idle: Vec<(Instant, Wire)>,
    handles: HashMap<SharePath, Option<(Instant, nfs_fh3)>>,
}

#[derive(Debug)]
struct Route {
    nfs: SocketAddr,
    root: nfs_fh3,
    /// The sizes of READ and WRITE to use, in bytes.
    read: u32,
    write: u32,
}

impl V3 {
    pub(super) fn new(share: Share, settings: AdminSettings, breaker: Breaker) -> Self {
        let shared = Shared {
            share,
            breaker,
            credential: credential(),
            meter: Meter::default(),
            dials: AtomicU64::new(0),
            handle_age: HANDLE_AGE,
            idle_age: IDLE,
            slots: Semaphore::new(settings.max_connections.max(1)),
            plain_listing: AtomicBool::new(false),
            settings,
            reaching: tokio::sync::Mutex::default(),
            state: Mutex::default(),
            #[cfg(feature = "simulated")]
            simulated: None,
        };
        Self {
            shared: Arc::new(shared),
            own: None,
        }
    }

    /// The same share and connections, with a memory of its own for the directories it comes to.
    pub(super) fn scoped(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            own: Some(Mutex::default()),
        }
    }

    /// The same share and connections, without such a memory.
    pub(super) fn unscoped(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            own: None,
        }
    }

    /// The same share by a connection of its own, with a deadline of its own. Handles that are kept
    /// are kept for as long as they are good, so that an operation is one call; so is the connection, so
    /// that a new one says that the server may have been away.
    pub(super) fn apart(&self, op_deadline: Duration) -> Self {
        let settings = AdminSettings {
            op_deadline,
            max_connections: 1,
            ..self.shared.settings.clone()
        };
        let known = self.state();
        let state = State {
            route: known.route.clone(),
            idle: Vec::new(),
            handles: known
                .handles
                .keys()
                .map(|place| (place.clone(), None))
                .collect(),
        };
        drop(known);
        let shared = Shared {
            share: self.shared.share.clone(),
            breaker: Breaker::resting(op_deadline / 4),
            credential: credential(),
            meter: self.shared.meter.clone(),
            dials: AtomicU64::new(0),
            handle_age: Duration::MAX,
            idle_age: Duration::MAX,
            slots: Semaphore::new(settings.max_connections),
            plain_listing: AtomicBool::new(self.shared.plain_listing.load(Ordering::Relaxed)),
            settings,
            reaching: tokio::sync::Mutex::default(),
            state: Mutex::new(state),
            #[cfg(feature = "simulated")]
            simulated: self.shared.simulated.clone(),
        };
        Self {
            shared: Arc::new(shared),
            own: None,
        }
    }

    pub(super) fn dials(&self) -> u64 {
        #[cfg(feature = "simulated")]
        if let Some(server) = &self.shared.simulated {
            return server.dials();
        }
        self.shared.dials.load(Ordering::Relaxed)
    }

    pub(super) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    fn own(&self) -> Option<MutexGuard<'_, HashMap<SharePath, nfs_fh3>>> {
        let own = self.own.as_ref()?;
        Some(own.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn rpc_count(&self) -> u64 {
        self.shared.meter.count()
    }

    pub(super) fn keep_handles(&self, places: &[SharePath]) {
        let mut state = self.state();
        for place in places.iter().filter(|place| !place.is_root()) {
            state.handles.entry(place.clone()).or_default();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs an operation within the deadline and the limit on connections.
    pub(super) async fn within<T>(
        &self,
        operation: impl Future<Output = Outcome<T>>,
    ) -> Outcome<T> {
        let limited = async {
            let _slot = self
                .shared
                .slots
                .acquire()
                .await
                .map_err(|_| AdminErrorKind::Busy)?;
            operation.await
        };
        match timeout(self.shared.settings.op_deadline, limited).await {
            Ok(result) => result,
            Err(_) => {
                // The next operation greets the server anew, so its silence is told as such.
                self.set_route(None);
                Err(AdminErrorKind::TimedOut(self.shared.settings.op_deadline))
            }
        }
    }

    /// A good connection from the pool. Also closes those that were idle for too long.
    fn idle_wire(&self) -> Option<(Arc<Route>, Wire)> {
        let mut state = self.state();
        state
            .idle
            .retain(|(since, _)| since.elapsed() < self.shared.idle_age);
        let route = Arc::clone(state.route.as_ref()?);
        while let Some((_, wire)) = state.idle.pop() {
            if wire.is_quiet() {
                return Some((route, wire));
            }
        }
        None
    }

    fn give_back(&self, route: &Arc<Route>, mut wire: Wire) {
        wire.rest();
        let mut state = self.state();
        let current = state
            .route
            .as_ref()
            .is_some_and(|now| Arc::ptr_eq(now, route));
        if current && state.idle.len() < self.shared.settings.max_connections {
            state.idle.push((Instant::now(), wire));
        }
    }

    fn close_idle(&self) {
        self.state().idle.clear();
    }

    /// Connections belong to the place that they lead to.
    fn set_route(&self, route: Option<Arc<Route>>) {
        let mut state = self.state();
        state.idle.clear();
        state.route = route;
    }

    /// A connection: an idle one, a new one to where the share was last, or by reaching it anew.
    async fn connect(&self) -> Outcome<(Arc<Route>, Wire)> {
        if let Some(idle) = self.idle_wire() {
            return Ok(idle);
        }
        let _alone = self.shared.reaching.lock().await;
        self.shared.dials.fetch_add(1, Ordering::Relaxed);
        let within = self.shared.settings.op_deadline * REACH_SHARE / OF;
        let known = self.state().route.clone();
        if let Some(route) = known {
            if let Ok(wire) = Wire::dial(route.nfs, true, within / 2, &self.shared.meter).await {
                return Ok((route, wire));
            }
            self.set_route(None);
        }
        let ports = Ports {
            nfs: self.shared.settings.nfs_port,
            mount: self.shared.settings.mount_port,
        };
        let contact = self
            .shared
            .breaker
            .run(reach(&self.shared.share, ports, within, &self.shared.meter))
            .await
            .map_err(AdminErrorKind::Reach)?;
        let reached = contact.reached;
        let nfs = SocketAddr::new(reached.addr, reached.nfs_port);
        let Some(root) = contact.root else {
            return Err(AdminErrorKind::Reach(reached.v3_error.unwrap_or_else(
                || ReachError {
                    share: self.shared.share.to_string(),
                    step: Step::Null,
                    addr: Some(nfs),
                    cause: Cause::Version { low: 4, high: 4 },
                    resting: None,
                },
            )));
        };
        let size = |most: Option<u32>| most.unwrap_or(0).clamp(4096, MAX_TRANSFER);
        let route = Arc::new(Route {
            nfs,
            root,
            //= 1813-3.3.6-rtmax: “count must be less than or equal to the value of the rtmax
            //= field”
            read: size(reached.fsinfo.map(|info| info.rtmax)),
            write: size(reached.fsinfo.map(|info| info.wtmax)),
        });
        self.set_route(Some(Arc::clone(&route)));
        Ok((route, contact.wire))
    }

    /// The kept handle that leads furthest towards `path`.
    fn kept_handle(&self, path: &SharePath) -> Option<(SharePath, nfs_fh3)> {
        let own = self.own();
        let state = self.state();
        let mut place = path.clone();
        while !place.is_root() {
            if let Some(handle) = own.as_ref().and_then(|own| own.get(&place)) {
                return Some((place, handle.clone()));
            }
            match state.handles.get(&place) {
                Some(Some((since, handle))) if since.elapsed() < self.shared.handle_age => {
                    return Some((place, handle.clone()));
                }
                _ => place = place.parent(),
            }
        }
        None
    }

    /// The kept handle of `path` itself.
    fn handle_of(&self, path: &SharePath) -> Option<nfs_fh3> {
        let (place, handle) = self.kept_handle(path)?;
        (place == *path).then_some(handle)
    }

    fn keep_handle(&self, path: &SharePath, handle: &nfs_fh3) {
        if !self.keep_in_frame(path, handle)
            && let Some(mut own) = self.own()
        {
            own.insert(path.clone(), handle.clone());
        }
    }

    /// Keeps the handle if the place is one of [`keep_handles`](Self::keep_handles).
    fn keep_in_frame(&self, path: &SharePath, handle: &nfs_fh3) -> bool {
        let mut state = self.state();
        let slot = state.handles.get_mut(path);
        slot.map(|slot| *slot = Some((Instant::now(), handle.clone())))
            .is_some()
    }

    /// Forgets the handles of what lies at or below `path`.
    fn forget(&self, path: &SharePath) {
        for (place, slot) in &mut self.state().handles {
            if place.starts_with(path) {
                *slot = None;
            }
        }
        if let Some(mut own) = self.own() {
            own.retain(|place, _| !place.starts_with(path));
        }
    }

    /// Forgets all handles, and at the second time in one operation the export's own.
    pub(super) fn forget_all(&self, round: u32) {
        self.forget(&SharePath::root());
        if round > 0 {
            self.set_route(None);
        }
    }
}

/// How often an operation is begun again after a stale handle: once for kept handles, once for
/// the export's, and once for an object that was replaced between LOOKUP and its use.
pub(super) const STALE_ROUNDS: u32 = 3;

/// Runs an operation of [`Session`] with a [`V3`], again after a stale handle: such a call did
/// nothing.
macro_rules! on_session {
    ($v3:expr, $session:ident => $call:expr) => {{
        let v3: &$crate::admin::v3::V3 = $v3;
        v3.within(async {
            let mut round = 0;
            loop {
                let mut $session = $crate::admin::v3::Session::open(v3).await?;
                match $call.await {
                    //= 1813-2.6-stale: A stale handle leads to nothing any more.
                    Err($crate::admin::AdminErrorKind::Stale)
                        if round < $crate::admin::v3::STALE_ROUNDS =>
                    {
                        v3.forget_all(round);
                        round += 1;
                    }
                    result => break result,
                }
            }
        })
        .await
    }};
}

pub(super) use on_session;

impl V3 {
    pub(super) async fn create_new(&self, path: &SharePath, contents: &[u8]) -> Outcome<Made> {
        // One for all rounds: what this call made is always known as its own.
        let verifier = random()?;
        on_session!(self, session => session.create_new(path, contents, verifier))
    }

    /// The handle of the directory that holds a tree to remove.
    async fn parent_handle(&self, parent: &SharePath) -> Outcome<Option<nfs_fh3>> {
        present(on_session!(self, session => session.dir(parent)))
    }
}

#[cfg(test)]
mod tests;
