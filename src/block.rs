//! The seam between the NBD server and whatever holds the bytes.
//!
//! [`BlockDevice`] is the only thing the protocol side knows of a disk: a range of bytes that can be
//! read, written, zeroed, discarded, flushed and mapped from many threads at once. Calls block; the
//! server runs them on its bounded I/O threads, or inline where a call cannot wait.

use std::fmt;

/// What a device can do and how it likes to be used; constant while it is open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Size in bytes.
    pub size: u64,
    /// Writes, zeroes and discards are refused with [`BlockErrorKind::ReadOnly`].
    pub read_only: bool,
    /// Granularity in bytes at which requests are efficient (cluster size for images); a power of two.
    pub preferred_block: u32,
    /// `write_zeroes` is supported without writing data.
    pub can_zero_fast: bool,
    /// `discard` gives space back.
    pub can_discard: bool,
    /// The device can tell how deep in a backing chain a range is allocated.
    pub has_depth: bool,
    /// The device can tell which ranges of this session's writes are durable
    /// ([`BlockDevice::durable`]).
    pub tells_durable: bool,
    /// Files below the one on top: what lies in one place of the disk may lie in as many more.
    pub backing_files: usize,
    /// The medium rotates (`NBD_FLAG_ROTATIONAL`).
    pub rotational: bool,
}

/// How a range is stored: what `base:allocation` and `qemu:allocation-depth` report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Length in bytes; never 0.
    pub length: u64,
    /// The range occupies no space of its own (`NBD_STATE_HOLE`).
    pub hole: bool,
    /// The range reads as zeroes (`NBD_STATE_ZERO`).
    pub zero: bool,
    /// 0: unallocated in the whole chain; 1: in the top image; n: in the n-th image from the top.
    pub depth: u32,
}

/// How a range is to be zeroed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ZeroOptions {
    /// Keep (or make) the range allocated (`NBD_CMD_FLAG_NO_HOLE`).
    pub no_hole: bool,
    /// Fail with [`BlockErrorKind::Unsupported`] instead of writing zeroes slowly
    /// (`NBD_CMD_FLAG_FAST_ZERO`).
    pub fast_only: bool,
}

/// The class of a failure: what the peer's errno is chosen from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockErrorKind {
    /// The device is read-only.
    ReadOnly,
    /// The range lies outside the device.
    OutOfBounds,
    /// The file system or the quota is full.
    NoSpace,
    /// Not possible on this device, or not without being slow.
    Unsupported,
    /// The device is closing.
    Closing,
    /// Reading or writing the medium failed, or its metadata is corrupt.
    Io,
}

/// A failed device call: kind for the peer, sentence for the operator, offset where known.
#[derive(Debug)]
pub struct BlockError {
    /// The class of the failure.
    pub kind: BlockErrorKind,
    /// First failing byte of the device, where known.
    pub offset: Option<u64>,
    /// Cause and next step in one sentence.
    pub message: String,
}

impl BlockError {
    /// A failure of `kind` told by `message`.
    pub fn new(kind: BlockErrorKind, message: impl Into<String>) -> Self {
        Self { kind, offset: None, message: message.into() }
    }

    /// The same failure, at device byte `offset`.
    #[must_use]
    pub fn at(mut self, offset: u64) -> Self {
        self.offset = Some(offset);
        self
    }
}

impl fmt::Display for BlockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.offset {
            Some(offset) => write!(f, "{} (at byte {offset})", self.message),
            None => f.write_str(&self.message),
        }
    }
}

impl std::error::Error for BlockError {}

/// Result of a device call.
pub type BlockResult<T> = Result<T, BlockError>;

/// A disk, shared by every connection of an export.
///
/// Implementations accept any offset and length inside the device, aligned or not, from any number
/// of threads. A completed write is seen by every later read on any connection; a completed
/// [`flush`](Self::flush) makes every write that had completed before it started durable, whoever
/// wrote it: that is what makes `NBD_FLAG_CAN_MULTI_CONN` true.
pub trait BlockDevice: Send + Sync {
    /// What this device is.
    fn info(&self) -> &DeviceInfo;

    /// Fills `buf` from byte `offset`.
    fn read(&self, buf: &mut [u8], offset: u64) -> BlockResult<()>;

    /// Stores `buf` at byte `offset`.
    fn write(&self, buf: &[u8], offset: u64) -> BlockResult<()>;

    /// Makes `length` bytes at `offset` read as zeroes.
    fn write_zeroes(&self, offset: u64, length: u64, options: ZeroOptions) -> BlockResult<()>;

    /// Gives up the content of a range; what it reads as afterwards is zeroes or the old content.
    fn discard(&self, offset: u64, length: u64) -> BlockResult<()>;

    /// Makes every completed write durable.
    fn flush(&self) -> BlockResult<()>;

    /// A hint that a range will be read soon.
    fn cache(&self, offset: u64, length: u64) -> BlockResult<()>;

    /// Calls `visit` with consecutive extents that cover `offset .. offset + length`, in order,
    /// until it returns `false`. Extents never reach past the device.
    fn extents(
        &self,
        offset: u64,
        length: u64,
        visit: &mut dyn FnMut(Extent) -> bool,
    ) -> BlockResult<()>;

    /// Calls `visit` with consecutive (offset, length, durable) that cover the range, in order, until
    /// it returns `false`. Durable is what was written in this session (a backup being received)
    /// and covered by a later flush: a client that was cut off need not send it again.
    fn durable(
        &self,
        _offset: u64,
        _length: u64,
        _visit: &mut dyn FnMut(u64, u64, bool) -> bool,
    ) -> BlockResult<()> {
        let text = "this device does not keep account of what is durable";
        Err(BlockError::new(BlockErrorKind::Unsupported, text))
    }

    /// Flushes and closes. Later calls fail with [`BlockErrorKind::Closing`].
    fn close(&self) -> BlockResult<()>;
}
