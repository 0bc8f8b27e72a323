//! One read of a socket, and how much the kernel has left behind it. The runtime takes a read that took less than it could
//! for the last one; but the kernel ends a read at the mark of urgent data (MSG_OOB), and does not announce again what is
//! behind the mark. With `TCP_INQ` the kernel says so in the same system call.

use std::io;

use socket2::SockRef;
use tokio::io::{Interest, ReadBuf};
use tokio::net::TcpStream;

/// Asks the kernel to say with each read how much is left. A kernel that cannot is asked with one more read each time.
pub(super) fn say_what_is_left(socket: &SockRef<'_>) {
    kernel::say_what_is_left(socket);
}

/// Reads what is there; `WouldBlock` when nothing is. When the kernel says that nothing is left, the next read waits without
/// asking it.
pub(super) fn receive(socket: &TcpStream, buffer: &mut ReadBuf<'_>) -> io::Result<()> {
    let mut received = false;
    let tried = socket.try_io(Interest::READABLE, || {
        let before = buffer.filled().len();
        let left = kernel::receive(socket, buffer)?;
        received = true;
        let drained = buffer.filled().len() > before && left == Some(0);
        // This is how the runtime hears that it has to wait for news of the socket.
        if drained { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
    });
    if received { Ok(()) } else { tried }
}

/// What has no safe form.
mod kernel {
    use std::io;
    use std::mem::{MaybeUninit, size_of, zeroed};
    use std::os::fd::AsRawFd;

    use socket2::SockRef;
    use tokio::io::ReadBuf;
    use tokio::net::TcpStream;

    /// Linux 4.18 and later; the option and the control message have one number.
    const TCP_INQ: libc::c_int = 36;

    #[expect(unsafe_code, reason = "setsockopt(2) with TCP_INQ has no safe form")]
    pub(super) fn say_what_is_left(socket: &SockRef<'_>) {
        let on: libc::c_int = 1;
        let size = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: the kernel reads one int. One that does not know the option says so, and says nothing with a read.
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, TCP_INQ, (&raw const on).cast(), size) };
    }

    /// A control message with one int, and nothing else.
    #[repr(C)]
    struct Control {
        head: libc::cmsghdr,
        left: libc::c_int,
    }

    /// Bytes that are left behind those that were read, or an end of the stream as one; `None` when the kernel does not say.
    #[expect(
        unsafe_code,
        reason = "recvmsg(2) has no safe form that tells of TCP_INQ and reads into what is not initialised"
    )]
    pub(super) fn receive(socket: &TcpStream, buffer: &mut ReadBuf<'_>) -> io::Result<Option<libc::c_int>> {
        // SAFETY: every bit pattern of both structures, zeros among them, is valid.
        let (mut control, mut message) = unsafe { (zeroed::<Control>(), zeroed::<libc::msghdr>()) };
        // SAFETY: only the kernel writes there, and only initialised bytes.
        let room: &mut [MaybeUninit<u8>] = unsafe { buffer.unfilled_mut() };
        let mut room = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() };
        message.msg_iov = &raw mut room;
        message.msg_iovlen = 1;
        message.msg_control = (&raw mut control).cast();
        message.msg_controllen = size_of::<Control>();
        // SAFETY: `message` points at `room` and `control`, which live on, and says how large they are.
        let count = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        // SAFETY: the kernel has written so many bytes.
        unsafe { buffer.assume_init(count) };
        buffer.advance(count);
        let said = control.head.cmsg_level == libc::IPPROTO_TCP && control.head.cmsg_type == TCP_INQ;
        Ok(said.then_some(control.left))
    }
}

#[cfg(test)]
mod tests {
    use std::task::Poll;

    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (one, other) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        (one.unwrap(), other.unwrap().0)
    }

    async fn read(socket: &TcpStream, room: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![MaybeUninit::uninit(); room];
        let mut buffer = ReadBuf::uninit(&mut bytes);
        loop {
            std::future::poll_fn(|cx| socket.poll_read_ready(cx)).await?;
            match receive(socket, &mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return read.map(|()| buffer.filled().to_vec()),
            }
        }
    }

    use std::mem::MaybeUninit;

    /// Whether the runtime believes that there is something to be read.
    async fn ready(socket: &TcpStream) -> bool {
        std::future::poll_fn(|cx| Poll::Ready(socket.poll_read_ready(cx).is_ready())).await
    }

    #[tokio::test]
    async fn a_mark_is_no_end_of_what_is_there() {
        for says in [true, false] {
            let (mut writes, reads) = pair().await;
            let socket = SockRef::from(&reads);
            socket.set_out_of_band_inline(true).unwrap();
            if says {
                say_what_is_left(&socket);
            }
            writes.write_all(b"ab").await.unwrap();
            SockRef::from(&writes).send_out_of_band(b"!").unwrap();
            writes.write_all(b"cd").await.unwrap();
            writes.shutdown().await.unwrap();
            let mut heard = Vec::new();
            loop {
                let piece = read(&reads, 100).await.unwrap();
                if piece.is_empty() {
                    break;
                }
                heard.extend_from_slice(&piece);
            }
            assert_eq!(heard, b"ab!cd", "the kernel says what is left: {says}");
        }
    }

    #[tokio::test]
    async fn what_is_drained_is_not_asked_again() {
        let (mut writes, reads) = pair().await;
        say_what_is_left(&SockRef::from(&reads));
        writes.write_all(b"abcd").await.unwrap();
        assert_eq!(read(&reads, 3).await.unwrap(), b"abc");
        assert!(ready(&reads).await, "one is left");
        assert_eq!(read(&reads, 1).await.unwrap(), b"d");
        assert!(!ready(&reads).await, "none is, although the read took all that it could");
        writes.write_all(b"e").await.unwrap();
        assert_eq!(read(&reads, 100).await.unwrap(), b"e");
        drop(writes);
        assert_eq!(read(&reads, 100).await.unwrap(), b"", "an end is heard");
    }
}
