//! HTTP for Prometheus and for browsers, on an address that is set.
//!
//! | path | answer |
//! |---|---|
//! | `/` | the status page |
//! | `/metrics` | metrics in the OpenMetrics text format |
//! | `/status.json?find=TEXT` | what the page shows |
//!
//! Volumes come first: an address that cannot be listened on is told in the log and tried again,
//! and no number of requests here takes more than [`CONNECTIONS`] from the daemon.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{
    ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, HeaderName, HeaderValue,
    REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::Watched;
use super::host::Names;
use crate::docker::wire::METRICS_TYPE;

/// The page; `NONCE` in it stands for what its script and its style are recognised by.
const PAGE: &str = include_str!("page.html");
const NONCE: &str = "{nonce}";

/// Connections served at once: a few Prometheus servers and people.
const CONNECTIONS: usize = 64;
/// The longest that an answer takes. It is made from memory; this is for a machine under load.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);
/// For the head of a request, and between two of one connection.
const HEAD: Duration = Duration::from_secs(75);
/// The largest head of a request, in bytes: browsers send about 1,000.
const MAX_HEAD: usize = 16 << 10;
/// How often an address is tried that cannot be listened on.
const RETRY: Duration = Duration::from_secs(10);
/// How long to wait after accept(2) failed, as when the process has no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

const HTML: &str = "text/html; charset=utf-8";
const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";

/// Serves until `stop` is cancelled.
pub(crate) async fn run(
    address: SocketAddr,
    names: Names,
    watched: Arc<impl Watched>,
    stop: CancellationToken,
) {
    let serving = async {
        let listener = listen(address).await;
        tracing::info!(%address, "metrics and status page");
        serve(listener, names, watched).await;
    };
    tokio::select! {
        () = serving => {}
        () = stop.cancelled() => {}
    }
}

async fn listen(address: SocketAddr) -> TcpListener {
    let mut told = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(error) if !told => {
                told = true;
                tracing::error!(%address, %error,
                    "no metrics and no status page: cannot listen there; trying again");
            }
            Err(_) => {}
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Serves whoever connects. Connections end with the future.
pub async fn serve(listener: TcpListener, names: Names, watched: Arc<impl Watched>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let names = Arc::new(names);
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let slot = Arc::clone(&slots).acquire_owned().await;
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        let (names, watched) = (Arc::clone(&names), Arc::clone(&watched));
        connections.spawn(async move {
            connection(stream, &names, watched.as_ref()).await;
            drop(slot);
        });
    }
}

async fn connection(stream: TcpStream, names: &Names, watched: &impl Watched) {
    let Ok(local) = stream.local_addr() else {
        return;
    };
    let service = service_fn(async |request: Request<Incoming>| {
        let answered = tokio::time::timeout(PATIENCE, answer(&request, local.ip(), names, watched));
        let late = || text(StatusCode::SERVICE_UNAVAILABLE, "the daemon is too busy\n");
        let mut response = answered.await.unwrap_or_else(|_| late());
        if request.method() == Method::HEAD {
            *response.body_mut() = Full::default();
        }
        Ok::<_, Infallible>(response)
    });
    let connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(stream), service)
    );
    if let Err(error) = connection.await {
        tracing::debug!(%error, "connection to the status page ended");
    }
}

async fn answer(
    request: &Request<Incoming>,
    local: IpAddr,
    names: &Names,
    watched: &impl Watched,
) -> Response<Full<Bytes>> {
    let hosts = request.headers().get_all(HOST).iter();
    let mut hosts: Vec<&str> = hosts
        .map(|host| host.to_str().unwrap_or_default())
        .collect();
    // `GET http://host/ HTTP/1.1` names one as well.
    hosts.extend(request.uri().authority().map(|host| host.as_str()));
    if hosts.is_empty() || hosts.iter().any(|host| !names.has(host, local)) {
        return text(
            StatusCode::FORBIDDEN,
            "This host does not go by the name that you asked for. Ask by its address or its host \
             name; or tell nfsvol of the name with --metrics-name (NFSVOL_METRICS_NAME).\n",
        );
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut refused = text(StatusCode::METHOD_NOT_ALLOWED, "There is only GET here.\n");
        let allowed = HeaderValue::from_static("GET, HEAD");
        refused.headers_mut().insert(ALLOW, allowed);
        return refused;
    }
    match request.uri().path() {
        "/" => page(),
        "/metrics" => respond(StatusCode::OK, METRICS_TYPE, watched.metrics().await),
        "/status.json" => {
            let find = find(request.uri().query().unwrap_or_default());
            match serde_json::to_vec(&watched.page(&find).await) {
                Ok(body) => respond(StatusCode::OK, JSON, body),
                Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
            }
        }
        _ => text(
            StatusCode::NOT_FOUND,
            "There is / (the status page), /metrics and /status.json.\n",
        ),
    }
}

/// What `find=` of a query says.
fn find(query: &str) -> String {
    let value = query.split('&').find_map(|part| part.strip_prefix("find="));
    let mut bytes = Vec::new();
    let mut rest = value.unwrap_or_default().bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digits = [rest.next(), rest.next()].map(|digit| digit.unwrap_or(b'x'));
                let digits = std::str::from_utf8(&digits).unwrap_or_default();
                u8::from_str_radix(digits, 16).unwrap_or(b'%')
            }
            plain => plain,
        });
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The page, whose own script and style alone may run: each answer has another nonce.
fn page() -> Response<Full<Bytes>> {
    let mut random = [0u8; 16];
    if getrandom::fill(&mut random).is_err() {
        return text(StatusCode::INTERNAL_SERVER_ERROR, "no random numbers\n");
    }
    let nonce: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; \
         connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
         require-trusted-types-for 'script'; trusted-types 'none'"
    );
    let mut response = respond(StatusCode::OK, HTML, PAGE.replace(NONCE, &nonce));
    if let Ok(policy) = HeaderValue::from_str(&policy) {
        let headers = response.headers_mut();
        headers.insert(CONTENT_SECURITY_POLICY, policy);
    }
    response
}

fn text(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    respond(status, TEXT, text.to_owned())
}

fn respond(
    status: StatusCode,
    form: &'static str,
    body: impl Into<Bytes>,
) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    for (name, value) in [
        (CONTENT_TYPE, form),
        (CACHE_CONTROL, "no-store"),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (X_FRAME_OPTIONS, "DENY"),
        (REFERRER_POLICY, "no-referrer"),
        (CONTENT_SECURITY_POLICY, "default-src 'none'"),
        (
            HeaderName::from_static("cross-origin-resource-policy"),
            "same-origin",
        ),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::monitor::view::{Page, Trash, Trashed, View};

    struct Still;

    impl Watched for Still {
        async fn metrics(&self) -> String {
            "# EOF\n".to_owned()
        }

        async fn page(&self, find: &str) -> Page {
            let entry = Trashed {
                volume: find.to_owned(),
                ..Trashed::default()
            };
            let trash = Trash {
                newest: vec![entry],
                ..Trash::default()
            };
            let view = View {
                trash: Some(trash),
                ..View::default()
            };
            Page {
                view,
                ..Page::default()
            }
        }
    }

    async fn ask(request: &str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let names = Names::new(["node1".to_owned()]);
        let served = tokio::spawn(serve(listener, names, Arc::new(Still)));
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!("{request}Connection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        served.abort();
        answer
    }

    #[tokio::test]
    async fn a_page_of_another_name_reads_nothing() {
        for path in ["/", "/metrics", "/status.json"] {
            for host in [
                "Host: evil.example\r\n",
                "",
                "Host: node1\r\nHost: evil\r\n",
            ] {
                let answer = ask(&format!("GET {path} HTTP/1.1\r\n{host}")).await;
                let refused =
                    answer.starts_with("HTTP/1.1 403") || answer.starts_with("HTTP/1.1 400");
                assert!(refused, "{path} {host} {answer}");
            }
            let answer = ask(&format!("GET {path} HTTP/1.1\r\nHost: node1:1\r\n")).await;
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        }
        let answer = ask("GET http://evil.example/ HTTP/1.1\r\nHost: node1\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
    }

    #[tokio::test]
    async fn nothing_can_be_changed() {
        for method in ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"] {
            let answer = ask(&format!(
                "{method} /metrics HTTP/1.1\r\nHost: localhost\r\n"
            ))
            .await;
            assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");
            assert!(answer.contains("\r\nallow: GET, HEAD\r\n"), "{answer}");
        }
        let answer = ask("HEAD / HTTP/1.1\r\nHost: localhost\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(answer.ends_with("\r\n\r\n"), "a body: {answer}");
        let answer = ask("GET /etc/passwd HTTP/1.1\r\nHost: localhost\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    }

    #[tokio::test]
    async fn the_page_runs_its_own_script_and_nothing_else() {
        let answer = ask("GET / HTTP/1.1\r\nHost: localhost\r\n").await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let (_, nonce) = head.split_once("script-src 'nonce-").unwrap();
        let nonce = &nonce[..32];
        assert!(head.contains("default-src 'none'") && head.contains("frame-ancestors 'none'"));
        assert!(
            !body.contains(NONCE) && body.matches(nonce).count() == 2,
            "{body}"
        );
        let again = ask("GET / HTTP/1.1\r\nHost: localhost\r\n").await;
        assert!(!again.contains(nonce), "the same nonce twice");
        // Nothing is loaded from elsewhere, and no text becomes HTML.
        for word in [
            "http:",
            "https:",
            "//cdn",
            "src=",
            "@import",
            "url(",
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            " style=",
            " onclick=",
        ] {
            assert!(!PAGE.contains(word), "{word}");
        }
    }

    #[tokio::test]
    async fn what_is_searched_for_arrives() {
        let answer =
            ask("GET /status.json?find=a%2Fb+%3C%zz HTTP/1.1\r\nHost: localhost\r\n").await;
        assert!(answer.contains(r#""volume":"a/b <%"#), "{answer}");
        assert!(
            answer.contains("\r\ncontent-type: application/json\r\n"),
            "{answer}"
        );
    }
}
