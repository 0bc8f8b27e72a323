//! Where the attacks happen: an application behind two sidecars, the two places where a peer may speak HTTP/2 to one
//! of them, and a bystander whose requests must go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use outrigger_sidecar::config::Limits;
use outrigger_tests::peer::H2;
use outrigger_tests::{Application, Connection, Mesh, MeshOptions, Peer, Sidecar};
use tokio::task::JoinHandle;

use crate::frames::Client;

/// A place where HTTP/2 comes in, and how many streams may run there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// The application, at the outbound listener: prior knowledge.
    Application,
    /// Another workload, at the inbound port: mutual TLS and ALPN.
    Mesh,
}

pub const PLACES: [Place; 2] = [Place::Application, Place::Mesh];

impl Place {
    pub fn streams(self) -> usize {
        match self {
            Place::Application | Place::Mesh => 1_000,
        }
    }
}

pub struct Field {
    pub app: Application,
    pub near: Sidecar,
    pub far: Sidecar,
    peer: Peer,
    _mesh: Mesh,
}

impl Field {
    pub async fn new() -> Field {
        Field::with(|_| {}).await
    }

    pub async fn with(limits: impl Fn(&mut Limits)) -> Field {
        let mesh = Mesh::start(MeshOptions::default()).await;
        let app = Application::start("catalog").await;
        mesh.service("catalog.shop", 80, app.port(), Some("http"));
        let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).limits(&limits);
        let far = far.start().await;
        let near = mesh.sidecar("cart-1").outbound("catalog:80").limits(&limits).start().await;
        let peer = Peer::issue(&mesh, "shop", "attacker", "attacker-1").await;
        Field { app, near, far, peer, _mesh: mesh }
    }

    pub async fn connect(&self, place: Place) -> Connection {
        match place {
            Place::Application => Connection::open(self.near.outbound()).await,
            Place::Mesh => self.peer.connect(self.far.inbound(), &[H2]).await.unwrap(),
        }
    }

    pub async fn client(&self, place: Place) -> Client {
        Client::open(self.connect(place).await, &[]).await
    }

    /// Requests that the application has and that nobody has given up.
    pub fn in_flight(&self) -> usize {
        self.app.count_of(|seen| !seen.cancelled && seen.target.contains("/hold"))
    }

    /// A fresh connection at this place works.
    pub async fn still_serves(&self, place: Place, after: &str) {
        let mut client = self.client(place).await;
        client.send(crate::frames::get(1, "/fine")).await;
        let heard = client.until(&format!("{place:?} serves after {after}"), |heard| heard.is_settled(1)).await;
        assert!(heard.answered_200(1), "{place:?} after {after}: {heard:?}");
    }
}

/// Asks one request after the other through both sidecars while an attack goes on.
pub struct Bystander {
    stop: Arc<AtomicBool>,
    task: JoinHandle<Vec<Duration>>,
    memory: usize,
    /// The most memory that the process had while it asked.
    most: Arc<AtomicUsize>,
}

impl Bystander {
    pub async fn start(field: &Field) -> Bystander {
        let mut connection = Connection::open(field.near.outbound()).await;
        assert_eq!(connection.ask("GET /bystander HTTP/1.1\r\nHost: a\r\n\r\n").await.status, 200);
        let (stop, most) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let task = tokio::spawn({
            let (stop, most) = (stop.clone(), most.clone());
            async move {
                let mut times = Vec::new();
                while !stop.load(Ordering::Relaxed) || times.len() < 20 {
                    let begun = Instant::now();
                    let answer = connection.ask("GET /bystander HTTP/1.1\r\nHost: a\r\n\r\n").await;
                    assert_eq!(answer.status, 200, "{}", answer.text());
                    times.push(begun.elapsed());
                    most.fetch_max(resident(), Ordering::Relaxed);
                }
                times
            }
        });
        Bystander { stop, task, memory: resident(), most }
    }

    /// The attack is over. How long each answer took, in order.
    pub async fn stop(self) -> Vec<Duration> {
        self.stop.store(true, Ordering::Relaxed);
        let mut times = self.task.await.unwrap();
        times.sort_unstable();
        times
    }

    /// The attack is over: nobody waited, and little memory was taken meanwhile.
    pub async fn was_served(self, attack: &str) {
        let most = self.most.load(Ordering::Relaxed).max(resident());
        let grown = most.saturating_sub(self.memory);
        let times = self.stop().await;
        let p99 = times[times.len() * 99 / 100];
        assert!(p99 <= Duration::from_secs(1), "{attack}: p99 {p99:?} of {}", times.len());
        assert!(grown <= 64 << 20, "{attack}: {} MiB more", grown >> 20);
    }
}

/// Bytes of memory that this process, with all sidecars in it, has now.
pub fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}
