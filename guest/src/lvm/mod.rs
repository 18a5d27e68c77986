//! LVM2 volume groups, whose physical volumes may lie on several disks.
//!
//! Linear and striped logical volumes are read. All others are told by the name of their kind. Of all
//! copies of a group's metadata the one with the highest sequence number counts.

mod config;
mod label;
mod volume;

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::source::Source;
use config::{Section, Value};
use volume::{LogicalVolume, Segment, Stripe};

/// Logical volumes of all groups.
pub(crate) const LOGICAL_VOLUMES_MAX: usize = 1024;
/// Segments of one logical volume.
const SEGMENTS_MAX: u64 = 65_536;
/// Physical volumes that one segment lies on.
const STRIPES_MAX: usize = 256;
const SECTOR: u64 = 512;

/// A source that holds a physical volume.
pub(crate) struct Member {
    source: Arc<dyn Source>,
    pv: label::PhysicalVolume,
}

/// Looks for a physical volume in `source`.
///
/// # Errors
/// `Corrupt` where its label or header is damaged; `Io`.
pub(crate) fn member(source: &Arc<dyn Source>) -> Result<Option<Member>> {
    let found = label::read(&**source)?;
    Ok(found.map(|pv| Member { source: Arc::clone(source), pv }))
}

/// A logical volume that was found.
pub(crate) struct Logical {
    /// Name of its group.
    pub(crate) group: String,
    /// Its name.
    pub(crate) name: String,
    /// Bytes in all, as far as that can be told.
    pub(crate) size: u64,
    /// Its bytes; or its kind, and why it is not read.
    pub(crate) source: std::result::Result<Arc<dyn Source>, (String, String)>,
}

/// What became of physical volumes.
#[derive(Default)]
pub(crate) struct Assembly {
    /// Logical volumes, by group.
    pub(crate) volumes: Vec<Logical>,
    /// Members, by their place in the list, that belong to no group that was found, with the reason.
    pub(crate) unused: Vec<(usize, String)>,
    /// What was left out or was wrong, for people.
    pub(crate) notes: Vec<String>,
}

/// The newest metadata of a group.
struct Group {
    name: String,
    sequence: u64,
    section: Section,
}

/// Puts the groups of all `members` together.
pub(crate) fn assemble(members: &[Member]) -> Assembly {
    let mut assembly = Assembly::default();
    let mut groups: BTreeMap<String, Group> = BTreeMap::new();
    for member in members {
        let uuid = dashed(&member.pv.uuid);
        let told = member.pv.notes.iter().map(|note| format!("physical volume {uuid}: {note}"));
        assembly.notes.extend(told);
        for text in &member.pv.texts {
            if let Err(error) = add_group(text, &mut groups) {
                assembly.notes.push(format!("physical volume {uuid}: {error}"));
            }
        }
    }
    let mut sources: BTreeMap<&str, Vec<&Arc<dyn Source>>> = BTreeMap::new();
    for member in members {
        sources.entry(&member.pv.uuid).or_default().push(&member.source);
    }
    let mut groups: Vec<Group> = groups.into_values().collect();
    groups.sort_by(|one, other| one.name.cmp(&other.name));
    for (number, member) in members.iter().enumerate() {
        if !groups.iter().any(|group| group.has(&member.pv.uuid)) {
            let uuid = dashed(&member.pv.uuid);
            let why = format!("LVM physical volume {uuid}: no readable metadata of a volume group");
            assembly.unused.push((number, why));
        }
    }
    for group in &groups {
        let before = assembly.volumes.len();
        match group.volumes(&sources, &mut assembly) {
            // Its physical volumes are not shown, so that something must be.
            Ok(()) if assembly.volumes.len() == before => {
                assembly.notes.push(format!("volume group {}: no logical volumes", group.name));
            }
            Ok(()) => {}
            Err(error) => assembly.notes.push(format!("volume group {}: {error}", group.name)),
        }
    }
    assembly
}

/// Parses a text, and keeps its group where it is the newest.
fn add_group(text: &str, groups: &mut BTreeMap<String, Group>) -> Result<()> {
    let root = config::parse(text)?;
    for (name, value) in root.0 {
        let Value::Section(section) = value else { continue };
        let missing = || Error::corrupt(format!("volume group {name} has no id or number"));
        let id = section.text("id").ok_or_else(missing)?.to_owned();
        let sequence = section.number("seqno").ok_or_else(missing)?;
        if groups.get(&id).is_none_or(|known| known.sequence < sequence) {
            groups.insert(id, Group { name, sequence, section });
        }
    }
    Ok(())
}

/// A UUID of LVM as people write it.
fn dashed(uuid: &str) -> String {
    let mut text = String::new();
    for (index, letter) in uuid.chars().enumerate() {
        if [6, 10, 14, 18, 22, 26].contains(&index) {
            text.push('-');
        }
        text.push(letter);
    }
    text
}

fn strings(list: &[Value]) -> impl Iterator<Item = &str> {
    list.iter().filter_map(|value| match value {
        Value::Text(text) => Some(text.as_str()),
        _ => None,
    })
}

/// Why a logical volume is not read: its kind, and a sentence.
type Refusal = (String, String);

impl Group {
    fn has(&self, uuid: &str) -> bool {
        let mut ids = self.section.sections("physical_volumes").filter_map(|(_, pv)| pv.text("id"));
        ids.any(|id| id.replace('-', "") == uuid)
    }

    fn volumes(
        &self,
        sources: &BTreeMap<&str, Vec<&Arc<dyn Source>>>,
        assembly: &mut Assembly,
    ) -> Result<()> {
        let extent = self.section.number("extent_size").and_then(|n| n.checked_mul(SECTOR));
        let extent = extent.filter(|extent| *extent > 0);
        let extent = extent.ok_or_else(|| Error::corrupt("it has no sane extent size"))?;
        let (mut stores, mut merging) = (Vec::new(), Vec::new());
        let volumes = self.section.sections("logical_volumes");
        for value in volumes.flat_map(|(_, volume)| volume.0.values()) {
            let Value::Section(segment) = value else { continue };
            stores.extend(segment.text("cow_store"));
            if let Some(store) = segment.text("merging_store") {
                stores.push(store);
                merging.extend(segment.text("origin"));
            }
        }
        for (name, volume) in self.section.sections("logical_volumes") {
            if !strings(volume.list("status")).any(|status| status == "VISIBLE") {
                continue;
            }
            if assembly.volumes.len() >= LOGICAL_VOLUMES_MAX {
                let more = "there are more logical volumes than are read: the rest is left out";
                return Err(Error::limit(format!("{more} after {LOGICAL_VOLUMES_MAX}")));
            }
            let extents = segments(volume).filter_map(|segment| segment.number("extent_count"));
            let extents = extents.fold(0, u64::saturating_add);
            let source = if stores.contains(&name.as_str()) {
                let why = "LVM snapshot volume: not read; its origin is a volume of its own";
                Err(("lvm-snapshot".into(), why.into()))
            } else if merging.contains(&name.as_str()) {
                let why = "LVM volume into which a snapshot is being merged: it lies in both";
                Err(("lvm-snapshot-merge".into(), why.into()))
            } else {
                self.volume(volume, extent, sources)
            };
            assembly.volumes.push(Logical {
                group: self.name.clone(),
                name: name.clone(),
                size: extents.saturating_mul(extent),
                source,
            });
        }
        Ok(())
    }

    fn volume(
        &self,
        volume: &Section,
        extent: u64,
        sources: &BTreeMap<&str, Vec<&Arc<dyn Source>>>,
    ) -> std::result::Result<Arc<dyn Source>, Refusal> {
        let refuse = |why: String| ("lvm".to_owned(), why);
        let count = volume.number("segment_count").unwrap_or(0);
        if count == 0 || count > SEGMENTS_MAX || segments(volume).count() as u64 != count {
            return Err(refuse("its metadata has no sane number of segments".into()));
        }
        for segment in segments(volume) {
            let kind = segment.text("type").unwrap_or("unknown");
            if kind != "striped" && kind != "linear" {
                let kind = kind.split('+').next().unwrap_or_default();
                let kind: String = kind.chars().take(40).collect();
                return Err((format!("lvm-{kind}"), format!("LVM {kind} volume: not read")));
            }
        }
        let parts = segments(volume).map(|segment| self.segment(segment, extent, sources));
        let parts = parts.collect::<std::result::Result<Vec<_>, _>>().map_err(refuse)?;
        let whole = LogicalVolume::new(parts).map_err(|error| refuse(error.message))?;
        Ok(Arc::new(whole))
    }

    fn segment(
        &self,
        segment: &Section,
        extent: u64,
        sources: &BTreeMap<&str, Vec<&Arc<dyn Source>>>,
    ) -> std::result::Result<Segment, String> {
        let bytes = |name: &str| segment.number(name).and_then(|n| n.checked_mul(extent));
        let range = bytes("start_extent").zip(bytes("extent_count"));
        let (start, length) = range.ok_or("a segment without a sane range")?;
        let list = segment.list("stripes");
        let width = list.len() / 2;
        if width == 0 || width > STRIPES_MAX || list.len() != 2 * width {
            return Err(format!("a segment with {width} stripes"));
        }
        let mut stripes = Vec::with_capacity(width);
        for pair in list.chunks_exact(2) {
            let [Value::Text(name), Value::Number(number)] = pair else {
                return Err("a stripe without a place".into());
            };
            stripes.push(self.stripe(name, *number, extent, sources)?);
        }
        let chunk = match segment.number("stripe_size").and_then(|n| n.checked_mul(SECTOR)) {
            _ if width == 1 => length,
            Some(chunk) => chunk,
            None => return Err("a striped segment without a stripe size".into()),
        };
        Ok(Segment { start, length, chunk, stripes })
    }

    fn stripe(
        &self,
        name: &str,
        number: i64,
        extent: u64,
        sources: &BTreeMap<&str, Vec<&Arc<dyn Source>>>,
    ) -> std::result::Result<Stripe, String> {
        let pv = self.section.section("physical_volumes").and_then(|all| all.section(name));
        let pv = pv.ok_or_else(|| format!("it lies on {name}, which is no physical volume"))?;
        let id = pv.text("id").unwrap_or_default();
        let source = match sources.get(id.replace('-', "").as_str()).map(Vec::as_slice) {
            Some([source]) => Arc::clone(source),
            Some([_, _, ..]) => {
                return Err(format!("several physical volumes have the id {id}: none is believed"));
            }
            _ => return Err(format!("physical volume {id} is missing")),
        };
        let first = pv.number("pe_start").and_then(|n| n.checked_mul(SECTOR));
        let within = u64::try_from(number).ok().and_then(|n| n.checked_mul(extent));
        let start = first.zip(within).and_then(|(first, within)| first.checked_add(within));
        Ok(Stripe { source, start: start.ok_or("a stripe without a sane place")? })
    }
}

/// The segments of a logical volume.
fn segments(volume: &Section) -> impl Iterator<Item = &Section> {
    volume.0.iter().filter_map(|(name, value)| match value {
        Value::Section(segment) if name.starts_with("segment") => Some(segment),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crc;
    use crate::source::MemoryDisk;

    const AREA: usize = 4096;
    const AREA_SIZE: usize = 16 << 10;
    const IDS: [&str; 2] =
        ["aaaaaa-aaaa-aaaa-aaaa-aaaa-aaaa-aaaaaa", "bbbbbb-bbbb-bbbb-bbbb-bbbb-bbbb-bbbbbb"];

    fn put(bytes: &mut [u8], at: usize, what: &[u8]) {
        bytes[at..at + what.len()].copy_from_slice(what);
    }

    /// A physical volume of 64 KiB whose text begins at `start` of its area.
    fn pv(number: usize, text: &str, start: usize) -> Vec<u8> {
        let sum = |bytes: &[u8]| crc::update(0xf597_a6cf, bytes).to_le_bytes();
        let mut disk = vec![0; 64 << 10];
        put(&mut disk, 512, b"LABELONE\x01\0\0\0\0\0\0\0\0\0\0\0\x20\0\0\0LVM2 001");
        put(&mut disk, 512 + 32, IDS[number].replace('-', "").as_bytes());
        let areas = [20_480, 0, 0, 0, AREA as u64, AREA_SIZE as u64];
        for (index, word) in areas.iter().enumerate() {
            put(&mut disk, 512 + 72 + 8 * index, &word.to_le_bytes());
        }
        let label = sum(&disk[532..1024]);
        put(&mut disk, 512 + 16, &label);
        put(&mut disk, AREA + 4, b" LVM2 x[5A%r0N*>\x01");
        put(&mut disk, AREA + 24, &(AREA as u64).to_le_bytes());
        put(&mut disk, AREA + 32, &(AREA_SIZE as u64).to_le_bytes());
        put(&mut disk, AREA + 40, &(start as u64).to_le_bytes());
        put(&mut disk, AREA + 48, &(text.len() as u64).to_le_bytes());
        put(&mut disk, AREA + 56, &sum(text.as_bytes()));
        let header = sum(&disk[AREA + 4..AREA + 512]);
        put(&mut disk, AREA, &header);
        for (index, byte) in text.bytes().enumerate() {
            let at = start + index;
            let at = if at < AREA_SIZE { at } else { at - AREA_SIZE + 512 };
            disk[AREA + at] = byte;
        }
        disk
    }

    /// A group of two physical volumes with extents of 4 KiB.
    fn group(sequence: u64, volumes: &str) -> String {
        let pv = |number: usize| {
            let id = IDS[number];
            format!("pv{number} {{ id = \"{id}\" pe_start = 40 pe_count = 11 }}\n")
        };
        format!(
            "vg {{ id = \"group\" seqno = {sequence} extent_size = 8\nphysical_volumes {{ {}{} }}\n\
             logical_volumes {{ {volumes} }} }}\n",
            pv(0),
            pv(1)
        )
    }

    fn lv(name: &str, kind: &str, more: &str) -> String {
        format!(
            "{name} {{ status = [\"READ\", \"VISIBLE\"] segment_count = 1 segment1 {{ start_extent = 0 \
             extent_count = 2 type = \"{kind}\" {more} }} }}\n"
        )
    }

    const LINEAR: &str = "stripe_count = 1 stripes = [ \"pv1\", 3 ]";
    const STRIPED: &str = "stripe_count = 2 stripe_size = 2 stripes = [ \"pv0\", 1, \"pv1\", 0 ]";

    fn member_of(disk: u32, bytes: Vec<u8>) -> Member {
        let disk: Arc<dyn Source> = Arc::new(MemoryDisk { bytes, disk });
        member(&disk).unwrap().unwrap()
    }

    fn both(text: &str) -> Assembly {
        assemble(&[member_of(0, pv(0, text, 512)), member_of(1, pv(1, text, 512))])
    }

    fn refusal(assembly: &Assembly) -> &str {
        &assembly.volumes[0].source.as_ref().err().unwrap().1
    }

    #[test]
    fn linear_and_striped_volumes_lie_where_the_text_says() {
        let text = group(1, &(lv("a", "striped", LINEAR) + &lv("b", "striped", STRIPED)));
        let assembly = both(&text);
        let mut found = Vec::new();
        for volume in &assembly.volumes {
            let source = volume.source.as_ref().ok().unwrap();
            assert_eq!(source.size(), volume.size);
            source.trace(0, 4096, &mut |r| found.push((r.disk, r.offset, r.length)));
        }
        let start = 20_480;
        let row = [
            (0, start + 4096, 1024),
            (1, start, 1024),
            (0, start + 5120, 1024),
            (1, start + 1024, 1024),
        ];
        assert_eq!(found[0], (1, start + 3 * 4096, 4096));
        assert_eq!(found[1..], row);
    }

    #[test]
    fn the_newest_text_counts_even_where_it_starts_over_at_the_end_of_its_area() {
        let old = group(7, &lv("old", "striped", LINEAR));
        let new = group(8, &lv("new", "striped", LINEAR));
        let disks = [member_of(0, pv(0, &new, AREA_SIZE - 99)), member_of(1, pv(1, &old, 600))];
        let assembly = assemble(&disks);
        assert_eq!(assembly.volumes.len(), 1);
        assert_eq!(assembly.volumes[0].name, "new");
        assert!(assembly.volumes[0].source.is_ok());
        assert!(assembly.notes.is_empty() && assembly.unused.is_empty());
    }

    #[test]
    fn missing_and_doubled_physical_volumes_refuse_what_lies_on_them_by_id() {
        let text = group(1, &lv("a", "striped", LINEAR));
        let assembly = assemble(&[member_of(0, pv(0, &text, 512))]);
        assert_eq!(refusal(&assembly), format!("physical volume {} is missing", IDS[1]));
        let disks = [0, 1, 2].map(|n| member_of(n, pv(n.min(1) as usize, &text, 512)));
        let assembly = assemble(&disks);
        assert!(refusal(&assembly).contains("several physical volumes have the id bbbbbb-"));
    }

    #[test]
    fn other_kinds_are_refused_by_name() {
        for kind in ["raid1", "mirror", "thin", "thin-pool", "cache", "vdo", "zero", "error"] {
            let assembly = both(&group(1, &lv("a", kind, "")));
            assert_eq!(refusal(&assembly), format!("LVM {kind} volume: not read"));
            assert_eq!(assembly.volumes[0].size, 8192);
        }
    }

    #[test]
    fn the_store_of_a_snapshot_is_refused_and_its_origin_is_read() {
        let hidden = "snapshot0 { status = [\"READ\"] segment_count = 1 segment1 { start_extent = 0 \
                      extent_count = 2 type = \"snapshot\" origin = \"b\" cow_store = \"a\" } }";
        let volumes = lv("a", "striped", LINEAR) + &lv("b", "striped", STRIPED) + hidden;
        let assembly = both(&group(1, &volumes));
        assert!(refusal(&assembly).contains("LVM snapshot"));
        assert_eq!(assembly.volumes.len(), 2);
        assert!(assembly.volumes[1].source.is_ok());
    }

    #[test]
    fn a_physical_volume_without_a_readable_text_is_unused_and_says_why() {
        let text = group(1, &lv("a", "striped", LINEAR));
        let mut bytes = pv(0, &text, 512);
        bytes[AREA + 520] ^= 1;
        let assembly = assemble(&[member_of(0, bytes)]);
        assert!(assembly.volumes.is_empty());
        assert_eq!(assembly.unused.len(), 1);
        assert!(assembly.notes[0].contains("checksum of its text"));
    }

    #[test]
    fn a_group_without_logical_volumes_is_told() {
        let hidden = "gone { status = [\"READ\"] segment_count = 0 }";
        for volumes in ["", hidden] {
            let assembly = both(&group(1, volumes));
            assert_eq!(assembly.notes, ["volume group vg: no logical volumes"]);
            assert!(assembly.volumes.is_empty() && assembly.unused.is_empty());
        }
    }

    #[test]
    fn no_damage_makes_it_panic_loop_or_reach_outside() {
        let text = group(1, &(lv("a", "striped", LINEAR) + &lv("b", "striped", STRIPED)));
        let mut state: u64 = 42;
        let mut dice = |bound: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            usize::try_from(state >> 11).unwrap() % bound
        };
        let sound = pv(1, &text, 512);
        for round in 0..5_000 {
            let mut changed = text.clone().into_bytes();
            let mut disk = sound.clone();
            if round % 2 == 0 {
                // Texts whose checksums hold, whatever they say.
                for _ in 0..=dice(4) {
                    let at = dice(changed.len());
                    changed[at] = b"0123456789{}[]\"=, #ax-"[dice(22)];
                }
                disk = pv(1, std::str::from_utf8(&changed).unwrap(), 512);
            } else {
                for _ in 0..=dice(4) {
                    let at = [512, AREA][dice(2)] + dice(512);
                    disk[at] = dice(256).to_le_bytes()[0];
                }
            }
            let disk: Arc<dyn Source> = Arc::new(MemoryDisk { bytes: disk, disk: 1 });
            let Ok(Some(member)) = member(&disk) else { continue };
            let other = member_of(0, pv(0, &group(0, ""), 512));
            for volume in assemble(&[other, member]).volumes {
                let Ok(source) = volume.source else { continue };
                let mut buf = [0; 512];
                source.read_at(&mut buf, 0).unwrap();
                source.read_at(&mut buf, source.size() - 512).unwrap();
                source.trace(source.size() - 512, u64::MAX, &mut |range| {
                    assert!(range.offset + range.length <= 64 << 10);
                });
            }
        }
    }
}
