//! Data as its checksums say it is.
//!
//! Every sector that is read is compared with the checksum tree, and where it differs, the other copy is
//! read. Whole sectors go straight into the caller's buffer; the ends are read apart.

use fs_btrfs::csum::{EXTENT_CSUM_KEY, EXTENT_CSUM_OBJECTID};

use super::volume::{Root, Volume, key};
use crate::error::{Error, Result};

/// The checksum tree, for reading.
#[derive(Clone, Copy)]
pub(super) struct Checked<'a> {
    pub(super) volume: &'a Volume,
    /// `None` for data that has no checksums.
    pub(super) tree: Option<Root>,
}

impl Checked<'_> {
    /// Fills `buf` from `logical`.
    ///
    /// # Errors
    /// `Corrupt` where no copy is what its checksum says; `Io`.
    pub(super) fn read(&self, buf: &mut [u8], logical: u64) -> Result<()> {
        let Some(tree) = self.tree else { return self.volume.read(buf, logical, 0) };
        let sector = self.volume.sb.sectorsize as usize;
        let within = usize::try_from(logical % sector as u64).unwrap_or(0);
        let mut rest = buf;
        let mut at = logical;
        if within != 0 || rest.len() < sector {
            let length = (sector - within).min(rest.len());
            let (head, after) = rest.split_at_mut(length);
            self.read_part(tree, head, at - within as u64, within)?;
            at += length as u64;
            rest = after;
        }
        let whole = rest.len() - rest.len() % sector;
        let (whole, tail) = rest.split_at_mut(whole);
        self.read_sectors(tree, whole, at)?;
        if !tail.is_empty() {
            self.read_part(tree, tail, at + whole.len() as u64, 0)?;
        }
        Ok(())
    }

    /// Fills `buf` from the sector at `logical`, from its byte `within` on.
    fn read_part(&self, tree: Root, buf: &mut [u8], logical: u64, within: usize) -> Result<()> {
        let mut sector = vec![0; self.volume.sb.sectorsize as usize];
        self.read_sectors(tree, &mut sector, logical)?;
        buf.copy_from_slice(&sector[within..within + buf.len()]);
        Ok(())
    }

    fn read_sectors(&self, tree: Root, buf: &mut [u8], logical: u64) -> Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        let sector = self.volume.sb.sectorsize as usize;
        let kind = self.volume.sb.csum_type;
        let sums = self.sums(tree, logical, buf.len() / sector)?;
        self.volume.read(buf, logical, 0)?;
        let mirrors = self.volume.mirrors(logical)?;
        let each = buf.chunks_exact_mut(sector).zip(sums.chunks_exact(kind.digest_len()));
        for (index, (bytes, sum)) in each.enumerate() {
            let at = logical + (index * sector) as u64;
            let mut mirror = 0;
            while !kind.verify(bytes, sum) {
                mirror += 1;
                if mirror >= mirrors {
                    return Err(Error::corrupt(format!(
                        "btrfs: the data at address {at} is not what its checksum says"
                    )));
                }
                self.volume.read(bytes, at, mirror)?;
            }
        }
        Ok(())
    }

    /// The checksums of `count` sectors.
    fn sums(&self, tree: Root, logical: u64, count: usize) -> Result<Vec<u8>> {
        let sector = u64::from(self.volume.sb.sectorsize);
        let length = self.volume.sb.csum_type.digest_len();
        let mut sums = Vec::with_capacity(count * length);
        let from = key(EXTENT_CSUM_OBJECTID, EXTENT_CSUM_KEY, logical);
        self.volume.for_each_around(tree, from, &mut |key, data| {
            if (key.objectid, key.key_type) < (from.objectid, from.key_type) {
                return Ok(true);
            }
            let at = logical + (sums.len() / length) as u64 * sector;
            if (key.objectid, key.key_type) != (from.objectid, from.key_type) || key.offset > at {
                return Ok(false);
            }
            let skipped = usize::try_from((at - key.offset) / sector).unwrap_or(usize::MAX);
            let held = data.get(skipped.saturating_mul(length)..).unwrap_or_default();
            let held = &held[..held.len() - held.len() % length];
            let wanted = count * length - sums.len();
            sums.extend_from_slice(&held[..held.len().min(wanted)]);
            Ok(sums.len() < count * length)
        })?;
        if sums.len() < count * length {
            return Err(Error::corrupt(format!(
                "btrfs: the data at address {logical} has no checksums"
            )));
        }
        Ok(sums)
    }
}
