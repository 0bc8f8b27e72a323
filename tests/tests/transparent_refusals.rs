//! Promise: the two listeners of a transparent sidecar serve redirected connections and nothing else: not whoever connects
//! to them directly, not an address of somebody else, not a port of the sidecar itself. Each is closed, counted with its
//! reason and written to the access log with the client's address. What cannot work is said at the start.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use outrigger_tests::mesh::PERMISSIVE;
use outrigger_tests::namespace::{Families, only_root};
use outrigger_tests::process::{Process, Program, command};
use outrigger_tests::transparent::{TransparentMesh, TransparentSidecar, everything};
use outrigger_tests::{Namespace, eventually, under_test};

async fn is_refused(from: &Namespace, sidecar: &TransparentSidecar<'_>, address: SocketAddr, reason: &str, log: &str) {
    let name = "outrigger_tcp_connections_closed_total";
    let before = sidecar.metrics().await.sum(name, &[("reason", reason)]);
    match from.try_connect(address).await {
        Ok(mut connection) => {
            // It may be closed already.
            let _ = connection.try_send("GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
            assert_eq!(everything(connection).await, b"", "{address}");
        }
        // Taken and closed before the client has looked.
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{address}"),
    }
    sidecar.counts(name, &[("reason", reason)], before + 1.0).await;
    let logged = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
        line["reason"] == reason
            && line["detail"].as_str().is_some_and(|detail| detail.contains(log))
            && line["downstream"].is_string()
    };
    eventually(&format!("{address} is refused in the log: {reason}, {log}"), async || {
        if sidecar.process.stderr().lines().any(logged) {
            return Some(());
        }
        // Strangers have one line per reason and second: another one had it, and a later second has this one.
        let _ = from.try_connect(address).await;
        None
    })
    .await;
}

async fn refused(families: Families) {
    let names = ["catalog", "lone"];
    let Some(mesh) = TransparentMesh::start(under_test!(), families, &names, PERMISSIVE).await else { return };
    let catalog = mesh.sidecar("catalog", "catalog", &[]).await;
    let (hub, inside) = (mesh.network.hub(), mesh.at("catalog"));
    let ip = mesh.address("catalog");
    let loopback: IpAddr = if ip.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
    let _application = catalog.application("catalog", 8080);

    // Straight to a listener: from within, and from elsewhere, where the rules redirect it to itself.
    is_refused(inside, &catalog, (loopback, 15001).into(), "own_port", "not redirected").await;
    is_refused(inside, &catalog, (loopback, 15006).into(), "own_port", "not redirected").await;
    is_refused(hub, &catalog, (ip, 15006).into(), "own_port", "not redirected").await;
    // The sidecar's own ports, admin among them.
    is_refused(hub, &catalog, (ip, 15001).into(), "own_port", "port 15001").await;
    is_refused(hub, &catalog, (ip, 15000).into(), "own_port", "port 15000").await;
    // Somebody else's address, which a neighbour sends here.
    let (route, foreign) = if ip.is_ipv4() {
        (format!("ip route add 203.0.113.7/32 via {ip}"), "203.0.113.7:8080")
    } else {
        (format!("ip -6 route add 2001:db8::7/128 via {ip}"), "[2001:db8::7]:8080")
    };
    hub.run(&route);
    catalog.redirect_by_hand();
    is_refused(hub, &catalog, foreign.parse().unwrap(), "foreign_address", "no address of this network namespace")
        .await;

    // Without any rules the kernel knows of no original destination at all.
    let lone = mesh.start_sidecar(mesh.at("lone"), "lone", &[]);
    let mut lone = lone;
    lone.process.ready().await;
    eventually("ready", async || (lone.ready().await.0 == 200).then_some(())).await;
    is_refused(mesh.at("lone"), &lone, (loopback, 15001).into(), "own_port", "not redirected").await;
    is_refused(hub, &lone, (mesh.address("lone"), 15006).into(), "own_port", "not redirected").await;
}

#[tokio::test]
async fn over_ipv4() {
    refused(Families::V4).await;
}

#[tokio::test]
async fn over_ipv6() {
    refused(Families::V6).await;
}

#[tokio::test]
async fn an_application_on_loopback_alone_is_not_reached_from_elsewhere() {
    let names = ["catalog"];
    let Some(mesh) = TransparentMesh::start(under_test!(), Families::V4, &names, PERMISSIVE).await else { return };
    let _catalog = mesh.sidecar("catalog", "catalog", &[]).await;
    let inside = mesh.at("catalog");
    let private = outrigger_tests::application::Backend::from(inside.listen("127.0.0.1:8080".parse().unwrap()));
    let answer = outrigger_tests::transparent::get(mesh.network.hub(), &format!("{}:8080", inside.v4()), "/").await;
    assert_eq!((answer.status, answer.reason().as_str()), (503, "connection_refused"));
    assert!(private.accepted().await.is_none());
}

async fn ends(mut process: Process) -> (i32, String) {
    let code = process.wait(Duration::from_secs(20)).await.code().unwrap();
    (code, process.stderr())
}

#[tokio::test]
async fn what_cannot_work_is_said_at_the_start() {
    let names = ["catalog"];
    let Some(mesh) = TransparentMesh::start(under_test!(), Families::V4, &names, PERMISSIVE).await else { return };
    let machine = mesh.at("catalog");
    let taken = machine.listen("0.0.0.0:15006".parse().unwrap());
    let (code, said) = ends(mesh.start_sidecar(machine, "catalog", &[]).process).await;
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("cannot listen on 0.0.0.0:15006 (inbound): the port is in use"), "{said}");
    drop(taken);

    let mut first = mesh.start_sidecar(machine, "catalog", &[]);
    first.process.ready().await;
    let addresses = first.process.stdout();
    for line in ["outbound 127.0.0.1:15001", "outbound [::1]:15001", "inbound 0.0.0.0:15006", "inbound [::]:15006"] {
        assert!(addresses.contains(&format!("listening {line}")), "{addresses}");
    }
    let other = ["--admin-listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0"];
    let (code, said) = ends(mesh.start_sidecar(machine, "second", &other).process).await;
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("cannot listen on 127.0.0.1:15001 (outbound): the port is in use"), "{said}");

    if only_root() {
        return eprintln!("not tried: another user has no right to set marks");
    }
    let mut unprivileged = command(under_test!(), Program::Sidecar);
    unprivileged.args(["run", "--control-plane", "127.0.0.1:1", "--trust-bundle", "/dev/null", "--token-file"]);
    unprivileged.args(["/dev/null", "--name", "x", "--namespace", "shop", "--service-account", "x", "--mark", "7"]);
    let (code, said) = ends(Process::spawn(machine.inside_as(Some(1234), &unprivileged))).await;
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("--mark 7 cannot be set on sockets") && said.contains("CAP_NET_ADMIN"), "{said}");
}
