//! The one call on the C library that no safe crate wraps.
#![allow(unsafe_code)]

/// Gives memory that was freed back to the kernel. With another C library than glibc this does
/// nothing: those give it back by themselves.
pub(super) fn release_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes the allocator's own locks, and touches only what is free.
    unsafe {
        libc::malloc_trim(0);
    }
}
