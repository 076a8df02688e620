//! Two hosts with one share: what close-to-open promises, and what NFS needs care for.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lab::{Export, Ganesha, Lab, PATIENCE, Result, wait_for};
use libtest_mimic::Trial;
use nfsvol::doors::volume::Right;
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_NOW, utimensat};

use crate::{EXPORT, Host, fuse_trial, nas};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        fuse_trial("close_to_open_between_hosts", close_to_open),
        fuse_trial("appends_of_two_hosts_in_turn_are_all_there", appends),
        fuse_trial("appends_overtaken_by_looks_are_all_there", watched_appends),
        fuse_trial("own_calls_hide_no_change_of_another_host", hidden_changes),
        fuse_trial("a_replaced_file_is_found_by_open", replaced),
        fuse_trial(
            "an_open_reader_sees_changes_within_the_cache_time",
            long_reader,
        ),
        fuse_trial("own_writes_do_not_drop_own_pages", own_writes),
        fuse_trial("exclusive_create_has_one_winner", exclusive),
        fuse_trial(
            "a_file_is_replaced_while_others_open_it",
            opened_while_replaced,
        ),
        fuse_trial("link_counts_are_those_of_names", link_counts),
        fuse_trial("set_id_files_are_written_by_others", set_id),
        fuse_trial("deleted_open_files_live_until_closed", deleted_open),
        fuse_trial("mapped_writes_reach_the_server", mapped),
        fuse_trial("maps_without_attribute_caches", uncached_maps),
        fuse_trial("direct_io_is_on_the_server_when_it_returns", direct),
        fuse_trial("a_listing_goes_on_while_the_directory_changes", listing),
        fuse_trial("rights_are_the_servers", rights),
        fuse_trial("where_the_server_squashes_it_decides", squashed),
        fuse_trial("a_right_to_send_is_measured_by_any_kernels_clock", right),
        fuse_trial(
            "an_attach_is_idempotent_and_a_detach_complete",
            attach_detach,
        ),
    ]
}

fn two(lab: &'static Lab, name: &str) -> Result<(Host, Host)> {
    let nas = nas(lab)?;
    Ok((Host::mount(nas, name, "")?, Host::mount(nas, name, "")?))
}

fn close_to_open(lab: &'static Lab) -> Result {
    let (a, b) = two(lab, "cto")?;
    let (at_a, at_b) = (a.join("file"), b.join("file"));
    for round in 0..50u32 {
        // Same length most of the time: only the times tell.
        let text = format!("round {:06} {}", round, "x".repeat(round as usize / 10));
        let (from, to) = if round % 2 == 0 {
            (&at_a, &at_b)
        } else {
            (&at_b, &at_a)
        };
        fs::write(from, &text)?;
        let seen = fs::read_to_string(to)?;
        ensure!(seen == text, "round {round}: {seen:?} instead of {text:?}");
        let size = File::open(to)?.metadata()?.size();
        ensure!(size == text.len() as u64, "round {round}: size {size}");
    }
    Ok(())
}

fn appends(lab: &'static Lab) -> Result {
    let (a, b) = two(lab, "append")?;
    let mut expected = String::new();
    for round in 0..40 {
        let host = if round % 2 == 0 { &a } else { &b };
        let line = format!("line {round} {}\n", "y".repeat(round));
        let mut file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(host.join("log"))?;
        for part in line.as_bytes().chunks(7) {
            file.write_all(part)?;
        }
        drop(file);
        expected.push_str(&line);
    }
    ensure!(fs::read_to_string(a.join("log"))? == expected);
    ensure!(fs::read_to_string(b.join("log"))? == expected);
    Ok(())
}

/// A log is appended to, made durable, and cut now and then, as databases do, while others ask for its
/// size all the time: an answer from before a line must not put the next one in that line's place.
fn watched_appends(lab: &'static Lab) -> Result {
    const ROUNDS: usize = 40;
    const LINES: usize = 100;
    let host = Host::mount(nas(lab)?, "watched", "noac")?;
    let path = host.join("log");
    let mut log = OpenOptions::new().append(true).create(true).open(&path)?;
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let _ = fs::metadata(&path);
                }
            });
        }
        let written = (0..ROUNDS).try_for_each(|round| {
            log.set_len(0)?;
            let mut expected = String::new();
            for line in 0..LINES {
                let line = format!("{round:03} {line:03}\n");
                log.write_all(line.as_bytes())?;
                log.sync_data()?;
                expected.push_str(&line);
            }
            let there = fs::read_to_string(nas(lab)?.local(EXPORT).join("watched/log"))?;
            ensure!(there == expected, "round {round}:\n{there}");
            Ok(())
        });
        over.store(true, Ordering::Relaxed);
        written
    })
}

/// Another host writes, and then this host does something to the file that brings its attributes.
fn hidden_changes(lab: &'static Lab) -> Result {
    type Call = fn(&Path) -> Result;
    let calls: [(&str, Call); 5] = [
        ("chmod", |path| {
            Ok(fs::set_permissions(path, PermissionsExt::from_mode(0o600))?)
        }),
        ("chown", |path| Ok(chown(path, Some(7), Some(8))?)),
        ("utimes", |path| {
            let now = Timespec {
                tv_sec: 0,
                tv_nsec: UTIME_NOW,
            };
            let times = Timestamps {
                last_access: now,
                last_modification: now,
            };
            Ok(utimensat(CWD, path, &times, AtFlags::empty())?)
        }),
        ("truncate", |path| {
            let mut command = std::process::Command::new("python3");
            command.args(["-c", "import os, sys; os.truncate(sys.argv[1], 5)"]);
            let status = command.arg(path).status()?;
            ensure!(status.success(), "{status}");
            Ok(())
        }),
        ("link", |path| {
            Ok(fs::hard_link(path, path.with_extension("twin"))?)
        }),
    ];
    let (a, b) = two(lab, "hidden")?;
    for (name, call) in calls {
        let (at_a, at_b) = (a.join(name), b.join(name));
        fs::write(&at_a, "old1\n")?;
        ensure!(fs::read(&at_a)? == b"old1\n");
        // Beyond one tick of the server's clock.
        thread::sleep(Duration::from_millis(50));
        fs::write(&at_b, "new1\n")?;
        call(&at_a)?;
        let seen = fs::read_to_string(&at_a)?;
        ensure!(seen == "new1\n", "after {name}: {seen:?}");
    }
    Ok(())
}

fn replaced(lab: &'static Lab) -> Result {
    let (a, b) = two(lab, "replaced")?;
    for round in 0..10 {
        let text = format!("version {round}");
        fs::write(a.join("config.new"), &text)?;
        fs::rename(a.join("config.new"), a.join("config"))?;
        ensure!(
            fs::read_to_string(b.join("config"))? == text,
            "round {round}"
        );
    }
    fs::remove_file(a.join("config"))?;
    ensure!(fs::read(b.join("config")).is_err());
    Ok(())
}

fn long_reader(lab: &'static Lab) -> Result {
    let (a, b) = two(lab, "reader")?;
    fs::write(a.join("file"), "old")?;
    let reader = File::open(b.join("file"))?;
    let mut seen = [0; 3];
    reader.read_exact_at(&mut seen, 0)?;
    ensure!(&seen == b"old");
    fs::write(a.join("file"), "new")?;
    let changed = Instant::now();
    // acregmin is 3 s; what is not looked at again then is trusted for acregmax, a minute.
    while &seen != b"new" {
        ensure!(
            changed.elapsed() < Duration::from_secs(30),
            "still {seen:?}"
        );
        thread::sleep(Duration::from_millis(200));
        reader.read_exact_at(&mut seen, 0)?;
    }
    Ok(())
}

/// Reads served by the worker, as against those from the kernel's page cache, show in its count.
fn own_writes(lab: &'static Lab) -> Result {
    let host = Host::mount(nas(lab)?, "ownwrites", "")?;
    let path = host.join("file");
    fs::write(&path, vec![7; 1 << 20])?;
    let mut file = OpenOptions::new().read(true).write(true).open(&path)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let before = host.status()?.traffic;
    for page in 0..200u8 {
        file.write_all_at(&[page; 4096], u64::from(page) * 4096)?;
    }
    file.sync_all()?;
    bytes.clear();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut bytes)?;
    ensure!(bytes.len() == 1 << 20 && bytes[4096] == 1);
    drop(file);
    ensure!(fs::read(&path)? == bytes);
    let after = host.status()?.traffic;
    ensure!(
        after.writes - before.writes == 200 && after.reads == before.reads,
        "{before:?} {after:?}"
    );
    Ok(())
}

fn exclusive(lab: &'static Lab) -> Result {
    let (a, b) = two(lab, "exclusive")?;
    for round in 0..30 {
        let name = format!("lock{round}");
        let (at_a, at_b) = (a.join(&name), b.join(&name));
        let make = |path: &Path| {
            OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o640)
                .open(path)
        };
        let (one, other) = thread::scope(|scope| {
            let one = scope.spawn(|| make(&at_a));
            let other = make(&at_b);
            (one.join(), other)
        });
        let one = one.map_err(|_| anyhow::anyhow!("a thread panicked"))?;
        ensure!(
            one.is_ok() != other.is_ok(),
            "round {round}: {one:?} {other:?}"
        );
        let loser = one.err().or_else(|| other.err()).context("no loser")?;
        ensure!(loser.raw_os_error() == Some(libc::EEXIST), "{loser}");
        // Either host may have seen it, and remember it, before the winner set its mode.
        let made = fs::metadata(nas(lab)?.local(EXPORT).join("exclusive").join(&name))?;
        ensure!(made.mode() & 0o777 == 0o640 && made.size() == 0);
        let age = made.modified()?.elapsed().unwrap_or_default();
        ensure!(age < PATIENCE, "mtime {age:?} ago");
    }
    Ok(())
}

//= test 1813-3.3.14-atomic
fn opened_while_replaced(lab: &'static Lab) -> Result {
    const OPENS: usize = 3000;
    let host = Host::mount(nas(lab)?, "reopened", "")?;
    let (path, new) = (host.join("file"), host.join("file.new"));
    let put = |version: usize| -> Result {
        fs::write(&new, format!("{version}").repeat(100))?;
        Ok(fs::rename(&new, &path)?)
    };
    put(0)?;
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            (1..)
                .take_while(|_| !over.load(Ordering::Relaxed))
                .try_for_each(put)
        });
        let failed: Vec<_> = (0..OPENS)
            .filter_map(|_| {
                File::open(&path)
                    .and_then(|mut file| file.read(&mut [0; 200]))
                    .err()
            })
            .collect();
        over.store(true, Ordering::Relaxed);
        writer.join().map_err(|_| anyhow::anyhow!("a panic"))??;
        ensure!(failed.is_empty(), "{} of {OPENS}: {failed:?}", failed.len());
        Ok(())
    })
}

fn link_counts(lab: &'static Lab) -> Result {
    let host = Host::mount(nas(lab)?, "links", "")?;
    let at = |name: &str| host.join(name);
    let links = |name: &str| -> Result<u64> { Ok(fs::metadata(at(name))?.nlink()) };
    fs::write(at("a"), "text")?;
    fs::hard_link(at("a"), at("b"))?;
    ensure!((links("a")?, links("b")?) == (2, 2), "linked");
    fs::write(at("c"), "more")?;
    fs::rename(at("c"), at("b"))?;
    ensure!(links("a")? == 1, "the twin was replaced: {}", links("a")?);
    fs::hard_link(at("a"), at("d"))?;
    fs::rename(at("a"), at("d"))?; // two names of one file: nothing happens
    ensure!((links("a")?, links("d")?) == (2, 2), "renamed over itself");
    fs::remove_file(at("d"))?;
    ensure!(links("a")? == 1, "the twin was removed");
    // While it is open, the hidden name counts as none.
    fs::hard_link(at("a"), at("e"))?;
    let open = File::open(at("a"))?;
    fs::remove_file(at("a"))?;
    let seen = (open.metadata()?.nlink(), links("e")?);
    ensure!(seen == (1, 1), "the open twin was removed: {seen:?}");
    drop(open);
    // A close ends before what follows it: the removal of the hidden name, and word of that.
    wait_for("one name to be left", PATIENCE, || {
        let names = fs::read_dir(&*host).map(Iterator::count);
        names.is_ok_and(|names| names == 2) && links("e").is_ok_and(|links| links == 1)
    })?;
    let open = File::open(at("e"))?;
    fs::rename(at("b"), at("e"))?;
    ensure!(open.metadata()?.nlink() == 0, "no name is left");
    Ok(())
}

fn set_id(lab: &'static Lab) -> Result {
    let host = Host::mount(nas(lab)?, "setid", "")?;
    host.script(
        "as() { setpriv --reuid=1000 --regid=1000 --clear-groups sh -c \"$*\"; }
for change in 'echo x >f' 'echo x >>f' 'dd if=/dev/zero of=f bs=1 count=1 conv=notrunc' \
    'truncate -s 0 f'; do
    echo text >f; chown 0:1000 f; chmod 4770 f; as \"$change\"
done",
    )
}

//= test 1813-3.3.12-open
fn deleted_open(lab: &'static Lab) -> Result {
    let (a, b) = two(lab, "deleted")?;
    let contents = |file: &File| -> Result<String> {
        let mut text = String::new();
        (&*file).seek(SeekFrom::Start(0))?;
        (&*file).read_to_string(&mut text)?;
        Ok(text)
    };
    // Removed.
    fs::write(a.join("one"), "one")?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(a.join("one"))?;
    fs::remove_file(a.join("one"))?;
    ensure!(!a.join("one").exists());
    (&file).write_all(b"ONE")?;
    file.sync_all()?;
    ensure!(contents(&file)? == "ONE");
    // Replaced, under a name that it got after it was opened by another.
    fs::write(a.join("two"), "two")?;
    fs::rename(a.join("two"), a.join("three"))?;
    let second = File::open(a.join("three"))?;
    fs::write(a.join("new"), "new")?;
    fs::rename(a.join("new"), a.join("three"))?;
    ensure!(contents(&second)? == "two");
    ensure!(fs::read_to_string(a.join("three"))? == "new");
    // Two names, both removed.
    fs::write(a.join("four"), "four")?;
    fs::hard_link(a.join("four"), a.join("five"))?;
    let third = File::open(a.join("five"))?;
    fs::remove_file(a.join("four"))?;
    fs::remove_file(a.join("five"))?;
    ensure!(contents(&third)? == "four");
    let hidden = || -> Result<usize> {
        Ok(fs::read_dir(&*b)?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.starts_with(".nfs"))
            .count())
    };
    ensure!(hidden()? == 3, "{} hidden files", hidden()?);
    drop((file, second, third));
    let closed = Instant::now();
    while hidden()? > 0 {
        ensure!(closed.elapsed() < PATIENCE, "left behind");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn mapped(lab: &'static Lab) -> Result {
    let (a, b) = two(lab, "mapped")?;
    // `memmap` in Python: a mapping needs unsafe code in Rust.
    let script = format!(
        "import mmap
f = open({path:?}, 'w+b'); f.truncate(1 << 20)
m = mmap.mmap(f.fileno(), 0)
for i in range(0, 1 << 20, 5000): m[i:i+4] = b'map!'
m.flush()
assert open({other:?}, 'rb').read()[5000:5004] == b'map!', 'after msync'
m[0:4] = b'last'
m.close(); f.close()
assert open({other:?}, 'rb').read()[0:4] == b'last', 'after close'",
        path = a.join("file"),
        other = b.join("file"),
    );
    lab_python(&script)
}

/// Maps, reads, writes and another host's writes agree at once, and a database that maps works.
fn uncached_maps(lab: &'static Lab) -> Result {
    let nas = nas(lab)?;
    let (a, b) = (
        Host::mount(nas, "uncached", "actimeo=0")?,
        Host::mount(nas, "uncached", "actimeo=0")?,
    );
    let script = format!(
        "import mmap, os, sqlite3, time
f = open({path:?}, 'w+b', 0); f.truncate(1 << 16); fd = f.fileno()
m = mmap.mmap(fd, 0)
m[0:4] = b'map!'; m.flush()
assert os.pread(fd, 4, 0) == b'map!', 'read behind a map'
assert open({other:?}, 'rb').read(4) == b'map!', 'another host behind a map'
os.pwrite(fd, b'write', 8192)
assert m[8192:8197] == b'write', 'map behind a write'
for round in range(5):
    time.sleep(0.02)
    text = b'other%d' % round
    with open({other:?}, 'r+b') as o: o.seek(4096); o.write(text)
    seen = os.pread(fd, 6, 4096)
    assert seen == text, seen
m.close(); f.close()
db = sqlite3.connect({db:?})
assert db.execute('pragma journal_mode=wal').fetchone() == ('wal',)
db.execute('create table t (v)')
with db: db.executemany('insert into t values (?)', [(n,) for n in range(1000)])
assert db.execute('select count(*) from t').fetchone() == (1000,)
assert db.execute('pragma integrity_check').fetchone() == ('ok',)",
        path = a.join("file"),
        other = b.join("file"),
        db = a.join("t.db"),
    );
    lab_python(&script)
}

fn lab_python(script: &str) -> Result {
    let output = std::process::Command::new("python3")
        .args(["-c", script])
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{said}");
    Ok(())
}

fn direct(lab: &'static Lab) -> Result {
    let nas = nas(lab)?;
    let host = Host::mount(nas, "direct", "")?;
    let local = nas.local(EXPORT).join("direct/file");
    let script = format!(
        "import mmap, os
fd = os.open({path:?}, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
out = mmap.mmap(-1, 3 << 20); back = mmap.mmap(-1, 3 << 20)
for i in range(0, 3 << 20, 4096): out[i:i+4096] = bytes([i // 4096 % 251]) * 4096
for at in (0, 3 << 20, 1 << 20):
    assert os.pwrite(fd, out, at) == 3 << 20
    assert open({local:?}, 'rb').read()[at:at + (3 << 20)] == out[:], 'not on the server'
    assert os.preadv(fd, [back], at) == 3 << 20 and back[:] == out[:], 'read back'
buffered = open({path:?}, 'rb').read()
assert len(buffered) == 6 << 20 and buffered[1 << 20:4 << 20] == out[:], 'buffered'",
        path = host.join("file"),
    );
    lab_python(&script)
}

fn listing(lab: &'static Lab) -> Result {
    const FILES: usize = 100_000;
    let nas = nas(lab)?;
    let host = Host::mount(nas, "listing", "")?;
    let local = nas.local(EXPORT).join("listing");
    for i in 0..FILES {
        File::create(local.join(format!("file-{i:06}")))?;
    }
    let mut seen = std::collections::HashMap::new();
    for (index, entry) in fs::read_dir(&*host)?.enumerate() {
        let name = entry?.file_name().into_string().unwrap_or_default();
        *seen.entry(name).or_insert(0u32) += 1;
        if index.is_multiple_of(1000) {
            // Half of what is there stays, the rest comes and goes meanwhile.
            let at = index / 1000 * 400;
            for i in (at..at + 400).filter(|i| !i.is_multiple_of(2)) {
                let _ = fs::remove_file(local.join(format!("file-{i:06}")));
                File::create(local.join(format!("new-{i:06}")))?;
            }
        }
    }
    let stable = |i: usize| i.is_multiple_of(2) || i >= FILES / 1000 * 400;
    for i in (0..FILES).filter(|i| stable(*i)) {
        let count = seen.get(&format!("file-{i:06}")).copied().unwrap_or(0);
        ensure!(count == 1, "file-{i:06} was listed {count} times");
    }
    ensure!(
        seen.values().all(|count| *count == 1),
        "something was listed twice"
    );
    Ok(())
}

fn rights(lab: &'static Lab) -> Result {
    let nas = nas(lab)?;
    let host = Host::mount(nas, "rights", "")?;
    host.script(
        "as() { ids=$1; shift; setpriv --reuid=$ids --regid=$ids --groups=$G sh -c \"$*\"; }
mkdir -m 0770 team; chown 0:4711 team
echo secret >own; chmod 0600 own; chown 1000:1000 own
G=4711; as 1000 'echo hi >team/file; cat own >/dev/null'
[ $(stat -c %u:%g team/file) = 1000:1000 ]
G=4712; as 1001 'cat own' 2>/dev/null && exit 1
as 1001 'ls team' 2>/dev/null && exit 1
as 1001 'cat team/file' 2>/dev/null && exit 1
G=4711; as 1001 'cat team/file' >/dev/null
chmod 4755 team/file; cp /bin/sleep suid; chmod 4755 suid
grep \" $place \" /proc/self/mountinfo | grep -q nosuid",
    )
}

/// The home NAS's default: everybody is one user to the server. What it lets this user do,
/// everybody may do, as with the kernel's client.
fn squashed(lab: &'static Lab) -> Result {
    /// nfs-ganesha's default, -2.
    const ANONYMOUS: u32 = 0xffff_fffe;
    let exports = [Export::new(EXPORT).squash("all_squash")];
    let nas = Ganesha::start(lab, "squashnas", &exports)?;
    let dir = nas.local(EXPORT).join("shared");
    fs::create_dir_all(&dir)?;
    chown(&dir, Some(ANONYMOUS), Some(ANONYMOUS))?;
    fs::set_permissions(&dir, PermissionsExt::from_mode(0o755))?;
    let host = Host::mount(&nas, "shared", "")?;
    host.script(
        "as() { setpriv --reuid=$1 --regid=$1 --clear-groups sh -c \"$2\"; }
as 1000 'echo a >f; echo b >>f; chmod 600 f; mkdir -m 0700 d; echo c >d/g'
as 1001 'cat f d/g; echo d >>f; ls d'
[ $(cat f | wc -l) = 3 ]
as 1000 'umask 0377; echo e >once; cat once'
install -m 0400 /bin/true program
cp /bin/true run; chmod 0711 run; as 1000 ./run",
    )
}

/// Of an exclusive volume the worker may send until then; some kernels have no vDSO to ask for the time.
fn right(lab: &'static Lab) -> Result {
    let host = Host::mount(nas(lab)?, "right", "")?;
    host.detach()?;
    let uptime = fs::read_to_string("/proc/uptime")?;
    let uptime: u64 = uptime.split('.').next().context("no uptime")?.parse()?;
    let mut attach = host.attach.clone();
    attach.fence = Some(Right {
        until: (uptime + 3600) * 1_000_000_000,
        under_way: 1000,
    });
    let deadline = Instant::now() + crate::ATTACH;
    host.runtime.block_on(host.path.attach(attach, deadline))?;
    fs::write(host.join("file"), "written")?;
    ensure!(fs::read_to_string(host.join("file"))? == "written");
    Ok(())
}

fn attach_detach(lab: &'static Lab) -> Result {
    let host = Host::mount(nas(lab)?, "twice", "acregmin=1")?;
    let pid = host.status()?.pid;
    fs::write(host.join("file"), "text")?;
    let deadline = Instant::now() + crate::ATTACH;
    host.runtime
        .block_on(host.path.attach(host.attach.clone(), deadline))?;
    ensure!(host.status()?.pid == pid, "a second worker");
    let mut other = host.attach.clone();
    other.options.acregmin = 2;
    let error = host.runtime.block_on(host.path.attach(other, deadline));
    ensure!(error.is_err(), "other options were taken");
    // Held in another mount namespace, as a container does.
    let mut holder = std::process::Command::new("unshare")
        .args(["-m", "--propagation", "private", "sh", "-c"])
        .arg(format!(
            "cd {dir}; echo ready; read go; echo more >>file && cat file",
            dir = host.display()
        ))
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()?;
    let mut told = holder.stdout.take().context("no stdout")?;
    let mut ready = [0; 6];
    told.read_exact(&mut ready)?;
    ensure!(&ready == b"ready\n");
    host.detach()?;
    ensure!(host.path.mounted().is_empty());
    ensure!(host.status().is_err(), "a worker still serves the host");
    ensure!(
        Path::new(&format!("/proc/{pid}")).exists(),
        "the holder lost its worker"
    );
    // A new attachment gets a new worker beside it.
    host.runtime
        .block_on(host.path.attach(host.attach.clone(), deadline))?;
    ensure!(host.status()?.pid != pid);
    holder
        .stdin
        .take()
        .context("no stdin")?
        .write_all(b"go\n")?;
    let said = std::io::read_to_string(told)?;
    ensure!(holder.wait()?.success() && said == "textmore\n", "{said}");
    let ended = Instant::now();
    while fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty()) {
        ensure!(ended.elapsed() < PATIENCE, "the worker does not end");
        thread::sleep(Duration::from_millis(50));
    }
    ensure!(fs::read_to_string(host.join("file"))? == "textmore\n");
    Ok(())
}
