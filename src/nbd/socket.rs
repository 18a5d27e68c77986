//! A connected socket of either family, used from several threads at once.

use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, sendmsg, sockopt};

/// Idle time after which the system starts to probe a TCP peer.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
/// Time between probes.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// Unanswered probes after which the connection is dead.
const KEEPALIVE_PROBES: u32 = 4;

/// A blocking stream socket.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
}

impl Socket {
    /// Takes over a connected socket. `stall` bounds each wait for input.
    ///
    /// # Errors
    /// When the system refuses an option.
    pub(super) fn new(fd: OwnedFd, tcp: bool, stall: Duration) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, false)?;
        sockopt::set_socket_timeout(&fd, sockopt::Timeout::Recv, Some(stall))?;
        if tcp {
            sockopt::set_tcp_nodelay(&fd, true)?;
            sockopt::set_socket_keepalive(&fd, true)?;
            sockopt::set_tcp_keepidle(&fd, KEEPALIVE_IDLE)?;
            sockopt::set_tcp_keepintvl(&fd, KEEPALIVE_INTERVAL)?;
            sockopt::set_tcp_keepcnt(&fd, KEEPALIVE_PROBES)?;
        }
        Ok(Self { fd })
    }

    /// Receives what is there, at least a byte; 0 at the end of the stream.
    ///
    /// # Errors
    /// `WouldBlock` when nothing came in the stall time.
    pub(super) fn receive(&self, buf: &mut [u8]) -> io::Result<usize> {
        self.receive_with(buf, RecvFlags::empty())
    }

    /// Receives what is there now.
    ///
    /// # Errors
    /// `WouldBlock` when nothing is there.
    pub(super) fn receive_now(&self, buf: &mut [u8]) -> io::Result<usize> {
        self.receive_with(buf, RecvFlags::DONTWAIT)
    }

    /// Bounds each wait for input from now on.
    ///
    /// # Errors
    /// When the system refuses the option.
    pub(super) fn set_receive_timeout(&self, time: Duration) -> io::Result<()> {
        Ok(sockopt::set_socket_timeout(&self.fd, sockopt::Timeout::Recv, Some(time))?)
    }

    /// Receives until `buf` is full or the stream ends. `patient` is asked whenever the time for a
    /// wait is over without a byte, with the number of such waits in a row.
    ///
    /// # Errors
    /// `UnexpectedEof`, `TimedOut` when patience is at its end, and those of recv(2).
    pub(super) fn receive_exact(
        &self,
        mut buf: &mut [u8],
        patient: impl Fn(u32) -> bool,
    ) -> io::Result<()> {
        let mut waits = 0;
        while !buf.is_empty() {
            match self.receive_with(buf, RecvFlags::WAITALL) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    buf = &mut buf[n..];
                    waits = 0;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    waits += 1;
                    if !patient(waits) {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn receive_with(&self, buf: &mut [u8], flags: RecvFlags) -> io::Result<usize> {
        loop {
            match recv(&self.fd, &mut *buf, flags) {
                Ok((n, _)) => return Ok(n),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Sends what the socket takes at once; 0 where it takes nothing now.
    ///
    /// # Errors
    /// Those of sendmsg(2).
    pub(super) fn send_now(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        loop {
            match sendmsg(&self.fd, parts, &mut SendAncillaryBuffer::default(), flags) {
                Ok(n) => return Ok(n),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(0),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Waits until the socket takes bytes again; `false` when it did not in `time`.
    ///
    /// # Errors
    /// Those of poll(2).
    pub(super) fn wait_writable(&self, time: Duration) -> io::Result<bool> {
        let timeout = Timespec::try_from(time).ok();
        let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(n) => Ok(n > 0),
            Err(Errno::INTR) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Ends one or both directions, from any thread: blocked calls return.
    pub(super) fn shut(&self, how: Shutdown) {
        let how = match how {
            Shutdown::Read => rustix::net::Shutdown::Read,
            Shutdown::Write => rustix::net::Shutdown::Write,
            Shutdown::Both => rustix::net::Shutdown::Both,
        };
        // Fails only where the peer is gone already.
        let _ = rustix::net::shutdown(&self.fd, how);
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
