//! A QCOW2 image engine: synchronous, positional, shared between threads.
//!
//! [`Image`] reads and writes the virtual disk of one image file through its chain of backing
//! files. Every method takes `&self`; operations on different parts of the disk run in parallel,
//! and operations on the same part wait for each other. What [`Image::flush`] covered survives a
//! crash at any later point; `docs/on-disk.md` of the project proves the order of writes.
//!
//! The format is that of QEMU's specification (`docs/interop/qcow2.txt`), versions 2 and 3.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let dir = tempfile::tempdir()?;
//! let path = dir.path().join("disk.qcow2");
//! qcow2::create(&path, &qcow2::CreateOptions::new(1 << 30))?;
//!
//! let image = qcow2::Image::open(&path, &qcow2::OpenOptions::new())?;
//! image.write_at(b"hello", 12345)?;
//! image.close()?;
//!
//! let mut back = [0; 5];
//! let image = qcow2::Image::open(&path, &qcow2::OpenOptions::new().read_only())?;
//! image.read_at(&mut back, 12345)?;
//! assert_eq!(&back, b"hello");
//! # Ok(())
//! # }
//! ```

mod alloc;
mod cache;
mod chain;
mod check;
mod compressed;
mod error;
mod geometry;
mod header;
mod image;
mod lock;
mod meta;
mod ranges;
mod refcount;
pub mod storage;
mod table;
mod types;
mod zeroes;

pub use chain::{ChainFile, FileGate, OpenGate, chain_files};
pub use check::{CheckReport, Repair, check, check_storage};
pub use error::{Error, ErrorKind, Result};
pub use header::{BackingFormat, Compression};
pub use image::Image;
pub use image::create::{CreateOptions, create, create_in};
pub use image::info::ImageInfo;
pub use image::map::{Mapping, MappingKind};
pub use image::open::OpenOptions;
pub use image::zero::ZeroMode;
