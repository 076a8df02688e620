//! Other people's judges of file systems, on a FUSE volume and on the kernel's NFSv3 client, over one
//! export of one server: what the kernel's client passes, FUSE passes.
//!
//! - [pjdfstest](https://crates.io/crates/pjdfstest): what POSIX says of each call, case by case.
//! - [fsx](https://crates.io/crates/fsx): random reads, writes, maps, cuts and syncs of one file, whose
//!   bytes it knows.
//!
//! Both are programs that the Makefile installs below target/tools. nfs-ganesha serves, because it runs
//! on the machine's own kernel; the kernel's client is a guest's.

#[path = "fuse/host.rs"]
mod host;
use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::process::ExitCode;

use anyhow::{Context, ensure};
use host::{EXPORT, Host};
use lab::process::Task;
use lab::{Export, Ganesha, Lab, Node, Output, Part, Result, Shared, tool, trial};

const NEEDS: &[Part] = &[Part::Ganesha, Part::Fuse, Part::Guest, Part::Judges];
/// Cases that the kernel's client does not pass here, and why.
const KERNEL_FAILS: &[(&str, &str)] = &[
    (
        "unlink::open_file_not_freed",
        "a deleted file that is open has a hidden name with an NFS client: one link instead of none",
    ),
    (
        "utimensat::follow_symlink",
        "nfs-ganesha says that it sets the times of a symbolic link, and does not",
    ),
    (
        "utimensat::y2038",
        "NFSv3 has 32 bits for the seconds of a time",
    ),
];
static NAS: Shared<Ganesha> = Shared::new();
static KERNEL: Shared<Node> = Shared::new();

fn main() -> ExitCode {
    if let Some(code) = host::as_worker() {
        return code;
    }
    lab::main!(|| {
        vec![
            trial("fuse_passes_what_the_kernel_passes", NEEDS, posix),
            trial("fsx_finds_no_wrong_byte", NEEDS, fsx),
        ]
    })
}

fn nas(lab: &'static Lab) -> Result<&'static Ganesha> {
    NAS.get(|| Ganesha::start(lab, "judged", &[Export::new(EXPORT)]))
}

/// A guest that has the export at /mnt/nfs by the kernel's own client.
fn kernel(lab: &'static Lab) -> Result<&'static Node> {
    let nas = nas(lab)?;
    KERNEL.get(|| {
        let guest = Node::guest(lab, "kernel")?;
        guest.sh(&format!(
            "mkdir /mnt/nfs
             mount -i -t nfs -o nolock,vers=3,addr={ip},proto=tcp,mountproto=tcp,port=2049,mountport=20048 \
               {ip}:{EXPORT} /mnt/nfs",
            ip = nas.ip()
        ))?;
        Ok(guest)
    })
}

fn bash(script: &str) -> Task {
    Task::new(&["bash", "-euc", script])
}

// ---- pjdfstest --------------------------------------------------------------------------------

/// What it says of each of its cases: `ok`, `FAILED`, `skipped`, and with the last two why.
struct Verdicts(BTreeMap<String, (String, String)>);

impl Verdicts {
    fn of(output: &Output) -> Result<Self> {
        let mut cases = BTreeMap::<String, (String, String)>::new();
        let mut last = String::new();
        for line in output.stdout.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match *words {
                [case, said @ ("ok" | "FAILED" | "skipped")] if !line.starts_with('\t') => {
                    last = case.to_owned();
                    cases.insert(last.clone(), (said.to_owned(), String::new()));
                }
                _ => {
                    if let Some((_, why)) = cases.get_mut(&last) {
                        why.push_str(line);
                        why.push('\n');
                    }
                }
            }
        }
        ensure!(output.stdout.contains("Summary"), "it broke off: {output}");
        Ok(Self(cases))
    }

    fn that(&self, said: &str) -> Vec<&str> {
        let all = self.0.iter().filter(|(_, (verdict, _))| verdict == said);
        all.map(|(case, _)| case.as_str()).collect()
    }

    fn passed(&self, case: &str) -> bool {
        self.0.get(case).is_some_and(|(said, _)| said == "ok")
    }

    fn failed(&self, case: &str) -> bool {
        self.0.get(case).is_some_and(|(said, _)| said == "FAILED")
    }

    fn why(&self, case: &str) -> &str {
        self.0.get(case).map_or("it was not run", |(_, why)| why)
    }
}

impl fmt::Display for Verdicts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |said| self.that(said).len();
        let (ok, failed) = (count("ok"), count("FAILED"));
        write!(
            f,
            "{ok} passed, {failed} failed, {} skipped",
            count("skipped")
        )
    }
}

/// Runs it in `dir` of the volume at `mount`, as a user of a container would: in a bind mount, which
/// every user can enter.
fn judge(mount: &str) -> String {
    format!(
        "umask 022; place=$(mktemp -d -p /run); chmod 755 $place
         mkdir $place/volume $place/other; mount --bind {mount} $place/volume
         trap 'cd /; umount $place/volume; rm -r $place' EXIT
         mount -t tmpfs tmpfs $place/other
         cat >$place/config <<'END'
[features]
posix_fallocate = {{}}
rename_ctime = {{}}
utime_now = {{}}
utimensat = {{}}
[settings]
# Longer than a tick of the clock that the server's file system takes its times from.
naptime = 0.02
[dummy_auth]
entries = [[\"nobody\", \"nogroup\"], [\"daemon\", \"daemon\"]]
END
         RUST_BACKTRACE=0 {} -c $place/config -p $place/volume -s $place/other || [ $? = 1 ]",
        tool("pjdfstest")
    )
}

fn posix(lab: &'static Lab) -> Result {
    let nas = nas(lab)?;
    let guest = kernel(lab)?;
    let volume = Host::mount(nas, "posix", "")?;
    guest.sh("mkdir /mnt/nfs/kernel")?;
    let ours = bash(&judge(&volume.display().to_string())).run()?;
    let theirs = guest.run_task(&bash(&judge("/mnt/nfs/kernel")))?;
    let took = format!("{:.0?} and {:.0?}", ours.took, theirs.took);
    let (ours, theirs) = (Verdicts::of(&ours)?, Verdicts::of(&theirs)?);
    lab::note(format!(
        "pjdfstest: FUSE {ours} ({}); the kernel's client {theirs}; took {took}",
        ours.that("FAILED").join(", ")
    ));
    ensure!(ours.that("skipped") == theirs.that("skipped"));
    let known = |case: &str| KERNEL_FAILS.iter().any(|(name, _)| *name == case);
    let mut wrong = String::new();
    for case in theirs.0.keys().filter(|case| !known(case)) {
        if theirs.passed(case) && !ours.passed(case) {
            writeln!(wrong, "FUSE only: {case}\n{}", ours.why(case))?;
        } else if theirs.failed(case) {
            writeln!(wrong, "the kernel's client: {case}\n{}", theirs.why(case))?;
        }
    }
    ensure!(wrong.is_empty(), "failed:\n{wrong}");
    let passed = KERNEL_FAILS.iter().find(|(case, _)| theirs.passed(case));
    ensure!(passed.is_none(), "known to fail, and passes: {passed:?}");
    Ok(())
}

// ---- fsx --------------------------------------------------------------------------------------

fn fsx(lab: &'static Lab) -> Result {
    let nas = nas(lab)?;
    let guest = kernel(lab)?;
    let mut times = Vec::new();
    for (name, options) in [
        ("fsx", ""),
        ("fsxnoac", "noac"),
        ("fsxsmall", "rsize=4096,wsize=4096"),
    ] {
        let volume = Host::mount(nas, name, options)?;
        let output = bash(&lab::fsx::script(&volume.display().to_string())).run()?;
        times.push(format!("{:.0?}", output.took));
        output.ok().with_context(|| format!("with {options:?}"))?;
    }
    guest.sh("mkdir /mnt/nfs/fsxkernel")?;
    let theirs = guest.run_task(&bash(&lab::fsx::script("/mnt/nfs/fsxkernel")))?;
    times.push(format!("{:.0?}", theirs.took));
    theirs.ok()?;
    lab::note(format!(
        "fsx: {} steps on each of three FUSE volumes and on the kernel's client, no byte wrong; {}",
        lab::fsx::STEPS,
        times.join(", ")
    ));
    Ok(())
}
