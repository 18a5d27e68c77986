//! Headers of replies. Payloads stay where they are: the driver sends them after the header.

use super::options::cut;
use crate::Mode;
use crate::codes::{ReplyType, magic};
use crate::error::Errno;
use crate::flags::ReplyFlags;
use crate::wire::put_length;

/// Longest header before a data payload, in bytes: extended header and offset.
pub const MAX_HEADER: usize = 40;
/// Most extents in one block status chunk.
pub const MAX_EXTENTS: usize = 64 << 10;

/// Encodes replies in the negotiated form, appending them to a buffer.
#[derive(Debug, Clone, Copy)]
pub struct ReplyEncoder {
    mode: Mode,
}

/// Extents of one context, built up in order.
#[derive(Debug, Clone, Default)]
pub struct ExtentList {
    extents: Vec<(u64, u64)>,
}

impl ExtentList {
    /// Appends an extent, joined to the last where the flags are equal; `false` where the list is
    /// full.
    pub fn push(&mut self, length: u64, flags: u64) -> bool {
        if length == 0 {
            return true;
        }
        let full = self.extents.len() >= MAX_EXTENTS;
        match self.extents.last_mut() {
            Some((last, same)) if *same == flags => *last += length,
            _ if full => return false,
            _ => self.extents.push((length, flags)),
        }
        true
    }

    /// Extents so far, as (length, flags).
    pub fn extents(&self) -> &[(u64, u64)] {
        &self.extents
    }
}

impl ReplyEncoder {
    /// For connections in `mode`.
    pub fn new(mode: Mode) -> Self {
        Self { mode }
    }

    /// The negotiated mode.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    fn simple(out: &mut Vec<u8>, cookie: u64, error: u32) {
        out.extend_from_slice(&magic::SIMPLE_REPLY.to_be_bytes());
        out.extend_from_slice(&error.to_be_bytes());
        out.extend_from_slice(&cookie.to_be_bytes());
    }

    fn chunk(
        self,
        out: &mut Vec<u8>,
        (cookie, offset): (u64, u64),
        kind: ReplyType,
        done: bool,
        length: usize,
    ) {
        let flags = ReplyFlags::empty().with_if(done, ReplyFlags::DONE).0;
        let extended = self.mode == Mode::Extended;
        let number = if extended { magic::EXTENDED_REPLY } else { magic::STRUCTURED_REPLY };
        out.extend_from_slice(&number.to_be_bytes());
        out.extend_from_slice(&flags.to_be_bytes());
        out.extend_from_slice(&kind.code().to_be_bytes());
        out.extend_from_slice(&cookie.to_be_bytes());
        if extended {
            out.extend_from_slice(&offset.to_be_bytes());
            out.extend_from_slice(&(length as u64).to_be_bytes());
        } else {
            put_length(out, length);
        }
    }

    /// Success without a payload. `request` is the cookie and the offset of the request, here and
    /// below.
    pub fn done(self, out: &mut Vec<u8>, request: (u64, u64)) {
        match self.mode {
            Mode::Simple => Self::simple(out, request.0, 0),
            _ => self.chunk(out, request, ReplyType::None, true, 0),
        }
    }

    /// The header before `length` bytes of data that were read at `at`. In simple mode it is the
    /// whole reply's header and must be the only one.
    pub fn data(self, out: &mut Vec<u8>, request: (u64, u64), at: u64, length: usize, done: bool) {
        if self.mode == Mode::Simple {
            return Self::simple(out, request.0, 0);
        }
        self.chunk(out, request, ReplyType::OffsetData, done, length + 8);
        out.extend_from_slice(&at.to_be_bytes());
    }

    /// A hole of `length` bytes at `at`; for structured modes.
    pub fn hole(self, out: &mut Vec<u8>, request: (u64, u64), at: u64, length: u32, done: bool) {
        self.chunk(out, request, ReplyType::OffsetHole, done, 12);
        out.extend_from_slice(&at.to_be_bytes());
        out.extend_from_slice(&length.to_be_bytes());
    }

    /// An error that ends the reply, with the byte at which it struck where that is known. A simple
    /// reply carries the number alone.
    pub fn error(
        self,
        out: &mut Vec<u8>,
        request: (u64, u64),
        errno: Errno,
        text: &str,
        at: Option<u64>,
    ) {
        if self.mode == Mode::Simple {
            return Self::simple(out, request.0, errno.code());
        }
        let text = cut(text);
        let kind = if at.is_some() { ReplyType::ErrorOffset } else { ReplyType::Error };
        let length = 6 + text.len() + if at.is_some() { 8 } else { 0 };
        self.chunk(out, request, kind, true, length);
        out.extend_from_slice(&errno.code().to_be_bytes());
        #[allow(clippy::cast_possible_truncation, reason = "cut to MAX_STRING")]
        out.extend_from_slice(&(text.len() as u16).to_be_bytes());
        out.extend_from_slice(text.as_bytes());
        if let Some(at) = at {
            out.extend_from_slice(&at.to_be_bytes());
        }
    }

    /// The extents of one context; for structured modes. `list` has at least one. With compact
    /// headers a longer extent than 4 GiB is cut and ends the list: the client asks again.
    pub fn block_status(
        self,
        out: &mut Vec<u8>,
        request: (u64, u64),
        context: u32,
        list: &ExtentList,
        done: bool,
    ) {
        let extents = list.extents();
        if self.mode == Mode::Extended {
            let length = 8 + extents.len() * 16;
            self.chunk(out, request, ReplyType::BlockStatusExt, done, length);
            out.extend_from_slice(&context.to_be_bytes());
            put_length(out, extents.len());
            for (length, flags) in extents {
                out.extend_from_slice(&length.to_be_bytes());
                out.extend_from_slice(&flags.to_be_bytes());
            }
            return;
        }
        // The longest multiple of every block size that 32 bits hold.
        const LONGEST: u64 = 0xffff_0000;
        let whole = extents.iter().take_while(|(length, _)| *length <= LONGEST).count();
        let count = (whole + 1).min(extents.len());
        self.chunk(out, request, ReplyType::BlockStatus, done, 4 + count * 8);
        out.extend_from_slice(&context.to_be_bytes());
        for (length, flags) in &extents[..count] {
            #[allow(clippy::cast_possible_truncation, reason = "cut to 32 bits; so are the flags")]
            for word in [(*length).min(LONGEST) as u32, *flags as u32] {
                out.extend_from_slice(&word.to_be_bytes());
            }
        }
    }
}
