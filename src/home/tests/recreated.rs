//! Volumes that are removed and made anew with other options.

use super::*;
use crate::mutant::{Mutant, put_back};

const OTHER: &[(&str, &str)] = &[("options", "nconnect=4"), ("mode", "0700")];

/// A host that has removed the volume `x`, which had a file in it.
async fn removed(lab: &Lab, given: &[(&str, &str)]) -> Host {
    let host = lab.host("a").await;
    host.made("x", given).await;
    fs::write(lab.path("x/file"), "data").unwrap();
    host.remove("x").await;
    host
}

impl Lab {
    fn has_data(&self) -> bool {
        fs::read_to_string(self.path("x/file")).is_ok_and(|text| text == "data")
    }
}

impl Host {
    async fn recreated(&self, given: &[(&str, &str)]) -> Arc<Record> {
        match self.create("x", given).await.unwrap() {
            Creation::Recreated(record) => record,
            other => panic!("{other:?}"),
        }
    }

    async fn entry(&self) -> TrashEntry {
        let found = self.catalog.find_in_trash(&self.admin, "x").await;
        found.unwrap()
    }

    /// The volume `x` is about to be made anew with these options, cut off after its `steps`.
    async fn cut_off(&self, given: &[(&str, &str)], steps: usize) {
        let entry = self.entry().await;
        let options = options(given);
        let record = Record {
            on_remove: options.on_remove.unwrap_or_default(),
            options,
            recreated: Some(entry.removed.clone()),
            ..entry.record.clone()
        };
        self.is_cut_off(&entry, record, layout::RECREATING, steps)
            .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_options_keep_the_data() {
    let lab = Lab::new();
    let host = removed(&lab, &[]).await;
    let entry = host.entry().await;
    let record = host.recreated(OTHER).await;
    assert!(lab.has_data());
    assert_eq!(record.id, entry.record.id);
    assert_eq!(record.options, options(OTHER));
    assert_eq!(record.recreated, Some(entry.removed));
    // It is found, so its mode is what it was.
    let mode = std::os::unix::fs::MetadataExt::mode(&fs::metadata(lab.path("x")).unwrap());
    assert_eq!(mode & 0o7777, 0o755);
    assert_eq!(lab.entries(), Vec::<String>::new());
    assert_eq!(fs::read_dir(lab.path(".nfsvol/tmp")).unwrap().count(), 0);
    let b = lab.host("b").await;
    assert_eq!(b.look_up("x").await, Known::Here(record.clone()));
    assert_eq!(
        b.create("x", OTHER).await.unwrap(),
        Creation::Existing(record)
    );
    // And so on.
    b.remove("x").await;
    b.recreated(&[("on_remove", "retain")]).await;
    assert!(lab.has_data());
    b.remove("x").await;
    // What is retained is where it was.
    assert!(
        matches!(b.create("x", &[]).await.unwrap(), Creation::New(found) if found.made.is_none())
    );
    assert!(lab.has_data());
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_options_make_an_empty_volume_and_the_last_removal_counts() {
    let lab = Lab::new();
    let host = removed(&lab, &[]).await;
    let before = host.entry().await;
    host.made("x", &[("uid", "0")]).await;
    assert_eq!(fs::read_dir(lab.path("x")).unwrap().count(), 0);
    fs::write(lab.path("x/file"), "new").unwrap();
    host.remove("x").await;
    host.recreated(OTHER).await;
    assert_eq!(fs::read_to_string(lab.path("x/file")).unwrap(), "new");
    assert_eq!(lab.entries(), [before.entry]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_a_change_of_options_is_a_new_volume() {
    let subdir: &[(&str, &str)] = &[("subdir", "other"), ("mode", "0700")];
    for (before, after) in [
        (&[][..], subdir),
        (&[("subdir", "other")], OTHER),
        // Its data is about to be deleted.
        (&[("on_remove", "delete"), ("subdir", "x")], OTHER),
    ] {
        let lab = Lab::new();
        let host = lab.host("a").await;
        host.made("x", before).await;
        host.remove("x").await;
        let made = host.made("x", after).await;
        assert_eq!(made.recreated, None, "{before:?} {after:?}");
        assert_eq!(lab.entries().len(), 1, "{before:?} {after:?}");
    }
    let lab = Lab::new();
    let host = removed(&lab, &[]).await;
    fs::create_dir(lab.path("x")).unwrap();
    assert_eq!(
        host.made("x", OTHER).await.made,
        None,
        "somebody's directory"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_removed_long_ago_stays_in_the_trash() {
    for (minutes, is_back) in [(9, true), (11, false)] {
        let lab = Lab::new();
        let host = removed(&lab, &[]).await;
        let entry = host.entry().await;
        let before = TrashName::at(&entry.record, entry.removed_secs - minutes * 60);
        let trash = lab.path(".nfsvol/trash");
        fs::rename(trash.join(&entry.entry), trash.join(before.entry())).unwrap();
        let made = host.create("x", OTHER).await.unwrap();
        assert_eq!(matches!(made, Creation::Recreated(_)), is_back);
        assert_eq!(lab.has_data(), is_back);
        assert_eq!(lab.entries().len(), usize::from(!is_back));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_may_be_set_to_make_it_empty_or_to_refuse() {
    let lab = Lab::new();
    let mut host = removed(&lab, &[]).await;
    host.catalog = host.catalog.recreating(Recreate::Refuse);
    let entry = host.entry().await.entry;
    let refused = host.create("x", OTHER).await.unwrap_err().to_string();
    for said in [
        "--recreate refuse",
        &entry,
        "mode is not set",
        "nfsvol restore",
    ] {
        assert!(refused.contains(said), "{said}: {refused}");
    }
    assert_eq!(lab.entries(), [entry]);
    assert!(!lab.path("x").exists());
    assert_eq!(fs::read_dir(lab.path(".nfsvol/tmp")).unwrap().count(), 0);
    host.catalog = host.catalog.recreating(Recreate::Empty);
    host.made("x", OTHER).await;
    assert_eq!(fs::read_dir(lab.path("x")).unwrap().count(), 0);
    host.catalog = host.catalog.recreating(Recreate::Refuse);
    host.remove("x").await;
    host.made("x", OTHER).await;
}

/// A volume is made anew with other options after a Create that did so was cut off; whether its data is back.
async fn back_after_a_cut(steps: usize, given: &[(&str, &str)]) -> bool {
    let lab = Lab::new();
    let host = removed(&lab, &[]).await;
    host.cut_off(OTHER, steps).await;
    host.cut_off(OTHER, steps.min(2)).await;
    let b = lab.host("b").await;
    let made = b.create("x", given).await.unwrap();
    let is_recreated =
        matches!(&made, Creation::Recreated(record) if record.options == options(given));
    is_recreated && lab.has_data() && lab.entries().is_empty()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recreate_that_was_cut_off_is_gone_on_with() {
    for steps in 1..=3 {
        // The second one has changed its mind.
        for given in [OTHER, &[]] {
            assert!(back_after_a_cut(steps, given).await, "{steps} {given:?}");
        }
    }
    let _back = put_back(Mutant::RecreatesBeginAnew);
    assert!(!back_after_a_cut(2, OTHER).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recreate_that_was_cut_off_can_be_restored() {
    for steps in 1..=3 {
        let lab = Lab::new();
        let host = removed(&lab, &[]).await;
        host.cut_off(&[("on_remove", "retain")], steps).await;
        host.restore("x", Some("y")).await.unwrap();
        let known = lab.host("b").await.look_up("y").await;
        let Known::Here(y) = known else {
            panic!("{known:?}")
        };
        let file = lab.path(y.data_dir.as_str()).join("file");
        assert_eq!(fs::read_to_string(file).unwrap(), "data");
    }
}

/// Whether the trash keeps a volume that is about to be made anew as one whose data is deleted at once.
async fn is_kept() -> bool {
    let lab = Lab::new();
    let host = removed(&lab, &[]).await;
    host.cut_off(&[("on_remove", "delete")], 2).await;
    let week = Duration::from_secs(7 * 86_400);
    let expired = host.catalog.expired(&host.admin, week).await.unwrap();
    expired.is_empty()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_to_be_deleted_later_is_not_deleted_on_its_way_back() {
    assert!(is_kept().await);
    let _back = put_back(Mutant::TakenIsDeletedAtOnce);
    assert!(!is_kept().await);
}

/// Another host has begun to restore the volume under another name; whether it can go on.
async fn leaves_a_restore_alone() -> bool {
    let lab = Lab::new();
    let host = removed(&lab, &[]).await;
    let entry = host.entry().await;
    let record = restore::renamed(&entry.record, &name("y")).unwrap();
    let restoring = host.takes(&entry, record, layout::RESTORING).await;
    let made = lab.host("b").await.create("x", OTHER).await.unwrap();
    assert_eq!(lab.has_data(), matches!(made, Creation::Recreated(_)));
    restoring.note().await.is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_restore_has_taken_is_left_to_it() {
    assert!(leaves_a_restore_alone().await);
    let _back = put_back(Mutant::RecreatesTakeRestores);
    assert!(!leaves_a_restore_alone().await);
}

/// The claims of an exclusive volume that was a shared one for a while.
fn claims_after_a_while() -> Vec<String> {
    // On this thread, for what is put back.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let lab = Lab::new();
        let host = lab.host("a").await;
        let exclusive: &[(&str, &str)] = &[("access", "exclusive")];
        let record = host.made("x", exclusive).await;
        let claims = lab.path(&format!(".nfsvol/volumes/x/claims.{}", record.id));
        fs::create_dir_all(claims.join("7")).unwrap();
        for given in [&[][..], exclusive] {
            host.remove("x").await;
            host.recreated(given).await;
        }
        let epochs = fs::read_dir(claims).into_iter().flatten();
        let epochs = epochs.map(|epoch| epoch.unwrap().file_name().into_string().unwrap());
        epochs.collect()
    })
}

#[test]
fn an_exclusive_volume_keeps_its_claims() {
    assert_eq!(claims_after_a_while(), ["7"]);
    let _back = put_back(Mutant::RecreatedClaimsBeginAnew);
    assert!(claims_after_a_while().is_empty());
}

/// No other volume may write what is an exclusive one's, also when it becomes one: whether it lies in the
/// other's directory, or had its own at the top to itself when it was made.
#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_others_write_to_does_not_become_exclusive() {
    for (path, others) in [("app/x", "app"), ("x", "x")] {
        let lab = Lab::new();
        let host = lab.host("a").await;
        host.made("x", &[("subdir", path)]).await;
        let other = [("subdir", others)];
        if path == others {
            host.made("y", &other).await;
            host.remove("x").await;
        } else {
            host.remove("x").await;
            host.made("y", &other).await;
        }
        let given = [("subdir", path), ("access", "exclusive")];
        let refused = host.create("x", &given).await.unwrap_err();
        assert!(
            matches!(refused, CatalogError::Excluded { .. }),
            "{refused}"
        );
        assert_eq!(lab.entries().len(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_hosts_that_change_the_options_at_once_one_wins() {
    for same in [true, false] {
        let lab = Lab::new();
        drop(removed(&lab, &[]).await);
        let mut hosts = Vec::new();
        for i in 0..6 {
            hosts.push(lab.host(&format!("host{i}")).await);
        }
        let mut racing = tokio::task::JoinSet::new();
        for (i, host) in hosts.into_iter().enumerate() {
            let mode = if same || i % 2 == 0 { "0700" } else { "0750" };
            racing.spawn(async move { host.create("x", &[("mode", mode)]).await });
        }
        while let Some(raced) = racing.join_next().await {
            match raced.unwrap() {
                Ok(Creation::Recreated(_) | Creation::Existing(_)) => {}
                Err(CatalogError::Different { .. }) if !same => {}
                other => panic!("{other:?}"),
            }
        }
        assert!(lab.has_data());
        assert_eq!(lab.entries(), Vec::<String>::new());
    }
}
