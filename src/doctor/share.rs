//! From a share's name to bytes in a file on it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::timeout;

use super::Finding;
use nfs::address::{Server, Share, SharePath};
use nfs::admin::{Admin, AdminError, AdminSettings, Attr};
use nfs::connect::resolve;
use nfs::probe::{Ports, ReachError, Reached, Step, probe};

/// For the steps to a server that answers, and for the test of writing. Together with a name
/// server that is silent they stay below 10 s.
const REACH: Duration = Duration::from_secs(5);
const WRITE: Duration = Duration::from_secs(3);
/// make(1) and others that compare times are misled by more.
const CLOCKS: Duration = Duration::from_secs(2);
/// The checks of reaching a share, in their order.
const CHECKS: [(&str, Step); 4] = [
    ("name", Step::Resolve),
    ("connect", Step::Connect),
    ("versions", Step::Null),
    ("export", Step::Fsinfo),
];
const BYTES: &[u8] = b"nfsvol doctor was here\n";

pub(super) async fn examine(share: &Share) -> Vec<Finding> {
    if *share.server() == Server::Embedded {
        return vec![Finding::skipped(
            "share",
            format!("{share} is served by its daemon on this host"),
        )];
    }
    let reached = match probe(share, Ports::default(), REACH).await {
        Ok(reached) => reached,
        Err(error) => return unreached(&error),
    };
    let mut findings = Vec::new();
    let addresses = resolve(share.server(), REACH).await.unwrap_or_default();
    let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    findings.push(Finding::ok("name", addresses.join(", ")));
    findings.push(Finding::ok(
        "connect",
        format!("{} port {}", reached.addr, reached.nfs_port),
    ));
    findings.push(versions(&reached));
    findings.push(match (&reached.v3_error, reached.v3) {
        (Some(error), _) => Finding::warning(
            "export",
            format!("not over NFSv3: {error}"),
            "a mount over NFSv4 may still work, as paths differ between the two; FUSE needs NFSv3",
        ),
        (None, true) => Finding::ok("export", share.export()),
        (None, false) => Finding::skipped("export", "only a mount over NFSv4 can tell"),
    });
    if reached.v3 {
        findings.extend(write_test(share, &reached).await);
    } else {
        findings.push(Finding::skipped("write", "tried over NFSv3 only"));
    }
    findings
}

/// The steps up to the one that failed, and those that were not tried then.
fn unreached(error: &ReachError) -> Vec<Finding> {
    let portmap = error.step == Step::Portmap;
    let mut findings: Vec<Finding> = CHECKS
        .into_iter()
        .scan(false, |failed, (check, step)| {
            let finding = match () {
                () if *failed => Finding::skipped(check, "not tried"),
                () if error.step > step || portmap && step == Step::Connect => {
                    Finding::ok(check, "")
                }
                () => {
                    *failed = true;
                    Finding::error(check, error)
                }
            };
            Some(finding)
        })
        .collect();
    findings.push(Finding::skipped("write", "not tried"));
    findings
}

fn versions(reached: &Reached) -> Finding {
    let ports = match reached.mount_port {
        Some(port) => format!("MOUNT on port {port}"),
        None => "its portmapper does not tell of MOUNT".to_owned(),
    };
    let rtt = format!("answers in {:.1} ms", reached.rtt.as_secs_f64() * 1e3);
    match (reached.v3, reached.v4) {
        (true, true) => Finding::ok("versions", format!("NFSv3 and NFSv4; {ports}; {rtt}")),
        (true, false) => Finding::warning(
            "versions",
            format!("NFSv3 only; {ports}; {rtt}"),
            "locks are local to each host over NFSv3; enable NFSv4 on the server for locks across \
             hosts",
        ),
        (false, _) => Finding::warning(
            "versions",
            format!("NFSv4 only; {ports}; {rtt}"),
            "volumes need the kernel's NFS client then; the FUSE data path speaks NFSv3",
        ),
    }
}

/// Makes a directory with a file in it, reads that back, and removes both.
async fn write_test(share: &Share, reached: &Reached) -> Vec<Finding> {
    let settings = AdminSettings {
        op_deadline: WRITE,
        nfs_port: Some(reached.nfs_port),
        mount_port: reached.mount_port,
        ..AdminSettings::default()
    };
    let admin = Admin::v3(share.clone(), settings);
    let random = getrandom::u64().unwrap_or_default();
    let Ok(directory) = SharePath::parse(&format!(".nfsvol-doctor-{random:016x}")) else {
        return Vec::new();
    };
    let tried = timeout(WRITE, write(&admin, &directory)).await;
    // What could not be removed in time is empty, or one small file.
    let _ = timeout(WRITE, admin.remove_tree(&directory, &|| true)).await;
    match tried {
        Err(_) => vec![Finding::failed(
            "write",
            format!("did not end within {} ms", WRITE.as_millis()),
            "look at the server's load and log",
        )],
        Ok(Err(error)) => vec![Finding::error("write", &error)],
        Ok(Ok((made, read))) => {
            let as_written = read.as_deref() == Some(BYTES);
            let write = match as_written {
                true => Finding::ok("write", "a file was written, read back and removed"),
                false => Finding::failed(
                    "write",
                    "a file is read back with other bytes than were written",
                    "another client may have changed it; if not, look at the server's disks",
                ),
            };
            vec![write, squash(&made), clocks(&made)]
        }
    }
}

async fn write(
    admin: &Admin,
    directory: &SharePath,
) -> Result<(Attr, Option<Vec<u8>>), AdminError> {
    admin.mkdir(directory, 0o700).await?;
    let file = directory.join("file");
    let made = admin.write(&file, BYTES).await?;
    Ok((made, admin.read(&file, BYTES.len() * 2).await?))
}

fn squash(made: &Attr) -> Finding {
    match made.uid {
        0 => Finding::ok("root", "stays root on the share"),
        uid => Finding::warning(
            "root",
            format!("becomes user {uid} on the share (root_squash)"),
            "Docker cannot copy an image's data into an empty volume, and uid= and gid= are \
             refused: mount with :nocopy, or export with no_root_squash",
        ),
    }
}

fn clocks(made: &Attr) -> Finding {
    let here = SystemTime::now().duration_since(UNIX_EPOCH);
    let here = here.unwrap_or_default();
    let there = Duration::new(made.mtime.secs, made.mtime.nanos);
    let apart = here.abs_diff(there);
    match apart < CLOCKS {
        true => Finding::ok("clocks", format!("{:.1} s apart", apart.as_secs_f64())),
        false => Finding::warning(
            "clocks",
            format!("{:.0} s apart", apart.as_secs_f64()),
            "nfsvol does not mind, but programs that compare times of files do, and Kerberos ends \
             at 5 minutes: run chrony or systemd-timesyncd on both",
        ),
    }
}
