//! What can be served: block devices over files and images.

pub mod memory;
mod null;
mod qcow2;
mod raw;

pub use self::qcow2::Qcow2Device;
pub use null::NullDevice;
pub use raw::RawDevice;

use std::sync::Arc;

use crate::block::{BlockDevice, BlockError, BlockErrorKind, BlockResult};
use crate::model::{Format, Source, parse_size};

/// Opens what `source` names.
///
/// # Errors
/// What opening gives, with the path in the message.
pub fn open(source: &Source, read_only: bool) -> BlockResult<Arc<dyn BlockDevice>> {
    Ok(match source.format {
        Format::Qcow2 => Arc::new(Qcow2Device::open(&source.path, read_only)?),
        Format::Raw => Arc::new(RawDevice::open(&source.path, read_only)?),
        Format::Null => {
            let size = parse_size(&source.path.to_string_lossy())
                .map_err(|e| BlockError::new(BlockErrorKind::Unsupported, e))?;
            Arc::new(NullDevice::new(size, read_only))
        }
    })
}
