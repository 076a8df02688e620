//! The driver of a host on the embedded server, with nothing mounted.

mod answers;

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use embedded::EmbeddedServer;
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::mount::HOME_WAIT;
use super::*;
use crate::attendant::Post;
use crate::cluster::Env;
use crate::docker::{Created, Lookup, VolumeDriver};
use crate::home::Creation;
use crate::host::{How, PODMAN};
use crate::sys::holders::Mark;
use crate::volume::{DataPath, OnRemove, VolumeOptions};
use nfs::probe::Reached;

/// The clock of a host that is tried without its daemon: it runs as the test's does.
pub(super) struct Clock(tokio::time::Instant);

impl Default for Clock {
    fn default() -> Self {
        Self(tokio::time::Instant::now())
    }
}

impl Env for Clock {
    fn now(&self) -> Duration {
        Duration::from_secs(1000) + self.0.elapsed()
    }

    fn nonce(&self) -> String {
        format!("{:016x}", chance::bits().unwrap())
    }
}

/// A home share, and the state of a host that has it.
struct Lab {
    export: TempDir,
    state: TempDir,
    /// Whether the server's answers pass.
    gate: watch::Sender<bool>,
    port: u16,
    _server: EmbeddedServer,
}

fn name(name: &str) -> VolumeName {
    name.parse().unwrap()
}

fn options(pairs: &[(&str, &str)]) -> VolumeOptions {
    let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    VolumeOptions::parse(&pairs.iter().map(owned).collect()).unwrap()
}

/// None without root, which the server needs.
async fn lab() -> Option<Lab> {
    if !rustix::process::geteuid().is_root() {
        let required = std::env::var_os("NFSVOL_TEST_REQUIRE_ALL");
        assert!(required.is_none(), "needs root");
        return None;
    }
    let [export, state, keys] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let settings = embedded::Settings {
        state_dir: keys.path().to_owned(),
        privileged_only: false,
    };
    let any: SocketAddr = (Ipv4Addr::LOCALHOST, 0).into();
    let server = embedded::serve(export.path(), any, &settings)
        .await
        .unwrap();
    let (gate, passes) = watch::channel(true);
    let listener = TcpListener::bind(any).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let addr = server.addr;
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(relay(client, addr, passes.clone()));
        }
    });
    Some(Lab {
        export,
        state,
        gate,
        port,
        _server: server,
    })
}

/// Passes on what a client says, and what the server says while it may.
async fn relay(client: TcpStream, server: SocketAddr, mut passes: watch::Receiver<bool>) {
    let server = TcpStream::connect(server).await.unwrap();
    let (mut from, mut to) = client.into_split();
    let (mut answers, mut calls) = server.into_split();
    let asks = tokio::io::copy(&mut from, &mut calls);
    let answers = async {
        let mut bytes = vec![0; 1 << 16];
        loop {
            let length = answers.read(&mut bytes).await?;
            if length == 0 || passes.wait_for(|passes| *passes).await.is_err() {
                return std::io::Result::Ok(());
            }
            to.write_all(&bytes[..length]).await?;
        }
    };
    // The end of either is that of both.
    tokio::select! { _ = asks => {} _ = answers => {} }
}

impl Lab {
    /// The share by another name of its server, or of one that is not there.
    fn share_at(&self, server: &str) -> String {
        format!("{server}:{}", self.export.path().display())
    }

    fn config(&self) -> Config {
        let home = self.share_at("127.0.0.1").parse().unwrap();
        let ports = format!("port={0},mountport={0}", self.port);
        Config {
            mount_options: ports.parse().unwrap(),
            ..Config::aside(home, self.state.path())
        }
    }

    /// A host that is one of several.
    fn member(&self) -> Driver {
        let session = Some(Duration::from_secs(30));
        Driver::open(Config {
            session,
            ..self.config()
        })
        .unwrap()
    }
}

impl Driver {
    async fn made(&self, volume: &str, given: &[(&str, &str)]) -> Arc<Record> {
        let made = self.create_volume(&name(volume), options(given)).await;
        match made.unwrap() {
            Creation::New(record) | Creation::Existing(record) | Creation::Recreated(record) => {
                record
            }
        }
    }
}

/// A volume's data are on another share, and the home share says nothing for longer than other calls
/// wait for it: whether a Mount waits.
async fn waits_for_the_home_share(lab: &Lab, driver: &Driver, record: &Arc<Record>) -> bool {
    lab.gate.send_replace(false);
    let share = driver.catalog.share_of(&record.options).unwrap();
    let answers = async {
        tokio::time::sleep(HOME_WAIT * 2).await;
        lab.gate.send_replace(true);
    };
    let (current, ()) = tokio::join!(driver.current(Arc::clone(record), share), answers);
    current.unwrap().1.is_some()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exclusive_volume_waits_for_the_home_share() {
    let Some(lab) = lab().await else { return };
    let (driver, elsewhere) = (lab.member(), lab.share_at("localhost"));
    let share = ("share", elsewhere.as_str());
    let given = [share, ("subdir", "db"), ("access", "exclusive")];
    let db = driver.made("db", &given).await;
    let web = driver.made("web", &[share, ("subdir", "web")]).await;
    assert!(waits_for_the_home_share(&lab, &driver, &db).await);
    assert!(!waits_for_the_home_share(&lab, &driver, &web).await);
    let _back = mutant::put_back(Mutant::ExclusiveWaitsNoLonger);
    assert!(!waits_for_the_home_share(&lab, &driver, &db).await);
}

/// The options of an exclusive volume change between a host's look at it and its claim: whether the host
/// has the volume by what it saw.
async fn holds_by_former_options(lab: &Lab) -> bool {
    let driver = lab.member();
    let home = driver.shares.home().await.unwrap().unwrap();
    let former = driver.made("db", &[("access", "exclusive")]).await;
    driver.remove_volume(&former.name).await.unwrap();
    let given = [("access", "exclusive"), ("mode", "0700")];
    let now = driver.made("db", &given).await;
    assert_eq!(now.id, former.id);
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    let held = driver.membership.hold(Some(&home), &former, deadline).await;
    driver.membership.let_go(&now.name).await;
    let again = driver.membership.hold(Some(&home), &now, deadline).await;
    assert!(again.is_ok(), "{again:?}");
    held.is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_is_for_the_options_of_its_time() {
    let Some(one) = lab().await else { return };
    assert!(!holds_by_former_options(&one).await);
    let Some(other) = lab().await else { return };
    let _back = mutant::put_back(Mutant::ClaimsKeepOptions);
    assert!(holds_by_former_options(&other).await);
}

/// How long a Get waits for a share that is being reached for most of what it may wait, and then
/// takes connections and says nothing.
async fn waited_for_a_silent_share() -> Duration {
    let state = tempfile::tempdir().unwrap();
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = silent.local_addr().unwrap().port();
    let config = Config {
        mount_options: format!("port={port},mountport={port}").parse().unwrap(),
        ..Config::aside("127.0.0.1:/export".parse().unwrap(), state.path())
    };
    let driver = Driver::open(config).unwrap();
    let contact = driver.shares.home_contact().unwrap();
    let reached = Reached {
        addr: Ipv4Addr::LOCALHOST.into(),
        nfs_port: port,
        mount_port: Some(port),
        v3: true,
        v4: false,
        v3_error: None,
        rtt: Duration::ZERO,
        fsinfo: None,
    };
    let began = tokio::time::Instant::now();
    let reaching = contact.reached_after(LOOKUP_WAIT * 4 / 5, reached);
    let db = name("db");
    let ((), known) = tokio::join!(reaching, driver.look_up(&db));
    assert_eq!(known, Known::Unknown);
    began.elapsed()
}

#[tokio::test(start_paused = true)]
async fn a_get_waits_for_the_share_once() {
    // Timers go by milliseconds.
    let once = LOOKUP_WAIT + Duration::from_millis(10);
    assert!(waited_for_a_silent_share().await < once);
    let _back = mutant::put_back(Mutant::GetWaitsTwice);
    assert!(waited_for_a_silent_share().await > once);
}

/// Two volumes were unmounted together, and the worker of one is stopped: whether calls for either can
/// go on while it is asked.
async fn go_on_beside_a_stopped_worker(lab: &Lab) -> [bool; 2] {
    let driver = lab.member();
    let home = driver.shares.home().await.unwrap().unwrap();
    for volume in ["a", "b"] {
        let record = driver.made(volume, &[]).await;
        let held = driver
            .membership
            .together()
            .announce_hold(&home, &record)
            .await;
        assert!(held.unwrap());
        driver.membership.let_go(&record.name).await;
    }
    let run_dir = lab.state.path().join("fuse/a");
    fs::create_dir_all(&run_dir).unwrap();
    let (_worker, asked) = Post::take(&run_dir).unwrap();
    let meanwhile = async {
        let _says_nothing = asked.accept().await.unwrap();
        ["a", "b"].map(|volume| driver.host.try_lock(&name(volume)).is_some())
    };
    let (told, go_on) = tokio::join!(driver.membership.let_go_together(), meanwhile);
    told.unwrap();
    let held = driver.membership.holds();
    assert!(held.contains_key(&name("a")) && !held.contains_key(&name("b")));
    go_on
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_worker_keeps_no_call_waiting() {
    let Some(lab) = lab().await else { return };
    assert_eq!(go_on_beside_a_stopped_worker(&lab).await, [true; 2]);
    let _back = mutant::put_back(Mutant::StoppedWorkerStopsOthers);
    assert_eq!(go_on_beside_a_stopped_worker(&lab).await, [false; 2]);
}

fn attached() -> How {
    How {
        share: "nas:/export".parse().unwrap(),
        data_path: DataPath::Fuse,
        mountpoint: PathBuf::from("/nowhere"),
        nfs_version: "3".to_owned(),
        address: None,
        held: Mark::Source("nas:/export/that-nobody-holds".to_owned()),
        warnings: Vec::new(),
    }
}

/// Makes the one attachment of a volume as old as the boot, and that of this start of the engine.
fn age(state: &Path, volume: &str, epoch: u64) {
    let file = state.join(format!("attachments/{volume}.json"));
    let mut json: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let attachment = &mut json["attachments"][0];
    (attachment["at"], attachment["epoch"]) = (0.into(), epoch.into());
    fs::write(file, json.to_string()).unwrap();
}

/// The attachments that are left when the engine has started since.
async fn left_attached(lab: &Lab) -> Vec<VolumeName> {
    {
        let driver = lab.member();
        for (volume, id) in [("db", "of-docker"), ("now", "of-docker"), ("pod", PODMAN)] {
            driver.made(volume, &[]).await;
            driver
                .host
                .attachments()
                .add(&name(volume), attached(), id)
                .unwrap();
        }
        driver.host.engine_started();
    }
    for (volume, epoch) in [("db", 0), ("now", 1), ("pod", 0)] {
        age(lab.state.path(), volume, epoch);
    }
    let driver = lab.member();
    assert_eq!(driver.host.attachments().count(), 3);
    driver
        .host
        .reconcile(|name| driver.catalog.get(name).is_some())
        .await;
    let mut left: Vec<VolumeName> = driver.host.attachments().names().into_iter().collect();
    left.sort();
    left
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_earlier_engine_had_counts_for_nothing_and_what_podman_counts_does() {
    let Some(lab) = lab().await else { return };
    assert_eq!(left_attached(&lab).await, [name("now"), name("pod")]);
    let Some(lab) = self::lab().await else { return };
    let _back = mutant::put_back(Mutant::CommandsAreEngines);
    assert_eq!(left_attached(&lab).await, [name("now")]);
}

/// What is left in the trash of two volumes, of which one has its data on a share that is gone.
async fn left_in_the_trash(lab: &Lab) -> Vec<VolumeName> {
    let driver = Driver::open(Config {
        trash_time: Duration::ZERO,
        ..lab.config()
    });
    let (driver, elsewhere) = (driver.unwrap(), lab.share_at("localhost"));
    let there = [("share", elsewhere.as_str()), ("subdir", "gone")];
    for (volume, given) in [("gone", &there[..]), ("web", &[])] {
        driver.made(volume, given).await;
        fs::write(lab.export.path().join(volume).join("file"), "").unwrap();
        driver.remove_volume(&name(volume)).await.unwrap();
    }
    let trash = lab.export.path().join(".nfsvol/trash");
    for entry in fs::read_dir(&trash).unwrap() {
        let record = entry.unwrap().path().join("volume/record.json");
        let text = fs::read_to_string(&record).unwrap();
        fs::write(record, text.replace("localhost:", "127.0.0.2:")).unwrap();
    }
    driver.empty_trash().await.unwrap_err();
    let home = driver.shares.home().await.unwrap().unwrap();
    let left = driver.catalog.trash(&home).await.unwrap();
    left.into_iter().map(|entry| entry.name).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_share_that_is_gone_keeps_nothing_else_in_the_trash() {
    let Some(lab) = lab().await else { return };
    assert_eq!(left_in_the_trash(&lab).await, [name("gone")]);
    let Some(lab) = self::lab().await else { return };
    let _back = mutant::put_back(Mutant::SweepEndsAtTheFirstError);
    let left = left_in_the_trash(&lab).await;
    assert!(left.contains(&name("web")), "{left:?}");
}

/// A removal that a crash cut off is finished by a Create of the name on another share: whether the data
/// of the removed volume are gone.
async fn is_finished_where_it_was(lab: &Lab, other: &Lab) -> bool {
    let driver = lab.member();
    let share = other.share_at("127.0.0.1");
    let ports = format!("port={0},mountport={0}", other.port);
    let there = [
        ("share", share.as_str()),
        ("options", ports.as_str()),
        ("on_remove", "delete"),
    ];
    driver.made("db", &there).await;
    let data = other.export.path().join("db");
    fs::write(data.join("file"), "").unwrap();
    let mark = lab
        .export
        .path()
        .join(".nfsvol/volumes/db/removing/by.another");
    fs::create_dir_all(mark).unwrap();
    let again = driver.made("db", &[]).await;
    assert_eq!(again.options.share, None);
    !data.exists()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_is_finished_on_the_share_of_its_volume() {
    for fault in [false, true] {
        let (Some(lab), Some(other)) = (lab().await, lab().await) else {
            return;
        };
        let _back = fault.then(|| mutant::put_back(Mutant::RemovalsEndOnTheNewShare));
        assert_eq!(is_finished_where_it_was(&lab, &other).await, !fault);
    }
}

/// A volume is made of the directory of another one, which goes right after the volumes were listed:
/// whether the new one has a directory.
async fn has_a_directory_of_its_own() -> bool {
    let share = std::thread::spawn(search::AtOnce::with_an_exclusive_volume);
    let (share, state) = (share.join().unwrap(), tempfile::tempdir().unwrap());
    let home = share.admin(0);
    let catalog = Catalog::open(state.path(), Some(home.share().clone()), "a").unwrap();
    share.move_after_a_listing(&[
        ["db", ".nfsvol/trash/data"],
        [".nfsvol/volumes/db", ".nfsvol/trash/volume"],
    ]);
    let (web, given) = (name("web"), options(&[("subdir", "db")]));
    let made = catalog.create(Some(&home), &home, &web, &given, OnRemove::Trash);
    made.await.unwrap();
    assert!(share.is_there(".nfsvol/trash/volume") && share.is_there(".nfsvol/volumes/web"));
    share.is_there("db")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_found_directory_that_goes_is_made_anew() {
    assert!(has_a_directory_of_its_own().await);
    let _back = mutant::put_back(Mutant::FoundIsThereForEver);
    assert!(!has_a_directory_of_its_own().await);
}

/// A listing may leave out an entry while others change (RFC 1813, READDIR).
#[tokio::test(flavor = "multi_thread")]
async fn what_a_listing_leaves_out_is_not_gone() {
    let share = std::thread::spawn(search::AtOnce::with_an_exclusive_volume);
    let (share, state) = (share.join().unwrap(), tempfile::tempdir().unwrap());
    let home = share.admin(0);
    let catalog = Catalog::open(state.path(), Some(home.share().clone()), "a").unwrap();
    catalog.catch_up(&home).await.unwrap();
    assert!(catalog.get(&name("db")).is_some());
    let (web, given) = (name("web"), options(&[]));
    let made = catalog.create(Some(&home), &home, &web, &given, OnRemove::Trash);
    made.await.unwrap();
    share.leave_out("db");
    let changes = catalog.catch_up(&home).await.unwrap();
    assert_eq!(changes.gone, []);
    assert!(share.has_left_out() && catalog.get(&name("db")).is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_of_volumes_that_are_gone_is_forgotten() {
    let Some(lab) = lab().await else { return };
    let driver = lab.member();
    driver.made("db", &[]).await;
    let dirs = ["fuse/db", "guard/db", "fuse/gone", "guard/gone"];
    let dirs = dirs.map(|dir| lab.state.path().join(dir));
    for dir in &dirs {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("log"), "").unwrap();
    }
    let other = "nas2:/media".parse().unwrap();
    drop(driver.shares.contact(&other, &options(&[])));
    assert_eq!(driver.shares.all().len(), 2);
    driver
        .host
        .reconcile(|name| driver.catalog.get(name).is_some())
        .await;
    driver.forget_shares();
    assert_eq!(dirs.map(|dir| dir.exists()), [true, true, false, false]);
    assert_eq!(driver.shares.all().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_refused_outside_of_what_this_host_allows() {
    let state = tempfile::tempdir().unwrap();
    let mut config = Config::aside("nas:/export".parse().unwrap(), state.path());
    config.allow_share = vec!["nas:/*".to_owned()];
    let driver = Driver::open(config).unwrap();
    let refused = |pairs: &[(&str, &str)]| {
        let map = pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        let options = VolumeOptions::parse(&map.collect()).unwrap();
        let checked = driver.check_options(&"db".parse().unwrap(), &options);
        checked.err().map(|error| error.to_string())
    };
    assert_eq!(refused(&[]), None);
    assert_eq!(
        refused(&[("share", "nas:/other"), ("options", "nconnect=2")]),
        None
    );
    for (option, value, reason) in [
        ("share", "evil:/export", "--allow-share"),
        ("options", "suid", "--allow-option"),
        ("options", "ro,dev", "mount option dev"),
        ("share", "nas:/export/.nfsvol", "belongs to the driver"),
        ("share", "nas:/.nfsvol", "belongs to the driver"),
        ("share", "nas:/export/.NFSVOL/tmp", "belongs to the driver"),
        (
            "share",
            "nas:/export/.nfsvol/volumes",
            "belongs to the driver",
        ),
    ] {
        let text = refused(&[(option, value)]).unwrap_or_default();
        assert!(text.contains(reason), "{option}={value}: {text}");
    }
    // By way of the directory above the home share.
    let above = refused(&[("share", "nas:/"), ("subdir", "export/.nfsvol/tmp")]);
    assert!(above.is_some_and(|text| text.contains("belongs to the driver")));
    driver.stop().await;
}

/// A volume without files is made anew with other options, and Docker does not hear of it: whether it is there.
async fn stays_when_nobody_has_heard_of_it(lab: &Lab) -> bool {
    let driver = lab.member();
    let db = name("db");
    driver.made("db", &[]).await;
    driver.remove_volume(&db).await.unwrap();
    let given = options(&[("mode", "0700")]);
    let made = driver.create_volume(&db, given.clone()).await.unwrap();
    assert!(matches!(made, Creation::Recreated(_)));
    driver.take_back(&db).await;
    let again = driver.create_volume(&db, given).await.unwrap();
    matches!(again, Creation::Existing(_))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recreate_that_nobody_has_heard_of_stays() {
    for fault in [false, true] {
        let Some(lab) = lab().await else { return };
        let _back = fault.then(|| mutant::put_back(Mutant::RecreatesAreUndone));
        assert_eq!(stays_when_nobody_has_heard_of_it(&lab).await, !fault);
    }
}

/// Docker is told that the volume was there, so that it undoes nothing, and shows what became of its data; and
/// this on a share of data that is another one than the home share.
#[tokio::test(flavor = "multi_thread")]
async fn a_recreate_is_told() {
    let Some(lab) = lab().await else { return };
    let driver = lab.member();
    let elsewhere = lab.share_at("localhost");
    let share = ("share", elsewhere.as_str());
    driver.made("db", &[share]).await;
    fs::write(lab.export.path().join("db/file"), "data").unwrap();
    driver.remove_volume(&name("db")).await.unwrap();
    let changed = [share, ("mode", "0700"), ("on_remove", "retain")];
    let opts = changed.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let told = driver.create("db", opts.into()).await.unwrap();
    assert_eq!(told, Created::Existing);
    let Lookup::Found(shown) = driver.get("db").await.unwrap() else {
        panic!("the volume is known");
    };
    assert_eq!(shown.status["options"]["mode"], "0700");
    let restored = shown.status["restored"].as_str().unwrap();
    assert!(
        restored.contains("was kept, its options changed"),
        "{restored}"
    );
    assert!(lab.export.path().join("db/file").exists());
    let trash = fs::read_dir(lab.export.path().join(".nfsvol/trash")).unwrap();
    assert_eq!(trash.count(), 0);
}
