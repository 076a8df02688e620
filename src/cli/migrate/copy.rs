//! `nfsvol migrate --copy`: a directory of this host becomes a volume.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use rustix::fs::{FlockOperation, Mode, OFlags};
use serde_json::{Value, json};

use super::MigrateArgs;
use crate::cli::print;
use crate::docker::client::Client;
use crate::migrate::{Copied, Copier, LocalVolume, local_volumes, measure};

/// Who holds the new volume while it is filled. Always the same, so that the next run lets go of
/// what one that was killed held.
const HOLDER: &str = "nfsvol-migrate";

pub(super) async fn copy(args: &MigrateArgs, found: &[LocalVolume]) -> anyhow::Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    let signalled = stop.clone();
    tokio::spawn(async move {
        crate::daemon::serve::stopped().await;
        signalled.store(true, Ordering::Relaxed);
    });
    let mut lines = Vec::new();
    for name in &args.volumes {
        let volume = super::find(found, name)?;
        let line = copy_one(args, volume, &stop)
            .await
            .with_context(|| format!("volume {name}"))?;
        if !args.json {
            print(report(&line).as_bytes())?;
        }
        lines.push(line);
    }
    match args.json {
        true => print(format!("{:#}\n", Value::from(lines)).as_bytes()),
        false => Ok(()),
    }
}

async fn copy_one(
    args: &MigrateArgs,
    volume: &LocalVolume,
    stop: &Arc<AtomicBool>,
) -> anyhow::Result<Value> {
    if volume.is_nfs() {
        bail!("it lies on an NFS server already; `nfsvol migrate` takes it over as it is");
    }
    check_unused(volume)?;
    let source = rustix::fs::open(
        &volume.mountpoint,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .with_context(|| format!("opening {} (as root?)", volume.mountpoint.display()))?;
    if rustix::fs::flock(&source, FlockOperation::NonBlockingLockExclusive).is_err() {
        bail!("another `nfsvol migrate --copy` of it is under way");
    }

    let name = args.new_name(&volume.name);
    let options: Value = args
        .opts
        .iter()
        .cloned()
        .map(|(k, v)| (k, v.into()))
        .collect::<serde_json::Map<_, _>>()
        .into();
    let mut client = Client::connect(&args.socket).await?;
    let create = json!({ "Name": name, "Opts": options });
    client.call("/VolumeDriver.Create", &create).await?;
    let holder = json!({ "Name": name, "ID": HOLDER });
    client.call("/VolumeDriver.Unmount", &holder).await?;
    let mounted = client.call("/VolumeDriver.Mount", &holder).await?;
    let to = PathBuf::from(mounted["Mountpoint"].as_str().unwrap_or_default());
    let from = volume.mountpoint.clone();
    let work = Work {
        from,
        to,
        source: format!("{} of {}", volume.name, host_name()),
        stop: stop.clone(),
        show: !args.json && std::io::stderr().is_terminal(),
    };
    let outcome = tokio::task::spawn_blocking(move || work.run()).await?;
    // The connection may be too old by now.
    let mut client = Client::connect(&args.socket).await?;
    let let_go = client.call("/VolumeDriver.Unmount", &holder).await;
    let (copied, bytes) = outcome?;
    let_go?;
    let now = local_volumes(&args.docker_socket).await?;
    check_unused(super::find(&now, &volume.name)?).with_context(|| {
        format!(
            "the copy is complete, but its source may have changed meanwhile; remove volume \
                 {name} before it is copied again"
        )
    })?;
    Ok(json!({
        "local": volume.name,
        "name": name,
        "bytes": bytes,
        "copied": copied.entries,
        "copied_earlier": copied.found,
        "sockets_left_out": copied.sockets,
        "attributes_left_out": copied.xattrs_left,
        "attribute_left_out": copied.xattr_left,
        "links_left_out": copied.links_left,
        "next": next(args, volume, &name),
    }))
}

fn next(args: &MigrateArgs, volume: &LocalVolume, name: &str) -> Vec<String> {
    let new = LocalVolume {
        options: args.opts.iter().cloned().collect(),
        ..volume.clone()
    };
    super::next(&new, name)
}

fn check_unused(volume: &LocalVolume) -> anyhow::Result<()> {
    let up: Vec<&str> = volume.up().collect();
    match up.is_empty() {
        true => Ok(()),
        false => bail!(
            "running containers use it ({}); stop them, so that nothing changes while it is copied",
            up.join(", ")
        ),
    }
}

fn host_name() -> String {
    let name = rustix::system::uname();
    name.nodename().to_string_lossy().into_owned()
}

/// What blocks: copying and comparing.
struct Work {
    from: PathBuf,
    to: PathBuf,
    source: String,
    stop: Arc<AtomicBool>,
    show: bool,
}

impl Work {
    fn run(&self) -> anyhow::Result<(Copied, u64)> {
        let (from, to) = (&*self.from, &*self.to);
        check_mounted(to)?;
        let (_, bytes) = measure(from)?;
        let bar = |doing| bar(self.show, doing, bytes);
        let begun = bar("copying");
        let progress = |done| begun.inc(done);
        let copier = self.copier(&progress);
        copier.begin(to, &self.source)?;
        let copied = copier.copy(from, to)?;
        begun.finish();
        let compared = bar("comparing");
        let progress = |done| compared.inc(done);
        let copier = self.copier(&progress);
        copier.verify(from, to, copied.links_left == 0)?;
        copier.finish(from, to)?;
        compared.finish();
        Ok((copied, bytes))
    }

    fn copier<'a>(&'a self, progress: &'a (dyn Fn(u64) + Sync)) -> Copier<'a> {
        Copier {
            progress,
            stop: &self.stop,
        }
    }
}

/// A daemon in a managed plugin mounts where nobody else sees it: copying would fill this host.
fn check_mounted(to: &Path) -> anyhow::Result<()> {
    let device = |path: &Path| rustix::fs::stat(path).map(|found| found.st_dev);
    let parent = to.parent().unwrap_or(to);
    match (device(to), device(parent)) {
        (Ok(volume), Ok(host)) if volume != host => Ok(()),
        _ => bail!(
            "the new volume's mount point {} cannot be seen from here; run this where the daemon \
             runs, on the host itself",
            to.display()
        ),
    }
}

fn bar(show: bool, doing: &'static str, bytes: u64) -> ProgressBar {
    if !show {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(
        "{msg:9} [{wide_bar}] {bytes} of {total_bytes}, {binary_bytes_per_sec}, {eta} left",
    );
    let bar = ProgressBar::new(bytes).with_message(doing);
    bar.enable_steady_tick(Duration::from_millis(200));
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

fn report(line: &Value) -> String {
    let text = |key: &str| line[key].as_str().unwrap_or_default().to_owned();
    let count = |key: &str| line[key].as_u64().unwrap_or_default();
    let mut all = format!(
        "volume {} has a copy of {}, compared byte by byte: {} bytes, {} entries, {} of them by an \
         earlier run\n",
        text("name"),
        text("local"),
        count("bytes"),
        count("copied") + count("copied_earlier"),
        count("copied_earlier"),
    );
    for (key, what) in [
        (
            "sockets_left_out",
            "sockets: they are made by their programs",
        ),
        (
            "attributes_left_out",
            "extended attributes: the share does not take them",
        ),
        (
            "links_left_out",
            "hard links: the share does not make them, so each name is a file",
        ),
    ] {
        if count(key) > 0 {
            all += &format!(
                "left out: {} {what} {}\n",
                count(key),
                match key {
                    "attributes_left_out" => format!("({}, …)", text("attribute_left_out")),
                    _ => String::new(),
                }
            );
        }
    }
    all += "\nThe local volume is as it was. When the copy has proved good, on this host:\n\n";
    for command in line["next"].as_array().into_iter().flatten() {
        all += &format!("  {}\n", command.as_str().unwrap_or_default());
    }
    all
}
