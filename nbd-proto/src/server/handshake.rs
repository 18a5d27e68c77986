//! The server's half of the negotiation ("Handshake phase", fixed newstyle).

use bytes::Bytes;

use super::options::{
    ExportInfo, Purpose, Refusal, cut, encode_info, list_contexts, parse_export_name, parse_go,
    parse_meta, select_contexts,
};
use super::transmission::Transmission;
use crate::Mode;
use crate::codes::{InfoType, OptionCode, OptionReply, magic};
use crate::flags::{
    CLIENT_FIXED_NEWSTYLE, CLIENT_NO_ZEROES, FIXED_NEWSTYLE, NO_ZEROES, TransmissionFlags,
};
use crate::wire::{Reader, put_length};

/// Longest data of an option that is looked at, in bytes.
const MAX_OPTION_DATA: u32 = 64 << 10;
/// Longest data of an option that is skipped; beyond it the connection closes.
const MAX_OPTION_SKIP: u32 = 32 << 20;
/// Zero bytes after the reply to `NBD_OPT_EXPORT_NAME`, unless the client wants none.
const EXPORT_NAME_PADDING: usize = 124;
/// Options of one connection unless configured otherwise.
const DEFAULT_MAX_OPTIONS: u32 = 1024;

/// What is done about TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsPolicy {
    /// Not built in: `NBD_REP_ERR_UNSUP`.
    Unsupported,
    /// Turned off: `NBD_REP_ERR_POLICY`.
    Forbidden,
    /// At the client's choice (SELECTIVETLS).
    Offered,
    /// Before anything else (FORCEDTLS).
    Required,
}

/// How a server negotiates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HandshakeConfig {
    /// What is done about TLS.
    pub tls: TlsPolicy,
    /// Offer structured replies and what builds on them.
    pub structured_replies: bool,
    /// Offer extended headers.
    pub extended_headers: bool,
    /// Options after which the connection closes.
    pub max_options: u32,
}

impl Default for HandshakeConfig {
    fn default() -> Self {
        Self {
            tls: TlsPolicy::Unsupported,
            structured_replies: true,
            extended_headers: true,
            max_options: DEFAULT_MAX_OPTIONS,
        }
    }
}

/// Why the connection ends before the transmission phase.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CloseReason {
    /// The client said so (`NBD_OPT_ABORT`).
    Aborted,
    /// `NBD_OPT_EXPORT_NAME` could not be served and has no way to say why.
    Refused(String),
    /// The client broke the protocol.
    Protocol(String),
}

/// The outcome of the negotiation.
#[derive(Debug)]
pub struct Negotiated {
    /// The chosen export, with the flags that were sent.
    pub export: ExportInfo,
    /// How replies are laid out.
    pub mode: Mode,
    /// Metadata contexts in use; the position plus one is the context's id.
    pub contexts: Vec<String>,
    /// Bytes received that belong to the transmission phase.
    pub rest: Bytes,
}

impl Negotiated {
    /// The state machine of the transmission phase.
    pub fn transmission(&self) -> Transmission {
        Transmission::new(&self.export, self.mode, self.contexts.len())
    }
}

/// What the driver does next, after it has sent [`Handshake::take_output`].
#[derive(Debug)]
pub enum Event {
    /// Receive and call [`Handshake::handle_input`].
    NeedInput,
    /// Find the export and call [`Handshake::handle_lookup`].
    Lookup {
        /// The name as the client wrote it; empty for the default export.
        name: String,
        /// What for.
        purpose: Purpose,
    },
    /// Call [`Handshake::handle_list`].
    ListExports,
    /// Set up TLS on the connection and call [`Handshake::handle_tls`].
    StartTls,
    /// The transmission phase begins.
    Transmit(Box<Negotiated>),
    /// Send what is left and close.
    Close(CloseReason),
}

/// An option that waits for the driver.
#[derive(Debug)]
enum Pending {
    ExportName,
    Info { go: bool, name: String, infos: Vec<InfoType> },
    ListMeta { queries: Vec<String> },
    SetMeta { name: String, queries: Vec<String> },
    List,
    Tls,
}

#[derive(Debug)]
enum State {
    ClientFlags,
    OptionHeader,
    OptionData { code: u32, length: usize },
    Skip { code: u32, left: usize },
    Waiting(Pending),
    Finished,
}

/// The server's side of one negotiation.
#[derive(Debug)]
pub struct Handshake {
    config: HandshakeConfig,
    state: State,
    input: Vec<u8>,
    output: Vec<u8>,
    fixed: bool,
    no_zeroes: bool,
    secure: bool,
    mode: Mode,
    /// Export name and contexts of the last successful `NBD_OPT_SET_META_CONTEXT`.
    contexts: Option<(String, Vec<String>)>,
    options: u32,
    shutting_down: bool,
    transmit: Option<Box<Negotiated>>,
}

impl Handshake {
    /// Starts with the server's greeting in the output.
    pub fn new(config: HandshakeConfig) -> Self {
        let mut output = magic::INIT.to_be_bytes().to_vec();
        output.extend_from_slice(&magic::OPTION.to_be_bytes());
        output.extend_from_slice(&(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
        Self {
            config,
            state: State::ClientFlags,
            input: Vec::new(),
            output,
            fixed: false,
            no_zeroes: false,
            secure: false,
            mode: Mode::Simple,
            contexts: None,
            options: 0,
            shutting_down: false,
            transmit: None,
        }
    }

    /// Takes bytes from the peer. Feed what one receive gave, then poll until
    /// [`Event::NeedInput`]: the machine holds at most that and one option.
    pub fn handle_input(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// Bytes to send before acting on the last event.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// From now on every option but `NBD_OPT_ABORT` is answered with `NBD_REP_ERR_SHUTDOWN`.
    pub fn begin_shutdown(&mut self) {
        self.shutting_down = true;
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Event {
        loop {
            if let Some(negotiated) = self.transmit.take() {
                self.state = State::Finished;
                return Event::Transmit(negotiated);
            }
            let step = match self.state {
                State::ClientFlags => self.client_flags(),
                State::OptionHeader => self.option_header(),
                State::OptionData { code, length } => self.option_data(code, length),
                State::Skip { code, left } => self.skip(code, left),
                State::Waiting(_) | State::Finished => Some(Event::NeedInput),
            };
            if let Some(event) = step {
                if let Event::Close(_) = event {
                    self.state = State::Finished;
                }
                return event;
            }
        }
    }

    fn consume(&mut self, length: usize) {
        self.input.drain(..length);
    }

    fn client_flags(&mut self) -> Option<Event> {
        let Some(flags) = Reader(&self.input).u32() else {
            return Some(Event::NeedInput);
        };
        self.consume(4);
        if flags & !(CLIENT_FIXED_NEWSTYLE | CLIENT_NO_ZEROES) != 0 {
            return Some(protocol(format!("unknown client flags {flags:#010x}")));
        }
        self.fixed = flags & CLIENT_FIXED_NEWSTYLE != 0;
        self.no_zeroes = flags & CLIENT_NO_ZEROES != 0;
        self.state = State::OptionHeader;
        None
    }

    fn option_header(&mut self) -> Option<Event> {
        let mut reader = Reader(&self.input);
        let number = reader.u64();
        if let Some(found) = number.filter(|n| *n != magic::OPTION) {
            return Some(protocol(format!("option magic {found:#018x} is wrong")));
        }
        let (Some(code), Some(length)) = (reader.u32(), reader.u32()) else {
            return Some(Event::NeedInput);
        };
        self.consume(16);
        self.options += 1;
        if self.options > self.config.max_options {
            return Some(protocol(format!("more than {} options", self.config.max_options)));
        }
        let export_name = code == OptionCode::ExportName.code();
        if !self.fixed && !export_name {
            return Some(protocol(
                "a client without fixed newstyle may only name an export".into(),
            ));
        }
        if length > MAX_OPTION_SKIP || (export_name && length > MAX_OPTION_DATA) {
            return Some(protocol(format!("option {code} with {length} bytes of data")));
        }
        let length = length as usize;
        self.state = if length > MAX_OPTION_DATA as usize {
            State::Skip { code, left: length }
        } else {
            State::OptionData { code, length }
        };
        None
    }

    fn skip(&mut self, code: u32, left: usize) -> Option<Event> {
        let here = left.min(self.input.len());
        self.consume(here);
        if here < left {
            self.state = State::Skip { code, left: left - here };
            return Some(Event::NeedInput);
        }
        let text = format!("an option has at most {MAX_OPTION_DATA} bytes of data here");
        self.refuse(code, &Refusal::new(OptionReply::ErrTooBig, text));
        self.state = State::OptionHeader;
        None
    }

    fn option_data(&mut self, code: u32, length: usize) -> Option<Event> {
        if self.input.len() < length {
            return Some(Event::NeedInput);
        }
        let data: Vec<u8> = self.input.drain(..length).collect();
        self.state = State::OptionHeader;
        let option = OptionCode::from_code(code);
        match self.option(option, &data) {
            Ok(event) => event,
            Err(refusal) if option == Some(OptionCode::ExportName) => {
                Some(Event::Close(CloseReason::Refused(refusal.text)))
            }
            Err(refusal) => {
                if option == Some(OptionCode::SetMetaContext) {
                    self.contexts = None;
                }
                self.refuse(code, &refusal);
                None
            }
        }
    }

    fn option(
        &mut self,
        option: Option<OptionCode>,
        data: &[u8],
    ) -> Result<Option<Event>, Refusal> {
        if option == Some(OptionCode::Abort) {
            self.reply(OptionCode::Abort.code(), OptionReply::Ack, &[]);
            return Ok(Some(Event::Close(CloseReason::Aborted)));
        }
        if self.shutting_down {
            return Err(Refusal::shutdown());
        }
        let needs_tls = self.config.tls == TlsPolicy::Required && !self.secure;
        if needs_tls && option != Some(OptionCode::StartTls) {
            let text = "this server requires TLS; start it first";
            return Err(Refusal::new(OptionReply::ErrTlsReqd, text));
        }
        let Some(option) = option else {
            return Err(Refusal::new(
                OptionReply::ErrUnsup,
                "this server does not know the option",
            ));
        };
        let no_data = || match data.is_empty() {
            true => Ok(()),
            false => Err(Refusal::invalid("this option has no data")),
        };
        match option {
            OptionCode::ExportName => {
                let name = parse_export_name(data)?;
                Ok(self.lookup(name, Purpose::Use, Pending::ExportName))
            }
            OptionCode::Info | OptionCode::Go => {
                let (name, infos) = parse_go(data)?;
                let go = option == OptionCode::Go;
                let purpose = if go { Purpose::Use } else { Purpose::Look };
                let pending = Pending::Info { go, name: name.clone(), infos };
                Ok(self.lookup(name, purpose, pending))
            }
            OptionCode::List => {
                no_data()?;
                self.state = State::Waiting(Pending::List);
                Ok(Some(Event::ListExports))
            }
            OptionCode::StartTls => {
                no_data()?;
                self.start_tls()
            }
            OptionCode::StructuredReply => {
                no_data()?;
                self.structured_reply().map(|()| None)
            }
            OptionCode::ExtendedHeaders => {
                no_data()?;
                self.extended_headers().map(|()| None)
            }
            OptionCode::ListMetaContext | OptionCode::SetMetaContext => {
                self.meta_context(option == OptionCode::SetMetaContext, data).map(Some)
            }
            OptionCode::Abort => Ok(Some(Event::Close(CloseReason::Aborted))),
        }
    }

    fn lookup(&mut self, name: String, purpose: Purpose, pending: Pending) -> Option<Event> {
        self.state = State::Waiting(pending);
        Some(Event::Lookup { name, purpose })
    }

    fn start_tls(&mut self) -> Result<Option<Event>, Refusal> {
        match self.config.tls {
            _ if self.secure => Err(Refusal::invalid("TLS is in use already")),
            TlsPolicy::Unsupported => {
                Err(Refusal::new(OptionReply::ErrUnsup, "this server has no TLS"))
            }
            TlsPolicy::Forbidden => {
                Err(Refusal::new(OptionReply::ErrPolicy, "TLS is turned off on this server"))
            }
            TlsPolicy::Offered | TlsPolicy::Required => {
                if !self.input.is_empty() {
                    // Whoever put it there, it was not protected.
                    return Ok(Some(protocol("plaintext was sent after NBD_OPT_STARTTLS".into())));
                }
                self.reply(OptionCode::StartTls.code(), OptionReply::Ack, &[]);
                self.state = State::Waiting(Pending::Tls);
                Ok(Some(Event::StartTls))
            }
        }
    }

    fn structured_reply(&mut self) -> Result<(), Refusal> {
        let option = OptionCode::StructuredReply.code();
        match self.mode {
            _ if !self.config.structured_replies => {
                Err(Refusal::new(OptionReply::ErrUnsup, "structured replies are turned off"))
            }
            Mode::Extended => {
                let text = "extended headers were negotiated and include structured replies";
                Err(Refusal::new(OptionReply::ErrExtHeaderReqd, text))
            }
            Mode::Structured => Err(Refusal::invalid("structured replies are in use already")),
            Mode::Simple => {
                self.mode = Mode::Structured;
                self.reply(option, OptionReply::Ack, &[]);
                Ok(())
            }
        }
    }

    fn extended_headers(&mut self) -> Result<(), Refusal> {
        if !(self.config.extended_headers && self.config.structured_replies) {
            return Err(Refusal::new(OptionReply::ErrUnsup, "extended headers are turned off"));
        }
        if self.mode == Mode::Extended {
            return Err(Refusal::invalid("extended headers are in use already"));
        }
        self.mode = Mode::Extended;
        self.reply(OptionCode::ExtendedHeaders.code(), OptionReply::Ack, &[]);
        Ok(())
    }

    fn meta_context(&mut self, set: bool, data: &[u8]) -> Result<Event, Refusal> {
        if self.mode == Mode::Simple {
            return Err(Refusal::invalid("metadata contexts need structured replies first"));
        }
        let (name, queries) = parse_meta(data)?;
        let queries = queries.into_iter().map(str::to_owned).collect();
        let pending = match set {
            true => Pending::SetMeta { name: name.clone(), queries },
            false => Pending::ListMeta { queries },
        };
        self.state = State::Waiting(pending);
        Ok(Event::Lookup { name, purpose: Purpose::Look })
    }

    /// Answers [`Event::Lookup`].
    pub fn handle_lookup(&mut self, found: Result<ExportInfo, Refusal>) -> Option<CloseReason> {
        let State::Waiting(pending) = std::mem::replace(&mut self.state, State::OptionHeader)
        else {
            return None;
        };
        let code = match &pending {
            Pending::ExportName => OptionCode::ExportName,
            Pending::Info { go: true, .. } => OptionCode::Go,
            Pending::Info { go: false, .. } => OptionCode::Info,
            Pending::ListMeta { .. } => OptionCode::ListMetaContext,
            Pending::SetMeta { .. } => {
                self.contexts = None;
                OptionCode::SetMetaContext
            }
            Pending::List | Pending::Tls => return None,
        };
        let mut export = match found {
            Ok(export) => export,
            Err(refusal) if code == OptionCode::ExportName => {
                self.state = State::Finished;
                return Some(CloseReason::Refused(refusal.text));
            }
            Err(refusal) => {
                self.refuse(code.code(), &refusal);
                return None;
            }
        };
        export.flags = self.effective_flags(export.flags);
        match pending {
            Pending::ExportName => {
                self.output.extend_from_slice(&export.size.to_be_bytes());
                self.output.extend_from_slice(&export.flags.0.to_be_bytes());
                if !self.no_zeroes {
                    self.output.extend_from_slice(&[0; EXPORT_NAME_PADDING]);
                }
                self.enter_transmission(export, None);
            }
            Pending::Info { go, name, infos } => self.answer_info(export, go, &name, &infos),
            Pending::ListMeta { queries } => {
                let queries: Vec<&str> = queries.iter().map(String::as_str).collect();
                for context in list_contexts(&export.contexts, &queries) {
                    self.reply_context(code, 0, context);
                }
                self.reply(code.code(), OptionReply::Ack, &[]);
            }
            Pending::SetMeta { name, queries } => {
                let queries: Vec<&str> = queries.iter().map(String::as_str).collect();
                let selected = select_contexts(&export.contexts, &queries);
                for (id, context) in (1..).zip(&selected) {
                    self.reply_context(code, id, context);
                }
                self.reply(code.code(), OptionReply::Ack, &[]);
                self.contexts = Some((name, selected));
            }
            Pending::List | Pending::Tls => {}
        }
        None
    }

    fn effective_flags(&self, flags: TransmissionFlags) -> TransmissionFlags {
        let mut flags = flags.with(TransmissionFlags::HAS_FLAGS);
        if self.mode < Mode::Structured {
            flags = flags.without(TransmissionFlags::SEND_DF);
        }
        if self.mode < Mode::Extended {
            flags = flags.without(TransmissionFlags::BLOCK_STAT_PAYLOAD);
        }
        flags
    }

    fn answer_info(&mut self, export: ExportInfo, go: bool, name: &str, infos: &[InfoType]) {
        let option = if go { OptionCode::Go } else { OptionCode::Info };
        let all = [InfoType::Export, InfoType::Name, InfoType::Description, InfoType::BlockSize];
        for info in all {
            let wanted = info == InfoType::Export || infos.contains(&info);
            if wanted && let Some(data) = encode_info(info, &export) {
                self.reply(option.code(), OptionReply::Info, &data);
            }
        }
        self.reply(option.code(), OptionReply::Ack, &[]);
        if go {
            self.enter_transmission(export, Some(name));
        }
    }

    fn enter_transmission(&mut self, export: ExportInfo, name: Option<&str>) {
        // Contexts count only for the export for which they were set.
        let contexts = match self.contexts.take() {
            Some((set_for, contexts)) if Some(set_for.as_str()) == name => contexts,
            _ => Vec::new(),
        };
        let rest = Bytes::from(std::mem::take(&mut self.input));
        self.transmit = Some(Box::new(Negotiated { export, mode: self.mode, contexts, rest }));
    }

    /// Answers [`Event::ListExports`] with names and descriptions.
    pub fn handle_list<'a>(&mut self, exports: impl IntoIterator<Item = (&'a str, &'a str)>) {
        let code = OptionCode::List.code();
        for (name, description) in exports {
            let mut data = Vec::new();
            put_length(&mut data, name.len());
            data.extend_from_slice(name.as_bytes());
            data.extend_from_slice(cut(description).as_bytes());
            self.reply(code, OptionReply::Server, &data);
        }
        self.reply(code, OptionReply::Ack, &[]);
        self.state = State::OptionHeader;
    }

    /// Answers [`Event::StartTls`]: everything from here on is protected, and nothing that was
    /// negotiated before counts.
    pub fn handle_tls(&mut self) {
        self.secure = true;
        self.mode = Mode::Simple;
        self.contexts = None;
        self.state = State::OptionHeader;
    }

    fn refuse(&mut self, code: u32, refusal: &Refusal) {
        self.reply(code, refusal.reply, cut(&refusal.text).as_bytes());
    }

    fn reply_context(&mut self, option: OptionCode, id: u32, context: &str) {
        let mut data = id.to_be_bytes().to_vec();
        data.extend_from_slice(context.as_bytes());
        self.reply(option.code(), OptionReply::MetaContext, &data);
    }

    fn reply(&mut self, option: u32, reply: OptionReply, data: &[u8]) {
        self.output.extend_from_slice(&magic::OPTION_REPLY.to_be_bytes());
        self.output.extend_from_slice(&option.to_be_bytes());
        self.output.extend_from_slice(&reply.code().to_be_bytes());
        put_length(&mut self.output, data.len());
        self.output.extend_from_slice(data);
    }
}

fn protocol(text: String) -> Event {
    Event::Close(CloseReason::Protocol(text))
}
