//! The NFSv3 client against a server, without FUSE in between: what the data path can reach.
//!
//! `NFSVOL_BENCH_SHARE=127.0.0.1:/export cargo bench --bench rpc [-- MEGABYTES]`, for example
//! inside the network namespace of a test server. Makes and removes one file in the export.

use std::error::Error;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use nfs::rpc::connector::TcpConnector;
use nfs::rpc::mountd::{Mountd, Ports};
use nfs::rpc::nfs3::{FileHandle, How, Nfs3, SetAttr, Stable};
use nfs::rpc::{Cred, Settings};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

const MIB: u32 = 1 << 20;
/// How long each rate of small calls is measured.
const SPAN: Duration = Duration::from_secs(2);

fn main() -> Result<(), Box<dyn Error>> {
    let Ok(share) = std::env::var("NFSVOL_BENCH_SHARE") else {
        println!("skipped: NFSVOL_BENCH_SHARE=IP:/export names no server");
        return Ok(());
    };
    let megabytes = std::env::args().find_map(|a| a.parse().ok()).unwrap_or(512);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(run(&share, megabytes))
}

async fn run(share: &str, megabytes: u32) -> Result<(), Box<dyn Error>> {
    let (host, export) = share.split_once(":/").ok_or("IP:/export")?;
    let ip: IpAddr = host.parse()?;
    let export = format!("/{export}");
    let mut settings = Settings::new(SocketAddr::new(ip, 0));
    let mountd = Mountd::new(&settings, || TcpConnector::new(true));
    let ports = Ports::default();
    let root = mountd.mount(ports, &export).await?.root;
    settings.addr.set_port(mountd.nfs_port(ports).await?);
    for nconnect in [1, 2] {
        settings.nconnect = nconnect;
        println!("nconnect={nconnect}, {megabytes} MiB");
        let nfs = Nfs3::connect(settings.clone()).await?;
        measure(nfs, root, megabytes).await?;
    }
    mountd.unmount(ports, &export).await?;
    Ok(())
}

async fn measure(nfs: Nfs3, root: FileHandle, megabytes: u32) -> Result<(), Box<dyn Error>> {
    let cred = Cred::root();
    let name = b"nfsvol-bench-rpc";
    let data = Bytes::from(vec![0x5a; MIB as usize]);
    for depth in [1, 8, 32] {
        let _ = nfs.remove(&cred, &root, name).await;
        let made = nfs
            .create(&cred, &root, name, How::Guarded(SetAttr::default()))
            .await?;
        let file = made.handle.ok_or("CREATE gave no handle")?;
        let start = Instant::now();
        each(depth, megabytes, |n| {
            let (nfs, cred, data) = (nfs.clone(), cred.clone(), data.clone());
            async move {
                let offset = u64::from(n) * u64::from(MIB);
                let done = nfs
                    .write(&cred, &file, offset, data, Stable::Unstable)
                    .await;
                assert_eq!(done.map(|w| w.count), Ok(MIB));
            }
        })
        .await;
        nfs.commit(&cred, &file, 0, 0).await?;
        rate("WRITE 1 MiB + COMMIT", depth, start, megabytes, "MiB");
        let start = Instant::now();
        each(depth, megabytes, |n| {
            let (nfs, cred) = (nfs.clone(), cred.clone());
            async move {
                let offset = u64::from(n) * u64::from(MIB);
                let read = nfs.read(&cred, &file, offset, MIB).await;
                assert_eq!(read.map(|r| r.data.len()), Ok(MIB as usize));
            }
        })
        .await;
        rate(
            "READ 1 MiB (server's cache)",
            depth,
            start,
            megabytes,
            "MiB",
        );
        if depth > 1 {
            let (nfs, cred) = (nfs.clone(), cred.clone());
            small("READ 4 KiB", depth, move |n| {
                let (nfs, cred) = (nfs.clone(), cred.clone());
                let offset = u64::from(n.wrapping_mul(2_654_435_761) % (megabytes * 256)) * 4096;
                async move {
                    let read = nfs.read(&cred, &file, offset, 4096).await;
                    assert_eq!(read.map(|r| r.data.len()), Ok(4096));
                }
            })
            .await;
        }
    }
    for depth in [1, 32, 128] {
        let (nfs, cred) = (nfs.clone(), cred.clone());
        small("GETATTR", depth, move |_| {
            let (nfs, cred, root) = (nfs.clone(), cred.clone(), root);
            async move {
                assert!(nfs.getattr(&cred, &root).await.is_ok());
            }
        })
        .await;
    }
    nfs.remove(&cred, &root, name).await?;
    Ok(())
}

fn rate(what: &str, depth: usize, start: Instant, count: u32, unit: &str) {
    let per_second = f64::from(count) / start.elapsed().as_secs_f64();
    println!("  {what:<28} depth {depth:>3}: {per_second:>9.0} {unit}/s");
}

/// Runs `count` jobs, `depth` at a time.
async fn each<F: Future<Output = ()> + Send + 'static>(
    depth: usize,
    count: u32,
    job: impl Fn(u32) -> F,
) {
    let slots = Arc::new(Semaphore::new(depth));
    let mut jobs = JoinSet::new();
    for n in 0..count {
        let slot = Arc::clone(&slots).acquire_owned().await;
        let job = job(n);
        jobs.spawn(async move {
            job.await;
            drop(slot);
        });
    }
    while let Some(done) = jobs.join_next().await {
        done.expect("a job of the measurement failed");
    }
}

/// Runs `depth` loops of small calls for a while.
async fn small<F: Future<Output = ()> + Send + 'static>(
    what: &str,
    depth: usize,
    job: impl Fn(u32) -> F + Clone + Send + 'static,
) {
    let start = Instant::now();
    let mut jobs = JoinSet::new();
    for lane in 0..u32::try_from(depth).unwrap_or(1) {
        let job = job.clone();
        jobs.spawn(async move {
            let mut done = 0;
            while start.elapsed() < SPAN {
                job(done * 128 + lane).await;
                done += 1;
            }
            done
        });
    }
    let mut total = 0;
    while let Some(done) = jobs.join_next().await {
        total += done.expect("a job of the measurement failed");
    }
    rate(what, depth, start, total, "calls");
}
