//! Exclusive volumes on the kernel data path: what the guard of one does when this host's right to
//! the volume has ended.

mod lab;

use std::process::ExitCode;

use anyhow::{bail, ensure};
use lab::{Lab, Node, Part, Result, trial};

fn main() -> ExitCode {
    lab::main(|| {
        vec![trial(
            "a_guard_ends_who_has_the_volume",
            &[Part::Root],
            guard,
        )]
    })
}

/// A file system in memory stands for the volume; its guard's right ends after two seconds.
const GUARD: &str = r#"
ip link set lo up
d=/run/guard; mkdir -p $d/share $d/place $d/run
mount -t tmpfs tmpfs $d/share; mkdir $d/share/db; mount --bind $d/share/db $d/place
device=$(awk -v at=$d/share '$5 == at { sub(":", ",\"minor\":", $3); print $3 }' /proc/self/mountinfo)
unshare -m --propagation private sh -c "mount --bind $d/place /mnt; umount $d/place $d/share
    while :; do echo x >>/mnt/log; sleep 0.01; done" & container=$!
sh -c "exec sleep 1000 3>$d/place/open" & host=$!
(cd $d/place; exec sleep 1000) & inside=$!
unshare -m --propagation slave sleep 1000 & service=$!
until [ -s $d/place/log ] && [ -e $d/place/open ]; do sleep 0.05; done
until=$(awk '{ printf "%d", ($1 + 2) * 1e9 }' /proc/uptime)
$NFSVOL kernel-guard <<TASK
{"volume":"db","place":"$d/place","share_place":"$d/share","device":{"major":$device},"server":"127.0.0.1:2049","docker":"/nowhere","run_dir":"$d/run","fence":{"until":$until,"under_way":60000}}
TASK
cat $d/run/fenced.json | tr -d ' \n'; echo
for pid in $container $host $inside $service; do
    kill -0 $pid 2>/dev/null && echo lives || echo ended
done
grep -c $d/ /proc/self/mountinfo || true
kill $service
"#;

fn guard(lab: &'static Lab) -> Result {
    let node = Node::machine(lab, "guard")?;
    let script = format!("NFSVOL={}\n{GUARD}", lab::Nfsvol::BINARY);
    let said = node.sh(&script)?;
    let lines: Vec<&str> = said.lines().collect();
    // The answer at the start, the report, who lives, and the mounts that are left.
    let [started, report, rest @ ..] = lines.as_slice() else {
        bail!("{said}");
    };
    ensure!(started.contains("Ok"), "{said}");
    for part in [r#""in_time":true"#, r#""troubles":[]"#] {
        ensure!(report.contains(part), "{part}: {said}");
    }
    ensure!(*rest == ["ended", "ended", "ended", "lives", "0"], "{said}");
    Ok(())
}
