//! Server-sent events (WHATWG HTML, 9.2), as far as the hub sends them.

use std::io::{self, BufRead};

/// Longest line that is taken, in bytes.
const LONGEST: u64 = 16 << 20;

/// Calls `event` with the data of each event until the stream ends, or it says `false`.
///
/// # Errors
/// Those of the stream; `InvalidData` where it is none of events.
pub(super) fn read(
    stream: &mut impl BufRead,
    mut event: impl FnMut(&str) -> bool,
) -> io::Result<()> {
    let mut data = String::new();
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = io::Read::take(&mut *stream, LONGEST).read_until(b'\n', &mut line)?;
        if read == 0 {
            return Ok(());
        }
        let invalid = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text);
        if line.last() != Some(&b'\n') && read as u64 == LONGEST {
            return Err(invalid("the hub sends a line that is too long"));
        }
        let text = std::str::from_utf8(&line).map_err(|_| invalid("the hub sends no text"))?;
        let text = text.trim_end_matches(['\n', '\r']);
        if text.is_empty() {
            if !data.is_empty() && !event(&data) {
                return Ok(());
            }
            data.clear();
        } else if let Some(part) = text.strip_prefix("data:") {
            if data.len() + part.len() > usize::try_from(LONGEST).unwrap_or(usize::MAX) {
                return Err(invalid("the hub sends an event that is too long"));
            }
            if !data.is_empty() {
                data.push('\n');
            }
            data.push_str(part.strip_prefix(' ').unwrap_or(part));
        }
        // Names of events and comments, which keep the connection alive, say nothing more.
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_what_stands_between_empty_lines() {
        let text =
            ": alive\n\nevent: progress\ndata: {\"a\":1}\n\ndata:x\r\ndata: y\r\n\r\ndata: cut";
        let mut seen = Vec::new();
        read(&mut text.as_bytes(), |data| {
            seen.push(data.to_owned());
            true
        })
        .unwrap();
        assert_eq!(seen, ["{\"a\":1}", "x\ny"]);
    }

    #[test]
    fn whoever_has_seen_enough_sees_no_more() {
        let mut count = 0;
        read(&mut "data: 1\n\ndata: 2\n\n".as_bytes(), |_| {
            count += 1;
            false
        })
        .unwrap();
        assert_eq!(count, 1);
    }
}
