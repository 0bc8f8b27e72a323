//! The pair of haproxy for bytes that nobody parses: TCP mode, one thread each, mutual TLS 1.3 between the two with the
//! cipher and the kind of certificate that the sidecars use, no logs.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::child::{Child, Layout};
use super::nginx::{find_program, free_port, wait_until_open, write_certificates};

pub struct Haproxy {
    pub client: Child,
    pub server: Child,
    pub address: SocketAddr,
}

/// Where haproxy is installed, if it is.
pub fn find() -> Option<PathBuf> {
    find_program("haproxy")
}

impl Haproxy {
    pub fn start(program: &Path, application: SocketAddr, directory: &Path, layout: Layout) -> anyhow::Result<Haproxy> {
        write_certificates(directory)?;
        for name in ["client", "server"] {
            let read = |kind: &str| fs::read_to_string(directory.join(format!("{name}.{kind}")));
            fs::write(directory.join(format!("{name}.both.pem")), read("pem")? + &read("key")?)?;
        }
        // haproxy cannot choose a port by itself and say it.
        let (mesh, plain) = (free_port()?, free_port()?);
        let start = |name: &'static str, text: String| {
            let file = directory.join(format!("{name}.cfg"));
            fs::write(&file, text)?;
            let arguments = ["-db".as_ref(), "-f".as_ref(), file.as_os_str()];
            Child::start(name, program, arguments, layout.proxies, directory)
        };
        let server = start("haproxy-server", server_text(directory, mesh, application))?;
        let client = start("haproxy-client", client_text(directory, plain, mesh))?;
        wait_until_open(mesh)?;
        wait_until_open(plain)?;
        Ok(Haproxy { client, server, address: plain })
    }
}

fn text(bind: &str, server: &str) -> String {
    format!(
        "global
    nbthread 1
    maxconn 4096
defaults
    mode tcp
    timeout connect 5s
    timeout client 1h
    timeout server 1h
listen bench
    bind {bind}
    server one {server}
"
    )
}

const TLS: &str = "ssl-min-ver TLSv1.3 ciphersuites TLS_AES_128_GCM_SHA256 verify required";

fn client_text(certificates: &Path, listen: SocketAddr, server: SocketAddr) -> String {
    let files = certificates.display();
    let ours = format!("crt {files}/client.both.pem ca-file {files}/root.pem");
    text(&listen.to_string(), &format!("{server} ssl {ours} {TLS} verifyhost server.bench"))
}

fn server_text(certificates: &Path, listen: SocketAddr, application: SocketAddr) -> String {
    let files = certificates.display();
    let ours = format!("crt {files}/server.both.pem ca-file {files}/root.pem");
    text(&format!("{listen} ssl {ours} {TLS}"), &application.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_prove_themselves() {
        let (one, two) = (([127, 0, 0, 1], 1).into(), ([127, 0, 0, 1], 2).into());
        let client = client_text(Path::new("/d"), one, two);
        let server = server_text(Path::new("/d"), one, two);
        assert!(client.contains("bind 127.0.0.1:1\n") && client.contains("server one 127.0.0.1:2 ssl crt /d/client"));
        assert!(server.contains("bind 127.0.0.1:1 ssl crt /d/server") && server.contains("server one 127.0.0.1:2\n"));
        for text in [client, server] {
            assert!(text.contains("mode tcp") && text.contains("verify required") && text.contains("ca-file"));
        }
    }
}
