//! What a check found.

/// Sentences kept in a report; the totals go on counting.
const MAX_FINDINGS: usize = 64;

/// What a check may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    None,
    /// Leaked clusters are given back, if there is no corruption.
    Leaks,
    /// Refcounts are built anew and `COPIED` flags put right. Entries that point nowhere are left,
    /// and so is space that only they may have led to.
    All,
}

/// The result of a check.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Findings that endanger data: refcounts below the references, wrong `COPIED` flags, entries
    /// that point outside the file or off a cluster, reserved bits, metadata used twice. After
    /// repair: those left.
    pub corruptions: u64,
    /// Clusters counted as used that nothing refers to. After repair: those left.
    pub leaks: u64,
    /// Corruptions that the repair removed.
    pub corruptions_fixed: u64,
    /// Leaks that the repair removed.
    pub leaks_fixed: u64,
    /// The first findings, in words; after repair those from before it.
    pub findings: Vec<String>,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Clusters of the virtual disk that have a host cluster, compressed ones included.
    pub allocated_clusters: u64,
    /// Compressed clusters of the virtual disk.
    pub compressed_clusters: u64,
    /// Clusters of the virtual disk that are marked as zeroes, with or without a host cluster.
    pub zero_clusters: u64,
    /// Allocated clusters that do not follow their predecessor in the file; compressed ones always
    /// count.
    pub fragmented_clusters: u64,
    /// One past the last byte of the file that is in use.
    pub image_end_offset: u64,
}

impl CheckReport {
    /// Neither corruption nor leak is left.
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0
    }

    pub(super) fn corruption(&mut self, sentence: impl FnOnce() -> String) {
        self.corruptions += 1;
        self.note(sentence);
    }

    pub(super) fn leak(&mut self, sentence: impl FnOnce() -> String) {
        self.leaks += 1;
        self.note(sentence);
    }

    fn note(&mut self, sentence: impl FnOnce() -> String) {
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(sentence());
        }
    }
}
