//! What an image says of itself.

use std::path::PathBuf;

use super::Image;
use crate::error::{Error, Result};
use crate::header::{Compression, INCOMPAT_CORRUPT, INCOMPAT_DIRTY};

/// Facts about an open image.
#[derive(Debug, Clone)]
pub struct ImageInfo {
    /// Version of the format: 2 or 3.
    pub version: u32,
    /// Bytes of the virtual disk.
    pub size: u64,
    /// Bytes of a cluster.
    pub cluster_size: u32,
    /// Width of a refcount in bits.
    pub refcount_bits: u32,
    /// Length of the file in bytes.
    pub file_length: u64,
    /// Name of the backing file as stored.
    pub backing_name: Option<String>,
    /// Format of the backing file as stored.
    pub backing_format: Option<String>,
    /// Paths of the backing files that were opened, top first.
    pub chain: Vec<PathBuf>,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// L2 entries describe subclusters.
    pub extended_l2: bool,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// Refcounts may be wrong.
    pub dirty: bool,
    /// Metadata may be wrong.
    pub corrupt: bool,
    /// Refcounts are written lazily by programs that know how (compatible feature bit 0).
    pub lazy_refcounts: bool,
}

impl Image {
    /// Facts about the image, from its header as it was opened.
    ///
    /// # Errors
    /// `Io` when the file's length cannot be read.
    pub fn info(&self) -> Result<ImageInfo> {
        let header = &self.header;
        let file_length = self
            .storage
            .len()
            .map_err(|e| Error::io("cannot tell the file's length", e).in_file(&self.path))?;
        Ok(ImageInfo {
            version: self.geometry.version,
            size: self.geometry.size,
            cluster_size: self.cluster_size(),
            refcount_bits: 1 << self.geometry.refcount_order,
            file_length,
            backing_name: header.backing_name.clone(),
            backing_format: header.backing_format().map(str::to_owned),
            chain: self
                .chain
                .iter()
                .flat_map(|chain| chain.paths().map(std::path::Path::to_owned))
                .collect(),
            compression: header.compression,
            extended_l2: self.geometry.extended_l2,
            snapshots: header.snapshots,
            dirty: header.incompatible & INCOMPAT_DIRTY != 0,
            corrupt: header.incompatible & INCOMPAT_CORRUPT != 0,
            lazy_refcounts: header.compatible & 1 != 0,
        })
    }

    /// How many backing files are below it.
    pub fn backing_files(&self) -> usize {
        self.chain.as_ref().map_or(0, |chain| chain.paths().count())
    }
}
