//! The lab itself: its parts start, work together, and are gone afterwards however it ends.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use lab::docker::{Engine, IMAGE};
use lab::proxy::{MOUNT, NFS};
use lab::{
    Export, Ganesha, Knfsd, Lab, Node, PATIENCE, Part, Proxy, Result, Shared, process, trial,
    wait_for,
};

/// Tells a lab inside this lab to come up with everything, and then what to do.
const DOOMED: &str = "NFSVOL_LAB_DOOMED";

fn main() -> ExitCode {
    lab::main!(|| {
        if let Ok(end) = std::env::var(DOOMED) {
            return vec![trial("doomed", &[], move |lab| doomed(lab, &end))];
        }
        let everything: &[Part] = &[Part::Docker, Part::Ganesha, Part::Guest];
        vec![
            trial(
                "guest_mounts_ganesha",
                &[Part::Ganesha, Part::Guest],
                guest_mounts_ganesha,
            ),
            trial(
                "guest_mounts_knfsd",
                &[Part::Guest, Part::Knfsd],
                guest_mounts_knfsd,
            ),
            trial(
                "proxy_counts_delays_resets",
                &[Part::Ganesha, Part::Guest],
                proxy,
            ),
            trial("engine_on_a_machine", &[Part::Docker], engine_on_a_machine),
            trial(
                "engine_in_a_guest",
                &[Part::Docker, Part::Guest],
                engine_in_a_guest,
            ),
            trial("nothing_is_left_after_a_panic", everything, |lab| {
                ends(lab, "panic")
            }),
            trial("nothing_is_left_after_sigterm", everything, |lab| {
                ends(lab, "term")
            }),
            trial("nothing_is_left_after_sigkill", everything, |lab| {
                ends(lab, "kill")
            }),
        ]
    })
}

static NAS: Shared<Ganesha> = Shared::new();
static CLIENT: Shared<Node> = Shared::new();

fn nas(lab: &'static Lab) -> Result<&'static Ganesha> {
    NAS.get(|| Ganesha::start(lab, "nas", &[Export::new("/srv/export")]))
}

fn client(lab: &'static Lab) -> Result<&'static Node> {
    CLIENT.get(|| Node::guest(lab, "client"))
}

/// Mounts a share with each version in turn and writes a file named after it.
fn write_with(client: &Node, share: &str, versions: &[&str], at: &str) -> Result {
    for version in versions {
        client.sh(&format!(
            "mkdir -p {at}; mount.nfs -o nolock,vers={version},tcp {share} {at}
             echo v{version} >{at}/{version}
             grep ' {at} nfs' /proc/mounts | grep -q vers={version}; umount {at}"
        ))?;
    }
    Ok(())
}

fn guest_mounts_ganesha(lab: &'static Lab) -> Result {
    let nas = nas(lab)?;
    write_with(
        client(lab)?,
        "nas:/srv/export",
        &["3", "4.0", "4.1"],
        "/tmp/ganesha",
    )?;
    for version in ["3", "4.0", "4.1"] {
        let path = nas.local("/srv/export").join(version);
        ensure!(fs::read_to_string(path)? == format!("v{version}\n"));
    }
    Ok(())
}

fn guest_mounts_knfsd(lab: &'static Lab) -> Result {
    let server = Knfsd::start(lab, "knfsd", "512M")?;
    write_with(
        client(lab)?,
        &server.share(),
        &["3", "4.0", "4.1", "4.2"],
        "/tmp/knfsd",
    )?;
    let files = server
        .node()
        .sh(&format!("cd {}; cat 3 4.0 4.1 4.2", server.local()))?;
    ensure!(files == "v3\nv4.0\nv4.1\nv4.2", "{files}");
    Ok(())
}

fn proxy(lab: &'static Lab) -> Result {
    let (nas, client) = (nas(lab)?, client(lab)?);
    let proxy = Proxy::start(lab, "proxy", &nas.ip(), &[2049, 20048])?;
    let options = format!(
        "nolock,vers=3,proto=tcp,mountproto=tcp,port=2049,mountport=20048,addr={}",
        proxy.ip()
    );
    client.sh(&format!(
        "mkdir -p /tmp/proxy; mount -i -t nfs -o {options} {}:/srv/export /tmp/proxy
         echo one >/tmp/proxy/one",
        proxy.ip()
    ))?;
    let calls = proxy.take_calls()?;
    // RFC 1813: MNT is procedure 1 of the mount protocol, CREATE 8 and WRITE 7 of NFS.
    for call in [(MOUNT, 1), (NFS, 8), (NFS, 7)] {
        ensure!(calls.get(&call) == Some(&1), "{call:?} in {calls:?}");
    }
    // A write and the commit at close follow each other, so at least two round trips.
    proxy.delay(Duration::from_millis(200));
    let start = Instant::now();
    client.sh("echo two >/tmp/proxy/one")?;
    ensure!(
        start.elapsed() > Duration::from_millis(800),
        "{:?}",
        start.elapsed()
    );
    proxy.delay(Duration::ZERO);
    let accepted = proxy.accepted();
    ensure!(proxy.reset()? > 0, "nothing was open");
    client.sh("echo three >/tmp/proxy/one; umount /tmp/proxy")?;
    ensure!(proxy.accepted() > accepted, "the client did not come back");
    ensure!(fs::read_to_string(nas.local("/srv/export/one"))? == "three\n");
    Ok(())
}

fn engine_on_a_machine(lab: &'static Lab) -> Result {
    let engine = Engine::start(lab, Box::leak(Box::new(Node::machine(lab, "machine")?)))?;
    run_container(&engine)?;
    engine.dockerd().kill()?;
    engine.restart()?;
    run_container(&engine)
}

fn engine_in_a_guest(lab: &'static Lab) -> Result {
    let engine = Engine::start(lab, Box::leak(Box::new(Node::guest(lab, "docker-guest")?)))?;
    run_container(&engine)?;
    // A crash of the computer: the engine's state is on its disk.
    engine.node().reboot()?;
    engine.restart()?;
    engine.ok(&["image", "inspect", "greeter"])?;
    Ok(())
}

fn run_container(engine: &Engine) -> Result {
    engine.image(
        "greeter",
        "echo hello >greeting",
        &["CMD [\"cat\", \"/greeting\"]"],
    )?;
    let said = engine.ok(&["run", "--rm", "--network", "host", "greeter"])?;
    ensure!(said == "hello", "{said}");
    engine.ok(&["run", "--rm", "--network", "host", IMAGE, "true"])?;
    Ok(())
}

/// In a lab inside this lab: everything comes up, and then the worst happens.
fn doomed(lab: &'static Lab, end: &str) -> Result {
    let nas = nas(lab)?;
    let guest = client(lab)?;
    guest.sh(&format!(
        "mkdir -p /tmp/nfs; mount.nfs -o nolock,vers=3,tcp {} /tmp/nfs",
        nas.share("/srv/export")
    ))?;
    let engine = Engine::start(lab, Box::leak(Box::new(Node::machine(lab, "machine")?)))?;
    engine.ok(&["run", "-d", "--network", "none", IMAGE, "sleep", "1000"])?;
    fs::write(lab.dir().join("is-up"), "")?;
    if end == "panic" {
        panic!("as asked");
    }
    thread::sleep(PATIENCE);
    bail!("nobody ended the lab");
}

/// Starts a lab inside this lab, ends it, and looks for anything that is left.
fn ends(lab: &'static Lab, end: &str) -> Result {
    let mark = format!("{DOOMED}={end}");
    let mut outer = Command::new(std::env::current_exe()?)
        .env(DOOMED, end)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    // Its test process works in the directory of its lab; the outer one still in this lab's.
    let works_in = |pid: &String| fs::read_link(format!("/proc/{pid}/cwd")).ok();
    let mut dir = None;
    let up = wait_for("the inner lab", PATIENCE, || {
        if dir.is_none() {
            dir = marked(&mark)
                .iter()
                .filter_map(works_in)
                .find(|dir| dir != lab.dir());
        }
        let there = dir
            .as_ref()
            .is_some_and(|dir: &PathBuf| dir.join("is-up").exists());
        there || !matches!(outer.try_wait(), Ok(None))
    });
    let dir = dir.context("the inner lab has no directory")?;
    up?;
    match end {
        "panic" => {}
        "term" => process::run(&["kill", "-s", "TERM", &outer.id().to_string()])?
            .ok()
            .map(drop)?,
        _ => outer.kill()?,
    }
    ensure!(!wait_end(&mut outer, PATIENCE)?, "it ended well");
    wait_for("every process to be gone", PATIENCE, || {
        marked(&mark).is_empty()
    })
    .with_context(|| format!("{:?}", marked(&mark)))?;
    if end == "kill" {
        // Nobody was left to remove the files: the next run does.
        ensure!(dir.exists());
        process::run(&[&std::env::current_exe()?.to_string_lossy(), "lab-sweep"])?.ok()?;
    }
    ensure!(!dir.exists(), "{} is left", dir.display());
    let name = dir
        .file_name()
        .context("no name")?
        .to_string_lossy()
        .into_owned();
    ensure!(
        !fs::read_to_string("/proc/self/mountinfo")?.contains(&name),
        "a mount is left"
    );
    for tree in fs::read_dir("/sys/fs/cgroup")?.flatten() {
        ensure!(!tree.path().join(&name).exists(), "a cgroup is left");
    }
    ensure!(
        !Path::new("/sys/fs/cgroup").join(&name).exists(),
        "a cgroup is left"
    );
    Ok(())
}

/// The processes that inherited a variable.
fn marked(variable: &str) -> Vec<String> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|pid| {
            fs::read(format!("/proc/{pid}/environ")).is_ok_and(|env| {
                env.split(|&byte| byte == 0)
                    .any(|v| v == variable.as_bytes())
            })
        })
        .collect()
}

/// Waits for the end of a process; whether it ended well.
fn wait_end(child: &mut Child, limit: Duration) -> Result<bool> {
    let mut status = None;
    wait_for("the inner lab's end", limit, || {
        status = child.try_wait().ok().flatten();
        status.is_some()
    })?;
    Ok(status.is_some_and(|status| status.success()))
}
