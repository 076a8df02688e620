use std::fs;
use std::path::Path;

use super::*;
use crate::nfs::admin::{Admin, AdminSettings};

struct Still;

impl Env for Still {
    fn now(&self) -> Duration {
        Duration::from_secs(1000)
    }

    fn nonce(&self) -> String {
        "1".to_owned()
    }
}

/// The document of a host that holds `volumes`, as it lies on the share.
fn write(export: &Path, file: &str, host: &str, volumes: &[&VolumeName]) {
    let hold = |name: &&VolumeName| {
        let hold = Hold {
            nonce: "n".to_owned(),
            access: Access::default(),
            since: 0,
            holders: Vec::new(),
        };
        ((*name).clone(), hold)
    };
    let doc = HostDoc {
        format: FORMAT,
        host: host.to_owned(),
        id: "other".to_owned(),
        boot: "other".to_owned(),
        session: "s".to_owned(),
        session_ms: 30_000,
        holds: volumes.iter().map(hold).collect(),
    };
    let (name, _) = file.split_once('.').unwrap();
    let hosts = export.join(".nfsvol/hosts");
    fs::create_dir_all(hosts.join(name)).unwrap();
    fs::write(hosts.join(name).join("alive.s.1"), "").unwrap();
    fs::write(hosts.join(file), serde_json::to_vec(&doc).unwrap()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_speaks_for_the_host_of_its_name_only() {
    let export = tempfile::tempdir().unwrap();
    let share = "nas:/export".parse().unwrap();
    let admin = Admin::mounted(share, export.path().to_owned(), AdminSettings::default());
    let host = Host {
        name: "here".to_owned(),
        id: "id".to_owned(),
        boot: "boot".to_owned(),
    };
    let member = Member::new(host, Times::new(Duration::from_secs(30)), Still, []);
    let [db, web]: [VolumeName; 2] = ["db", "web"].map(|name| name.parse().unwrap());

    write(export.path(), "evil.1.json", "evil", &[]);
    assert!(member.holdings(&admin, &db).await.unwrap().is_empty());

    // What it holds is not known now, so nothing may be removed; the others are heard all the same.
    write(export.path(), "evil.2.json", "../../elsewhere", &[]);
    write(export.path(), "other.1.json", "other", &[&web]);
    let unreadable = |error| matches!(error, MemberError::Unreadable(host) if host == "evil");
    assert!(unreadable(member.look(&admin).await.unwrap_err()));
    assert!(unreadable(member.holdings(&admin, &db).await.unwrap_err()));
    let others = member.others().await;
    assert_eq!(others.len(), 1, "{others:?}");
    assert!(others[0].doc.holds.contains_key(&web));

    // As the error says.
    for left in ["evil.1.json", "evil.2.json"] {
        fs::remove_file(export.path().join(".nfsvol/hosts").join(left)).unwrap();
    }
    fs::remove_dir_all(export.path().join(".nfsvol/hosts/evil")).unwrap();
    let held = member.holdings(&admin, &web).await.unwrap();
    assert_eq!(held.len(), 1, "{held:?}");
    assert_eq!(held[0].host, "other");
}
