//! Names what is on a volume and is not read here: encryption, RAID, other file systems, swap.

use crate::bytes::{le16, le32, le64};
use crate::error::Result;
use crate::source::Source;

/// Something that is not read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Recognised {
    /// Its kind, in one word.
    pub(crate) kind: &'static str,
    /// What it is, and why it is not read, for people.
    pub(crate) reason: String,
}

/// Bytes at the start that are compared with zero.
const EMPTY: usize = 1 << 20;
const MD_MAGIC: u32 = 0xa92b_4efc;
const ZFS_UBERBLOCK: u64 = 0x00ba_b10c;

struct Magic(&'static str, u64, &'static [u8], &'static str);

const ENCRYPTED: &str = "is encrypted";
const FOREIGN: &str = "is a file system that is not read here";
const MEMBER: &str = "is a part of something that is not put together here";
const NO_FILES: &str = "holds no files";

/// Signatures that count for more than the file system that seems to lie behind them.
const STRONG: [Magic; 6] = [
    Magic("luks1", 0, b"LUKS\xba\xbe\0\x01", ENCRYPTED),
    Magic("luks2", 0, b"LUKS\xba\xbe\0\x02", ENCRYPTED),
    Magic("bitlocker", 3, b"-FVE-FS-", ENCRYPTED),
    Magic(
        "bitlocker",
        424,
        b"\x3b\xd6\x67\x49\x29\x2e\xd8\x4a\x83\x99\xf6\xa3\x39\xe3\xd0\x01",
        ENCRYPTED,
    ),
    Magic("refs", 3, b"ReFS\0\0\0\0", FOREIGN),
    Magic("windows-dynamic-disk", 0xc00, b"PRIVHEAD", MEMBER),
];

/// Signatures that count where no file system is read; those of few bytes last.
const WEAK: [Magic; 60] = [
    Magic("swap", 4086, b"SWAPSPACE2", NO_FILES),
    Magic("swap", 4086, b"SWAP-SPACE", NO_FILES),
    Magic("swap", 65526, b"SWAPSPACE2", NO_FILES),
    Magic("hibernation", 4086, b"S1SUSPEND", NO_FILES),
    Magic("hibernation", 4086, b"S2SUSPEND", NO_FILES),
    Magic("hibernation", 4086, b"ULSUSPEND", NO_FILES),
    Magic("hibernation", 4086, b"LINHIB0001", NO_FILES),
    Magic("hibernation", 4086, b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c", NO_FILES),
    Magic(
        "bcache",
        4120,
        b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81",
        MEMBER,
    ),
    Magic(
        "bcachefs",
        4120,
        b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef",
        FOREIGN,
    ),
    Magic("vdo", 0, b"dmvdo001", MEMBER),
    Magic("bluestore", 0, b"bluestore block device\n", MEMBER),
    Magic("stratis", 516, b"!Stra0tis\x86\xff\x02\x5e\x41rh", MEMBER),
    Magic("dm-verity", 0, b"verity\0\0", MEMBER),
    Magic("dm-integrity", 0, b"integrt\0", MEMBER),
    Magic("oracle-asm", 32, b"ORCLDISK", MEMBER),
    Magic("lvm1", 0, b"HM\x01\0", MEMBER),
    Magic("lvm1", 0, b"HM\x02\0", MEMBER),
    Magic("vmfs", 0x10_0000, b"\x0d\xd0\x01\xc0", FOREIGN),
    Magic("vmfs", 0x20_0000, b"\x5e\xf1\xab\x2f", FOREIGN),
    Magic("apfs", 32, b"NXSB", FOREIGN),
    Magic("hfsplus", 1024, b"H+\0\x04", FOREIGN),
    Magic("hfsplus", 1024, b"HX\0\x05", FOREIGN),
    Magic("ufs1", 8192 + 1372, b"\x54\x19\x01\0", FOREIGN),
    Magic("ufs1", 8192 + 1372, b"\0\x01\x19\x54", FOREIGN),
    Magic("ufs2", 65_536 + 1372, b"\x19\x01\x54\x19", FOREIGN),
    Magic("ufs2", 65_536 + 1372, b"\x19\x54\x01\x19", FOREIGN),
    Magic("jfs", 32_768, b"JFS1", FOREIGN),
    Magic("reiserfs", 65_536 + 52, b"ReIsErFs", FOREIGN),
    Magic("reiserfs", 65_536 + 52, b"ReIsEr2Fs", FOREIGN),
    Magic("reiserfs", 65_536 + 52, b"ReIsEr3Fs", FOREIGN),
    Magic("reiserfs", 8192 + 52, b"ReIsErFs", FOREIGN),
    Magic("reiser4", 65_536, b"ReIsEr4", FOREIGN),
    Magic("f2fs", 1024, b"\x10\x20\xf5\xf2", FOREIGN),
    Magic("squashfs", 0, b"hsqs", FOREIGN),
    Magic("erofs", 1024, b"\xe2\xe1\xf5\xe0", FOREIGN),
    Magic("cramfs", 0, b"\x45\x3d\xcd\x28", FOREIGN),
    Magic("romfs", 0, b"-rom1fs-", FOREIGN),
    Magic("gfs2", 65_536, b"\x01\x16\x19\x70", FOREIGN),
    Magic("ocfs2", 1024, b"OCFSV2", FOREIGN),
    Magic("ocfs2", 2048, b"OCFSV2", FOREIGN),
    Magic("ocfs2", 4096, b"OCFSV2", FOREIGN),
    Magic("ocfs2", 8192, b"OCFSV2", FOREIGN),
    Magic("vxfs", 1024, b"\xf5\xfc\x01\xa5", FOREIGN),
    Magic("vxfs", 8192, b"\xa5\x01\xfc\xf5", FOREIGN),
    Magic("udf", 34_817, b"NSR02", FOREIGN),
    Magic("udf", 34_817, b"NSR03", FOREIGN),
    Magic("udf", 36_865, b"NSR02", FOREIGN),
    Magic("udf", 36_865, b"NSR03", FOREIGN),
    Magic("udf", 32_769, b"BEA01", FOREIGN),
    Magic("iso9660", 32_769, b"CD001", FOREIGN),
    Magic("minix", 1048, b"\x5a\x4d", FOREIGN),
    Magic("minix", 1040, b"\x7f\x13", FOREIGN),
    Magic("minix", 1040, b"\x8f\x13", FOREIGN),
    Magic("minix", 1040, b"\x68\x24", FOREIGN),
    Magic("minix", 1040, b"\x78\x24", FOREIGN),
    Magic("nilfs2", 1030, b"\x34\x34", FOREIGN),
    Magic("hfs", 1024, b"BD", FOREIGN),
    Magic("adfs", 0xdc0, b"Hugo", FOREIGN),
    Magic("befs", 544, b"1SFB", FOREIGN),
];

/// Signatures of what is read here, for volumes whose reader failed.
const READ_HERE: [Magic; 5] = [
    Magic("xfs", 0, b"XFSB", ""),
    Magic("btrfs", 65_600, b"_BHRfS_M", ""),
    Magic("ext", 1080, b"\x53\xef", ""),
    Magic("ntfs", 3, b"NTFS    ", ""),
    Magic("exfat", 3, b"EXFAT   ", ""),
];

/// Names what must not be read as the file system that it may look like.
///
/// # Errors
/// `Io`.
pub(crate) fn strong(source: &dyn Source) -> Result<Option<Recognised>> {
    if let Some(found) = find(source, &STRONG)? {
        return Ok(Some(found));
    }
    let ext = read::<512>(source, 1024)?;
    // The feature of a journal that is a device of its own.
    if le16(&ext, 56) == 0xef53 && le32(&ext, 96) & 8 != 0 {
        return Ok(Some(named("ext-journal", NO_FILES)));
    }
    md(source)
}

/// Names what no reader wants.
///
/// # Errors
/// `Io`.
pub(crate) fn weak(source: &dyn Source) -> Result<Option<Recognised>> {
    if is_zero(source)? {
        let reason = "it is empty: its start is all zeroes, and it holds no file system";
        return Ok(Some(Recognised { kind: "", reason: reason.into() }));
    }
    if let Some(found) = find(source, &WEAK)? {
        return Ok(Some(found));
    }
    if zfs(source)? {
        return Ok(Some(named("zfs", MEMBER)));
    }
    // What is replicated has its metadata at the end, and a magic number of three versions.
    let tail = read::<64>(source, (source.size() & !4095).saturating_sub(4096))?;
    if tail[60..63] == *b"\x83\x74\x02" && (0x6a..=0x6d).contains(&tail[63]) {
        return Ok(Some(named("drbd", MEMBER)));
    }
    Ok(None)
}

/// The kind of file system whose reader failed; empty where that cannot be told.
pub(crate) fn kind_of_damaged(source: &dyn Source) -> &'static str {
    find(source, &READ_HERE).ok().flatten().map_or("", |found| found.kind)
}

fn named(kind: &'static str, what: &str) -> Recognised {
    Recognised { kind, reason: format!("{kind}: it {what}") }
}

fn find(source: &dyn Source, table: &[Magic]) -> Result<Option<Recognised>> {
    for Magic(kind, offset, bytes, what) in table {
        if read::<32>(source, *offset)?.starts_with(bytes) {
            return Ok(Some(named(kind, what)));
        }
    }
    Ok(None)
}

/// `N` bytes at `offset`, zeroes where the source ends.
fn read<const N: usize>(source: &dyn Source, offset: u64) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    let length = usize::try_from(source.size().saturating_sub(offset)).unwrap_or(N).min(N);
    if length > 0 {
        source.read_at(&mut bytes[..length], offset)?;
    }
    Ok(bytes)
}

fn is_zero(source: &dyn Source) -> Result<bool> {
    let mut offset = 0;
    while offset < source.size().min(EMPTY as u64) {
        if read::<4096>(source, offset)? != [0; 4096] {
            return Ok(false);
        }
        offset += 4096;
    }
    Ok(true)
}

/// A member of a Linux software RAID, by its superblock: version 1.1 at the start, 1.2 at 4 KiB, 1.0
/// and 0.90 at the end.
fn md(source: &dyn Source) -> Result<Option<Recognised>> {
    let size = source.size();
    let level = |level: u32| match level {
        0xffff_ffff => "linear".to_owned(),
        0xffff_fffc => "multipath".to_owned(),
        0xffff_fffb => "faulty".to_owned(),
        level => format!("raid{level}"),
    };
    let told = |version: &str, level: String| {
        let reason = format!("md {level} (metadata {version}): it {MEMBER}");
        Ok(Some(Recognised { kind: "md", reason }))
    };
    let last = (size / 512).saturating_sub(16) & !7;
    for (version, sector) in [("1.1", 0), ("1.2", 8), ("1.0", last)] {
        let block = read::<256>(source, sector * 512)?;
        let is = le32(&block, 0) == MD_MAGIC && le32(&block, 4) == 1;
        if is && le64(&block, 144) == sector {
            return told(version, level(le32(&block, 72)));
        }
    }
    let old = (size & !0xffff).saturating_sub(0x1_0000);
    let block = read::<64>(source, old)?;
    if le32(&block, 0) == MD_MAGIC && le32(&block, 4) == 0 && le32(&block, 8) == 90 {
        return told("0.90", level(le32(&block, 28)));
    }
    Ok(None)
}

/// Whether a ring of uberblocks, in the second half of the first label, has one.
fn zfs(source: &dyn Source) -> Result<bool> {
    for slot in 0..128 {
        let magic = read::<8>(source, (128 + slot) << 10)?;
        if [magic, [magic[7], magic[6], magic[5], magic[4], magic[3], magic[2], magic[1], magic[0]]]
            .iter()
            .any(|magic| u64::from_le_bytes(*magic) == ZFS_UBERBLOCK)
        {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::MemoryDisk;

    fn disk() -> MemoryDisk {
        MemoryDisk { bytes: vec![0; 3 << 20], disk: 0 }
    }

    fn with(places: &[(u64, &[u8])]) -> MemoryDisk {
        let mut disk = disk();
        for (at, bytes) in places {
            let at = usize::try_from(*at).unwrap();
            disk.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        }
        // No volume is empty that has something in its first sector.
        disk.bytes[400] = 1;
        disk
    }

    #[test]
    fn every_signature_is_told_by_its_name() {
        for Magic(kind, offset, bytes, _) in &STRONG {
            let found = strong(&with(&[(*offset, bytes)])).unwrap();
            assert_eq!(found.map(|found| found.kind), Some(*kind));
        }
        for Magic(kind, offset, bytes, what) in &WEAK {
            let disk = with(&[(*offset, bytes)]);
            assert_eq!(strong(&disk).unwrap(), None, "{kind}");
            let found = weak(&disk).unwrap().unwrap();
            assert_eq!(found.kind, *kind);
            assert!(found.reason.contains(what));
        }
    }

    #[test]
    fn superblocks_at_computed_places_are_told() {
        let sectors: u64 = (3 << 20) / 512 - 16;
        for (version, at, sector) in
            [("1.1", 0, 0), ("1.2", 4096, 8), ("1.0", sectors * 512, sectors)]
        {
            let place = sector.to_le_bytes();
            let disk = with(&[
                (at, b"\xfc\x4e\x2b\xa9\x01"),
                (at + 72, &5_u32.to_le_bytes()),
                (at + 144, &place),
            ]);
            let reason = strong(&disk).unwrap().unwrap().reason;
            assert!(reason.starts_with(&format!("md raid5 (metadata {version})")), "{reason}");
        }
        let old = (3 << 20) - 0x1_0000;
        let disk = with(&[(old, b"\xfc\x4e\x2b\xa9\0\0\0\0\x5a"), (old + 28, b"\x01")]);
        assert!(strong(&disk).unwrap().unwrap().reason.starts_with("md raid1 (metadata 0.90)"));
        for magic in [b"\x0c\xb1\xba\0\0\0\0\0", b"\0\0\0\0\0\xba\xb1\x0c"] {
            assert_eq!(weak(&with(&[(140 << 10, magic)])).unwrap().unwrap().kind, "zfs");
        }
        let drbd = with(&[((3 << 20) - 4096 + 60, b"\x83\x74\x02\x6b")]);
        assert_eq!(weak(&drbd).unwrap().unwrap().kind, "drbd");
        let journal = with(&[(1080, b"\x53\xef"), (1024 + 96, b"\x08")]);
        assert_eq!(strong(&journal).unwrap().unwrap().kind, "ext-journal");
    }

    #[test]
    fn nothing_at_all_is_told_as_empty_and_anything_else_as_nothing_known() {
        assert!(weak(&disk()).unwrap().unwrap().reason.contains("empty"));
        assert_eq!(weak(&with(&[])).unwrap(), None);
        for size in [0, 1, 600, 5000] {
            let disk = MemoryDisk { bytes: vec![1; size], disk: 0 };
            assert_eq!((strong(&disk).unwrap(), weak(&disk).unwrap().is_some()), (None, size == 0));
        }
    }
}
