//! Volumes that come and go on three hosts at random, for minutes, while the NFS server is killed
//! twice: no call fails for a reason of its own, no host finds another one in an exclusive volume,
//! nothing that was written is lost, and nothing is left over, on any host or on the share.
//!
//! 60 volumes for half a minute in `make test`, 600 for five in `make test-long`. A run is a
//! function of its seed as far as its hosts' timing is; `NFSVOL_CHURN_SEED=SEED` sets it.

#[path = "churn/user.rs"]
mod user;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::{Context, anyhow, ensure};
use lab::process::Task;
use lab::{
    Call, Export, Ganesha, Lab, Nfsvol, Node, PATIENCE, Part, Result, calls, trial, wait_for,
};
use serde_json::{Value, json};
use user::{Plan, Report};

const NEEDS: &[Part] = &[Part::Ganesha, Part::Fuse];
const EXPORT: &str = "/srv/churn";
const HOSTS: [&str; 3] = ["churn-a", "churn-b", "churn-c"];
/// Users of each host, at work at the same time.
const LANES: u64 = 2;
/// Volumes that take part, and for how long.
const SHORT: (u64, Duration) = (60, Duration::from_secs(30));
const LONG: (u64, Duration) = (600, Duration::from_secs(300));
/// What the users may have been about when the server was killed. What such a call leaves in `tmp/`
/// is swept an hour later.
const UNFINISHED: usize = 24;
/// Descriptors of a daemon that come and go: its connections to the server.
const DESCRIPTORS: usize = 16;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|role| role == user::ROLE) {
        return user::main();
    }
    lab::main!(|| vec![trial("nothing_is_lost_or_left", NEEDS, churn)])
}

/// A host of the cluster.
struct Host {
    node: &'static Node,
    nfsvol: Nfsvol<'static>,
    /// Descriptors that the daemon had open before anything was done.
    descriptors: usize,
}

impl Host {
    fn start(lab: &'static Lab, name: &str, share: &str) -> Result<Self> {
        let node: &'static Node = Box::leak(Box::new(Node::machine(lab, name)?));
        let args = ["--share", share, "--data-path", "fuse", "--poll", "2s"];
        let nfsvol = Nfsvol::start(node, &args, &[])?;
        let mut host = Self {
            node,
            nfsvol,
            descriptors: 0,
        };
        host.ok(Call::list())?;
        host.descriptors = host.open_descriptors()?;
        Ok(host)
    }

    fn ok(&self, call: Call) -> Result<Value> {
        calls::one(self.node, call)?.ok()
    }

    fn names(&self) -> Result<BTreeSet<String>> {
        let list = self.ok(Call::list())?;
        let volumes = list["Volumes"].as_array().context("no list")?;
        let names = volumes.iter().filter_map(|volume| volume["Name"].as_str());
        Ok(names.map(str::to_owned).collect())
    }

    fn open_descriptors(&self) -> Result<usize> {
        let pid = self.nfsvol.process().pid()?;
        let listed = self.node.sh(&format!("ls /proc/{pid}/fd"))?;
        Ok(listed.lines().count())
    }

    /// Waits until the host's daemon is answered by its share again.
    fn finds_its_share(&self) -> Result {
        let ask = || self.ok(Call::new("Nfsvol.TrashLs", &json!({})));
        wait_for("the server to be found", PATIENCE, || ask().is_ok())
    }

    /// Has the host's users at work.
    fn work(&self, plan: &Plan) -> Result<Report> {
        let exe = std::env::current_exe()?;
        let exe = exe.to_str().context("the path is not UTF-8")?;
        let task = Task {
            stdin: serde_json::to_string(plan)?,
            limit: Some(Duration::from_secs(plan.seconds) + PATIENCE),
            ..Task::new(&[exe, user::ROLE])
        };
        Ok(serde_json::from_str(&self.node.run_task(&task)?.ok()?)?)
    }

    /// What nobody uses any more and is there all the same.
    fn left(&self) -> Result<Vec<String>> {
        let found = self.node.sh("cd /var/lib/nfsvol
             grep -o '/var/lib/nfsvol/mnt/[^ ]*' /proc/self/mountinfo || true
             pgrep -af '[ ]fuse-worker' || true
             find attachments mnt/volumes mnt/shares -mindepth 1 2>/dev/null || true")?;
        let mut left: Vec<String> = found.lines().map(str::to_owned).collect();
        let status = self.ok(Call::new("Nfsvol.Status", &json!({})))?;
        if status["attachments"] != 0 {
            left.push(format!("{} attachments", status["attachments"]));
        }
        let listed = self.ok(Call::new("Nfsvol.Ls", &json!({})))?;
        let held = listed.as_array().into_iter().flatten();
        let held = held.filter(|line| line["held_by"] != "");
        left.extend(held.map(|line| format!("{} held by {}", line["name"], line["held_by"])));
        let copies = self.node.sh("ls /var/lib/nfsvol/catalog")?;
        let copies: BTreeSet<String> = copies.lines().map(str::to_owned).collect();
        let names: BTreeSet<String> = self.names()?.iter().map(|n| format!("{n}.json")).collect();
        left.extend(copies.symmetric_difference(&names).cloned());
        let descriptors = self.open_descriptors()?;
        if descriptors > self.descriptors + DESCRIPTORS {
            left.push(format!(
                "{descriptors} descriptors, {} before",
                self.descriptors
            ));
        }
        Ok(left)
    }
}

/// The share, as its server sees it.
struct Share<'a> {
    nas: &'a Ganesha,
}

fn list(dir: &Path) -> Result<BTreeSet<String>> {
    let entries = fs::read_dir(dir).with_context(|| dir.display().to_string())?;
    entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

impl Share<'_> {
    fn list(&self, below: &str) -> Result<BTreeSet<String>> {
        list(&self.nas.local(EXPORT).join(below))
    }

    fn records(&self) -> Result<BTreeSet<String>> {
        self.list(".nfsvol/volumes")
    }

    /// Volumes that a call did not come to the end with: the next call for one does.
    fn unfinished(&self) -> Result<BTreeSet<String>> {
        let records = self.records()?;
        let mut data = self.list("")?;
        data.remove(".nfsvol");
        let mut names: BTreeSet<String> = data.symmetric_difference(&records).cloned().collect();
        for name in records {
            let dir = format!(".nfsvol/volumes/{name}");
            let mut parts = self.list(&dir)?;
            let whole = parts.remove("record.json");
            // The last epoch stays for as long as the volume is there.
            let claims: Vec<String> = parts
                .extract_if(.., |part| part.starts_with("claims."))
                .collect();
            let epochs =
                |of: &String| Ok::<_, anyhow::Error>(self.list(&format!("{dir}/{of}"))?.len());
            let epochs: Vec<usize> = claims.iter().map(epochs).collect::<Result<_>>()?;
            if !whole || !parts.is_empty() || epochs.iter().any(|count| *count > 1) {
                names.insert(name);
            }
        }
        Ok(names)
    }

    /// What is there besides volumes, whole entries of the trash, and hosts.
    fn left(&self) -> Result<Vec<String>> {
        let mut left: Vec<String> = self.unfinished()?.into_iter().collect();
        let tmp = self.list(".nfsvol/tmp")?;
        if tmp.len() > UNFINISHED {
            left.extend(tmp.iter().map(|name| format!("tmp/{name}")));
        }
        for entry in self.list(".nfsvol/trash")? {
            let parts = self.list(&format!(".nfsvol/trash/{entry}"))?;
            if !parts.iter().eq(["data", "volume"]) {
                left.push(format!("trash/{entry}: {parts:?}"));
            }
        }
        // The last document of each host counts; the one before it stays.
        let mut last = BTreeMap::new();
        for file in self.list(".nfsvol/hosts")? {
            let number = file
                .strip_suffix(".json")
                .and_then(|file| file.rsplit_once('.'));
            if let Some((host, number)) = number {
                let docs: &mut Vec<(u64, String)> = last.entry(host.to_owned()).or_default();
                docs.push((number.parse()?, file));
            }
        }
        for (host, docs) in last {
            let (_, file) = docs.iter().max().context("no document")?;
            let doc = self.nas.local(EXPORT).join(".nfsvol/hosts").join(file);
            let doc: Value = serde_json::from_slice(&fs::read(doc)?)?;
            if doc["holds"] != json!({}) {
                left.push(format!("{file}: {}", doc["holds"]));
            }
            if docs.len() > 2 {
                left.push(format!("{} documents of {host}", docs.len()));
            }
        }
        Ok(left)
    }

    /// Every file that was written, wherever it is by now.
    fn files(&self) -> Result<BTreeSet<String>> {
        let mut files = BTreeSet::new();
        for name in self.records()? {
            files.extend(self.list(&name)?);
        }
        for entry in self.list(".nfsvol/trash")? {
            files.extend(self.list(&format!(".nfsvol/trash/{entry}/data"))?);
        }
        Ok(files)
    }
}

fn seed() -> u64 {
    if let Ok(seed) = std::env::var("NFSVOL_CHURN_SEED") {
        return seed.parse().expect("NFSVOL_CHURN_SEED is a number");
    }
    let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    time.map_or(0, |time| time.as_secs())
}

fn churn(lab: &'static Lab) -> Result {
    let seed = seed();
    with_seed(lab, seed).with_context(|| format!("NFSVOL_CHURN_SEED={seed}"))
}

fn with_seed(lab: &'static Lab, seed: u64) -> Result {
    let (volumes, time) = if lab::long() { LONG } else { SHORT };
    let nas = Ganesha::start(lab, "churn-nas", &[Export::new(EXPORT)])?;
    let share = Share { nas: &nas };
    let home = nas.share(EXPORT);
    let hosts = HOSTS.map(|name| Host::start(lab, name, &home));
    let hosts: Vec<Host> = hosts.into_iter().collect::<Result<_>>()?;

    let away = lab.dir().join("away");
    let reports: Vec<Report> = thread::scope(|scope| {
        let users: Vec<_> = hosts
            .iter()
            .enumerate()
            .map(|(number, host)| {
                let plan = Plan {
                    seed,
                    hosts: HOSTS.map(str::to_owned).to_vec(),
                    number,
                    lanes: LANES,
                    volumes,
                    seconds: time.as_secs(),
                    away: away.clone(),
                };
                scope.spawn(move || host.work(&plan))
            })
            .collect();
        for _ in 0..2 {
            thread::sleep(time / 3);
            fs::write(&away, "")?;
            nas.restart(None)?;
            for host in &hosts {
                host.finds_its_share()?;
            }
            fs::remove_file(&away)?;
        }
        let ended = users.into_iter().map(|user| {
            let ended = user.join().map_err(|_| anyhow!("a thread panicked"));
            ended?
        });
        ended.collect::<Result<_>>()
    })?;
    let mut all = Report::default();
    for report in reports {
        all.add(report);
    }
    lab::note(&all);
    ensure!(all.wrong.is_empty(), "{:#?}", all.wrong);
    let named = |count: u64| (0..count).map(user::volume).collect::<BTreeSet<_>>();
    let unused: Vec<_> = named(volumes).difference(&all.used).cloned().collect();
    ensure!(unused.is_empty(), "never used: {unused:?}");

    // What the server's end has cut off is finished by the next call; the rest settles by itself.
    let unfinished = share.unfinished()?;
    lab::note(format!("cut off: {unfinished:?}"));
    ensure!(unfinished.len() <= UNFINISHED, "{unfinished:?}");
    for name in &unfinished {
        let host = &hosts[0];
        host.ok(Call::create(name, user::options(name)))?;
        host.ok(Call::mount(name, "again"))?;
        host.ok(Call::unmount(name, "again"))?;
    }
    settle(&hosts, &share)?;
    let there = share.files()?;
    let lost: Vec<_> = all.written.difference(&there).collect();
    ensure!(lost.is_empty(), "written and lost: {lost:?}");

    // All that is left goes away when it is asked to.
    let records = share.records()?;
    lab::note(format!("left: {} of {volumes} volumes", records.len()));
    for (name, host) in records.iter().zip(hosts.iter().cycle()) {
        host.ok(Call::remove(name))?;
    }
    hosts[0].ok(Call::new("Nfsvol.TrashPurge", &json!({ "All": true })))?;
    for host in &hosts {
        // A start looks at once at what is left, as the daemon does each minute.
        host.nfsvol.restart()?;
    }
    settle(&hosts, &share)?;
    for host in &hosts {
        let logs = || host.node.sh("ls /var/lib/nfsvol/fuse");
        wait_for("workers' logs to be gone", PATIENCE, || {
            logs().is_ok_and(|logs| logs.is_empty())
        })
        .with_context(|| format!("on {}: {:?}", host.node.name(), logs()))?;
    }
    for dir in ["volumes", "trash"] {
        let rest = share.list(&format!(".nfsvol/{dir}"))?;
        ensure!(rest.is_empty(), "in .nfsvol/{dir}: {rest:?}");
    }
    Ok(())
}

/// Waits until every host has the share's volumes and nothing is left of their use.
fn settle(hosts: &[Host], share: &Share) -> Result {
    let left = || -> Result<BTreeMap<String, Vec<String>>> {
        let mut left = BTreeMap::from([("share".to_owned(), share.left()?)]);
        let records = share.records()?;
        for host in hosts {
            let mut own = host.left()?;
            let names = host.names()?;
            let differs = records.symmetric_difference(&names);
            own.extend(differs.map(|name| format!("{name} is not on both")));
            left.insert(host.node.name().to_owned(), own);
        }
        left.retain(|_, left| !left.is_empty());
        Ok(left)
    };
    wait_for("nothing to be left", PATIENCE, || {
        left().is_ok_and(|left| left.is_empty())
    })
    .with_context(|| format!("{:#?}", left()))
}
