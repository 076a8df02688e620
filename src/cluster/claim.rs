//! The right to mount an exclusive volume.
//!
//! Of several hosts that take the next epoch, one wins its RENAME. An epoch's claim is good while
//! its host's document holds the volume under the claim's nonce, in a session that lives. The hold
//! is published before the claim is made, so a claim that is void stays void; one that arrives
//! late, after its host gave up, is void from the start. The highest epoch stays until there is a
//! higher one, and lower ones are removed; so whoever has made one looks whether it is the highest
//! now. A volume that is made anew has other claims; one that is restored has those that it had, so a
//! host that was on its way to a claim meanwhile looks whether that is still where the volume is.

use std::time::Duration;

use super::hold::{Claim, FORMAT, Hold, HostDoc, json};
use super::member::{Claimed, Holding, Member, MemberError, OwnClaim, State, is_absent};
use super::share::{Env, Store};
use super::view::Life;
use crate::layout;
use crate::mutant::{self, Mutant};
use crate::volume::{Access, VolumeName};
use nfs::address::SharePath;
use nfs::admin::AdminErrorKind;

/// How often the next epoch is tried for when another host was faster and gave up at once.
const TRIES: usize = 4;

impl<E: Env> Member<E> {
    /// Takes the exclusive volume whose record has this id, if nobody has it. With
    /// [`Claimed::Mine`] this host holds it and, until the time that it tells, no other host does:
    /// provided that the volume still has that record, which is to be looked at afterwards. As long
    /// as it is held it is not removed, so it keeps its record. One that was lost is not to be had
    /// before [`Member::tend`] has told so.
    ///
    /// # Errors
    /// What the share answered; this host does not hold the volume then.
    pub async fn claim(
        &self,
        store: &impl Store,
        volume: &VolumeName,
        id: &str,
    ) -> Result<Claimed, MemberError> {
        let mut state = self.lock().await;
        let had = state.holds.contains_key(volume);
        let claimed = self.try_to_claim(store, &mut state, volume, id).await;
        if !had
            && !matches!(claimed, Ok(Claimed::Mine(_)))
            && state.drop_hold(volume)
            && let Err(error) = self.publish(store, &mut state).await
        {
            tracing::debug!(%volume, %error, "the other hosts are told later");
        }
        claimed
    }

    #[tracing::instrument(level = "debug", skip_all)]
    async fn try_to_claim(
        &self,
        store: &impl Store,
        state: &mut State,
        volume: &VolumeName,
        id: &str,
    ) -> Result<Claimed, MemberError> {
        self.ensure(store, state).await?;
        // What serves it since then must have been ended before there is a right to it again.
        if state.lost.contains(volume) {
            return Err(MemberError::Ended);
        }
        let session = state.session.clone();
        let claims = layout::claims(volume, id);
        store.make_dir(&claims).await?;
        for _ in 0..TRIES {
            let before = epochs(store, &claims).await?;
            let highest = before.last().copied().unwrap_or(0);
            if highest > 0 {
                match self.holder(store, state, volume, id, highest).await? {
                    Holder::Nobody => {}
                    Holder::Myself => return self.mine(state, session.as_deref()),
                    Holder::Other(holding) => return Ok(Claimed::Held(holding)),
                    Holder::Superseded => continue,
                }
            }
            let epoch = highest + 1;
            self.add(store, state, volume, Access::Exclusive).await?;
            if self.make(store, state, volume, &claims, epoch).await? {
                for epoch in before {
                    // What stays is below the highest, and means nothing.
                    let _ = store.remove(&claims.join(&epoch.to_string())).await;
                }
                let id = id.to_owned();
                state.claims.insert(volume.clone(), OwnClaim { id, epoch });
                return self.mine(state, session.as_deref());
            }
        }
        Err(MemberError::Unclear(self.host.name.clone()))
    }

    /// Makes sure that this host's claim to a volume lies where the volume is now: that may have been
    /// removed and restored since its directory was looked up, and the claim lie beside the new ones.
    ///
    /// # Errors
    /// [`MemberError::Unclear`] when it does not, and what the share answered.
    pub async fn check_claim(
        &self,
        store: &impl Store,
        volume: &VolumeName,
    ) -> Result<(), MemberError> {
        let state = self.lock().await;
        let (own, hold) = (state.claims.get(volume), state.holds.get(volume));
        let (Some(own), Some(hold)) = (own, hold) else {
            return Err(MemberError::Ended);
        };
        let claims = layout::claims(volume, &own.id);
        // Not put there again, as of one that the server has lost: another host's may be coming.
        match self.written(store, &claims, own.epoch).await? {
            Written::Claim(there)
                if (&there.host, &there.nonce) == (&self.host.name, &hold.nonce) =>
            {
                Ok(())
            }
            _ if mutant::is_on(Mutant::ClaimsAreNotLookedFor) => Ok(()),
            _ => Err(MemberError::Unclear(self.host.name.clone())),
        }
    }

    fn mine(&self, state: &State, session: Option<&str>) -> Result<Claimed, MemberError> {
        // The calls above may have taken longer than the right lasted.
        if self.has_right() && state.session.as_deref() == session {
            Ok(Claimed::Mine(self.right_until()))
        } else {
            Err(MemberError::Ended)
        }
    }

    /// What the claim of an epoch says.
    pub(super) async fn written(
        &self,
        store: &impl Store,
        claims: &SharePath,
        epoch: u64,
    ) -> Result<Written, MemberError> {
        let file = layout::claim_file(&claims.join(&epoch.to_string()));
        let Some(json) = store.read(&file).await? else {
            return Ok(Written::Gone);
        };
        Ok(match serde_json::from_slice::<Claim>(&json) {
            Ok(claim) if claim.format == FORMAT => Written::Claim(claim),
            _ => Written::Torn,
        })
    }

    /// Who has the volume by the claim of an epoch.
    pub(super) async fn holder(
        &self,
        store: &impl Store,
        state: &mut State,
        volume: &VolumeName,
        id: &str,
        epoch: u64,
    ) -> Result<Holder, MemberError> {
        let claims = layout::claims(volume, id);
        let written = match self.written(store, &claims, epoch).await? {
            // The server has lost the file, or a higher epoch's maker is removing this one.
            Written::Gone if self.is_epoch_there(store, &claims, epoch).await? => {
                self.without_file(store, state, volume, id, epoch).await?
            }
            written => written,
        };
        let claim = match written {
            Written::Claim(claim) => claim,
            Written::Gone => return Ok(Holder::Superseded),
            Written::Torn if mutant::is_on(Mutant::TornFilesStay) => {
                return Err(MemberError::Unclear("that made the claim".to_owned()));
            }
            Written::Torn => return self.holder_of_torn(store, state, volume, id, epoch).await,
        };
        if claim.host == self.host.name {
            let own = state.holds.get(volume);
            if own.is_none_or(|hold| hold.nonce != claim.nonce) {
                return Ok(Holder::Nobody);
            }
            let id = id.to_owned();
            state.claims.insert(volume.clone(), OwnClaim { id, epoch });
            return Ok(Holder::Myself);
        }
        // After the claim: its hold was published before it.
        self.refresh(store, state).await?;
        self.check_known(store, state, &claim.host).await?;
        let Some((_, doc)) = state.others.get(&claim.host).cloned() else {
            return Ok(Holder::Nobody);
        };
        let hold = doc.holds.get(volume);
        let Some(hold) = hold.filter(|hold| hold.nonce == claim.nonce) else {
            return Ok(Holder::Nobody);
        };
        if doc.session != claim.session {
            return Ok(Holder::Nobody);
        }
        match self.life(store, &doc).await? {
            Life::Over => Ok(Holder::Nobody),
            Life::Lives(left) => Ok(Holder::Other(holding(&doc, hold, left))),
        }
    }

    async fn is_epoch_there(
        &self,
        store: &impl Store,
        claims: &SharePath,
        epoch: u64,
    ) -> Result<bool, MemberError> {
        if mutant::is_on(Mutant::ClaimsWithoutFileStay) {
            return Ok(false);
        }
        let there = store.mtime(&claims.join(&epoch.to_string())).await?;
        Ok(there.is_some())
    }

    /// The claim of an epoch whose file is not there. One's own is put there again, unless there is another
    /// host's by now: the server may have forgotten the whole epoch between the two looks.
    async fn without_file(
        &self,
        store: &impl Store,
        state: &State,
        volume: &VolumeName,
        id: &str,
        epoch: u64,
    ) -> Result<Written, MemberError> {
        if !is_own(state, volume, id, epoch) || mutant::is_on(Mutant::OwnClaimReplaces) {
            return Ok(Written::Torn);
        }
        let claims = layout::claims(volume, id);
        let claim = json(&self.to_claim(state, volume)?);
        let file = layout::claim_file(&claims.join(&epoch.to_string()));
        store.create(&file, &claim).await?;
        self.written(store, &claims, epoch).await
    }

    /// A claim that cannot be read is that of a host whose document holds the volume exclusively;
    /// where none does, it is void. One's own is replaced: as long as its file is there, whatever is in it,
    /// no other host's epoch takes its place.
    async fn holder_of_torn(
        &self,
        store: &impl Store,
        state: &mut State,
        volume: &VolumeName,
        id: &str,
        epoch: u64,
    ) -> Result<Holder, MemberError> {
        if is_own(state, volume, id, epoch) {
            let claims = layout::claims(volume, id);
            let claim = self.to_claim(state, volume)?;
            let file = layout::claim_file(&claims.join(&epoch.to_string()));
            store.put(&file, &json(&claim)).await?;
            return Ok(Holder::Myself);
        }
        self.refresh(store, state).await?;
        self.check_all_known(store, state).await?;
        for (_, doc) in state.others.clone().values() {
            let hold = doc.holds.get(volume);
            let Some(hold) = hold.filter(|hold| hold.access == Access::Exclusive) else {
                continue;
            };
            if let Life::Lives(left) = self.life(store, doc).await? {
                return Ok(Holder::Other(holding(doc, hold, left)));
            }
        }
        Ok(Holder::Nobody)
    }

    fn to_claim(&self, state: &State, volume: &VolumeName) -> Result<Claim, MemberError> {
        let (Some(hold), Some(session)) = (state.holds.get(volume), &state.session) else {
            return Err(MemberError::Ended);
        };
        Ok(Claim {
            format: FORMAT,
            host: self.host.name.clone(),
            session: session.clone(),
            nonce: hold.nonce.clone(),
            since: hold.since,
        })
    }

    /// Makes the claim of an epoch; false when another host was faster.
    #[tracing::instrument(level = "debug", skip_all)]
    pub(super) async fn make(
        &self,
        store: &impl Store,
        state: &State,
        volume: &VolumeName,
        claims: &SharePath,
        epoch: u64,
    ) -> Result<bool, MemberError> {
        let claim = self.to_claim(state, volume)?;
        let aside = layout::aside(&format!("{}.claim", self.env.nonce()));
        store.make_dir(&aside).await?;
        store
            .put(&layout::claim_file(&aside), &json(&claim))
            .await?;
        let place = claims.join(&epoch.to_string());
        if let Err(error) = store.rename(&aside, &place).await {
            // Whose is it? The reply may have been lost after the server acted.
            let lost = match self.written(store, claims, epoch).await? {
                Written::Claim(there) if there == claim => false,
                Written::Claim(_) => true,
                Written::Torn | Written::Gone => {
                    let taken = matches!(error.kind, AdminErrorKind::Exists) || is_absent(&error);
                    if !taken {
                        let _ = store.remove(&aside).await;
                        return Err(error.into());
                    }
                    true
                }
            };
            if lost {
                // What stays is swept.
                let _ = store.remove(&aside).await;
                return Ok(false);
            }
        }
        if mutant::is_on(Mutant::EpochMadeAnewWins) {
            return Ok(true);
        }
        // While this host was slow the epoch may have been made, superseded and removed.
        let last = epochs(store, claims).await?.pop();
        Ok(last == Some(epoch))
    }
}

/// Whether this host has a volume by the claim of this epoch.
fn is_own(state: &State, volume: &VolumeName, id: &str, epoch: u64) -> bool {
    let own = state.claims.get(volume);
    own.is_some_and(|own| own.id == id && own.epoch == epoch)
}

fn holding(doc: &HostDoc, hold: &Hold, left: Duration) -> Holding {
    Holding {
        host: doc.host.clone(),
        hold: hold.clone(),
        left,
    }
}

pub(super) enum Holder {
    Nobody,
    Myself,
    Other(Holding),
    /// There is a higher epoch by now.
    Superseded,
}

/// What is found where a claim should be.
pub(super) enum Written {
    Claim(Claim),
    /// It cannot be read.
    Torn,
    Gone,
}

/// The epochs that are there, lowest first.
pub(super) async fn epochs(
    store: &impl Store,
    claims: &SharePath,
) -> Result<Vec<u64>, MemberError> {
    let entries = store.list(claims).await?.unwrap_or_default();
    let mut epochs: Vec<u64> = entries
        .iter()
        .filter_map(|entry| entry.name.parse().ok())
        .collect();
    epochs.sort_unstable();
    Ok(epochs)
}
