//! Passing of a file descriptor with the first bytes of a stream.

use std::io::{self, IoSlice, IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Sends all of `bytes`, and `fd` with the first of them.
///
/// # Errors
/// The stream is closed or its timeout has passed.
pub fn send(stream: &mut UnixStream, bytes: &[u8], fd: impl AsFd) -> io::Result<()> {
    send_all(stream, bytes, &[fd.as_fd()])
}

/// Sends all of `bytes`, and `fds`, at most four, with the first of them.
///
/// # Errors
/// There are more descriptors, the stream is closed or its timeout has passed.
pub fn send_all(stream: &mut UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("no room for the file descriptors"));
    }
    let sent = rustix::io::retry_on_intr(|| {
        sendmsg(
            &*stream,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        )
    })?;
    stream.write_all(bytes.get(sent..).unwrap_or_default())
}

/// Receives at most `buffer.len()` bytes and returns their count, 0 at end of file.
/// Descriptors that arrive with them, at most four, are appended to `fds` with
/// close-on-exec set.
///
/// # Errors
/// The stream cannot be read.
pub fn receive(
    stream: &UnixStream,
    buffer: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        recvmsg(
            stream,
            &mut [IoSliceMut::new(buffer)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
    })?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    Ok(received.bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn a_descriptor_arrives_with_the_bytes() {
        let (mut a, b) = UnixStream::pair().unwrap();
        let (reader, writer) = UnixStream::pair().unwrap();
        send(&mut a, b"hello", &writer).unwrap();
        drop(writer);
        let (mut buffer, mut fds) = ([0; 16], Vec::new());
        assert_eq!(receive(&b, &mut buffer, &mut fds).unwrap(), 5);
        let mut writer = UnixStream::from(fds.remove(0));
        assert!(fds.is_empty());
        writer.write_all(b"x").unwrap();
        drop(writer);
        let mut text = String::new();
        (&reader).read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
    }
}
