//! A server inside the test process, on a loopback port of its own.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use sendense_hub::block::{
    BlockDevice, BlockError, BlockErrorKind, BlockResult, DeviceInfo, Extent, ZeroOptions,
};
use sendense_hub::export::memory::MemoryDevice;
use sendense_hub::nbd::client::{Client, ClientOptions};
use sendense_hub::nbd::exports::Export;
use sendense_hub::nbd::handshake::Pending;
use sendense_hub::nbd::limits::Limits;
use sendense_hub::nbd::listener::Listener;
use sendense_hub::nbd::server::Server;

/// The server; ends when dropped.
pub struct Local {
    pub server: Arc<Server>,
    pub pending: Arc<Pending>,
    pub address: SocketAddr,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Local {
    /// Serves `device` as `disk`.
    pub fn start(limits: Limits, device: Arc<dyn BlockDevice>) -> Self {
        let server = Server::new(limits).unwrap();
        let limits = &server.limits;
        let (connections, payload) = (limits.connections_per_export, limits.max_payload);
        let export = Export::new("disk".into(), String::new(), device, connections, payload);
        server.exports.add(export).unwrap();
        let bound = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = bound.local_addr().unwrap();
        let pending = Arc::new(Pending::default());
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let (serving, waiting) = (Arc::clone(&server), Arc::clone(&pending));
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let listener = Listener::from_tcp(bound).unwrap();
                let _serving = listener.serve(serving, waiting, None);
                let _ = stopped.await;
            });
        });
        Self { server, pending, address, stop: Some(stop), thread: Some(thread) }
    }

    pub fn export(&self) -> Arc<Export> {
        self.server.exports.get("disk").unwrap()
    }

    pub fn client(&self) -> Client {
        self.client_with(&ClientOptions::new("disk"))
    }

    pub fn client_with(&self, options: &ClientOptions) -> Client {
        Client::connect_tcp(&self.address.to_string(), options).unwrap()
    }

    /// A raw connection that gives up reading after a while.
    pub fn raw(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    /// A raw connection in the transmission phase, with structured replies or simple ones.
    pub fn transmitting(&self, structured: bool) -> TcpStream {
        let mut stream = self.raw();
        let mut hello = [0; 18];
        stream.read_exact(&mut hello).unwrap();
        stream.write_all(&[0, 0, 0, 3]).unwrap();
        if structured {
            stream.write_all(b"IHAVEOPT\0\0\0\x08\0\0\0\0").unwrap();
            stream.read_exact(&mut [0; 20]).unwrap();
        }
        stream.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\x04disk").unwrap();
        stream.read_exact(&mut [0; 10]).unwrap();
        stream
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        if let Some(export) = self.server.exports.remove("disk") {
            let _ = export.close(Duration::ZERO, Duration::from_secs(10));
        }
        drop(self.stop.take());
        let _ = self.thread.take().unwrap().join();
    }
}

/// A compact request.
pub fn request(command: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = vec![0x25, 0x60, 0x95, 0x13];
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// What a test device does before a call.
pub type Hook = Box<dyn Fn(&str, u64, usize) -> BlockResult<()> + Send + Sync>;

/// A memory device with a hook before reads, writes and flushes.
pub struct Hooked {
    pub memory: MemoryDevice,
    hook: Hook,
}

impl Hooked {
    pub fn new(
        size: usize,
        hook: impl Fn(&str, u64, usize) -> BlockResult<()> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self { memory: MemoryDevice::new(size, false), hook: Box::new(hook) })
    }
}

impl BlockDevice for Hooked {
    fn info(&self) -> &DeviceInfo {
        self.memory.info()
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> BlockResult<()> {
        (self.hook)("read", offset, buf.len())?;
        self.memory.read(buf, offset)
    }

    fn write(&self, buf: &[u8], offset: u64) -> BlockResult<()> {
        (self.hook)("write", offset, buf.len())?;
        self.memory.write(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, length: u64, options: ZeroOptions) -> BlockResult<()> {
        self.memory.write_zeroes(offset, length, options)
    }

    fn discard(&self, offset: u64, length: u64) -> BlockResult<()> {
        self.memory.discard(offset, length)
    }

    fn flush(&self) -> BlockResult<()> {
        (self.hook)("flush", 0, 0)?;
        self.memory.flush()
    }

    fn cache(&self, offset: u64, length: u64) -> BlockResult<()> {
        self.memory.cache(offset, length)
    }

    fn extents(
        &self,
        offset: u64,
        length: u64,
        visit: &mut dyn FnMut(Extent) -> bool,
    ) -> BlockResult<()> {
        self.memory.extents(offset, length, visit)
    }

    fn close(&self) -> BlockResult<()> {
        self.memory.close()
    }
}

/// A medium error at a byte.
pub fn broken(offset: u64) -> BlockError {
    BlockError::new(BlockErrorKind::Io, "the medium is scratched").at(offset)
}

/// A door that opens once.
#[derive(Default)]
pub struct Door {
    open: Mutex<bool>,
    changed: Condvar,
}

impl Door {
    pub fn pass(&self) {
        let mut open = self.open.lock().unwrap();
        while !*open {
            open = self.changed.wait(open).unwrap();
        }
    }

    pub fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.changed.notify_all();
    }
}
