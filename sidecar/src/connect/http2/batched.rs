//! The byte stream below an HTTP/2 connection, on both sides: what the library writes is held until the end of the turn in
//! which this thread handles what came (`connect/http1/turn.rs` says why), so that the frames of all streams that are ready
//! leave in one write. The library alone would write each DATA frame by itself. Where nothing else is ready the turn ends at
//! once. Larger pieces are written through, behind what is held.
//!
//! The connection's task calls [`Batched::end_turn`] after it has polled the connection.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What is held at most. TLS has records of this size.
const MOST: usize = 16 * 1024;

/// Slices that the library writes at once: the head of a frame and its payload.
const SLICES: usize = 8;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEAD: usize = 9;
const SETTINGS: u8 = 4;
const MAX_HEADER_LIST_SIZE: [u8; 2] = [0, 6];

/// The stream, shared by the library and by the task that drives the connection.
pub struct Batched<S>(Rc<RefCell<Inner<S>>>);

impl<S> Clone for Batched<S> {
    fn clone(&self) -> Batched<S> {
        Batched(self.0.clone())
    }
}

thread_local! {
    /// Buffers to lend: what is held rarely outlives a turn.
    static SPARE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Buffers that one thread keeps to lend.
const SPARES: usize = 16;

struct Inner<S> {
    below: S,
    held: Vec<u8>,
    /// Bytes of `held` that are written.
    written: usize,
    /// The header list that is announced; the library would announce what it takes. None: it has been.
    announced: Option<u32>,
    turn: Turn,
    /// Nothing can be written any more.
    failed: Option<io::ErrorKind>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// Nothing to write.
    Rest,
    /// The task is woken behind those that are ready now.
    Ending,
    /// The peer takes no more for now.
    Blocked,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Batched<S> {
    /// `header_list` is what SETTINGS tell the peer: the library takes more, so that the sidecar can say what is wrong.
    pub fn new(below: S, header_list: u32) -> Batched<S> {
        let inner =
            Inner { below, held: Vec::new(), written: 0, announced: Some(header_list), turn: Turn::Rest, failed: None };
        Batched(Rc::new(RefCell::new(inner)))
    }

    /// To be called when the connection was polled: writes what is held once the tasks that are ready have run. The library
    /// sees an error when it is polled next, which is then.
    pub fn end_turn(&self, cx: &mut Context<'_>) {
        self.0.borrow_mut().end_turn(cx);
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Inner<S> {
    fn end_turn(&mut self, cx: &mut Context<'_>) {
        match self.turn {
            Turn::Rest if self.held.is_empty() => {}
            Turn::Rest => {
                self.turn = Turn::Ending;
                cx.waker().wake_by_ref();
            }
            Turn::Ending | Turn::Blocked => {
                self.turn = match self.poll_out(cx) {
                    Poll::Pending => Turn::Blocked,
                    Poll::Ready(Ok(())) => Turn::Rest,
                    Poll::Ready(Err(error)) => {
                        self.clear();
                        self.failed = Some(error.kind());
                        cx.waker().wake_by_ref();
                        Turn::Rest
                    }
                };
            }
        }
    }

    /// Writes what is held, all the way to the socket.
    fn poll_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.held.len() {
            let count = ready!(Pin::new(&mut self.below).poll_write(cx, &self.held[self.written..]))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += count;
        }
        self.clear();
        Pin::new(&mut self.below).poll_flush(cx)
    }

    /// Gives the buffer back: an idle connection holds none.
    fn clear(&mut self) {
        let mut held = std::mem::take(&mut self.held);
        self.written = 0;
        if held.capacity() == 0 || held.capacity() > 2 * MOST {
            return;
        }
        held.clear();
        SPARE.with_borrow_mut(|spare| {
            if spare.len() < SPARES {
                spare.push(held);
            }
        });
    }

    fn check(&self) -> io::Result<()> {
        self.failed.map_or(Ok(()), |kind| Err(kind.into()))
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        self.check()?;
        let total: usize = slices.iter().map(|slice| slice.len()).sum();
        if self.held.len() + total <= MOST {
            if self.held.capacity() == 0 {
                self.held = SPARE.with_borrow_mut(Vec::pop).unwrap_or_default();
            }
            for slice in slices {
                self.held.extend_from_slice(slice);
            }
            self.announce();
            return Poll::Ready(Ok(total));
        }
        // Nothing larger comes before the settings.
        loop {
            let mut all = [io::IoSlice::new(&[]); SLICES];
            all[0] = io::IoSlice::new(&self.held[self.written..]);
            for (one, slice) in all[1..].iter_mut().zip(slices) {
                *one = io::IoSlice::new(slice);
            }
            let before = all[0].len();
            let count = ready!(Pin::new(&mut self.below).poll_write_vectored(cx, &all))?;
            if count < before {
                if count == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                self.written += count;
                continue;
            }
            self.clear();
            if count > before || total == 0 {
                return Poll::Ready(Ok(count - before));
            }
        }
    }

    /// Puts the announced value into the library's first SETTINGS (RFC 9113 section 6.5.2), which are still held.
    fn announce(&mut self) {
        let Some(announced) = self.announced else { return };
        let begin = if self.held.starts_with(PREFACE) { PREFACE.len() } else { 0 };
        let Some(frame) = self.held.get_mut(begin..).filter(|rest| rest.len() >= HEAD && rest[3] == SETTINGS) else {
            return;
        };
        self.announced = None;
        for setting in frame[HEAD..].chunks_exact_mut(6).filter(|setting| setting[..2] == MAX_HEADER_LIST_SIZE) {
            setting[2..].copy_from_slice(&announced.to_be_bytes());
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Batched<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0.borrow_mut().below).poll_read(cx, buffer)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Batched<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().poll_write(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().poll_write(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Nothing: the end of the turn flushes.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.0.borrow().check())
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.0.borrow_mut();
        ready!(inner.poll_out(cx))?;
        Pin::new(&mut inner.below).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::poll_fn;

    use bytes::Bytes;
    use h2::server::SendResponse;
    use http::{Request, Response};
    use tokio::io::{AsyncReadExt, DuplexStream};

    use super::*;

    struct Counted {
        stream: DuplexStream,
        writes: Rc<Cell<usize>>,
    }

    impl AsyncRead for Counted {
        fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.stream).poll_read(cx, buffer)
        }
    }

    impl AsyncWrite for Counted {
        fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            self.writes.set(self.writes.get() + 1);
            Pin::new(&mut self.stream).poll_write(cx, bytes)
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            slices: &[io::IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            self.writes.set(self.writes.get() + 1);
            Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.stream).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.stream).poll_shutdown(cx)
        }
    }

    fn counted() -> (DuplexStream, Batched<Counted>, Rc<Cell<usize>>) {
        let (near, stream) = tokio::io::duplex(1 << 20);
        let writes = Rc::<Cell<usize>>::default();
        (near, Batched::new(Counted { stream, writes: writes.clone() }, 1 << 16), writes)
    }

    async fn answer(mut reply: SendResponse<Bytes>, length: usize) {
        let mut sending = reply.send_response(Response::new(()), false).unwrap();
        sending.send_data(Bytes::from(vec![b'x'; length]), true).unwrap();
    }

    async fn serve(io: Batched<Counted>, length: usize) {
        let mut handshake = Box::pin(h2::server::Builder::new().handshake::<_, Bytes>(io.clone()));
        let mut connection = poll_fn(|cx| {
            let ready = handshake.as_mut().poll(cx);
            io.end_turn(cx);
            ready
        })
        .await
        .unwrap();
        poll_fn(|cx| {
            let ended = loop {
                match connection.poll_accept(cx) {
                    Poll::Ready(Some(Ok((_, reply)))) => {
                        tokio::task::spawn_local(answer(reply, length));
                    }
                    Poll::Ready(_) => break Poll::Ready(()),
                    Poll::Pending => break Poll::Pending,
                }
            };
            io.end_turn(cx);
            ended
        })
        .await;
    }

    #[tokio::test(flavor = "local")]
    async fn the_frames_of_all_streams_leave_in_one_write() {
        // The library would write each DATA frame of these by itself.
        for (length, most) in [(300, 3), (30_000, 60)] {
            let (near, io, writes) = counted();
            tokio::task::spawn_local(serve(io, length));
            let mut client = h2::client::Builder::new();
            client.initial_window_size(1 << 20).initial_connection_window_size(1 << 24);
            let (mut sender, connection) = client.handshake::<_, Bytes>(near).await.unwrap();
            tokio::task::spawn_local(async move {
                let _ = connection.await;
            });
            sender = sender.ready().await.unwrap();
            let mut answers = vec![sender.send_request(Request::get("http://a/").body(()).unwrap(), true).unwrap().0];
            answers.pop().unwrap().await.unwrap();
            let before = writes.get();
            for _ in 0..20 {
                let request = Request::get("http://a/").body(()).unwrap();
                answers.push(sender.send_request(request, true).unwrap().0);
            }
            for answer in answers {
                let mut body = answer.await.unwrap().into_body();
                let mut count = 0;
                while let Some(data) = body.data().await {
                    count += data.unwrap().len();
                }
                assert_eq!(count, length);
            }
            let writes = writes.get() - before;
            assert!(writes <= most, "{writes} writes for 20 answers of {length} bytes");
        }
    }

    #[tokio::test(flavor = "local")]
    async fn settings_announce_what_they_are_told_to() {
        let max = |frames: &[u8]| {
            let settings = frames[HEAD..].chunks_exact(6).find(|one| one[..2] == MAX_HEADER_LIST_SIZE);
            settings.map(|one| u32::from_be_bytes(one[2..].try_into().unwrap()))
        };
        let (mut near, io, _) = counted();
        let _server = tokio::task::spawn_local(async move {
            let mut builder = h2::server::Builder::new();
            let mut handshake = Box::pin(builder.max_header_list_size(1 << 18).handshake::<_, Bytes>(io.clone()));
            poll_fn(|cx| {
                let ready = handshake.as_mut().poll(cx);
                io.end_turn(cx);
                ready.map(|_| ())
            })
            .await;
        });
        let mut frame = vec![0; 200];
        let count = near.read(&mut frame).await.unwrap();
        assert_eq!(max(&frame[..count]), Some(1 << 16));
        let (mut near, io, _) = counted();
        let mut builder = h2::client::Builder::new();
        let opening = builder.max_header_list_size(1 << 18).handshake::<_, Bytes>(io.clone());
        let (_sender, mut connection) = opening.await.unwrap();
        tokio::task::spawn_local(poll_fn(move |cx| {
            let ended = Pin::new(&mut connection).poll(cx).map(|_| ());
            io.end_turn(cx);
            ended
        }));
        let count = near.read(&mut frame).await.unwrap();
        assert!(frame.starts_with(PREFACE));
        assert_eq!(max(&frame[PREFACE.len()..count]), Some(1 << 16));
    }
}
