//! The field of the HTTP/1.1 attacks: a PERMISSIVE mesh with one application that records raw bytes, and the two places
//! where an attacker can stand. Says what an attack led to: what its client got, and what reached the application.

#![allow(dead_code, reason = "each suite uses its part")]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use outrigger_api::name::Protocol;
use outrigger_sidecar::config::Limits;
use outrigger_tests::application::Seen;
use outrigger_tests::wire::find;
use outrigger_tests::{Application, Connection, Mesh, MeshOptions, Response, Sidecar, eventually};

/// Where the attacker stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// The application of a client sidecar: the hop between the sidecars is then ours.
    Outbound,
    /// In plaintext at the inbound port.
    Inbound,
}

pub const PLACES: [Place; 2] = [Place::Outbound, Place::Inbound];

pub struct Field {
    pub app: Application,
    pub near: Sidecar,
    pub far: Sidecar,
    attacks: AtomicUsize,
    _mesh: Mesh,
}

impl Field {
    pub async fn new() -> Field {
        Field::with(|_| {}).await
    }

    pub async fn with(limits: fn(&mut Limits)) -> Field {
        let app = Application::start("catalog").await;
        let mesh = Mesh::start(MeshOptions::permissive()).await;
        mesh.service("catalog.shop", 80, app.port(), Some("http"));
        let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address());
        let far = far.port(app.port(), Some(Protocol::Http)).limits(limits).start().await;
        let near = mesh.sidecar("cart-1").outbound("catalog:80").limits(limits).start().await;
        Field { app, near, far, attacks: AtomicUsize::new(0), _mesh: mesh }
    }

    pub fn address(&self, place: Place) -> SocketAddr {
        match place {
            Place::Outbound => self.near.outbound(),
            Place::Inbound => self.far.address(&format!("inbound:{}", self.app.port())),
        }
    }

    pub async fn connect(&self, place: Place) -> Connection {
        Connection::open(self.address(place)).await
    }

    /// Sends these bytes, then, when the connection is still good after the first answer, one honest last request.
    pub async fn attack(&self, place: Place, raw: impl AsRef<[u8]>) -> Outcome {
        // Its own target, so that what comes late of the one before is not taken for this one's.
        let mine = format!("/t{:05}", self.attacks.fetch_add(1, Relaxed));
        let raw = renamed(raw.as_ref(), &mine);
        self.app.forget();
        let mut client = self.connect(place).await;
        // A refusal may come before everything is sent.
        let _ = client.try_send(&raw).await;
        let mut answers = Vec::new();
        let mut asked = false;
        while let Ok(answer) = client.try_response(raw.starts_with(b"HEAD ") && answers.is_empty()).await {
            let close = answer.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
            answers.push(answer);
            if !close && !asked {
                asked = true;
                let _ = client.try_send("GET /last HTTP/1.1\r\nHost: catalog\r\nConnection: close\r\n\r\n").await;
            }
        }
        Outcome { answers, seen: self.settled(&mine).await }
    }

    /// What reached the application, once each request has ended there one way or the other.
    async fn settled(&self, mine: &str) -> Vec<Seen> {
        eventually("the application is done with what reached it", async || {
            let mut seen = self.app.requests();
            seen.retain(|seen| !seen.target.starts_with("/t0") || seen.target.starts_with(mine));
            for seen in &mut seen {
                seen.target = seen.target.replacen(mine, TARGET, 1);
            }
            seen.iter().all(|seen| seen.whole || seen.cancelled).then_some(seen)
        })
        .await
    }

    /// Since the beginning the application got nothing that a strict parser would not take, and nothing smuggled.
    pub fn assert_clean(&self) {
        for raw in self.app.raw() {
            let shown = outrigger_tests::wire::text(&raw);
            match strict(&raw) {
                Ok(targets) => assert!(targets.iter().all(|target| target != "/smuggled"), "smuggled: {shown:?}"),
                Err(odd) => panic!("{odd} reached the application: {shown:?}"),
            }
        }
    }
}

/// What attacks write for their target.
const TARGET: &str = "/target";

fn renamed(raw: &[u8], target: &str) -> Vec<u8> {
    assert_eq!(target.len(), TARGET.len());
    let mut raw = raw.to_vec();
    let line = raw.iter().position(|byte| *byte == b'\n').unwrap_or(raw.len());
    if let Some(at) = find(&raw[..line], TARGET.as_bytes()) {
        raw[at..at + TARGET.len()].copy_from_slice(target.as_bytes());
    }
    raw
}

pub struct Outcome {
    pub answers: Vec<Response>,
    pub seen: Vec<Seen>,
}

impl Outcome {
    /// Targets that the application got.
    pub fn targets(&self) -> Vec<&str> {
        self.seen.iter().map(|seen| seen.target.as_str()).collect()
    }

    pub fn status(&self) -> u16 {
        self.answers.first().map_or(0, |answer| answer.status)
    }

    /// 4xx from us or an abrupt end, and nothing whole at the application.
    pub fn assert_refused(&self, name: &str) {
        assert!(self.answers.len() <= 1, "{name}: more than one answer: {:?}", self.answers);
        if let Some(answer) = self.answers.first() {
            let cut = !answer.is_whole();
            assert!((400..500).contains(&answer.status) || cut, "{name}: {answer:?}");
            if !cut {
                assert!(!answer.reason().is_empty(), "{name}: not the sidecar's own answer: {answer:?}");
                assert!(answer.header("proxy-status").is_some(), "{name}: {answer:?}");
            }
        }
        assert!(self.seen.iter().all(|seen| !seen.whole), "{name}: served: {:?}", self.seen);
    }

    /// Refused before anything reached the application.
    pub fn assert_refused_early(&self, name: &str, status: u16) {
        self.assert_refused(name);
        assert_eq!(self.status(), status, "{name}: {:?}", self.answers);
        assert!(self.seen.is_empty(), "{name}: reached the application: {:?}", self.seen);
    }

    /// Refused, or exactly one clean request (and the honest one after it).
    pub fn assert_once_or_refused(&self, name: &str, target: &str) {
        if self.seen.iter().any(|seen| seen.whole) {
            let targets = self.targets();
            assert!(targets == [target] || targets == [target, "/last"], "{name}: {targets:?}");
            assert_eq!(self.answers.len(), targets.len(), "{name}: {:?}", self.answers);
        } else {
            self.assert_refused(name);
        }
    }
}

/// Parses what one connection carried as nobody could misread it; gives the targets. The last message may be incomplete.
fn strict(raw: &[u8]) -> Result<Vec<String>, String> {
    let mut rest = raw;
    let mut targets = Vec::new();
    while let Some(end) = find(rest, b"\r\n\r\n") {
        let head = &rest[..end];
        rest = &rest[end + 4..];
        let framing = strict_head(head)?;
        targets.push(String::from_utf8_lossy(head.split(|byte| *byte == b' ').nth(1).unwrap_or_default()).into_owned());
        let Some(framing) = framing else { continue };
        match framing {
            Framing::Length(length) if rest.len() < length => return Ok(targets),
            Framing::Length(length) => rest = &rest[length..],
            Framing::Chunked => match strict_chunks(rest)? {
                Some(after) => rest = after,
                None => return Ok(targets),
            },
        }
    }
    if rest.is_empty() { Ok(targets) } else { Err(format!("bytes after the last message: {rest:?}")) }
}

enum Framing {
    Length(usize),
    Chunked,
}

fn strict_head(head: &[u8]) -> Result<Option<Framing>, String> {
    let mut lines = head.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let bare = head.iter().enumerate().any(|(at, byte)| match byte {
        b'\n' => at == 0 || head[at - 1] != b'\r',
        b'\r' => head.get(at + 1) != Some(&b'\n'),
        byte => *byte < b' ' && *byte != b'\t' || *byte == 0x7f,
    });
    if bare {
        return Err("a control character, a bare CR or LF".to_owned());
    }
    let first = lines.next().unwrap_or_default();
    let words: Vec<&[u8]> = first.split(|byte| *byte == b' ').collect();
    let [method, target, b"HTTP/1.1"] = words[..] else { return Err(format!("request line {first:?}")) };
    if !is_token(method) || !target.starts_with(b"/") && target != b"*" || target.contains(&b'#') {
        return Err(format!("request line {first:?}"));
    }
    let (mut hosts, mut framing) = (0, None);
    for line in lines {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { return Err("no colon".to_owned()) };
        let (name, value) = (&line[..colon], String::from_utf8_lossy(line[colon + 1..].trim_ascii()).into_owned());
        if !is_token(name) {
            return Err(format!("the name {:?}", String::from_utf8_lossy(name)));
        }
        let spelled = String::from_utf8_lossy(name).to_ascii_lowercase();
        let meant = spelled.replace('_', "-");
        let new = match meant.as_str() {
            "host" => {
                hosts += 1;
                None
            }
            "content-length" => Some(Framing::Length(value.parse().map_err(|_| format!("length {value:?}"))?)),
            "transfer-encoding" if value == "chunked" => Some(Framing::Chunked),
            "transfer-encoding" => return Err(format!("coding {value:?}")),
            "http2-settings" => return Err(meant),
            "upgrade" if value.contains("h2c") => return Err(meant),
            _ => None,
        };
        if new.is_some() && spelled != meant {
            return Err(format!("a twin: {spelled}"));
        }
        if let Some(new) = new
            && framing.replace(new).is_some()
        {
            return Err("more than one framing".to_owned());
        }
    }
    if hosts == 1 { Ok(framing) } else { Err(format!("{hosts} Host fields")) }
}

fn strict_chunks(mut rest: &[u8]) -> Result<Option<&[u8]>, String> {
    loop {
        let Some(end) = find(rest, b"\r\n") else { return Ok(None) };
        let size = String::from_utf8_lossy(&rest[..end]).into_owned();
        if size.starts_with('+') {
            return Err(format!("chunk size {size:?}"));
        }
        let length = usize::from_str_radix(&size, 16).map_err(|_| format!("chunk size {size:?}"))?;
        rest = &rest[end + 2..];
        if length == 0 {
            return loop {
                let Some(end) = find(rest, b"\r\n") else { return Ok(None) };
                let line = &rest[..end];
                rest = &rest[end + 2..];
                if line.is_empty() {
                    break Ok(Some(rest));
                }
                if !line.contains(&b':') {
                    break Err(format!("trailer {line:?}"));
                }
            };
        }
        if rest.len() < length + 2 {
            return Ok(None);
        }
        if &rest[length..length + 2] != b"\r\n" {
            return Err("a chunk longer than it says".to_owned());
        }
        rest = &rest[length + 2..];
    }
}

fn is_token(bytes: &[u8]) -> bool {
    !bytes.is_empty() && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte))
}

/// Resident memory of this process, the sidecars among it.
pub fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}
