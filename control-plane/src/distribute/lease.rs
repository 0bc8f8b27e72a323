//! `Registry.Lease`: the stream is the lease. What is registered is limited to what the instance's certificate and its
//! token's grant allow; everything that a sidecar says is checked before it gets into the registry. An address is claimed
//! by whoever connects from it, or by whoever's token grants it: the word of a sidecar alone moves nobody's traffic.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use outrigger_api::peer_text::{PeerText, cut};
use outrigger_api::wire::registry_server::Registry;
use outrigger_api::wire::{self, LeaseRequest, LeaseResponse, lease_request, protocol_from_wire};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::discovery::{client_certificate, instance_of, place};
use super::recent::Event;
use super::server::{Control, Shared};
use super::tls::{Peer, PeerCertificate};
use crate::ca::Grant;
use crate::registry::{Holder, InstanceId, LeasedPort, Registration};

/// Far more than any workload serves.
const MAX_PORTS: usize = 1_000;
const MAX_NAME: usize = 253;
/// One for each family, and a few more.
const MAX_ADDRESSES: usize = 8;

#[tonic::async_trait]
impl Registry for Shared {
    type LeaseStream = ReceiverStream<Result<LeaseResponse, Status>>;

    async fn lease(&self, request: Request<Streaming<LeaseRequest>>) -> Result<Response<Self::LeaseStream>, Status> {
        let (peer, certificate) = client_certificate(&request)?;
        let place = place(&self.0, &peer, &certificate)?;
        let (answers, stream) = mpsc::channel(4);
        let held = lease(self.0.clone(), peer, certificate, request.into_inner(), answers);
        tokio::spawn(async move {
            held.await;
            drop(place);
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

async fn lease(
    control: Arc<Control>,
    peer: Peer,
    certificate: PeerCertificate,
    mut requests: Streaming<LeaseRequest>,
    answers: mpsc::Sender<Result<LeaseResponse, Status>>,
) {
    let number = control.next_stream();
    let mut id: Option<InstanceId> = None;
    let held = hold(&control, &peer, &certificate, number, &mut id, &mut requests, &answers);
    let ended = tokio::select! {
        ended = held => ended,
        status = control.until_end(&peer) => Some(status),
    };
    if let Some(id) = id {
        control.publisher.lost(&id, number);
    }
    if let Some(status) = ended {
        let _ = answers.try_send(Err(status));
    }
}

/// Answers each message. None: the sidecar left.
async fn hold(
    control: &Control,
    peer: &Peer,
    certificate: &PeerCertificate,
    number: u64,
    registered: &mut Option<InstanceId>,
    requests: &mut Streaming<LeaseRequest>,
    answers: &mpsc::Sender<Result<LeaseResponse, Status>>,
) -> Option<Status> {
    while let Ok(Some(request)) = requests.message().await {
        let answer = match request.kind {
            Some(lease_request::Kind::Register(registration)) => {
                let id = match instance_of(certificate, &registration.instance) {
                    Ok(id) => id,
                    Err(status) => return Some(status),
                };
                // One stream holds one lease: under another name the first would be nobody's, and stay for ever.
                if let Some(before) = registered.take_if(|before| *before != id) {
                    control.publisher.withdraw(&before, number);
                }
                let answer = register(control, &id, certificate, peer, number, &registration);
                *registered = Some(id);
                answer
            }
            Some(lease_request::Kind::Withdraw(_)) => {
                if let Some(id) = registered.take() {
                    control.publisher.withdraw(&id, number);
                    if let Some(line) = control.line("lease_withdrawn") {
                        tracing::info!(instance = %id, suppressed = line.suppressed, "lease withdrawn");
                    }
                }
                LeaseResponse::default()
            }
            None => return Some(Status::invalid_argument("a message that this control plane does not know")),
        };
        if answers.send(Ok(answer)).await.is_err() {
            return None;
        }
    }
    None
}

fn register(
    control: &Control,
    id: &InstanceId,
    certificate: &PeerCertificate,
    peer: &Peer,
    number: u64,
    registration: &wire::Registration,
) -> LeaseResponse {
    let (holder, grant) = control.holder(certificate, &registration.process);
    let registered = match read(registration, peer.address.ip(), &grant, holder) {
        Ok(registration) => control.publisher.register(id, number, &registration).map_err(|error| {
            let holder = error.holder().map(|holder| format!(" (it is {holder})")).unwrap_or_default();
            (error.to_string(), holder)
        }),
        Err(refusal) => Err((refusal, String::new())),
    };
    match registered {
        Ok(services) => {
            LeaseResponse { refusal: String::new(), services: services.iter().map(ToString::to_string).collect() }
        }
        Err((refusal, holder)) => {
            control.metrics.leases_refused.inc();
            // Who has what was asked for is for the operator alone.
            let what = format!("{id}: {}{holder}", PeerText(&refusal));
            control.recent.note(Event::RegistrationRefused, what, std::time::SystemTime::now());
            if let Some(line) = control.line("registration_refused") {
                let suppressed = line.suppressed;
                tracing::warn!(instance = %id, suppressed, "registration refused: {refusal}{holder}");
            }
            LeaseResponse { refusal, services: Vec::new() }
        }
    }
}

/// Checks what a sidecar says about itself against what it may say.
fn read(message: &wire::Registration, peer: IpAddr, grant: &Grant, holder: Holder) -> Result<Registration, String> {
    for (key, value) in &message.labels {
        if grant.labels.get(key) != Some(value) {
            let label = format!("{key}={value}");
            let label = PeerText(&label);
            return Err(format!("the label {label} was not granted; make the token with `--label {label}`"));
        }
    }
    if message.other_ips.len() >= MAX_ADDRESSES {
        let count = message.other_ips.len() + 1;
        return Err(format!("{count} addresses; at most {MAX_ADDRESSES} can be registered"));
    }
    let ip = match message.ip.as_str() {
        "" => claimable(peer, peer, grant)?,
        text => address(text, peer, grant)?,
    };
    let mut other_ips = Vec::new();
    for text in &message.other_ips {
        let other = address(text, peer, grant)?;
        if other != ip && !other_ips.contains(&other) {
            other_ips.push(other);
        }
    }
    if message.ports.len() > MAX_PORTS {
        return Err(format!("{} ports; at most {MAX_PORTS} can be registered", message.ports.len()));
    }
    let mut ports: Vec<LeasedPort> = Vec::new();
    for port in &message.ports {
        let number = |value: u32| {
            u16::try_from(value).ok().filter(|port| *port != 0).ok_or_else(|| format!("{value} is not a port"))
        };
        let protocol = protocol_from_wire(port.protocol).map_err(|error| error.to_string())?;
        let port = LeasedPort { application: number(port.application_port)?, mesh: number(port.mesh_port)?, protocol };
        if ports.iter().any(|other| other.application == port.application || other.mesh == port.mesh) {
            return Err(format!("port {} (at {}) is registered twice", port.application, port.mesh));
        }
        ports.push(port);
    }
    let workload = if message.workload.is_empty() { &message.instance } else { &message.workload };
    if workload.len() > MAX_NAME || workload.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(format!("the workload's name must be at most {MAX_NAME} bytes without spaces"));
    }
    let labels = message.labels.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
    let (workload, transparent) = (workload.clone(), message.transparent);
    Ok(Registration { holder, workload, labels, ip, other_ips, ports, transparent })
}

fn address(text: &str, peer: IpAddr, grant: &Grant) -> Result<IpAddr, String> {
    let ip = text.parse::<IpAddr>().map_err(|_| format!("{:?} is not an IP address", cut(text)))?;
    claimable(ip.to_canonical(), peer, grant)
}

/// Whether a sidecar that connects from `peer` may claim an address. What Services and Workload documents have is asked
/// where these are known.
fn claimable(ip: IpAddr, peer: IpAddr, grant: &Grant) -> Result<IpAddr, String> {
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    if ip.is_unspecified() || ip.is_multicast() || link_local || ip == IpAddr::V4(Ipv4Addr::BROADCAST) {
        return Err(format!("{ip} is no address at which peers can reach this workload; give --workload-address"));
    }
    // All loopback addresses are one machine: the one on which the control plane runs, too.
    let own = ip == peer || (ip.is_loopback() && peer.is_loopback());
    if own || grant.addresses.iter().any(|network| network.contains(&ip)) {
        return Ok(ip);
    }
    Err(format!(
        "the address {ip} was not granted: this sidecar connects from {peer}; give that as --workload-address, or make the \
         token with `--address {ip}`"
    ))
}

#[cfg(test)]
mod tests {
    use outrigger_api::resource::Labels;

    use super::*;

    #[test]
    fn what_a_sidecar_says_is_checked() {
        let labels = Labels::from([("app".to_owned(), "cart".to_owned())]);
        let grant = Grant { labels, addresses: vec!["10.0.0.2/32".parse().unwrap()] };
        let port = |application_port, mesh_port| wire::RegisteredPort { application_port, mesh_port, protocol: 0 };
        let base = wire::Registration { instance: "cart-1".into(), ..Default::default() };
        let with = |change: fn(&mut wire::Registration)| {
            let mut message = base.clone();
            message.labels.insert("app".into(), "cart".into());
            message.ports = vec![port(80, 9080)];
            change(&mut message);
            read(&message, [10, 0, 0, 1].into(), &grant, Holder::default())
        };
        let good = with(|_| {}).unwrap();
        assert_eq!((good.ip, good.workload.as_str()), ([10, 0, 0, 1].into(), "cart-1"));
        assert_eq!(with(|m| m.ip = "::ffff:10.0.0.2".into()).unwrap().ip, IpAddr::from([10, 0, 0, 2]));
        assert_eq!(with(|m| m.workload = "cart".into()).unwrap().workload, "cart");
        type Change = fn(&mut wire::Registration);
        let bad: [(&str, Change); 9] = [
            ("a label with another value", |m| drop(m.labels.insert("app".into(), "pay".into()))),
            ("a label that was not granted", |m| drop(m.labels.insert("tier".into(), "x".into()))),
            ("no address", |m| m.ip = "cart.test".into()),
            ("every address", |m| m.ip = "0.0.0.0".into()),
            ("a group's address", |m| m.ip = "224.0.0.1".into()),
            ("port 0", |m| m.ports[0].mesh_port = 0),
            ("port 65536", |m| m.ports[0].application_port = 65536),
            ("an unknown protocol", |m| m.ports[0].protocol = 99),
            ("a name with a line break", |m| m.workload = "a\nb".into()),
        ];
        for (name, change) in bad {
            assert!(with(change).is_err(), "{name}");
        }
        assert_eq!(with(|m| m.other_ips = vec!["10.0.0.2".into(), "10.0.0.1".into()]).unwrap().other_ips.len(), 1);
        assert!(with(|m| m.other_ips = vec!["10.0.0.3".into()]).is_err());
        assert!(with(|m| m.other_ips = vec!["10.0.0.2".into(); MAX_ADDRESSES]).is_err());
        let mut twice = base.clone();
        twice.ports = vec![port(80, 9080), port(81, 9080)];
        assert!(read(&twice, [10, 0, 0, 1].into(), &grant, Holder::default()).is_err());
    }
    #[test]
    fn an_address_is_the_streams_own_or_granted() {
        let (pod, loopback, six) = ("10.0.0.1", "127.0.0.1", "fd00::1");
        let cases: [(&str, &str, &str, bool); 22] = [
            ("its own", pod, pod, true),
            ("another", "10.0.0.2", pod, false),
            ("another that was granted", "10.1.0.7", pod, true),
            ("beside what was granted", "10.1.1.7", pod, false),
            ("granted of the other family", "fd01::5", pod, true),
            ("its own of IPv6", six, six, true),
            ("another of IPv6", "fd00::2", six, false),
            ("loopback from loopback", "127.0.0.9", loopback, true),
            ("loopback of the other family", "::1", loopback, true),
            ("loopback from IPv6's", loopback, "::1", true),
            ("loopback from elsewhere", loopback, pod, false),
            ("elsewhere from loopback", pod, loopback, false),
            ("link-local", "169.254.169.254", pod, false),
            ("link-local from there", "169.254.1.1", "169.254.1.1", false),
            ("link-local of IPv6", "fe80::1", "fe80::1", false),
            ("unspecified", "0.0.0.0", pod, false),
            ("unspecified of IPv6", "::", six, false),
            ("a group", "224.0.0.1", pod, false),
            ("a group of IPv6", "ff02::1", six, false),
            ("broadcast", "255.255.255.255", pod, false),
            ("link-local that was granted", "169.254.7.7", pod, false),
            ("mapped", "::ffff:10.0.0.1", pod, true),
        ];
        let networks = ["10.1.0.0/24", "fd01::/16", "169.254.7.0/24"].map(|text| text.parse().unwrap());
        let grant = Grant { addresses: networks.to_vec(), ..Grant::default() };
        for (name, ip, peer, expected) in cases {
            let claimed = address(ip, peer.parse().unwrap(), &grant);
            assert_eq!(claimed.is_ok(), expected, "{name}: {claimed:?}");
        }
        let refused = address("10.0.0.2", pod.parse().unwrap(), &grant).unwrap_err();
        assert!(refused.contains("--address 10.0.0.2") && refused.contains(pod), "{refused}");
    }
}
