//! Names of any bytes as text, and back.
//!
//! A name is shown as it is. Two things are not: a byte that is no UTF-8 is `\xNN` (NN from `80` to
//! `ff`), and a backslash is doubled where it would otherwise read as the start of such an escape. So
//! nearly every name stays plain, `dev-disk-by\x2duuid.swap` of systemd too, and `parse` finds the same
//! bytes again for every name and path.

/// A name or a path as text.
pub fn shown(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for (at, chunk) in chunks(bytes) {
        let valid = chunk.valid();
        for (index, c) in valid.char_indices() {
            text.push(c);
            if c == '\\' && escapes(bytes.get(at + index + 1..).unwrap_or_default()) {
                text.push('\\');
            }
        }
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

/// The bytes that a text from [`shown`] stands for. A backslash that starts no escape is itself.
pub fn parse(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        if first != b'\\' {
            bytes.push(first);
        } else if let Some(byte) = high_byte(after) {
            bytes.push(byte);
            rest = after.get(3..).unwrap_or_default();
        } else {
            bytes.push(b'\\');
            if after.first() == Some(&b'\\') {
                rest = after.get(1..).unwrap_or_default();
            }
        }
    }
    bytes
}

/// A name or path as text of one line: what [`shown`] gives, with control characters as `\u{..}`. For
/// reports and messages, where a line break in a name must not start a line.
pub fn line(bytes: &[u8]) -> String {
    let mut text = String::new();
    for c in shown(bytes).chars() {
        if c.is_control() {
            text.extend(c.escape_default());
        } else {
            text.push(c);
        }
    }
    text
}

/// Pieces of `bytes` with where each starts.
fn chunks(bytes: &[u8]) -> impl Iterator<Item = (usize, std::str::Utf8Chunk<'_>)> {
    let mut at = 0;
    bytes.utf8_chunks().map(move |chunk| {
        let start = at;
        at += chunk.valid().len() + chunk.invalid().len();
        (start, chunk)
    })
}

/// Whether what follows a backslash makes it look like the start of an escape.
fn escapes(after: &[u8]) -> bool {
    if after.first() == Some(&b'\\') || high_byte(after).is_some() {
        return true;
    }
    // A byte that will be escaped comes next.
    after.utf8_chunks().next().is_some_and(|chunk| chunk.valid().is_empty())
}

/// `x80` to `xff` at the start of `text`.
fn high_byte(text: &[u8]) -> Option<u8> {
    let [b'x', high, low, ..] = *text else { return None };
    let digit = |c: u8| char::from(c).to_digit(16).and_then(|d| u8::try_from(d).ok());
    let byte = digit(high)? << 4 | digit(low)?;
    (byte >= 0x80).then_some(byte)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;

    #[test]
    fn plain_names_stay_plain() {
        for name in ["a b", "grün", "100%", r"C:\dir", r"dev-disk-by\x2duuid.swap", r"\xzz", "a\nb"]
        {
            assert_eq!(shown(name.as_bytes()), name);
            assert_eq!(parse(name), name.as_bytes());
        }
        assert_eq!(shown(b"caf\xe9"), r"caf\xe9");
        assert_eq!(shown(br"caf\xe9"), r"caf\\xe9");
        assert_eq!(shown(b"a\\\xff"), r"a\\\xff");
        assert_eq!(line(b"a\nb\\"), r"a\nb\");
    }

    proptest! {
        #[test]
        fn every_name_comes_back(name in prop_oneof![
            vec(any::<u8>(), 0..12),
            vec(select(b"\\\\x8f0/\xe9\xc3\xa9".to_vec()), 0..12),
        ]) {
            prop_assert_eq!(parse(&shown(&name)), name);
        }
    }
}
