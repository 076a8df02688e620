//! What the server answered, and what it means for what is held.

use super::{Ghost, Held, Out, State, Verifier};

impl<C: Clone + PartialEq> Held<C> {
    /// A WRITE call came back: `count` bytes from the flight's start are in the server's memory,
    /// or on its disk when `durable`. The rest is unsent again.
    pub(in crate::fuse) fn sent(
        &mut self,
        id: u64,
        count: usize,
        verifier: Verifier,
        durable: bool,
    ) {
        let Some(out) = self.land(id) else {
            return;
        };
        let upto = out.end.min(out.start + count as u64);
        self.split(upto);
        let order = self.tick();
        for at in self.of_flight(&out) {
            //= 1813-3.3.7-short: “If the server writes less than count bytes, the client should
            //= issue another WRITE to write the remaining data.”
            if at >= upto {
                self.set_state(at, State::Unsent);
                self.send_again(at);
            } else if durable {
                self.make_durable(at);
            } else {
                //= 1813-3.3.21-dirty: “After a buffer is written with stable UNSTABLE, it must be
                //= considered as dirty by the client system until it is either flushed via a
                //= COMMIT operation or written via a WRITE operation with stable set to FILE_SYNC
                //= or DATA_SYNC.”
                self.set_state(at, State::Written { verifier, order });
            }
        }
        if let Some(mark) = out.overwritten {
            if upto < out.end {
                self.inherit(mark);
            } else if !durable {
                self.add_ghost(verifier, order, mark, out.owner);
            }
        }
    }

    /// It has to go out again, however small.
    fn send_again(&mut self, at: u64) {
        if let Some(segment) = self.segments.get(&at) {
            self.full.insert((segment.mark, at));
        }
    }

    /// A WRITE call failed for good: its bytes are dropped.
    pub(in crate::fuse) fn failed(&mut self, id: u64) {
        let Some(out) = self.land(id) else {
            return;
        };
        for at in self.of_flight(&out) {
            self.take_out(at);
        }
    }

    /// What is on the wire is unsent again, as if nothing could come of it any more: a fault that
    /// tests put back.
    pub(in crate::fuse) fn take_back(&mut self) {
        let flights: Vec<u64> = self.flights.iter().map(|out| out.id).collect();
        for id in flights {
            self.sent(id, 0, Verifier::default(), false);
        }
    }

    fn land(&mut self, id: u64) -> Option<Out<C>> {
        let index = self.flights.iter().position(|out| out.id == id)?;
        Some(self.flights.swap_remove(index))
    }

    fn of_flight(&self, out: &Out<C>) -> Vec<u64> {
        self.segments
            .range(out.start..out.end)
            .filter(|(_, s)| s.state == State::Sending(out.id))
            .map(|(&at, _)| at)
            .collect()
    }

    /// Names the moment before a COMMIT call is sent. One is under way at a time.
    pub(in crate::fuse) fn begin_commit(&mut self) -> u64 {
        self.begun = self.tick();
        self.begun
    }

    /// What was written before a COMMIT call was sent.
    fn written_before(&self, begun: u64) -> Vec<u64> {
        self.written
            .range(..(begun, 0))
            .map(|&(_, at)| at)
            .collect()
    }

    fn ghosts_before(&mut self, begun: u64) -> Vec<Ghost<C>> {
        self.ghosts
            .extract_if(.., |ghost| ghost.order < begun)
            .collect()
    }

    /// A COMMIT call that was sent at `begun` answered with this verifier. What was written under
    /// another one is unsent again; says whether there was any.
    pub(in crate::fuse) fn committed(&mut self, begun: u64, now: Verifier) -> bool {
        let mut lost = false;
        for at in self.written_before(begun) {
            match self.segments.get(&at).map(|segment| segment.state) {
                //= 1813-3.3.21-verf: “This information is required so that the client can safely
                //= determine whether the server could have lost cached data.”
                Some(State::Written { verifier, .. }) if verifier == now => self.make_durable(at),
                _ => {
                    self.set_state(at, State::Unsent);
                    self.send_again(at);
                    lost = true;
                }
            }
        }
        for ghost in self.ghosts_before(begun) {
            if ghost.verifier != now {
                self.inherit(ghost.mark);
                lost = true;
            }
        }
        lost
    }

    /// COMMIT failed for good: what waited for it is dropped.
    pub(in crate::fuse) fn commit_failed(&mut self, begun: u64) {
        for at in self.written_before(begun) {
            self.take_out(at);
        }
        self.ghosts_before(begun);
    }

    fn make_durable(&mut self, at: u64) {
        if self.reads.is_empty() {
            self.take_out(at);
        } else {
            let after = self.clock;
            self.set_state(at, State::Durable { after });
        }
    }
}
