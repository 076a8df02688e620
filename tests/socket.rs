//! The plugin's socket, byte for byte: requests exactly as dockerd 20.10 writes them, answers
//! compared whole. Behind it is a driver in memory that records what it is told; the volume's name
//! tells it how to behave.

#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nfsvol::doors::api::{Client, ClientError, Inspect, Ls, Question, Reply};
use nfsvol::doors::docker::{
    Calls, Created, ListenError, Listener, Lookup, Scope, Settings, Unfinished, Volume,
    VolumeDriver, run,
};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinHandle;

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(300);

#[derive(Debug, thiserror::Error)]
#[error("server nas does not answer")]
struct DriverError(#[source] io::Error);

/// A driver in memory.
#[derive(Debug)]
struct Memory {
    told: Mutex<Vec<String>>,
    volumes: Mutex<BTreeSet<String>>,
    /// What calls on volumes named `held…` wait for.
    gate: Semaphore,
    calls: Calls,
}

impl Memory {
    fn tell(&self, what: String) {
        self.told.lock().unwrap().push(what);
    }

    fn told(&self) -> Vec<String> {
        self.told.lock().unwrap().clone()
    }

    async fn behave(&self, name: &str) -> Result<(), DriverError> {
        if name.starts_with("held") {
            self.gate.acquire().await.unwrap().forget();
        }
        if name.starts_with("broken") {
            return Err(DriverError(io::Error::other("timed out after 10 s")));
        }
        assert!(!name.starts_with("bug"), "a bug in the driver");
        Ok(())
    }

    fn volume(name: &str) -> Volume {
        Volume {
            name: name.to_owned(),
            mountpoint: Some(PathBuf::from("/mnt").join(name)),
            created_at: Some("2026-01-02T03:04:05Z".to_owned()),
            status: serde_json::Map::new(),
        }
    }
}

impl VolumeDriver for Memory {
    type Error = DriverError;

    fn activated(&self) {
        self.tell("activated".to_owned());
    }

    fn scope(&self) -> Scope {
        Scope::Global
    }

    fn calls(&self) -> &Calls {
        &self.calls
    }

    async fn metrics(&self) -> String {
        "measured\n# EOF\n".to_owned()
    }

    async fn create(
        &self,
        name: &str,
        opts: BTreeMap<String, String>,
    ) -> Result<Created, DriverError> {
        self.tell(format!("create {name} {opts:?}"));
        self.behave(name).await?;
        Ok(match self.volumes.lock().unwrap().insert(name.to_owned()) {
            true => Created::New,
            false => Created::Existing,
        })
    }

    async fn undo_create(&self, name: &str) {
        self.volumes.lock().unwrap().remove(name);
        self.tell(format!("undo create {name}"));
    }

    async fn remove(&self, name: &str) -> Result<(), DriverError> {
        self.tell(format!("remove {name}"));
        self.behave(name).await?;
        self.volumes.lock().unwrap().remove(name);
        Ok(())
    }

    async fn mount(&self, name: &str, id: &str, _: Instant) -> Result<PathBuf, DriverError> {
        self.tell(format!("mount {name} {id}"));
        self.behave(name).await?;
        self.tell(format!("mounted {name} {id}"));
        Ok(PathBuf::from("/mnt").join(name))
    }

    async fn unmount(&self, name: &str, id: &str) -> Result<(), DriverError> {
        self.tell(format!("unmount {name} {id}"));
        Ok(())
    }

    async fn path(&self, name: &str) -> Result<Option<PathBuf>, DriverError> {
        self.behave(name).await?;
        Ok(name.starts_with("db").then(|| PathBuf::from("/mnt/db")))
    }

    async fn get(&self, name: &str) -> Result<Lookup, DriverError> {
        self.behave(name).await?;
        if name == "unreadable" {
            return Ok(Lookup::Unknown);
        }
        let known = self.volumes.lock().unwrap().contains(name);
        Ok(match known {
            true => {
                let mut volume = Self::volume(name);
                volume
                    .status
                    .insert("share".to_owned(), json!({ "of": ["nas"] }));
                Lookup::Found(volume)
            }
            false => Lookup::Absent,
        })
    }

    async fn list(&self) -> Result<Vec<Volume>, DriverError> {
        let volumes = self.volumes.lock().unwrap();
        Ok(volumes.iter().map(|name| Self::volume(name)).collect())
    }

    async fn ask(&self, question: Question) -> Result<Reply, DriverError> {
        self.behave(question.volume()).await?;
        Ok(Reply::of(&match question {
            Question::Ls(_) => json!([]),
            question => json!({ "asked": format!("{question:?}") }),
        }))
    }
}

/// A server on a socket of its own.
struct Plugin {
    driver: Arc<Memory>,
    socket: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    server: JoinHandle<Result<(), Unfinished>>,
    directory: tempfile::TempDir,
}

async fn plugin() -> Plugin {
    plugin_with(Settings::default()).await
}

async fn plugin_with(settings: Settings) -> Plugin {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("plugins/nfsvol.sock");
    let listener = Listener::open(&socket).await.unwrap();
    let driver = Arc::new(Memory {
        told: Mutex::default(),
        volumes: Mutex::new(BTreeSet::from(["db".to_owned()])),
        gate: Semaphore::new(0),
        calls: Calls::default(),
    });
    let (stop, stopped) = oneshot::channel();
    let shutdown = async {
        let _ = stopped.await;
    };
    let server = tokio::spawn(run(listener, Arc::clone(&driver), settings, shutdown));
    Plugin {
        driver,
        socket,
        stop: Some(stop),
        server,
        directory,
    }
}

impl Plugin {
    async fn connect(&self) -> Docker {
        Docker(UnixStream::connect(&self.socket).await.unwrap())
    }

    /// One request on a connection of its own.
    async fn ask(&self, path: &str, body: &str) -> String {
        let mut docker = self.connect().await;
        docker.send(path, body).await;
        docker.answer().await
    }

    fn stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }

    async fn stopped(self) -> Result<(), Unfinished> {
        within(self.server).await.unwrap()
    }

    async fn told(&self, what: &str) {
        within(async {
            while !self.driver.told().iter().any(|told| told == what) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }

    /// What the driver was told, once the server has come to rest.
    async fn told_in_the_end(mut self) -> Vec<String> {
        self.stop();
        let driver = Arc::clone(&self.driver);
        self.stopped().await.unwrap();
        driver.told()
    }
}

async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(PATIENCE, future)
        .await
        .expect("in time")
}

/// A connection as dockerd makes it.
struct Docker(UnixStream);

impl Docker {
    async fn send(&mut self, path: &str, body: &str) {
        self.write(&request(path, body)).await;
    }

    async fn write(&mut self, bytes: &str) {
        self.0.write_all(bytes.as_bytes()).await.unwrap();
    }

    /// One whole answer.
    async fn answer(&mut self) -> String {
        let mut bytes = Vec::new();
        within(async {
            loop {
                let text = String::from_utf8_lossy(&bytes);
                if let Some((head, body)) = text.split_once("\r\n\r\n") {
                    let length = head.split_once("content-length: ").unwrap().1;
                    let length = length.split("\r\n").next().unwrap();
                    if body.len() >= length.parse().unwrap() {
                        return text.into_owned();
                    }
                }
                let byte = self.0.read_u8().await;
                bytes.push(byte.unwrap_or_else(|e| panic!("{e} after {bytes:?}")));
            }
        })
        .await
    }

    /// What still comes until the server closes the connection.
    async fn rest(&mut self) -> String {
        let mut bytes = Vec::new();
        within(self.0.read_to_end(&mut bytes)).await.unwrap();
        String::from_utf8(bytes).unwrap()
    }
}

/// A request as dockerd 20.10.24 writes it: an empty Host, no Content-Type.
fn request(path: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nHost: \r\nUser-Agent: Go-http-client/1.1\r\n\
         Content-Length: {}\r\nAccept: application/vnd.docker.plugins.v1.2+json\r\n\r\n{body}",
        body.len()
    )
}

/// An answer to the last byte: no Date, no chunks.
fn answer(status: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn ok(body: &str) -> String {
    answer("200 OK", body)
}

fn failed(text: &str) -> String {
    let body = json!({ "Err": text }).to_string();
    answer("500 Internal Server Error", &body)
}

#[tokio::test]
async fn every_call_of_docker_is_answered_to_the_byte() {
    let plugin = plugin().await;
    let mut docker = plugin.connect().await;
    let volume = r#"{"Name":"db","Mountpoint":"/mnt/db","CreatedAt":"2026-01-02T03:04:05Z""#;
    let calls = [
        (
            "/Plugin.Activate",
            "",
            r#"{"Implements":["VolumeDriver"]}"#.to_owned(),
        ),
        (
            "/VolumeDriver.Capabilities",
            "{}\n",
            r#"{"Capabilities":{"Scope":"global"}}"#.to_owned(),
        ),
        (
            "/VolumeDriver.Create",
            "{\"Name\":\"v1\",\"Opts\":{\"uid\":\"1000\"}}\n",
            "{}".to_owned(),
        ),
        (
            "/VolumeDriver.Get",
            "{\"Name\":\"db\"}\n",
            format!(r#"{{"Volume":{volume},"Status":{{"share":{{"of":["nas"]}}}}}}}}"#),
        ),
        (
            "/VolumeDriver.Mount",
            "{\"Name\":\"db\",\"ID\":\"5f0c\"}\n",
            r#"{"Mountpoint":"/mnt/db"}"#.to_owned(),
        ),
        (
            "/VolumeDriver.Path",
            "{\"Name\":\"db\"}\n",
            r#"{"Mountpoint":"/mnt/db"}"#.to_owned(),
        ),
        (
            "/VolumeDriver.Path",
            "{\"Name\":\"idle\"}\n",
            r#"{"Mountpoint":""}"#.to_owned(),
        ),
        (
            "/VolumeDriver.Unmount",
            "{\"Name\":\"db\",\"ID\":\"5f0c\"}\n",
            "{}".to_owned(),
        ),
        (
            "/VolumeDriver.Remove",
            "{\"Name\":\"v1\"}\n",
            "{}".to_owned(),
        ),
        (
            "/VolumeDriver.List",
            "{}\n",
            format!(r#"{{"Volumes":[{volume}}}]}}"#),
        ),
    ];
    // All on one connection, as dockerd keeps it.
    for (path, body, expected) in calls {
        docker.send(path, body).await;
        assert_eq!(docker.answer().await, ok(&expected), "{path}");
    }
    assert_eq!(
        plugin.told_in_the_end().await,
        [
            "activated",
            "create v1 {\"uid\": \"1000\"}",
            "mount db 5f0c",
            "mounted db 5f0c",
            "unmount db 5f0c",
            "remove v1",
        ]
    );
}

#[tokio::test]
async fn options_may_be_null_absent_or_empty() {
    let plugin = plugin().await;
    for body in [
        "{\"Name\":\"v2\",\"Opts\":null}\n",
        "{\"Name\":\"v2\"}\n",
        "{\"Name\":\"v2\",\"Opts\":{}}",
    ] {
        assert_eq!(plugin.ask("/VolumeDriver.Create", body).await, ok("{}"));
    }
    assert_eq!(plugin.told_in_the_end().await, ["create v2 {}"; 3]);
}

#[tokio::test]
async fn errors_are_500_with_err_and_what_caused_them() {
    let plugin = plugin().await;
    assert_eq!(
        plugin
            .ask(
                "/VolumeDriver.Mount",
                "{\"Name\":\"broken\",\"ID\":\"1\"}\n"
            )
            .await,
        failed("server nas does not answer: timed out after 10 s")
    );
    assert_eq!(
        plugin
            .ask("/VolumeDriver.Get", "{\"Name\":\"nope\"}\n")
            .await,
        failed("no such volume: nope")
    );
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let plugin = plugin().await;
    let mut docker = plugin.connect().await;
    let two = request("/VolumeDriver.Path", "{\"Name\":\"db\"}\n")
        + &request("/VolumeDriver.Capabilities", "{}\n");
    docker.write(&two).await;
    assert_eq!(docker.answer().await, ok(r#"{"Mountpoint":"/mnt/db"}"#));
    assert_eq!(
        docker.answer().await,
        ok(r#"{"Capabilities":{"Scope":"global"}}"#)
    );
}

#[tokio::test]
async fn a_call_that_waits_holds_up_no_other() {
    let plugin = plugin().await;
    let mut waiting = Vec::new();
    for id in 0..50 {
        let mut docker = plugin.connect().await;
        let body = format!("{{\"Name\":\"held\",\"ID\":\"{id}\"}}\n");
        docker.send("/VolumeDriver.Mount", &body).await;
        plugin.told(&format!("mount held {id}")).await;
        waiting.push(docker);
    }
    // Whoever waited for those would wait for ever.
    for (path, body) in [
        ("/Plugin.Activate", ""),
        ("/VolumeDriver.Capabilities", "{}\n"),
        ("/VolumeDriver.Get", "{\"Name\":\"db\"}\n"),
        ("/VolumeDriver.List", "{}\n"),
        ("/VolumeDriver.Path", "{\"Name\":\"db\"}\n"),
    ] {
        let answer = plugin.ask(path, body).await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    }
    plugin.driver.gate.add_permits(50);
    for mut docker in waiting {
        assert_eq!(docker.answer().await, ok(r#"{"Mountpoint":"/mnt/held"}"#));
    }
}

#[tokio::test]
async fn a_repeated_call_without_its_body_is_refused_at_once() {
    let plugin = plugin().await;
    for (path, call) in [
        ("/VolumeDriver.Create", "Create"),
        ("/VolumeDriver.Mount", "Mount"),
        ("/VolumeDriver.Unmount", "Unmount"),
        ("/VolumeDriver.Remove", "Remove"),
        ("/VolumeDriver.Path", "Path"),
    ] {
        let answer = plugin.ask(path, "").await;
        let expected = format!(r#"{{"Err":"the {call} call came without its body, so "#);
        assert!(
            answer.starts_with("HTTP/1.1 400 Bad Request\r\n"),
            "{answer}"
        );
        assert!(answer.contains(&expected), "{answer}");
        assert!(answer.contains("try again"), "{answer}");
    }
    assert_eq!(plugin.told_in_the_end().await, [""; 0]);
}

#[tokio::test]
async fn what_is_not_understood_is_refused_in_words() {
    let plugin = plugin().await;
    let answer = plugin
        .ask("/VolumeDriver.Create", "{\"Name\": [\"db\"]}\n")
        .await;
    assert_eq!(
        answer,
        self::answer(
            "400 Bad Request",
            &json!({ "Err":
                "the body of the Create call is not what it should be: invalid type: sequence, \
                 expected a string at line 1 column 9; it begins: {\"Name\": [\"db\"]}"
            })
            .to_string()
        )
    );
    for (path, body, missing) in [
        ("/VolumeDriver.Mount", "{\"Name\":\"db\"}", "`ID`"),
        ("/VolumeDriver.Remove", "{}", "`Name`"),
        ("/Nfsvol.TrashPurge", "{}", "All"),
        (
            "/Nfsvol.TrashPurge",
            "{\"Name\":\"db\",\"All\":true}",
            "All",
        ),
    ] {
        let answer = plugin.ask(path, body).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
        assert!(answer.contains(missing), "{answer}");
    }
    let answer = plugin.ask("/VolumeDriver.Snapshot", "{}\n").await;
    assert!(answer.starts_with("HTTP/1.1 404 Not Found\r\n"), "{answer}");
    assert!(answer.contains(r#"{"Err":"nfsvol has no /VolumeDriver.Snapshot"#));

    let mut docker = plugin.connect().await;
    docker
        .write("GET /VolumeDriver.List HTTP/1.1\r\nHost: \r\n\r\n")
        .await;
    let answer = docker.answer().await;
    assert!(
        answer.starts_with("HTTP/1.1 405 Method Not Allowed\r\n"),
        "{answer}"
    );
    assert!(answer.contains("\r\nallow: POST\r\n"), "{answer}");
    assert!(answer.ends_with(r#"{"Err":"/VolumeDriver.List is called with POST, not GET"}"#));
}

#[tokio::test]
async fn metrics_are_read_with_get_and_count_the_calls() {
    let plugin = plugin().await;
    plugin.ask("/VolumeDriver.Get", "{\"Name\":\"db\"}\n").await;
    plugin
        .ask("/VolumeDriver.Remove", "{\"Name\":\"broken\"}\n")
        .await;
    plugin.ask("/VolumeDriver.Snapshot", "{}\n").await;
    let mut client = plugin.connect().await;
    client
        .write("GET /metrics HTTP/1.1\r\nHost: \r\n\r\n")
        .await;
    let answer = client.answer().await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(
        answer.contains("\r\ncontent-type: application/openmetrics-text; version=1.0.0;"),
        "{answer}"
    );
    assert!(answer.ends_with("measured\n# EOF\n"), "{answer}");

    let counted = |call: &str, outcome: &str| {
        let labels = [("call", call.to_owned()), ("outcome", outcome.to_owned())];
        let total = &plugin.driver.calls.total;
        total.get(&labels).map_or(0, |counter| counter.get())
    };
    assert_eq!(counted("Get", "ok"), 1);
    assert_eq!(counted("Remove", "error"), 1);
    assert_eq!(counted("unknown", "refused"), 1);
    assert_eq!(counted("Metrics", "ok"), 1);
    assert_eq!(plugin.driver.calls.running.get(), 0);

    let answer = plugin.ask("/metrics", "{}\n").await;
    assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
    assert!(answer.contains("\r\nallow: GET\r\n"), "{answer}");
}

/// dockerd takes any error in answer to Get for "no such volume", and forgets the volume.
#[tokio::test]
async fn get_is_silent_rather_than_wrong() {
    let plugin = plugin_with(Settings {
        deadline: Duration::from_millis(200),
        ..Settings::default()
    })
    .await;
    for body in [
        "{\"Name\":\"unreadable\"}\n",
        "{\"Name\":\"broken\"}\n",
        "{\"Name\":\"bug\"}\n",
        "{\"Name\":\"held\"}\n",
        // What dockerd sends after the connection was closed on it.
        "",
        "{\"Nam",
    ] {
        let mut docker = plugin.connect().await;
        docker.send("/VolumeDriver.Get", body).await;
        assert_eq!(docker.rest().await, "", "{body}");
    }
}

#[tokio::test]
async fn a_panic_is_an_error_and_the_connection_lives_on() {
    let plugin = plugin().await;
    let mut docker = plugin.connect().await;
    docker
        .send("/VolumeDriver.Mount", "{\"Name\":\"bug\",\"ID\":\"1\"}\n")
        .await;
    assert_eq!(
        docker.answer().await,
        failed(
            "internal error in Mount of volume \"bug\": a bug in the driver. Please report it \
             with nfsvol's log"
        )
    );
    docker
        .send("/VolumeDriver.Path", "{\"Name\":\"db\"}\n")
        .await;
    assert_eq!(docker.answer().await, ok(r#"{"Mountpoint":"/mnt/db"}"#));
}

#[tokio::test]
async fn what_a_client_that_left_never_heard_of_is_undone() {
    let plugin = plugin().await;
    for (path, body, asked) in [
        (
            "/VolumeDriver.Mount",
            "{\"Name\":\"held\",\"ID\":\"7\"}\n",
            "mount held 7",
        ),
        (
            "/VolumeDriver.Create",
            "{\"Name\":\"held-new\",\"Opts\":null}\n",
            "create held-new {}",
        ),
    ] {
        let mut docker = plugin.connect().await;
        docker.send(path, body).await;
        plugin.told(asked).await;
    }
    plugin.driver.gate.add_permits(2);
    plugin.told("unmount held 7").await;
    plugin.told("undo create held-new").await;
}

#[tokio::test]
async fn a_volume_that_was_there_before_is_not_taken_back() {
    let plugin = plugin().await;
    plugin
        .driver
        .volumes
        .lock()
        .unwrap()
        .insert("held".to_owned());
    let mut docker = plugin.connect().await;
    docker
        .send(
            "/VolumeDriver.Create",
            "{\"Name\":\"held\",\"Opts\":null}\n",
        )
        .await;
    plugin.told("create held {}").await;
    drop(docker);
    plugin.driver.gate.add_permits(1);
    assert_eq!(plugin.told_in_the_end().await, ["create held {}"]);
}

#[tokio::test]
async fn an_answer_that_was_never_read_is_undone() {
    let plugin = plugin().await;
    let mut docker = plugin.connect().await;
    docker
        .send("/VolumeDriver.Mount", "{\"Name\":\"db\",\"ID\":\"8\"}\n")
        .await;
    // The answer is in the client's buffer when the client closes.
    within(docker.0.readable()).await.unwrap();
    drop(docker);
    plugin.told("unmount db 8").await;
}

#[tokio::test]
async fn an_answer_that_was_read_stays() {
    let plugin = plugin().await;
    let mount = |id: u8| format!("{{\"Name\":\"db\",\"ID\":\"{id}\"}}\n");
    let mut docker = plugin.connect().await;
    for id in [1, 2] {
        docker.send("/VolumeDriver.Mount", &mount(id)).await;
        docker.answer().await;
    }
    drop(docker);
    assert_eq!(
        plugin.told_in_the_end().await,
        ["mount db 1", "mounted db 1", "mount db 2", "mounted db 2"]
    );
}

#[tokio::test]
async fn at_the_deadline_the_client_hears_of_it_and_what_comes_later_is_undone() {
    let plugin = plugin_with(Settings {
        mount_deadline: Duration::from_millis(300),
        ..Settings::default()
    })
    .await;
    let since = Instant::now();
    let answer = plugin
        .ask("/VolumeDriver.Mount", "{\"Name\":\"held\",\"ID\":\"9\"}\n")
        .await;
    assert!(since.elapsed() >= Duration::from_millis(300));
    assert_eq!(
        answer,
        failed(
            "Mount of volume \"held\" did not finish within 300ms. It goes on in the background, \
             and what it still does is undone. Most often an NFS server does not answer, which \
             `nfsvol status` shows, or another call for the volume waits; then try again"
        )
    );
    assert_eq!(plugin.driver.told(), ["mount held 9"]);
    plugin.driver.gate.add_permits(1);
    plugin.told("unmount held 9").await;
}

#[tokio::test]
async fn a_shutdown_waits_for_calls_and_turns_new_clients_away() {
    let mut plugin = plugin().await;
    let mut idle = plugin.connect().await;
    idle.send("/VolumeDriver.Path", "{\"Name\":\"db\"}\n").await;
    idle.answer().await;
    let mut busy = plugin.connect().await;
    busy.send("/VolumeDriver.Mount", "{\"Name\":\"held\",\"ID\":\"1\"}\n")
        .await;
    plugin.told("mount held 1").await;

    plugin.stop();
    assert_eq!(idle.rest().await, "");
    assert!(!plugin.socket.exists());
    let error = UnixStream::connect(&plugin.socket).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    assert!(!plugin.server.is_finished());

    plugin.driver.gate.add_permits(1);
    let answer = busy.answer().await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.contains("\r\nconnection: close\r\n"), "{answer}");
    assert!(
        answer.ends_with(r#"{"Mountpoint":"/mnt/held"}"#),
        "{answer}"
    );
    assert_eq!(busy.rest().await, "");
    let driver = Arc::clone(&plugin.driver);
    plugin.stopped().await.unwrap();
    assert_eq!(driver.told(), ["mount held 1", "mounted held 1"]);
}

#[tokio::test]
async fn who_waits_in_the_queue_at_shutdown_is_served() {
    let mut plugin = plugin().await;
    // This test has one thread, so the server has not seen these when it hears of the shutdown.
    let mut waiting = Vec::new();
    for _ in 0..20 {
        let stream = std::os::unix::net::UnixStream::connect(&plugin.socket).unwrap();
        let body = request("/VolumeDriver.Path", "{\"Name\":\"db\"}\n");
        io::Write::write_all(&mut &stream, body.as_bytes()).unwrap();
        stream.set_nonblocking(true).unwrap();
        waiting.push(Docker(UnixStream::from_std(stream).unwrap()));
    }
    plugin.stop();
    for mut docker in waiting {
        let answer = docker.answer().await;
        assert!(answer.ends_with(r#"{"Mountpoint":"/mnt/db"}"#), "{answer}");
    }
    plugin.stopped().await.unwrap();
}

#[tokio::test]
async fn a_request_that_is_on_its_way_at_shutdown_is_served() {
    let mut plugin = plugin().await;
    let mut kept = plugin.connect().await;
    kept.send("/VolumeDriver.Path", "{\"Name\":\"db\"}\n").await;
    kept.answer().await;
    plugin.stop();
    within(async {
        while plugin.socket.exists() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    kept.send("/VolumeDriver.Path", "{\"Name\":\"db\"}\n").await;
    assert_eq!(kept.answer().await, ok(r#"{"Mountpoint":"/mnt/db"}"#));
    plugin.stopped().await.unwrap();
}

#[tokio::test]
async fn a_shutdown_ends_even_if_a_call_does_not() {
    let drain = Duration::from_millis(900);
    let mut plugin = plugin_with(Settings {
        drain,
        ..Settings::default()
    })
    .await;
    let mut docker = plugin.connect().await;
    docker
        .send("/VolumeDriver.Mount", "{\"Name\":\"held\",\"ID\":\"1\"}\n")
        .await;
    plugin.told("mount held 1").await;
    plugin.stop();
    assert_eq!(plugin.stopped().await, Err(Unfinished(drain)));
}

#[tokio::test]
async fn a_body_beyond_the_limit_is_refused_unread() {
    let plugin = plugin().await;
    let mut docker = plugin.connect().await;
    docker
        .write("POST /VolumeDriver.Create HTTP/1.1\r\nHost: \r\nContent-Length: 1048577\r\n\r\n")
        .await;
    let answer = docker.answer().await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    assert!(answer.contains("larger than 1048576 bytes"), "{answer}");

    // The largest body passes, however long its parts take.
    let mut docker = plugin.connect().await;
    let shell = "{\"Name\":\"v\",\"Opts\":{\"k\":\"\"}}";
    let big = "x".repeat((1 << 20) - shell.len());
    let body = format!("{{\"Name\":\"v\",\"Opts\":{{\"k\":\"{big}\"}}}}");
    assert_eq!(body.len(), 1 << 20);
    docker.send("/VolumeDriver.Create", &body).await;
    assert_eq!(docker.answer().await, ok("{}"));

    // Of a body in chunks the length shows only as it comes.
    let mut docker = plugin.connect().await;
    let chunk = format!("10000\r\n{}\r\n", " ".repeat(0x10000)).repeat(17);
    docker
        .write("POST /VolumeDriver.Create HTTP/1.1\r\nHost: \r\nTransfer-Encoding: chunked\r\n\r\n")
        .await;
    // The server may close before all of it is written.
    let _ = docker.0.write_all(chunk.as_bytes()).await;
    let answer = docker.answer().await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
}

#[tokio::test]
async fn a_client_that_stops_half_way_is_let_go() {
    let plugin = plugin_with(Settings {
        head: Duration::from_millis(300),
        body: Duration::from_millis(300),
        ..Settings::default()
    })
    .await;
    let mut in_head = plugin.connect().await;
    in_head.write("POST /VolumeDriver.Mount HTT").await;
    let mut in_body = plugin.connect().await;
    in_body
        .write("POST /VolumeDriver.Mount HTTP/1.1\r\nHost: \r\nContent-Length: 20\r\n\r\n{\"Name")
        .await;
    // Others are served meanwhile.
    let answer = plugin.ask("/VolumeDriver.List", "{}\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");

    assert_eq!(in_head.rest().await, "");
    let answer = in_body.answer().await;
    assert!(
        answer.starts_with("HTTP/1.1 408 Request Timeout\r\n"),
        "{answer}"
    );
    assert_eq!(plugin.told_in_the_end().await, [""; 0]);
}

#[tokio::test]
async fn a_head_without_end_is_refused() {
    let plugin = plugin().await;
    let mut docker = plugin.connect().await;
    docker
        .write("POST /VolumeDriver.List HTTP/1.1\r\nX: ")
        .await;
    let endless = "x".repeat(1 << 20);
    let _ = docker.0.write_all(endless.as_bytes()).await;
    let mut start = [0; 12];
    within(docker.0.read_exact(&mut start)).await.unwrap();
    assert_eq!(&start, b"HTTP/1.1 431");
}

#[tokio::test]
async fn beyond_the_limit_of_connections_clients_wait() {
    let plugin = plugin_with(Settings {
        connections: 2,
        ..Settings::default()
    })
    .await;
    let mut open = Vec::new();
    for _ in 0..2 {
        let mut docker = plugin.connect().await;
        docker.send("/VolumeDriver.List", "{}\n").await;
        docker.answer().await;
        open.push(docker);
    }
    let mut third = plugin.connect().await;
    third.send("/VolumeDriver.List", "{}\n").await;
    let early = tokio::time::timeout(Duration::from_millis(200), third.0.readable()).await;
    assert!(early.is_err(), "served beyond the limit");
    open.pop();
    third.answer().await;
}

#[tokio::test]
async fn the_socket_is_for_root_alone_and_goes_away() {
    let mut plugin = plugin().await;
    let mode = |path: &Path| {
        std::fs::symlink_metadata(path)
            .unwrap()
            .permissions()
            .mode()
            & 0o7777
    };
    assert_eq!(mode(&plugin.socket), 0o600);
    assert_eq!(mode(plugin.socket.parent().unwrap()), 0o755);
    let socket = plugin.socket.clone();
    plugin.stop();
    plugin.stopped().await.unwrap();
    assert!(!socket.exists());
}

#[tokio::test]
async fn only_a_socket_that_nobody_answers_on_is_replaced() {
    let plugin = plugin().await;
    let error = Listener::open(&plugin.socket).await.unwrap_err();
    assert!(matches!(error, ListenError::Taken(_)), "{error}");
    assert!(
        error.to_string().contains("is nfsvol running already?"),
        "{error}"
    );
    let answer = plugin.ask("/VolumeDriver.List", "{}\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");

    let stale = plugin.directory.path().join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    assert!(stale.exists());
    let listener = Listener::open(&stale).await.unwrap();
    UnixStream::connect(&stale).await.unwrap();

    // Another process puts its own socket there: it is not ours to remove.
    std::fs::remove_file(&stale).unwrap();
    let _other = std::os::unix::net::UnixListener::bind(&stale).unwrap();
    drop(listener);
    assert!(stale.exists());

    let file = plugin.directory.path().join("precious");
    std::fs::write(&file, "data").unwrap();
    let error = Listener::open(&file).await.unwrap_err();
    assert!(matches!(error, ListenError::NotASocket(_)), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), b"data");

    let long = plugin.directory.path().join("x".repeat(120));
    let error = Listener::open(&long).await.unwrap_err();
    assert!(matches!(error, ListenError::Long(_)), "{error}");
}

#[tokio::test]
async fn of_many_that_start_at_once_on_a_stale_socket_one_gets_it() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("nfsvol.sock");
    for _ in 0..20 {
        let _ = std::fs::remove_file(&socket);
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        let starts: Vec<_> = (0..4)
            .map(|_| {
                let socket = socket.clone();
                tokio::task::spawn_blocking(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread()
                        .enable_all()
                        .build()
                        .unwrap();
                    let listener = runtime.block_on(Listener::open(&socket));
                    // Whoever has it keeps it until all have tried.
                    (runtime, listener)
                })
            })
            .collect();
        let mut ends = Vec::new();
        for start in starts {
            ends.push(within(start).await.unwrap());
        }
        let won = ends.iter().filter(|(_, listener)| listener.is_ok()).count();
        assert_eq!(won, 1, "{ends:?}");
        for (runtime, listener) in ends {
            drop(listener);
            runtime.shutdown_background();
        }
    }
}

#[tokio::test]
async fn a_socket_from_systemd_is_served_and_left() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("nfsvol.sock");
    let systemd = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let told = std::os::unix::net::UnixDatagram::bind(directory.path().join("notify")).unwrap();
    told.set_read_timeout(Some(PATIENCE)).unwrap();
    let state = || {
        let mut bytes = [0; 64];
        let length = told.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    };
    // The binary itself, as systemd starts a service.
    let service = || {
        tokio::process::Command::new("sh")
            .arg("-c")
            .arg("exec env LISTEN_FDS=1 LISTEN_PID=$$ \"$0\" serve --state-dir \"$1\" 3<&0")
            .arg(env!("CARGO_BIN_EXE_nfsvol"))
            .arg(directory.path().join("state"))
            .stdin(std::os::fd::OwnedFd::from(systemd.try_clone().unwrap()))
            .env("NOTIFY_SOCKET", directory.path().join("notify"))
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap()
    };
    for _ in 0..2 {
        let mut child = service();
        let mut docker = Docker(UnixStream::connect(&socket).await.unwrap());
        docker.send("/Plugin.Activate", "").await;
        assert_eq!(
            docker.answer().await,
            ok(r#"{"Implements":["VolumeDriver"]}"#)
        );
        let pid = rustix::process::Pid::from_raw(child.id().unwrap().cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert!(within(child.wait()).await.unwrap().success());
        assert_eq!([state(), state()], ["READY=1\n", "STOPPING=1\n"]);
        assert!(socket.exists());
    }
}

#[tokio::test]
async fn the_command_line_asks_on_the_same_socket() {
    let plugin = plugin().await;
    for (path, body, asked) in [
        (
            "/Nfsvol.Inspect",
            json!({ "Name": "db" }),
            "Inspect(Inspect { name: \"db\" })",
        ),
        ("/Nfsvol.Status", json!(null), "Status(Status)"),
        ("/Nfsvol.TrashLs", json!({}), "TrashLs(Trash)"),
        (
            "/Nfsvol.Restore",
            json!({ "Name": "db", "As": "db2" }),
            "Restore(Restore { name: \"db\", rename: Some(\"db2\") })",
        ),
        (
            "/Nfsvol.TrashPurge",
            json!({ "Name": "db" }),
            "TrashPurge(Name(\"db\"))",
        ),
        (
            "/Nfsvol.TrashPurge",
            json!({ "All": true }),
            "TrashPurge(All)",
        ),
    ] {
        let answer = plugin.ask(path, &format!("{body}\n")).await;
        assert_eq!(answer, ok(&json!({ "asked": asked }).to_string()));
    }
    let mut client = Client::connect(&plugin.socket).await.unwrap();
    assert_eq!(client.ask(&Ls {}).await.unwrap(), []);
    let name = "broken".to_owned();
    let error = client.ask(&Inspect { name }).await.unwrap_err();
    assert!(matches!(error, ClientError::Failed(_)));
    assert_eq!(
        error.to_string(),
        "server nas does not answer: timed out after 10 s"
    );
}

#[tokio::test]
async fn the_command_line_says_why_nobody_answers() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("nfsvol.sock");
    let error = Client::connect(&socket).await.unwrap_err();
    assert!(matches!(error, ClientError::Absent(_)), "{error}");
    assert!(
        error.to_string().contains("systemctl start nfsvol"),
        "{error}"
    );

    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let error = Client::connect(&socket).await.unwrap_err();
    assert!(matches!(error, ClientError::Refused(_)), "{error}");

    // Something else than nfsvol answers there.
    std::fs::remove_file(&socket).unwrap();
    let other = tokio::net::UnixListener::bind(&socket).unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = other.accept().await.unwrap();
        let asked = stream.read(&mut [0; 1024]).await.unwrap();
        assert!(asked > 0);
        let answer = "HTTP/1.1 418 I'm a teapot\r\nContent-Length: 3\r\n\r\ntea";
        stream.write_all(answer.as_bytes()).await.unwrap();
        std::future::pending::<()>().await;
    });
    let mut client = Client::connect(&socket).await.unwrap();
    let error = within(client.ask(&Ls {})).await.unwrap_err();
    assert!(matches!(error, ClientError::Strange { .. }), "{error}");
    assert!(error.to_string().contains("\"tea\""), "{error}");
}
