//! Several hosts on one home share: what they see of each other, and what happens to the others
//! when one dies, stops or is cut off. Namespaced machines on the FUSE data path, with Ganesha.

#[path = "cluster/away.rs"]
mod away;
#[path = "cluster/mixed.rs"]
mod mixed;
#[path = "cluster/races.rs"]
mod races;
#[path = "cluster/repair.rs"]
mod repair;
#[path = "cluster/stale.rs"]
mod stale;
#[path = "cluster/turns.rs"]
mod turns;
#[path = "cluster/unmount.rs"]
mod unmount;

use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lab::docker::{Engine, IMAGE};
use lab::{
    Call, Export, Ganesha, Lab, Nfsvol, Node, PATIENCE, Part, Result, Shared, calls, trial,
    wait_for,
};
use serde_json::{Value, json};

const FUSE: &[Part] = &[Part::Ganesha, Part::Fuse];
const DOCKER: &[Part] = &[Part::Docker, Part::Ganesha, Part::Fuse];
const EXPORT: &str = "/srv/cluster";
/// The session time of these hosts; a fifth of the default.
const SESSION: Duration = Duration::from_secs(6);
/// Further arguments of every host.
const FUSE_ARGS: [&str; 4] = ["--poll", "500ms", "--data-path", "fuse"];
/// For longer than a session.
const LONGER: Duration = SESSION.saturating_add(Duration::from_secs(3));
/// A dead host's volumes are free by then, also on a machine that is busy with other things.
const FREED: Duration = Duration::from_secs(30);

static NAS: Shared<Ganesha> = Shared::new();

fn main() -> ExitCode {
    lab::main!(|| {
        vec![
            trial("holders_are_seen_and_protect", DOCKER, holders),
            trial("a_dead_hosts_holds_end_with_its_session", FUSE, dead_host),
            trial("a_restart_of_the_daemon_keeps_its_holds", FUSE, restart),
            trial(
                "an_exclusive_volume_is_handed_over_at_once",
                FUSE,
                hand_over,
            ),
            trial(
                "a_dead_hosts_exclusive_volume_is_taken_over",
                FUSE,
                take_over,
            ),
            trial(
                "a_stopped_host_that_wakes_late_writes_nothing",
                FUSE,
                late_wake,
            ),
            trial("a_host_that_was_cut_off_writes_nothing", FUSE, cut_off),
            trial("a_host_that_was_away_catches_up", FUSE, away::away),
            trial("writers_and_readers_of_one_directory", FUSE, mixed::mixed),
            trial(
                "what_is_left_of_a_worker_names_no_other",
                FUSE,
                stale::stale,
            ),
            trial("what_a_server_tore_is_put_back", FUSE, repair::repair),
            trial("whoever_waits_gets_its_turn", FUSE, turns::turns),
            trial(
                "a_volume_that_was_not_unmounted_is_let_go_of",
                FUSE,
                unmount::unmount,
            ),
            trial("of_each_race_the_losers_hear_the_truth", FUSE, races::races),
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
        args.extend(FUSE_ARGS);
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
        PATIENCE,
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
    wait_for("the second host to be seen on the first", PATIENCE, || {
        a.held_by(&volume).is_ok_and(|by| by.contains(b.name()))
    })?;
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
    while began.elapsed() < LONGER {
        let refused = b.fails(Call::remove(&volume))?;
        ensure!(refused.contains(a.name()), "{refused}");
        std::thread::sleep(Duration::from_millis(500));
    }
    a.node.power_off()?;
    let took = remove_when_free(&b, &volume, FREED)?;
    lab::note(format!(
        "free {took:?} after its host died, with a session of {SESSION:?}"
    ));
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
    std::thread::sleep(LONGER);
    refused("a session later")?;
    a.ok(Call::unmount(&volume, "a"))?;
    b.ok(Call::remove(&volume))?;
    Ok(())
}

const EXCLUSIVE: &[(&str, &str)] = &[("access", "exclusive")];

fn mountpoint(answer: &Value) -> Result<String> {
    Ok(answer["Mountpoint"]
        .as_str()
        .context("no mount point")?
        .to_owned())
}

fn hand_over(lab: &'static Lab) -> Result {
    let nas = nas(lab)?;
    let a = Host::start(lab, nas, "over", "a")?;
    let node: &'static Node = Box::leak(Box::new(Node::machine(lab, "over-b")?));
    let b = Host::on(node, nas, &["--mount-deadline", "8s"])?;
    let volume = fresh("over");
    a.ok(Call::create(&volume, EXCLUSIVE))?;
    let place = mountpoint(&a.ok(Call::mount(&volume, "a"))?)?;
    a.node.sh(&format!("echo from a >{place}/file"))?;
    // A second container of the same host.
    a.ok(Call::mount(&volume, "a2"))?;
    a.ok(Call::unmount(&volume, "a2"))?;
    let refused = b.fails(Call::mount(&volume, "b"))?;
    for part in ["exclusive", a.name(), "since 20"] {
        ensure!(refused.contains(part), "{part}: {refused}");
    }
    let refused = b.fails(Call::remove(&volume))?;
    ensure!(refused.contains(a.name()), "{refused}");
    // While the other host waits, more patient now, its daemon is restarted, and the volume let go of.
    b.nfsvol.process().stop()?;
    let b = Host::on(node, nas, &["--mount-deadline", "90s"])?;
    let (answer, let_go) = std::thread::scope(|scope| -> Result<_> {
        let waiting = scope.spawn(|| b.ok(Call::mount(&volume, "b")).map(|a| (a, Instant::now())));
        std::thread::sleep(Duration::from_secs(1));
        a.nfsvol.kill()?;
        a.nfsvol.up()?;
        a.node.sh(&format!("echo again >>{place}/file"))?;
        std::thread::sleep(Duration::from_secs(1));
        let let_go = Instant::now();
        a.ok(Call::unmount(&volume, "a"))?;
        let (answer, at) = waiting.join().map_err(|_| anyhow::anyhow!("panicked"))??;
        Ok((answer, at.saturating_duration_since(let_go)))
    })?;
    lab::note(format!("handed over in {let_go:?}"));
    ensure!(let_go < FREED, "{let_go:?}");
    let place = mountpoint(&answer)?;
    let file = b.node.sh(&format!("cat {place}/file"))?;
    ensure!(file == "from a\nagain", "{file}");
    b.ok(Call::unmount(&volume, "b"))?;
    a.ok(Call::remove(&volume))?;
    Ok(())
}

fn take_over(lab: &'static Lab) -> Result {
    let nas = nas(lab)?;
    let a = Host::start(lab, nas, "take", "a")?;
    let b = Host::start(lab, nas, "take", "b")?;
    let volume = fresh("take");
    a.ok(Call::create(&volume, EXCLUSIVE))?;
    let place = mountpoint(&a.ok(Call::mount(&volume, "a"))?)?;
    a.node
        .sh(&format!("echo kept >{place}/file; sync {place}/file"))?;
    std::thread::sleep(SESSION);
    a.node.power_off()?;
    let died = Instant::now();
    let place = mountpoint(&b.ok(Call::mount(&volume, "b"))?)?;
    let took = died.elapsed();
    lab::note(format!(
        "taken over {took:?} after its host died, with a session of {SESSION:?}"
    ));
    ensure!(took < FREED, "{took:?}");
    ensure!(b.node.sh(&format!("cat {place}/file"))? == "kept");
    Ok(())
}

/// A program on host a writes all the time, `fault` comes, host b takes the volume over, and
/// after `heal` nothing of what a wrote late is there.
fn fenced(
    lab: &'static Lab,
    word: &str,
    fault: impl FnOnce(&Host, u32) -> Result,
    heal: impl FnOnce(&Host, u32) -> Result,
) -> Result {
    let nas = nas(lab)?;
    let a = Host::start(lab, nas, word, "a")?;
    let b = Host::start(lab, nas, word, "b")?;
    let volume = fresh(word);
    a.ok(Call::create(&volume, EXCLUSIVE))?;
    let place = mountpoint(&a.ok(Call::mount(&volume, "a"))?)?;
    let script = format!(
        "n=0; while :; do n=$((n+1)); echo $n >>{place}/log && sync {place}/log || exit 1; done"
    );
    let writer = a.node.spawn("writer", &["sh", "-c", &script])?;
    let log = nas.local(EXPORT).join(&volume).join("log");
    let lines = || std::fs::read_to_string(&log).map_or(0, |text| text.lines().count());
    // For longer than one right lasts.
    std::thread::sleep(SESSION);
    let before = lines();
    wait_for("the program to write", PATIENCE, || lines() > before + 10)?;
    let status = a.ok(Call::get(&volume))?;
    let worker = status["Volume"]["Status"]["worker"]["pid"].as_u64();
    let worker = u32::try_from(worker.context("no worker")?)?;
    fault(&a, worker)?;
    let began = Instant::now();
    let place_b = mountpoint(&b.ok(Call::mount(&volume, "b"))?)?;
    let took = began.elapsed();
    lab::note(format!(
        "{word}: taken over after {took:?}, with a session of {SESSION:?}"
    ));
    ensure!(took > SESSION / 2 && took < FREED, "{took:?}");
    let taken = std::fs::read(&log)?;
    b.node.sh(&format!("cp {place_b}/log {place_b}/copy"))?;
    heal(&a, worker)?;
    // What waits is thrown away, and the program is told.
    writer.wait(PATIENCE)?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(
        std::fs::read(&log)? == taken,
        "written to after another host had it"
    );
    let copy = std::fs::read(nas.local(EXPORT).join(&volume).join("copy"))?;
    ensure!(copy == taken, "another host saw something else");
    // And the first host can have it again.
    b.ok(Call::unmount(&volume, "b"))?;
    a.ok(Call::unmount(&volume, "a"))?;
    let place = mountpoint(&a.ok(Call::mount(&volume, "again"))?)?;
    a.node
        .sh(&format!("echo new >>{place}/log; sync {place}/log"))?;
    ensure!(std::fs::read(&log)?.len() == taken.len() + 4);
    Ok(())
}

fn late_wake(lab: &'static Lab) -> Result {
    let signal = |host: &Host, worker: u32, signal: &str| -> Result {
        host.nfsvol.process().signal(signal)?;
        host.node.ok(&["kill", "-s", signal, &worker.to_string()])?;
        Ok(())
    };
    fenced(
        lab,
        "wake",
        |host, worker| signal(host, worker, "STOP"),
        |host, worker| {
            // First the worker alone: nobody tells it anything.
            host.node.ok(&["kill", "-s", "CONT", &worker.to_string()])?;
            std::thread::sleep(Duration::from_secs(2));
            host.nfsvol.process().signal("CONT")
        },
    )
}

fn cut_off(lab: &'static Lab) -> Result {
    let way = |host: &Host, how: &str| -> Result {
        host.node.sh(&format!(
            "iptables {how} OUTPUT -o eth0 -j DROP; iptables {how} INPUT -i eth0 -j DROP"
        ))?;
        Ok(())
    };
    fenced(
        lab,
        "cut",
        |host, _| way(host, "-A"),
        |host, _| {
            // First the worker alone: nobody tells it anything.
            host.nfsvol.process().signal("STOP")?;
            way(host, "-D")?;
            std::thread::sleep(SESSION);
            host.nfsvol.process().signal("CONT")
        },
    )
}
