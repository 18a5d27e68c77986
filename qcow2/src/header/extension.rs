//! Header extensions (QCOW2 specification, "Header extensions").

use crate::error::{Error, Result};

const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
/// Bytes of one entry of the feature name table.
const FEATURE_NAME_ENTRY: usize = 48;

/// A feature's name, from the image itself.
#[derive(Debug, Clone)]
pub(crate) struct FeatureName {
    /// 0 incompatible, 1 compatible, 2 autoclear.
    pub(crate) kind: u8,
    pub(crate) bit: u8,
    pub(crate) name: String,
}

/// One header extension.
#[derive(Debug, Clone)]
pub(crate) enum Extension {
    /// Format of the backing file.
    BackingFormat(String),
    /// Names for feature bits.
    FeatureNames(Vec<FeatureName>),
    /// Persistent bitmaps: directory offset and size in bytes.
    Bitmaps { directory_offset: u64, directory_size: u64 },
    /// Anything else: safely ignored, kept where it is.
    Unknown,
}

/// Parses the extensions between `start` and `end` of the header cluster.
///
/// # Errors
/// `Corrupt` for an extension that reaches past `end`.
pub(crate) fn parse_extensions(area: &[u8], start: usize, end: usize) -> Result<Vec<Extension>> {
    let mut found = Vec::new();
    let mut at = start;
    let end = end.min(area.len());
    while at + 8 <= end {
        let kind = super::be32(area, at);
        let length = super::be32(area, at + 4) as usize;
        if kind == END {
            break;
        }
        let data_at = at + 8;
        let Some(data) =
            data_at.checked_add(length).filter(|e| *e <= end).map(|e| &area[data_at..e])
        else {
            return Err(Error::corrupt(format!(
                "header extension {kind:#x} of {length} bytes reaches past the header area"
            )));
        };
        found.push(parse_one(kind, data)?);
        at = data_at + length.next_multiple_of(8);
    }
    Ok(found)
}

fn parse_one(kind: u32, data: &[u8]) -> Result<Extension> {
    Ok(match kind {
        BACKING_FORMAT => {
            let name = std::str::from_utf8(data)
                .map_err(|_| Error::corrupt("backing format name is not valid UTF-8"))?;
            Extension::BackingFormat(name.to_owned())
        }
        FEATURE_NAMES => Extension::FeatureNames(
            data.chunks_exact(FEATURE_NAME_ENTRY)
                .map(|entry| {
                    let text = entry[2..].split(|b| *b == 0).next().unwrap_or_default();
                    FeatureName {
                        kind: entry[0],
                        bit: entry[1],
                        name: String::from_utf8_lossy(text).into_owned(),
                    }
                })
                .collect(),
        ),
        BITMAPS if data.len() == 24 => Extension::Bitmaps {
            directory_size: super::be64(data, 8),
            directory_offset: super::be64(data, 16),
        },
        BITMAPS => return Err(Error::corrupt("bitmaps extension has the wrong length")),
        _ => Extension::Unknown,
    })
}

/// Appends one extension in its stored form.
pub(crate) fn encode_backing_format(out: &mut Vec<u8>, name: &str) {
    out.extend_from_slice(&BACKING_FORMAT.to_be_bytes());
    #[allow(clippy::cast_possible_truncation, reason = "`raw` or `qcow2`")]
    out.extend_from_slice(&(name.len() as u32).to_be_bytes());
    out.extend_from_slice(name.as_bytes());
    out.resize(out.len().next_multiple_of(8), 0);
}

/// Appends the end marker.
pub(crate) fn encode_end(out: &mut Vec<u8>) {
    out.extend_from_slice(&[0; 8]);
}
