//! This host's right to an exclusive volume, as whoever has to end with it is told.

use serde::{Deserialize, Serialize};

/// How long a volume may be used, unless the right is prolonged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Right {
    /// Until when something may be sent: nanoseconds of CLOCK_BOOTTIME.
    pub until: u64,
    /// How long unacknowledged bytes may stay under way, in milliseconds.
    pub under_way: u32,
}
