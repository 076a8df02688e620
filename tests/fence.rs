//! Exclusive volumes on the kernel data path: two Docker hosts with the kernel's NFS client, of
//! which one is cut off from the server while its container writes, with and without its daemon.

use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};
use lab::ganesha::LONG_LEASE;
use lab::{DataPath, Export, Ganesha, Host, Lab, Node, PATIENCE, Part, Result, trial, wait_for};

const EXPORT: &str = "/srv/fence";
/// One volume for each protocol, each with a log that is synced line by line and a file that is not.
const VOLUMES: [(&str, &str); 2] = [("three", "3"), ("four", "4.1")];
const FILES: [&str; 2] = ["log", "lazy"];
/// A fence has a sixth of it, and guests are slow.
const SESSION: &str = "40s";
/// A container whose start was given up is started again after this long.
const AGAIN: Duration = Duration::from_secs(30);
/// How much later than as long as the cut lasted TCP would have sent what it had: it doubles its
/// pauses.
const SLACK: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    lab::main!(|| {
        let parts = &[Part::Docker, Part::Ganesha, Part::Guest];
        vec![
            trial("a_guard_ends_who_has_the_volume", &[Part::Root], guard),
            trial(
                "a_guard_spares_the_engine_and_itself",
                &[Part::Root],
                engine,
            ),
            trial(
                "a_fence_waits_for_the_calls_of_what_it_killed",
                &[Part::Root],
                call,
            ),
            trial("a_host_that_is_cut_off_writes_nothing", parts, cut_off),
        ]
    })
}

/// A file system in memory stands for the volume.
const VOLUME: &str = r#"
ip link set lo up
d=/run/guard; mkdir -p $d/share $d/place $d/run
mount -t tmpfs tmpfs $d/share; mkdir $d/share/db; mount --bind $d/share/db $d/place
device=$(awk -v at=$d/share '$5 == at { sub(":", ",\"minor\":", $3); print $3 }' /proc/self/mountinfo)
share=$d/share
# Its right ends after two seconds; a fence has so many milliseconds.
guard() {
    until=$(awk '{ printf "%d", ($1 + 2) * 1e9 }' /proc/uptime)
    $NFSVOL kernel-guard 2>$d/log <<TASK
{"volume":"db","place":"$d/place","share_place":"$share","device":{"major":$device},"server":"127.0.0.1:2049","docker":"/nowhere","run_dir":"$d/run","fence":{"until":$until,"under_way":$1}}
TASK
    cat $d/run/fenced.json | tr -d ' \n'; echo
}
"#;

/// Whoever has the volume.
const GUARD: &str = r#"
unshare -m --propagation private sh -c "mount --bind $d/place /mnt; umount $d/place $d/share
    while :; do echo x >>/mnt/log; sleep 0.01; done" & container=$!
sh -c "exec sleep 1000 3>$d/place/open" & host=$!
(cd $d/place; exec sleep 1000) & inside=$!
# Its main thread has ended, by exit(2): no more than another one is left, which has the file.
perl -Mthreads -e 'open F, ">", shift or die; threads->create(sub { sleep 1000 });
    syscall(+(`uname -m` =~ /x86_64/ ? 60 : 93), 0)' $d/place/led & led=$!
unshare -m --propagation slave sleep 1000 & service=$!
until [ -s $d/place/log ] && [ -e $d/place/open ] && grep -q ') Z' /proc/$led/stat; do sleep 0.05; done
(until ls $d/run/*.sock >/dev/null 2>&1; do sleep 0.05; done; cat /proc/$(pgrep -x nfsvol)/oom_score_adj >$d/oom) &
guard 60000
for pid in $container $host $inside $led $service; do
    kill -0 $pid 2>/dev/null && echo lives || echo ended
done
grep -c $d/ /proc/self/mountinfo || true
# Where it may not ask for that it says so.
if sh -c 'echo -999 >/proc/$$/oom_score_adj' 2>/dev/null; then cat $d/oom
else grep -q 'the OOM killer may take this process' $d/log && echo -1000; fi
kill $service $led 2>/dev/null || true
"#;

/// The guard cannot open the volume's directory, which is a file; or only after a second.
const NO_ROOT: &str = r#"
touch $d/share/file $d/file; mount --bind $d/share/file $d/file
share=$d/file; guard 60000
"#;
const LATE_ROOT: &str = r#"
mount -t tmpfs other $d/share; (sleep 1; umount $d/share) &
guard 60000
"#;

/// nfsvol runs in a container, and the engine in another one, which copies into the volume until a
/// second after the right's end. Somebody on the host has bound the volume to another place too; a service
/// has a copy of that, and a container has it because it was given what is around it.
const ENGINE: &str = r#"
nest='mkdir $d/$id; touch $d/$id/hostname; mount --bind $d/$id/hostname /etc/hostname'
export d id=$(printf %064d 1); eval "$nest"
cp "$(command -v sleep)" $d/dockerd; mkdir $d/look; mount --bind $d/place $d/look
unshare -m --propagation slave sleep 1000 & service=$!
sh -c "exec sleep 1000 3>$d/place/open" & host=$!
export id=$(printf %064d 3)
unshare -m --propagation private sh -c "umount /etc/hostname $d/place $d/share; $nest; exec sleep 1000" & given=$!
export id=$(printf %064d 2)
unshare -m --propagation slave sh -c "$nest; exec $d/dockerd 3.5 3>$d/place/copy" & engine=$!
until [ -e $d/place/copy ] && [ -e $d/place/open ] && [ -e $d/$(printf %064d 3)/hostname ]; do sleep 0.05; done
guard 60000
wait $engine && echo copied || echo killed
for pid in $host $given $service; do
    kill -0 $pid 2>/dev/null && echo lives || echo ended
done
kill $service $given 2>/dev/null || true
"#;

/// A process that has the volume is within a read of a FUSE file whose server takes its time: such a
/// call goes on until it is answered, whether its process is killed or not.
const CALL: &str = r#"
touch $d/silent
cat >$d/fuse.pl <<'PERL'
use strict;
my ($at, $begun) = @ARGV;
sysopen(my $fuse, "/dev/fuse", 2) or die "/dev/fuse: $!";
my $options = sprintf("fd=%d,rootmode=100644,user_id=0,group_id=0", fileno($fuse));
my ($mount, $fs) = (`uname -m` =~ /x86_64/ ? 165 : 40, "fuse");
syscall($mount, my $source = "silent", $at, $fs, 0, $options) == 0 or die "mount: $!";
# struct fuse_in_header, fuse_out_header, and the bodies of linux/fuse.h
while (sysread($fuse, my $in, 1 << 17)) {
    my ($length, $call, $id) = unpack("L L Q", $in);
    next if $call == 2 || $call == 36;                                      # FORGET, INTERRUPT
    my ($error, $body) = (-38, "");
    ($error, $body) = (0, pack("L4 S2 L2 S2 L8", 7, 31, 0, 0, 1, 1, 4096, 1, 1, 0, (0) x 8)) if $call == 26;
    ($error, $body) = (0, pack("Q L2 Q6 L10", 3600, 0, 0, 1, 4096, 8, 0, 0, 0, 0, 0, 0, 0100644, 1, 0, 0, 0, 4096, 0))
        if $call == 3;
    ($error, $body) = (0, pack("Q L2", 0, 1, 0)) if $call == 14;           # OPEN: FOPEN_DIRECT_IO
    if ($call == 15) {
        open(my $file, ">", $begun) or die; close $file;
        sleep 6;
        ($error, $body) = (0, "x");
    }
    syswrite($fuse, pack("L l Q", 16 + length $body, $error, $id) . $body);
}
PERL
perl $d/fuse.pl $d/silent $d/begun & server=$!
until grep -q $d/silent /proc/self/mountinfo; do sleep 0.05; done
sh -c "exec head -c 1 $d/silent 3>$d/place/open" >/dev/null & caller=$!
until [ -e $d/begun ] && [ -e $d/place/open ]; do sleep 0.05; done
guard 2000
kill -0 $caller 2>/dev/null && echo lives || echo ended
umount -l $d/silent; kill $server 2>/dev/null || true
"#;

/// Appends to every file, until a write fails.
const WRITER: &str = "n=0
while :; do
    n=$((n+1))
    for v in /v/*; do
        head -c 16384 /dev/zero >>$v/lazy || exit 1
        echo line $n | dd of=$v/log oflag=append conv=notrunc,fsync 2>/dev/null || exit 1
    done
done";

/// Copies what there is when it starts, and goes on.
const TAKER: &str = "for v in /v/*; do cp $v/log $v/log.copy; cp $v/lazy $v/lazy.copy; done
    echo copied; exec sleep 3600";

struct World {
    nas: Ganesha,
    a: Host,
    b: Host,
}

impl World {
    fn path(&self, volume: &str, file: &str) -> PathBuf {
        self.nas.local(EXPORT).join(volume).join(file)
    }

    fn lines(&self) -> usize {
        let lines = |path| std::fs::read_to_string(path).map_or(0, |text| text.lines().count());
        let of = VOLUMES
            .iter()
            .map(|(name, _)| lines(self.path(name, "log")));
        of.min().unwrap_or(0)
    }

    /// Drops what comes from and goes to host a, or no longer.
    fn cut(&self, how: &str) -> Result {
        let a = self.a.node().ip();
        let script =
            format!("iptables {how} INPUT -s {a} -j DROP; iptables {how} OUTPUT -d {a} -j DROP");
        self.nas.node().sh(&script)?;
        Ok(())
    }

    fn is_running(&self, host: &Host, container: &str) -> bool {
        // One that waits for its restart counts as running, without a process.
        host.ok(&format!("inspect -f {{{{.State.Pid}}}} {container}"))
            .is_ok_and(|said| said != "0")
    }
}

/// What a script says of the volume's end with a fault put back, or none.
fn fenced(lab: &'static Lab, name: &str, script: &str, fault: &str) -> Result<String> {
    let node = Node::machine(lab, name)?;
    let binary = lab::Nfsvol::binary();
    node.sh(&format!(
        "NFSVOL={binary}; export NFSVOL_MUTANT={fault}\n{VOLUME}{script}"
    ))
}

fn guard(lab: &'static Lab) -> Result {
    let run = |name, script, fault| move || fenced(lab, name, script, fault);
    let all = thread::scope(|scope| {
        let runs = [
            ("guard", GUARD, ""),
            ("guard-main", GUARD, "MainThreadIsAll"),
            ("guard-no-root", NO_ROOT, ""),
            ("guard-no-root-before", NO_ROOT, "NothingThrownAwayIsDone"),
            ("guard-late-root", LATE_ROOT, ""),
        ];
        runs.map(|(name, script, fault)| scope.spawn(run(name, script, fault)))
            .map(|thread| thread.join().map_err(|_| anyhow!("a fence panicked")))
    });
    let [said, main, no_root, no_root_before, late_root] = all;
    let (in_time, no_troubles) = (r#""in_time":true"#, r#""troubles":[]"#);
    let main = main??;
    ensure!(main.contains("ended\nended\nended\nlives\nlives"), "{main}");
    let no_root = no_root??;
    ensure!(
        !no_root.contains(in_time) && !no_root.contains(no_troubles),
        "{no_root}"
    );
    for said in [no_root_before??, late_root??] {
        ensure!(
            said.contains(in_time) && said.contains(no_troubles),
            "{said}"
        );
    }
    let said = said??;
    let lines: Vec<&str> = said.lines().collect();
    // The answer at the start, the report, who lives, the mounts that are left, and how soon the kernel
    // kills a guard when memory is short: never.
    let [started, report, rest @ ..] = lines.as_slice() else {
        bail!("{said}");
    };
    ensure!(started.contains("Ok"), "{said}");
    for part in [in_time, no_troubles] {
        ensure!(report.contains(part), "{part}: {said}");
    }
    let lives = ["ended", "ended", "ended", "ended", "lives", "0", "-1000"];
    ensure!(*rest == lives, "{said}");
    Ok(())
}

fn engine(lab: &'static Lab) -> Result {
    let run = |name, fault| move || fenced(lab, name, ENGINE, fault);
    let [said, nested, own, binds] = thread::scope(|scope| {
        let faults = [
            ("engine", ""),
            ("engine-nested", "NestedEngineIsKilled"),
            ("engine-own", "OwnContainerIsKilled"),
            ("engine-binds", "BindsAreTheHosts"),
        ];
        faults
            .map(|(name, fault)| scope.spawn(run(name, fault)))
            .map(|thread| thread.join().map_err(|_| anyhow!("a fence panicked")))
    });
    let (said, nested, own, binds) = (said??, nested??, own??, binds??);
    let of_one = format!(r#""containers":["{:064}"]"#, 3);
    ensure!(said.contains(&of_one), "{said}");
    ensure!(said.ends_with("copied\nended\nended\nlives"), "{said}");
    ensure!(nested.contains("killed"), "{nested}");
    ensure!(!own.contains(&of_one), "{own}");
    ensure!(binds.ends_with("copied\nended\nlives\nlives"), "{binds}");
    Ok(())
}

fn call(lab: &'static Lab) -> Result {
    let (said, before) = thread::scope(|scope| {
        let before = scope.spawn(|| fenced(lab, "call-before", CALL, "KilledCallsAreOver"));
        (fenced(lab, "call", CALL, ""), before.join())
    });
    let said = said?;
    ensure!(said.ends_with("ended"), "{said}");
    // It says that it was too late, which it was.
    for part in [r#""in_time":false"#, r#""troubles":[]"#] {
        ensure!(said.contains(part), "{part}: {said}");
    }
    let before = before.map_err(|_| anyhow!("a fence panicked"))??;
    ensure!(before.contains(r#""in_time":true"#), "{before}");
    Ok(())
}

fn cut_off(lab: &'static Lab) -> Result {
    let nas = Ganesha::start_leasing(lab, "fence-nas", &[Export::new(EXPORT)], LONG_LEASE)?;
    let home = nas.share(EXPORT);
    let start = |name: &str| {
        let serve = ["--session", SESSION, "--mount-deadline", "110s"];
        Host::start_with(lab, name, DataPath::Kernel, &home, &serve, &[])
    };
    let (b, a) = thread::scope(|scope| {
        let a = scope.spawn(|| start("fence-a"));
        (start("fence-b"), a.join())
    });
    let (a, b) = (a.map_err(|_| anyhow!("a start panicked"))??, b?);
    let world = World { nas, a, b };
    let World { a, .. } = &world;

    let mut mounts = String::new();
    for (name, version) in VOLUMES {
        a.ok(&format!(
            "volume create -d nfsvol -o access=exclusive -o options=nfsvers={version} {name}"
        ))?;
        mounts.push_str(&format!(" -v {name}:/v/{name}"));
    }
    let options = format!("-d --name=writer --restart=always {mounts}");
    a.try_run(&options, WRITER)?.ok()?;
    wait_for("the container to write", PATIENCE, || world.lines() > 20)?;
    for (name, version) in VOLUMES {
        let status = &a.inspect(name)?["Status"];
        ensure!(
            status["data_path"] == "kernel" && status["nfs_version"] == version,
            "{status}"
        );
        ensure!(status["guard"]["watching"]["until"].is_u64(), "{status}");
    }

    a_dead_guard_is_replaced(&world)?;
    cut_and_taken_over(&world, &mounts, "taker", Daemon::Lives)?;
    goes_back(&world, "taker")?;
    // Guards need no daemon.
    cut_and_taken_over(&world, &mounts, "second-taker", Daemon::Dies)?;
    world.a.ok("rm -f writer")?;
    Ok(())
}

/// Whether the daemon of the host that is cut off sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Daemon {
    Lives,
    Dies,
}

/// Its volume has a new guard at the next renewals, while the container writes on.
fn a_dead_guard_is_replaced(world: &World) -> Result {
    let World { a, .. } = world;
    let (name, _) = VOLUMES[0];
    let guard = || {
        let guards = a.node().sh("pgrep -f '[k]ernel-guard' || true")?;
        Ok::<_, anyhow::Error>(guards.lines().map(str::to_owned).collect::<Vec<_>>())
    };
    let before = guard()?;
    ensure!(before.len() == VOLUMES.len(), "guards: {before:?}");
    a.node().sh(&format!("kill -9 {}", before.join(" ")))?;
    wait_for("new guards", PATIENCE, || {
        let watched = || {
            a.inspect(name)
                .is_ok_and(|v| v["Status"]["guard"]["watching"]["until"].is_u64())
        };
        guard().is_ok_and(|now| {
            now.len() == before.len() && now.iter().all(|pid| !before.contains(pid))
        }) && watched()
    })
    .with_context(|| format!("{before:?}, {:?}", guard()))?;
    let lines = world.lines();
    wait_for("the container to write on", PATIENCE, || {
        world.lines() > lines + 2
    })
}

/// The first host is cut off, the second one takes the volumes over, and when the first one is back
/// nothing of what it had under way is written.
fn cut_and_taken_over(world: &World, mounts: &str, taker: &str, daemon: Daemon) -> Result {
    let World { a, b, .. } = world;
    world.cut("-A")?;
    if daemon == Daemon::Dies {
        a.nfsvol().kill()?;
    }
    let began = Instant::now();
    b.try_run(&format!("-d --name={taker} {mounts}"), TAKER)?
        .ok()?;
    wait_for("the other host to read", PATIENCE, || {
        b.ok(&format!("logs {taker}"))
            .is_ok_and(|said| said == "copied")
    })?;
    let lasted = began.elapsed();
    lab::note(format!(
        "taken over {lasted:?} after the cut, by a container in a guest; the other's daemon {daemon:?}"
    ));
    lab::note(a.node().sh("cat /var/lib/nfsvol/guard/*/log")?);
    // The first host has let go, before the other one could have the volume.
    ensure!(!world.is_running(a, "writer"));
    let script = "grep -cF /shares/own. /proc/self/mountinfo || true";
    let mounted = a.node().sh(script)?;
    ensure!(mounted == "0", "{mounted} mounts are left");
    if daemon == Daemon::Dies {
        a.nfsvol().up()?;
    }
    let mut stopped = 0;
    for (name, _) in VOLUMES {
        let status = &a.inspect(name)?["Status"];
        let fenced = &status["fenced"];
        lab::note(format!("{name}: {fenced}"));
        ensure!(fenced["in_time"] == true, "{status}");
        ensure!(fenced["troubles"] == serde_json::json!([]), "{status}");
        stopped += fenced["containers"].as_array().map_or(0, Vec::len);
        ensure!(status["guard"].is_null(), "{status}");
    }
    ensure!(stopped > 0, "no fence tells of the container");

    world.cut("-D")?;
    thread::sleep(lasted + SLACK);
    for (name, _) in VOLUMES {
        for file in FILES {
            let taken = std::fs::read(world.path(name, &format!("{file}.copy")))?;
            let now = std::fs::read(world.path(name, file))?;
            ensure!(
                now == taken,
                "{name}/{file} has {} bytes, the other host took over {}",
                now.len(),
                taken.len()
            );
        }
        let refused = a.docker(&format!("volume rm {name}"))?.fails()?;
        ensure!(!refused.is_empty());
    }
    Ok(())
}

/// A clean stop hands over to the container that its restart policy has started again.
fn goes_back(world: &World, taker: &str) -> Result {
    let World { a, b, .. } = world;
    b.ok(&format!("stop -t 1 {taker}"))?;
    let lines = world.lines();
    let mut tried = Instant::now();
    wait_for("the first host to have it again", PATIENCE, || {
        // Its start was given up if the other host had the volume for long.
        if tried.elapsed() > AGAIN && !world.is_running(a, "writer") {
            tried = Instant::now();
            let _ = a.docker("start writer");
        }
        world.lines() > lines + 2
    })
}
