//! The exports of the process, by name; each visible only while its device is open.

use std::collections::{BTreeMap, HashMap};
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use nbd_proto::server::ExportInfo;
use nbd_proto::{
    ALLOCATION_DEPTH, BASE_ALLOCATION, BlockSizes, SENDENSE_DURABLE, TransmissionFlags,
};

use super::limits::{INLINE_READ, INLINE_WRITE, Limits};
use super::socket::Socket;
use super::stats::Stats;
use super::workers::{Pace, Workers};
use crate::block::{BlockDevice, BlockError, BlockErrorKind, BlockResult};
use crate::model::validate_export_name;

/// Preferred block size where the device has none: 64 KiB, and bounds of what is advertised.
const PREFERRED: (u32, u32) = (4096, 32 << 20);

/// A connection in the transmission phase, as others see it.
#[derive(Debug)]
pub(super) struct Control {
    socket: Arc<Socket>,
    shutting_down: AtomicBool,
    phase: Mutex<Phase>,
}

/// Whether a connection may be ended now.
#[derive(Debug, Default)]
struct Phase {
    /// A request is being received or carried out.
    busy: bool,
    /// Nothing more is received once that is over.
    ending: bool,
}

impl Control {
    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request begins: the connection stays until it is received.
    pub(super) fn begin_request(&self) {
        self.phase().busy = true;
    }

    /// The request is received.
    pub(super) fn end_request(&self) {
        let mut phase = self.phase();
        phase.busy = false;
        if phase.ending {
            self.socket.shut(Shutdown::Read);
        }
    }

    /// Whether the connection is being ended from this side.
    pub(super) fn is_ending(&self) -> bool {
        self.phase().ending
    }

    /// Ends the connection once the request that is coming in, if any, is received. What has come
    /// in already is still answered.
    fn end(&self) {
        let mut phase = self.phase();
        phase.ending = true;
        if !phase.busy {
            self.socket.shut(Shutdown::Read);
        }
    }

    /// Whether new requests are to be refused.
    pub(super) fn is_shutting_down(&self) -> bool {
        self.shutting_down.load(Ordering::Acquire)
    }
}

#[derive(Default)]
struct Sessions {
    next: u64,
    open: HashMap<u64, Arc<Control>>,
    /// Whoever comes is ended at once.
    ending: bool,
}

/// One export.
pub struct Export {
    /// Its name.
    pub name: String,
    /// For human eyes.
    pub description: String,
    /// What it serves.
    pub device: Arc<dyn BlockDevice>,
    /// What it did.
    pub stats: Stats,
    pub(super) workers: Workers,
    pub(super) pace: Pace,
    max_connections: usize,
    max_payload: u32,
    in_use: AtomicUsize,
    served: AtomicU64,
    closing: AtomicBool,
    sessions: Mutex<Sessions>,
    left: Condvar,
}

/// One of an export's connections; counts until dropped.
pub struct Slot {
    export: Arc<Export>,
}

impl Slot {
    /// The export.
    pub fn export(&self) -> &Arc<Export> {
        &self.export
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.export.in_use.fetch_sub(1, Ordering::AcqRel);
        let _sessions = self.export.sessions();
        self.export.left.notify_all();
    }
}

/// A connection on an export's list.
pub(super) struct Entered {
    export: Arc<Export>,
    id: u64,
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.export.sessions().open.remove(&self.id);
        self.export.left.notify_all();
    }
}

impl Export {
    /// An export of `device`, within `limits`.
    pub fn new(
        name: String,
        description: String,
        device: Arc<dyn BlockDevice>,
        limits: &Limits,
    ) -> Arc<Self> {
        let threads = limits.threads(device.info());
        Arc::new(Self {
            name,
            description,
            device,
            stats: Stats::default(),
            workers: Workers::new(threads),
            pace: Pace::default(),
            max_connections: limits.connections_per_export,
            max_payload: limits.max_payload,
            in_use: AtomicUsize::new(0),
            served: AtomicU64::new(0),
            closing: AtomicBool::new(false),
            sessions: Mutex::default(),
            left: Condvar::new(),
        })
    }

    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the negotiation tells of the export.
    pub fn info(&self) -> ExportInfo {
        use TransmissionFlags as F;
        let device = self.device.info();
        let writable = !device.read_only;
        let flags = F::SEND_FLUSH
            .with(F::SEND_FUA)
            .with(F::SEND_DF)
            .with(F::CAN_MULTI_CONN)
            .with(F::SEND_CACHE)
            .with(F::BLOCK_STAT_PAYLOAD)
            .with_if(device.read_only, F::READ_ONLY)
            .with_if(device.rotational, F::ROTATIONAL)
            .with_if(writable && device.can_discard, F::SEND_TRIM)
            .with_if(writable, F::SEND_WRITE_ZEROES)
            .with_if(writable, F::SEND_FAST_ZERO);
        let mut contexts = vec![BASE_ALLOCATION.to_owned()];
        if device.has_depth {
            contexts.push(ALLOCATION_DEPTH.to_owned());
        }
        if device.tells_durable {
            contexts.push(SENDENSE_DURABLE.to_owned());
        }
        ExportInfo {
            name: self.name.clone(),
            description: self.description.clone(),
            size: device.size,
            flags,
            block: BlockSizes {
                minimum: 1,
                preferred: device.preferred_block.clamp(PREFERRED.0, PREFERRED.1),
                maximum: self.max_payload,
            },
            contexts,
        }
    }

    /// Reserves a connection.
    ///
    /// # Errors
    /// A sentence with the export's limit.
    pub fn reserve(self: &Arc<Self>) -> Result<Slot, String> {
        let claim = |n: usize| (n < self.max_connections).then_some(n + 1);
        match self.in_use.fetch_update(Ordering::AcqRel, Ordering::Acquire, claim) {
            Ok(_) => Ok(Slot { export: Arc::clone(self) }),
            Err(_) => Err(format!(
                "export '{}' has {} connections already, its maximum",
                self.name, self.max_connections
            )),
        }
    }

    /// Connections now, those about to begin included, and those that ever began.
    pub fn connections(&self) -> (usize, u64) {
        (self.in_use.load(Ordering::Acquire), self.served.load(Ordering::Relaxed))
    }

    /// Enters a connection into the export's list; it leaves when the guard is dropped.
    pub(super) fn enter(self: &Arc<Self>, socket: &Arc<Socket>) -> (Entered, Arc<Control>) {
        let mut sessions = self.sessions();
        // Under the lock: whoever closes the export either finds this connection on the list, or
        // has left word for it.
        let control = Arc::new(Control {
            socket: Arc::clone(socket),
            shutting_down: AtomicBool::new(self.closing.load(Ordering::Acquire)),
            phase: Mutex::default(),
        });
        if sessions.ending {
            control.end();
        }
        let id = sessions.next;
        sessions.next += 1;
        sessions.open.insert(id, Arc::clone(&control));
        self.served.fetch_add(1, Ordering::Relaxed);
        (Entered { export: Arc::clone(self), id }, control)
    }

    /// Reads from the device.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> BlockResult<()> {
        match buf.len() {
            ..=INLINE_READ => self.pace.measure(|| self.device.read(buf, offset)),
            _ => self.device.read(buf, offset),
        }
    }

    /// Writes to the device.
    pub(super) fn write(&self, buf: &[u8], offset: u64) -> BlockResult<()> {
        match buf.len() {
            ..=INLINE_WRITE => self.pace.measure(|| self.device.write(buf, offset)),
            _ => self.device.write(buf, offset),
        }
    }

    /// Refuses new requests on every connection.
    pub fn begin_shutdown(&self) {
        self.closing.store(true, Ordering::Release);
        for control in self.sessions().open.values() {
            control.shutting_down.store(true, Ordering::Release);
        }
    }

    /// Ends the connections: requests that were received are finished and answered; after `bound`
    /// the rest is cut off. Returns whether everything ended in time.
    fn end_sessions(&self, notice: Duration, bound: Duration) -> bool {
        self.begin_shutdown();
        let start = Instant::now();
        if self.wait_empty(start + notice) {
            return true;
        }
        {
            let mut sessions = self.sessions();
            sessions.ending = true;
            for control in sessions.open.values() {
                control.end();
            }
        }
        if self.wait_empty(start + bound) {
            return true;
        }
        for control in self.sessions().open.values() {
            control.socket.shut(Shutdown::Both);
        }
        self.wait_empty(Instant::now() + notice);
        false
    }

    fn wait_empty(&self, until: Instant) -> bool {
        let mut sessions = self.sessions();
        loop {
            if sessions.open.is_empty() && self.in_use.load(Ordering::Acquire) == 0 {
                return true;
            }
            let Some(time) = until.checked_duration_since(Instant::now()) else { return false };
            let waited = self.left.wait_timeout(sessions, time);
            sessions = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Ends the connections and closes the device. Blocks for at most about `bound`, and as long
    /// as the device takes.
    ///
    /// # Errors
    /// What closing the device gave; `Io` where connections had to be cut off.
    pub fn close(&self, notice: Duration, bound: Duration) -> BlockResult<()> {
        let in_time = self.end_sessions(notice, bound);
        self.device.close()?;
        if in_time {
            return Ok(());
        }
        let text = format!("connections of export '{}' were cut off", self.name);
        Err(BlockError::new(BlockErrorKind::Io, text))
    }
}

#[derive(Default)]
struct Names {
    exports: BTreeMap<String, Arc<Export>>,
    /// Other names of exports.
    aliases: BTreeMap<String, String>,
}

/// All exports.
#[derive(Default)]
pub struct Exports {
    names: RwLock<Names>,
    closing: AtomicBool,
}

impl Exports {
    /// Makes an export visible.
    ///
    /// # Errors
    /// A sentence where the name is taken or not possible.
    pub fn add(&self, export: Arc<Export>) -> Result<(), String> {
        self.add_with_alias(export, None)
    }

    /// Makes an export visible under its name and another one.
    ///
    /// # Errors
    /// A sentence where a name is taken or not possible.
    pub fn add_with_alias(&self, export: Arc<Export>, alias: Option<&str>) -> Result<(), String> {
        let mut names = self.names.write().unwrap_or_else(PoisonError::into_inner);
        for name in std::iter::once(export.name.as_str()).chain(alias) {
            validate_export_name(name)?;
            if names.exports.contains_key(name) || names.aliases.contains_key(name) {
                return Err(format!("there is an export named '{name}' already"));
            }
        }
        if let Some(alias) = alias {
            names.aliases.insert(alias.to_owned(), export.name.clone());
        }
        names.exports.insert(export.name.clone(), export);
        Ok(())
    }

    /// Makes an export invisible and gives it to whoever closes it.
    pub fn remove(&self, name: &str) -> Option<Arc<Export>> {
        let mut names = self.names.write().unwrap_or_else(PoisonError::into_inner);
        names.aliases.retain(|_, of| of != name);
        names.exports.remove(name)
    }

    /// The export of that name or alias; the empty name stands for the only export, if there is just
    /// one.
    pub fn get(&self, name: &str) -> Option<Arc<Export>> {
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        let name = names.aliases.get(name).map_or(name, String::as_str);
        match names.exports.get(name) {
            None if name.is_empty() && names.exports.len() == 1 => {
                names.exports.values().next().cloned()
            }
            found => found.cloned(),
        }
    }

    /// All exports, by name.
    pub fn all(&self) -> Vec<Arc<Export>> {
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        names.exports.values().cloned().collect()
    }

    /// From now on negotiations are refused.
    pub fn begin_shutdown(&self) {
        self.closing.store(true, Ordering::Release);
        for export in self.all() {
            export.begin_shutdown();
        }
    }

    /// Whether the process is about to end.
    pub fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }
}
