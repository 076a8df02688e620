//! The two system calls on file handles, which no safe crate wraps.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// The most bytes of a kernel handle that are kept. What is left of the 64 bytes of an NFSv3
/// handle (RFC 1813, NFS3_FHSIZE) after our own fields; ext4 needs 8, XFS 12, tmpfs 12,
/// Btrfs 20.
pub(super) const MAX_HANDLE: usize = MAX_LEN as usize;
const MAX_LEN: u8 = 48;

/// A file's handle as the kernel gives it: the same for as long as the file exists, over renames
/// and reboots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct KernelHandle {
    pub(super) kind: i32,
    pub(super) len: u8,
    pub(super) bytes: [u8; MAX_HANDLE],
}

impl KernelHandle {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len).min(MAX_HANDLE)]
    }
}

/// `struct file_handle` with room for its bytes.
#[repr(C)]
struct Buffer {
    handle_bytes: u32,
    handle_type: i32,
    f_handle: [u8; MAX_HANDLE],
}

/// Safe wrapper for `name_to_handle_at(2)` on an open file.
///
/// # Errors
/// `EOPNOTSUPP` where the file system has no handles (overlayfs as containers mount it),
/// `EOVERFLOW` where they are longer than [`MAX_HANDLE`].
pub(super) fn handle_of(file: impl AsFd) -> io::Result<KernelHandle> {
    let mut buffer = Buffer {
        handle_bytes: u32::from(MAX_LEN),
        handle_type: 0,
        f_handle: [0; MAX_HANDLE],
    };
    let mut mount_id = 0;
    // SAFETY: `buffer` begins as `struct file_handle` does and its `handle_bytes` says how many
    // bytes follow; the path is an empty C string; all of them outlive the call.
    let result = unsafe {
        libc::name_to_handle_at(
            file.as_fd().as_raw_fd(),
            c"".as_ptr(),
            (&raw mut buffer).cast(),
            &raw mut mount_id,
            libc::AT_EMPTY_PATH,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let len = u8::try_from(buffer.handle_bytes).map_err(io::Error::other)?;
    Ok(KernelHandle {
        kind: buffer.handle_type,
        len,
        bytes: buffer.f_handle,
    })
}

/// Safe wrapper for `open_by_handle_at(2)`: a descriptor that names the file and nothing more
/// (`O_PATH`; a symbolic link is not followed). `any` is an open file of the same file system.
///
/// # Errors
/// `ESTALE` when the file is gone, `EPERM` without CAP_DAC_READ_SEARCH.
pub(super) fn open_handle(any: impl AsFd, handle: &KernelHandle) -> io::Result<OwnedFd> {
    let mut buffer = Buffer {
        handle_bytes: u32::from(handle.len),
        handle_type: handle.kind,
        f_handle: handle.bytes,
    };
    if usize::from(handle.len) > MAX_HANDLE {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: `buffer` begins as `struct file_handle` does, holds at least `handle_bytes` bytes
    // (checked above) and outlives the call.
    let fd = unsafe {
        libc::open_by_handle_at(
            any.as_fd().as_raw_fd(),
            (&raw mut buffer).cast(),
            libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
