//! Connections that begin with a client's address instead of this machine's own: a transparent socket (IP_TRANSPARENT),
//! and a mark by which the redirect rules know it and lead back to it what is answered. Used by `connect` for
//! `--keep-source-address`, and by `redirect` to find out whether the answers come back.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use super::SocketOptions;

/// SO_MARK of these sockets, and of the packets that answer them. **Contract** with the redirect rules.
pub const KEPT_SOURCE_MARK: u32 = 15006;

/// Connects from a port of `source`, which need not be an address of this machine; the caller bounds the time.
pub async fn connect_from(source: IpAddr, address: SocketAddr, options: &SocketOptions) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    SocketOptions { mark: Some(KEPT_SOURCE_MARK), ..*options }.apply(&SockRef::from(&socket))?;
    be_transparent(&SockRef::from(&socket), address.is_ipv4())?;
    socket.bind(SocketAddr::new(source, 0))?;
    socket.connect(address).await
}

/// Whether this process may open such sockets: else every connection to the application would fail, later and one by one.
pub fn check_kept_source() -> io::Result<()> {
    let open = |domain| {
        let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
        socket.set_mark(KEPT_SOURCE_MARK)?;
        be_transparent(&SockRef::from(&socket), domain == Domain::IPV4)
    };
    // Either family will do: a network namespace may lack one.
    open(Domain::IPV4).or_else(|error| if super::is_absent(&error) { open(Domain::IPV6) } else { Err(error) })
}

fn be_transparent(socket: &SockRef<'_>, is_ipv4: bool) -> io::Result<()> {
    if is_ipv4 { socket.set_ip_transparent_v4(true) } else { socket.set_ip_transparent_v6(true) }
}

/// Whether a connection from `source`, an address that is nobody's, to `own`, one of this machine's, is established: only
/// when what `own` answers comes back to the socket that asked.
pub async fn answers_come_back(source: IpAddr, own: IpAddr, patience: Duration) -> io::Result<bool> {
    let listener = TcpListener::bind((own, 0)).await?;
    let address = listener.local_addr()?;
    let socket = if own.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    SockRef::from(&socket).set_mark(KEPT_SOURCE_MARK)?;
    be_transparent(&SockRef::from(&socket), own.is_ipv4())?;
    socket.bind(SocketAddr::new(source, 0))?;
    match tokio::time::timeout(patience, socket.connect(address)).await {
        Ok(Ok(_)) => Ok(true),
        Ok(Err(error)) => Err(error),
        Err(_) => Ok(false),
    }
}
