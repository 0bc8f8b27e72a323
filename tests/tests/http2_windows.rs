//! Promise: an HTTP/2 stream over a long path takes about as long as it would without the mesh. Windows begin small and
//! follow bandwidth x round trip, whichever hop is long and whichever way the bytes go.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::SendRequest;
use http::{Request, Response};
use outrigger_tests::application::{Backend, write};
use outrigger_tests::eventually::within;
use outrigger_tests::{Mesh, MeshOptions, Sidecar};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

const MUCH: usize = 20 << 20;
/// Of client and server, with and without a mesh: as much as clients of Go give a stream. Libraries of gRPC begin with 64 KiB
/// and grow, Node and nghttp2 stay there, curl begins with 10 MiB.
const WINDOW: u32 = 4 << 20;

/// A TCP proxy that gives everything on after half a round trip.
async fn delaying(round_trip: Duration) -> (SocketAddr, tokio::sync::watch::Sender<SocketAddr>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, to) = tokio::sync::watch::channel(address);
    tokio::spawn(async move {
        while let Ok((here, _)) = listener.accept().await {
            let to = *to.borrow();
            tokio::spawn(async move {
                let Ok(there) = TcpStream::connect(to).await else { return };
                for stream in [&here, &there] {
                    stream.set_nodelay(true).unwrap();
                }
                let ((here_reads, here_writes), (there_reads, there_writes)) = (here.into_split(), there.into_split());
                tokio::spawn(later(here_reads, there_writes, round_trip / 2));
                tokio::spawn(later(there_reads, here_writes, round_trip / 2));
            });
        }
    });
    (address, sender)
}

async fn later(mut from: tokio::net::tcp::OwnedReadHalf, mut to: tokio::net::tcp::OwnedWriteHalf, delay: Duration) {
    let (sender, mut pieces) = mpsc::unbounded_channel::<(Instant, Vec<u8>)>();
    tokio::spawn(async move {
        loop {
            let mut piece = vec![0; 64 << 10];
            match from.read(&mut piece).await {
                Ok(count) if count > 0 => piece.truncate(count),
                _ => return,
            }
            if sender.send((Instant::now() + delay, piece)).is_err() {
                return;
            }
        }
    });
    while let Some((due, piece)) = pieces.recv().await {
        if !delay.is_zero() {
            tokio::time::sleep_until(due.into()).await;
        }
        if to.write_all(&piece).await.is_err() {
            return;
        }
    }
}

/// A server that takes and gives as fast as it can: reads the body, then answers with as many bytes as the path says.
fn serve(app: Backend) {
    tokio::spawn(async move {
        loop {
            let (stream, _) = app.wait().await.into_parts();
            let stream = stream.expect("plain TCP");
            tokio::spawn(async move {
                let mut builder = h2::server::Builder::new();
                builder.initial_window_size(WINDOW).initial_connection_window_size(4 * WINDOW);
                let Ok(mut connection) = builder.handshake::<_, Bytes>(stream).await else { return };
                while let Some(Ok((request, mut reply))) = connection.accept().await {
                    tokio::spawn(async move {
                        let length: usize = request.uri().path()[1..].parse().unwrap();
                        let mut body = request.into_body();
                        while let Some(Ok(data)) = body.data().await {
                            let _ = body.flow_control().release_capacity(data.len());
                        }
                        let mut sending = reply.send_response(Response::new(()), false).unwrap();
                        let _ = write(&mut sending, Bytes::from(vec![b'x'; length]), true).await;
                    });
                }
            });
        }
    });
}

async fn client(address: SocketAddr) -> SendRequest<Bytes> {
    let stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(WINDOW).initial_connection_window_size(4 * WINDOW);
    let (sender, connection) = builder.handshake(stream).await.unwrap();
    tokio::spawn(connection);
    sender
}

/// One exchange of so many bytes each way.
async fn exchange(client: &SendRequest<Bytes>, up: usize, down: usize) -> Duration {
    let begun = Instant::now();
    let mut client = client.clone().ready().await.unwrap();
    let request = Request::post(format!("http://catalog/{down}")).body(()).unwrap();
    let (answer, mut sending) = client.send_request(request, false).unwrap();
    write(&mut sending, Bytes::from(vec![b'u'; up]), true).await.unwrap();
    let mut body = answer.await.unwrap().into_body();
    let mut came = 0;
    while let Some(data) = body.data().await {
        let data = data.unwrap();
        came += data.len();
        body.flow_control().release_capacity(data.len()).unwrap();
    }
    assert_eq!(came, down);
    begun.elapsed()
}

/// Two sidecars, and which hop is long.
struct Pair {
    near: Sidecar,
    _far: Sidecar,
    _mesh: Mesh,
    entrance: SocketAddr,
}

#[derive(Clone, Copy, Debug)]
enum Long {
    /// Between the sidecars.
    Mesh,
    /// Between the client and its sidecar.
    Client,
}

async fn pair(long: Long, round_trip: Duration) -> Pair {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Backend::start().await;
    let (path, to) = delaying(round_trip).await;
    let far = mesh.sidecar("catalog-1").label("app", "away").inbound(app.address()).start().await;
    let mesh_port = match long {
        Long::Mesh => {
            to.send(far.inbound()).unwrap();
            path.port()
        }
        Long::Client => far.inbound().port(),
    };
    mesh.service("catalog.shop", 80, mesh_port, Some("http2"));
    mesh.write(
        "catalog.yaml",
        &format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{name: catalog-9, namespace: shop}}\nspec: \
             {{address: 127.0.0.1, serviceAccount: catalog, mesh: true, labels: {{app: catalog}}, ports: {{main: \
             {mesh_port}}}}}\n"
        ),
    );
    serve(app);
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    let entrance = match long {
        Long::Mesh => near.outbound(),
        Long::Client => {
            to.send(near.outbound()).unwrap();
            path
        }
    };
    Pair { near, _far: far, _mesh: mesh, entrance }
}

/// The same client and server over the same kind of path, without a mesh.
async fn direct(round_trip: Duration) -> SocketAddr {
    let app = Backend::start().await;
    let (path, to) = delaying(round_trip).await;
    to.send(app.address()).unwrap();
    serve(app);
    path
}

/// How long one exchange takes on a connection of its own, on which one has been before: that opens what is behind it, too.
async fn measured(entrance: SocketAddr, up: usize, down: usize) -> Duration {
    let client = client(entrance).await;
    exchange(&client, 10, 10).await;
    exchange(&client, up, down).await
}

#[tokio::test]
async fn one_stream_over_a_long_path_takes_at_most_a_third_longer_than_without_a_mesh() {
    for long in [Long::Mesh, Long::Client] {
        for milliseconds in [1, 10, 50] {
            let round_trip = Duration::from_millis(milliseconds);
            let (close, away) = (pair(long, Duration::ZERO).await, pair(long, round_trip).await);
            let (direct_close, direct_away) = (direct(Duration::ZERO).await, direct(round_trip).await);
            for (up, down) in [(10, MUCH), (MUCH, 10)] {
                // What else runs on this machine slows all four of a round, or spoils the round: not each.
                within(Duration::from_secs(60), "a fast exchange", async || {
                    let direct_close = measured(direct_close, up, down).await;
                    let direct_away = measured(direct_away, up, down).await;
                    let close = measured(close.entrance, up, down).await;
                    let away = measured(away.entrance, up, down).await;
                    println!(
                        "{long:?} {milliseconds} ms, {up} up, {down} down: direct {direct_close:?}, delayed {direct_away:?}; \
                         mesh {close:?}, delayed {away:?}"
                    );
                    // What two sidecars of a debug build compute for these bytes is nothing that a path has to do with.
                    let computed = close.saturating_sub(direct_close);
                    (away <= (direct_away + computed) * 13 / 10).then_some(())
                })
                .await;
            }
            drop(close.near);
            drop(away.near);
        }
    }
}
