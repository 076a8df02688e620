//! Hosts that change the catalog at the same time.

use std::collections::BTreeSet;
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use lab::{Answer, Call, Ganesha, Lab, Node, PATIENCE, Result, wait_for};
use serde_json::{Value, json};

use crate::{EXCLUSIVE, EXPORT, Host, fresh, nas};

/// Of each race: who is faster is another one each time.
const ROUNDS: usize = 5;
/// How long a Mount of these hosts may take, so that one waits for an exclusive volume for some seconds
/// less; a busy machine takes one to start a worker.
const DEADLINE: Duration = Duration::from_secs(6);
/// The hosts, and the server that they share.
struct Cluster {
    nas: &'static Ganesha,
    hosts: Vec<Host>,
}

impl Cluster {
    fn start(lab: &'static Lab, word: &str) -> Result<Self> {
        let nas = nas(lab)?;
        let deadline = format!("{}s", DEADLINE.as_secs());
        let start = |letter| {
            let node = Node::machine(lab, &format!("{word}-{letter}"))?;
            let node: &'static Node = Box::leak(Box::new(node));
            Host::on(node, nas, &["--mount-deadline", &deadline])
        };
        let hosts = ["a", "b", "c"].map(start);
        let hosts = hosts.into_iter().collect::<Result<_>>()?;
        Ok(Self { nas, hosts })
    }

    /// Has every host make its call at the same time.
    fn together(&self, call: impl Fn(usize) -> Call) -> Result<Vec<Answer>> {
        thread::scope(|scope| {
            let asked = self.hosts.iter().enumerate().map(|(number, host)| {
                let call = call(number);
                scope.spawn(move || host.ask(call))
            });
            let asked: Vec<_> = asked.collect();
            let answers = asked.into_iter().map(|asked| {
                let answer = asked.join().map_err(|_| anyhow!("a thread panicked"));
                answer?
            });
            answers.collect()
        })
    }

    /// What the record of a volume says, on all hosts alike.
    fn status(&self, volume: &str) -> Result<Value> {
        let told = |host: &Host| {
            let mut status = host.ok(Call::get(volume))?["Volume"]["Status"].clone();
            anyhow::Ok(json!([
                status["created_by"].take(),
                status["options"].take()
            ]))
        };
        let all = self.hosts.iter().map(told).collect::<Result<Vec<_>>>()?;
        ensure!(all.iter().all(|one| *one == all[0]), "{volume}: {all:?}");
        all.into_iter().next().context("no host")
    }

    fn name(&self, number: usize) -> &str {
        self.hosts[number].name()
    }
}

fn won(answers: &[Answer]) -> Vec<usize> {
    let won = answers.iter().enumerate();
    won.filter(|(_, answer)| answer.status == 200)
        .map(|(number, _)| number)
        .collect()
}

pub(crate) fn races(lab: &'static Lab) -> Result {
    let cluster = Cluster::start(lab, "race")?;
    let mut winners = BTreeSet::new();
    for _ in 0..ROUNDS {
        winners.insert(create(&cluster)?);
        remove(&cluster)?;
        mount_or_remove(&cluster)?;
        winners.insert(exclusive(&cluster)?);
    }
    lab::note(format!("won by {winners:?}"));
    Ok(())
}

/// Of Creates with different options one wins, and the others are told its options.
fn create(cluster: &Cluster) -> Result<usize> {
    let volume = fresh("create");
    let mode = |number: usize| ["0700", "0750", "0711"][number];
    let answers = cluster.together(|number| Call::create(&volume, &[("mode", mode(number))]))?;
    let won = won(&answers);
    let &[winner] = won.as_slice() else {
        anyhow::bail!("not one winner: {answers:?}");
    };
    for (number, answer) in answers.into_iter().enumerate() {
        if number != winner {
            let text = answer.fails()?;
            for part in [
                "other options",
                mode(winner),
                mode(number),
                cluster.name(winner),
            ] {
                ensure!(text.contains(part), "{part}: {text}");
            }
        }
    }
    let status = cluster.status(&volume)?;
    ensure!(
        status[0] == cluster.name(winner) && status[1]["mode"] == mode(winner),
        "{status} instead of {winner}"
    );
    // Equal ones all succeed.
    let volume = fresh("create");
    for answer in cluster.together(|_| Call::create(&volume, &[]))? {
        answer.ok()?;
    }
    cluster.status(&volume)?;
    Ok(winner)
}

/// Of Removes each succeeds, and the data is in the trash once.
fn remove(cluster: &Cluster) -> Result {
    let volume = fresh("remove");
    cluster.hosts[0].ok(Call::create(&volume, &[]))?;
    let export = cluster.nas.local(EXPORT);
    std::fs::write(export.join(&volume).join("file"), &volume)?;
    for answer in cluster.together(|_| Call::remove(&volume))? {
        answer.ok()?;
    }
    let trash = export.join(".nfsvol/trash");
    let entries = std::fs::read_dir(&trash)?.collect::<std::io::Result<Vec<_>>>()?;
    let own = entries
        .iter()
        .map(std::fs::DirEntry::path)
        .filter(|path| path.join("data/file").exists())
        .filter(|path| std::fs::read(path.join("data/file")).is_ok_and(|t| t == volume.as_bytes()));
    ensure!(own.count() == 1, "{volume} in {entries:?}");
    ensure!(!export.join(&volume).exists());
    // A poll that was under way may have brought the record back to a host: until the next one.
    for host in &cluster.hosts {
        let mut text = String::new();
        wait_for("the volume to be gone", PATIENCE, || {
            text = host.fails(Call::get(&volume)).unwrap_or_default();
            text.contains("no such volume")
        })
        .with_context(|| text.clone())?;
    }
    Ok(())
}

/// Of a Mount and Removes elsewhere one wins.
fn mount_or_remove(cluster: &Cluster) -> Result {
    let volume = fresh("either");
    cluster.hosts[0].ok(Call::create(&volume, &[]))?;
    let answers = cluster.together(|number| match number {
        0 => Call::mount(&volume, "race"),
        _ => Call::remove(&volume),
    })?;
    let won = won(&answers);
    let mounted = won.contains(&0);
    ensure!(
        if mounted { won == [0] } else { !won.is_empty() },
        "{answers:?}"
    );
    for (number, answer) in answers.into_iter().enumerate() {
        if !won.contains(&number) {
            // A Mount that is about to fail holds the volume for a moment.
            let told = if number == 0 {
                "no such volume"
            } else {
                cluster.name(0)
            };
            let text = answer.fails()?;
            ensure!(text.contains(told), "{text}");
        }
    }
    let there = cluster.nas.local(EXPORT).join(&volume).exists();
    ensure!(
        there == mounted,
        "{volume} is there: {there}, mounted: {mounted}"
    );
    if mounted {
        cluster.hosts[0].ok(Call::unmount(&volume, "race"))?;
        cluster.hosts[1].ok(Call::remove(&volume))?;
    }
    Ok(())
}

/// Of Mounts of an exclusive volume one wins, and the others are told who has it.
fn exclusive(cluster: &Cluster) -> Result<usize> {
    let volume = fresh("one");
    cluster.hosts[0].ok(Call::create(&volume, EXCLUSIVE))?;
    let answers = cluster.together(|_| Call::mount(&volume, "race"))?;
    let won = won(&answers);
    let &[winner] = won.as_slice() else {
        anyhow::bail!("not one winner: {answers:?}");
    };
    for (number, answer) in answers.into_iter().enumerate() {
        if number != winner {
            let text = answer.fails()?;
            ensure!(
                text.contains("exclusive") && text.contains(cluster.name(winner)),
                "{text}"
            );
        }
    }
    cluster.hosts[winner].ok(Call::unmount(&volume, "race"))?;
    Ok(winner)
}
