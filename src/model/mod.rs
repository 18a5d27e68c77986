//! Nouns that several parts share.

mod backup;
mod export;
mod id;
mod role;
mod time;
mod words;

pub use backup::{BackupState, BackupType, CopyState, DiskState};
pub use export::{ExportSpec, Format, Source, format_size, parse_size, validate_export_name};
pub use id::{
    BackupId, VmId, backup_id, export_alias, export_name, hex, new_id, random_hex, slug, vm_id,
};
pub use role::Role;
pub use time::Timestamp;
