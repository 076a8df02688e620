//! Ten minutes of what people run on file systems, all on one FUSE volume that two hosts have, while
//! the server is killed and falls silent in turns: `make test-long`.
//!
//! A restart and a silence only delay, so no program may fail at all. At the end everything written is
//! on the server, both hosts read the same bytes, and no process is left waiting.
//! `NFSVOL_SOAK_SECONDS` sets another length.

#[path = "fuse/host.rs"]
mod host;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use host::{EXPORT, Host};
use lab::process::Task;
use lab::{Export, Ganesha, Lab, PATIENCE, Part, Result, trial, wait_for};

const NEEDS: &[Part] = &[Part::Ganesha, Part::Fuse, Part::Services, Part::Soak];
/// How long the programs begin anew.
const SECONDS: u64 = 600;
/// How long the server is well between two faults, and how long it is silent.
const WELL: Duration = Duration::from_secs(40);
const SILENT: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    if let Some(code) = host::as_worker() {
        return code;
    }
    lab::main!(|| {
        // By name it runs at any time.
        let soak = trial("nothing_fails_in_ten_minutes", NEEDS, soak);
        vec![soak.with_ignored_flag(!lab::long())]
    })
}

/// A program's name, the host that it runs on, and one round of it, in a directory of its own.
const PROGRAMS: &[(&str, usize, &str)] = &[
    (
        "fio",
        0,
        "common='--name=f --thread --rw=randrw --bsrange=512-64k --size=24m --verify=crc32c --verify_fatal=1 \
           --randrepeat=0 --output-format=terse'
         fio $common --filename=buffered --ioengine=psync --fsync=32
         fio $common --filename=direct --ioengine=psync --direct=1 --bsrange=4k-64k --blockalign=4k
         fio $common --filename=mapped --ioengine=mmap --bsrange=4k-64k --blockalign=4k --fsync=64",
    ),
    (
        "fio-other-host",
        1,
        "common='--name=f --thread --rw=randrw --bsrange=512-64k --size=24m --verify=crc32c --verify_fatal=1 \
           --randrepeat=0 --output-format=terse'
         fio $common --filename=synced --ioengine=psync --sync=1 --size=4m
         fio $common --ioengine=psync --fdatasync=16 --numjobs=2 --nrfiles=2 --size=12m",
    ),
    // Left out is what NFSv3 has not (`fsize` takes fallocate for granted), and what asks nothing of a volume.
    (
        "stress-ng",
        1,
        "stress-ng --temp-path . --verify --class filesystem --sequential 1 --timeout 4 --exclude \
           bind-mount,binderfs,chattr,eventfd,fallocate,fanotify,fiemap,fpunch,fsize,handle,inode-flags,ioprio,procfs,verity,xattr",
    ),
    (
        "sqlite",
        0,
        "sqlite3 t.db 'pragma journal_mode=wal; create table if not exists t (id integer primary key, v text)'
         for writer in 1 2 3; do
           (for i in $(seq 30); do
              sqlite3 -cmd '.timeout 300000' t.db \\
                'insert into t (v) select hex(randomblob(200)) from (select 1 union all select 2)'
            done) &
           jobs[writer]=$!
         done
         for job in ${jobs[@]}; do wait $job; done
         [ \"$(sqlite3 -cmd '.timeout 300000' t.db 'pragma integrity_check')\" = ok ]
         rows=$(sqlite3 t.db 'select count(*) from t'); expected=$(($(cat rows 2>/dev/null || echo 0) + 180))
         [ $rows = $expected ]; echo $rows >rows",
    ),
    (
        "pgbench",
        1,
        "bin=$(echo /usr/lib/postgresql/*/bin); socket=$(mktemp -d); chown postgres . $socket
         as() { setpriv --reuid=postgres --regid=postgres --clear-groups env PATH=$bin:$PATH HOME=$socket \"$@\"; }
         [ -e data ] || as initdb -k -D data >/dev/null
         as pg_ctl -s -w -t 300 -D data -l $socket/log -o \"-k $socket -c listen_addresses=\" start
         as psql -qAt -h $socket -d postgres -c 'select 1 from pgbench_branches' >/dev/null 2>&1 \\
           || as pgbench -q -i -s 2 -h $socket postgres 2>/dev/null
         as pgbench -c 4 -T 20 -h $socket postgres
         as pg_ctl -s -w -t 300 -m fast -D data stop || { cat $socket/log; exit 1; }
         as pg_checksums --check -D data >/dev/null; rm -r $socket",
    ),
    (
        "git",
        0,
        "export HOME=$PWD GIT_CONFIG_NOSYSTEM=1; rm -rf clone
         git config --global --replace-all safe.directory '*'
         git config --global user.name t; git config --global user.email t@t
         git clone -q --no-hardlinks {source} clone; cd clone
         for i in $(seq 10); do echo $i >f$i; git add f$i; git commit -qm $i; done
         git gc -q; git fsck --full; [ -z \"$(git status --porcelain)\" ]",
    ),
];

fn soak(lab: &'static Lab) -> Result {
    let seconds = std::env::var("NFSVOL_SOAK_SECONDS");
    let seconds = Duration::from_secs(seconds.map_or(Ok(SECONDS), |text| text.parse())?);
    let nas = Ganesha::start(lab, "soaked", &[Export::new(EXPORT)])?;
    let hosts = [
        Host::mount(&nas, "soak", "")?,
        Host::mount(&nas, "soak", "")?,
    ];
    // As containers have it: at a place that every user can enter.
    let places = [
        place(&hosts[0], "/run/soak-a")?,
        place(&hosts[1], "/run/soak-b")?,
    ];
    let until = Instant::now() + seconds;
    let running = AtomicUsize::new(PROGRAMS.len());
    let (rounds, faults) = thread::scope(|scope| {
        let programs: Vec<_> = PROGRAMS
            .iter()
            .map(|(name, host, script)| {
                let (place, running) = (places[*host], &running);
                scope.spawn(move || {
                    let rounds = program(name, place, script, until);
                    running.fetch_sub(1, Ordering::Relaxed);
                    rounds.map(|rounds| format!("{name} {rounds}"))
                })
            })
            .collect();
        let faults = trouble(&nas, &running, until);
        let rounds = programs.into_iter().map(|program| {
            let ended = program.join();
            ended.map_err(|_| anyhow!("a thread panicked"))?
        });
        (rounds.collect::<Result<Vec<_>>>(), faults)
    });
    let (rounds, faults) = (rounds?, faults?);
    lab::note(format!(
        "soak of {seconds:?}, {faults} faults of the server; rounds: {}",
        rounds.join(", ")
    ));
    settled(&hosts)?;
    let seen = [listing(places[0])?, listing(places[1])?];
    let there = listing(&nas.local(EXPORT).join("soak").display().to_string())?;
    ensure!(
        seen[0] == there,
        "the first host reads other bytes than the server has"
    );
    ensure!(
        seen[1] == there,
        "the second host reads other bytes than the server has"
    );
    for place in places {
        lab::process::run(&["umount", place])?.ok()?;
    }
    hosts.iter().try_for_each(Host::detach)
}

fn place(host: &Host, at: &'static str) -> Result<&'static str> {
    fs::create_dir(at)?;
    let volume = host.display().to_string();
    lab::process::run(&["mount", "--bind", &volume, at])?.ok()?;
    Ok(at)
}

/// Runs a program round by round until then; answers how many rounds.
fn program(name: &str, place: &str, script: &str, until: Instant) -> Result<usize> {
    let script = script.replace("{source}", env!("CARGO_MANIFEST_DIR"));
    let text = format!("mkdir -p {place}/{name}; cd {place}/{name}\n{script}");
    let mut rounds = 0;
    while Instant::now() < until {
        let task = Task {
            limit: Some(until.saturating_duration_since(Instant::now()) + PATIENCE),
            ..Task::new(&["bash", "-euo", "pipefail", "-c", &text])
        };
        let round = task.run().and_then(lab::Output::ok);
        round.with_context(|| format!("{name}, round {rounds}"))?;
        rounds += 1;
    }
    Ok(rounds)
}

/// Kills the server and makes it silent in turns, until then; answers how often.
fn trouble(nas: &Ganesha, running: &AtomicUsize, until: Instant) -> Result<usize> {
    let mut faults = 0;
    loop {
        let well = Instant::now();
        while well.elapsed() < WELL {
            // The last ones end with a server that is well.
            if Instant::now() + SILENT > until || running.load(Ordering::Relaxed) == 0 {
                return Ok(faults);
            }
            thread::sleep(Duration::from_millis(200));
        }
        if faults % 2 == 0 {
            nas.kill()?;
            nas.up()?;
        } else {
            nas.freeze()?;
            thread::sleep(SILENT);
            nas.thaw()?;
        }
        faults += 1;
    }
}

/// Waits until all is on the server and nobody waits any more.
fn settled(hosts: &[Host; 2]) -> Result {
    let mut left = Vec::new();
    let waited = wait_for("all to be written", PATIENCE, || {
        let unsaved = hosts
            .iter()
            .map(|host| host.status().map(|s| (s.unsaved, s.under_way)));
        left = unsaved.collect();
        left.iter().all(|left| matches!(left, Ok((0, 0))))
    });
    waited.with_context(|| format!("bytes unsaved, requests under way: {left:?}"))?;
    let mut stuck = Vec::new();
    for process in fs::read_dir("/proc")?.flatten() {
        let status = fs::read_to_string(process.path().join("status")).unwrap_or_default();
        if status.contains("State:\tD") {
            stuck.push(status.lines().next().unwrap_or_default().to_owned());
        }
    }
    ensure!(stuck.is_empty(), "in state D: {stuck:?}");
    Ok(())
}

/// Every file below a directory with its sum. Sockets and the like are none.
fn listing(dir: &str) -> Result<String> {
    ensure!(Path::new(dir).exists(), "{dir}");
    let script = "find . -type f -print0 | sort -z | xargs -0 md5sum";
    let task = Task {
        limit: Some(PATIENCE),
        ..Task::new(&[
            "bash",
            "-euo",
            "pipefail",
            "-c",
            &format!("cd {dir}; {script}"),
        ])
    };
    task.run()?.ok()
}
