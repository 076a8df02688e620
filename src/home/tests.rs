//! Several hosts on one share; the share is a directory, as it is over a kernel mount.

mod adopt;
mod following;
mod recreated;
mod removing;
mod repairing;
mod restored;
mod trashed;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;

use super::restore::Restoring;
use super::*;
use crate::cluster::removal;
use nfs::admin::AdminSettings;

struct Lab {
    export: TempDir,
    state: TempDir,
}

struct Host {
    catalog: Catalog,
    admin: Admin,
}

impl Lab {
    fn new() -> Self {
        Self {
            export: tempfile::tempdir().unwrap(),
            state: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, below: &str) -> PathBuf {
        self.export.path().join(below)
    }

    /// A host that starts (again) with the state it left.
    async fn host(&self, name: &str) -> Host {
        let share: Share = "nas:/export".parse().unwrap();
        let settings = AdminSettings::default();
        let admin = Admin::mounted(share.clone(), self.export.path().to_owned(), settings);
        let catalog = Catalog::open(&self.state.path().join(name), Some(share), name).unwrap();
        catalog.init(&admin).await.unwrap();
        Host { catalog, admin }
    }
}

/// When a Get stops waiting.
fn soon() -> tokio::time::Instant {
    tokio::time::Instant::now() + LOOKUP_WAIT
}

/// Makes a file or directory two hours old.
fn make_old(path: &Path) {
    let hours_ago = std::time::SystemTime::now() - Duration::from_secs(7200);
    fs::File::open(path)
        .unwrap()
        .set_modified(hours_ago)
        .unwrap();
}

fn name(name: &str) -> VolumeName {
    name.parse().unwrap()
}

fn options(pairs: &[(&str, &str)]) -> VolumeOptions {
    let map: BTreeMap<_, _> = pairs
        .iter()
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
        .collect();
    VolumeOptions::parse(&map).unwrap()
}

impl Host {
    async fn create(&self, volume: &str, given: &[(&str, &str)]) -> Result<Creation, CatalogError> {
        let (home, options) = (Some(&self.admin), options(given));
        self.catalog
            .create(home, &self.admin, &name(volume), &options, OnRemove::Trash)
            .await
    }

    async fn made(&self, volume: &str, given: &[(&str, &str)]) -> Arc<Record> {
        match self.create(volume, given).await.unwrap() {
            Creation::New(record) => record,
            Creation::Existing(record) | Creation::Recreated(record) => {
                panic!("{} was there", record.name)
            }
        }
    }

    async fn remove(&self, volume: &str) -> Option<String> {
        let record = self
            .catalog
            .fetch(&self.admin, &name(volume))
            .await
            .unwrap()
            .unwrap();
        self.catalog
            .remove(Some(&self.admin), Some(&self.admin), &record)
            .await
            .unwrap()
    }

    /// A restore that has taken an entry of the trash, and does not go on by itself.
    async fn takes<'a>(
        &'a self,
        entry: &'a TrashEntry,
        record: Record,
        called: &str,
    ) -> Restoring<'a> {
        let taken = Restoring::take(&self.admin, &self.admin, entry, record, called);
        taken.await.unwrap()
    }

    /// The same, cut off after so many `steps`.
    async fn is_cut_off(&self, entry: &TrashEntry, record: Record, called: &str, steps: usize) {
        if steps > 0 {
            let mut restoring = self.takes(entry, record, called).await;
            if steps > 1 {
                restoring.note().await.unwrap();
            }
            if steps > 2 {
                restoring.bring_data(&self.catalog).await.unwrap();
            }
        }
    }

    async fn restore(
        &self,
        volume: &str,
        rename: Option<&str>,
    ) -> Result<Arc<Record>, CatalogError> {
        let entry = self.catalog.find_in_trash(&self.admin, volume).await?;
        let rename = rename.map(name);
        self.catalog
            .restore(&self.admin, &self.admin, &entry, rename.as_ref())
            .await
    }

    async fn look_up(&self, volume: &str) -> Known {
        self.catalog
            .look_up(Some(&self.admin), &name(volume), soon())
            .await
    }

    fn names(&self) -> Vec<String> {
        self.catalog
            .list()
            .iter()
            .map(|r| r.name.to_string())
            .collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_made_on_one_host_is_known_on_another() {
    let lab = Lab::new();
    let (a, b) = (lab.host("a").await, lab.host("b").await);
    let record = a.made("db", &[("mode", "0750")]).await;
    assert_eq!(b.look_up("db").await, Known::Here(record.clone()));
    assert_eq!(b.look_up("other").await, Known::Absent);
    assert_eq!(
        a.create("db", &[("mode", "0750")]).await.unwrap(),
        Creation::Existing(record)
    );
    let mode = std::os::unix::fs::MetadataExt::mode(&fs::metadata(lab.path("db")).unwrap());
    assert_eq!(mode & 0o7777, 0o750);
    assert_eq!(
        fs::read_dir(lab.path("db")).unwrap().count(),
        0,
        "nothing of ours inside"
    );
    assert_eq!(
        fs::read_dir(lab.path(".nfsvol/tmp")).unwrap().count(),
        0,
        "nothing left over"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn of_racing_creates_one_wins_and_the_others_learn_its_options() {
    let lab = Lab::new();
    let mut hosts = Vec::new();
    for i in 0..8 {
        hosts.push(lab.host(&format!("host{i}")).await);
    }
    let mut racing = tokio::task::JoinSet::new();
    for (i, host) in hosts.into_iter().enumerate() {
        racing.spawn(async move {
            let mode = if i % 2 == 0 { "0700" } else { "0755" };
            (host.create("db", &[("mode", mode)]).await, host)
        });
    }
    let (mut new, mut existing, mut different) = (0, 0, 0);
    while let Some(raced) = racing.join_next().await {
        match raced.unwrap().0 {
            Ok(Creation::New(_)) => new += 1,
            Ok(Creation::Existing(_) | Creation::Recreated(_)) => existing += 1,
            Err(CatalogError::Different { differences, .. }) => {
                assert!(differences[0].starts_with("mode is"));
                different += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!((new, existing, different), (1, 3, 4));
    assert_eq!(fs::read_dir(lab.path(".nfsvol/tmp")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn racing_first_hosts_agree_on_the_share() {
    let lab = Lab::new();
    let (a, b) = tokio::join!(lab.host("a"), lab.host("b"));
    a.made("db", &[]).await;
    assert!(matches!(b.look_up("db").await, Known::Here(_)));
    let entries = fs::read_dir(lab.export.path()).unwrap();
    let mut names: Vec<_> = entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, [".nfsvol", "db"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_volume_comes_back_with_its_data() {
    let lab = Lab::new();
    let host = lab.host("a").await;
    host.made("db", &[]).await;
    fs::write(lab.path("db/file"), "data").unwrap();
    assert_eq!(host.remove("db").await, None);
    assert_eq!(host.look_up("db").await, Known::Absent);
    assert!(!lab.path("db").exists());

    // The name can be used again at once, and is then in the way.
    host.made("db", &[]).await;
    assert!(matches!(
        host.restore("db", None).await,
        Err(CatalogError::NameTaken(_))
    ));
    let restored = host.restore("db", Some("old")).await.unwrap();
    assert_eq!(restored.data_dir.as_str(), "old");
    assert_eq!(fs::read_to_string(lab.path("old/file")).unwrap(), "data");
    assert_eq!(host.catalog.trash(&host.admin).await.unwrap().len(), 0);
    assert_eq!(fs::read_dir(lab.path(".nfsvol/trash")).unwrap().count(), 0);
    // Every host can read what was restored.
    assert!(matches!(
        lab.host("b").await.look_up("old").await,
        Known::Here(_)
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_name_in_the_trash_is_answered_with_the_nearest() {
    let lab = Lab::new();
    let host = lab.host("a").await;
    host.made("postgres", &[]).await;
    host.remove("postgres").await;
    let error = host
        .restore("postgers", None)
        .await
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "volume postgers is not in the trash (did you mean postgres?)"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_was_found_is_never_moved() {
    let lab = Lab::new();
    let host = lab.host("a").await;
    fs::create_dir(lab.path("photos")).unwrap();
    fs::write(lab.path("photos/1"), "x").unwrap();
    let record = host
        .made("photos", &[("on_remove", "delete"), ("uid", "7")])
        .await;
    assert_eq!(record.made, None);
    assert_eq!(
        std::os::unix::fs::MetadataExt::uid(&fs::metadata(lab.path("photos")).unwrap()),
        0
    );
    let entry = host.remove("photos").await.unwrap();
    Catalog::purge(Some(&host.admin), None, &entry)
        .await
        .unwrap();
    assert_eq!(fs::read_to_string(lab.path("photos/1")).unwrap(), "x");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_put_in_place_of_ours_is_not_ours() {
    let lab = Lab::new();
    let host = lab.host("a").await;
    host.made("db", &[("on_remove", "delete")]).await;
    fs::rename(lab.path("db"), lab.path("db.saved")).unwrap();
    fs::create_dir(lab.path("db")).unwrap();
    fs::write(lab.path("db/precious"), "x").unwrap();
    let entry = host.remove("db").await.unwrap();
    Catalog::purge(Some(&host.admin), None, &entry)
        .await
        .unwrap();
    assert!(lab.path("db/precious").exists() && lab.path("db.saved").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_another_volume_uses_stays() {
    let lab = Lab::new();
    let host = lab.host("a").await;
    host.made("app", &[("on_remove", "delete")]).await;
    host.made("view", &[("subdir", "app/part"), ("access", "readonly")])
        .await;
    host.remove("app").await;
    assert!(lab.path("app/part").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn on_remove_says_where_the_data_goes() {
    let lab = Lab::new();
    let host = lab.host("a").await;
    host.made("kept", &[("on_remove", "retain")]).await;
    host.made("gone", &[("on_remove", "delete")]).await;
    fs::write(lab.path("gone/x"), "x").unwrap();
    fs::create_dir(lab.path("found")).unwrap();
    host.made("found", &[]).await;
    let entry = host.remove("gone").await.expect("nothing to restore");
    Catalog::purge(Some(&host.admin), None, &entry)
        .await
        .unwrap();
    for volume in ["kept", "found"] {
        assert_eq!(host.remove(volume).await, None, "to be restored");
        assert!(lab.path(volume).exists());
        host.restore(volume, None).await.unwrap();
        assert!(lab.path(volume).exists());
    }
    assert!(!lab.path("gone").exists());
    assert_eq!(fs::read_dir(lab.path(".nfsvol/trash")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(lab.path(".nfsvol/tmp")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_host_finishes_a_removal_that_a_crash_cut_off() {
    let lab = Lab::new();
    let (a, b) = (lab.host("a").await, lab.host("b").await);
    let record = a.made("db", &[]).await;
    fs::write(lab.path("db/file"), "old").unwrap();
    let entry = share::begin_removal(&a.admin, "a", &record).await.unwrap();
    // Host a is gone; whoever asks for the name next gets a new, empty volume.
    let there = removal::forestall(&b.admin, &record.name, || "b".to_owned());
    assert!(!there.await.unwrap());
    let new = b.made("db", &[]).await;
    assert_ne!(new.id, record.id);
    assert_eq!(fs::read_dir(lab.path("db")).unwrap().count(), 0);
    let trash = b.catalog.trash(&b.admin).await.unwrap();
    assert_eq!(
        trash.iter().map(|e| e.entry.clone()).collect::<Vec<_>>(),
        [entry.entry()]
    );
    let data = lab
        .path(".nfsvol/trash")
        .join(&trash[0].entry)
        .join("data/file");
    assert_eq!(fs::read_to_string(data).unwrap(), "old");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_that_a_crash_cut_off_is_finished_by_the_next() {
    let lab = Lab::new();
    let host = lab.host("a").await;
    let made = host.made("db", &[]).await;
    // As it is between the record and its directory.
    let aside = lab.path(&format!(".nfsvol/tmp/{}.data", made.id));
    fs::rename(lab.path("db"), &aside).unwrap();
    make_old(&aside);
    assert_eq!(host.catalog.sweep(&host.admin).await.unwrap(), 0);
    Catalog::ready(&host.admin, &made).await.unwrap();
    assert!(lab.path("db").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_empty_directory_takes_the_place_of_lost_data() {
    let lab = Lab::new();
    let host = lab.host("a").await;
    let record = host.made("db", &[]).await;
    fs::remove_dir(lab.path("db")).unwrap();
    let error = Catalog::ready(&host.admin, &record).await.unwrap_err();
    assert!(matches!(error, CatalogError::DataGone { .. }), "{error}");
    assert!(!lab.path("db").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn polling_follows_other_hosts() {
    let lab = Lab::new();
    let (a, b) = (lab.host("a").await, lab.host("b").await);
    for volume in ["one", "two", "three"] {
        a.made(volume, &[]).await;
    }
    assert_eq!(b.catalog.poll(&b.admin).await.unwrap().read, 3);
    assert_eq!(b.names(), ["one", "three", "two"]);
    a.remove("two").await;
    assert_eq!(b.catalog.poll(&b.admin).await.unwrap().gone, [name("two")]);
    assert_eq!(b.names(), ["one", "three"]);
    assert_eq!(b.catalog.poll(&b.admin).await.unwrap(), Changes::default());
    assert_eq!(lab.host("b").await.names(), ["one", "three"], "durable");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_share_that_lost_its_file_system_forgets_nothing() {
    let lab = Lab::new();
    let host = lab.host("a").await;
    host.made("db", &[]).await;
    host.catalog.poll(&host.admin).await.unwrap();
    // The server exports an empty directory, then somebody else's.
    fs::rename(lab.path(".nfsvol"), lab.path("hidden")).unwrap();
    assert!(matches!(
        host.catalog.poll(&host.admin).await,
        Err(CatalogError::OtherShare { .. })
    ));
    assert!(matches!(host.look_up("db").await, Known::Here(_)));
    let fetched = host.catalog.fetch(&host.admin, &name("db")).await;
    assert!(matches!(fetched, Err(CatalogError::OtherShare { .. })));
    let other = Lab::new();
    other.host("x").await;
    fs::rename(other.path(".nfsvol"), lab.path(".nfsvol")).unwrap();
    assert!(matches!(
        host.catalog.poll(&host.admin).await,
        Err(CatalogError::OtherShare { .. })
    ));
    assert_eq!(host.names(), ["db"]);
    fs::remove_dir_all(lab.path(".nfsvol")).unwrap();
    fs::rename(lab.path("hidden"), lab.path(".nfsvol")).unwrap();
    host.catalog.poll(&host.admin).await.unwrap();
    assert_eq!(host.names(), ["db"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_without_a_copy_never_says_no_for_a_silent_share() {
    let lab = Lab::new();
    let host = lab.host("a").await;
    let db = name("db");
    assert_eq!(
        host.catalog.look_up(None, &db, soon()).await,
        Known::Unknown
    );
    host.catalog.poll(&host.admin).await.unwrap();
    assert_eq!(host.catalog.look_up(None, &db, soon()).await, Known::Absent);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_that_nobody_heard_of_leaves_nothing() {
    let lab = Lab::new();
    let host = lab.host("a").await;
    let record = host.made("db", &[]).await;
    host.catalog
        .undo(Some(&host.admin), &host.admin, &record, false)
        .await;
    assert_eq!(host.look_up("db").await, Known::Absent);
    assert!(!lab.path("db").exists());
    assert_eq!(fs::read_dir(lab.path(".nfsvol/tmp")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_state_disk_leaves_nothing_half_made() {
    let lab = Lab::new();
    let host = lab.host("a").await;
    // A directory in the way of the record's file stands for any failure to write it.
    fs::create_dir_all(lab.state.path().join("a/catalog/db.json.tmp")).unwrap();
    let error = host.create("db", &[]).await.unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with("state directory: writing the volume's record"),
        "{text}"
    );
    // The driver takes it back, once it knows that no host has it.
    let CatalogError::HalfMade { record, .. } = error else {
        panic!("{error:?}");
    };
    let home = Some(&host.admin);
    host.catalog.undo(home, &host.admin, &record, false).await;
    assert!(!lab.path("db").exists() && !lab.path(".nfsvol/volumes/db").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_home_share_volumes_name_their_own() {
    let lab = Lab::new();
    let share: Share = "nas:/export".parse().unwrap();
    let admin = Admin::mounted(
        share,
        lab.export.path().to_owned(),
        AdminSettings::default(),
    );
    let catalog = Catalog::open(&lab.state.path().join("a"), None, "a").unwrap();
    let given = options(&[("share", "nas:/export")]);
    assert!(matches!(
        catalog.share_of(&options(&[])),
        Err(CatalogError::NoShare)
    ));
    let db = name("db");
    let made = catalog
        .create(None, &admin, &db, &given, OnRemove::Trash)
        .await
        .unwrap();
    let Creation::New(record) = made else {
        panic!("{made:?}")
    };
    fs::write(lab.path("db/file"), "data").unwrap();
    let again = Catalog::open(&lab.state.path().join("a"), None, "a").unwrap();
    assert_eq!(
        again.look_up(None, &db, soon()).await,
        Known::Here(record.clone())
    );
    assert_eq!(
        again.remove(None, Some(&admin), &record).await.unwrap(),
        None
    );
    assert_eq!(again.look_up(None, &db, soon()).await, Known::Absent);
    let entry = again.find_in_trash(&admin, "db").await.unwrap();
    again.restore(&admin, &admin, &entry, None).await.unwrap();
    assert_eq!(again.look_up(None, &db, soon()).await, Known::Here(record));
    assert_eq!(fs::read_to_string(lab.path("db/file")).unwrap(), "data");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_expired_is_purged_and_what_is_left_over_is_swept() {
    let lab = Lab::new();
    let host = lab.host("a").await;
    host.made("db", &[]).await;
    host.remove("db").await;
    let week = Duration::from_secs(7 * 86400);
    assert_eq!(
        host.catalog.expired(&host.admin, week).await.unwrap().len(),
        0
    );
    // Not kept at all.
    let none = Duration::ZERO;
    let expired = host.catalog.expired(&host.admin, none).await.unwrap();
    assert_eq!(expired.len(), 1);
    Catalog::purge(Some(&host.admin), None, &expired[0].entry)
        .await
        .unwrap();
    assert_eq!(host.catalog.trash(&host.admin).await.unwrap().len(), 0);

    let left = lab.path(".nfsvol/tmp/purge.x.20200101T000000Z.01234567");
    fs::create_dir(&left).unwrap();
    assert_eq!(
        host.catalog.sweep(&host.admin).await.unwrap(),
        0,
        "may be under way"
    );
    make_old(&left);
    assert_eq!(host.catalog.sweep(&host.admin).await.unwrap(), 1);
}
