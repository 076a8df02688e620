//! Programs that work on the same files at once, on both hosts.

use std::sync::Arc;
use std::time::Duration;

use crate::fuse::error::{Errno, Result};

use super::dice::Dice;
use super::kernel::Host;
use super::process::{Descriptor, Process};
use super::{Seen, World};

/// Words of a file at most, about.
const WORDS: u64 = 160;
/// Words of a write at most.
const PIECE: u64 = 24;
/// No operation may take longer, also not one that begins when faults do. It is what the longest
/// pauses of the transport come to; a call is repeated after one, three and seven minutes.
const ENDS_WITHIN: Duration = Duration::from_secs(900);
/// The same while nothing fails.
const ENDS_SOON: Duration = Duration::from_secs(30);

/// One program after the other: the next begins when one was killed.
pub(super) struct Actor {
    pub(super) host: Arc<Host>,
    pub(super) dice: Dice,
    /// The one of its host that replaces and deletes names.
    pub(super) leads: bool,
    pub(super) process: Arc<std::sync::Mutex<Process>>,
}

impl Actor {
    pub(super) async fn run(mut self, world: Arc<World>) {
        while world.is_troubled() && !world.has_failed() {
            let pause = self.dice.below(120) + 1;
            tokio::time::sleep(Duration::from_millis(pause)).await;
            let process = Process::new(&self.host);
            *self.process.lock().unwrap() = process.clone();
            for _ in 0..self.dice.below(6) + 1 {
                let name = self.name();
                let step = self.step(&process, &name);
                match tokio::time::timeout(ENDS_WITHIN, step).await {
                    Ok(outcome) => self.judge(&world, &process, &name, outcome),
                    Err(_) => world.fail(format!("{name} of an operation on {name} never ends")),
                }
                if process.is_killed() || !world.is_troubled() {
                    break;
                }
            }
            if self.dice.below(4) == 0 {
                let mut dice = self.dice.fork();
                self.host.shrink(|| dice.below(3) == 0);
            }
        }
    }

    /// Two files of both hosts; a log, a configuration and one more of each.
    fn name(&mut self) -> String {
        let host = if self.dice.below(4) == 0 {
            1 - self.host.number
        } else {
            self.host.number
        };
        match self.dice.below(6) {
            0 => "data0".to_owned(),
            1 => "data1".to_owned(),
            2 => format!("log{host}"),
            3 | 4 => format!("conf{host}"),
            _ => format!("gone{host}"),
        }
    }

    fn judge(&self, world: &World, process: &Process, name: &str, outcome: Result<()>) {
        let Err(Errno(errno)) = outcome else { return };
        let foreign = name.ends_with(&format!("{}", 1 - self.host.number));
        let replaced = name.starts_with("conf") || name.starts_with("gone");
        let fine = match errno {
            libc::EINTR => process.is_killed(),
            libc::ENOSPC | libc::EIO => world.is_faulty(),
            libc::ETIMEDOUT => self.host.fs.options.io_timeout > 0,
            libc::EOPNOTSUPP => world.has_no_links(),
            libc::ENOENT | libc::EEXIST => true,
            libc::ESTALE => replaced && (foreign || world.renames_late()),
            _ => false,
        };
        if !fine {
            let error = std::io::Error::from_raw_os_error(errno);
            world.fail(format!("host {}, {name}: {error}", self.host.number));
        }
    }

    async fn step(&mut self, process: &Process, name: &str) -> Result<()> {
        let own = name.ends_with(&format!("{}", self.host.number));
        let mine = self.leads && own && !name.starts_with("data");
        let bytes = name.as_bytes();
        match self.dice.below(22) {
            20 => {
                let room = usize::try_from(self.dice.below(8)).unwrap() + 1;
                process.list(self.dice.below(2) == 0, room).await
            }
            21 => process.make_alone().await,
            0 => process.stat_name(bytes).await,
            1 => {
                process
                    .chmod(bytes, 0o600 + u32::try_from(self.dice.below(64)).unwrap())
                    .await
            }
            2 if name.starts_with("log") && own => process.truncate(bytes, 0).await,
            3 if name.starts_with("data") => {
                let size = self.dice.below(WORDS);
                process.truncate(bytes, size).await
            }
            4 => {
                let twin = format!("twin{}{}", self.host.number, self.dice.below(1 << 30));
                process.link(bytes, twin.as_bytes()).await?;
                process.unlink(twin.as_bytes()).await
            }
            5..=9 if mine && name.starts_with("conf") => self.replace(process, name).await,
            5..=8 if mine && name.starts_with("gone") => process.unlink(bytes).await,
            _ => self.session(process, name).await,
        }
    }

    /// A new file in the place of an old one.
    async fn replace(&mut self, process: &Process, name: &str) -> Result<()> {
        let new = format!("new{}", self.host.number);
        let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC;
        let file = process.open(new.as_bytes(), flags).await?;
        let wrote = process.write(&file, 0, self.dice.below(PIECE) + 1).await;
        process.close(file).await?;
        wrote?;
        process.rename(new.as_bytes(), name.as_bytes()).await
    }

    async fn session(&mut self, process: &Process, name: &str) -> Result<()> {
        let own = name.ends_with(&format!("{}", self.host.number));
        let log = name.starts_with("log");
        let mut flags = match self.dice.below(3) {
            0 if !log || own => libc::O_RDWR,
            1 if !log || own => libc::O_WRONLY,
            _ => libc::O_RDONLY,
        };
        if flags != libc::O_RDONLY {
            if log || self.dice.below(6) == 0 {
                flags |= libc::O_APPEND;
            }
            if self.dice.below(8) == 0 {
                flags |= libc::O_DSYNC;
            }
            if !log && self.dice.below(12) == 0 {
                flags |= libc::O_TRUNC;
            }
        }
        if self.dice.below(5) == 0 {
            flags |= libc::O_DIRECT;
        }
        if own || name.starts_with("data") {
            flags |= libc::O_CREAT;
        }
        // By fcntl, as GNU make does with what the shell has opened.
        let later = log && own && self.dice.below(4) == 0;
        let set = if later { flags & libc::O_APPEND } else { 0 };
        let mut file = process.open(name.as_bytes(), flags & !set).await?;
        file.flags |= set;
        let worked = self.work(process, &file).await;
        let closed = process.close(file).await;
        worked.and(closed)
    }

    async fn work(&mut self, process: &Process, file: &Descriptor) -> Result<()> {
        for _ in 0..self.dice.below(5) + 1 {
            let from = self.dice.below(WORDS - PIECE);
            let count = self.dice.below(PIECE) + 1;
            match self.dice.below(10) {
                0..=3 if file.writes() => process.write(file, from, count).await?,
                4 => process.fsync(file).await?,
                5 => process.stat(file).await?,
                _ if file.reads() => {
                    let all = self.dice.below(3) == 0;
                    let (from, count) = if all { (0, WORDS) } else { (from, count) };
                    process.read(file, from, count).await?;
                }
                _ => process.stat(file).await?,
            }
            if process.is_killed() {
                return Err(Errno(libc::EINTR));
            }
            let pause = self.dice.below(40);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        Ok(())
    }
}

/// While one program overwrites the same words without a pause, stat, fsync and close end.
pub(super) async fn hammer(host: Arc<Host>, world: Arc<World>, every: Duration) {
    let name = b"data0";
    let overwriter = Process::new(&host);
    let Ok(file) = overwriter.open(name, libc::O_RDWR | libc::O_CREAT).await else {
        return world.fail("the file cannot be made".to_owned());
    };
    let overwrites = async {
        loop {
            if let Err(errno) = overwriter.write(&file, 0, 8).await {
                world.fail(format!("an overwrite: {errno:?}"));
            }
            tokio::time::sleep(every).await;
        }
    };
    let looks = async {
        tokio::time::sleep(every * 10).await;
        let process = Process::new(&host);
        let other = process.open(name, libc::O_RDWR).await?;
        process.stat(&other).await?;
        process.fsync(&other).await?;
        process.write(&other, 4, 8).await?;
        process.close(other).await
    };
    let looked = tokio::select! {
        looked = tokio::time::timeout(ENDS_SOON, looks) => looked,
        () = overwrites => return,
    };
    match looked {
        Ok(Ok(())) => world.saw(Seen::Hammered),
        Ok(Err(errno)) => world.fail(format!("beside an overwriter: {errno:?}")),
        Err(_) => world.fail("a look beside an overwriter never ends".to_owned()),
    }
    let _ = overwriter.close(file).await;
}
