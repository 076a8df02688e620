//! This host's part in the cluster: its session, what it tells the others it holds, and what is
//! refused because of what they hold.
//!
//! Invariant: a volume of the home share that Docker was given is held on the share first, and is
//! let go of there only when no process of this host has it any more.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::attachments::Attachments;
use super::config::Config;
use super::elsewhere::Elsewhere;
use super::together::{Together, Ways};
use super::turns::Turns;
use super::{Driver, DriverError};
use crate::chance::since_boot;
use crate::cluster::{Beat, Env, Holding, Host, Member, MemberError, Renewal, Times, layout};
use crate::docker::engine;
use crate::home::{Catalog, CatalogError};
use crate::kernel::Holder;
use crate::mutant::{self, Mutant};
use crate::nfs::address::SharePath;
use crate::nfs::admin::Admin;
use crate::sys::files::write_durably;
use crate::volume::Right;
use crate::volume::{Access, Record, VolumeName, VolumeOptions};

/// A random id of this state directory; in it.
const ID_FILE: &str = "host-id";
/// A container that was given a volume has it in its mount namespace after this time.
pub(super) const STARTED: Duration = Duration::from_secs(3);
/// How long `ls` and `inspect` wait for what the other hosts hold now.
pub(super) const LOOK_WAIT: Duration = Duration::from_millis(250);
/// How long after the last Unmount it is looked for the end of the volume's last process: a
/// worker ends within milliseconds.
const FREE_WAIT: Duration = Duration::from_millis(500);
/// Volumes that are unmounted within this time are let go of by one document. In it a Remove on
/// another host waits ([`super::together`]) rather than being refused.
pub(super) const LEAVE_TOGETHER: Duration = Duration::from_millis(50);
/// How long a daemon that ends waits for the home share to take what was unmounted last.
const LAST_WORD: Duration = Duration::from_secs(2);
/// How long a volume may take, at each later try, whose data did not reach the server in time.
const LATE_FLUSH: Duration = Duration::from_secs(5);
const FREE_LOOK: Duration = Duration::from_millis(20);

/// The host's clock that goes on while it is suspended, and its random numbers.
#[derive(Debug)]
pub(super) struct HostEnv;

impl Env for HostEnv {
    fn now(&self) -> Duration {
        since_boot()
    }

    fn nonce(&self) -> String {
        let number = getrandom::u64().expect("there were random numbers at the start");
        format!("{number:016x}")
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Cluster {
    pub(super) member: Member<HostEnv>,
    /// When this driver only asks a share: it is no member then.
    aside: bool,
    /// Something was mounted or unmounted: the others are told soon what holds what.
    pub(super) changed: tokio::sync::Notify,
    /// Renewals in a row that were not answered.
    unanswered: AtomicU64,
    /// A session has begun, and its first renewal is due.
    begun: tokio::sync::Notify,
    /// A renewal has left something to be done.
    tend: tokio::sync::Notify,
    /// The last words on other hosts' holds.
    view: Mutex<Arc<Elsewhere>>,
    /// Volumes that were unmounted, and since when: the others are told together.
    leaving: Mutex<BTreeMap<VolumeName, Instant>>,
    /// Something is in `leaving`.
    pub(super) left: tokio::sync::Notify,
    turns: Turns,
}

impl Cluster {
    pub(super) fn open(
        config: &Config,
        attachments: &Attachments,
        catalog: &Catalog,
    ) -> Result<Self, DriverError> {
        // From here on they do not fail: the kernel's generator is ready.
        getrandom::u64().map_err(|error| DriverError::State {
            what: "random numbers",
            source: error.into(),
        })?;
        let id = host_id(config).map_err(|source| DriverError::State {
            what: ID_FILE,
            source,
        })?;
        // No host's name begins with a dot: one that only asks sees them all.
        let aside = config.session.is_none();
        let name = if aside {
            ".aside".to_owned()
        } else {
            layout::host_name(&config.host)
        };
        let host = Host {
            name,
            id,
            boot: attachments.boot_id().to_owned(),
        };
        let using = attachments.all().into_iter().filter_map(|(name, _)| {
            let record = catalog
                .get(&name)
                .filter(|_| !catalog.is_only_here(&name))?;
            Some((name, record.options.access))
        });
        let times = Times::new(config.session.unwrap_or_default());
        Ok(Self {
            member: Member::new(host, times, HostEnv, using),
            aside,
            changed: tokio::sync::Notify::new(),
            unanswered: AtomicU64::new(0),
            begun: tokio::sync::Notify::new(),
            tend: tokio::sync::Notify::new(),
            view: Mutex::default(),
            leaving: Mutex::default(),
            left: tokio::sync::Notify::new(),
            turns: Turns::default(),
        })
    }

    /// The directories that a host asks for at every turn.
    pub(super) fn frame(&self) -> [SharePath; 2] {
        [layout::hosts(), layout::host_dir(&self.member.host().name)]
    }

    fn leaving(&self) -> MutexGuard<'_, BTreeMap<VolumeName, Instant>> {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the other hosts that live hold, as of the last look.
    pub(super) fn elsewhere(&self) -> Arc<Elsewhere> {
        let view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&view)
    }

    /// What this host holds.
    pub(super) fn holds(&self) -> Arc<BTreeMap<VolumeName, crate::cluster::Hold>> {
        self.member.held()
    }
}

fn host_id(config: &Config) -> std::io::Result<String> {
    let path = config.state_dir.join(ID_FILE);
    match std::fs::read_to_string(&path) {
        Ok(id) if !id.trim().is_empty() => return Ok(id.trim().to_owned()),
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let id = HostEnv.nonce();
    write_durably(&path, id.as_bytes())?;
    Ok(id)
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// How people know a process that holds a volume.
pub(super) fn describe(holder: &Holder) -> String {
    match &holder.container_id {
        Some(id) => format!("container {}", id.get(..12).unwrap_or(id)),
        None => format!("process {} ({})", holder.pid, holder.comm),
    }
}

/// Hosts and what holds a volume there, for an error.
pub(super) fn names(holdings: &[Holding]) -> String {
    let names: Vec<String> = holdings
        .iter()
        .map(|holding| {
            let host = &holding.host;
            match holding.hold.holders.as_slice() {
                [] => format!("host {host}"),
                holders => format!("host {host} ({})", holders.join(", ")),
            }
        })
        .collect();
    names.join(", ")
}

impl Ways for Driver {
    async fn home(&self) -> Result<Option<Admin>, DriverError> {
        Self::home(self).await
    }

    async fn data(
        &self,
        home: Option<&Admin>,
        options: &VolumeOptions,
    ) -> Result<Admin, DriverError> {
        self.scoped_data(home, options).await
    }

    fn may_be_held(&self, name: &VolumeName) -> bool {
        self.cluster.elsewhere().of(name).next().is_some()
    }
}

impl Driver {
    /// What this host does together with others.
    pub(super) fn together(&self) -> Together<'_, HostEnv, Self> {
        Together {
            catalog: &self.catalog,
            member: &self.cluster.member,
            ways: self,
            aside: self.cluster.aside,
        }
    }

    /// Tells the others that this host is about to mount a volume, and makes sure that none of
    /// them is removing it.
    ///
    /// Waits for an exclusive volume until the deadline; returns its fence.
    #[tracing::instrument(level = "debug", skip_all)]
    pub(super) async fn hold(
        &self,
        home: Option<&Admin>,
        record: &Record,
        deadline: Instant,
    ) -> Result<Option<Right>, DriverError> {
        let name = &record.name;
        let exclusive = record.options.access == Access::Exclusive;
        let Some(home) = self.together().shared_home(home, name) else {
            return match exclusive {
                true => Err(CatalogError::NoHome("access=exclusive").into()),
                false => Ok(None),
            };
        };
        let mut fence = None;
        let there = if exclusive {
            fence = Some(match self.claim(home, record, deadline).await {
                // Removed since it was looked up: there is no place for a claim.
                Err(DriverError::Cluster(_)) if self.together().is_gone(record).await => {
                    return Err(CatalogError::Absent(name.clone()).into());
                }
                claimed => claimed?,
            });
            // The claim may have been waited for: the volume is looked up anew.
            self.together().is_still_there(&home.scoped(), record).await
        } else {
            let there = self.together().announce_hold(home, record).await;
            there.map_err(DriverError::from)
        };
        match there {
            Ok(true) => Ok(fence),
            Ok(false) => {
                self.let_go(name).await;
                Err(CatalogError::Absent(name.clone()).into())
            }
            // A full share must not keep the container from starting that would tidy it up.
            Err(DriverError::Cluster(MemberError::Share(error)))
                if !exclusive && error.takes_no_change() =>
            {
                tracing::warn!(volume = %name, %error, "mounted without telling the other hosts");
                Ok(None)
            }
            Err(error) => {
                self.let_go(name).await;
                Err(error)
            }
        }
    }

    /// Takes an exclusive volume as soon as nobody else has it.
    #[tracing::instrument(level = "debug", skip_all)]
    async fn claim(
        &self,
        home: &Admin,
        record: &Record,
        deadline: Instant,
    ) -> Result<Right, DriverError> {
        let (name, member) = (&record.name, &self.cluster.member);
        // What serves it since a time when this host had it before holds what others do not know.
        // Of a daemon that has just started only its session tells what goes on.
        if self.paths.is_served(name) && !member.held_in_session(home).await?.contains_key(name) {
            self.paths.abort(name).await?;
        }
        let taken = self
            .cluster
            .turns
            .take(member, home, record, deadline.into());
        // Not the right of now: the claim may be lost by now, and a new session begun.
        Ok(self.fence(nanos(taken.await?)))
    }

    /// Tells the workers of exclusive volumes until when they may send.
    fn prolong(self: &Arc<Self>) {
        // Read before the holds: a right of a session that begins now is not for those of the last.
        let until = nanos(self.cluster.member.right_until());
        for (name, hold) in self.cluster.member.held().iter() {
            if hold.access == Access::Exclusive {
                let (driver, name) = (Arc::clone(self), name.clone());
                // One that does not answer delays no other.
                tokio::spawn(async move {
                    if !driver.paths.prolong(&name, until).await {
                        driver.guard_again(&name, until).await;
                    }
                });
            }
        }
    }

    /// Tells the worker of a volume that has just been mounted: it may have missed a renewal since
    /// the claim.
    pub(super) async fn prolong_one(&self, name: &VolumeName) {
        // Read before the holds, as above.
        let until = nanos(self.cluster.member.right_until());
        if self.cluster.member.held().contains_key(name) {
            self.paths.prolong(name, until).await;
        }
    }

    /// The fence of an exclusive volume whose guard has gone.
    async fn guard_again(&self, name: &VolumeName, until: u64) {
        // A call for the volume is under way: it knows better, and this comes again.
        let Some(_lock) = self.locks.try_lock(name) else {
            return;
        };
        tracing::warn!(volume = %name, "without a guard; a new one is started");
        if self.paths.is_own(name)
            && let Err(error) = self.paths.guard(name, self.fence(until)).await
        {
            tracing::error!(volume = %name, %error, "nobody would fence it");
        }
    }

    fn fence(&self, until: u64) -> Right {
        let under_way = self.cluster.member.times().under_way().as_millis();
        Right {
            until,
            under_way: u32::try_from(under_way).unwrap_or(u32::MAX),
        }
    }

    /// Has an exclusive volume watched that has just been mounted by the kernel's client.
    #[tracing::instrument(level = "debug", skip_all)]
    pub(super) async fn guard(&self, name: &VolumeName, fence: Right) -> Result<(), DriverError> {
        // Mounting may have taken longer than the right lasted that the claim was made in. Read
        // before the holds: a right of a session that begins now is not for those of the last.
        let until = nanos(self.cluster.member.right_until());
        let held = self.cluster.member.held().contains_key(name);
        let until = if held { until } else { fence.until };
        self.paths.guard(name, Right { until, ..fence }).await
    }

    /// Goes on with volumes that were fenced, now that this host has a right again: what Docker
    /// did not let go of is let go of, and containers are started as their restart policy says.
    async fn recover(self: &Arc<Self>) {
        let mut stopped = BTreeSet::new();
        for (name, fenced) in self.paths.guards().unsettled() {
            let Some(_lock) = self.locks.try_lock(&name) else {
                continue;
            };
            if self.paths.is_served(&name) {
                continue;
            }
            tracing::warn!(volume = %name, containers = ?fenced.containers, "was fenced; going on");
            self.attachments.retain(&name, |_| false);
            self.let_go(&name).await;
            if let Err(error) = self.paths.guards().settle(&name, &fenced) {
                tracing::warn!(volume = %name, %error, "asked again at the next renewal");
                continue;
            }
            stopped.extend(fenced.containers);
        }
        // Each once, however many of its volumes were fenced: a start that waits for another host is
        // in the way of whoever stops the container.
        for container in stopped {
            let docker = self.config.docker_socket.clone();
            tokio::spawn(async move {
                if let Err(error) = engine::start_again(&docker, &container).await {
                    tracing::warn!(container, %error, "not started again; start it by hand");
                }
            });
        }
    }

    /// Ends the use of an exclusive volume that another host may have by now.
    async fn give_up(&self, name: &VolumeName) {
        tracing::error!(volume = %name, "lost: its containers get errors; start them again");
        if let Err(error) = self.paths.abort(name).await {
            tracing::error!(volume = %name, %error, "its worker is fenced, but not ended");
        }
    }

    /// Tells the others that this host does not hold a volume, if that is so. Of an exclusive one
    /// when this returns, so that the next host has it at once; of others in a moment.
    #[tracing::instrument(level = "debug", skip_all)]
    pub(super) async fn let_go(&self, name: &VolumeName) {
        if self.attachments.get(name).is_some() {
            return;
        }
        let exclusive = |record: Arc<Record>| record.options.access == Access::Exclusive;
        if !self.catalog.get(name).is_some_and(exclusive) {
            self.leave(name.clone(), Instant::now());
            return;
        }
        let Ok(Some(home)) = self.home().await else {
            return; // `settle` does it when the share is back
        };
        if self.together().shared_home(Some(&home), name).is_some() && self.is_free_soon(name).await
        {
            let member = &self.cluster.member;
            member.release(&home, std::slice::from_ref(name)).await;
            self.cluster.turns.had(name);
        }
    }

    /// As [`let_go_together`](Self::let_go_together), before the daemon ends.
    pub(super) async fn let_go_at_last(&self) {
        let told = tokio::time::timeout(LAST_WORD, self.let_go_together()).await;
        if !matches!(told, Ok(Ok(()))) {
            tracing::info!("the next start tells the other hosts what was unmounted last");
        }
    }

    fn leave(&self, name: VolumeName, since: Instant) {
        self.cluster.leaving().insert(name, since);
        self.cluster.left.notify_one();
    }

    /// Tells the others of the volumes that were unmounted a moment ago.
    pub(super) async fn let_go_together(&self) -> Result<(), DriverError> {
        let mut leaving = std::mem::take(&mut *self.cluster.leaving());
        if leaving.is_empty() || self.cluster.aside {
            return Ok(());
        }
        let held = self.cluster.member.held();
        leaving.retain(|name, _| held.contains_key(name));
        if leaving.is_empty() {
            return Ok(());
        }
        let Some(home) = self.home().await? else {
            return Ok(());
        };
        let mut gone = Vec::new();
        let mut records = Vec::new();
        let stops = leaving
            .keys()
            .filter(|_| mutant::is_on(Mutant::StoppedWorkerStopsOthers));
        let stopped: Vec<_> = stops.filter_map(|name| self.locks.try_lock(name)).collect();
        // Without locks: a worker that is stopped keeps no other volume's calls waiting.
        for name in leaving.keys() {
            if self.attachments.get(name).is_some() || self.catalog.is_only_here(name) {
                continue;
            }
            if self.paths.is_left_to_containers(name).await || self.paths.is_served(name) {
                self.leave_later(name, &leaving);
                continue;
            }
            match self.catalog.get(name) {
                Some(record) => records.push(record),
                None => gone.push(name.clone()),
            }
        }
        let holders = match self.holders_of_all(&records) {
            Ok(holders) => holders,
            Err(error) => {
                tracing::warn!(%error, "the other hosts are told later what was unmounted");
                return Ok(()); // `settle` looks again
            }
        };
        for (record, holders) in records.iter().zip(holders) {
            if holders.is_empty() {
                gone.push(record.name.clone());
            } else {
                self.leave_later(&record.name, &leaving);
            }
        }
        drop(stopped);
        // Held until the others are told, so that none of them is mounted again meanwhile.
        let mut locks = Vec::new();
        gone.retain(|name| match self.locks.try_lock(name) {
            // It was mounted meanwhile; if it was unmounted again as well, it is looked at anew.
            Some(_) if self.attachments.get(name).is_some() => false,
            Some(_) if self.cluster.leaving().contains_key(name) => false,
            Some(lock) => {
                locks.push(lock);
                true
            }
            // A call for the volume is under way, and may mount it again.
            None => {
                self.leave_later(name, &leaving);
                false
            }
        });
        if !gone.is_empty() {
            self.cluster.member.release(&home, &gone).await;
        }
        Ok(())
    }

    /// A process has the volume still; for a while it may be one that is ending.
    fn leave_later(&self, name: &VolumeName, leaving: &BTreeMap<VolumeName, Instant>) {
        if let Some(since) = leaving
            .get(name)
            .filter(|since| since.elapsed() < FREE_WAIT)
        {
            self.leave(name.clone(), *since);
        }
    }

    /// Whether no process of this host has a volume that it has unmounted.
    async fn is_free_soon(&self, name: &VolumeName) -> bool {
        let deadline = Instant::now() + FREE_WAIT;
        loop {
            if self.is_free(name).await {
                return true;
            }
            if Instant::now() > deadline {
                return false;
            }
            tokio::time::sleep(FREE_LOOK).await;
        }
    }

    async fn is_free(&self, name: &VolumeName) -> bool {
        if self.paths.is_left_to_containers(name).await || self.paths.is_served(name) {
            return false;
        }
        match self.catalog.get(name) {
            Some(record) => {
                matches!(self.holders(name, self.marks(&record)), Ok(found) if found.is_empty())
            }
            None => true,
        }
    }

    /// Makes what the others are told true: volumes that are attached are held, others are not.
    pub(super) async fn settle(&self) -> Result<(), DriverError> {
        let Some(home) = self.home().await? else {
            return Ok(());
        };
        let member = &self.cluster.member;
        let attached = self.attachments.all();
        let records: Vec<Arc<Record>> = attached
            .iter()
            .filter(|(name, _)| !self.catalog.is_only_here(name))
            .filter_map(|(name, _)| self.catalog.get(name))
            .collect();
        for record in &records {
            let name = &record.name;
            // An exclusive volume is held by its claim alone.
            if record.options.access != Access::Exclusive {
                member.hold(&home, name, record.options.access).await?;
            } else if let Some(_lock) = self.locks.try_lock(name)
                && self.paths.is_served(name)
                && member.has_right()
                && !member.held().contains_key(name)
            {
                self.give_up(name).await;
            }
        }
        let found = self.holders_of_all(&records);
        let found = found.map_err(|source| DriverError::State {
            what: "reading /proc",
            source,
        })?;
        let holders = records.iter().zip(found).map(|(record, found)| {
            let mut found: Vec<String> = found.iter().map(describe).collect();
            found.sort();
            found.dedup();
            (record.name.clone(), found)
        });
        member.describe(&home, &holders.collect()).await?;
        for name in member.held().keys() {
            // A call for the volume is under way: it knows better.
            let Some(_lock) = self.locks.try_lock(name) else {
                continue;
            };
            if self.attachments.get(name).is_some() {
                continue;
            }
            // What an Unmount could not finish.
            if self.paths.is_own(name)
                && let Err(error) = self.paths.detach(name, LATE_FLUSH).await
            {
                tracing::warn!(volume = %name, %error, "not let go of yet");
            }
            if self.is_free(name).await {
                member.release(&home, std::slice::from_ref(name)).await;
            }
        }
        Ok(())
    }

    /// Renews this host's session, tells the workers of exclusive volumes, and waits until that is
    /// due again: at once as long as there is a right and no answer.
    pub(super) async fn beat(self: &Arc<Self>) -> Result<(), DriverError> {
        let member = &self.cluster.member;
        let renewed = self.renew().await;
        if !matches!(renewed, Ok(Renewal::Renewed)) || member.is_unsure() {
            self.cluster.tend.notify_one();
        }
        self.prolong();
        let pause = member.pause(renewed.is_ok());
        let begun = self.cluster.begun.notified();
        // A session that began meanwhile gives a right with its first renewal.
        let _ = tokio::time::timeout(pause, begun).await;
        renewed.map(drop)
    }

    async fn renew(&self) -> Result<Renewal, DriverError> {
        let Some(home) = self.home().await? else {
            return Ok(Renewal::Renewed);
        };
        let tries = self.cluster.unanswered.load(Ordering::Relaxed);
        // A server may take longer to be reached anew than to answer: every other time there is
        // more time for it.
        let way = match tries % 2 {
            0 => home.for_renewals(self.cluster.member.times().answer()),
            _ => home,
        };
        let renewed = self.cluster.member.renew(&way).await;
        let tries = if renewed.is_ok() { 0 } else { tries + 1 };
        self.cluster.unanswered.store(tries, Ordering::Relaxed);
        Ok(renewed?)
    }

    /// What is to be done beside the renewals, from time to time and when one of them says so.
    pub(super) async fn tend(self: &Arc<Self>) -> Result<(), DriverError> {
        let pause = self.cluster.member.times().renew();
        let _ = tokio::time::timeout(pause, self.cluster.tend.notified()).await;
        let Some(home) = self.home().await? else {
            return Ok(());
        };
        if !self.cluster.member.has_right() {
            // Made where it is absent, and known to be the share that it was.
            self.catalog.init(&home).await?;
        }
        let forgotten = self.cluster.member.is_forgotten();
        match self.cluster.member.tend(&home).await? {
            Beat::Renewed if forgotten => self.cluster.begun.notify_one(),
            Beat::Renewed => {}
            // Only a renewal gives a right.
            Beat::Began => {
                self.cluster.begun.notify_one();
                self.cluster.changed.notify_one();
            }
            Beat::Lost(lost) => {
                self.cluster.begun.notify_one();
                tracing::error!(
                    ?lost,
                    "this host was out of reach of its home share for longer \
                    than the session time, or its server has forgotten that they were here"
                );
                let held = self.cluster.member.held();
                // One that was taken anew meanwhile has a new worker.
                for name in lost.into_iter().filter(|name| !held.contains_key(name)) {
                    let driver = Arc::clone(self);
                    tokio::spawn(async move { driver.give_up(&name).await });
                }
                self.cluster.changed.notify_one();
            }
        }
        if self.cluster.member.has_right() {
            self.recover().await;
        }
        Ok(())
    }

    /// Looks at what the other hosts hold.
    pub(super) async fn look(&self, home: &Admin) -> Result<(), DriverError> {
        let looked = self.cluster.member.look(home).await;
        if !matches!(looked, Ok(()) | Err(MemberError::Unreadable(_))) {
            return Ok(looked?);
        }
        let others = self.cluster.member.others();
        let view = others
            .into_iter()
            .filter(|other| {
                let times = Times::new(Duration::from_millis(other.doc.session_ms));
                other.silent < times.expire()
            })
            .map(|other| other.doc)
            .collect();
        *self
            .cluster
            .view
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Arc::new(Elsewhere::new(view));
        Ok(looked?)
    }

    /// A look for somebody who waits for the answer.
    pub(super) async fn look_soon(&self) {
        let look = async {
            if let Some(home) = self.home().await? {
                self.look(&home).await?;
            }
            Ok::<_, DriverError>(())
        };
        // The last look has to do.
        let _ = tokio::time::timeout(LOOK_WAIT, look).await;
    }
}
