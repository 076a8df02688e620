//! `nfsvol demo`: the main job without Docker, in half a minute at most.
//!
//! Two daemons on one embedded share play two hosts, and this command plays their dockerd: it
//! sends the calls that dockerd sends, and uses the mounted directories as containers do. All of
//! it runs in mount and process namespaces of its own, with its files in memory, so that the
//! kernel removes everything when it ends, however it ends.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::mount::{MountFlags, mount};
use serde::Serialize;

use crate::api::{Ask, Client, Restore, Status, Trash};
use crate::docker::wire::{Create, Get, Mount, Remove, Unmount};
use crate::local_server;

/// Where the demo keeps its files: a file system in memory that only the demo sees.
const PLACE: &str = "/mnt";
/// How long a daemon may take to answer for the first time.
const START_TIME: Duration = Duration::from_secs(20);

/// Flags of `nfsvol demo`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  nfsvol demo
It needs root and /dev/fuse, and leaves nothing behind. `make demo` shows the same with real
Docker hosts.")]
pub(super) struct DemoArgs {
    /// This is the process in the namespaces
    #[arg(long, hide = true)]
    inside: bool,
}

pub(super) fn demo(args: &DemoArgs) -> anyhow::Result<()> {
    if args.inside { inside() } else { outside() }
}

/// Runs the demo in namespaces of its own.
fn outside() -> anyhow::Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "the demo mounts file systems: run it as root"
    );
    ensure!(
        Path::new("/dev/fuse").exists(),
        "there is no /dev/fuse: modprobe fuse"
    );
    let program = std::env::current_exe()?;
    let status = Command::new("unshare")
        .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .args(["--propagation", "private", "--"])
        .arg(program)
        .args(["demo", "--inside"])
        .status()
        .context("cannot run unshare (package util-linux)")?;
    match status.code() {
        Some(0) => Ok(()),
        _ => bail!("the demo failed ({status})"),
    }
}

fn inside() -> anyhow::Result<()> {
    let began = Instant::now();
    let place = Path::new(PLACE);
    mount("tmpfs", place, "tmpfs", MountFlags::NOSUID, None).context("mounting a tmpfs")?;
    let share = place.join("share");
    std::fs::create_dir(&share)?;
    let runtime = super::runtime()?;
    let program = std::env::current_exe()?;

    say("Two hosts on one embedded share")?;
    let one = Host::start(
        &runtime,
        "one",
        &[&format!("--share=embedded:{}", share.display())],
    )?;
    let served = runtime.block_on(local_server::ensure(&program, &share, &one.state))?;
    let two = Host::start(
        &runtime,
        "two",
        &[
            &format!("--share={}:{}", served.ip(), share.display()),
            &format!("--mount-options=port={0},mountport={0}", served.port()),
        ],
    )?;
    line(&format!("nfsvol serves {} at {served}", share.display()))?;

    say("Host one makes a volume and writes")?;
    let mode = ("mode".to_owned(), "0750".to_owned());
    one.call(&Create {
        name: name(),
        opts: Some([mode].into()),
    })?;
    let mounted = one.mount("container-1")?;
    let (words, big) = ("a volume follows its container\n", vec![0xa5_u8; 32 << 20]);
    timed(
        &format!(
            "echo … >{}/words; write and fsync 32 MiB",
            mounted.display()
        ),
        || {
            std::fs::write(mounted.join("words"), words)?;
            let mut file = File::create(mounted.join("big"))?;
            file.write_all(&big)?;
            Ok(file.sync_all()?)
        },
    )?;

    say("Host two sees the volume and reads")?;
    two.call(&Get { name: name() })?;
    let there = two.mount("container-2")?;
    timed(
        &format!("cat {}/words; compare 32 MiB", there.display()),
        || {
            ensure!(
                std::fs::read_to_string(there.join("words"))? == words,
                "other words"
            );
            ensure!(std::fs::read(there.join("big"))? == big, "other bytes");
            line(words.trim_end())
        },
    )?;

    say("Nobody uses it any more; it is removed, and brought back")?;
    two.unmount("container-2")?;
    one.unmount("container-1")?;
    one.call(&Remove { name: name() })?;
    ensure!(
        !share.join("db").exists(),
        "the directory of the removed volume is still there"
    );
    one.call(&Trash {})?;
    one.call(&Restore {
        name: name(),
        rename: None,
    })?;
    let back = one.mount("container-3")?;
    timed(&format!("cat {}/words", back.display()), || {
        ensure!(
            std::fs::read_to_string(back.join("words"))? == words,
            "other words"
        );
        line(words.trim_end())
    })?;
    one.unmount("container-3")?;

    say(&format!(
        "Done in {:.1} s. Nothing is left behind",
        began.elapsed().as_secs_f64()
    ))?;
    line("The embedded server is for trying out; with a real one it is the same:")?;
    line("    nfsvol serve --share YOUR-NAS:/export")
}

/// A daemon, and what its dockerd would send.
struct Host<'a> {
    name: &'static str,
    socket: PathBuf,
    state: PathBuf,
    runtime: &'a tokio::runtime::Runtime,
}

impl<'a> Host<'a> {
    /// Starts a daemon that believes to be on a host of this name. It ends with the namespace.
    fn start(
        runtime: &'a tokio::runtime::Runtime,
        name: &'static str,
        flags: &[&str],
    ) -> anyhow::Result<Self> {
        let at = |suffix: &str| Path::new(PLACE).join(format!("{name}{suffix}"));
        let host = Self {
            name,
            socket: at(".sock"),
            state: at(""),
            runtime,
        };
        let log = at(".log");
        let output = File::create(&log)?;
        let mut child = Command::new("unshare")
            .args([
                "--uts",
                "--",
                "sh",
                "-c",
                "hostname \"$1\"; shift; exec \"$@\"",
                "sh",
                name,
            ])
            .arg(std::env::current_exe()?)
            .args(["serve", "--data-path=fuse", "--socket"])
            .arg(&host.socket)
            .arg("--state-dir")
            .arg(&host.state)
            .args(flags)
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .context("cannot run unshare")?;
        let deadline = Instant::now() + START_TIME;
        while let Err(error) = host.ask(&Status {}) {
            let ended: Option<ExitStatus> = child.try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                let log = std::fs::read_to_string(&log).unwrap_or_default();
                bail!("the daemon of host {name} does not answer: {error:#}\n{log}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(host)
    }

    fn ask<A: Ask>(&self, ask: &A) -> anyhow::Result<A::Answer> {
        self.runtime
            .block_on(async { Ok(Client::connect(&self.socket).await?.ask(ask).await?) })
    }

    /// Sends a call and shows it with its answer.
    fn call<A: Ask>(&self, ask: &A) -> anyhow::Result<A::Answer> {
        timed(
            &format!("{}: {} {}", self.name, A::PATH, json(ask)?),
            || {
                let answer = self.ask(ask)?;
                line(&json(&answer)?)?;
                Ok(answer)
            },
        )
    }

    fn mount(&self, container: &str) -> anyhow::Result<PathBuf> {
        let mount = Mount {
            name: name(),
            id: container.to_owned(),
        };
        Ok(self.call(&mount)?.mountpoint)
    }

    fn unmount(&self, container: &str) -> anyhow::Result<()> {
        let unmount = Unmount {
            name: name(),
            id: container.to_owned(),
        };
        self.call(&unmount).map(drop)
    }
}

/// The one volume.
fn name() -> String {
    "db".to_owned()
}

fn json(body: &impl Serialize) -> serde_json::Result<String> {
    Ok(serde_json::to_value(body)?.to_string())
}

fn say(text: &str) -> anyhow::Result<()> {
    Ok(writeln!(std::io::stdout(), "\n{text}")?)
}

fn line(text: &str) -> anyhow::Result<()> {
    Ok(writeln!(std::io::stdout(), "    {text}")?)
}

/// Shows what is done, does it, and shows how long it took.
fn timed<T>(what: &str, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    writeln!(std::io::stdout(), "  {what}")?;
    let began = Instant::now();
    let done = work().with_context(|| what.to_owned())?;
    line(&format!("({:.1} ms)", began.elapsed().as_secs_f64() * 1e3))?;
    Ok(done)
}
