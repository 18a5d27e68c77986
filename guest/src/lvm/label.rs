//! LVM2 on one physical volume: its label, its header, and its copies of the group's metadata.

use crate::bytes::{le32, le64};
use crate::crc;
use crate::error::{Error, Result};
use crate::source::Source;

const SECTOR: u64 = 512;
/// Sectors at the start that may hold the label.
const LABEL_SECTORS: u64 = 4;
/// What checksums of LVM2 start from.
const CRC_START: u32 = 0xf597_a6cf;
/// Areas in a list of a header.
const AREAS_MAX: usize = 16;
/// Bytes of a metadata area's header.
const AREA_HEADER: u64 = 512;
/// Bytes of a text.
const TEXT_MAX: u64 = 32 << 20;

/// What a physical volume says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PhysicalVolume {
    /// Its UUID: 32 letters and digits.
    pub(super) uuid: String,
    /// The texts of its metadata areas.
    pub(super) texts: Vec<String>,
    /// What was wrong with areas that could not be read.
    pub(super) notes: Vec<String>,
}

/// Reads the label of a physical volume; `None` where there is none.
///
/// # Errors
/// `Corrupt`; `Io`.
pub(super) fn read(source: &dyn Source) -> Result<Option<PhysicalVolume>> {
    let mut damage = None;
    for number in 0..LABEL_SECTORS {
        if (number + 1) * SECTOR > source.size() {
            break;
        }
        let mut sector = [0; 512];
        source.read_at(&mut sector, number * SECTOR)?;
        if !sector.starts_with(b"LABELONE") || sector[24..32] != *b"LVM2 001" {
            continue;
        }
        if le64(&sector, 8) != number || crc::update(CRC_START, &sector[20..]) != le32(&sector, 16)
        {
            damage = Some(Error::corrupt(format!("the LVM label in sector {number} is damaged")));
            continue;
        }
        return header(source, &sector).map(Some);
    }
    damage.map_or(Ok(None), Err)
}

fn header(source: &dyn Source, sector: &[u8; 512]) -> Result<PhysicalVolume> {
    let bad = || Error::corrupt("the header of an LVM physical volume makes no sense");
    let at = le32(sector, 20) as usize;
    let header = sector.get(at..).filter(|_| at >= 32).ok_or_else(bad)?;
    let uuid = header.get(..32).ok_or_else(bad)?;
    if !uuid.iter().all(u8::is_ascii_graphic) {
        return Err(bad());
    }
    let uuid = String::from_utf8_lossy(uuid).into_owned();
    let mut pv = PhysicalVolume { uuid, texts: Vec::new(), notes: Vec::new() };
    // Two lists that end with a pair of zeroes: areas of data, and areas of metadata.
    let (mut at, mut lists) = (40, 0);
    for _ in 0..2 * AREAS_MAX {
        let area = header.get(at..at + 16).ok_or_else(bad)?;
        at += 16;
        let (offset, size) = (le64(area, 0), le64(area, 8));
        if offset == 0 {
            lists += 1;
            if lists == 2 {
                return Ok(pv);
            }
        } else if lists == 1 {
            match text(source, offset, size) {
                Ok(text) => pv.texts.extend(text),
                Err(error) if error.kind == crate::ErrorKind::Io => return Err(error),
                Err(error) => pv.notes.push(error.message),
            }
        }
    }
    Err(bad())
}

/// The text of the metadata area at `offset`: in a buffer that starts over after its end. `None` where
/// the area is empty or ignored.
fn text(source: &dyn Source, offset: u64, size: u64) -> Result<Option<String>> {
    let bad = |what: &str| Error::corrupt(format!("LVM metadata area at byte {offset}: {what}"));
    let mut header = [0; 512];
    source.read_at(&mut header, offset)?;
    if header[4..20] != *b" LVM2 x[5A%r0N*>" {
        return Err(bad("it has no signature"));
    }
    if crc::update(CRC_START, &header[4..]) != le32(&header, 0) {
        return Err(bad("the checksum of its header is wrong"));
    }
    let (area_offset, area_size) = (le64(&header, 24), le64(&header, 32));
    if area_offset != offset || area_size <= AREA_HEADER || (size != 0 && area_size > size) {
        return Err(bad("its header belongs elsewhere"));
    }
    // The first place is that of the text in use.
    let (at, length) = (le64(&header, 40), le64(&header, 48));
    let (sum, flags) = (le32(&header, 56), le32(&header, 60));
    if at == 0 || length == 0 || flags & 1 != 0 {
        return Ok(None);
    }
    let room = area_size - AREA_HEADER;
    if at < AREA_HEADER || at >= area_size || length > room || length > TEXT_MAX {
        return Err(bad("its text lies outside"));
    }
    let start = offset.checked_add(at).ok_or_else(|| bad("its text lies outside"))?;
    // Checked before so much memory is taken: the whole area must lie on the volume.
    if offset.checked_add(area_size).is_none_or(|end| end > source.size()) {
        return Err(bad("it reaches past the volume"));
    }
    let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
    let first = usize::try_from((area_size - at).min(length)).unwrap_or_default();
    let (before, after) = bytes.split_at_mut(first);
    source.read_at(before, start)?;
    source.read_at(after, offset + AREA_HEADER)?;
    if crc::update(CRC_START, &bytes) != sum {
        return Err(bad("the checksum of its text is wrong"));
    }
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}
