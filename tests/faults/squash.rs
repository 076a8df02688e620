//! root_squash where the server's anonymous user may make directories.

use anyhow::ensure;
use lab::{Call, Export, Ganesha, Lab, Nfsvol, Node, Result, calls};

const EXPORT: &str = "/srv/squashed";
/// Ganesha's `Anonymous_Uid`.
const NOBODY: &str = "4294967294";

pub(crate) fn allows(lab: &'static Lab) -> Result {
    let server = Ganesha::start(
        lab,
        "squash-nas",
        &[Export::new(EXPORT).squash("root_squash")],
    )?;
    server.node().sh(&format!("chmod 0777 {EXPORT}"))?;
    let node: &'static Node = Box::leak(Box::new(Node::machine(lab, "squash")?));
    let _nfsvol = Nfsvol::start(node, &["--share", &server.share(EXPORT)], &[])?;
    let one = |call| calls::one(node, call);
    // What can be had is had, and what cannot be is said in Status.
    one(Call::create("plain", &[("mode", "0750")]))?.ok()?;
    let status = one(Call::get("plain"))?.ok()?["Volume"]["Status"].to_string();
    ensure!(status.contains("nocopy"), "{status}");
    let stat = server
        .node()
        .sh(&format!("stat -c '%u %a' {EXPORT}/plain"))?;
    ensure!(stat == format!("{NOBODY} 750"), "{stat}");
    one(Call::create("theirs", &[("uid", NOBODY), ("gid", NOBODY)]))?.ok()?;
    // Another owner cannot: that is an error, before Docker copies anything.
    let text = one(Call::create("mine", &[("uid", "999"), ("gid", "999")]))?.fails()?;
    for word in ["uid 999", "root_squash", ":nocopy"] {
        ensure!(text.contains(word), "{word}: {text}");
    }
    let left = server
        .node()
        .sh(&format!("ls -A {EXPORT} {EXPORT}/.nfsvol/tmp"))?;
    ensure!(
        !left.contains("mine") && !left.contains(".data"),
        "left behind: {left}"
    );
    one(Call::mount("plain", "c1"))?.ok()?;
    one(Call::unmount("plain", "c1"))?.ok()?;
    for name in ["plain", "theirs"] {
        one(Call::remove(name))?.ok()?;
    }
    Ok(())
}
