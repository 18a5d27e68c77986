//! Where links point as the host sees them.

/// A link's target so that it stays in its volume, `depth` directories below whose root the link is.
///
/// A relative one with `..` at its beginning only is as it is, unless it leads above the root: that has no
/// parent but itself. An absolute one becomes relative to the root. `..` behind a name is taken together
/// with that name, because where the name is a link, the kernel would go up from where that leads to. So
/// what is left goes up at most to the root and then down, and stays inside whatever it meets.
pub(super) fn inside(target: &[u8], depth: usize) -> Vec<u8> {
    let absolute = target.starts_with(b"/");
    let mut up = if absolute { depth } else { 0 };
    let mut down: Vec<&[u8]> = Vec::new();
    let mut changed = absolute;
    for part in target.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." if down.pop().is_some() => changed = true,
            b".." if up < depth => up += 1,
            b".." => changed = true,
            name => down.push(name),
        }
    }
    if !changed && !target.is_empty() {
        return target.to_vec();
    }
    let parts: Vec<&[u8]> = std::iter::repeat_n(&b".."[..], up).chain(down).collect();
    if parts.is_empty() { b".".to_vec() } else { parts.join(&b'/') }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_stay_in_their_volume() {
        for (target, depth, wanted) in [
            ("hosts", 1, "hosts"),
            ("../usr//lib/", 1, "../usr//lib/"),
            ("/etc/passwd", 0, "etc/passwd"),
            ("/etc/passwd", 2, "../../etc/passwd"),
            ("/", 0, "."),
            ("/", 1, ".."),
            ("/../../x", 1, "../x"),
            ("../../../etc/shadow", 1, "../etc/shadow"),
            ("..", 0, "."),
            ("a/../../..", 1, ".."),
            ("a/b/../c", 5, "a/c"),
            ("", 3, "."),
        ] {
            assert_eq!(String::from_utf8(inside(target.as_bytes(), depth)).unwrap(), wanted);
        }
    }
}
