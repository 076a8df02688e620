//! What nfsvol costs an NFS server, counted in RPCs on the wire between each host and the server.
//!
//! docs/DESIGN.md ("What a host costs the server") states these figures; this keeps them true.

use std::fs;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use lab::proxy::{Calls, MOUNT, NFS};
use lab::{
    Call, Export, Ganesha, Lab, Nfsvol, Node, PATIENCE, Part, Proxy, Result, calls, trial, wait_for,
};
use serde_json::{Value, json};

const PORTS: [u16; 2] = [lab::ganesha::NFS_PORT, lab::ganesha::MOUNT_PORT];
/// How often the hosts of these tests look for changes; the default is twenty times as long.
const POLL: Duration = Duration::from_millis(500);
/// How many polls of a host at rest are watched.
const WATCHED: u32 = 20;
/// Longer than a change takes to be followed and trusted: two polls, a tick of the server's clock
/// of a second between them, and what they do.
const SETTLED: Duration = Duration::from_secs(3);

/// How often a host with the default session time renews it.
const RENEWED: Duration = Duration::from_secs(5);

/// Procedures of NFSv3 (RFC 1813 section 3.3).
const LOOKUP: u32 = 3;
const RENAME: u32 = 14;
const READ: u32 = 6;
const READDIRPLUS: u32 = 17;
const FSSTAT: u32 = 18;

fn main() -> ExitCode {
    let needs: &[Part] = &[Part::Ganesha];
    lab::main!(move || {
        vec![
            trial("a_host_at_rest_costs_one_call_a_poll", needs, at_rest),
            trial(
                "a_change_costs_every_host_the_same_few_calls",
                needs,
                change,
            ),
            trial("calls_cost_a_bounded_number", needs, each_call),
            trial(
                "a_mount_costs_a_bounded_number",
                &[Part::Ganesha, Part::Guest],
                mounts,
            ),
            trial("one_host_of_many_empties_the_trash", needs, emptying),
            trial(
                "a_minute_at_rest_costs_30_calls_with_3_and_300_hosts",
                needs,
                a_minute,
            ),
        ]
    })
}

/// A host whose way to the server counts the calls.
struct Host {
    node: &'static Node,
    proxy: Proxy,
    nfsvol: Nfsvol<'static>,
}

impl Host {
    fn start(lab: &'static Lab, name: &str, server: &Ganesha, export: &str) -> Result<Self> {
        Self::start_with(lab, name, server, export, POLL)
    }

    fn start_with(
        lab: &'static Lab,
        name: &str,
        server: &Ganesha,
        export: &str,
        poll: Duration,
    ) -> Result<Self> {
        let proxy = Proxy::start(lab, &format!("{name}-way"), &server.ip(), &PORTS)?;
        Self::on(Node::machine(lab, name)?, proxy, export, poll)
    }

    fn on(node: Node, proxy: Proxy, export: &str, poll: Duration) -> Result<Self> {
        let node: &'static Node = Box::leak(Box::new(node));
        let share = format!("{}:{export}", proxy.ip());
        // A host that never looks renews its session as rarely.
        let session = if poll > POLL * 100 { "1h" } else { "30s" };
        let poll = format!("{}ms", poll.as_millis());
        let ports = format!("port={},mountport={}", PORTS[0], PORTS[1]);
        let args = [
            "--share",
            &share,
            "--poll",
            &poll,
            "--session",
            session,
            "--mount-options",
            &ports,
        ];
        let nfsvol = Nfsvol::start(node, &args, &[])?;
        Ok(Self {
            node,
            proxy,
            nfsvol,
        })
    }

    fn ok(&self, call: Call) -> Result {
        calls::one(self.node, call)?.ok().map(drop)
    }

    /// The calls that go to the server while `work` runs.
    fn counted(&self, work: impl FnOnce() -> Result) -> Result<Calls> {
        self.proxy.take_calls()?;
        work()?;
        self.proxy.take_calls()
    }

    /// What the host costs at rest, without the looks at the share's health.
    /// And in how many polls at most.
    fn at_rest(&self) -> Result<(Calls, u64)> {
        thread::sleep(SETTLED);
        let began = Instant::now();
        let mut calls = self.counted(|| {
            thread::sleep(POLL * WATCHED);
            Ok(())
        })?;
        let polls = polls_in(began.elapsed());
        // One each 30 s.
        let health = calls.remove(&(NFS, FSSTAT)).unwrap_or(0);
        ensure!(health <= 1, "{health} FSSTAT in {polls} polls");
        Ok((calls, polls))
    }
}

/// How often a host polls at most in this time.
fn polls_in(time: Duration) -> u64 {
    u64::try_from(time.as_millis().div_ceil(POLL.as_millis())).unwrap_or(u64::MAX)
}

fn server(lab: &'static Lab, name: &str, export: &str) -> Result<Ganesha> {
    Ganesha::start(lab, name, &[Export::new(export)])
}

fn sum(calls: &Calls) -> u64 {
    calls.values().sum()
}

fn at_rest(lab: &'static Lab) -> Result {
    let nas = server(lab, "rest-nas", "/srv/rest")?;
    let host = Host::start(lab, "rest", &nas, "/srv/rest")?;
    host.ok(Call::create("first", &[]))?;
    let few = host.at_rest()?;
    let many: Vec<Call> = vec![Call::create("v{n}", &[]).times(299)];
    for answer in calls::all(host.node, &many)? {
        answer.ok()?;
    }
    let more = host.at_rest()?;
    lab::note(format!(
        "at rest for {WATCHED} polls: 1 volume {few:?}, 300 volumes {more:?}"
    ));
    for (calls, most) in [&few, &more] {
        let polls = calls.get(&(NFS, LOOKUP)).copied().unwrap_or(0);
        // A busy machine polls less often. The directories of the catalog and of the session are
        // looked up anew once a minute.
        let expected = most / 2..=most + 4;
        ensure!(expected.contains(&polls), "{polls} instead of {expected:?}");
        // The other hosts are looked at every other time; the session is renewed.
        let of = |procedure| calls.get(&(NFS, procedure)).copied().unwrap_or(0);
        ensure!((1..=most / 2 + 1).contains(&of(READDIRPLUS)), "{calls:?}");
        ensure!((1..=3).contains(&of(RENAME)), "{calls:?}");
        let known = polls + of(READDIRPLUS) + of(RENAME);
        ensure!(sum(calls) == known, "something else: {calls:?}");
    }
    Ok(())
}

/// With the settings that users have: one of 3 hosts, and one of 300 that all live.
fn a_minute(lab: &'static Lab) -> Result {
    // What other hosts do is seen at once, also what is done on the server's disk.
    let export = Export::new("/srv/minute").uncached();
    let nas = Ganesha::start(lab, "minute-nas", &[export])?;
    let default = Duration::from_secs(10);
    let start = |name| Host::start_with(lab, name, &nas, "/srv/minute", default);
    let [host, _b, _c] = [start("minute-a")?, start("minute-b")?, start("minute-c")?];
    host.ok(Call::create("first", &[]))?;
    let status =
        || -> Result<Value> { calls::one(host.node, Call::new("Nfsvol.Status", &json!({})))?.ok() };
    let others = |many: usize| {
        wait_for("the other hosts", PATIENCE, || {
            let hosts = status().map(|status| status["hosts"].as_array().map_or(0, Vec::len));
            hosts.is_ok_and(|hosts| hosts == many)
        })
    };
    let half_a_minute = || {
        host.counted(|| {
            thread::sleep(Duration::from_secs(30));
            Ok(())
        })
    };
    others(2)?;
    // Followed, and listed once more to be sure.
    thread::sleep(2 * default);
    let of_few = half_a_minute()?;

    // 297 more, as they are on the share. The server would not see them all in its cache, if it
    // ran meanwhile.
    nas.stop()?;
    let dir = nas.local("/srv/minute/.nfsvol/hosts");
    let token = |n: usize, number: u32| dir.join(format!("host{n}/alive.0.{number}"));
    for n in 0..297 {
        fs::create_dir(dir.join(format!("host{n}")))?;
        fs::write(token(n, 0), "")?;
        let doc = json!({
            "format": 1, "host": format!("host{n}"), "id": n.to_string(), "boot": "b",
            "session": "0", "session_ms": 30_000, "holds": {},
        });
        fs::write(dir.join(format!("host{n}.1.json")), doc.to_string())?;
    }
    nas.up()?;
    let over = AtomicBool::new(false);
    let of_many = thread::scope(|scope| {
        // They renew their sessions as long as it takes.
        let renewing = scope.spawn(|| -> Result {
            let mut number = 0;
            while !over.load(Ordering::Relaxed) {
                for n in 0..297 {
                    fs::rename(token(n, number), token(n, number + 1))?;
                }
                number += 1;
                thread::sleep(RENEWED);
            }
            Ok(())
        });
        // Each is read once.
        let counted = others(299).and_then(|()| half_a_minute());
        let stayed = others(299);
        over.store(true, Ordering::Relaxed);
        renewing
            .join()
            .map_err(|_| anyhow!("a thread panicked"))??;
        stayed.and(counted)
    })?;
    lab::note(format!(
        "half a minute at rest: one of 3 hosts {of_few:?}, one of 300 {of_many:?}"
    ));
    for calls in [&of_few, &of_many] {
        ensure!(sum(calls) <= 15, "{} RPCs: {calls:?}", sum(calls));
    }
    Ok(())
}

/// Removed volumes whose time is over.
const TRASHED: u64 = 300;
/// Other hosts; with so many, a host does not look into the trash when it starts.
const OTHERS: usize = 11;
const DAY: u64 = 86_400;

/// The trash of a share of 12 hosts is emptied by the one whose day it is.
fn emptying(lab: &'static Lab) -> Result {
    let nas = server(lab, "trash-nas", "/srv/trash")?;
    let hour = Duration::from_secs(3600);
    let host = Host::start_with(lab, "m", &nas, "/srv/trash", hour)?;
    host.ok(Call::create("warm", &[]))?;
    nas.stop()?;
    let own = nas.local("/srv/trash/.nfsvol");
    fill_trash(&host, &own)?;
    nas.up()?;
    let left = || fs::read_dir(own.join("trash")).map_or(0, Iterator::count);
    // Hosts have their days in the order of their names.
    let today = host.node.sh("date +%s")?.parse::<u64>()? / DAY;
    let day = usize::try_from(today)? % (OTHERS + 1);
    let started = |before: usize, wait: &dyn Fn() -> Result| -> Result<Calls> {
        nas.stop()?;
        put_others(&own, before)?;
        nas.up()?;
        host.counted(|| {
            host.nfsvol.restart()?;
            wait()
        })
    };
    let idle = started((day + 1) % (OTHERS + 1), &|| {
        thread::sleep(2 * SETTLED);
        Ok(())
    })?;
    ensure!(left() == usize::try_from(TRASHED)?, "another host's day");
    let busy = started(day, &|| {
        wait_for("an empty trash", PATIENCE, || left() == 0)?;
        thread::sleep(SETTLED);
        Ok(())
    })?;
    let each = (sum(&busy) - sum(&idle).min(sum(&busy))) / TRASHED;
    lab::note(format!(
        "a start {idle:?}, with {TRASHED} to delete {busy:?}: {each} each"
    ));
    ensure!(each <= 36, "{each} calls each");
    Ok(())
}

/// Volumes that were removed eight days ago, as they lie there.
fn fill_trash(host: &Host, own: &std::path::Path) -> Result {
    let json = fs::read(own.join("volumes/warm/record.json"))?;
    let mut record: Value = serde_json::from_slice(&json)?;
    let removed = host.node.sh("date +%s")?.parse::<u64>()? - 8 * DAY;
    let time = host
        .node
        .sh(&format!("date -u -d @{removed} +%Y%m%dT%H%M%SZ"))?;
    let created = host.node.sh(&format!(
        "date -u -d @{} +%Y-%m-%dT%H:%M:%SZ",
        removed - DAY
    ))?;
    record["created"] = created.into();
    for n in 0..TRASHED {
        let (name, id) = (format!("v{n}"), format!("{n:032x}"));
        record["name"] = name.clone().into();
        record["data_dir"] = name.clone().into();
        record["id"] = id.clone().into();
        let entry = own.join(format!("trash/{name}.{time}.{}", &id[..8]));
        fs::create_dir_all(
            entry
                .join("volume/removing")
                .join(format!("by.{removed}.m")),
        )?;
        fs::create_dir(entry.join("data"))?;
        fs::write(entry.join("volume/record.json"), record.to_string())?;
    }
    Ok(())
}

/// Hosts that live, so many of them before this one by their names.
fn put_others(own: &std::path::Path, before: usize) -> Result {
    let hosts = own.join("hosts");
    for entry in fs::read_dir(&hosts)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        match name {
            Some(name) if name == "m" || name.starts_with("m.") => {}
            _ if path.is_dir() => fs::remove_dir_all(&path)?,
            _ => fs::remove_file(&path)?,
        }
    }
    for n in 0..OTHERS {
        let name = format!("{}{n}", if n < before { "a" } else { "z" });
        fs::create_dir(hosts.join(&name))?;
        fs::write(hosts.join(&name).join("alive.0.1"), "")?;
        let doc = json!({
            "format": 1, "host": name, "id": n.to_string(), "boot": "b",
            "session": "0", "session_ms": 3_600_000, "holds": {},
        });
        fs::write(hosts.join(format!("{name}.1.json")), doc.to_string())?;
    }
    Ok(())
}

fn change(lab: &'static Lab) -> Result {
    let nas = server(lab, "change-nas", "/srv/change")?;
    let a = Host::start(lab, "change-a", &nas, "/srv/change")?;
    let b = Host::start(lab, "change-b", &nas, "/srv/change")?;
    let mut costs = Vec::new();
    for name in ["one", "two", "three"] {
        thread::sleep(SETTLED);
        let began = Instant::now();
        let created = b.counted(|| {
            a.ok(Call::create(name, &[]))?;
            wait_for("the volume on the other host", PATIENCE, || {
                let listed = calls::one(b.node, Call::list()).map(|a| a.body.to_string());
                listed.is_ok_and(|list| list.contains(name))
            })?;
            thread::sleep(SETTLED);
            Ok(())
        })?;
        costs.push((created, polls_in(began.elapsed())));
    }
    let removed = b.counted(|| {
        a.ok(Call::remove("two"))?;
        thread::sleep(SETTLED);
        Ok(())
    })?;
    lab::note(format!(
        "one more volume costs another host {costs:?}, one less {removed:?}"
    ));
    for (calls, polls) in &costs {
        let of = |procedure| calls.get(&(NFS, procedure)).copied().unwrap_or(0);
        // Listed when it changed, and once more to be sure of the server's clock; besides, every
        // other poll looks at the other hosts.
        ensure!((2..=3 + polls / 2).contains(&of(READDIRPLUS)), "{calls:?}");
        // The new record, and the share's own id with each listing.
        ensure!((2..=3).contains(&of(READ)), "{calls:?}");
        // Those, the LOOKUPs for them, and one of `volumes/` a poll.
        ensure!(
            sum(calls) <= 16 + polls + polls / 2,
            "{polls} polls: {calls:?}"
        );
    }
    ensure!(
        removed.get(&(NFS, READ)).copied().unwrap_or(0) <= 2,
        "{removed:?}"
    );
    Ok(())
}

fn each_call(lab: &'static Lab) -> Result {
    let nas = server(lab, "calls-nas", "/srv/calls")?;
    let hour = Duration::from_secs(3600);
    let host = Host::start_with(lab, "calls", &nas, "/srv/calls", hour)?;
    host.ok(Call::create("warm", &[]))?;
    thread::sleep(SETTLED);
    let known: Vec<Call> = vec![Call::get("warm").times(100), Call::list().times(100)];
    let began = Instant::now();
    let mut reads = host.counted(|| {
        for answer in calls::all(host.node, &known)? {
            answer.ok()?;
        }
        Ok(())
    })?;
    reads.remove(&(NFS, FSSTAT));
    // Get looks whether the volume is still there, if that was not seen within the last second.
    let looks = reads.remove(&(NFS, LOOKUP)).unwrap_or(0);
    ensure!(looks <= 1 + began.elapsed().as_secs(), "{looks} looks");
    ensure!(reads.is_empty(), "Get and List of what is known: {reads:?}");
    let create = host.counted(|| host.ok(Call::create("db", &[])))?;
    let again = host.counted(|| host.ok(Call::create("db", &[])))?;
    let remove = host.counted(|| host.ok(Call::remove("db")))?;
    let absent = host.counted(|| {
        let text = calls::one(host.node, Call::get("never"))?.fails()?;
        ensure!(text.contains("no such volume"), "{text}");
        Ok(())
    })?;
    for (what, calls, most) in [
        // The trash has just been made, so it is listed.
        ("Create", &create, 13),
        ("Create of what exists", &again, 6),
        ("Remove", &remove, 26),
        ("Get of what is absent", &absent, 3),
    ] {
        lab::note(format!("{what}: {} RPCs {calls:?}", sum(calls)));
        ensure!(sum(calls) <= most, "{what}: more than {most}: {calls:?}");
        ensure!(
            calls.keys().all(|&(program, _)| program != MOUNT),
            "{calls:?}"
        );
    }
    host.nfsvol.process().stop().context("stopping")?;
    Ok(())
}

/// On an attached share, through the kernel's client, whose own calls are counted as well.
fn mounts(lab: &'static Lab) -> Result {
    const VOLUMES: u64 = 10;
    let nas = server(lab, "mounts-nas", "/srv/mounts")?;
    let proxy = Proxy::start(lab, "mounts-way", &nas.ip(), &PORTS)?;
    let hour = Duration::from_secs(3600);
    let host = Host::on(Node::guest(lab, "mounts")?, proxy, "/srv/mounts", hour)?;
    let all = |calls: &[Call]| -> Result {
        for answer in calls::all(host.node, calls)? {
            answer.ok()?;
        }
        Ok(())
    };
    let numbers = || 0..VOLUMES;
    let named = |make: fn(&str) -> Call| -> Vec<Call> {
        numbers().map(|n| make(&format!("v{n}"))).collect()
    };
    all(&named(|name| Call::create(name, &[])))?;
    host.ok(Call::create("holder", &[]))?;
    host.ok(Call::mount("holder", "x"))?;
    thread::sleep(2 * SETTLED);
    let began = Instant::now();
    let mounted = host.counted(|| all(&named(|name| Call::mount(name, "x"))))?;
    let fives = began.elapsed().as_secs() / 5;
    // What holds them is told the other hosts some seconds later.
    thread::sleep(3 * SETTLED);
    let unmounted = host.counted(|| {
        all(&named(|name| Call::unmount(name, "x")))?;
        thread::sleep(SETTLED);
        Ok(())
    })?;
    lab::note(format!(
        "of {VOLUMES}: Mount {mounted:?}, Unmount {unmounted:?}"
    ));
    ensure!(sum(&mounted) <= 12 * VOLUMES, "Mount: {mounted:?}");
    // At most one document for each (CREATE, WRITE, RENAME, REMOVE), and fewer when they come within a moment. How
    // often the kernel asks for attributes depends on how long it takes.
    let asked = unmounted.get(&(NFS, 1)).copied().unwrap_or(0);
    ensure!(
        sum(&unmounted) - asked <= 4 * VOLUMES + 5,
        "Unmount: {unmounted:?}"
    );
    // The server is probed once for all that come within five seconds.
    let probes = mounted.get(&(MOUNT, 1)).copied().unwrap_or(0);
    ensure!(probes <= 2 + fives, "Mount: {mounted:?}");
    host.nfsvol.process().stop().context("stopping")?;
    host.node.power_off()
}
