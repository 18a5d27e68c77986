//! The image header (QCOW2 specification, "Header"): parsed once into checked values.

mod extension;

use std::fmt;

pub(crate) use extension::{Extension, encode_backing_format, encode_end, parse_extensions};

use crate::error::{Error, ErrorKind, Result};
use crate::geometry::{Geometry, MAX_CLUSTER_BITS, MIN_CLUSTER_BITS};
use crate::storage::Storage;
use crate::types::HostOffset;

/// First four bytes of an image: `QFI` and 0xfb.
pub(crate) const MAGIC: u32 = 0x5146_49fb;
/// Bytes of a version 2 header.
const V2_LENGTH: usize = 72;
/// Bytes of a version 3 header up to and without `compression_type`.
const V3_LENGTH: usize = 104;
/// Longest header of version 3 that is read: later fields are optional by the specification.
const MAX_HEADER_LENGTH: usize = 4096;
/// Longest backing file name (specification: 1023 bytes).
pub(crate) const MAX_BACKING_NAME: u32 = 1023;
/// Largest L1 table: 32 MiB, as in qemu.
pub(crate) const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table: 8 MiB, as in qemu.
pub(crate) const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// Most internal snapshots that are believed: 65536, as in qemu.
pub(crate) const MAX_SNAPSHOTS: u32 = 65536;
/// Largest virtual size: what `off_t` holds.
pub(crate) const MAX_SIZE: u64 = i64::MAX as u64;

/// Refcounts may be wrong: rebuild before writing.
pub(crate) const INCOMPAT_DIRTY: u64 = 1 << 0;
/// Metadata may be wrong: read only.
pub(crate) const INCOMPAT_CORRUPT: u64 = 1 << 1;
/// Guest data is in another file.
pub(crate) const INCOMPAT_EXTERNAL_DATA: u64 = 1 << 2;
/// `compression_type` is set.
pub(crate) const INCOMPAT_COMPRESSION: u64 = 1 << 3;
/// L2 entries are 128 bits wide.
pub(crate) const INCOMPAT_EXTENDED_L2: u64 = 1 << 4;
const INCOMPAT_KNOWN: u64 = INCOMPAT_DIRTY
    | INCOMPAT_CORRUPT
    | INCOMPAT_EXTERNAL_DATA
    | INCOMPAT_COMPRESSION
    | INCOMPAT_EXTENDED_L2;
/// Persistent bitmaps are consistent.
pub(crate) const AUTOCLEAR_BITMAPS: u64 = 1 << 0;

/// Offsets of header fields that are rewritten in place.
pub(crate) mod field {
    pub(crate) const CLUSTER_BITS: u64 = 20;
    pub(crate) const REFTABLE_OFFSET: u64 = 48;
    pub(crate) const INCOMPATIBLE: u64 = 72;
    pub(crate) const AUTOCLEAR: u64 = 88;
}

/// How compressed clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate (the format calls it zlib).
    Deflate,
    /// Zstandard.
    Zstd,
}

/// Format of a backing file, as stored in the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackingFormat {
    /// Plain bytes.
    Raw,
    /// QCOW2, version 2 or 3.
    Qcow2,
}

impl BackingFormat {
    /// The name that images store.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }

    /// The format of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "raw" => Some(Self::Raw),
            "qcow2" => Some(Self::Qcow2),
            _ => None,
        }
    }
}

impl fmt::Display for BackingFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A header whose every field was checked against the file and the engine's limits.
#[derive(Debug, Clone)]
pub(crate) struct Header {
    pub(crate) geometry: Geometry,
    pub(crate) l1_entries: u32,
    pub(crate) l1_offset: HostOffset,
    pub(crate) reftable_offset: HostOffset,
    pub(crate) reftable_clusters: u32,
    pub(crate) snapshots: u32,
    pub(crate) snapshots_offset: HostOffset,
    pub(crate) incompatible: u64,
    pub(crate) compatible: u64,
    pub(crate) autoclear: u64,
    pub(crate) compression: Compression,
    pub(crate) backing_name: Option<String>,
    pub(crate) extensions: Vec<Extension>,
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
}

impl Header {
    /// Reads and checks the header.
    ///
    /// # Errors
    /// `NotQcow2`, `Unsupported` (by name) or `Corrupt`.
    pub(crate) fn read(storage: &dyn Storage) -> Result<Self> {
        let file_len = storage.len().map_err(|e| Error::io("cannot tell the file's length", e))?;
        let read = |length: usize, offset: u64| -> Result<Vec<u8>> {
            let mut bytes = vec![0; length];
            storage.read_at(&mut bytes, offset).map_err(|e| Error::io("cannot read header", e))?;
            Ok(bytes)
        };
        let fixed = read(MAX_HEADER_LENGTH, 0)?;
        if file_len < V2_LENGTH as u64 || be32(&fixed, 0) != MAGIC {
            return Err(Error::new(ErrorKind::NotQcow2, "not a QCOW2 image (no QFI magic)"));
        }
        let version = be32(&fixed, 4);
        if version != 2 && version != 3 {
            return Err(Error::unsupported(format!(
                "QCOW2 version {version} is unknown; versions 2 and 3 are served"
            )));
        }
        let header_length = match version {
            2 => V2_LENGTH,
            _ => be32(&fixed, 100) as usize,
        };
        if version == 3
            && (header_length < V3_LENGTH
                || !header_length.is_multiple_of(8)
                || header_length > MAX_HEADER_LENGTH)
        {
            return Err(Error::corrupt(format!("header length {header_length} is impossible")));
        }
        // Fields beyond the header's own length are not present.
        let fixed = &fixed[..header_length];

        let incompatible = be64(fixed, 72);
        let compatible = be64(fixed, 80);
        let autoclear = be64(fixed, 88);
        let refcount_order = if version == 2 { 4 } else { be32(fixed, 96) };
        let cluster_bits = be32(fixed, 20);
        if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
            return Err(Error::unsupported(format!(
                "clusters of 2^{cluster_bits} bytes; 512 bytes to 2 MiB are served"
            )));
        }
        let geometry = Geometry {
            version,
            cluster_bits,
            size: be64(fixed, 24),
            refcount_order,
            extended_l2: incompatible & INCOMPAT_EXTENDED_L2 != 0,
        };
        let area_length = (1usize << cluster_bits).min(1 << MAX_CLUSTER_BITS);
        let first_cluster = read(area_length, 0)?;
        let backing_offset = be64(fixed, 8);
        let extensions_end = match backing_offset {
            0 => area_length,
            at => usize::try_from(at).unwrap_or(usize::MAX).min(area_length),
        };
        let extensions = parse_extensions(&first_cluster, header_length, extensions_end)?;
        refuse_unknown_features(incompatible, &extensions)?;
        check_features(incompatible, be32(fixed, 32), &geometry)?;
        let compression = compression_of(incompatible, fixed)?;

        let header = Self {
            geometry,
            l1_entries: be32(fixed, 36),
            l1_offset: HostOffset(be64(fixed, 40)),
            reftable_offset: HostOffset(be64(fixed, 48)),
            reftable_clusters: be32(fixed, 56),
            snapshots: be32(fixed, 60),
            snapshots_offset: HostOffset(be64(fixed, 64)),
            incompatible,
            compatible,
            autoclear,
            compression,
            backing_name: backing_name(&first_cluster, backing_offset, be32(fixed, 16))?,
            extensions,
        };
        header.check_tables(file_len)?;
        Ok(header)
    }

    fn check_tables(&self, file_len: u64) -> Result<()> {
        let g = &self.geometry;
        if g.size > MAX_SIZE {
            return Err(Error::corrupt(format!("virtual size {} is impossible", g.size)));
        }
        let l1_bytes = u64::from(self.l1_entries) * 8;
        if l1_bytes > MAX_L1_BYTES {
            return Err(Error::unsupported(format!(
                "L1 table of {l1_bytes} bytes; at most {MAX_L1_BYTES} are served"
            )));
        }
        if g.l1_entries() > u64::from(self.l1_entries) {
            return Err(Error::corrupt(format!(
                "L1 table has {} entries, but the virtual size of {} bytes needs {}",
                self.l1_entries,
                g.size,
                g.l1_entries()
            )));
        }
        let reftable_bytes = u64::from(self.reftable_clusters) << g.cluster_bits;
        if reftable_bytes > MAX_REFTABLE_BYTES.max(g.cluster_size()) {
            return Err(Error::unsupported(format!(
                "refcount table of {reftable_bytes} bytes; at most {MAX_REFTABLE_BYTES} are served"
            )));
        }
        if self.reftable_clusters == 0 {
            return Err(Error::corrupt("the image has no refcount table"));
        }
        for (name, offset, bytes) in [
            ("L1 table", self.l1_offset, l1_bytes),
            ("refcount table", self.reftable_offset, reftable_bytes),
        ] {
            let end = offset.0.checked_add(bytes).filter(|end| *end <= file_len.max(1));
            let inside = bytes == 0 || (offset.0 >= g.cluster_size() && end.is_some());
            if !offset.0.is_multiple_of(g.cluster_size()) || !inside {
                return Err(Error::corrupt(format!(
                    "{name} at {offset} ({bytes} bytes) is not aligned or outside the file of \
                     {file_len} bytes; the file may be truncated"
                )));
            }
        }
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(Error::unsupported(format!(
                "{} internal snapshots; at most {MAX_SNAPSHOTS} are served",
                self.snapshots
            )));
        }
        Ok(())
    }

    /// The stored format of the backing file.
    pub(crate) fn backing_format(&self) -> Option<&str> {
        self.extensions.iter().find_map(|e| match e {
            Extension::BackingFormat(name) => Some(name.as_str()),
            _ => None,
        })
    }
}

fn refuse_unknown_features(incompatible: u64, extensions: &[Extension]) -> Result<()> {
    let unknown = incompatible & !INCOMPAT_KNOWN;
    if unknown == 0 {
        return Ok(());
    }
    let named = |bit: u32| {
        extensions.iter().find_map(|e| match e {
            Extension::FeatureNames(names) => {
                names.iter().find(|n| n.kind == 0 && u32::from(n.bit) == bit).map(|n| &n.name)
            }
            _ => None,
        })
    };
    let list: Vec<String> = (0..64)
        .filter(|bit| unknown >> bit & 1 != 0)
        .map(|bit| named(bit).map_or(format!("bit {bit}"), |n| format!("bit {bit} ({n})")))
        .collect();
    Err(Error::unsupported(format!(
        "the image uses unknown incompatible features: {}; convert it with the tool that made it",
        list.join(", ")
    )))
}

fn check_features(incompatible: u64, crypt_method: u32, geometry: &Geometry) -> Result<()> {
    match crypt_method {
        0 => {}
        1 => {
            return Err(Error::unsupported("the image is encrypted (AES); decrypt it first"));
        }
        2 => {
            return Err(Error::unsupported("the image is encrypted (LUKS); decrypt it first"));
        }
        n => return Err(Error::unsupported(format!("unknown encryption method {n}"))),
    }
    if incompatible & INCOMPAT_EXTERNAL_DATA != 0 {
        return Err(Error::unsupported(
            "the image keeps its data in an external file; convert it to a plain QCOW2 first",
        ));
    }
    if geometry.refcount_order > 6 {
        return Err(Error::corrupt(format!(
            "refcount order {} is above 6",
            geometry.refcount_order
        )));
    }
    if geometry.extended_l2 && geometry.cluster_bits < 14 {
        return Err(Error::corrupt("extended L2 entries need clusters of 16 KiB or more"));
    }
    Ok(())
}

fn compression_of(incompatible: u64, fixed: &[u8]) -> Result<Compression> {
    let stored = fixed.get(V3_LENGTH).copied().unwrap_or(0);
    match (incompatible & INCOMPAT_COMPRESSION != 0, stored) {
        (false, 0) => Ok(Compression::Deflate),
        (true, 1) => Ok(Compression::Zstd),
        (true, 0) | (false, _) => {
            Err(Error::corrupt("compression type and its feature bit contradict each other"))
        }
        (true, n) => Err(Error::unsupported(format!("unknown compression type {n}"))),
    }
}

fn backing_name(first_cluster: &[u8], offset: u64, length: u32) -> Result<Option<String>> {
    if offset == 0 {
        return Ok(None);
    }
    let range = usize::try_from(offset)
        .ok()
        .filter(|_| length <= MAX_BACKING_NAME)
        .and_then(|start| Some(start..start.checked_add(length as usize)?));
    let Some(bytes) = range.and_then(|range| first_cluster.get(range)) else {
        return Err(Error::corrupt(format!(
            "backing file name ({length} bytes at {offset}) lies outside the header cluster or is \
             longer than {MAX_BACKING_NAME} bytes"
        )));
    };
    match std::str::from_utf8(bytes) {
        Ok("") => Ok(None),
        Ok(name) if !name.contains('\0') => Ok(Some(name.to_owned())),
        _ => Err(Error::corrupt("backing file name is not valid UTF-8")),
    }
}
