//! The master file table: records by number, and values of attributes wherever their extents are.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use super::attribute::{self, Attribute, COMPRESSION, Form, ListEntry, MAX_LIST, kind};
use super::boot::Geometry;
use super::record::{Record, in_record};
use super::runs;
use super::stream::Stream;
use crate::error::{Error, ErrorKind, Result};
use crate::source::Source;

/// Records are read in blocks of this many bytes.
const BLOCK: u64 = 64 << 10;
/// Blocks that are kept.
const BLOCKS: usize = 64;
/// Low bits of a file reference: the number of the record.
pub(super) const NUMBER: u64 = (1 << 48) - 1;

/// The table, open.
pub(super) struct Mft {
    /// The volume's bytes.
    pub(super) source: Arc<dyn Source>,
    /// Its sizes.
    pub(super) geometry: Geometry,
    stream: Stream,
    blocks: Mutex<VecDeque<(u64, Arc<Vec<u8>>)>>,
}

/// Name of the index of names, `$I30`, as UTF-16LE.
pub(super) const I30: &[u8] = b"$\0I\x003\x000\0";

impl Mft {
    /// Finds the table's own extents.
    ///
    /// # Errors
    /// `Corrupt`; `Io`.
    pub(super) fn open(source: Arc<dyn Source>, geometry: Geometry) -> Result<Self> {
        let at = |cluster: u64| {
            let mut bytes = vec![0; geometry.record as usize];
            let offset = cluster.saturating_mul(geometry.cluster);
            source.read_at(&mut bytes, offset)?;
            Record::parse(0, bytes, geometry.sector)
        };
        let first = at(geometry.mft).or_else(|error| at(geometry.mirror).map_err(|_| error))?;
        let attributes = first.attributes()?;
        let own = find_in(&attributes, kind::DATA, &[], None)
            .ok_or_else(|| Error::corrupt("$MFT has no data"))?;
        let mut runs = Vec::new();
        let Form::NonResident(extent) = own.form else {
            return Err(Error::corrupt("$MFT is resident"));
        };
        runs::decode(extent.pairs, 0, geometry.clusters(), &mut runs)?;
        let sizes = (extent.size, extent.initialized);
        let known = runs::end(&runs).saturating_mul(geometry.cluster);
        let partial = (sizes.0.min(known), sizes.1.min(known));
        let blocks = Mutex::new(VecDeque::new());
        let stream = Stream::in_clusters(runs.clone(), geometry.cluster, 0, partial)?;
        let mut mft = Self { source, geometry, stream, blocks };
        if let Some(list) = mft.list(&attributes)? {
            // Each extent lies in a record that earlier extents hold.
            let extents =
                list.iter().filter(|e| e.kind == kind::DATA && e.name.is_empty() && e.lowest > 0);
            for entry in extents {
                let record = mft.extension(entry, first.reference())?;
                let attributes = record.attributes()?;
                mft.add_extent(&attributes, entry, &mut runs)?;
                let known = runs::end(&runs).saturating_mul(geometry.cluster);
                let partial = (sizes.0.min(known), sizes.1.min(known));
                mft.stream = Stream::in_clusters(runs.clone(), geometry.cluster, 0, partial)?;
                // The last block was as long as what was known of it.
                mft.blocks = Mutex::new(VecDeque::new());
            }
        }
        if mft.stream.size < sizes.0 {
            return Err(Error::corrupt("$MFT: extents are missing"));
        }
        Ok(mft)
    }

    /// Record `number`, whatever it is.
    ///
    /// # Errors
    /// `NotFound` behind the end; `Corrupt`; `Io`.
    pub(super) fn record(&self, number: u64) -> Result<Record> {
        let size = u64::from(self.geometry.record);
        let offset = number
            .checked_mul(size)
            .filter(|offset| offset.checked_add(size).is_some_and(|end| end <= self.stream.size))
            .ok_or_else(|| Error::not_found(format!("there is no MFT record {number}")))?;
        let block = self.block(offset / BLOCK)?;
        let within = usize::try_from(offset % BLOCK).unwrap_or(usize::MAX);
        let bytes = super::bytes::part(&block, within, self.geometry.record as usize)?;
        if bytes.starts_with(&[0; 4]) {
            return Err(Error::not_found(format!("MFT record {number} was never used")));
        }
        Record::parse(number, bytes.to_vec(), self.geometry.sector)
    }

    fn block(&self, number: u64) -> Result<Arc<Vec<u8>>> {
        let lock = || self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let mut blocks = lock();
            if let Some(at) = blocks.iter().position(|(kept, _)| *kept == number)
                && let Some(found) = blocks.remove(at)
            {
                let block = Arc::clone(&found.1);
                blocks.push_front(found);
                return Ok(block);
            }
        }
        let offset = number * BLOCK;
        let length = usize::try_from(BLOCK.min(self.stream.size - offset)).unwrap_or(0);
        let mut bytes = vec![0; length];
        self.stream.read_at(&*self.source, &mut bytes, offset)?;
        let block = Arc::new(bytes);
        let mut blocks = lock();
        blocks.push_front((number, Arc::clone(&block)));
        blocks.truncate(BLOCKS);
        Ok(block)
    }

    /// Where record `number` lies on the volume.
    pub(super) fn place(&self, number: u64) -> Option<u64> {
        self.stream.place(number.checked_mul(u64::from(self.geometry.record))?)
    }

    /// Alternate data streams of the file in `base`.
    ///
    /// # Errors
    /// `Corrupt`; `Io`.
    pub(super) fn named_streams(&self, base: &Record) -> Result<usize> {
        let attributes = base.attributes()?;
        Ok(match self.list(&attributes).map_err(|e| in_record(base.number, &e))? {
            None => {
                attributes.iter().filter(|a| a.kind == kind::DATA && !a.name.is_empty()).count()
            }
            Some(list) => list
                .iter()
                .filter(|e| e.kind == kind::DATA && !e.name.is_empty() && e.lowest == 0)
                .count(),
        })
    }

    /// The base record that a file reference names, in use and of that sequence.
    ///
    /// # Errors
    /// `NotFound` where it names nothing, or what was there before; `Corrupt`; `Io`.
    pub(super) fn file(&self, reference: u64) -> Result<Record> {
        let record = self.record(reference & NUMBER)?;
        if !record.in_use() || record.reference() != reference || record.base() != 0 {
            return Err(Error::not_found(format!(
                "there is no file {} of generation {}",
                reference & NUMBER,
                reference >> 48
            )));
        }
        Ok(record)
    }

    /// The attribute list among `attributes` of a base record.
    pub(super) fn list(&self, attributes: &[Attribute<'_>]) -> Result<Option<Vec<ListEntry>>> {
        let Some(list) = find_in(attributes, kind::ATTRIBUTE_LIST, &[], None) else {
            return Ok(None);
        };
        let bytes = match list.form {
            Form::Resident(bytes) => bytes.to_vec(),
            Form::NonResident(extent) => {
                let mut runs = Vec::new();
                runs::decode(extent.pairs, extent.lowest, self.geometry.clusters(), &mut runs)?;
                let sizes = (extent.size, extent.initialized);
                Stream::in_clusters(runs, self.geometry.cluster, 0, sizes)?
                    .read_all(&*self.source, MAX_LIST)?
            }
        };
        attribute::parse_list(&bytes).map(Some)
    }

    /// The record of a list's entry: the base itself, or one that extends it.
    fn extension(&self, entry: &ListEntry, base: u64) -> Result<Record> {
        let record = self.record(entry.reference & NUMBER).map_err(|e| {
            Error::new(
                if e.kind == ErrorKind::NotFound { ErrorKind::Corrupt } else { e.kind },
                format!("an extension of MFT record {}: {}", base & NUMBER, e.message),
            )
        })?;
        let belongs = entry.reference == base || record.base() == base;
        if !record.in_use() || record.reference() != entry.reference || !belongs {
            return Err(Error::corrupt(format!(
                "MFT record {} does not extend record {}",
                record.number,
                base & NUMBER
            )));
        }
        Ok(record)
    }

    fn add_extent(
        &self,
        attributes: &[Attribute<'_>],
        entry: &ListEntry,
        runs: &mut Vec<runs::Run>,
    ) -> Result<()> {
        let found = find_in(attributes, entry.kind, &entry.name, Some(entry.instance));
        match found.map(|attribute| attribute.form) {
            Some(Form::NonResident(extent))
                if extent.lowest == entry.lowest && extent.lowest == runs::end(runs) =>
            {
                runs::decode(extent.pairs, extent.lowest, self.geometry.clusters(), runs)
            }
            _ => Err(Error::corrupt(format!(
                "the extent from cluster {} on is not where the attribute list says",
                entry.lowest
            ))),
        }
    }

    /// The value of an attribute of the file in `base`, from all its extents; `None` where it has none.
    ///
    /// # Errors
    /// `Corrupt`; `Limit`; `Unsupported`; `Io`.
    pub(super) fn value(&self, base: &Record, kind: u32, name: &[u8]) -> Result<Option<Stream>> {
        self.value_of(base, kind, name).map_err(|e| in_record(base.number, &e))
    }

    /// Size and bytes allocated of an attribute's value, and its flags, without its later extents.
    ///
    /// # Errors
    /// As [`Self::value`].
    pub(super) fn head(&self, base: &Record, kind: u32, name: &[u8]) -> Result<Option<Head>> {
        let read = |attributes: &[Attribute<'_>], instance| {
            find_in(attributes, kind, name, instance).map(|attribute| Head::of(&attribute))
        };
        let attributes = base.attributes()?;
        let Some(list) = self.list(&attributes).map_err(|e| in_record(base.number, &e))? else {
            return Ok(read(&attributes, None));
        };
        match list.iter().find(|e| e.kind == kind && e.name == name) {
            None => Ok(None),
            Some(entry) if entry.lowest != 0 => Err(in_record(base.number, &headless())),
            Some(entry) => {
                let record = self.extension(entry, base.reference())?;
                let found = read(&record.attributes()?, Some(entry.instance));
                found.map(Some).ok_or_else(|| {
                    Error::corrupt(format!("MFT record {}: an attribute is missing", base.number))
                })
            }
        }
    }

    fn value_of(&self, base: &Record, kind: u32, name: &[u8]) -> Result<Option<Stream>> {
        let attributes = base.attributes()?;
        let Some(list) = self.list(&attributes)? else {
            return match find_in(&attributes, kind, name, None) {
                Some(found) => {
                    let mut runs = Vec::new();
                    if let Form::NonResident(extent) = found.form {
                        if extent.lowest != 0 {
                            return Err(headless());
                        }
                        runs::decode(extent.pairs, 0, self.geometry.clusters(), &mut runs)?;
                    }
                    self.stream(&found, runs).map(Some)
                }
                None => Ok(None),
            };
        };
        let mut runs = Vec::new();
        let mut first: Option<(Record, u16)> = None;
        for entry in list.iter().filter(|entry| entry.kind == kind && entry.name == name) {
            let record = self.extension(entry, base.reference())?;
            let attributes = record.attributes()?;
            if first.is_none() {
                if entry.lowest != 0 {
                    return Err(headless());
                }
                let found = find_in(&attributes, kind, name, Some(entry.instance));
                if let Some(Form::Resident(bytes)) = found.map(|attribute| attribute.form) {
                    return Ok(Some(Stream::resident(bytes.to_vec())));
                }
            }
            self.add_extent(&attributes, entry, &mut runs)?;
            first.get_or_insert((record, entry.instance));
        }
        let Some((record, instance)) = first else { return Ok(None) };
        let attributes = record.attributes()?;
        match find_in(&attributes, kind, name, Some(instance)) {
            Some(found) => self.stream(&found, runs).map(Some),
            None => Ok(None),
        }
    }

    fn stream(&self, attribute: &Attribute<'_>, runs: Vec<runs::Run>) -> Result<Stream> {
        match attribute.form {
            Form::Resident(bytes) => Ok(Stream::resident(bytes.to_vec())),
            Form::NonResident(extent) => {
                let unit = match attribute.flags & COMPRESSION {
                    0 => 0,
                    1 if extent.unit > 0 => extent.unit,
                    method => {
                        return Err(Error::unsupported(format!("compression method {method}")));
                    }
                };
                let sizes = (extent.size, extent.initialized);
                Stream::in_clusters(runs, self.geometry.cluster, unit, sizes)
            }
        }
    }
}

/// A value without its first extent, which tells its size.
fn headless() -> Error {
    Error::corrupt("the first extent of a value is missing")
}

/// What the first extent of a value says of all of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Head {
    /// Bytes.
    pub(super) size: u64,
    /// Bytes that it takes.
    pub(super) allocated: u64,
    /// Flags of the attribute.
    pub(super) flags: u16,
}

impl Head {
    fn of(attribute: &Attribute<'_>) -> Self {
        let (size, allocated) = match attribute.form {
            Form::Resident(bytes) => (bytes.len() as u64, 0),
            Form::NonResident(extent) => (extent.size, extent.taken.unwrap_or(extent.allocated)),
        };
        Self { size, allocated, flags: attribute.flags }
    }
}

/// The attribute of this type and name, and of this number where one is told.
pub(super) fn find_in<'a>(
    attributes: &[Attribute<'a>],
    kind: u32,
    name: &[u8],
    instance: Option<u16>,
) -> Option<Attribute<'a>> {
    attributes
        .iter()
        .find(|a| a.kind == kind && a.name == name && instance.is_none_or(|i| i == a.instance))
        .copied()
}
