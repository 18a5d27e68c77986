//! Parts of a file over HTTP (RFC 9110): ranges, entity tags, names of attachments.

use axum::http::{HeaderMap, header};
use sha2::{Digest, Sha256};

/// Bytes of a hash that make an entity tag.
const TAG: usize = 16;

/// What is sent of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// All of it.
    Whole,
    /// So many bytes from an offset on; never none.
    Bytes {
        /// First byte.
        offset: u64,
        /// How many.
        length: u64,
    },
    /// The file ends before what was asked for.
    Outside,
}

/// What is asked for of a file of `size` bytes whose entity tag is `tag`. A range that is malformed,
/// in another unit, or several of them, are as none: the answer is the whole file.
pub(super) fn part(headers: &HeaderMap, tag: &str, size: u64) -> Part {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let Some(range) = text(header::RANGE) else { return Part::Whole };
    // A date, or a weak tag, is no proof that the file is the same.
    if headers.contains_key(header::IF_RANGE) && text(header::IF_RANGE).map(str::trim) != Some(tag)
    {
        return Part::Whole;
    }
    parse(range, size).unwrap_or(Part::Whole)
}

fn parse(range: &str, size: u64) -> Option<Part> {
    let (unit, set) = range.split_once('=')?;
    if !unit.trim().eq_ignore_ascii_case("bytes") || set.contains(',') {
        return None;
    }
    let (first, last) = set.trim().split_once('-')?;
    let digits = |text: &str| -> Option<u64> {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        // A number that is too large for us lies outside of any file.
        digits.then(|| text.parse().unwrap_or(u64::MAX))
    };
    let (offset, end) = match (first, last) {
        ("", suffix) => (size.saturating_sub(digits(suffix)?), size),
        (first, "") => (digits(first)?, size),
        (first, last) => {
            let (first, last) = (digits(first)?, digits(last)?);
            if first > last {
                return None;
            }
            (first, last.saturating_add(1).min(size))
        }
    };
    match end.checked_sub(offset) {
        None | Some(0) => Some(Part::Outside),
        Some(length) => Some(Part::Bytes { offset, length }),
    }
}

/// A strong entity tag of what these words tell apart.
pub(super) fn entity_tag(words: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for word in words {
        hash.update((word.len() as u64).to_le_bytes());
        hash.update(word);
    }
    let hex: String = hash.finalize().iter().take(TAG).map(|byte| format!("{byte:02x}")).collect();
    format!("\"{hex}\"")
}

/// `Content-Disposition` for a file with this name (RFC 6266, RFC 8187). The name is a guest's: what
/// could end the header, or means something in a path, does not come through.
pub(super) fn attachment(name: &[u8]) -> String {
    let text = String::from_utf8_lossy(name);
    let safe = |c: char| if matches!(c, '/' | '\\') || c.is_control() { '_' } else { c };
    let text: String = text.chars().map(safe).collect();
    let plain = |c: char| if c.is_ascii() && !matches!(c, '"' | '%') { c } else { '_' };
    let ascii: String = text.chars().map(plain).collect();
    let mut encoded = String::new();
    for byte in text.bytes() {
        // attr-char of RFC 8187.
        if byte.is_ascii_alphanumeric() || b"!#$&+-.^_`|~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    format!("attachment; filename=\"{ascii}\"; filename*=UTF-8''{encoded}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_range_is_understood_and_what_is_none_is_as_if_it_were_not_there() {
        let bytes = |offset, length| Part::Bytes { offset, length };
        for (range, expected) in [
            ("bytes=0-0", bytes(0, 1)),
            ("bytes=10-19", bytes(10, 10)),
            ("BYTES = 10-", bytes(10, 90)),
            ("bytes=90-1000", bytes(90, 10)),
            ("bytes=-5", bytes(95, 5)),
            ("bytes=-1000", bytes(0, 100)),
            ("bytes=99-99999999999999999999999", bytes(99, 1)),
            ("bytes=100-", Part::Outside),
            ("bytes=99999999999999999999999-", Part::Outside),
            ("bytes=-0", Part::Outside),
            ("bytes=5-4", Part::Whole),
            ("bytes=0-1,5-6", Part::Whole),
            ("lines=0-1", Part::Whole),
            ("bytes=a-b", Part::Whole),
            ("bytes=-", Part::Whole),
            ("bytes=+1-2", Part::Whole),
        ] {
            let headers = HeaderMap::from_iter([(header::RANGE, range.parse().unwrap())]);
            assert_eq!(part(&headers, "\"t\"", 100), expected, "{range}");
        }
        assert_eq!(part(&HeaderMap::new(), "\"t\"", 100), Part::Whole);
    }

    #[test]
    fn a_range_counts_only_for_the_file_that_it_was_meant_for() {
        let range = (header::RANGE, "bytes=1-1".parse().unwrap());
        for (tag, expected) in [
            ("\"t\"", Part::Bytes { offset: 1, length: 1 }),
            ("\"u\"", Part::Whole),
            ("W/\"t\"", Part::Whole),
            ("Wed, 21 Oct 2015 07:28:00 GMT", Part::Whole),
        ] {
            let condition = (header::IF_RANGE, tag.parse().unwrap());
            let headers = HeaderMap::from_iter([range.clone(), condition]);
            assert_eq!(part(&headers, "\"t\"", 100), expected, "{tag}");
        }
        let empty = HeaderMap::from_iter([(header::RANGE, "bytes=0-".parse().unwrap())]);
        assert_eq!(part(&empty, "\"t\"", 0), Part::Outside);
    }

    #[test]
    fn tags_tell_apart_what_only_joins_to_the_same() {
        assert_eq!(entity_tag(&[b"a", b"bc"]), entity_tag(&[b"a", b"bc"]));
        assert_ne!(entity_tag(&[b"a", b"bc"]), entity_tag(&[b"ab", b"c"]));
        assert_eq!(entity_tag(&[]).len(), 2 * TAG + 2);
    }

    #[test]
    fn the_name_of_an_attachment_is_whole_and_harmless() {
        assert_eq!(
            attachment("na\u{ef}ve \"x\".txt".as_bytes()),
            "attachment; filename=\"na_ve _x_.txt\"; filename*=UTF-8''na%C3%AFve%20%22x%22.txt"
        );
        let name = attachment(b"a\r\nSet-Cookie: b\\../\xff");
        assert!(name.is_ascii() && !name.contains(['\r', '\n', '\\']), "{name}");
        assert!(name.parse::<axum::http::HeaderValue>().is_ok());
    }
}
