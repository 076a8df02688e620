//! Round trips on the socket, and a large catalog.

use std::thread;
use std::time::Duration;

use anyhow::Context;
use lab::{Answer, Call, Export, Ganesha, Lab, Nfsvol, Node, Part, Result, calls, trial};
use libtest_mimic::Trial;

use crate::load;
use crate::report::{Report, Samples, Target};

/// Calls of each kind.
const CALLS: usize = 200;
/// Volumes in the large catalog.
const VOLUMES: usize = 10_000;
/// They are made over so many connections, this many at a time.
const CONNECTIONS: usize = 4;
const AT_A_TIME: usize = 500;
const ROUNDS: usize = 3;
/// A read(2) and a write(2) each.
const PAIRS: u32 = 100_000;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("socket", &[Part::Ganesha, Part::Guest, Part::Fuse], socket),
        trial("catalog", &[Part::Ganesha], catalog),
    ]
}

pub(crate) fn serve(node: &'static Node, share: &str, more: &[&str]) -> Result<Nfsvol<'static>> {
    let mut args = vec!["--share", share, "--log", "warn"];
    args.extend(more);
    Nfsvol::start(node, &args, &[])
}

fn milliseconds(answers: &[Answer]) -> Vec<f64> {
    answers
        .iter()
        .map(|answer| answer.took.as_secs_f64() * 1e3)
        .collect()
}

/// Makes calls that all have to succeed.
fn make(node: &Node, calls: &[Call]) -> Result<Vec<f64>> {
    let answers = calls::all(node, calls)?;
    for answer in &answers {
        answer.clone().ok()?;
    }
    Ok(milliseconds(&answers))
}

fn socket(lab: &'static Lab) -> Result {
    const EXPORT: &str = "/srv/socket";
    let report = Report::of("socket")?;
    let server = Ganesha::start(lab, "socket-nas", &[Export::new(EXPORT)])?;
    let machine: &'static Node = Box::leak(Box::new(Node::machine(lab, "socket-host")?));
    let guest: &'static Node = Box::leak(Box::new(Node::guest(lab, "socket-guest")?));
    let hosts = [(machine, "by FUSE"), (guest, "by the kernel, in a guest")];
    for (node, place) in hosts {
        let _nfsvol = serve(node, &server.share(EXPORT), &[])?;
        let name = node.name();
        make(
            node,
            &[Call::create(name, &[]), Call::mount(name, "holder")],
        )?;
        let gets = make(node, &[Call::get(name).times(CALLS)])?;
        let others = format!("{name}-{{n}}");
        let creates = make(node, &[Call::create(&others, &[]).times(CALLS)])?;
        let mut pairs = Vec::new();
        let cycles = if node.is_guest() { CALLS / 2 } else { 10 };
        for n in 0..cycles {
            let volume = format!("{name}-{n}");
            pairs.extend([Call::mount(&volume, "one"), Call::unmount(&volume, "one")]);
        }
        let pairs: Vec<f64> = make(node, &pairs)?
            .chunks(2)
            .map(|pair| pair.iter().sum())
            .collect();
        let target = |most| match node.is_guest() {
            true => Target::None,
            false => Target::AtMost(most),
        };
        let own = |samples: &[f64]| Samples::new("nfsvol", samples);
        report.note(
            &format!("Get, {place}"),
            "ms",
            target(0.3),
            &own(&gets),
            None,
        )?;
        report.note(
            &format!("Create, {place}"),
            "ms",
            target(5.0),
            &own(&creates),
            None,
        )?;
        let target = match node.is_guest() {
            true => Target::AtMost(2.0),
            false => Target::None,
        };
        report.note(
            &format!("Mount + Unmount of one more, {place}"),
            "ms",
            target,
            &own(&pairs),
            None,
        )?;
        // What the two are made of: some hundred system calls, and several calls to the share.
        let calls = node.sh(&format!(
            "dd if=/dev/zero of=/dev/null bs=1 count={PAIRS} 2>&1"
        ))?;
        let seconds: f64 = calls
            .split("copied, ")
            .nth(1)
            .and_then(|took| took.split(' ').next()?.parse().ok())
            .with_context(|| calls.clone())?;
        report.note(
            &format!("one system call (read(2) or write(2) of a byte), {place}"),
            "µs",
            Target::None,
            &own(&[seconds * 1e6 / f64::from(2 * PAIRS)]),
            None,
        )?;
        let rpcs = load::on(node, &["rpc", &server.share(EXPORT), "500"])?;
        report.note(
            &format!("one call to the share, {place}"),
            "ms",
            Target::None,
            &own(&rpcs),
            None,
        )?;
    }
    machine.power_off()?;
    guest.power_off()?;
    server.stop()
}

fn catalog(lab: &'static Lab) -> Result {
    const EXPORT: &str = "/srv/catalog";
    let report = Report::of("catalog")?;
    let server = Ganesha::start(lab, "catalog-nas", &[Export::new(EXPORT)])?;
    let share = server.share(EXPORT);
    let node: &'static Node = Box::leak(Box::new(Node::machine(lab, "catalog-host")?));
    let nfsvol = serve(node, &share, &[])?;
    thread::scope(|scope| {
        let threads: Vec<_> = (0..CONNECTIONS)
            .map(|lane| {
                scope.spawn(move || -> Result {
                    for part in 0..VOLUMES / CONNECTIONS / AT_A_TIME {
                        let name = format!("volume-{lane}-{part}-{{n}}");
                        make(node, &[Call::create(&name, &[]).times(AT_A_TIME)])?;
                    }
                    Ok(())
                })
            })
            .collect();
        for thread in threads {
            thread.join().ok().context("a thread panicked")??;
        }
        anyhow::Ok(())
    })?;
    nfsvol.process().stop()?;
    let mut columns = vec![Vec::new(); 5];
    for _ in 0..ROUNDS {
        let argv = [
            "start",
            Nfsvol::SOCKET,
            "/VolumeDriver.List {}",
            Nfsvol::binary(),
            "serve",
            "--share",
            &share,
            "--log",
            "warn",
        ];
        let numbers = load::on(node, &argv)?;
        for (column, number) in columns.iter_mut().zip(numbers) {
            column.push(number);
        }
        // A socket file of a daemon that was killed takes no connection, but a new one checks.
        thread::sleep(Duration::from_millis(100));
    }
    let thousandfold = |column: &[f64]| column.iter().map(|s| s * 1e3).collect::<Vec<_>>();
    let figures = [
        (
            "start to the first List",
            "ms",
            1000.0,
            thousandfold(&columns[0]),
        ),
        (
            "List of 10,000 volumes",
            "ms",
            100.0,
            thousandfold(&columns[1]),
        ),
        ("resident memory", "MiB", 30.0, columns[2].clone()),
        ("processor at rest", "%", 0.1, columns[4].clone()),
    ];
    for (name, unit, most, samples) in figures {
        let samples = Samples::new("nfsvol", &samples);
        report.note(name, unit, Target::AtMost(most), &samples, None)?;
    }
    node.power_off()?;
    server.stop()
}
