//! Changes of files' mappings that the log says were begun, and does not say were done.
//!
//! A remapping takes more than one transaction: the first logs an intent, the range is unmapped and mapped
//! anew, and the last logs that it is done. The kernel finishes what is left open after its replay; the
//! crate does not, so that such a range may read as a hole, which it never was.
//!
//! Other intents need no notice. Those that free extents or update reverse maps and reference counts are
//! about free space only, and are logged with the change of the mapping itself. Those of attributes need
//! a flag in the superblock with which the crate refuses the log, or are about pointers to parents.

use std::collections::{BTreeSet, HashMap};

use crate::error::{Error, Result};

/// Transactions that are under way at once in a log, and intents that are kept, at most.
const MAX_TRANSACTIONS: usize = 1 << 16;
const MAX_INTENTS: usize = 1 << 18;

/// `xlog_op_header`, big-endian: `oh_tid`, `oh_len`, `oh_flags`.
const OPERATION: usize = 12;
const TID: usize = 0;
const LENGTH: usize = 4;
const FLAGS: usize = 9;
/// `XLOG_START_TRANS`, `XLOG_COMMIT_TRANS`, `XLOG_WAS_CONT_TRANS`, `XLOG_UNMOUNT_TRANS`.
const START: u8 = 0x01;
const COMMIT: u8 = 0x02;
const CONTINUED: u8 = 0x08;
const UNMOUNT: u8 = 0x20;

/// `xfs_trans_header`: its bytes and its magic number.
const HEADER: usize = 16;
const HEADER_MAGIC: u32 = 0x5452_414e;

/// Items, in the byte order of the host, as the log is: their type and how many operations they take
/// (`ilf_type`, `ilf_size`), and for intents and what ends them the number of the intent.
const ITEM: usize = 4;
const NUMBER: usize = 8;
const INTENT: usize = 16;
/// `XFS_LI_BUI`, `XFS_LI_BUD`, `XFS_LI_XMI`, `XFS_LI_XMD`.
const MAP: u16 = 0x1244;
const MAP_DONE: u16 = 0x1245;
const EXCHANGE: u16 = 0x1248;
const EXCHANGE_DONE: u16 = 0x1249;

/// Which intents are open, of what was read of a log, from its tail on.
#[derive(Default)]
pub(super) struct Intents {
    under_way: HashMap<u32, Transaction>,
    /// Intents of the transactions under way.
    waiting: usize,
    /// By the type of the intent and its number.
    open: BTreeSet<(u16, u64)>,
}

/// What was read of a transaction that did not commit yet.
#[derive(Default)]
struct Transaction {
    /// Whether its header was read.
    begun: bool,
    /// Operations of the present item that are still to come.
    left: u16,
    /// The beginning of the present item, where it is an intent or the end of one.
    item: Vec<u8>,
    /// Intents in order, and whether they began or ended.
    changes: Vec<(u16, u64, bool)>,
}

impl Intents {
    /// Number of intents that committed and are not done.
    pub(super) fn open(&self) -> usize {
        self.open.len()
    }

    /// Takes the next record: its `count` operations.
    ///
    /// # Errors
    /// `Corrupt`; `Limit`; `Unsupported` where the crate would lose a transaction.
    pub(super) fn add(&mut self, mut data: &[u8], count: u32) -> Result<()> {
        for _ in 0..count {
            let cut_off = || Error::corrupt("a record of the XFS log is cut off");
            let (header, rest) = data.split_at_checked(OPERATION).ok_or_else(cut_off)?;
            let length = usize::try_from(be32(header, LENGTH)).unwrap_or(usize::MAX);
            let (region, rest) = rest.split_at_checked(length).ok_or_else(cut_off)?;
            self.operation(be32(header, TID), header[FLAGS], region)?;
            data = rest;
        }
        Ok(())
    }

    fn operation(&mut self, tid: u32, flags: u8, region: &[u8]) -> Result<()> {
        if flags & UNMOUNT != 0 {
            return Ok(());
        }
        if flags & START != 0 {
            if self.under_way.len() >= MAX_TRANSACTIONS {
                return Err(Error::limit("too many transactions are under way in the XFS log"));
            }
            let before = self.under_way.insert(tid, Transaction::default());
            self.waiting -= before.map_or(0, |before| before.changes.len());
            return Ok(());
        }
        if flags & COMMIT != 0 {
            if let Some(mut transaction) = self.under_way.remove(&tid) {
                self.waiting -= transaction.changes.len();
                transaction.finish_item();
                self.commit(&transaction);
            }
            return Ok(());
        }
        // One that started before the tail is where it belongs.
        let Some(transaction) = self.under_way.get_mut(&tid) else { return Ok(()) };
        let before = transaction.changes.len();
        transaction.region(flags, region)?;
        self.waiting += transaction.changes.len() - before;
        if self.waiting + self.open.len() > MAX_INTENTS {
            return Err(Error::limit("too many changes of mappings are open in the XFS log"));
        }
        Ok(())
    }

    fn commit(&mut self, transaction: &Transaction) {
        for &(kind, number, began) in &transaction.changes {
            if began {
                self.open.insert((kind, number));
            } else {
                self.open.remove(&(kind, number));
            }
        }
    }
}

impl Transaction {
    /// Takes the next region, or the rest of one that was split between records.
    fn region(&mut self, flags: u8, region: &[u8]) -> Result<()> {
        if flags & CONTINUED != 0 {
            self.keep(region);
            return Ok(());
        }
        if region.is_empty() {
            return Ok(());
        }
        if !self.begun {
            self.begun = true;
            if region.len() >= 4 && le32(region, 0) == HEADER_MAGIC {
                // The crate takes half a header for an item that has all that follows.
                return match region.len() {
                    HEADER.. => Ok(()),
                    _ => Err(Error::unsupported("a transaction's header is in two records")),
                };
            }
        }
        if self.left > 0 {
            self.left -= 1;
            if self.left == 0 {
                self.finish_item();
            }
            return Ok(());
        }
        self.finish_item();
        if region.len() < ITEM {
            return Err(Error::corrupt("an item of the XFS log is cut off"));
        }
        self.left = le16(region, 2).saturating_sub(1);
        if matches!(le16(region, 0), MAP | MAP_DONE | EXCHANGE | EXCHANGE_DONE) {
            self.keep_first(region);
        }
        Ok(())
    }

    /// Keeps the beginning of the present item.
    fn keep_first(&mut self, region: &[u8]) {
        self.item.extend_from_slice(&region[..region.len().min(INTENT)]);
    }

    /// Goes on with the beginning of the present item, where it is not all there.
    fn keep(&mut self, region: &[u8]) {
        if !self.item.is_empty() {
            let missing = INTENT.saturating_sub(self.item.len());
            self.item.extend_from_slice(&region[..region.len().min(missing)]);
        }
    }

    /// Notes the present item, of which no more comes.
    fn finish_item(&mut self) {
        let item = std::mem::take(&mut self.item);
        if item.is_empty() {
            return;
        }
        let number = u64::from(le32(&item, NUMBER)) | u64::from(le32(&item, NUMBER + 4)) << 32;
        self.changes.push(match le16(&item, 0) {
            MAP_DONE => (MAP, number, false),
            EXCHANGE_DONE => (EXCHANGE, number, false),
            kind => (kind, number, true),
        });
    }
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    le32(bytes, at).swap_bytes()
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    let bytes = bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u32::from_le_bytes)
}

fn le16(bytes: &[u8], at: usize) -> u16 {
    let bytes = bytes.get(at..at + 2).and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u16::from_le_bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    /// An operation of the transaction `tid`.
    fn operation(tid: u32, flags: u8, region: &[u8]) -> Vec<u8> {
        let length = u32::try_from(region.len()).unwrap();
        let header = [&tid.to_be_bytes()[..], &length.to_be_bytes(), &[0x69, flags, 0, 0]];
        [&header.concat(), region].concat()
    }

    fn header() -> Vec<u8> {
        [&HEADER_MAGIC.to_le_bytes()[..], &[0; 12]].concat()
    }

    /// An intent, or the end of one, in `size` operations.
    fn item(kind: u16, size: u16, number: u64) -> Vec<u8> {
        let head = [&kind.to_le_bytes()[..], &size.to_le_bytes(), &[0; 4]].concat();
        [&head[..], &number.to_le_bytes(), &[0; 32]].concat()
    }

    fn transaction(tid: u32, regions: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let mut all = vec![operation(tid, START, &[]), operation(tid, 0, &header())];
        all.extend(regions.iter().map(|region| operation(tid, 0, region)));
        all.push(operation(tid, COMMIT, &[]));
        all
    }

    fn add(intents: &mut Intents, operations: &[Vec<u8>]) {
        let count = u32::try_from(operations.len()).unwrap();
        intents.add(&operations.concat(), count).unwrap();
    }

    #[test]
    fn an_intent_is_open_until_it_is_done() {
        for (kind, done) in [(MAP, MAP_DONE), (EXCHANGE, EXCHANGE_DONE)] {
            let mut intents = Intents::default();
            let buffer = [item(0x123c, 2, 7), vec![0x44, 0x12, 1, 0, 0, 0, 0, 0]];
            let begin = [&buffer[..], &[item(kind, 1, 7), item(kind, 1, 8)]].concat();
            add(&mut intents, &transaction(1, &begin));
            assert_eq!(intents.open(), 2);
            add(&mut intents, &transaction(2, &[item(done, 1, 7)]));
            assert_eq!(intents.open(), 1);
            add(&mut intents, &transaction(2, &[item(done, 1, 8), item(kind, 1, 9)]));
            add(&mut intents, &transaction(2, &[item(done, 1, 9)]));
            assert_eq!(intents.open(), 0);
        }
    }

    #[test]
    fn an_intent_counts_once_its_transaction_commits() {
        let mut intents = Intents::default();
        let mut operations = transaction(1, &[item(MAP, 1, 7)]);
        let commit = operations.pop().unwrap();
        add(&mut intents, &operations);
        assert_eq!(intents.open(), 0);
        add(&mut intents, &transaction(2, &[item(MAP, 1, 8)]));
        add(&mut intents, &[commit]);
        assert_eq!(intents.open(), 2);
        // One that began before the tail of the log.
        add(&mut intents, &[operation(9, 0, &item(MAP, 1, 10)), operation(9, COMMIT, &[])]);
        assert_eq!(intents.open(), 2);
    }

    #[test]
    fn an_intent_that_is_split_between_records_is_read() {
        let mut intents = Intents::default();
        add(&mut intents, &transaction(1, &[item(MAP, 1, 7), item(MAP, 1, 8 << 32)]));
        let end = item(MAP_DONE, 1, 8 << 32);
        let parts = [
            operation(2, START, &[]),
            operation(2, 0, &header()),
            operation(2, 0x04, &end[..12]),
            operation(2, CONTINUED | 0x10, &end[12..]),
            operation(2, COMMIT, &[]),
        ];
        add(&mut intents, &parts[..3]);
        add(&mut intents, &parts[3..]);
        assert_eq!(intents.open(), 1);
    }

    #[test]
    fn other_intents_are_not_counted() {
        let mut intents = Intents::default();
        let others = [0x1236, 0x1240, 0x1242, 0x1246].map(|kind| item(kind, 1, 7));
        add(&mut intents, &transaction(1, &others));
        assert_eq!(intents.open(), 0);
    }

    #[test]
    fn operations_that_make_no_sense_are_refused() {
        let kind = |operations: &[Vec<u8>], count| {
            Intents::default().add(&operations.concat(), count).unwrap_err().kind
        };
        let start = operation(1, START, &[]);
        let half = operation(1, 0x04, &header()[..8]);
        assert_eq!(kind(&[start.clone(), half], 2), ErrorKind::Unsupported);
        assert_eq!(kind(std::slice::from_ref(&start), 2), ErrorKind::Corrupt);
        let mut long = operation(1, 0, &header());
        long[LENGTH..LENGTH + 4].fill(0xff);
        assert_eq!(kind(&[start, long], 2), ErrorKind::Corrupt);
        let starts: Vec<Vec<u8>> = (0..70_000).map(|tid| operation(tid, START, &[])).collect();
        assert_eq!(kind(&starts, 70_000), ErrorKind::Limit);
    }
}
