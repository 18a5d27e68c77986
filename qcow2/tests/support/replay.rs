//! A model of a disk under crashes: what each byte may hold after one, and how to build the storage
//! that a crash leaves.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use qcow2::storage::record::{Event, RecordingStorage, apply};
use qcow2::storage::{MemStorage, Storage};
use qcow2::{
    BackingFormat, CreateOptions, Error, ErrorKind, Image, OpenGate, OpenOptions, Repair,
    check_storage, create_in,
};

use crate::support::Random;

/// Backing files in memory.
#[derive(Clone, Default)]
pub struct MemGate(HashMap<String, Arc<MemStorage>>);

impl OpenGate for MemGate {
    fn open(&self, _: &Path, name: &str) -> qcow2::Result<(PathBuf, Arc<dyn Storage>)> {
        match self.0.get(name) {
            Some(storage) => Ok((PathBuf::from(name), Arc::clone(storage) as _)),
            None => Err(Error::new(ErrorKind::Chain, format!("no '{name}'"))),
        }
    }
}

/// Opens for writing with the smallest metadata cache, so that changes are often written out early.
pub fn small_cache() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.metadata_cache = 1;
    options
}

pub fn open(storage: Arc<dyn Storage>, gate: &MemGate) -> qcow2::Result<Image> {
    Image::open_storage(storage, Path::new("top"), gate, &small_cache())
}

pub fn whole(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xee; usize::try_from(image.size()).unwrap()];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// A disk, perhaps with two backing files below, filled with `seed`: the bytes of its file, the
/// gate to its backing files, and its content.
pub fn prepared(options: &CreateOptions, layers: u32, seed: u64) -> (Vec<u8>, MemGate, Vec<u8>) {
    let mut random = Random::new(seed);
    let mut gate = MemGate::default();
    let mut below: Option<String> = None;
    let mut content = Vec::new();
    for layer in 0..layers {
        let mut options = options.clone();
        options.backing = below.take().map(|name| (name, BackingFormat::Qcow2));
        let storage = Arc::new(MemStorage::default());
        create_in(&*storage, &options).unwrap();
        let image = open(Arc::clone(&storage) as _, &gate).unwrap();
        let size = image.size();
        for _ in 0..if layer + 1 == layers { 4 } else { 12 } {
            let offset = random.below(size);
            let length = (1 + random.below(size / 8)).min(size - offset);
            let bytes = vec![1 + random.below(255) as u8; length as usize];
            image.write_at(&bytes, offset).unwrap();
        }
        image.close().unwrap();
        content = whole(&image_reader(&storage, &gate));
        if layer + 1 == layers {
            return (storage.snapshot(), gate, content);
        }
        let name = format!("layer{layer}");
        gate.0.insert(name.clone(), storage);
        below = Some(name);
    }
    (Vec::new(), gate, content)
}

fn image_reader(storage: &Arc<MemStorage>, gate: &MemGate) -> Image {
    open(Arc::clone(storage) as _, gate).unwrap()
}

/// A change that some thread made, or began to make.
#[derive(Debug, Clone)]
pub struct Change {
    pub offset: u64,
    pub bytes: Vec<u8>,
    /// Events logged before it began.
    pub begun: usize,
    /// When it had succeeded; `None` if it failed.
    pub done: Option<Tick>,
}

/// A flush that succeeded.
#[derive(Debug, Clone, Copy)]
pub struct Flushed {
    pub begun: Tick,
    /// Events logged once it had succeeded.
    pub done: usize,
}

/// A moment: many of them may pass between two events.
pub type Tick = u64;

/// The present moment, later than every one before.
pub fn tick() -> Tick {
    static CLOCK: AtomicU64 = AtomicU64::new(0);
    CLOCK.fetch_add(1, Ordering::SeqCst)
}

/// What was done to a disk, in order of beginning.
#[derive(Debug, Default)]
pub struct History {
    pub changes: Vec<Change>,
    pub flushes: Vec<Flushed>,
}

impl History {
    /// Fails unless `got` is what a crash after `cut` events may leave of a disk that held `start`.
    pub fn allows(&self, start: &[u8], cut: usize, got: &[u8]) -> Result<(), String> {
        let flush = self.flushes.iter().rfind(|f| f.done <= cut);
        let durable =
            |change: &Change| flush.is_some_and(|f| change.done.is_some_and(|done| done < f.begun));
        self.compare(start, cut, durable, got)
    }

    /// Fails unless `got` is what an open image of a disk that held `start` may show: everything that
    /// succeeded, and of what failed any part.
    pub fn allows_live(&self, start: &[u8], got: &[u8]) -> Result<(), String> {
        self.compare(start, usize::MAX, |change| change.done.is_some(), got)
    }

    fn compare(
        &self,
        start: &[u8],
        cut: usize,
        is_sure: impl Fn(&Change) -> bool,
        got: &[u8],
    ) -> Result<(), String> {
        let mut sure = start.to_vec();
        // The change that decided each byte, counted from 1.
        let mut decided = vec![0; start.len()];
        let mut perhaps = Vec::new();
        for (number, change) in (1..).zip(&self.changes).filter(|(_, c)| c.begun <= cut) {
            let at = usize::try_from(change.offset).unwrap();
            let range = at..at + change.bytes.len();
            if is_sure(change) {
                sure[range.clone()].copy_from_slice(&change.bytes);
                decided[range].fill(number);
            } else {
                perhaps.push((number, range, change));
            }
        }
        for (at, (got, sure)) in got.iter().zip(&sure).enumerate() {
            let later = perhaps.iter().any(|(number, range, change)| {
                *number > decided[at]
                    && range.contains(&at)
                    && change.bytes[at - range.start] == *got
            });
            if got != sure && !later {
                return Err(format!(
                    "byte {at} is {got}, should be {sure}, and no later write put {got} there"
                ));
            }
        }
        Ok(())
    }
}

/// A disk and all that was done to it.
pub struct Disk<'a> {
    /// The bytes of the file at first.
    pub start: &'a [u8],
    /// The content at first.
    pub content: &'a [u8],
    pub gate: &'a MemGate,
    pub events: &'a [Event],
    pub history: &'a History,
}

/// A storage's bytes after a crash that `cut` events preceded. Everything up to the last flush is
/// there; of each later event `keep` decides, by sector.
pub fn crashed(
    start: &[u8],
    events: &[Event],
    cut: usize,
    mut keep: impl FnMut() -> bool,
) -> Vec<u8> {
    let flushed = events[..cut].iter().rposition(|e| *e == Event::Flush).map_or(0, |at| at + 1);
    let mut bytes = start.to_vec();
    for event in &events[..flushed] {
        apply(&mut bytes, event, |_| true);
    }
    for event in &events[flushed..cut] {
        match event {
            Event::SetLen(_) if !keep() => {}
            _ => apply(&mut bytes, event, |_| keep()),
        }
    }
    bytes
}

/// Opens what a crash left, checks it against the history, goes on working with it, and checks it
/// again.
pub fn survives(
    bytes: Vec<u8>,
    gate: &MemGate,
    may_be: impl Fn(&[u8]) -> Result<(), String>,
) -> Result<(), String> {
    let storage = Arc::new(MemStorage::new(bytes));
    let sound = |when: &str| {
        let report = check_storage(&*storage, Repair::None).map_err(|e| format!("{when}: {e}"))?;
        match report.corruptions {
            0 => Ok(()),
            _ => Err(format!("{when}: {:?}", report.findings)),
        }
    };
    sound("after the crash")?;
    let image = open(Arc::clone(&storage) as _, gate).map_err(|e| format!("opening: {e}"))?;
    let before = whole(&image);
    may_be(&before)?;
    // New clusters must not come from what is in use.
    let size = before.len();
    let (from, to) = (size / 3 + 100, size / 2 + 300);
    let mut after = before;
    after[from..to].fill(0xa5);
    image
        .write_at(&after[from..to], from as u64)
        .and_then(|()| image.close())
        .map_err(|e| format!("writing: {e}"))?;
    sound("after going on")?;
    let image = open(Arc::clone(&storage) as _, gate).map_err(|e| format!("reopening: {e}"))?;
    if whole(&image) == after { Ok(()) } else { Err("going on changed something else".to_owned()) }
}

/// Tries the crash after each of `cuts` events, in `variants` random outcomes each besides "all of
/// it" and "only what was flushed".
pub fn crashes(disk: &Disk<'_>, cuts: impl Iterator<Item = usize>, variants: u64, seed: u64) {
    let mut random = Random::new(seed);
    for cut in cuts {
        for variant in 0..variants + 2 {
            let chance = [2, 8][(variant % 2) as usize];
            let keep = || match variant {
                0 => true,
                1 => false,
                _ => random.below(chance) > 0,
            };
            let bytes = crashed(disk.start, disk.events, cut, keep);
            let allowed = |got: &[u8]| disk.history.allows(disk.content, cut, got);
            if let Err(message) = survives(bytes, disk.gate, allowed) {
                let all = disk.events.len();
                panic!(
                    "crash after event {cut} of {all}, variant {variant}, seed {seed}: {message}"
                );
            }
        }
    }
}

/// The events so far.
pub fn events(log: &Mutex<Vec<Event>>) -> usize {
    log.lock().unwrap().len()
}

/// A recording storage that starts from `bytes`.
pub fn recording(bytes: &[u8]) -> (Arc<RecordingStorage>, Arc<Mutex<Vec<Event>>>) {
    let storage = RecordingStorage::new(bytes.to_vec());
    let log = storage.log();
    (Arc::new(storage), log)
}
