//! A disk behind an NBD server.

use std::sync::{Mutex, MutexGuard, PoisonError};

use nbd_proto::{BASE_ALLOCATION, Errno, ExtentState, Mode, ProtocolError, TransmissionFlags};

use super::source::Stretch;
use crate::nbd::client::{Address, Client, ClientError, ClientOptions, ClientResult};

/// Namespace of qemu's metadata contexts.
const QEMU: &str = "qemu:";
/// Start of the names of qemu's dirty bitmaps.
const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";
/// State of a dirty range in a bitmap's context.
const DIRTY: u64 = 1;
/// Longest range that one block status request asks for, in bytes.
const STATUS: u64 = 1 << 30;

/// An export in use.
pub(super) struct RemoteSource {
    address: Address,
    options: ClientOptions,
    /// The connection that knows the contexts.
    main: Mutex<Client>,
    /// Others that only read; as many as there were reads at a time.
    idle: Mutex<Vec<Client>>,
    /// The server shows the same to all connections.
    multi: bool,
    size: u64,
    minimum: u64,
    maximum: u64,
    allocation: Option<u32>,
    bitmaps: Vec<(u32, String)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl RemoteSource {
    pub(super) fn open(address: Address, export: &str) -> ClientResult<Self> {
        let listed = match Client::list_contexts(&address, export, QEMU) {
            Ok(names) => names,
            // A server need not be able to list; what the export itself says comes next.
            Err(ClientError::Refused(_)) => Vec::new(),
            Err(error) => return Err(error),
        };
        let bitmaps = listed.into_iter().filter(|name| name.starts_with(DIRTY_BITMAP));
        let contexts = [BASE_ALLOCATION.to_owned()].into_iter().chain(bitmaps).collect();
        let mode = Mode::Extended;
        let options = ClientOptions { mode, contexts, ..ClientOptions::new(export) };
        let main = Client::connect(&address, &options)?;
        let session = main.session();
        if i64::try_from(session.size).is_err() {
            let text = format!("an export of {} bytes", session.size);
            return Err(ProtocolError(text).into());
        }
        let minimum = u64::from(session.block.minimum);
        let allocation = session.contexts.iter().find(|(_, name)| name == BASE_ALLOCATION);
        let named = |(id, name): &(u32, String)| {
            name.strip_prefix(DIRTY_BITMAP).map(|name| (*id, name.to_owned()))
        };
        Ok(Self {
            size: session.size,
            minimum,
            maximum: (u64::from(session.block.maximum) / minimum * minimum).max(minimum),
            multi: session.flags.contains(TransmissionFlags::CAN_MULTI_CONN),
            allocation: allocation.map(|(id, _)| *id),
            bitmaps: session.contexts.iter().filter_map(named).collect(),
            options: ClientOptions { contexts: Vec::new(), ..options },
            main: Mutex::new(main),
            idle: Mutex::default(),
            address,
        })
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn minimum(&self) -> u64 {
        self.minimum
    }

    pub(super) fn bitmaps(&self) -> impl Iterator<Item = &str> {
        self.bitmaps.iter().map(|(_, name)| name.as_str())
    }

    /// Extents of a context that cover `from .. to`: start, end, state.
    fn status(
        &self,
        context: u32,
        (from, to): (u64, u64),
        mut visit: impl FnMut(u64, u64, u64),
    ) -> ClientResult<()> {
        let mut main = lock(&self.main);
        let mut at = from / self.minimum * self.minimum;
        while at < to {
            let length = (to - at).next_multiple_of(self.minimum).min(STATUS).min(self.size - at);
            let statuses = main.block_status(at, length)?;
            let start = at;
            for (_, extents) in statuses.iter().filter(|(id, _)| *id == context) {
                for (length, state) in extents {
                    let end = at.saturating_add(*length);
                    let (first, last) = (at.clamp(from, to), end.clamp(from, to));
                    if first < last {
                        visit(first, last, *state);
                    }
                    at = end;
                }
            }
            if at == start {
                let text = "a block status does not tell anything of its context";
                return Err(ProtocolError(text.into()).into());
            }
        }
        Ok(())
    }

    /// Holes and zeroes as the server tells them; where it cannot, everything is data.
    pub(super) fn map(&self, from: u64, to: u64) -> ClientResult<Vec<Stretch>> {
        let mut stretches = Vec::new();
        let Some(context) = self.allocation else {
            stretches.push(Stretch { from, to, zero: false });
            return Ok(stretches);
        };
        let told = self.status(context, (from, to), |from, to, state| {
            let zero = state & u64::from(ExtentState::ZERO.0) != 0;
            stretches.push(Stretch { from, to, zero });
        });
        match told {
            Ok(()) => {}
            Err(ClientError::Failed { .. }) => {
                let from = stretches.last().map_or(from, |stretch: &Stretch| stretch.to);
                stretches.push(Stretch { from, to, zero: false });
            }
            Err(error) => return Err(error),
        }
        Ok(stretches)
    }

    /// The dirty ranges of a bitmap, as (offset, length).
    pub(super) fn changed(&self, bitmap: &str) -> ClientResult<Vec<(u64, u64)>> {
        let Some((context, _)) = self.bitmaps.iter().find(|(_, name)| name == bitmap) else {
            let text = format!("there is no bitmap {bitmap}");
            return Err(ClientError::Failed { errno: Errno::Inval, text, at: None });
        };
        let mut changed: Vec<(u64, u64)> = Vec::new();
        self.status(*context, (0, self.size), |from, to, state| {
            if state & DIRTY == 0 {
                return;
            }
            match changed.last_mut() {
                Some((offset, length)) if *offset + *length == from => *length += to - from,
                _ => changed.push((from, to - from)),
            }
        })?;
        Ok(changed)
    }

    /// Reads on a connection of its own where the server allows that.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> ClientResult<()> {
        let idle = lock(&self.idle).pop();
        let own = match idle {
            Some(client) => Some(client),
            None if self.multi => match Client::connect(&self.address, &self.options) {
                Ok(client) => Some(client),
                // It has as many as it wants.
                Err(ClientError::Refused(_)) => None,
                Err(error) => return Err(error),
            },
            None => None,
        };
        match own {
            Some(mut client) => {
                self.read_on(&mut client, buf, offset)?;
                lock(&self.idle).push(client);
                Ok(())
            }
            None => self.read_on(&mut lock(&self.main), buf, offset),
        }
    }

    fn read_on(&self, client: &mut Client, buf: &mut [u8], offset: u64) -> ClientResult<()> {
        let inside = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
        let end = offset + buf.len() as u64;
        let (from, to) = (offset / self.minimum * self.minimum, end);
        let to = to.next_multiple_of(self.minimum).min(self.size);
        if (from, to) != (offset, end) {
            let mut wide = vec![0; inside(to - from)];
            self.read_on(client, &mut wide, from)?;
            let skip = inside(offset - from);
            buf.copy_from_slice(&wide[skip..skip + buf.len()]);
            return Ok(());
        }
        let mut at = offset;
        for part in buf.chunks_mut(inside(self.maximum)) {
            client.read(part, at)?;
            at += part.len() as u64;
        }
        Ok(())
    }
}
