//! Addresses of NBD servers as the NBD project writes them (`doc/uri.md`).

use std::path::PathBuf;

use crate::nbd::client::Address;

/// The port of NBD.
const PORT: u16 = 10809;

/// Reads `nbd://host[:port]/export` or `nbd+unix:///export?socket=PATH`; `None` where the text is no
/// URI but a path.
///
/// # Errors
/// A sentence where it is a URI of another kind, or incomplete.
pub(super) fn parse(text: &str) -> Result<Option<(Address, String)>, String> {
    let Some((scheme, rest)) = text.split_once("://") else { return Ok(None) };
    if scheme.contains('/') {
        return Ok(None);
    }
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
    let export = decode(export).ok_or_else(|| format!("'{text}' has a broken % sequence"))?;
    match scheme {
        "nbd" if authority.is_empty() => Err(format!("'{text}' names no host: nbd://host/export")),
        "nbd" if authority.contains('@') => {
            Err(format!("'{text}' names a user; that is for TLS, which is not supported here"))
        }
        "nbd" => Ok(Some((Address::Tcp(with_port(authority)), export))),
        "nbd+unix" => {
            let socket = query.split('&').find_map(|part| part.strip_prefix("socket="));
            let path =
                socket.filter(|path| !path.is_empty()).and_then(decode).ok_or_else(|| {
                    format!("'{text}' names no socket: nbd+unix:///export?socket=PATH")
                })?;
            Ok(Some((Address::Unix(PathBuf::from(path)), export)))
        }
        "nbds" | "nbds+unix" => Err(format!(
            "'{text}' asks for TLS, which is not supported; go through a tunnel, or use nbd://"
        )),
        _ => Err(format!(
            "'{text}' is no source: give a path, nbd://host[:port]/export or \
             nbd+unix:///export?socket=PATH"
        )),
    }
}

fn with_port(authority: &str) -> String {
    // The colons of an IPv6 address are in brackets.
    let after = authority.rsplit_once(']').map_or(authority, |(_, after)| after);
    match after.contains(':') {
        true => authority.to_owned(),
        false => format!("{authority}:{PORT}"),
    }
}

/// Resolves `%41` and the like; `None` where a sequence is broken or the result is no UTF-8.
fn decode(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        let mut digit = || char::from(bytes.next()?).to_digit(16);
        out.push(match byte {
            b'%' => u8::try_from(digit()? * 16 + digit()?).ok()?,
            other => other,
        });
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(address: &str, export: &str) -> Result<Option<(Address, String)>, String> {
        Ok(Some((Address::Tcp(address.into()), export.into())))
    }

    #[test]
    fn uris_name_a_host_or_a_socket() {
        assert_eq!(parse("nbd://host/disk"), tcp("host:10809", "disk"));
        assert_eq!(parse("nbd://host:1/a/b"), tcp("host:1", "a/b"));
        assert_eq!(parse("nbd://[::1]/x%20y"), tcp("[::1]:10809", "x y"));
        assert_eq!(parse("nbd://[::1]:7"), tcp("[::1]:7", ""));
        let unix = Address::Unix("/run/a b.sock".into());
        let expected = Ok(Some((unix, "disk".to_owned())));
        assert_eq!(parse("nbd+unix:///disk?socket=/run/a%20b.sock"), expected);
    }

    #[test]
    fn paths_are_no_uris() {
        for path in ["/dev/vg/disk", "disk.raw", "./a://b", "/x/nbd://y"] {
            assert_eq!(parse(path), Ok(None), "{path}");
        }
    }

    #[test]
    fn what_cannot_be_reached_is_refused_with_the_form_that_can() {
        for (text, word) in [
            ("nbds://host/disk", "TLS"),
            ("nbd://user@host/disk", "TLS"),
            ("nbd:///disk", "nbd://host/export"),
            ("nbd+unix:///disk", "socket=PATH"),
            ("http://host/disk", "give a path"),
            ("nbd://host/%zz", "%"),
        ] {
            assert!(parse(text).unwrap_err().contains(word), "{text}");
        }
    }
}
