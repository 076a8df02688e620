//! A hostile NFS server: a real one behind a proxy that makes lies of its replies.
//!
//! Records (RFC 5531 section 11) are taken whole in both directions, so that a lie can be told of
//! one procedure only. Limit: NFSv3 over TCP, one lie at a time.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use anyhow::{Context, anyhow};

use super::proxy::NFS;
use super::{Lab, Result, process};

/// NFSv3 procedures (RFC 1813 section 3).
const LOOKUP: u32 = 3;
const REMOVE: u32 = 12;
const READDIRPLUS: u32 = 17;
/// Statuses of RFC 1813 section 2.6.
const BAD_COOKIE: u32 = 10_003;
const NOTSUPP: u32 = 10_004;
/// xid, type, reply state, verifier (flavour, length), accept state; then the NFS status.
const REPLY_HEADER: usize = 24;
/// The most a test has any use for.
const MAX_RECORD: usize = 16 << 20;
const LAST: u32 = 0x8000_0000;

/// What becomes of replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// A fragment header that announces 2 GiB, and then nothing.
    Length,
    /// A record that never ends: full fragments, none of them the last.
    Endless,
    /// True replies in fragments of one byte, with empty ones between.
    Crumbs,
    /// A status that RFC 1813 does not know.
    Status,
    /// Replies cut off in the middle.
    Cut,
    /// Every 32-bit word behind the status is 0xffff_fff0: each length and count is absurd.
    Lengths,
    /// Some bytes of each reply are others.
    Noise,
    /// Answers to READDIRPLUS are the first two of their connection, in turn, for ever.
    Cookies,
    /// Handles of LOOKUP are others each time.
    Handles,
    /// Replies to calls that nobody made.
    Strangers,
    /// READDIRPLUS is not supported.
    NamesOnly,
    /// Entries of READDIRPLUS come without attributes and handles.
    Bare,
    /// Some of them have names of 300 bytes.
    Long,
    /// A cookie is unknown after something was removed from a directory.
    Strict,
}

/// Calls under way on one connection, by xid: program, procedure, and of READDIRPLUS whether it
/// goes on from a cookie.
type Calls = Arc<Mutex<HashMap<[u8; 4], (u32, u32, bool)>>>;

#[derive(Debug)]
pub struct Liar {
    ip: String,
    lie: Arc<Mutex<Option<Lie>>>,
}

impl Liar {
    /// Takes a new address, known as `name`, in front of the server at `ip`.
    pub fn start(lab: &'static Lab, name: &str, ip: &str, ports: &[u16]) -> Result<Self> {
        let address = lab.address(name)?.v4();
        process::run(&["ip", "addr", "add", &format!("{address}/24"), "dev", "br0"])?.ok()?;
        let lie = Arc::<Mutex<Option<Lie>>>::default();
        for &port in ports {
            let listener = TcpListener::bind((address.as_str(), port))
                .with_context(|| format!("listening on {address}:{port}"))?;
            let (lie, target) = (Arc::clone(&lie), format!("{ip}:{port}"));
            thread::spawn(move || {
                for client in listener.incoming().flatten() {
                    // A connection whose ends are gone is gone itself.
                    let _ = TcpStream::connect(&target)
                        .map_err(anyhow::Error::from)
                        .and_then(|server| connect(&lie, &client, &server));
                }
            });
        }
        Ok(Self { ip: address, lie })
    }

    pub fn ip(&self) -> &str {
        &self.ip
    }

    /// From now on replies are lies; `None`: the truth again.
    pub fn tell(&self, lie: Option<Lie>) -> Result {
        *self.lie.lock().map_err(|_| anyhow!("the liar panicked"))? = lie;
        Ok(())
    }
}

fn connect(lie: &Arc<Mutex<Option<Lie>>>, client: &TcpStream, server: &TcpStream) -> Result {
    let calls = Calls::default();
    let (mut from, mut to) = (client.try_clone()?, server.try_clone()?);
    let noted = Arc::clone(&calls);
    thread::spawn(move || {
        while let Ok(call) = read_record(&mut from) {
            if let (Some(xid), Ok(mut calls)) = (call.first_chunk(), noted.lock()) {
                let (program, procedure) = (word(&call, 3), word(&call, 5));
                let goes_on = procedure == READDIRPLUS && has_cookie(&call);
                calls.insert(*xid, (program, procedure, goes_on));
            }
            if to.write_all(&marked(&call)).is_err() {
                break;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Both);
    });
    let (mut from, mut to) = (server.try_clone()?, client.try_clone()?);
    let lie = Arc::clone(lie);
    thread::spawn(move || {
        let mut turned = Turned::default();
        while let Ok(reply) = read_record(&mut from) {
            let call = reply
                .first_chunk()
                .and_then(|xid: &[u8; 4]| calls.lock().ok()?.remove(xid));
            let now = lie.lock().ok().and_then(|lie| *lie);
            let bytes = match (now, call) {
                (Some(Lie::Strict), Some((NFS, procedure, goes_on))) => {
                    marked(&turned.lose_places(procedure, goes_on, reply))
                }
                (Some(lie), Some((NFS, procedure, _))) => turned.turn(lie, procedure, reply),
                _ => marked(&reply),
            };
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Both);
    });
    Ok(())
}

/// One whole record, put together of its fragments.
fn read_record(from: &mut TcpStream) -> Result<Vec<u8>> {
    let mut record = Vec::new();
    loop {
        let mut mark = [0; 4];
        from.read_exact(&mut mark)?;
        let mark = u32::from_be_bytes(mark);
        let (start, length) = (record.len(), (mark & !LAST) as usize);
        anyhow::ensure!(start + length <= MAX_RECORD, "a record of {length} bytes");
        record.resize(start + length, 0);
        from.read_exact(&mut record[start..])?;
        if mark & LAST != 0 {
            return Ok(record);
        }
    }
}

/// The record as one fragment.
fn marked(record: &[u8]) -> Vec<u8> {
    let length = u32::try_from(record.len()).unwrap_or(0);
    [&(length | LAST).to_be_bytes(), record].concat()
}

fn word(record: &[u8], at: usize) -> u32 {
    let bytes = record.get(at * 4..).and_then(|rest| rest.first_chunk());
    bytes.map_or(0, |bytes| u32::from_be_bytes(*bytes))
}

/// An entry of READDIRPLUS.
struct Entry {
    fileid: [u8; 8],
    name: Vec<u8>,
    cookie: [u8; 8],
    /// Attributes and handle; empty for none.
    told: Vec<u8>,
}

/// A true reply to READDIRPLUS with its entries changed.
fn relisted(reply: &[u8], change: impl Fn(&mut Entry)) -> Vec<u8> {
    let mut rest = reply;
    let mut take = |length: usize| {
        let (taken, after) = rest.split_at(length.min(rest.len()));
        rest = after;
        taken
    };
    let number = |bytes: &[u8]| word(bytes, 0) as usize;
    let mut out = take(REPLY_HEADER + 4).to_vec();
    let attributes = take(4);
    out.extend(attributes);
    out.extend(take(84 * number(attributes)));
    out.extend(take(8)); // the verifier
    while number(take(4)) == 1 {
        let fileid = take(8).try_into().unwrap_or_default();
        let length = number(take(4));
        let name = take(length.next_multiple_of(4))[..length].to_vec();
        let cookie = take(8).try_into().unwrap_or_default();
        let attributes = take(4);
        let mut told = [attributes, take(84 * number(attributes))].concat();
        let handle = take(4);
        told.extend(handle);
        if number(handle) == 1 {
            let length = take(4);
            told.extend([length, take(number(length).next_multiple_of(4))].concat());
        }
        let mut entry = Entry {
            fileid,
            name,
            cookie,
            told,
        };
        change(&mut entry);
        out.extend(1u32.to_be_bytes());
        out.extend(entry.fileid);
        let length = entry.name.len();
        out.extend(u32::try_from(length).unwrap_or(0).to_be_bytes());
        entry.name.resize(length.next_multiple_of(4), 0);
        out.extend(entry.name);
        out.extend(entry.cookie);
        if entry.told.is_empty() {
            entry.told.resize(8, 0);
        }
        out.extend(entry.told);
    }
    out.extend(0u32.to_be_bytes());
    out.extend(take(4)); // whether that is the end
    out
}

/// Puts a failure without attributes in the place of what a call has brought.
fn refuse(reply: &mut Vec<u8>, status: u32) {
    reply.truncate(REPLY_HEADER);
    reply.extend([status, 0].map(u32::to_be_bytes).concat());
}

/// Whether a call of READDIRPLUS names a place to go on from.
fn has_cookie(call: &[u8]) -> bool {
    let mut at = REPLY_HEADER;
    for _ in ["credential", "verifier"] {
        at += 8 + (word(call, at / 4 + 1) as usize).next_multiple_of(4);
    }
    at += 4 + (word(call, at / 4) as usize).next_multiple_of(4); // the handle
    word(call, at / 4) != 0 || word(call, at / 4 + 1) != 0
}

/// What lies on one connection remember.
#[derive(Default)]
struct Turned {
    told: u32,
    listings: Vec<Vec<u8>>,
    /// Something was removed since a listing began.
    removed: bool,
}

impl Turned {
    /// BAD_COOKIE for what goes on after something was removed.
    fn lose_places(&mut self, procedure: u32, goes_on: bool, mut reply: Vec<u8>) -> Vec<u8> {
        match procedure {
            REMOVE => self.removed = true,
            READDIRPLUS if !goes_on => self.removed = false,
            READDIRPLUS if self.removed => refuse(&mut reply, BAD_COOKIE),
            _ => {}
        }
        reply
    }

    /// The bytes to send in place of a reply.
    fn turn(&mut self, lie: Lie, procedure: u32, mut reply: Vec<u8>) -> Vec<u8> {
        self.told = self.told.wrapping_add(1);
        let fill = |reply: &mut Vec<u8>, from: usize, word: u32| {
            for chunk in reply
                .get_mut(from..)
                .unwrap_or_default()
                .chunks_exact_mut(4)
            {
                chunk.copy_from_slice(&word.to_be_bytes());
            }
        };
        match lie {
            Lie::Length => return (LAST | 0x7fff_ffff).to_be_bytes().to_vec(),
            Lie::Endless => {
                let fragment = [&0x0001_0000_u32.to_be_bytes()[..], &[0; 0x0001_0000]].concat();
                return [&reply[..0], &fragment.repeat(64)].concat();
            }
            Lie::Crumbs => {
                let last = reply.len().saturating_sub(1);
                let crumbs = reply.iter().enumerate().flat_map(|(at, &byte)| {
                    let mark = if at == last { LAST | 1 } else { 1 };
                    [[0; 4], mark.to_be_bytes()]
                        .concat()
                        .into_iter()
                        .chain([byte])
                });
                return crumbs.collect();
            }
            Lie::Status => fill(&mut reply, REPLY_HEADER, 0x00ab_cdef),
            Lie::Lengths => fill(&mut reply, REPLY_HEADER + 4, 0xffff_fff0),
            Lie::Cut => reply.truncate(REPLY_HEADER + self.told as usize % 40),
            Lie::Noise => {
                let length = reply.len();
                for n in 1..=3 {
                    let at = (self.told.wrapping_mul(2_654_435_761).wrapping_mul(n) >> 7) as usize;
                    reply[4 + at % (length - 4)] ^= 0x55;
                }
            }
            Lie::Cookies if procedure == READDIRPLUS => {
                if self.listings.len() < 2 {
                    self.listings.push(reply.clone());
                } else {
                    self.listings.rotate_left(1);
                    let xid = reply[..4].to_vec();
                    reply.clone_from(&self.listings[1]);
                    reply[..4].copy_from_slice(&xid);
                }
            }
            // Behind the status: the handle's length, the handle.
            Lie::Handles if procedure == LOOKUP && word(&reply, 6) == 0 => {
                let last = 32 + (word(&reply, 7) as usize).saturating_sub(1);
                if let Some(byte) = reply.get_mut(last) {
                    *byte ^= u8::try_from(self.told % 255).unwrap_or(0) + 1;
                }
            }
            Lie::Strangers => {
                let mut strange = reply.clone();
                strange[..4].copy_from_slice(&(0xdead_0000 | self.told).to_be_bytes());
                return [marked(&strange), marked(&reply), marked(&reply)].concat();
            }
            Lie::NamesOnly if procedure == READDIRPLUS => {
                refuse(&mut reply, NOTSUPP);
            }
            Lie::Bare if procedure == READDIRPLUS && word(&reply, 6) == 0 => {
                reply = relisted(&reply, |entry| entry.told = Vec::new());
            }
            Lie::Long if procedure == READDIRPLUS && word(&reply, 6) == 0 => {
                reply = relisted(&reply, |entry| {
                    if entry.name.ends_with(b"7") {
                        entry.name.resize(300, b'7');
                    }
                });
            }
            Lie::Cookies | Lie::Handles | Lie::NamesOnly | Lie::Bare | Lie::Long | Lie::Strict => {}
        }
        marked(&reply)
    }
}
