//! What calls do on the shares together with other hosts: nothing in here knows a process, a mount or
//! an attachment of this host, so that all interleavings of two hosts can be tried (`search`).
//!
//! Invariant: a removal is binding only after all holds have been looked at, and what this host has
//! made is taken back only by such a removal.

use std::future::Future;
use std::time::Duration;

use crate::cluster::removal::{self, Bound};
use crate::cluster::{Env, Member, MemberError};
use crate::driver::DriverError;
use crate::home::{Catalog, CatalogError, Creation};
use crate::mutant::{self, Mutant};
use crate::volume::{OnRemove, Record, VolumeName, VolumeOptions};
use chance::host_time;
use nfs::admin::Admin;

/// How many removals that others have begun a Create finishes, which are in its way.
const REMOVALS_FINISHED: usize = 3;
/// A Remove that finds the volume held looks again so many times, after this pause each time: the
/// last container may have ended just now.
const HELD_LOOKS: usize = 3;
const HELD_PAUSE: Duration = Duration::from_millis(200);

/// Why a volume is removed.
#[derive(Debug, Clone, Copy)]
enum Removed<'a> {
    /// Somebody has asked for it. On this share is its data, if that is to be moved.
    ByUser(Option<&'a Admin>),
    /// Nobody was told that it was made, and it goes if nobody has used it. Its data is on this share.
    Unmade(&'a Admin),
}

/// How the shares are reached.
pub(in crate::driver) trait Ways: Sync {
    /// The home share, with nothing kept of it by a call.
    fn home(&self) -> impl Future<Output = Result<Option<Admin>, DriverError>> + Send;
    /// The share of a volume's data, for the call that has this home share.
    fn data(
        &self,
        home: Option<&Admin>,
        options: &VolumeOptions,
    ) -> impl Future<Output = Result<Admin, DriverError>> + Send;
    /// Whether another host holds the volume, as far as is known without asking.
    fn may_be_held(&self, name: &VolumeName) -> bool;
}

/// A host that shares its volumes with others.
pub(in crate::driver) struct Together<'a, E, W> {
    pub(in crate::driver) catalog: &'a Catalog,
    pub(in crate::driver) member: &'a Member<E>,
    pub(in crate::driver) ways: &'a W,
    /// This driver only asks a share: it is no member of the cluster then.
    pub(in crate::driver) aside: bool,
}

impl<E: Env, W: Ways> Together<'_, E, W> {
    /// The home share of a volume whose record is on it.
    pub(in crate::driver) fn shared_home<'a>(
        &self,
        home: Option<&'a Admin>,
        name: &VolumeName,
    ) -> Option<&'a Admin> {
        home.filter(|_| !self.aside && !self.catalog.is_only_here(name))
    }

    /// Makes the volume's record and directory, after removals that are in its way.
    pub(in crate::driver) async fn make(
        &self,
        home: Option<&Admin>,
        on: &Admin,
        name: &VolumeName,
        options: &VolumeOptions,
        default: OnRemove,
    ) -> Result<Creation, DriverError> {
        let mut tries = 0..REMOVALS_FINISHED;
        loop {
            let made = self.catalog.create(home, on, name, options, default);
            match made.await {
                Err(CatalogError::Removing(record)) if tries.next().is_some() => {
                    let its = match mutant::is_on(Mutant::RemovalsEndOnTheNewShare) {
                        true => on.clone(),
                        false => self.ways.data(home, &record.options).await?,
                    };
                    self.catalog.finish(home, Some(&its), &record).await?;
                }
                Err(CatalogError::HalfMade { record, source }) => {
                    self.undo(home, on, &record).await;
                    return Err((*source).into());
                }
                made => return Ok(made?),
            }
        }
    }

    /// Takes a volume back that this host has made, unless another one has it by now.
    pub(in crate::driver) async fn undo(&self, home: Option<&Admin>, on: &Admin, record: &Record) {
        let begun = match mutant::is_on(Mutant::UndoneByName) {
            true => Ok(false),
            false => self.begin_removal(home, Removed::Unmade(on), record).await,
        };
        match begun {
            Ok(marked) => self.catalog.undo(home, on, record, marked).await,
            Err(error) => {
                tracing::warn!(volume = %record.name, %error, "could not be taken back; it stays");
            }
        }
    }

    /// Whether the volume is held now, rather than being removed by another host.
    #[tracing::instrument(level = "debug", skip_all)]
    pub(in crate::driver) async fn announce_hold(
        &self,
        home: &Admin,
        record: &Record,
    ) -> Result<bool, MemberError> {
        let (name, access) = (&record.name, record.options.access);
        self.member.hold(home, name, access).await?;
        self.forestall(home, name).await
    }

    /// Whether a volume that was claimed is there, with the record and the options that the claim was made
    /// to, and with that claim. `home` has looked nothing up before.
    pub(in crate::driver) async fn is_still_there(
        &self,
        home: &Admin,
        record: &Record,
    ) -> Result<bool, DriverError> {
        if !self.forestall(home, &record.name).await? {
            return Ok(false);
        }
        let now = self.catalog.revalidate(home, &record.name).await?;
        let is_it = |now: &Record| {
            let same = now.options == record.options || mutant::is_on(Mutant::ClaimsKeepOptions);
            now.id == record.id && same
        };
        if !now.is_some_and(|now| is_it(&now)) {
            return Ok(false);
        }
        self.member.check_claim(home, &record.name).await?;
        Ok(true)
    }

    async fn forestall(&self, home: &Admin, name: &VolumeName) -> Result<bool, MemberError> {
        fail::fail_point!("mount.held", |_| crate::failpoint::die());
        Ok(removal::forestall(home, name, || self.member.nonce()).await?)
    }

    /// The share of a volume's data, if a Remove moves that: one of which nothing is needed may be
    /// read-only, or gone.
    pub(in crate::driver) async fn data_to_move(
        &self,
        home: Option<&Admin>,
        record: &Record,
    ) -> Result<Option<Admin>, DriverError> {
        match record.moves_data() || mutant::is_on(Mutant::RemoveTouchesEveryShare) {
            true => Ok(Some(self.ways.data(home, &record.options).await?)),
            false => Ok(None),
        }
    }

    /// Removes a volume that nothing of this host has; the trash entry to purge at once, if any.
    /// `on` is the share of its data, if that is to be moved.
    #[tracing::instrument(level = "debug", skip_all)]
    pub(in crate::driver) async fn remove(
        &self,
        home: Option<&Admin>,
        on: Option<&Admin>,
        record: &Record,
    ) -> Result<Option<String>, DriverError> {
        let removed = async {
            let begun = self.begin_removal(home, Removed::ByUser(on), record);
            Ok::<_, DriverError>(match begun.await? {
                true => self.catalog.finish(home, on, record).await?,
                false => self.catalog.remove(home, on, record).await?,
            })
        };
        match removed.await {
            // Another host was faster.
            Err(_) if self.is_gone(record).await => Ok(None),
            removed => removed,
        }
    }

    /// Whether the home share, asked anew, says that a volume is no more.
    pub(in crate::driver) async fn is_gone(&self, record: &Record) -> bool {
        if self.catalog.is_only_here(&record.name) {
            return false;
        }
        let Ok(Some(home)) = self.ways.home().await else {
            return false;
        };
        let found = self.catalog.fetch(&home, &record.name).await;
        found.is_ok_and(|found| found.is_none_or(|found| found.id != record.id))
    }

    /// Refuses when another host holds the volume, or when a share would not let it be removed;
    /// otherwise makes its removal binding. Returns whether it is: where there are no other hosts
    /// it need not be.
    async fn begin_removal(
        &self,
        home: Option<&Admin>,
        why: Removed<'_>,
        record: &Record,
    ) -> Result<bool, DriverError> {
        let name = &record.name;
        let Some(home) = self.shared_home(home, name) else {
            return Ok(false);
        };
        if let Removed::ByUser(Some(on)) = why
            && on.share() != home.share()
        {
            Catalog::try_removal(on, record).await?;
        }
        let mut begun = self.try_to_begin_removal(home, why, record).await;
        for _ in 0..HELD_LOOKS {
            if !matches!(begun, Err(DriverError::HeldElsewhere { .. })) {
                break;
            }
            tokio::time::sleep(HELD_PAUSE).await;
            begun = match self.check_elsewhere(home, name).await {
                Ok(()) => self.try_to_begin_removal(home, why, record).await,
                held => held,
            };
        }
        begun.map(|()| true)
    }

    async fn try_to_begin_removal(
        &self,
        home: &Admin,
        why: Removed<'_>,
        record: &Record,
    ) -> Result<(), DriverError> {
        let name = &record.name;
        // What is held, as far as is known, gets no intent before that has been asked.
        if self.ways.may_be_held(name) {
            self.check_elsewhere(home, name).await?;
        }
        let nonce = self.member.nonce();
        let host = crate::layout::remover(&self.member.host().name, host_time());
        // Shows as well that the share takes changes: an intent by itself changes nothing.
        if let Err(error) = removal::announce(home, name, &nonce, &host).await {
            removal::withdraw(home, name, &nonce).await;
            return Err(error.into());
        }
        fail::fail_point!("remove.announced", |_| crate::failpoint::die());
        // After the intent: who uses the volume from here on takes it away, and one that takes the
        // volume's place does not have it.
        let checks = async {
            self.check_elsewhere(home, name).await?;
            if !mutant::is_on(Mutant::MarkedUnseen) {
                Catalog::check_same(home, record).await?;
                if let Removed::Unmade(on) = why {
                    Catalog::check_unused(on, record).await?;
                }
            }
            Ok::<_, DriverError>(())
        };
        if let Err(error) = checks.await {
            removal::withdraw(home, name, &nonce).await;
            return Err(error);
        }
        match removal::bind(home, name, &nonce).await? {
            Bound::Removing => Ok(()),
            Bound::Withdrawn => {
                self.check_elsewhere(home, name).await?;
                Err(MemberError::Unclear("that mounts the volume".to_owned()).into())
            }
        }
    }

    async fn check_elsewhere(&self, home: &Admin, name: &VolumeName) -> Result<(), DriverError> {
        let holdings = self.member.holdings(home, name).await?;
        if holdings.is_empty() {
            Ok(())
        } else {
            Err(DriverError::HeldElsewhere {
                name: name.clone(),
                holdings,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::cluster::{Host, Times};
    use crate::driver::tests::Clock;
    use nfs::address::Share;
    use nfs::admin::AdminSettings;

    /// A home share, and one with a user's own files.
    struct Shares {
        home: Admin,
        users: Admin,
    }

    impl Ways for Shares {
        async fn home(&self) -> Result<Option<Admin>, DriverError> {
            Ok(Some(self.home.clone()))
        }

        async fn data(&self, _: Option<&Admin>, _: &VolumeOptions) -> Result<Admin, DriverError> {
            Ok(self.users.clone())
        }

        fn may_be_held(&self, _: &VolumeName) -> bool {
            false
        }
    }

    fn share(text: &str, dir: &TempDir) -> Admin {
        let share = text.parse().unwrap();
        Admin::mounted(share, dir.path().to_owned(), AdminSettings::default())
    }

    /// What is on the user's share after a volume of a directory there was made and removed.
    async fn left() -> Vec<String> {
        let [home, users, state] = [(); 3].map(|()| tempfile::tempdir().unwrap());
        std::fs::create_dir(users.path().join("app")).unwrap();
        let shares = Shares {
            home: share("nas:/export", &home),
            users: share("nas2:/media", &users),
        };
        let at: Share = "nas:/export".parse().unwrap();
        let catalog = Catalog::open(state.path(), Some(at), "a").unwrap();
        let host = Host {
            name: "a".to_owned(),
            id: "id".to_owned(),
            boot: "boot".to_owned(),
        };
        let times = Times::new(Duration::from_secs(30));
        let member = Member::new(host, times, Clock::default(), []);
        let together = Together {
            catalog: &catalog,
            member: &member,
            ways: &shares,
            aside: false,
        };
        let given = [("share", "nas2:/media"), ("subdir", "app")];
        let given = given.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let options = VolumeOptions::parse(&given.into()).unwrap();
        let (name, home) = ("app".parse().unwrap(), Some(&shares.home));
        let made = together.make(home, &shares.users, &name, &options, OnRemove::Trash);
        made.await.unwrap();
        let record = catalog.get(&name).unwrap();
        let on = together.data_to_move(home, &record).await.unwrap();
        together.remove(home, on.as_ref(), &record).await.unwrap();
        assert_eq!(catalog.get(&name), None);
        let left = std::fs::read_dir(users.path()).unwrap();
        left.map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_share_of_which_nothing_is_needed_is_left_alone() {
        assert_eq!(left().await, ["app"]);
    }

    #[test]
    fn a_share_that_is_touched_without_need_is_found() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .unwrap();
        let _back = mutant::put_back(Mutant::RemoveTouchesEveryShare);
        assert!(runtime.block_on(left()).contains(&".nfsvol".to_owned()));
    }
}
