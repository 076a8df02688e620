//! The clock of the C library, which asks the kernel where there is no vDSO to ask: rustix takes it
//! for granted that a vDSO has a clock, and panics on kernels whose vDSO has none.
#![allow(unsafe_code)]

use std::time::Duration;

/// Time since the host's boot, with suspension (CLOCK_BOOTTIME, since Linux 2.6.39).
#[must_use]
pub fn since_boot() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a timespec of this function, to which the call writes.
    let done = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    assert_eq!(done, 0, "this kernel has no CLOCK_BOOTTIME");
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_uptime() {
        let before = since_boot();
        let text = std::fs::read_to_string("/proc/uptime").unwrap();
        let uptime: f64 = text.split(' ').next().unwrap().parse().unwrap();
        // Which is in hundredths of a second, rounded down.
        let uptime = Duration::from_secs_f64(uptime);
        assert!(before <= uptime + Duration::from_millis(20) && uptime <= since_boot());
    }
}
