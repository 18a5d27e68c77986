//! Reparse points: links, and files whose content another program keeps elsewhere.

use super::bytes::{part, u16_at, u32_at};
use super::names;
use crate::error::{Error, Result};
use crate::fs::FileType;

/// Largest value of a reparse point.
pub(super) const MAX_REPARSE: u64 = 16 << 10;

const MOUNT_POINT: u32 = 0xa000_0003;
const SYMLINK: u32 = 0xa000_000c;
const LX_SYMLINK: u32 = 0xa000_001d;
const AF_UNIX: u32 = 0x8000_0023;
const LX_FIFO: u32 = 0x8000_0024;
const LX_CHR: u32 = 0x8000_0025;
const LX_BLK: u32 = 0x8000_0026;
const DEDUP: u32 = 0x8000_0013;
const WOF: u32 = 0x8000_0017;
const ONEDRIVE: u32 = 0x8000_0021;
const CLOUD: u32 = 0x9000_001a;
/// The bits of a cloud tag that number its providers.
const CLOUD_PROVIDER: u32 = 0x0000_f000;
/// Bit of tags that stand for another name in the tree.
const NAME_SURROGATE: u32 = 0x2000_0000;
const RELATIVE: u32 = 1;

/// What a reparse point makes of a file or directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reparse {
    /// A link with this target.
    Link(Vec<u8>),
    /// Something of WSL's, without content.
    Special(FileType),
    /// Its content is not in the file; why.
    Opaque(String),
    /// A directory that is listed as it is; what it is besides.
    Directory(String),
}

/// Reads the value of a reparse point.
///
/// # Errors
/// `Corrupt`.
pub(super) fn parse(bytes: &[u8], directory: bool) -> Result<Reparse> {
    let tag = u32_at(bytes, 0)?;
    let data = part(bytes, 8, usize::from(u16_at(bytes, 4)?))?;
    let named = |what: &str| {
        Ok(if directory && tag & NAME_SURROGATE == 0 {
            Reparse::Directory(what.to_owned())
        } else {
            Reparse::Opaque(what.to_owned())
        })
    };
    match tag {
        SYMLINK => link(data, 12, u32_at(data, 8)? & RELATIVE != 0).map(Reparse::Link),
        MOUNT_POINT => link(data, 8, false).map(Reparse::Link),
        LX_SYMLINK => Ok(Reparse::Link(data.get(4..).unwrap_or(&[]).to_vec())),
        AF_UNIX => Ok(Reparse::Special(FileType::Socket)),
        LX_FIFO => Ok(Reparse::Special(FileType::Fifo)),
        LX_CHR => Ok(Reparse::Special(FileType::CharDevice)),
        LX_BLK => Ok(Reparse::Special(FileType::BlockDevice)),
        DEDUP => named("its content is deduplicated (Windows Server data deduplication)"),
        WOF => named("its content is compressed by the system (CompactOS, WOF)"),
        ONEDRIVE => named("its content is kept by OneDrive"),
        tag if tag & !CLOUD_PROVIDER == CLOUD => {
            named("its content is kept by a cloud provider (cloud files, OneDrive)")
        }
        tag => named(&format!("a reparse point of another program (tag {tag:#010x})")),
    }
}

/// The target of a symbolic link or a junction: its substitute name. A relative one gets forward
/// slashes. An absolute one stays in the words of Windows, without the prefix of its name space:
/// `C:\x`, `\\server\share`, `\\?\Volume{...}\`.
fn link(data: &[u8], names_at: usize, relative: bool) -> Result<Vec<u8>> {
    let at = names_at + usize::from(u16_at(data, 0)?);
    let name = part(data, at, usize::from(u16_at(data, 2)?))?;
    let mut target = names::to_utf8(name);
    if target.is_empty() || target.contains(&0) {
        return Err(Error::corrupt("a link whose target is no name"));
    }
    if relative {
        for byte in target.iter_mut().filter(|byte| **byte == b'\\') {
            *byte = b'/';
        }
        return Ok(target);
    }
    if let Some(rest) = target.strip_prefix(br"\??\") {
        return Ok(if let Some(share) = rest.strip_prefix(br"UNC\") {
            [br"\\", share].concat()
        } else if rest.starts_with(b"Volume{") {
            [br"\\?\", rest].concat()
        } else {
            rest.to_vec()
        });
    }
    Ok(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn utf16(text: &str) -> Vec<u8> {
        text.encode_utf16().flat_map(u16::to_le_bytes).collect()
    }

    fn point(tag: u32, flags: Option<u32>, target: &str) -> Vec<u8> {
        let name = utf16(target);
        let length = u16::try_from(name.len()).unwrap().to_le_bytes();
        let mut data = [&[0, 0][..], &length, &length, &[0, 0]].concat();
        data.extend(flags.iter().flat_map(|flags| flags.to_le_bytes()));
        data.extend(name);
        [&tag.to_le_bytes()[..], &u16::try_from(data.len()).unwrap().to_le_bytes(), &[0, 0], &data]
            .concat()
    }

    fn target(bytes: &[u8]) -> String {
        match parse(bytes, false).unwrap() {
            Reparse::Link(target) => String::from_utf8(target).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn relative_links_get_forward_slashes_and_absolute_ones_the_words_of_windows() {
        assert_eq!(target(&point(SYMLINK, Some(1), r"..\a\b")), "../a/b");
        assert_eq!(target(&point(SYMLINK, Some(0), r"\??\C:\x\y")), r"C:\x\y");
        assert_eq!(target(&point(SYMLINK, Some(0), r"\??\UNC\server\share")), r"\\server\share");
        assert_eq!(target(&point(MOUNT_POINT, None, r"\??\Volume{1-2}\")), r"\\?\Volume{1-2}\");
        assert_eq!(target(&point(MOUNT_POINT, None, r"\??\C:\Users")), r"C:\Users");
    }

    #[test]
    fn cloud_directories_are_directories_and_cloud_files_are_opaque() {
        for tag in [CLOUD, 0x9000_601a, 0x8000_0099] {
            let bytes = point(tag, None, "x");
            assert!(matches!(parse(&bytes, true).unwrap(), Reparse::Directory(_)));
            assert!(matches!(parse(&bytes, false).unwrap(), Reparse::Opaque(_)));
        }
        assert!(matches!(parse(&point(0xa000_0099, None, "x"), true).unwrap(), Reparse::Opaque(_)));
    }

    #[test]
    fn links_that_are_cut_off_are_damage() {
        let whole = point(SYMLINK, Some(1), "target");
        for length in 0..whole.len() {
            assert!(parse(&whole[..length], false).is_err(), "{length}");
        }
    }
}
