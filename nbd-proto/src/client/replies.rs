//! Requests out, replies in.

use crate::codes::{CommandType, ReplyType, magic};
use crate::error::{Errno, ProtocolError};
use crate::flags::{CommandFlags, ReplyFlags};
use crate::request::RequestHeader;
use crate::wire::Reader;
use crate::{MAX_STRING, Mode};

/// Longest chunk that is taken into memory whole (everything but data), in bytes.
const MAX_CHUNK: u64 = 2 << 20;

/// Content of a structured or extended chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Chunk {
    /// Nothing.
    None,
    /// `length` bytes read at `offset` follow.
    Data {
        /// First byte.
        offset: u64,
        /// Bytes that follow.
        length: u64,
    },
    /// Zeroes.
    Hole {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        length: u32,
    },
    /// The request failed.
    Error {
        /// The error.
        errno: Errno,
        /// The server's sentence.
        text: String,
        /// The byte at which it struck.
        at: Option<u64>,
    },
    /// Extents of a metadata context, as (length, flags).
    Status {
        /// The context's id.
        context: u32,
        /// The extents.
        extents: Vec<(u64, u64)>,
    },
}

/// One message of the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// A simple reply; the data of a successful read follows.
    Simple {
        /// The request.
        cookie: u64,
        /// The error, if it failed.
        error: Option<Errno>,
    },
    /// A chunk of a structured or extended reply.
    Chunk {
        /// The request.
        cookie: u64,
        /// It is the last one.
        done: bool,
        /// What it holds.
        chunk: Chunk,
    },
}

/// Appends a request header. A write's payload is to follow it.
pub fn encode_request(
    mode: Mode,
    command: CommandType,
    flags: CommandFlags,
    cookie: u64,
    (offset, length): (u64, u64),
    out: &mut Vec<u8>,
) {
    let extended = mode == Mode::Extended;
    let payload = extended && command == CommandType::Write;
    let flags = flags.with_if(payload, CommandFlags::PAYLOAD_LEN);
    let header = RequestHeader { flags, command: command.code(), cookie, offset, length };
    header.encode(extended, out);
}

/// Reads the message at the start of `input`: it and its length, without the data that follows it;
/// `None` while it is incomplete. `max_payload` bounds the data of one chunk.
///
/// # Errors
/// When the server breaks the protocol.
pub fn decode_reply(
    mode: Mode,
    max_payload: u32,
    input: &[u8],
) -> Result<Option<(Reply, usize)>, ProtocolError> {
    let mut reader = Reader(input);
    let Some(number) = reader.u32() else {
        return Ok(None);
    };
    match (number, mode) {
        (magic::SIMPLE_REPLY, Mode::Simple | Mode::Structured) => {
            let (Some(error), Some(cookie)) = (reader.u32(), reader.u64()) else {
                return Ok(None);
            };
            Ok(Some((Reply::Simple { cookie, error: Errno::from_code(error) }, 16)))
        }
        (magic::STRUCTURED_REPLY, Mode::Structured) | (magic::EXTENDED_REPLY, Mode::Extended) => {
            decode_chunk(reader, mode == Mode::Extended, u64::from(max_payload), input.len())
        }
        _ => Err(ProtocolError::new(format!("reply magic {number:#010x} is wrong"))),
    }
}

fn decode_chunk(
    mut reader: Reader<'_>,
    extended: bool,
    max_payload: u64,
    total: usize,
) -> Result<Option<(Reply, usize)>, ProtocolError> {
    let header = (|| {
        let (flags, kind, cookie) = (reader.u16()?, reader.u16()?, reader.u64()?);
        let length = if extended {
            reader.u64()?;
            reader.u64()?
        } else {
            u64::from(reader.u32()?)
        };
        Some((ReplyFlags(flags), kind, cookie, length))
    })();
    let Some((flags, code, cookie, length)) = header else {
        return Ok(None);
    };
    let kind = ReplyType::from_code(code);
    let whole = match kind {
        Some(ReplyType::OffsetData) => {
            if length <= 8 || length - 8 > max_payload {
                return Err(ProtocolError::new(format!("a data chunk of {length} bytes")));
            }
            8
        }
        _ if length > MAX_CHUNK => {
            return Err(ProtocolError::new(format!("a reply chunk of {length} bytes")));
        }
        _ => length,
    };
    #[allow(clippy::cast_possible_truncation, reason = "at most MAX_CHUNK")]
    let Some(data) = reader.bytes(whole as usize) else {
        return Ok(None);
    };
    let chunk = decode_content(kind, code, data, length)
        .ok_or_else(|| ProtocolError::new(format!("a malformed reply chunk of type {code:#x}")))?;
    let done = flags.contains(ReplyFlags::DONE);
    Ok(Some((Reply::Chunk { cookie, done, chunk }, total - reader.0.len())))
}

fn decode_content(kind: Option<ReplyType>, code: u16, data: &[u8], length: u64) -> Option<Chunk> {
    let mut reader = Reader(data);
    let chunk = match kind {
        Some(ReplyType::None) => Chunk::None,
        Some(ReplyType::OffsetData) => Chunk::Data { offset: reader.u64()?, length: length - 8 },
        Some(ReplyType::OffsetHole) => Chunk::Hole { offset: reader.u64()?, length: reader.u32()? },
        Some(ReplyType::BlockStatus) => {
            let context = reader.u32()?;
            let mut extents = Vec::with_capacity(reader.0.len() / 8);
            while !reader.is_empty() {
                extents.push((u64::from(reader.u32()?), u64::from(reader.u32()?)));
            }
            (!extents.is_empty()).then_some(Chunk::Status { context, extents })?
        }
        Some(ReplyType::BlockStatusExt) => {
            let (context, count) = (reader.u32()?, reader.u32()? as usize);
            let mut extents = Vec::with_capacity(reader.0.len() / 16);
            while !reader.is_empty() {
                extents.push((reader.u64()?, reader.u64()?));
            }
            (count == extents.len() && count > 0).then_some(Chunk::Status { context, extents })?
        }
        // Error types that this version does not know start like the ones it knows.
        Some(ReplyType::Error | ReplyType::ErrorOffset) | None if code & 0x8000 != 0 => {
            let errno = Errno::from_code(reader.u32()?)?;
            let length = usize::from(reader.u16()?);
            let text = reader.bytes(length).filter(|text| text.len() <= MAX_STRING)?;
            let text = String::from_utf8_lossy(text).into_owned();
            let at = match kind {
                Some(ReplyType::ErrorOffset) => Some(reader.u64()?),
                _ => None,
            };
            if kind.is_none() {
                reader = Reader(&[]);
            }
            Chunk::Error { errno, text, at }
        }
        _ => return None,
    };
    reader.is_empty().then_some(chunk)
}
