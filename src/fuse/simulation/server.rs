//! The server: its disk, its memory of calls, its restarts, and what it refuses.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use nfs3_types::nfs3::{
    CREATE3args, LINK3args, LOOKUP3args, NFS_PROGRAM, Nfs3Option, PROGRAM, READ3args, REMOVE3args,
    RENAME3args, SETATTR3args, VERSION, WRITE3args, filename3, nfsstat3,
};
use nfs3_types::rpc::opaque_auth;
use nfs3_types::xdr_codec::{Opaque, Pack, Unpack};

use super::dice::Dice;
use super::disk::Disk;
use super::model::WORD;
use super::network::Wire;
use super::procedures::{carry_out, id, take};
use super::{Seen, World};

/// How often the server does what, in calls of 1,000.
#[derive(Debug, Clone, Default)]
pub(super) struct Habits {
    /// The connection breaks before the call is carried out, or after it was, before the reply.
    pub(super) break_before: u64,
    pub(super) break_after: u64,
    pub(super) jukebox: u64,
    pub(super) answer_twice: u64,
    /// RENAME is refused with NOSPC, WRITE with that or IO, COMMIT with IO.
    pub(super) refuse_rename: u64,
    pub(super) refuse_write: u64,
    pub(super) refuse_commit: u64,
    /// READ and WRITE carry less than was asked for.
    pub(super) cut_short: u64,
    /// Answers come without the attributes that RFC 1813 lets a server leave out.
    pub(super) mute: u64,
    /// COMMIT finds that the server has lost everything.
    pub(super) lose: u64,
    /// There are no hard links.
    pub(super) no_links: bool,
    /// What a call takes at most, in milliseconds; a few take ten times as long.
    pub(super) slowness: u64,
    /// Calls are remembered across connections by client and xid, and repetitions answered from
    /// memory, until the server restarts.
    pub(super) remembers: bool,
}

/// The reply to a call; `None` while it is being carried out.
type Memory = Option<Vec<u8>>;

#[derive(Debug)]
pub(super) struct Server {
    pub(super) disk: Mutex<Disk>,
    pub(super) habits: Habits,
    pub(super) world: Arc<World>,
    dice: Mutex<Dice>,
    memory: Mutex<HashMap<(usize, u32), Memory>>,
    /// Calls that were answered once: a repetition is not refused what was done already.
    answered: Mutex<HashSet<(usize, u32)>>,
    /// What becomes of the next calls of these procedures: each is refused, or carried out.
    pub(super) orders: Mutex<VecDeque<(NFS_PROGRAM, Option<nfsstat3>)>>,
    /// Calls of these procedures are carried out, and not answered.
    pub(super) unanswered: Mutex<Vec<NFS_PROGRAM>>,
    /// The next calls of these procedures wait for so long before they are carried out.
    pub(super) held: Mutex<VecDeque<(NFS_PROGRAM, Duration)>>,
    /// The next answers to these procedures are late.
    pub(super) late: Mutex<VecDeque<(NFS_PROGRAM, Duration)>>,
    /// Which host last took a name from a file.
    takers: Mutex<HashMap<u64, usize>>,
    wires: Mutex<Vec<Weak<Wire>>>,
    /// Which life this is, and whether it is down in between.
    life: Mutex<(u64, bool)>,
}

impl Server {
    pub(super) fn new(habits: Habits, dice: Dice, world: Arc<World>, sizes: u32) -> Arc<Self> {
        let mut disk = Disk::new();
        disk.sizes = sizes;
        Arc::new(Self {
            disk: Mutex::new(disk),
            habits,
            world,
            dice: Mutex::new(dice),
            memory: Mutex::default(),
            answered: Mutex::default(),
            orders: Mutex::default(),
            unanswered: Mutex::default(),
            held: Mutex::default(),
            late: Mutex::default(),
            takers: Mutex::default(),
            wires: Mutex::default(),
            life: Mutex::new((1, false)),
        })
    }

    pub(super) fn roll(&self, below: u64) -> u64 {
        self.dice.lock().unwrap().below(below)
    }

    fn chance(&self, in_1000: u64) -> bool {
        // Faults end one day.
        self.world.is_troubled() && self.roll(1000) < in_1000
    }

    /// The present life; `None` while it is down.
    pub(super) fn life(&self) -> Option<u64> {
        let (life, down) = *self.life.lock().unwrap();
        (!down).then_some(life)
    }

    pub(super) fn connected(&self, wire: &Arc<Wire>) {
        let mut wires = self.wires.lock().unwrap();
        wires.retain(|wire| wire.strong_count() > 0);
        wires.push(Arc::downgrade(wire));
    }

    /// The power fails: memory is lost, and what is under way.
    pub(super) fn crash(&self) {
        {
            let (life, down) = &mut *self.life.lock().unwrap();
            *life += 1;
            *down = true;
        }
        self.disk.lock().unwrap().crash();
        self.memory.lock().unwrap().clear();
        for wire in self.wires.lock().unwrap().drain(..) {
            if let Some(wire) = wire.upgrade() {
                wire.reset();
            }
        }
        self.world.saw(Seen::Crash);
    }

    pub(super) fn start(&self) {
        self.life.lock().unwrap().1 = false;
    }

    /// A call has arrived.
    pub(super) async fn receive(self: Arc<Self>, wire: Arc<Wire>, call: Vec<u8>) {
        let gone = || self.life() != Some(wire.life) || (!self.habits.remembers && !wire.is_open());
        if gone() {
            return;
        }
        let mut input = call.as_slice();
        let header: [u32; 6] = std::array::from_fn(|_| take(&mut input));
        let [xid, 0, 2, PROGRAM, VERSION, procedure] = header else {
            panic!("the client sent {header:?}");
        };
        for _ in ["credential", "verifier"] {
            opaque_auth::unpack(&mut input).unwrap();
        }
        let host = wire.link.host;
        let key = (host, xid);
        if self.habits.remembers {
            let known = self.memory.lock().unwrap().get(&key).cloned();
            match known {
                Some(Some(reply)) => {
                    self.world.saw(Seen::Remembered);
                    return wire.reply(&reply).await;
                }
                // Being carried out for another connection: dropped, as knfsd does.
                Some(None) => return,
                None => self.memory.lock().unwrap().insert(key, None),
            };
        }
        let mut slow = self.roll(self.habits.slowness + 1);
        if self.chance(20) {
            slow *= 10;
        }
        tokio::time::sleep(Duration::from_millis(slow)).await;
        wait_for_order(&self.held, procedure).await;
        if gone() {
            return;
        }
        if self.chance(self.habits.break_before) {
            self.memory.lock().unwrap().remove(&key);
            return wire.reset();
        }
        let reply = self.carry_out(host, xid, procedure, input);
        let unanswered = |name: &NFS_PROGRAM| *name as u32 == procedure;
        if self.unanswered.lock().unwrap().iter().any(unanswered) {
            return;
        }
        if self.habits.remembers {
            self.memory.lock().unwrap().insert(key, Some(reply.clone()));
        }
        wait_for_order(&self.late, procedure).await;
        if self.chance(self.habits.break_after) {
            return wire.reset();
        }
        wire.reply(&reply).await;
        if self.chance(self.habits.answer_twice) {
            wire.reply(&reply).await;
        }
    }

    fn carry_out(&self, host: usize, xid: u32, procedure: u32, input: &[u8]) -> Vec<u8> {
        let procedure_name = NFS_PROGRAM::try_from(procedure).unwrap();
        let mut reply = Vec::new();
        for word in [xid, 1, 0, 0, 0, 0] {
            word.pack(&mut reply).unwrap();
        }
        if procedure != 0 && self.chance(self.habits.jukebox) {
            refuse(&mut reply, nfsstat3::NFS3ERR_JUKEBOX);
        } else if procedure_name == NFS_PROGRAM::NFSPROC3_LINK && self.habits.no_links {
            refuse(&mut reply, nfsstat3::NFS3ERR_NOTSUPP);
        } else if self.answered.lock().unwrap().insert((host, xid))
            && let Some(status) = self.refusal(procedure_name, input)
        {
            if matches!(
                procedure_name,
                NFS_PROGRAM::NFSPROC3_WRITE | NFS_PROGRAM::NFSPROC3_COMMIT
            ) {
                let file = id(&take::<nfs3_types::nfs3::nfs_fh3>(&mut &*input));
                self.world.model.refused(file, host);
            }
            refuse(&mut reply, status);
        } else {
            let short = self.shortened(procedure_name, input);
            let input = short.as_deref().unwrap_or(input);
            let mut disk = self.disk.lock().unwrap();
            if procedure_name == NFS_PROGRAM::NFSPROC3_COMMIT && self.chance(self.habits.lose) {
                self.world.saw(Seen::Lost);
                disk.crash();
            }
            disk.mute = self.chance(self.habits.mute);
            self.watch(&disk, host, procedure_name, input);
            let changed = changed(procedure_name, input);
            self.note_taker(&disk, host, procedure_name, changed.last());
            carry_out(&mut disk, procedure, input, &mut reply);
            self.world.names.lock().unwrap().changed.extend(changed);
        }
        let status = u32::from_be_bytes(*reply[24..].first_chunk().unwrap_or(&[0; 4]));
        if status == nfsstat3::NFS3ERR_STALE as u32 {
            self.file_is_gone(host, procedure_name, input);
        }
        self.world.note(|| {
            let detail = describe(procedure_name, input);
            format!("server: {procedure_name} of host {host} {detail}: status {status}")
        });
        reply
    }

    /// Notes whose file a call may take away with its last name.
    fn note_taker(&self, disk: &Disk, host: usize, procedure: NFS_PROGRAM, name: Option<&Vec<u8>>) {
        let takes = matches!(
            procedure,
            NFS_PROGRAM::NFSPROC3_REMOVE | NFS_PROGRAM::NFSPROC3_RENAME
        );
        if takes && let Some(Ok(file)) = name.map(|name| disk.lookup(super::disk::ROOT, name)) {
            self.takers.lock().unwrap().insert(file, host);
        }
    }

    /// The file of a WRITE or COMMIT is gone. NFS keeps no file that another host has open; one
    /// that the same host has open is put out of the way, and its bytes may not be lost.
    fn file_is_gone(&self, host: usize, procedure: NFS_PROGRAM, mut input: &[u8]) {
        let stores = matches!(
            procedure,
            NFS_PROGRAM::NFSPROC3_WRITE | NFS_PROGRAM::NFSPROC3_COMMIT
        );
        if !stores {
            return;
        }
        let file = id(&take::<nfs3_types::nfs3::nfs_fh3>(&mut input));
        let taker = self.takers.lock().unwrap().get(&file).copied();
        if taker.is_some_and(|taker| taker != host) || self.world.renames_late() {
            self.world.model.unsettle(file, host);
        }
    }

    fn refusal(&self, procedure: NFS_PROGRAM, mut input: &[u8]) -> Option<nfsstat3> {
        {
            let mut orders = self.orders.lock().unwrap();
            if let Some(at) = orders.iter().position(|order| order.0 == procedure) {
                return orders.remove(at).and_then(|order| order.1);
            }
        }
        match procedure {
            NFS_PROGRAM::NFSPROC3_LINK if self.habits.no_links => Some(nfsstat3::NFS3ERR_NOTSUPP),
            NFS_PROGRAM::NFSPROC3_RENAME if self.chance(self.habits.refuse_rename) => {
                // What was put out of the way can be put back.
                let from = take::<RENAME3args<'_, '_>>(&mut input).from;
                (!from.name.as_ref().starts_with(b".nfs")).then_some(nfsstat3::NFS3ERR_NOSPC)
            }
            NFS_PROGRAM::NFSPROC3_WRITE if self.chance(self.habits.refuse_write) => {
                self.world.saw(Seen::WriteRefused);
                let full = self.roll(2) == 0;
                Some(if full {
                    nfsstat3::NFS3ERR_NOSPC
                } else {
                    nfsstat3::NFS3ERR_IO
                })
            }
            NFS_PROGRAM::NFSPROC3_COMMIT if self.chance(self.habits.refuse_commit) => {
                self.world.saw(Seen::CommitRefused);
                Some(nfsstat3::NFS3ERR_IO)
            }
            _ => None,
        }
    }

    /// The arguments of a READ or WRITE of which only a part is carried out.
    fn shortened(&self, procedure: NFS_PROGRAM, mut input: &[u8]) -> Option<Vec<u8>> {
        let word = u32::try_from(WORD).unwrap();
        let part = |count: u32| {
            let words = u64::from(count / word);
            let kept = u32::try_from(self.roll(words)).unwrap() + 1;
            (words > 1 && self.chance(self.habits.cut_short)).then_some(kept * word)
        };
        let mut shorter = Vec::new();
        match procedure {
            NFS_PROGRAM::NFSPROC3_READ => {
                let mut args = take::<READ3args>(&mut input);
                args.count = part(args.count)?;
                args.pack(&mut shorter).unwrap();
            }
            NFS_PROGRAM::NFSPROC3_WRITE => {
                let mut args = take::<WRITE3args<'_>>(&mut input);
                args.count = part(args.count)?;
                args.data = Opaque::owned(args.data[..args.count as usize].to_vec());
                args.pack(&mut shorter).unwrap();
            }
            _ => return None,
        }
        self.world.saw(Seen::CutShort);
        Some(shorter)
    }

    /// No WRITE may land after a newer one of the same bytes. A cut may be a part of an open.
    fn watch(&self, disk: &Disk, host: usize, procedure: NFS_PROGRAM, mut input: &[u8]) {
        if procedure == NFS_PROGRAM::NFSPROC3_SETATTR {
            let args = take::<SETATTR3args>(&mut input);
            if let Nfs3Option::Some(0) = args.new_attributes.size {
                self.world.model.cut_by_open(id(&args.object), host);
            }
        }
        if procedure != NFS_PROGRAM::NFSPROC3_WRITE {
            return;
        }
        let args = take::<WRITE3args<'_>>(&mut input);
        let file = id(&args.file);
        let Some((_, there)) = disk.content(file) else {
            return;
        };
        let all: Vec<u64> = words(&args.data).collect();
        self.world.model.seen(file, args.offset / WORD, &all);
        let from = usize::try_from(args.offset).unwrap();
        let there = there.get(from..).unwrap_or(&[]);
        for (index, (old, new)) in (0..).zip(words(there).zip(words(&args.data))) {
            if self.world.model.is_newer(file, old, new) {
                let word = args.offset / WORD + index;
                self.world.fail(format!(
                    "file {file}: a WRITE of host {host} puts {new} over {old} at word {word}"
                ));
            }
        }
    }
}

/// Waits for as long as the first of these orders says, if it is for this procedure.
async fn wait_for_order(orders: &Mutex<VecDeque<(NFS_PROGRAM, Duration)>>, procedure: u32) {
    let is_meant = |order: &mut (NFS_PROGRAM, _)| order.0 as u32 == procedure;
    let order = orders.lock().unwrap().pop_front_if(is_meant);
    if let Some((_, pause)) = order {
        tokio::time::sleep(pause).await;
    }
}

/// The names that a call makes or takes away.
fn changed(procedure: NFS_PROGRAM, mut input: &[u8]) -> Vec<Vec<u8>> {
    let name = |name: &filename3<'_>| name.as_ref().to_vec();
    match procedure {
        NFS_PROGRAM::NFSPROC3_CREATE => {
            vec![name(&take::<CREATE3args<'_>>(&mut input).where_.name)]
        }
        NFS_PROGRAM::NFSPROC3_REMOVE => {
            vec![name(&take::<REMOVE3args<'_>>(&mut input).object.name)]
        }
        NFS_PROGRAM::NFSPROC3_LINK => vec![name(&take::<LINK3args<'_>>(&mut input).link.name)],
        NFS_PROGRAM::NFSPROC3_RENAME => {
            let args = take::<RENAME3args<'_, '_>>(&mut input);
            vec![name(&args.from.name), name(&args.to.name)]
        }
        _ => Vec::new(),
    }
}

/// The words of a file's bytes.
pub(super) fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks(8).map(|word| {
        let mut whole = [0; 8];
        whole[..word.len()].copy_from_slice(word);
        u64::from_be_bytes(whole)
    })
}

fn refuse(reply: &mut Vec<u8>, status: nfsstat3) {
    // Longer than what any failure holds; what is left over is ignored.
    for word in [status as u32, 0, 0, 0, 0] {
        word.pack(reply).unwrap();
    }
}

/// A name; a hidden one without what chance made of it.
fn shown(name: &[u8]) -> String {
    let hidden = name.starts_with(b".nfs");
    let length = if hidden { 20 } else { name.len() };
    String::from_utf8_lossy(&name[..length.min(name.len())]).into_owned()
}

fn describe(procedure: NFS_PROGRAM, mut input: &[u8]) -> String {
    match procedure {
        NFS_PROGRAM::NFSPROC3_WRITE => {
            let args = take::<WRITE3args<'_>>(&mut input);
            let from = args.offset / WORD;
            let to = from + args.data.len() as u64 / WORD;
            let all: Vec<u64> = words(&args.data).collect();
            format!("file {} words {from}..{to} {all:?}", id(&args.file))
        }
        NFS_PROGRAM::NFSPROC3_SETATTR => {
            let args = take::<SETATTR3args>(&mut input);
            format!("file {} {:?}", id(&args.object), args.new_attributes.size)
        }
        NFS_PROGRAM::NFSPROC3_RENAME => {
            let args = take::<RENAME3args<'_, '_>>(&mut input);
            let (from, to) = (shown(args.from.name.as_ref()), shown(args.to.name.as_ref()));
            format!("{from} to {to}")
        }
        NFS_PROGRAM::NFSPROC3_LINK => {
            let args = take::<LINK3args<'_>>(&mut input);
            format!("file {}", id(&args.file))
        }
        NFS_PROGRAM::NFSPROC3_REMOVE => {
            let args = take::<REMOVE3args<'_>>(&mut input);
            shown(args.object.name.as_ref())
        }
        NFS_PROGRAM::NFSPROC3_LOOKUP => {
            let args = take::<LOOKUP3args<'_>>(&mut input);
            shown(args.what.name.as_ref())
        }
        NFS_PROGRAM::NFSPROC3_CREATE => {
            let args = take::<CREATE3args<'_>>(&mut input);
            shown(args.where_.name.as_ref())
        }
        NFS_PROGRAM::NFSPROC3_GETATTR
        | NFS_PROGRAM::NFSPROC3_ACCESS
        | NFS_PROGRAM::NFSPROC3_READ
        | NFS_PROGRAM::NFSPROC3_COMMIT => {
            let handle = take::<nfs3_types::nfs3::nfs_fh3>(&mut input);
            format!("file {}", id(&handle))
        }
        _ => String::new(),
    }
}
