//! Promise: programs that speak no HTTP need to know nothing of the mesh: through two transparent sidecars under STRICT
//! RabbitMQ works with pika, PostgreSQL with psycopg, Redis with its client, a mail server that speaks first on ports that
//! are known for it and on one that is not, and the application's own TLS inside the mesh's.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use outrigger_tests::namespace::Families;
use outrigger_tests::pods::{NOBODY, Pods, Port, find, run};
use outrigger_tests::process::Process;
use outrigger_tests::under_test;

const fn same(port: u16) -> Port {
    Port { service: port, app: port }
}

/// Of a connection that one side ended with a RST; which copy meets it first, reading or writing, is chance.
const RESET: &[&str] = &["upstream_reset", "client_closed"];

// --- RabbitMQ -----------------------------------------------------------------------------------------------------

#[tokio::test]
async fn rabbitmq_and_pika() {
    let Some(pods) = Pods::start(under_test!(), Families::V4, &[same(5672)], &["python", "rabbitmq-server"]).await
    else {
        return;
    };
    let _server = rabbitmq(&pods).await;
    assert_eq!(run(pods.python("cart", "rabbitmq_client.py", &["catalog.shop", "5672"])).await, "ok");
    // The broker resets a connection that is over, without the mesh as well.
    let both = pods.tcp("tcp", 1, RESET).await;
    // No default says that this port is opaque; the client's first bytes do.
    assert_eq!(both.detected("tcp")[0], 1.0);
    let [sent, _] = both.sums("outrigger_tcp_sent_bytes_total", &[]);
    let [received, _] = both.sums("outrigger_tcp_received_bytes_total", &[]);
    assert!(sent > 9e6 && received > 9e6, "every message went there and back: {sent} {received}");
}

/// A broker of its own. It leaves a daemon (epmd) behind, so it has a process namespace that ends with it.
async fn rabbitmq(pods: &Pods) -> Process {
    let home = pods.directory_of("rabbitmq", NOBODY);
    let settings = "listeners.tcp.1 = :::5672\nloopback_users = none\nheartbeat = 2\n";
    std::fs::write(home.join("rabbitmq.conf"), settings).unwrap();
    std::fs::write(home.join("plugins"), "[].\n").unwrap();
    let mut server = pods.at("catalog").command("unshare");
    server.args(["--pid", "--fork", "--kill-child", "--mount-proc", "--wd=/"]);
    server.args(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--pdeathsig=KILL"]);
    server.arg(find("rabbitmq-server").unwrap());
    for (name, value) in [("HOME", ""), ("RABBITMQ_MNESIA_BASE", "mnesia"), ("RABBITMQ_LOG_BASE", "log")] {
        server.env(name, home.join(value));
    }
    server.env("RABBITMQ_CONFIG_FILE", home.join("rabbitmq.conf"));
    server.env("RABBITMQ_ENABLED_PLUGINS_FILE", home.join("plugins"));
    server.env("RABBITMQ_CONF_ENV_FILE", "/dev/null").env("RABBITMQ_LOGS", "-").env("RABBITMQ_NODENAME", "x@localhost");
    server.env("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", "+S 1:1 +sbwt none");
    pods.serve_until(server, "Server startup complete").await
}

// --- databases ----------------------------------------------------------------------------------------------------

#[tokio::test]
async fn postgresql_and_psycopg() {
    let known = Port { service: 5432, app: 6543 };
    let Some(pods) = Pods::start(under_test!(), Families::V6, &[known, same(6543)], &["python", "initdb"]).await else {
        return;
    };
    let _server = postgresql(&pods).await;
    // On the second port nobody has said what is spoken: the client's own request for TLS decides. With TLS the server
    // leaves the client's last record unread, and so resets a connection that is over, without the mesh as well.
    for (port, sslmode, connections, reasons) in
        [("5432", "disable", 3, &[][..]), ("5432", "prefer", 6, RESET), ("6543", "prefer", 9, RESET)]
    {
        let client = pods.python("cart", "postgres_client.py", &["catalog.shop", port, sslmode]);
        assert_eq!(run(client).await, "ok", "{port} {sslmode}");
        let both = pods.tcp("tcp", connections, reasons).await;
        assert_eq!(both.detected("tcp")[0], if port == "6543" { 3.0 } else { 0.0 }, "{port} {sslmode}");
    }
}

/// A cluster of its own, with TLS for those who ask for it.
async fn postgresql(pods: &Pods) -> Process {
    let home = pods.directory_of("postgresql", NOBODY);
    let data = home.join("data");
    let mut make = pods.program_of_nobody("initdb");
    make.args(["--username=postgres", "--auth=trust", "--no-sync", "--locale=C.UTF-8", "--encoding=UTF8"]);
    make.arg("--pgdata").arg(&data);
    run(make).await;
    let access = data.join("pg_hba.conf");
    let known = std::fs::read_to_string(&access).unwrap();
    std::fs::write(&access, known + "host all all all trust\n").unwrap();
    let (certificate, key) = own_certificate(pods, "postgres");
    let mut server = pods.program_of_nobody("postgres");
    server.arg("-D").arg(&data);
    for setting in [
        "listen_addresses=*",
        "port=6543",
        "unix_socket_directories=",
        "fsync=off",
        "ssl=on",
        &format!("ssl_cert_file={}", certificate.display()),
        &format!("ssl_key_file={}", key.display()),
    ] {
        server.args(["-c", setting]);
    }
    pods.serve_until(server, "database system is ready to accept connections").await
}

#[tokio::test]
async fn redis() {
    let known = Port { service: 6379, app: 7000 };
    let Some(pods) = Pods::start(under_test!(), Families::V4, &[known, same(7000)], &["python", "redis-server"]).await
    else {
        return;
    };
    let home = pods.directory_of("redis", NOBODY);
    let mut server = pods.program_of_nobody("redis-server");
    server.args(["--port", "7000", "--bind", "*", "-::*", "--protected-mode", "no", "--save", "", "--dir"]).arg(home);
    let _server = pods.serve_until(server, "Ready to accept connections").await;
    for (port, connections, detected) in [("6379", 3, 0.0), ("7000", 6, 3.0)] {
        assert_eq!(run(pods.python("cart", "redis_client.py", &["catalog.shop", port])).await, "ok", "{port}");
        let both = pods.tcp("tcp", connections, &[]).await;
        assert_eq!(both.detected("tcp")[0], detected, "{port}");
    }
}

// --- the server speaks first --------------------------------------------------------------------------------------

#[tokio::test]
async fn mail_by_ipv4() {
    mail(Families::V4).await;
}

#[tokio::test]
async fn mail_by_ipv6() {
    mail(Families::V6).await;
}

async fn mail(family: Families) {
    let Some(pods) = Pods::start(under_test!(), family, &[same(25), same(587), same(2525)], &["python"]).await else {
        return;
    };
    let server = pods.python("catalog", "smtp_server.py", &[pods.everywhere(), "25", "587", "2525"]);
    let server = pods.serve(server).await;
    for (port, connections, guessed) in [("25", 3, 0.0), ("587", 6, 0.0), ("2525", 9, 3.0)] {
        assert_eq!(run(pods.python("cart", "smtp_client.py", &["catalog.shop", port])).await, "ok", "{port}");
        let both = pods.tcp("tcp", connections, &[]).await;
        assert_eq!(both.detected("server_first")[0], guessed, "{port}: a known port needs no guess");
    }
    assert_eq!(server.stdout().matches("mail 720089").count(), 9, "{}", server.stdout());
}

// --- the application's own TLS ------------------------------------------------------------------------------------

#[tokio::test]
async fn https_of_the_application() {
    for family in [Families::V4, Families::V6] {
        let Some(pods) = Pods::start(under_test!(), family, &[same(443)], &["python", "curl"]).await else { return };
        let (certificate, key) = own_certificate(&pods, "https");
        let (certificate, key) = (certificate.to_str().unwrap(), key.to_str().unwrap());
        let server = pods.python("catalog", "aiohttp_server.py", &[pods.everywhere(), "443", certificate, key]);
        let _server = pods.serve(server).await;
        let shown = pods.curl("", &["--cacert", certificate, "https://catalog.shop/hello"]).await;
        let seen: serde_json::Value = serde_json::from_str(&shown).unwrap();
        assert_eq!(seen["host"], "catalog.shop", "end to end: curl has checked the application's own certificate");
        assert_eq!(seen["caller"], "", "nobody in between could add a header");
        let size = ["--cacert", certificate, "-o", "/dev/null", "https://catalog.shop/bytes/3000000"];
        assert_eq!(pods.curl("%{response_code} %{size_download}", &size).await, "200 3000000");
        // curl does not wait for the server's last record.
        let both = pods.tcp("tls", 2, RESET).await;
        assert_eq!(both.detected("tls")[0], 2.0);
    }
}

/// A certificate for catalog.shop that nobody else has signed, and its key, which only [`NOBODY`] and root can read.
fn own_certificate(pods: &Pods, name: &str) -> (PathBuf, PathBuf) {
    let pair = rcgen::generate_simple_self_signed(["catalog.shop".to_owned()]).unwrap();
    let directory = pods.directory_of(&format!("certificate-{name}"), NOBODY);
    let write = |file: &str, text: String| {
        let path = directory.join(file);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::chown(&path, Some(NOBODY), Some(NOBODY)).unwrap();
        path
    };
    (write("certificate.pem", pair.cert.pem()), write("key.pem", pair.signing_key.serialize_pem()))
}
