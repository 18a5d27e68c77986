//! The client's half of the negotiation.

use bytes::Bytes;

use crate::codes::{InfoType, OptionCode, OptionReply, magic};
use crate::error::ProtocolError;
use crate::flags::{
    CLIENT_FIXED_NEWSTYLE, CLIENT_NO_ZEROES, FIXED_NEWSTYLE, NO_ZEROES, TransmissionFlags,
};
use crate::wire::{Reader, put_length};
use crate::{BlockSizes, MAX_STRING, Mode};

/// Longest data of an option reply that is believed, in bytes.
const MAX_REPLY_DATA: u32 = 64 << 10;
/// Most exports, contexts or informations that one option may be answered with.
const MAX_REPLIES: usize = 64 << 10;
/// Size constraints where the server names none ("Size constraints").
const DEFAULT_BLOCK: BlockSizes = BlockSizes { minimum: 1, preferred: 4096, maximum: 32 << 20 };

/// What the client connects for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Goal {
    /// To use the export of this name.
    Use(String),
    /// To see the names of the exports.
    List,
    /// To see which metadata contexts the export of this name offers; the configured contexts are
    /// queries, such as a namespace with its colon.
    Contexts(String),
}

/// How a client negotiates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandshakeConfig {
    /// What for.
    pub goal: Goal,
    /// The most capable mode to ask for; the server may know less.
    pub mode: Mode,
    /// Metadata contexts to ask for.
    pub contexts: Vec<String>,
}

/// An export in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// Size in bytes.
    pub size: u64,
    /// What the export can do.
    pub flags: TransmissionFlags,
    /// Size constraints.
    pub block: BlockSizes,
    /// How replies are laid out.
    pub mode: Mode,
    /// Metadata contexts with their ids.
    pub contexts: Vec<(u32, String)>,
    /// Bytes received that belong to the transmission phase.
    pub rest: Bytes,
}

/// What the driver does next, after it has sent [`Handshake::take_output`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Receive and call [`Handshake::handle_input`].
    NeedInput,
    /// The transmission phase begins.
    Transmit(Box<Session>),
    /// Names and descriptions of the exports; the connection can be closed.
    Listed(Vec<(String, String)>),
    /// Names of the metadata contexts; the connection can be closed.
    Contexts(Vec<String>),
    /// The server refused: type and text of its reply.
    Refused(OptionReply, String),
}

/// The step that waits for the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Greeting,
    ExtendedHeaders,
    StructuredReply,
    SetMetaContext,
    ListMetaContext,
    Go,
    ExportName,
    List,
    Finished,
}

/// The client's side of one negotiation.
#[derive(Debug)]
pub struct Handshake {
    config: HandshakeConfig,
    step: Step,
    input: Vec<u8>,
    output: Vec<u8>,
    no_zeroes: bool,
    mode: Mode,
    size_and_flags: Option<(u64, TransmissionFlags)>,
    block: BlockSizes,
    contexts: Vec<(u32, String)>,
    listed: Vec<(String, String)>,
    replies: usize,
}

impl Handshake {
    /// Waits for the server's greeting.
    pub fn new(config: HandshakeConfig) -> Self {
        Self {
            config,
            step: Step::Greeting,
            input: Vec::new(),
            output: Vec::new(),
            no_zeroes: false,
            mode: Mode::Simple,
            size_and_flags: None,
            block: DEFAULT_BLOCK,
            contexts: Vec::new(),
            listed: Vec::new(),
            replies: 0,
        }
    }

    /// Takes bytes from the server.
    pub fn handle_input(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// Bytes to send before acting on the last event.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// The next thing to do.
    ///
    /// # Errors
    /// When the server breaks the protocol.
    pub fn poll(&mut self) -> Result<Event, ProtocolError> {
        loop {
            let event = match self.step {
                Step::Greeting => self.greeting()?,
                Step::ExportName => self.export_name()?,
                Step::Finished => Some(Event::NeedInput),
                _ => self.option_reply()?,
            };
            if let Some(event) = event {
                return Ok(event);
            }
        }
    }

    fn greeting(&mut self) -> Result<Option<Event>, ProtocolError> {
        let mut reader = Reader(&self.input);
        let (Some(init), Some(style), Some(flags)) = (reader.u64(), reader.u64(), reader.u16())
        else {
            return Ok(Some(Event::NeedInput));
        };
        if init != magic::INIT || style != magic::OPTION || flags & FIXED_NEWSTYLE == 0 {
            return Err(ProtocolError::new("the peer is no fixed newstyle NBD server"));
        }
        self.input.drain(..18);
        self.no_zeroes = flags & NO_ZEROES != 0;
        let answer = CLIENT_FIXED_NEWSTYLE | if self.no_zeroes { CLIENT_NO_ZEROES } else { 0 };
        self.output.extend_from_slice(&answer.to_be_bytes());
        match (&self.config.goal, self.config.mode) {
            (Goal::List, _) => self.send(Step::List, OptionCode::List, &[]),
            // Contexts come with structured replies.
            (Goal::Contexts(_), _) => {
                self.send(Step::StructuredReply, OptionCode::StructuredReply, &[]);
            }
            (_, Mode::Extended) => {
                self.send(Step::ExtendedHeaders, OptionCode::ExtendedHeaders, &[]);
            }
            (_, Mode::Structured) => {
                self.send(Step::StructuredReply, OptionCode::StructuredReply, &[]);
            }
            (_, Mode::Simple) => self.go(),
        }
        Ok(None)
    }

    fn send(&mut self, step: Step, option: OptionCode, data: &[u8]) {
        self.output.extend_from_slice(&magic::OPTION.to_be_bytes());
        self.output.extend_from_slice(&option.code().to_be_bytes());
        put_length(&mut self.output, data.len());
        self.output.extend_from_slice(data);
        self.step = step;
        self.replies = 0;
    }

    fn export(&self) -> &[u8] {
        match &self.config.goal {
            Goal::Use(name) | Goal::Contexts(name) => name.as_bytes(),
            Goal::List => &[],
        }
    }

    fn meta_or_go(&mut self) {
        if matches!(self.config.goal, Goal::Contexts(_)) {
            let data = self.queries();
            return self.send(Step::ListMetaContext, OptionCode::ListMetaContext, &data);
        }
        if self.config.contexts.is_empty() || self.mode == Mode::Simple {
            return self.go();
        }
        let data = self.queries();
        self.send(Step::SetMetaContext, OptionCode::SetMetaContext, &data);
    }

    /// Data of the metadata context options: export and queries.
    fn queries(&self) -> Vec<u8> {
        let mut data = Vec::new();
        put_length(&mut data, self.export().len());
        data.extend_from_slice(self.export());
        put_length(&mut data, self.config.contexts.len());
        for context in &self.config.contexts {
            put_length(&mut data, context.len());
            data.extend_from_slice(context.as_bytes());
        }
        data
    }

    fn go(&mut self) {
        let mut data = Vec::new();
        put_length(&mut data, self.export().len());
        data.extend_from_slice(self.export());
        data.extend_from_slice(&1u16.to_be_bytes());
        data.extend_from_slice(&InfoType::BlockSize.code().to_be_bytes());
        self.send(Step::Go, OptionCode::Go, &data);
    }

    /// The option whose replies this step waits for.
    fn expected(&self) -> OptionCode {
        match self.step {
            Step::ExtendedHeaders => OptionCode::ExtendedHeaders,
            Step::StructuredReply => OptionCode::StructuredReply,
            Step::SetMetaContext => OptionCode::SetMetaContext,
            Step::ListMetaContext => OptionCode::ListMetaContext,
            Step::List => OptionCode::List,
            Step::Greeting | Step::Go | Step::ExportName | Step::Finished => OptionCode::Go,
        }
    }

    fn option_reply(&mut self) -> Result<Option<Event>, ProtocolError> {
        let mut reader = Reader(&self.input);
        let header = (|| Some((reader.u64()?, reader.u32()?, reader.u32()?, reader.u32()?)))();
        let Some((number, option, reply, length)) = header else {
            return Ok(Some(Event::NeedInput));
        };
        if number != magic::OPTION_REPLY || option != self.expected().code() {
            return Err(ProtocolError::new("the server answered an option that was not asked"));
        }
        if length > MAX_REPLY_DATA {
            return Err(ProtocolError::new(format!("an option reply of {length} bytes")));
        }
        let Some(data) = reader.bytes(length as usize) else {
            return Ok(Some(Event::NeedInput));
        };
        let data = data.to_vec();
        self.input.drain(..20 + data.len());
        self.replies += 1;
        if self.replies > MAX_REPLIES {
            return Err(ProtocolError::new("the server's answer does not end"));
        }
        match OptionReply::from_code(reply) {
            Some(OptionReply::Ack) => self.acknowledged(),
            Some(OptionReply::Info) => self.info(&data).map(|()| None),
            Some(OptionReply::MetaContext) => {
                let mut reader = Reader(&data);
                if let Some(id) = reader.u32() {
                    self.contexts.push((id, String::from_utf8_lossy(reader.0).into_owned()));
                }
                Ok(None)
            }
            Some(OptionReply::Server) => {
                let mut reader = Reader(&data);
                let name = reader
                    .string()
                    .ok_or_else(|| ProtocolError::new("an export's name is too long"))?;
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                self.listed.push((text(name), text(reader.0)));
                Ok(None)
            }
            Some(error) => Ok(self.refused(error, &data)),
            None if reply & 0x8000_0000 != 0 => Ok(self.refused(OptionReply::ErrUnsup, &data)),
            None => Err(ProtocolError::new(format!("unknown option reply {reply:#x}"))),
        }
    }

    fn acknowledged(&mut self) -> Result<Option<Event>, ProtocolError> {
        match self.step {
            Step::ExtendedHeaders => {
                self.mode = Mode::Extended;
                self.meta_or_go();
            }
            Step::StructuredReply => {
                self.mode = Mode::Structured;
                self.meta_or_go();
            }
            Step::SetMetaContext => self.go(),
            Step::ListMetaContext => {
                self.step = Step::Finished;
                let names = self.contexts.drain(..).map(|(_, name)| name).collect();
                return Ok(Some(Event::Contexts(names)));
            }
            Step::List => {
                self.step = Step::Finished;
                return Ok(Some(Event::Listed(std::mem::take(&mut self.listed))));
            }
            _ => {
                let Some((size, flags)) = self.size_and_flags else {
                    return Err(ProtocolError::new("the server did not tell the export's size"));
                };
                return Ok(Some(self.transmit(size, flags)));
            }
        }
        Ok(None)
    }

    /// Optional features are done without; the rest ends the negotiation.
    fn refused(&mut self, error: OptionReply, data: &[u8]) -> Option<Event> {
        match self.step {
            Step::ExtendedHeaders => {
                self.send(Step::StructuredReply, OptionCode::StructuredReply, &[]);
                return None;
            }
            // A server without structured replies has no contexts.
            Step::StructuredReply if matches!(self.config.goal, Goal::Contexts(_)) => {
                self.step = Step::Finished;
                return Some(Event::Contexts(Vec::new()));
            }
            Step::StructuredReply => {
                self.go();
                return None;
            }
            Step::SetMetaContext => {
                self.contexts.clear();
                self.go();
                return None;
            }
            Step::Go if error == OptionReply::ErrUnsup => {
                let name = self.export().to_vec();
                self.send(Step::ExportName, OptionCode::ExportName, &name);
                return None;
            }
            _ => {}
        }
        self.step = Step::Finished;
        let text = &data[..data.len().min(MAX_STRING)];
        Some(Event::Refused(error, String::from_utf8_lossy(text).into_owned()))
    }

    fn info(&mut self, data: &[u8]) -> Result<(), ProtocolError> {
        let mut reader = Reader(data);
        let kind = reader.u16().and_then(InfoType::from_code);
        match kind {
            Some(InfoType::Export) => {
                let (Some(size), Some(flags)) = (reader.u64(), reader.u16()) else {
                    return Err(ProtocolError::new("the export's information is too short"));
                };
                self.size_and_flags = Some((size, TransmissionFlags(flags)));
            }
            Some(InfoType::BlockSize) => {
                let (Some(minimum), Some(preferred), Some(maximum)) =
                    (reader.u32(), reader.u32(), reader.u32())
                else {
                    return Err(ProtocolError::new("the size constraints are too short"));
                };
                let sane = minimum.is_power_of_two()
                    && preferred.is_power_of_two()
                    && minimum <= preferred
                    && maximum >= minimum;
                if !sane {
                    return Err(ProtocolError::new("the size constraints make no sense"));
                }
                self.block = BlockSizes { minimum, preferred, maximum };
            }
            _ => {}
        }
        Ok(())
    }

    fn export_name(&mut self) -> Result<Option<Event>, ProtocolError> {
        let mut reader = Reader(&self.input);
        let padding = if self.no_zeroes { 0 } else { 124 };
        let (Some(size), Some(flags), Some(_)) =
            (reader.u64(), reader.u16(), reader.bytes(padding))
        else {
            return Ok(Some(Event::NeedInput));
        };
        self.input.drain(..10 + padding);
        self.contexts.clear();
        Ok(Some(self.transmit(size, TransmissionFlags(flags))))
    }

    fn transmit(&mut self, size: u64, flags: TransmissionFlags) -> Event {
        self.step = Step::Finished;
        Event::Transmit(Box::new(Session {
            size,
            flags,
            block: self.block,
            mode: self.mode,
            contexts: std::mem::take(&mut self.contexts),
            rest: Bytes::from(std::mem::take(&mut self.input)),
        }))
    }
}
