//! Why a command failed, and the exit code that tells it.

use std::fmt;

use crate::capture::CaptureError;

/// What was asked for was done.
pub(super) const OK: u8 = 0;
/// It failed.
pub(super) const FAILED: u8 = 1;
/// The command line makes no sense. The parser of arguments uses the same.
pub(super) const USAGE: u8 = 2;
/// There is no such thing.
pub(super) const NOT_FOUND: u8 = 3;
/// It collides with the state of things.
pub(super) const CONFLICT: u8 = 4;
/// The token is missing, not valid, or may not do this.
pub(super) const UNAUTHORIZED: u8 = 5;
/// The hub does not answer.
pub(super) const UNREACHABLE: u8 = 6;
/// Ended by Ctrl-C or SIGTERM.
pub(super) const INTERRUPTED: u8 = 130;

/// What `--help` says about them.
pub(super) const EXIT_CODES: &str = "Exit codes:
  0    done; of `doctor` and checks: nothing found
  1    failed; of `doctor` and checks: findings
  2    the command line makes no sense
  3    there is no such thing
  4    it collides with the state of things
  5    the token is missing, not valid, or may not do this
  6    the hub cannot be reached
  130  ended by Ctrl-C; a backup that ran was cancelled";

/// The class of a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Failed,
    Usage,
    NotFound,
    Conflict,
    Unauthorized,
    Unreachable,
    Interrupted,
}

impl Kind {
    /// The class of an answer's HTTP status.
    pub(super) fn of_status(status: u16) -> Self {
        match status {
            401 | 403 => Self::Unauthorized,
            404 => Self::NotFound,
            409 => Self::Conflict,
            _ => Self::Failed,
        }
    }

    /// The exit code that tells it.
    pub(super) fn exit_code(self) -> u8 {
        match self {
            Self::Failed => FAILED,
            Self::Usage => USAGE,
            Self::NotFound => NOT_FOUND,
            Self::Conflict => CONFLICT,
            Self::Unauthorized => UNAUTHORIZED,
            Self::Unreachable => UNREACHABLE,
            Self::Interrupted => INTERRUPTED,
        }
    }
}

/// A failed command: the cause, and what to do next.
#[derive(Debug, Clone)]
pub(super) struct CtlError {
    pub(super) kind: Kind,
    /// What went wrong, in one sentence.
    pub(super) cause: String,
    /// What to do; may be empty.
    pub(super) next: String,
}

/// Result of a command.
pub(super) type CtlResult<T> = Result<T, CtlError>;

impl CtlError {
    pub(super) fn new(kind: Kind, cause: impl Into<String>, next: impl Into<String>) -> Self {
        Self { kind, cause: cause.into(), next: next.into() }
    }

    pub(super) fn failed(cause: impl Into<String>, next: impl Into<String>) -> Self {
        Self::new(Kind::Failed, cause, next)
    }

    pub(super) fn usage(cause: impl Into<String>, next: impl Into<String>) -> Self {
        Self::new(Kind::Usage, cause, next)
    }

    /// Whether it may go away by itself: a hub that is being restarted.
    pub(super) fn is_passing(&self) -> bool {
        self.kind == Kind::Unreachable
    }
}

impl fmt::Display for CtlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.cause)?;
        if self.next.is_empty() { Ok(()) } else { write!(f, "\n  {}", self.next) }
    }
}

impl From<CaptureError> for CtlError {
    fn from(error: CaptureError) -> Self {
        let (kind, next) = match &error {
            CaptureError::Invalid(_) => (Kind::Usage, ""),
            CaptureError::Cancelled => (Kind::Interrupted, ""),
            CaptureError::Source { .. } => (Kind::Failed, "check that the source can be read"),
            CaptureError::Connect { .. } => {
                (Kind::Failed, "check the way to the NBD port; --nbd HOST:PORT names another one")
            }
            _ => (Kind::Failed, ""),
        };
        Self::new(kind, error.to_string(), next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_exit_code_is_told_in_the_help() {
        for code in [OK, FAILED, USAGE, NOT_FOUND, CONFLICT, UNAUTHORIZED, UNREACHABLE, INTERRUPTED]
        {
            let told = EXIT_CODES.lines().any(|l| l.trim().starts_with(&format!("{code} ")));
            assert!(told, "{code}");
        }
    }
}
