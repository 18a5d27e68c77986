//! Requests on the wire ("Request message", extended headers).

use crate::codes::{CommandType, magic};
use crate::error::ProtocolError;
use crate::flags::CommandFlags;
use crate::wire::Reader;

/// Bytes of a compact request header.
pub const COMPACT_REQUEST: usize = 28;
/// Bytes of an extended request header.
pub const EXTENDED_REQUEST: usize = 32;

/// A request as it came or will go, unchecked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHeader {
    /// Flags, known or not.
    pub flags: CommandFlags,
    /// Number of the command, known or not.
    pub command: u16,
    /// The client's name for the request.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Length in bytes: of the effect, or of the payload (`PAYLOAD_LEN`).
    pub length: u64,
}

impl RequestHeader {
    /// Reads one header from the start of `input`; `None` while it is incomplete.
    ///
    /// # Errors
    /// When the magic is wrong: the byte stream has no meaning any more.
    pub fn decode(input: &[u8], extended: bool) -> Result<Option<Self>, ProtocolError> {
        let mut reader = Reader(input);
        let expected = if extended { magic::EXTENDED_REQUEST } else { magic::REQUEST };
        let Some(found) = reader.u32() else {
            return Ok(None);
        };
        if found != expected {
            return Err(ProtocolError::new(format!("request magic {found:#010x} is wrong")));
        }
        let parse = |r: &mut Reader<'_>| {
            Some(Self {
                flags: CommandFlags(r.u16()?),
                command: r.u16()?,
                cookie: r.u64()?,
                offset: r.u64()?,
                length: if extended { r.u64()? } else { u64::from(r.u32()?) },
            })
        };
        Ok(parse(&mut reader))
    }

    /// Appends the header in its wire form. A compact header carries 32 bits of length.
    pub fn encode(&self, extended: bool, out: &mut Vec<u8>) {
        let number = if extended { magic::EXTENDED_REQUEST } else { magic::REQUEST };
        out.extend_from_slice(&number.to_be_bytes());
        out.extend_from_slice(&self.flags.0.to_be_bytes());
        out.extend_from_slice(&self.command.to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
        out.extend_from_slice(&self.offset.to_be_bytes());
        if extended {
            out.extend_from_slice(&self.length.to_be_bytes());
        } else {
            let length = u32::try_from(self.length).unwrap_or(u32::MAX);
            out.extend_from_slice(&length.to_be_bytes());
        }
    }

    /// The command, if the number is known.
    pub fn command_type(&self) -> Option<CommandType> {
        CommandType::from_code(self.command)
    }
}
