//! The kernel's caches: how it is told what is not good any more, and made to forget.
//!
//! What may wait is done by threads of its own: dropping pages waits for reads under way, and
//! forgetting writes back first what programs have changed in mapped files.
//!
//! The kernel is made to forget by a change of the mount's settings that changes none
//! (`reconfigure_super`): it drops whatever nobody uses of its names, and with the last name of a
//! file the file. FUSE's own way, `FUSE_NOTIFY_INVAL_ENTRY`, would also detach what is mounted
//! there, in every container.
//!
//! Known limits: before Linux 5.9 nothing is forgotten, nor once the daemon has unmounted a volume
//! that a container still uses.

use std::io;
use std::path::Path;
use std::sync::{Arc, OnceLock, mpsc};
use std::thread;

use fuser::{INodeNo, Notifier};
use rustix::mount::{FsPickFlags, fsconfig_reconfigure, fspick};
use tokio::sync::oneshot;

use crate::sys::mountinfo::MountEntry;

use super::fs::Kernel;
use super::known::Forgetting;
use super::{sys, worker};

/// The stack of a thread that makes a system call, in bytes.
const STACK: usize = 64 * 1024;

/// See the module's text.
#[derive(Debug)]
pub(super) struct Caches {
    notifier: OnceLock<Notifier>,
    mount: OnceLock<MountEntry>,
    pages: mpsc::Sender<Unwanted>,
}

/// Pages to be dropped: a range of a file's, or all with a length of 0.
#[derive(Debug)]
struct Unwanted {
    ino: u64,
    offset: i64,
    len: i64,
    done: Option<oneshot::Sender<()>>,
}

impl Caches {
    /// Starts the thread that drops pages.
    pub(super) fn start() -> io::Result<Arc<Self>> {
        let (pages, queue) = mpsc::channel();
        let caches = Arc::new(Self {
            notifier: OnceLock::new(),
            mount: OnceLock::new(),
            pages,
        });
        let weak = Arc::downgrade(&caches);
        let dropping = move || {
            while let Ok(unwanted) = queue.recv() {
                let Some(notifier) = weak.upgrade().and_then(|c| c.notifier.get().cloned()) else {
                    continue;
                };
                // Fails when the kernel does not know the node, and then there is nothing.
                let Unwanted {
                    ino, offset, len, ..
                } = unwanted;
                let _ = notifier.inval_inode(INodeNo(ino), offset, len);
                if let Some(done) = unwanted.done {
                    let _ = done.send(()); // unless its caller was killed
                }
            }
        };
        start("caches", dropping)?;
        Ok(caches)
    }

    fn unwanted(&self, ino: u64, (offset, len): (i64, i64), done: Option<oneshot::Sender<()>>) {
        let _ = self.pages.send(Unwanted {
            ino,
            offset,
            len,
            done,
        });
    }

    /// From here on the kernel can be told.
    pub(super) fn connect(&self, notifier: Notifier) {
        let _ = self.notifier.set(notifier);
    }

    /// From here on it can be made to forget.
    pub(super) fn is_mounted(&self, mount: MountEntry) {
        let _ = self.mount.set(mount);
    }
}

fn start(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let thread = thread::Builder::new().name(name.to_owned());
    thread.stack_size(STACK).spawn(work).map(drop)
}

impl Kernel for Caches {
    fn drop_attributes(&self, ino: u64) {
        if let Some(notifier) = self.notifier.get() {
            // A negative offset means the attributes only, which never waits.
            let _ = notifier.inval_inode(INodeNo(ino), -1, 0);
        }
    }

    fn drop_pages(&self, ino: u64) {
        self.unwanted(ino, (0, 0), None);
    }

    fn drop_range(&self, ino: u64, offset: u64, len: u64, done: oneshot::Sender<()>) {
        // A file's offsets fit; if not, all pages go.
        let range = i64::try_from(offset).ok().zip(i64::try_from(len).ok());
        self.unwanted(ino, range.unwrap_or((0, 0)), Some(done));
    }

    fn forget_unused(&self, done: Forgetting) {
        let Some(mount) = self.mount.get().cloned() else {
            return;
        };
        let forgetting = move || {
            let _done = done;
            if let Err(error) = reconfigure(&mount) {
                tracing::warn!("the kernel does not forget unused files: {error}");
            }
        };
        if let Err(error) = start("forget", forgetting) {
            tracing::warn!("the kernel does not forget unused files: {error}");
        }
    }
}

/// Sets what is set already. It may wait for the server, and must not keep /dev/fuse open then:
/// its last descriptor's end frees everybody.
fn reconfigure(mount: &MountEntry) -> io::Result<()> {
    sys::close_descriptors_of_this_thread()?;
    let point: &Path = &mount.mountpoint;
    let top = worker::our_mount(point)?;
    if top.is_none_or(|top| top.device != mount.device) {
        return Err(io::Error::other("it is not mounted here any more"));
    }
    let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_NO_AUTOMOUNT;
    let picked = fspick(rustix::fs::CWD, point, flags)?;
    Ok(fsconfig_reconfigure(&picked)?)
}
