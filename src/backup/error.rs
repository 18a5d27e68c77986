//! Why a request about a backup failed.

use std::fmt;

use crate::block::{BlockError, BlockErrorKind};
use crate::catalog::CatalogError;
use crate::repository::RepositoryError;

/// The class of a failure: what clients act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// The request makes no sense.
    Invalid,
    /// There is no such thing.
    NotFound,
    /// It collides with the state of things.
    Conflict,
    /// It is well formed, but what it asks for cannot be done as things are set up.
    Unprocessable,
    /// There is no room for it.
    NoSpace,
    /// The capture appliance failed.
    Agent,
    /// The hub failed.
    Internal,
}

/// A failed request: kind for clients, cause and next step for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The class.
    pub kind: FailureKind,
    /// What went wrong, in one sentence.
    pub message: String,
    /// What to do, or more about it; may be empty.
    pub details: String,
}

impl Failure {
    /// A failure of `kind`.
    pub fn new(kind: FailureKind, message: impl Into<String>, details: impl Into<String>) -> Self {
        Self { kind, message: message.into(), details: details.into() }
    }

    /// There is no such thing.
    pub fn not_found(what: &str, key: &str) -> Self {
        let message = format!("there is no {what} '{key}'");
        Self::new(FailureKind::NotFound, message, "")
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if self.details.is_empty() { Ok(()) } else { write!(f, "; {}", self.details) }
    }
}

impl std::error::Error for Failure {}

impl From<CatalogError> for Failure {
    fn from(error: CatalogError) -> Self {
        let kind = match &error {
            CatalogError::Conflict(_) => FailureKind::Conflict,
            _ => FailureKind::Internal,
        };
        Self::new(kind, error.to_string(), "")
    }
}

/// What to do about a repository that is full.
const FREE_SPACE: &str = "free space in the repository, then start the backup again";

impl From<BlockError> for Failure {
    fn from(error: BlockError) -> Self {
        match error.kind {
            BlockErrorKind::NoSpace => {
                Self::new(FailureKind::NoSpace, error.to_string(), FREE_SPACE)
            }
            _ => Self::new(FailureKind::Internal, error.to_string(), ""),
        }
    }
}

impl From<RepositoryError> for Failure {
    fn from(error: RepositoryError) -> Self {
        if error.is_no_space() {
            return Self::new(FailureKind::NoSpace, error.to_string(), FREE_SPACE);
        }
        Self::new(FailureKind::Internal, error.to_string(), "")
    }
}
