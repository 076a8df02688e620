//! A host that was away while others changed the catalog.

use std::collections::BTreeSet;
use std::thread;

use anyhow::{Context, ensure};
use lab::{Call, Lab, PATIENCE, Result, wait_for};

use crate::{Host, SESSION, fresh, nas};

/// A host that the server is out of reach of answers meanwhile, and catches up afterwards.
pub(crate) fn away(lab: &'static Lab) -> Result {
    let nas = nas(lab)?;
    let start = |letter| Host::start(lab, nas, "away", letter);
    let (a, b, c) = &(start("a")?, start("b")?, start("c")?);
    let word = fresh("away");
    let volume = |n: usize| format!("{word}-{n}");
    let names = |host: &Host| -> Result<BTreeSet<String>> {
        let list = host.ok(Call::list())?;
        let volumes = list["Volumes"].as_array().context("no list")?;
        let names = volumes.iter().filter_map(|volume| volume["Name"].as_str());
        let own = names.filter(|name| name.starts_with(&word));
        Ok(own.map(str::to_owned).collect())
    };
    for n in 0..10 {
        a.ok(Call::create(&volume(n), &[("mode", "0750")]))?;
    }
    let known = names(a)?;
    wait_for("the volumes on the third host", PATIENCE, || {
        names(c).is_ok_and(|names| names == known)
    })?;

    c.node.set_network(false)?;
    // Some go, some come, one becomes another, all from two hosts.
    for n in 0..4 {
        b.ok(Call::remove(&volume(n)))?;
    }
    for n in 10..16 {
        b.ok(Call::create(&volume(n), &[]))?;
    }
    a.ok(Call::remove(&volume(9)))?;
    b.ok(Call::create(&volume(9), &[("mode", "0700")]))?;
    // For longer than its session lasts.
    thread::sleep(SESSION * 3 / 2);
    ensure!(names(c)? == known, "it forgets what it cannot ask about");
    let status = &c.ok(Call::get(&volume(0)))?["Volume"]["Status"];
    ensure!(status["options"]["mode"] == "0750", "{status}");
    c.node.set_network(true)?;

    let now: BTreeSet<String> = (4..16).map(volume).collect();
    for host in [a, b, c] {
        wait_for(&format!("{} to catch up", host.name()), PATIENCE, || {
            names(host).is_ok_and(|names| names == now)
        })
        .with_context(|| format!("{:?} instead of {now:?}", names(host)))?;
    }
    wait_for("the one that became another", PATIENCE, || {
        let got = c.ok(Call::get(&volume(9)));
        got.is_ok_and(|got| got["Volume"]["Status"]["options"]["mode"] == "0700")
    })?;
    // And it takes part again.
    c.ok(Call::mount(&volume(15), "back"))?;
    let refused = a.fails(Call::remove(&volume(15)))?;
    ensure!(refused.contains(c.name()), "{refused}");
    c.ok(Call::unmount(&volume(15), "back"))?;
    Ok(())
}
