//! What is checked while servers fail: every call answers in time and says what to do, known
//! volumes are known on, the healthy server's volumes are as quick as before; and when the faults
//! end, all works again without a restart.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use lab::{
    Call, Export, Ganesha, Lab, Nfsvol, Node, PATIENCE, Process, Result, Shared, calls, wait_for,
};

use crate::kinds::{self, Answer, EXPORT, Fault, Faulty, Held};

/// From the deadline to the answer in the test's hands, on a machine that is busy with other things.
/// What waits for a server without a deadline would wait for as long as the fault lasts.
const SLACK: Duration = Duration::from_secs(30);
/// What 99 of 100 of Get, List and Mount of healthy volumes may take, and half of Get and List of those
/// on the faulty servers: who waits for a server waits for twice as long at least (`op_deadline`).
/// `make bench` says what they do take.
const NO_WAIT: Duration = Duration::from_secs(2);
/// Between two looks at what is to change.
const AGAIN: Duration = Duration::from_millis(200);
/// How many calls of each kind are timed.
const TIMED: usize = 100;
const VOLUMES: &str = "/var/lib/nfsvol/mnt/volumes";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DataPath {
    Fuse,
    Kernel,
}

impl DataPath {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Fuse => "fuse",
            Self::Kernel => "kernel",
        }
    }
}

/// The server that nothing happens to.
fn calm(lab: &'static Lab) -> Result<&'static Ganesha> {
    static CALM: Shared<Ganesha> = Shared::new();
    CALM.get(|| Ganesha::start(lab, "calm", &[Export::new(EXPORT)]))
}

/// A server that fails, and its volumes on the host.
struct Case {
    fault: &'static Fault,
    faulty: Faulty,
    /// What the names of its volumes begin with.
    prefix: String,
    share: String,
}

impl Case {
    fn start(lab: &'static Lab, prefix: &str, fault: &'static Fault) -> Result<Self> {
        let prefix = format!("{prefix}-{}", fault.name.replace('_', "-"));
        let name = format!("{prefix}-nas");
        let server = Ganesha::start(lab, &name, &kinds::exports())?;
        (fault.prepare)(&server)?;
        let share = if fault.by_name {
            format!("{name}:{EXPORT}")
        } else {
            server.share(EXPORT)
        };
        Ok(Self {
            fault,
            faulty: Faulty { server, name },
            prefix,
            share,
        })
    }

    fn volume(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    fn create(&self, name: &str) -> Call {
        Call::create(&self.volume(name), &[("share", &self.share)])
    }

    /// Each call that may have to wait for the server, and what it answers during the fault.
    fn calls(&self) -> [(Call, Answer); 4] {
        let fault = self.fault;
        [
            (self.create("new"), fault.create),
            (Call::mount(&self.volume("idle"), "during"), fault.mount),
            (Call::remove(&self.volume("removed")), fault.remove),
            // What is mounted always comes off.
            (
                Call::unmount(&self.volume("mounted"), "before"),
                Answer::Works,
            ),
        ]
    }
}

/// The daemon's limits in this test: short ones, so that what waits for a server does not wait long.
struct Limits {
    deadline: Duration,
    mount_deadline: Duration,
    op_deadline: Duration,
}

impl Limits {
    fn of(path: DataPath) -> Self {
        // A guest has one slow processor, and ten servers fail for it at once.
        let times = match path {
            DataPath::Fuse => 1,
            DataPath::Kernel => 2,
        };
        Self {
            deadline: Duration::from_secs(15) * times,
            mount_deadline: Duration::from_secs(12) * times,
            op_deadline: Duration::from_secs(4) * times,
        }
    }
}

/// A host with volumes on servers that are about to fail, and on one that is not.
pub(crate) struct Scenario {
    node: &'static Node,
    nfsvol: Nfsvol<'static>,
    limits: Limits,
    cases: Vec<Case>,
}

impl Scenario {
    /// A host of its own for one fault: of its home share.
    pub(crate) fn at_home(
        lab: &'static Lab,
        path: DataPath,
        fault: &'static Fault,
    ) -> Result<Self> {
        let case = Case::start(lab, path.word(), fault)?;
        let home = case.share.clone();
        Self::start(lab, &case.prefix.clone(), path, &home, vec![case])
    }

    /// A host for all faults at once: of shares that its home share is not among.
    pub(crate) fn elsewhere(
        lab: &'static Lab,
        path: DataPath,
        faults: &'static [Fault],
    ) -> Result<Self> {
        let home = calm(lab)?.share(EXPORT);
        let cases = thread::scope(|scope| {
            let start = |fault| scope.spawn(move || Case::start(lab, path.word(), fault));
            let threads: Vec<_> = faults.iter().map(start).collect();
            let ended = threads.into_iter().map(|thread| thread.join());
            let cases = ended.map(|ended| ended.map_err(|_| anyhow!("a thread panicked"))?);
            cases.collect::<Result<Vec<_>>>()
        })?;
        Self::start(lab, path.word(), path, &home, cases)
    }

    fn start(
        lab: &'static Lab,
        name: &str,
        path: DataPath,
        home: &str,
        cases: Vec<Case>,
    ) -> Result<Self> {
        let calm_share = calm(lab)?.share(EXPORT);
        let node: &'static Node = Box::leak(Box::new(match path {
            DataPath::Fuse => Node::machine(lab, name)?,
            DataPath::Kernel => Node::guest(lab, name)?,
        }));
        let limits = Limits::of(path);
        let seconds = |time: Duration| format!("{}s", time.as_secs());
        let args = [
            ["--share", home],
            ["--data-path", path.word()],
            ["--deadline", &seconds(limits.deadline)],
            ["--mount-deadline", &seconds(limits.mount_deadline)],
            ["--op-deadline", &seconds(limits.op_deadline)],
            ["--poll", "1s"],
        ];
        let nfsvol = Nfsvol::start(node, args.as_flattened(), &[])?;
        let scenario = Self {
            node,
            nfsvol,
            limits,
            cases,
        };
        let calm = scenario.calm();
        scenario.ok(Call::create(&calm, &[("share", &calm_share)]))?;
        scenario.ok(Call::mount(&calm, "before"))?;
        for case in &scenario.cases {
            for name in ["held", "idle", "mounted", "removed"] {
                scenario.ok(case.create(name))?;
            }
            for name in ["held", "mounted"] {
                scenario.ok(Call::mount(&case.volume(name), "before"))?;
            }
        }
        Ok(scenario)
    }

    /// The volume on the healthy server.
    fn calm(&self) -> String {
        format!("{}-calm", self.node.name())
    }

    fn call(&self, call: Call) -> Result<calls::Answer> {
        calls::one(self.node, call)
    }

    fn ok(&self, call: Call) -> Result<serde_json::Value> {
        self.call(call)?.ok()
    }

    pub(crate) fn run(self) -> Result {
        let before = p99(&calls::all(self.node, &self.timed())?)?;
        let holders = self.cases.iter().map(|case| self.hold(case));
        let holders: Vec<_> = holders.collect::<Result<_>>()?;
        for holder in &holders {
            goes_on(holder).context("before the fault")?;
        }
        let daemon = self.nfsvol.process().pid()?;

        for case in &self.cases {
            (case.fault.begin)(&case.faulty, self.node).context(case.fault.name)?;
        }
        let during = self.during().context("during the fault")?;
        lab::note(format!(
            "{}: p99 before {before:?}, during {during:?}",
            self.node.name()
        ));
        for (what, took) in TIMED_CALLS.iter().zip(during) {
            ensure!(
                took < NO_WAIT,
                "p99 of {what} of healthy volumes: {took:?} during the fault"
            );
        }
        for case in &self.cases {
            (case.fault.end)(&case.faulty, self.node).context(case.fault.name)?;
        }
        for (case, holder) in self.cases.iter().zip(&holders) {
            let after = self.after(case, holder);
            after.with_context(|| format!("after the fault: {}", case.fault.name))?;
        }
        ensure!(
            self.nfsvol.process().is_running()? && self.nfsvol.process().pid()? == daemon,
            "the daemon was started anew"
        );
        for holder in &holders {
            holder.kill()?;
        }
        self.clean_up()
    }

    /// A process that has the volume in a mount namespace of its own, as a container has, and
    /// writes and reads a file in it for ever.
    fn hold(&self, case: &Case) -> Result<Process<'static>> {
        let volume = case.volume("held");
        let script = format!(
            "mkdir -p /mnt/{volume}; mount --bind {VOLUMES}/{volume} /mnt/{volume}
             umount {VOLUMES}/{volume}; cd /; n=0
             while :; do
                 n=$((n+1)); f=/mnt/{volume}/count
                 if echo $n >$f && read m <$f && [ \"$m\" = $n ]; then echo works $n; fi
                 sleep 1
             done 2>&1"
        );
        let argv = [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            &script,
        ];
        self.node.spawn(&format!("holder-{volume}"), &argv)
    }

    /// Calls on the healthy server's volume: how long they take is what matters.
    fn timed(&self) -> Vec<Call> {
        let calm = self.calm();
        let mut sequence = Vec::new();
        for n in 0..TIMED {
            let id = format!("container{n}");
            sequence.push(Call::get(&calm));
            sequence.push(Call::list());
            sequence.push(Call::mount(&calm, &id));
            sequence.push(Call::unmount(&calm, &id));
        }
        sequence
    }

    /// All calls on the faulty servers' volumes at once, and beside them those that are timed.
    fn during(&self) -> Result<Vec<Duration>> {
        let calls = || self.cases.iter().flat_map(Case::calls);
        let series: Vec<_> = calls().map(|(call, _)| vec![call]).collect();
        let (answers, p99) = thread::scope(|scope| {
            let answers = scope.spawn(|| calls::side_by_side(self.node, &series));
            // What all these cost the host's processor is over when the known have been told.
            let p99 = self
                .known()
                .and_then(|()| p99(&calls::all(self.node, &self.timed())?));
            let answers = answers.join().map_err(|_| anyhow!("a thread panicked"));
            (answers, p99)
        });
        let mut answers = answers??.into_iter().flatten();
        let looked = Instant::now();
        let mut wrong = Vec::new();
        for case in &self.cases {
            for (call, expected) in case.calls() {
                let first = answers.next().context("no answer")?;
                let outcome = self.is_as_expected(case, &call, expected, first, looked);
                wrong.extend(outcome.err().map(|error| format!("{error:#}")));
            }
        }
        ensure!(wrong.is_empty(), "{wrong:#?}");
        p99
    }

    /// Volumes of the faulty servers are known on, at once.
    fn known(&self) -> Result {
        let volumes = self.cases.iter().map(|case| case.volume("idle"));
        let volumes: Vec<_> = volumes.collect();
        let asked = volumes.iter();
        let series: Vec<_> = asked
            .map(|volume| vec![Call::get(volume).times(20), Call::list().times(20)])
            .collect();
        let answers = calls::side_by_side(self.node, &series)?;
        for (volume, answers) in volumes.iter().zip(answers) {
            let half = calls::percentile(&answers, 50);
            ensure!(
                half < NO_WAIT,
                "half of the calls on {volume} took {half:?}"
            );
            for answer in answers {
                ensure!(answer.took < self.limits.deadline, "too late: {answer}");
                let body = answer.ok()?.to_string();
                ensure!(body.contains(volume), "{volume} is not in {body}");
            }
        }
        Ok(())
    }

    /// A call answers in time, and as expected; until the fault shows it may work, and is undone
    /// and made again. It was made when the fault began; its answer is looked at later.
    fn is_as_expected(
        &self,
        case: &Case,
        call: &Call,
        expected: Answer,
        mut answer: calls::Answer,
        looked: Instant,
    ) -> Result {
        loop {
            let deadline = if answer.call.contains(".Mount") {
                self.limits.mount_deadline
            } else {
                self.limits.deadline
            };
            ensure!(answer.took < deadline + SLACK, "too late: {answer}");
            lab::note(format!("{}: {answer}", case.prefix));
            let words = match expected {
                // The server may have been started anew for the fault.
                Answer::Works
                    if answer.status != 200
                        && !answer.call.contains(".Unmount")
                        && looked.elapsed() < PATIENCE =>
                {
                    answer = self.call(call.clone())?;
                    continue;
                }
                Answer::Works => return answer.ok().map(drop),
                Answer::Fails(words) => words,
            };
            // A look at a share is trusted for some seconds, so a fault may show a little later.
            let showing = answer.status == 200 && looked.elapsed() < PATIENCE;
            if showing && answer.call.contains(".Mount") {
                self.ok(Call::unmount(&case.volume("idle"), "during"))?;
                answer = self.call(call.clone())?;
                continue;
            }
            let text = answer.fails()?;
            let mut parts = words.iter().copied().chain([case.share.as_str()]);
            let Some(part) = parts.find(|part| !part.split('|').any(|word| text.contains(word)))
            else {
                return Ok(());
            };
            // Refused while the server was started anew for the fault, or a healthy share on a busy
            // machine was late.
            ensure!(looked.elapsed() < PATIENCE, "{part:?} is not in: {text}");
            thread::sleep(AGAIN);
            answer = self.call(call.clone())?;
        }
    }

    /// Everything works again.
    fn after(&self, case: &Case, holder: &Process<'_>) -> Result {
        let removed = case.volume("removed");
        let mut calls = vec![
            case.create("new"),
            Call::mount(&case.volume("idle"), "after"),
            Call::mount(&case.volume("mounted"), "after"),
            Call::mount(&case.volume("held"), "after"),
        ];
        if let Answer::Fails(_) = case.fault.remove {
            // What could not be removed is there as before, not half gone.
            calls.push(Call::mount(&removed, "after"));
            calls.push(Call::unmount(&removed, "after"));
        }
        calls.push(Call::remove(&removed));
        for call in calls {
            let began = Instant::now();
            let mut answer = self.call(call.clone())?;
            while answer.status != 200 && began.elapsed() < PATIENCE {
                answer = self.call(call.clone())?;
            }
            lab::note(format!(
                "{}, {:?} after the fault: {answer}",
                case.prefix,
                began.elapsed()
            ));
            answer.ok()?;
        }
        for name in ["idle", "mounted", "held"] {
            let volume = case.volume(name);
            self.node.sh(&format!(
                "cd {VOLUMES}/{volume}; echo {name} >after; sync after; [ $(cat after) = {name} ]"
            ))?;
            let there = format!("cat {EXPORT}/{volume}/after");
            let there = case.faulty.server.node().sh(&there)?;
            ensure!(there == name, "on the server: {there:?}");
        }
        match case.fault.held {
            Held::Recovers => goes_on(holder),
            Held::IsStale => {
                let held = self.ok(Call::get(&case.volume("held")))?;
                let status = &held["Volume"]["Status"];
                let pid = holder.pid()?;
                let named = status["stale_holders"]
                    .as_array()
                    .is_some_and(|holders| holders.iter().any(|holder| holder["pid"] == pid));
                ensure!(named, "process {pid} is not a stale holder: {status:#}");
                Ok(())
            }
        }
    }

    fn clean_up(&self) -> Result {
        // The holder's worker ends a moment after it.
        let remove = |volume: &str| {
            wait_for(&format!("{volume} to be removed"), PATIENCE, || {
                self.ok(Call::remove(volume)).is_ok()
            })
        };
        self.ok(Call::unmount(&self.calm(), "before"))?;
        remove(&self.calm())?;
        for case in &self.cases {
            for (name, ids) in [
                ("held", &["before", "after"][..]),
                ("idle", &["during", "after"]),
                ("mounted", &["after"]),
            ] {
                for id in ids {
                    self.ok(Call::unmount(&case.volume(name), id))?;
                }
            }
            for name in ["held", "idle", "mounted", "new"] {
                remove(&case.volume(name))?;
            }
            case.faulty.server.kill()?;
        }
        let left = self.node.sh(&format!("ls {VOLUMES}"))?;
        ensure!(left.is_empty(), "mount points are left: {left}");
        Ok(())
    }
}

/// The holder writes, and reads what it wrote, from now on.
fn goes_on(holder: &Process<'_>) -> Result {
    let so_far = holder.log().len();
    wait_for("the volume's holder to work", PATIENCE, || {
        let log = holder.log();
        let news = log.get(so_far..).unwrap_or_default();
        news.matches("works").count() > 1
    })
    .with_context(|| {
        let log = holder.log();
        let last = log.lines().rev().take(5);
        last.collect::<Vec<_>>().join("\n")
    })
}

const TIMED_CALLS: [&str; 3] = ["Get", "List", "Mount"];

/// What 99 of 100 took, of each of [`TIMED_CALLS`].
fn p99(answers: &[calls::Answer]) -> Result<Vec<Duration>> {
    let of = |what: &&str| {
        let path = format!("/VolumeDriver.{what} ");
        let of = answers.iter().filter(|a| a.call.starts_with(&path));
        let of: Vec<calls::Answer> = of.cloned().collect();
        ensure!(of.len() == TIMED, "{} of {what}", of.len());
        for answer in &of {
            answer.clone().ok()?;
        }
        Ok(calls::percentile(&of, 99))
    };
    TIMED_CALLS.iter().map(of).collect()
}
