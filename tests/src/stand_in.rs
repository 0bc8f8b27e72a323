//! Who answers in a network namespace when it matters where a connection arrives: each answer is one line that names
//! who took it and the original destination as the kernel knows it. [`sidecar`] stands where a sidecar listens with
//! `--transparent`, [`server`] where the client wanted to go.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::eventually::soon;
use crate::namespace::Namespace;

/// Listens at 15001 on loopback and at 15006, in both families: answers `outbound ADDRESS` and `inbound ADDRESS`. Ends
/// when it is dropped.
pub fn sidecar(at: &Namespace) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
        tasks.spawn(serve(at.listen((ip, 15001).into()), "outbound"));
    }
    for ip in [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
        tasks.spawn(serve(at.listen((ip, 15006).into()), "inbound"));
    }
    tasks
}

/// Listens at these ports, on all addresses of both families: answers `NAME ADDRESS`.
pub fn server(at: &Namespace, name: &'static str, ports: &[u16]) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    for port in ports {
        for ip in [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
            tasks.spawn(serve(at.listen((ip, *port).into()), name));
        }
    }
    tasks
}

/// Connects from there and reads what is said: `outbound 10.77.0.3:80`.
pub async fn ask(from: &Namespace, address: SocketAddr) -> io::Result<String> {
    ask_on(from, address, |_| {}).await
}

/// The same from a socket with this mark.
pub async fn ask_marked(from: &Namespace, address: SocketAddr, mark: u32) -> io::Result<String> {
    ask_on(from, address, |socket| socket.set_mark(mark).unwrap()).await
}

async fn ask_on(from: &Namespace, address: SocketAddr, set: impl FnOnce(SockRef)) -> io::Result<String> {
    let socket = from.socket(address.ip());
    set(SockRef::from(&socket));
    let mut stream = soon("connect", socket.connect(address)).await?;
    let mut said = String::new();
    soon("an answer", stream.read_to_string(&mut said)).await?;
    Ok(said.trim_end().to_owned())
}

/// As another user, by curl.
pub async fn ask_as(uid: u32, from: &Namespace, address: SocketAddr) -> io::Result<String> {
    let mut curl = from.command_as(uid, "curl");
    curl.args(["-sS", "--http0.9", "--noproxy", "*", "--max-time", "20", &format!("http://{address}/")]);
    let output = tokio::task::spawn_blocking(move || curl.output()).await.unwrap()?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
    } else {
        Err(io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned()))
    }
}

async fn serve(listener: TcpListener, name: &'static str) {
    let mut answers = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        answers.spawn(answer(stream, name));
    }
}

/// Says it, then waits for the client's end: closing with unread bytes would take the answer back.
async fn answer(mut stream: TcpStream, name: &'static str) {
    let line = format!("{name} {}\n", original(&stream));
    if stream.write_all(line.as_bytes()).await.is_ok() && stream.shutdown().await.is_ok() {
        let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
    }
}

/// Without NAT the kernel may not know of one; then the client meant this socket.
fn original(stream: &TcpStream) -> SocketAddr {
    let local = stream.local_addr().unwrap();
    let socket = SockRef::from(stream);
    let original = if local.is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() };
    original.ok().and_then(|address| address.as_socket()).unwrap_or(local)
}
