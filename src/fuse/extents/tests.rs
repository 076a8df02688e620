use proptest::prelude::*;

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

fn view(held: &Held<u8>, server: &[u8]) -> Vec<u8> {
    let mut bytes = server.to_vec();
    held.overlay(0, &mut bytes);
    bytes
}

fn settle(held: &mut Held<u8>, server: &mut Server) {
    for _ in 0..1000 {
        while let Some(flight) = held.take(CHUNK, u64::MAX) {
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
    #[test]
    fn what_writers_wrote_is_what_readers_see_and_what_the_disk_gets(steps in steps()) {
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
                    held.write(at as u64, &data, &owner, CHUNK);
                    for (_, _, seen) in &mut reads {
                        seen.push(truth.clone());
                    }
                }
                Step::Take { force } => {
                    let force = if force { u64::MAX } else { 0 };
                    if let Some(flight) = held.take(CHUNK, force) {
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
                    truth = view(&held, &server.memory);
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
                    let got = view(&held, &answer);
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
                prop_assert_eq!(&view(&held, &server.memory), &truth);
                prop_assert_eq!(&view(&held, &server.disk), &truth);
            }
            let sum: usize = held.segments.values().map(|s| s.data.len()).sum();
            prop_assert_eq!(held.bytes(), sum);
            for (mark, then) in &marks {
                if !failed && !held.pending(*mark) {
                    // Each byte is on disk as it was at the mark, or newer.
                    let newer = server.disk.iter().zip(then).all(|(disk, then)| disk >= then);
                    prop_assert!(newer);
                }
            }
        }
        for flight in flights {
            held.returned(flight.id);
        }
        settle(&mut held, &mut server);
        if !failed {
            prop_assert_eq!(&server.disk, &truth);
        }
        for (token, ..) in reads {
            held.end_read(token);
        }
        prop_assert!(held.is_empty());
    }

    #[test]
    fn covers_means_every_byte(writes in prop::collection::vec((0u64..64, 1usize..16), 0..8),
                               at in 0u64..64, len in 1u64..20) {
        let mut held: Held<u8> = Held::default();
        let mut set = [false; 96];
        for (from, len) in writes {
            held.write(from, &vec![1; len], &0, CHUNK);
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
    let mut held: Held<u8> = Held::default();
    for i in 0..4u64 {
        held.write(i * 4, &[1; 4], &0, CHUNK);
    }
    let flight = held.take(CHUNK, 0).unwrap();
    assert_eq!((flight.offset, flight.data.len()), (0, 16));
    assert!(held.take(CHUNK, u64::MAX).is_none());
}

#[test]
fn a_cut_forgets_what_lies_beyond() {
    let mut held: Held<u8> = Held::default();
    held.write(0, &[1; 10], &0, CHUNK);
    held.cut(4);
    assert_eq!(held.end(), Some(4));
    assert_eq!(held.bytes(), 4);
}
