//! TCP between a client and a server, at an address of its own: delays, drops, resets, silence,
//! and counts of the RPC calls that pass, by program and procedure (RFC 5531 sections 9 and 11).
//!
//! Limits: a call is counted when its record's first fragment begins; fragments that go on a
//! record are passed on uncounted.

use std::collections::{BTreeMap, VecDeque};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};

use super::{Lab, Result, process};

pub const NFS: u32 = 100_003;
pub const MOUNT: u32 = 100_005;
/// How often a silent direction looks whether it may go on.
const LOOK: Duration = Duration::from_millis(5);

/// What one read takes at most, and what is copied rather than passed on in place, in bytes.
const LARGE: usize = 1 << 20;
const SMALL: usize = 16 * 1024;
/// Pieces under way in one direction: of the large ones ten milliseconds at 3 GB/s.
const LARGE_PIECES: usize = 32;
const SMALL_PIECES: usize = 4096;

/// Bytes on their way.
struct Piece {
    came: Instant,
    bytes: Vec<u8>,
    length: usize,
}

/// Calls by (program, procedure).
pub type Calls = BTreeMap<(u32, u32), u64>;

#[derive(Debug, Default)]
struct State {
    /// Of every byte, in each direction, in microseconds.
    delay: AtomicU64,
    /// What comes in is kept back until this is false again.
    silent: AtomicBool,
    calls: Mutex<Calls>,
    connections: Mutex<Vec<TcpStream>>,
    accepted: AtomicU64,
}

/// A proxy in front of one server's ports.
#[derive(Debug)]
pub struct Proxy {
    ip: String,
    state: Arc<State>,
}

impl Proxy {
    /// Takes a new address, known as `name`, and passes these ports on to the server at `ip`.
    pub fn start(lab: &'static Lab, name: &str, ip: &str, ports: &[u16]) -> Result<Self> {
        let address = lab.address(name)?.v4();
        process::run(&["ip", "addr", "add", &format!("{address}/24"), "dev", "br0"])?.ok()?;
        let state = Arc::new(State::default());
        for &port in ports {
            let listener = TcpListener::bind((address.as_str(), port))
                .with_context(|| format!("listening on {address}:{port}"))?;
            let (state, target) = (Arc::clone(&state), format!("{ip}:{port}"));
            thread::spawn(move || {
                for client in listener.incoming().flatten() {
                    state.accepted.fetch_add(1, Ordering::Relaxed);
                    let Ok(server) = TcpStream::connect(&target) else {
                        reset(&client);
                        continue;
                    };
                    // The two ends are gone when this fails, and so is the connection.
                    let _ = connect(&state, client, server);
                }
            });
        }
        Ok(Self { ip: address, state })
    }

    pub fn ip(&self) -> &str {
        &self.ip
    }

    /// Delays every byte by this much in each direction; the round trip takes twice as long.
    pub fn delay(&self, each_way: Duration) {
        let micros = u64::try_from(each_way.as_micros()).unwrap_or(u64::MAX);
        self.state.delay.store(micros, Ordering::Relaxed);
    }

    /// Keeps connections open and passes nothing on, or passes on what was kept back.
    pub fn silence(&self, silent: bool) {
        self.state.silent.store(silent, Ordering::Relaxed);
    }

    /// Resets the connections that are open now; answers how many.
    pub fn reset(&self) -> Result<usize> {
        let mut open = self
            .state
            .connections
            .lock()
            .map_err(|_| anyhow!("a proxy panicked"))?;
        let ends = open.len();
        for stream in open.drain(..) {
            reset(&stream);
        }
        Ok(ends / 2)
    }

    /// Connections accepted so far.
    pub fn accepted(&self) -> u64 {
        self.state.accepted.load(Ordering::Relaxed)
    }

    /// Calls that passed since the start, or since this was asked last.
    pub fn take_calls(&self) -> Result<Calls> {
        let mut calls = self
            .state
            .calls
            .lock()
            .map_err(|_| anyhow!("a proxy panicked"))?;
        Ok(std::mem::take(&mut calls))
    }
}

/// Ends a connection with RST instead of FIN, so that neither side sees an orderly end.
fn reset(stream: &TcpStream) {
    // The connection may have ended by itself.
    let _ = rustix::net::connect_unspec(stream);
}

fn connect(state: &Arc<State>, client: TcpStream, server: TcpStream) -> Result {
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let mut open = state
        .connections
        .lock()
        .map_err(|_| anyhow!("a proxy panicked"))?;
    open.extend([client.try_clone()?, server.try_clone()?]);
    drop(open);
    pass(
        state,
        client.try_clone()?,
        server.try_clone()?,
        Some(Counter::default()),
    );
    pass(state, server, client, None);
    Ok(())
}

/// Passes bytes on in one direction: one thread reads and notes the time, one waits and writes.
/// Large reads are passed on in the memory they came into, which is then used again, so that the
/// proxy itself carries more than what is measured through it.
fn pass(state: &Arc<State>, mut from: TcpStream, mut to: TcpStream, mut counter: Option<Counter>) {
    // Both bounded, so that a writer who is held up holds up the sender too.
    let (sender, receiver) = mpsc::sync_channel::<Piece>(SMALL_PIECES);
    let (give_back, spare) = mpsc::channel();
    let reading = Arc::clone(state);
    thread::spawn(move || {
        let mut large = 1;
        let mut buffer = vec![0; LARGE];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            let came = Instant::now();
            if let (Some(counter), Ok(mut calls)) = (&mut counter, reading.calls.lock()) {
                for call in counter.feed(&buffer[..length]) {
                    *calls.entry(call).or_default() += 1;
                }
            }
            let bytes = if length <= SMALL {
                buffer[..length].to_vec()
            } else {
                let next = match spare.try_recv() {
                    Ok(next) => next,
                    Err(_) if large < LARGE_PIECES => {
                        large += 1;
                        vec![0; LARGE]
                    }
                    Err(_) => match spare.recv() {
                        Ok(next) => next,
                        Err(_) => break,
                    },
                };
                std::mem::replace(&mut buffer, next)
            };
            let piece = Piece {
                came,
                bytes,
                length,
            };
            if sender.send(piece).is_err() {
                break;
            }
        }
    });
    let state = Arc::clone(state);
    thread::spawn(move || {
        // A sleep is late by 50 µs otherwise.
        let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
        for piece in receiver {
            let delay = Duration::from_micros(state.delay.load(Ordering::Relaxed));
            thread::sleep((piece.came + delay).saturating_duration_since(Instant::now()));
            while state.silent.load(Ordering::Relaxed) {
                thread::sleep(LOOK);
            }
            if to.write_all(&piece.bytes[..piece.length]).is_err() {
                break;
            }
            if piece.bytes.len() == LARGE {
                // The reader may have ended.
                let _ = give_back.send(piece.bytes);
            }
        }
        // The other side may have ended it already.
        let _ = to.shutdown(Shutdown::Write);
    });
}

/// Finds the calls in a client's byte stream.
#[derive(Default)]
struct Counter {
    /// Bytes of the current fragment that are still to come.
    left: usize,
    /// The first bytes of what is looked at: a fragment's header, then the call's.
    head: VecDeque<u8>,
    in_body: bool,
    /// This fragment goes on a record; so will the next one.
    continued: bool,
    continued_next: bool,
}

/// xid, message type, RPC version, program, program version, procedure.
const CALL_HEADER: usize = 24;

impl Counter {
    fn feed(&mut self, bytes: &[u8]) -> Vec<(u32, u32)> {
        let mut calls = Vec::new();
        let mut rest = bytes;
        while !rest.is_empty() {
            if self.in_body {
                let wanted = CALL_HEADER.saturating_sub(self.head.len());
                let now = self.left.min(rest.len());
                self.head.extend(&rest[..now.min(wanted)]);
                self.left -= now;
                rest = &rest[now..];
                if wanted > 0 && self.head.len() == CALL_HEADER && !self.continued {
                    let word = |n: usize| {
                        self.head
                            .iter()
                            .skip(n * 4)
                            .take(4)
                            .fold(0, |word, &byte| (word << 8) | u32::from(byte))
                    };
                    if word(1) == 0 {
                        calls.push((word(3), word(5)));
                    }
                }
                if self.left == 0 {
                    self.in_body = false;
                    self.head.clear();
                }
            } else {
                self.head.push_back(rest[0]);
                rest = &rest[1..];
                if self.head.len() == 4 {
                    let mark = self
                        .head
                        .drain(..)
                        .fold(0, |word, byte| (word << 8) | u32::from(byte));
                    self.left = usize::try_from(mark & 0x7fff_ffff).unwrap_or(usize::MAX);
                    self.continued = self.continued_next;
                    self.continued_next = mark & 0x8000_0000 == 0;
                    self.in_body = self.left > 0;
                }
            }
        }
        calls
    }
}
