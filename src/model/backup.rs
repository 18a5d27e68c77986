//! Kinds and states of backups.

use super::words::words;

words! {
    /// What a backup holds.
    BackupType {
        /// Every block of the disk.
        Full = "full",
        /// What changed since the parent.
        Incremental = "incremental",
    }
}

words! {
    /// The state of a backup, which is also the state of the job that makes it.
    BackupState {
        /// Waits for its turn.
        Queued = "queued",
        /// Images and exports are made, the agent is called.
        Preparing = "preparing",
        /// The agent sends.
        Receiving = "receiving",
        /// All disks are sealed; files get their names and the catalog its entry. Rolled forward
        /// after a crash.
        Sealing = "sealing",
        /// A restore point.
        Completed = "completed",
        /// Ended without a restore point; the error says why.
        Failed = "failed",
        /// Ended by the operator without a restore point.
        Cancelled = "cancelled",
        /// Being taken away. Rolled forward after a crash.
        Deleting = "deleting",
    }
}

words! {
    /// The state of one disk of a backup.
    DiskState {
        /// Not complete yet.
        Receiving = "receiving",
        /// Image, checksums and manifest are on disk under their temporary names.
        Sealed = "sealed",
        /// Part of a restore point.
        Completed = "completed",
        /// Given up with its backup.
        Failed = "failed",
    }
}

words! {
    /// The state of a copy of a restore point.
    CopyState {
        /// Waits for its turn.
        Pending = "pending",
        /// Being made.
        Copying = "copying",
        /// There, and verified.
        Completed = "completed",
        /// Not there; it can be asked for again.
        Failed = "failed",
    }
}

impl BackupState {
    /// Whether somebody works on it.
    pub fn is_running(self) -> bool {
        matches!(self, Self::Queued | Self::Preparing | Self::Receiving | Self::Sealing)
    }

    /// The word that clients of the old hub know.
    pub fn status(self) -> &'static str {
        match self {
            Self::Queued => "pending",
            Self::Preparing | Self::Receiving | Self::Sealing => "running",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Deleting => "deleting",
        }
    }

    /// The states that a client's word stands for; its own words and ours.
    pub fn of_status(word: &str) -> Vec<Self> {
        const ALL: [BackupState; 8] = [
            BackupState::Queued,
            BackupState::Preparing,
            BackupState::Receiving,
            BackupState::Sealing,
            BackupState::Completed,
            BackupState::Failed,
            BackupState::Cancelled,
            BackupState::Deleting,
        ];
        ALL.into_iter().filter(|s| s.status() == word || s.as_str() == word).collect()
    }
}
