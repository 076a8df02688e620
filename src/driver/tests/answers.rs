//! What scripts read: the JSON of each of nfsvol's own calls, and of what Docker shows, whole.

use hyper::Method;
use serde_json::{Map, Value, json};

use super::*;
use crate::docker::route::{Call, Route};

/// Asks as the command line does.
async fn said(driver: &Driver, path: &str, body: Value) -> Value {
    let route = Route::find(&Method::POST, path).unwrap();
    let Call::Ask(question) = route.parse(body.to_string().as_bytes()).unwrap() else {
        panic!("{path} is none of nfsvol's own calls");
    };
    let reply = driver.ask(question).await.unwrap();
    serde_json::from_slice(&reply.0.unwrap()).unwrap()
}

/// What differs from run to run in words that do not.
fn plain(value: Value, lab: &Lab) -> Value {
    let constant = |key: &str, value: Value| match (key, &value) {
        ("rtt_ms" | "last_answer" | "bytes_total" | "bytes_available", Value::Number(_))
        | ("since" | "at" | "made" | "pid" | "epoch", Value::Number(_)) => json!(0),
        ("id", Value::String(id)) if id.len() == 32 => json!("RECORD"),
        ("entry", Value::String(_)) => json!("ENTRY"),
        ("created" | "removed", Value::String(_)) => json!("TIME"),
        _ => plain(value, lab),
    };
    match value {
        Value::Object(map) => {
            let fields = map.into_iter();
            let fields = fields.map(|(key, value)| (key.clone(), constant(&key, value)));
            Value::Object(fields.collect::<Map<_, _>>())
        }
        Value::Array(values) => values.into_iter().map(|v| constant("", v)).collect(),
        Value::String(text) => {
            let text = text.replace(&lab.export.path().display().to_string(), "EXPORT");
            let text = text.replace(&lab.state.path().display().to_string(), "STATE");
            text.replace(&lab.port.to_string(), "PORT").into()
        }
        other => other,
    }
}

const MOUNT_OPTIONS: &str = "hard,mountport=PORT,nodev,nosuid,port=PORT";

/// A host with two volumes, one of which is attached, and a removed one.
async fn host(lab: &Lab) -> Driver {
    let driver = Driver::open(Config {
        host: "one".to_owned(),
        data_path: DataPath::Fuse,
        session: Some(Duration::from_secs(30)),
        ..lab.config()
    })
    .unwrap();
    driver.made("db", &[("mode", "0750")]).await;
    driver.made("old", &[]).await;
    driver.remove_volume(&name("old")).await.unwrap();
    driver.made("web", &[("access", "readonly")]).await;
    let attached = attached();
    driver
        .host
        .attachments()
        .add(&name("db"), attached, "container")
        .unwrap();
    driver
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_are_listed_and_inspected_in_words_that_stay() {
    let Some(lab) = lab().await else { return };
    let driver = host(&lab).await;
    let lines = plain(said(&driver, "/Nfsvol.Ls", json!({})).await, &lab);
    let line = |name: &str, access: &str| {
        json!({
            "access": access,
            "attachments": 0,
            "created": "TIME",
            "created_by": "one",
            "data_dir": name,
            "held_by": "",
            "mount_options": MOUNT_OPTIONS,
            "mountpoint": null,
            "name": name,
            "on_remove": "trash",
            "share": "127.0.0.1:EXPORT",
            "warning": null,
        })
    };
    let mut db = line("db", "shared");
    db["attachments"] = json!(1);
    db["held_by"] = json!("one");
    db["mountpoint"] = json!("/nowhere");
    assert_eq!(lines, json!([db, line("web", "readonly")]));

    let ask = json!({ "Name": "web" });
    let web = plain(said(&driver, "/Nfsvol.Inspect", ask).await, &lab);
    let status = json!({
        "access": "readonly",
        "created_by": "one",
        "data_dir": "web",
        "data_dir_made_by_driver": true,
        "data_path": "fuse",
        "data_path_reason": "the daemon is set to it",
        "health": web["status"]["health"],
        "held_by_other_hosts": [],
        "mount_options": MOUNT_OPTIONS,
        "on_remove": "trash",
        "options": { "access": "readonly" },
        "scope": "global",
        "share": "127.0.0.1:EXPORT",
    });
    let inspected = json!({
        "created": "TIME",
        "mountpoint": null,
        "name": "web",
        "status": status,
    });
    assert_eq!(web, inspected);

    let ask = json!({ "Name": "db" });
    let db = plain(said(&driver, "/Nfsvol.Inspect", ask).await, &lab);
    let status = json!({
        "access": "shared",
        "address": null,
        "attachments": [{ "at": 0, "epoch": 0, "id": "container", "since": 0 }],
        "created_by": "one",
        "data_dir": "db",
        "data_dir_made_by_driver": true,
        "data_path": "fuse",
        "health": db["status"]["health"],
        "held_by_other_hosts": [],
        "holders": [],
        "mount_options": MOUNT_OPTIONS,
        "nfs_version": "3",
        "on_remove": "trash",
        "options": { "mode": "0750" },
        "scope": "global",
        "share": "127.0.0.1:EXPORT",
        "worker": "does not answer",
    });
    assert_eq!(db["status"], status);
    assert_eq!(db["mountpoint"], "/nowhere");

    let Lookup::Found(shown) = driver.get("db").await.unwrap() else {
        panic!("the volume is known");
    };
    let mut of_docker = plain(Value::Object(shown.status), &lab);
    of_docker["health"] = status["health"].clone();
    assert_eq!(of_docker, status);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_and_its_trash_are_told_in_words_that_stay() {
    let Some(lab) = lab().await else { return };
    let driver = host(&lab).await;
    let status = plain(said(&driver, "/Nfsvol.Status", json!({})).await, &lab);
    let share = json!({
        "health": {
            "address": "127.0.0.1",
            "healthy": true,
            "last_answer": 0,
            "rtt_ms": 0,
        },
        "home": true,
        "share": "127.0.0.1:EXPORT",
    });
    let expected = json!({
        "attachments": 1,
        "data_path": { "path": "fuse", "reason": "the daemon is set to it" },
        "home_share": "127.0.0.1:EXPORT",
        "host": "one",
        "hosts": [],
        "mount_root": "STATE/mnt",
        "shares": [share],
        "state_dir": "STATE",
        "version": env!("CARGO_PKG_VERSION"),
        "volumes": 2,
    });
    assert_eq!(status, expected);

    let trash = plain(said(&driver, "/Nfsvol.TrashLs", json!({})).await, &lab);
    let record = json!({
        "created": "TIME",
        "created_by": "one",
        "data_dir": "old",
        "format": 1,
        "id": "RECORD",
        "made": 0,
        "name": "old",
        "on_remove": "trash",
        "options": {},
    });
    let entry = json!({ "entry": "ENTRY", "name": "old", "record": record, "removed": "TIME" });
    assert_eq!(trash, json!([entry]));

    let ask = json!({ "Name": "old" });
    let restored = plain(said(&driver, "/Nfsvol.Restore", ask).await, &lab);
    let expected = json!({ "entry": "ENTRY", "name": "old", "removed": "TIME" });
    assert_eq!(restored, expected);
    let purged = said(&driver, "/Nfsvol.TrashPurge", json!({ "All": true })).await;
    assert_eq!(purged, json!({ "purged": [] }));
    let repaired = said(&driver, "/Nfsvol.Repair", json!({ "DryRun": true })).await;
    assert_eq!(repaired, json!([]));
    let ask = json!({ "Name": "web", "Opts": { "access": "readonly" } });
    let adopted = plain(said(&driver, "/Nfsvol.Adopt", ask).await, &lab);
    let expected = json!({
        "data_dir": "web",
        "differences": [],
        "name": "web",
        "outcome": "exists",
        "share": "127.0.0.1:EXPORT",
    });
    assert_eq!(adopted, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_is_told_in_words_that_stay() {
    let Some(lab) = lab().await else { return };
    let driver = host(&lab).await;
    let record = |name: &str| {
        let volumes = lab.export.path().join(".nfsvol/volumes");
        volumes.join(name).join("record.json")
    };
    fs::write(record("web"), "{").unwrap();
    fs::create_dir_all(record("new").parent().unwrap()).unwrap();
    fs::write(record("new"), "{").unwrap();
    driver.read_catalog().await.unwrap();
    said(&driver, "/Nfsvol.Inspect", json!({ "Name": "web" })).await;
    let lines = said(&driver, "/Nfsvol.Ls", json!({})).await;
    let lines = lines.as_array().unwrap();
    let new = lines.iter().find(|line| line["name"] == "new").unwrap();
    let fields: Vec<&String> = new.as_object().unwrap().keys().collect();
    assert_eq!(fields, ["name", "warning"]);
    let web = lines.iter().find(|line| line["name"] == "web").unwrap();
    assert!(web["warning"].is_string() && web["share"].is_string());

    let dry = said(&driver, "/Nfsvol.Repair", json!({ "DryRun": true })).await;
    let fields: Vec<&String> = dry[0].as_object().unwrap().keys().collect();
    assert_eq!(fields, ["outcome", "reason", "what"]);
    let told = json!({ "outcome": "possible", "reason": null, "what": "volume web" });
    assert!(dry.as_array().unwrap().contains(&told), "{dry}");
    let ask = json!({ "Name": "web", "DryRun": false });
    let done = said(&driver, "/Nfsvol.Repair", ask).await;
    let told = json!({ "outcome": "done", "reason": null, "what": "volume web" });
    assert_eq!(done, json!([told]));
}
