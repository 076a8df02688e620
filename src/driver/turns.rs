//! Taking turns with an exclusive volume.
//!
//! A host whose Mount waits looks every 200 ms (`CLAIM_PAUSE`) whether the volume is free, so one that
//! mounts again right after its Unmount would keep it for ever. Whoever waits leaves a mark beside the
//! claims; whoever had the volume a moment ago and wants it again waits for a while, once, if it finds
//! one. A mark that a crash left costs that while, once: it is taken away.

use std::time::{Duration, Instant};

use super::Driver;
use crate::cluster::layout;
use crate::mutant::{self, Mutant};
use crate::nfs::admin::Admin;
use crate::volume::{Record, VolumeName};

/// How long after its Unmount a host gives way; later than that whoever waited has the volume.
const JUST_NOW: Duration = Duration::from_secs(2);
/// How long it gives way: a few looks of whoever waits.
const GIVE_WAY: Duration = Duration::from_millis(600);
/// After so many looks the mark is made again, which was taken away for a host that was faster.
pub(super) const REMIND: usize = 10;

impl Driver {
    /// Notes that an exclusive volume has been let go of.
    pub(super) fn had(&self, name: &VolumeName) {
        let mut had = self.cluster.had();
        had.retain(|_, at| at.elapsed() < JUST_NOW);
        had.insert(name.clone(), Instant::now());
    }

    /// Lets a host that waits for a volume go first, if this one has just had it.
    pub(super) async fn give_way(&self, home: &Admin, record: &Record) {
        let had = self.cluster.had().remove(&record.name);
        let is_just_now = had.is_some_and(|at| at.elapsed() < JUST_NOW);
        if !is_just_now || mutant::is_on(Mutant::WhoeverIsFirst) {
            return;
        }
        let claims = layout::claims(&record.name, &record.id);
        let entries = home.list(&claims).await.ok().flatten().unwrap_or_default();
        let names = entries.iter().filter_map(|entry| entry.name.to_str());
        let mut waits = false;
        for mark in names.filter(|name| layout::is_wanted(name)) {
            waits = true;
            // What stays costs the same while again.
            let _ = home.remove_dir(&claims.join(mark)).await;
        }
        if waits {
            tracing::debug!(volume = %record.name, "another host waits for it: it goes first");
            tokio::time::sleep(GIVE_WAY).await;
        }
    }

    /// Tells who has the volume that this host waits for it, or that it does no longer. It is a
    /// courtesy: without it the volume is had all the same, if later.
    pub(super) async fn want(&self, home: &Admin, record: &Record, wanted: bool) {
        let host = &self.cluster.member.host().name;
        let mark = layout::wanted(&record.name, &record.id, host);
        let told = match wanted {
            true => home.mkdir(&mark, 0o755).await.map(drop),
            false => home.remove_dir(&mark).await.map(drop),
        };
        if let Err(error) = told {
            tracing::debug!(volume = %record.name, %error, "nobody is told who waits");
        }
    }
}
