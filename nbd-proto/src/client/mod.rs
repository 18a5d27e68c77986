//! The client's half: negotiation, request headers, reply parsing.

mod handshake;
mod replies;

pub use handshake::{Event, Goal, Handshake, HandshakeConfig, Session};
pub use replies::{Chunk, Reply, decode_reply, encode_request};
