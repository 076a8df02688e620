//! What a host's copy says while others change the share.

use super::*;
use crate::mutant::{self, Mutant};

/// Of a volume that is listed and torn, to a host that has never read it, while the share is silent.
async fn of_an_unread_volume() -> Known {
    let lab = Lab::new();
    lab.host("a").await.made("db", &[]).await;
    fs::write(lab.path(".nfsvol/volumes/db/record.json"), "").unwrap();
    let b = lab.host("b").await;
    b.catalog.poll(&b.admin).await.unwrap();
    b.catalog.look_up(None, &name("db"), soon()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_is_not_absent() {
    assert_eq!(of_an_unread_volume().await, Known::Unknown);
}

#[tokio::test]
async fn a_copy_that_takes_the_unread_for_absent_is_found_out() {
    let unread = [(name("db"), "torn".to_owned())].into_iter().collect();
    let state = sync::State::listed(unread);
    assert!(!state.tells_of(&name("db")) && state.tells_of(&name("web")));
    let _back = mutant::put_back(Mutant::UnreadIsAbsent);
    assert!(state.tells_of(&name("db")));
}

/// A volume is found absent, and made anew before that is noted: whether it is known then.
async fn knows_what_was_made_meanwhile() -> bool {
    let lab = Lab::new();
    let a = lab.host("a").await;
    a.made("db", &[]).await;
    let before = a.catalog.copies.get(&name("db"));
    a.remove("db").await;
    a.made("db", &[]).await;
    a.catalog
        .forget(before.as_ref(), &name("db"))
        .await
        .unwrap();
    a.catalog.get(&name("db")).is_some()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_made_meanwhile_is_not_forgotten() {
    assert!(knows_what_was_made_meanwhile().await);
    let _back = mutant::put_back(Mutant::ForgottenByName);
    assert!(!knows_what_was_made_meanwhile().await);
}

/// What a Get on a host tells of a volume that it knows and that another host has removed.
async fn told_of_a_removed_volume() -> Known {
    let lab = Lab::new();
    let (a, b) = (lab.host("a").await, lab.host("b").await);
    a.made("db", &[]).await;
    assert!(matches!(b.look_up("db").await, Known::Here(_)));
    a.remove("db").await;
    let db = name("db");
    b.catalog.confirm(Some(&b.admin), &db, soon()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_host_removed_is_not_told_of() {
    assert_eq!(told_of_a_removed_volume().await, Known::Absent);
    let _back = mutant::put_back(Mutant::KnownIsThere);
    assert!(matches!(told_of_a_removed_volume().await, Known::Here(_)));
}

/// What a Get tells of a known volume while the directory of all records is away.
async fn told_without_a_list() -> Known {
    let lab = Lab::new();
    let a = lab.host("a").await;
    a.made("db", &[]).await;
    fs::rename(lab.path(".nfsvol/volumes"), lab.path(".nfsvol/away")).unwrap();
    a.catalog.confirm(Some(&a.admin), &name("db"), soon()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_list_nothing_is_gone() {
    assert!(matches!(told_without_a_list().await, Known::Here(_)));
    let _back = mutant::put_back(Mutant::NoListNoVolume);
    assert_eq!(told_without_a_list().await, Known::Absent);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_share_leaves_what_is_known() {
    let lab = Lab::new();
    let a = lab.host("a").await;
    let (db, record) = (name("db"), a.made("db", &[]).await);
    let known = Known::Here(record);
    assert_eq!(a.catalog.confirm(None, &db, soon()).await, known);
    assert!(!a.catalog.is_confirmed(&db).await);

    assert_eq!(a.catalog.confirm(Some(&a.admin), &db, soon()).await, known);
    assert!(a.catalog.is_confirmed(&db).await);
    a.remove("db").await;
    assert!(!a.catalog.is_confirmed(&db).await);
}

fn aged(path: &Path, days: u64) {
    let then = std::time::SystemTime::now() - Duration::from_secs(days * 86_400 + 7200);
    fs::File::open(path).unwrap().set_modified(then).unwrap();
}

/// A host that was scrapped, one that is stopped for a week, and what a crash left in a volume.
#[tokio::test(flavor = "multi_thread")]
async fn hosts_that_are_no_more_are_forgotten() {
    let lab = Lab::new();
    let host = lab.host("a").await;
    host.made("db", &[]).await;
    for (name, days) in [("scrapped", 31), ("stopped", 7)] {
        let dir = lab.path(&format!(".nfsvol/hosts/{name}"));
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("ended.0123.7"), "").unwrap();
        let document = lab.path(&format!(".nfsvol/hosts/{name}.5.json"));
        fs::write(&document, "{}").unwrap();
        aged(&document, days);
        aged(&dir, days);
    }
    let left = lab.path(".nfsvol/volumes/db/.nfsvol-tmp-0123456789abcdef");
    fs::write(&left, "").unwrap();
    aged(&left, 0);
    aged(&lab.path(".nfsvol/volumes/db"), 0);
    assert_eq!(host.catalog.sweep(&host.admin).await.unwrap(), 3);
    assert!(!left.exists());
    let mut names: Vec<_> = fs::read_dir(lab.path(".nfsvol/hosts"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["stopped", "stopped.5.json"]);
}
