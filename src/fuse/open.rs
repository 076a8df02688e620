//! Opening and closing.
//!
//! Invariants:
//! - an open counts from its first call to the server on, so that no unlink or rename of this host
//!   takes the file away in between; whoever deletes counts as an opener while at it, so that a
//!   close in between finds the hidden name;
//! - an open that comes while a name of the file is being taken away waits for the outcome; which of
//!   the two came first is decided in one step ([`Target::of`]);
//! - what was counted is taken back by [`Opening`], also when the caller is killed; the last one
//!   removes the hidden name.
//!
//! An open, or a look at attributes before it, can still come too late: the kernel sends it to the
//! file that a name led to before this host's rename. It gets ESTALE and looks the name up again,
//! once; a call by a descriptor it does not repeat. It is told so ([`Fs::too_late`]) when this host's
//! renames and unlinks that were under way have ended, or take longer than [`LATE_AT_MOST`]. For
//! [`SHY`] after that a file that a rename replaces is kept as if it were open, so that the second
//! try finds it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::mutant::{self, Mutant};
use nfs::rpc::Cred;
use nfs::rpc::nfs3::access;

use super::attr::now;
use super::error::{Errno, Result};
use super::fs::{Fs, OpenFile, Opened};
use super::inode::{Inode, Silly, State};
use super::task;

/// How long replaced files are kept after a call came too late: a second try of the kernel's
/// takes two or three calls.
const SHY: Duration = Duration::from_secs(1);

/// How long a call that came too late waits for renames and unlinks of any name: longer than one takes
/// that meets no trouble.
const LATE_AT_MOST: Duration = Duration::from_secs(5);

/// `__FMODE_EXEC` of the kernel's fs.h, in the flags of an open by execve.
const FMODE_EXEC: i32 = 0x20;

/// Counts as an open file until it is dropped or becomes one.
#[derive(Debug)]
pub(super) struct Opening {
    fs: Arc<Fs>,
    pub(super) inode: Arc<Inode>,
    cred: Cred,
}

impl Opening {
    pub(super) fn new(fs: &Arc<Fs>, inode: &Arc<Inode>, cred: &Cred) -> Self {
        inode.state().opens += 1;
        Self {
            fs: Arc::clone(fs),
            inode: Arc::clone(inode),
            cred: cred.clone(),
        }
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        let Some(last) = self.fs.closed(&self.inode) else {
            return;
        };
        let (fs, cred) = (Arc::clone(&self.fs), self.cred.clone());
        self.fs
            .runtime
            .spawn(async move { fs.remove_hidden(&cred, last).await });
    }
}

/// Takes a name of a file away, the hidden one too, that nobody has open; opens wait for it.
#[derive(Debug)]
pub(super) struct Going(Arc<Inode>);

impl Going {
    /// Begins within the change that finds that nobody has it open.
    fn new(inode: &Arc<Inode>, state: &mut State) -> Self {
        state.going += 1;
        Self(Arc::clone(inode))
    }
}

impl Drop for Going {
    fn drop(&mut self) {
        self.0.state().going -= 1;
        self.0.progress().notify_waiters();
    }
}

/// What a name leads to that is being taken away.
#[derive(Debug)]
pub(super) enum Target {
    /// It is open, and stays so until this is dropped.
    Open(Opening),
    /// Nobody has it open, and opens wait until this is dropped.
    Closed(#[expect(dead_code, reason = "what counts is when it is dropped")] Going),
}

impl Target {
    pub(super) fn of(fs: &Arc<Fs>, inode: Arc<Inode>, cred: &Cred) -> Self {
        let mut state = inode.state();
        if state.opens > 0 && !inode.is_directory() {
            state.opens += 1;
            drop(state);
            return Self::Open(Opening {
                fs: Arc::clone(fs),
                inode,
                cred: cred.clone(),
            });
        }
        if mutant::is_on(Mutant::TargetsInTwoSteps) {
            drop(state);
            std::thread::yield_now();
            state = inode.state();
        }
        Self::Closed(Going::new(&inode, &mut state))
    }
}

/// Waits until no call of ours takes a name of the file away: the file may be gone then.
pub(super) async fn settled(inode: &Inode) {
    task::until(inode.progress(), || inode.state().going == 0).await;
}

impl Fs {
    /// Asks the server whether a file may be opened, which also brings its attributes up to date:
    /// the "open" half of close-to-open.
    pub(super) async fn check_access(&self, cred: &Cred, inode: &Inode, flags: i32) -> Result<()> {
        let wanted = match flags & libc::O_ACCMODE {
            libc::O_RDONLY => access::READ | access::EXECUTE,
            libc::O_WRONLY => access::MODIFY | access::EXTEND,
            _ => access::READ | access::MODIFY | access::EXTEND,
        };
        let asked = self.tick();
        //= 1813-3.3.4-who: “The NFS version 3 protocol client should use the effective
        //= credentials of the user”
        let answer = self.nfs.access(cred, &inode.handle, wanted).await?;
        match answer.attr {
            Some(attr) => self.absorb(inode, attr, asked),
            None => {
                let attr = self.nfs.getattr(cred, &inode.handle).await?;
                self.absorb(inode, attr, asked);
            }
        }
        let granted = answer.granted;
        // Whoever may execute a file gets its bytes from the server; that he may not read it the
        // kernel knows, where it checks.
        let executes = flags & FMODE_EXEC != 0 || !self.server_decides();
        let reads = granted & access::READ != 0 || (executes && granted & access::EXECUTE != 0);
        let changes = granted & (access::MODIFY | access::EXTEND) != 0;
        let allowed = match flags & libc::O_ACCMODE {
            libc::O_RDONLY => reads,
            libc::O_WRONLY => changes,
            _ => granted & access::READ != 0 && changes,
        };
        if allowed {
            Ok(())
        } else {
            Err(Errno(libc::EACCES))
        }
    }

    pub(super) async fn open(
        self: &Arc<Self>,
        cred: &Cred,
        ino: u64,
        flags: i32,
    ) -> Result<Opened> {
        let inode = self.inode(ino)?;
        let known = inode.state().version;
        let size = inode.state().cached.attr.size;
        let late = mutant::is_on(Mutant::OpenInFlightIsNone);
        let opening = (!late).then(|| Opening::new(self, &inode, cred));
        if !late {
            settled(&inode).await;
        }
        self.check_access(cred, &inode, flags).await?;
        let changed = {
            let state = inode.state();
            // What was told beside an own call is not judged yet, and the kernel not told of it.
            let doubtful = state.cached.is_in_doubt() && !mutant::is_on(Mutant::DoubtsKeepSizes);
            state.version != known || state.cached.attr.size != size || doubtful
        };
        if changed {
            self.kernel.drop_attributes(ino);
        }
        let opening = opening.unwrap_or_else(|| Opening::new(self, &inode, cred));
        Ok(self.opened(opening, flags))
    }

    /// The answer to a call for what a name led to. Where that is gone, renames and unlinks that
    /// begin now shall know it, and the kernel's second try comes after those that are under way.
    pub(super) async fn too_late<T>(&self, answer: Result<T>) -> Result<T> {
        if matches!(answer, Err(Errno(libc::ESTALE)))
            && !mutant::is_on(Mutant::LateLooksAreForgotten)
        {
            self.missed().await;
        }
        answer
    }

    async fn missed(&self) {
        let miss = || *self.missed.lock().unwrap_or_else(|e| e.into_inner()) = Some(now());
        // Whatever begins from here on knows it.
        miss();
        if !mutant::is_on(Mutant::LateOpensDoNotWait) {
            // What takes longer is mostly about another name.
            let _ = tokio::time::timeout(LATE_AT_MOST, self.replacing.those_under_way()).await;
        }
        miss();
    }

    /// Whether a call came too late a moment ago.
    pub(super) fn is_shy(&self) -> bool {
        let missed = *self.missed.lock().unwrap_or_else(|e| e.into_inner());
        missed.is_some_and(|when| now().saturating_duration_since(when) < SHY)
    }

    /// Counts as an opener of what a name leads to, for so long that whoever looked it up has
    /// opened it.
    pub(super) fn open_shyly(self: &Arc<Self>, cred: &Cred, parent: u64, name: &[u8]) {
        let Some(inode) = self.inodes.named(parent, name) else {
            return;
        };
        let opening = Opening::new(self, &inode, cred);
        self.runtime.spawn(async move {
            tokio::time::sleep(SHY).await;
            drop(opening);
        });
    }

    pub(super) fn opened(&self, opening: Opening, flags: i32) -> Opened {
        let inode = Arc::clone(&opening.inode);
        let mut state = inode.state();
        // The open file counts from here on.
        state.opens += 1;
        let keep_pages = state.kernel_version == state.version && !state.cached.is_in_doubt();
        state.kernel_version = state.version;
        let told = state.told();
        drop(state);
        let fh = self.next_file.fetch_add(1, Ordering::Relaxed);
        let writes = flags & libc::O_ACCMODE != libc::O_RDONLY;
        // The kernel would append where it believes the end to be, and cache it there. And
        // without attribute caches there is no telling when its pages are good.
        let direct = (self.options.acregmax == 0 && !self.needs_pages.load(Ordering::Relaxed))
            || (writes && flags & libc::O_APPEND != 0);
        let file = Arc::new(OpenFile {
            cred: opening.cred.clone(),
            inode,
            flags,
            direct,
            reported: AtomicU64::new(told),
        });
        drop(opening);
        self.files
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .insert(fh, file);
        Opened {
            fh,
            keep_pages,
            direct,
            writes,
        }
    }

    /// Whether files go through the kernel's pages although nothing is to be cached: before Linux
    /// 6.6 what goes past them cannot be mapped shared. The kernel then asks before each read
    /// whether its pages are good.
    pub(super) fn needs_pages(&self, maps_past_pages: bool) -> bool {
        let needs = self.options.acregmax == 0
            && !maps_past_pages
            && !mutant::is_on(Mutant::UncachedIsUnmapped);
        self.needs_pages.store(needs, Ordering::Relaxed);
        needs
    }

    /// The last descriptor of an open file is gone.
    pub(super) async fn release(self: &Arc<Self>, fh: u64) {
        let file = self
            .files
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .remove(&fh);
        let Some(file) = file else { return };
        if file.writes() {
            // What fails is noted, and what does not end is tried again as long as it is held.
            let _ = self.sync(&file.inode).await;
        }
        if let Some(last) = self.closed(&file.inode) {
            self.remove_hidden(&file.cred, last).await;
        }
    }

    /// One opener less. The last one has to remove the hidden name.
    fn closed(&self, inode: &Arc<Inode>) -> Option<(Silly, Going)> {
        let last = {
            let mut state = inode.state();
            state.opens = state.opens.saturating_sub(1);
            let silly = match state.opens {
                0 => state.silly.take(),
                _ => None,
            };
            silly.map(|silly| (*silly, Going::new(inode, &mut state)))
        };
        self.inodes.release(inode.ino);
        last
    }

    async fn remove_hidden(&self, cred: &Cred, (silly, going): (Silly, Going)) {
        let inode = Arc::clone(&going.0);
        let _going = (!mutant::is_on(Mutant::HiddenGoesUnseen)).then_some(going);
        // It may have another name, and has one link less now.
        let changing = self.change(&inode);
        self.remove_silly(cred, silly).await;
        drop(changing);
        self.kernel.drop_attributes(inode.ino);
    }
}
