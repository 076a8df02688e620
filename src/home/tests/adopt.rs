//! Volumes of directories that are there.

use super::*;

async fn adopt(
    host: &Host,
    volume: &str,
    given: &[(&str, &str)],
    how: (bool, bool),
) -> Result<Adopted, CatalogError> {
    let (home, options) = (Some(&host.admin), options(given));
    host.catalog
        .adopt(
            home,
            &host.admin,
            &name(volume),
            &options,
            OnRemove::Delete,
            how,
        )
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adopted_directory_keeps_its_data_through_everything() {
    let lab = Lab::new();
    let (a, b) = (lab.host("a").await, lab.host("b").await);
    fs::create_dir_all(lab.path("apps/db")).unwrap();
    fs::write(lab.path("apps/db/file"), "kept").unwrap();
    let given = [("subdir", "apps/db"), ("uid", "999")];

    // Only looked at: nothing of it is there.
    assert_eq!(
        adopt(&a, "db", &given, (false, true)).await.unwrap(),
        Adopted::New(None)
    );
    assert_eq!(b.look_up("db").await, Known::Absent);

    let Adopted::New(Some(record)) = adopt(&a, "db", &given, (false, false)).await.unwrap() else {
        panic!("it was not there");
    };
    assert_eq!(record.made, None);
    assert_eq!(b.look_up("db").await, Known::Here(record.clone()));
    let again = adopt(&b, "db", &[("subdir", "apps/db")], (false, false)).await;
    assert_eq!(again.unwrap(), Adopted::Existing(record));
    let owner = std::os::unix::fs::MetadataExt::uid(&fs::metadata(lab.path("apps/db")).unwrap());
    assert_ne!(owner, 999, "options are not applied to it");

    // Even where the default is to delete.
    b.remove("db").await;
    assert_eq!(fs::read(lab.path("apps/db/file")).unwrap(), b"kept");
    assert_eq!(b.look_up("db").await, Known::Absent);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_is_absent_or_anothers_is_refused_with_the_reason() {
    let lab = Lab::new();
    let a = lab.host("a").await;
    a.made("web", &[]).await;
    fs::create_dir_all(lab.path("web/below")).unwrap();
    fs::create_dir_all(lab.path("apps/db")).unwrap();
    fs::write(lab.path("file"), "").unwrap();
    std::os::unix::fs::symlink("/etc", lab.path("link")).unwrap();

    for (volume, dir, reason) in [
        ("db", "absent", "there is no directory absent"),
        ("db", "file", "not a directory"),
        ("db", "link", "not a directory"),
        (
            "db",
            "web/below",
            "overlaps with web, the directory of volume web",
        ),
        ("other", "web", "overlaps with web"),
        (
            "web",
            "apps/db",
            "web exists with other options (subdir is not set",
        ),
    ] {
        for dry_run in [true, false] {
            let refused = adopt(&a, volume, &[("subdir", dir)], (false, dry_run)).await;
            let text = refused.unwrap_err().to_string();
            assert!(text.contains(reason), "{dir}, dry run {dry_run}: {text}");
        }
    }
    assert_eq!(a.names(), ["web"]);
    assert!(!lab.path("absent").exists());

    // As two volumes of the `local` driver may have one directory.
    let shared = adopt(&a, "below", &[("subdir", "web/below")], (true, false)).await;
    assert!(matches!(shared, Ok(Adopted::New(Some(_)))), "{shared:?}");
    a.remove("web").await;
    assert!(lab.path("web/below").is_dir(), "another volume uses it");
}
