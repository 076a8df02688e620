//! What a server has torn, and what a host's copy can put back.

use super::*;
use crate::mutant::{self, Mutant};

impl Host {
    async fn torn(&self) -> Vec<String> {
        let torn = self.catalog.torn(&self.admin, None).await.unwrap();
        torn.into_iter().map(|(name, _)| name.to_string()).collect()
    }

    async fn put_back(&self, volume: &str, dry: bool) -> Result<(), CatalogError> {
        let (home, name) = (&self.admin, name(volume));
        self.catalog.put_back(home, home, &name, dry).await
    }
}

/// A host that has read all.
async fn follower(lab: &Lab, name: &str) -> Host {
    let host = lab.host(name).await;
    host.catalog.poll(&host.admin).await.unwrap();
    host
}

#[tokio::test(flavor = "multi_thread")]
async fn a_torn_record_is_put_back_by_a_host_that_has_read_it() {
    let lab = Lab::new();
    let a = lab.host("a").await;
    let record = a.made("db", &[("mode", "0750")]).await;
    a.made("whole", &[]).await;
    let (knows, file) = (
        follower(&lab, "b").await,
        lab.path(".nfsvol/volumes/db/record.json"),
    );
    for torn in [Some(""), Some("\0\0\0"), Some("{\"format\": 1,"), None] {
        match torn {
            Some(text) => fs::write(&file, text).unwrap(),
            None => fs::remove_file(&file).unwrap(),
        }
        let new = lab.host(&format!("new-{}", torn.map_or(9, str::len))).await;
        assert_eq!(new.torn().await, ["db"], "{torn:?}");
        let refused = new.put_back("db", false).await.unwrap_err().to_string();
        assert!(refused.contains("no copy"), "{refused}");
        let error = knows.catalog.fetch(&knows.admin, &name("db")).await;
        let error = error.unwrap_err().to_string();
        assert!(error.contains("nfsvol repair db"), "{error}");
        knows.put_back("db", true).await.unwrap();
        assert_eq!(knows.torn().await, ["db"], "only looked");
        knows.put_back("db", false).await.unwrap();
        assert!(knows.torn().await.is_empty());
        assert_eq!(new.look_up("db").await, Known::Here(record.clone()));
    }
}

/// What a host's lists warn of.
async fn warned_of(host: &Host) -> Vec<String> {
    let unread = host.catalog.unread().await;
    let told = unread.values().all(|why| why.contains("nfsvol repair"));
    assert!(told, "{unread:?}");
    unread.keys().map(ToString::to_string).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_is_warned_of_until_it_can() {
    let lab = Lab::new();
    let a = lab.host("a").await;
    a.made("db", &[]).await;
    a.made("web", &[]).await;
    let knows = follower(&lab, "b").await;
    let volume = lab.path(".nfsvol/volumes/db");
    fs::write(volume.join("record.json"), "").unwrap();
    fs::remove_file(lab.path(".nfsvol/volumes/web/record.json")).unwrap();
    // A host that has read neither; one that has is told when it reads one anew.
    let new = follower(&lab, "c").await;
    assert_eq!(warned_of(&new).await, ["db", "web"]);
    knows
        .catalog
        .fetch(&knows.admin, &name("db"))
        .await
        .unwrap_err();
    assert!(warned_of(&knows).await.contains(&"db".to_owned()));
    for volume in ["db", "web"] {
        knows.put_back(volume, false).await.unwrap();
    }
    new.catalog.poll(&new.admin).await.unwrap();
    knows.catalog.poll(&knows.admin).await.unwrap();
    for host in [&new, &knows] {
        assert_eq!(warned_of(host).await, [""; 0]);
    }
    // What is gone is not warned of either.
    fs::write(volume.join("record.json"), "").unwrap();
    new.catalog
        .fetch(&new.admin, &name("db"))
        .await
        .unwrap_err();
    fs::remove_dir_all(&volume).unwrap();
    new.catalog.poll(&new.admin).await.unwrap();
    assert_eq!(warned_of(&new).await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_removed_elsewhere_does_not_come_back() {
    let lab = Lab::new();
    let a = lab.host("a").await;
    a.made("db", &[]).await;
    let stale = follower(&lab, "b").await;
    let old = fs::read(lab.path(".nfsvol/volumes/db/record.json")).unwrap();
    a.remove("db").await;
    let only = name("db");
    let gone = stale.catalog.torn(&stale.admin, Some(&only)).await;
    assert!(matches!(gone, Err(CatalogError::Absent(_))), "{gone:?}");
    // Made anew, and then torn: what the stale host knows was another volume.
    a.made("db", &[]).await;
    let file = lab.path(".nfsvol/volumes/db/record.json");
    fs::write(&file, "").unwrap();
    let refused = stale.put_back("db", false).await.unwrap_err();
    assert!(matches!(refused, CatalogError::Unproven(_)), "{refused}");
    a.put_back("db", false).await.unwrap();
    assert_ne!(fs::read(&file).unwrap(), old);
    // The data is another directory by now: the server is not as it was.
    fs::write(&file, "").unwrap();
    fs::rename(lab.path("db"), lab.path("aside")).unwrap();
    fs::create_dir(lab.path("db")).unwrap();
    let refused = a.put_back("db", false).await.unwrap_err();
    assert!(matches!(refused, CatalogError::Unproven(_)), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_goes_on_with_a_record_that_was_put_back() {
    let lab = Lab::new();
    let a = lab.host("a").await;
    let record = a.made("db", &[]).await;
    removal::announce(&a.admin, &record.name, "1", &layout::remover("a", 1))
        .await
        .unwrap();
    removal::bind(&a.admin, &record.name, "1").await.unwrap();
    fs::write(lab.path(".nfsvol/volumes/db/record.json"), "").unwrap();
    a.put_back("db", false).await.unwrap();
    a.remove("db").await;
    assert!(a.names().is_empty() && !lab.path("db").exists());
}

async fn is_forgotten_without_a_record() -> bool {
    let lab = Lab::new();
    let a = lab.host("a").await;
    a.made("db", &[]).await;
    fs::remove_file(lab.path(".nfsvol/volumes/db/record.json")).unwrap();
    let _ = a.catalog.revalidate(&a.admin, &name("db")).await;
    a.catalog.get(&name("db")).is_none()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_without_its_record_is_not_forgotten() {
    assert!(!is_forgotten_without_a_record().await);
    let _back = mutant::put_back(Mutant::NoRecordNoVolume);
    assert!(is_forgotten_without_a_record().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_torn_format_file_is_put_back_where_the_share_is_known() {
    let lab = Lab::new();
    let a = lab.host("a").await;
    a.made("db", &[]).await;
    let file = lab.path(".nfsvol/format.json");
    let whole = fs::read(&file).unwrap();
    fs::write(&file, "").unwrap();
    let error = a.create("web", &[]).await.unwrap_err().to_string();
    assert!(error.contains("nfsvol repair"), "{error}");
    assert!(a.catalog.repair_format(&a.admin, true).await.unwrap());
    assert!(a.catalog.repair_format(&a.admin, false).await.unwrap());
    assert!(!a.catalog.repair_format(&a.admin, false).await.unwrap());
    assert_eq!(fs::read(&file).unwrap(), whole);
    // Another share, on which nothing is as this host knows it.
    let other = Lab::new();
    other.host("x").await.made("db", &[]).await;
    fs::write(other.path(".nfsvol/format.json"), "").unwrap();
    let admin = Admin::mounted(
        "nas:/export".parse().unwrap(),
        other.export.path().to_owned(),
        AdminSettings::default(),
    );
    let refused = a.catalog.repair_format(&admin, false).await.unwrap_err();
    assert!(matches!(refused, CatalogError::Unproven(_)), "{refused}");
}

/// Whether the record of a restored volume is put back by a daemon that has been started anew since.
async fn is_put_back_after_a_restore() -> bool {
    let lab = Lab::new();
    let host = lab.host("a").await;
    host.made("db", &[]).await;
    host.remove("db").await;
    host.restore("db", Some("web")).await.unwrap();
    host.catalog.poll(&host.admin).await.unwrap();
    let host = lab.host("a").await;
    fs::write(lab.path(".nfsvol/volumes/web/record.json"), "").unwrap();
    host.put_back("web", false).await.is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_volume_is_known_by_its_directory() {
    assert!(is_put_back_after_a_restore().await);
    let _back = mutant::put_back(Mutant::DirectoriesAreForgotten);
    assert!(!is_put_back_after_a_restore().await);
}
