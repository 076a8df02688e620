use std::sync::Arc;

use proptest::prelude::*;

use super::super::room::Room;
use super::*;

const CHUNK: usize = 16;
const SPACE: usize = 96;

#[derive(Debug, Clone)]
enum Step {
    Write {
        at: usize,
        len: usize,
        owner: u8,
    },
    Take {
        force: bool,
    },
    Land {
        which: usize,
        short: bool,
        stable: bool,
    },
    Fail {
        which: usize,
    },
    Commit,
    Crash,
    BeginRead,
    EndRead,
    Mark,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..SPACE - 24, 1usize..24, 0u8..2)
            .prop_map(|(at, len, owner)| Step::Write { at, len, owner }),
        4 => any::<bool>().prop_map(|force| Step::Take { force }),
        4 => (0usize..4, prop::bool::weighted(0.2), prop::bool::weighted(0.2))
            .prop_map(|(which, short, stable)| Step::Land { which, short, stable }),
        1 => (0usize..4).prop_map(|which| Step::Fail { which }),
        2 => Just(Step::Commit),
        1 => Just(Step::Crash),
        2 => Just(Step::BeginRead),
        2 => Just(Step::EndRead),
        1 => Just(Step::Mark),
    ];
    prop::collection::vec(step, 0..80)
}

/// A server that keeps unstable writes in memory and loses them when it crashes.
struct Server {
    memory: Vec<u8>,
    disk: Vec<u8>,
    verifier: Verifier,
}

impl Server {
    fn crash(&mut self) {
        self.memory = self.disk.clone();
        self.verifier[0] = self.verifier[0].wrapping_add(1);
    }
}

fn view(held: &Held<u8>, server: &[u8], reader: Option<ReadToken>) -> Vec<u8> {
    let mut bytes = server.to_vec();
    held.overlay(0, &mut bytes, reader);
    bytes
}

/// That the indices say what the segments do.
fn check(held: &Held<u8>) {
    let sum: usize = held.segments.values().map(|s| s.data.len()).sum();
    assert_eq!(held.bytes(), sum);
    let mut flights = held.flights.len();
    for (&at, segment) in &held.segments {
        assert_eq!(segment.data.len(), segment.share.bytes());
        assert!(segment.data.whole() <= 2 * segment.data.len());
        let (mark, key) = (segment.mark, (segment.mark, at));
        let full = segment.data.len() >= held.chunk;
        match segment.state {
            State::Unsent => {
                assert!(held.unsent.contains(&key) && (!full || held.full.contains(&key)));
            }
            State::Sending(id) => {
                assert!(held.flights.iter().any(|o| o.id == id && o.mark <= mark))
            }
            State::Written { order, .. } => {
                assert!(held.written.contains(&(order, at)) && held.written_marks.contains(&key));
            }
            State::Durable { after } => assert!(held.durable.contains(&(after, at))),
        }
    }
    flights += held.unsent.len() + held.written.len() + held.durable.len();
    assert!(flights <= held.segments.len() + held.flights.len());
    assert!(held.full.is_subset(&held.unsent) && held.ghosts.len() <= 8);
}

fn settle(held: &mut Held<u8>, server: &mut Server) {
    for _ in 0..1000 {
        while let Some(flight) = held.take(u64::MAX) {
            let at = usize::try_from(flight.offset).unwrap();
            server.memory[at..at + flight.data.len()].copy_from_slice(&flight.data);
            held.sent(flight.id, flight.data.len(), server.verifier, false);
        }
        let begun = held.begin_commit();
        server.disk = server.memory.clone();
        held.committed(begun, server.verifier);
        if held.is_clean() {
            return;
        }
    }
    panic!("never clean: {held:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]
    //= test 1813-3.3.7-short
    //= test 1813-3.3.21-dirty
    //= test 1813-3.3.21-verf
    #[test]
    fn what_writers_wrote_is_what_readers_see_and_what_the_disk_gets(steps in steps()) {
        let room = Arc::new(Room::default());
        let mut held: Held<u8> = Held::default();
        let mut truth = vec![0u8; SPACE];
        let blank = Server { memory: truth.clone(), disk: truth.clone(), verifier: [0; 8] };
        let mut server = blank;
        let mut flights: Vec<Flight<u8>> = Vec::new();
        let mut reads: Vec<(ReadToken, Vec<u8>, Vec<Vec<u8>>)> = Vec::new();
        let mut marks: Vec<(u64, Vec<u8>)> = Vec::new();
        let mut fill = 0u8;
        let mut failed = false;
        for step in steps {
            match step {
                Step::Write { at, len, owner } => {
                    fill = fill.wrapping_add(1).max(1);
                    let data = vec![fill; len];
                    truth[at..at + len].copy_from_slice(&data);
                    held.write(at as u64, &data, &owner, CHUNK, room.take(len));
                    for (_, _, seen) in &mut reads {
                        seen.push(truth.clone());
                    }
                }
                Step::Take { force } => {
                    let force = if force { u64::MAX } else { 0 };
                    if let Some(flight) = held.take(force) {
                        prop_assert!(flight.data.len() <= CHUNK);
                        let end = flight.offset + flight.data.len() as u64;
                        for other in &flights {
                            let other_end = other.offset + other.data.len() as u64;
                            prop_assert!(end <= other.offset || other_end <= flight.offset);
                        }
                        flights.push(flight);
                    }
                }
                Step::Land { which, short, stable } if which < flights.len() => {
                    let flight = flights.swap_remove(which);
                    let len = flight.data.len();
                    let count = if short { len.div_ceil(2) } else { len };
                    let at = usize::try_from(flight.offset).unwrap();
                    server.memory[at..at + count].copy_from_slice(&flight.data[..count]);
                    if stable {
                        server.disk[at..at + count].copy_from_slice(&flight.data[..count]);
                    }
                    held.sent(flight.id, count, server.verifier, stable);
                }
                Step::Fail { which } if which < flights.len() && !failed && reads.is_empty() => {
                    // The bytes are lost, and said to be: from here on the truth is what
                    // is left.
                    let flight = flights.swap_remove(which);
                    held.failed(flight.id);
                    truth = view(&held, &server.memory, None);
                    marks.clear();
                    failed = true;
                }
                Step::Commit => {
                    let begun = held.begin_commit();
                    server.disk = server.memory.clone();
                    held.committed(begun, server.verifier);
                }
                Step::Crash => server.crash(),
                Step::BeginRead => {
                    let token = held.begin_read();
                    reads.push((token, server.memory.clone(), vec![truth.clone()]));
                }
                Step::EndRead if !reads.is_empty() => {
                    let (token, answer, seen) = reads.remove(0);
                    let got = view(&held, &answer, Some(token));
                    held.end_read(token);
                    for (i, byte) in got.iter().enumerate() {
                        prop_assert!(
                            failed || seen.iter().any(|s| s[i] == *byte),
                            "byte {} of a read is {}, never written in its time", i, byte
                        );
                    }
                }
                Step::Mark => marks.push((held.mark(), truth.clone())),
                Step::Land { .. } | Step::Fail { .. } | Step::EndRead => {}
            }
            if !failed {
                prop_assert_eq!(&view(&held, &server.memory, None), &truth);
                prop_assert_eq!(&view(&held, &server.disk, None), &truth);
            }
            check(&held);
            prop_assert_eq!(held.cost(), room.cost());
            for (mark, then) in &marks {
                if !failed && !held.pending(*mark) {
                    // Each byte is on disk as it was at the mark, or newer.
                    let newer = server.disk.iter().zip(then).all(|(disk, then)| disk >= then);
                    prop_assert!(newer);
                }
            }
        }
        for flight in flights {
            let at = usize::try_from(flight.offset).unwrap();
            server.memory[at..at + flight.data.len()].copy_from_slice(&flight.data);
            held.sent(flight.id, flight.data.len(), server.verifier, false);
        }
        settle(&mut held, &mut server);
        if !failed {
            prop_assert_eq!(&server.disk, &truth);
        }
        for (token, ..) in reads {
            held.end_read(token);
        }
        prop_assert!(held.is_empty());
        prop_assert_eq!(room.cost(), 0);
    }

    #[test]
    fn covers_means_every_byte(writes in prop::collection::vec((0u64..64, 1usize..16), 0..8),
                               at in 0u64..64, len in 1u64..20) {
        let room = Arc::new(Room::default());
        let mut held: Held<u8> = Held::default();
        let mut set = [false; 96];
        for (from, len) in writes {
            held.write(from, &vec![1; len], &0, CHUNK, room.take(len));
            let from = usize::try_from(from).unwrap();
            set[from..from + len].fill(true);
        }
        let range = usize::try_from(at).unwrap()..usize::try_from(at + len).unwrap();
        prop_assert_eq!(held.covers(at, at + len), set[range.clone()].iter().all(|b| *b));
        prop_assert_eq!(held.touches(at, at + len), set[range].iter().any(|b| *b));
    }
}

#[test]
fn small_writes_in_a_row_make_one_call() {
    let room = Arc::new(Room::default());
    let mut held: Held<u8> = Held::default();
    for i in 0..4u64 {
        held.write(i * 4, &[1; 4], &0, CHUNK, room.take(4));
    }
    let flight = held.take(0).unwrap();
    assert_eq!((flight.offset, flight.data.len()), (0, 16));
    assert!(held.take(u64::MAX).is_none());
}

//= test 1813-3.3.2-size
#[test]
fn a_cut_forgets_what_lies_beyond() {
    let room = Arc::new(Room::default());
    let mut held: Held<u8> = Held::default();
    held.write(0, &[1; 10], &0, CHUNK, room.take(10));
    held.cut(4);
    assert_eq!(held.end(None), Some(4));
    assert_eq!(held.bytes(), 4);
}

/// Whoever waits for a mark waits for a few calls, although every call finds its bytes overwritten.
fn rounds_until(owed: fn(&Held<u8>, u64) -> bool) -> Option<usize> {
    const ROUNDS: usize = 20;
    let room = Arc::new(Room::default());
    let mut held: Held<u8> = Held::default();
    let write = |held: &mut Held<u8>| held.write(0, &[1; 4], &0, CHUNK, room.take(4));
    write(&mut held);
    let first = held.take(u64::MAX).unwrap();
    write(&mut held);
    let mark = held.mark();
    let mut flight = first;
    for round in 0..ROUNDS {
        held.sent(flight.id, 4, [0; 8], false);
        let begun = held.begin_commit();
        write(&mut held);
        flight = held.take(u64::MAX).unwrap();
        write(&mut held);
        held.committed(begun, [0; 8]);
        if !owed(&held, mark) {
            return Some(round);
        }
    }
    None
}

#[test]
fn a_mark_is_settled_while_others_overwrite() {
    for owed in [Held::unsent_upto, Held::pending] {
        assert!(rounds_until(owed).is_some_and(|rounds| rounds <= 3));
        let _back = mutant::put_back(Mutant::HeirsTakeOverMarks);
        assert_eq!(rounds_until(owed), None, "the fault is found");
    }
}

#[test]
fn what_was_overwritten_and_lost_is_stood_for_by_what_overwrote_it() {
    let room = Arc::new(Room::default());
    let mut held: Held<u8> = Held::default();
    held.write(0, &[1; 4], &0, CHUNK, room.take(4));
    let mark = held.mark();
    let flight = held.take(u64::MAX).unwrap();
    held.write(0, &[2; 4], &0, CHUNK, room.take(4));
    held.sent(flight.id, 4, [0; 8], false);
    assert!(!held.unsent_upto(mark) && held.pending(mark));
    let begun = held.begin_commit();
    assert!(held.committed(begun, [1; 8]), "the server was restarted");
    assert!(held.unsent_upto(mark));
    let flight = held.take(mark).unwrap();
    held.sent(flight.id, 4, [1; 8], true);
    assert!(!held.pending(mark));
}

/// How much of a write of four chunks goes out without being forced.
fn sent_at_once() -> usize {
    let room = Arc::new(Room::default());
    let mut held: Held<u8> = Held::default();
    held.write(0, &[1; 4 * CHUNK], &0, CHUNK, room.take(4 * CHUNK));
    let flights = std::iter::from_fn(|| held.take(0));
    flights.map(|flight| flight.data.len()).sum()
}

#[test]
fn a_segment_of_several_chunks_goes_out_whole_without_being_forced() {
    assert_eq!(sent_at_once(), 4 * CHUNK);
    let _back = mutant::put_back(Mutant::RestsWaitToBeForced);
    assert_eq!(sent_at_once(), CHUNK);
}

#[test]
fn segments_written_from_the_end_to_the_start_make_one_call() {
    let room = Arc::new(Room::default());
    let mut held: Held<u8> = Held::default();
    for at in [12, 8, 4, 0] {
        held.write(at, &[1; 4], &0, CHUNK, room.take(4));
    }
    let flight = held.take(u64::MAX).unwrap();
    assert_eq!((flight.offset, flight.data.len()), (0, CHUNK));
}

#[test]
fn what_was_durable_before_a_read_is_not_laid_over_its_answer() {
    let room = Arc::new(Room::default());
    let mut held: Held<u8> = Held::default();
    held.write(0, &[1; 4], &0, CHUNK, room.take(4));
    let earlier = held.begin_read();
    let flight = held.take(u64::MAX).unwrap();
    held.sent(flight.id, 4, [0; 8], true);
    let later = held.begin_read();
    // Another host has written since.
    assert_eq!(view(&held, &[2; 4], Some(later)), [2; 4]);
    assert_eq!((held.end(None), held.covers(0, 4)), (None, false));
    // A READ that the server may have answered before the WRITE.
    assert_eq!(view(&held, &[0; 4], Some(earlier)), [1; 4]);
    let _back = mutant::put_back(Mutant::DurableHidesOthers);
    assert_eq!(view(&held, &[2; 4], Some(later)), [1; 4]);
}
