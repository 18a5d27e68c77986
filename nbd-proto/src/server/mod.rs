//! The server's half: negotiation, request validation, reply headers.

mod handshake;
mod options;
mod reply;
mod transmission;

pub use handshake::{CloseReason, Event, Handshake, HandshakeConfig, Negotiated, TlsPolicy};
pub use options::{ExportInfo, Purpose, Refusal};
pub use reply::{ExtentList, MAX_EXTENTS, MAX_HEADER, ReplyEncoder};
pub use transmission::{Command, Parsed, Rejection, Request, StatusFilter, Transmission};
