//! A host's document: what it tells the others, and the comparison of what lies on the share with
//! what this host did ([`Member::recall`]).
//!
//! A server may forget what it acknowledged, or bring back torn files. So after an error or a gap
//! a host looks at its token, its document and its claims; what is missing it puts there again,
//! and an exclusive volume that another host has by now is given up.

use std::sync::Arc;

use super::claim::{Holder, Written, epochs};
use super::hold::{FORMAT, HostDoc, json};
use super::member::{Beat, Member, MemberError, OwnClaim, Renewal, State};
use super::share::{Env, Store};
use crate::layout;
use crate::mutant::{self, Mutant};
use crate::volume::{Access, VolumeName};

/// How often a listing is made anew when what it named had gone meanwhile.
pub(super) const LOOKS: usize = 4;
/// Documents of an earlier process of this host may still arrive; no process writes as many.
pub(super) const NUMBERS_OF_A_PROCESS: u64 = 1 << 32;

impl<E: Env> Member<E> {
    /// Renews the session and does what is to be done beside that.
    ///
    /// # Errors
    /// What the share answered; the right lasts as long as it did before.
    pub async fn beat(&self, store: &impl Store) -> Result<Beat, MemberError> {
        let renewed = self.renew(store).await;
        match (renewed, self.tend(store).await) {
            (_, Ok(beat)) if beat != Beat::Renewed => Ok(beat),
            (Ok(Renewal::Renewed), tended) => tended,
            (Ok(Renewal::Forgotten | Renewal::Over), Ok(beat)) => {
                self.renew(store).await?;
                Ok(beat)
            }
            (Err(error), _) | (_, Err(error)) => Err(error),
        }
    }

    /// Begins a session where there is none, compares what lies on the share with what this host
    /// did, and tells the others what they have not been told.
    ///
    /// # Errors
    /// What the share answered.
    pub async fn tend(&self, store: &impl Store) -> Result<Beat, MemberError> {
        let mut state = self.lock().await;
        let tended = self.tend_to(store, &mut state).await;
        // Also when something failed: they are lost.
        if !state.lost.is_empty() {
            return Ok(Beat::Lost(std::mem::take(&mut state.lost)));
        }
        let beat = tended?;
        drop(state);
        self.tidy(store).await;
        Ok(beat)
    }

    async fn tend_to(&self, store: &impl Store, state: &mut State) -> Result<Beat, MemberError> {
        let began = self.have_session(store, state).await?;
        if self.is_unsure() {
            self.recall(store, state).await?;
        }
        if state.dirty {
            self.publish(store, state).await?;
        }
        Ok(if began { Beat::Began } else { Beat::Renewed })
    }

    /// Compares what lies on the share with what this host did, and puts it right.
    pub(super) async fn recall(
        &self,
        store: &impl Store,
        state: &mut State,
    ) -> Result<(), MemberError> {
        let (unsure, forgotten) = (self.unsure.raised(), self.forgotten.raised());
        if !mutant::is_on(Mutant::ForgottenStaysForgotten) {
            self.check_share(store, state).await?;
            self.recall_token(store).await?;
            self.recall_document(store, state).await?;
            if state.dirty {
                self.publish(store, state).await?;
            }
            self.recall_claims(store, state).await?;
            if state.dirty {
                self.publish(store, state).await?;
            }
        }
        self.show(state);
        self.unsure.settle(unsure);
        self.forgotten.settle(forgotten);
        Ok(())
    }

    /// By how much the numbers of this process begin above what is there. The server may have
    /// forgotten documents of the process before, which others have read: so it is by chance that a
    /// number could come again with another content.
    pub(super) fn numbers_to_leave_out(&self) -> u64 {
        let chance = u64::from_str_radix(&self.env.nonce(), 16).unwrap_or(0);
        match mutant::is_on(Mutant::DocumentNumbersComeAgain) {
            true => NUMBERS_OF_A_PROCESS,
            false => NUMBERS_OF_A_PROCESS + chance % NUMBERS_OF_A_PROCESS,
        }
    }

    async fn recall_document(
        &self,
        store: &impl Store,
        state: &mut State,
    ) -> Result<(), MemberError> {
        let Some(told) = self.to_tell(state) else {
            return Ok(());
        };
        let entries = store.list(&layout::hosts()).await?;
        let entries = entries.ok_or(MemberError::Elsewhere)?;
        let highest = own_numbers(&self.host.name, &entries).last().copied();
        let there = match highest {
            Some(number) => self.document(store, &self.host.name, number).await,
            None => Ok(None),
        };
        // Whoever looks by numbers would take the others' for old as well.
        let behind = highest < state.old.last().copied();
        let behind = behind && !mutant::is_on(Mutant::BehindIsEqual);
        match there {
            Ok(Some(there)) if there == told && !behind => {}
            Ok(_) | Err(MemberError::Unreadable(_)) => {
                state.number = state.number.max(highest.unwrap_or(0));
                state.dirty = true;
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Looks whether the claims are there by which this host holds volumes.
    async fn recall_claims(
        &self,
        store: &impl Store,
        state: &mut State,
    ) -> Result<(), MemberError> {
        for (volume, own) in state.claims.clone() {
            if !self.recall_claim(store, state, &volume, &own).await? {
                tracing::error!(%volume, "another host has it: the server forgot that it was here");
                state.drop_hold(&volume);
                state.lost.push(volume);
                // Before there is a right again: it is not for this one.
                self.show(state);
            }
        }
        Ok(())
    }

    /// Whether a volume is this host's still, or again.
    async fn recall_claim(
        &self,
        store: &impl Store,
        state: &mut State,
        volume: &VolumeName,
        own: &OwnClaim,
    ) -> Result<bool, MemberError> {
        let claims = layout::claims(volume, &own.id);
        let there = epochs(store, &claims).await?;
        match there.last().copied().unwrap_or(0) {
            higher if higher > own.epoch => Ok(false),
            same if same == own.epoch => {
                let holder = self.holder(store, state, volume, &own.id, same).await?;
                Ok(matches!(holder, Holder::Myself))
            }
            lower => {
                if lower > 0 {
                    let holder = self.holder(store, state, volume, &own.id, lower).await?;
                    if !matches!(holder, Holder::Nobody) {
                        return Ok(false);
                    }
                } else if store.mtime(&layout::volume(volume)).await?.is_none() {
                    // No volume, so nobody can claim it; its record is the catalog's.
                    return Ok(true);
                }
                tracing::warn!(%volume, "the home share's server has forgotten this host's claim");
                store.make_dir(&claims).await?;
                self.make(store, state, volume, &claims, own.epoch).await
            }
        }
    }

    /// After a restart of the daemon: the claims by which this host holds its exclusive volumes.
    pub(super) async fn find_own_claims(
        &self,
        store: &impl Store,
        state: &mut State,
    ) -> Result<(), MemberError> {
        let holds = Arc::clone(&state.holds);
        let exclusive = holds.iter().filter(|(_, h)| h.access == Access::Exclusive);
        for (volume, hold) in exclusive {
            let entries = store.list(&layout::volume(volume)).await?;
            let entries = entries.unwrap_or_default();
            for id in entries.iter().filter_map(|e| layout::claims_of(&e.name)) {
                let claims = layout::claims(volume, id);
                let Some(epoch) = epochs(store, &claims).await?.pop() else {
                    continue;
                };
                let written = self.written(store, &claims, epoch).await?;
                if matches!(written, Written::Claim(claim) if claim.nonce == hold.nonce) {
                    let id = id.to_owned();
                    let own = OwnClaim { id, epoch };
                    state.claims.insert(volume.clone(), own);
                }
            }
        }
        Ok(())
    }

    /// The numbers of this host's documents, lowest first, and what the last one says that can be
    /// read: a torn one says nothing.
    pub(super) async fn own_documents(
        &self,
        store: &impl Store,
    ) -> Result<(Vec<u64>, Option<HostDoc>), MemberError> {
        'looks: for _ in 0..LOOKS {
            let entries = store.list(&layout::hosts()).await?.unwrap_or_default();
            let numbers = own_numbers(&self.host.name, &entries);
            for &number in numbers.iter().rev() {
                match self.document(store, &self.host.name, number).await {
                    Ok(Some(doc)) => return Ok((numbers, Some(doc))),
                    Ok(None) => continue 'looks,
                    Err(MemberError::Unreadable(_)) if !mutant::is_on(Mutant::TornFilesStay) => {
                        tracing::warn!(number, "this host's document is damaged; written anew");
                    }
                    Err(error) => return Err(error),
                }
            }
            return Ok((numbers, None));
        }
        Err(MemberError::Unclear(self.host.name.clone()))
    }

    pub(super) async fn document(
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
        doc.filter(|doc: &HostDoc| doc.host == host && doc.format == FORMAT)
            .map(Some)
            .ok_or_else(|| MemberError::Unreadable(host.to_owned()))
    }

    fn to_tell(&self, state: &State) -> Option<HostDoc> {
        Some(HostDoc {
            format: FORMAT,
            host: self.host.name.clone(),
            id: self.host.id.clone(),
            boot: self.host.boot.clone(),
            session: state.session.clone()?,
            session_ms: state.session_ms,
            holds: state.holds.as_ref().clone(),
        })
    }

    /// Writes the document.
    #[tracing::instrument(level = "debug", skip_all)]
    pub(super) async fn publish(
        &self,
        store: &impl Store,
        state: &mut State,
    ) -> Result<(), MemberError> {
        let doc = self.to_tell(state).ok_or(MemberError::Ended)?;
        // One number a try: a try that is given up may still arrive, and must then count less.
        state.number += 1;
        state.dirty = true;
        let number = state.number;
        let file = layout::document(&self.host.name, number);
        if let Err(error) = store.put(&file, &json(&doc)).await {
            self.unsure.raise();
            return Err(error.into());
        }
        state.dirty = false;
        state.old.push(number);
        Ok(())
    }

    /// Removes this host's earlier documents. The last two stay, so that whoever lists meanwhile
    /// finds one of them.
    pub(super) async fn tidy(&self, store: &impl Store) {
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
}

/// The numbers of a host's documents, lowest first.
pub(super) fn own_numbers(host: &str, entries: &[super::share::Entry]) -> Vec<u64> {
    let mut numbers: Vec<u64> = entries
        .iter()
        .filter_map(|entry| layout::parse_document(&entry.name))
        .filter(|(of, _)| *of == host)
        .map(|(_, number)| number)
        .collect();
    numbers.sort_unstable();
    numbers
}
