//! Against small servers that answer each RPC program as a case wants it.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

/// The words of a reply behind its xid: accepted, without a verifier.
fn accepted(words: &[u32]) -> Option<Vec<u32>> {
    Some([&[1, 0, 0, 0, 0], words].concat())
}

fn mismatch(low: u32, high: u32) -> Option<Vec<u32>> {
    Some(vec![1, 0, 0, 0, 2, low, high])
}

/// A string of four letters as XDR words.
fn four(text: &str) -> [u32; 2] {
    [4, u32::from_be_bytes(text.as_bytes().try_into().unwrap())]
}

/// Serves what `answer` says to (program, version, procedure); None is silence.
async fn server(answer: impl Fn(u32, u32, u32) -> Option<Vec<u32>> + Send + Sync + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let answer = Arc::new(answer);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let answer = Arc::clone(&answer);
            tokio::spawn(async move {
                while let Ok(header) = stream.read_u32().await {
                    let mut call = vec![0; (header & 0x7fff_ffff) as usize];
                    stream.read_exact(&mut call).await.unwrap();
                    let word =
                        |n: usize| u32::from_be_bytes(call[4 * n..4 * n + 4].try_into().unwrap());
                    let Some(words) = answer(word(3), word(4), word(5)) else {
                        continue;
                    };
                    let length = 4 + 4 * u32::try_from(words.len()).unwrap();
                    let reply: Vec<u8> = [length | 1 << 31, word(0)]
                        .into_iter()
                        .chain(words)
                        .flat_map(u32::to_be_bytes)
                        .collect();
                    stream.write_all(&reply).await.unwrap();
                }
            });
        }
    });
    port
}

/// A whole v3 server: MOUNT gives a handle or `status`, and exports `/srv`, `/home` shortened
/// to four letters.
fn v3(status: u32) -> impl Fn(u32, u32, u32) -> Option<Vec<u32>> {
    move |program, version, procedure| match (program, version, procedure) {
        (100_003, 3, 0) | (100_005, 3, 3) => accepted(&[]),
        (100_003, 3, 19) => accepted(&[0, 0, 65536, 1, 1, 32768, 2, 1, 512, 0, 1 << 30, 0, 1, 0]),
        (100_003, ..) => mismatch(3, 3),
        (100_005, 3, 1) if status == 0 => accepted(&[0, 4, 0xabcd, 2, 1, 6]),
        (100_005, 3, 1) => accepted(&[status]),
        (100_005, 3, 5) => {
            accepted(&[&[1], &four("/srv")[..], &[0, 1], &four("/tmp"), &[0, 0]].concat())
        }
        _ => None,
    }
}

async fn ask(export: &str, nfs: u16, mount: u16) -> Result<Reached, ReachError> {
    let share = format!("127.0.0.1:{export}").parse().unwrap();
    let ports = Ports {
        nfs: Some(nfs),
        mount: Some(mount),
    };
    probe(&share, ports, Duration::from_millis(400)).await
}

/// A port where nobody listens.
async fn closed() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap().port()
}

#[tokio::test]
async fn a_server_of_version_3_tells_its_limits() {
    let port = server(v3(0)).await;
    let reached = ask("/srv", port, port).await.unwrap();
    assert!(reached.v3 && !reached.v4);
    let limits = reached.fsinfo.unwrap();
    assert_eq!(
        (limits.rtmax, limits.wtmax, limits.wtpref),
        (65536, 32768, 2)
    );
    assert_eq!(limits.maxfilesize, 1 << 30);
}

#[tokio::test]
async fn a_server_of_version_4_alone_needs_no_mount_service() {
    let port = server(|program, version, _| match (program, version) {
        (100_003, 4) => accepted(&[]),
        (100_003, _) => mismatch(4, 4),
        _ => None,
    })
    .await;
    let reached = ask("/srv", port, closed().await).await.unwrap();
    assert!(reached.v4 && !reached.v3 && reached.v3_error.is_none());
}

#[tokio::test]
async fn a_server_that_drops_who_asks_for_version_4_is_used_over_version_3() {
    let answer = v3(0);
    let port = server(move |program, version, procedure| {
        // A record that ends too early, which is as good as a broken connection.
        if version == 4 {
            Some(vec![1])
        } else {
            answer(program, version, procedure)
        }
    })
    .await;
    let reached = ask("/srv", port, port).await.unwrap();
    assert!(reached.v3 && !reached.v4);
}

/// What is reached of a server that knows version 4 alone, and does this where it is asked for version 3.
async fn reached_of_a_stranger_to_3(in_its_place: Option<Vec<u32>>) -> Result<Reached, ReachError> {
    let port = server(move |program, version, _| match (program, version) {
        (100_003, 4) => accepted(&[]),
        (100_003, _) => in_its_place.clone(),
        _ => None,
    })
    .await;
    let share = "127.0.0.1:/srv".parse().unwrap();
    let ports = Ports {
        nfs: Some(port),
        mount: Some(port),
    };
    probe(&share, ports, Duration::from_secs(5)).await
}

#[tokio::test]
async fn a_server_that_drops_or_ignores_who_asks_for_version_3_is_used_over_version_4() {
    for in_its_place in [None, Some(vec![1])] {
        let reached = reached_of_a_stranger_to_3(in_its_place).await.unwrap();
        assert!(reached.v4 && !reached.v3);
        let why = reached.v3_error.expect("told, as it may pass");
        assert_eq!(why.step, Step::Null);
    }
}

#[test]
fn a_server_that_is_not_asked_for_version_4_is_found() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let _back = mutant::put_back(Mutant::SilenceIsForAll);
    let broken = reached_of_a_stranger_to_3(Some(vec![1]));
    assert!(runtime.block_on(broken).is_err());
}

#[tokio::test]
async fn each_step_has_its_own_error() {
    let cases = [
        (v3(13), "/srv/sub", Step::Mount, Cause::Denied),
        (
            v3(13),
            "/srvx",
            Step::Mount,
            Cause::NoExport(vec!["/srv".into(), "/tmp".into()]),
        ),
        (
            v3(2),
            "/srv/x",
            Step::Mount,
            Cause::NoExport(vec!["/srv".into(), "/tmp".into()]),
        ),
    ];
    for (answer, export, step, cause) in cases {
        let port = server(answer).await;
        let error = ask(export, port, port).await.unwrap_err();
        assert_eq!((error.step, &error.cause), (step, &cause));
        assert!(!error.is_transient());
    }

    let port = server(v3(0)).await;
    let error = ask("/srv", port, closed().await).await.unwrap_err();
    assert_eq!((error.step, &error.cause), (Step::Mount, &Cause::Refused));
    let nobody = closed().await;
    let error = ask("/srv", nobody, port).await.unwrap_err();
    assert_eq!((error.step, &error.cause), (Step::Connect, &Cause::Refused));
    assert_eq!(
        error.to_string(),
        format!(
            "share 127.0.0.1:/srv: connect: 127.0.0.1 port {nobody} refused the connection; is \
             the NFS server running there, and does a firewall let this host through?"
        )
    );
    assert!(error.is_transient());

    let old = server(|program, _, _| (program == 100_003).then(|| mismatch(2, 2)).flatten()).await;
    let error = ask("/srv", old, old).await.unwrap_err();
    assert_eq!(error.cause, Cause::Version { low: 2, high: 2 });

    let silent = server(|_, _, _| None).await;
    let begun = Instant::now();
    let error = ask("/srv", silent, silent).await.unwrap_err();
    assert_eq!(error.step, Step::Null);
    assert!(matches!(error.cause, Cause::TimedOut(_)), "{error}");
    assert!(begun.elapsed() < Duration::from_millis(700));
}

#[tokio::test]
async fn a_refused_export_of_a_server_that_also_speaks_version_4_is_left_to_the_mount() {
    let answer = v3(2);
    let port = server(
        move |program, version, procedure| match (program, version) {
            (100_003, 4) => accepted(&[]),
            _ => answer(program, version, procedure),
        },
    )
    .await;
    let reached = ask("/pseudo", port, port).await.unwrap();
    assert!(reached.v4 && !reached.v3);
    let text = reached.v3_error.unwrap().to_string();
    assert!(
        text.contains("no such export; the server exports: /srv, /tmp;"),
        "{text}"
    );
}

#[tokio::test]
async fn a_list_of_flavors_longer_than_memory_is_not_believed() {
    let answer = v3(0);
    let port = server(
        move |program, version, procedure| match (program, procedure) {
            (100_005, 1) => accepted(&[0, 4, 0xabcd, u32::MAX, 1]),
            _ => answer(program, version, procedure),
        },
    )
    .await;
    assert!(ask("/srv", port, port).await.unwrap().v3);
}

#[tokio::test]
async fn a_dead_address_of_a_name_does_not_hide_a_living_one() {
    let port = server(v3(0)).await;
    let share: Share = "nas:/srv".parse().unwrap();
    let ports = Ports {
        nfs: Some(port),
        mount: Some(port),
    };
    // Nobody listens on the first; the fake server does on the second.
    let addresses = ["127.0.0.2", "127.0.0.1"]
        .map(|addr| addr.parse().unwrap())
        .to_vec();
    let until = Instant::now() + Duration::from_secs(2);
    let contact = reach_any(&share, ports, addresses.clone(), until, &Meter::default()).await;
    assert_eq!(contact.unwrap().reached.addr, addresses[1]);
}
