//! Opening an image and its backing chain.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, RwLock};

use super::flush::Durability;
use super::{Image, Reserved};
use crate::alloc::Allocator;
use crate::chain::{Chain, FileGate, OpenGate, Reference};
use crate::check;
use crate::compressed::ClusterReader;
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::Geometry;
use crate::header::{Header, INCOMPAT_CORRUPT, INCOMPAT_DIRTY, field};
use crate::meta::{Meta, Space, read_words};
use crate::ranges::Ranges;
use crate::refcount::Refcounts;
use crate::storage::{FileStorage, Storage};

/// Deepest chain that is opened, the image itself included, unless the caller says otherwise.
const DEFAULT_CHAIN_DEPTH: usize = 256;
/// Memory for L2 slices, in bytes, unless the caller says otherwise: 32 MiB, which is the mapping of
/// 256 GiB at the default cluster size.
const DEFAULT_METADATA_CACHE: usize = 32 << 20;
/// Smallest and largest window of the chain's look-up, in bytes.
const WINDOW: (u64, u64) = (1 << 20, 1 << 30);

/// How to open an image.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Refuse writes; other readers may have the image open too.
    pub read_only: bool,
    /// Deepest chain, the image itself included.
    pub max_chain_depth: usize,
    /// Memory for L2 slices in bytes.
    pub metadata_cache: usize,
    /// Take the locks that qemu's programs take, and respect theirs.
    pub lock: bool,
    /// Let large aligned writes bypass the page cache, where the file system can. Has no effect on
    /// clusters smaller than a page.
    pub direct: bool,
    /// Store no data for clusters that are written with nothing but zeroes.
    pub detect_zeroes: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl OpenOptions {
    /// For reading and writing, locked, with the default bounds.
    pub fn new() -> Self {
        Self {
            read_only: false,
            max_chain_depth: DEFAULT_CHAIN_DEPTH,
            metadata_cache: DEFAULT_METADATA_CACHE,
            lock: true,
            direct: true,
            detect_zeroes: true,
        }
    }

    /// The same for reading only.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }
}

impl Image {
    /// Opens the image at `path` with every file of its backing chain.
    ///
    /// An image whose dirty bit is set gets its refcounts rebuilt first when it is opened for
    /// writing.
    ///
    /// # Errors
    /// `Io` when a file cannot be opened, `Locked` (naming the holder), `NotQcow2`, `Unsupported`,
    /// `Corrupt`, `Chain`; `ReadOnly` for an image that is marked corrupt and opened for writing.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self> {
        let open = || -> Result<_> {
            let mut file = FileStorage::open(path, !options.read_only)
                .map_err(|e| Error::io("cannot open the image", e))?;
            if options.direct && !options.read_only && cluster_is_pages(&file) {
                file.write_directly();
            }
            if options.lock {
                file.lock(path, !options.read_only)?;
            }
            Ok(Arc::new(file))
        };
        let file = open().map_err(|e| e.in_file(path))?;
        let storage: Arc<dyn Storage> = Arc::clone(&file) as _;
        let gate = FileGate { lock: options.lock };
        let mut image = Self::open_storage(storage, path, &gate, options)?;
        image.file = Some(file);
        Ok(image)
    }

    /// Opens an image that is in `storage`; its backing files come from `gate`. `path` names it in
    /// messages and is what relative names count from. Takes no locks on `storage`.
    ///
    /// # Errors
    /// As [`Image::open`].
    pub fn open_storage(
        storage: Arc<dyn Storage>,
        path: &Path,
        gate: &dyn OpenGate,
        options: &OpenOptions,
    ) -> Result<Self> {
        Self::assemble(storage, path, gate, options).map_err(|e| e.in_file(path))
    }

    fn assemble(
        storage: Arc<dyn Storage>,
        path: &Path,
        gate: &dyn OpenGate,
        options: &OpenOptions,
    ) -> Result<Self> {
        let mut header = Header::read(&*storage)?;
        if !options.read_only {
            refuse_writing(&header)?;
        }
        let chain = match &header.backing_name {
            None => None,
            Some(name) => {
                let reference = Reference { name, format: header.backing_format() };
                let window = header.geometry.slice_span().clamp(WINDOW.0, WINDOW.1);
                let top = storage.identity();
                let depth = options.max_chain_depth;
                Some(Chain::open(gate, path, top, reference, depth, window)?)
            }
        };
        if !options.read_only {
            header = make_writable(&*storage, header)?;
        }
        let geometry = header.geometry;
        let l1 = read_words(&*storage, header.l1_offset, header.l1_entries as usize)?.into_vec();
        let space = match options.read_only {
            true => None,
            false => Some(open_space(&*storage, &header)?),
        };
        let length = storage.len().map_err(|e| Error::io("cannot tell the file's length", e))?;
        let meta = Meta::new(geometry, l1, header.l1_offset, space, options.metadata_cache);
        Ok(Self {
            path: PathBuf::from(path),
            storage,
            file: None,
            reserved: RwLock::new(reserved_ranges(&header, &geometry)),
            header,
            geometry,
            read_only: options.read_only,
            detect_zeroes: options.detect_zeroes,
            meta: Mutex::new(meta),
            ranges: Ranges::default(),
            durability: Durability::default(),
            chain,
            clusters: ClusterReader::default(),
            file_len: AtomicU64::new(length),
        })
    }
}

/// Whether clusters are whole pages. What is wrong with a header is found later.
fn cluster_is_pages(file: &FileStorage) -> bool {
    let mut bits = [0; 4];
    file.read_at(&mut bits, field::CLUSTER_BITS).is_ok()
        && u32::from_be_bytes(bits) >= super::PAGE.trailing_zeros()
}

fn refuse_writing(header: &Header) -> Result<()> {
    if header.incompatible & INCOMPAT_CORRUPT != 0 {
        return Err(Error::new(
            ErrorKind::ReadOnly,
            "the image is marked corrupt and can only be read; repair it with \
             'image check --repair all' or restore it from another copy",
        ));
    }
    if header.snapshots != 0 {
        return Err(Error::unsupported(format!(
            "the image has {} internal snapshot(s) and can only be read; delete them with \
             'qemu-img snapshot -d' first",
            header.snapshots
        )));
    }
    if header.geometry.extended_l2 {
        return Err(Error::unsupported(
            "the image has extended L2 entries (subclusters) and can only be read",
        ));
    }
    Ok(())
}

/// Brings an image into the state in which it may be changed.
fn make_writable(storage: &dyn Storage, mut header: Header) -> Result<Header> {
    if header.incompatible & INCOMPAT_DIRTY != 0 {
        check::rebuild_refcounts(storage, &header)?;
        header = Header::read(storage)?;
    }
    if header.autoclear != 0 {
        // Nothing that these bits vouch for is maintained here.
        storage
            .write_at(&[0; 8], field::AUTOCLEAR)
            .and_then(|()| storage.flush())
            .map_err(|e| Error::io("cannot clear the header's autoclear bits", e))?;
        header.autoclear = 0;
    }
    Ok(header)
}

fn open_space(storage: &dyn Storage, header: &Header) -> Result<Space> {
    let mut refcounts = Refcounts::load(
        storage,
        header.geometry,
        header.reftable_offset,
        header.reftable_clusters,
    )?;
    refcounts.require_inside(
        storage.len().map_err(|e| Error::io("cannot tell the file's length", e))?,
    )?;
    let alloc = Allocator::new(storage, header.geometry, &mut refcounts)?;
    Ok(Space { refcounts, alloc })
}

fn reserved_ranges(header: &Header, geometry: &Geometry) -> Reserved {
    let range = |start: u64, length: u64| (start, start.saturating_add(length));
    Reserved {
        header: range(0, geometry.cluster_size()),
        l1: range(header.l1_offset.0, u64::from(header.l1_entries) * 8),
        reftable: range(
            header.reftable_offset.0,
            u64::from(header.reftable_clusters) << geometry.cluster_bits,
        ),
    }
}
