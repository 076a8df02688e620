//! A host as a member of the cluster: its session and its holds, and what it sees of the others.
//!
//! Invariants:
//! - the right that [`Member::right_until`] tells is never longer than what the last renewal that
//!   is known to have been made gives, counted from when that renewal was sent;
//! - a nonce that has left the document never comes back;
//! - every document has a higher number than all before it, also after a restart.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Mutex, MutexGuard};

use super::elapsed::Elapsed;
use super::hold::{FORMAT, Hold, HostDoc};
use super::layout::{self, Token};
use super::share::{Env, Stamp, Store};
use super::times::{LONGEST_SESSION, Times};
use crate::nfs::admin::{AdminError, AdminErrorKind};
use crate::volume::{Access, VolumeName};

/// How often a listing is made anew when what it named had gone meanwhile.
const LOOKS: usize = 4;
/// Documents of an earlier process of this host may still arrive; no process writes as many.
const NUMBERS_OF_A_PROCESS: u64 = 1 << 32;

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
            Self::SameName(_) | Self::Unreadable(_) => false,
            Self::Ended | Self::Unclear(_) => true,
        }
    }
}

/// Who a host is.
#[derive(Debug, Clone)]
pub struct Host {
    /// As a part of file names ([`layout::host_name`]).
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

/// Whether a session is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Life {
    Over,
    /// It lives, and if it stays silent it is over in this time.
    Lives(Duration),
}

/// What a host's token and its stamp say.
enum Judged {
    Over,
    Lives(Duration),
    Silent(Token, Stamp),
}

/// What is known of another host.
#[derive(Debug, Clone)]
pub struct Other {
    pub doc: HostDoc,
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

#[derive(Debug, Clone)]
struct Session {
    id: String,
    number: u64,
    /// When the renewal to `number + 1` was first sent, if its answer never came.
    tried: Option<Duration>,
}

#[derive(Debug)]
pub(super) struct State {
    session: Option<Session>,
    /// What the others wait by: the longest session time since the session began.
    session_ms: u64,
    /// Exclusive volumes that were lost with a session, and that nobody has been told of.
    lost: Vec<VolumeName>,
    /// The number of the last document written, or tried.
    number: u64,
    /// Those of this process that may still be there.
    old: Vec<u64>,
    /// The document on the share may not be the latest.
    pub(super) dirty: bool,
    pub(super) holds: BTreeMap<VolumeName, Hold>,
    elapsed: Elapsed,
    now: Option<Stamp>,
    pub(super) others: BTreeMap<String, (u64, HostDoc)>,
    /// Hosts whose last document cannot be read: what they hold is not known.
    unreadable: BTreeSet<String>,
    stamps: BTreeMap<String, Stamp>,
}

impl State {
    pub(super) fn session_id(&self) -> Option<&str> {
        self.session.as_ref().map(|session| session.id.as_str())
    }

    /// A lower bound of the time since a host was last heard of.
    fn silent(&self, host: &str, now: Duration) -> Duration {
        let stamp = self.stamps.get(host);
        stamp.map_or(Duration::ZERO, |stamp| {
            self.elapsed.since(host, *stamp, now)
        })
    }
}

/// See the module.
#[derive(Debug)]
pub struct Member<E> {
    pub(super) host: Host,
    pub(super) env: E,
    times: Times,
    /// Nanoseconds of [`Env::now`]; 0 without a right. Read without waiting for the share.
    right_until: AtomicU64,
    state: Mutex<State>,
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
        let state = State {
            holds: holds.map(|(name, access)| (name, hold(access))).collect(),
            session: None,
            session_ms: 0,
            lost: Vec::new(),
            number: 0,
            old: Vec::new(),
            dirty: false,
            elapsed: Elapsed::new(times.renew() * 2),
            now: None,
            others: BTreeMap::new(),
            unreadable: BTreeSet::new(),
            stamps: BTreeMap::new(),
        };
        Self {
            host,
            times,
            right_until: AtomicU64::new(0),
            state: state.into(),
            waiting: std::sync::Mutex::default(),
            env,
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

    pub(super) async fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().await
    }

    /// Renews the session, or begins one.
    ///
    /// # Errors
    /// What the share answered; the right lasts as long as it did before.
    pub async fn beat(&self, store: &impl Store) -> Result<Beat, MemberError> {
        let mut state = self.lock().await;
        let renewed = self.renew(store, &mut state).await;
        // Also when this renewal failed: they are lost.
        if !state.lost.is_empty() {
            return Ok(Beat::Lost(std::mem::take(&mut state.lost)));
        }
        let beat = renewed?;
        if state.dirty {
            self.publish(store, &mut state).await?;
        }
        drop(state);
        self.tidy(store).await;
        Ok(beat)
    }

    /// Makes sure of a session whose right lasts for a while.
    pub(super) async fn ensure(
        &self,
        store: &impl Store,
        state: &mut State,
    ) -> Result<(), MemberError> {
        let enough = self.env.now() + self.times.right() / 2 < self.right_until();
        if state.session.is_some() && enough {
            return Ok(());
        }
        match self.renew(store, state).await? {
            Beat::Renewed => Ok(()),
            // What began anew is renewed at once: only that gives a right.
            Beat::Began | Beat::Lost(_) => match self.renew(store, state).await? {
                Beat::Renewed => Ok(()),
                Beat::Began | Beat::Lost(_) => Err(MemberError::Ended),
            },
        }
    }

    async fn renew(&self, store: &impl Store, state: &mut State) -> Result<Beat, MemberError> {
        let Some(session) = state.session.clone() else {
            self.join(store, state).await?;
            return Ok(Beat::Began);
        };
        let dir = layout::host_dir(&self.host.name);
        let from = Token::alive(&session.id, session.number).name();
        let to = Token::alive(&session.id, session.number + 1).name();
        let sent = self.env.now();
        let first = session.tried.unwrap_or(sent);
        if let Some(session) = &mut state.session {
            session.tried = Some(first);
        }
        match store.rename_within(&dir, &from, &to).await {
            Ok(stamp) => {
                self.renewed(state, session.number + 1, sent);
                state.elapsed.sample(sent, self.env.now(), stamp);
                state.now = Some(stamp);
                Ok(Beat::Renewed)
            }
            Err(error) => {
                let token = self.token_of(store, &self.host.name, &session.id).await?;
                match token {
                    // Done by this try or by an earlier one whose answer was lost.
                    Some(token) if token.number == session.number + 1 => {
                        self.renewed(state, token.number, first);
                        Ok(Beat::Renewed)
                    }
                    Some(_) => Err(error.into()),
                    None => self.lost(store, state).await,
                }
            }
        }
    }

    fn renewed(&self, state: &mut State, number: u64, sent: Duration) {
        if let Some(session) = &mut state.session {
            session.number = number;
            session.tried = None;
        }
        let until = (sent + self.times.right()).as_nanos();
        let until = u64::try_from(until).unwrap_or(u64::MAX);
        self.right_until.fetch_max(until, Ordering::AcqRel);
    }

    /// The token of a session that lives.
    async fn token_of(
        &self,
        store: &impl Store,
        host: &str,
        session: &str,
    ) -> Result<Option<Token>, MemberError> {
        // A name that is being changed may be missed once; the end of a session leaves a proof.
        for _ in 0..2 {
            let entries = store.list(&layout::host_dir(host)).await?;
            let tokens = entries.into_iter().flatten();
            let token = tokens
                .filter_map(|entry| Token::parse(&entry.name))
                .filter(|token| token.session == session)
                .max_by_key(|token| (token.alive, token.number));
            match token {
                Some(token) if token.alive => return Ok(Some(token)),
                Some(_) => return Ok(None),
                None => {}
            }
        }
        Ok(None)
    }

    /// Another host has ended the session: a new one begins, without what was exclusive.
    async fn lost(&self, store: &impl Store, state: &mut State) -> Result<Beat, MemberError> {
        self.right_until.store(0, Ordering::Release);
        state.session = None;
        let State { holds, lost, .. } = state;
        holds.retain(|name, hold| {
            hold.nonce = self.env.nonce();
            let stays = hold.access != Access::Exclusive;
            if !stays {
                lost.push(name.clone());
            }
            stays
        });
        self.join(store, state).await?;
        Ok(Beat::Began)
    }

    /// Begins a session, or goes on with that of this host's process before.
    async fn join(&self, store: &impl Store, state: &mut State) -> Result<(), MemberError> {
        let began = self.env.now();
        let own_ms = u64::try_from(self.times.session.as_millis()).unwrap_or(u64::MAX);
        state.session_ms = own_ms;
        let dir = layout::host_dir(&self.host.name);
        store.make_dir(&layout::hosts()).await?;
        store.make_dir(&dir).await?;
        let (numbers, found) = self.own_documents(store).await?;
        let highest = numbers.last().copied().unwrap_or(0);
        state.number = state.number.max(highest + NUMBERS_OF_A_PROCESS);
        state.old = numbers;
        let tokens: Vec<Token> = self.tokens(store, &self.host.name).await?;
        let ours = found.as_ref().is_none_or(|doc| doc.id == self.host.id);
        for token in &tokens {
            let going_on = found.as_ref().filter(|doc| {
                ours && token.alive && doc.boot == self.host.boot && doc.session == token.session
            });
            if let Some(doc) = going_on {
                for (name, hold) in &doc.holds {
                    state.holds.insert(name.clone(), hold.clone());
                }
                state.session = Some(Session {
                    id: token.session.clone(),
                    number: token.number,
                    // A renewal of the process before may still arrive.
                    tried: Some(began),
                });
                state.session_ms = own_ms.max(doc.session_ms);
                state.dirty = true;
                return Ok(());
            }
            if token.alive && !ours {
                let Some(doc) = &found else { continue };
                let life = match self.judge(store, state, doc).await? {
                    Judged::Silent(token, _) => self.end(store, doc, token).await?,
                    Judged::Over => Life::Over,
                    Judged::Lives(left) => Life::Lives(left),
                };
                if life != Life::Over {
                    return Err(MemberError::SameName(self.host.name.clone()));
                }
            } else {
                store.remove(&dir.join(&token.name())).await?;
            }
        }
        let id = self.env.nonce();
        store
            .put(&dir.join(&Token::alive(&id, 0).name()), &[])
            .await?;
        state.session = Some(Session {
            id,
            number: 0,
            tried: None,
        });
        state.dirty = true;
        self.publish(store, state).await
    }

    async fn tokens(&self, store: &impl Store, host: &str) -> Result<Vec<Token>, MemberError> {
        let entries = store.list(&layout::host_dir(host)).await?;
        Ok(entries
            .into_iter()
            .flatten()
            .filter_map(|entry| Token::parse(&entry.name))
            .collect())
    }

    /// The numbers of this host's documents, lowest first, and what the last one says.
    async fn own_documents(
        &self,
        store: &impl Store,
    ) -> Result<(Vec<u64>, Option<HostDoc>), MemberError> {
        for _ in 0..LOOKS {
            let entries = store.list(&layout::hosts()).await?.unwrap_or_default();
            let mut numbers: Vec<u64> = entries
                .iter()
                .filter_map(|entry| layout::parse_document(&entry.name))
                .filter(|(host, _)| *host == self.host.name)
                .map(|(_, number)| number)
                .collect();
            numbers.sort_unstable();
            let Some(&last) = numbers.last() else {
                return Ok((numbers, None));
            };
            if let Some(doc) = self.document(store, &self.host.name, last).await? {
                return Ok((numbers, Some(doc)));
            }
        }
        Err(MemberError::Unclear(self.host.name.clone()))
    }

    async fn document(
        &self,
        store: &impl Store,
        host: &str,
        number: u64,
    ) -> Result<Option<HostDoc>, MemberError> {
        let Some(json) = store.read(&layout::document(host, number)).await? else {
            return Ok(None);
        };
        let doc = serde_json::from_slice(&json).ok();
        // Its host becomes a part of paths: that of its file's name, and nothing else.
        doc.filter(|doc: &HostDoc| doc.host == host)
            .map(Some)
            .ok_or_else(|| MemberError::Unreadable(host.to_owned()))
    }

    /// Writes the document.
    pub(super) async fn publish(
        &self,
        store: &impl Store,
        state: &mut State,
    ) -> Result<(), MemberError> {
        let Some(session) = &state.session else {
            return Err(MemberError::Ended);
        };
        let doc = HostDoc {
            format: FORMAT,
            host: self.host.name.clone(),
            id: self.host.id.clone(),
            boot: self.host.boot.clone(),
            session: session.id.clone(),
            session_ms: state.session_ms,
            holds: state.holds.clone(),
        };
        let json = serde_json::to_vec_pretty(&doc).unwrap_or_default();
        // One number a try: a try that is given up may still arrive, and must then count less.
        state.number += 1;
        state.dirty = true;
        let number = state.number;
        store
            .put(&layout::document(&self.host.name, number), &json)
            .await?;
        state.dirty = false;
        state.old.push(number);
        Ok(())
    }

    /// Removes this host's earlier documents. The last two stay, so that whoever lists meanwhile
    /// finds one of them.
    async fn tidy(&self, store: &impl Store) {
        let old: Vec<u64> = {
            let mut state = self.lock().await;
            let last = state.old.len().saturating_sub(2);
            state.old.drain(..last).collect()
        };
        for (done, number) in old.iter().enumerate() {
            let file = layout::document(&self.host.name, *number);
            if store.unlink(&file).await.is_err() {
                let mut state = self.lock().await;
                state.old.extend(&old[done..]);
                state.old.sort_unstable();
                return;
            }
        }
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
                since: state.now.map_or(0, |stamp| stamp.secs),
                holders: Vec::new(),
            };
            state.holds.insert(volume.clone(), hold);
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
                state.holds.remove(volume);
            }
            return Err(error);
        }
        Ok(())
    }

    /// Lets go of volumes. What cannot be told now is told at the next renewal.
    pub async fn release(&self, store: &impl Store, volumes: &[VolumeName]) {
        let mut state = self.lock().await;
        let before = state.holds.len();
        state.holds.retain(|name, _| !volumes.contains(name));
        if state.holds.len() == before {
            return;
        }
        state.dirty = true;
        if let Err(error) = self.publish(store, &mut state).await {
            tracing::warn!(?volumes, %error, "the other hosts are told later");
        }
        drop(state);
        self.tidy(store).await;
    }

    /// The volumes that this host holds.
    pub async fn held(&self) -> BTreeMap<VolumeName, Hold> {
        self.lock().await.holds.clone()
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
        let State { holds, dirty, .. } = &mut *state;
        for (name, hold) in holds {
            let now = holders.get(name).cloned().unwrap_or_default();
            if hold.holders != now {
                hold.holders = now;
                *dirty = true;
            }
        }
        if state.dirty && state.session.is_some() {
            self.publish(store, &mut state).await?;
        }
        drop(state);
        self.tidy(store).await;
        Ok(())
    }

    /// Looks at what the other hosts hold.
    ///
    /// # Errors
    /// What the share answered. With [`MemberError::Unreadable`] all other hosts were looked at.
    pub async fn look(&self, store: &impl Store) -> Result<(), MemberError> {
        let mut state = self.lock().await;
        self.refresh(store, &mut state).await?;
        match state.unreadable.first() {
            None => Ok(()),
            Some(host) => Err(MemberError::Unreadable(host.clone())),
        }
    }

    pub(super) async fn refresh(
        &self,
        store: &impl Store,
        state: &mut State,
    ) -> Result<(), MemberError> {
        let mut unclear = String::new();
        for _ in 0..LOOKS {
            let entries = store.list(&layout::hosts()).await?.unwrap_or_default();
            let now = self.env.now();
            let mut numbers: BTreeMap<&str, u64> = BTreeMap::new();
            let mut hosts = Vec::new();
            for entry in &entries {
                if let Some((host, number)) = layout::parse_document(&entry.name) {
                    let highest = numbers.entry(host).or_default();
                    *highest = number.max(*highest);
                } else if !entry.name.starts_with('.') && entry.name != self.host.name {
                    hosts.push(entry);
                }
            }
            state
                .others
                .retain(|host, _| hosts.iter().any(|e| e.name == *host));
            state
                .stamps
                .retain(|host, _| hosts.iter().any(|e| e.name == *host));
            state
                .elapsed
                .keep_hosts(|host| hosts.iter().any(|e| e.name == host));
            unclear.clear();
            state.unreadable.clear();
            for entry in hosts {
                let host = entry.name.as_str();
                if let Some(stamp) = entry.mtime {
                    state.elapsed.see(host, stamp, now);
                    state.stamps.insert(host.to_owned(), stamp);
                }
                // Without a document it has never held anything.
                let Some(&number) = numbers.get(host) else {
                    continue;
                };
                if state
                    .others
                    .get(host)
                    .is_some_and(|(known, _)| *known == number)
                {
                    continue;
                }
                match self.document(store, host, number).await {
                    Ok(Some(doc)) => {
                        state.others.insert(host.to_owned(), (number, doc));
                    }
                    Ok(None) => host.clone_into(&mut unclear),
                    Err(MemberError::Unreadable(host)) => {
                        state.others.remove(&host);
                        state.unreadable.insert(host);
                    }
                    Err(error) => return Err(error),
                }
            }
            if unclear.is_empty() {
                return Ok(());
            }
        }
        Err(MemberError::Unclear(unclear))
    }

    /// Makes sure that what a host holds is known, or that no session of it can live.
    pub(super) fn check_known(&self, state: &State, host: &str) -> Result<(), MemberError> {
        let silent = state.silent(host, self.env.now());
        if state.unreadable.contains(host) && silent < LONGEST_SESSION {
            return Err(MemberError::Unreadable(host.to_owned()));
        }
        Ok(())
    }

    /// The other hosts, as of the last look.
    pub async fn others(&self) -> Vec<Other> {
        let state = self.lock().await;
        let now = self.env.now();
        state
            .others
            .iter()
            .map(|(host, (_, doc))| Other {
                doc: doc.clone(),
                silent: state.silent(host, now),
            })
            .collect()
    }

    /// Who else holds a volume now. Ends sessions that have been silent for too long.
    ///
    /// # Errors
    /// What the share answered.
    pub async fn holdings(
        &self,
        store: &impl Store,
        volume: &VolumeName,
    ) -> Result<Vec<Holding>, MemberError> {
        let mut state = self.lock().await;
        self.ensure(store, &mut state).await?;
        self.refresh(store, &mut state).await?;
        for host in &state.unreadable {
            self.check_known(&state, host)?;
        }
        let holding: Vec<HostDoc> = state
            .others
            .values()
            .filter(|(_, doc)| doc.holds.contains_key(volume))
            .map(|(_, doc)| doc.clone())
            .collect();
        let mut found = Vec::new();
        for doc in holding {
            let life = self.life(store, &mut state, &doc).await?;
            if let (Life::Lives(left), Some(hold)) = (life, doc.holds.get(volume)) {
                found.push(Holding {
                    host: doc.host.clone(),
                    hold: hold.clone(),
                    left,
                });
            }
        }
        Ok(found)
    }

    /// Whether the session of a document is over; ends it if it has been silent for too long.
    pub(super) async fn life(
        &self,
        store: &impl Store,
        state: &mut State,
        doc: &HostDoc,
    ) -> Result<Life, MemberError> {
        let (token, stamp) = match self.judge(store, state, doc).await? {
            Judged::Over => return Ok(Life::Over),
            Judged::Lives(left) => return Ok(Life::Lives(left)),
            Judged::Silent(token, stamp) => (token, stamp),
        };
        // A server's clock that went back before the stamp was read is noticed here.
        self.ensure_fresh(store, state).await?;
        match self.left(state, doc, stamp) {
            Duration::ZERO => self.end(store, doc, token).await,
            left => Ok(Life::Lives(left)),
        }
    }

    /// How much longer a session lasts without a new stamp.
    fn left(&self, state: &State, doc: &HostDoc, stamp: Stamp) -> Duration {
        let times = Times::new(Duration::from_millis(doc.session_ms));
        let silent = state.elapsed.since(&doc.host, stamp, self.env.now());
        times.expire().saturating_sub(silent)
    }

    async fn judge(
        &self,
        store: &impl Store,
        state: &mut State,
        doc: &HostDoc,
    ) -> Result<Judged, MemberError> {
        // First the token, then the stamp: a renewal in between makes the stamp younger than the
        // token, which then cannot be renamed any more.
        let Some(token) = self.token_of(store, &doc.host, &doc.session).await? else {
            return Ok(Judged::Over);
        };
        let Some(stamp) = store.mtime(&layout::host_dir(&doc.host)).await? else {
            return Ok(Judged::Over);
        };
        state.elapsed.see(&doc.host, stamp, self.env.now());
        Ok(match self.left(state, doc, stamp) {
            Duration::ZERO => Judged::Silent(token, stamp),
            left => Judged::Lives(left),
        })
    }

    /// Ends a session, unless its host has renewed it since.
    async fn end(
        &self,
        store: &impl Store,
        doc: &HostDoc,
        token: Token,
    ) -> Result<Life, MemberError> {
        let dir = layout::host_dir(&doc.host);
        let ended = Token {
            alive: false,
            ..token.clone()
        };
        let (from, to) = (token.name(), ended.name());
        let Err(error) = store.rename_within(&dir, &from, &to).await else {
            tracing::warn!(host = doc.host, "silent for too long: its session is ended");
            return Ok(Life::Over);
        };
        match self.token_of(store, &doc.host, &doc.session).await? {
            None => Ok(Life::Over),
            Some(now) if now.number != token.number => {
                Ok(Life::Lives(Duration::from_millis(doc.session_ms)))
            }
            Some(_) => Err(error.into()),
        }
    }

    /// A renewal now, whose stamp shows the server's clock.
    async fn ensure_fresh(&self, store: &impl Store, state: &mut State) -> Result<(), MemberError> {
        match self.renew(store, state).await? {
            Beat::Renewed => Ok(()),
            Beat::Began | Beat::Lost(_) => Err(MemberError::Ended),
        }
    }
}

/// Whether an error says that something was not there.
pub(super) fn is_absent(error: &AdminError) -> bool {
    matches!(error.kind, AdminErrorKind::NotFound)
}

#[cfg(test)]
mod tests;
