//! What may happen next, and that it happens: calls, waits, and the fault of the case.

use std::collections::HashSet;
use std::io;
use std::time::Duration;

use super::Fault;
use super::server::{Key, Touched};
use super::world::{NAMES, TURN, TURNS, World};

/// After this time a call without an answer is given up ([`nfs::admin::AdminSettings`]).
const OP_DEADLINE: Duration = Duration::from_secs(5);

/// What may happen next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// The server carries out a call of a host, which goes on until its next.
    Call {
        host: usize,
        number: u64,
    },
    /// A host that waits for a time to pass goes on.
    Wait {
        host: usize,
    },
    /// A call that its host has given up is carried out.
    Late,
    Fault(Mishap),
}

/// A fault at one point of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mishap {
    /// The connection breaks after a call was carried out.
    Answer { host: usize, number: u64 },
    /// The connection breaks before.
    Lost { host: usize, number: u64 },
    /// There is no answer; the call is carried out later.
    Silence { host: usize, number: u64 },
    /// So many seconds pass, of which a host sees nothing.
    Pause { host: usize, secs: u64 },
    /// A host stops for ever.
    Death { host: usize },
    /// The server loses so many of its last changes.
    Forgets { changes: usize },
}

/// What each host has been seen to touch in any run of a case.
#[derive(Debug, Default)]
pub(super) struct AllTouched {
    seen: [HashSet<Key>; 2],
    changed: [HashSet<Key>; 2],
    /// Something was new: what was taken for apart may not have been.
    pub(super) grew: bool,
}

impl AllTouched {
    pub(super) fn note(&mut self, host: usize, touched: Touched) {
        for key in touched.seen {
            self.grew |= self.seen[host].insert(key);
        }
        for key in touched.changed {
            self.grew |= self.changed[host].insert(key);
        }
    }

    fn are_apart(&self, host: usize, touched: &Touched) -> bool {
        let (seen, changed) = (&self.seen[1 - host], &self.changed[1 - host]);
        !touched.seen.iter().any(|key| changed.contains(key))
            && !touched
                .changed
                .iter()
                .any(|key| changed.contains(key) || seen.contains(key))
    }
}

impl World {
    /// The calls that wait for the server, by host.
    fn open_calls(&self) -> Vec<(usize, u64)> {
        let wires = self.wires();
        let open = wires.waiting.iter().filter(|(_, w)| w.reply.is_none());
        open.map(|(number, waiting)| (waiting.call.host, *number))
            .collect()
    }

    /// What may happen next; nothing when all has ended.
    pub(super) fn steps(&self) -> Vec<Step> {
        let open = self.open_calls();
        let call = |(host, number): &(usize, u64)| Step::Call {
            host: *host,
            number: *number,
        };
        // A call that touches nothing that the other ever changes, nor the other way round, is made
        // at once: when makes no difference.
        if let Some(apart) = open
            .iter()
            .find(|(host, number)| self.is_apart(*host, *number))
        {
            let mut steps = vec![call(apart)];
            self.mishaps(std::slice::from_ref(apart), &mut steps);
            // Nor does it when the server forgets it.
            steps.retain(|step| !matches!(step, Step::Fault(Mishap::Forgets { .. })));
            return steps;
        }
        let mut steps: Vec<Step> = open.iter().map(call).collect();
        for (number, host) in self.hosts.iter().enumerate() {
            let waits = host.task.is_some() && !open.iter().any(|(of, _)| *of == number);
            if waits && host.turns < TURNS {
                steps.push(Step::Wait { host: number });
            }
        }
        if self.late.is_some() {
            steps.push(Step::Late);
        }
        self.mishaps(&open, &mut steps);
        steps
    }

    /// Whether nothing that the call touches is anything to the other host.
    fn is_apart(&self, host: usize, number: u64) -> bool {
        let wires = self.wires();
        let touched = wires.waiting[&number].call.touches(&wires.disk);
        let others = self.touched.lock().unwrap();
        // What is late comes from the host that has given it up.
        self.late.is_none() && others.are_apart(host, &touched)
    }

    fn mishaps(&self, open: &[(usize, u64)], steps: &mut Vec<Step>) {
        if self.fault.is_some() || (steps.is_empty() && open.is_empty()) {
            return;
        }
        for fault in self.faults {
            match fault {
                Fault::Break => {
                    for &(host, number) in open {
                        steps.push(Step::Fault(Mishap::Answer { host, number }));
                        steps.push(Step::Fault(Mishap::Lost { host, number }));
                    }
                }
                Fault::Late => {
                    for &(host, number) in open {
                        steps.push(Step::Fault(Mishap::Silence { host, number }));
                    }
                }
                Fault::Pause(secs) => {
                    for host in 0..2 {
                        if self.hosts[host].task.is_some() {
                            let secs = *secs;
                            steps.push(Step::Fault(Mishap::Pause { host, secs }));
                        }
                    }
                }
                Fault::Death => {
                    for host in 0..2 {
                        if self.hosts[host].task.is_some() {
                            steps.push(Step::Fault(Mishap::Death { host }));
                        }
                    }
                }
                Fault::Forget(changes) => {
                    let changes = *changes;
                    let done = self.wires().before.as_ref().map_or(0, Vec::len);
                    if changes <= done {
                        steps.push(Step::Fault(Mishap::Forgets { changes }));
                    }
                }
            }
        }
    }

    pub(super) fn take(&mut self, step: Step) {
        self.tell(step);
        match step {
            Step::Call { host, number } => {
                self.answer(number);
                self.go_on(host);
            }
            Step::Wait { host } => {
                self.hosts[host].turns += 1;
                self.hosts[host].note(None);
                self.advance(host, TURN);
                self.go_on(host);
            }
            Step::Late => {
                let call = self.late.take().unwrap();
                self.carry_out(&call);
            }
            Step::Fault(mishap) => {
                self.fault = Some(mishap);
                self.go_wrong(mishap);
            }
        }
    }

    fn broken() -> io::Error {
        io::ErrorKind::ConnectionReset.into()
    }

    fn go_wrong(&mut self, mishap: Mishap) {
        match mishap {
            Mishap::Answer { host, number } => {
                self.carry_out(&self.call(number));
                self.reply(number, Err(Self::broken()));
                self.go_on(host);
            }
            Mishap::Lost { host, number } => {
                self.reply(number, Err(Self::broken()));
                self.go_on(host);
            }
            Mishap::Silence { host, number } => {
                let call = self.call(number);
                self.late = (!call.only_asks()).then_some(call);
                self.hosts[host].note(None);
                self.advance(host, OP_DEADLINE);
                self.go_on(host);
            }
            Mishap::Pause { host, secs } => self.pass(secs, Some(host)),
            Mishap::Death { host } => {
                self.hosts[host].dead = true;
                self.hosts[host].task = None;
                self.facts.lock().unwrap().hosts[host].clear();
            }
            Mishap::Forgets { changes } => {
                {
                    let mut wires = self.wires();
                    let kept = wires.before.take().unwrap();
                    wires.disk.go_back_to(&kept[kept.len() - changes]);
                }
                for (_, number) in self.open_calls() {
                    self.reply(number, Err(Self::broken()));
                }
                for host in 0..2 {
                    self.wires().dials[host] += 1;
                    self.go_on(host);
                }
            }
        }
    }

    /// Whether two calls of different hosts lead to one state in either order.
    pub(super) fn can_be_swapped(&self, one: Step, other: Step) -> bool {
        let (
            Step::Call { host, number },
            Step::Call {
                host: of,
                number: its,
            },
        ) = (one, other)
        else {
            return false;
        };
        let wires = self.wires();
        let touched = |number| wires.waiting[&number].call.touches(&wires.disk);
        let (one, other) = (touched(number), touched(its));
        let meets = |changed: &[Key], other: &Touched| {
            let mut changed = changed.iter();
            changed.any(|key| other.changed.contains(key) || other.seen.contains(key))
        };
        host != of && !meets(&one.changed, &other) && !meets(&other.changed, &one)
    }

    fn tell(&mut self, step: Step) {
        let Some(mut story) = self.story.take() else {
            return;
        };
        let what = |number: &u64| {
            let wires = self.wires();
            wires.waiting[number].call.describe(&wires.disk)
        };
        story.push(match &step {
            Step::Call { host, number } => format!("{}: {}", NAMES[*host], what(number)),
            Step::Wait { host } => format!("{}: waits", NAMES[*host]),
            Step::Late => {
                let late = self.late.as_ref().unwrap();
                format!("late: {}", late.describe(&self.disk()))
            }
            Step::Fault(
                mishap @ (Mishap::Answer { host, number }
                | Mishap::Lost { host, number }
                | Mishap::Silence { host, number }),
            ) => format!("{mishap:?}: {}: {}", NAMES[*host], what(number)),
            Step::Fault(mishap) => format!("{mishap:?}"),
        });
        self.story = Some(story);
    }
}
