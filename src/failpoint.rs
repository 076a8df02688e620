//! Named points at which a test kills the process as `kill -9` would.
//!
//! Points are [`fail::fail_point!`]s; with the feature `failpoints` and `FAILPOINTS=name=return`
//! in the environment the process ends there. Without the feature they compile to nothing.

/// Ends this process at once, without any clean-up.
pub(crate) fn die() -> ! {
    let me = rustix::process::getpid();
    // The signal cannot be caught; abort only satisfies the type.
    let _ = rustix::process::kill_process(me, rustix::process::Signal::KILL);
    std::process::abort()
}
