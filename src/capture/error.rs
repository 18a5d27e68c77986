//! Why a capture failed.

use std::time::Duration;

use crate::nbd::client::ClientError;

/// A failed capture, as a sentence for whoever started it.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The text does not name a source, or the source has no such bitmap.
    #[error("{0}")]
    Invalid(String),
    /// The source cannot be opened or read.
    #[error("cannot read the source {name}: {cause}")]
    Source {
        /// The source.
        name: String,
        /// What happened.
        cause: String,
    },
    /// The target cannot be reached, or refuses its export.
    #[error("cannot use the target {target}: {cause}")]
    Connect {
        /// Address and export.
        target: String,
        /// What happened.
        #[source]
        cause: ClientError,
    },
    /// The target is there, but this copy cannot go into it.
    #[error("cannot write to the target {target}: {cause}")]
    Unfit {
        /// Address and export.
        target: String,
        /// Why, and what to do.
        cause: String,
    },
    /// Source and target differ in size.
    #[error(
        "the source has {from} bytes and the target's export {into}: nothing was sent; make an export \
         of the source's size"
    )]
    Size {
        /// Bytes of the source.
        from: u64,
        /// Bytes of the target.
        into: u64,
    },
    /// The target answered with an error other than that it is about to end, or broke the protocol.
    #[error("{what} at the target {target} failed: {cause}")]
    Failed {
        /// Address and export.
        target: String,
        /// The request.
        what: String,
        /// The server's answer.
        #[source]
        cause: ClientError,
    },
    /// The connection was cut and did not come back.
    #[error(
        "the connection to the target {target} was cut, and trying again for {} s did not help: {cause}",
        .tried.as_secs()
    )]
    Lost {
        /// Address and export.
        target: String,
        /// Time since the cut.
        tried: Duration,
        /// The last failure.
        #[source]
        cause: ClientError,
    },
    /// The connection comes back and is cut again before anything is made durable.
    #[error(
        "the connection to the target {target} was cut {cuts} times in a row before anything was \
         durable; see the server's log, and what lies between: {cause}"
    )]
    Unstable {
        /// Address and export.
        target: String,
        /// Cuts in a row.
        cuts: u32,
        /// The last failure.
        #[source]
        cause: ClientError,
    },
    /// The server lets the copy connect and takes no requests.
    #[error("the target {target} can be connected to and takes no more requests: {cause}")]
    Closed {
        /// Address and export.
        target: String,
        /// The server's answer.
        #[source]
        cause: ClientError,
    },
    /// The observer asked to stop.
    #[error("the copy was cancelled; what was sent so far is incomplete")]
    Cancelled,
}
