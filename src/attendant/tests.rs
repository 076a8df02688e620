//! Attendants as processes of their own: this test binary again, as what a variable says.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{Attendant, Post, gone, lives, living};
use crate::mutant::{self, Mutant};

/// Names the directory that [`process`] attends.
const DIR: &str = "NFSVOL_TEST_ATTENDS";
/// Set for one of the first release.
const EARLIER: &str = "NFSVOL_TEST_ATTENDS_EARLIER";
const SOON: Duration = Duration::from_secs(10);
/// Guards against a hang only: a process starts within seconds, however busy the machine is.
const STARTED: Duration = Duration::from_secs(600);
const NOT_LONG: Duration = Duration::from_millis(50);

/// Not a test but what the tests start: attends a directory until it is killed.
#[tokio::test]
async fn process() {
    let Some(dir) = std::env::var_os(DIR) else {
        return;
    };
    let dir = Path::new(&dir);
    let _attends = match std::env::var_os(EARLIER) {
        None => {
            let (post, listener) = Post::take(dir).unwrap();
            (Some(post), listener.into_std().unwrap())
        }
        Some(_) => {
            let socket = dir.join(format!("{}.sock", std::process::id()));
            (None, UnixListener::bind(socket).unwrap())
        }
    };
    std::future::pending::<()>().await;
}

/// Ended at the latest when it is dropped.
struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Started {
    fn has_ended(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }
}

async fn start(dir: &Path, earlier: bool) -> (Started, Attendant) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["attendant::tests::process", "--exact"])
        .env(DIR, dir)
        .stdout(Stdio::null());
    if earlier {
        command.env(EARLIER, "");
    }
    let before = living(dir).len();
    let child = Started(command.spawn().unwrap());
    let deadline = Instant::now() + STARTED;
    loop {
        let mut found = living(dir);
        // Its number may not be in its lock yet.
        found.retain(|attendant| attendant.process().is_some());
        if found.len() > before
            && let Some(attendant) = found.pop()
        {
            return (child, attendant);
        }
        assert!(Instant::now() < deadline, "nobody attends");
        tokio::time::sleep(super::POLL).await;
    }
}

fn files(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap();
    names
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[tokio::test]
async fn it_lives_as_long_as_its_process_and_is_killed_through_it() {
    for earlier in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (mut child, attendant) = start(dir.path(), earlier).await;
        assert!(!attendant.ends(NOT_LONG).await && !child.has_ended());
        assert!(attendant.kill(SOON).await, "earlier: {earlier}");
        assert!(gone(dir.path(), Instant::now()).await);
        assert_eq!(files(dir.path()), [""; 0]);
        child.0.wait().unwrap();
    }
}

#[tokio::test]
async fn one_that_is_stopped_lives() {
    for earlier in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (child, attendant) = start(dir.path(), earlier).await;
        let pid = rustix::process::Pid::from_child(&child.0);
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        assert!(attendant.ask::<_, ()>(&(), NOT_LONG).await.is_err());
        assert_eq!(living(dir.path()).len(), 1);
        assert!(attendant.kill(SOON).await);
    }
}

#[tokio::test]
async fn one_that_leaves_lives_on_as_a_process_only() {
    let dir = tempfile::tempdir().unwrap();
    let (first, _listener) = Post::take(dir.path()).unwrap();
    let (second, _listener) = Post::take(dir.path()).unwrap();
    assert!(lives(dir.path(), first.name()) && lives(dir.path(), second.name()));
    drop(first);
    let left = living(dir.path());
    assert_eq!(left.len(), 1);
    assert_eq!(files(dir.path()).len(), 2, "its lock and its socket");
    drop(second);
    assert!(left[0].ends(SOON).await);
    assert_eq!(files(dir.path()), [""; 0]);
}

/// What a power failure leaves: files without a process, one of which has a number that another
/// attendant has now.
#[tokio::test]
async fn what_is_left_of_one_names_no_other() {
    let dirs = tempfile::tempdir().unwrap();
    let (ours, others) = (dirs.path().join("ours"), dirs.path().join("others"));
    fs::create_dir(&ours).unwrap();
    fs::create_dir(&others).unwrap();
    let (mut other, _) = start(&others, false).await;
    let pid = other.0.id();
    let leave = || {
        drop(UnixListener::bind(ours.join(format!("{pid}.sock"))).unwrap());
        drop(UnixListener::bind(ours.join("00c0ffee.sock")).unwrap());
        let lock = format!("{pid} {}\n", super::post::namespace());
        fs::write(ours.join("00c0ffee.lock"), lock).unwrap();
    };
    leave();
    assert!(living(&ours).is_empty());
    assert_eq!(files(&ours), [""; 0]);
    assert!(!other.has_ended() && living(&others).len() == 1);

    // By its number, and by the word that a guard has in its command line.
    let mut guard = Started(
        Command::new("sh")
            .args(["-c", "read waiting", "kernel-guard"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    // A process may be seen for a moment before its command line is.
    let words = format!("/proc/{}/cmdline", guard.0.id());
    while !fs::read_to_string(&words).unwrap().contains("kernel-guard") {
        tokio::task::yield_now().await;
    }
    drop(UnixListener::bind(ours.join(format!("{}.sock", guard.0.id()))).unwrap());
    let back = mutant::put_back(Mutant::AttendantByNumber);
    let found = living(&ours);
    assert_eq!(found.len(), 1, "the fault is not there");
    found[0].kill(SOON).await;
    drop(back);
    assert!(
        guard.0.wait().unwrap().code().is_none(),
        "it was not killed"
    );
    assert!(living(&ours).is_empty());
}
