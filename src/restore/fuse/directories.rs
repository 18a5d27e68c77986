//! Open directories: a page of names each, and where the listing goes on.

use guest::tree::Listed;
use guest::{Cursor, Error, Node, Result, Tree};

use super::super::files::proper;

/// Names that are asked for at once.
const PAGE: usize = 256;

/// A directory that is being listed.
pub(super) struct OpenDirectory {
    page: Vec<Listed>,
    /// Number of the page's first name in the directory.
    first: u64,
    next: Option<Cursor>,
}

impl OpenDirectory {
    pub(super) fn new() -> Self {
        Self { page: Vec::new(), first: 0, next: Some(Cursor(0)) }
    }

    /// The name with that number; `None` behind the last one. Names are read forwards; going back begins
    /// anew.
    pub(super) fn name(
        &mut self,
        tree: &dyn Tree,
        directory: Node,
        number: u64,
    ) -> Result<Option<&Listed>> {
        if number < self.first {
            *self = Self::new();
        }
        while number >= self.first + self.page.len() as u64 {
            let Some(cursor) = self.next else { return Ok(None) };
            let listing = tree.list(directory, cursor, PAGE)?;
            if listing.entries.is_empty() && listing.next.is_some() {
                return Err(Error::corrupt("a listing goes on without names"));
            }
            if !listing.entries.iter().all(|entry| proper(&entry.name)) {
                return Err(Error::corrupt("a directory has a name that is none"));
            }
            self.first += self.page.len() as u64;
            self.page = listing.entries;
            self.next = listing.next;
        }
        let index = usize::try_from(number - self.first).unwrap_or(usize::MAX);
        Ok(self.page.get(index))
    }
}
