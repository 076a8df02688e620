//! Metrics and the status page of a real daemon: read by Prometheus, and by Chromium.

#[path = "monitoring/keyboard.rs"]
mod keyboard;
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lab::{DataPath, Export, Ganesha, Host, Lab, Node, PATIENCE, Part, Result, trial, wait_for};
use nfsvol::doors::monitor::{Names, Page, Watched, serve};
use serde_json::{Value, json};

const PORT: u16 = 9469;
const CHROMIUM: &str = "/usr/bin/chromium";
const PROMETHEUS_PORT: u16 = 9090;
/// The checkout; nodes see it at the same path.
const CHECKOUT: &str = env!("CARGO_MANIFEST_DIR");
/// An answer while a server is dead, on a busy machine; one that waits for the server waits for longer.
const SCRAPE: Duration = Duration::from_secs(30);
/// What a hostile share or host would like to run in the page.
const HOSTILE: &str = "<img src=x onerror=\"document.title='owned'\">";

fn main() -> ExitCode {
    let browser: &[Part] = &[Part::Browser];
    let all: &[Part] = &[
        Part::Docker,
        Part::Ganesha,
        Part::Fuse,
        Part::Browser,
        Part::Prometheus,
    ];
    lab::main!(|| {
        vec![
            trial("rules_hold", &[Part::Prometheus], |_| rules()),
            trial("watched", all, watched),
            trial("a_daemon_that_does_not_answer", browser, stuck),
        ]
    })
}

/// GET over TCP; the status, the head and the body.
fn get(host: &str, port: u16, path: &str) -> Result<(String, String)> {
    let mut stream = TcpStream::connect((host, port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {host}:{port}\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8(answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no head")?;
    ensure!(head.split(' ').nth(1) == Some("200"), "{path}: {answer}");
    Ok((head.to_owned(), body.to_owned()))
}

fn scrape(node: &Node) -> Result<String> {
    Ok(get(&node.ip(), PORT, "/metrics")?.1)
}

/// The value of one series.
fn value(text: &str, series: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(series))?;
    line.strip_prefix(' ')?.parse().ok()
}

/// The names by which families can be asked for, with what OpenMetrics appends.
fn exported(text: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for line in text.lines().filter_map(|l| l.strip_prefix("# TYPE ")) {
        let Some((name, kind)) = line.split_once(' ') else {
            continue;
        };
        let suffixes: &[&str] = match kind {
            "counter" => &["_total"],
            "histogram" => &["_bucket", "_sum", "_count"],
            _ => &[""],
        };
        names.extend(suffixes.iter().map(|suffix| format!("{name}{suffix}")));
    }
    names
}

/// The metrics that a text names.
fn named(text: &str) -> BTreeSet<String> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.split(|c| !word(c))
        .filter(|name| name.starts_with("nfsvol_") || name.starts_with("process_"))
        .map(str::to_owned)
        .collect()
}

fn file(path: &str) -> Result<String> {
    let path = Path::new(CHECKOUT).join(path);
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}

/// The queries of the dashboard, with its variables put in.
fn queries() -> Result<Vec<String>> {
    let dashboard: Value = serde_json::from_str(&file("docs/monitoring/grafana-dashboard.json")?)?;
    let panels = dashboard["panels"].as_array().context("no panels")?;
    let targets = panels.iter().flat_map(|p| p["targets"].as_array());
    let queries: Vec<String> = targets
        .flatten()
        .filter_map(|target| target["expr"].as_str())
        .map(|expr| {
            expr.replace("$instance", ".*")
                .replace("$__rate_interval", "1m")
        })
        .collect();
    ensure!(queries.len() > 20, "{queries:?}");
    Ok(queries)
}

fn rules() -> Result {
    let dir = tempfile::tempdir()?;
    for (from, to) in [
        ("docs/monitoring/alerts.yaml", "alerts.yaml"),
        ("tests/monitoring/alerts_test.yaml", "alerts_test.yaml"),
    ] {
        std::fs::write(dir.path().join(to), file(from)?)?;
    }
    let at = |name: &str| dir.path().join(name).display().to_string();
    let promtool = |args: &[&str]| lab::process::run(&[&["/usr/bin/promtool"], args].concat());
    promtool(&["check", "rules", &at("alerts.yaml")])?.ok()?;
    promtool(&["test", "rules", &at("alerts_test.yaml")])?.ok()?;
    // That test says how many alerts fire where everything is wrong: all of them.
    let alerts = file("docs/monitoring/alerts.yaml")?
        .matches("- alert: ")
        .count();
    let fired = format!("value: {alerts} }}");
    ensure!(file("tests/monitoring/alerts_test.yaml")?.contains(&fired));
    Ok(())
}

/// Runs Chromium on a node; what it printed.
fn chromium(node: &Node, args: &[&str], url: &str) -> Result<String> {
    let profile = tempfile::Builder::new()
        .prefix("chromium-")
        .tempdir_in(node.dir())?;
    let profile_dir = format!("--user-data-dir={}", profile.path().display());
    let mut argv = vec![
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        "--virtual-time-budget=2000",
        &profile_dir,
    ];
    argv.extend(args);
    argv.push(url);
    node.ok(&argv)
}

/// A picture of the page, kept for people below target/tmp.
fn screenshot(node: &Node, name: &str, size: &str, more: &[&str], url: &str) -> Result {
    let path = node.dir().join(name);
    let to = format!("--screenshot={}", path.display());
    let size = format!("--window-size={size}");
    let args: Vec<&str> = [to.as_str(), size.as_str()]
        .into_iter()
        .chain(more.iter().copied())
        .collect();
    chromium(node, &args, url)?;
    let picture = std::fs::read(&path)?;
    ensure!(picture.starts_with(b"\x89PNG"), "{name} is no picture");
    ensure!(picture.len() > 10_000, "{name} is almost empty");
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::write(kept, picture)?;
    Ok(())
}

/// Puts the document of a hostile host on the share, as one with write access to it can.
fn plant(nas: &Ganesha) -> Result {
    let hosts = nas.local("/srv/export").join(".nfsvol/hosts");
    std::fs::create_dir_all(hosts.join(HOSTILE))?;
    let document = json!({
        "format": 1, "host": HOSTILE, "id": "x", "boot": "x", "session": "x",
        // Alive for longer than the trial takes.
        "session_ms": 3_600_000,
        "holds": { "db": { "nonce": "x", "access": "shared", "since": 0, "holders": [HOSTILE] } },
    });
    std::fs::write(
        hosts.join(format!("{HOSTILE}.1.json")),
        document.to_string(),
    )?;
    Ok(())
}

fn watched(lab: &'static Lab) -> Result {
    let nas = Ganesha::start(lab, "nas", &[Export::new("/srv/export").uncached()])?;
    let listen = format!("0.0.0.0:{PORT}");
    let serve = ["--metrics", listen.as_str(), "--poll", "1s"];
    let host = Host::start_with(lab, "node1", DataPath::Fuse, "nas:/srv/export", &serve, &[])?;
    let node = host.node();

    host.ok("volume create -d nfsvol db")?;
    host.ok("volume create -d nfsvol -o access=exclusive queue")?;
    host.ok("volume create -d nfsvol old")?;
    host.ok("volume rm old")?;
    host.keep("one", "-v db:/data")?;
    host.keep("two", "-v queue:/data")?;
    host.ok("exec one dd if=/dev/zero of=/data/file bs=1M count=2 conv=fsync")?;
    let other = Host::start(lab, "node2", DataPath::Fuse, "nas:/srv/export")?;
    other.ok("volume create -d nfsvol uploads")?;
    other.keep("three", "-v uploads:/data")?;
    pictures(&host, &other)?;
    let hostile = format!("subdir={HOSTILE}");
    let create = ["volume", "create", "-d", "nfsvol", "-o", &hostile, "web"];
    host.engine().ok(&create)?;
    plant(&nas)?;

    let expected = [
        // The planted host is one of them.
        ("nfsvol_hosts", 3.0),
        ("nfsvol_trash_entries", 1.0),
        ("nfsvol_calls_total{call=\"Mount\",outcome=\"ok\"}", 2.0),
        ("nfsvol_call_duration_seconds_count{call=\"Create\"}", 4.0),
        ("nfsvol_volumes", 4.0),
        ("nfsvol_attachments", 2.0),
        (
            "nfsvol_share_up{share=\"nas:/srv/export\",home=\"true\"}",
            1.0,
        ),
        ("nfsvol_share_rtt_seconds{share=\"nas:/srv/export\"}", 1e-6),
        ("nfsvol_share_rpcs_total{share=\"nas:/srv/export\"}", 10.0),
        ("nfsvol_workers{state=\"serving\"}", 2.0),
        (
            "nfsvol_volume_written_bytes_total{volume=\"db\"}",
            2_097_152.0,
        ),
        (
            "nfsvol_volume_operations_total{volume=\"db\",operation=\"write\"}",
            2.0,
        ),
        ("nfsvol_volume_rpcs_total{volume=\"db\"}", 3.0),
        ("nfsvol_session_valid", 1.0),
        ("nfsvol_claims", 1.0),
        ("process_resident_memory_bytes", 1e6),
    ];
    let mut text = String::new();
    for (series, least) in expected {
        wait_for(series, PATIENCE, || {
            text = scrape(node).unwrap_or_default();
            value(&text, series).is_some_and(|value| value >= least)
        })
        .with_context(|| text.clone())?;
    }
    documented(&text)?;
    on_the_socket(&host, &text)?;
    let prometheus = prometheus(node)?;
    seen_in_a_browser(&host)?;
    keyboard::is_enough(node, &format!("http://127.0.0.1:{PORT}/"))?;
    queried(node)?;
    when_things_break(&host, &nas)?;
    prometheus.kill()
}

/// What is exported is in the manual, and what the manual, the dashboard and the rules name is
/// exported.
fn documented(text: &str) -> Result {
    let exported = exported(text);
    let manual = file("docs/OPERATIONS.md")?;
    let listed: BTreeSet<String> = manual
        .lines()
        .filter(|line| line.starts_with("| `nfsvol_") || line.starts_with("| `process_"))
        .flat_map(|line| named(line.split('|').nth(1).unwrap_or_default()))
        .collect();
    let bare = |name: &String| {
        let suffixes = ["_bucket", "_sum", "_count"];
        let base = suffixes.iter().find_map(|suffix| name.strip_suffix(suffix));
        base.filter(|base| base.ends_with("_seconds"))
            .unwrap_or(name)
            .to_owned()
    };
    let families: BTreeSet<String> = exported.iter().map(bare).collect();
    ensure!(
        families == listed,
        "exported and not in docs/OPERATIONS.md: {:?}\nin docs/OPERATIONS.md and not exported: {:?}",
        families.difference(&listed).collect::<Vec<_>>(),
        listed.difference(&families).collect::<Vec<_>>()
    );
    for path in [
        "docs/monitoring/alerts.yaml",
        "docs/monitoring/grafana-dashboard.json",
    ] {
        let mut used = named(&file(path)?);
        used.retain(|name| !exported.contains(name));
        ensure!(
            used.is_empty(),
            "{path} names what is not exported: {used:?}"
        );
    }
    Ok(())
}

/// The daemon's own socket tells the same.
fn on_the_socket(host: &Host, text: &str) -> Result {
    let answer = host.nfsvol().metrics()?;
    ensure!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    ensure!(exported(&answer) == exported(text), "{answer}");
    Ok(())
}

/// A Prometheus that scrapes the daemon each second.
fn prometheus(node: &'static Node) -> Result<lab::Process<'static>> {
    let dir = node.dir().join("prometheus");
    std::fs::create_dir(&dir)?;
    let config = format!(
        "global: {{ scrape_interval: 1s, evaluation_interval: 1s }}\n\
         scrape_configs: [{{ job_name: nfsvol, static_configs: [{{ targets: ['127.0.0.1:{PORT}'] }}] }}]\n\
         rule_files: ['{CHECKOUT}/docs/monitoring/alerts.yaml']\n"
    );
    std::fs::write(dir.join("prometheus.yml"), config)?;
    let argv = [
        "/usr/bin/prometheus".to_owned(),
        format!("--config.file={}/prometheus.yml", dir.display()),
        format!("--storage.tsdb.path={}/data", dir.display()),
        format!("--web.listen-address=0.0.0.0:{PROMETHEUS_PORT}"),
    ];
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    node.spawn("prometheus", &argv)
}

/// How many series a query gives.
fn query(node: &Node, expr: &str) -> Result<usize> {
    let encoded: String = expr.bytes().map(|byte| format!("%{byte:02X}")).collect();
    let path = format!("/api/v1/query?query={encoded}");
    let answer = get(&node.ip(), PROMETHEUS_PORT, &path)?.1;
    let answer: Value = serde_json::from_str(&answer)?;
    ensure!(answer["status"] == "success", "{expr}: {answer}");
    let result = answer["data"]["result"].as_array().context("no result")?;
    Ok(result.len())
}

/// Prometheus takes what it scrapes, and understands every query of the dashboard.
fn queried(node: &Node) -> Result {
    wait_for("Prometheus to scrape", PATIENCE, || {
        query(node, "up{job=\"nfsvol\"} == 1").is_ok_and(|found| found == 1)
            && query(node, "rate(nfsvol_calls_total[1m])").is_ok_and(|found| found > 0)
    })?;
    let mut without = queries()?;
    // This host has no kernel NFS client, so these tell nothing here.
    without.retain(|expr| !expr.contains("nfsvol_mount_"));
    wait_for("an answer to each query", PATIENCE, || {
        without.retain(|expr| query(node, expr).unwrap_or(0) == 0);
        without.is_empty()
    })
    .with_context(|| format!("no answer to {without:?}"))
}

fn seen_in_a_browser(host: &Host) -> Result {
    let node = host.node();
    let url = format!("http://127.0.0.1:{PORT}/");
    let texts = [
        "<title>nfsvol on node1</title>",
        "live, as of ",
        "● up",
        "nas:/srv/export",
        "all answer",
        "claimed by node1",
        "serving",
        "old.20",
    ];
    let mut dom = String::new();
    wait_for("the page to show what is there", PATIENCE, || {
        dom = chromium(node, &["--dump-dom"], &url).unwrap_or_default();
        texts.iter().all(|text| dom.contains(text))
    })
    .with_context(|| format!("one of {texts:?} is not in\n{dom}"))?;
    // The hostile texts are there, as texts, three times: a directory, a host and a holder.
    let escaped = "&lt;img src=x onerror=";
    ensure!(dom.matches(escaped).count() >= 3, "{dom}");
    ensure!(!dom.contains("<img"), "a hostile text became HTML:\n{dom}");
    // A name of somebody else that leads here (DNS rebinding) shows nothing.
    let rebound = [
        "--dump-dom",
        "--host-resolver-rules=MAP evil.example 127.0.0.1",
    ];
    let dom = chromium(node, &rebound, &format!("http://evil.example:{PORT}/"))?;
    ensure!(dom.contains("does not go by the name"), "{dom}");
    ensure!(!dom.contains("t-shares"), "{dom}");
    Ok(())
}

/// Both hosts with their containers, as docs/monitoring shows them.
fn pictures(host: &Host, other: &Host) -> Result {
    let (node, url) = (host.node(), format!("http://127.0.0.1:{PORT}/"));
    let mut shown = Vec::new();
    for (host, name) in [(host, "one"), (host, "two"), (other, "three")] {
        let id = host.ok(&format!("inspect -f {{{{.Id}}}} {name}"))?;
        shown.push(format!("container {}", &id[..12]));
    }
    wait_for("the containers of both hosts", PATIENCE, || {
        let page = get(&node.ip(), PORT, "/status.json").map(|(_, page)| page);
        page.is_ok_and(|page| shown.iter().all(|name| page.contains(name)))
    })?;
    let mut dom = String::new();
    wait_for("the page to show them", PATIENCE, || {
        dom = chromium(node, &["--dump-dom"], &url).unwrap_or_default();
        shown.iter().all(|name| dom.contains(name))
    })
    .with_context(|| dom.clone())?;
    screenshot(node, "status-page.png", "1280,1040", &[], &url)?;
    screenshot(node, "status-page-phone.png", "400,1500", &[], &url)?;
    let dark = ["--blink-settings=preferredColorScheme=0"];
    screenshot(node, "status-page-dark.png", "1280,1040", &dark, &url)
}

/// With a dead server and a dead worker, scrapes are as quick as ever and say what is wrong.
fn when_things_break(host: &Host, nas: &Ganesha) -> Result {
    let node = host.node();
    nas.freeze()?;
    node.sh("kill -9 $(pgrep -f '[n]fsvol fuse-worker' | head -1)")?;
    let down = "nfsvol_share_up{share=\"nas:/srv/export\",home=\"true\"} 0.0";
    let died = "nfsvol_workers{state=\"died\"} 1.0";
    let mut slowest = Duration::ZERO;
    let mut text = String::new();
    wait_for("the share to be seen as down", PATIENCE, || {
        let began = Instant::now();
        text = scrape(node).unwrap_or_default();
        slowest = slowest.max(began.elapsed());
        text.contains(down) && text.contains(died)
    })
    .with_context(|| text.clone())?;
    let began = Instant::now();
    let (_, page) = get(&node.ip(), PORT, "/status.json?find=")?;
    slowest = slowest.max(began.elapsed());
    ensure!(slowest < SCRAPE, "an answer took {slowest:?}");
    let page: Value = serde_json::from_str(&page)?;
    ensure!(page["shares"][0]["up"] == false, "{page:#}");
    ensure!(page["workers"]["died"] == 1, "{page:#}");
    let url = format!("http://127.0.0.1:{PORT}/");
    let mut dom = String::new();
    wait_for("the page to show it", PATIENCE, || {
        dom = chromium(node, &["--dump-dom"], &url).unwrap_or_default();
        dom.contains("▲ down") && dom.contains("1 broken")
    })
    .with_context(|| dom.clone())?;
    for alert in ["NfsvolShareDown", "NfsvolWorkerDied"] {
        wait_for(alert, PATIENCE, || {
            query(node, &format!("ALERTS{{alertname=\"{alert}\"}}")).is_ok_and(|n| n == 1)
        })?;
    }
    nas.thaw()
}

/// A daemon that is stuck: asked for what the page shows, it does not answer.
struct Stuck;

impl Watched for Stuck {
    async fn metrics(&self) -> String {
        std::future::pending().await
    }

    async fn page(&self, _: &str) -> Page {
        std::future::pending().await
    }
}

fn stuck(lab: &'static Lab) -> Result {
    let node = Node::machine(lab, "looking")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let listener = runtime.block_on(tokio::net::TcpListener::bind("10.77.0.1:0"))?;
    let url = format!("http://{}/", listener.local_addr()?);
    runtime.spawn(serve(listener, Names::default(), Arc::new(Stuck)));
    let dom = chromium(&node, &["--dump-dom"], &url)?;
    runtime.shutdown_background();
    ensure!(dom.contains("The daemon does not answer"), "{dom}");
    ensure!(dom.contains("Nothing is known yet"), "{dom}");
    Ok(())
}
