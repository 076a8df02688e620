//! A host: its daemon, and the workers that outlive it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nfsvol::doors::cluster::removal::{self, Bound};
use nfsvol::doors::cluster::{Beat, Claimed, Env, Host as Identity, Member, Renewal, Store, Times};
use nfsvol::doors::layout;
use nfsvol::doors::volume::{Access, VolumeName};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::disk::{Link, awake};
use crate::model::Grant;
use crate::{Dice, EXCLUSIVE, SESSION, Switches, VOLUMES};

/// A clock with a rate of its own, and random numbers.
#[derive(Debug, Clone)]
pub(crate) struct SimEnv {
    pub(crate) began: Instant,
    /// In millionths; 1,000,000 is true time.
    pub(crate) rate: u32,
    pub(crate) offset: Duration,
    pub(crate) dice: Arc<Mutex<Dice>>,
}

impl Env for SimEnv {
    fn now(&self) -> Duration {
        self.offset + self.began.elapsed() * self.rate / 1_000_000
    }

    fn nonce(&self) -> String {
        format!("{:016x}", self.dice.lock().unwrap().roll())
    }
}

impl SimEnv {
    /// What a time by this clock is in truth.
    fn true_time(&self, time: Duration) -> Duration {
        time * 1_000_000 / self.rate
    }

    /// Sleeps by this clock.
    async fn sleep(&self, time: Duration) {
        sleep(self.true_time(time)).await;
    }
}

/// What the renewals and the rest wake each other by.
#[derive(Default)]
struct Wake {
    tend: Notify,
    begun: Notify,
}

/// A process that serves an exclusive volume to containers, and what it may do.
struct Worker {
    grant: Grant,
    /// Until when it may send, by the host's clock; it learns that from the daemon.
    right: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<()>,
}

/// What of a host is there whether its daemon runs or not.
#[derive(Clone)]
pub(crate) struct Host {
    pub(crate) name: String,
    pub(crate) boot: Arc<AtomicU64>,
    pub(crate) env: SimEnv,
    pub(crate) link: Link,
    pub(crate) switches: Switches,
    /// Volumes are taken and let go of one after another.
    quick: bool,
    workers: Arc<Mutex<BTreeMap<String, Worker>>>,
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap()
}

fn name(volume: &str) -> VolumeName {
    volume.parse().unwrap()
}

fn access(volume: &str) -> Access {
    if EXCLUSIVE.contains(&volume) {
        Access::Exclusive
    } else {
        Access::Shared
    }
}

impl Host {
    pub(crate) fn new(
        name: &str,
        env: SimEnv,
        link: Link,
        switches: Switches,
        quick: bool,
    ) -> Self {
        Self {
            name: name.to_owned(),
            boot: Arc::default(),
            env,
            link,
            switches,
            quick,
            workers: Arc::default(),
        }
    }

    fn roll(&self, limit: u64) -> u64 {
        self.env.dice.lock().unwrap().below(limit)
    }

    fn member(&self) -> Member<SimEnv> {
        let identity = Identity {
            name: self.name.clone(),
            id: format!("id of {}", self.name),
            boot: self.boot.load(Ordering::Relaxed).to_string(),
        };
        let model = self.link.model.lock().unwrap();
        let using = model.mounted.keys().filter(|(host, _)| *host == self.name);
        let using = using.map(|(_, volume)| (name(volume), access(volume)));
        Member::new(identity, Times::new(SESSION), self.env.clone(), using)
    }

    /// The host's power fails: its workers are gone with it.
    pub(crate) fn power_off(&self) {
        self.boot.fetch_add(1, Ordering::Relaxed);
        for (volume, worker) in std::mem::take(&mut *self.workers.lock().unwrap()) {
            worker.task.abort();
            self.link.model.lock().unwrap().unmount(&self.name, &volume);
        }
        let mut model = self.link.model.lock().unwrap();
        model.mounted.retain(|(host, _), _| *host != self.name);
    }

    /// The daemon, until it is killed.
    pub(crate) async fn daemon(self) {
        let member = Arc::new(self.member());
        let mut tasks = JoinSet::new();
        let wake = Arc::new(Wake::default());
        let (host, shared, woken) = (self.clone(), Arc::clone(&member), Arc::clone(&wake));
        tasks.spawn(async move { host.renew(&shared, &woken).await });
        let (host, shared) = (self.clone(), Arc::clone(&member));
        tasks.spawn(async move { host.tend(&shared, &wake).await });
        for volume in VOLUMES {
            let (host, member) = (self.clone(), Arc::clone(&member));
            tasks.spawn(async move {
                loop {
                    let most = if host.quick { 500 } else { 20_000 };
                    let pause = Duration::from_millis(host.roll(most));
                    sleep(pause).await;
                    awake(&host.link.weather).await;
                    host.turn(&member, volume).await;
                }
            });
        }
        while tasks.join_next().await.is_some() {}
    }

    /// The renewals, and what they tell the workers.
    async fn renew(&self, member: &Member<SimEnv>, wake: &Wake) {
        loop {
            awake(&self.link.weather).await;
            let renewed = member
                .renew(&self.link.within(member.times().answer()))
                .await;
            if !matches!(renewed, Ok(Renewal::Renewed)) || member.is_unsure() {
                wake.tend.notify_one();
            }
            // Read before the holds: a right of a session that begins now is not for those of the
            // last.
            let until = member.right_until();
            for volume in member.held().keys() {
                self.extend(volume.as_str(), until);
            }
            let pause = member.pause(renewed.is_ok());
            let _ = tokio::time::timeout(self.env.true_time(pause), wake.begun.notified()).await;
        }
    }

    /// What is done beside the renewals.
    async fn tend(&self, member: &Member<SimEnv>, wake: &Wake) {
        loop {
            let pause = self.env.true_time(member.times().renew());
            let _ = tokio::time::timeout(pause, wake.tend.notified()).await;
            awake(&self.link.weather).await;
            let forgotten = member.is_forgotten();
            let tended = member.tend(&self.link).await;
            if tended
                .as_ref()
                .is_ok_and(|beat| forgotten || *beat != Beat::Renewed)
            {
                wake.begun.notify_one();
            }
            if let Ok(Beat::Lost(lost)) = tended {
                for volume in lost {
                    self.stop(volume.as_str());
                }
            }
            if member.has_right() {
                // The daemon before this one lost its session.
                let held = member.held();
                let served: Vec<String> = self.workers.lock().unwrap().keys().cloned().collect();
                for volume in served.iter().filter(|v| !held.contains_key(&name(v))) {
                    self.stop(volume);
                }
            }
        }
    }

    fn extend(&self, volume: &str, until: Duration) {
        if let Some(worker) = self.workers.lock().unwrap().get(volume) {
            worker.right.fetch_max(nanos(until), Ordering::Relaxed);
        }
    }

    /// Ends a volume's worker at once.
    fn stop(&self, volume: &str) {
        if !self.switches.fencing {
            return;
        }
        let mut model = self.link.model.lock().unwrap();
        if let Some(worker) = self.workers.lock().unwrap().remove(volume) {
            worker.task.abort();
            model.fenced(&self.name, volume, worker.grant);
        }
        model.unmount(&self.name, volume);
    }

    /// One thing that somebody does with a volume on this host.
    async fn turn(&self, member: &Member<SimEnv>, volume: &'static str) {
        let key = (self.name.clone(), volume.to_owned());
        let in_use = self.link.model.lock().unwrap().mounted.contains_key(&key);
        if in_use {
            self.unmount(member, volume).await;
        } else if self.roll(5) == 0 {
            let _ = self.remove(member, volume).await;
        } else if self.mount(member, volume).await != Some(true) {
            self.make(volume).await;
        }
    }

    /// Whether the volume is mounted now; `None` when nothing could be found out.
    pub(crate) async fn mount(&self, member: &Member<SimEnv>, volume: &str) -> Option<bool> {
        let volume_name = name(volume);
        let mut until = Duration::ZERO;
        let record = layout::volume(&volume_name).join("record.json");
        let mut id = None;
        if access(volume) == Access::Exclusive {
            let Some(found) = self.link.read(&record).await.ok()? else {
                return Some(false);
            };
            let found = String::from_utf8(found).unwrap();
            let claimed = member.claim(&self.link, &volume_name, &found).await;
            id = Some(found);
            match claimed {
                Ok(Claimed::Mine(right)) => until = right,
                Ok(Claimed::Held(_)) => return Some(false),
                Err(_) => return None,
            }
        } else {
            let held = member.hold(&self.link, &volume_name, Access::Shared).await;
            held.ok()?;
        }
        let there = if self.switches.forestall {
            removal::forestall(&self.link, &volume_name, || self.env.nonce()).await
        } else {
            Ok(true)
        };
        let marked = format!(".nfsvol/volumes/{volume}/removing");
        let path = format!(".nfsvol/volumes/{volume}/record.json");
        let is_same = match &id {
            // The record that was claimed: read again, as the driver does.
            Some(id) => match self.link.read(&record).await {
                Ok(now) => now.as_deref() == Some(id.as_bytes()),
                Err(_) => false,
            },
            None => true,
        };
        let good = matches!(there, Ok(true)) && is_same && member.has_right() && {
            // Between a removal and the making of a new volume nothing is there to be mounted.
            let disk = self.link.disk.lock().unwrap();
            disk.file(&path).is_some()
                && (self.switches.forestall || disk.names(&marked).is_empty())
        };
        if !good {
            member.release(&self.link, &[volume_name]).await;
            return Some(false);
        }
        let exclusive = access(volume) == Access::Exclusive;
        let grant = self
            .link
            .model
            .lock()
            .unwrap()
            .mount(&self.name, volume, exclusive);
        if exclusive {
            let right = Arc::new(AtomicU64::new(nanos(until)));
            let task = tokio::spawn(self.clone().write(
                volume.to_owned(),
                grant,
                Arc::clone(&right),
            ));
            let worker = Worker { grant, right, task };
            let old = self
                .workers
                .lock()
                .unwrap()
                .insert(volume.to_owned(), worker);
            assert!(old.is_none(), "{} has two workers of {volume}", self.name);
            // It may have missed a renewal since the claim.
            let until = member.right_until();
            if member.held().contains_key(&volume_name) {
                self.extend(volume, until);
            }
        }
        Some(true)
    }

    /// A worker that writes as long as it may.
    async fn write(self, volume: String, grant: Grant, right: Arc<AtomicU64>) {
        let under_way = nanos(Times::new(SESSION).under_way()) / 1_000_000;
        let mut had_right = false;
        loop {
            let most = if self.quick { 100 } else { 2000 };
            sleep(Duration::from_millis(self.roll(most))).await;
            awake(&self.link.weather).await;
            let until = Duration::from_nanos(right.load(Ordering::Relaxed));
            if self.switches.fencing && self.env.now() >= until {
                // Mounting may have taken longer than the right of the claim lasted.
                if std::mem::take(&mut had_right) {
                    let mut model = self.link.model.lock().unwrap();
                    model.fenced(&self.name, &volume, grant);
                }
                continue;
            }
            had_right = true;
            let cut = self.link.weather.lock().unwrap().cut;
            // What is sent while the host is cut off comes through when it is not any more,
            // within the time after which TCP gives up.
            let most = if cut { under_way } else { 50 };
            let late = Duration::from_millis(self.roll(most));
            let host = self.clone();
            let volume = volume.clone();
            tokio::spawn(async move {
                host.env.sleep(late).await;
                if !host.link.weather.lock().unwrap().cut {
                    let mut model = host.link.model.lock().unwrap();
                    model.written(&host.name, &volume, grant);
                }
            });
        }
    }

    pub(crate) async fn unmount(&self, member: &Member<SimEnv>, volume: &str) {
        let worker = self.workers.lock().unwrap().remove(volume);
        if let Some(worker) = worker {
            worker.task.abort();
            self.link.model.lock().unwrap().unmount(&self.name, volume);
            // Flushed: nothing is under way any more when the hold is let go of.
            let cut = self.link.weather.lock().unwrap().cut;
            let flushed = if self.quick && !cut {
                Duration::from_millis(100)
            } else {
                member.times().under_way()
            };
            self.env.sleep(flushed).await;
            debug_assert!(worker.grant > 0);
        }
        self.link.model.lock().unwrap().unmount(&self.name, volume);
        member.release(&self.link, &[name(volume)]).await;
    }

    async fn remove(&self, member: &Member<SimEnv>, volume: &str) -> Option<()> {
        let volume_name = name(volume);
        let free = member.holdings(&self.link, &volume_name).await.ok()?;
        if !free.is_empty() {
            return None;
        }
        let nonce = self.env.nonce();
        removal::announce(&self.link, &volume_name, &nonce, &self.name)
            .await
            .ok()?;
        let free = member.holdings(&self.link, &volume_name).await.ok()?;
        if !free.is_empty() {
            removal::withdraw(&self.link, &volume_name, &nonce).await;
            return None;
        }
        let bound = removal::bind(&self.link, &volume_name, &nonce).await.ok()?;
        if bound == Bound::Removing {
            self.finish(volume).await;
        }
        Some(())
    }

    /// Moves a volume that is being removed to the trash.
    async fn finish(&self, volume: &str) {
        let dir = layout::volume(&name(volume));
        let Ok(Some(json)) = self.link.read(&dir.join("record.json")).await else {
            return;
        };
        // After the record: by now another volume may be there. One whose record was read is in the
        // trash already if it is not this one's, and what is there is never replaced.
        let mark = self.link.mtime(&layout::removing(&name(volume))).await;
        if !matches!(mark, Ok(Some(_))) {
            return;
        }
        let entry = String::from_utf8(json).unwrap();
        let trash = dir.parent().parent().join("trash").join(&entry);
        let moved = self.link.rename(&dir, &trash).await;
        // What the server forgot before may be another volume by now.
        let there = self.link.read(&trash.join("record.json")).await;
        if moved.is_ok() && matches!(there, Ok(Some(id)) if id != entry.as_bytes()) {
            let _ = self.link.rename(&trash, &dir).await;
        }
    }

    /// Makes a volume where there is none; finishes its removal first.
    pub(crate) async fn make(&self, volume: &str) {
        let volume_name = name(volume);
        match self.link.mtime(&layout::removing(&volume_name)).await {
            Ok(Some(_)) => return self.finish(volume).await,
            Ok(None) => {}
            Err(_) => return,
        }
        let id = self.env.nonce();
        let aside = layout::aside(&id);
        let boots = self.link.gaps();
        let made = async {
            self.link.make_dir(&aside).await?;
            self.link
                .put(&aside.join("record.json"), id.as_bytes())
                .await?;
            self.link
                .rename(&aside, &layout::volume(&volume_name))
                .await
        };
        let made = made.await;
        if made.is_ok() && boots == self.link.gaps() {
            let mut model = self.link.model.lock().unwrap();
            model.made.push((id, Instant::now()));
        }
    }

    /// After all faults: every volume can be had.
    pub(crate) async fn use_all(&self, member: &Member<SimEnv>) -> Result<(), String> {
        for volume in VOLUMES {
            let deadline = Instant::now() + SESSION * 2;
            loop {
                match self.mount(member, volume).await {
                    Some(true) => break,
                    // It is held for a moment yet, or not there.
                    Some(false) | None => self.make(volume).await,
                }
                if Instant::now() > deadline {
                    return Err(format!("{} cannot have {volume}", self.name));
                }
                sleep(Duration::from_millis(500)).await;
            }
            self.unmount(member, volume).await;
        }
        Ok(())
    }

    /// The end of the run: the daemon's memory without its tasks.
    pub(crate) async fn last_daemon(&self) -> Member<SimEnv> {
        let member = self.member();
        // A torn document is waited for as long as its session lasts.
        for _ in 0..20 {
            if matches!(member.beat(&self.link).await, Ok(Beat::Renewed)) {
                break;
            }
            sleep(Times::new(SESSION).renew()).await;
        }
        let in_use: Vec<String> = {
            let model = self.link.model.lock().unwrap();
            let own = model.mounted.keys().filter(|(host, _)| *host == self.name);
            own.map(|(_, volume)| volume.clone()).collect()
        };
        for volume in &in_use {
            self.unmount(&member, volume).await;
        }
        for volume in member.held().keys() {
            member
                .release(&self.link, std::slice::from_ref(volume))
                .await;
        }
        member
    }
}
