//! What a host sees of the others: who lives, and what each holds.
//!
//! Absence is no proof. Where the token of a session is not there and its host has been silent for
//! as long as any other, a token is put there, which the host may renew and others may end later. A
//! document that cannot be read counts as holding everything until its host has been silent.
//!
//! Known limit: of a host none of whose documents was ever read, the session time is not known;
//! the longest there is counts.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::document::{LOOKS, own_numbers};
use super::hold::HostDoc;
use super::member::{Holding, Member, MemberError, State, Unreadable};
use super::session::Found;
use super::share::{Entry, Env, Stamp, Store};
use super::times::{LONGEST_SESSION, Times};
use crate::layout::{self, Token};
use crate::mutant::{self, Mutant};
use crate::volume::VolumeName;

/// Whether a session is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Life {
    Over,
    /// It lives, and if it stays silent it is over in this time.
    Lives(Duration),
}

/// What is to be ended of a session that has been silent for too long.
#[derive(Debug)]
enum Silent {
    Token(Token),
    /// Its token is not there.
    Nothing,
}

/// What a host's token and its stamp say.
enum Judged {
    Over,
    Lives(Duration),
    Silent(Silent, Stamp),
}

impl<E: Env> Member<E> {
    /// Looks at what the other hosts hold.
    ///
    /// # Errors
    /// What the share answered. With [`MemberError::Unreadable`] all other hosts were looked at.
    pub async fn look(&self, store: &impl Store) -> Result<(), MemberError> {
        let mut state = self.lock().await;
        self.refresh(store, &mut state).await?;
        match state.unreadable.keys().next() {
            None => Ok(()),
            Some(host) => Err(MemberError::Unreadable(host.clone())),
        }
    }

    pub(super) async fn refresh(
        &self,
        store: &impl Store,
        state: &mut State,
    ) -> Result<(), MemberError> {
        let mut unclear = None;
        for _ in 0..LOOKS {
            let entries = store.list(&layout::hosts()).await?;
            let entries = self.check_listing(state, entries)?;
            unclear = self.read_hosts(store, state, &entries).await?;
            if unclear.is_none() {
                return Ok(());
            }
        }
        Err(MemberError::Unclear(unclear.unwrap_or_default()))
    }

    /// A listing without what this host has there says nothing of the others either.
    fn check_listing(
        &self,
        state: &State,
        entries: Option<Vec<Entry>>,
    ) -> Result<Vec<Entry>, MemberError> {
        if state.session.is_none() || mutant::is_on(Mutant::AbsenceEndsSessions) {
            return Ok(entries.unwrap_or_default());
        }
        let Some(entries) = entries else {
            self.unsure.raise();
            return Err(MemberError::Elsewhere);
        };
        let told = state.old.last().copied().unwrap_or(0);
        let there = own_numbers(&self.host.name, &entries).pop().unwrap_or(0);
        if there < told {
            self.unsure.raise();
            return Err(MemberError::Elsewhere);
        }
        Ok(entries)
    }

    /// Reads the documents that are new; the host one of whose documents has gone meanwhile.
    async fn read_hosts(
        &self,
        store: &impl Store,
        state: &mut State,
        entries: &[Entry],
    ) -> Result<Option<String>, MemberError> {
        let now = self.env.now();
        let mut numbers: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
        for entry in entries {
            if let Some((host, number)) = layout::parse_document(&entry.name) {
                numbers.entry(host).or_default().push(number);
            }
        }
        let is_host = |entry: &&Entry| {
            let name = entry.name.as_str();
            let document = layout::parse_document(name).is_some();
            !document && !name.starts_with('.') && name != self.host.name
        };
        let hosts: BTreeMap<&str, Option<Stamp>> = entries
            .iter()
            .filter(is_host)
            .map(|entry| (entry.name.as_str(), entry.mtime))
            .collect();
        let is_there = |host: &str| hosts.contains_key(host);
        if state.others.keys().any(|host| !is_there(host)) {
            Arc::make_mut(&mut state.others).retain(|host, _| is_there(host));
        }
        state.stamps = Arc::new(self.see_stamps(&hosts, now));
        state.unreadable.clear();
        let mut unclear = None;
        for host in hosts.into_keys() {
            // Without a document it has never held anything.
            let Some(numbers) = numbers.get_mut(host) else {
                continue;
            };
            numbers.sort_unstable();
            let last = numbers.last().copied().unwrap_or(0);
            if matches!(state.others.get(host), Some((known, _)) if *known == last) {
                continue;
            }
            match self.document(store, host, last).await {
                Ok(Some(doc)) => {
                    let others = Arc::make_mut(&mut state.others);
                    others.insert(host.to_owned(), (last, Arc::new(doc)));
                }
                Ok(None) => unclear = Some(host.to_owned()),
                Err(MemberError::Unreadable(_)) => {
                    let session = self.session_time(store, state, host, numbers).await?;
                    Arc::make_mut(&mut state.others).remove(host);
                    let unreadable = Unreadable { session };
                    state.unreadable.insert(host.to_owned(), unreadable);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(unclear)
    }

    fn see_stamps(
        &self,
        hosts: &BTreeMap<&str, Option<Stamp>>,
        now: Duration,
    ) -> BTreeMap<String, Stamp> {
        let mut watched = self.watched();
        // One of this host's own name is waited for.
        let waited_for =
            |host: &str| host == self.host.name && !mutant::is_on(Mutant::NamesakesAreForgotten);
        watched
            .elapsed
            .keep_hosts(|host| hosts.contains_key(host) || waited_for(host));
        let stamped = hosts
            .iter()
            .filter_map(|(host, stamp)| Some((*host, (*stamp)?)));
        stamped
            .map(|(host, stamp)| {
                watched.elapsed.see(host, stamp, now);
                (host.to_owned(), stamp)
            })
            .collect()
    }

    /// The session time of a host whose last document cannot be read: that of the one before.
    async fn session_time(
        &self,
        store: &impl Store,
        state: &State,
        host: &str,
        numbers: &[u64],
    ) -> Result<Duration, MemberError> {
        if let Some((_, known)) = state.others.get(host) {
            return Ok(Duration::from_millis(known.session_ms));
        }
        for &number in numbers.iter().rev().skip(1) {
            match self.document(store, host, number).await {
                Ok(Some(doc)) => return Ok(Duration::from_millis(doc.session_ms)),
                Ok(None) | Err(MemberError::Unreadable(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(LONGEST_SESSION)
    }

    /// Makes sure that what a host holds is known, or that no session of it can live.
    pub(super) async fn check_known(
        &self,
        store: &impl Store,
        state: &State,
        host: &str,
    ) -> Result<(), MemberError> {
        let Some(unreadable) = state.unreadable.get(host) else {
            return Ok(());
        };
        let unknown = || Err(MemberError::Unreadable(host.to_owned()));
        if mutant::is_on(Mutant::TornFilesStay) {
            return unknown();
        }
        let mut tokens = self.tokens(store, host).await?;
        if tokens.is_empty() {
            // A name that is being changed may be missed once.
            tokens = self.tokens(store, host).await?;
        }
        let unread = |session: &str| HostDoc::unread(host, session, unreadable.session);
        if tokens.is_empty() && !self.is_silent(store, &unread("")).await? {
            return unknown();
        }
        for token in tokens.iter().filter(|token| token.alive) {
            if self.life(store, &unread(&token.session)).await? != Life::Over {
                return unknown();
            }
        }
        Ok(())
    }

    /// Whether a host none of whose sessions is there has been silent for as long as a session.
    async fn is_silent(&self, store: &impl Store, doc: &HostDoc) -> Result<bool, MemberError> {
        if mutant::is_on(Mutant::AbsenceEndsSessions) {
            return Ok(true);
        }
        let Some(stamp) = store.mtime(&layout::host_dir(&doc.host)).await? else {
            return Ok(false);
        };
        self.watched().elapsed.see(&doc.host, stamp, self.env.now());
        if !self.left(doc, stamp).is_zero() {
            return Ok(false);
        }
        // As for a session: a server's clock that went back, or a server that forgot, shows now.
        self.ensure_fresh(store).await?;
        Ok(self.left(doc, stamp).is_zero())
    }

    pub(super) async fn check_all_known(
        &self,
        store: &impl Store,
        state: &State,
    ) -> Result<(), MemberError> {
        for host in state.unreadable.keys() {
            self.check_known(store, state, host).await?;
        }
        Ok(())
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
        self.check_all_known(store, &state).await?;
        let mut found = Vec::new();
        for (_, doc) in state.others.clone().values() {
            let Some(hold) = doc.holds.get(volume) else {
                continue;
            };
            if let Life::Lives(left) = self.life(store, doc).await? {
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
        doc: &HostDoc,
    ) -> Result<Life, MemberError> {
        let (silent, stamp) = match self.judge(store, doc).await? {
            Judged::Over => return Ok(Life::Over),
            Judged::Lives(left) => return Ok(Life::Lives(left)),
            Judged::Silent(silent, stamp) => (silent, stamp),
        };
        // A server's clock that went back before the stamp was read is noticed here.
        self.ensure_fresh(store).await?;
        match self.left(doc, stamp) {
            Duration::ZERO => self.end(store, doc, silent).await,
            left => Ok(Life::Lives(left)),
        }
    }

    /// How much longer a session lasts without a new stamp.
    fn left(&self, doc: &HostDoc, stamp: Stamp) -> Duration {
        let times = Times::new(Duration::from_millis(doc.session_ms));
        let now = self.env.now();
        let silent = self.watched().elapsed.since(&doc.host, stamp, now);
        times.expire().saturating_sub(silent)
    }

    async fn judge(&self, store: &impl Store, doc: &HostDoc) -> Result<Judged, MemberError> {
        // First the token, then the stamp: a renewal in between makes the stamp younger than the
        // token, which then cannot be renamed any more.
        let silent = match self.find(store, &doc.host, &doc.session).await? {
            Found::Ended => return Ok(Judged::Over),
            Found::Nothing if mutant::is_on(Mutant::AbsenceEndsSessions) => {
                return Ok(Judged::Over);
            }
            Found::Alive(token) => Silent::Token(token),
            Found::Nothing => Silent::Nothing,
        };
        let dir = layout::host_dir(&doc.host);
        let Some(stamp) = store.mtime(&dir).await? else {
            // From here on it can be seen whether the host is silent.
            store.make_dir(&dir).await?;
            let times = Times::new(Duration::from_millis(doc.session_ms));
            return Ok(Judged::Lives(times.expire()));
        };
        self.watched().elapsed.see(&doc.host, stamp, self.env.now());
        Ok(match self.left(doc, stamp) {
            Duration::ZERO => Judged::Silent(silent, stamp),
            left => Judged::Lives(left),
        })
    }

    /// Ends a session, unless its host has renewed it since.
    async fn end(
        &self,
        store: &impl Store,
        doc: &HostDoc,
        silent: Silent,
    ) -> Result<Life, MemberError> {
        let dir = layout::host_dir(&doc.host);
        let token = match silent {
            Silent::Token(token) => token,
            // Its host may put its own there at this moment, so not the proof: one that lives, and
            // is ended as any other once it has been silent for as long.
            Silent::Nothing => {
                let token = Token {
                    alive: !mutant::is_on(Mutant::ProofWithoutToken),
                    ..Token::alive(&doc.session, 0)
                };
                store.put(&dir.join(&token.name()), &[]).await?;
                let times = Times::new(Duration::from_millis(doc.session_ms));
                return Ok(Life::Lives(times.expire()));
            }
        };
        let ended = Token {
            alive: false,
            ..token.clone()
        };
        let (from, to) = (token.name(), ended.name());
        let Err(error) = store.rename_within(&dir, &from, &to).await else {
            tracing::warn!(host = doc.host, "silent for too long: its session is ended");
            return Ok(Life::Over);
        };
        match self.find(store, &doc.host, &doc.session).await? {
            Found::Ended => Ok(Life::Over),
            Found::Alive(now) if now.number == token.number => Err(error.into()),
            Found::Alive(_) | Found::Nothing => {
                Ok(Life::Lives(Duration::from_millis(doc.session_ms)))
            }
        }
    }

    /// Under this host's name another one may live: it is waited for until it is silent.
    pub(super) async fn wait_for_namesake(
        &self,
        store: &impl Store,
        found: Option<&HostDoc>,
        token: &Token,
    ) -> Result<(), MemberError> {
        let session = found.map_or(self.times.session, |doc| {
            Duration::from_millis(doc.session_ms)
        });
        let doc = HostDoc::unread(&self.host.name, &token.session, session);
        let life = match self.judge(store, &doc).await? {
            Judged::Silent(silent, _) => self.end(store, &doc, silent).await?,
            Judged::Over => Life::Over,
            Judged::Lives(left) => Life::Lives(left),
        };
        match life {
            Life::Over => Ok(()),
            Life::Lives(_) => Err(MemberError::SameName(self.host.name.clone())),
        }
    }
}
