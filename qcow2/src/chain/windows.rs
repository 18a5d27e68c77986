//! The chain's merged look-up: which layer has what, remembered per window of the disk.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use super::layer::Layer;
use crate::error::Result;
use crate::table::segment::{Segment, SegmentKind};

/// Extents kept in memory for one chain: about 10 MiB.
const MAX_CACHED_EXTENTS: usize = 256 * 1024;

/// A run of guest bytes that one layer of the chain decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) guest: u64,
    pub(crate) length: u64,
    /// Index of the layer, top first; the number of layers where none has the bytes.
    pub(crate) layer: usize,
    pub(crate) kind: SegmentKind,
}

impl Extent {
    /// Whether the bytes are zeroes without looking at them.
    pub(crate) fn reads_as_zeroes(&self) -> bool {
        !matches!(self.kind, SegmentKind::Data { .. } | SegmentKind::Compressed(_))
    }

    /// The part of the extent inside `start .. end`, if any.
    fn clip(mut self, start: u64, end: u64) -> Option<Self> {
        let from = self.guest.max(start);
        let to = (self.guest + self.length).min(end);
        if from >= to {
            return None;
        }
        let skip = from - self.guest;
        self.kind = match self.kind {
            SegmentKind::Data { host, copied } => SegmentKind::Data { host: host + skip, copied },
            SegmentKind::ZeroAllocated { host, copied } => {
                SegmentKind::ZeroAllocated { host: host + skip, copied }
            }
            kind => kind,
        };
        (self.guest, self.length) = (from, to - from);
        Some(self)
    }
}

#[derive(Default)]
struct State {
    windows: HashMap<u64, (Arc<[Extent]>, bool)>,
    order: VecDeque<u64>,
    extents: usize,
}

/// Resolved windows, bounded by [`MAX_CACHED_EXTENTS`]; second chance for those in use.
pub(super) struct Windows {
    span: u64,
    state: Mutex<State>,
}

impl Windows {
    pub(super) fn new(span: u64) -> Self {
        Self { span, state: Mutex::default() }
    }

    pub(super) fn extents(
        &self,
        layers: &[Layer],
        start: u64,
        end: u64,
        visit: &mut dyn FnMut(Extent) -> Result<bool>,
    ) -> Result<()> {
        let mut at = start;
        while at < end {
            let number = at / self.span;
            let window_end = (number + 1).saturating_mul(self.span).min(end);
            let window = self.window(layers, number)?;
            let first = window.partition_point(|e| e.guest + e.length <= at);
            for extent in window[first..].iter().map_while(|e| e.clip(at, window_end)) {
                if !visit(extent)? {
                    return Ok(());
                }
            }
            at = window_end;
        }
        Ok(())
    }

    fn window(&self, layers: &[Layer], number: u64) -> Result<Arc<[Extent]>> {
        {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((window, touched)) = state.windows.get_mut(&number) {
                *touched = true;
                return Ok(Arc::clone(window));
            }
        }
        // Two threads may resolve the same window: the files never change, so both are right.
        let start = number * self.span;
        let window: Arc<[Extent]> = resolve(layers, start, start.saturating_add(self.span))?.into();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.insert(number, Arc::clone(&window));
        Ok(window)
    }
}

impl State {
    fn insert(&mut self, number: u64, window: Arc<[Extent]>) {
        let added = window.len();
        if let Some((old, _)) = self.windows.insert(number, (window, false)) {
            self.extents -= old.len();
        } else {
            self.order.push_back(number);
        }
        self.extents += added;
        while self.extents > MAX_CACHED_EXTENTS && self.order.len() > 1 {
            let Some(oldest) = self.order.pop_front() else {
                return;
            };
            match self.windows.get_mut(&oldest) {
                Some((_, touched)) if *touched => {
                    *touched = false;
                    self.order.push_back(oldest);
                }
                Some((window, _)) => {
                    self.extents -= window.len();
                    self.windows.remove(&oldest);
                }
                None => {}
            }
        }
    }
}

/// Asks each layer for what the layers above it left open.
fn resolve(layers: &[Layer], start: u64, end: u64) -> Result<Vec<Extent>> {
    let mut found: Vec<Extent> = Vec::new();
    let mut open = vec![(start, end)];
    let mut segments: Vec<Segment> = Vec::new();
    for (layer, file) in layers.iter().enumerate() {
        let mut still_open = Vec::new();
        let mut last = None;
        for range in open {
            segments.clear();
            file.segments(range, &mut last, &mut segments)?;
            for segment in &segments {
                let Segment { guest, length, kind } = *segment;
                if kind == SegmentKind::Unallocated {
                    still_open.push((guest.0, guest.0 + length));
                } else {
                    found.push(Extent { guest: guest.0, length, layer, kind });
                }
            }
        }
        open = still_open;
        if open.is_empty() {
            break;
        }
    }
    let none = layers.len();
    found.extend(open.into_iter().map(|(from, to)| Extent {
        guest: from,
        length: to - from,
        layer: none,
        kind: SegmentKind::Unallocated,
    }));
    found.sort_unstable_by_key(|extent| extent.guest);
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::chain::{Chain, FileGate, OpenGate, Reference};
    use crate::header::BackingFormat;
    use crate::image::Image;
    use crate::image::create::{CreateOptions, create};
    use crate::image::open::OpenOptions;
    use crate::storage::Storage;
    use crate::storage::fault::FaultStorage;

    /// Counts what is asked of the files that it opens.
    #[derive(Default)]
    struct Counting(Mutex<Vec<Arc<FaultStorage>>>);

    impl OpenGate for Counting {
        fn open(
            &self,
            referrer: &Path,
            name: &str,
        ) -> Result<(std::path::PathBuf, Arc<dyn Storage>)> {
            let (path, file) = FileGate { lock: false }.open(referrer, name)?;
            let counted = Arc::new(FaultStorage::new(file));
            self.0.lock().unwrap().push(Arc::clone(&counted));
            Ok((path, counted))
        }
    }

    #[test]
    fn a_chain_of_many_fragments_is_looked_up_with_one_read_per_file_and_slice() {
        const SIZE: u64 = 16 << 20;
        let dir = tempfile::tempdir().unwrap();
        let mut below: Option<String> = None;
        for number in 0..4 {
            let name = format!("{number}.qcow2");
            let mut options = CreateOptions::new(SIZE);
            if let Some(below) = below {
                options = options.backing(below, BackingFormat::Qcow2);
            }
            create(&dir.path().join(&name), &options).unwrap();
            let image = Image::open(&dir.path().join(&name), &OpenOptions::new()).unwrap();
            // Every fourth cluster is in each file.
            for at in (number << 16..SIZE).step_by(4 << 16) {
                image.write_at(&[1; 512], at).unwrap();
            }
            image.close().unwrap();
            below = Some(name);
        }
        let gate = Counting::default();
        let name = "3.qcow2";
        let reference = Reference { name, format: Some("qcow2") };
        let top = dir.path().join("top.qcow2");
        let chain = Chain::open(&gate, &top, None, reference, 10, 32 << 20).unwrap();
        let calls = || gate.0.lock().unwrap().iter().map(|file| file.calls()).sum::<u64>();
        let before = calls();
        let mut layers = Vec::new();
        chain
            .extents(0, SIZE, &mut |extent| {
                layers.push(extent.layer);
                Ok(true)
            })
            .unwrap();
        assert_eq!(layers.len(), 256);
        assert!(layers.chunks(4).all(|four| four == [3, 2, 1, 0]));
        assert_eq!(calls() - before, 4);
    }
}
