//! Of a Mount and a Remove that meet, one wins.
//!
//! Who removes: (1) looks for holds, (2) makes an intent, (3) looks again, (4) makes the intent
//! binding. Who mounts: (1) publishes its hold, (2) takes all intents away, (3) looks for the
//! binding mark. If the mount's (1) came before the removal's (3), the removal sees the hold;
//! otherwise the mount's (2) sees the intent, and either takes it away before (4), which then
//! fails, or comes too late and finds the mark. Intents have names that are never used again, so
//! nobody makes another's binding. An intent that a crash left does no harm.

use super::share::Store;
use crate::layout;
use crate::volume::VolumeName;
use nfs::admin::{AdminError, AdminErrorKind};

/// What became of an intent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// The volume is being removed; anybody may finish that.
    Removing,
    /// A host that mounts the volume has taken the intent away.
    Withdrawn,
}

fn intent(volume: &VolumeName, nonce: &str) -> nfs::address::SharePath {
    layout::volume(volume).join(&format!("{}.{nonce}", layout::REMOVING))
}

/// Announces a removal.
///
/// # Errors
/// What the share answered; [`AdminErrorKind::NotFound`] when the volume is gone.
pub async fn announce(
    store: &impl Store,
    volume: &VolumeName,
    nonce: &str,
    host: &str,
) -> Result<(), AdminError> {
    let dir = intent(volume, nonce);
    store.make_dir(&dir).await?;
    // Not empty, so that no other intent can take its place once it is binding.
    store
        .make_dir(&dir.join(&format!("by.{}", layout::host_name(host))))
        .await
}

/// Takes an own announcement back.
pub async fn withdraw(store: &impl Store, volume: &VolumeName, nonce: &str) {
    // What stays does no harm.
    if store
        .rename(
            &intent(volume, nonce),
            &layout::aside(&format!("{nonce}.withdrawn")),
        )
        .await
        .is_ok()
    {
        let _ = store
            .remove(&layout::aside(&format!("{nonce}.withdrawn")))
            .await;
    }
}

/// Makes an announcement binding.
///
/// # Errors
/// What the share answered; the volume may be being removed then.
pub async fn bind(
    store: &impl Store,
    volume: &VolumeName,
    nonce: &str,
) -> Result<Bound, AdminError> {
    let renamed = store
        .rename(&intent(volume, nonce), &layout::removing(volume))
        .await;
    let Err(error) = renamed else {
        return Ok(Bound::Removing);
    };
    // Another host's is binding, or this one's is and the reply was lost.
    if store.mtime(&layout::removing(volume)).await?.is_some() {
        return Ok(Bound::Removing);
    }
    match error.kind {
        AdminErrorKind::NotFound => Ok(Bound::Withdrawn),
        _ => Err(error),
    }
}

/// For a host that has published its hold: takes all intents away. Returns whether the volume is
/// there to be mounted.
///
/// # Errors
/// What the share answered; the volume must not be mounted then.
#[tracing::instrument(level = "debug", skip_all)]
pub async fn forestall(
    store: &impl Store,
    volume: &VolumeName,
    nonce: impl Fn() -> String,
) -> Result<bool, AdminError> {
    let Some(entries) = store.list(&layout::volume(volume)).await? else {
        return Ok(false);
    };
    for entry in entries.iter().filter(|e| layout::is_intent(&e.name)) {
        let aside = layout::aside(&format!("{}.withdrawn", nonce()));
        let there = layout::volume(volume).join(&entry.name);
        match store.rename(&there, &aside).await {
            Ok(()) => {
                // What stays is swept.
                let _ = store.remove(&aside).await;
            }
            // Binding, or taken away already.
            Err(error) if matches!(error.kind, AdminErrorKind::NotFound) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(store.mtime(&layout::removing(volume)).await?.is_none())
}
