//! The guard: a process that watches one volume's right.
//!
//! It is a session of its own and takes no notice of the daemon's end. It keeps a directory of the
//! volume's file system open from the start ([`super::root`]), because opening one could wait for the
//! server then.
//!
//! Known limit: who kills a guard with SIGKILL leaves the volume without a fence until the daemon
//! sees that, within a sixth of the session time.

use std::io::{self, BufRead};
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tracing::Instrument;

use super::cut::Barrier;
use super::end;
use super::root::Root;
use super::{Ask, FENCED, State, Task};
use crate::attendant::{self, Post, receive, send};
use crate::sys::files::write_whole;
use crate::telemetry;
use chance::since_boot;

/// The longest that the end of the right can go by unseen after the host was suspended: timers do
/// not count that.
const LOOK: Duration = Duration::from_millis(250);
/// How long the guard's start waits for the volume's directory; it goes on trying after that.
const OPEN: Duration = Duration::from_secs(2);
/// How long a client of the socket may take to say what it wants.
const ASK: Duration = Duration::from_secs(5);
/// How often it is looked whether connections behind the barrier have ended.
const LOWER: Duration = Duration::from_secs(1);

type Asked = (Ask, oneshot::Sender<State>);

/// Watches the volume that standard input names. This is what the subcommand does; the process is
/// to end when it returns.
///
/// # Errors
/// When it cannot start; the daemon has been told by then.
pub(crate) fn run() -> io::Result<()> {
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line)?;
    let task: Task = serde_json::from_str(&line)?;
    // Fails if there is a log already, which is as good.
    let _ = telemetry::init_bounded();
    attendant::detach()?;
    // A host that is short of memory must not lose its fence.
    attendant::spare(-1000);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let ready = || {
        attendant::tell(&Ok::<(), String>(()))?;
        attendant::close_standard_streams();
        Ok(())
    };
    let span = tracing::info_span!("guard", volume = %task.volume);
    let result = runtime.block_on(watch(&task, ready).instrument(span));
    if let Err(error) = &result {
        // Whoever started it may be gone, and then nobody wants to know.
        let _ = attendant::tell(&Err::<(), String>(error.to_string()));
    }
    // What still waits for the server ends with the process.
    runtime.shutdown_background();
    result
}

async fn watch(task: &Task, ready: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let (post, listener) = Post::take(&task.run_dir)?;
    let mut root = Root::of(task);
    if root.get(OPEN).is_none() {
        tracing::warn!("the volume's directory does not open; trying on");
    }
    // Only the volume's end, or SIGKILL, ends a guard.
    let _term = signal(SignalKind::terminate())?;
    let _hangup = signal(SignalKind::hangup())?;
    ready()?;
    let (tx, mut asked) = mpsc::channel(8);
    tokio::spawn(listen(listener, tx));

    let mut until = task.fence.until;
    let mut reply = loop {
        let left = Duration::from_nanos(until).saturating_sub(since_boot());
        if left.is_zero() {
            tracing::error!(volume = %task.volume, "this host's right has ended: fencing");
            break None;
        }
        root.get(Duration::ZERO);
        tokio::select! {
            Some((ask, reply)) = asked.recv() => match ask {
                Ask::Fence => break Some(reply),
                Ask::Leave => {
                    drop(root);
                    drop(post);
                    let _ = reply.send(State::Watching { device: task.device, until });
                    return Ok(());
                }
                Ask::Prolong(to) => {
                    until = until.max(to);
                    let _ = reply.send(State::Watching { device: task.device, until });
                }
                Ask::Status => {
                    let _ = reply.send(State::Watching { device: task.device, until });
                }
            },
            () = tokio::time::sleep(left.min(LOOK)) => {}
        }
    };
    if let Some(reply) = reply.take() {
        let _ = reply.send(State::Fencing);
    }
    let fencing = end::fence(task, until, root);
    tokio::pin!(fencing);
    let (fenced, barrier) = loop {
        tokio::select! {
            done = &mut fencing => break done,
            Some((_, reply)) = asked.recv() => drop(reply.send(State::Fencing)),
        }
    };
    if let Err(error) = write_whole(
        &task.run_dir.join(FENCED),
        &serde_json::to_vec_pretty(&fenced)?,
    ) {
        tracing::warn!(%error, "no report written");
    }
    drop(post);
    lower(barrier).await;
    Ok(())
}

/// Takes the barrier away as soon as nothing is behind it.
async fn lower(mut barrier: Barrier) {
    while !barrier.lower() {
        tokio::time::sleep(LOWER).await;
    }
}

async fn listen(listener: UnixListener, to: mpsc::Sender<Asked>) {
    loop {
        let Ok((mut stream, _)) = listener.accept().await else {
            // Out of descriptors, at worst; later there may be some.
            tokio::time::sleep(ASK).await;
            continue;
        };
        let to = to.clone();
        tokio::spawn(async move {
            let Ok(Ok(ask)) = tokio::time::timeout(ASK, receive(&mut stream)).await else {
                return;
            };
            let (reply, state) = oneshot::channel();
            if to.send((ask, reply)).await.is_ok()
                && let Ok(state) = state.await
            {
                let _ = send(&mut stream, &state).await;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Fenced, Guards};
    use super::*;
    use crate::sys::mountinfo::DeviceId;
    use crate::volume::Right;
    use crate::volume::VolumeName;

    fn from_now(time: Duration) -> u64 {
        u64::try_from((since_boot() + time).as_nanos()).unwrap()
    }

    /// Of a file system that nothing has mounted.
    fn task(guards: &Guards, volume: &VolumeName, right: Duration) -> Task {
        let run_dir = guards.run_dir(volume);
        std::fs::create_dir_all(&run_dir).unwrap();
        Task {
            volume: volume.clone(),
            place: run_dir.join("place"),
            share_place: run_dir.join("share"),
            device: DeviceId {
                major: 0,
                minor: u32::MAX,
            },
            server: "127.0.0.1:1".parse().ok(),
            docker: run_dir.join("docker.sock"),
            run_dir,
            fence: Right {
                until: from_now(right),
                under_way: 60_000,
            },
        }
    }

    async fn ask(task: &Task, ask: Ask) -> io::Result<State> {
        let guards = attendant::living(&task.run_dir);
        guards[0].ask(&ask, Duration::from_secs(20)).await
    }

    #[tokio::test]
    async fn a_right_that_is_prolonged_lasts_and_one_that_ends_is_fenced() {
        let dir = tempfile::tempdir().unwrap();
        let guards = Guards::new(dir.path(), dir.path(), dir.path());
        let db: VolumeName = "db".parse().unwrap();
        let task = task(&guards, &db, Duration::from_secs(3600));
        let (tell, ready) = oneshot::channel();
        let (watched, report) = (task.clone(), task.run_dir.join(FENCED));
        let watching = tokio::spawn(async move {
            watch(&watched, || {
                let _ = tell.send(());
                Ok(())
            })
            .await
        });
        ready.await.unwrap();
        let later = task.fence.until + 1;
        let state = ask(&task, Ask::Prolong(later)).await.unwrap();
        let device = task.device;
        assert_eq!(
            state,
            State::Watching {
                device,
                until: later
            }
        );
        // What comes late does not shorten it.
        let state = ask(&task, Ask::Prolong(1)).await.unwrap();
        assert_eq!(
            state,
            State::Watching {
                device,
                until: later
            }
        );
        assert!(!report.exists());
        assert_eq!(ask(&task, Ask::Fence).await.unwrap(), State::Fencing);
        watching.await.unwrap().unwrap();
        let fenced: Fenced = guards.fenced(&db).unwrap();
        assert!(fenced.in_time && fenced.troubles.is_empty(), "{fenced:?}");
        assert_eq!(guards.unsettled().len(), 1);
        guards.settle(&db, &fenced).unwrap();
        assert!(guards.unsettled().is_empty() && guards.fenced(&db).is_some());
    }

    #[tokio::test]
    async fn a_right_ends_by_itself_unless_the_volume_is_left_before() {
        let dir = tempfile::tempdir().unwrap();
        let guards = Guards::new(dir.path(), dir.path(), dir.path());
        let ended = task(
            &guards,
            &"ended".parse().unwrap(),
            Duration::from_millis(50),
        );
        watch(&ended, || Ok(())).await.unwrap();
        assert!(guards.fenced(&ended.volume).is_some());

        let left = task(&guards, &"left".parse().unwrap(), Duration::from_secs(3600));
        let (tell, ready) = oneshot::channel();
        let watched = left.clone();
        let watching = tokio::spawn(async move {
            watch(&watched, || {
                let _ = tell.send(());
                Ok(())
            })
            .await
        });
        ready.await.unwrap();
        ask(&left, Ask::Leave).await.unwrap();
        watching.await.unwrap().unwrap();
        assert!(guards.fenced(&left.volume).is_none());
    }
}
