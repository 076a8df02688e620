//! How a real dockerd talks to the plugin: its retries, its questions, its restarts, and what
//! becomes of volumes then. One trial for each behaviour.
//!
//! Most share one host, whose calls are read in nfsvol's own log; those that need an engine of
//! another kind have one of their own. What users do with volumes is in `tutorial.rs`, every byte
//! on the socket in `socket.rs`.

use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use lab::docker::Engine;
use lab::{
    Call, DataPath, Export, Ganesha, Host, Lab, Nfsvol, Node, PATIENCE, Part, Result, Shared,
    calls, trial, wait_for,
};
use serde_json::json;

const NEEDS: &[Part] = &[Part::Docker, Part::Ganesha, Part::Fuse];
/// What is answered from memory takes a fraction of this, on a loaded machine too; what waits for the
/// server, which is silent meanwhile, takes longer.
const AT_ONCE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    lab::main!(|| {
        vec![
            // Slow, and beside the others: they have hosts of their own.
            trial("a_plugin_that_comes_late_is_found", NEEDS, late_plugin),
            trial("live_restore_keeps_attachments", NEEDS, live_restore),
            trial("an_error_is_shown_as_it_is", NEEDS, errors),
            trial("a_restart_of_the_plugin_is_not_noticed", NEEDS, restart),
            trial("a_retry_without_its_body_is_refused", NEEDS, empty_retry),
            trial("calls_come_in_the_known_order", NEEDS, order),
            trial("get_never_says_a_wrong_no", NEEDS, no_wrong_no),
            trial("what_nobody_knows_is_not_denied", NEEDS, unknown),
            trial("the_same_id_is_mounted_twice", NEEDS, multiset),
            trial("a_killed_engine_loses_nothing", NEEDS, engine_killed),
            trial("names_are_checked_here", NEEDS, names),
            trial("another_host_removes_a_volume", NEEDS, removed_elsewhere),
            trial("a_mount_that_waits_holds_up_nothing", NEEDS, waiting),
            trial("copying_up_on_a_squashed_share", NEEDS, squashed),
        ]
    })
}

// ---- the shared host --------------------------------------------------------------------------

/// The host that most trials share, one at a time: they stop its server, its plugin, its engine.
struct Alone {
    nas: &'static Ganesha,
    host: &'static Host,
    _alone: MutexGuard<'static, ()>,
}

fn alone(lab: &'static Lab) -> Result<Alone> {
    static ALONE: Mutex<()> = Mutex::new(());
    static NAS: Shared<Ganesha> = Shared::new();
    static HOST: Shared<Host> = Shared::new();
    // A trial that failed has said so; the others go on.
    let alone = ALONE.lock().unwrap_or_else(|failed| failed.into_inner());
    let nas = NAS.get(|| Ganesha::start(lab, "nas", &[Export::new("/srv/export")]))?;
    let share = nas.share("/srv/export");
    let host = HOST.get(|| {
        let serve = ["--log", "debug"];
        Host::start_with(lab, "machine", DataPath::Fuse, &share, &serve, &[])
    })?;
    reached(host)?;
    Ok(Alone {
        nas,
        host,
        _alone: alone,
    })
}

/// Waits until the host is answered by its share: one that gave no answer is asked again after a while.
fn reached(host: &Host) -> Result {
    wait_for("the share to be reached", PATIENCE, || {
        let asked = calls::one(host.node(), Call::new("Nfsvol.TrashLs", &json!({})));
        asked.is_ok_and(|answer| answer.status == 200)
    })
}

/// Another server, that nobody stops.
fn steady(lab: &'static Lab) -> Result<&'static Ganesha> {
    static STEADY: Shared<Ganesha> = Shared::new();
    STEADY.get(|| {
        let exports = [
            Export::new("/srv/export"),
            Export::new("/srv/squashed").squash("root_squash"),
        ];
        Ganesha::start(lab, "steady", &exports)
    })
}

/// Reads the calls about one volume that the log tells of from now on.
struct Wire<'a> {
    nfsvol: &'a Nfsvol<'static>,
    volume: String,
    from: usize,
}

impl<'a> Wire<'a> {
    fn new(host: &'a Host, volume: &str) -> Self {
        let nfsvol = host.nfsvol();
        Self {
            nfsvol,
            volume: format!("volume=\"{volume}\""),
            from: nfsvol.process().log().len(),
        }
    }

    /// The lines since the last look.
    fn lines(&mut self) -> Vec<String> {
        let log = self.nfsvol.process().log();
        let new = log.get(self.from..).unwrap_or_default().to_owned();
        self.from = log.len();
        new.lines()
            .filter(|line| line.contains("docker::call") && line.contains(&self.volume))
            .map(str::to_owned)
            .collect()
    }

    /// The names of the calls since the last look.
    fn calls(&mut self) -> Vec<String> {
        self.lines()
            .iter()
            .filter_map(|line| field(line, "call"))
            .collect()
    }
}

fn field(line: &str, name: &str) -> Option<String> {
    let rest = line.split_once(&format!(" {name}=\""))?.1;
    Some(rest.split_once('"')?.0.to_owned())
}

fn label(host: &Host, volume: &str) -> Result<String> {
    let shown = host.inspect(volume)?;
    Ok(shown["Labels"]["kept"]
        .as_str()
        .unwrap_or_default()
        .to_owned())
}

/// How many attachments the volume has on this host.
fn attachments(host: &Host, volume: &str) -> Result<usize> {
    let file = format!("/var/lib/nfsvol/attachments/{volume}.json");
    let json = host
        .node()
        .sh(&format!("cat {file} 2>/dev/null || echo '{{}}'"))?;
    let file: serde_json::Value = serde_json::from_str(&json)?;
    Ok(file["attachments"].as_array().map_or(0, Vec::len))
}

// ---- errors and retries -----------------------------------------------------------------------

fn errors(lab: &'static Lab) -> Result {
    let Alone { host, _alone, .. } = alone(lab)?;
    let error = host.fails("volume create -d nfsvol -o uidd=7 wrong")?;
    ensure!(
        error.contains("VolumeDriver.Create: ") && error.contains("uidd") && error.contains("uid"),
        "{error}"
    );
    ensure!(host.volume("wrong")?.is_none());
    Ok(())
}

fn restart(lab: &'static Lab) -> Result {
    let Alone { host, _alone, .. } = alone(lab)?;
    host.ok("volume create -d nfsvol --label kept=yes restarted")?;
    for end in ["TERM", "KILL"] {
        host.nfsvol().process().signal(end)?;
        host.nfsvol().process().wait(PATIENCE)?;
        let run = thread::spawn(|| host.run("-v restarted:/data", "echo here >>/data/file"));
        // The engine has found nobody, and tries again.
        thread::sleep(Duration::from_secs(2));
        let waited = !run.is_finished();
        host.nfsvol().up()?;
        let said = run.join().map_err(|_| anyhow!("panicked"))??;
        ensure!(waited, "{end}: it did not wait: {said}");
    }
    let read = host.run("-v restarted:/data", "cat /data/file")?;
    ensure!(read == "here\nhere", "{read}");
    ensure!(label(host, "restarted")? == "yes");
    host.ok("volume rm restarted")?;
    Ok(())
}

/// A call whose connection broke is sent again without its body, so nobody can tell what it was
/// about: it is refused, nothing is mounted by mistake, and the next attempt is a whole one.
fn empty_retry(lab: &'static Lab) -> Result {
    let Alone { host, nas, _alone } = alone(lab)?;
    host.ok("volume create -d nfsvol --label kept=yes broken")?;
    host.nfsvol().kill()?;
    let share = nas.share("/srv/export");
    let armed = Nfsvol::start(
        host.node(),
        &["--share", &share, "--data-path", "fuse"],
        &[("FAILPOINTS", "mount.ready=return")],
    )?;
    let run = thread::spawn(|| host.try_run("--rm -v broken:/data", "true"));
    armed.process().wait(PATIENCE)?;
    host.nfsvol().up()?;
    let output = run.join().map_err(|_| anyhow!("panicked"))??;
    let error = output.fails()?;
    ensure!(
        error.contains("VolumeDriver.Mount: ") && error.contains("without its body"),
        "{error}"
    );
    ensure!(label(host, "broken")? == "yes");
    host.run("-v broken:/data", "echo here >/data/file")?;
    host.ok("volume rm broken")?;
    Ok(())
}

// ---- the order of calls -----------------------------------------------------------------------

fn order(lab: &'static Lab) -> Result {
    let Alone { host, _alone, .. } = alone(lab)?;
    let mut wire = Wire::new(host, "ordered");
    host.ok("volume create -d nfsvol -o mode=0700 ordered")?;
    let calls = wire.calls();
    ensure!(calls == ["Get", "Create"], "{calls:?}");
    // Known to the engine: other options never reach the driver.
    host.ok("volume create -d nfsvol -o mode=0711 ordered")?;
    let calls = wire.calls();
    ensure!(
        !calls.is_empty() && calls.iter().all(|call| call == "Get"),
        "{calls:?}"
    );
    ensure!(host.inspect("ordered")?["Status"]["options"]["mode"] == "0700");
    wire.calls();
    host.run("-v ordered:/data", "true")?;
    let lines = wire.lines();
    let mounting: Vec<String> = lines
        .iter()
        .filter_map(|line| field(line, "call"))
        .filter(|call| call != "Get")
        .collect();
    ensure!(mounting == ["Mount", "Unmount"], "{lines:?}");
    let id = |call: &str| {
        let line = lines.iter().find(|line| line.contains(call))?;
        field(line, "id")
    };
    ensure!(
        id("Mount").is_some() && id("Mount") == id("Unmount"),
        "{lines:?}"
    );
    host.ok("volume rm ordered")?;
    let calls = wire.calls();
    ensure!(
        calls.last().is_some_and(|call| call == "Remove"),
        "{calls:?}"
    );

    // Made by somebody else: Create is never sent.
    let mut wire = Wire::new(host, "made-elsewhere");
    calls::one(host.node(), Call::create("made-elsewhere", &[]))?.ok()?;
    wire.calls();
    host.ok("volume create -d nfsvol made-elsewhere")?;
    let calls = wire.calls();
    ensure!(!calls.contains(&"Create".to_owned()), "{calls:?}");
    host.ok("volume rm made-elsewhere")?;
    Ok(())
}

// ---- Get --------------------------------------------------------------------------------------

fn no_wrong_no(lab: &'static Lab) -> Result {
    let Alone { host, nas, _alone } = alone(lab)?;
    host.ok("volume create -d nfsvol --label kept=yes asked")?;
    nas.freeze()?;
    let began = Instant::now();
    let while_frozen = label(host, "asked");
    let took = began.elapsed();
    // Asked by an engine that starts while the server is away, and by a plugin that does.
    host.nfsvol().kill()?;
    host.nfsvol().up()?;
    host.engine().restart()?;
    let after_restarts = label(host, "asked");
    nas.thaw()?;
    ensure!(while_frozen? == "yes" && took < AT_ONCE, "{took:?}");
    ensure!(after_restarts? == "yes");
    ensure!(label(host, "asked")? == "yes");
    reached(host)?;
    host.ok("volume rm asked")?;
    Ok(())
}

/// A plugin that has lost its copy of the catalog and does not reach the share closes the
/// connection: an error would make the engine forget the volume's labels.
fn unknown(lab: &'static Lab) -> Result {
    let Alone { host, nas, _alone } = alone(lab)?;
    host.ok("volume create -d nfsvol --label kept=yes unknown")?;
    host.nfsvol().kill()?;
    host.node()
        .sh("rm -r /var/lib/nfsvol/catalog /var/lib/nfsvol/home.json")?;
    nas.freeze()?;
    host.nfsvol().up()?;
    let asked = host.docker("volume inspect unknown");
    nas.thaw()?;
    let asked = asked?;
    ensure!(
        asked.code != 0 && !asked.stderr.to_lowercase().contains("no such volume"),
        "{asked}"
    );
    wait_for("the volume to be known again", PATIENCE, || {
        label(host, "unknown").is_ok_and(|label| label == "yes")
    })?;
    reached(host)?;
    host.ok("volume rm unknown")?;
    Ok(())
}

// ---- counting ---------------------------------------------------------------------------------

fn multiset(lab: &'static Lab) -> Result {
    let Alone { host, _alone, .. } = alone(lab)?;
    host.ok("volume create -d nfsvol twice")?;
    host.keep("copied", "-v twice:/data")?;
    let mut wire = Wire::new(host, "twice");
    host.engine()
        .ok(&["exec", "copied", "sh", "-c", "echo one >/data/file"])?;
    ensure!(attachments(host, "twice")? == 1);
    let to = host.node().dir().join("copy");
    host.ok(&format!("cp copied:/data/file {}", to.display()))?;
    let lines = wire.lines();
    let ids = |call: &str| -> Vec<Option<String>> {
        let call = format!("call=\"{call}\"");
        let lines = lines.iter().filter(|line| line.contains(&call));
        lines.map(|line| field(line, "id")).collect()
    };
    ensure!(
        ids("Mount").len() == 1 && ids("Mount") == ids("Unmount"),
        "{lines:?}"
    );
    // The container's own attachment has the same ID, and still counts.
    ensure!(attachments(host, "twice")? == 1);
    host.engine()
        .ok(&["exec", "copied", "sh", "-c", "echo two >>/data/file"])?;
    ensure!(host.fails("volume rm twice")?.contains("in use"));
    host.ok("rm -f copied")?;
    ensure!(attachments(host, "twice")? == 0);
    host.ok("volume rm twice")?;
    Ok(())
}

fn engine_killed(lab: &'static Lab) -> Result {
    let Alone { host, _alone, .. } = alone(lab)?;
    for name in ["again", "once"] {
        host.ok(&format!("volume create -d nfsvol --label kept=yes {name}"))?;
    }
    let write = "while :; do echo here >>/data/file; sleep 0.2; done";
    host.try_run(
        "-d --name again --stop-timeout=1 --restart=always -v again:/data",
        write,
    )?
    .ok()?;
    host.try_run("-d --name once --stop-timeout=1 -v once:/data", write)?
        .ok()?;
    host.engine().dockerd().kill()?;
    let mut wire = Wire::new(host, "again");
    host.engine().restart()?;
    // The container that is started again mounts with no Unmount before.
    wait_for("the container to run again", PATIENCE, || {
        host.ok("inspect -f {{.State.Running}} again")
            .is_ok_and(|running| running == "true")
    })?;
    let calls = wire.calls();
    ensure!(calls.contains(&"Mount".to_owned()), "{calls:?}");
    ensure!(!calls.contains(&"Unmount".to_owned()), "{calls:?}");
    for name in ["again", "once"] {
        ensure!(label(host, name)? == "yes");
    }
    let lines = || -> Result<u64> {
        let count = ["exec", "again", "sh", "-c", "wc -l </data/file"];
        host.engine()
            .ok(&count)?
            .trim()
            .parse()
            .context("no number")
    };
    wait_for("the container to have written", PATIENCE, || {
        lines().is_ok_and(|now| now > 0)
    })?;
    let before = lines()?;
    wait_for("the container to write", PATIENCE, || {
        lines().is_ok_and(|now| now > before)
    })?;
    // The other one never comes back, and no Unmount is ever sent for it.
    wait_for("what the old engine left to be forgotten", PATIENCE, || {
        attachments(host, "once").is_ok_and(|left| left == 0)
    })?;
    ensure!(lines()? > before, "the container lost its volume");
    for name in ["again", "once"] {
        host.ok(&format!("rm -f {name}"))?;
        let kept = host.run(&format!("-v {name}:/data"), "head -n 1 /data/file")?;
        ensure!(kept == "here", "{name}: {kept}");
        host.ok(&format!("volume rm {name}"))?;
    }
    Ok(())
}

fn live_restore(lab: &'static Lab) -> Result {
    let share = steady(lab)?.share("/srv/export");
    let serve = ["--log", "debug"];
    let dockerd = ["--live-restore"];
    let host = Host::start_with(lab, "live", DataPath::Fuse, &share, &serve, &dockerd)?;
    host.ok("volume create -d nfsvol live")?;
    let write = "while :; do echo here >>/data/file; sleep 0.2; done";
    host.try_run("-d --name live -v live:/data", write)?.ok()?;
    let pid = host.ok("inspect -f {{.State.Pid}} live")?;
    let mut wire = Wire::new(&host, "live");
    host.engine().restart()?;
    ensure!(
        host.ok("inspect -f {{.State.Pid}} live")? == pid,
        "the container was restarted"
    );
    let calls = wire.calls();
    ensure!(calls.iter().all(|call| call == "Get"), "{calls:?}");
    // Longer than attachments of an earlier engine are kept that nothing stands behind.
    let log = || host.nfsvol().process().log();
    thread::sleep(Duration::from_secs(30));
    ensure!(attachments(&host, "live")? == 1, "{}", log());
    ensure!(host.fails("volume rm live")?.contains("in use"));
    host.engine()
        .ok(&["exec", "live", "sh", "-c", "echo still >>/data/file"])?;
    host.ok("rm -f live")?;
    let calls = wire.calls();
    ensure!(calls.contains(&"Unmount".to_owned()), "{calls:?}");
    ensure!(attachments(&host, "live")? == 0);
    host.ok("volume rm live")?;
    Ok(())
}

// ---- names and hosts --------------------------------------------------------------------------

fn names(lab: &'static Lab) -> Result {
    let Alone { host, nas, _alone } = alone(lab)?;
    // The engine checks the names of `local` volumes only.
    for name in ["../up", "a/b", "-x", ".hidden", "a b", "ä"] {
        let created = host
            .engine()
            .docker(&["volume", "create", "-d", "nfsvol", "--", name])?;
        let error = created.fails()?;
        ensure!(error.contains("name"), "{name}: {error}");
    }
    let there = std::fs::read_dir(nas.local("/srv/export"))?.count();
    ensure!(there == std::fs::read_dir(nas.local("/srv/export/.nfsvol/volumes"))?.count() + 1);
    // A name belongs to one driver of an engine.
    host.ok("volume create taken")?;
    let error = host.fails("volume create -d nfsvol taken")?;
    ensure!(error.contains("taken"), "{error}");
    host.ok("volume rm taken")?;
    Ok(())
}

fn removed_elsewhere(lab: &'static Lab) -> Result {
    let Alone { host, nas, _alone } = alone(lab)?;
    host.ok("volume create -d nfsvol -o mode=0700 elsewhere")?;
    ensure!(host.inspect("elsewhere")?["Scope"] == "global");
    let node = Node::machine(lab, "elsewhere")?;
    let share = nas.share("/srv/export");
    let other = Nfsvol::start(&node, &["--share", &share], &[])?;
    calls::one(&node, Call::remove("elsewhere"))?.ok()?;
    // What was seen a moment ago counts for a second, not until the next poll.
    thread::sleep(Duration::from_millis(1100));
    host.ok("volume create -d nfsvol -o mode=0711 elsewhere")?;
    ensure!(host.inspect("elsewhere")?["Status"]["options"]["mode"] == "0711");
    host.ok("volume rm elsewhere")?;
    other.process().stop()
}

fn waiting(lab: &'static Lab) -> Result {
    let Alone { host, nas, _alone } = alone(lab)?;
    for name in ["waits", "other"] {
        host.ok(&format!("volume create -d nfsvol {name}"))?;
    }
    nas.freeze()?;
    let run = thread::spawn(|| host.run("-v waits:/data", "echo late >/data/file; cat /data/file"));
    thread::sleep(Duration::from_secs(1));
    let answers = [
        "ps -a",
        "volume ls",
        "volume inspect other",
        "volume inspect waits",
    ]
    .map(|line| (line, host.docker(line)));
    let waited = !run.is_finished();
    nas.thaw()?;
    for (line, answer) in answers {
        let answer = answer?;
        ensure!(
            answer.code == 0 && answer.took < AT_ONCE,
            "{line}: {answer}"
        );
    }
    ensure!(waited, "the container did not wait for the server");
    let said = run.join().map_err(|_| anyhow!("panicked"))??;
    ensure!(said == "late", "{said}");
    reached(host)?;
    for name in ["waits", "other"] {
        host.ok(&format!("volume rm {name}"))?;
    }
    Ok(())
}

// ---- the engine's start, and images -----------------------------------------------------------

fn late_plugin(lab: &'static Lab) -> Result {
    let share = steady(lab)?.share("/srv/export");
    let node: &'static Node = Box::leak(Box::new(Node::machine(lab, "late")?));
    let engine = Engine::start(lab, node)?;
    let plugins = || engine.ok(&["info", "-f", "{{.Plugins.Volume}}"]);
    let create = ["volume", "create", "-d", "nfsvol", "late"];
    let error = engine.docker(&create)?.fails()?;
    ensure!(
        error.contains("nfsvol") && error.contains("not found"),
        "{error}"
    );
    ensure!(!plugins()?.contains("nfsvol"), "{}", plugins()?);
    let nfsvol = Nfsvol::start(node, &["--share", &share], &[])?;
    engine.ok(&create)?;
    ensure!(plugins()?.contains("nfsvol"), "{}", plugins()?);
    engine.ok(&[
        "run",
        "-d",
        "--name",
        "late",
        "--restart=always",
        "--stop-timeout=1",
        "--network=host",
        "-v",
        "late:/data",
        lab::docker::IMAGE,
        "sh",
        "-c",
        "echo here >>/data/file; exec sleep 3600",
    ])?;
    // The engine starts while the plugin is away: the container waits for a person.
    nfsvol.process().stop()?;
    engine.restart()?;
    nfsvol.up()?;
    engine.ok(&["start", "late"])?;
    wait_for("the container to have written twice", PATIENCE, || {
        let read = engine.ok(&["exec", "late", "cat", "/data/file"]);
        read.is_ok_and(|read| read == "here\nhere")
    })?;
    engine.ok(&["rm", "-f", "late"])?;
    engine.ok(&["volume", "rm", "late"])?;
    Ok(())
}

/// The engine copies an image's files into an empty volume with their owners, which a server
/// that squashes root refuses.
fn squashed(lab: &'static Lab) -> Result {
    let server = steady(lab)?;
    let Alone { host, _alone, .. } = alone(lab)?;
    server.node().sh("chmod 0777 /srv/squashed")?;
    let share = server.share("/srv/squashed");
    host.engine().image(
        "owned",
        "mkdir data; echo image >data/file; chown -R 1000:1000 data",
        &[],
    )?;
    host.ok(&format!(
        "volume create -d nfsvol -o share={share} squashed"
    ))?;
    let warned = host.inspect("squashed")?["Status"]["warnings"].to_string();
    ensure!(warned.contains("nocopy"), "{warned}");
    let run = |volume: &str| {
        host.docker(&format!(
            "run --rm --network=host --volume-driver=nfsvol -v {volume} owned ls /data"
        ))
    };
    let error = run("squashed:/data")?.fails()?;
    ensure!(error.contains("failed to"), "{error}");
    let listed = run("squashed:/data:nocopy")?.ok()?;
    ensure!(listed.is_empty(), "{listed}");
    host.ok("volume rm squashed")?;
    Ok(())
}
