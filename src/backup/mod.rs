//! Backups of VMs: from request to restore point.
//!
//! ```text
//! queued -> preparing -> receiving -> sealing -> completed
//!    \___________\____________\-> failed | cancelled
//! ```
//!
//! The catalog has the state, so that it survives the process; `Running` has what
//! goes with it: open images, exports, signs of life. Whoever changes a backup holds its turn.

mod callbacks;
mod copies;
mod end;
mod error;
mod launch;
mod library;
mod plan;
mod receive;
mod received;
mod recover;
mod retention;
mod running;
mod service;
mod settings;
mod sna;
mod verify;
mod watch;

pub use callbacks::{ChangeId, Telemetry};
pub use error::{Failure, FailureKind};
pub use library::ImportReport;
pub use plan::{DiskPlan, Plan, Request};
pub use retention::expired;
pub use running::Progress;
pub use service::Backups;
pub use settings::Settings;
pub use verify::MergedChecksums;
pub use watch::{dispatch, keep, watch};
