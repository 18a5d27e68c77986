//! Damage at random places, and walks over what it leaves.

use std::fs;
use std::ops::Range;
use std::path::Path;

use guest::{Cursor, FileSystem, FileType};

use super::{disk, noise, poke};

/// Entries that a walk looks at, and pieces of a file's layout, at most.
const ENTRIES: u32 = 3000;
const PIECES: u32 = 10_000;

/// Walks everything within bounds; what fails, fails.
pub fn walk(fs: &dyn FileSystem) {
    let mut waiting = vec![fs.root()];
    let (mut left, mut buf) = (ENTRIES, vec![0; 65_536]);
    while let Some(node) = waiting.pop() {
        let mut cursor = Cursor::default();
        while let Ok(page) = fs.list(node, cursor, 100) {
            for entry in &page.entries {
                assert!(!entry.name.is_empty() && !entry.name.contains(&b'/'));
                let Some(less) = left.checked_sub(1) else { return };
                left = less;
                let node = entry.node;
                let _ = (fs.stat(node), fs.xattrs(node), fs.read_link(node));
                let _ = (fs.read_at(node, &mut buf, 0), fs.read_at(node, &mut buf, 1 << 20));
                let mut pieces = PIECES;
                let _ = fs.layout(node, &mut |piece| {
                    assert!(piece.length > 0);
                    pieces -= 1;
                    pieces > 0
                });
                if entry.file_type == Some(FileType::Directory) {
                    waiting.push(node);
                }
            }
            let Some(next) = page.next else { break };
            assert_ne!(next, cursor);
            cursor = next;
        }
    }
}

/// Overwrites a few bytes of the image's metadata, `rounds` times anew, and walks what is left.
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
