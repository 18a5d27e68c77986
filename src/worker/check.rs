//! Whether an answer of a worker keeps to what [`guest::Tree`] promises. A worker that says anything
//! else has been taken over by what it read.

use std::collections::BTreeSet;

use guest::path::PATH_MAX;
use guest::tree::{Layout, Listed, Listing, PIECES, Resolved};
use guest::{Attributes, VolumeAbout};

/// Volumes of a machine.
const VOLUMES: usize = 4096;
/// Longest name of a volume, in bytes.
const VOLUME_NAME: usize = 255;
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
    }
    Ok(())
}

fn is_name(name: &[u8]) -> bool {
    !name.is_empty() && name != b"." && name != b".." && !name.iter().any(|b| [0, b'/'].contains(b))
}

pub(super) fn attributes(attributes: &Attributes) -> Checked {
    ensure(attributes.mode & !MODE == 0, || format!("a mode is {:#o}", attributes.mode))?;
    let times = [attributes.modified, attributes.accessed, attributes.changed, attributes.created];
    let fit = times.iter().flatten().all(|time| time.nanoseconds < NANOSECONDS);
    ensure(fit, || "a time has more than a second of nanoseconds".into())
}

pub(super) fn listed(entry: &Listed) -> Checked {
    ensure(is_name(&entry.name), || format!("a name is {:?}", entry.name.escape_ascii()))?;
    if let Some(target) = &entry.target {
        link(target)?;
    }
    entry.attributes.as_ref().map_or(Ok(()), attributes)
}

pub(super) fn link(target: &[u8]) -> Checked {
    ensure(target.len() <= PATH_MAX, || format!("a link of {} bytes", target.len()))
}

pub(super) fn listing(listing: &Listing, limit: usize) -> Checked {
    let count = listing.entries.len();
    ensure(count <= limit, || format!("{count} names came where {limit} were asked for"))?;
    ensure(count > 0 || listing.next.is_none(), || "a listing goes on without a name".into())?;
    listing.entries.iter().try_for_each(listed)
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

#[cfg(test)]
mod tests {
    use super::*;
    use guest::tree::{Origin, Placed};
    use guest::{Cursor, FileType, Node, Status, Time};

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
        assert!(listed(&entry(b"a\xff b")).is_ok());
        for name in [&b""[..], b".", b"..", b"a/b", b"/etc", b"a\0"] {
            assert!(listed(&entry(name)).is_err(), "{name:?}");
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
        let link = Listed { target: Some(vec![b'a'; PATH_MAX + 1]), ..entry(b"a") };
        assert!(listed(&link).is_err());
    }

    #[test]
    fn a_listing_is_no_longer_than_asked_for_and_gets_on() {
        let of = |count, next| Listing { entries: vec![entry(b"a"); count], next };
        assert!(listing(&of(2, Some(Cursor(1))), 2).is_ok());
        assert!(listing(&of(0, None), 2).is_ok());
        assert!(listing(&of(3, None), 2).is_err());
        assert!(listing(&of(0, Some(Cursor(1))), 2).is_err());
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
        for name in ["", "..", "a/b", "a\nb", &"a".repeat(VOLUME_NAME + 1)] {
            assert!(volumes(&[of(name)]).is_err(), "{name:?}");
        }
    }
}
