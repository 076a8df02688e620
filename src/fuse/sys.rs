//! Calls on the C library that no safe crate wraps.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs;
use std::io;
use std::ops::Range;

/// Gives memory that was freed back to the kernel. With another C library than glibc this does
/// nothing: those give it back by themselves.
pub(super) fn release_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes the allocator's own locks, and touches only what is free.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Lets go of the program itself, as far as it is mapped from files: most of it served the start.
/// What is needed again is mapped again, from the page cache or, if the host was short of memory,
/// from the disk.
pub(super) fn release_program() {
    // Without it, everything stays mapped.
    let mappings = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    for range in unchanged(&mappings) {
        // SAFETY: the range is a mapping of a file that this process cannot write to and has no
        // page of its own in (relocated data, a debugger's breakpoint), as the kernel has just
        // said. So each page is read from the file again and is what it was. Libraries are never
        // unloaded, so that nothing else is mapped there since.
        unsafe {
            libc::madvise(
                std::ptr::without_provenance_mut::<c_void>(range.start),
                range.len(),
                libc::MADV_DONTNEED,
            );
        }
    }
}

/// Closes all descriptors but the standard streams for the calling thread alone, which must not use
/// any that it did not open since.
pub(super) fn close_descriptors_of_this_thread() -> io::Result<()> {
    let (first, last) = (3, libc::c_uint::MAX);
    // SAFETY: the kernel gives the thread a table of its own first, so the other threads keep what
    // they have.
    let done = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            last,
            libc::CLOSE_RANGE_UNSHARE,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The mappings of files in /proc/PID/smaps that are not writable and hold nothing but what the
/// file does.
fn unchanged(smaps: &str) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut candidate = None;
    for line in smaps.lines() {
        if let Some(kib) = line.strip_prefix("Anonymous:") {
            found.extend(candidate.take().filter(|_| kib.trim() == "0 kB"));
        } else if let Some(range) = read_only_file(line) {
            candidate = range;
        }
    }
    found
}

/// Of the first line of a mapping, its range if it is of a file and not writable; `None` for any
/// other line.
fn read_only_file(line: &str) -> Option<Option<Range<usize>>> {
    // 55d0c0000000-55d0c0100000 r-xp 00001000 fe:00 1234    /usr/bin/nfsvol
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let number = |hex| usize::from_str_radix(hex, 16).ok();
    let range = number(start)?..number(end)?;
    let rights = fields.next()?;
    let is_file = fields.nth(3).is_some_and(|path| path.starts_with('/'));
    Some((is_file && rights.starts_with("r-") && rights.ends_with('p')).then_some(range))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_file_holds_unchanged_is_let_go() {
        let mapping = |first: &str, anonymous: u32| {
            format!("{first}\nRss:    8 kB\nAnonymous:    {anonymous} kB\nVmFlags: rd ex mr\n")
        };
        let smaps = [
            mapping("1000-3000 r-xp 00001000 fe:00 12    /usr/bin/nfsvol", 0),
            mapping("3000-4000 r--p 00003000 fe:00 12    /usr/bin/nfsvol", 4),
            mapping("4000-5000 rw-p 00004000 fe:00 12    /usr/bin/nfsvol", 0),
            mapping("5000-6000 rw-p 00000000 00:00 0     [heap]", 0),
            mapping("6000-7000 r--s 00000000 fe:00 13    /var/shared", 0),
            mapping("7000-8000 r-xp 00000000 00:00 0     [vdso]", 0),
            mapping("8000-9000 r--p 00000000 00:00 0 ", 0),
            mapping("a000-c000 r--p 00000000 fe:00 14    /usr/lib/lib c.so", 0),
        ];
        assert_eq!(unchanged(&smaps.concat()), [0x1000..0x3000, 0xa000..0xc000]);
    }

    #[test]
    fn only_the_thread_loses_its_descriptors() {
        let file = fs::File::open("/dev/null").unwrap();
        let path = format!(
            "/proc/thread-self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&file)
        );
        std::thread::scope(|scope| {
            scope.spawn(|| {
                fs::read_link(&path).unwrap();
                close_descriptors_of_this_thread().unwrap();
                assert!(fs::read_link(&path).is_err());
            });
        });
        assert!(fs::read_link(&path).is_ok());
    }

    #[test]
    fn the_program_goes_on() {
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        let code = the_program_goes_on as fn() as usize;
        let ranges = unchanged(&smaps);
        assert!(ranges.iter().any(|range| range.contains(&code)), "{smaps}");
        release_program();
        assert_eq!(unchanged(&smaps), ranges);
    }
}
