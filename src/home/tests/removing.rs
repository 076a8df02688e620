//! What a Remove takes, and what it leaves alone.

use super::restore;
use super::*;
use crate::mutant::{Mutant, is_on, put_back};

/// A share of its own beside the home share.
fn other_share(lab: &TempDir, share: &str) -> Admin {
    let dir = lab.path().to_owned();
    Admin::mounted(share.parse().unwrap(), dir, AdminSettings::default())
}

impl Host {
    async fn record(&self, volume: &str) -> Arc<Record> {
        let fetched = self.catalog.fetch(&self.admin, &name(volume)).await;
        fetched.unwrap().unwrap()
    }
}

/// A host makes a volume on the directory of another one; a third, that has not heard of it,
/// removes the first.
async fn removed_under_another(b_names: &str) -> bool {
    let lab = Lab::new();
    let (a, b) = (lab.host("a").await, lab.host("b").await);
    a.made("db", &[("on_remove", "delete")]).await;
    fs::write(lab.path("db/file"), "data").unwrap();
    a.catalog.poll(&a.admin).await.unwrap();
    let other = other_share(&lab.export, b_names);
    let given = options(&[("subdir", "db"), ("share", b_names)]);
    let (home, web) = (Some(&b.admin), name("web"));
    let made = b
        .catalog
        .create(home, &other, &web, &given, OnRemove::Trash);
    made.await.unwrap();
    a.remove("db").await;
    lab.path("db/file").exists()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_stays_that_another_host_has_just_made_a_volume_of() {
    for server in ["nas:/export", "localhost:/export"] {
        assert!(removed_under_another(server).await, "{server}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_volumes_that_is_not_looked_at_anew_is_found_out() {
    let _back = put_back(Mutant::RemoveTrustsItsList);
    assert!(!removed_under_another("nas:/export").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_server_under_two_names_is_found_out() {
    assert!(may_be_one("127.0.0.1:/x", "localhost:/y").await);
    assert!(
        may_be_one("nas.invalid:/x", "127.0.0.1:/y").await,
        "who knows"
    );
    assert!(!may_be_one("127.0.0.1:/x", "127.0.0.2:/x").await);
    let _back = put_back(Mutant::ServersByName);
    assert!(!may_be_one("127.0.0.1:/x", "localhost:/y").await);
}

async fn may_be_one(one: &str, other: &str) -> bool {
    let [one, other]: [Share; 2] = [one.parse().unwrap(), other.parse().unwrap()];
    may_be_one_server(one.server(), other.server()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_finishes_a_removal_looks_who_uses_the_directory() {
    let lab = Lab::new();
    let (a, b) = (lab.host("a").await, lab.host("b").await);
    let record = a.made("db", &[("on_remove", "delete")]).await;
    fs::write(lab.path("db/file"), "data").unwrap();
    b.made("web", &[("subdir", "db")]).await;
    share::begin_removal(&a.admin, "a", &record).await.unwrap();
    // Host a is gone; the next Create of the name finishes what it began, and finds the data.
    let again = a.made("db", &[]).await;
    assert_eq!(again.made, None);
    assert!(lab.path("db/file").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_volume_is_made_of_a_directory_that_is_being_removed() {
    let lab = Lab::new();
    let (a, b) = (lab.host("a").await, lab.host("b").await);
    let record = a.made("db", &[]).await;
    fs::write(lab.path("db/file"), "data").unwrap();
    share::begin_removal(&a.admin, "a", &record).await.unwrap();
    let refused = b.create("web", &[("subdir", "db")]).await.unwrap_err();
    let CatalogError::Removing(being_removed) = refused else {
        panic!("{refused:?}");
    };
    assert!(!lab.path(".nfsvol/volumes/web").exists());
    // As the driver does it.
    let (home, on) = (Some(&b.admin), Some(&b.admin));
    let removed = b.catalog.remove(home, on, &being_removed).await;
    removed.unwrap();
    assert!(!lab.path("db").exists());
    b.made("web", &[("subdir", "db")]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_volume_that_may_write_is_made_of_an_exclusive_ones_directory() {
    let lab = Lab::new();
    let (a, b) = (lab.host("a").await, lab.host("b").await);
    a.made("db", &[("access", "exclusive")]).await;
    fs::create_dir(lab.path("db/inside")).unwrap();
    for access in ["exclusive", "shared"] {
        for subdir in ["db", "db/inside", "db/new"] {
            let given = [("subdir", subdir), ("access", access)];
            let refused = b.create("web", &given).await.unwrap_err();
            assert!(
                matches!(refused, CatalogError::Excluded { .. }),
                "{refused}"
            );
            assert!(!lab.path(".nfsvol/volumes/web").exists());
        }
    }
    assert!(!lab.path("db/new").exists());
    let reads = [("subdir", "db"), ("access", "readonly")];
    b.made("reader", &reads).await;

    // Nor the other way round; shared ones may have it together.
    a.made("shared", &[]).await;
    let exclusive = [("subdir", "shared"), ("access", "exclusive")];
    b.create("alone", &exclusive).await.unwrap_err();
    b.made("together", &[("subdir", "shared")]).await;
    let _back = put_back(Mutant::ExclusiveByName);
    b.made("alone", &exclusive).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_volumes_of_one_directory_that_go_together_leave_nothing() {
    let lab = Lab::new();
    let a = lab.host("a").await;
    let db = a.made("db", &[]).await;
    let web = a.made("web", &[("subdir", "db")]).await;
    for record in [&db, &web] {
        share::begin_removal(&a.admin, "a", record).await.unwrap();
    }
    a.remove("db").await;
    a.remove("web").await;
    assert!(!lab.path("db").exists());
    assert_eq!(a.catalog.trash(&a.admin).await.unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_needs_nothing_of_a_share_touches_nothing_there() {
    let lab = Lab::new();
    let a = lab.host("a").await;
    let users = tempfile::tempdir().unwrap();
    fs::create_dir(users.path().join("pg")).unwrap();
    let on = other_share(&users, "nas2:/media");
    for given in [
        vec![("share", "nas2:/media"), ("subdir", "pg")],
        vec![
            ("share", "nas2:/media"),
            ("subdir", "pg"),
            ("on_remove", "retain"),
        ],
    ] {
        let (home, db, given) = (Some(&a.admin), name("db"), options(&given));
        let made = a.catalog.create(home, &on, &db, &given, OnRemove::Trash);
        made.await.unwrap();
        let record = a.record("db").await;
        // Nor is the share asked for.
        a.catalog.remove(home, None, &record).await.unwrap();
        assert_eq!(a.look_up("db").await, Known::Absent);
    }
    // Nor by a host without a home share.
    let alone = Catalog::open(&lab.state.path().join("alone"), None, "b").unwrap();
    let given = options(&[("share", "nas2:/media"), ("subdir", "pg")]);
    let db = name("db");
    let made = alone.create(None, &on, &db, &given, OnRemove::Trash);
    let Creation::New(record) = made.await.unwrap() else {
        panic!("it was there");
    };
    alone.remove(None, Some(&on), &record).await.unwrap();
    let left: Vec<_> = fs::read_dir(users.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

/// A host is held up between its last look and its RENAMEs, while another one finishes the removal
/// and makes the volume anew. Whether that one is whole afterwards.
async fn removed_late() -> bool {
    let lab = Lab::new();
    let (a, b) = (lab.host("a").await, lab.host("b").await);
    let old = a.made("db", &[]).await;
    let before = a.admin.attr(&old.data_dir).await.unwrap().unwrap();
    let entry = share::begin_removal(&a.admin, "a", &old).await.unwrap();
    b.made("db", &[]).await;
    fs::write(lab.path("db/file"), "new").unwrap();
    let (data, volume) = (entry.path().join("data"), entry.path().join("volume"));
    for gone in [&data, &volume] {
        fs::remove_dir_all(lab.path(gone.as_str())).unwrap();
    }
    a.admin.rename(&old.data_dir, &data).await.unwrap();
    let moved = data::moved(&a.admin, &old, &data, before).await.unwrap();
    let there = layout::volume(&old.name);
    a.admin.rename(&there, &volume).await.unwrap();
    trash::look_at_moved(&a.admin, &old, &entry).await.unwrap();
    let record = a.catalog.fetch(&a.admin, &old.name).await.unwrap();
    moved == data::Away::Stays
        && lab.path("db/file").exists()
        && record.is_some_and(|r| r.id != old.id)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_takes_the_place_of_the_removed_meanwhile_is_put_back() {
    assert!(removed_late().await);
    let _back = put_back(Mutant::RemovedUnseen);
    assert!(!removed_late().await);
}

/// A host is held up in a removal that it has begun, when it has moved the data perhaps; another one finishes
/// that, restores the volume, and may begin to remove it `again`. Whether the volume is whole afterwards, and
/// known to the host that was held up.
async fn restored_beside(moved: bool, again: bool) -> bool {
    let lab = Lab::new();
    let (a, b) = (lab.host("a").await, lab.host("b").await);
    let old = a.made("db", &[]).await;
    fs::write(lab.path("db/file"), "data").unwrap();
    let entry = share::begin_removal(&a.admin, "a", &old).await.unwrap();
    let on = Some(&b.admin);
    b.catalog.finish(on, on, &old).await.unwrap();
    b.restore("db", None).await.unwrap();
    if again {
        share::begin_removal(&b.admin, "b", &old).await.unwrap();
        // Not in the same second: that would be the same entry.
        make_old(&lab.path(".nfsvol/volumes/db/removing"));
    }
    if moved {
        let trashed = lab.path(entry.path().join("data").as_str());
        fs::create_dir(trashed.parent().unwrap()).unwrap();
        fs::rename(lab.path("db"), trashed).unwrap();
    }
    let on = Some(&a.admin);
    let finished = a.catalog.finish_removal(&a.admin, on, &old, &entry);
    finished.await.unwrap();
    assert!(!lab.path(entry.path().as_str()).exists() || is_on(Mutant::RestoredIsRemovedAgain));
    lab.path(".nfsvol/volumes/db/record.json").exists()
        && lab.path("db/file").exists()
        && a.catalog.get(&old.name).is_some()
}

/// A removal is held up while another host finishes it, and has taken the entry to restore it under another name.
/// Whether the data waits there for that one.
async fn data_waits_for_the_restore() -> bool {
    let lab = Lab::new();
    let (a, b) = (lab.host("a").await, lab.host("b").await);
    let old = a.made("db", &[]).await;
    fs::write(lab.path("db/file"), "data").unwrap();
    let entry = share::begin_removal(&a.admin, "a", &old).await.unwrap();
    let on = Some(&b.admin);
    b.catalog.finish(on, on, &old).await.unwrap();
    let trashed = b.catalog.find_in_trash(&b.admin, "db").await.unwrap();
    let web = restore::renamed(&trashed.record, &name("web")).unwrap();
    let taken = b.takes(&trashed, web, layout::RESTORING).await;
    taken.note().await.unwrap();
    let on = Some(&a.admin);
    let late = a.catalog.finish_removal(&a.admin, on, &old, &entry);
    late.await.unwrap();
    lab.path(entry.path().join("data").as_str())
        .join("file")
        .exists()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_host_restores_is_not_moved_to_where_it_was() {
    assert!(data_waits_for_the_restore().await);
    let _back = put_back(Mutant::DataGoesBackUnasked);
    assert!(!data_waits_for_the_restore().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_restored_meanwhile_is_not_removed_again() {
    for (moved, again) in [(false, false), (true, false), (false, true), (true, true)] {
        assert!(restored_beside(moved, again).await, "{moved} {again}");
    }
    let _back = put_back(Mutant::RestoredIsRemovedAgain);
    assert!(!restored_beside(false, false).await);
}

/// A Create is taken back by a host that is held up, while another one finishes that and the volume is
/// restored; whether it stays.
async fn restored_beside_an_undo() -> bool {
    let lab = Lab::new();
    let (a, b) = (lab.host("a").await, lab.host("b").await);
    let old = a.made("db", &[]).await;
    share::begin_removal(&a.admin, "a", &old).await.unwrap();
    let on = Some(&b.admin);
    b.catalog.finish(on, on, &old).await.unwrap();
    b.restore("db", None).await.unwrap();
    a.catalog.undo(Some(&a.admin), &a.admin, &old, true).await;
    lab.path(".nfsvol/volumes/db/record.json").exists() && lab.path("db").exists()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_restored_meanwhile_is_not_taken_back() {
    assert!(restored_beside_an_undo().await);
}

/// A host begins the removal of an earlier volume of the name, and goes on with it: whether the one
/// that is there now is left alone.
async fn marks_only_its_own() -> bool {
    let lab = Lab::new();
    let (a, b) = (lab.host("a").await, lab.host("b").await);
    let old = a.made("db", &[]).await;
    a.remove("db").await;
    b.made("db", &[]).await;
    let begun = share::begin_removal(&a.admin, "a", &old).await;
    let on = Some(&a.admin);
    let finished = a.catalog.finish(on, on, &old).await.unwrap();
    let there = lab.path(".nfsvol/volumes/db");
    begun.is_err()
        && finished.is_none()
        && there.join("record.json").exists()
        && !there.join("removing").exists()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_removal_is_begun_by_name() {
    assert!(marks_only_its_own().await);
    let _back = put_back(Mutant::MarkedUnseen);
    assert!(!marks_only_its_own().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_is_not_taken_back_once_somebody_has_written() {
    let lab = Lab::new();
    let a = lab.host("a").await;
    let record = a.made("db", &[]).await;
    Catalog::check_unused(&a.admin, &record).await.unwrap();
    share::begin_removal(&a.admin, "a", &record).await.unwrap();
    fs::write(lab.path("db/file"), "data").unwrap();
    let used = Catalog::check_unused(&a.admin, &record).await.unwrap_err();
    assert!(matches!(used, CatalogError::Used(_)), "{used}");
    let home = Some(&a.admin);
    a.catalog.undo(home, &a.admin, &record, true).await;
    let there = lab.path(".nfsvol/volumes/db");
    assert!(there.join("record.json").exists() && !there.join("removing").exists());
    assert!(lab.path("db/file").exists());
}

/// Whether a Create that is taken back late leaves the volume of another host alone.
async fn undone_late() -> bool {
    let lab = Lab::new();
    let (a, b) = (lab.host("a").await, lab.host("b").await);
    let old = a.made("db", &[]).await;
    a.remove("db").await;
    b.made("db", &[]).await;
    let home = Some(&a.admin);
    a.catalog.undo(home, &a.admin, &old, false).await;
    lab.path("db").exists() && lab.path(".nfsvol/volumes/db/record.json").exists()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_is_taken_back_by_its_id() {
    assert!(undone_late().await);
    let _back = put_back(Mutant::UndoneByName);
    assert!(!undone_late().await);
}

/// A server whose numbers follow the path gives a directory another one when it is put in place.
async fn numbered_anew() -> Option<u64> {
    let lab = Lab::new();
    let a = lab.host("a").await;
    let record = a.made("db", &[]).await;
    let real = record.made.unwrap();
    let aside = layout::tmp().join(&format!("{}.data", record.id));
    fs::rename(lab.path("db"), lab.path(aside.as_str())).unwrap();
    let before = Record {
        made: Some(real + 1),
        ..(*record).clone()
    };
    match data::place(&a.admin, &before).await.unwrap() {
        data::Placed::Remade(number) => (number == real).then_some(number),
        data::Placed::There | data::Placed::Found => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_is_known_by_the_number_that_it_has_in_place() {
    assert!(numbered_anew().await.is_some());
    let _back = put_back(Mutant::FileIdOfBeforeTheRename);
    assert!(numbered_anew().await.is_none());
}
