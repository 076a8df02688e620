//! What comes back from the trash.

use super::restore;
use super::*;
use crate::mutant::{Mutant, put_back};

impl Lab {
    /// The directory of the only restore in the only entry.
    fn restoring(&self) -> PathBuf {
        let entry = self
            .path(".nfsvol/trash")
            .join(self.entries().pop().unwrap());
        let entries = fs::read_dir(entry).unwrap();
        let mut paths = entries.map(|entry| entry.unwrap().path());
        paths.find(|path| path.join("from").exists()).unwrap()
    }

    /// What lies in a volume's directory of the catalog.
    fn files_of(&self, volume: &str) -> Vec<String> {
        let files = fs::read_dir(self.path(&format!(".nfsvol/volumes/{volume}"))).unwrap();
        files
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .collect()
    }
}

/// A restore under the name `y`, cut off after its `steps`.
async fn cut_off(host: &Host, entry: &TrashEntry, steps: usize) {
    let record = restore::renamed(&entry.record, &name("y")).unwrap();
    host.is_cut_off(entry, record, layout::RESTORING, steps)
        .await;
}

/// A host that has removed the volume `x`, which had a file in it; and its entry in the trash.
async fn removed_with_data(lab: &Lab) -> (Host, TrashEntry) {
    let host = lab.host("a").await;
    host.made("x", &[]).await;
    fs::write(lab.path("x/file"), "data").unwrap();
    host.remove("x").await;
    let entry = host.catalog.find_in_trash(&host.admin, "x").await;
    (host, entry.unwrap())
}

/// A restore under another name is cut off after its `steps`; whether what was removed comes back.
async fn restored_after_a_cut(steps: usize, as_name: Option<&str>) -> Result<(), CatalogError> {
    let lab = Lab::new();
    let (host, entry) = removed_with_data(&lab).await;
    cut_off(&host, &entry, steps).await;
    assert_eq!(host.catalog.trash(&host.admin).await?.len(), 1);
    // Another one, which was cut off as well.
    let entry = host.catalog.find_in_trash(&host.admin, "x").await?;
    cut_off(&host, &entry, steps.min(2)).await;
    let restored = host.restore("x", as_name).await?;
    let file = lab.path(restored.data_dir.as_str()).join("file");
    assert_eq!(fs::read_to_string(file).unwrap(), "data");
    assert_eq!(restored.name.as_str(), as_name.unwrap_or("x"));
    let known = lab.host("b").await.look_up(restored.name.as_str()).await;
    assert_eq!(known, Known::Here(restored));
    assert_eq!(lab.entries(), Vec::<String>::new());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_under_another_name_that_was_cut_off_loses_nothing() {
    for steps in 0..=3 {
        for as_name in [None, Some("y"), Some("z")] {
            let restored = restored_after_a_cut(steps, as_name).await;
            restored.unwrap_or_else(|error| panic!("{steps} {as_name:?}: {error}"));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_restores_one_has_the_volume_and_the_other_is_told() {
    for steps in 0..=3 {
        let lab = Lab::new();
        let b = lab.host("b").await;
        let (a, entry) = removed_with_data(&lab).await;
        cut_off(&b, &entry, steps).await;
        let late = a.catalog.restore(&a.admin, &a.admin, &entry, None).await;
        let told = matches!(late, Err(CatalogError::RestoredElsewhere(_)));
        assert!(told || steps == 0, "{steps}: {late:?}");
        if told {
            a.restore("x", None).await.unwrap();
        }
        assert!(lab.path("x/file").exists() && !lab.path("y").exists());
        assert_eq!(lab.entries(), Vec::<String>::new());
    }
}

/// Where a retained volume has its data after a restore under another name.
async fn retained_under_another_name() -> Result<String, CatalogError> {
    let lab = Lab::new();
    let host = lab.host("a").await;
    host.made("x", &[("on_remove", "retain")]).await;
    host.remove("x").await;
    let restored = host.restore("x", Some("y")).await?;
    let known = lab.host("b").await.look_up("y").await;
    assert_eq!(known, Known::Here(restored.clone()));
    assert!(lab.path("x").exists() && !lab.path("y").exists());
    Ok(restored.data_dir.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_retained_is_found_where_it_is() {
    assert_eq!(retained_under_another_name().await.unwrap(), "x");
    let _back = put_back(Mutant::RetainedMovesByName);
    let lost = retained_under_another_name().await.unwrap_err();
    assert!(matches!(lost, CatalogError::DataGone { .. }), "{lost}");
}

/// One restore has found where another one has put the data, and moves it only when a third one has the
/// entry and has made a volume of it. Whether that volume keeps its data.
async fn data_stays_with_the_volume() -> bool {
    let lab = Lab::new();
    let b = lab.host("b").await;
    let (a, entry) = removed_with_data(&lab).await;
    cut_off(&b, &entry, 3).await;
    let entry = a.catalog.find_in_trash(&a.admin, "x").await.unwrap();
    let record = restore::renamed(&entry.record, &name("z")).unwrap();
    let slow = a.takes(&entry, record, layout::RESTORING).await;
    slow.note().await.unwrap();
    let place = slow.elsewhere(&a.catalog).await.unwrap().unwrap();
    let entry = b.catalog.find_in_trash(&b.admin, "x").await.unwrap();
    let record = restore::renamed(&entry.record, &name("y")).unwrap();
    let mut third = b.takes(&entry, record, layout::RESTORING).await;
    third.note().await.unwrap();
    third.bring_data(&b.catalog).await.unwrap();
    third.publish().await.unwrap();
    let late = slow.fetch(&a.catalog, &place).await;
    let told = matches!(late, Err(CatalogError::RestoredElsewhere(_)));
    told && lab.path("y/file").exists()
}

/// One restore has found where one that was cut off has put the data, and moves it only when another host has
/// made a volume there. Whether that volume keeps its data.
async fn data_stays_with_a_new_volume() -> bool {
    let lab = Lab::new();
    let b = lab.host("b").await;
    let (a, entry) = removed_with_data(&lab).await;
    cut_off(&b, &entry, 3).await;
    let entry = a.catalog.find_in_trash(&a.admin, "x").await.unwrap();
    let record = restore::renamed(&entry.record, &name("z")).unwrap();
    let slow = a.takes(&entry, record, layout::RESTORING).await;
    slow.note().await.unwrap();
    let place = slow.elsewhere(&a.catalog).await.unwrap().unwrap();
    b.made(place.as_str(), &[]).await;
    let late = slow.fetch(&a.catalog, &place).await;
    let told = matches!(late, Err(CatalogError::PathTaken { .. }));
    told && lab.path(place.as_str()).join("file").exists()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_late_restore_takes_a_new_volumes_data_away() {
    assert!(data_stays_with_a_new_volume().await);
    let _back = put_back(Mutant::PlacesAreAskedForFirst);
    assert!(!data_stays_with_a_new_volume().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_late_restore_takes_a_volumes_data_away() {
    assert!(data_stays_with_the_volume().await);
    let _back = put_back(Mutant::DataIsFetchedFromVolumes);
    assert!(!data_stays_with_the_volume().await);
}

/// A restore goes on although the server has forgotten that the data was moved; whether it tells so, and
/// the next one brings all of it.
async fn forgotten_data_comes_back() -> bool {
    let lab = Lab::new();
    let (host, entry) = removed_with_data(&lab).await;
    let restoring = host
        .takes(&entry, entry.record.clone(), layout::RESTORING)
        .await;
    restoring.note().await.unwrap();
    let told = restoring.publish().await.is_err();
    told && host.restore("x", None).await.is_ok() && lab.path("x/file").exists()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_forgot_of_a_restore_is_seen() {
    assert!(forgotten_data_comes_back().await);
    let _back = put_back(Mutant::RestoredUnseen);
    assert!(!forgotten_data_comes_back().await);
}

/// A restore goes on although the server has forgotten its record, or has torn it; whether it tells so, and
/// the next one brings all of it.
async fn forgotten_record_comes_back(torn: Option<&str>) -> bool {
    let lab = Lab::new();
    let (host, entry) = removed_with_data(&lab).await;
    let restoring = host
        .takes(&entry, entry.record.clone(), layout::RESTORING)
        .await;
    if let Some(torn) = torn {
        fs::write(lab.restoring().join("record.json"), torn).unwrap();
    }
    let told = restoring.publish().await.is_err();
    told && host.restore("x", None).await.is_ok()
        && lab.path("x/file").exists()
        && lab.files_of("x") == ["record.json"]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_whose_record_a_server_forgot_loses_nothing() {
    for torn in [None, Some(""), Some("\0\0\0")] {
        assert!(forgotten_record_comes_back(torn).await, "{torn:?}");
    }
    let _back = put_back(Mutant::RestoreDeletesFirst);
    assert!(!forgotten_record_comes_back(None).await);
}

/// The server has forgotten that the entry was taken; whether nothing of it is left in the trash.
async fn forgotten_entry_is_taken_again() -> bool {
    let lab = Lab::new();
    let host = lab.host("a").await;
    host.made("x", &[]).await;
    host.remove("x").await;
    let entry = host.catalog.find_in_trash(&host.admin, "x").await.unwrap();
    let mut restoring = host
        .takes(&entry, entry.record.clone(), layout::RESTORING)
        .await;
    let dir = lab.restoring();
    let place = dir.with_file_name("volume");
    fs::rename(dir.join("from"), &place).unwrap();
    restoring.note().await.unwrap();
    restoring.bring_data(&host.catalog).await.unwrap();
    restoring.publish().await.unwrap();
    assert_eq!(lab.files_of("x"), ["record.json"]);
    !place.exists()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_restored_volume_stays_in_the_trash_as_well() {
    assert!(forgotten_entry_is_taken_again().await);
    let _back = put_back(Mutant::RestoredUnseen);
    assert!(!forgotten_entry_is_taken_again().await);
}

/// The server has forgotten that claims were brought out of what was taken; whether the restore tells so, and
/// the next one brings all of it.
async fn forgotten_claims_come_back() -> bool {
    let lab = Lab::new();
    let host = lab.host("a").await;
    let record = host.made("x", &[("access", "exclusive")]).await;
    let claims = format!("claims.{}", record.id);
    fs::create_dir_all(lab.path(".nfsvol/volumes/x").join(&claims).join("7")).unwrap();
    host.remove("x").await;
    let entry = host.catalog.find_in_trash(&host.admin, "x").await.unwrap();
    let mut restoring = host
        .takes(&entry, entry.record.clone(), layout::RESTORING)
        .await;
    restoring.note().await.unwrap();
    restoring.bring_data(&host.catalog).await.unwrap();
    let claimed = restoring.bring_claims().await.unwrap();
    let dir = lab.restoring();
    fs::rename(dir.join(&claims), dir.join("from").join(&claims)).unwrap();
    let told = restoring.put_in_place(claimed).await.is_err();
    let again = host.restore("x", None).await;
    told && again.is_ok()
        && lab
            .path(".nfsvol/volumes/x")
            .join(claims)
            .join("7")
            .exists()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_whose_claims_a_server_forgot_brings_them_again() {
    assert!(forgotten_claims_come_back().await);
    let _back = put_back(Mutant::RestoredUnseen);
    assert!(!forgotten_claims_come_back().await);
}

/// A restore that is stopped when it has published leaves what it has taken beside the record: that is
/// deleted when it is old, if the record can be read, and is in nobody's way before.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_restore_has_taken_is_swept_or_harmless() {
    let lab = Lab::new();
    let host = lab.host("a").await;
    host.made("x", &[]).await;
    fs::write(lab.path("x/file"), "data").unwrap();
    let (volume, record) = (
        lab.path(".nfsvol/volumes/x"),
        lab.path(".nfsvol/volumes/x/record.json"),
    );
    let leave = || {
        fs::create_dir_all(volume.join("from/removing/by.1.a")).unwrap();
        fs::copy(&record, volume.join("from/record.json")).unwrap();
    };
    leave();
    host.remove("x").await;
    host.restore("x", Some("y")).await.unwrap();
    assert_eq!(lab.files_of("y"), ["record.json"]);
    host.remove("y").await;
    host.restore("y", Some("x")).await.unwrap();

    leave();
    let whole = fs::read(&record).unwrap();
    for (contents, stays) in [(&b"torn"[..], true), (&whole[..], false)] {
        fs::write(&record, contents).unwrap();
        make_old(&volume.join("from"));
        make_old(&volume);
        host.catalog.sweep(&host.admin).await.unwrap();
        assert_eq!(volume.join("from").exists(), stays);
    }
    assert_eq!(lab.files_of("x"), ["record.json"]);
    assert!(lab.path("x/file").exists());
}

/// The claims that an exclusive volume has after a restore, which came after so many that were cut off
/// when the last of them had brought the claims. It was restored before, and a slow host has made its claim in
/// what was taken then.
fn restored_claims(cuts: usize, beside: Option<&str>) -> Vec<String> {
    // On this thread, for what is put back.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let lab = Lab::new();
        let host = lab.host("a").await;
        let record = host.made("x", &[("access", "exclusive")]).await;
        let claims = format!("claims.{}", record.id);
        let claims = |at: &str| lab.path(at).join(&claims);
        fs::create_dir_all(claims(".nfsvol/volumes/x").join("7")).unwrap();
        if let Some(epoch) = beside {
            fs::create_dir_all(claims(".nfsvol/volumes/x/from").join(epoch)).unwrap();
        }
        host.remove("x").await;
        for cut in 0..cuts {
            let entry = host.catalog.find_in_trash(&host.admin, "x").await.unwrap();
            let restoring = host
                .takes(&entry, entry.record.clone(), layout::RESTORING)
                .await;
            restoring.note().await.unwrap();
            if cut > 0 {
                restoring.bring_claims().await.unwrap();
            }
        }
        host.restore("x", Some("y")).await.unwrap();
        assert_eq!(lab.entries(), Vec::<String>::new());
        let epochs = fs::read_dir(claims(".nfsvol/volumes/y"));
        let epochs = epochs.map(|epochs| epochs.map(|epoch| epoch.unwrap().file_name()));
        let epochs = epochs.map(|names| names.map(|name| name.into_string().unwrap()));
        epochs.map(Iterator::collect).unwrap_or_default()
    })
}

#[test]
fn a_restored_volume_keeps_its_claims() {
    for cuts in 0..=3 {
        for beside in [None, Some("1")] {
            assert_eq!(restored_claims(cuts, beside), ["7"], "{cuts} {beside:?}");
        }
    }
    let _back = put_back(Mutant::RestoredClaimsBeginAnew);
    assert!(
        restored_claims(0, None).is_empty(),
        "not found when it is put back"
    );
}

/// The time of the remover is found wherever a restore that was cut off has taken it.
#[tokio::test(flavor = "multi_thread")]
async fn an_entry_that_a_restore_has_taken_goes_when_it_is_old() {
    let lab = Lab::new();
    let host = lab.host("a").await;
    host.made("db", &[]).await;
    host.remove("db").await;
    for _ in 0..2 {
        let entry = host.catalog.find_in_trash(&host.admin, "db").await.unwrap();
        let before = trash::removers_time(&host.admin, &entry).await.unwrap();
        assert!(before.is_some());
        cut_off(&host, &entry, 2).await;
    }
    let entry = host.catalog.find_in_trash(&host.admin, "db").await.unwrap();
    let taken = trash::removers_time(&host.admin, &entry).await.unwrap();
    assert!(taken.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_restore_takes_what_another_volume_has_found_meanwhile() {
    let lab = Lab::new();
    let (host, entry) = removed_with_data(&lab).await;
    cut_off(&host, &entry, 3).await;
    lab.host("b").await.made("y", &[]).await;
    let refused = host.restore("x", None).await.unwrap_err();
    assert!(
        matches!(refused, CatalogError::PathTaken { .. }),
        "{refused}"
    );
    assert!(lab.path("y/file").exists());
}

/// A restore of which the server has forgotten a part is held up before it puts that back, while another host
/// removes the volume and makes another one of its name; whether that is left alone.
async fn only_its_own_is_put_back() -> bool {
    let lab = Lab::new();
    let (host, entry) = removed_with_data(&lab).await;
    let restoring = host
        .takes(&entry, entry.record.clone(), layout::RESTORING)
        .await;
    restoring.note().await.unwrap();
    // Published, with the data in the trash still.
    fs::rename(lab.restoring(), lab.path(".nfsvol/volumes/x")).unwrap();
    let b = lab.host("b").await;
    b.remove("x").await;
    let new = b.made("x", &[]).await;
    let volume = layout::volume(&new.name);
    let late = restoring.put_back(&volume, false).await;
    assert!(late.is_err(), "{late:?}");
    b.look_up("x").await == Known::Here(new) && lab.path(".nfsvol/volumes/x/record.json").exists()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_host_has_made_meanwhile_is_not_put_back() {
    assert!(only_its_own_is_put_back().await);
    let _back = put_back(Mutant::PutBackUnseen);
    assert!(!only_its_own_is_put_back().await);
}

/// What another volume was restored from is not deleted by a restore that is late.
#[tokio::test(flavor = "multi_thread")]
async fn only_what_it_has_taken_itself_is_deleted() {
    let lab = Lab::new();
    let (host, entry) = removed_with_data(&lab).await;
    let other = host.made("y", &[]).await;
    let from = lab.path(".nfsvol/volumes/y/from");
    fs::create_dir(&from).unwrap();
    fs::copy(from.with_file_name("record.json"), from.join("record.json")).unwrap();
    let volume = layout::volume(&other.name);
    for (record, stays) in [(&entry.record, true), (other.as_ref(), false)] {
        let deleted = restore::delete_taken(&host.admin, &volume, record, &|| true);
        deleted.await.unwrap();
        assert_eq!(from.exists(), stays);
    }
    assert_eq!(fs::read_dir(lab.path(".nfsvol/tmp")).unwrap().count(), 0);
}
