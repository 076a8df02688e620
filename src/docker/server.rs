//! Connections: taking them, their limits, and a shutdown that cuts nobody off.
//!
//! Shutdown: the socket file goes first, so new clients get a refusal that dockerd repeats with
//! its body intact; whoever is connected already, or waits to be, is served; connections without
//! a request are closed after a moment; and then the calls that still run have
//! [`Settings::drain`] to end.

use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use sd_notify::NotifyState;
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::call::{self, Outcome, Undo};
use super::route::{Kind, Refusal, Route};
use super::wire::{Failed, MAX_BODY, MEDIA_TYPE};
use super::{Listener, VolumeDriver};

/// The largest head of a request, in bytes: dockerd sends about 200.
const MAX_HEAD: usize = 16 << 10;

/// How long to wait after accept(2) failed, as when the process has no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a client that is in the queue at shutdown may take to appear; it is there already.
const QUEUE: Duration = Duration::from_millis(20);

/// How long a connection without a request stays open at shutdown: a request that the client has
/// just begun to send would be lost otherwise, and dockerd would repeat it without its body.
const IDLE: Duration = Duration::from_millis(500);

/// How long a client may take at shutdown to read its answer, or to send the rest of a request.
const LINGER: Duration = Duration::from_secs(5);

/// Limits of the server, all of them times in which something must have happened.
#[derive(Debug, Clone)]
pub struct Settings {
    /// For Mount. dockerd gives up after 120 s and then sends no Unmount.
    pub mount_deadline: Duration,
    /// For every other call. dockerd gives up on most after 60 s.
    pub deadline: Duration,
    /// For the calls that run when the shutdown begins. systemd kills after 90 s.
    pub drain: Duration,
    /// For the head of a request, counted from the connection or from the previous answer. Longer
    /// than any client keeps an idle connection (Go's, in dockerd: 30 s), because closing one
    /// just when a request is on its way loses that request.
    pub head: Duration,
    /// For the body of a request, once its head is there.
    pub body: Duration,
    /// Connections served at once; more wait in the kernel's queue. Each call of dockerd that
    /// does not return holds one, so this is far above what one dead server can tie up.
    pub connections: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            mount_deadline: Duration::from_secs(100),
            deadline: Duration::from_secs(50),
            drain: Duration::from_secs(60),
            head: Duration::from_secs(120),
            body: Duration::from_secs(20),
            connections: 1024,
        }
    }
}

/// The drain time has passed and calls still run.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "stopped with calls unfinished, {0:?} after the shutdown began; what they did is looked at \
     again at the next start"
)]
pub struct Unfinished(pub Duration);

/// Serves `driver` on `listener` until `shutdown` is ready and the calls that run then have ended.
///
/// # Errors
/// [`Unfinished`], when calls still run after [`Settings::drain`].
pub async fn run<D: VolumeDriver>(
    mut listener: Listener,
    driver: Arc<D>,
    settings: Settings,
    shutdown: impl Future<Output = ()>,
) -> Result<(), Unfinished> {
    let drain = settings.drain;
    let server = Arc::new(Server {
        driver,
        slots: Arc::new(Semaphore::new(settings.connections)),
        settings,
        tasks: TaskTracker::new(),
        close_idle: CancellationToken::new(),
    });
    notify(NotifyState::Ready);
    {
        let mut shutdown = pin!(shutdown);
        loop {
            tokio::select! {
                () = &mut shutdown => break,
                (stream, slot) = server.accept(&listener) => server.serve(stream, slot),
            }
        }
    }
    notify(NotifyState::Stopping);
    tracing::info!("stopping: calls that run may take {drain:?} to end");
    if !listener.is_handed_over() {
        listener.remove();
        while let Ok((stream, slot)) = tokio::time::timeout(QUEUE, server.accept(&listener)).await {
            server.serve(stream, slot);
        }
    }
    drop(listener);

    let ended = async {
        tokio::time::sleep(IDLE).await;
        server.close_idle.cancel();
        server.tasks.close();
        server.tasks.wait().await;
    };
    tokio::time::timeout(drain, ended)
        .await
        .map_err(|_| Unfinished(drain))
}

fn notify(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "cannot tell systemd about the service's state");
    }
}

struct Server<D> {
    driver: Arc<D>,
    settings: Settings,
    /// One permit per connection.
    slots: Arc<Semaphore>,
    /// Connections, calls and undos: all that must end before the process does.
    tasks: TaskTracker,
    close_idle: CancellationToken,
}

impl<D: VolumeDriver> Server<D> {
    /// The next connection, when there is room for one. May be dropped at any time.
    async fn accept(&self, listener: &Listener) -> (UnixStream, OwnedSemaphorePermit) {
        let slot = Arc::clone(&self.slots).acquire_owned().await;
        let slot = slot.expect("the semaphore is never closed");
        loop {
            match listener.socket.accept().await {
                Ok((stream, _)) => return (stream, slot),
                Err(error) => {
                    tracing::error!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn serve(self: &Arc<Self>, stream: UnixStream, slot: OwnedSemaphorePermit) {
        let server = Arc::clone(self);
        self.tasks.spawn(async move {
            server.connection(stream).await;
            drop(slot);
        });
    }

    async fn connection(self: Arc<Self>, stream: UnixStream) {
        let peer = Peer::new();
        let service = service_fn(|request| self.request(&peer, request));
        let socket = Socket {
            io: TokioIo::new(stream),
            broken: &peer.broken,
        };
        let mut connection = pin!(
            http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(self.settings.head)
                .max_buf_size(MAX_HEAD)
                .auto_date_header(false)
                .serve_connection(socket, service)
        );
        let served = tokio::select! {
            biased;
            served = connection.as_mut() => served,
            () = self.close_idle.cancelled() => {
                connection.as_mut().graceful_shutdown();
                loop {
                    match tokio::time::timeout(LINGER, connection.as_mut()).await {
                        Ok(served) => break served,
                        Err(_) if peer.is_waiting() => {}
                        Err(_) => return,
                    }
                }
            }
        };
        if let Err(error) = served {
            tracing::debug!(%error, "connection ended");
        }
        peer.gone();
    }

    /// Answers one request. An error closes the connection without an answer.
    async fn request(
        &self,
        peer: &Peer<D>,
        request: Request<Incoming>,
    ) -> Result<Response<Full<Bytes>>, Silence> {
        let _waiting = peer.asks();
        let route = match Route::find(request.method(), request.uri().path()) {
            Ok(route) => route,
            Err(refusal) => {
                self.driver.calls().refused(None);
                return Ok(refuse(&refusal));
            }
        };
        let call = match self.body(route, request.into_body()).await? {
            Ok(body) => route.parse(&body),
            Err(refusal) => Err(refusal),
        };
        let call = match call {
            Ok(call) => call,
            Err(refusal) if route.kind == Kind::Lookup => {
                tracing::warn!(call = route.name, error = %refusal, "not answered");
                self.driver.calls().refused(Some(route.name));
                return Err(Silence);
            }
            Err(refusal) => {
                self.driver.calls().refused(Some(route.name));
                return Ok(refuse(&refusal));
            }
        };
        let outcome = call::run(&self.driver, &self.tasks, &self.settings, route, call).await;
        match outcome {
            Outcome::Ok(body, undo) => {
                peer.answered(undo);
                Ok(respond(StatusCode::OK, body, route.media_type()))
            }
            Outcome::Failed(text) => Ok(fail(StatusCode::INTERNAL_SERVER_ERROR, &text)),
            Outcome::Silence => Err(Silence),
        }
    }

    async fn body(&self, route: &Route, body: Incoming) -> Result<Result<Bytes, Refusal>, Silence> {
        if body.size_hint().lower() > MAX_BODY as u64 {
            return Ok(Err(Refusal::TooLarge(route.name)));
        }
        let whole = Limited::new(body, MAX_BODY).collect();
        match tokio::time::timeout(self.settings.body, whole).await {
            Ok(Ok(body)) => Ok(Ok(body.to_bytes())),
            Ok(Err(error)) if error.is::<LengthLimitError>() => {
                Ok(Err(Refusal::TooLarge(route.name)))
            }
            // The client has gone, or does not speak HTTP.
            Ok(Err(_)) => Err(Silence),
            Err(_) => Ok(Err(Refusal::Slow(route.name))),
        }
    }
}

fn refuse(refusal: &Refusal) -> Response<Full<Bytes>> {
    tracing::warn!(error = %refusal, "request refused");
    let mut response = fail(refusal.status(), &refusal.to_string());
    if let Refusal::Method { wanted, .. } = refusal
        && let Ok(wanted) = HeaderValue::from_str(wanted.as_str())
    {
        response.headers_mut().insert(ALLOW, wanted);
    }
    response
}

fn fail(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    // A string always has a JSON form; the fallback still is an error to every client.
    let body = serde_json::to_vec(&Failed { err: text }).unwrap_or_default();
    respond(status, body.into(), MEDIA_TYPE)
}

fn respond(status: StatusCode, body: Bytes, form: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    let form = HeaderValue::from_static(form);
    response.headers_mut().insert(CONTENT_TYPE, form);
    response
}

/// No answer is the right one.
#[derive(Debug, thiserror::Error)]
#[error("the connection is closed without an answer")]
struct Silence;

/// What is known of the client at the other end of a connection.
struct Peer<D: VolumeDriver> {
    /// It waits for an answer.
    waiting: AtomicBool,
    /// For the last answer, until it is known to have been read.
    undo: Mutex<Option<Undo<D>>>,
    /// A read or a write on the socket has failed. Closing a Unix socket with an unread answer in
    /// it resets the connection (unix_release_sock in net/unix/af_unix.c), so an answer that was
    /// written and never read shows here too.
    broken: AtomicBool,
}

impl<D: VolumeDriver> Peer<D> {
    fn new() -> Self {
        Self {
            waiting: AtomicBool::new(false),
            undo: Mutex::new(None),
            broken: AtomicBool::new(false),
        }
    }

    fn is_waiting(&self) -> bool {
        self.waiting.load(Ordering::Relaxed)
    }

    /// A request has come, so the answer before it has been read.
    fn asks(&self) -> Waiting<'_> {
        self.keep();
        self.waiting.store(true, Ordering::Relaxed);
        Waiting(&self.waiting)
    }

    fn answered(&self, undo: Option<Undo<D>>) {
        *self.undo.lock().unwrap_or_else(PoisonError::into_inner) = undo;
    }

    /// The connection is closed. What is not kept now is undone as this is dropped.
    fn gone(&self) {
        if !self.broken.load(Ordering::Relaxed) {
            self.keep();
        }
    }

    fn keep(&self) {
        let undo = self
            .undo
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(undo) = undo {
            undo.keep();
        }
    }
}

/// While a request is being answered.
struct Waiting<'a>(&'a AtomicBool);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// A connection's socket that notes when a read or a write fails: hyper takes a reset between two
/// requests for an ordinary end.
struct Socket<'a> {
    io: TokioIo<UnixStream>,
    broken: &'a AtomicBool,
}

impl Socket<'_> {
    fn note<T>(&self, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if let Poll::Ready(Err(_)) = result {
            self.broken.store(true, Ordering::Relaxed);
        }
        result
    }
}

impl Read for Socket<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.io).poll_read(cx, buf);
        self.note(result)
    }
}

impl Write for Socket<'_> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.io).poll_write(cx, buf);
        self.note(result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.note(result)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
