//! A host as a member of the cluster: its session and its holds, and what it sees of the others.
//!
//! Invariants:
//! - the right that [`Member::right_until`] tells is never longer than what the last renewal that
//!   is known to have been made gives, counted from when that renewal was sent;
//! - a renewal waits for nothing but its own calls: not for a claim, a look or a document;
//! - after an error or a gap, what lies on the share is compared with what this host did, and put
//!   right, before anything is decided by it;
//! - a nonce that has left the document never comes back;
//! - every document has a higher number than all before it, also after a restart.
//!
//! The session is in [`super::session`], the host's document in [`super::document`], the other
//! hosts in [`super::view`], claims in [`super::claim`]. Locks are taken in the order [`State`],
//! [`Standing`]; who only asks what is held or seen ([`Member::held`], [`Member::others`]) reads a
//! copy and waits for neither.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::{Mutex, MutexGuard};

use super::elapsed::Elapsed;
use super::hold::{Hold, HostDoc};
use super::session::Standing;
use super::share::{Env, Stamp, Store};
use super::times::Times;
use crate::mutant::{self, Mutant};
use crate::volume::{Access, VolumeName};
use nfs::admin::{AdminError, AdminErrorKind};

/// Why the cluster's part of a call failed.
#[derive(Debug, thiserror::Error)]
pub enum MemberError {
    #[error(transparent)]
    Share(Box<AdminError>),
    #[error(
        "another host of this cluster is called {0} too: give each host a name of its own, or, if \
         this is the same host with a new state directory, try again in a minute"
    )]
    SameName(String),
    #[error(
        "the session of this host on the home share ended before the call did: the share was out \
         of reach for too long; try again"
    )]
    Ended,
    #[error("what host {0} holds keeps changing; try again")]
    Unclear(String),
    #[error(
        "the home share does not show what this host has there: it is not the share that it was, \
         or its server has forgotten; nothing is decided by it"
    )]
    Elsewhere,
    #[error(
        "what host {0} holds is not known: its file on the home share is damaged, or is not its \
         own. If there is no such host, remove what begins with .nfsvol/hosts/{0} on the share; \
         otherwise start nfsvol again on it"
    )]
    Unreadable(String),
}

impl From<AdminError> for MemberError {
    fn from(error: AdminError) -> Self {
        Self::Share(Box::new(error))
    }
}

impl MemberError {
    /// Whether the same call may succeed later without anybody changing anything.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Share(error) => error.is_transient(),
            Self::Unreadable(_) => false,
            // Mostly this host itself, with another state directory or both its documents torn.
            Self::SameName(_) | Self::Ended | Self::Unclear(_) | Self::Elsewhere => true,
        }
    }
}

/// Who a host is.
#[derive(Debug, Clone)]
pub struct Host {
    /// As a part of file names ([`crate::layout::host_name`]).
    pub name: String,
    /// Random, kept in the state directory.
    pub id: String,
    pub boot: String,
}

/// What a renewal came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Beat {
    Renewed,
    /// A session was begun, or the one before a restart of the daemon went on.
    Began,
    /// Another host had ended the session. These exclusive volumes of it are lost; a new session
    /// has begun with the other holds, or will at the next renewal.
    Lost(Vec<VolumeName>),
}

/// What became of a renewal by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Renewal {
    Renewed,
    /// The server had forgotten earlier ones. The session goes on, and its right is longer again
    /// as soon as [`Member::tend`] has compared what lies there with what this host did.
    Forgotten,
    /// There is no session; [`Member::tend`] begins one.
    Over,
}

/// What is known of another host.
#[derive(Debug, Clone)]
pub struct Other {
    pub doc: Arc<HostDoc>,
    /// A lower bound of the time since it was last heard of.
    pub silent: Duration,
}

/// A hold of another host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holding {
    pub host: String,
    pub hold: Hold,
    /// How much longer the hold lasts if its host is dead.
    pub left: Duration,
}

/// What became of asking for an exclusive volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claimed {
    /// Until this time of [`Env::now`], and longer with each renewal as long as it is held.
    Mine(Duration),
    Held(Holding),
}

/// A volume that a call is about to hold, for as long as it is.
struct Waiting<'a> {
    all: &'a std::sync::Mutex<BTreeMap<VolumeName, Access>>,
    volume: &'a VolumeName,
}

impl<'a> Waiting<'a> {
    fn new(
        all: &'a std::sync::Mutex<BTreeMap<VolumeName, Access>>,
        volume: &'a VolumeName,
        access: Access,
    ) -> Self {
        let mut waiting = all.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.insert(volume.clone(), access);
        Self { all, volume }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut waiting = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.remove(self.volume);
    }
}

/// Things that must be looked at, and those that have been.
#[derive(Debug, Default)]
pub(super) struct Doubt {
    raised: AtomicU64,
    settled: AtomicU64,
}

impl Doubt {
    pub(super) fn raise(&self) {
        self.raised.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn is_raised(&self) -> bool {
        self.raised() != self.settled.load(Ordering::Acquire)
    }

    /// For [`settle`](Self::settle): what is raised from here on stays.
    pub(super) fn raised(&self) -> u64 {
        self.raised.load(Ordering::Acquire)
    }

    pub(super) fn settle(&self, raised: u64) {
        self.settled.fetch_max(raised, Ordering::AcqRel);
    }
}

/// The claim by which an exclusive volume is held.
#[derive(Debug, Clone)]
pub(super) struct OwnClaim {
    /// Of the volume's record.
    pub(super) id: String,
    pub(super) epoch: u64,
}

/// A host whose last document cannot be read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Unreadable {
    /// Its session time, as far as is known.
    pub(super) session: Duration,
}

/// What this host tells the others, and what it has read of them.
#[derive(Debug, Clone, Default)]
pub(super) struct State {
    /// The session of the document.
    pub(super) session: Option<String>,
    /// What the others wait by: the longest session time since the session began.
    pub(super) session_ms: u64,
    /// `format.json` of the share that the session is on.
    pub(super) share: Option<Vec<u8>>,
    /// Exclusive volumes that were lost with a session, and that nobody has been told of.
    pub(super) lost: Vec<VolumeName>,
    /// The number of the last document written, or tried.
    pub(super) number: u64,
    /// Those of this process that may still be there.
    pub(super) old: Vec<u64>,
    /// The document on the share may not be the latest.
    pub(super) dirty: bool,
    pub(super) holds: Arc<BTreeMap<VolumeName, Hold>>,
    /// Of exclusive volumes that are held.
    pub(super) claims: BTreeMap<VolumeName, OwnClaim>,
    pub(super) others: Arc<BTreeMap<String, (u64, Arc<HostDoc>)>>,
    pub(super) unreadable: BTreeMap<String, Unreadable>,
    pub(super) stamps: Arc<BTreeMap<String, Stamp>>,
}

impl State {
    pub(super) fn holds(&mut self) -> &mut BTreeMap<VolumeName, Hold> {
        Arc::make_mut(&mut self.holds)
    }

    /// Lets go of a volume in the next document.
    pub(super) fn drop_hold(&mut self, volume: &VolumeName) -> bool {
        self.claims.remove(volume);
        let held = self.holds().remove(volume).is_some();
        self.dirty |= held;
        held
    }
}

/// A copy of the state for who must not wait for it.
#[derive(Debug, Clone, Default)]
struct Seen {
    holds: Arc<BTreeMap<VolumeName, Hold>>,
    others: Arc<BTreeMap<String, (u64, Arc<HostDoc>)>>,
    stamps: Arc<BTreeMap<String, Stamp>>,
}

impl Seen {
    fn of(state: &State) -> Self {
        Self {
            holds: Arc::clone(&state.holds),
            others: Arc::clone(&state.others),
            stamps: Arc::clone(&state.stamps),
        }
    }
}

/// What the server's clock says of the others.
#[derive(Debug, Clone)]
pub(super) struct Watched {
    pub(super) elapsed: Elapsed,
    /// The server's clock at the last renewal.
    pub(super) now: Option<Stamp>,
}

/// The state while it is worked with; what it has become is seen by all when this is dropped.
pub(super) struct Locked<'a> {
    state: MutexGuard<'a, State>,
    seen: &'a std::sync::Mutex<Seen>,
}

impl Deref for Locked<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Seen::of(&self.state);
    }
}

/// See the module.
#[derive(Debug)]
pub struct Member<E> {
    pub(super) host: Host,
    pub(super) env: E,
    pub(super) times: Times,
    /// Nanoseconds of [`Env::now`]; 0 without a right. Read without waiting for the share.
    pub(super) right_until: AtomicU64,
    pub(super) standing: Mutex<Standing>,
    state: Mutex<State>,
    seen: std::sync::Mutex<Seen>,
    pub(super) watched: std::sync::Mutex<Watched>,
    /// What lies on the share may not be what this host did: nothing is decided until it has been
    /// compared.
    pub(super) unsure: Doubt,
    /// It is not: the server had forgotten a renewal. No right is given either.
    pub(super) forgotten: Doubt,
    /// What calls that wait for the state are about to hold: the next document tells of all.
    waiting: std::sync::Mutex<BTreeMap<VolumeName, Access>>,
}

impl<E: Env> Member<E> {
    /// `using`: what the host has mounted already, as after a restart of the daemon. It is told
    /// with the first document; exclusive volumes only if the session before goes on.
    #[must_use]
    pub fn new(
        host: Host,
        times: Times,
        env: E,
        using: impl IntoIterator<Item = (VolumeName, Access)>,
    ) -> Self {
        let hold = |access| Hold {
            nonce: env.nonce(),
            access,
            since: 0,
            holders: Vec::new(),
        };
        let shared = |(_, access): &(VolumeName, Access)| *access != Access::Exclusive;
        let holds = using.into_iter().filter(shared);
        let holds: BTreeMap<_, _> = holds.map(|(name, access)| (name, hold(access))).collect();
        let holds = Arc::new(holds);
        let seen = Seen {
            holds: Arc::clone(&holds),
            ..Seen::default()
        };
        let state = State {
            holds,
            ..State::default()
        };
        Self {
            host,
            times,
            right_until: AtomicU64::new(0),
            standing: Mutex::default(),
            state: state.into(),
            seen: seen.into(),
            watched: std::sync::Mutex::new(Watched {
                elapsed: Elapsed::new(times.renew() * 2),
                now: None,
            }),
            unsure: Doubt::default(),
            forgotten: Doubt::default(),
            waiting: std::sync::Mutex::default(),
            env,
        }
    }

    /// The same host once more, for a test that goes on from one moment in several ways. No call of
    /// it may be under way.
    #[cfg(test)]
    pub(crate) fn copy(&self, env: E) -> Self {
        let doubt = |doubt: &Doubt| Doubt {
            raised: doubt.raised().into(),
            settled: doubt.settled.load(Ordering::Acquire).into(),
        };
        Self {
            host: self.host.clone(),
            env,
            times: self.times,
            right_until: self.right_until.load(Ordering::Acquire).into(),
            standing: self.standing.try_lock().unwrap().clone().into(),
            state: self.state.try_lock().unwrap().clone().into(),
            seen: self.seen().into(),
            watched: self.watched().clone().into(),
            unsure: doubt(&self.unsure),
            forgotten: doubt(&self.forgotten),
            waiting: std::sync::Mutex::default(),
        }
    }

    #[must_use]
    pub fn times(&self) -> Times {
        self.times
    }

    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    #[must_use]
    pub fn now(&self) -> Duration {
        self.env.now()
    }

    /// 16 hexadecimal digits that nobody else uses.
    #[must_use]
    pub fn nonce(&self) -> String {
        self.env.nonce()
    }

    /// Until when, by [`Env::now`], this host may use what it holds exclusively.
    #[must_use]
    pub fn right_until(&self) -> Duration {
        Duration::from_nanos(self.right_until.load(Ordering::Acquire))
    }

    /// Whether the session is good at this moment.
    #[must_use]
    pub fn has_right(&self) -> bool {
        self.env.now() < self.right_until()
    }

    pub(super) async fn lock(&self) -> Locked<'_> {
        Locked {
            state: self.state.lock().await,
            seen: &self.seen,
        }
    }

    /// Has all see what the state has become.
    pub(super) fn show(&self, state: &State) {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Seen::of(state);
    }

    fn seen(&self) -> Seen {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.clone()
    }

    pub(super) fn watched(&self) -> std::sync::MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long after a renewal the next one is due: soon, if there was no answer and there is a
    /// right to be lost.
    #[must_use]
    pub fn pause(&self, answered: bool) -> Duration {
        let soon = !answered && self.has_right() && !mutant::is_on(Mutant::RenewalIsNotTriedAgain);
        if soon {
            self.times.again()
        } else {
            self.times.renew()
        }
    }

    /// The server has forgotten renewals; none gives a right until that has been put right.
    #[must_use]
    pub fn is_forgotten(&self) -> bool {
        self.forgotten.is_raised()
    }

    /// What lies on the share is to be compared with what this host did.
    #[must_use]
    pub fn is_unsure(&self) -> bool {
        self.unsure.is_raised() || self.forgotten.is_raised()
    }

    /// Tells the others that this host holds a volume. On the share when this returns. Calls that
    /// come together share one document.
    ///
    /// # Errors
    /// What the share answered; the hold is taken back then, at the next renewal at the latest.
    pub async fn hold(
        &self,
        store: &impl Store,
        volume: &VolumeName,
        access: Access,
    ) -> Result<(), MemberError> {
        let _waiting = Waiting::new(&self.waiting, volume, access);
        let mut state = self.lock().await;
        self.ensure(store, &mut state).await?;
        let mut together = BTreeMap::from([(volume.clone(), access)]);
        {
            let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            together.extend(waiting.iter().map(|(name, access)| (name.clone(), *access)));
        }
        together.retain(|name, _| !state.holds.contains_key(name));
        for (name, access) in &together {
            self.note(&mut state, name, *access);
        }
        self.tell(store, &mut state, together.keys()).await
    }

    pub(super) async fn add(
        &self,
        store: &impl Store,
        state: &mut State,
        volume: &VolumeName,
        access: Access,
    ) -> Result<(), MemberError> {
        self.note(state, volume, access);
        self.tell(store, state, [volume]).await
    }

    fn note(&self, state: &mut State, volume: &VolumeName, access: Access) {
        if !state.holds.contains_key(volume) {
            let hold = Hold {
                nonce: self.env.nonce(),
                access,
                since: self.watched().now.map_or(0, |stamp| stamp.secs),
                holders: Vec::new(),
            };
            state.holds().insert(volume.clone(), hold);
            state.dirty = true;
        }
    }

    /// Writes the document if it has changed; without success, these volumes are not held.
    async fn tell<'a>(
        &self,
        store: &impl Store,
        state: &mut State,
        added: impl IntoIterator<Item = &'a VolumeName>,
    ) -> Result<(), MemberError> {
        if state.dirty
            && let Err(error) = self.publish(store, state).await
        {
            for volume in added {
                state.holds().remove(volume);
            }
            return Err(error);
        }
        Ok(())
    }

    /// Lets go of volumes. What cannot be told now is told at the next renewal.
    pub async fn release(&self, store: &impl Store, volumes: &[VolumeName]) {
        let mut state = self.lock().await;
        let mut any = false;
        for volume in volumes {
            any |= state.drop_hold(volume);
        }
        if !any {
            return;
        }
        if let Err(error) = self.publish(store, &mut state).await {
            tracing::warn!(?volumes, %error, "the other hosts are told later");
        }
        drop(state);
        self.tidy(store).await;
    }

    /// The volumes that this host holds, once it has a session: only that tells which of the
    /// exclusive ones go on after a restart of the daemon.
    ///
    /// # Errors
    /// What the share answered while a session was begun.
    pub async fn held_in_session(
        &self,
        store: &impl Store,
    ) -> Result<Arc<BTreeMap<VolumeName, Hold>>, MemberError> {
        let mut state = self.lock().await;
        if !mutant::is_on(Mutant::GoingOnIsSeenLate) {
            self.have_session(store, &mut state).await?;
        }
        Ok(Arc::clone(&state.holds))
    }

    /// The volumes that this host holds as far as is known now: of a daemon that has just started
    /// the shared ones. Waits for nothing.
    #[must_use]
    pub fn held(&self) -> Arc<BTreeMap<VolumeName, Hold>> {
        self.seen().holds
    }

    /// Tells the others what holds this host's volumes.
    ///
    /// # Errors
    /// What the share answered.
    pub async fn describe(
        &self,
        store: &impl Store,
        holders: &BTreeMap<VolumeName, Vec<String>>,
    ) -> Result<(), MemberError> {
        let mut state = self.lock().await;
        let now = |name: &VolumeName| holders.get(name).cloned().unwrap_or_default();
        if state
            .holds
            .iter()
            .any(|(name, hold)| hold.holders != now(name))
        {
            for (name, hold) in state.holds() {
                hold.holders = now(name);
            }
            state.dirty = true;
        }
        if state.dirty && state.session.is_some() {
            self.publish(store, &mut state).await?;
        }
        drop(state);
        self.tidy(store).await;
        Ok(())
    }

    /// The other hosts, as of the last look. Waits for nothing.
    #[must_use]
    pub fn others(&self) -> Vec<Other> {
        let (seen, now) = (self.seen(), self.env.now());
        let watched = self.watched();
        let silent = |host: &String| {
            let stamp = seen.stamps.get(host);
            stamp.map_or(Duration::ZERO, |stamp| {
                watched.elapsed.since(host, *stamp, now)
            })
        };
        let others = seen.others.iter();
        others
            .map(|(host, (_, doc))| Other {
                doc: Arc::clone(doc),
                silent: silent(host),
            })
            .collect()
    }
}

/// Whether an error says that something was not there.
pub(super) fn is_absent(error: &AdminError) -> bool {
    matches!(error.kind, AdminErrorKind::NotFound)
}

#[cfg(test)]
mod tests;
