//! Content of large files, read by the hub itself.
//!
//! The worker tells where a file lies. What lies byte for byte on the machine's disks need not come
//! through it: the hub reads the same ranges of the same restore point, from several threads, and copies
//! nothing. A guest's disk can make the hub follow numbers only, and each range is one of a disk that is
//! mounted here. All else goes through the worker: small files and reads, what is compressed, among
//! metadata or in a journal, and what has checksums of its own.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use guest::tree::{Layout, Origin, Placed, READ};
use guest::{DiskRange, Error, ErrorKind, Node, Result};
use qcow2::Image;

use super::disk;

/// Shortest read that is worth it, in bytes.
const SHORTEST: usize = 64 << 10;
/// The part of a file that always goes through the worker, in bytes: where a small file lies is not asked.
const BEGINNING: u64 = READ as u64;
/// Parts of layouts that are remembered, and pieces and ranges of them in all.
const LAYOUTS: usize = 64;
const ITEMS: usize = 128 << 10;
/// Bytes of a file for which it is remembered that its layout cannot be told.
const UNKNOWN: u64 = 64 << 20;
/// Time that reads under way have to be done once the mount ends.
const READS: Duration = Duration::from_secs(2);

/// The machine's disks, by number.
type Images = Vec<(u32, Image)>;

enum Disks {
    Closed(Vec<(u32, PathBuf)>),
    /// Somebody opens them, which may take long: a disk may hang.
    Opening,
    Open(Arc<Images>),
    /// They cannot be opened a second time, or the mount has ended.
    None,
}

/// What a layout is of: the number of the volume, and the file.
type Of = (u32, Node);

/// A mount's disks and what is known of its files.
pub(super) struct Plain {
    disks: Mutex<Disks>,
    layouts: Mutex<VecDeque<(Of, Arc<Layout>)>>,
    /// Volumes whose content is checked against checksums.
    checked: Mutex<BTreeSet<u32>>,
    under_way: Mutex<UnderWay>,
}

/// When the reads began that are under way, by number.
#[derive(Default)]
struct UnderWay {
    begun: BTreeMap<u64, Instant>,
    last: u64,
}

/// A read that is under way; none any more when it is dropped.
struct Reading<'a> {
    plain: &'a Plain,
    number: u64,
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        lock(&self.plain.under_way).begun.remove(&self.number);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a read may be worth it.
pub(super) fn is_worth_it(length: usize, offset: u64) -> bool {
    length >= SHORTEST && offset >= BEGINNING
}

impl Plain {
    /// For disks that are opened when they are needed.
    pub(super) fn new(disks: &[(u32, PathBuf)]) -> Self {
        Self {
            disks: Mutex::new(Disks::Closed(disks.to_vec())),
            layouts: Mutex::default(),
            checked: Mutex::default(),
            under_way: Mutex::default(),
        }
    }

    fn begin(&self) -> Reading<'_> {
        let mut under_way = lock(&self.under_way);
        under_way.last += 1;
        let number = under_way.last;
        under_way.begun.insert(number, Instant::now());
        Reading { plain: self, number }
    }

    /// Whether a read of a disk takes longer than `limit`: it hangs.
    pub(super) fn hangs(&self, limit: Duration) -> bool {
        let under_way = lock(&self.under_way);
        under_way.begun.values().any(|begun| begun.elapsed() > limit)
    }

    /// Lets go of the disks, as soon as nobody reads them.
    pub(super) fn end(&self) {
        let before = std::mem::replace(&mut *lock(&self.disks), Disks::None);
        if let Disks::Open(images) = before {
            let until = Instant::now() + READS;
            while Arc::strong_count(&images) > 1 && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    fn images(&self) -> Option<Arc<Images>> {
        let mut disks = lock(&self.disks);
        let paths = match &mut *disks {
            Disks::Open(images) => return Some(Arc::clone(images)),
            Disks::Opening | Disks::None => return None,
            Disks::Closed(paths) => std::mem::take(paths),
        };
        *disks = Disks::Opening;
        drop(disks);
        let images = open(&paths).map(Arc::new);
        let mut disks = lock(&self.disks);
        if !matches!(*disks, Disks::Opening) {
            // The mount has ended.
            return None;
        }
        *disks = images.clone().map_or(Disks::None, Disks::Open);
        images
    }

    /// The part of a file's layout that has byte `offset`, from `ask` where it is not known.
    fn layout(
        &self,
        of: Of,
        offset: u64,
        ask: impl FnOnce() -> Result<Layout>,
    ) -> Option<Arc<Layout>> {
        if let Some(known) = known(&mut lock(&self.layouts), of, offset) {
            return Some(known);
        }
        if lock(&self.checked).contains(&of.0) {
            return None;
        }
        let layout = ask().unwrap_or_else(|_| {
            // What lies there may be read all the same, or the reason is told then.
            let origin = Origin::Unknown;
            Layout { pieces: vec![Placed { offset, length: UNKNOWN, origin }], ..Layout::default() }
        });
        if layout.checked {
            lock(&self.checked).insert(of.0);
            return None;
        }
        let layout = Arc::new(layout);
        let mut layouts = lock(&self.layouts);
        // Others may have asked at the same time.
        if let Some(known) = known(&mut layouts, of, offset) {
            return Some(known);
        }
        layouts.push_back((of, Arc::clone(&layout)));
        let mut items: usize = layouts.iter().map(|(_, layout)| weight(layout)).sum();
        while layouts.len() > LAYOUTS || (items > ITEMS && layouts.len() > 1) {
            items -= layouts.pop_front().map_or(0, |(_, layout)| weight(&layout));
        }
        Some(layout)
    }

    /// Fills `buf` from byte `offset` of a file, less only at its end. `None` where not all of it is on
    /// the disks as it is.
    ///
    /// # Errors
    /// `Io` where a disk cannot be read; `Corrupt` for a range that is not on it.
    pub(super) fn read(
        &self,
        of: Of,
        buf: &mut [u8],
        offset: u64,
        ask: impl FnOnce() -> Result<Layout>,
    ) -> Result<Option<usize>> {
        let Some(layout) = self.layout(of, offset, ask) else { return Ok(None) };
        let Some((parts, length)) = parts(&layout, offset, buf.len()) else { return Ok(None) };
        let _reading = self.begin();
        let Some(images) = self.images() else { return Ok(None) };
        let mut rest = &mut buf[..length];
        for part in parts {
            let length = usize::try_from(part.length).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = std::mem::take(&mut rest).split_at_mut(length);
            match part.range {
                None => now.fill(0),
                Some(range) => read(&images, now, range)?,
            }
            rest = later;
        }
        Ok(Some(length))
    }
}

/// Finds the part of a layout that has byte `offset`, and keeps it longest from now on.
fn known(layouts: &mut VecDeque<(Of, Arc<Layout>)>, of: Of, offset: u64) -> Option<Arc<Layout>> {
    let has = |layout: &Layout| {
        let start = layout.pieces.first().map_or(u64::MAX, |piece| piece.offset);
        let end = layout.pieces.last().map_or(0, |piece| piece.offset.saturating_add(piece.length));
        start <= offset && offset < end
    };
    let at = layouts.iter().position(|(whose, layout)| *whose == of && has(layout))?;
    let entry = layouts.remove(at)?;
    let layout = Arc::clone(&entry.1);
    layouts.push_back(entry);
    Some(layout)
}

/// Pieces and ranges of a layout.
fn weight(layout: &Layout) -> usize {
    layout.pieces.iter().map(|piece| 1 + piece.origin.ranges().len()).sum()
}

fn open(paths: &[(u32, PathBuf)]) -> Option<Images> {
    let mut images = Images::new();
    for (number, path) in paths {
        match disk::open_image(path) {
            Ok(image) => images.push((*number, image)),
            Err(error) => {
                tracing::warn!(%error, "a disk cannot be opened again; its worker reads all of it");
                return None;
            }
        }
    }
    Some(images)
}

fn read(images: &Images, buf: &mut [u8], range: DiskRange) -> Result<()> {
    let image = images.iter().find(|(number, _)| *number == range.disk);
    let (_, image) = image.ok_or_else(|| {
        Error::corrupt(format!("a file lies on disk {}, which is not mounted", range.disk))
    })?;
    image.read_at(buf, range.offset).map_err(|error| {
        let kind = match error.kind() {
            qcow2::ErrorKind::OutOfBounds => ErrorKind::Corrupt,
            _ => ErrorKind::Io,
        };
        Error::new(kind, format!("disk {}: {error}", range.disk))
    })
}

/// Bytes of a file: where on the disks they are, or zeroes.
#[derive(Debug, PartialEq, Eq)]
struct Part {
    length: u64,
    range: Option<DiskRange>,
}

/// The parts of `length` bytes from `offset` on, and how many bytes there are until the file ends. `None`
/// where not all of them lie on the disks as they are.
fn parts(layout: &Layout, offset: u64, length: usize) -> Option<(Vec<Part>, usize)> {
    if layout.checked {
        return None;
    }
    let wanted = offset.checked_add(length as u64)?;
    let first = layout.pieces.partition_point(|piece| piece.offset + piece.length <= offset);
    let (mut found, mut at) = (Vec::new(), offset);
    for piece in layout.pieces.get(first..)? {
        if at == wanted || piece.offset > at {
            break;
        }
        let until = (piece.offset + piece.length).min(wanted);
        match &piece.origin {
            Origin::Hole => found.push(Part { length: until - at, range: None }),
            Origin::Plain(ranges) => cut(piece, ranges, (at, until), &mut found),
            Origin::Encoded(_) | Origin::Unknown => return None,
        }
        at = until;
    }
    let is_all = at == wanted || (at > offset && layout.next.is_none());
    is_all.then(|| (found, usize::try_from(at - offset).unwrap_or(length)))
}

/// Adds where the bytes `from .. until` of a piece are.
fn cut(piece: &Placed, ranges: &[DiskRange], (from, until): (u64, u64), found: &mut Vec<Part>) {
    let mut at = piece.offset;
    for range in ranges {
        let (start, end) = (at.max(from), (at + range.length).min(until));
        if start < end {
            let (offset, length) = (range.offset + (start - at), end - start);
            found.push(Part { length, range: Some(DiskRange { offset, length, ..*range }) });
        }
        at += range.length;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(disk: u32, offset: u64, length: u64) -> DiskRange {
        DiskRange { disk, offset, length }
    }

    fn placed(offset: u64, length: u64, origin: Origin) -> Placed {
        Placed { offset, length, origin }
    }

    fn layout() -> Layout {
        let pieces = vec![
            placed(0, 100, Origin::Plain(vec![range(0, 1000, 60), range(1, 0, 40)])),
            placed(100, 50, Origin::Hole),
            placed(150, 50, Origin::Plain(vec![range(0, 5000, 50)])),
            placed(200, 50, Origin::Encoded(vec![range(0, 9000, 50)])),
            placed(250, 50, Origin::Unknown),
            placed(300, 50, Origin::Hole),
        ];
        Layout { pieces, next: None, checked: false }
    }

    #[test]
    fn a_read_is_cut_into_what_lies_together() {
        let found = parts(&layout(), 50, 110).unwrap();
        let part = |length, range| Part { length, range };
        let wanted = vec![
            part(10, Some(range(0, 1050, 10))),
            part(40, Some(range(1, 0, 40))),
            part(50, None),
            part(10, Some(range(0, 5000, 10))),
        ];
        assert_eq!(found, (wanted, 110));
    }

    #[test]
    fn what_is_not_there_as_it_is_is_left_to_the_worker() {
        for (offset, length) in [(150, 51), (210, 10), (199, 2), (260, 10), (250, 60)] {
            assert_eq!(parts(&layout(), offset, length), None, "{offset}, {length}");
        }
        assert_eq!(parts(&Layout { checked: true, ..layout() }, 0, 10), None);
    }

    #[test]
    fn a_read_ends_with_the_file_and_not_with_a_part_of_its_layout() {
        let length = |layout: &Layout, offset| parts(layout, offset, 100).map(|found| found.1);
        assert_eq!(length(&layout(), 310), Some(40));
        assert_eq!(length(&layout(), 350), None, "the worker says what is there");
        assert_eq!(length(&Layout { next: Some(350), ..layout() }, 310), None);
    }

    #[test]
    fn ranges_of_disks_that_are_not_there_are_damage() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        qcow2::create(&path, &qcow2::CreateOptions::new(1 << 20)).unwrap();
        let plain = Plain::new(&[(3, path)]);
        let at = |range: DiskRange| {
            let pieces = vec![placed(0, range.length, Origin::Plain(vec![range]))];
            let layout = Layout { pieces, ..Layout::default() };
            let mut bytes = vec![1; 512];
            let of = (0, Node(range.offset));
            plain.read(of, &mut bytes, 0, || Ok(layout)).map(|read| (read, bytes[0]))
        };
        assert_eq!(at(range(3, 0, 512)).unwrap(), (Some(512), 0));
        for wrong in [range(2, 512, 512), range(3, 1 << 20, 512), range(3, u64::MAX - 600, 512)] {
            assert_eq!(at(wrong).unwrap_err().kind, ErrorKind::Corrupt, "{wrong:?}");
        }
        plain.end();
        assert_eq!(at(range(3, 1024, 512)).unwrap().0, None);
    }

    #[test]
    fn parts_of_layouts_are_asked_for_once_as_long_as_they_are_remembered() {
        let plain = Plain::new(&[]);
        let asked = std::cell::Cell::new(0);
        let ask = |file: u64, pieces: usize| {
            plain.layout((0, Node(file)), 10, || {
                asked.set(asked.get() + 1);
                let pieces = (0..pieces as u64).map(|n| placed(n * 100, 100, Origin::Hole));
                Ok(Layout { pieces: pieces.collect(), ..Layout::default() })
            })
        };
        for file in (0..LAYOUTS as u64).chain([0, 7, 0]) {
            assert!(ask(file, 1).is_some());
        }
        assert_eq!(asked.get(), LAYOUTS);
        ask(1000, 1);
        // One more than are remembered: nobody had asked for the second one for longest.
        ask(0, 1);
        assert_eq!(asked.get(), LAYOUTS + 1);
        ask(1, 1);
        assert_eq!(asked.get(), LAYOUTS + 2);
        // Large ones count for more.
        ask(2000, ITEMS);
        ask(0, 1);
        assert_eq!(asked.get(), LAYOUTS + 4);
        assert_eq!(lock(&plain.layouts).len(), 1);
    }

    #[test]
    fn a_layout_that_cannot_be_told_leaves_the_file_to_the_worker_and_is_not_asked_for_again() {
        let plain = Plain::new(&[]);
        let mut asked = 0;
        for offset in [5 << 20, 6 << 20, (5 << 20) + UNKNOWN - 100, (5 << 20) + UNKNOWN] {
            let read = plain.read((0, Node(1)), &mut [0; 512], offset, || {
                asked += 1;
                Err(Error::corrupt("a damaged block"))
            });
            assert_eq!(read.unwrap(), None);
        }
        assert_eq!(asked, 2);
        // A volume that checks its content is asked once.
        let mut asked = 0;
        for offset in [5 << 20, 900 << 20] {
            let read = plain.read((1, Node(1)), &mut [0; 512], offset, || {
                asked += 1;
                Ok(Layout { checked: true, ..layout() })
            });
            assert_eq!(read.unwrap(), None);
        }
        assert_eq!(asked, 1);
    }

    #[test]
    fn a_disk_that_hangs_is_noticed_and_a_mount_ends_without_it() {
        let plain = Plain::new(&[]);
        assert!(!plain.hangs(Duration::ZERO));
        let reading = plain.begin();
        std::thread::sleep(Duration::from_millis(2));
        assert!(plain.hangs(Duration::from_millis(1)));
        drop(reading);
        assert!(!plain.hangs(Duration::ZERO));
        // While somebody opens the disks, others do without and the end does not wait.
        *lock(&plain.disks) = Disks::Opening;
        assert!(plain.images().is_none());
        plain.end();
        assert!(matches!(*lock(&plain.disks), Disks::None));
    }

    #[test]
    fn a_file_that_is_cut_off_while_it_is_mounted_gives_no_zeroes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        qcow2::create(&path, &qcow2::CreateOptions::new(4 << 20)).unwrap();
        let image = Image::open(&path, &qcow2::OpenOptions::new()).unwrap();
        image.write_at(&vec![7; 2 << 20], 0).unwrap();
        image.close().unwrap();
        let plain = Plain::new(&[(0, path.clone())]);
        let read = || {
            let pieces = vec![placed(0, 2 << 20, Origin::Plain(vec![range(0, 0, 2 << 20)]))];
            let mut bytes = vec![0; 1 << 20];
            let layout = Layout { pieces, ..Layout::default() };
            plain.read((0, Node(1)), &mut bytes, 1 << 20, || Ok(layout)).map(|_| bytes[1 << 19])
        };
        assert_eq!(read().unwrap(), 7);
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len(file.metadata().unwrap().len() - (1 << 20)).unwrap();
        assert_eq!(read().unwrap_err().kind, ErrorKind::Io);
    }
}
