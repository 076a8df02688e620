//! The calls of a host, as the driver makes them, and what came of them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::wires::Clock;
use super::{Start, server};
use crate::cluster::{Claimed, Env, Host as Identity, Member, Times};
use crate::driver::DriverError;
use crate::driver::membership::together::{Together, Ways};
use crate::home::{Catalog, CatalogError, Creation};
use crate::volume::{Access, OnRemove, Record, VolumeName, VolumeOptions};
use nfs::admin::{Admin, simulated};

/// A call of a user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Do {
    Create(&'static str),
    CreateExclusive(&'static str),
    /// With other options than the others.
    Recreate(&'static str),
    /// Of a directory that is another volume's.
    CreateIn(&'static str, &'static str),
    Mount(&'static str),
    Unmount(&'static str),
    Remove(&'static str),
    Restore(&'static str),
    RestoreAs(&'static str, &'static str),
}

impl Do {
    /// The volume that is there when this has succeeded, of what makes one or brings it back.
    pub(super) fn makes(self) -> Option<&'static str> {
        match self {
            Self::Create(name)
            | Self::CreateExclusive(name)
            | Self::Recreate(name)
            | Self::CreateIn(name, _)
            | Self::Restore(name)
            | Self::RestoreAs(_, name) => Some(name),
            Self::Mount(_) | Self::Unmount(_) | Self::Remove(_) => None,
        }
    }
}

/// A volume that a host has mounted.
#[derive(Debug, Clone)]
pub(super) struct Held {
    pub(super) record: Arc<Record>,
    /// Until when it may write to an exclusive volume.
    pub(super) until: Duration,
}

/// What the hosts were told.
#[derive(Debug, Clone, Default)]
pub(super) struct Facts {
    pub(super) hosts: Vec<BTreeMap<&'static str, Held>>,
    /// The id of the record, or the error, of each call that was answered.
    pub(super) results: Vec<(usize, Do, Result<String, String>)>,
}

/// A host's daemon.
pub(super) struct Parts {
    number: usize,
    catalog: Catalog,
    pub(super) member: Member<Clock>,
    admin: Admin,
    facts: Arc<Mutex<Facts>>,
}

fn name(name: &str) -> VolumeName {
    name.parse().unwrap()
}

fn options(pairs: &[(&str, &str)]) -> VolumeOptions {
    let pairs = pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    VolumeOptions::parse(&pairs.collect()).unwrap()
}

impl Ways for Parts {
    async fn home(&self) -> Result<Option<Admin>, DriverError> {
        Ok(Some(self.admin.clone()))
    }

    async fn data(&self, home: Option<&Admin>, _: &VolumeOptions) -> Result<Admin, DriverError> {
        Ok(home.unwrap_or(&self.admin).clone())
    }

    /// A host that has not looked lately: the most that can go wrong.
    fn may_be_held(&self, _: &VolumeName) -> bool {
        false
    }
}

type Answer = Result<String, DriverError>;

impl Parts {
    pub(super) fn new(
        number: usize,
        host: &str,
        link: Arc<dyn simulated::Server>,
        clock: Clock,
        state_dir: &Path,
        facts: Arc<Mutex<Facts>>,
    ) -> Self {
        let share: nfs::address::Share = "nas:/export".parse().unwrap();
        let admin = simulated::admin(share.clone(), link, server::root());
        let state_dir = state_dir.join(host);
        let host = Identity {
            name: host.to_owned(),
            id: format!("id of {number}"),
            boot: "boot".to_owned(),
        };
        let mut places = crate::layout::frame().to_vec();
        places.push(crate::layout::hosts());
        places.push(crate::layout::host_dir(&host.name));
        admin.keep_handles(&places);
        std::fs::create_dir_all(&state_dir).unwrap();
        Self {
            number,
            catalog: Catalog::open(&state_dir, Some(share), &host.name).unwrap(),
            member: Member::new(host, Times::new(Duration::from_secs(30)), clock, []),
            admin,
            facts,
        }
    }

    /// The same daemon once more.
    pub(super) fn copy(
        &self,
        link: Arc<dyn simulated::Server>,
        clock: Clock,
        facts: Arc<Mutex<Facts>>,
    ) -> Self {
        Self {
            number: self.number,
            catalog: self.catalog.copy(),
            member: self.member.copy(clock),
            admin: simulated::again(&self.admin, link, server::root()),
            facts,
        }
    }

    fn together(&self) -> Together<'_, Clock, Self> {
        Together {
            catalog: &self.catalog,
            member: &self.member,
            ways: self,
            aside: false,
        }
    }

    /// The start of a daemon.
    pub(super) async fn begin(&self) {
        self.catalog.init(&self.admin).await.unwrap();
        self.catalog.poll(&self.admin).await.unwrap();
        self.beat().await;
    }

    /// A renewal, and what is due besides.
    pub(super) async fn beat(&self) {
        let _ = self.member.beat(&self.admin).await;
    }

    pub(super) async fn all(&self, calls: &[Do]) {
        for call in calls {
            self.one(*call).await;
        }
    }

    pub(super) async fn one(&self, what: Do) {
        let answer = match what {
            Do::Create(name) => self.create(name, &[]).await,
            Do::CreateExclusive(name) => self.create(name, &[("access", "exclusive")]).await,
            Do::Recreate(name) => self.create(name, &[("mode", "0700")]).await,
            Do::CreateIn(name, dir) => self.create(name, &[("subdir", dir)]).await,
            Do::Mount(name) => self.mount(name).await,
            Do::Unmount(name) => self.unmount(name).await,
            Do::Remove(name) => self.remove(name).await,
            Do::Restore(name) => self.restore(name, None).await,
            Do::RestoreAs(name, other) => self.restore(name, Some(other)).await,
        };
        let answer = answer.map_err(|error| error.to_string());
        let mut facts = self.facts.lock().unwrap();
        facts.results.push((self.number, what, answer));
    }

    async fn create(&self, volume: &str, given: &[(&str, &str)]) -> Answer {
        let home = self.admin.scoped();
        let (name, options) = (name(volume), options(given));
        let made = self.together();
        let made = made.make(Some(&home), &home, &name, &options, OnRemove::Trash);
        Ok(match made.await? {
            Creation::New(record) | Creation::Existing(record) | Creation::Recreated(record) => {
                record.id.clone()
            }
        })
    }

    /// As a Mount, up to where the volume is attached.
    async fn mount(&self, volume: &'static str) -> Answer {
        let name = name(volume);
        let home = self.admin.scoped();
        let found = match self.catalog.get(&name) {
            Some(_) => self.catalog.revalidate(&home, &name).await?,
            None => self.catalog.fetch(&self.admin, &name).await?,
        };
        let Some(record) = found else {
            return Err(DriverError::Absent(name));
        };
        let held = self.hold(&home, &record).await;
        let ready = match held {
            Ok(until) => Catalog::ready(&home, &record).await.map(|()| until),
            Err(error) => {
                self.let_go(&name).await;
                return Err(error);
            }
        };
        match ready {
            Ok(until) => {
                let id = record.id.clone();
                let held = Held { record, until };
                self.facts.lock().unwrap().hosts[self.number].insert(volume, held);
                Ok(id)
            }
            Err(error) => {
                self.let_go(&name).await;
                Err(error.into())
            }
        }
    }

    async fn hold(&self, home: &Admin, record: &Arc<Record>) -> Result<Duration, DriverError> {
        let name = &record.name;
        let absent = || Err(CatalogError::Absent(name.clone()).into());
        if record.options.access != Access::Exclusive {
            return match self.together().announce_hold(home, record).await? {
                true => Ok(Duration::ZERO),
                false => absent(),
            };
        }
        let claimed = self
            .member
            .claim(&self.admin.scoped(), name, &record.id)
            .await;
        match claimed {
            Err(_) if self.together().is_gone(record).await => absent(),
            Err(error) => Err(error.into()),
            Ok(Claimed::Held(holding)) => Err(DriverError::Taken {
                name: name.clone(),
                holding: holding.into(),
            }),
            Ok(Claimed::Mine(until)) => {
                match self
                    .together()
                    .is_still_there(&self.admin.scoped(), record)
                    .await?
                {
                    true => Ok(until),
                    false => absent(),
                }
            }
        }
    }

    async fn let_go(&self, name: &VolumeName) {
        self.member
            .release(&self.admin, std::slice::from_ref(name))
            .await;
    }

    async fn unmount(&self, volume: &str) -> Answer {
        // From here on nothing of this host uses it.
        self.facts.lock().unwrap().hosts[self.number].remove(volume);
        self.let_go(&name(volume)).await;
        Ok(String::new())
    }

    async fn remove(&self, volume: &str) -> Answer {
        let home = self.admin.scoped();
        let Some(record) = self.catalog.fetch(&home, &name(volume)).await? else {
            return Ok(String::new());
        };
        let on = record.moves_data().then_some(&home);
        let entry = self.together().remove(Some(&home), on, &record).await?;
        if let Some(entry) = entry {
            Catalog::purge(Some(&home), on, &entry).await?;
        }
        Ok(record.id.clone())
    }

    async fn restore(&self, volume: &str, other: Option<&str>) -> Answer {
        let entry = self.catalog.find_in_trash(&self.admin, volume).await?;
        let other = other.map(name);
        let restored = self
            .catalog
            .restore(&self.admin, &self.admin, &entry, other.as_ref());
        Ok(restored.await?.id.clone())
    }

    /// Makes a volume `back` of an entry of the trash.
    pub(super) async fn bring_back(&self, entry: &str) {
        let _ = self.restore(entry, Some("back")).await;
    }

    /// What there is before a run, made by a host that is no member.
    pub(super) async fn prepare(&self, start: Start) {
        self.catalog.init(&self.admin).await.unwrap();
        let options = match start {
            Start::Nothing => return,
            Start::Exclusive => options(&[("access", "exclusive")]),
            Start::Volume | Start::Trash => options(&[]),
        };
        let (home, db) = (Some(&self.admin), name("db"));
        let on_remove = OnRemove::Trash;
        let made = self
            .catalog
            .create(home, &self.admin, &db, &options, on_remove);
        made.await.unwrap();
    }

    /// The volume is removed.
    pub(super) async fn prepare_trash(&self) {
        let record = self.catalog.get(&name("db")).unwrap();
        let home = Some(&self.admin);
        self.catalog.remove(home, home, &record).await.unwrap();
    }

    /// Until when this host may write to a volume that it has.
    pub(super) fn right(&self, volume: &str, held: &Held) -> Duration {
        match self.member.held().contains_key(&name(volume)) {
            true => self.member.right_until().max(held.until),
            false => held.until,
        }
    }

    pub(super) fn may_write(&self, volume: &str, held: &Held, clock: &Clock) -> bool {
        held.record.options.access == Access::Exclusive && clock.now() < self.right(volume, held)
    }
}
