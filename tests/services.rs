//! Stateful services in a Swarm of three Docker hosts, from the stack files of docs/examples, whose
//! node is drained, killed and cut off in turns: after each move every write that was acknowledged
//! is there, and the service's own check of its files is clean. Before that, a stack of web servers.
//!
//! Once each in `make test`, [`LONG`] times in `make test-long`.

#[path = "services/web.rs"]
mod web;

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use lab::docker::Engine;
use lab::process::{self, Task};
use lab::{
    Call, DataPath, Export, Ganesha, Host, Lab, Output, PATIENCE, Part, Result, calls, trial,
    wait_for,
};
use serde_json::json;

const PARTS: &[Part] = &[Part::Docker, Part::Ganesha, Part::Fuse, Part::Services];
const EXPORT: &str = "/srv/export";
const NODES: [&str; 3] = ["node1", "node2", "node3"];
/// How often Swarm hears of its nodes; one that was silent for three of these is lost. Shorter than
/// the default of 5 s, as the session time of these hosts is shorter than 30 s: moves take less long.
const HEARTBEAT: &str = "2s";
const SESSION: &str = "10s";
/// What happens to the node that the services are on, one after the other.
const FAULTS: [Fault; 4] = [
    Fault::Drain,
    Fault::Kill,
    Fault::CutOff,
    Fault::ServerCutOff,
];
/// Moves of the short version, which does without the last, and of the long one.
const SHORT: usize = 3;
const LONG: usize = 24;
/// One write, or an attempt.
const WRITE: Duration = Duration::from_secs(5);
/// Writes that have to be acknowledged before each move and after it.
const WRITES: usize = 20;

fn main() -> ExitCode {
    lab::main!(|| vec![trial("services_move_in_a_swarm", PARTS, moves)])
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
        // redis-cli ends with 0 whatever the answer is, and prints an empty line after an error.
        insert: "redis-cli -h $ip rpush log $n | grep -Eqx '[0-9]+'",
        read: "redis-cli -h $ip lrange log 0 -1",
        check: "redis-check-aof $dir/appendonlydir/appendonly.aof.manifest",
    },
    Service {
        name: "postgres",
        stack: include_str!("../docs/examples/postgres.yml"),
        image: "postgres:15",
        setup: "psql -h $ip -U postgres -qc 'create table if not exists log (n int primary key)'",
        insert: "psql -h $ip -U postgres -qc 'insert into log values ('$n')'",
        read: "psql -h $ip -U postgres -qAtc 'select n from log'",
        check: "/usr/lib/postgresql/*/bin/pg_amcheck -h $ip -U postgres --install-missing postgres
            pg_dump -h $ip -U postgres postgres | grep -q 'COPY public.log'",
    },
    Service {
        name: "mariadb",
        stack: include_str!("../docs/examples/mariadb.yml"),
        image: "mariadb:10.11",
        setup: "mariadb -h $ip -e 'create database if not exists app; create table if not exists app.log (n int primary key)'",
        insert: "mariadb -h $ip -e 'insert into app.log values ('$n')'",
        read: "mariadb -h $ip -Ne 'select n from app.log'",
        check: "mariadb-check -h $ip --check --extended --all-databases | grep -v 'OK$' | grep . && exit 1 || true",
    },
];

impl Service {
    /// Runs one of the commands, for at most [`WRITE`].
    fn run(&self, script: &str, ip: &str, n: usize) -> Result<Output> {
        let mut task = Task::new(&["sh", "-euc", script]);
        task.env.insert("ip".to_owned(), ip.to_owned());
        task.env.insert("n".to_owned(), n.to_string());
        task.limit = Some(WRITE);
        task.run()
    }
}

/// What a service was told, and what it has acknowledged.
struct Ledger {
    service: &'static Service,
    acknowledged: Mutex<BTreeSet<usize>>,
    next: AtomicUsize,
}

impl Ledger {
    fn new(service: &'static Service) -> Arc<Self> {
        Arc::new(Self {
            service,
            acknowledged: Mutex::default(),
            next: AtomicUsize::new(1),
        })
    }

    fn acknowledged(&self) -> BTreeSet<usize> {
        let set = self.acknowledged.lock();
        set.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Compares with what the service at this address has, and has it check its files. Nobody
    /// writes meanwhile.
    fn check(&self, ip: &str, nas: &Ganesha) -> Result {
        let service = self.service;
        let dir = nas.local(EXPORT).join(format!("{}_data", service.name));
        let ask = |script| process::sh(&format!("ip={ip} dir={}; {script}", dir.display()))?.ok();
        let text = ask(service.read)?;
        let there: BTreeSet<usize> = text
            .lines()
            .filter_map(|line| line.trim().parse().ok())
            .collect();
        let acknowledged = self.acknowledged();
        let lost: Vec<_> = acknowledged.difference(&there).collect();
        ensure!(
            lost.is_empty(),
            "{} lost {lost:?} of {}",
            service.name,
            acknowledged.len()
        );
        ask(service.check)?;
        Ok(())
    }
}

/// A client that writes one number after the other and notes which were acknowledged.
struct Client {
    ledger: Arc<Ledger>,
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<()>,
}

impl Client {
    /// Writes at whichever of these addresses the service answers, until it is stopped.
    fn start(ledger: &Arc<Ledger>, ips: &[String]) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let (ips, stopped, noted) = (ips.to_vec(), Arc::clone(&stop), Arc::clone(ledger));
        let thread = thread::spawn(move || {
            let service = noted.service;
            let mut at = 0;
            while !stopped.load(Ordering::Relaxed) {
                let n = noted.next.fetch_add(1, Ordering::Relaxed);
                match service.run(service.insert, &ips[at % ips.len()], n) {
                    Ok(output) if output.code == 0 => {
                        if let Ok(mut acknowledged) = noted.acknowledged.lock() {
                            acknowledged.insert(n);
                        }
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
            ledger: Arc::clone(ledger),
            stop,
            thread,
        }
    }

    /// Waits until so many more writes were acknowledged.
    fn goes_on(&self, phase: &str) -> Result {
        let count = || self.ledger.acknowledged().len();
        let wanted = count() + WRITES;
        let what = format!("{} to take writes {phase}", self.ledger.service.name);
        wait_for(&what, PATIENCE, || count() >= wanted)
    }

    fn stop(self) -> Result {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("a client panicked"))
    }
}

/// What makes services leave a node.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// An administrator empties it.
    Drain,
    /// Its power fails.
    Kill,
    /// It runs on and reaches nobody: neither the other nodes nor the NFS server.
    CutOff,
    /// It loses the NFS server alone, which Swarm does not see: an administrator drains it.
    ServerCutOff,
}

/// The hosts, as one Swarm of managers, and the server that they share.
struct Swarm {
    nas: Ganesha,
    hosts: Vec<Host>,
    ips: Vec<String>,
}

impl Swarm {
    fn start(lab: &'static Lab) -> Result<Self> {
        let nas = Ganesha::start(lab, "nas", &[Export::new(EXPORT)])?;
        let share = &nas.share(EXPORT);
        let hosts = thread::scope(|scope| {
            let start = |name| {
                let serve = ["--session", SESSION];
                Host::start_with(lab, name, DataPath::Fuse, share, &serve, &[])
            };
            let started: Vec<_> = NODES.map(|name| scope.spawn(move || start(name))).into();
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
            host.engine().hears_of_the_plugin()?;
        }
        let first = &hosts[0];
        first.ok(&format!(
            "swarm init --dispatcher-heartbeat {HEARTBEAT} --advertise-addr {}",
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
        let ips = hosts.iter().map(|host| host.node().ip()).collect();
        let swarm = Self { nas, hosts, ips };
        for node in 0..NODES.len() {
            swarm.is_back(0, node)?;
            swarm.has_driver(0, node)?;
        }
        Ok(swarm)
    }

    /// Waits until what the managers know of a node is so.
    fn known(&self, by: usize, node: usize, what: &str, is_so: impl Fn(&str) -> bool) -> Result {
        let ask = format!("node inspect {} --format {what}", NODES[node]);
        wait_for(&format!("`{ask}`"), PATIENCE, || {
            self.hosts[by].ok(&ask).is_ok_and(|said| is_so(&said))
        })
        .with_context(|| format!("{:?}", self.hosts[by].docker(&ask)))
    }

    /// Waits until a node is a manager that the others reach.
    fn is_back(&self, by: usize, node: usize) -> Result {
        let what = "{{.Status.State}},{{.ManagerStatus.Reachability}}";
        self.known(by, node, what, |said| said == "ready,reachable")
    }

    /// Waits until the scheduler knows that nfsvol is on a node.
    fn has_driver(&self, by: usize, node: usize) -> Result {
        let what = "{{.Description.Engine.Plugins}}";
        self.known(by, node, what, |said| said.contains("nfsvol"))
    }

    /// Sets a node to `active` or `drain`, by one of the managers, as soon as there is a leader.
    fn set(&self, by: usize, node: usize, availability: &str) -> Result {
        let line = format!("node update --availability {availability} {}", NODES[node]);
        let set = || {
            let output = self.hosts[by].docker(&line);
            output.is_ok_and(|output| output.code == 0)
        };
        wait_for(&format!("`{line}`"), PATIENCE, set)
            .with_context(|| format!("{:?}", self.hosts[by].docker(&line)))
    }

    /// Where the one task of a service runs, if it does.
    fn place(&self, by: usize, service: &str) -> Result<String> {
        self.hosts[by].ok(&format!(
            "service ps {service}_db --filter desired-state=running --format {{{{.Node}}}}"
        ))
    }

    /// Waits until the services run on a node and take writes there.
    fn all_go_on(&self, by: usize, clients: &[Client], phase: &str, node: usize) -> Result {
        for client in clients {
            let (service, node) = (client.ledger.service, NODES[node]);
            let what = format!("{} to run on {node} {phase}", service.name);
            wait_for(&what, PATIENCE, || {
                self.place(by, service.name)
                    .is_ok_and(|place| place == node)
            })
            .and_then(|()| client.goes_on(phase))
            .with_context(|| self.state(by, service))?;
        }
        Ok(())
    }

    /// What Docker says of a service that does not come up.
    fn state(&self, by: usize, service: &Service) -> String {
        let ask = |line: &str| match self.hosts[by].docker(line) {
            Ok(output) => format!("{}{}", output.stdout, output.stderr),
            Err(error) => format!("{error:#}"),
        };
        ask(&format!("service ps --no-trunc {}_db", service.name))
            + &ask(&format!("service logs --tail 20 {}_db", service.name))
            + &ask("node ls")
    }

    /// Drops what comes to a node and leaves it, or lets it pass again; all, or the server's alone.
    fn cut(&self, node: usize, fault: Fault, cut: bool) -> Result {
        let how = if cut { "-I" } else { "-D" };
        let server = match fault {
            Fault::ServerCutOff => self.nas.ip(),
            _ => "0.0.0.0/0".to_owned(),
        };
        self.hosts[node].node().sh(&format!(
            "iptables {how} OUTPUT -o eth0 -d {server} -j DROP
             iptables {how} INPUT -i eth0 -s {server} -j DROP"
        ))?;
        Ok(())
    }

    /// Moves the services from one node to another while their clients write; all else is as
    /// before afterwards.
    fn move_all(&self, ledgers: &[Arc<Ledger>], fault: Fault, from: usize, to: usize) -> Result {
        let by = NODES.len() - from - to;
        let clients: Vec<_> = ledgers
            .iter()
            .map(|ledger| Client::start(ledger, &self.ips))
            .collect();
        self.all_go_on(by, &clients, "before", from)?;
        self.has_driver(by, to)?;
        self.set(by, to, "active")?;
        let began = Instant::now();
        match fault {
            Fault::Drain => self.set(by, from, "drain")?,
            Fault::Kill => self.hosts[from].node().power_off()?,
            Fault::CutOff => self.cut(from, fault, true)?,
            Fault::ServerCutOff => {
                self.cut(from, fault, true)?;
                self.set(by, from, "drain")?;
            }
        }
        self.all_go_on(by, &clients, "afterwards", to)?;
        let took = began.elapsed();
        for client in clients {
            client.stop()?;
        }
        for ledger in ledgers {
            ledger.check(&self.ips[to], &self.nas)?;
        }
        // The node comes back, and stays empty.
        self.set(by, from, "drain")?;
        match fault {
            Fault::Drain => {}
            Fault::Kill => {
                self.hosts[from].boot()?;
                self.hosts[from].engine().hears_of_the_plugin()?;
            }
            Fault::CutOff | Fault::ServerCutOff => self.cut(from, fault, false)?,
        }
        self.is_back(by, from)?;
        let host = &self.hosts[from];
        let name = NODES[from];
        wait_for(&format!("{name} to let go of everything"), PATIENCE, || {
            let status = calls::one(host.node(), Call::new("Nfsvol.Status", &json!({})));
            host.ok("ps --quiet")
                .is_ok_and(|running| running.is_empty())
                && status.is_ok_and(|status| status.body["attachments"] == 0)
        })
        .with_context(|| format!("{:?}", host.nfsvol().command(&["ls"])))?;
        let counts = ledgers.iter().map(|ledger| ledger.acknowledged().len());
        lab::note(format!(
            "{fault:?}, {name} to {}: {took:.1?}; acknowledged and there: {:?}",
            NODES[to],
            counts.collect::<Vec<_>>()
        ));
        Ok(())
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
    let swarm = Swarm::start(lab)?;
    thread::scope(|scope| {
        let each = |host: &Host| {
            SERVICES
                .iter()
                .try_for_each(|one| image(host.engine(), one))
        };
        let made: Vec<_> = swarm
            .hosts
            .iter()
            .map(|host| scope.spawn(move || each(host)))
            .collect();
        made.into_iter().try_for_each(|made| {
            made.join()
                .map_err(|_| anyhow!("making an image panicked"))?
        })
    })?;

    web::is_seen_on_every_node(lab, &swarm)?;

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
    for service in &SERVICES {
        let mut last = None;
        wait_for(&format!("{} to come up", service.name), PATIENCE, || {
            last = service.run(service.setup, &swarm.ips[0], 0).ok();
            last.as_ref().is_some_and(|output| output.code == 0)
        })
        .with_context(|| format!("{last:?}\n{}", swarm.state(0, service)))?;
        let volume = format!("{}_data", service.name);
        ensure!(
            swarm.nas.local(EXPORT).join(&volume).is_dir(),
            "its volume is not on the share"
        );
        let status = &swarm.hosts[0].inspect(&volume)?["Status"];
        ensure!(status["options"]["access"] == "exclusive", "{status}");
    }
    let ledgers: Vec<_> = SERVICES.iter().map(Ledger::new).collect();
    let times = if lab::long() { LONG } else { SHORT };
    for (n, fault) in FAULTS.into_iter().cycle().take(times).enumerate() {
        let [from, to] = [n, n + 1].map(|n| n % NODES.len());
        swarm
            .move_all(&ledgers, fault, from, to)
            .with_context(|| format!("move {} of {times}: {fault:?}", n + 1))?;
    }
    Ok(())
}
