//! Which names and links may be in an archive.

/// Names that mean devices to Windows, whatever follows a point.
const DEVICES: [&str; 6] = ["CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"];
/// Those with a digit behind them.
const NUMBERED: [&str; 2] = ["COM", "LPT"];

/// A name that every system can have as one component: bytes that Windows forbids, that are no UTF-8,
/// or that make a name a device's become `%XX`, and so does `%` in a name that is changed. `None` where
/// nothing has to be changed. Different names stay different among those that are changed.
pub(super) fn windows(name: &[u8]) -> Option<Vec<u8>> {
    let device = is_device(name);
    let last = name.len().saturating_sub(1);
    let mut bad = vec![false; name.len()];
    let mut at = 0;
    for chunk in name.utf8_chunks() {
        for (index, byte) in chunk.valid().bytes().enumerate() {
            let place = at + index;
            let forbidden = byte < 0x20 || byte == 0x7f || b"<>:\"|?*\\/".contains(&byte);
            let trailing = place == last && (byte == b'.' || byte == b' ');
            mark(&mut bad, place, forbidden || trailing || (device && place == 0));
        }
        at += chunk.valid().len();
        for _ in chunk.invalid() {
            mark(&mut bad, at, true);
            at += 1;
        }
    }
    if !bad.contains(&true) {
        return None;
    }
    let mut safe = Vec::with_capacity(name.len() + 8);
    for (byte, bad) in name.iter().zip(bad) {
        if bad || *byte == b'%' {
            safe.extend_from_slice(format!("%{byte:02X}").as_bytes());
        } else {
            safe.push(*byte);
        }
    }
    Some(safe)
}

fn mark(bad: &mut [bool], at: usize, value: bool) {
    if let Some(place) = bad.get_mut(at) {
        *place = value;
    }
}

fn is_device(name: &[u8]) -> bool {
    let stem = name.split(|b| *b == b'.').next().unwrap_or_default();
    let stem = String::from_utf8_lossy(stem).trim_end_matches(' ').to_uppercase();
    let numbered = |prefix: &&str| {
        let mut rest = stem.strip_prefix(*prefix).unwrap_or_default().chars();
        matches!((rest.next(), rest.next()), (Some('0'..='9' | '¹' | '²' | '³'), None))
    };
    DEVICES.contains(&stem.as_str()) || NUMBERED.iter().any(numbered)
}

/// Whether a link stays inside what is archived, whatever other links that stay inside it meets:
/// relative, with `..` at the beginning only, and not above the top. `depth` is how far below the top
/// the link's directory is.
pub(super) fn link_stays_inside(target: &[u8], depth: usize) -> bool {
    if target.is_empty() || target.starts_with(b"/") || target.contains(&0) {
        return false;
    }
    // Windows would read these as ways from a root or a drive.
    if target.contains(&b'\\') || target.get(1) == Some(&b':') {
        return false;
    }
    let mut up = 0;
    let mut down = false;
    for part in target.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." if down => return false,
            b".." => up += 1,
            _ => down = true,
        }
    }
    up <= depth
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_what_every_system_can_have() {
        let safe = |name: &[u8]| windows(name).map(|n| String::from_utf8(n).unwrap());
        for name in ["a", "100%", "grün", "com", "COM10", "console", ".profile", " a"] {
            assert_eq!(safe(name.as_bytes()), None, "{name}");
        }
        for (name, wanted) in [
            (&b"a:b"[..], "a%3Ab"),
            (b"..\\..\\x", "..%5C..%5Cx"),
            (b"dot.", "dot%2E"),
            (b"nul.txt", "%6Eul.txt"),
            (b"LPT1", "%4CPT1"),
            (b"50% \xff", "50%25 %FF"),
            ("com¹".as_bytes(), "%63om¹"),
        ] {
            assert_eq!(safe(name).as_deref(), Some(wanted));
        }
    }

    #[test]
    fn only_links_that_cannot_lead_out_are_kept() {
        for (target, depth) in [("a", 0), ("../a", 1), ("./../../a/b", 2), ("a//b/.", 0), (".", 0)]
        {
            assert!(link_stays_inside(target.as_bytes(), depth), "{target}");
        }
        for (target, depth) in [
            ("/etc", 9),
            ("..", 0),
            ("../../a", 1),
            ("a/../b", 5),
            ("", 0),
            ("C:x", 3),
            ("a\\b", 3),
        ] {
            assert!(!link_stays_inside(target.as_bytes(), depth), "{target}");
        }
    }
}
