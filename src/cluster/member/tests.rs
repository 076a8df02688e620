use std::fs;

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
    let there = export.path().join(".nfsvol/hosts/evil");
    fs::create_dir_all(&there).unwrap();
    let volume: VolumeName = "db".parse().unwrap();
    for (number, said, believed) in [(1, "evil", true), (2, "../../elsewhere", false)] {
        let doc = HostDoc {
            format: FORMAT,
            host: said.to_owned(),
            id: "other".to_owned(),
            boot: "other".to_owned(),
            session: "s".to_owned(),
            session_ms: 30_000,
            holds: BTreeMap::new(),
        };
        let file = export
            .path()
            .join(format!(".nfsvol/hosts/evil.{number}.json"));
        fs::write(file, serde_json::to_vec(&doc).unwrap()).unwrap();
        fs::write(there.join("alive.s.1"), "").unwrap();
        let held = member.holdings(&admin, &volume).await;
        match believed {
            true => assert!(held.unwrap().is_empty()),
            false => assert!(
                matches!(&held, Err(MemberError::Unclear(host)) if host == "evil"),
                "{held:?}"
            ),
        }
    }
}
