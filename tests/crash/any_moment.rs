//! kill -9 of the daemon at any moment, while clients make, use and remove volumes.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};
use lab::calls::Answer;
use lab::{Call, PATIENCE, Part, Result, trial, wait_for};
use libtest_mimic::Trial;

use crate::world::{Path, World};

/// How long the daemon is killed again and again.
const STORM: Duration = Duration::from_secs(12);
/// The daemon lives at most this long, in milliseconds; a call takes a few.
const LIFE: u64 = 250;
const CLIENTS: usize = 4;

pub(crate) fn trials() -> Vec<Trial> {
    let needs: &[Part] = &[Part::Ganesha, Part::Fuse];
    vec![trial("any-moment", needs, |lab| {
        storm(World::new(lab, "any-moment", Path::Fuse, true)?)
    })]
}

/// What a client holds to be true of its volume, because it was told so.
struct Client<'a> {
    world: &'a World,
    volume: String,
    exists: bool,
    /// Files written in volumes of this name, ever.
    files: Vec<String>,
}

fn storm(world: World) -> Result {
    let a = world.a.start("")?;
    let over = AtomicBool::new(false);
    let clients = thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|n| {
                let (world, over) = (&world, &over);
                scope.spawn(move || {
                    let mut client = Client {
                        world,
                        volume: format!("v{n}"),
                        exists: false,
                        files: Vec::new(),
                    };
                    while !over.load(Ordering::Relaxed) {
                        client.life()?;
                    }
                    Ok(client)
                })
            })
            .collect();
        let mut killed = 0_u64;
        let began = Instant::now();
        let storm = (|| -> Result {
            while began.elapsed() < STORM {
                // Lives of all lengths, the same in every run.
                thread::sleep(Duration::from_millis(killed * 97 % LIFE));
                a.kill()?;
                a.up()?;
                killed += 1;
            }
            Ok(())
        })();
        over.store(true, Ordering::Relaxed);
        let clients: Result<Vec<Client>> = clients
            .into_iter()
            .map(|client| client.join().map_err(|_| anyhow!("a client panicked"))?)
            .collect();
        let clients = clients?;
        let files: usize = clients.iter().map(|client| client.files.len()).sum();
        lab::note(format!(
            "killed {killed} times while {files} files were written"
        ));
        storm.map(|()| clients)
    })?;

    let b = world.b.start("")?;
    for client in &clients {
        ensure!(
            world.agree(&client.volume)? == client.exists,
            "{}",
            client.volume
        );
        for file in &client.files {
            let found = world.disk.find(file)?;
            ensure!(found.len() == 1, "{file}: {found:?}");
            ensure!(fs::read_to_string(&found[0])? == format!("{file}\n"));
        }
        client.end()?;
    }
    drop(clients);
    world.end(a, b)
}

impl Client<'_> {
    /// Makes a call until it is answered; calls may be repeated. The daemon is away at times.
    fn call(&self, call: &Call) -> Result<Answer> {
        let began = Instant::now();
        loop {
            let answer = self.world.a.call(call.clone())?;
            if answer.status != 0 {
                return Ok(answer);
            }
            if began.elapsed() > PATIENCE {
                bail!("{answer}");
            }
        }
    }

    /// Makes the volume, writes a file to it, lets it go, and may remove it.
    fn life(&mut self) -> Result {
        let (volume, file) = (
            self.volume.clone(),
            format!("{}-{}", self.volume, self.files.len()),
        );
        self.call(&Call::create(&volume, &[]))?.ok()?;
        self.exists = true;
        let answer = self.call(&Call::mount(&volume, &file))?.ok()?;
        let place = answer["Mountpoint"].as_str().context("no mount point")?;
        self.world
            .a
            .node()
            .sh(&format!("echo {file} >{place}/{file}"))?;
        self.files.push(file.clone());
        self.call(&Call::unmount(&volume, &file))?.ok()?;
        if self.files.len().is_multiple_of(2) {
            let answer = self.call(&Call::remove(&volume))?;
            // A Mount that was done and not answered may still count.
            let starting = answer.to_string().contains("being started");
            ensure!(starting || answer.status == 200, "{answer}");
            self.exists = starting;
        }
        Ok(())
    }

    /// Removes the volume for good, whatever attachments were left without an owner.
    fn end(&self) -> Result {
        wait_for(&format!("{} to be removed", self.volume), PATIENCE, || {
            self.call(&Call::remove(&self.volume))
                .is_ok_and(|answer| answer.status == 200)
        })
    }
}
