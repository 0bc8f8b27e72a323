//! The pair of nginx: one takes plaintext and speaks mutual TLS to the other, which proxies to the application. The
//! settings are those that somebody would choose who wants it fast: keep-alive pools on both hops, session reuse, TLS
//! 1.3 with the cipher that the sidecars use, P-256 certificates, no logs, one worker each.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::bail;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, PKCS_ECDSA_P256_SHA256};

use super::child::{self, Child, Layout};

const PATIENCE: Duration = Duration::from_secs(10);

pub struct Nginx {
    pub client: Child,
    pub server: Child,
    pub address: SocketAddr,
}

/// Where nginx is installed, if it is.
pub fn find() -> Option<PathBuf> {
    find_program("nginx")
}

pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(more).map(|directory| directory.join(name)).find(|file| file.is_file())
}

impl Nginx {
    pub fn start(program: &Path, application: SocketAddr, directory: &Path, layout: Layout) -> anyhow::Result<Nginx> {
        write_certificates(directory)?;
        // nginx cannot choose a port by itself and say it.
        let (mesh, plain) = (free_port()?, free_port()?);
        let start = |name: &'static str, text: String| {
            let prefix = directory.join(name);
            fs::create_dir_all(&prefix)?;
            let file = prefix.join("nginx.conf");
            fs::write(&file, text)?;
            let arguments = ["-p".as_ref(), prefix.as_os_str(), "-c".as_ref(), file.as_os_str()];
            Child::start(name, program, arguments, layout.proxies, directory)
        };
        let server = start("nginx-server", server_text(directory, mesh, application))?;
        let client = start("nginx-client", client_text(directory, plain, mesh))?;
        wait_until_open(mesh)?;
        wait_until_open(plain)?;
        Ok(Nginx { client, server, address: plain })
    }
}

/// The process that does the work. The master listens before it forks.
pub fn worker(master: &Child) -> anyhow::Result<u32> {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(worker) = child::children(master.pid()).first() {
            return Ok(*worker);
        }
        if Instant::now() > until {
            bail!("{} has no worker after {PATIENCE:?}", master.name);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub fn free_port() -> std::io::Result<SocketAddr> {
    TcpListener::bind("127.0.0.1:0")?.local_addr()
}

pub fn wait_until_open(address: SocketAddr) -> anyhow::Result<()> {
    let until = Instant::now() + PATIENCE;
    while TcpStream::connect(address).is_err() {
        if Instant::now() > until {
            bail!("nobody listens on {address}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// A root, and a certificate for each side, as PEM files in `directory`.
pub fn write_certificates(directory: &Path) -> anyhow::Result<()> {
    let key = || KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256);
    let mut root = CertificateParams::new(Vec::<String>::new())?;
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    // OpenSSL finds issuers by name, so each needs one of its own.
    root.distinguished_name.push(DnType::CommonName, "bench root");
    let root = CertifiedIssuer::self_signed(root, key()?)?;
    fs::write(directory.join("root.pem"), root.pem())?;
    for name in ["client", "server"] {
        let key = key()?;
        let mut leaf = CertificateParams::new(vec![format!("{name}.bench")])?;
        leaf.distinguished_name.push(DnType::CommonName, name);
        let leaf = leaf.signed_by(&key, &root)?;
        fs::write(directory.join(format!("{name}.pem")), leaf.pem())?;
        fs::write(directory.join(format!("{name}.key")), key.serialize_pem())?;
    }
    Ok(())
}

/// What both have in common; `inner` stands in the `http` block.
fn text(inner: &str) -> String {
    format!(
        "daemon off;
worker_processes 1;
pid nginx.pid;
error_log stderr warn;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    tcp_nodelay on;
    keepalive_timeout 1h;
    keepalive_requests 1000000000;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    proxy_http_version 1.1;
    proxy_set_header Connection \"\";
    proxy_set_header Host $http_host;
{inner}}}
"
    )
}

fn client_text(certificates: &Path, listen: SocketAddr, server: SocketAddr) -> String {
    let certificates = certificates.display();
    text(&format!(
        "    upstream mesh {{ server {server}; keepalive 64; keepalive_requests 1000000000; keepalive_timeout 1h; }}
    server {{
        listen {listen};
        location / {{
            proxy_pass https://mesh;
            proxy_ssl_protocols TLSv1.3;
            proxy_ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;
            proxy_ssl_certificate {certificates}/client.pem;
            proxy_ssl_certificate_key {certificates}/client.key;
            proxy_ssl_trusted_certificate {certificates}/root.pem;
            proxy_ssl_verify on;
            proxy_ssl_server_name on;
            proxy_ssl_name server.bench;
            proxy_ssl_session_reuse on;
        }}
    }}
"
    ))
}

fn server_text(certificates: &Path, listen: SocketAddr, application: SocketAddr) -> String {
    let certificates = certificates.display();
    text(&format!(
        "    upstream application {{ server {application}; keepalive 64; keepalive_requests 1000000000; keepalive_timeout 1h; }}
    server {{
        listen {listen} ssl;
        ssl_protocols TLSv1.3;
        ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;
        ssl_certificate {certificates}/server.pem;
        ssl_certificate_key {certificates}/server.key;
        ssl_client_certificate {certificates}/root.pem;
        ssl_verify_client on;
        ssl_session_cache shared:mesh:1m;
        location / {{ proxy_pass http://application; }}
    }}
"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_prove_themselves_and_keep_their_connections() {
        let (client, server) = (([127, 0, 0, 1], 1).into(), ([127, 0, 0, 1], 2).into());
        let one = client_text(Path::new("/d"), client, server);
        for line in [
            "listen 127.0.0.1:1;",
            "server 127.0.0.1:2; keepalive 64;",
            "proxy_pass https://mesh;",
            "proxy_ssl_verify on;",
            "proxy_ssl_certificate /d/client.pem;",
            "proxy_ssl_trusted_certificate /d/root.pem;",
            "proxy_ssl_session_reuse on;",
            "proxy_ssl_protocols TLSv1.3;",
            "proxy_set_header Connection \"\";",
            "worker_processes 1;",
        ] {
            assert!(one.contains(line), "{line} is not in\n{one}");
        }
        let two = server_text(Path::new("/d"), server, client);
        for line in [
            "listen 127.0.0.1:2 ssl;",
            "server 127.0.0.1:1; keepalive 64;",
            "ssl_verify_client on;",
            "ssl_protocols TLSv1.3;",
            "access_log off;",
            "proxy_http_version 1.1;",
        ] {
            assert!(two.contains(line), "{line} is not in\n{two}");
        }
        for text in [one, two] {
            assert_eq!(text.matches('{').count(), text.matches('}').count());
        }
    }

    #[test]
    fn certificates_are_written() {
        let directory = tempfile::tempdir().unwrap();
        write_certificates(directory.path()).unwrap();
        for (file, what) in [("root.pem", "CERTIFICATE"), ("client.key", "PRIVATE KEY"), ("server.pem", "CERTIFICATE")]
        {
            assert!(fs::read_to_string(directory.path().join(file)).unwrap().contains(what), "{file}");
        }
    }
}
