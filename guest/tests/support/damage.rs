//! Damaged volumes: walked as far as that goes, and made.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use guest::{Cursor, FileSystem, FileType, Source};
use sha2::{Digest, Sha256};

use super::{Truth, disk, noise, poke};

/// Names that a walk looks at.
const NAMES: usize = 3000;
/// Bytes of a file that are read, and pieces of its layout that are looked at.
const READ: u64 = 64 << 10;
const PIECES: usize = 10_000;
/// Bytes of a file that are read where its content is known.
const COMPARED: u64 = 1 << 20;

/// Walks everything within bounds; what fails, fails.
pub fn walk(fs: &dyn FileSystem) {
    walk_beside(fs, None);
}

/// The same; what is read must be what `truth` has, where there is one. How many calls failed.
pub fn walk_beside(fs: &dyn FileSystem, truth: Option<&Truth>) -> usize {
    let mut waiting = vec![(Vec::new(), fs.root())];
    let (mut left, mut failures) = (NAMES, 0);
    while let Some((directory, node)) = waiting.pop() {
        let mut cursor = Cursor::default();
        loop {
            let Ok(page) = fs.list(node, cursor, 100) else {
                failures += 1;
                break;
            };
            for entry in page.entries {
                assert!(!entry.name.is_empty() && !entry.name.contains(&b'/'));
                let Some(less) = left.checked_sub(1) else { return failures };
                left = less;
                let mut path: Vec<u8> = directory.clone();
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend(&entry.name);
                failures += usize::from(fs.xattrs(entry.node).is_err());
                let Ok(stat) = fs.stat(entry.node) else {
                    failures += 1;
                    continue;
                };
                let known = truth.map(|truth| &truth[&path]);
                if let Some(known) = known {
                    assert_eq!((known.file_type, known.access.0), (stat.file_type, stat.mode));
                }
                match stat.file_type {
                    FileType::Directory => waiting.push((path, entry.node)),
                    FileType::Symlink => match (fs.read_link(entry.node), known) {
                        (Ok(target), Some(known)) => assert_eq!(target, known.content),
                        (Ok(_), None) => {}
                        (Err(_), _) => failures += 1,
                    },
                    FileType::File => {
                        let most = if known.is_some() { COMPARED } else { READ };
                        let mut buf = vec![0; stat.size.min(most) as usize];
                        match (fs.read_at(entry.node, &mut buf, 0), known) {
                            (Ok(n), Some(known)) if stat.size <= most => {
                                assert_eq!(Sha256::digest(&buf[..n]).to_vec(), known.content);
                            }
                            (Ok(_), _) => {}
                            (Err(_), _) => failures += 1,
                        }
                        let end = stat.size.saturating_sub(5000);
                        failures += usize::from(fs.read_at(entry.node, &mut buf, end).is_err());
                        let mut pieces = 0;
                        let told = fs.layout(entry.node, 0, &mut |_| {
                            pieces += 1;
                            pieces < PIECES
                        });
                        failures += usize::from(told.is_err());
                    }
                    _ => {}
                }
            }
            let Some(next) = page.next else { break };
            assert_ne!(next, cursor, "a listing goes on");
            cursor = next;
        }
    }
    failures
}

/// A volume with bytes changed.
pub struct Patched {
    pub inner: Arc<dyn Source>,
    pub at: u64,
    pub bytes: Vec<u8>,
}

impl Source for Patched {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> guest::Result<()> {
        self.inner.read_at(buf, offset)?;
        let (start, end) = (self.at.max(offset), self.at + self.bytes.len() as u64);
        let end = end.min(offset + buf.len() as u64);
        if start < end {
            let bytes = &self.bytes[(start - self.at) as usize..(end - self.at) as usize];
            buf[(start - offset) as usize..(end - offset) as usize].copy_from_slice(bytes);
        }
        Ok(())
    }

    fn trace(&self, offset: u64, length: u64, visit: &mut dyn FnMut(guest::DiskRange)) {
        self.inner.trace(offset, length, visit);
    }
}

/// Overwrites a few bytes of `regions` of the image, `rounds` times anew, and walks what is left.
pub fn mutate(image: &Path, regions: &[Range<u64>], rounds: u64) {
    let whole = fs::read(image).unwrap();
    let disk = disk(image);
    for round in 0..rounds {
        let dice = noise(round + 1, 96);
        let mut places = Vec::new();
        for throw in dice.chunks_exact(12).take(1 + round as usize % 8) {
            let number = u64::from_le_bytes(throw[..8].try_into().unwrap());
            let region = &regions[throw[8] as usize % regions.len()];
            let place = region.start + number % (region.end - region.start - 3);
            poke(image, place, &throw[9..10 + throw[8] as usize % 3]);
            places.push(place);
        }
        if let Ok(fs) = guest::fs::open(&disk) {
            walk(&*fs);
        }
        for place in places {
            poke(image, place, &whole[place as usize..place as usize + 3]);
        }
    }
}
