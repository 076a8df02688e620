//! What README shows works as it is written there, on the lab's hosts.

use std::process::ExitCode;

use anyhow::{Context, bail, ensure};
use lab::docker::Engine;
use lab::{Export, Ganesha, Lab, Nfsvol, Node, Part, Result, trial};

const README: &str = include_str!("../README.md");
/// The share that README names, and the one that stands for it here.
const SHARE: (&str, &str) = ("nas:/export", "nas:/srv/export");
const PARTS: &[Part] = &[Part::Docker, Part::Ganesha, Part::Fuse];

fn main() -> ExitCode {
    lab::main!(|| vec![trial("readme_does_what_it_says", PARTS, readme)])
}

/// A Docker host on which a user follows README.
struct Host {
    engine: Engine,
    daemon: Option<Nfsvol<'static>>,
}

impl Host {
    fn new(lab: &'static Lab, name: &str) -> Result<Self> {
        let node = Box::leak(Box::new(Node::machine(lab, name)?));
        // What `make install` does; the lab has no compiler on its hosts.
        node.sh(&format!(
            "mount -t tmpfs tmpfs /usr/local/bin
             install -m 0755 {} /usr/local/bin/nfsvol",
            Nfsvol::binary()
        ))?;
        let engine = Engine::start(lab, node)?;
        engine.image("alpine", "", &["CMD [\"sh\"]"])?;
        engine.image("image", "", &["CMD [\"sleep\", \"1000\"]"])?;
        Ok(Self {
            engine,
            daemon: None,
        })
    }

    /// Does what one line of README says; its output.
    fn follow(&mut self, line: &str) -> Result<String> {
        let command = line.split("  #").next().unwrap_or(line).trim();
        let command = command
            .replace(SHARE.0, SHARE.1)
            .replace(" IMAGE", " image");
        if let Some(args) = command.strip_prefix("nfsvol serve") {
            let args: Vec<&str> = args.trim_end_matches('&').split_whitespace().collect();
            self.daemon = Some(self.engine.nfsvol(&args)?);
            return Ok(String::new());
        }
        self.engine
            .node()
            .sh(&format!("PATH=/usr/local/bin:$PATH; {command}"))
            .with_context(|| format!("README: {line}"))
    }
}

/// The lines of the console blocks of one part of README, from a heading to the next one.
fn console(heading: &str) -> Result<Vec<&'static str>> {
    let (_, text) = README
        .split_once(heading)
        .with_context(|| format!("README has no {heading:?}"))?;
    let text = text.split("\n## ").next().unwrap_or(text);
    let blocks = text.split("```").skip(1).step_by(2);
    Ok(blocks
        .filter_map(|block| block.strip_prefix("console\n"))
        .flat_map(str::lines)
        .filter(|line| !line.is_empty())
        .collect())
}

fn readme(lab: &'static Lab) -> Result {
    let nas = Ganesha::start(lab, "nas", &[Export::new("/srv/export")])?;
    let volumes = nas.local("/srv/export");
    let (mut a, mut b) = (Host::new(lab, "nodea")?, Host::new(lab, "nodeb")?);
    let mut said = String::new();
    let opening = console("# nfsvol\n")?;
    ensure!(opening.len() == 6, "{opening:?}");
    for line in opening {
        said = match line.split_once("# ") {
            Some(("nodeA", command)) => a.follow(command)?,
            Some(("nodeB", command)) => b.follow(command)?,
            _ if line == said => continue,
            _ => bail!("README promises {line:?}, here it is {said:?}"),
        };
    }
    ensure!(std::fs::read_to_string(volumes.join("db/file"))? == "kept\n");

    // The quick start, by a user who comes later: the first volume has gone.
    a.follow("docker container prune -f && docker volume rm db && nfsvol trash purge --all")?;
    for line in console("## Quick start")? {
        let command = line.strip_prefix("# ").context(line)?;
        match command {
            _ if command.starts_with("make install") => continue,
            _ if command.starts_with("nfsvol serve") => continue,
            _ => {}
        }
        let said = a.follow(command)?;
        let told = |word: &str| said.contains(word);
        let shown = match command.split_whitespace().take(3).collect::<Vec<_>>()[..] {
            ["docker", "volume", "inspect"] => told("\"holders\"") && told("\"healthy\""),
            ["nfsvol", "trash", "ls"] => told("db."),
            ["nfsvol", "status", ..] => told(SHARE.1),
            ["nfsvol", "ls", ..] => told("db"),
            _ => true,
        };
        ensure!(shown, "{command}\n{said}");
    }
    ensure!(volumes.join("db").is_dir());
    Ok(())
}
