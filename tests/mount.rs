//! The kernel data path against real NFS servers, in guests with the kernel's NFS client.
//!
//! The test binary runs itself inside the guest as a small command over `KernelPath`
//! ([`inside_guest`]): every run is a process of its own, so each step also shows that the next
//! process finds what the last one left.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use lab::{Export, Ganesha, Knfsd, Lab, Linux, Node, PATIENCE, Part, Result, Shared, trial};
use nfs::address::{Server, Share, SharePath};
use nfsvol::doors::kernel::{Attach, Endpoint, KernelPath, KernelSettings};
use nfsvol::doors::sys;
use nfsvol::doors::volume::{MountOptions, VolumeName};
use serde_json::{Value, json};

const ROOT: &str = "/var/lib/nfsvol/mnt";
const GANESHA: &[Part] = &[Part::Ganesha, Part::Guest];
const NEWER: &[Part] = &[Part::Ganesha, Part::Guest, Part::NewerLinux];
const KNFSD: &[Part] = &[Part::Knfsd, Part::Guest];
/// Held by trials with a silent server: the kernel's mounts of other servers may wait for it.
static ALONE: Mutex<()> = Mutex::new(());

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    if args.next().as_deref() == Some("kernel-path") {
        return inside_guest(&args.collect::<Vec<_>>());
    }
    lab::main!(|| {
        vec![
            trial("every_version_carries_a_volume", GANESHA, every_version),
            trial("the_best_version_is_negotiated", KNFSD, best_version),
            trial(
                "a_version_that_kernel_and_server_cannot_speak_is_left_out",
                NEWER,
                left_out,
            ),
            trial("ipv6_carries_a_volume", GANESHA, ipv6),
            trial("a_refusal_says_what_was_tried", GANESHA, refusals),
            trial(
                "links_and_files_are_no_data_directories",
                GANESHA,
                no_diversion,
            ),
            trial("a_directory_made_anew_is_the_one_bound", GANESHA, made_anew),
            trial("attributes_are_those_asked_for", GANESHA, attributes),
            trial("attaching_twice_changes_nothing", GANESHA, idempotent),
            trial("holders_are_seen_after_the_detach", GANESHA, held),
            trial("one_more_volume_takes_a_moment", GANESHA, quick),
            trial("a_silent_server_delays_nobody_else", GANESHA, silent_server),
            trial("a_mount_that_hangs_is_broken_off", GANESHA, silent_at_mount),
            trial("a_deaf_server_lets_others_mount", GANESHA, deaf_server),
            trial("a_stale_share_is_mounted_anew", GANESHA, stale),
            trial("a_user_namespace_has_no_nfs", GANESHA, user_namespace),
        ]
    })
}

// ---- inside the guest -------------------------------------------------------------------------

/// Runs commands, separated by `--`, on one `KernelPath`; one line of JSON each.
fn inside_guest(args: &[String]) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build();
    let path = KernelPath::new(Path::new(ROOT), KernelSettings::default());
    let (Ok(runtime), Ok(path)) = (runtime, path) else {
        return ExitCode::FAILURE;
    };
    runtime.block_on(async {
        let mut running = Vec::new();
        for words in args.split(|word| word == "--") {
            let (path, mut words) = (path.clone(), words.to_vec());
            // `&` lets a command run beside those that follow it.
            let beside = words.last().is_some_and(|last| last == "&");
            if beside {
                words.pop();
            }
            let task = tokio::spawn(async move {
                let began = Instant::now();
                let mut answer = command(&path, &words)
                    .await
                    .unwrap_or_else(|error| json!({ "error": format!("{error:#}") }));
                answer["ms"] = json!(began.elapsed().as_secs_f64() * 1e3);
                println!("{answer}");
            });
            if beside {
                running.push(task);
            } else {
                let _ = task.await;
            }
        }
        for task in running {
            let _ = task.await;
        }
    });
    // Threads that still wait for a server end with the process.
    runtime.shutdown_background();
    ExitCode::SUCCESS
}

async fn command(path: &KernelPath, words: &[String]) -> Result<Value> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let volume = |name: &str| name.parse::<VolumeName>();
    Ok(match words.as_slice() {
        ["attach", name, share, dir, options, milliseconds] => {
            let share: Share = share.parse()?;
            let Server::Ip(addr) = share.server() else {
                bail!("an address, please");
            };
            let request = Attach {
                volume: volume(name)?,
                endpoint: endpoint(*addr),
                share,
                options: options.trim_start_matches('-').parse::<MountOptions>()?,
                dir: SharePath::parse(dir)?,
                readonly: false,
                own: false,
            };
            let deadline = Instant::now() + Duration::from_millis(milliseconds.parse()?);
            let attached = path.attach(request, deadline).await?;
            json!({
                "mountpoint": attached.mountpoint,
                "version": attached.nfs_version,
                "addr": attached.addr,
                "source": attached.source,
                "warnings": attached.warnings,
            })
        }
        ["detach", name, milliseconds] => {
            let flush = Duration::from_millis(milliseconds.parse()?);
            let detached = path.detach(&volume(name)?, flush).await?;
            json!({
                "was_mounted": detached.was_mounted,
                "unflushed": detached.unflushed.map(|error| error.to_string()),
            })
        }
        ["check", name, milliseconds] => {
            let within = Duration::from_millis(milliseconds.parse()?);
            json!({ "health": format!("{:?}", path.check(&volume(name)?, within).await?) })
        }
        ["mounted"] => {
            let volumes = path.mounted()?.into_iter();
            json!({ "volumes": volumes.map(|v| (v.volume.to_string(), json!(v.source))).collect::<HashMap<_, _>>() })
        }
        ["holders", name, source] => {
            let held = sys::Mark::Source((*source).to_owned());
            let found = sys::find(&held, &path.mountpoint(&volume(name)?))?;
            json!({ "holders": found.iter().map(|h| json!([h.comm, h.mountpoint])).collect::<Vec<_>>() })
        }
        ["idle"] => {
            path.unmount_idle().await;
            json!({})
        }
        ["sleep", milliseconds] => {
            tokio::time::sleep(Duration::from_millis(milliseconds.parse()?)).await;
            json!({})
        }
        ["kernel"] => {
            KernelPath::kernel_has_nfs()?;
            json!({})
        }
        _ => bail!("no such command: {words:?}"),
    })
}

fn endpoint(addr: IpAddr) -> Endpoint {
    Endpoint {
        addr,
        nfs_port: 2049,
        mount_port: Some(20048),
        v3: true,
        v4: true,
    }
}

// ---- the trials -------------------------------------------------------------------------------

static NAS: Shared<Ganesha> = Shared::new();
static CLIENT: Shared<Node> = Shared::new();

fn nas(lab: &'static Lab) -> Result<&'static Ganesha> {
    NAS.get(|| Ganesha::start(lab, "nas", &[Export::new("/srv/export")]))
}

/// A guest with the kernel's NFS client.
struct Client<'a>(&'a Node);

impl Client<'static> {
    fn get(lab: &'static Lab) -> Result<Self> {
        CLIENT.get(|| Node::guest(lab, "client")).map(Self)
    }
}

impl Client<'_> {
    /// Runs commands in one process of the guest; their answers in the order of their ends.
    fn run(&self, commands: &str) -> Result<Vec<Value>> {
        let exe = std::env::current_exe()?;
        let exe = exe.to_str().context("the path of the test binary")?;
        let mut argv = vec![exe, "kernel-path"];
        argv.extend(commands.split_whitespace());
        let out = self.0.ok(&argv)?;
        out.lines()
            .map(|line| serde_json::from_str(line).context(out.clone()))
            .collect()
    }

    /// Runs one command that has to succeed.
    fn ok(&self, command: &str) -> Result<Value> {
        let answer = self.run(command)?.pop().context("no answer")?;
        if !answer["error"].is_null() {
            let log = self.sh("dmesg | tail -n 20")?;
            bail!("{command}: {answer}\n{log}");
        }
        Ok(answer)
    }

    /// Runs one command that has to fail; its error text.
    fn err(&self, command: &str) -> Result<String> {
        let answer = self.run(command)?.pop().context("no answer")?;
        Ok(answer["error"]
            .as_str()
            .with_context(|| format!("{command}: {answer}"))?
            .to_owned())
    }

    fn sh(&self, script: &str) -> Result<String> {
        self.0.sh(script)
    }

    fn mountinfo(&self) -> Result<String> {
        self.sh("cat /proc/self/mountinfo")
    }
}

/// A fresh name for a volume and its directory.
fn fresh(word: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{word}{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Makes a data directory on the server.
fn directory(nas: &Ganesha, name: &str) -> Result {
    Ok(std::fs::create_dir_all(
        nas.local("/srv/export").join(name),
    )?)
}

fn milliseconds(answer: &Value) -> f64 {
    answer["ms"].as_f64().unwrap_or(f64::MAX)
}

fn every_version(lab: &'static Lab) -> Result {
    let (nas, client) = (nas(lab)?, Client::get(lab)?);
    // A share that no trial beside this one uses: it can become idle.
    directory(nas, "versions")?;
    let share = nas.share("/srv/export/versions");
    client.ok("kernel")?;
    for version in ["3", "4.0", "4.1"] {
        let name = fresh("v");
        directory(nas, &format!("versions/deep/{name}"))?;
        let attached = client.ok(&format!(
            "attach {name} {share} deep/{name} nfsvers={version} 20000"
        ))?;
        ensure!(attached["version"] == version, "{attached}");
        ensure!(attached["addr"] == nas.ip(), "{attached}");
        let warned = attached["warnings"].to_string().contains("locks");
        ensure!(warned == (version == "3"), "{attached}");
        // The path and the source are those of the kernel.
        let place = format!("{ROOT}/volumes/{name}");
        ensure!(attached["mountpoint"] == place.as_str(), "{attached}");
        let source = attached["source"].as_str().unwrap_or_default().to_owned();
        let mountinfo = client.mountinfo()?;
        ensure!(
            mountinfo
                .lines()
                .any(|line| line.contains(&place) && line.contains(&format!(" {source} "))),
            "{source}\n{mountinfo}"
        );
        client.sh(&format!("echo {version} >{place}/file"))?;
        ensure!(client.ok(&format!("check {name} 5000"))?["health"] == "Ok");
        let detached = client.ok(&format!("detach {name} 5000"))?;
        ensure!(
            detached["was_mounted"] == true && detached["unflushed"].is_null(),
            "{detached}"
        );
        let file = nas
            .local("/srv/export")
            .join(format!("versions/deep/{name}/file"));
        ensure!(std::fs::read_to_string(&file)? == format!("{version}\n"));
        ensure!(client.ok(&format!("detach {name} 5000"))?["was_mounted"] == false);
        client.sh(&format!("test ! -e {place}"))?;
    }
    ensure!(client.mountinfo()?.contains(&share));
    client.ok("idle")?;
    let mountinfo = client.mountinfo()?;
    ensure!(!mountinfo.contains(&share), "{mountinfo}");
    Ok(())
}

/// Linux since 6.19 asks for delegations of directories, and nfs-ganesha before 9.11 refuses the whole
/// request.
fn left_out(lab: &'static Lab) -> Result {
    let nas = nas(lab)?;
    let guest: &'static Node = Box::leak(Box::new(Node::guest_of(lab, "newer", Linux::V7_2)?));
    let client = Client(guest);
    client.ok("kernel")?;
    directory(nas, "newer/some/where")?;
    let share = nas.share("/srv/export/newer");
    let both = format!("attach first {share} some - 20000 -- attach second {share} some - 20000");
    for attached in client.run(&both)? {
        ensure!(attached["version"] == "4.0", "{attached}");
        let warned = attached["warnings"].to_string();
        ensure!(
            warned.contains("NFSv4.1 not used: this kernel"),
            "{attached}"
        );
        let place = attached["mountpoint"].as_str().context("no place")?;
        let seen = client.sh(&format!("for n in 1 2 3 4; do ls -l {place}; done"))?;
        ensure!(seen.matches("where").count() == 4, "{seen}");
    }
    // Not behind the user's back.
    let error = client.err(&format!("attach third {share} some nfsvers=4.1 20000"))?;
    ensure!(
        error.contains("delegations of directories") && error.contains("next: update the server"),
        "{error}"
    );
    // What it is for: without the look it is mounted, and directories cannot be read.
    let attach = format!("kernel-path attach third {share} some nfsvers=4.1 20000");
    let exe = std::env::current_exe()?;
    guest.sh(&format!(
        "NFSVOL_MUTANT=TrapsAreMounted {} {attach}",
        exe.display()
    ))?;
    let look =
        format!("import os; d = os.open('{ROOT}/volumes/third', 0); os.listdir(d); os.fstat(d)");
    let listed = guest.sh(&format!("python3 -c \"{look}\" 2>&1 || true"))?;
    ensure!(listed.contains("Remote I/O error"), "{listed}");
    Ok(())
}

/// As in an unprivileged container: the kernel has an NFS client, which this process may not use.
fn user_namespace(lab: &'static Lab) -> Result {
    let client = Client::get(lab)?;
    client.ok("kernel")?;
    if client.0.run(&["unshare", "-Urm", "true"])?.code != 0 {
        println!("the guest's kernel has no user namespaces");
        return Ok(());
    }
    let exe = std::env::current_exe()?;
    let exe = exe.to_str().context("the path of the test binary")?;
    let said = client
        .0
        .ok(&["unshare", "-Urm", exe, "kernel-path", "kernel"])?;
    ensure!(
        said.contains("this process may not mount file systems"),
        "{said}"
    );
    Ok(())
}

fn best_version(lab: &'static Lab) -> Result {
    static SERVER: Shared<Knfsd> = Shared::new();
    let server = SERVER.get(|| Knfsd::start(lab, "knfsd", "512M"))?;
    let client = Client::get(lab)?;
    let directory = format!("{}/db", server.local());
    server.node().sh(&format!("mkdir -p {directory}"))?;
    for (options, expected) in [
        ("-", "4.2"),
        ("nfsvers=4", "4.2"),
        ("v4.0", "4.0"),
        ("v3", "3"),
    ] {
        let name = fresh("best");
        let attached = client.ok(&format!(
            "attach {name} {} db {options} 20000",
            server.share()
        ))?;
        ensure!(attached["version"] == expected, "{options}: {attached}");
        let source = attached["source"].as_str().unwrap_or_default();
        ensure!(
            client.mountinfo()?.contains(&format!(" {source} ")),
            "{source}"
        );
        client.sh(&format!("echo {options} >>{ROOT}/volumes/{name}/file"))?;
        client.ok(&format!("detach {name} 5000"))?;
    }
    ensure!(
        server
            .node()
            .sh(&format!("cat {directory}/file"))?
            .lines()
            .count()
            == 4
    );
    // Where the server lacks a version, the next lower one is taken.
    server
        .node()
        .sh("rpc.nfsd 0; echo -4.2 >/proc/fs/nfsd/versions; rpc.nfsd -N 4.2 4")?;
    client.ok("idle")?;
    let attached = client.ok(&format!("attach lower {} db - 20000", server.share()))?;
    ensure!(attached["version"] == "4.1", "{attached}");
    client.ok("detach lower 5000")?;
    Ok(())
}

fn ipv6(lab: &'static Lab) -> Result {
    let (nas, client) = (nas(lab)?, Client::get(lab)?);
    for version in ["3", "4.1"] {
        let name = fresh("six");
        directory(nas, &name)?;
        let share = format!("[{}]:/srv/export", nas.node().ip6());
        let attached = client.ok(&format!(
            "attach {name} {share} {name} nfsvers={version} 20000"
        ))?;
        ensure!(attached["addr"] == nas.node().ip6(), "{attached}");
        let source = attached["source"].as_str().unwrap_or_default().to_owned();
        ensure!(
            client.mountinfo()?.contains(&format!(" {source} ")),
            "{source}"
        );
        client.sh(&format!("touch {ROOT}/volumes/{name}/file"))?;
        client.ok(&format!("detach {name} 5000"))?;
    }
    Ok(())
}

fn refusals(lab: &'static Lab) -> Result {
    let (nas, client) = (nas(lab)?, Client::get(lab)?);
    let error = client.err(&format!(
        "attach no {} db - 20000",
        nas.share("/srv/nothing")
    ))?;
    for part in ["NFSv4.2", "NFSv3", "ENOENT", "next:", "showmount -e"] {
        ensure!(error.contains(part), "{part}: {error}");
    }
    ensure!(!client.mountinfo()?.contains("/srv/nothing"));
    Ok(())
}

fn no_diversion(lab: &'static Lab) -> Result {
    let (nas, client) = (nas(lab)?, Client::get(lab)?);
    let share = nas.share("/srv/export");
    let export = nas.local("/srv/export");
    directory(nas, "target/sub")?;
    let _ = std::os::unix::fs::symlink("target", export.join("link"));
    let _ = std::os::unix::fs::symlink("/etc", export.join("outside"));
    std::fs::write(export.join("file"), "")?;
    for version in ["3", "4.1"] {
        for (dir, part) in [
            ("link", "symbolic link"),
            ("link/sub", "symbolic link"),
            ("outside", "symbolic link"),
            ("file", "not a directory"),
            ("absent", "does not exist"),
        ] {
            let error = client.err(&format!("attach div {share} {dir} nfsvers={version} 20000"))?;
            ensure!(error.contains(part), "{dir}: {error}");
        }
    }
    ensure!(client.ok("mounted")?["volumes"]["div"].is_null());
    Ok(())
}

/// The kernel keeps names for up to a minute; what is bound must be what the server has now.
fn made_anew(lab: &'static Lab) -> Result {
    static OTHER: Shared<Node> = Shared::new();
    let (nas, client) = (nas(lab)?, Client::get(lab)?);
    let share = nas.share("/srv/export");
    // Another host, because the server as well remembers what it saw.
    let other = OTHER.get(|| Node::guest(lab, "other"))?;
    other.sh(&format!("mkdir -p /tmp/nfs; mount.nfs -o nolock,vers=3,tcp {share} /tmp/nfs; mkdir -p /tmp/nfs/trash"))?;
    for version in ["3", "4.1"] {
        let name = fresh("anew");
        let attach = format!("attach {name} {share} below/{name} nfsvers={version} 20000");
        let error = client.err(&attach)?;
        ensure!(error.contains("does not exist"), "{error}");
        other.sh(&format!("mkdir -p /tmp/nfs/below/{name}"))?;
        client.ok(&attach)?;
        client.sh(&format!("echo old >{ROOT}/volumes/{name}/file"))?;
        client.ok(&format!("detach {name} 5000"))?;
        // Removed and created again there.
        other.sh(&format!(
            "cd /tmp/nfs; mv below/{name} trash/{name}; mkdir below/{name}"
        ))?;
        client.ok(&attach)?;
        let listed = client.sh(&format!("ls {ROOT}/volumes/{name}"))?;
        ensure!(
            listed.is_empty(),
            "NFSv{version} shows the directory in the trash: {listed}"
        );
        client.ok(&format!("detach {name} 5000"))?;
    }
    other.sh("umount /tmp/nfs")?;
    Ok(())
}

fn attributes(lab: &'static Lab) -> Result {
    let (nas, client) = (nas(lab)?, Client::get(lab)?);
    let share = nas.share("/srv/export");
    let (plain, other) = (fresh("attr"), fresh("attr"));
    directory(nas, &plain)?;
    directory(nas, &other)?;
    client.ok(&format!(
        "attach {plain} {share} {plain} v4.1,acregmin=7 20000"
    ))?;
    client.ok(&format!(
        "attach {other} {share} {other} v4.1,acregmin=7,ro,suid,noexec,noatime 20000"
    ))?;
    let mountinfo = client.mountinfo()?;
    let options = |name: &str| {
        let line = mountinfo
            .lines()
            .find(|line| line.contains(&format!(" {ROOT}/volumes/{name} ")));
        line.and_then(|line| line.split(' ').nth(5))
            .unwrap_or_default()
            .to_owned()
    };
    ensure!(options(&plain) == "rw,nosuid,nodev,relatime", "{mountinfo}");
    ensure!(options(&other) == "ro,nodev,noexec,noatime", "{mountinfo}");
    // Both stem from one mount of the share.
    let shares = mountinfo
        .lines()
        .filter(|line| line.contains(&format!(" {ROOT}/shares/")) && line.contains("acregmin=7"));
    ensure!(shares.count() == 1, "{mountinfo}");
    // What the kernel takes from an earlier mount is said, not kept quiet about.
    let third = fresh("attr");
    directory(nas, &third)?;
    let attached = client.ok(&format!(
        "attach {third} {share} {third} v4.1,acregmin=7,timeo=70 20000"
    ))?;
    let warned = attached["warnings"].to_string();
    ensure!(
        warned.contains("timeo=600 is in effect in place of 70"),
        "{attached}"
    );
    client.ok(&format!("detach {third} 5000"))?;
    let ahead = client.sh(&format!(
        "cat /sys/class/bdi/$(mountpoint -d {ROOT}/volumes/{plain})/read_ahead_kb"
    ))?;
    let size: u32 = mountinfo
        .split("acregmin=7")
        .next()
        .and_then(|before| {
            before
                .rsplit("rsize=")
                .next()?
                .split(',')
                .next()?
                .parse()
                .ok()
        })
        .context("rsize")?;
    ensure!(
        ahead.trim() == (size / 1024 * 15).to_string(),
        "{ahead} for {size}"
    );
    client.ok(&format!("detach {plain} 5000"))?;
    client.ok(&format!("detach {other} 5000"))?;
    Ok(())
}

fn idempotent(lab: &'static Lab) -> Result {
    let (nas, client) = (nas(lab)?, Client::get(lab)?);
    let share = nas.share("/srv/export");
    let name = fresh("twice");
    directory(nas, &name)?;
    let attach = format!("attach {name} {share} {name} v4.1 20000");
    client.ok(&attach)?;
    let ids = || {
        client.sh(&format!(
            "grep ' {ROOT}/volumes/{name} ' /proc/self/mountinfo | cut -d' ' -f1"
        ))
    };
    let first = ids()?;
    client.ok(&attach)?;
    ensure!(ids()? == first && first.lines().count() == 1, "{first}");
    // One whose attributes are others now is replaced, not covered.
    client.ok(&format!("attach {name} {share} {name} v4.1,ro 20000"))?;
    ensure!(ids()?.lines().count() == 1, "{}", ids()?);
    let written = client.sh(&format!("touch {ROOT}/volumes/{name}/file 2>&1 || true"))?;
    ensure!(written.contains("Read-only"), "{written}");
    client.ok(&format!("detach {name} 5000"))?;
    Ok(())
}

fn held(lab: &'static Lab) -> Result {
    let (nas, client) = (nas(lab)?, Client::get(lab)?);
    let share = nas.share("/srv/export");
    let name = fresh("held");
    directory(nas, &name)?;
    let attached = client.ok(&format!("attach {name} {share} {name} - 20000"))?;
    let source = attached["source"].as_str().unwrap_or_default().to_owned();
    let holders = || client.ok(&format!("holders {name} {source}"));
    ensure!(holders()?["holders"] == json!([]), "{}", holders()?);
    // As a container: a namespace of its own with the volume at another place.
    let script = format!(
        "mkdir -p /mnt/data && mount --bind {ROOT}/volumes/{name} /mnt/data \
         && umount -R {ROOT}/volumes/{name} && exec sleep 1000"
    );
    let container = client.0.spawn(
        "container",
        &[
            "unshare",
            "-m",
            "--propagation",
            "private",
            "sh",
            "-c",
            &script,
        ],
    )?;
    lab::wait_for("the volume to be held", PATIENCE, || {
        holders().is_ok_and(|answer| answer["holders"] == json!([["sleep", "/mnt/data"]]))
    })
    .with_context(|| format!("{:?}", holders()))?;
    client.ok(&format!("detach {name} 5000"))?;
    client.ok("idle")?;
    ensure!(client.ok("mounted")?["volumes"][&name].is_null());
    ensure!(
        holders()?["holders"] == json!([["sleep", "/mnt/data"]]),
        "{}",
        holders()?
    );
    container.kill()?;
    ensure!(holders()?["holders"] == json!([]));
    Ok(())
}

fn quick(lab: &'static Lab) -> Result {
    let (nas, client) = (nas(lab)?, Client::get(lab)?);
    let share = nas.share("/srv/export");
    let names: Vec<String> = (0..50).map(|_| fresh("quick")).collect();
    for name in &names {
        directory(nas, name)?;
    }
    let attach = |name: &String| format!("attach {name} {share} {name} v4.1 20000");
    let detach = |name: &String| format!("detach {name} 5000");
    let all = |command: &dyn Fn(&String) -> String| {
        let commands: Vec<String> = names.iter().map(command).collect();
        let answers = client.run(&commands.join(" -- "))?;
        ensure!(
            answers.iter().all(|answer| answer["error"].is_null()),
            "{answers:?}"
        );
        let mut times: Vec<f64> = answers.iter().map(milliseconds).collect();
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    };
    let attaching: f64 = all(&attach)?;
    let detaching: f64 = all(&detach)?;
    lab::note(format!(
        "median of 50: attach {attaching:.2} ms, detach {detaching:.2} ms"
    ));
    // A guest's system calls cost ten times those of a machine, and others use its processors.
    ensure!(
        attaching < 2000.0 && detaching < 2000.0,
        "{attaching} {detaching}"
    );
    Ok(())
}

/// A server that falls silent under a mounted share.
fn silent_server(lab: &'static Lab) -> Result {
    let _alone = ALONE.lock();
    let (nas, client) = (nas(lab)?, Client::get(lab)?);
    let silent = Ganesha::start(lab, "silent", &[Export::new("/srv/export")])?;
    for name in ["s1", "s2", "s3", "s4", "late"] {
        directory(&silent, name)?;
    }
    directory(nas, "h1")?;
    let (dead, fine) = (silent.share("/srv/export"), nas.share("/srv/export"));
    client.ok(&format!("attach s1 {dead} s1 v4.1 20000"))?;
    client.ok(&format!("attach h1 {fine} h1 v4.1 20000"))?;
    // Pages that syncfs has to wait for, whatever happens to it.
    let dirty = format!("exec 3>{ROOT}/volumes/s1/dirty; echo x >&3; echo written; sleep 300");
    let writer = client.0.spawn("dirty", &["sh", "-c", &dirty])?;
    writer.wait_log("written", PATIENCE)?;
    silent.freeze()?;
    let answers = client.run(&format!(
        "attach s2 {dead} s2 v4.1 8000 & -- sleep 300 -- attach h1 {fine} h1 v4.1 20000 \
         -- check h1 20000 -- check s1 1000 -- sleep 8000 -- attach s3 {dead} s3 v4.1 8000 -- mounted"
    ))?;
    // In the order of their ends: healthy attach, its check, ...
    let find = |part: &str| {
        answers
            .iter()
            .find(|answer| answer.to_string().contains(part))
            .with_context(|| format!("{part}: {answers:?}"))
    };
    // It does not wait for the other, which began before.
    ensure!(
        milliseconds(find(&format!("{ROOT}/volumes/h1"))?) < 7000.0,
        "{answers:?}"
    );
    ensure!(find("\"Ok\"").is_ok(), "{answers:?}");
    ensure!(find("Hung").is_ok(), "{answers:?}");
    let timeout = find("no answer from the server")?;
    ensure!(milliseconds(timeout) > 7900.0, "{timeout}");
    let busy = find("not responding")?;
    ensure!(milliseconds(busy) < 4000.0, "{busy}");
    // A volume of the silent server comes off all the same, and its process ends: what waits for the
    // server for ever is another one.
    let detached = client.ok("detach s1 500")?;
    ensure!(detached["was_mounted"] == true, "{detached}");
    ensure!(!detached["unflushed"].is_null(), "{detached}");

    // What succeeds too late leaves nothing behind.
    let exe = std::env::current_exe()?;
    let late = format!("attach late {dead} late v4.1 1000 -- sleep 4000 -- mounted");
    let mut argv = vec![
        exe.to_str().context("the path of the test binary")?,
        "kernel-path",
    ];
    argv.extend(late.split_whitespace());
    let running = client.0.spawn("late", &argv)?;
    running.wait_log("error", PATIENCE)?;
    silent.thaw()?;
    drop(writer);
    running.wait(PATIENCE)?;
    // At the volume's directory; or at the mount, if a trial beside this one has unmounted the share.
    let told = ["no answer from the server", "did not answer in time"];
    ensure!(
        told.iter().any(|text| running.log().contains(text)),
        "{}",
        running.log()
    );
    ensure!(!running.log().contains("volumes/late"), "{}", running.log());
    ensure!(client.ok("mounted")?["volumes"]["late"].is_null());

    // And all is well again.
    client.ok(&format!("attach late {dead} late v4.1 20000"))?;
    for name in ["late", "h1"] {
        client.ok(&format!("detach {name} 5000"))?;
    }
    client.ok("idle")?;
    silent.kill()
}

/// A server that falls silent between the probe and the mount: NFSv4 then holds a lock that all
/// mounts of the host need, until the mount is broken off.
fn silent_at_mount(lab: &'static Lab) -> Result {
    let _alone = ALONE.lock();
    let (nas, client) = (nas(lab)?, Client::get(lab)?);
    let silent = Ganesha::start(lab, "mute", &[Export::new("/srv/export")])?;
    directory(nas, "h2")?;
    client.ok("idle")?;
    silent.freeze()?;
    let (dead, fine) = (silent.share("/srv/export"), nas.share("/srv/export"));
    for version in ["v4.1", "v4.0", "v3"] {
        let answers = client.run(&format!(
            "attach m1 {dead} m1 {version} 3000 & -- sleep 1000 -- attach h2 {fine} h2 {version} 60000 \
             -- detach h2 1000 -- idle -- mounted"
        ))?;
        let text = answers
            .iter()
            .map(Value::to_string)
            .collect::<Vec<_>>()
            .join("\n");
        ensure!(
            text.contains("did not answer in time") || text.contains("no answer"),
            "{text}"
        );
        // It would wait for as long as the server is silent.
        let healthy = answers
            .iter()
            .find(|a| a["mountpoint"].is_string())
            .context(text.clone())?;
        lab::note(format!(
            "{version}: beside a mount that hangs, a healthy one took {:.0} ms",
            milliseconds(healthy)
        ));
        // No process is left over from what was broken off.
        ensure!(!client.sh("ps ax -o comm,args")?.contains(&dead), "{text}");
    }
    silent.thaw()?;
    silent.kill()
}

/// A server that answers the probe's NULL call and nothing else. While the kernel waits for such a
/// one to know its client, it holds a lock that every NFSv4 mount of the host needs: the mount is
/// broken off at its deadline, and the others go on.
fn deaf_server(lab: &'static Lab) -> Result {
    let _alone = ALONE.lock();
    let (nas, client) = (nas(lab)?, Client::get(lab)?);
    directory(nas, "h3")?;
    client.ok("idle")?;
    let listener = TcpListener::bind("10.77.0.1:2049")?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || answer_null_calls(stream));
        }
    });
    for version in ["v4.1", "v4.0"] {
        let fine = nas.share("/srv/export");
        let answers = client.run(&format!(
            "attach m1 10.77.0.1:/x m1 {version} 3000 & -- sleep 1000 -- attach h3 {fine} h3 {version} 60000 \
             -- detach h3 1000 -- idle"
        ))?;
        let failed = answers.iter().any(|a| !a["error"].is_null());
        ensure!(failed, "{answers:?}");
        let healthy = answers.iter().find(|a| a["mountpoint"].is_string());
        let healthy = milliseconds(healthy.with_context(|| format!("{answers:?}"))?);
        lab::note(format!(
            "{version}: beside a deaf server, a healthy one took {healthy:.0} ms"
        ));
    }
    Ok(())
}

/// ONC RPC (RFC 5531): a reply to procedure 0, silence to all others.
fn answer_null_calls(mut stream: TcpStream) -> std::io::Result<()> {
    loop {
        let mut mark = [0; 4];
        stream.read_exact(&mut mark)?;
        let mut call = vec![0; (u32::from_be_bytes(mark) & 0x7fff_ffff) as usize];
        stream.read_exact(&mut call)?;
        let is_null = call.get(20..24) == Some(&[0; 4]);
        if let (true, Some(xid)) = (is_null, call.get(..4)) {
            let mut reply = vec![0x80, 0, 0, 24];
            reply.extend(xid);
            reply.extend([0, 0, 0, 1]); // REPLY; accepted, AUTH_NONE, SUCCESS follow as zeros
            reply.extend([0; 16]);
            stream.write_all(&reply)?;
        }
    }
}

fn stale(lab: &'static Lab) -> Result {
    let _alone = ALONE.lock();
    let client = Client::get(lab)?;
    let server = Ganesha::start(lab, "swap", &[Export::new("/srv/export")])?;
    let share = server.share("/srv/export");
    for version in ["v3", "v4.1"] {
        for name in ["one", "two"] {
            directory(&server, name)?;
        }
        let attach = |name: &str| format!("attach {name} {share} {name} {version} 30000");
        client.ok(&attach("one"))?;
        let held = format!("cd {ROOT}/volumes/one && echo ready && exec sleep 1000");
        let old = client
            .0
            .spawn(&format!("holder-{version}"), &["sh", "-c", &held])?;
        old.wait_log("ready", PATIENCE)?;
        // The same names, but other directories: all handles are stale.
        server.kill()?;
        std::fs::remove_dir_all(server.local("/srv/export"))?;
        for name in ["one", "two"] {
            directory(&server, name)?;
        }
        server.up()?;
        let health = client.ok("check one 20000")?;
        ensure!(health["health"] == "Stale", "{health}");
        client.ok(&attach("two"))?;
        client.sh(&format!("echo {version} >{ROOT}/volumes/two/file"))?;
        // The stale bind of the first volume is replaced as well.
        client.ok(&attach("one"))?;
        ensure!(client.ok("check one 20000")?["health"] == "Ok");
        for name in ["one", "two"] {
            client.ok(&format!("detach {name} 3000"))?;
        }
        old.kill()?;
        client.ok("idle")?;
    }
    server.kill()
}
