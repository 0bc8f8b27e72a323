//! A handle with which a connection is cut by somebody who does not own its stream: the task that does is woken by its
//! socket, wherever on the walk it stands.

use std::net::Shutdown;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::rc::{Rc, Weak};

use socket2::SockRef;
use tokio::net::TcpStream;

/// Lives inside the stream whose socket it names, and is dropped before that socket is closed.
#[derive(Debug)]
pub(super) struct Handle(RawFd);

/// Cuts a stream for as long as there is one. Not `Send`: the stream is used and dropped on the same thread.
#[derive(Debug)]
pub struct Cut(Weak<Handle>);

impl Handle {
    pub(super) fn of(tcp: &TcpStream) -> Rc<Handle> {
        Rc::new(Handle(tcp.as_raw_fd()))
    }

    pub(super) fn cut(handle: &Rc<Handle>) -> Cut {
        Cut(Rc::downgrade(handle))
    }
}

impl Cut {
    /// Whether the stream is still there.
    pub fn is_open(&self) -> bool {
        self.0.strong_count() > 0
    }

    /// Both directions of the socket end now: what is read next is the end without a word of TLS, what is written fails.
    #[expect(
        unsafe_code,
        reason = "the stream that owns the descriptor is somewhere on the walk and cannot be borrowed"
    )]
    pub fn now(&self) {
        let Some(handle) = self.0.upgrade() else { return };
        // SAFETY: the handle is a field of the stream that owns the descriptor and goes before it, on this very thread.
        let socket = unsafe { BorrowedFd::borrow_raw(handle.0) };
        // It fails for a socket that has ended already.
        let _ = SockRef::from(&socket).shutdown(Shutdown::Both);
    }
}
