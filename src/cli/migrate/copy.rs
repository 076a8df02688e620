//! `nfsvol migrate --copy`: a directory of this host becomes a volume.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::MigrateArgs;
use crate::cli::{output, print};
use crate::migrate::{Copied, Copying, LocalVolume, Progress};

/// What was copied.
#[derive(Debug, Serialize)]
struct Line {
    local: String,
    name: String,
    bytes: u64,
    copied: u64,
    copied_earlier: u64,
    sockets_left_out: u64,
    attributes_left_out: u64,
    /// One of them.
    attribute_left_out: Option<String>,
    links_left_out: u64,
    /// Commands for a shell.
    next: Vec<String>,
}

pub(super) async fn copy(args: &MigrateArgs, found: &[LocalVolume]) -> anyhow::Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    let signalled = stop.clone();
    tokio::spawn(async move {
        crate::daemon::serve::stopped().await;
        signalled.store(true, Ordering::Relaxed);
    });
    let show = !args.json && std::io::stderr().is_terminal();
    let mut lines = Vec::new();
    for local in &args.volumes {
        let volume = LocalVolume::named(found, local)?;
        let name = args.new_name(local);
        let copying = Copying {
            socket: &args.socket,
            docker: &args.docker_socket,
            options: args.opts.iter().cloned().collect(),
            stop: stop.clone(),
            progress: Arc::new(Bar(show.then(|| Mutex::new(ProgressBar::hidden())))),
        };
        let copied = copying.copy(volume, &name).await;
        // The bar goes before anything is printed.
        drop(copying);
        let (copied, bytes) = copied.with_context(|| format!("volume {local}"))?;
        let next = next(args, volume, &name);
        let line = Line::new(volume, name, copied, bytes, next);
        if !args.json {
            print(line.report().as_bytes())?;
        }
        lines.push(line);
    }
    match args.json {
        true => print(output::json(&lines)?.as_bytes()),
        false => Ok(()),
    }
}

fn next(args: &MigrateArgs, volume: &LocalVolume, name: &str) -> Vec<String> {
    let new = LocalVolume {
        options: args.opts.iter().cloned().collect(),
        ..volume.clone()
    };
    super::next(&new, name)
}

/// A bar on the terminal, if there is one.
struct Bar(Option<Mutex<ProgressBar>>);

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.lock().unwrap_or_else(PoisonError::into_inner).finish();
        }
    }
}

impl Progress for Bar {
    fn begin(&self, doing: &'static str, bytes: u64) {
        let Some(bar) = &self.0 else { return };
        let style = ProgressStyle::with_template(
            "{msg:9} [{wide_bar}] {bytes} of {total_bytes}, {binary_bytes_per_sec}, {eta} left",
        );
        let new = ProgressBar::new(bytes).with_message(doing);
        new.enable_steady_tick(Duration::from_millis(200));
        let new = match style {
            Ok(style) => new.with_style(style),
            Err(_) => new,
        };
        let mut bar = bar.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *bar, new).finish();
    }

    fn done(&self, bytes: u64) {
        if let Some(bar) = &self.0 {
            bar.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .inc(bytes);
        }
    }
}

impl Line {
    fn new(
        volume: &LocalVolume,
        name: String,
        copied: Copied,
        bytes: u64,
        next: Vec<String>,
    ) -> Self {
        Self {
            local: volume.name.clone(),
            name,
            bytes,
            copied: copied.entries,
            copied_earlier: copied.found,
            sockets_left_out: copied.sockets,
            attributes_left_out: copied.xattrs_left,
            attribute_left_out: copied.xattr_left,
            links_left_out: copied.links_left,
            next,
        }
    }

    fn report(&self) -> String {
        let mut all = format!(
            "volume {} has a copy of {}, compared byte by byte: {} bytes, {} entries, {} of them by \
             an earlier run\n",
            self.name,
            self.local,
            self.bytes,
            self.copied + self.copied_earlier,
            self.copied_earlier,
        );
        let attribute = self.attribute_left_out.as_deref().unwrap_or_default();
        for (count, what, example) in [
            (
                self.sockets_left_out,
                "sockets: they are made by their programs",
                String::new(),
            ),
            (
                self.attributes_left_out,
                "extended attributes: the share does not take them",
                format!("({attribute}, …)"),
            ),
            (
                self.links_left_out,
                "hard links: the share does not make them, so each name is a file",
                String::new(),
            ),
        ] {
            if count > 0 {
                all += &format!("left out: {count} {what} {example}\n");
            }
        }
        all += "\nThe local volume is as it was. When the copy has proved good, on this host:\n\n";
        for command in &self.next {
            all += &format!("  {command}\n");
        }
        all
    }
}
