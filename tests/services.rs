//! Stateful services in a Swarm of three Docker hosts, from the stack files of docs/examples:
//! every write that was acknowledged is there after each move, and the service's own check of its
//! files is clean.

mod lab;

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use lab::docker::Engine;
use lab::process::{self, Task};
use lab::{DataPath, Export, Ganesha, Host, Lab, Output, Part, Result, trial, wait_for};

const PARTS: &[Part] = &[Part::Docker, Part::Ganesha, Part::Fuse, Part::Services];
const EXPORT: &str = "/srv/export";
const NODES: [&str; 3] = ["node1", "node2", "node3"];
/// Swarm takes a silent node for lost after about 15 s; then a database recovers.
const MOVE: Duration = Duration::from_secs(120);
/// One write, or an attempt.
const WRITE: Duration = Duration::from_secs(5);
/// Writes that each phase between two moves has to see acknowledged.
const WRITES: usize = 20;

fn main() -> ExitCode {
    lab::main(|| vec![trial("services_move_in_a_swarm", PARTS, moves)])
}

/// A service of docs/examples, and how its users reach it.
struct Service {
    name: &'static str,
    stack: &'static str,
    /// The image that the stack file names; built here from Debian's packages.
    image: &'static str,
    /// Shell commands with `$ip`, `$n` and, for the check of what lies on the share, `$dir`.
    setup: &'static str,
    insert: &'static str,
    read: &'static str,
    check: &'static str,
}

const SERVICES: [Service; 3] = [
    Service {
        name: "redis",
        stack: include_str!("../docs/examples/redis.yml"),
        image: "redis:7",
        setup: "redis-cli -h $ip ping | grep -qx PONG",
        // redis-cli ends with 0 whatever the answer is.
        insert: "redis-cli -h $ip rpush log $n | grep -qx '[0-9]*'",
        read: "redis-cli -h $ip lrange log 0 -1",
        check: "redis-check-aof $dir/appendonlydir/appendonly.aof.manifest",
    },
    Service {
        name: "postgres",
        stack: include_str!("../docs/examples/postgres.yml"),
        image: "postgres:15",
        setup: "psql -h $ip -U postgres -qc 'create table log (n int primary key)'",
        insert: "psql -h $ip -U postgres -qc 'insert into log values ('$n')'",
        read: "psql -h $ip -U postgres -qAtc 'select n from log'",
        check: "/usr/lib/postgresql/*/bin/pg_amcheck -h $ip -U postgres --install-missing postgres
            pg_dump -h $ip -U postgres postgres | grep -q 'COPY public.log'",
    },
    Service {
        name: "mariadb",
        stack: include_str!("../docs/examples/mariadb.yml"),
        image: "mariadb:10.11",
        setup: "mariadb -h $ip -e 'create database app; create table app.log (n int primary key)'",
        insert: "mariadb -h $ip -e 'insert into app.log values ('$n')'",
        read: "mariadb -h $ip -Ne 'select n from app.log'",
        check: "mariadb-check -h $ip --check --extended --all-databases | grep -v 'OK$' | grep . && exit 1 || true",
    },
];

impl Service {
    fn run(&self, script: &str, ip: &str, n: usize) -> Result<Output> {
        let mut task = Task::new(&["sh", "-euc", script]);
        task.env.insert("ip".to_owned(), ip.to_owned());
        task.env.insert("n".to_owned(), n.to_string());
        task.limit = Some(WRITE);
        task.run()
    }
}

/// A client that writes one number after the other and knows which were acknowledged.
struct Client {
    service: &'static Service,
    acknowledged: Arc<Mutex<BTreeSet<usize>>>,
    count: Arc<AtomicUsize>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Client {
    /// Writes until `stop`, at whichever of these addresses the service answers.
    fn start(service: &'static Service, ips: &[String], stop: &Arc<AtomicBool>) -> Self {
        let acknowledged = Arc::<Mutex<BTreeSet<usize>>>::default();
        let count = Arc::<AtomicUsize>::default();
        let (noted, counter) = (Arc::clone(&acknowledged), Arc::clone(&count));
        let (ips, stop) = (ips.to_vec(), Arc::clone(stop));
        let thread = thread::spawn(move || {
            let mut at = 0;
            for n in 1.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let ip = &ips[at % ips.len()];
                match service.run(service.insert, ip, n) {
                    Ok(output) if output.code == 0 => {
                        if let Ok(mut acknowledged) = noted.lock() {
                            acknowledged.insert(n);
                        }
                        counter.fetch_add(1, Ordering::Relaxed);
                    }
                    // Not here, or not yet; what became of this number nobody was told.
                    _ => {
                        at += 1;
                        thread::sleep(Duration::from_millis(100));
                    }
                }
            }
        });
        Self {
            service,
            acknowledged,
            count,
            thread: Some(thread),
        }
    }

    /// Waits until so many more writes were acknowledged.
    fn goes_on(&self, phase: &str) -> Result {
        let wanted = self.count.load(Ordering::Relaxed) + WRITES;
        let what = format!("{} to take writes {phase}", self.service.name);
        wait_for(&what, MOVE, || self.count.load(Ordering::Relaxed) >= wanted)
    }
}

/// The hosts, as one Swarm of managers.
struct Swarm {
    hosts: Vec<Host>,
}

impl Swarm {
    fn start(lab: &'static Lab, share: &str) -> Result<Self> {
        let hosts = thread::scope(|scope| {
            let started: Vec<_> = NODES
                .map(|name| scope.spawn(move || Host::start(lab, name, DataPath::Fuse, share)))
                .into();
            started
                .into_iter()
                .map(|host| host.join().map_err(|_| anyhow!("a host panicked"))?)
                .collect::<Result<Vec<_>>>()
        })?;
        for host in &hosts {
            // Swarm looks for images in a registry first: that there is none is known at once.
            host.node().sh(
                "echo 'options timeout:1 attempts:1\nnameserver 127.0.0.1' >/etc/resolv.conf",
            )?;
            // What nfsvol-announce.service does after each start of Docker.
            host.ok("volume ls --quiet")?;
        }
        let first = &hosts[0];
        first.ok(&format!(
            "swarm init --advertise-addr {}",
            first.node().ip()
        ))?;
        let token = first.ok("swarm join-token -q manager")?;
        for host in &hosts[1..] {
            host.ok(&format!(
                "swarm join --token {token} --advertise-addr {} {}:2377",
                host.node().ip(),
                first.node().ip()
            ))?;
        }
        Ok(Self { hosts })
    }

    /// Sets a node to `active` or `drain`, by one of the managers.
    fn set(&self, by: usize, node: usize, availability: &str) -> Result {
        self.hosts[by].ok(&format!(
            "node update --availability {availability} {}",
            NODES[node]
        ))?;
        Ok(())
    }

    /// Where the one task of a service runs, if it does.
    fn place(&self, by: usize, service: &str) -> Result<String> {
        self.hosts[by].ok(&format!(
            "service ps {service}_db --filter desired-state=running --format {{{{.Node}}}}"
        ))
    }
}

fn image(engine: &Engine, service: &Service) -> Result {
    let script = format!(
        "service={}\n{}",
        service.name,
        include_str!("services/image.sh")
    );
    engine.image(service.image, &script, &["ENTRYPOINT [\"/entry\"]"])
}

fn moves(lab: &'static Lab) -> Result {
    let nas = Ganesha::start(lab, "nas", &[Export::new(EXPORT)])?;
    let swarm = Swarm::start(lab, &nas.share(EXPORT))?;
    // The scheduler knows the driver of each node.
    for node in NODES {
        let plugins = swarm.hosts[0].ok(&format!(
            "node inspect {node} --format {{{{.Description.Engine.Plugins}}}}"
        ))?;
        ensure!(plugins.contains("nfsvol"), "{node}: {plugins}");
    }
    for host in &swarm.hosts {
        for service in &SERVICES {
            image(host.engine(), service)?;
        }
    }

    // All of them on the first node.
    swarm.set(0, 1, "drain")?;
    swarm.set(0, 2, "drain")?;
    for service in &SERVICES {
        let file = lab.dir().join(format!("{}.yml", service.name));
        std::fs::write(&file, service.stack)?;
        swarm.hosts[0].ok(&format!(
            "stack deploy --resolve-image never -c {} {}",
            file.display(),
            service.name
        ))?;
    }
    let ips: Vec<String> = swarm.hosts.iter().map(|host| host.node().ip()).collect();
    for service in &SERVICES {
        let mut last = None;
        wait_for(&format!("{} to come up", service.name), MOVE, || {
            last = service.run(service.setup, &ips[0], 0).ok();
            last.as_ref().is_some_and(|output| output.code == 0)
        })
        .with_context(|| format!("{last:?}\n{}", state(&swarm, 0, service)))?;
        ensure!(
            nas.local(EXPORT)
                .join(format!("{}_data", service.name))
                .is_dir(),
            "its volume is not on the share"
        );
    }
    let stop = Arc::new(AtomicBool::new(false));
    let mut clients: Vec<_> = SERVICES
        .iter()
        .map(|service| Client::start(service, &ips, &stop))
        .collect();
    let all_go_on = |by: usize, phase: &str, node: &str| {
        for client in &clients {
            let name = client.service.name;
            wait_for(&format!("{name} to run on {node} {phase}"), MOVE, || {
                swarm.place(by, name).is_ok_and(|place| place == node)
            })
            .and_then(|()| client.goes_on(phase))
            .with_context(|| state(&swarm, by, client.service))?;
        }
        anyhow::Ok(())
    };
    all_go_on(0, "at first", NODES[0])?;

    swarm.set(0, 1, "active")?;
    swarm.set(0, 0, "drain")?;
    all_go_on(0, "after the drain", NODES[1])?;

    swarm.set(0, 2, "active")?;
    swarm.hosts[1].node().power_off()?;
    all_go_on(0, "after the loss of the node", NODES[2])?;

    stop.store(true, Ordering::Relaxed);
    for client in &mut clients {
        let ended = client.thread.take().map(thread::JoinHandle::join);
        ensure!(matches!(ended, Some(Ok(()))), "a client panicked");
        let service = client.service;
        let text = service.run(service.read, &ips[2], 0)?.ok()?;
        let there: BTreeSet<usize> = text
            .lines()
            .filter_map(|line| line.trim().parse().ok())
            .collect();
        let acknowledged = client
            .acknowledged
            .lock()
            .map_err(|_| anyhow!("a client panicked"))?;
        let lost: Vec<_> = acknowledged.difference(&there).collect();
        ensure!(
            lost.is_empty(),
            "{} lost {lost:?} of {}",
            service.name,
            acknowledged.len()
        );
        eprintln!("{}: {} writes, all there", service.name, acknowledged.len());
        let dir = nas.local(EXPORT).join(format!("{}_data", service.name));
        let check = format!("ip={} dir={}; {}", ips[2], dir.display(), service.check);
        process::sh(&check)?.ok()?;
    }
    Ok(())
}

/// What Docker says of a service that does not come up.
fn state(swarm: &Swarm, by: usize, service: &Service) -> String {
    let ask = |line: &str| match swarm.hosts[by].docker(line) {
        Ok(output) => format!("{}{}", output.stdout, output.stderr),
        Err(error) => format!("{error:#}"),
    };
    ask(&format!("service ps --no-trunc {}_db", service.name))
        + &ask(&format!("service logs --tail 20 {}_db", service.name))
        + &ask("node ls")
}
