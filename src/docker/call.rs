//! One call: a task that runs to its end, an answer in time, and an undo for what nobody heard of.
//!
//! What a success must be undone with travels along with its answer, as an [`Undo`]: from the
//! driver's task to the connection, until the client is known to have read the answer. Dropping
//! it anywhere on that way undoes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::Serialize;
use tokio::task::JoinError;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tracing::Instrument;

use super::calls::Measured;
use super::route::{Call, Kind, Route};
use super::{Created, Lookup, Settings, VolumeDriver, wire};

/// A driver is told to be done this much before the server answers for it, because its error says
/// what it waited for; a tenth of the deadline if that is less.
const MARGIN: Duration = Duration::from_secs(2);

/// How much of a holder's ID is logged: Docker's short form.
const SHORT_ID: usize = 12;

/// How a call ended, for the client.
pub(super) enum Outcome<D: VolumeDriver> {
    Ok(Bytes, Option<Undo<D>>),
    /// The text of the error.
    Failed(String),
    /// The connection must be closed without an answer.
    Silence,
}

/// Runs one call in its own task, until it is done or its deadline has passed.
///
/// Dropping the future leaves the task to itself; its success is undone then.
pub(super) async fn run<D: VolumeDriver>(
    driver: &Arc<D>,
    tasks: &TaskTracker,
    settings: &Settings,
    route: &'static Route,
    call: Call,
) -> Outcome<D> {
    let limit = match call {
        Call::Mount { .. } => settings.mount_deadline,
        _ => settings.deadline,
    };
    let mut line = Line::new(route, &call, driver.calls().begin(route.name));
    let failed = |text| match route.kind {
        Kind::Lookup => Outcome::Silence,
        _ => Outcome::Failed(text),
    };
    let title = title(route, &call);
    let deadline = Instant::now() + limit;
    // Its end is that of a story (src/telemetry/story.rs).
    let span = tracing::debug_span!(
        "call",
        call = route.name,
        volume = line.volume(),
        id = line.id()
    );
    let task = {
        let (driver, tasks_of_undo) = (Arc::clone(driver), tasks.clone());
        let driver_deadline = deadline - MARGIN.min(limit / 10);
        let perform = async move { perform(&driver, tasks_of_undo, call, driver_deadline).await };
        tasks.spawn(perform.instrument(span))
    };
    match tokio::time::timeout_at(deadline.into(), task).await {
        Ok(Ok(Ok(Answer { body, undo }))) => {
            line.end("ok", None);
            Outcome::Ok(body, undo)
        }
        Ok(Ok(Err(Failure::Absent(text)))) => {
            line.end("absent", None);
            Outcome::Failed(text)
        }
        Ok(Ok(Err(Failure::Unknown))) => {
            line.end("unknown", Some("the volume's state cannot be read"));
            Outcome::Silence
        }
        Ok(Ok(Err(Failure::Error(text)))) => {
            line.end("error", Some(&text));
            failed(text)
        }
        Ok(Err(error)) => {
            let text = panicked(&title, error);
            line.end("panic", Some(&text));
            failed(text)
        }
        Err(_) => {
            let text = late(&title, limit);
            line.end("deadline", Some(&text));
            failed(text)
        }
    }
}

fn late(title: &str, limit: Duration) -> String {
    format!(
        "{title} did not finish within {}. It goes on in the background, and what it still does is \
         undone. Most often an NFS server does not answer, which `nfsvol status` shows, or another call \
         for the volume waits; then try again",
        humantime::format_duration(limit)
    )
}

fn panicked(title: &str, error: JoinError) -> String {
    let payload = error.try_into_panic().ok();
    let text = payload.as_deref().and_then(|payload| {
        let text = payload.downcast_ref::<&str>().copied();
        text.or_else(|| payload.downcast_ref::<String>().map(String::as_str))
    });
    format!(
        "internal error in {title}: {}. Please report it with nfsvol's log",
        text.unwrap_or("the task ended without a result")
    )
}

struct Answer<D: VolumeDriver> {
    body: Bytes,
    undo: Option<Undo<D>>,
}

enum Failure {
    Error(String),
    /// Get of a volume that is known not to exist.
    Absent(String),
    /// Get of a volume of which nothing is known.
    Unknown,
}

/// Has the driver do the call, and puts what it says into the client's words.
async fn perform<D: VolumeDriver>(
    driver: &Arc<D>,
    tasks: TaskTracker,
    call: Call,
    deadline: Instant,
) -> Result<Answer<D>, Failure> {
    let undo = |what| Some(Undo::new(driver, tasks, what));
    match call {
        Call::Activate => {
            driver.activated();
            answer(&wire::Activated::VOLUME_DRIVER)
        }
        Call::Capabilities => answer(&wire::Capabilities::from(driver.scope())),
        Call::Create(wire::Create { name, opts }) => {
            let opts = opts.unwrap_or_default();
            let undo = match driver.create(&name, opts).await.map_err(text)? {
                Created::New => undo(What::Create { name }),
                Created::Existing => None,
            };
            answer_with(&wire::Done {}, undo)
        }
        Call::Remove(wire::Remove { name }) => {
            driver.remove(&name).await.map_err(text)?;
            answer(&wire::Done {})
        }
        Call::Mount(wire::Mount { name, id }) => {
            let mountpoint = driver.mount(&name, &id, deadline).await.map_err(text)?;
            let undo = undo(What::Mount { name, id });
            answer_with(&wire::Mountpoint { mountpoint }, undo)
        }
        Call::Unmount(wire::Unmount { name, id }) => {
            driver.unmount(&name, &id).await.map_err(text)?;
            answer(&wire::Done {})
        }
        Call::Path(wire::Path { name }) => {
            let path = driver.path(&name).await.map_err(text)?;
            answer(&wire::Mountpoint {
                mountpoint: path.unwrap_or_default(),
            })
        }
        Call::Get(wire::Get { name }) => match driver.get(&name).await.map_err(text)? {
            Lookup::Found(volume) => answer(&wire::Found {
                volume: volume.into(),
            }),
            Lookup::Absent => Err(Failure::Absent(format!("no such volume: {name}"))),
            Lookup::Unknown => Err(Failure::Unknown),
        },
        Call::List => {
            let volumes = driver.list().await.map_err(text)?;
            answer(&wire::Listed {
                volumes: volumes.into_iter().map(Into::into).collect(),
            })
        }
        Call::Metrics => Ok(Answer {
            body: driver.metrics().await.into(),
            undo: None,
        }),
        Call::Ask(question) => written(driver.ask(question).await.map_err(text)?.0, None),
    }
}

fn answer<D: VolumeDriver>(body: &impl Serialize) -> Result<Answer<D>, Failure> {
    answer_with(body, None)
}

fn answer_with<D: VolumeDriver>(
    body: &impl Serialize,
    undo: Option<Undo<D>>,
) -> Result<Answer<D>, Failure> {
    written(serde_json::to_vec(body), undo)
}

fn written<D: VolumeDriver>(
    body: serde_json::Result<Vec<u8>>,
    undo: Option<Undo<D>>,
) -> Result<Answer<D>, Failure> {
    match body {
        Ok(body) => Ok(Answer {
            body: body.into(),
            undo,
        }),
        Err(error) => Err(Failure::Error(format!(
            "internal error: the answer cannot be written as JSON: {error}"
        ))),
    }
}

fn text(error: impl std::error::Error) -> Failure {
    Failure::Error(chain(&error))
}

/// An error with its sources; one that repeats its source's text says it once.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let more = cause.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = cause.source();
    }
    text
}

fn title(route: &Route, call: &Call) -> String {
    match call.volume() {
        "" => route.name.to_owned(),
        volume => format!("{} of volume {volume:?}", route.name),
    }
}

/// What takes back a success that nobody heard of; does so when it is dropped.
pub(super) struct Undo<D: VolumeDriver> {
    /// Gone once it is known that the client has the answer.
    what: Option<What>,
    driver: Arc<D>,
    tasks: TaskTracker,
    /// Keeps the server from ending before this is decided.
    _pending: TaskTrackerToken,
}

#[derive(Debug)]
enum What {
    Create { name: String },
    Mount { name: String, id: String },
}

impl<D: VolumeDriver> Undo<D> {
    fn new(driver: &Arc<D>, tasks: TaskTracker, what: What) -> Self {
        Self {
            what: Some(what),
            driver: Arc::clone(driver),
            _pending: tasks.token(),
            tasks,
        }
    }

    /// The client has the answer: what was done stays.
    pub(super) fn keep(mut self) {
        self.what = None;
    }
}

impl<D: VolumeDriver> Drop for Undo<D> {
    fn drop(&mut self) {
        let Some(what) = self.what.take() else { return };
        // Without a runtime the process is ending; the driver's own start repairs what is left.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        let driver = Arc::clone(&self.driver);
        let undo = async move {
            match what {
                What::Create { name } => {
                    tracing::warn!(volume = name, "taking back a Create that nobody heard of");
                    driver.undo_create(&name).await;
                }
                What::Mount { name, id } => {
                    let short = short(&id);
                    tracing::warn!(volume = name, id = short, "undoing a Mount nobody heard of");
                    if let Err(error) = driver.unmount(&name, &id).await {
                        let error = chain(&error);
                        tracing::error!(volume = name, id = short, error, "cannot undo the Mount");
                    }
                }
            }
        };
        self.tasks.spawn_on(undo, &runtime);
    }
}

/// The line of a call in the log, written once. Without an end the client has gone.
struct Line {
    route: &'static Route,
    volume: String,
    id: String,
    since: Instant,
    measured: Measured,
    ended: bool,
}

impl Line {
    fn new(route: &'static Route, call: &Call, measured: Measured) -> Self {
        Self {
            route,
            volume: call.volume().to_owned(),
            id: short(call.id()),
            since: Instant::now(),
            measured,
            ended: false,
        }
    }

    /// What is not there is left out of the log.
    fn volume(&self) -> Option<&str> {
        Some(&*self.volume).filter(|volume| !volume.is_empty())
    }

    fn id(&self) -> Option<&str> {
        Some(&*self.id).filter(|id| !id.is_empty())
    }

    fn end(&mut self, outcome: &str, error: Option<&str>) {
        self.ended = true;
        self.measured.end(outcome, self.since.elapsed());
        let call = self.route.name;
        let (volume, id) = (self.volume(), self.id());
        let ms = (self.since.elapsed().as_secs_f64() * 1e4).round() / 10.0;
        match (outcome, self.route.kind != Kind::Change) {
            ("ok" | "absent", true) => tracing::debug!(call, volume, id, ms, outcome),
            ("ok", false) => tracing::info!(call, volume, id, ms, outcome),
            ("panic", _) => tracing::error!(call, volume, id, ms, outcome, error),
            _ => tracing::warn!(call, volume, id, ms, outcome, error),
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if !self.ended {
            self.end("client gone", None);
        }
    }
}

fn short(id: &str) -> String {
    id.chars().take(SHORT_ID).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Nested {
        #[error("cannot mount db")]
        Plain(#[source] std::io::Error),
        #[error("cannot mount db: {0}")]
        Repeating(#[source] std::io::Error),
    }

    #[test]
    fn an_error_is_told_with_its_cause_once() {
        let cause = || std::io::Error::other("timed out");
        assert_eq!(chain(&Nested::Plain(cause())), "cannot mount db: timed out");
        assert_eq!(
            chain(&Nested::Repeating(cause())),
            "cannot mount db: timed out"
        );
    }
}
