//! Where a restored disk goes.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use qcow2::{CreateOptions, Image, OpenOptions};

use crate::ctl::error::{CtlError, CtlResult};

/// A file that did not exist, a block device, a new image, or a stream.
pub(super) enum Sink {
    /// A file: what is not written reads as zeroes.
    File(File),
    /// A block device: zeroes must be written.
    Device(File),
    /// An image.
    Image(Box<Image>),
    /// Standard output: everything, in order.
    Stream,
}

impl Sink {
    pub(super) fn output() -> Self {
        Self::Stream
    }

    /// A file at `path`, which must not exist; or a block device that is large enough.
    pub(super) fn raw(path: &Path, size: u64) -> CtlResult<Self> {
        let cannot = |e: io::Error| {
            let next = "give --to a file that is not there, or a block device";
            CtlError::failed(format!("cannot write '{}': {e}", path.display()), next)
        };
        if std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device()) {
            let device = File::options().write(true).open(path).map_err(cannot)?;
            let room = rustix::fs::seek(&device, rustix::fs::SeekFrom::End(0));
            let room = room.map_err(|e| cannot(e.into()))?;
            if room < size {
                let cause = format!("'{}' has {room} bytes, the disk {size}", path.display());
                return Err(CtlError::failed(cause, "give a larger device"));
            }
            return Ok(Self::Device(device));
        }
        let file = File::create_new(path).map_err(cannot)?;
        file.set_len(size).map_err(cannot)?;
        Ok(Self::File(file))
    }

    /// A new image at `path`.
    pub(super) fn qcow2(path: &Path, size: u64) -> CtlResult<Self> {
        let make = || {
            qcow2::create(path, &CreateOptions::new(size))?;
            Image::open(path, &OpenOptions::new())
        };
        let image = make().map_err(|e| CtlError::failed(e.to_string(), "give --to a new file"))?;
        Ok(Self::Image(Box::new(image)))
    }

    /// Whether everything must come in order.
    pub(super) fn is_stream(&self) -> bool {
        matches!(self, Self::Stream)
    }

    /// Whether what is not written reads as zeroes.
    pub(super) fn is_zero(&self) -> bool {
        matches!(self, Self::File(_) | Self::Image(_))
    }

    pub(super) fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        match self {
            Self::File(file) | Self::Device(file) => file.write_all_at(bytes, offset),
            Self::Image(image) => image.write_at(bytes, offset).map_err(io::Error::other),
            Self::Stream => io::stdout().lock().write_all(bytes),
        }
    }

    /// Makes everything durable.
    pub(super) fn finish(&self) -> io::Result<()> {
        match self {
            Self::File(file) | Self::Device(file) => file.sync_all(),
            Self::Image(image) => image.close().map_err(io::Error::other),
            Self::Stream => io::stdout().lock().flush(),
        }
    }
}
