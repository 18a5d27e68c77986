//! Making a new, empty image (version 3).

use std::fs::File;
use std::path::Path;

use crate::chain::{Chain, FileGate, Reference};
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::{Geometry, MAX_CLUSTER_BITS, MIN_CLUSTER_BITS};
use crate::header::{
    BackingFormat, MAGIC, MAX_BACKING_NAME, MAX_L1_BYTES, MAX_SIZE, encode_backing_format,
    encode_end,
};
use crate::refcount::write_entry;
use crate::storage::{FileStorage, Storage};

/// Cluster size unless the caller says otherwise: 64 KiB, as in qemu.
const DEFAULT_CLUSTER_SIZE: u32 = 64 << 10;
/// Width of a refcount unless the caller says otherwise: 16 bits, as in qemu.
const DEFAULT_REFCOUNT_BITS: u32 = 16;
/// Bytes of the header that is written: version 3 with `compression_type`, padded.
const HEADER_LENGTH: u32 = 112;
/// The unit of a disk's size, in bytes.
const SECTOR: u64 = 512;

/// What a new image is like.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// Bytes of the virtual disk, 0 to 2^63 - 512; rounded up to whole sectors of 512 bytes, since
    /// qemu ignores a last part of one.
    pub size: u64,
    /// Bytes of a cluster: a power of two from 512 to 2 MiB; 64 KiB is the default.
    pub cluster_size: u32,
    /// Name of the backing file, stored as it is (relative to the image's directory, at most 1023
    /// bytes), and its format.
    pub backing: Option<(String, BackingFormat)>,
    /// Width of a refcount in bits: a power of two from 1 to 64; 16 is the default.
    pub refcount_bits: u32,
}

impl CreateOptions {
    /// A disk of `size` bytes with the defaults and no backing file.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            cluster_size: DEFAULT_CLUSTER_SIZE,
            backing: None,
            refcount_bits: DEFAULT_REFCOUNT_BITS,
        }
    }

    /// The same with a backing file.
    #[must_use]
    pub fn backing(mut self, name: impl Into<String>, format: BackingFormat) -> Self {
        self.backing = Some((name.into(), format));
        self
    }

    /// The same with clusters of `bytes`.
    #[must_use]
    pub fn cluster_size(mut self, bytes: u32) -> Self {
        self.cluster_size = bytes;
        self
    }
}

/// Makes a new image at `path`, which must not exist; it is durable, name and all, on return. A
/// failure leaves no file behind.
///
/// # Errors
/// `InvalidArgument`, `Io` (also where the file exists), `NoSpace`; `Chain` and what opening gives
/// when the backing file cannot be opened.
pub fn create(path: &Path, options: &CreateOptions) -> Result<()> {
    let make = || -> Result<()> {
        if let Some((name, format)) = &options.backing {
            let gate = FileGate { lock: false };
            let reference = Reference { name, format: Some(format.name()) };
            // To find mistakes now rather than at the first read.
            Chain::open(&gate, path, None, reference, usize::MAX, u64::from(options.cluster_size))?;
        }
        let file =
            FileStorage::create_new(path).map_err(|e| Error::io("cannot create the image", e))?;
        let written = create_in(&file, options).and_then(|()| {
            sync_directory(path).map_err(|e| Error::io("cannot flush the image's directory", e))
        });
        if written.is_err() {
            // The first failure is the one to tell.
            let _ = std::fs::remove_file(path);
        }
        written
    };
    make().map_err(|e| e.in_file(path))
}

fn sync_directory(path: &Path) -> std::io::Result<()> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}

/// Where the parts of a new image lie, in clusters.
struct Layout {
    reftable: u64,
    reftable_clusters: u64,
    blocks: u64,
    block_clusters: u64,
    l1: u64,
    end: u64,
}

impl Layout {
    fn new(geometry: &Geometry) -> Self {
        let l1_clusters = (geometry.l1_entries() * 8).div_ceil(geometry.cluster_size());
        let per_block = 1u64 << geometry.refblock_bits();
        let per_table_cluster = geometry.cluster_size() / 8;
        let (mut blocks, mut table) = (1, 1);
        loop {
            let end = 1 + table + blocks + l1_clusters;
            let need_blocks = end.div_ceil(per_block);
            let need_table = need_blocks.div_ceil(per_table_cluster);
            if need_blocks <= blocks && need_table <= table {
                return Self {
                    reftable: 1,
                    reftable_clusters: table,
                    blocks: 1 + table,
                    block_clusters: blocks,
                    l1: 1 + table + blocks,
                    end,
                };
            }
            (blocks, table) = (need_blocks.max(blocks), need_table.max(table));
        }
    }
}

/// Writes a new image into an empty `storage` and flushes it.
///
/// # Errors
/// `InvalidArgument`, `Io`, `NoSpace`.
pub fn create_in(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    let geometry = geometry_of(options)?;
    let layout = Layout::new(&geometry);
    let header = encode_header(options, &geometry, &layout)?;
    let cluster = |number: u64| number << geometry.cluster_bits;
    let write = |bytes: &[u8], offset: u64| {
        storage.write_at(bytes, offset).map_err(|e| Error::io("cannot write the new image", e))
    };
    storage.set_len(cluster(layout.end)).map_err(|e| Error::io("cannot grow the new image", e))?;
    let blocks = layout.blocks..layout.blocks + layout.block_clusters;
    let table: Vec<u8> = blocks.clone().flat_map(|b| cluster(b).to_be_bytes()).collect();
    write(&table, cluster(layout.reftable))?;
    let per_block = 1u64 << geometry.refblock_bits();
    for (number, block) in blocks.enumerate() {
        #[allow(clippy::cast_possible_truncation, reason = "a cluster is at most 2 MiB")]
        let mut bytes = vec![0; geometry.cluster_size() as usize];
        let first = number as u64 * per_block;
        for index in 0..per_block.min(layout.end.saturating_sub(first)) {
            #[allow(clippy::cast_possible_truncation, reason = "an index inside a cluster")]
            write_entry(&mut bytes, geometry.refcount_order, index as usize, 1);
        }
        write(&bytes, cluster(block))?;
    }
    write(&header, 0)?;
    storage.flush().map_err(|e| Error::io("cannot flush the new image", e))
}

fn geometry_of(options: &CreateOptions) -> Result<Geometry> {
    let invalid = |message: String| Err(Error::new(ErrorKind::InvalidArgument, message));
    let cluster_bits = options.cluster_size.trailing_zeros();
    if !options.cluster_size.is_power_of_two()
        || !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits)
    {
        return invalid(format!(
            "cluster size {} is not a power of two from 512 to 2 MiB",
            options.cluster_size
        ));
    }
    if !options.refcount_bits.is_power_of_two() || options.refcount_bits > 64 {
        return invalid(format!(
            "refcount width {} is not a power of two from 1 to 64",
            options.refcount_bits
        ));
    }
    let geometry = Geometry {
        version: 3,
        cluster_bits,
        size: options.size.min(MAX_SIZE).next_multiple_of(SECTOR),
        refcount_order: options.refcount_bits.trailing_zeros(),
        extended_l2: false,
    };
    if geometry.size > MAX_SIZE || geometry.l1_entries() * 8 > MAX_L1_BYTES {
        return invalid(format!(
            "a disk of {} bytes is too large for clusters of {} bytes; at most {} bytes fit, \
             larger clusters allow more",
            options.size,
            options.cluster_size,
            (MAX_L1_BYTES / 8).saturating_mul(geometry.table_span())
        ));
    }
    Ok(geometry)
}

fn encode_header(options: &CreateOptions, geometry: &Geometry, layout: &Layout) -> Result<Vec<u8>> {
    let cluster = |number: u64| number << geometry.cluster_bits;
    let mut tail = Vec::new();
    let mut name: &[u8] = &[];
    if let Some((backing, format)) = &options.backing {
        name = backing.as_bytes();
        encode_backing_format(&mut tail, format.name());
    }
    encode_end(&mut tail);
    let name_offset = HEADER_LENGTH as usize + tail.len();
    let name_length = u32::try_from(name.len()).unwrap_or(u32::MAX);
    if name_length > MAX_BACKING_NAME || name_offset + name.len() > 1 << geometry.cluster_bits {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            format!("the backing file name of {name_length} bytes is too long for the header"),
        ));
    }
    if options.backing.is_some() && name.is_empty() {
        return Err(Error::new(ErrorKind::InvalidArgument, "the backing file name is empty"));
    }
    let backing_offset = if name.is_empty() { 0 } else { name_offset as u64 };
    let to_u32 = |value: u64| u32::try_from(value).unwrap_or(u32::MAX).to_be_bytes();

    let mut out = Vec::new();
    out.extend_from_slice(&MAGIC.to_be_bytes());
    out.extend_from_slice(&3u32.to_be_bytes());
    out.extend_from_slice(&backing_offset.to_be_bytes());
    out.extend_from_slice(&name_length.to_be_bytes());
    out.extend_from_slice(&geometry.cluster_bits.to_be_bytes());
    out.extend_from_slice(&geometry.size.to_be_bytes());
    out.extend_from_slice(&0u32.to_be_bytes()); // crypt_method
    out.extend_from_slice(&to_u32(geometry.l1_entries()));
    out.extend_from_slice(&cluster(layout.l1).to_be_bytes());
    out.extend_from_slice(&cluster(layout.reftable).to_be_bytes());
    out.extend_from_slice(&to_u32(layout.reftable_clusters));
    out.extend_from_slice(&0u32.to_be_bytes()); // nb_snapshots
    out.extend_from_slice(&0u64.to_be_bytes()); // snapshots_offset
    out.extend_from_slice(&[0; 24]); // incompatible, compatible and autoclear features
    out.extend_from_slice(&geometry.refcount_order.to_be_bytes());
    out.extend_from_slice(&HEADER_LENGTH.to_be_bytes());
    out.resize(HEADER_LENGTH as usize, 0); // compression_type 0 and padding
    out.extend_from_slice(&tail);
    out.extend_from_slice(name);
    Ok(out)
}
