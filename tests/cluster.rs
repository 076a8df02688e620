//! Several hosts on one home share: what they see of each other, and what happens to the others
//! when one dies, stops or is cut off. Namespaced machines on the FUSE data path, with Ganesha.

mod lab;

use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lab::docker::{Engine, IMAGE};
use lab::{Call, Export, Ganesha, Lab, Nfsvol, Node, Part, Result, Shared, calls, trial, wait_for};
use serde_json::{Value, json};

const FUSE: &[Part] = &[Part::Ganesha, Part::Fuse];
const DOCKER: &[Part] = &[Part::Docker, Part::Ganesha, Part::Fuse];
const EXPORT: &str = "/srv/cluster";
/// The session time of these hosts; a fifth of the default.
const SESSION: Duration = Duration::from_secs(6);
/// How much later than its session a dead host's volumes may be free.
const SLACK: Duration = Duration::from_secs(3);

static NAS: Shared<Ganesha> = Shared::new();

fn main() -> ExitCode {
    lab::main(|| {
        vec![
            trial("holders_are_seen_and_protect", DOCKER, holders),
            trial("a_dead_hosts_holds_end_with_its_session", FUSE, dead_host),
            trial("a_restart_of_the_daemon_keeps_its_holds", FUSE, restart),
        ]
    })
}

fn nas(lab: &'static Lab) -> Result<&'static Ganesha> {
    NAS.get(|| Ganesha::start(lab, "cluster-nas", &[Export::new(EXPORT)]))
}

/// A host of the cluster.
struct Host {
    node: &'static Node,
    nfsvol: Nfsvol<'static>,
}

impl Host {
    /// `letter` tells the hosts of a trial apart.
    fn start(lab: &'static Lab, nas: &Ganesha, trial: &str, letter: &str) -> Result<Self> {
        let name = format!("{trial}-{letter}");
        let node: &'static Node = Box::leak(Box::new(Node::machine(lab, &name)?));
        Self::on(node, nas, &[])
    }

    fn on(node: &'static Node, nas: &Ganesha, more: &[&str]) -> Result<Self> {
        let session = format!("{}s", SESSION.as_secs());
        let share = nas.share(EXPORT);
        let mut args = vec!["--share", &share, "--session", &session];
        args.extend(["--poll", "500ms", "--data-path", "fuse"]);
        args.extend(more);
        let nfsvol = Nfsvol::start(node, &args, &[])?;
        Ok(Self { node, nfsvol })
    }

    fn name(&self) -> &str {
        self.node.name()
    }

    fn ask(&self, call: Call) -> Result<lab::Answer> {
        calls::one(self.node, call)
    }

    fn ok(&self, call: Call) -> Result<Value> {
        self.ask(call)?.ok()
    }

    fn fails(&self, call: Call) -> Result<String> {
        self.ask(call)?.fails()
    }

    /// The line of `nfsvol ls` about a volume.
    fn listed(&self, volume: &str) -> Result<Value> {
        let volumes = self.ok(Call::new("Nfsvol.Ls", &json!({})))?;
        let volumes = volumes.as_array().cloned().unwrap_or_default();
        let found = volumes.into_iter().find(|line| line["name"] == volume);
        found.with_context(|| format!("{volume} is not listed on {}", self.name()))
    }

    fn held_by(&self, volume: &str) -> Result<String> {
        Ok(self.listed(volume)?["held_by"]
            .as_str()
            .unwrap_or_default()
            .to_owned())
    }
}

/// A fresh name for a volume.
fn fresh(word: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{word}{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Removes a volume as soon as it is free; how long that took.
fn remove_when_free(host: &Host, volume: &str, limit: Duration) -> Result<Duration> {
    let began = Instant::now();
    wait_for(&format!("{volume} to be free"), limit, || {
        host.ask(Call::remove(volume))
            .is_ok_and(|answer| answer.status == 200)
    })?;
    Ok(began.elapsed())
}

fn holders(lab: &'static Lab) -> Result {
    let nas = nas(lab)?;
    let node: &'static Node = Box::leak(Box::new(Node::machine(lab, "seen-a")?));
    let engine = Engine::start(lab, node)?;
    let a = Host::on(node, nas, &[])?;
    let b = Host::start(lab, nas, "seen", "b")?;
    let volume = fresh("seen");
    a.ok(Call::create(&volume, &[]))?;
    let mount = format!("{volume}:/data");
    let container = engine.ok(&[
        "run",
        "-d",
        "--network",
        "host",
        "--volume-driver",
        "nfsvol",
        "-v",
        &mount,
        IMAGE,
        "sleep",
        "1000",
    ])?;
    let container = container.get(..12).context("no container id")?.to_owned();
    // At once by its host, and by the containers a few seconds later.
    let refused = b.fails(Call::remove(&volume))?;
    ensure!(refused.contains(&format!("host {}", a.name())), "{refused}");
    wait_for(
        "the container to be seen on the other host",
        Duration::from_secs(20),
        || {
            b.held_by(&volume)
                .is_ok_and(|by| by.contains(a.name()) && by.contains(&container))
        },
    )?;
    let refused = b.fails(Call::remove(&volume))?;
    ensure!(refused.contains(&container), "{refused}");
    let status = b.ok(Call::get(&volume))?["Volume"]["Status"]["held_by_other_hosts"].clone();
    ensure!(
        status[0]["host"] == a.name() && status[0]["since"].is_string(),
        "{status}"
    );
    ensure!(a.held_by(&volume)?.contains(&container));
    // Both hosts at once.
    b.ok(Call::mount(&volume, "b"))?;
    wait_for(
        "the second host to be seen on the first",
        Duration::from_secs(5),
        || a.held_by(&volume).is_ok_and(|by| by.contains(b.name())),
    )?;
    b.ok(Call::unmount(&volume, "b"))?;
    engine.ok(&["rm", "-f", &container])?;
    b.ok(Call::remove(&volume))?;
    ensure!(!nas.local(EXPORT).join(&volume).exists());
    Ok(())
}

fn dead_host(lab: &'static Lab) -> Result {
    let nas = nas(lab)?;
    let a = Host::start(lab, nas, "dead", "a")?;
    let b = Host::start(lab, nas, "dead", "b")?;
    let volume = fresh("dead");
    a.ok(Call::create(&volume, &[]))?;
    a.ok(Call::mount(&volume, "a"))?;
    // For longer than a session, as long as the host lives.
    let began = Instant::now();
    while began.elapsed() < SESSION + SLACK {
        let refused = b.fails(Call::remove(&volume))?;
        ensure!(refused.contains(a.name()), "{refused}");
        std::thread::sleep(Duration::from_millis(500));
    }
    a.node.power_off()?;
    let took = remove_when_free(&b, &volume, SESSION + SLACK)?;
    println!("free {took:?} after its host died, with a session of {SESSION:?}");
    ensure!(took > SESSION / 2, "free after {took:?} already");
    Ok(())
}

fn restart(lab: &'static Lab) -> Result {
    let nas = nas(lab)?;
    let a = Host::start(lab, nas, "again", "a")?;
    let b = Host::start(lab, nas, "again", "b")?;
    let volume = fresh("again");
    a.ok(Call::create(&volume, &[]))?;
    a.ok(Call::mount(&volume, "a"))?;
    let refused = |what: &str| -> Result {
        let refused = b.fails(Call::remove(&volume)).context(what.to_owned())?;
        ensure!(refused.contains(a.name()), "{what}: {refused}");
        Ok(())
    };
    for _ in 0..2 {
        a.nfsvol.kill()?;
        refused("while the daemon is dead")?;
        a.nfsvol.up()?;
        refused("after its restart")?;
    }
    std::thread::sleep(SESSION + SLACK);
    refused("a session later")?;
    a.ok(Call::unmount(&volume, "a"))?;
    b.ok(Call::remove(&volume))?;
    Ok(())
}
