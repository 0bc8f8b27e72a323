//! Promise: whatever is sent to the resolver, it answers the next question: packets that are none, pointers that lead
//! nowhere, no question or several, answers, floods, and TCP clients that say nothing, half of something or more than there
//! is. A port that is taken is said at the start, with what to do.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use outrigger_tests::dns::{self, A, Message, NameServer, question, receive, send, take, udp_client, with_edns};
use outrigger_tests::eventually::soon;
use outrigger_tests::{Mesh, MeshOptions, Sidecar, eventually, under_test};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const CATALOG: &str = "\
apiVersion: v1
kind: Service
metadata: {name: catalog, namespace: shop}
spec: {clusterIP: 10.96.0.10, selector: {app: catalog}, ports: [{port: 80}]}
";

struct Setting {
    mesh: Mesh,
    cart: Sidecar,
    resolver: SocketAddr,
    upstream: NameServer,
}

/// The upstream answers nothing but names that begin with `www`.
async fn setting(limits: impl FnOnce(&mut outrigger_sidecar::config::Limits)) -> Setting {
    let mesh = Mesh::start(MeshOptions::default()).await;
    mesh.write("catalog.yaml", CATALOG);
    let say = |_, asked: &[u8]| asked[12..].starts_with(b"\x03www").then(|| dns::answer(asked, 3, &[], 60));
    let upstream = NameServer::start(say).await;
    let address = upstream.address;
    // On a busy machine the control plane's first answer may come late.
    let patient = |limits: &mut outrigger_sidecar::config::Limits| limits.dns_first_answer = outrigger_tests::PATIENCE;
    let sidecar = mesh.sidecar("cart-1").limits(patient).limits(limits).config(|config| {
        config.dns_listen = Some(([127, 0, 0, 1], 0).into());
        config.dns_upstream = vec![address];
    });
    let cart = sidecar.start().await;
    let resolver = cart.address("dns");
    Setting { mesh, cart, resolver, upstream }
}

impl Setting {
    /// Both kinds of names are answered, by both transports.
    async fn serves(&self) {
        self.answers_names_of_the_mesh().await;
        for by_tcp in [false, true] {
            // What an upstream says may take longer than the limits of a test.
            eventually("www.example.org is denied", async || {
                let asked = question(1, "www.example.org", A);
                let said =
                    if by_tcp { dns::tcp(self.resolver, &asked).await } else { dns::udp(self.resolver, &asked).await };
                (Message::read(&said).code == 3).then_some(())
            })
            .await;
        }
    }

    async fn answers_names_of_the_mesh(&self) {
        for said in [
            dns::udp(self.resolver, &question(1, "catalog", A)).await,
            dns::tcp(self.resolver, &question(1, "catalog", A)).await,
        ] {
            assert_eq!(Message::read(&said).addresses(), ["10.96.0.10".parse::<IpAddr>().unwrap()]);
        }
    }

    async fn refused(&self) -> f64 {
        self.cart.metrics().await.sum("outrigger_dns_queries_total", &[("outcome", "refused")])
    }
}

/// What cannot be answered, and the code that is said to it; None: nothing.
fn hostile() -> Vec<(&'static str, Vec<u8>, Option<u8>)> {
    let plain = question(9, "catalog", A);
    let with = |at: usize, byte: u8| {
        let mut bytes = plain.clone();
        bytes[at] = byte;
        bytes
    };
    let named = |name: &[u8]| [&plain[..12], name, &[0, 1, 0, 1]].concat();
    let mut all = vec![
        ("an answer", with(2, 0x81), None),
        ("half a header", plain[..11].to_vec(), None),
        ("nothing", Vec::new(), None),
        ("a name that points to itself", named(&[0xC0, 12]), Some(1)),
        ("two names that point to each other", named(&[0xC0, 14, 0xC0, 12]), Some(1)),
        ("a pointer behind the end", named(&[0xFF, 0xFF]), Some(1)),
        ("a label of a kind that is not", named(&[0x41, b'x', 0]), Some(1)),
        ("a label that is longer than all", named(&[63, b'x']), Some(1)),
        ("no question", with(5, 0)[..12].to_vec(), Some(1)),
        ("no question, though there is one", with(5, 0), Some(1)),
        ("two questions", [&with(5, 2)[..], &plain[12..]].concat(), Some(1)),
        ("65,535 records that are not there", with(6, 0xFF), Some(1)),
        ("cut off in its question", plain[..plain.len() - 1].to_vec(), Some(1)),
        ("bytes behind its end", [&plain[..], b"and more"].concat(), Some(1)),
        ("an update", with(2, 5 << 3), Some(4)),
        ("a notify", with(2, 4 << 3), Some(4)),
        ("class CHAOS", with(plain.len() - 1, 3), Some(4)),
        ("a transfer of a zone", question(9, "shop", 252), Some(5)),
        ("two OPT", with_edns(with_edns(plain.clone(), 512), 512), Some(1)),
        ("a name of 256 bytes", question(9, &vec!["x".repeat(62); 5].join("."), A), Some(1)),
    ];
    all.push(("nothing but 0xFF", vec![0xFF; 4096], None));
    all.push(("nothing but zeros", vec![0; 4096], Some(1)));
    all
}

#[tokio::test]
async fn packets_that_are_no_questions() {
    let setting = setting(|_| {}).await;
    let packets = hostile();
    for (what, packet, code) in &packets {
        let client = udp_client(setting.resolver).await;
        client.send(packet).await.unwrap();
        // What is answered in order shows what was not.
        client.send(&question(4242, "catalog", A)).await.unwrap();
        let first = soon(what, receive(&client)).await;
        let first = Message::read(&first);
        match code {
            Some(code) => {
                assert_eq!((first.code, first.answers.len()), (*code, 0), "{what}");
                assert_eq!(Message::read(&soon(what, receive(&client)).await).id, 4242);
            }
            None => assert_eq!(first.id, 4242, "{what}: nothing is said to it"),
        }
        let mut tcp = TcpStream::connect(setting.resolver).await.unwrap();
        send(&mut tcp, packet).await;
        let said = soon(what, take(&mut tcp)).await.map(|said| Message::read(&said).code);
        assert_eq!(said, *code, "{what} by TCP: an answer, or the end");
    }
    assert_eq!(setting.refused().await, 2.0 * packets.len() as f64);
    assert!(setting.upstream.asked().is_empty(), "nobody else sees any of it");
    setting.serves().await;
}

#[tokio::test]
async fn mutations_of_questions() {
    let setting = setting(|limits| {
        limits.dns_server_timeout = Duration::from_millis(100);
    })
    .await;
    setting.serves().await;
    let seeds = [
        question(1, "catalog", A),
        with_edns(question(2, "catalog.shop.svc.cluster.local", 28), 4096),
        with_edns(question(3, "www.example.org", 255), 512),
    ];
    let client = udp_client(setting.resolver).await;
    let mut state = 0x5EED_u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below.max(1)
    };
    for round in 0..3_000 {
        let mut packet = seeds[round % seeds.len()].clone();
        for _ in 0..=random(4) {
            let at = random(packet.len());
            match random(4) {
                0 => packet.truncate(at),
                1 => packet.insert(at, random(256) as u8),
                _ if packet.is_empty() => {}
                2 => packet[at] = random(256) as u8,
                _ => packet[at] ^= 1 << random(8),
            }
        }
        client.send(&packet).await.unwrap();
        if round % 100 == 0 {
            setting.answers_names_of_the_mesh().await;
        }
    }
    setting.serves().await;
}

#[tokio::test]
async fn a_flood_of_questions_that_nobody_answers_holds_up_no_name_of_the_mesh() {
    let setting = setting(|limits| {
        limits.dns_in_flight = 8;
        limits.dns_server_timeout = Duration::from_secs(4);
    })
    .await;
    setting.serves().await;
    let client = udp_client(setting.resolver).await;
    for id in 0..40 {
        client.send(&question(id, "silent.example.org", A)).await.unwrap();
    }
    // 8 wait; the others are told at once, and a name of the mesh is answered.
    for _ in 0..32 {
        assert_eq!(Message::read(&soon("a refusal", receive(&client)).await).code, 2);
    }
    assert!(setting.refused().await >= 32.0);
    let catalog = Message::read(&dns::udp(setting.resolver, &question(1, "catalog", A)).await);
    assert_eq!(catalog.addresses(), ["10.96.0.10".parse::<IpAddr>().unwrap()]);
    for _ in 0..8 {
        assert_eq!(Message::read(&soon("a failure", receive(&client)).await).code, 2);
    }
    setting.serves().await;
}

#[tokio::test]
async fn tcp_clients_that_are_slow_silent_or_too_many() {
    let setting = setting(|limits| {
        limits.dns_tcp_clients = 4;
        limits.dns_tcp_idle = Duration::from_secs(3);
    })
    .await;
    let connect = async || TcpStream::connect(setting.resolver).await.unwrap();
    // One that says nothing, one in the middle of the length, one in the middle of 64 KiB.
    let mut slow = [connect().await, connect().await, connect().await];
    slow[1].write_all(&[0xFF]).await.unwrap();
    slow[2].write_all(&[0xFF, 0xFF]).await.unwrap();
    slow[2].write_all(&[7; 30_000]).await.unwrap();
    // The fourth is served, for as many questions as it has.
    let mut fourth = connect().await;
    for id in 1..=3 {
        let both = [question(id, "catalog", A), question(id + 100, "www.example.org", A)];
        for asked in &both {
            send(&mut fourth, asked).await;
        }
        for asked in &both {
            let said = soon("an answer", take(&mut fourth)).await.expect("an answer");
            assert_eq!(said[..2], asked[..2], "in order");
        }
    }
    // UDP is nobody's to take away.
    assert_eq!(Message::read(&dns::udp(setting.resolver, &question(1, "catalog", A)).await).answers.len(), 1);
    for mut slow in slow {
        let mut rest = Vec::new();
        // Unread bytes make it a reset.
        let _ = soon("the end", slow.read_to_end(&mut rest)).await;
        assert_eq!(rest, b"");
    }
    drop(fourth);
    eventually("places are free again", async || {
        let mut stream = connect().await;
        send(&mut stream, &question(1, "catalog", A)).await;
        soon("an answer or the end", take(&mut stream)).await
    })
    .await;
    // A whole message of 64 KiB is none, but is read to its end.
    let mut long = connect().await;
    send(&mut long, &[&question(5, "catalog", A)[..], &[0; 65_000]].concat()).await;
    assert_eq!(Message::read(&soon("an answer", take(&mut long)).await.unwrap()).code, 1);
    drop(long);
    setting.serves().await;
}

#[tokio::test]
async fn a_port_that_is_taken() {
    let setting = setting(|_| {}).await;
    let refusal = async |address: std::net::SocketAddr| {
        let sidecar = setting.mesh.sidecar("cart-2").config(|config| config.dns_listen = Some(address));
        let (status, stdout, stderr) = sidecar.spawn(under_test!()).await.finish(outrigger_tests::PATIENCE).await;
        assert_eq!((status.code(), stdout.as_str()), (Some(1), ""), "{stderr}");
        stderr
    };
    let refused = |address, what| format!("cannot listen on {address} ({what}): the port is in use; end what holds it");
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = tcp.local_addr().unwrap();
    let said = refusal(taken).await;
    assert!(said.contains(&refused(taken, "dns")), "{said}");
    // A number that is free for TCP: somebody else on this machine may just have taken it there, which is told first.
    let mut said = String::new();
    for _ in 0..10 {
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let taken = udp.local_addr().unwrap();
        said = refusal(taken).await;
        if said.contains(&refused(taken, "dns, UDP")) {
            said.clear();
            break;
        }
        assert!(said.contains(&refused(taken, "dns")), "{said}");
    }
    assert_eq!(said, "", "UDP is never named");
    let sidecar = setting.mesh.sidecar("cart-3").config(|config| {
        config.dns_listen = Some(([127, 0, 0, 1], 0).into());
        config.dns_upstream = vec![setting.upstream.address];
    });
    let mut process = sidecar.spawn(under_test!()).await;
    process.ready().await;
    let resolver = process.address("dns").await;
    eventually("the first answer", async || {
        let said = dns::udp(resolver, &question(1, "catalog", A)).await;
        (Message::read(&said).answers.len() == 1).then_some(())
    })
    .await;
}
