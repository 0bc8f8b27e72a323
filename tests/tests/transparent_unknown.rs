//! Promise: what an application sends to somebody whom nobody registered passes with its bytes untouched, whoever speaks
//! first; where the mesh allows registered destinations only it is refused with a reason.

use std::net::SocketAddr;

use outrigger_tests::application::Backend;
use outrigger_tests::mesh::STRICT;
use outrigger_tests::namespace::Families;
use outrigger_tests::peer::{Peer, self_signed};
use outrigger_tests::transparent::{TransparentMesh, get};
use outrigger_tests::{End, eventually, under_test};

const REGISTRY_ONLY: &str = "\
apiVersion: outrigger.dev/v1alpha1
kind: MeshConfig
metadata: {name: default, namespace: outrigger-system}
spec: {outbound: {mode: RegistryOnly}}
";

async fn untouched(families: Families) {
    let Some(mesh) = TransparentMesh::start(under_test!(), families, &["web"], STRICT).await else { return };
    let web = mesh.sidecar("web", "web", &[]).await;
    let hub = mesh.network.hub();
    let ip = if families == Families::V6 { hub.v6().into() } else { hub.v4().into() };
    let address = SocketAddr::new(ip, 7777);
    let outside = Backend::from(hub.listen(address));

    // Nothing of it would come through a parser of HTTP unchanged, and the first line never ends.
    for (sent, answered) in [
        (&b"get  / HTTP/1.1\nhOST:x\n\x00\xff"[..], &b"HTTP/9 what?"[..]),
        (b"GE", b"I speak too early"),
        (b"\x16\x03\x01", b"no TLS"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x00\x00"),
    ] {
        let mut client = mesh.at("web").connect(address).await;
        client.send(sent).await;
        let mut server = outside.accept().await;
        assert_eq!(server.take(sent.len()).await, sent);
        server.send(answered).await;
        assert_eq!(client.take(answered.len()).await, answered);
        client.finish().await;
        assert_eq!(server.take_to_end().await, (Vec::new(), End::Closed));
        server.send("the end").await;
        server.finish().await;
        assert_eq!(client.take_to_end().await, (b"the end".to_vec(), End::Closed));
    }

    // The server speaks first, to a client that never does and has already ended its own direction.
    let mut client = mesh.at("web").connect(address).await;
    client.finish().await;
    let mut server = outside.accept().await;
    assert_eq!(server.take_to_end().await, (Vec::new(), End::Closed));
    server.send("220 welcome\r\n").await;
    server.finish().await;
    assert_eq!(client.take_to_end().await, (b"220 welcome\r\n".to_vec(), End::Closed));

    // TLS of its own: the name that it asks for is known.
    let client = mesh.at("web").connect(address).await;
    let outsider = self_signed("https://outside.test");
    let handshake = async { outsider.accept(outside.accept().await, &["h2"]).await };
    let nobody = Peer::without_certificate();
    let (client, server) = tokio::join!(nobody.secure(client, "outside.test", &["h2"]), handshake);
    let (mut client, mut server) = (client.unwrap(), server.unwrap());
    client.send("secret").await;
    assert_eq!(server.take(6).await, b"secret");
    eventually("/connections names the server", async || {
        web.admin("/connections").await.to_string().contains("\"sni\":\"outside.test\"").then_some(())
    })
    .await;
    drop((client, server));
    let labels = [("direction", "outbound"), ("destination_workload", "unknown"), ("mtls", "false"), ("reason", "")];
    web.counts("outrigger_tcp_connections_closed_total", &[&labels[..], &[("protocol", "tcp")]].concat(), 5.0).await;
    let labels = [&labels[..3], &[("protocol", "tls")]].concat();
    web.counts("outrigger_tcp_connections_opened_total", &labels, 1.0).await;
    assert_eq!(web.metrics().await.sum("outrigger_http_requests_total", &[]), 0.0);
}

#[tokio::test]
async fn over_ipv4() {
    untouched(Families::V4).await;
}

#[tokio::test]
async fn over_ipv6() {
    untouched(Families::V6).await;
}

#[tokio::test]
async fn registered_destinations_only() {
    let yaml = format!("{STRICT}---\n{REGISTRY_ONLY}");
    let Some(mesh) = TransparentMesh::start(under_test!(), Families::V4, &["web"], &yaml).await else { return };
    let web = mesh.sidecar("web", "web", &[]).await;
    let hub = mesh.network.hub();
    let address = SocketAddr::new(hub.v4().into(), 7777);
    let outside = Backend::from(hub.listen(address));

    let answer = get(mesh.at("web"), &address.to_string(), "/").await;
    assert_eq!((answer.status, answer.reason().as_str()), (502, "not_registered"), "{}", answer.text());
    let mut client = mesh.at("web").connect(address).await;
    client.send("\x01\x02\x03 not http").await;
    assert_eq!(client.take_to_end().await, (Vec::new(), End::Reset));
    // Who waits for the server is told as well.
    let mut client = mesh.at("web").connect(address).await;
    assert_eq!(client.take_to_end().await, (Vec::new(), End::Reset));
    let refused = [("direction", "outbound"), ("reason", "not_registered")];
    web.counts("outrigger_http_requests_total", &refused, 1.0).await;
    web.counts("outrigger_tcp_connections_closed_total", &refused, 2.0).await;
    assert!(outside.accepted().await.is_none(), "nothing got out");
}
