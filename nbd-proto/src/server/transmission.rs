//! Requests: parsed and judged in one place, before any device sees them.

use super::options::ExportInfo;
use crate::codes::CommandType;
use crate::error::{Errno, ProtocolError};
use crate::flags::{CommandFlags, TransmissionFlags};
use crate::request::{COMPACT_REQUEST, EXTENDED_REQUEST, RequestHeader};
use crate::wire::Reader;
use crate::{BlockSizes, Mode};

/// Longest payload of a refused request that is skipped, in bytes: what a compact header can say.
const MAX_SKIP: u64 = u32::MAX as u64;
/// Longest payload of a block status filter: the length and this many context ids.
const MAX_FILTER_IDS: u64 = 64;

/// Which contexts a block status request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StatusFilter {
    /// All that were negotiated.
    All,
    /// Those with these ids.
    Ids(Vec<u32>),
}

/// What a valid request wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// `NBD_CMD_READ`; `whole`: in one chunk (`NBD_CMD_FLAG_DF`).
    Read {
        /// One chunk only.
        whole: bool,
    },
    /// `NBD_CMD_WRITE`; the payload of the request's length follows.
    Write {
        /// Durable before the reply.
        fua: bool,
    },
    /// `NBD_CMD_FLUSH`
    Flush,
    /// `NBD_CMD_TRIM`
    Trim {
        /// Durable before the reply.
        fua: bool,
    },
    /// `NBD_CMD_CACHE`
    Cache,
    /// `NBD_CMD_WRITE_ZEROES`
    WriteZeroes {
        /// Durable before the reply.
        fua: bool,
        /// The range stays allocated.
        no_hole: bool,
        /// Fail rather than be slow.
        fast: bool,
    },
    /// `NBD_CMD_BLOCK_STATUS`
    BlockStatus {
        /// One extent is enough (`NBD_CMD_FLAG_REQ_ONE`).
        one: bool,
        /// Contexts asked for.
        filter: StatusFilter,
    },
}

/// A request that may go to the device: in bounds, permitted, with flags that make sense.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The client's name for it.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Length of the effect in bytes.
    pub length: u64,
    /// What to do.
    pub command: Command,
}

/// A request that is answered with an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// The client's name for it.
    pub cookie: u64,
    /// The request's offset.
    pub offset: u64,
    /// The error.
    pub errno: Errno,
    /// A sentence for the peer's user.
    pub text: String,
    /// Payload bytes that follow and must be skipped.
    pub skip: u64,
    /// The first byte that is not possible, where there is one.
    pub at: Option<u64>,
}

/// What the start of the input holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parsed {
    /// Not a whole header yet.
    Incomplete,
    /// Do it; a write's payload follows.
    Accept(Request),
    /// Skip the payload and answer with the error.
    Reject(Rejection),
    /// Receive `payload` bytes and call [`Transmission::handle_filter`] with them.
    NeedFilter {
        /// The request, without its filter and length.
        request: Request,
        /// Bytes of the filter.
        payload: usize,
    },
    /// `NBD_CMD_DISC`: answer what is pending, then close.
    Disconnect,
}

/// The server's side of the transmission phase.
#[derive(Debug, Clone)]
pub struct Transmission {
    size: u64,
    flags: TransmissionFlags,
    block: BlockSizes,
    mode: Mode,
    contexts: usize,
    shutting_down: bool,
}

impl Transmission {
    pub(super) fn new(export: &ExportInfo, mode: Mode, contexts: usize) -> Self {
        Self {
            size: export.size,
            flags: export.flags,
            block: export.block,
            mode,
            contexts,
            shutting_down: false,
        }
    }

    /// Bytes of a request header on this connection.
    pub fn header_length(&self) -> usize {
        if self.mode == Mode::Extended { EXTENDED_REQUEST } else { COMPACT_REQUEST }
    }

    /// From now on every request but `NBD_CMD_DISC` is rejected with `NBD_ESHUTDOWN`.
    pub fn begin_shutdown(&mut self) {
        self.shutting_down = true;
    }

    /// Judges the request at the start of `input`, which takes [`Self::header_length`] bytes.
    ///
    /// # Errors
    /// When the stream has no meaning any more, or a payload is too long even to skip.
    pub fn handle_header(&self, input: &[u8]) -> Result<Parsed, ProtocolError> {
        let extended = self.mode == Mode::Extended;
        let Some(header) = RequestHeader::decode(input, extended)? else {
            return Ok(Parsed::Incomplete);
        };
        let command = header.command_type();
        if command == Some(CommandType::Disc) {
            return Ok(Parsed::Disconnect);
        }
        let carries = header.flags.contains(CommandFlags::PAYLOAD_LEN) && extended;
        let payload =
            if command == Some(CommandType::Write) || carries { header.length } else { 0 };
        if payload > MAX_SKIP {
            return Err(ProtocolError::new(format!(
                "a request announces {payload} bytes of payload, more than can be skipped"
            )));
        }
        let reject = |(errno, text, at): Fault| {
            let RequestHeader { cookie, offset, .. } = header;
            Parsed::Reject(Rejection { cookie, offset, errno, text, skip: payload, at })
        };
        Ok(match self.judge(&header, command, carries) {
            Ok(parsed) => parsed,
            Err(fault) => reject(fault),
        })
    }

    fn judge(
        &self,
        header: &RequestHeader,
        command: Option<CommandType>,
        carries: bool,
    ) -> Result<Parsed, Fault> {
        if self.shutting_down {
            return Err((Errno::Shutdown, "the server is shutting down".into(), None));
        }
        let Some(command) = command else {
            return Err(invalid(format!("unknown command {}", header.command)));
        };
        self.check_flags(header, command)?;
        let has = |flag| header.flags.contains(flag);
        let fua = has(CommandFlags::FUA);
        let command = match command {
            CommandType::Read => Command::Read { whole: has(CommandFlags::DF) },
            CommandType::Write => Command::Write { fua },
            CommandType::Flush => Command::Flush,
            CommandType::Trim => Command::Trim { fua },
            CommandType::Cache => Command::Cache,
            CommandType::WriteZeroes => Command::WriteZeroes {
                fua,
                no_hole: has(CommandFlags::NO_HOLE),
                fast: has(CommandFlags::FAST_ZERO),
            },
            CommandType::BlockStatus | CommandType::Disc => {
                Command::BlockStatus { one: has(CommandFlags::REQ_ONE), filter: StatusFilter::All }
            }
        };
        let RequestHeader { cookie, offset, length, .. } = *header;
        let mut request = Request { cookie, offset, length, command };
        if matches!(request.command, Command::BlockStatus { .. }) && carries {
            if !(12..=8 + 4 * MAX_FILTER_IDS).contains(&length) || length % 4 != 0 {
                return Err(invalid(format!("a filter of {length} bytes is not possible")));
            }
            request.length = 0;
            #[allow(clippy::cast_possible_truncation, reason = "bounded just above")]
            return Ok(Parsed::NeedFilter { request, payload: length as usize });
        }
        self.check_range(&mut request)?;
        Ok(Parsed::Accept(request))
    }

    /// Completes a block status request with its payload.
    pub fn handle_filter(&self, mut request: Request, payload: &[u8]) -> Parsed {
        let (cookie, offset) = (request.cookie, request.offset);
        let result = (|| {
            let mut reader = Reader(payload);
            let Some(length) = reader.u64() else {
                return Err(invalid("the filter is too short".into()));
            };
            let ids: Vec<u32> = std::iter::from_fn(|| reader.u32()).collect();
            let known = |id: &u32| (1..=self.contexts).contains(&(*id as usize));
            let distinct = (1..ids.len()).all(|i| !ids[..i].contains(&ids[i]));
            if ids.is_empty() || !ids.iter().all(known) || !distinct {
                return Err(invalid("the filter names unknown contexts or one twice".into()));
            }
            request.length = length;
            if let Command::BlockStatus { filter, .. } = &mut request.command {
                *filter = StatusFilter::Ids(ids);
            }
            self.check_range(&mut request)?;
            Ok(request)
        })();
        match result {
            Ok(request) => Parsed::Accept(request),
            Err((errno, text, at)) => {
                Parsed::Reject(Rejection { cookie, offset, errno, text, skip: 0, at })
            }
        }
    }

    fn check_flags(&self, header: &RequestHeader, command: CommandType) -> Result<(), Fault> {
        use TransmissionFlags as T;
        let extended = self.mode == Mode::Extended;
        let offers = |flag| self.flags.contains(flag);
        let (needed, mut allowed) = match command {
            CommandType::Read => {
                (None, CommandFlags::empty().with_if(offers(T::SEND_DF), CommandFlags::DF))
            }
            CommandType::Write => {
                (None, CommandFlags::empty().with_if(extended, CommandFlags::PAYLOAD_LEN))
            }
            CommandType::Flush => (Some(T::SEND_FLUSH), CommandFlags::empty()),
            CommandType::Trim => (Some(T::SEND_TRIM), CommandFlags::empty()),
            CommandType::Cache => (Some(T::SEND_CACHE), CommandFlags::empty()),
            CommandType::WriteZeroes => (
                Some(T::SEND_WRITE_ZEROES),
                CommandFlags::NO_HOLE.with_if(offers(T::SEND_FAST_ZERO), CommandFlags::FAST_ZERO),
            ),
            CommandType::BlockStatus | CommandType::Disc => (
                None,
                CommandFlags::REQ_ONE
                    .with_if(offers(T::BLOCK_STAT_PAYLOAD), CommandFlags::PAYLOAD_LEN),
            ),
        };
        // FUA is tolerated on every command once it is offered, as the specification asks.
        allowed = allowed.with_if(offers(T::SEND_FUA), CommandFlags::FUA);
        if self.flags.contains(T::READ_ONLY) && changes(command) {
            return Err((Errno::Perm, "the export is read-only".into(), None));
        }
        if needed.is_some_and(|flag| !offers(flag)) {
            return Err(invalid(format!("{command:?} was not offered on this export")));
        }
        let unknown = header.flags.without(allowed);
        if unknown != CommandFlags::empty() {
            return Err(invalid(format!(
                "flags {:#06x} are not possible with {command:?} here",
                unknown.0
            )));
        }
        if command == CommandType::BlockStatus && self.contexts == 0 {
            return Err(invalid("no metadata context was negotiated".into()));
        }
        Ok(())
    }

    fn check_range(&self, request: &mut Request) -> Result<(), Fault> {
        let Request { offset, length, .. } = *request;
        if request.command == Command::Flush {
            // Offset and length of a flush are reserved.
            (request.offset, request.length) = (0, 0);
            return Ok(());
        }
        let end = offset.checked_add(length).filter(|end| *end <= self.size);
        if end.is_none() {
            let errno = match request.command {
                Command::Write { .. } | Command::WriteZeroes { .. } => Errno::NoSpc,
                _ => Errno::Inval,
            };
            let size = self.size;
            let text = format!("{length} bytes at {offset} reach past the end ({size} bytes)");
            return Err((errno, text, Some(offset.max(size))));
        }
        let minimum = u64::from(self.block.minimum);
        if minimum > 1 && (offset % minimum != 0 || length % minimum != 0) {
            return Err(invalid(format!("offset and length must be multiples of {minimum}")));
        }
        let maximum = self.block.maximum;
        match request.command {
            Command::Read { whole } if length > u64::from(maximum) => {
                let errno = if whole { Errno::Overflow } else { Errno::Inval };
                Err((errno, format!("a read has at most {maximum} bytes here"), None))
            }
            Command::Write { .. } if length > u64::from(maximum) => {
                Err(invalid(format!("a write has at most {maximum} bytes here")))
            }
            Command::BlockStatus { .. } if length == 0 => {
                Err(invalid("block status needs a length".into()))
            }
            _ => Ok(()),
        }
    }
}

/// Error, sentence, first impossible byte.
type Fault = (Errno, String, Option<u64>);

fn invalid(text: String) -> Fault {
    (Errno::Inval, text, None)
}

fn changes(command: CommandType) -> bool {
    matches!(command, CommandType::Write | CommandType::Trim | CommandType::WriteZeroes)
}
