//! Where a disk is read from.

use super::error::CaptureError;
use super::file::FileSource;
use super::remote::RemoteSource;
use super::uri;

/// A stretch of a disk, and whether it is known to read as zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stretch {
    /// First byte.
    pub(super) from: u64,
    /// End.
    pub(super) to: u64,
    /// It reads as zeroes.
    pub(super) zero: bool,
}

enum Kind {
    File(FileSource),
    Remote(Box<RemoteSource>),
}

/// A disk that is open for reading, from any number of threads.
pub struct Source {
    name: String,
    kind: Kind,
}

impl Source {
    /// Opens a file or block device by its path, or an export by its URI: `nbd://host[:port]/export`
    /// or `nbd+unix:///export?socket=PATH`.
    ///
    /// # Errors
    /// `Invalid` where the text names nothing that could be opened, `Source` where opening failed.
    pub fn open(text: &str) -> Result<Self, CaptureError> {
        let failed = |cause| CaptureError::Source { name: text.to_owned(), cause };
        let kind = match uri::parse(text).map_err(CaptureError::Invalid)? {
            None => Kind::File(FileSource::open(text.as_ref()).map_err(failed)?),
            Some((address, export)) => {
                let remote = RemoteSource::open(address, &export);
                Kind::Remote(Box::new(remote.map_err(|e| failed(e.to_string()))?))
            }
        };
        Ok(Self { name: text.to_owned(), kind })
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        match &self.kind {
            Kind::File(file) => file.size(),
            Kind::Remote(remote) => remote.size(),
        }
    }

    /// Names of the dirty bitmaps that the source offers; none for files.
    pub fn bitmaps(&self) -> Vec<String> {
        match &self.kind {
            Kind::File(_) => Vec::new(),
            Kind::Remote(remote) => remote.bitmaps().map(str::to_owned).collect(),
        }
    }

    /// What a dirty bitmap says has changed, as (offset, length) in order. Without a name, the only
    /// bitmap that there is.
    ///
    /// # Errors
    /// `Invalid` where there is no such bitmap, or no name and not just one; `Source` where asking
    /// failed.
    pub fn changed_extents(&self, bitmap: Option<&str>) -> Result<Vec<(u64, u64)>, CaptureError> {
        let names = self.bitmaps();
        let offered = match names.is_empty() {
            true => "it offers none".to_owned(),
            false => format!("it offers {}", names.join(", ")),
        };
        let name = &self.name;
        let wanted = match (bitmap, &names[..]) {
            (Some(wanted), _) if names.iter().any(|n| n == wanted) => wanted,
            (None, [only]) => only,
            (Some(wanted), _) => {
                let text = format!("the source {name} has no dirty bitmap '{wanted}'; {offered}");
                return Err(CaptureError::Invalid(text));
            }
            (None, _) => {
                let text = format!("say which dirty bitmap of {name} tells the changes; {offered}");
                return Err(CaptureError::Invalid(text));
            }
        };
        match &self.kind {
            Kind::File(_) => Ok(Vec::new()),
            Kind::Remote(remote) => remote.changed(wanted).map_err(|e| self.failed(e.to_string())),
        }
    }

    /// Unit of reads in bytes; a power of two.
    pub(super) fn minimum(&self) -> u64 {
        match &self.kind {
            Kind::File(_) => 1,
            Kind::Remote(remote) => remote.minimum(),
        }
    }

    /// Stretches that cover `from .. to`, in order.
    pub(super) fn map(&self, from: u64, to: u64) -> Result<Vec<Stretch>, CaptureError> {
        match &self.kind {
            Kind::File(file) => Ok(file.map(from, to)),
            Kind::Remote(remote) => remote.map(from, to).map_err(|e| self.failed(e.to_string())),
        }
    }

    /// Fills `buf` from byte `offset`.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), CaptureError> {
        let length = buf.len();
        let failed =
            |e: &dyn std::fmt::Display| self.failed(format!("{length} bytes at {offset}: {e}"));
        match &self.kind {
            Kind::File(file) => file.read(buf, offset).map_err(|e| failed(&e)),
            Kind::Remote(remote) => remote.read(buf, offset).map_err(|e| failed(&e)),
        }
    }

    fn failed(&self, cause: String) -> CaptureError {
        CaptureError::Source { name: self.name.clone(), cause }
    }
}
