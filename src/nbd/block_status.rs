//! Block status: what the metadata contexts of an export tell of a range.

use nbd_proto::server::{ExtentList, Request, StatusFilter};
use nbd_proto::{ALLOCATION_DEPTH, ExtentState, SENDENSE_DURABLE, STATE_DURABLE};

use super::session::Session;
use crate::block::{BlockResult, Extent};

/// What a context tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Context {
    /// Holes and zeroes: `base:allocation`.
    Allocation,
    /// How deep in the chain: [`ALLOCATION_DEPTH`].
    Depth,
    /// What need not be sent again: [`SENDENSE_DURABLE`].
    Durable,
}

impl Context {
    /// Of one of the names that the negotiation offers.
    fn from_name(name: &str) -> Self {
        match name {
            ALLOCATION_DEPTH => Self::Depth,
            SENDENSE_DURABLE => Self::Durable,
            _ => Self::Allocation,
        }
    }
}

/// The answer of one context.
struct Answer {
    id: u32,
    context: Context,
    list: ExtentList,
}

impl Answer {
    /// Appends an extent; `false` where the answer takes no more. With `NBD_CMD_FLAG_REQ_ONE` it ends
    /// where the state first changes.
    fn push(&mut self, one: bool, length: u64, flags: u64) -> bool {
        let ended = one && self.list.extents().iter().any(|(_, f)| *f != flags);
        !ended && self.list.push(length, flags)
    }
}

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
        let mut answers: Vec<Answer> = (1..)
            .zip(&self.contexts)
            .filter(|(id, _)| wanted(*id))
            .map(|(id, name)| (id, Context::from_name(name)))
            .map(|(id, context)| Answer { id, context, list: ExtentList::default() })
            .collect();
        let device = &self.shared.export.device;
        if answers.iter().any(|answer| answer.context != Context::Durable) {
            device.extents(request.offset, request.length, &mut |extent| {
                let mut open = false;
                for answer in &mut answers {
                    let flags = match answer.context {
                        Context::Allocation => allocation(&extent),
                        Context::Depth => u64::from(extent.depth),
                        Context::Durable => continue,
                    };
                    open |= answer.push(one, extent.length, flags);
                }
                open
            })?;
        }
        if let Some(answer) = answers.iter_mut().find(|a| a.context == Context::Durable) {
            device.durable(request.offset, request.length, &mut |_, length, durable| {
                answer.push(one, length, if durable { STATE_DURABLE } else { 0 })
            })?;
        }
        let last = answers.len().saturating_sub(1);
        let id = (request.cookie, request.offset);
        for (number, Answer { id: context, list, .. }) in answers.iter().enumerate() {
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
