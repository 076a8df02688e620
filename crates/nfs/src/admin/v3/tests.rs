//! Against the embedded server, through a proxy that does to single calls what bad networks and
//! bad servers do.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, symlink};
use std::time::Instant;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::admin::{Admin, scenarios};
use crate::mutant::{self, Mutant};
use embedded::{EmbeddedServer, Settings, serve};

const MKDIR: u32 = 9;
const LOOKUP: u32 = 3;
const CREATE: u32 = 8;
const RENAME: u32 = 14;
const READDIRPLUS: u32 = 17;

/// What the proxy does to one call.
#[derive(Debug, Clone)]
enum Act {
    /// The server gets it, the client never hears of it: the connection is closed.
    LoseReply,
    /// The connection is closed instead.
    Close,
    /// Nothing happens any more.
    Hang,
    /// These bytes come instead of a reply.
    Bytes(Vec<u8>),
    /// The reply comes in fragments of this many bytes.
    Fragments(usize),
    /// The call is answered with this NFS status instead.
    Status(u32),
}

/// What is to be done to which calls of the NFS program, in this order.
type Plan = Arc<Mutex<VecDeque<(u32, Act)>>>;

struct Lab {
    dir: tempfile::TempDir,
    state: tempfile::TempDir,
    server: Option<EmbeddedServer>,
    plan: Plan,
    admin: Admin,
}

/// Long enough for an operation that is answered, on a busy machine too.
const DEADLINE: Duration = Duration::from_secs(3);

/// A server, the proxy before it, and an admin path with a deadline of [`DEADLINE`]; None without
/// root, which the server needs.
async fn lab() -> Option<Lab> {
    if !rustix::process::geteuid().is_root() {
        assert!(
            std::env::var_os("NFSVOL_TEST_REQUIRE_ALL").is_none(),
            "needs root"
        );
        return None;
    }
    let (dir, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let plan = Plan::default();
    let settings = Settings {
        state_dir: state.path().to_owned(),
        privileged_only: false,
    };
    let server = serve(dir.path(), "127.0.0.1:0".parse().unwrap(), &settings)
        .await
        .unwrap();
    let port = proxy(server.addr, Arc::clone(&plan)).await;
    let share = format!("127.0.0.1:{}", dir.path().display())
        .parse()
        .unwrap();
    let admin = Admin::v3(share, settings_for(port));
    let server = Some(server);
    Some(Lab {
        dir,
        state,
        server,
        plan,
        admin,
    })
}

fn settings_for(port: u16) -> AdminSettings {
    AdminSettings {
        op_deadline: DEADLINE,
        nfs_port: Some(port),
        mount_port: Some(port),
        ..AdminSettings::default()
    }
}

impl Lab {
    fn next(&self, procedure: u32, act: Act) {
        self.plan.lock().unwrap().push_back((procedure, act));
    }

    async fn rpcs<T>(&self, operation: impl Future<Output = T>) -> (u64, T) {
        let before = self.admin.rpc_count();
        let result = operation.await;
        (self.admin.rpc_count() - before, result)
    }
}

async fn proxy(server: SocketAddr, plan: Plan) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(relay(client, server, Arc::clone(&plan)));
        }
    });
    port
}

async fn relay(mut client: TcpStream, server: SocketAddr, plan: Plan) -> std::io::Result<()> {
    let mut server = TcpStream::connect(server).await?;
    loop {
        let call = record(&mut client).await?;
        let word = |n: usize| u32::from_be_bytes(call[4 * n..4 * n + 4].try_into().unwrap());
        let act = {
            let mut plan = plan.lock().unwrap();
            match plan.front() {
                Some((procedure, _)) if (word(3), word(5)) == (100_003, *procedure) => {
                    plan.pop_front().map(|(_, act)| act)
                }
                _ => None,
            }
        };
        match &act {
            Some(Act::Close) => return Ok(()),
            Some(Act::Hang) => std::future::pending().await,
            Some(Act::Bytes(bytes)) => {
                client.write_all(bytes).await?;
                continue;
            }
            Some(Act::Status(status)) => {
                // xid, reply, accepted, verifier (2 words), success, status, no attributes.
                let words = if word(5) == MKDIR { 2 } else { 1 };
                let mut reply = vec![word(0), 1, 0, 0, 0, 0, *status];
                reply.extend(vec![0; words]);
                let reply: Vec<u8> = reply.into_iter().flat_map(u32::to_be_bytes).collect();
                client.write_all(&framed(&reply, true)).await?;
                continue;
            }
            _ => {}
        }
        server.write_all(&framed(&call, true)).await?;
        let reply = record(&mut server).await?;
        match act {
            Some(Act::LoseReply) => return Ok(()),
            Some(Act::Fragments(size)) => {
                let mut parts = reply.chunks(size).peekable();
                while let Some(part) = parts.next() {
                    client
                        .write_all(&framed(part, parts.peek().is_none()))
                        .await?;
                }
            }
            _ => client.write_all(&framed(&reply, true)).await?,
        }
    }
}

async fn record(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut record = Vec::new();
    loop {
        let header = stream.read_u32().await?;
        let mut part = vec![0; (header & 0x7fff_ffff) as usize];
        stream.read_exact(&mut part).await?;
        record.extend(part);
        if header >> 31 == 1 {
            return Ok(record);
        }
    }
}

fn framed(part: &[u8], last: bool) -> Vec<u8> {
    let header = u32::try_from(part.len()).unwrap() | u32::from(last) << 31;
    [&header.to_be_bytes(), part].concat()
}

fn at(text: &str) -> SharePath {
    SharePath::parse(text).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_share_over_nfs3_does_what_every_share_does() {
    let Some(lab) = lab().await else { return };
    std::fs::create_dir(lab.dir.path().join("links")).unwrap();
    symlink("/etc", lab.dir.path().join("links/out")).unwrap();
    scenarios::all(&lab.admin).await;
}

//= test 1813-4.5-repeat
#[tokio::test]
async fn a_change_whose_reply_is_lost_is_unknown_and_never_somebody_elses() {
    let Some(lab) = lab().await else { return };
    let admin = &lab.admin;
    let (a, b) = (at("a"), at("b"));
    lab.next(MKDIR, Act::LoseReply);
    let error = admin.mkdir(&a, 0o755).await.unwrap_err();
    assert_eq!(error.kind, AdminErrorKind::Unknown);
    assert!(error.is_transient());
    assert!(admin.attr(&a).await.unwrap().is_some(), "it was made");

    lab.next(RENAME, Act::LoseReply);
    let error = admin.rename(&a, &b).await.unwrap_err();
    assert_eq!(error.kind, AdminErrorKind::Unknown);
    assert!(admin.attr(&b).await.unwrap().is_some(), "it was renamed");

    lab.next(13, Act::LoseReply);
    assert_eq!(
        admin.remove_dir(&b).await.unwrap_err().kind,
        AdminErrorKind::Unknown
    );
    assert!(!admin.remove_dir(&b).await.unwrap(), "it was removed");
}

#[tokio::test]
async fn what_may_be_repeated_is_and_its_maker_knows_it() {
    let Some(lab) = lab().await else { return };
    let admin = &lab.admin;
    let file = at("f");
    lab.next(CREATE, Act::LoseReply);
    assert!(matches!(
        admin.create_new(&file, b"1").await.unwrap(),
        Made::New(_)
    ));
    // The temporary file's rename went through: its number shows that it is in place.
    lab.next(RENAME, Act::LoseReply);
    let attr = admin.write(&file, b"22").await.unwrap();
    assert_eq!(
        admin.attr(&file).await.unwrap().unwrap().fileid,
        attr.fileid
    );
    lab.next(RENAME, Act::Close);
    assert_eq!(
        admin.write(&file, b"333").await.unwrap_err().kind,
        AdminErrorKind::Unknown
    );
    assert_eq!(admin.read(&file, 9).await.unwrap().unwrap(), b"22");
    assert_eq!(
        admin.list(&SharePath::root()).await.unwrap().unwrap().len(),
        1
    );
    for procedure in [LOOKUP, 6, READDIRPLUS] {
        lab.next(procedure, Act::Close);
        assert_eq!(admin.read(&file, 9).await.unwrap().unwrap(), b"22");
        admin.list(&SharePath::root()).await.unwrap();
        assert!(lab.plan.lock().unwrap().is_empty());
    }
}

#[tokio::test]
async fn no_reply_hangs_spins_or_swells() {
    let Some(lab) = lab().await else { return };
    let admin = &lab.admin;
    admin.mkdir(&at("d"), 0o755).await.unwrap();
    let garbage: Vec<u8> = (0..400u32)
        .flat_map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes())
        .collect();
    let acts = [
        Act::Hang,
        Act::Bytes(framed(&garbage, true)),
        Act::Bytes(framed(&[], true)),
        Act::Bytes(0xffff_ffff_u32.to_be_bytes().to_vec()),
        Act::Bytes([0x7fff_ffff_u32.to_be_bytes(), [1; 4]].concat()),
        Act::Bytes([0; 4096 * 4].to_vec()),
        Act::Bytes(
            [0x0010_0000_u32.to_be_bytes().to_vec(), vec![0; 1 << 20]]
                .concat()
                .repeat(2),
        ),
        Act::Bytes(garbage),
    ];
    for act in acts {
        lab.next(LOOKUP, act.clone());
        let begun = Instant::now();
        let cpu = cpu_time();
        let error = admin.attr(&at("d")).await.unwrap_err();
        let name = format!("{:.40}", format!("{act:?}"));
        assert!(
            begun.elapsed() < DEADLINE + Duration::from_secs(1),
            "{name}: {:?}",
            begun.elapsed()
        );
        assert!(cpu_time() - cpu < Duration::from_millis(400), "{name}");
        assert!(
            matches!(
                error.kind,
                AdminErrorKind::Protocol(_) | AdminErrorKind::TimedOut(_)
            ),
            "{name}: {error}"
        );
        assert!(
            admin.attr(&at("d")).await.unwrap().is_some(),
            "{name}: all is well afterwards"
        );
    }
    for size in [1, 4, 60] {
        lab.next(LOOKUP, Act::Fragments(size));
        assert!(
            admin.attr(&at("d")).await.unwrap().is_some(),
            "fragments of {size}"
        );
    }
}

/// What this thread, which runs client and proxy, has used.
fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(stat.split(' ').next().unwrap().parse().unwrap())
}

//= test 1813-2.6-jukebox
#[tokio::test]
async fn a_server_that_puts_calls_off_is_asked_again() {
    let Some(lab) = lab().await else { return };
    lab.next(MKDIR, Act::Status(10_008));
    lab.next(MKDIR, Act::Status(10_008));
    assert!(matches!(
        lab.admin.mkdir(&at("d"), 0o755).await.unwrap(),
        Made::New(_)
    ));
    lab.next(READDIRPLUS, Act::Status(10_003));
    assert_eq!(
        lab.admin
            .list(&SharePath::root())
            .await
            .unwrap()
            .unwrap()
            .len(),
        1
    );
    lab.next(LOOKUP, Act::Status(70));
    lab.next(LOOKUP, Act::Status(70));
    assert!(
        lab.admin.attr(&at("d")).await.unwrap().is_some(),
        "the export's handle was stale"
    );
}

#[tokio::test]
async fn a_server_without_readdirplus_is_listed_by_readdir_from_then_on() {
    let Some(lab) = lab().await else { return };
    lab.admin.mkdir(&at("d"), 0o755).await.unwrap();
    lab.admin.write(&at("d").join("f"), b"1").await.unwrap();
    lab.next(READDIRPLUS, Act::Status(10_004));
    {
        let _back = mutant::put_back(Mutant::ReaddirplusOnly);
        lab.admin.list(&SharePath::root()).await.unwrap_err();
    }
    lab.next(READDIRPLUS, Act::Status(10_004));
    for calls in [2, 1] {
        let (rpcs, listed) = lab.rpcs(lab.admin.list(&SharePath::root())).await;
        let listed = listed.unwrap().unwrap();
        assert_eq!((rpcs, listed.len()), (calls, 1));
        assert_eq!((&*listed[0].name, listed[0].attr), ("d".as_ref(), None));
    }
    lab.admin.remove_tree(&at("d"), &|| true).await.unwrap();
    assert_eq!(lab.admin.attr(&at("d")).await.unwrap(), None);
}

//= test 1813-3.3.16-cookie
#[tokio::test]
async fn a_listing_whose_place_is_lost_begins_anew_and_not_for_ever() {
    let Some(lab) = lab().await else { return };
    lab.admin.mkdir(&at("d"), 0o755).await.unwrap();
    for (lost, listed) in [(3, true), (4, false)] {
        for _ in 0..lost {
            lab.next(READDIRPLUS, Act::Status(10_003));
        }
        let names = lab.admin.list(&SharePath::root()).await;
        assert_eq!(names.is_ok(), listed, "{names:?}");
    }
}

#[tokio::test]
async fn a_restarted_server_is_found_again_without_an_error() {
    let Some(mut lab) = lab().await else { return };
    lab.admin.mkdir(&at("d"), 0o755).await.unwrap();
    let server = lab.server.take().unwrap();
    let addr = server.addr;
    server.shutdown().await;
    let error = lab.admin.attr(&at("d")).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    let settings = Settings {
        state_dir: lab.state.path().to_owned(),
        privileged_only: false,
    };
    lab.server = Some(serve(lab.dir.path(), addr, &settings).await.unwrap());
    tokio::time::sleep(Duration::from_millis(1050)).await;
    assert!(lab.admin.attr(&at("d")).await.unwrap().is_some());
}

#[tokio::test]
async fn repeated_operations_cost_few_calls() {
    let Some(lab) = lab().await else { return };
    let admin = &lab.admin;
    let frame = [at(".nfsvol"), at(".nfsvol/volumes")];
    admin.keep_handles(&frame);
    for dir in &frame {
        admin.mkdir(dir, 0o755).await.unwrap();
    }
    let volume = frame[1].join("db");
    assert_eq!(
        lab.rpcs(admin.mkdir(&volume, 0o755)).await.0,
        1,
        "MKDIR: that of volumes/ brought its handle"
    );
    let record = volume.join("record.json");
    assert_eq!(lab.rpcs(admin.attr(&volume)).await.0, 1, "LOOKUP");
    assert_eq!(
        lab.rpcs(admin.write(&record, b"{}")).await.0,
        4,
        "LOOKUP, CREATE, WRITE, RENAME"
    );
    assert_eq!(
        lab.rpcs(admin.read(&record, 100)).await.0,
        3,
        "LOOKUP, LOOKUP, READ"
    );
    assert_eq!(lab.rpcs(admin.list(&frame[1])).await.0, 1, "READDIRPLUS");
    assert_eq!(
        lab.rpcs(admin.touch(&record)).await.0,
        3,
        "LOOKUP, LOOKUP, SETATTR"
    );
    // One call of a user looks a directory up once.
    let scoped = admin.scoped();
    assert_eq!(lab.rpcs(scoped.read(&record, 100)).await.0, 3);
    assert_eq!(lab.rpcs(scoped.list(&volume)).await.0, 1, "READDIRPLUS");
    assert_eq!(lab.rpcs(scoped.attr(&record)).await.0, 1, "LOOKUP");
    assert_eq!(lab.rpcs(admin.list(&volume)).await.0, 2, "not anybody else");
}

#[tokio::test]
async fn what_a_call_has_found_is_left_behind_when_it_is_renamed_or_gone() {
    let Some(lab) = lab().await else { return };
    let (v, w) = (at("v"), at("w"));
    lab.admin.mkdir(&v, 0o755).await.unwrap();
    lab.admin.write(&v.join("a"), b"1").await.unwrap();
    let scoped = lab.admin.scoped();
    assert!(scoped.attr(&v.join("a")).await.unwrap().is_some());
    // Its own renames count at once.
    scoped.rename(&v, &w).await.unwrap();
    assert!(scoped.attr(&v.join("a")).await.unwrap().is_none());
    assert!(scoped.attr(&w.join("a")).await.unwrap().is_some());
    // What others removed is looked up anew.
    lab.admin.remove_tree(&w, &|| true).await.unwrap();
    assert!(scoped.attr(&w.join("a")).await.unwrap().is_none());
    lab.admin.mkdir(&w, 0o755).await.unwrap();
    lab.admin.write(&w.join("a"), b"2").await.unwrap();
    let contents = scoped.read(&w.join("a"), 100).await.unwrap();
    assert_eq!(contents.as_deref(), Some(&b"2"[..]));
}

//= test 1813-2.6-stale
#[tokio::test]
async fn a_kept_handle_that_went_stale_is_looked_up_anew() {
    let Some(lab) = lab().await else { return };
    let (kept, file) = (at("kept"), at("kept/f"));
    lab.admin.keep_handles(std::slice::from_ref(&kept));
    lab.admin.mkdir(&kept, 0o755).await.unwrap();
    lab.admin.create_new(&file, b"1").await.unwrap();
    let on_disk = lab.dir.path().join("kept");
    std::fs::remove_dir_all(&on_disk).unwrap();
    assert_eq!(lab.admin.attr(&file).await.unwrap(), None);
    std::fs::create_dir(&on_disk).unwrap();
    std::fs::write(on_disk.join("f"), b"2").unwrap();
    assert_eq!(lab.admin.read(&file, 9).await.unwrap().unwrap(), b"2");
}

#[tokio::test]
async fn what_another_host_replaced_is_never_answered_from_a_kept_handle() {
    let Some(lab) = lab().await else { return };
    let settings = settings_for(lab.server.as_ref().unwrap().addr.port());
    let other = Admin::v3(lab.admin.share().clone(), settings);
    let frame = ["own", "own/volumes", "own/trash"].map(at);
    for admin in [&lab.admin, &other] {
        admin.keep_handles(&frame);
    }
    for dir in &frame {
        other.mkdir(dir, 0o755).await.unwrap();
    }
    let volume = frame[1].join("db");
    let record = volume.join("record.json");
    for round in 0..3 {
        let contents = format!("round {round}").into_bytes();
        other.mkdir(&volume, 0o755).await.unwrap();
        other.create_new(&record, &contents).await.unwrap();
        let seen = lab.admin.read(&record, 100).await.unwrap();
        assert_eq!(seen.unwrap(), contents);
        // As a removal does: the directory lives on under another name.
        let aside = frame[2].join(&format!("db.{round}"));
        other.rename(&volume, &aside).await.unwrap();
        assert_eq!(lab.admin.read(&record, 100).await.unwrap(), None);
    }
}

#[tokio::test]
async fn connections_are_few_and_kept_for_a_while() {
    let Some(lab) = lab().await else { return };
    let tasks: Vec<_> = (0..40)
        .map(|n| {
            let admin = lab.admin.clone();
            tokio::spawn(async move { admin.mkdir(&at(&format!("d{n}")), 0o755).await })
        })
        .collect();
    for task in tasks {
        assert!(matches!(task.await.unwrap().unwrap(), Made::New(_)));
    }
    let Admin(inner) = &lab.admin;
    let crate::admin::Way::V3(v3) = &inner.way else {
        panic!()
    };
    assert!(
        (1..=4).contains(&v3.state().idle.len()),
        "{}",
        v3.state().idle.len()
    );
    tokio::time::pause();
    tokio::time::advance(IDLE).await;
    tokio::time::resume();
    assert!(v3.idle_wire().is_none());
    assert_eq!(std::fs::metadata(lab.dir.path()).unwrap().nlink(), 42);
}
