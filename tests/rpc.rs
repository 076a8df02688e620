//! The NFSv3 client of the FUSE data path against real servers: nfs-ganesha and the Linux
//! kernel's.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::Bytes;
use lab::{Export, Ganesha, Knfsd, Lab, Part, Proxy, Result, Shared, trial};
use nfs::rpc::connector::TcpConnector;
use nfs::rpc::mountd::{MountError, Mountd, Ports};
use nfs::rpc::nfs3::{
    FileHandle, FileKind, How, Nfs3, Nfs3Status, Node, SetAttr, SetTime, Stable, Time, access,
};
use nfs::rpc::{Cred, Settings};
use tokio::task::JoinSet;

const EXPORT: &str = "/srv/export";
const BLOCK: u32 = 64 * 1024;

fn main() -> ExitCode {
    lab::main!(|| {
        vec![
            trial("procedures_on_ganesha", &[Part::Ganesha], |lab| {
                let nas = nas(lab)?;
                run(procedures(&nas.ip(), EXPORT))?
            }),
            trial("procedures_on_knfsd", &[Part::Knfsd, Part::Guest], |lab| {
                let server = Knfsd::start(lab, "knfsd", "1G")?;
                run(procedures(&server.ip(), lab::knfsd::EXPORT))?
            }),
            trial("exports_that_are_not_there", &[Part::Ganesha], |lab| {
                let nas = nas(lab)?;
                let refused = run(mount(&nas.ip(), "/srv/nowhere"))?;
                let error = refused.err().context("an export that is not there")?;
                let error = error.downcast::<MountError>()?;
                ensure!(error.errno() != 0 && error.to_string().contains("/srv/nowhere"));
                Ok(())
            }),
            trial("writes_outlast_resets", &[Part::Ganesha], |lab| {
                outlast(lab, "resets", |proxy, _| {
                    for _ in 0..20 {
                        std::thread::sleep(Duration::from_millis(100));
                        proxy.reset()?;
                    }
                    Ok(())
                })
            }),
            trial("writes_outlast_silence", &[Part::Ganesha], |lab| {
                outlast(lab, "silence", |proxy, _| {
                    std::thread::sleep(Duration::from_millis(200));
                    proxy.silence(true);
                    std::thread::sleep(Duration::from_secs(30));
                    proxy.silence(false);
                    Ok(())
                })
            }),
            trial("writes_outlast_a_killed_server", &[Part::Ganesha], |lab| {
                outlast(lab, "kill", |_, nas| {
                    std::thread::sleep(Duration::from_millis(200));
                    nas.kill()?;
                    nas.up()
                })
            }),
        ]
    })
}

static NAS: Shared<Ganesha> = Shared::new();

fn nas(lab: &'static Lab) -> Result<&'static Ganesha> {
    NAS.get(|| Ganesha::start(lab, "nas", &[Export::new(EXPORT)]))
}

/// Runs a trial's asynchronous part. One runtime for all, since connections belong to theirs.
fn run<T>(work: impl Future<Output = T>) -> Result<T> {
    static RUNTIME: Shared<tokio::runtime::Runtime> = Shared::new();
    let runtime = RUNTIME.get(|| {
        Ok(tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?)
    })?;
    Ok(runtime.block_on(work))
}

/// A client of an export, whose ports the server's port mapper tells.
async fn mount(ip: &str, export: &str) -> Result<(Nfs3, FileHandle)> {
    let mut settings = Settings::new(SocketAddr::new(ip.parse()?, 0));
    settings.io_timeout = Some(Duration::from_secs(120));
    let mountd = Mountd::new(&settings, || TcpConnector::new(true));
    let ports = Ports::default();
    let root = mountd.mount(ports, export).await?.root;
    settings.addr.set_port(mountd.nfs_port(ports).await?);
    mountd.unmount(ports, export).await?;
    Ok((Nfs3::connect(settings).await?, root))
}

async fn procedures(ip: &str, export: &str) -> Result {
    let (nfs, root) = mount(ip, export).await?;
    nfs.null().await?;
    let cred = Cred::root();
    let set = |mode| SetAttr {
        mode: Some(mode),
        ..SetAttr::default()
    };
    let made = nfs.mkdir(&cred, &root, b"procedures", &set(0o777)).await?;
    let dir = made.handle.context("MKDIR gave no handle")?;
    let again = nfs.mkdir(&cred, &root, b"procedures", &set(0o777)).await;
    ensure!(again.err().and_then(|e| e.status()) == Some(Nfs3Status::NFS3ERR_EXIST));

    // What a user makes is the user's, and a group's rights are those of its members.
    let user = Cred {
        uid: 1234,
        gid: 1235,
        groups: Arc::from([4000, 4001]),
    };
    let file = nfs
        .create(&user, &dir, b"file", How::Exclusive([3; 8]))
        .await?;
    let file = file.handle.context("CREATE gave no handle")?;
    let repeated = nfs
        .create(&user, &dir, b"file", How::Exclusive([3; 8]))
        .await?;
    ensure!(repeated.handle == Some(file), "the same verifier");
    let other = nfs
        .create(&user, &dir, b"file", How::Exclusive([4; 8]))
        .await;
    ensure!(other.err().and_then(|e| e.status()) == Some(Nfs3Status::NFS3ERR_EXIST));
    let time = Time {
        secs: 1_234_567_890,
        nanos: 123_456_789,
    };
    let all = SetAttr {
        mode: Some(0o640),
        mtime: SetTime::To(time),
        atime: SetTime::Server,
        ..SetAttr::default()
    };
    nfs.setattr(&user, &file, &all, None).await?;
    nfs.setattr(
        &cred,
        &file,
        &SetAttr {
            gid: Some(4001),
            ..SetAttr::default()
        },
        None,
    )
    .await?;
    let attr = nfs.getattr(&user, &file).await?;
    ensure!(attr.kind == FileKind::Regular && attr.mode == 0o640);
    ensure!((attr.uid, attr.gid, attr.mtime) == (1234, 4001, time));
    let stale = Time::default();
    let guarded = nfs.setattr(&user, &file, &set(0o600), Some(stale)).await;
    ensure!(guarded.err().and_then(|e| e.status()) == Some(Nfs3Status::NFS3ERR_NOT_SYNC));
    let member = Cred {
        uid: 99,
        gid: 99,
        groups: Arc::from([7, 4001]),
    };
    let granted = nfs.access(&member, &file, access::READ | access::MODIFY);
    ensure!(granted.await?.granted == access::READ);
    let stranger = nfs.access(&Cred::new(99, 99), &file, access::READ).await?;
    ensure!(stranger.granted == 0);

    // Data, beyond 4 GiB too. A WRITE above `wtmax` would cost the connection.
    let info = nfs.fsinfo(&cred, &root).await?;
    let far = 5 << 30;
    ensure!(info.rtmax >= 4096 && info.wtmax >= 4096 && info.max_file_size > far);
    let length = info.wtmax.min(100_003);
    let data: Bytes = (0..length).map(|n| n.to_be_bytes()[3]).collect();
    for stable in [Stable::Unstable, Stable::DataSync, Stable::FileSync] {
        let written = nfs.write(&user, &file, far, data.clone(), stable).await?;
        ensure!(written.count == length && written.committed >= stable);
        nfs.commit(&user, &file, 0, 0).await?;
    }
    let read = nfs.read(&user, &file, far, 1 << 20).await?;
    ensure!(read.data == data && read.eof);
    let hole = nfs.read(&user, &file, 1 << 30, 4096).await?;
    ensure!(hole.data.iter().all(|byte| *byte == 0) && !hole.eof);

    // Names.
    let link = nfs
        .symlink(&cred, &dir, b"link", b"some/\xff/where", &set(0o777))
        .await?;
    let link = link.handle.context("SYMLINK gave no handle")?;
    ensure!(nfs.readlink(&cred, &link).await?.target.as_ref() == b"some/\xff/where");
    nfs.link(&cred, &file, &dir, b"second").await?;
    ensure!(nfs.getattr(&cred, &file).await?.nlink == 2);
    let fifo = nfs
        .mknod(&cred, &dir, b"fifo", Node::Fifo, &set(0o600))
        .await?;
    ensure!(fifo.attr.map(|attr| attr.kind) == Some(FileKind::Fifo));
    let device = Node::CharDevice(1, 3);
    nfs.mknod(&cred, &dir, b"null", device, &set(0o600)).await?;
    let found = nfs.lookup(&cred, &dir, b"null").await?;
    let attr = nfs.getattr(&cred, &found.handle).await?;
    ensure!(attr.kind == FileKind::CharDevice && attr.rdev == (1, 3));
    let (from, to) = ((&dir, b"second".as_ref()), (&root, b"moved".as_ref()));
    nfs.rename(&cred, from, to, Some(&file)).await?;
    nfs.remove(&cred, &root, b"moved").await?;
    let gone = nfs.remove(&cred, &root, b"moved").await;
    ensure!(gone.err().and_then(|e| e.status()) == Some(Nfs3Status::NFS3ERR_NOENT));
    let full = nfs.rmdir(&cred, &root, b"procedures").await;
    ensure!(full.err().and_then(|e| e.status()) == Some(Nfs3Status::NFS3ERR_NOTEMPTY));

    // Limits and sizes.
    let stat = nfs.fsstat(&cred, &root).await?;
    ensure!(stat.total_bytes >= stat.free_bytes && stat.free_bytes > 0);
    let conf = nfs.pathconf(&cred, &root).await?;
    ensure!(conf.name_max >= 255 && conf.case_preserving, "{conf:?}");
    listing(&nfs, &dir).await?;
    nfs.close();
    let closed = nfs.null().await;
    ensure!(closed.err().map(|e| e.errno()) == Some(libc::ENOTCONN));
    Ok(())
}

/// Files made side by side are all listed, each once, by both procedures.
async fn listing(nfs: &Nfs3, dir: &FileHandle) -> Result {
    const FILES: u32 = 1000;
    let cred = Cred::root();
    let big = nfs.mkdir(&cred, dir, b"big", &SetAttr::default()).await?;
    let big = big.handle.context("MKDIR gave no handle")?;
    let name = |n| format!("{n}-{}", "x".repeat(100)).into_bytes();
    let mut making = JoinSet::new();
    for n in 0..FILES {
        let (nfs, cred) = (nfs.clone(), cred.clone());
        making.spawn(async move {
            let how = How::Guarded(SetAttr::default());
            nfs.create(&cred, &big, &name(n), how).await
        });
    }
    for made in making.join_all().await {
        made?;
    }
    let mut expected: BTreeSet<Vec<u8>> = (0..FILES).map(name).collect();
    expected.extend([b".".to_vec(), b"..".to_vec()]);
    for plus in [false, true] {
        let (mut cookie, mut verf, mut listed) = (0, [0; 8], Vec::new());
        loop {
            let (names, next_verf, eof): (Vec<_>, _, _) = if plus {
                let page = nfs.readdirplus(&cred, &big, cookie, verf, 4096, 16_384);
                let page = page.await?;
                let with = page.entries.iter().filter(|e| e.handle.is_some()).count();
                ensure!(with + 2 >= page.entries.len(), "entries come with handles");
                let names = page.entries.into_iter().map(|e| (e.name, e.cookie));
                (names.collect(), page.verf, page.eof)
            } else {
                let page = nfs.readdir(&cred, &big, cookie, verf, 16_384).await?;
                let names = page.entries.into_iter().map(|e| (e.name, e.cookie));
                (names.collect(), page.verf, page.eof)
            };
            verf = next_verf;
            cookie = names.last().map_or(cookie, |(_, cookie)| *cookie);
            listed.extend(names.into_iter().map(|(name, _)| name.to_vec()));
            ensure!(listed.len() <= expected.len(), "a listing goes in circles");
            if eof {
                break;
            }
        }
        ensure!(listed.len() == expected.len() && BTreeSet::from_iter(listed) == expected);
    }
    Ok(())
}

/// Writes and commits through a proxy while `trouble` happens, by the rules: whatever was written
/// under another verifier than the COMMIT's is written again. Then what was acknowledged is read
/// on the server itself.
fn outlast(
    lab: &'static Lab,
    name: &'static str,
    trouble: impl FnOnce(&Proxy, &Ganesha) -> Result,
) -> Result {
    const ROUNDS: u32 = 60;
    let nas = nas(lab)?;
    let ports = [111, lab::ganesha::NFS_PORT, lab::ganesha::MOUNT_PORT];
    let proxy = Proxy::start(lab, name, &nas.ip(), &ports)?;
    let (nfs, root) = run(mount(proxy.ip(), EXPORT))??;
    let start = Instant::now();
    let writing = std::thread::spawn(move || run(write_rounds(&nfs, &root, name, ROUNDS)));
    trouble(&proxy, nas)?;
    let writing = writing.join().map_err(|_| anyhow::anyhow!("a panic"))?;
    let repeated = writing??;
    let content = std::fs::read(nas.local(EXPORT).join(name))?;
    ensure!(content.len() == (ROUNDS * 8 * BLOCK) as usize);
    for (n, block) in content.chunks(BLOCK as usize).enumerate() {
        let byte = block_byte(u32::try_from(n)?);
        ensure!(block.iter().all(|b| *b == byte), "block {n} is lost");
    }
    lab::note(format!(
        "{name}: {:.1} s, {} connections, {repeated} rounds written again",
        start.elapsed().as_secs_f64(),
        proxy.accepted()
    ));
    Ok(())
}

fn block_byte(block: u32) -> u8 {
    let [.., high, low] = block.to_be_bytes();
    low ^ high.wrapping_mul(31) | 1
}

async fn write_rounds(nfs: &Nfs3, root: &FileHandle, name: &str, rounds: u32) -> Result<u32> {
    let cred = Cred::root();
    let how = How::Exclusive([9; 8]);
    let made = nfs.create(&cred, root, name.as_bytes(), how).await?;
    let file = made.handle.context("CREATE gave no handle")?;
    let mode = SetAttr {
        mode: Some(0o644),
        ..SetAttr::default()
    };
    nfs.setattr(&cred, &file, &mode, None).await?;
    let mut repeated = 0;
    for round in 0..rounds {
        loop {
            let mut writes = JoinSet::new();
            for n in round * 8..round * 8 + 8 {
                let (nfs, cred) = (nfs.clone(), cred.clone());
                writes.spawn(async move {
                    let data = Bytes::from(vec![block_byte(n); BLOCK as usize]);
                    let offset = u64::from(n) * u64::from(BLOCK);
                    let written = nfs.write(&cred, &file, offset, data, Stable::Unstable);
                    let written = written.await?;
                    ensure!(written.count == BLOCK);
                    Ok(written.verf)
                });
            }
            let verifiers: Vec<_> = writes.join_all().await.into_iter().collect::<Result<_>>()?;
            let commit = nfs.commit(&cred, &file, 0, 0).await?;
            if verifiers.iter().all(|verf| *verf == commit.verf) {
                break;
            }
            repeated += 1;
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    Ok(repeated)
}
