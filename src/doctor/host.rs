//! What this host has: data paths, helpers, the daemon, and mounts that no longer answer.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use serde_json::Value;
use tokio::time::error::Elapsed;
use tokio::time::timeout_at;

use super::Finding;
use crate::docker::client::ClientError;
use crate::fuse::FusePath;
use crate::kernel::KernelPath;
use crate::kernel::holders::{self, Held};
use crate::nfs::connect::detached;
use crate::sys::mountinfo::{MountEntry, MountInfo};
use crate::sys::proc;

/// statfs(2) on a mount whose server is well takes microseconds.
const STATFS: Duration = Duration::from_secs(2);

/// What the daemon says of itself, and of its volumes.
pub(super) type Told = (Value, Value);

pub(super) fn daemon(asked: Result<Result<Told, ClientError>, Elapsed>) -> (Finding, Option<Told>) {
    match asked {
        Ok(Ok(told)) => {
            let (status, _) = &told;
            let number = |key: &str| status[key].as_u64().unwrap_or_default();
            let found = format!(
                "version {}, {} volumes, {} attachments",
                status["version"].as_str().unwrap_or("?"),
                number("volumes"),
                number("attachments"),
            );
            (Finding::ok("daemon", found), Some(told))
        }
        Ok(Err(error)) => {
            let text = error.to_string();
            let (found, advice) = text.split_once(". ").unwrap_or((&text, "run it as root"));
            (Finding::failed("daemon", found, advice), None)
        }
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
    let said = |check, has: &str, error: Option<String>, other: &str| match error {
        None => Finding::ok(check, has),
        Some(error) if neither => Finding::error(check, &error),
        Some(error) => Finding::skipped(check, format!("{error}: volumes use {other}")),
    };
    vec![
        said(
            "kernel nfs",
            "the kernel's NFS client is there",
            kernel.err().map(|e| e.to_string()),
            "FUSE",
        ),
        said(
            "fuse",
            "/dev/fuse is there",
            fuse.err().map(|e| e.to_string()),
            "the kernel's NFS client",
        ),
    ]
}

/// Daemons that some mount options need; what is absent matters when a volume has those options.
pub(super) fn helpers(volumes: Option<&Value>) -> Vec<Finding> {
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
fn asking(volumes: Option<&Value>, asks: impl Fn(&str) -> bool) -> String {
    let volumes = volumes.and_then(Value::as_array).into_iter().flatten();
    let asking = volumes.filter(|volume| {
        let options = volume["mount_options"].as_str().unwrap_or_default();
        options.split(',').any(&asks)
    });
    let names: Vec<&str> = asking
        .filter_map(|volume| volume["name"].as_str())
        .collect();
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
        Err(error) => return vec![Finding::error("mounts", &error)],
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
        true => Held::Device(entry.device),
        false => Held::Source(entry.source.clone()),
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
        let volumes = json!([
            { "name": "a", "mount_options": "hard,nodev,nosuid,sec=krb5p" },
            { "name": "b", "mount_options": "hard,lock,nodev,nosuid" },
            { "name": "c", "mount_options": "hard,nodev,nolock,nosuid" },
            { "name": "d", "mount_options": "hard,nodev,nosuid,sec=krb5" },
        ]);
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
