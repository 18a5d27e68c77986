//! A server in this process, and raw sockets that need not behave.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use nbd_proto::{CommandFlags, CommandType, Mode};
use sendense_hub::block::BlockDevice;
use sendense_hub::nbd::client::{Client, ClientOptions};
use sendense_hub::nbd::exports::Export;
use sendense_hub::nbd::handshake::Pending;
use sendense_hub::nbd::limits::Limits;
use sendense_hub::nbd::listener::Listener;
use sendense_hub::nbd::server::Server;

pub mod devices;

/// Nothing here takes that long unless something hangs.
pub const GUARD: Duration = Duration::from_secs(20);

/// Patience of the server with silent peers in tests that wait for its end.
pub const SHORT: Duration = Duration::from_millis(300);

/// A server with a listener on the loopback address.
pub struct Hub {
    pub server: Arc<Server>,
    pub pending: Arc<Pending>,
    pub address: SocketAddr,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Hub {
    pub fn start(limits: Limits) -> Self {
        let server = Server::new(limits).unwrap();
        let pending = Arc::new(Pending::default());
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let (tell, told) = std::sync::mpsc::channel();
        let (s, p) = (Arc::clone(&server), Arc::clone(&pending));
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let bound = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
                tell.send(bound.local_addr().unwrap()).unwrap();
                let _serving = Listener::from_tcp(bound).unwrap().serve(s, p, None);
                let _ = stopped.await;
            });
        });
        let address = told.recv().unwrap();
        Self { server, pending, address, stop: Some(stop), thread: Some(thread) }
    }

    /// A server with one export named `disk`.
    pub fn with(limits: Limits, device: Arc<dyn BlockDevice>) -> Self {
        let hub = Self::start(limits);
        hub.add("disk", device);
        hub
    }

    pub fn add(&self, name: &str, device: Arc<dyn BlockDevice>) -> Arc<Export> {
        let limits = &self.server.limits;
        let export = Export::new(name.to_owned(), String::new(), device, limits);
        self.server.exports.add(Arc::clone(&export)).unwrap();
        export
    }

    pub fn client(&self, mode: Mode) -> Client {
        self.connect(&ClientOptions { mode, ..ClientOptions::new("disk") })
    }

    pub fn connect(&self, options: &ClientOptions) -> Client {
        Client::connect_tcp(&self.address.to_string(), options).unwrap()
    }

    /// A connection that has sent and received nothing.
    pub fn raw(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(GUARD)).unwrap();
        stream.set_write_timeout(Some(GUARD)).unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    /// A connection in the transmission phase, in simple mode.
    pub fn transmitting(&self) -> TcpStream {
        let mut stream = self.raw();
        negotiate(&mut stream, "disk");
        stream
    }

    /// The same with structured replies.
    pub fn transmitting_structured(&self) -> TcpStream {
        let mut stream = self.raw();
        greet(&mut stream);
        stream.write_all(&option(8, &[])).unwrap();
        assert_eq!(option_reply(&mut stream).0, 1);
        stream.write_all(&go("disk")).unwrap();
        while option_reply(&mut stream).0 != 1 {}
        stream
    }

    /// Waits until `condition` holds; the guard ends a test in which it never does.
    pub fn wait_until(&self, condition: impl Fn(&Self) -> bool) {
        let start = std::time::Instant::now();
        while !condition(self) {
            assert!(start.elapsed() < GUARD, "the condition never came true");
            std::thread::yield_now();
        }
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        for export in self.server.exports.all() {
            let _ = export.close(Duration::ZERO, Duration::ZERO);
        }
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub fn option(code: u32, data: &[u8]) -> Vec<u8> {
    let mut out = b"IHAVEOPT".to_vec();
    out.extend_from_slice(&code.to_be_bytes());
    out.extend_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes());
    out.extend_from_slice(data);
    out
}

/// Data of `NBD_OPT_GO` for an export, without information requests.
pub fn go(name: &str) -> Vec<u8> {
    let mut data = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&[0, 0]);
    option(7, &data)
}

/// Greeting and client flags.
pub fn greet(stream: &mut TcpStream) {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    stream.write_all(&3u32.to_be_bytes()).unwrap();
}

/// One option reply: its type and data.
pub fn option_reply(stream: &mut TcpStream) -> (u32, Vec<u8>) {
    let mut header = [0; 20];
    stream.read_exact(&mut header).unwrap();
    assert_eq!(u64::from_be_bytes(header[..8].try_into().unwrap()), 0x0003_e889_0455_65a9);
    let kind = u32::from_be_bytes(header[12..16].try_into().unwrap());
    let mut data = vec![0; u32::from_be_bytes(header[16..].try_into().unwrap()) as usize];
    stream.read_exact(&mut data).unwrap();
    (kind, data)
}

pub fn negotiate(stream: &mut TcpStream, name: &str) {
    greet(stream);
    stream.write_all(&go(name)).unwrap();
    while option_reply(stream).0 != 1 {}
}

pub fn request(command: CommandType, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    request_with(command.code(), CommandFlags::empty(), cookie, offset, length)
}

pub fn request_with(
    command: u16,
    flags: CommandFlags,
    cookie: u64,
    offset: u64,
    length: u32,
) -> Vec<u8> {
    let mut out = 0x2560_9513u32.to_be_bytes().to_vec();
    out.extend_from_slice(&flags.0.to_be_bytes());
    out.extend_from_slice(&command.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
    out.extend_from_slice(&offset.to_be_bytes());
    out.extend_from_slice(&length.to_be_bytes());
    out
}

/// Header of one simple reply: error and cookie.
pub fn simple_reply(stream: &mut TcpStream) -> (u32, u64) {
    let mut header = [0; 16];
    stream.read_exact(&mut header).unwrap();
    assert_eq!(header[..4], 0x6744_6698u32.to_be_bytes());
    let error = u32::from_be_bytes(header[4..8].try_into().unwrap());
    (error, u64::from_be_bytes(header[8..].try_into().unwrap()))
}

/// Whether the server closed the connection, once it has sent all it wanted.
pub fn is_closed(stream: &mut TcpStream) -> bool {
    let mut sink = [0; 4096];
    loop {
        match stream.read(&mut sink) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(e) => return e.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}
