//! Messages on a stream: a length, four bytes, little-endian, and so many bytes. Descriptors come
//! beside single bytes of their own.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::protocol::MESSAGE;

/// Descriptors that go with one byte: the kernel takes up to 253.
const BATCH: usize = 128;

fn invalid(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

/// The bytes of a message, its length before it.
///
/// # Errors
/// `InvalidData` for one that is longer than a message may be.
pub(super) fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    encode_up_to(MESSAGE, message)
}

/// The same for a message of `most` bytes at most.
///
/// # Errors
/// As [`encode`].
pub(super) fn encode_up_to(most: usize, message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut frame = postcard::to_extend(message, vec![0; 4]).map_err(|e| invalid(e.to_string()))?;
    let length = frame.len() - 4;
    let head = u32::try_from(length).ok().filter(|_| length <= most);
    let head = head.ok_or_else(|| invalid(format!("a message of {length} bytes")))?;
    frame[..4].copy_from_slice(&head.to_le_bytes());
    Ok(frame)
}

/// Writes a message.
///
/// # Errors
/// Those of the stream and of [`encode`].
pub(super) fn send(mut stream: &UnixStream, message: &impl Serialize) -> io::Result<()> {
    stream.write_all(&encode(message)?)
}

/// Fills `buf`, until `deadline` at most.
///
/// # Errors
/// `TimedOut`; `UnexpectedEof`; those of the stream.
pub(super) fn fill(
    mut stream: &UnixStream,
    mut buf: &mut [u8],
    deadline: Option<Instant>,
) -> io::Result<()> {
    while !buf.is_empty() {
        if let Some(deadline) = deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            stream.set_read_timeout(Some(left))?;
        }
        match stream.read(buf) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => buf = &mut buf[n..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Reads a message, until `deadline` at most.
///
/// # Errors
/// `InvalidData` for what is no such message; those of [`fill`].
pub(super) fn receive<T: DeserializeOwned>(
    stream: &UnixStream,
    deadline: Option<Instant>,
) -> io::Result<T> {
    receive_up_to(MESSAGE, stream, deadline)
}

/// The same for a message of `most` bytes at most.
///
/// # Errors
/// As [`receive`].
pub(super) fn receive_up_to<T: DeserializeOwned>(
    most: usize,
    stream: &UnixStream,
    deadline: Option<Instant>,
) -> io::Result<T> {
    let mut head = [0; 4];
    fill(stream, &mut head, deadline)?;
    let length = usize::try_from(u32::from_le_bytes(head)).unwrap_or(usize::MAX);
    if length > most {
        return Err(invalid(format!("a message of {length} bytes; {most} are the most")));
    }
    let mut body = vec![0; length];
    fill(stream, &mut body, deadline)?;
    match postcard::take_from_bytes(&body) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(invalid(format!("{} bytes too many in a message", rest.len()))),
        Err(error) => Err(invalid(format!("a message that cannot be read: {error}"))),
    }
}

/// Sends open files.
///
/// # Errors
/// Those of sendmsg(2).
pub(super) fn send_files(stream: &UnixStream, files: &[BorrowedFd<'_>]) -> io::Result<()> {
    for batch in files.chunks(BATCH) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(batch)) {
            return Err(io::Error::other("no room for descriptors"));
        }
        let sent =
            rustix::net::sendmsg(stream, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)?;
        if sent != 1 {
            return Err(io::ErrorKind::WriteZero.into());
        }
    }
    Ok(())
}

/// Receives `count` open files.
///
/// # Errors
/// `InvalidData` where other things come; those of recvmsg(2).
pub(super) fn receive_files(stream: &UnixStream, count: usize) -> io::Result<Vec<OwnedFd>> {
    let mut files = Vec::new();
    while files.len() < count {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let received = rustix::net::recvmsg(
            stream,
            &mut [IoSliceMut::new(&mut byte)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        let before = files.len();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                files.extend(rights);
            }
        }
        if received.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || files.len() == before {
            return Err(invalid("descriptors were lost on their way"));
        }
    }
    if files.len() != count {
        return Err(invalid(format!("{} descriptors came, and {count} were told", files.len())));
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;
    use std::time::Duration;

    #[test]
    fn messages_come_back_as_they_were_and_the_next_one_too() {
        let (a, b) = UnixStream::pair().unwrap();
        send(&a, &(7_u32, "text".to_owned())).unwrap();
        send(&a, &vec![1_u8; 1000]).unwrap();
        assert_eq!(receive::<(u32, String)>(&b, None).unwrap(), (7, "text".into()));
        assert_eq!(receive::<Vec<u8>>(&b, None).unwrap(), vec![1; 1000]);
        drop(a);
        let error = receive::<u32>(&b, None).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn messages_that_are_too_long_or_no_messages_are_refused() {
        let too_long = u32::try_from(MESSAGE).unwrap() + 1;
        for bytes in [
            too_long.to_le_bytes().to_vec(),
            vec![1, 0, 0, 0, 0x80],
            // A string of four bytes in a message of two.
            vec![2, 0, 0, 0, 4, b'a'],
            vec![3, 0, 0, 0, 1, b'a', b'b'],
        ] {
            let (mut a, b) = UnixStream::pair().unwrap();
            a.write_all(&bytes).unwrap();
            let error = receive::<String>(&b, None).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{bytes:?}");
        }
        assert!(encode(&vec![0_u8; MESSAGE]).is_err());
    }

    #[test]
    fn a_message_that_does_not_come_is_not_waited_for_longer_than_told() {
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(&[9, 0, 0]).unwrap();
        let deadline = Instant::now() + Duration::from_millis(20);
        let error = receive::<u32>(&b, Some(deadline)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn open_files_arrive_in_their_order() {
        let (a, b) = UnixStream::pair().unwrap();
        let files: Vec<std::fs::File> = (0..300_u32)
            .map(|number| {
                let file = tempfile::tempfile().unwrap();
                file.write_all_at(&number.to_le_bytes(), 0).unwrap();
                file
            })
            .collect();
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        send(&a, &5_u32).unwrap();
        send_files(&a, &fds).unwrap();
        send(&a, &6_u32).unwrap();
        assert_eq!(receive::<u32>(&b, None).unwrap(), 5);
        for (number, fd) in receive_files(&b, 300).unwrap().into_iter().enumerate() {
            let mut bytes = [0; 4];
            std::fs::File::from(fd).read_exact_at(&mut bytes, 0).unwrap();
            assert_eq!(u32::from_le_bytes(bytes) as usize, number);
        }
        assert_eq!(receive::<u32>(&b, None).unwrap(), 6);
    }
}
