//! What a volume is: its name, its options and its record. Values only, no I/O.

mod local_form;
mod mode;
pub(crate) mod mount_options;
pub(crate) mod name;
pub(crate) mod options;
pub(crate) mod record;
mod right;

pub use mount_options::MountOptions;
pub(crate) use mount_options::{NfsVersion, OptionsError};
pub use name::VolumeName;
pub use options::{Access, VolumeOptions};
pub(crate) use options::{DataPath, OnRemove, OptionError, Owner, Recreate};
pub(crate) use record::json;
pub(crate) use record::{MAX_RECORD, Record, RecordError};
pub use right::Right;
