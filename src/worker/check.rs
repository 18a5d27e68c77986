//! Whether an answer of a worker keeps to what [`guest::Tree`] promises. A worker that says anything
//! else has been taken over by what it read.

use std::collections::BTreeSet;

use guest::path::{NAME_MAX, PATH_MAX};
use guest::tree::{Layout, Listed, Listing, Origin, PIECES, Placed, Resolved};
use guest::{Attributes, DiskRange, Status, VolumeAbout};

use super::process::printable;
use super::protocol::{NOTES, SENTENCE};

/// Volumes of a machine.
const VOLUMES: usize = 4096;
/// Longest name of a volume, in bytes.
const VOLUME_NAME: usize = 255;
/// Longest target of a link in a listing.
const TARGET: usize = 4096;
/// Extended attributes of a node: how many, and bytes in all.
const XATTRS: (usize, usize) = (64 << 10, 1 << 20);
/// Ranges of disks in a part of a layout.
const RANGES: usize = 128 << 10;
/// Bits of a mode.
const MODE: u32 = 0o7777;
const NANOSECONDS: u32 = 1_000_000_000;

type Checked = Result<(), String>;

fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Checked {
    if holds { Ok(()) } else { Err(otherwise()) }
}

pub(super) fn volumes(volumes: &[VolumeAbout]) -> Checked {
    ensure(volumes.len() <= VOLUMES, || format!("it tells of {} volumes", volumes.len()))?;
    let mut names = BTreeSet::new();
    for volume in volumes {
        let name = &volume.name;
        let fit = name.len() <= VOLUME_NAME && !name.contains(char::is_control);
        ensure(fit && is_name(name.as_bytes()), || format!("a volume is called {name:?}"))?;
        ensure(names.insert(name), || format!("two volumes are called {name:?}"))?;
        let why = match &volume.status {
            Status::Stale(why) | Status::Refused(why) => why,
            Status::Clean | Status::Replayed => "",
        };
        let texts = [&volume.place, &volume.kind, &volume.label, &volume.uuid, why];
        texts.into_iter().try_for_each(sentence)?;
    }
    Ok(())
}

pub(super) fn notes(notes: &[String]) -> Checked {
    ensure(notes.len() <= NOTES, || format!("it has {} notes", notes.len()))?;
    notes.iter().try_for_each(|note| sentence(note))
}

fn sentence(text: &str) -> Checked {
    ensure(text.len() <= SENTENCE, || format!("a text of {} bytes", text.len()))
}

fn is_name(name: &[u8]) -> bool {
    let fit = !name.is_empty() && name.len() <= NAME_MAX && name != b"." && name != b"..";
    fit && !name.iter().any(|b| [0, b'/'].contains(b))
}

pub(super) fn attributes(attributes: &Attributes) -> Checked {
    ensure(attributes.mode & !MODE == 0, || format!("a mode is {:#o}", attributes.mode))?;
    sentence(attributes.note.as_deref().unwrap_or_default())?;
    let times = [attributes.modified, attributes.accessed, attributes.changed, attributes.created];
    let fit = times.iter().flatten().all(|time| time.nanoseconds < NANOSECONDS);
    ensure(fit, || "a time has more than a second of nanoseconds".into())
}

/// Checks an entry; what it says of damage is made printable.
pub(super) fn listed(entry: &mut Listed) -> Checked {
    ensure(is_name(&entry.name), || format!("a name is {:?}", entry.name.escape_ascii()))?;
    let length = entry.target.as_ref().map_or(0, Vec::len);
    ensure(length <= TARGET, || format!("a link of {length} bytes in a listing"))?;
    match &mut entry.attributes {
        Ok(known) => attributes(known),
        Err(error) => {
            error.message = printable(&error.message, SENTENCE);
            Ok(())
        }
    }
}

pub(super) fn xattrs(found: &[(Vec<u8>, Vec<u8>)]) -> Checked {
    let bytes: usize = found.iter().map(|(name, value)| name.len() + value.len()).sum();
    let fit = found.len() <= XATTRS.0 && bytes <= XATTRS.1;
    ensure(fit, || format!("{} extended attributes of {bytes} bytes", found.len()))
}

pub(super) fn link(target: &[u8]) -> Checked {
    ensure(target.len() <= PATH_MAX, || format!("a link of {} bytes", target.len()))
}

pub(super) fn listing(listing: &mut Listing, limit: usize) -> Checked {
    let count = listing.entries.len();
    ensure(count <= limit, || format!("{count} names came where {limit} were asked for"))?;
    ensure(count > 0 || listing.next.is_none(), || "a listing goes on without a name".into())?;
    listing.entries.iter_mut().try_for_each(listed)?;
    let names: BTreeSet<_> = listing.entries.iter().map(|entry| &entry.name).collect();
    ensure(names.len() == count, || "a listing has a name twice".into())
}

pub(super) fn resolved(found: &Resolved) -> Checked {
    let wrong = || format!("a path is {:?}", found.path.escape_ascii());
    let names = found.path.strip_prefix(b"/").ok_or_else(wrong)?;
    let fit = names.is_empty() || names.split(|b| *b == b'/').all(is_name);
    ensure(fit, wrong)
}

pub(super) fn layout(layout: &Layout, from: u64) -> Checked {
    let count = layout.pieces.len();
    ensure(count <= PIECES, || format!("a layout of {count} pieces"))?;
    let ranges: usize = layout.pieces.iter().map(|piece| piece.origin.ranges().len()).sum();
    ensure(ranges <= RANGES, || format!("a layout of {ranges} ranges of disks"))?;
    let is_sound =
        |range: &DiskRange| range.length > 0 && range.offset.checked_add(range.length).is_some();
    let sound = layout.pieces.iter().flat_map(|piece| piece.origin.ranges()).all(is_sound);
    ensure(sound, || "a range of a disk that no disk can have".into())?;
    layout.pieces.iter().try_for_each(plain)?;
    let mut end = None;
    for piece in &layout.pieces {
        let after = piece.offset.checked_add(piece.length).filter(|after| *after > piece.offset);
        let follows = end.map_or(piece.offset <= from, |end| end == piece.offset);
        let after = after.filter(|_| follows);
        end = Some(after.ok_or_else(|| format!("a piece does not fit at byte {}", piece.offset))?);
    }
    let goes_on = layout.next.is_none_or(|next| next > from && Some(next) == end);
    ensure(goes_on, || format!("a layout goes on at byte {:?}", layout.next))
}

/// What lies byte for byte on the disks is as long there as in the file.
fn plain(piece: &Placed) -> Checked {
    let Origin::Plain(ranges) = &piece.origin else { return Ok(()) };
    let sum = ranges.iter().try_fold(0_u64, |sum, range| sum.checked_add(range.length));
    ensure(sum == Some(piece.length), || {
        format!("a piece of {} bytes lies in {sum:?} bytes", piece.length)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest::{Cursor, FileType, Node, Time};

    fn known() -> Attributes {
        Attributes {
            file_type: FileType::File,
            size: 1,
            allocated: None,
            mode: 0o644,
            uid: 0,
            gid: 0,
            links: 1,
            modified: None,
            accessed: None,
            changed: None,
            created: None,
            note: None,
        }
    }

    fn entry(name: &[u8]) -> Listed {
        Listed { name: name.to_vec(), node: Node(1), attributes: Ok(known()), target: None }
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        assert!(listed(&mut entry(b"a\xff b")).is_ok());
        for name in [&b""[..], b".", b"..", b"a/b", b"/etc", b"a\0"] {
            assert!(listed(&mut entry(name)).is_err(), "{name:?}");
        }
        for path in [&b""[..], b"etc", b"/a/", b"/a//b", b"/a/../b", b"/.", b"/a\0"] {
            let found = Resolved { node: Node(1), path: path.to_vec() };
            assert!(resolved(&found).is_err(), "{path:?}");
        }
        for path in [&b"/"[..], b"/a", b"/a/..b"] {
            assert!(resolved(&Resolved { node: Node(1), path: path.to_vec() }).is_ok());
        }
    }

    #[test]
    fn attributes_keep_to_their_bounds() {
        assert!(attributes(&Attributes { mode: 0o7777, ..known() }).is_ok());
        assert!(attributes(&Attributes { mode: 0o10_000, ..known() }).is_err());
        let late = Some(Time { seconds: 0, nanoseconds: NANOSECONDS });
        assert!(attributes(&Attributes { changed: late, ..known() }).is_err());
        let mut link = Listed { target: Some(vec![b'a'; TARGET + 1]), ..entry(b"a") };
        assert!(listed(&mut link).is_err());
        let note = Some("a".repeat(SENTENCE + 1));
        assert!(attributes(&Attributes { note, ..known() }).is_err());
        let xattr = |length| (b"user.a".to_vec(), vec![0; length]);
        assert!(xattrs(&[xattr(10), xattr(10)]).is_ok());
        assert!(xattrs(&[xattr(XATTRS.1 / 2), xattr(XATTRS.1 / 2)]).is_err());
        assert!(xattrs(&vec![(Vec::new(), Vec::new()); XATTRS.0 + 1]).is_err());
    }

    #[test]
    fn a_listing_is_no_longer_than_asked_for_and_gets_on() {
        let of = |count: u8, next| Listing {
            entries: (0..count).map(|n| entry(&[b'a' + n])).collect(),
            next,
        };
        let twice = Listing { entries: vec![entry(b"a"); 2], next: None };
        assert!(listing(&mut { twice }, 2).is_err());
        assert!(listing(&mut of(2, Some(Cursor(1))), 2).is_ok());
        assert!(listing(&mut of(0, None), 2).is_ok());
        assert!(listing(&mut of(3, None), 2).is_err());
        assert!(listing(&mut of(0, Some(Cursor(1))), 2).is_err());
    }

    #[test]
    fn a_layout_has_no_gaps_and_gets_on() {
        let of = |pieces: &[(u64, u64)], next| Layout {
            pieces: pieces
                .iter()
                .map(|(offset, length)| Placed {
                    offset: *offset,
                    length: *length,
                    origin: Origin::Hole,
                })
                .collect(),
            next,
            checked: false,
        };
        assert!(layout(&of(&[], None), 0).is_ok());
        assert!(layout(&of(&[(0, 10), (10, 5)], Some(15)), 3).is_ok());
        for wrong in [
            of(&[(4, 10)], None),
            of(&[(0, 10), (11, 5)], None),
            of(&[(0, 0)], None),
            of(&[(0, 10), (10, u64::MAX)], None),
            of(&[(0, 10)], Some(11)),
            of(&[(0, 2)], Some(2)),
            of(&[], Some(9)),
        ] {
            assert!(layout(&wrong, 3).is_err(), "{wrong:?}");
        }
        let range = DiskRange { disk: 0, offset: 0, length: 1 };
        let mut many = of(&[(0, 10)], None);
        many.pieces[0].origin = Origin::Encoded(vec![range; RANGES + 1]);
        assert!(layout(&many, 0).is_err());
    }

    #[test]
    fn volumes_have_names_that_paths_can_have_and_each_its_own() {
        let of = |name: &str| VolumeAbout {
            name: name.into(),
            place: String::new(),
            size: 0,
            kind: String::new(),
            label: String::new(),
            uuid: String::new(),
            used: None,
            status: Status::Clean,
        };
        assert!(volumes(&[of("disk0"), of("vg-root")]).is_ok());
        assert!(volumes(&[of("a"), of("a")]).is_err());
        let long = "a".repeat(SENTENCE + 1);
        assert!(volumes(&[VolumeAbout { label: long.clone(), ..of("a") }]).is_err());
        assert!(
            volumes(&[VolumeAbout { status: Status::Stale(long.clone()), ..of("a") }]).is_err()
        );
        assert!(notes(&[long]).is_err() && notes(&vec![String::new(); NOTES + 1]).is_err());
        for name in ["", "..", "a/b", "a\nb", &"a".repeat(VOLUME_NAME + 1)] {
            assert!(volumes(&[of(name)]).is_err(), "{name:?}");
        }
    }
}
