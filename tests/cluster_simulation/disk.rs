//! The home share: a tree in memory, a clock that jumps, a server that forgets its last seconds or
//! exports an empty directory, and a link to each host on which answers get lost and calls arrive
//! late.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nfs::address::SharePath;
use nfs::admin::{AdminError, AdminErrorKind};
use nfsvol::doors::cluster::{Entry, Stamp, Store};
use tokio::time::{Instant, sleep};

use crate::Dice;
use crate::model::Model;

/// The longest that one operation takes.
pub(crate) const OP_DEADLINE: Duration = Duration::from_secs(5);
/// How much later than its caller gave up a call may arrive.
const LATE: u64 = 40_000;

#[derive(Debug, Clone)]
enum Kind {
    Dir,
    File(Vec<u8>),
}

#[derive(Debug, Clone)]
struct Node {
    kind: Kind,
    changed: Stamp,
}

/// One change or question, carried out at once.
#[derive(Debug, Clone)]
enum Op {
    List(String),
    Mtime(String),
    Read(String),
    Put(String, Vec<u8>),
    /// The same, unless it is there.
    Create(String, Vec<u8>),
    MakeDir(String),
    Rename(String, String),
    Remove(String),
}

enum Answer {
    Names(Option<Vec<Entry>>),
    Time(Option<Stamp>),
    Contents(Option<Vec<u8>>),
    Done(Stamp),
}

#[derive(Debug)]
pub(crate) struct Disk {
    nodes: BTreeMap<String, Node>,
    began: Instant,
    /// What the server's clock is ahead by, in milliseconds.
    pub(crate) ahead: i64,
    last: Stamp,
    pub(crate) ops: u64,
    /// The ticks of its clock, in milliseconds.
    pub(crate) tick: i64,
    /// It does not answer.
    pub(crate) down: bool,
    /// What it exports is an empty mount point.
    pub(crate) empty: bool,
    /// How often it was started.
    pub(crate) boots: u64,
    /// What was there, at most once a second.
    history: VecDeque<(Instant, BTreeMap<String, Node>)>,
}

/// How far back the server may go.
const KEPT: Duration = Duration::from_secs(45);

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(dir, _)| dir)
}

impl Disk {
    pub(crate) fn new() -> Self {
        let mut disk = Self {
            nodes: BTreeMap::new(),
            began: Instant::now(),
            ahead: 0,
            last: Stamp::default(),
            ops: 0,
            tick: 4,
            down: false,
            empty: false,
            boots: 0,
            history: VecDeque::new(),
        };
        let now = disk.now();
        let kind = Kind::File(b"{}".to_vec());
        let format = ".nfsvol/format.json".to_owned();
        disk.nodes.insert(format, Node { kind, changed: now });
        for dir in [
            "",
            ".nfsvol",
            ".nfsvol/volumes",
            ".nfsvol/tmp",
            ".nfsvol/trash",
        ] {
            disk.nodes.insert(
                dir.to_owned(),
                Node {
                    kind: Kind::Dir,
                    changed: now,
                },
            );
        }
        disk
    }

    /// The server's clock.
    fn now(&mut self) -> Stamp {
        let since = i64::try_from(self.began.elapsed().as_millis()).unwrap();
        let millis = 1_000_000_000_000 + (since + self.ahead) / self.tick * self.tick;
        let millis = u64::try_from(millis).unwrap();
        self.last = Stamp {
            secs: millis / 1000,
            nanos: u32::try_from(millis % 1000).unwrap() * 1_000_000,
        };
        self.last
    }

    fn is_dir(&self, path: &str) -> bool {
        matches!(
            self.nodes.get(path),
            Some(Node {
                kind: Kind::Dir,
                ..
            })
        )
    }

    fn below<'a>(&'a self, dir: &str) -> impl Iterator<Item = &'a String> {
        let prefix = format!("{dir}/");
        let first = prefix.clone();
        self.nodes
            .range(first..)
            .map(|(path, _)| path)
            .take_while(move |path| path.starts_with(&prefix))
    }

    fn touch(&mut self, dir: &str) -> Stamp {
        let now = self.now();
        if let Some(node) = self.nodes.get_mut(dir) {
            node.changed = now;
        }
        now
    }

    pub(crate) fn names(&self, dir: &str) -> Vec<String> {
        self.below(dir)
            .filter(|path| parent(path) == dir)
            .map(|path| path[dir.len() + 1..].to_owned())
            .collect()
    }

    pub(crate) fn file(&self, path: &str) -> Option<&[u8]> {
        match self.nodes.get(path) {
            Some(Node {
                kind: Kind::File(bytes),
                ..
            }) => Some(bytes),
            _ => None,
        }
    }

    /// All that is there, for people.
    pub(crate) fn tree(&self) -> String {
        let mut tree = String::new();
        for (path, node) in &self.nodes {
            let contents = match &node.kind {
                Kind::Dir => String::new(),
                Kind::File(bytes) => String::from_utf8_lossy(bytes).replace(['\n', ' '], ""),
            };
            tree.push_str(&format!("{path} {contents}\n"));
        }
        tree
    }

    /// The power fails: what was done since some time is forgotten, and what was written shortly
    /// before may be torn. Returns what it goes back to.
    pub(crate) fn crash(&mut self, back: Duration, dice: &mut Dice) -> Option<Instant> {
        self.boots += 1;
        let then = Instant::now() - back;
        while self.history.back().is_some_and(|(at, _)| *at > then) {
            self.history.pop_back();
        }
        let (at, nodes) = self.history.pop_back()?;
        self.nodes = nodes;
        for (path, node) in &mut self.nodes {
            let tears = path.ends_with("claim.json") || path.starts_with(".nfsvol/hosts/");
            if let Kind::File(bytes) = &mut node.kind
                && tears
                && node.changed.secs + 10 > self.last.secs
                && dice.below(4) == 0
            {
                bytes.clear();
            }
        }
        Some(at)
    }

    fn remember(&mut self) {
        let now = Instant::now();
        let last = self.history.back().map(|(at, _)| *at);
        if last.is_none_or(|at| now - at > Duration::from_secs(1)) {
            self.history.push_back((now, self.nodes.clone()));
            while self.history.front().is_some_and(|(at, _)| now - *at > KEPT) {
                self.history.pop_front();
            }
        }
    }

    fn carry_out(&mut self, op: &Op, model: &mut Model) -> Result<Answer, AdminErrorKind> {
        self.ops += 1;
        self.remember();
        if self.empty {
            return match op {
                Op::List(_) => Ok(Answer::Names(None)),
                Op::Mtime(_) => Ok(Answer::Time(None)),
                Op::Read(_) => Ok(Answer::Contents(None)),
                _ => Err(AdminErrorKind::NotFound),
            };
        }
        Ok(match op {
            Op::List(dir) => Answer::Names(self.is_dir(dir).then(|| {
                let name = |name: String| Entry {
                    mtime: self.nodes.get(&format!("{dir}/{name}")).map(|n| n.changed),
                    name,
                };
                self.names(dir).into_iter().map(name).collect()
            })),
            Op::Mtime(path) => Answer::Time(self.nodes.get(path).map(|node| node.changed)),
            Op::Read(path) => Answer::Contents(self.file(path).map(<[u8]>::to_vec)),
            Op::Create(path, _) if self.nodes.contains_key(path) => Answer::Done(self.now()),
            Op::Put(path, contents) | Op::Create(path, contents) => {
                if !self.is_dir(parent(path)) {
                    return Err(AdminErrorKind::NotFound);
                }
                let changed = self.touch(parent(path));
                let kind = Kind::File(contents.clone());
                self.nodes.insert(path.clone(), Node { kind, changed });
                Answer::Done(changed)
            }
            Op::MakeDir(path) => {
                if !self.is_dir(parent(path)) {
                    return Err(AdminErrorKind::NotFound);
                }
                let now = self.now();
                if !self.nodes.contains_key(path) {
                    let changed = self.touch(parent(path));
                    self.nodes.insert(
                        path.clone(),
                        Node {
                            kind: Kind::Dir,
                            changed,
                        },
                    );
                }
                Answer::Done(now)
            }
            Op::Rename(from, to) => {
                if !self.nodes.contains_key(from) || !self.is_dir(parent(to)) {
                    return Err(AdminErrorKind::NotFound);
                }
                if self.is_dir(to) && self.below(to).next().is_some() {
                    return Err(AdminErrorKind::Exists);
                }
                let moved: Vec<String> = self.below(from).cloned().chain([from.clone()]).collect();
                for path in moved {
                    if let Some(node) = self.nodes.remove(&path) {
                        let new = format!("{to}{}", &path[from.len()..]);
                        self.nodes.insert(new, node);
                    }
                }
                model.renamed(self, to);
                self.touch(parent(from));
                Answer::Done(self.touch(parent(to)))
            }
            Op::Remove(path) => {
                let gone: Vec<String> = self.below(path).cloned().chain([path.clone()]).collect();
                for path in gone {
                    self.nodes.remove(&path);
                }
                Answer::Done(self.touch(parent(path)))
            }
        })
    }
}

/// What a host's network and the host itself do.
#[derive(Debug, Default)]
pub(crate) struct Weather {
    pub(crate) cut: bool,
    pub(crate) paused_until: Option<Instant>,
    /// Of 1,000 calls, so many get lost before, get their answer lost after, or arrive late.
    pub(crate) mishaps: u64,
    /// Each call takes up to so many milliseconds; 0 means that most are quick.
    pub(crate) slow: u64,
}

/// The way of one host to the share.
#[derive(Clone)]
pub(crate) struct Link {
    pub(crate) disk: Arc<Mutex<Disk>>,
    pub(crate) model: Arc<Mutex<Model>>,
    pub(crate) weather: Arc<Mutex<Weather>>,
    pub(crate) dice: Arc<Mutex<Dice>>,
    /// The longest that one operation takes.
    pub(crate) deadline: Duration,
}

/// Waits while a host is stopped.
pub(crate) async fn awake(weather: &Mutex<Weather>) {
    loop {
        let until = weather.lock().unwrap().paused_until;
        match until {
            Some(until) if until > Instant::now() => tokio::time::sleep_until(until).await,
            _ => return,
        }
    }
}

impl Link {
    /// The same way with another deadline.
    pub(crate) fn within(&self, deadline: Duration) -> Self {
        Self {
            deadline,
            ..self.clone()
        }
    }

    fn roll(&self, limit: u64) -> u64 {
        self.dice.lock().unwrap().below(limit)
    }

    fn act(&self, op: &Op) -> Result<Answer, AdminErrorKind> {
        let mut model = self.model.lock().unwrap();
        self.disk.lock().unwrap().carry_out(op, &mut model)
    }

    async fn call(&self, op: Op) -> Result<Answer, AdminError> {
        let timed_out = Err(AdminErrorKind::TimedOut(self.deadline));
        let (cut, mishaps, slow) = {
            let weather = self.weather.lock().unwrap();
            (weather.cut, weather.mishaps, weather.slow)
        };
        let cut = cut || self.disk.lock().unwrap().down;
        let changes = !matches!(op, Op::List(_) | Op::Mtime(_) | Op::Read(_));
        let fate = self.roll(1000);
        // Mostly quick, at times as slow as a loaded server.
        let most = match self.roll(20) {
            _ if slow > 0 => slow,
            0 => 1500,
            _ => 20,
        };
        sleep(Duration::from_millis(self.roll(most))).await;
        awake(&self.weather).await;
        let result = if cut || fate < mishaps {
            sleep(self.deadline).await;
            timed_out
        } else if fate < 2 * mishaps {
            // The server acts, and its answer is lost.
            let _ = self.act(&op);
            sleep(self.deadline).await;
            timed_out
        } else if changes && fate < 3 * mishaps {
            let (link, op, late) = (self.clone(), op.clone(), self.roll(LATE));
            tokio::spawn(async move {
                sleep(Duration::from_millis(late)).await;
                let _ = link.act(&op);
            });
            sleep(self.deadline).await;
            timed_out
        } else {
            let result = self.act(&op);
            let back = if slow > 0 { 0 } else { self.roll(20) };
            sleep(Duration::from_millis(back)).await;
            result
        };
        awake(&self.weather).await;
        result.map_err(|kind| AdminError {
            op: "do",
            share: "nas:/export".to_owned(),
            path: SharePath::root(),
            kind,
        })
    }
}

fn text(path: &SharePath) -> String {
    path.as_str().trim_start_matches('/').to_owned()
}

impl Store for Link {
    fn for_renewals(&self, answer: Duration) -> impl Store {
        self.within(answer)
    }

    async fn list(&self, dir: &SharePath) -> Result<Option<Vec<Entry>>, AdminError> {
        match self.call(Op::List(text(dir))).await? {
            Answer::Names(names) => Ok(names),
            _ => unreachable!(),
        }
    }

    async fn mtime(&self, path: &SharePath) -> Result<Option<Stamp>, AdminError> {
        match self.call(Op::Mtime(text(path))).await? {
            Answer::Time(time) => Ok(time),
            _ => unreachable!(),
        }
    }

    async fn read(&self, file: &SharePath) -> Result<Option<Vec<u8>>, AdminError> {
        match self.call(Op::Read(text(file))).await? {
            Answer::Contents(contents) => Ok(contents),
            _ => unreachable!(),
        }
    }

    async fn put(&self, file: &SharePath, contents: &[u8]) -> Result<(), AdminError> {
        self.call(Op::Put(text(file), contents.to_vec()))
            .await
            .map(drop)
    }

    async fn create(&self, file: &SharePath, contents: &[u8]) -> Result<(), AdminError> {
        self.call(Op::Create(text(file), contents.to_vec()))
            .await
            .map(drop)
    }

    async fn make_dir(&self, dir: &SharePath) -> Result<(), AdminError> {
        self.call(Op::MakeDir(text(dir))).await.map(drop)
    }

    async fn rename(&self, from: &SharePath, to: &SharePath) -> Result<(), AdminError> {
        self.call(Op::Rename(text(from), text(to))).await.map(drop)
    }

    async fn rename_within(
        &self,
        dir: &SharePath,
        from: &str,
        to: &str,
    ) -> Result<Stamp, AdminError> {
        let op = Op::Rename(text(&dir.join(from)), text(&dir.join(to)));
        match self.call(op).await? {
            Answer::Done(stamp) => Ok(stamp),
            _ => unreachable!(),
        }
    }

    fn gaps(&self) -> u64 {
        self.disk.lock().unwrap().boots
    }

    async fn remove(&self, path: &SharePath) -> Result<(), AdminError> {
        self.call(Op::Remove(text(path))).await.map(drop)
    }
}
