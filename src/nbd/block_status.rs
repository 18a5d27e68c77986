//! Block status: what the metadata contexts of an export tell of a range.

use nbd_proto::server::{ExtentList, Request, StatusFilter};
use nbd_proto::{ALLOCATION_DEPTH, ExtentState};

use super::session::Session;
use crate::block::{BlockResult, Extent};

impl Session {
    pub(super) fn block_status(
        &mut self,
        request: &Request,
        one: bool,
        filter: &StatusFilter,
    ) -> BlockResult<()> {
        let wanted = |id: u32| match filter {
            StatusFilter::All => true,
            StatusFilter::Ids(ids) => ids.contains(&id),
        };
        let mut lists: Vec<(u32, bool, ExtentList)> = (1..)
            .zip(&self.contexts)
            .filter(|(id, _)| wanted(*id))
            .map(|(id, name)| (id, name == ALLOCATION_DEPTH, ExtentList::default()))
            .collect();
        let device = &self.shared.export.device;
        device.extents(request.offset, request.length, &mut |extent| {
            let mut open = false;
            for (_, depth, list) in &mut lists {
                let flags = if *depth { u64::from(extent.depth) } else { allocation(&extent) };
                // With REQ_ONE a list ends where the state first changes.
                let ended = one && list.extents().iter().any(|(_, f)| *f != flags);
                if !ended && list.push(extent.length, flags) {
                    open = true;
                }
            }
            open
        })?;
        let last = lists.len().saturating_sub(1);
        let id = (request.cookie, request.offset);
        for (number, (context, _, list)) in lists.iter().enumerate() {
            let done = number == last;
            self.shared.encoder.block_status(&mut self.batch, id, *context, list, done);
        }
        Ok(())
    }
}

/// The state word of `base:allocation`.
fn allocation(extent: &Extent) -> u64 {
    let state = ExtentState::empty()
        .with_if(extent.hole, ExtentState::HOLE)
        .with_if(extent.zero, ExtentState::ZERO);
    u64::from(state.0)
}
