//! docs/examples/stack.yaml: servers on every node that show one volume, and a task that fills it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, ensure};
use lab::docker::IMAGE;
use lab::{Lab, PATIENCE, Result, wait_for};

use crate::{EXPORT, Swarm};

const STACK: &str = include_str!("../../docs/examples/stack.yaml");
/// In place of what the lab has not: networks between hosts, and nginx.
const LAB: &str = "version: '3.8'
services:
  web: { networks: [host] }
  editor: { networks: [host] }
networks:
  host: { external: true, name: host }
";
const ANSWER: Duration = Duration::from_secs(5);

/// What the server of a node shows.
fn page(ip: &str) -> Result<String> {
    let mut stream = TcpStream::connect((ip, 80))?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, page) = answer.split_once("\r\n\r\n").context("no head")?;
    ensure!(head.contains(" 200 "), "{answer}");
    Ok(page.trim_end().to_owned())
}

pub(crate) fn is_seen_on_every_node(lab: &Lab, swarm: &Swarm) -> Result {
    for host in &swarm.hosts {
        let serve = r#"CMD ["httpd", "-f", "-h", "/usr/share/nginx/html"]"#;
        let site =
            "mkdir -p usr/share/nginx/html; echo of the image >usr/share/nginx/html/index.html";
        host.engine().image("nginx:1", site, &[serve])?;
    }
    let files = [("stack.yaml", STACK), ("web-lab.yaml", LAB)];
    let mut deploy = "stack deploy --resolve-image never".to_owned();
    for (name, text) in files {
        let file = lab.dir().join(name);
        std::fs::write(&file, text)?;
        deploy += &format!(" -c {}", file.display());
    }
    ensure!(
        STACK.contains(&format!("image: {IMAGE}\n")),
        "another image"
    );
    let first = &swarm.hosts[0];
    first.ok(&format!("{deploy} web"))?;
    let state = || format!("{:?}", first.docker("stack ps --no-trunc web"));

    let mut seen = Vec::new();
    wait_for("each node to show a page of the volume", PATIENCE, || {
        seen = swarm
            .ips
            .iter()
            .map(|ip| page(ip).unwrap_or_default())
            .collect();
        seen.iter()
            .all(|page| page.contains(':') && !page.contains("image"))
    })
    .with_context(|| format!("{seen:?}\n{}", state()))?;
    // What the one task writes from now on reaches all of them.
    let written = swarm.nas.local(EXPORT).join("site/index.html");
    let mut news = String::new();
    // The editor writes every 10 s, and a page is cached for some seconds.
    wait_for("news on every node", PATIENCE, || {
        news = std::fs::read_to_string(&written).unwrap_or_default();
        let all = |text: &str| {
            swarm
                .ips
                .iter()
                .all(|ip| page(ip).is_ok_and(|page| page == text))
        };
        !seen.contains(&news.trim_end().to_owned()) && !news.is_empty() && all(news.trim_end())
    })
    .with_context(|| format!("{news:?}\n{}", state()))?;
    for host in &swarm.hosts {
        let web = host.ok("ps --quiet --filter label=com.docker.swarm.service.name=web_web")?;
        let refused = host.docker(&format!("exec {web} touch /usr/share/nginx/html/mine"))?;
        ensure!(
            refused.stderr.contains("Read-only file system"),
            "{refused:?}"
        );
    }

    first.ok("stack rm web")?;
    for host in &swarm.hosts {
        wait_for("the stack's containers to go", PATIENCE, || {
            host.ok("ps --quiet")
                .is_ok_and(|running| running.is_empty())
        })?;
    }
    // It outlives the stack, on each host's list.
    ensure!(written.exists());
    for host in &swarm.hosts {
        ensure!(host.inspect("site")?["Driver"] == "nfsvol");
    }
    wait_for("the volume to be removed", PATIENCE, || {
        first.ok("volume rm site").is_ok()
    })
}
