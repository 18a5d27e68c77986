//! The backing chain of an image: files opened read-only, looked up as one.
//!
//! Which file holds a byte is resolved once for a window of the disk, through all files, and kept:
//! reading from a chain of thirty costs what reading from a chain of one does.

mod files;
mod gate;
mod layer;
mod windows;

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use files::{ChainFile, chain_files};
pub use gate::{FileGate, OpenGate};
pub(crate) use layer::past_end;

use crate::compressed::ClusterReader;
use crate::error::{Error, ErrorKind, Result};
use crate::header::{BackingFormat, Header};
use crate::storage::{Identity, Span, Storage};
use crate::table::segment::SegmentKind;
use layer::Layer;
pub(crate) use windows::Extent;
use windows::Windows;

/// The backing files of one image, top first. Never empty.
pub(crate) struct Chain {
    layers: Vec<Layer>,
    windows: Windows,
    clusters: ClusterReader,
}

/// What an image says of its backing file.
pub(crate) struct Reference<'a> {
    pub(crate) name: &'a str,
    pub(crate) format: Option<&'a str>,
}

fn backing_format(path: &Path, reference: &Reference<'_>) -> Result<BackingFormat> {
    let Some(format) = reference.format else {
        return Err(Error::new(
            ErrorKind::Chain,
            format!(
                "the image does not say which format its backing file '{}' has, and guessing is \
                 unsafe; store it with: qemu-img rebase -u -F FORMAT -b '{}' '{}'",
                reference.name,
                reference.name,
                path.display()
            ),
        ));
    };
    BackingFormat::from_name(format).ok_or_else(|| {
        Error::new(
            ErrorKind::Chain,
            format!(
                "backing file '{}' has format '{format}'; raw and qcow2 are served",
                reference.name
            ),
        )
    })
}

impl Chain {
    /// Opens everything behind `reference`, which the image at `path` makes.
    ///
    /// # Errors
    /// `Chain` for a missing file or format, a loop, or more than `max_depth` files; what opening
    /// each file gives.
    pub(crate) fn open(
        gate: &dyn OpenGate,
        path: &Path,
        top: Option<Identity>,
        reference: Reference<'_>,
        max_depth: usize,
        window: u64,
    ) -> Result<Self> {
        let mut layers: Vec<Layer> = Vec::new();
        let mut seen: Vec<Identity> = top.into_iter().collect();
        let mut referrer = path.to_owned();
        let mut name = reference.name.to_owned();
        let mut format = backing_format(path, &reference).map_err(|e| e.in_file(path))?;
        loop {
            if layers.len() + 1 >= max_depth.max(2) {
                return Err(Error::new(
                    ErrorKind::Chain,
                    format!("the backing chain is longer than {max_depth} images"),
                )
                .in_file(path));
            }
            let (layer_path, storage) =
                gate.open(&referrer, &name).map_err(|e| e.in_file(&referrer))?;
            if let Some(identity) = storage.identity() {
                if seen.contains(&identity) {
                    return Err(Error::new(
                        ErrorKind::Chain,
                        format!(
                            "the backing chain is a loop: '{}' is its own ancestor",
                            layer_path.display()
                        ),
                    )
                    .in_file(path));
                }
                seen.push(identity);
            }
            match Self::open_layer(layer_path, storage, format)? {
                (layer, None) => {
                    layers.push(layer);
                    break;
                }
                (layer, Some((next_name, next_format))) => {
                    referrer = layer.path.clone();
                    layers.push(layer);
                    (name, format) = (next_name, next_format);
                }
            }
        }
        Ok(Self { layers, windows: Windows::new(window), clusters: ClusterReader::default() })
    }

    #[allow(clippy::type_complexity, reason = "a layer and where to go on")]
    fn open_layer(
        path: PathBuf,
        storage: Arc<dyn Storage>,
        format: BackingFormat,
    ) -> Result<(Layer, Option<(String, BackingFormat)>)> {
        if format == BackingFormat::Raw {
            return Ok((Layer::raw(path, storage)?, None));
        }
        let open = || -> Result<_> {
            let header = Header::read(&*storage)?;
            let next = match &header.backing_name {
                None => None,
                Some(name) => {
                    let reference = Reference { name, format: header.backing_format() };
                    Some((name.clone(), backing_format(&path, &reference)?))
                }
            };
            Ok((Layer::qcow2(path.clone(), Arc::clone(&storage), &header)?, next))
        };
        open().map_err(|e| e.in_file(&path))
    }

    /// Paths of the files, top first.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.layers.iter().map(|layer| layer.path.as_path())
    }

    /// Calls `visit` with the extents that cover `start .. end`, in order, until it returns `false`
    /// or fails.
    pub(crate) fn extents(
        &self,
        start: u64,
        end: u64,
        visit: &mut dyn FnMut(Extent) -> Result<bool>,
    ) -> Result<()> {
        self.windows.extents(&self.layers, start, end, visit)
    }

    /// Whether all of `start .. end` reads as zeroes by its mapping alone.
    pub(crate) fn is_zero(&self, start: u64, end: u64) -> Result<bool> {
        let mut zero = true;
        self.extents(start, end, &mut |extent| {
            zero = extent.reads_as_zeroes();
            Ok(zero)
        })?;
        Ok(zero)
    }

    /// Fills `buf` with the bytes of the chain at `start`.
    pub(crate) fn read(&self, buf: &mut [u8], start: u64, span: Span) -> Result<()> {
        let end = start + buf.len() as u64;
        let mut rest = buf;
        self.extents(start, end, &mut |extent| {
            // The extents cover the buffer exactly.
            #[allow(clippy::cast_possible_truncation, reason = "bounded by the buffer")]
            let (part, tail) = std::mem::take(&mut rest).split_at_mut(extent.length as usize);
            self.read_extent(part, extent, span).map_err(|e| e.at_guest(extent.guest))?;
            rest = tail;
            Ok(true)
        })
    }

    fn read_extent(&self, buf: &mut [u8], extent: Extent, span: Span) -> Result<()> {
        match extent.kind {
            SegmentKind::Unallocated
            | SegmentKind::ZeroPlain
            | SegmentKind::ZeroAllocated { .. } => {
                buf.fill(0);
                Ok(())
            }
            SegmentKind::Data { host, .. } => self.layers[extent.layer].read_host(buf, host, span),
            SegmentKind::Compressed(data) => {
                let layer = &self.layers[extent.layer];
                let Some((compression, cluster_size)) = layer.compression() else {
                    return Err(Error::corrupt("compressed data in a raw file"));
                };
                let inside = extent.guest % cluster_size;
                self.clusters
                    .read(&*layer.storage, compression, data, cluster_size, inside, buf)
                    .map_err(|e| e.in_file(&layer.path))
            }
        }
    }
}
