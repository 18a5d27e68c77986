//! A QCOW2 image as a block device.

use std::path::Path;

use qcow2::{ErrorKind, Image, Mapping, MappingKind, OpenOptions, ZeroMode};

use crate::block::{
    BlockDevice, BlockError, BlockErrorKind, BlockResult, DeviceInfo, Extent, ZeroOptions,
};

/// An open image with its chain.
#[derive(Debug)]
pub struct Qcow2Device {
    info: DeviceInfo,
    image: Image,
}

fn fault(error: qcow2::Error) -> BlockError {
    let kind = match error.kind() {
        ErrorKind::NoSpace => BlockErrorKind::NoSpace,
        ErrorKind::ReadOnly => BlockErrorKind::ReadOnly,
        ErrorKind::OutOfBounds => BlockErrorKind::OutOfBounds,
        ErrorKind::Unsupported => BlockErrorKind::Unsupported,
        ErrorKind::Closed => BlockErrorKind::Closing,
        _ => BlockErrorKind::Io,
    };
    let mut fault = BlockError::new(kind, error.to_string());
    fault.offset = error.offset();
    fault
}

impl Qcow2Device {
    /// Opens the image at `path` and its backing files.
    ///
    /// # Errors
    /// Those of [`Image::open`].
    pub fn open(path: &Path, read_only: bool) -> BlockResult<Self> {
        let options = OpenOptions { read_only, ..OpenOptions::new() };
        Ok(Self::new(Image::open(path, &options).map_err(fault)?))
    }

    /// Serves an open image.
    pub fn new(image: Image) -> Self {
        let info = DeviceInfo {
            size: image.size(),
            read_only: image.is_read_only(),
            preferred_block: image.cluster_size(),
            can_zero_fast: image.zeroes_fast(),
            can_discard: true,
            has_depth: true,
            tells_durable: false,
            backing_files: image.backing_files(),
            rotational: false,
        };
        Self { info, image }
    }

    /// The image itself.
    pub fn image(&self) -> &Image {
        &self.image
    }
}

fn extent(mapping: Mapping) -> Extent {
    let Mapping { offset, length, depth, kind } = mapping;
    let (hole, zero) = match kind {
        MappingKind::Data { .. } | MappingKind::Compressed => (false, false),
        MappingKind::ZeroAllocated { .. } => (false, true),
        MappingKind::ZeroPlain | MappingKind::Unallocated => (true, true),
    };
    let depth = if kind == MappingKind::Unallocated { 0 } else { depth + 1 };
    Extent { offset, length, hole, zero, depth }
}

impl BlockDevice for Qcow2Device {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> BlockResult<()> {
        self.image.read_at(buf, offset).map_err(fault)
    }

    fn write(&self, buf: &[u8], offset: u64) -> BlockResult<()> {
        self.image.write_at(buf, offset).map_err(fault)
    }

    fn write_zeroes(&self, offset: u64, length: u64, options: ZeroOptions) -> BlockResult<()> {
        if options.fast_only && !self.info.can_zero_fast {
            let text = "an image of version 2 is zeroed by writing";
            return Err(BlockError::new(BlockErrorKind::Unsupported, text));
        }
        let mode = if options.no_hole { ZeroMode::KeepAllocated } else { ZeroMode::Unmap };
        self.image.write_zeroes(offset, length, mode).map_err(fault)
    }

    fn discard(&self, offset: u64, length: u64) -> BlockResult<()> {
        self.image.discard(offset, length).map_err(fault)
    }

    fn flush(&self) -> BlockResult<()> {
        self.image.flush().map_err(fault)
    }

    fn cache(&self, offset: u64, length: u64) -> BlockResult<()> {
        // Looking the range up brings its metadata into memory; the system reads data ahead by
        // itself once it is read.
        self.image.map(offset, length, &mut |_| true).map_err(fault)
    }

    fn extents(
        &self,
        offset: u64,
        length: u64,
        visit: &mut dyn FnMut(Extent) -> bool,
    ) -> BlockResult<()> {
        self.image.map(offset, length, &mut |mapping| visit(extent(mapping))).map_err(fault)
    }

    fn close(&self) -> BlockResult<()> {
        self.image.close().map_err(fault)
    }
}
