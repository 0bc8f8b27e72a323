//! Listeners and dials, with the options that every socket of the mesh has, and what can be asked of the kernel about an
//! address before.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpSocket, TcpStream};

use super::receive::say_what_is_left;

/// When TCP asks an idle peer whether it is there: idle time, then interval and count of probes.
#[derive(Clone, Copy, Debug)]
pub struct SocketOptions {
    pub keepalive: Duration,
    pub keepalive_interval: Duration,
    pub keepalive_probes: u32,
    /// TCP_USER_TIMEOUT, which also ends a connection whose peer pauses. None where [`super::give_up_silent_peers`] looks.
    pub user_timeout: Option<Duration>,
    /// SO_MARK, by which redirect rules know the sidecar's own traffic.
    pub mark: Option<u32>,
}

impl SocketOptions {
    /// On a listener these are inherited by what it accepts, so that accepting costs no further system call.
    pub(super) fn apply(&self, socket: &SockRef<'_>) -> io::Result<()> {
        socket.set_tcp_nodelay(true)?;
        if let Some(mark) = self.mark {
            socket.set_mark(mark)?;
        }
        socket.set_tcp_keepalive(
            &TcpKeepalive::new()
                .with_time(self.keepalive)
                .with_interval(self.keepalive_interval)
                .with_retries(self.keepalive_probes),
        )?;
        // What a peer sends as urgent is a byte in its place, as it is for most servers that ever look at it.
        socket.set_out_of_band_inline(true)?;
        say_what_is_left(socket);
        match self.user_timeout {
            Some(timeout) => socket.set_tcp_user_timeout(Some(timeout)),
            None => Ok(()),
        }
    }
}

const BACKLOG: i32 = 4096;

/// Opens a listener that other workers can open too (SO_REUSEPORT). The error names the address.
pub fn listen(address: SocketAddr, options: &SocketOptions) -> io::Result<std::net::TcpListener> {
    let open = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.set_nonblocking(true)?;
        options.apply(&SockRef::from(&socket))?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    };
    open().map_err(|error: io::Error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}")))
}

/// Opens a UDP socket that nobody shares.
pub fn bind_udp(address: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// Whether this process may set a mark: else every socket that needs one would fail, later and one by one.
pub fn check_mark(mark: u32) -> io::Result<()> {
    let set = |domain| Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?.set_mark(mark);
    // Either family will do: a network namespace may lack one.
    set(Domain::IPV4).or_else(|error| if is_absent(&error) { set(Domain::IPV6) } else { Err(error) })
}

/// Whether the error of a bind says that this network namespace does not have the address, or its family at all.
pub fn is_absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable || error.raw_os_error() == Some(libc::EAFNOSUPPORT)
}

/// Whether some socket of this machine already listens on `address`: SO_REUSEPORT would share it silently.
pub fn is_taken(address: SocketAddr) -> bool {
    if address.port() == 0 {
        return false;
    }
    let probe = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())
    };
    probe().is_err_and(|error: io::Error| error.kind() == io::ErrorKind::AddrInUse)
}

/// Whether an address belongs to this machine (or network namespace): who sends to its own address sends from it. That it
/// could be bound says less, where `net.ipv4.ip_nonlocal_bind` lets anything be bound.
pub fn is_local(ip: IpAddr) -> bool {
    ip.is_loopback() || (!ip.is_unspecified() && source_towards(ip).is_ok_and(|source| source == ip))
}

/// The address of this machine from which it would send to `ip`; an error where no route leads there.
pub fn source_towards(ip: IpAddr) -> io::Result<IpAddr> {
    let any: IpAddr = if ip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = std::net::UdpSocket::bind((any, 0))?;
    // Sends nothing.
    socket.connect((ip, 9))?;
    Ok(socket.local_addr()?.ip())
}

/// Connects; the caller bounds the time.
pub async fn connect(address: SocketAddr, options: &SocketOptions) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    options.apply(&SockRef::from(&socket))?;
    socket.connect(address).await
}

/// Connects to what is no part of the traffic, as the control plane; only the mark is set.
pub async fn connect_marked(address: SocketAddr, mark: Option<u32>) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if let Some(mark) = mark {
        SockRef::from(&socket).set_mark(mark)?;
    }
    socket.connect(address).await
}

#[cfg(test)]
mod tests {
    use super::*;
    #[test]
    fn what_is_local() {
        for (ip, local) in [
            ("127.0.0.1", true),
            ("127.9.9.9", true),
            ("::1", true),
            ("0.0.0.0", false),
            ("::", false),
            ("192.0.2.1", false),
            ("2001:db8::1", false),
            ("255.255.255.255", false),
            ("224.0.0.1", false),
        ] {
            assert_eq!(is_local(ip.parse().unwrap()), local, "{ip}");
        }
    }
}
