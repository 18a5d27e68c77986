//! Disks in files, and a proxy that cuts connections.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

pub mod observer;

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use sendense_hub::capture::Source;

/// Bytes without a zero that differ from cluster to cluster.
pub fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|i| u8::try_from((i * 31 + i / 251 + seed * 7) % 255).unwrap() + 1).collect()
}

/// A disk in a file of its own.
pub struct Disk {
    file: tempfile::NamedTempFile,
}

impl Disk {
    /// One hole.
    pub fn sparse(size: u64) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        Self { file }
    }

    pub fn of(bytes: &[u8]) -> Self {
        let mut disk = Self::sparse(0);
        disk.write(bytes, 0);
        disk
    }

    pub fn write(&mut self, bytes: &[u8], offset: u64) {
        self.file.as_file().write_all_at(bytes, offset).unwrap();
    }

    pub fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.file.path()).unwrap()
    }

    pub fn source(&self) -> Source {
        Source::open(self.file.path().to_str().unwrap()).unwrap()
    }
}

struct Line {
    upstream: SocketAddr,
    /// Bytes to the server until the next cuts.
    cuts: Mutex<VecDeque<u64>>,
    passed: AtomicU64,
    closed: AtomicBool,
    stay_closed: AtomicBool,
    open: Mutex<Vec<TcpStream>>,
    at_cut: Box<dyn Fn() + Send + Sync>,
}

/// Passes connections on to a server, and drops all of them after so many bytes to the server.
pub struct Proxy {
    line: Arc<Line>,
    address: SocketAddr,
    accepting: Option<std::thread::JoinHandle<()>>,
}

impl Proxy {
    /// Cuts after each of these numbers of bytes, and then no more. `at_cut` is called while nobody is
    /// connected.
    pub fn start(
        upstream: SocketAddr,
        cuts: &[u64],
        at_cut: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        let line = Arc::new(Line {
            upstream,
            cuts: Mutex::new(cuts.iter().copied().collect()),
            passed: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            stay_closed: AtomicBool::new(false),
            open: Mutex::default(),
            at_cut: Box::new(at_cut),
        });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let accepted = Arc::clone(&line);
        let accepting = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if accepted.closed.load(Ordering::SeqCst) {
                    break;
                }
                accepted.serve(stream.unwrap());
            }
        });
        Self { line, address, accepting: Some(accepting) }
    }

    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// After the next cut nobody gets through any more.
    pub fn stay_closed(&self) {
        self.line.stay_closed.store(true, Ordering::SeqCst);
    }

    /// Bytes that went to the server.
    pub fn passed(&self) -> u64 {
        self.line.passed.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.line.closed.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        self.line.drop_all();
        if let Some(thread) = self.accepting.take() {
            thread.join().unwrap();
        }
    }
}

impl Line {
    fn serve(self: &Arc<Self>, client: TcpStream) {
        // Under the lock, so that a cut has either dropped it or comes before it.
        let mut open = self.open.lock().unwrap();
        let spent = self.stay_closed.load(Ordering::SeqCst) && self.cuts.lock().unwrap().is_empty();
        if spent {
            return;
        }
        let server = TcpStream::connect(self.upstream).unwrap();
        server.set_nodelay(true).unwrap();
        client.set_nodelay(true).unwrap();
        open.push(client.try_clone().unwrap());
        open.push(server.try_clone().unwrap());
        drop(open);
        let (mut from, mut to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Both);
        });
        let line = Arc::clone(self);
        std::thread::spawn(move || line.pass(client, server));
    }

    /// What goes to the server is counted.
    fn pass(&self, mut client: TcpStream, mut server: TcpStream) {
        let mut buffer = vec![0; 16 << 10];
        while let Ok(n @ 1..) = client.read(&mut buffer) {
            // The lock orders what all connections send.
            let mut open = self.open.lock().unwrap();
            if open.is_empty() {
                break;
            }
            let mut cuts = self.cuts.lock().unwrap();
            let left = cuts.front().copied().unwrap_or(u64::MAX);
            let part = usize::try_from(left).unwrap_or(usize::MAX).min(n);
            self.passed.fetch_add(part as u64, Ordering::SeqCst);
            let sent = server.write_all(&buffer[..part]);
            match cuts.front_mut() {
                Some(left) if *left > part as u64 => *left -= part as u64,
                Some(_) => {
                    cuts.pop_front();
                    drop(cuts);
                    for stream in open.drain(..) {
                        let _ = stream.shutdown(Shutdown::Both);
                    }
                    (self.at_cut)();
                    return;
                }
                None => {}
            }
            if sent.is_err() {
                break;
            }
        }
        let _ = server.shutdown(Shutdown::Both);
    }

    fn drop_all(&self) {
        for stream in self.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}
