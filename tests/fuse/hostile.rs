//! A server that lies: errors, no panic, no hang, no memory beyond the cap, and nothing else lost.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lab::liar::{Liar, Lie};
use lab::process::Task;
use lab::{Lab, PATIENCE, Result};
use libtest_mimic::Trial;

use crate::{EXPORT, Host, fuse_trial, memory, nas};

/// `io_timeout` of the mount.
const IO_TIMEOUT: u64 = 1;

const ENTRIES: usize = 3000;

pub(crate) fn trials() -> Vec<Trial> {
    use Lie::{Cookies, Crumbs, Cut, Endless, Handles, Length, Lengths, Noise, Status, Strangers};
    let lies: [(_, &'static [Lie]); 4] = [
        ("hostile_records", &[Length, Endless, Crumbs, Strangers]),
        ("hostile_replies", &[Status, Cut, Lengths]),
        ("hostile_noise", &[Noise]),
        ("hostile_names", &[Cookies, Handles]),
    ];
    lies.map(|(name, lies)| fuse_trial(name, move |lab| hostile(lab, name, lies)))
        .into()
}

fn hostile(lab: &'static Lab, name: &str, lies: &[Lie]) -> Result {
    let nas = nas(lab)?;
    let liar = Liar::start(lab, &format!("{name}-liar"), &nas.ip(), &[2049, 20048])?;
    let options = format!("io_timeout={IO_TIMEOUT},acregmax=1,acdirmax=1");
    let host = Host::mount_at(liar.ip(), nas, name, &options)?;
    let kept = host.join("kept");
    fs::write(&kept, "kept")?;
    // More than one answer of READDIRPLUS holds.
    for n in 0..ENTRIES {
        fs::write(nas.local(EXPORT).join(format!("{name}/entry{n}")), "x")?;
    }
    let worker = host.status()?.pid;
    for &lie in lies {
        liar.tell(Some(lie))?;
        // What each of them answers is the server's lie; that it answers is the promise.
        for program in [
            "stat -f . ; stat entry1 gone".to_owned(),
            "ls -lU . | wc -l".to_owned(),
            "cat entry3 kept | wc -c".to_owned(),
            format!("dd if=/dev/zero of=new-{lie:?} bs=64k count=20 conv=fsync"),
            format!("mkdir d-{lie:?} && rmdir d-{lie:?}"),
            "mv entry5 entry6; ln entry7 link; truncate -s 3 entry8".to_owned(),
        ] {
            let text = format!("cd {}; {program}", host.display());
            let task = Task::new(&["sh", "-c", &text]);
            task.run().with_context(|| format!("{lie:?}: {program}"))?;
        }
        let status = host.status().with_context(|| format!("{lie:?}"))?;
        ensure!(status.pid == worker && status.alive, "{lie:?}: {status:?}");
        let peak = memory::peak(worker)?;
        ensure!(
            peak <= memory::MEMORY,
            "{lie:?}: {peak} bytes were resident"
        );

        liar.tell(None)?;
        works_again(&host, lie)?;
        ensure!(fs::read_to_string(&kept)? == "kept", "{lie:?}");
    }
    Ok(())
}

/// Once the server tells the truth, so does the mount; what is cached is forgotten in a second.
fn works_again(host: &Host, lie: Lie) -> Result {
    let path = host.join(format!("after-{lie:?}"));
    let began = Instant::now();
    loop {
        let outcome = fs::write(&path, format!("{lie:?}"))
            .and_then(|()| fs::read_to_string(&path))
            .and_then(|text| Ok((text, fs::read_dir(&**host)?.count())));
        match outcome {
            Ok((text, entries)) if text == format!("{lie:?}") && entries > ENTRIES => return Ok(()),
            outcome => ensure!(began.elapsed() < PATIENCE, "{lie:?}: {outcome:?}"),
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}
