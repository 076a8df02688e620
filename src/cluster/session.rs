//! A host's session: the token that it renames, and what it does when the token is not as it left
//! it.
//!
//! Invariants:
//! - only a token `ended.<session>` ends a session; one that is not there is put there again, on a
//!   share that is known to be the same;
//! - a number that was tried is never tried again for another renewal, so a RENAME that arrives
//!   late finds nothing;
//! - while the server is known to have forgotten something, no renewal gives a right: not before
//!   the claims have been looked at ([`Member::recall`]).

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::member::{Member, MemberError, Renewal, State};
use super::share::{Env, Stamp, Store};
use super::times::LONGEST_SESSION;
use crate::layout::{self, Token};
use crate::mutant::{self, Mutant};
use crate::volume::Access;

#[derive(Debug, Clone)]
pub(super) struct Session {
    pub(super) id: String,
    /// Of the token.
    pub(super) number: u64,
    /// The highest number that may have been tried.
    pub(super) peak: u64,
    /// When the renewal to the next number was first sent, if its answer never came.
    pub(super) tried: Option<Duration>,
    /// When the last renewal that is known to have been made was sent.
    pub(super) confirmed: Duration,
}

impl Session {
    fn next(&self) -> u64 {
        self.number.max(self.peak) + 1
    }
}

#[derive(Debug, Clone, Default)]
pub(super) struct Standing {
    pub(super) session: Option<Session>,
    /// The last one was ended by another host, and what it held is not given up yet.
    ended: bool,
    /// [`Store::gaps`] at the last renewal.
    gaps: u64,
}

/// What is found of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    Alive(Token),
    Ended,
    Nothing,
}

/// Where renewals are as rare as this, each may come by a new connection, which then says nothing. A
/// living host is not taken for dead there either: what a server forgets is some 35 s.
const RARE: Duration = Duration::from_secs(60);
/// How often a session is tried to be had with a right before a call gives up.
const ROUNDS: usize = 6;

impl<E: Env> Member<E> {
    /// Renews the session. Waits for nothing else that this host does on the share.
    ///
    /// # Errors
    /// What the share answered; the right lasts as long as it did before.
    pub async fn renew(&self, store: &impl Store) -> Result<Renewal, MemberError> {
        let _behind = match mutant::is_on(Mutant::RenewalWaitsForCalls) {
            true => Some(self.lock().await),
            false => None,
        };
        self.renew_now(store).await
    }

    async fn renew_now(&self, store: &impl Store) -> Result<Renewal, MemberError> {
        let mut standing = self.standing.lock().await;
        let dir = layout::host_dir(&self.host.name);
        for _ in 0..2 {
            let Some(session) = &mut standing.session else {
                return Ok(Renewal::Over);
            };
            let next = session.next();
            let from = Token::alive(&session.id, session.number).name();
            let to = Token::alive(&session.id, next).name();
            let sent = self.env.now();
            let first = *session.tried.get_or_insert(sent);
            let error = match store.rename_within(&dir, &from, &to).await {
                Ok(stamp) => {
                    let renewed = self.renewed(session, next, sent);
                    self.watch_gaps(&mut standing, store);
                    self.stamped(sent, stamp);
                    return Ok(renewed);
                }
                Err(error) => error,
            };
            self.may_have_forgotten();
            let found = self.find(store, &self.host.name, &session.id).await?;
            match found {
                // Done by this try or by an earlier one whose answer was lost.
                Found::Alive(token) if token.number == next => {
                    return Ok(self.renewed(session, next, first));
                }
                Found::Alive(token)
                    if token.number == session.number
                        || mutant::is_on(Mutant::TokenBehindIsAnError) =>
                {
                    return Err(error.into());
                }
                // The server has forgotten renewals: the session goes on from there.
                Found::Alive(token) => {
                    tracing::warn!(
                        number = token.number,
                        "the home share's server has forgotten renewals of this host's session"
                    );
                    self.forgotten.raise();
                    session.peak = next;
                    session.number = token.number;
                    session.tried = None;
                }
                Found::Ended => {
                    self.over(&mut standing);
                    return Ok(Renewal::Over);
                }
                Found::Nothing if mutant::is_on(Mutant::AbsenceEndsSessions) => {
                    self.over(&mut standing);
                    return Ok(Renewal::Over);
                }
                Found::Nothing => {
                    self.forgotten.raise();
                    return Err(MemberError::Elsewhere);
                }
            }
        }
        Err(MemberError::Unclear(self.host.name.clone()))
    }

    fn stamped(&self, sent: Duration, stamp: Stamp) {
        let mut watched = self.watched();
        watched.elapsed.sample(sent, self.env.now(), stamp);
        watched.now = Some(stamp);
    }

    fn renewed(&self, session: &mut Session, number: u64, sent: Duration) -> Renewal {
        session.number = number;
        session.tried = None;
        session.confirmed = sent;
        if self.forgotten.is_raised() {
            return Renewal::Forgotten;
        }
        let until = (sent + self.times.right()).as_nanos();
        let until = u64::try_from(until).unwrap_or(u64::MAX);
        self.right_until.fetch_max(until, Ordering::AcqRel);
        Renewal::Renewed
    }

    /// A server whose power failed has broken the connections, if nothing else tells of it.
    fn watch_gaps(&self, standing: &mut Standing, store: &impl Store) {
        let gaps = store.gaps();
        if gaps != standing.gaps {
            standing.gaps = gaps;
            self.may_have_forgotten();
        }
    }

    /// The server may not be where it was: what is known of it so far says nothing any more, neither
    /// of what this host did nor of how long another one has been silent.
    fn may_have_forgotten(&self) {
        self.unsure.raise();
        let often = self.times.renew() < RARE;
        if often && !mutant::is_on(Mutant::SilenceOutlivesForgetting) {
            self.watched().elapsed.forget();
        }
    }

    /// The way for what is done while a renewal waits for it: each call is answered as soon as one
    /// of those is, or given up.
    fn renewals(&self, store: &impl Store) -> impl Store {
        store.for_renewals(self.times.answer())
    }

    fn over(&self, standing: &mut Standing) {
        self.right_until.store(0, Ordering::Release);
        standing.session = None;
        standing.ended = true;
    }

    /// Makes sure of a session whose right lasts for a while, and that what lies on the share is
    /// what this host did.
    pub(super) async fn ensure(
        &self,
        store: &impl Store,
        state: &mut State,
    ) -> Result<(), MemberError> {
        for _ in 0..ROUNDS {
            self.have_session(store, state).await?;
            if self.is_unsure() {
                self.recall(store, state).await?;
                continue;
            }
            if self.env.now() + self.times.right() / 2 < self.right_until() {
                return Ok(());
            }
            self.renew_now(&self.renewals(store)).await?;
        }
        Err(MemberError::Ended)
    }

    /// A renewal now, whose stamp shows the server's clock.
    pub(super) async fn ensure_fresh(&self, store: &impl Store) -> Result<(), MemberError> {
        match self.renew_now(&self.renewals(store)).await? {
            Renewal::Renewed => Ok(()),
            Renewal::Forgotten | Renewal::Over => Err(MemberError::Ended),
        }
    }

    /// Begins a session where there is none; whether it did.
    pub(super) async fn have_session(
        &self,
        store: &impl Store,
        state: &mut State,
    ) -> Result<bool, MemberError> {
        let mut standing = self.standing.lock().await;
        if standing.session.is_some() {
            return Ok(false);
        }
        if standing.ended {
            self.give_up_exclusive(state);
            standing.ended = false;
        }
        let session = self.join(store, state).await?;
        if !mutant::is_on(Mutant::GoingOnIsSeenLate) {
            // Before there is a right: it is for these as well.
            self.show(state);
        }
        standing.session = Some(session);
        standing.gaps = self.renewals(store).gaps();
        Ok(true)
    }

    /// Another host has ended the session: what was exclusive is not held any more.
    fn give_up_exclusive(&self, state: &mut State) {
        state.session = None;
        state.claims.clear();
        let mut lost = Vec::new();
        state.holds().retain(|name, hold| {
            hold.nonce = self.env.nonce();
            let stays = hold.access != Access::Exclusive;
            if !stays {
                lost.push(name.clone());
            }
            stays
        });
        state.lost.append(&mut lost);
        // Before there is a right again: it is not for these.
        self.show(state);
    }

    /// Begins a session, or goes on with that of this host's process before.
    async fn join(&self, store: &impl Store, state: &mut State) -> Result<Session, MemberError> {
        let began = self.env.now();
        let own_ms = u64::try_from(self.times.session.as_millis()).unwrap_or(u64::MAX);
        state.session_ms = own_ms;
        self.check_share(store, state).await?;
        let dir = layout::host_dir(&self.host.name);
        store.make_dir(&layout::hosts()).await?;
        store.make_dir(&dir).await?;
        let (numbers, found) = self.own_documents(store).await?;
        let torn = found.is_none() && !numbers.is_empty();
        let highest = numbers.last().copied().unwrap_or(0);
        let next = highest + self.numbers_to_leave_out();
        state.number = state.number.max(next);
        state.old = numbers;
        let tokens = self.tokens(store, &self.host.name).await?;
        let ours = match &found {
            Some(doc) => doc.id == self.host.id,
            // None of the documents can be read: whoever this was has renewed lately, or has not.
            None => !torn,
        };
        let ended = |session: &str| tokens.iter().any(|t| !t.alive && t.session == session);
        let going_on = found
            .as_ref()
            .filter(|doc| ours && doc.boot == self.host.boot && !ended(&doc.session));
        let token = going_on.and_then(|doc| {
            let own = tokens.iter().filter(|token| token.session == doc.session);
            Some((doc, own.max_by_key(|token| token.number)?))
        });
        if let Some((doc, token)) = token {
            for (name, hold) in &doc.holds {
                state.holds().insert(name.clone(), hold.clone());
            }
            state.session = Some(token.session.clone());
            state.session_ms = own_ms.max(doc.session_ms);
            state.dirty = true;
            self.find_own_claims(store, state).await?;
            return Ok(Session {
                id: token.session.clone(),
                number: token.number,
                peak: token.number,
                // A renewal of the process before may still arrive.
                tried: Some(began),
                confirmed: began,
            });
        }
        if !ours {
            for token in tokens.iter().filter(|token| token.alive) {
                self.wait_for_namesake(store, found.as_ref(), token).await?;
            }
        }
        let session = self.begin(store, state, began).await?;
        // Not before the new document: its session is what the others go by from now on.
        for token in &tokens {
            store.remove(&dir.join(&token.name())).await?;
        }
        Ok(session)
    }

    async fn begin(
        &self,
        store: &impl Store,
        state: &mut State,
        began: Duration,
    ) -> Result<Session, MemberError> {
        let id = self.env.nonce();
        let dir = layout::host_dir(&self.host.name);
        let token = dir.join(&Token::alive(&id, 0).name());
        store.put(&token, &[]).await?;
        state.session = Some(id.clone());
        self.publish(store, state).await?;
        Ok(Session {
            id,
            number: 0,
            peak: 0,
            tried: None,
            confirmed: began,
        })
    }

    /// The share must be the one that the session is on, and have an id at all.
    pub(super) async fn check_share(
        &self,
        store: &impl Store,
        state: &mut State,
    ) -> Result<(), MemberError> {
        let there = store.read(&layout::format_file()).await?;
        match (there, &state.share) {
            (Some(there), None)
                if serde_json::from_slice::<serde_json::Value>(&there).is_ok()
                    || (mutant::is_on(Mutant::TornFormatIsOne) && !there.is_empty()) =>
            {
                state.share = Some(there);
                Ok(())
            }
            (Some(there), Some(known)) if there == *known => Ok(()),
            _ => Err(MemberError::Elsewhere),
        }
    }

    /// Looks at the token, and puts it there again if it was forgotten.
    pub(super) async fn recall_token(&self, store: &impl Store) -> Result<(), MemberError> {
        let store = &self.renewals(store);
        let mut standing = self.standing.lock().await;
        let Some(session) = &mut standing.session else {
            return Ok(());
        };
        match self.find(store, &self.host.name, &session.id).await? {
            // What its number means is for the next renewal to find out.
            Found::Alive(_) => Ok(()),
            Found::Ended => {
                self.over(&mut standing);
                Ok(())
            }
            // By now another host may have ended the session and have swept the proof away.
            Found::Nothing if self.env.now() > session.confirmed + LONGEST_SESSION => {
                self.over(&mut standing);
                Ok(())
            }
            Found::Nothing => {
                tracing::warn!("the home share's server has forgotten this host's session");
                let dir = layout::host_dir(&self.host.name);
                store.make_dir(&dir).await?;
                let number = session.next();
                session.peak = number;
                let token = dir.join(&Token::alive(&session.id, number).name());
                store.put(&token, &[]).await?;
                session.number = number;
                session.tried = None;
                Ok(())
            }
        }
    }

    /// What is found of a session of a host.
    pub(super) async fn find(
        &self,
        store: &impl Store,
        host: &str,
        session: &str,
    ) -> Result<Found, MemberError> {
        // A name that is being changed may be missed once.
        for _ in 0..2 {
            let tokens = self.tokens(store, host).await?;
            let mut own = tokens.into_iter().filter(|t| t.session == session);
            let Some(mut last) = own.next() else { continue };
            for token in own {
                // One that is alive beside the proof was put there late.
                if (!token.alive, token.number) > (!last.alive, last.number) {
                    last = token;
                }
            }
            return Ok(if last.alive {
                Found::Alive(last)
            } else {
                Found::Ended
            });
        }
        Ok(Found::Nothing)
    }

    pub(super) async fn tokens(
        &self,
        store: &impl Store,
        host: &str,
    ) -> Result<Vec<Token>, MemberError> {
        let entries = store.list(&layout::host_dir(host)).await?;
        Ok(entries
            .into_iter()
            .flatten()
            .filter_map(|entry| Token::parse(&entry.name))
            .collect())
    }
}
