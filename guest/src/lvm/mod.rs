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
        if let Err(error) = group.volumes(&sources, &mut assembly) {
            assembly.notes.push(format!("volume group {}: {error}", group.name));
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
        let stores: Vec<&str> = self
            .section
            .sections("logical_volumes")
            .flat_map(|(_, volume)| volume.0.values())
            .filter_map(|value| match value {
                Value::Section(segment) => segment.text("cow_store"),
                _ => None,
            })
            .collect();
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
