//! Contents of options: parsed, bounded, answered.

use crate::codes::{InfoType, OptionReply};
use crate::flags::TransmissionFlags;
use crate::wire::Reader;
use crate::{BlockSizes, MAX_STRING};

/// What the server says of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// Canonical name.
    pub name: String,
    /// For human eyes; may be empty.
    pub description: String,
    /// Size in bytes.
    pub size: u64,
    /// What the export can do. `HAS_FLAGS` is added, and `SEND_DF` and `BLOCK_STAT_PAYLOAD` are
    /// taken away where the negotiated mode has no such thing.
    pub flags: TransmissionFlags,
    /// Size constraints.
    pub block: BlockSizes,
    /// Names of its metadata contexts.
    pub contexts: Vec<String>,
}

/// Why the peer asks for an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To look at it (`NBD_OPT_INFO`, `NBD_OPT_LIST_META_CONTEXT`, `NBD_OPT_SET_META_CONTEXT`).
    Look,
    /// To use it (`NBD_OPT_GO`, `NBD_OPT_EXPORT_NAME`).
    Use,
}

/// Why an option is refused: the reply's type and a sentence for the peer's user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The type of the error reply.
    pub reply: OptionReply,
    /// A sentence of at most [`MAX_STRING`] bytes; cut where longer.
    pub text: String,
}

impl Refusal {
    /// A refusal of type `reply`.
    pub fn new(reply: OptionReply, text: impl Into<String>) -> Self {
        Self { reply, text: text.into() }
    }

    /// The export does not exist.
    pub fn unknown(name: &str) -> Self {
        Self::new(OptionReply::ErrUnknown, format!("there is no export named '{name}'"))
    }

    pub(super) fn invalid(text: &str) -> Self {
        Self::new(OptionReply::ErrInvalid, text)
    }

    pub(super) fn shutdown() -> Self {
        Self::new(OptionReply::ErrShutdown, "the server is shutting down")
    }
}

fn export_name(bytes: &[u8]) -> Result<String, Refusal> {
    if bytes.len() > MAX_STRING {
        let text = format!("an export name has at most {MAX_STRING} bytes");
        return Err(Refusal::new(OptionReply::ErrTooBig, text));
    }
    match std::str::from_utf8(bytes) {
        Ok(name) if !name.contains('\0') => Ok(name.to_owned()),
        _ => Err(Refusal::invalid("the export name is not valid UTF-8 or has a NUL")),
    }
}

/// The name of `NBD_OPT_EXPORT_NAME`: all of its data.
pub(super) fn parse_export_name(data: &[u8]) -> Result<String, Refusal> {
    export_name(data)
}

/// Name and information requests of `NBD_OPT_INFO` and `NBD_OPT_GO`.
pub(super) fn parse_go(data: &[u8]) -> Result<(String, Vec<InfoType>), Refusal> {
    let parse = || {
        let mut reader = Reader(data);
        let name = reader.string()?;
        let count = reader.u16()?;
        let codes: Vec<u16> = (0..count).map_while(|_| reader.u16()).collect();
        (codes.len() == usize::from(count) && reader.is_empty()).then_some((name, codes))
    };
    let Some((name, codes)) = parse() else {
        return Err(Refusal::invalid("the option's lengths contradict each other"));
    };
    let infos = codes.into_iter().filter_map(InfoType::from_code).collect();
    Ok((export_name(name)?, infos))
}

/// Name and queries of the metadata context options.
pub(super) fn parse_meta(data: &[u8]) -> Result<(String, Vec<&str>), Refusal> {
    let mut reader = Reader(data);
    let (Some(name), Some(count)) = (reader.string(), reader.u32()) else {
        return Err(Refusal::invalid("the option's lengths contradict each other"));
    };
    let name = export_name(name)?;
    let mut queries = Vec::new();
    // The count is only believed as far as there is data for it.
    for _ in 0..count {
        let Some(bytes) = reader.string() else {
            return Err(Refusal::invalid("there are fewer queries than the option says"));
        };
        if bytes.len() > MAX_STRING {
            let text = format!("a query has at most {MAX_STRING} bytes");
            return Err(Refusal::new(OptionReply::ErrTooBig, text));
        }
        match std::str::from_utf8(bytes) {
            Ok(query) if query.contains(':') => queries.push(query),
            _ => {
                return Err(Refusal::invalid("a query has no namespace or is not valid UTF-8"));
            }
        }
    }
    if !reader.is_empty() {
        return Err(Refusal::invalid("there is data after the last query"));
    }
    Ok((name, queries))
}

/// Contexts that `NBD_OPT_LIST_META_CONTEXT` names: all without a query, a namespace's with its
/// prefix as the query.
pub(super) fn list_contexts<'a>(available: &'a [String], queries: &[&str]) -> Vec<&'a str> {
    let matches = |context: &str| {
        queries.is_empty()
            || queries.iter().any(|q| *q == context || (q.ends_with(':') && context.starts_with(q)))
    };
    available.iter().map(String::as_str).filter(|context| matches(context)).collect()
}

/// Contexts that `NBD_OPT_SET_META_CONTEXT` selects, by their full names only.
pub(super) fn select_contexts(available: &[String], queries: &[&str]) -> Vec<String> {
    available.iter().filter(|context| queries.contains(&context.as_str())).cloned().collect()
}

/// One `NBD_REP_INFO` payload; `None` where the export has nothing of that type to say.
pub(super) fn encode_info(info: InfoType, export: &ExportInfo) -> Option<Vec<u8>> {
    let mut out = info.code().to_be_bytes().to_vec();
    match info {
        InfoType::Export => {
            out.extend_from_slice(&export.size.to_be_bytes());
            out.extend_from_slice(&export.flags.0.to_be_bytes());
        }
        InfoType::Name => out.extend_from_slice(export.name.as_bytes()),
        InfoType::Description if export.description.is_empty() => return None,
        InfoType::Description => out.extend_from_slice(cut(&export.description).as_bytes()),
        InfoType::BlockSize => {
            let BlockSizes { minimum, preferred, maximum } = export.block;
            for size in [minimum, preferred, maximum] {
                out.extend_from_slice(&size.to_be_bytes());
            }
        }
    }
    Some(out)
}

/// The first [`MAX_STRING`] bytes of a text, cut between characters.
pub(super) fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_STRING)]
}
