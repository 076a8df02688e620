//! What this host has: data paths, helpers, the daemon, and mounts that no longer answer.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use tokio::time::error::Elapsed;
use tokio::time::timeout_at;

use super::Finding;
use crate::api::daemon::DaemonStatus;
use crate::api::volumes::VolumeLine;
use crate::api::{ClientError, Failure};
use crate::fuse::FusePath;
use crate::kernel::{KernelPath, MountError};
use crate::sys::holders::{self, Mark};
use crate::sys::mountinfo::{MountEntry, MountInfo};
use crate::sys::proc;
use nfs::connect::detached;

/// statfs(2) on a mount whose server is well takes microseconds.
const STATFS: Duration = Duration::from_secs(2);

/// What the daemon says of itself, and of its volumes.
pub(super) type Told = (DaemonStatus, Vec<VolumeLine>);

pub(super) fn daemon(asked: Result<Result<Told, ClientError>, Elapsed>) -> (Finding, Option<Told>) {
    match asked {
        Ok(Ok(told)) => {
            let (status, _) = &told;
            let found = format!(
                "version {}, {} volumes, {} attachments",
                status.version, status.volumes, status.attachments,
            );
            (Finding::ok("daemon", found), Some(told))
        }
        Ok(Err(error)) => (Finding::error("daemon", &error), None),
        Err(_) => (
            Finding::failed(
                "daemon",
                "it does not answer",
                "`journalctl -u nfsvol` says what it waits for; systemctl restart nfsvol",
            ),
            None,
        ),
    }
}

pub(super) fn data_paths() -> Vec<Finding> {
    let kernel = KernelPath::kernel_has_nfs();
    let fuse = FusePath::available();
    let neither = kernel.is_err() && fuse.is_err();
    let said = |check, has: &str, error: Option<Failure>, other: &str| match error {
        None => Finding::ok(check, has),
        Some(error) if neither => Finding::error(check, error),
        Some(error) => Finding::skipped(check, format!("{error}: volumes use {other}")),
    };
    vec![
        said(
            "kernel nfs",
            "the kernel's NFS client is there",
            kernel.err().map(|error| failure(&error)),
            "FUSE",
        ),
        said(
            "fuse",
            "/dev/fuse is there",
            fuse.err().map(Failure::plain),
            "the kernel's NFS client",
        ),
    ]
}

fn failure(error: &MountError) -> Failure {
    match error {
        MountError::NoKernelNfs { hint, .. } => {
            let text = error.to_string();
            let message = text.strip_suffix(&format!("; {hint}")).unwrap_or(&text);
            Failure::new(message, Some(hint))
        }
        error => Failure::plain(error),
    }
}

/// Daemons that some mount options need; what is absent matters when a volume has those options.
pub(super) fn helpers(volumes: Option<&[VolumeLine]>) -> Vec<Finding> {
    let running = running();
    let runs = |name: &str| running.iter().any(|comm| comm == name);
    let keytab = Path::new("/etc/krb5.keytab").exists();
    vec![
        locks(runs("rpc.statd"), &asking(volumes, |word| word == "lock")),
        kerberos(
            runs("rpc.gssd"),
            keytab,
            &asking(volumes, |word| word.starts_with("sec=krb5")),
        ),
    ]
}

/// The volumes with a mount option for which `asks` answers true.
fn asking(volumes: Option<&[VolumeLine]>, asks: impl Fn(&str) -> bool) -> String {
    let known = volumes
        .unwrap_or_default()
        .iter()
        .filter_map(VolumeLine::known);
    let asking = known.filter(|line| line.facts.mount_options.split(',').any(&asks));
    let names: Vec<&str> = asking.map(|line| line.name.as_str()).collect();
    names.join(", ")
}

fn locks(statd: bool, volumes: &str) -> Finding {
    match (statd, volumes) {
        (true, _) => Finding::ok(
            "locks",
            "rpc.statd runs: the option `lock` works over NFSv3",
        ),
        (false, "") => Finding::skipped(
            "locks",
            "rpc.statd does not run: over NFSv3 locks stay local to this host (nolock); NFSv4 needs \
             none",
        ),
        (false, volumes) => Finding::warning(
            "locks",
            format!(
                "rpc.statd does not run, and the option `lock` of {volumes} needs it over NFSv3"
            ),
            "systemctl start rpc-statd; or leave `lock` out; NFSv4 needs none",
        ),
    }
}

fn kerberos(gssd: bool, keytab: bool, volumes: &str) -> Finding {
    let yes = |yes: bool| if yes { "yes" } else { "no" };
    let found = format!(
        "sec=krb5 needs rpc.gssd (runs: {}) and /etc/krb5.keytab (there: {})",
        yes(gssd),
        yes(keytab)
    );
    match (gssd && keytab, volumes) {
        (true, _) => Finding::ok("kerberos", "rpc.gssd runs and there is a keytab"),
        (false, "") => Finding::skipped("kerberos", found),
        (false, volumes) => Finding::failed(
            "kerberos",
            format!("{found}: {volumes} cannot be mounted here"),
            "systemctl start rpc-gssd; a keytab for nfs/HOST or host/HOST comes from the KDC (kadmin: \
             ktadd)",
        ),
    }
}

/// Names of the processes that run.
fn running() -> Vec<String> {
    let processes = proc::ids().unwrap_or_default().into_iter();
    processes
        .filter_map(|pid| std::fs::read_to_string(format!("/proc/{pid}/comm")).ok())
        .map(|comm| comm.trim_end().to_owned())
        .collect()
}

/// What is wrong with a mount, and what to do.
const STALE: &str = "is stale: the server no longer knows it";
const RESTART: &str = "restart these containers";
const NO_WORKER: &str = "has lost its worker process";
const RESTART_HERE_OR_THERE: &str = "restart these containers; those of an exclusive volume on the \
     host that has it now (`nfsvol ls`)";
const SERVER_FIRST: &str = "see to the server and the network first";
const HANGS: &str = "hangs: its server does not answer";
const WAIT: &str = "bring the server back: everything goes on by itself, and nothing is to be \
     restarted. Where it will not come back, `nfsvol abort VOLUME` ends the waiting calls with an \
     error; what was not synced is lost then";

/// One finding for all mounts that answer, and one for each that does not.
pub(super) async fn mounts(mount_root: &Path) -> Vec<Finding> {
    let mounts: Vec<MountEntry> = match MountInfo::read_below(mount_root) {
        Ok(info) => info
            .entries
            .into_iter()
            .filter(|entry| entry.is_nfs() || entry.is_fuse())
            .collect(),
        Err(error) => return vec![Finding::error("mounts", Failure::plain(error))],
    };
    let looks: Vec<_> = mounts
        .iter()
        .map(|entry| {
            let path = entry.mountpoint.clone();
            detached(move || rustix::fs::statfs(&path).map(drop))
        })
        .collect();
    // The same moment for all: however many hang, it is waited once.
    let until = tokio::time::Instant::now() + STATFS;
    let mut findings = Vec::new();
    let mut well = 0;
    for (entry, look) in mounts.iter().zip(looks) {
        let (problem, way_out) = match look {
            Err(error) => (error.to_string(), SERVER_FIRST),
            Ok(look) => match timeout_at(until, look).await {
                Ok(Ok(Ok(()))) => {
                    well += 1;
                    continue;
                }
                Ok(Ok(Err(Errno::STALE))) => (STALE.to_owned(), RESTART),
                Ok(Ok(Err(Errno::NOTCONN))) => (NO_WORKER.to_owned(), RESTART_HERE_OR_THERE),
                Ok(Ok(Err(errno))) => (io::Error::from(errno).to_string(), SERVER_FIRST),
                Ok(Err(_)) | Err(_) => (HANGS.to_owned(), WAIT),
            },
        };
        findings.push(Finding::failed(
            "mounts",
            format!("{} {problem}{}", entry.mountpoint.display(), holding(entry)),
            way_out,
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::ok("mounts", format!("{well} answer")));
    }
    findings
}

/// Who has a mount open, in words.
fn holding(entry: &MountEntry) -> String {
    let held = match entry.is_fuse() {
        true => Mark::Device(entry.device),
        false => Mark::Source(entry.source.clone()),
    };
    let holders = holders::find(&held, &PathBuf::from(&entry.mountpoint)).unwrap_or_default();
    let names: Vec<String> = holders
        .iter()
        .map(|holder| {
            let container = holder.container_id.as_deref().map(|id| &id[..12]);
            let container = container.map_or_else(String::new, |id| format!(", container {id}"));
            format!("{} (process {}{container})", holder.comm, holder.pid)
        })
        .collect();
    match names.is_empty() {
        true => String::new(),
        false => format!("; held by {}", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::doctor::Outcome;

    #[test]
    fn a_helper_that_is_absent_matters_when_a_volume_needs_it() {
        let volumes = [
            ("a", "hard,nodev,nosuid,sec=krb5p"),
            ("b", "hard,lock,nodev,nosuid"),
            ("c", "hard,nodev,nolock,nosuid"),
            ("d", "hard,nodev,nosuid,sec=krb5"),
        ];
        let volumes = volumes.map(|(name, mount_options)| {
            let line = json!({
                "name": name, "mount_options": mount_options, "share": null, "data_dir": name,
                "access": "shared", "on_remove": "trash", "created_by": "", "created": "",
                "held_by": "", "attachments": 0, "mountpoint": null, "warning": null,
            });
            serde_json::from_value::<VolumeLine>(line).unwrap()
        });
        let secure = asking(Some(&volumes), |word| word.starts_with("sec=krb5"));
        assert_eq!(secure, "a, d");
        let locking = asking(Some(&volumes), |word| word == "lock");
        assert_eq!(locking, "b");

        assert_eq!(kerberos(false, true, "").outcome, Outcome::Skipped);
        assert_eq!(kerberos(true, true, &secure).outcome, Outcome::Ok);
        for (gssd, keytab) in [(false, false), (true, false), (false, true)] {
            let finding = kerberos(gssd, keytab, &secure);
            assert_eq!(finding.outcome, Outcome::Failed);
            assert!(
                finding.found.contains("a, d cannot be mounted"),
                "{finding:?}"
            );
        }
        assert_eq!(locks(false, "").outcome, Outcome::Skipped);
        assert_eq!(locks(false, &locking).outcome, Outcome::Warning);
        assert_eq!(locks(true, &locking).outcome, Outcome::Ok);
    }
}
