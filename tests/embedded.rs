//! The embedded NFS server as a process: with the Linux kernel's NFS client, and with a daemon
//! that comes and goes.

use std::process::ExitCode;

use anyhow::{Context, ensure};
use lab::{Lab, Nfsvol, Node, PATIENCE, Part, Result, trial, wait_for};

fn main() -> ExitCode {
    lab::main!(|| {
        vec![
            trial("kernel_client", &[Part::Guest], kernel_client),
            trial("outlives_the_daemon", &[Part::Root], outlives_the_daemon),
            trial("is_started_again", &[Part::Root], is_started_again),
        ]
    })
}

/// What a kernel client does to a share, each line an assertion (`sh -e`).
const OPERATIONS: &str = r#"
umask 022
(set -C; echo one >exclusive); ! (set -C; echo two >exclusive) 2>/dev/null
test "$(cat exclusive)" = one
mkdir d; ! mkdir d 2>/dev/null
ln exclusive hard; test "$(stat -c %h hard)" = 2
ln -s exclusive symlink; test "$(cat symlink)" = one
mkfifo pipe; test -p pipe; mknod null c 1 3; test -c null
cp -a /usr/share/dpkg tree; diff -r /usr/share/dpkg tree; rm -rf tree
dd if=/dev/urandom of=big bs=1M count=16 conv=fsync status=none; md5sum big >sum
echo 3 >/proc/sys/vm/drop_caches; md5sum --quiet -c sum
truncate -s 5G sparse; echo end >>sparse; test "$(tail -c 4 sparse)" = end
test "$(stat -c %s sparse)" = 5368709124
chown 1000:100 exclusive; chmod 4751 exclusive; touch -d '2001-02-03 04:05:06.789' exclusive
test "$(stat -c '%a %u:%g %y' exclusive)" = '4751 1000:100 2001-02-03 04:05:06.789000000 +0000'
mkdir u; chown 1000:1000 u
as() { setpriv --reuid $1 --regid $1 --clear-groups sh -c "$2"; }
as 1000 'umask 077; echo mine >u/mine'; test "$(stat -c %u:%g:%a u/mine)" = 1000:1000:600
! as 1001 'cat u/mine' 2>/dev/null; ! as 1001 'rm -f u/mine' 2>/dev/null; test -e u/mine
! as 1000 'echo x >not-mine' 2>/dev/null
for i in $(seq 1000); do : >many.$i; done; test $(ls | grep -c many) = 1000; rm many.*
exec 5>unlinked; echo data >&5; rm unlinked; echo more >&5; exec 5>&-; ! ls -A | grep -q nfs
mkdir full; touch full/x; ! mv -T d full 2>/dev/null; mv d u/d; test -d u/d
"#;

fn kernel_client(lab: &'static Lab) -> Result {
    let nas = Node::machine(lab, "nas")?;
    nas.sh("mkdir -p /srv/share")?;
    let listen = format!("{}:111", nas.ip());
    let server = nas.spawn(
        "embedded-server",
        &[
            Nfsvol::binary(),
            "embedded-server",
            "--listen",
            &listen,
            "/srv/share",
        ],
    )?;
    server.wait_log("serving a local directory", PATIENCE)?;
    let guest = Node::guest(lab, "client")?;
    let mount = "nolock,vers=3,proto=tcp,mountproto=tcp,port=111,mountport=111";
    let share = format!("{}:/srv/share", nas.ip());
    guest.sh(&format!(
        "mkdir -p /tmp/n; mount -i -t nfs -o addr={},{mount} {share} /tmp/n",
        nas.ip()
    ))?;
    guest.sh(&format!("set -e; cd /tmp/n; {OPERATIONS}"))?;
    ensure!(nas.sh("cat /srv/share/hard")? == "one");
    // Another server process: what is mounted goes on, by the same handles.
    guest.sh(
        "(exec 5>/tmp/n/held; echo before >&5; until [ -e /tmp/go ]; do sleep 0.1; done
          echo after >&5; exec 5>&-; : >/tmp/done) >/dev/null 2>&1 </dev/null &
          until [ -e /tmp/n/held ]; do sleep 0.1; done",
    )?;
    server.stop()?;
    server.start()?;
    guest.sh("cat /tmp/n/hard; : >/tmp/go; until [ -e /tmp/done ]; do sleep 0.1; done")?;
    ensure!(nas.sh("cat /srv/share/held")? == "before\nafter");
    guest.sh("umount /tmp/n")?;
    Ok(())
}

fn daemon(node: &Node) -> Result<Nfsvol<'_>> {
    Nfsvol::start(node, &["--share=embedded:/srv/volumes"], &[])
}

/// The process id of the one embedded server on a node.
fn server_of(node: &Node) -> Result<u32> {
    let script = "cat /var/lib/nfsvol/embedded/*/server; pgrep -f '[n]fsvol embedded-server'";
    let mut found = String::new();
    wait_for("the embedded server", PATIENCE, || {
        found = node.sh(script).unwrap_or_default();
        found.lines().count() == 2 && found.starts_with("127.0.0.1:")
    })?;
    let pid = found.lines().nth(1).context("no process")?;
    Ok(pid.parse()?)
}

/// The daemon's way to the share works: its catalog is reached.
fn healthy(nfsvol: &Nfsvol<'_>) -> Result {
    wait_for("a healthy share", PATIENCE, || {
        let status = nfsvol.command(&["status"]).and_then(|output| output.ok());
        status.is_ok_and(|text| text.contains("healthy: true"))
    })
}

fn outlives_the_daemon(lab: &'static Lab) -> Result {
    let node = Node::machine(lab, "one")?;
    let nfsvol = daemon(&node)?;
    healthy(&nfsvol)?;
    let server = server_of(&node)?;
    for kill in [true, false] {
        if kill {
            nfsvol.kill()?;
        } else {
            nfsvol.process().stop()?;
        }
        ensure!(server_of(&node)? == server);
        nfsvol.up()?;
        healthy(&nfsvol)?;
        ensure!(server_of(&node)? == server, "a second server was started");
    }
    Ok(())
}

fn is_started_again(lab: &'static Lab) -> Result {
    let node = Node::machine(lab, "two")?;
    let nfsvol = daemon(&node)?;
    healthy(&nfsvol)?;
    let (server, address) = (server_of(&node)?, "cat /var/lib/nfsvol/embedded/*/server");
    let before = node.sh(address)?;
    node.sh(&format!("kill -KILL {server}"))?;
    wait_for("another server", PATIENCE, || {
        server_of(&node).is_ok_and(|now| now != server)
    })?;
    // Workers and mounts reconnect to the address that they know.
    ensure!(node.sh(address)? == before);
    healthy(&nfsvol)
}
