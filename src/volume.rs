//! What a volume is: its name, its options and its record. Values only, no I/O.

mod local_form;
pub mod mount_options;
pub mod name;
pub mod options;
pub mod record;
mod right;

pub use mount_options::{MountOptions, NfsVersion, OptionsError};
pub use name::VolumeName;
pub use options::{Access, DataPath, OnRemove, OptionError, Owner, VolumeOptions};
pub(crate) use record::json;
pub use record::{MAX_RECORD, Record, RecordError};
pub use right::Right;
