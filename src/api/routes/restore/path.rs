//! Paths of guests in addresses and answers.
//!
//! A path is `/VOLUME/DIRECTORY/NAME`, and `/` has the volumes in it. Names are bytes, and told as text
//! by [`names`]. An address takes that text, and just as well the bytes themselves, percent-encoded.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;

use crate::api::error::{ApiError, invalid};
use crate::restore::files::names;

/// Longest path that is taken, in bytes.
const LONGEST: usize = 16 << 10;

/// A path as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct GuestPath {
    /// The volume; nothing for `/`, which has the volumes in it.
    pub(super) volume: Option<String>,
    /// The path inside, from the volume's root on; begins with `/`.
    pub(super) inside: Vec<u8>,
}

impl GuestPath {
    /// What all volumes lie in.
    pub(super) fn root() -> Self {
        Self { volume: None, inside: b"/".to_vec() }
    }

    /// Takes a path apart.
    ///
    /// # Errors
    /// A sentence: it does not begin with `/`, has `..` or NUL in it, or is too long. `.` and
    /// repeated slashes mean nothing.
    pub(super) fn parse(path: &[u8]) -> Result<Self, String> {
        let shown = names::line(path.get(..LONGEST).unwrap_or(path));
        if path.len() > LONGEST {
            return Err(format!("the path has {} bytes, {LONGEST} at most are taken", path.len()));
        }
        if path.first() != Some(&b'/') {
            return Err(format!("'{shown}' is no path: it begins with /, and a volume's name"));
        }
        if path.contains(&0) {
            return Err("a path has no NUL in it".into());
        }
        let mut parts =
            path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".");
        let mut found = Self::root();
        let Some(volume) = parts.next() else { return Ok(found) };
        let mut inside = Vec::with_capacity(path.len());
        for part in std::iter::once(volume).chain(parts) {
            if part == b".." {
                return Err(format!("'{shown}' has '..' in it, which is not followed"));
            }
            inside.push(b'/');
            inside.extend_from_slice(part);
        }
        found.volume = Some(String::from_utf8_lossy(volume).into_owned());
        inside.drain(..=volume.len());
        if !inside.is_empty() {
            found.inside = inside;
        }
        Ok(found)
    }
}

/// The path in the query of an address, as its bytes.
pub(super) struct AskedPath(pub(super) Option<GuestPath>);

impl AskedPath {
    /// The path that must be there.
    pub(super) fn needed(self) -> Result<GuestPath, ApiError> {
        self.0.ok_or_else(|| invalid("`path` is missing: /VOLUME/PATH"))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for AskedPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        let query = parts.uri.query().unwrap_or_default();
        let given = query.split('&').find_map(|pair| pair.strip_prefix("path="));
        let Some(text) = given.filter(|text| !text.is_empty()) else { return Ok(Self(None)) };
        let mut bytes = decode(text);
        if let Ok(text) = std::str::from_utf8(&bytes) {
            bytes = names::parse(text);
        }
        GuestPath::parse(&bytes).map(|path| Self(Some(path))).map_err(invalid)
    }
}

/// What stands percent-encoded in a query. What is no encoding stays as it is.
fn decode(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        let digit = |at: usize| char::from(*after.get(at)?).to_digit(16);
        out.push(match (byte, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => {
                rest = after.get(2..).unwrap_or_default();
                u8::try_from(high * 16 + low).unwrap_or(byte)
            }
            (b'+', ..) => b' ',
            _ => byte,
        });
    }
    out
}

/// The path of something in a volume, from the mount's root on, as text.
pub(super) fn told(volume: &str, inside: &[u8]) -> String {
    let inside = if inside == b"/" { b"" } else { inside };
    format!("/{volume}{}", names::shown(inside))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(path: &str) -> (Option<String>, String) {
        let path = GuestPath::parse(path.as_bytes()).unwrap();
        (path.volume, String::from_utf8(path.inside).unwrap())
    }

    #[test]
    fn a_path_is_a_volume_and_what_is_in_it() {
        let disk = || Some("disk0".to_owned());
        assert_eq!(parsed("/"), (None, "/".into()));
        assert_eq!(parsed("/./"), (None, "/".into()));
        assert_eq!(parsed("/disk0"), (disk(), "/".into()));
        assert_eq!(parsed("/disk0/"), (disk(), "/".into()));
        assert_eq!(parsed("//disk0/.//etc/./hosts/"), (disk(), "/etc/hosts".into()));
    }

    #[test]
    fn what_would_lead_out_of_a_volume_is_refused() {
        for path in ["", "disk0", "/disk0/..", "/..", "/disk0/a/../../b", "/disk0/a\0b"] {
            assert!(GuestPath::parse(path.as_bytes()).is_err(), "{path:?}");
        }
        assert!(GuestPath::parse(&[b'/'; LONGEST + 1]).is_err());
        assert!(GuestPath::parse(b"/disk0/..a/b..").is_ok(), "names may begin and end with dots");
    }

    #[test]
    fn any_bytes_come_through_an_address() {
        let bytes: Vec<u8> = (0..=255).collect();
        let text: String = bytes.iter().map(|byte| format!("%{byte:02x}")).collect();
        assert_eq!(decode(&text), bytes);
        assert_eq!(decode("a+b%2B%zz%4"), b"a b+%zz%4");
        assert_eq!(told("disk0", b"/"), "/disk0");
        assert_eq!(told("disk0", b"/a\xff"), r"/disk0/a\xff");
    }

    #[tokio::test]
    async fn a_name_is_asked_for_as_it_was_told_or_by_its_bytes() {
        for (query, expected) in [
            ("", None),
            ("path=", None),
            ("recursive=true&path=%2Fdisk0%2Fa+b", Some(&b"/a b"[..])),
            ("path=/disk0/caf%5Cxe9", Some(b"/caf\xe9")),
            ("path=/disk0/caf%E9", Some(b"/caf\xe9")),
            ("path=/disk0/caf%C3%A9", Some("/caf\u{e9}".as_bytes())),
        ] {
            let request = axum::http::Request::get(format!("/x?{query}")).body(()).unwrap();
            let (mut parts, ()) = request.into_parts();
            let found = AskedPath::from_request_parts(&mut parts, &()).await.unwrap().0;
            assert_eq!(found.as_ref().map(|path| &*path.inside), expected, "{query}");
        }
    }
}
