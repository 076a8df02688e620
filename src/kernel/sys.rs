//! System calls that rustix does not wrap: the unsafe code of the kernel data path.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, pidfd_open, waitpid};

/// `struct mount_attr` of linux/mount.h, version 0.
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Sets and clears attributes of the one mount that `mount` refers to, and takes it out of its
/// peer group: mount_setattr(2).
///
/// # Errors
/// `ENOSYS` before Linux 5.12.
pub(super) fn mount_setattr(
    mount: BorrowedFd<'_>,
    set: MountAttrFlags,
    clear: MountAttrFlags,
) -> Result<(), Errno> {
    let attr = MountAttr {
        attr_set: u64::from(set.bits()),
        attr_clr: u64::from(clear.bits()),
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: the path is a NUL-terminated constant and `attr` is a live structure whose size is
    // passed along; the kernel only reads both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(last_errno())
    }
}

/// What a process of its own does with a descriptor.
#[derive(Debug, Clone, Copy)]
pub(super) enum Call {
    /// Creates the superblock of a context from fsopen(2).
    ///
    /// That talks to the server, and while NFSv4 does so the kernel holds a lock that every NFSv4
    /// mount of the host needs (`nfs_clid_init_mutex`): one server that falls silent in that moment
    /// would block the mounts of all others. The wait can be broken only by a fatal signal, which a
    /// thread cannot get alone; a process can.
    Create,
    /// syncfs(2): nothing ends its wait for pages that are under way to a silent server. A daemon
    /// one of whose threads waited so could not end, and none could be started after it.
    Sync,
    /// Lists the directory and asks for its attributes, [`LOOKS`] times. Waits for the server.
    Look,
}

/// What a client finds out at the first of them it may make use of at the next.
const LOOKS: usize = 2;

/// A process of its own that makes one system call.
#[derive(Debug)]
pub(super) struct Aside {
    pid: Pid,
    pidfd: OwnedFd,
    reaped: bool,
}

impl Aside {
    /// Starts a call.
    ///
    /// # Errors
    /// When no process can be made.
    pub(super) fn start(call: Call, fd: BorrowedFd<'_>) -> io::Result<Self> {
        let fd = fd.as_raw_fd();
        // SAFETY: the child of a process with threads may call only what is async-signal-safe:
        // `call_and_exit` makes raw system calls and neither allocates nor returns.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            call_and_exit(call, fd);
        }
        if pid < 0 {
            return Err(io::Error::last_os_error());
        }
        let pid = Pid::from_raw(pid).ok_or(Errno::CHILD)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).inspect_err(|_| {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
            let _ = waitpid(Some(pid), WaitOptions::empty());
        })?;
        Ok(Self {
            pid,
            pidfd,
            reaped: false,
        })
    }

    /// Waits for the end of the call.
    ///
    /// # Errors
    /// What the call answered; `ETIMEDOUT` when the deadline passed, and the process is then
    /// killed.
    pub(super) fn wait(mut self, deadline: Option<Instant>) -> Result<(), Errno> {
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let ready = poll(
                &mut [PollFd::new(&self.pidfd, PollFlags::IN)],
                left.map(timespec).as_ref(),
            );
            match ready {
                Ok(0) => return Err(Errno::TIMEDOUT), // and drop kills
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        let status = waitpid(Some(self.pid), WaitOptions::empty());
        self.reaped = true;
        match status?.and_then(|(_, status)| status.exit_status()) {
            Some(0) => Ok(()),
            Some(errno) => Err(Errno::from_raw_os_error(errno)),
            None => Err(Errno::INTR),
        }
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        if self.reaped {
            return;
        }
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        let pid = self.pid;
        // A killed process leaves its wait within moments, but nobody should wait for that.
        let reaper = std::thread::Builder::new()
            .name("mount-reaper".into())
            .spawn(move || waitpid(Some(pid), WaitOptions::empty()));
        if let Err(error) = reaper {
            tracing::debug!(%error, "no thread to reap a mount helper");
        }
    }
}

/// Runs in the child: the one system call, its errno as the exit status.
fn call_and_exit(call: Call, fd: RawFd) -> ! {
    /// `enum fsconfig_command` of linux/mount.h.
    const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
    // SAFETY: raw system calls on plain numbers; no memory of the parent is touched. The child
    // dies with the thread that started it, and closes every descriptor but this one, so that it
    // keeps no socket or lock of the daemon open.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let (below, above) = (fd.wrapping_sub(1), fd.wrapping_add(1));
        libc::syscall(libc::SYS_close_range, 0, below, 0);
        libc::syscall(libc::SYS_close_range, above, libc::c_uint::MAX, 0);
        let nothing = std::ptr::null::<u8>();
        let result = match call {
            Call::Create => {
                let create = FSCONFIG_CMD_CREATE;
                libc::syscall(libc::SYS_fsconfig, fd, create, nothing, nothing, 0)
            }
            Call::Sync => libc::syscall(libc::SYS_syncfs, fd),
            Call::Look => look(fd),
        };
        let status = if result == 0 {
            0
        } else {
            *libc::__errno_location()
        };
        libc::_exit(status)
    }
}

/// [`Call::Look`], as a system call answers.
///
/// # Safety
/// Async-signal-safe: raw system calls, which write to its own stack only.
unsafe fn look(fd: RawFd) -> libc::c_long {
    let mut page = [0_u64; 512];
    // SAFETY: the names are NUL-terminated constants; the kernel writes at most as many bytes to
    // `page` as it is told, and a `struct statx` (256 bytes) to the start of it.
    unsafe {
        // By a path, as programs do: opened as `.` below a descriptor, Linux 7.2 asks the server for
        // less. Where there is no /proc, nothing is found out.
        libc::syscall(libc::SYS_dup3, fd, 0, 0);
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        let path = c"/proc/self/fd/0".as_ptr();
        let dir = libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path, flags);
        if dir < 0 {
            return dir;
        }
        for _ in 0..LOOKS {
            let size = size_of_val(&page);
            let asked = libc::AT_EMPTY_PATH;
            let what = libc::STATX_BASIC_STATS;
            let steps = [
                libc::syscall(libc::SYS_lseek, dir, 0, libc::SEEK_SET),
                libc::syscall(libc::SYS_getdents64, dir, page.as_mut_ptr(), size),
                libc::syscall(
                    libc::SYS_statx,
                    dir,
                    c"".as_ptr(),
                    asked,
                    what,
                    page.as_mut_ptr(),
                ),
            ];
            if steps.iter().any(|result| *result < 0) {
                return -1;
            }
        }
    }
    0
}

fn timespec(left: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(left.subsec_nanos()),
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::mount::{FsOpenFlags, fsconfig_set_flag, fsopen};

    use super::*;

    #[test]
    fn a_creation_reports_the_errno_of_the_kernel() {
        // Not a context: the kernel refuses the descriptor, whoever runs the test.
        let file = std::fs::File::open("/dev/null").unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        let result = Aside::start(Call::Create, file.as_fd())
            .unwrap()
            .wait(Some(deadline));
        assert_eq!(result, Err(Errno::INVAL));
    }

    #[test]
    fn a_file_system_is_synced_aside() {
        let dir = tempfile::tempdir().unwrap();
        let open = |flags| rustix::fs::open(dir.path(), flags, rustix::fs::Mode::empty()).unwrap();
        let sync = |dir: OwnedFd| Aside::start(Call::Sync, dir.as_fd()).unwrap().wait(None);
        let directory = rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
        assert_eq!(sync(open(directory)), Ok(()));
        assert_eq!(
            sync(open(directory | rustix::fs::OFlags::PATH)),
            Err(Errno::BADF)
        );
    }

    #[test]
    fn a_directory_is_looked_at_aside() {
        let look = |path: &std::path::Path| {
            let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
            let open = rustix::fs::open(path, flags, rustix::fs::Mode::empty()).unwrap();
            let looked = Aside::start(Call::Look, open.as_fd()).unwrap();
            looked.wait(None)
        };
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert_eq!(look(dir.path()), Ok(()));
        assert_eq!(look(&dir.path().join("file")), Err(Errno::NOTDIR));
    }

    #[test]
    fn a_creation_that_succeeds_leaves_a_usable_context() {
        let Ok(context) = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC) else {
            return; // needs CAP_SYS_ADMIN, which CI's unit tests may not have
        };
        fsconfig_set_flag(&context, "ro").unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        Aside::start(Call::Create, context.as_fd())
            .unwrap()
            .wait(Some(deadline))
            .unwrap();
        let mount = rustix::mount::fsmount(
            &context,
            rustix::mount::FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::empty(),
        )
        .unwrap();
        mount_setattr(
            mount.as_fd(),
            MountAttrFlags::MOUNT_ATTR_NOEXEC,
            MountAttrFlags::empty(),
        )
        .unwrap();
        let flags = rustix::fs::fstatvfs(&mount).unwrap().f_flag;
        assert!(flags.contains(rustix::fs::StatVfsMountFlags::NOEXEC));
    }
}
