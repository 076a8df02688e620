//! The calls of one connection, without I/O; the time is passed in.
//!
//! A call stays in the table from the moment it is made until its reply, its deadline or its
//! cancellation, whatever happens to the connection meanwhile: when the connection is lost, all
//! calls are queued again, in the order in which they were made and under the same xid, so that
//! the server's duplicate request cache can tell a repetition. A reply to a xid that is not in
//! the table (late, or a duplicate) is ignored.
//!
//! A connection on which calls wait and nothing arrives is probed with a NULL call after
//! [`PROBE_AFTER`], and given up after [`GIVE_UP_AFTER`] or more. One that is alive but has left
//! a call without an answer gets that call again after [`RESEND_AFTER`], then ever more rarely.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::message::{Draft, Request};

/// Silence after which the connection is probed: well above what a busy server takes for a call.
pub(crate) const PROBE_AFTER: Duration = Duration::from_secs(5);
/// Silence after which the connection is given up, two probes later. A new connection gets
/// through sooner than TCP's own retransmission, which by then waits for some 25 s.
pub(crate) const GIVE_UP_AFTER: Duration = Duration::from_secs(15);
/// The most that [`GIVE_UP_AFTER`] grows to, doubling with each connection that stayed silent:
/// a server that is alive but stuck is not flooded with repetitions.
pub(crate) const GIVE_UP_AT_MOST: Duration = Duration::from_secs(60);
/// When a call is repeated on a connection that answers others: TCP loses nothing, so the server
/// has dropped it. As long as the kernel client waits over TCP (nfs(5), `timeo`).
pub(crate) const RESEND_AFTER: Duration = Duration::from_secs(60);
/// The longest pause between two repetitions; they double up to here.
pub(crate) const RESEND_AT_MOST: Duration = Duration::from_secs(600);
/// How often silence and repetitions are looked at while calls are in flight.
const TICK: Duration = Duration::from_secs(1);

/// A call in the table; `T` is where its outcome goes.
#[derive(Debug)]
struct Call<T> {
    request: Request,
    deadline: Option<Instant>,
    /// Position among all calls ever made: the order of repetition.
    order: u64,
    /// How often it was handed to a connection.
    sent: u32,
    /// On the present connection: when to send it again. `None` while it is queued.
    resend: Option<Instant>,
    slot: T,
}

/// A call that has come to its end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Finished<T> {
    pub(crate) slot: T,
    /// It went out more than once: the answer may be to a repetition of what was already done.
    pub(crate) retransmitted: bool,
}

/// What the connection needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Health {
    Good,
    /// Send a NULL call.
    Probe,
    /// Give the connection up.
    Dead,
}

/// What has gone out so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Calls, each counted once however often it went out.
    pub calls: u64,
    /// Repetitions of calls.
    pub repeated: u64,
}

impl std::ops::Add for Traffic {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            calls: self.calls + other.calls,
            repeated: self.repeated + other.repeated,
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct CallTable<T> {
    calls: HashMap<u32, Call<T>>,
    /// Calls to be sent; those that have ended since are skipped.
    queue: VecDeque<u32>,
    made: u64,
    /// Bytes of the calls in the table, as an estimate of the work ahead.
    weight: usize,
    /// Calls on the wire of the present connection.
    in_flight: usize,
    /// Since when nothing has arrived although calls were in flight.
    silent_since: Instant,
    probed: Option<Instant>,
    give_up_after: Duration,
    /// Whether the present connection answered a call.
    useful: bool,
    /// When [`Self::poll`] is next called; it need not be exact, but never later than due.
    armed: Option<Instant>,
    traffic: Traffic,
}

impl<T> CallTable<T> {
    #[must_use]
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            calls: HashMap::new(),
            queue: VecDeque::new(),
            made: 0,
            weight: 0,
            in_flight: 0,
            silent_since: now,
            probed: None,
            give_up_after: GIVE_UP_AFTER,
            useful: false,
            armed: None,
            traffic: Traffic::default(),
        }
    }

    #[must_use]
    pub(crate) fn traffic(&self) -> Traffic {
        self.traffic
    }

    #[must_use]
    pub(crate) fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// How many calls were ever made.
    #[must_use]
    pub(crate) fn made(&self) -> u64 {
        self.made
    }

    #[must_use]
    pub(crate) fn contains(&self, xid: u32) -> bool {
        self.calls.contains_key(&xid)
    }

    /// Bytes waiting to be sent or answered.
    #[must_use]
    pub(crate) fn weight(&self) -> usize {
        self.weight
    }

    /// Adds a call and queues it; the xid must not be in the table. `true` when the timer has to
    /// be set anew because it would fire too late for this call.
    pub(crate) fn insert(
        &mut self,
        xid: u32,
        draft: Draft,
        deadline: Option<Instant>,
        slot: T,
    ) -> bool {
        debug_assert!(!self.contains(xid), "the transport picks a free xid");
        let call = Call {
            request: draft.seal(xid),
            deadline,
            order: self.made,
            sent: 0,
            resend: None,
            slot,
        };
        self.made += 1;
        self.weight += call.request.weight();
        self.calls.insert(xid, call);
        self.queue.push_back(xid);
        match (self.armed, deadline) {
            (None, _) => true,
            (Some(armed), Some(deadline)) => deadline < armed,
            (Some(_), None) => false,
        }
    }

    /// Takes the next queued call, to be written now.
    pub(crate) fn next_to_send(&mut self, now: Instant) -> Option<Request> {
        while let Some(xid) = self.queue.pop_front() {
            let Some(call) = self.calls.get_mut(&xid) else {
                continue;
            };
            if call.resend.is_some() {
                continue;
            }
            let pause = RESEND_AFTER * 2u32.saturating_pow(call.sent.min(8));
            call.resend = Some(now + pause.min(RESEND_AT_MOST));
            match call.sent {
                0 => self.traffic.calls += 1,
                _ => self.traffic.repeated += 1,
            }
            call.sent += 1;
            let request = call.request.clone();
            if self.in_flight == 0 {
                self.heard(now);
            }
            self.in_flight += 1;
            return Some(request);
        }
        None
    }

    #[must_use]
    pub(crate) fn has_queued(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Bytes have come from the server.
    pub(crate) fn heard(&mut self, now: Instant) {
        self.silent_since = now;
        self.probed = None;
    }

    /// The reply to a call has come. `None` for a xid that nobody waits for.
    pub(crate) fn reply(&mut self, xid: u32) -> Option<Finished<T>> {
        let finished = self.forget(xid)?;
        self.useful = true;
        self.give_up_after = GIVE_UP_AFTER;
        Some(finished)
    }

    /// Forgets one call; its reply will be ignored. The others are not touched.
    pub(crate) fn forget(&mut self, xid: u32) -> Option<Finished<T>> {
        let call = self.calls.remove(&xid)?;
        self.weight -= call.request.weight();
        if call.resend.is_some() {
            self.in_flight -= 1;
        }
        // Calls that end while the connection is down leave their numbers in the queue.
        if self.queue.len() > 2 * self.calls.len() + 64 {
            let calls = &self.calls;
            self.queue.retain(|xid| calls.contains_key(xid));
        }
        Some(Finished {
            slot: call.slot,
            retransmitted: call.sent > 1,
        })
    }

    /// Forgets all calls.
    pub(crate) fn drain(&mut self) -> Vec<T> {
        self.queue.clear();
        self.weight = 0;
        self.in_flight = 0;
        self.calls.drain().map(|(_, call)| call.slot).collect()
    }

    /// A new connection stands.
    pub(crate) fn connected(&mut self, now: Instant) {
        self.heard(now);
        self.useful = false;
    }

    /// The connection is lost: everything is to be sent again. Returns whether the connection
    /// had answered any call.
    pub(crate) fn disconnected(&mut self) -> bool {
        //= 5531-5-repeat: A call that is repeated keeps its transaction ID, so that the server
        //= can tell it from a new one.
        let mut all: Vec<(u64, u32)> = Vec::with_capacity(self.calls.len());
        for (xid, call) in &mut self.calls {
            call.resend = None;
            all.push((call.order, *xid));
        }
        all.sort_unstable();
        self.queue = all.into_iter().map(|(_, xid)| xid).collect();
        self.in_flight = 0;
        self.useful
    }

    /// Ends the calls whose deadline has passed, queues those that are due again, and says how
    /// the connection does. Called when [`Self::wake_at`] says so.
    pub(crate) fn poll(&mut self, now: Instant) -> (Vec<T>, Health) {
        let mut late: Vec<(u64, u32)> = self
            .calls
            .iter()
            .filter(|(_, call)| call.deadline.is_some_and(|deadline| deadline <= now))
            .map(|(xid, call)| (call.order, *xid))
            .collect();
        // In order, so that a simulation runs the same way each time.
        late.sort_unstable();
        let late = late
            .into_iter()
            .filter_map(|(_, xid)| self.forget(xid))
            .map(|finished| finished.slot)
            .collect();
        (late, self.check(now))
    }

    fn check(&mut self, now: Instant) -> Health {
        if self.in_flight == 0 {
            return Health::Good;
        }
        let silence = now.saturating_duration_since(self.silent_since);
        if silence >= self.give_up_after {
            self.give_up_after = (self.give_up_after * 2).min(GIVE_UP_AT_MOST);
            return Health::Dead;
        }
        let mut due: Vec<(u64, u32)> = Vec::new();
        for (xid, call) in &mut self.calls {
            if call.resend.is_some_and(|at| at <= now) {
                call.resend = None;
                due.push((call.order, *xid));
            }
        }
        due.sort_unstable();
        self.in_flight -= due.len();
        self.queue.extend(due.into_iter().map(|(_, xid)| xid));
        let since_probe = self
            .probed
            .map_or(silence, |at| now.saturating_duration_since(at));
        if since_probe >= PROBE_AFTER {
            self.probed = Some(now);
            return Health::Probe;
        }
        Health::Good
    }

    /// When to call [`Self::poll`]; `None` when there is nothing to wait for.
    pub(crate) fn wake_at(&mut self, now: Instant) -> Option<Instant> {
        let deadline = self.calls.values().filter_map(|call| call.deadline).min();
        let tick = (!self.calls.is_empty()).then(|| now + TICK);
        self.armed = [deadline, tick].into_iter().flatten().min();
        self.armed
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::rpc::message::Program;

    const ANY: Program = Program {
        number: 100_003,
        version: 3,
    };

    fn draft() -> Draft {
        Draft::new(ANY, 0, None, |_| {})
    }

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn xid(request: &Request) -> u32 {
        let head = request.chunks().next().unwrap();
        u32::from_be_bytes(head[4..8].try_into().unwrap())
    }

    fn sent<T>(table: &mut CallTable<T>, now: Instant) -> Vec<u32> {
        std::iter::from_fn(|| table.next_to_send(now))
            .map(|request| xid(&request))
            .collect()
    }

    //= test 5531-5-repeat
    #[test]
    fn a_lost_connection_repeats_unanswered_calls_in_order_under_their_xids() {
        let now = Instant::now();
        let mut table = CallTable::new(now);
        table.connected(now);
        for n in [7, 3, 9, 1] {
            table.insert(n, draft(), None, n);
        }
        assert_eq!(sent(&mut table, now), [7, 3, 9, 1]);
        assert!(!table.reply(3).unwrap().retransmitted);
        assert!(table.disconnected(), "it had answered a call");
        table.insert(2, draft(), None, 2);
        table.connected(now);
        assert_eq!(sent(&mut table, now), [7, 9, 1, 2]);
        assert!(table.reply(9).unwrap().retransmitted);
        assert!(!table.reply(2).unwrap().retransmitted);
        let traffic = Traffic {
            calls: 5,
            repeated: 3,
        };
        assert_eq!(table.traffic(), traffic);
        assert_eq!(table.reply(9), None, "a duplicate");
        assert_eq!(table.reply(1000), None, "nobody asked");
    }

    #[test]
    fn a_forgotten_call_takes_nothing_else_along() {
        let now = Instant::now();
        let mut table = CallTable::new(now);
        for n in 0..4 {
            table.insert(n, draft(), None, n);
        }
        table.forget(1);
        assert_eq!(sent(&mut table, now), [0, 2, 3]);
        table.forget(2);
        assert_eq!(table.reply(2), None, "its reply comes late");
        assert_eq!(table.reply(3).unwrap().slot, 3);
        assert_eq!(table.calls.len(), 1);
    }

    #[test]
    fn deadlines_hold_without_a_connection() {
        let now = Instant::now();
        let mut table = CallTable::new(now);
        assert!(table.insert(1, draft(), Some(now + seconds(600)), "late"));
        assert!(table.wake_at(now).unwrap() <= now + seconds(600));
        let earlier = now + Duration::from_millis(10);
        assert!(
            table.insert(2, draft(), Some(earlier), "soon"),
            "the timer is set for later"
        );
        assert!(!table.insert(3, draft(), None, "never"));
        assert_eq!(table.wake_at(now), Some(earlier));
        assert_eq!(table.poll(earlier).0, ["soon"]);
        assert_eq!(table.poll(now + seconds(599)).0, Vec::<&str>::new());
        assert_eq!(table.poll(now + seconds(600)).0, ["late"]);
        assert_eq!(table.calls.len(), 1);
    }

    #[test]
    fn a_silent_connection_is_probed_then_given_up_ever_later() {
        let start = Instant::now();
        let mut table = CallTable::new(start);
        table.insert(1, draft(), None, ());
        table.connected(start);
        sent(&mut table, start);
        let mut first = Vec::new();
        let mut second = Vec::new();
        for (seen, from) in [(&mut first, start), (&mut second, start + seconds(100))] {
            for second in 1..=40 {
                match table.poll(from + seconds(second)).1 {
                    Health::Good => {}
                    health => seen.push((second, health)),
                }
                if seen.last().is_some_and(|(_, h)| *h == Health::Dead) {
                    table.disconnected();
                    table.connected(start + seconds(100));
                    sent(&mut table, start + seconds(100));
                    break;
                }
            }
        }
        let probe = Health::Probe;
        assert_eq!(first, [(5, probe), (10, probe), (15, Health::Dead)]);
        assert_eq!(second.last(), Some(&(30, Health::Dead)));
    }

    #[test]
    fn an_idle_connection_is_left_alone_and_a_busy_one_repeats_rarely() {
        let now = Instant::now();
        let mut table = CallTable::new(now);
        table.connected(now);
        assert_eq!(table.poll(now + seconds(1000)), (vec![], Health::Good));
        let start = now + seconds(1000);
        table.insert(1, draft(), None, ());
        assert_eq!(sent(&mut table, start), [1]);
        let mut repeated = Vec::new();
        for second in 1..=400 {
            let now = start + seconds(second);
            table.heard(now);
            assert_eq!(table.poll(now).1, Health::Good);
            repeated.extend(sent(&mut table, now).iter().map(|_| second));
        }
        assert_eq!(repeated, [60, 180]);
        assert!(table.reply(1).unwrap().retransmitted);
    }

    /// What may happen to a table.
    #[derive(Debug, Clone)]
    enum Event {
        Call { timeout: Option<u64> },
        Send(usize),
        Reply(u32),
        Forget(u32),
        Lose,
        Wait(u64),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            4 => proptest::option::of(1u64..100).prop_map(|timeout| Event::Call { timeout }),
            3 => (0usize..4).prop_map(Event::Send),
            3 => (0u32..40).prop_map(Event::Reply),
            1 => (0u32..40).prop_map(Event::Forget),
            1 => Just(Event::Lose),
            2 => (0u64..50).prop_map(Event::Wait),
        ]
    }

    proptest! {
        /// Against a plain list of calls: each ends exactly once, by its reply, its deadline or
        /// its caller, and none is lost from the queue.
        #[test]
        fn every_call_ends_exactly_once(events in proptest::collection::vec(event(), 0..200)) {
            let mut now = Instant::now();
            let mut table = CallTable::new(now);
            table.connected(now);
            let mut model: BTreeMap<u32, Option<Instant>> = BTreeMap::new();
            let mut next = 0;
            for event in events {
                match event {
                    Event::Call { timeout } => {
                        let deadline = timeout.map(|s| now + seconds(s));
                        table.insert(next, draft(), deadline, next);
                        model.insert(next, deadline);
                        next += 1;
                    }
                    Event::Send(count) => {
                        for _ in 0..count {
                            if let Some(request) = table.next_to_send(now) {
                                prop_assert!(model.contains_key(&xid(&request)));
                            }
                        }
                    }
                    Event::Reply(n) => {
                        let expected = model.remove(&n).map(|_| n);
                        prop_assert_eq!(table.reply(n).map(|f| f.slot), expected);
                    }
                    Event::Forget(n) => {
                        let expected = model.remove(&n).map(|_| n);
                        prop_assert_eq!(table.forget(n).map(|f| f.slot), expected);
                    }
                    Event::Lose => {
                        table.disconnected();
                        table.connected(now);
                    }
                    Event::Wait(s) => {
                        now += seconds(s);
                        let (mut late, _) = table.poll(now);
                        late.sort_unstable();
                        let due = |d: &Option<Instant>| d.is_some_and(|d| d <= now);
                        let expected: Vec<u32> =
                            model.iter().filter(|(_, d)| due(d)).map(|(n, _)| *n).collect();
                        model.retain(|_, d| !due(d));
                        prop_assert_eq!(late, expected);
                    }
                }
                prop_assert_eq!(table.calls.len(), model.len());
                prop_assert_eq!(table.weight() == 0, model.is_empty());
            }
            table.disconnected();
            let left: Vec<u32> = model.into_keys().collect();
            prop_assert_eq!(sent(&mut table, now), left);
        }
    }
}
