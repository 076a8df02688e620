//! The status page by the keyboard alone, in a real Chromium (WebDriver, W3C).

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;

use anyhow::{Context, ensure};
use lab::{Node, PATIENCE, Result, wait_for};
use serde_json::{Value, json};

use crate::CHROMIUM;

const DRIVER: &str = "/usr/bin/chromedriver";
const DRIVER_PORT: u16 = 9515;
/// Keys in WebDriver's words (section 17.4.2).
const TAB: char = '\u{e004}';
const ENTER: char = '\u{e007}';
/// More stops than the page has.
const STOPS: usize = 20;

/// A browser with the page, driven from the test process.
struct Browser {
    host: String,
    session: String,
}

/// One call of WebDriver; its value.
fn call(host: &str, method: &str, path: &str, body: &Value) -> Result<Value> {
    let mut stream = TcpStream::connect((host, DRIVER_PORT))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let body = body.to_string();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: localhost:{DRIVER_PORT}\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    // It keeps the connection, whatever it is asked for.
    let mut stream = BufReader::new(stream);
    let (mut status, mut length, mut line) = (String::new(), 0, String::new());
    while line != "\r\n" {
        line.clear();
        ensure!(stream.read_line(&mut line)? > 0, "no head");
        if status.is_empty() {
            status.clone_from(&line);
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse()?;
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    let mut answer: Value = serde_json::from_slice(&body)?;
    ensure!(status.contains(" 200 "), "{method} {path}: {answer}");
    Ok(answer["value"].take())
}

impl Browser {
    fn open(node: &Node, url: &str) -> Result<Self> {
        let host = node.ip();
        let up = || call(&host, "GET", "/status", &json!({}));
        wait_for("chromedriver", PATIENCE, || up().is_ok())
            .with_context(|| format!("{:?}", up()))?;
        let options = json!({ "binary": CHROMIUM, "args": [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync",
            format!("--user-data-dir={}", node.dir().join("keyboard").display()),
        ] });
        let wanted =
            json!({ "capabilities": { "alwaysMatch": { "goog:chromeOptions": options } } });
        let made = call(&host, "POST", "/session", &wanted)?;
        let session = made["sessionId"].as_str().context("no session")?.to_owned();
        let browser = Self { host, session };
        browser.call("url", &json!({ "url": url }))?;
        Ok(browser)
    }

    fn call(&self, what: &str, body: &Value) -> Result<Value> {
        call(
            &self.host,
            "POST",
            &format!("/session/{}/{what}", self.session),
            body,
        )
    }

    fn press(&self, keys: &str) -> Result {
        let presses: Vec<Value> = keys
            .chars()
            .flat_map(|key| ["keyDown", "keyUp"].map(|kind| json!({ "type": kind, "value": key })))
            .collect();
        let actions = json!({ "actions": [{ "type": "key", "id": "keys", "actions": presses }] });
        self.call("actions", &actions).map(drop)
    }

    fn ask(&self, expression: &str) -> Result<String> {
        let script = json!({ "script": format!("return String({expression})"), "args": [] });
        let said = self.call("execute/sync", &script)?;
        Ok(said.as_str().unwrap_or_default().to_owned())
    }

    /// What has the keyboard: its id, or else its text.
    fn at(&self) -> Result<String> {
        self.ask("document.activeElement.id || document.activeElement.textContent")
    }

    fn close(self) -> Result {
        let path = format!("/session/{}", self.session);
        call(&self.host, "DELETE", &path, &json!({})).map(drop)
    }
}

/// Every part of the page is reached, and a volume is found, without a mouse.
pub(crate) fn is_enough(node: &'static Node, url: &str) -> Result {
    let port = format!("--port={DRIVER_PORT}");
    let driver = node.spawn("chromedriver", &[DRIVER, &port, "--allowed-ips="])?;
    let browser = Browser::open(node, url)?;
    wait_for("the page to be live", PATIENCE, || {
        let state = browser.ask("document.getElementById('state').textContent");
        state.is_ok_and(|state| state.starts_with("live"))
    })?;

    browser.press(&TAB.to_string())?;
    ensure!(browser.at()? == "Skip to the shares", "{}", browser.at()?);
    browser.press(&ENTER.to_string())?;
    ensure!(browser.at()? == "shares", "{}", browser.at()?);
    let mut stops = Vec::new();
    while stops.last().is_none_or(|at| at != "find") {
        ensure!(stops.len() < STOPS, "the search is not among {stops:?}");
        browser.press(&TAB.to_string())?;
        stops.push(browser.at()?);
    }
    let rows = "document.getElementById('t-volumes').textContent";
    ensure!(browser.ask(rows)?.contains("db"), "{}", browser.ask(rows)?);
    browser.press("queu")?;
    wait_for("only the volume that is looked for", PATIENCE, || {
        browser
            .ask(rows)
            .is_ok_and(|rows| rows.contains("queue") && !rows.contains("db"))
    })
    .with_context(|| browser.ask(rows).unwrap_or_default())?;
    // Answers that come in leave the keyboard where it is.
    ensure!(browser.at()? == "find", "{}", browser.at()?);
    // On to the end of the page, and into its links.
    let mut last = browser.at()?;
    for _ in 0..STOPS {
        browser.press(&TAB.to_string())?;
        last = browser.at()?;
        if last == "Metrics for Prometheus" {
            break;
        }
    }
    ensure!(last == "Metrics for Prometheus", "ended at {last}");
    browser.close()?;
    driver.kill()
}
