//! The right to mount an exclusive volume.
//!
//! Of several hosts that take the next epoch, one wins its RENAME. An epoch's claim is good while
//! its host's document holds the volume under the claim's nonce, in a session that lives. The hold
//! is published before the claim is made, so a claim that is void stays void; one that arrives
//! late, after its host gave up, is void from the start. Epochs are never used again: the highest
//! stays until there is a higher one, and a volume that is made anew has other claims.

use super::hold::{Claim, FORMAT};
use super::layout;
use super::member::{Claimed, Holding, Life, Member, MemberError, State, is_absent};
use super::share::{Env, Store};
use crate::nfs::address::SharePath;
use crate::nfs::admin::AdminErrorKind;
use crate::volume::{Access, VolumeName};

/// How often the next epoch is tried for when another host was faster and gave up at once.
const TRIES: usize = 4;

impl<E: Env> Member<E> {
    /// Takes the exclusive volume whose record has this id, if nobody has it. With
    /// [`Claimed::Mine`] this host holds it and, until the time that it tells, no other host does:
    /// provided that the volume still has that record, which is to be looked at afterwards. As long
    /// as it is held it is not removed, so it keeps its record.
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
        if !had && !matches!(claimed, Ok(Claimed::Mine(_))) && state.holds.remove(volume).is_some()
        {
            state.dirty = true;
            if let Err(error) = self.publish(store, &mut state).await {
                tracing::debug!(%volume, %error, "the other hosts are told later");
            }
        }
        claimed
    }

    async fn try_to_claim(
        &self,
        store: &impl Store,
        state: &mut State,
        volume: &VolumeName,
        id: &str,
    ) -> Result<Claimed, MemberError> {
        self.ensure(store, state).await?;
        let claims = layout::claims(volume, id);
        store.make_dir(&claims).await?;
        for _ in 0..TRIES {
            let epochs = epochs(store, &claims).await?;
            let highest = epochs.last().copied().unwrap_or(0);
            if highest > 0 {
                match self.holder(store, state, volume, &claims, highest).await? {
                    Holder::Nobody => {}
                    Holder::Myself => return self.mine(),
                    Holder::Other(holding) => return Ok(Claimed::Held(holding)),
                    Holder::Superseded => continue,
                }
            }
            self.add(store, state, volume, Access::Exclusive).await?;
            let made = self
                .make(store, state, volume, &claims, highest + 1)
                .await?;
            for epoch in epochs {
                // What stays is below the highest, and means nothing.
                let _ = store.remove(&claims.join(&epoch.to_string())).await;
            }
            if made {
                return self.mine();
            }
        }
        Err(MemberError::Unclear(self.host.name.clone()))
    }

    fn mine(&self) -> Result<Claimed, MemberError> {
        // The calls above may have taken longer than the right lasted.
        if self.has_right() {
            Ok(Claimed::Mine(self.right_until()))
        } else {
            Err(MemberError::Ended)
        }
    }

    /// Who has the volume by the claim of an epoch.
    async fn holder(
        &self,
        store: &impl Store,
        state: &mut State,
        volume: &VolumeName,
        claims: &SharePath,
        epoch: u64,
    ) -> Result<Holder, MemberError> {
        let file = layout::claim_file(&claims.join(&epoch.to_string()));
        let Some(json) = store.read(&file).await? else {
            return Ok(Holder::Superseded);
        };
        let Ok(claim) = serde_json::from_slice::<Claim>(&json) else {
            return Err(MemberError::Unclear("that made the claim".to_owned()));
        };
        if claim.host == self.host.name {
            let own = state.holds.get(volume);
            return Ok(match own {
                Some(hold) if hold.nonce == claim.nonce => Holder::Myself,
                _ => Holder::Nobody,
            });
        }
        // After the claim: its hold was published before it.
        self.refresh(store, state).await?;
        self.check_known(state, &claim.host)?;
        let Some((_, doc)) = state.others.get(&claim.host).cloned() else {
            return Ok(Holder::Nobody);
        };
        let Some(hold) = doc
            .holds
            .get(volume)
            .filter(|hold| hold.nonce == claim.nonce)
        else {
            return Ok(Holder::Nobody);
        };
        if doc.session != claim.session {
            return Ok(Holder::Nobody);
        }
        match self.life(store, state, &doc).await? {
            Life::Over => Ok(Holder::Nobody),
            Life::Lives(left) => Ok(Holder::Other(Holding {
                host: doc.host.clone(),
                hold: hold.clone(),
                left,
            })),
        }
    }

    /// Makes the claim of an epoch; false when another host was faster.
    async fn make(
        &self,
        store: &impl Store,
        state: &State,
        volume: &VolumeName,
        claims: &SharePath,
        epoch: u64,
    ) -> Result<bool, MemberError> {
        let (Some(hold), Some(session)) = (state.holds.get(volume), state.session_id()) else {
            return Err(MemberError::Ended);
        };
        let claim = Claim {
            format: FORMAT,
            host: self.host.name.clone(),
            session: session.to_owned(),
            nonce: hold.nonce.clone(),
            since: hold.since,
        };
        let aside = layout::aside(&format!("{}.claim", self.env.nonce()));
        store.make_dir(&aside).await?;
        let json = serde_json::to_vec_pretty(&claim).unwrap_or_default();
        store.put(&layout::claim_file(&aside), &json).await?;
        let place = claims.join(&epoch.to_string());
        let Err(error) = store.rename(&aside, &place).await else {
            return Ok(true);
        };
        // Whose is it? The reply may have been lost after the server acted.
        let there = store.read(&layout::claim_file(&place)).await?;
        let there = there.and_then(|json| serde_json::from_slice::<Claim>(&json).ok());
        let lost = match there {
            Some(there) if there == claim => return Ok(true),
            Some(_) => true,
            None => matches!(error.kind, AdminErrorKind::Exists) || is_absent(&error),
        };
        // What stays is swept.
        let _ = store.remove(&aside).await;
        if lost { Ok(false) } else { Err(error.into()) }
    }
}

enum Holder {
    Nobody,
    Myself,
    Other(Holding),
    /// There is a higher epoch by now.
    Superseded,
}

/// The epochs that are there, lowest first.
async fn epochs(store: &impl Store, claims: &SharePath) -> Result<Vec<u64>, MemberError> {
    let entries = store.list(claims).await?.unwrap_or_default();
    let mut epochs: Vec<u64> = entries
        .iter()
        .filter_map(|entry| entry.name.parse().ok())
        .collect();
    epochs.sort_unstable();
    Ok(epochs)
}
