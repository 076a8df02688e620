//! One directory of the share for those who write and those who only read, on two hosts.

use anyhow::ensure;
use lab::{Call, Lab, PATIENCE, Result};

use crate::{EXPORT, Host, fresh, mountpoint, nas, remove_when_free};

/// A volume for who publishes, and one with access=readonly for who reads, of the same directory.
pub(crate) fn mixed(lab: &'static Lab) -> Result {
    let nas = nas(lab)?;
    let a = Host::start(lab, nas, "mixed", "a")?;
    let b = Host::start(lab, nas, "mixed", "b")?;
    let (site, seen) = (fresh("site"), fresh("seen"));
    a.ok(Call::create(&site, &[]))?;
    let readonly = [("access", "readonly"), ("subdir", site.as_str())];
    b.ok(Call::create(&seen, &readonly))?;

    let written = mountpoint(&a.ok(Call::mount(&site, "writer"))?)?;
    a.node.sh(&format!("echo one >{written}/page"))?;
    // Readers on both hosts, also beside the writer.
    let mut places = Vec::new();
    for host in [&a, &b] {
        let place = mountpoint(&host.ok(Call::mount(&seen, "reader"))?)?;
        ensure!(host.node.sh(&format!("cat {place}/page"))? == "one");
        for change in [
            "echo >page",
            "echo >new",
            "rm page",
            "mkdir dir",
            "chmod 600 page",
        ] {
            let refused = host.node.sh(&format!("cd {place}; {change}"));
            let refused = format!(
                "{:#}",
                refused.err().unwrap_or_else(|| anyhow::anyhow!("done"))
            );
            ensure!(
                refused.contains("Read-only file system"),
                "{change}: {refused}"
            );
        }
        places.push(place);
    }
    // What is published is seen by who opens it afterwards.
    a.node.sh(&format!(
        "echo two >{written}/next; mv {written}/next {written}/page"
    ))?;
    for (host, place) in [&a, &b].into_iter().zip(&places) {
        let read = format!("until [ $(cat {place}/page) = two ]; do sleep .1; done");
        host.node.sh(&read)?;
    }

    // Removed only when nobody uses it: neither a volume, nor its directory by way of another one.
    let refused = b.fails(Call::remove(&site))?;
    ensure!(
        refused.contains(&format!("same directory as volume {seen}")),
        "{refused}"
    );
    a.ok(Call::unmount(&seen, "reader"))?;
    let refused = a.fails(Call::remove(&seen))?;
    ensure!(
        refused.contains(&format!("same directory as volume {site}")),
        "{refused}"
    );
    b.ok(Call::unmount(&seen, "reader"))?;
    let refused = b.fails(Call::remove(&site))?;
    ensure!(refused.contains(a.name()), "{refused}");
    a.node.sh(&format!("echo three >{written}/page"))?;
    a.ok(Call::unmount(&site, "writer"))?;
    remove_when_free(&b, &seen, PATIENCE)?;
    // The directory is the writer's: it was there before the volume that only read it.
    let page = std::fs::read_to_string(nas.local(EXPORT).join(&site).join("page"))?;
    ensure!(page == "three\n", "{page}");
    remove_when_free(&b, &site, PATIENCE)?;
    Ok(())
}
