//! Binds every listener before anything runs: those of the settings, and with `--transparent` the two that redirect rules
//! lead to. Says which address cannot be bound and why; a network namespace may lack one of the two address families.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::time::Duration;

use outrigger_api::snapshot::Key;

use super::worker::Purpose;
use crate::admin::ForOperators;
use crate::config::{Config, INBOUND_PORT, OUTBOUND_PORT};
use crate::connection::Direction;
use crate::net::{self, SocketOptions};
use crate::resolver;

/// What is bound before anything runs.
pub(super) struct Bound {
    /// Name and address, as stdout shows them.
    pub(super) listening: Vec<(String, SocketAddr)>,
    pub(super) data: Vec<DataListener>,
    pub(super) operators: ForOperators,
    /// Of the resolver; none: it was not asked for.
    pub(super) names: Vec<resolver::Listener>,
}

/// A listener of the data path, open once per worker.
pub(super) struct DataListener {
    pub(super) address: SocketAddr,
    pub(super) sockets: Vec<TcpListener>,
    pub(super) purpose: Purpose,
}

/// Nobody looks after what operators and the resolver accept, so the kernel ends what takes nothing for `user_timeout`.
pub(super) fn bind(config: &Config, options: &SocketOptions, user_timeout: Duration) -> io::Result<Bound> {
    if let Some(mark) = options.mark {
        net::check_mark(mark).map_err(|error| {
            let hint = "setting it needs CAP_NET_ADMIN (or CAP_NET_RAW); grant it, or leave out --mark and exempt the \
                        sidecar from the rules by its uid (`redirect apply --uid`)";
            io::Error::new(error.kind(), format!("--mark {mark} cannot be set on sockets: {error}; {hint}"))
        })?;
    }
    if config.keep_source_address {
        net::check_kept_source().map_err(|error| {
            let hint = "it needs CAP_NET_ADMIN in this network namespace: run the sidecar as root there with `capabilities: \
                        {add: [NET_ADMIN]}` and --mark, or give its file the capability (`setcap cap_net_admin+ep`); or leave \
                        the flag out, and the application sees this machine's own address";
            let message = format!("--keep-source-address cannot open sockets with a client's address: {error}; {hint}");
            io::Error::new(error.kind(), message)
        })?;
    }
    let operators = SocketOptions { user_timeout: Some(user_timeout), ..*options };
    let mut binding = Binding { data: *options, operators, listening: Vec::new() };
    let operators = ForOperators {
        admin: binding.single("admin", config.admin_listen)?,
        metrics: binding.everywhere("metrics", config.metrics_listen, config.transparent)?,
        health: binding.everywhere("health", config.health_listen, config.transparent)?,
    };
    let mut data = Vec::new();
    if config.transparent {
        data.extend(intercepting(&mut binding, config.workers)?);
    }
    let mut one = |name: String, address, purpose| -> io::Result<()> {
        let options = binding.data;
        let (address, sockets) = binding.open(&name, address, config.workers, &options)?;
        data.push(DataListener { address, sockets, purpose });
        Ok(())
    };
    for inbound in &config.inbound {
        let purpose = Purpose::Inbound { application: inbound.app };
        one(format!("inbound:{}", inbound.app.port()), inbound.listen, purpose)?;
    }
    for outbound in &config.outbound {
        let purpose = Purpose::Outbound { destination: Key::Service(outbound.destination.clone()) };
        one(format!("outbound:{}", outbound.destination), outbound.listen, purpose)?;
    }
    if let Some(proxy) = config.http_proxy {
        one("http-proxy".to_owned(), proxy, Purpose::Proxy { allow: config.http_proxy_allow.clone().into() })?;
    }
    let names = match config.dns_listen {
        Some(listen) => binding.names(listen, config.transparent)?,
        None => Vec::new(),
    };
    Ok(Bound { listening: binding.listening, data, operators, names })
}

/// Where redirect rules lead. What the application sends is redirected in OUTPUT and arrives on loopback, whatever it
/// was sent to; what others send keeps the interface that it came by.
fn intercepting(binding: &mut Binding, workers: usize) -> io::Result<Vec<DataListener>> {
    let loopback = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    let everywhere = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
    let directions = [
        ("outbound", loopback, OUTBOUND_PORT, Direction::Outbound),
        ("inbound", everywhere, INBOUND_PORT, Direction::Inbound),
    ];
    let options = binding.data;
    let mut all = Vec::new();
    for (name, addresses, port, direction) in directions {
        for (address, sockets) in binding.present(name, addresses, port, workers, &options)? {
            all.push(DataListener { address, sockets, purpose: Purpose::Redirected(direction) });
        }
    }
    Ok(all)
}

struct Binding {
    data: SocketOptions,
    operators: SocketOptions,
    listening: Vec<(String, SocketAddr)>,
}

impl Binding {
    fn open(
        &mut self,
        name: &str,
        address: SocketAddr,
        count: usize,
        options: &SocketOptions,
    ) -> io::Result<(SocketAddr, Vec<TcpListener>)> {
        if net::is_taken(address) {
            let message =
                format!("cannot listen on {address} ({name}): the port is in use; end what holds it or choose another");
            return Err(io::Error::new(io::ErrorKind::AddrInUse, message));
        }
        let first = net::listen(address, options)?;
        let bound = first.local_addr()?;
        let mut all = vec![first];
        for _ in 1..count {
            all.push(net::listen(bound, options)?);
        }
        self.listening.push((name.to_owned(), bound));
        Ok((bound, all))
    }

    fn single(&mut self, name: &str, address: SocketAddr) -> io::Result<Vec<TcpListener>> {
        let options = self.operators;
        Ok(self.open(name, address, 1, &options)?.1)
    }

    /// `both`: an address 0.0.0.0 means every address of either family.
    fn everywhere(&mut self, name: &str, address: SocketAddr, both: bool) -> io::Result<Vec<TcpListener>> {
        if !(both && address.ip() == Ipv4Addr::UNSPECIFIED) {
            return self.single(name, address);
        }
        let families = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        let options = self.operators;
        Ok(self
            .present(name, families, address.port(), 1, &options)?
            .into_iter()
            .flat_map(|(_, sockets)| sockets)
            .collect())
    }

    /// The resolver's. `both`: with redirect rules a question comes to loopback of the family of whom it was for.
    fn names(&mut self, address: SocketAddr, both: bool) -> io::Result<Vec<resolver::Listener>> {
        let other: Option<IpAddr> = match address.ip() {
            _ if !both => None,
            IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Some(Ipv6Addr::UNSPECIFIED.into()),
            IpAddr::V4(ip) if ip.is_loopback() => Some(Ipv6Addr::LOCALHOST.into()),
            IpAddr::V6(Ipv6Addr::LOCALHOST) => Some(Ipv4Addr::LOCALHOST.into()),
            IpAddr::V4(_) | IpAddr::V6(_) => None,
        };
        let first = self.both_transports(address)?;
        let port = first.tcp.local_addr()?.port();
        let mut all = vec![first];
        if let Some(other) = other {
            match self.both_transports(SocketAddr::new(other, port)) {
                Ok(listener) => all.push(listener),
                Err(error) if net::is_absent(&error) => {
                    tracing::debug!(ip = %other, "this network namespace has no such address; no resolver listens there");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }

    /// UDP and TCP at one port.
    fn both_transports(&mut self, address: SocketAddr) -> io::Result<resolver::Listener> {
        let mut tries = if address.port() == 0 { 8 } else { 1 };
        loop {
            let options = self.operators;
            let (bound, tcp) = self.open("dns", address, 1, &options)?;
            tries -= 1;
            match (net::bind_udp(bound), tcp.into_iter().next()) {
                (Ok(udp), Some(tcp)) => return Ok(resolver::Listener { udp, tcp }),
                // The port that TCP got is somebody's for UDP; another one will do.
                (Err(error), _) if tries > 0 && error.kind() == io::ErrorKind::AddrInUse => {
                    self.listening.pop();
                }
                (Err(error), _) if error.kind() == io::ErrorKind::AddrInUse => {
                    let message = format!(
                        "cannot listen on {bound} (dns, UDP): the port is in use; end what holds it or choose another"
                    );
                    return Err(io::Error::new(error.kind(), message));
                }
                (Err(error), _) => {
                    return Err(io::Error::new(error.kind(), format!("cannot listen on {bound} (dns, UDP): {error}")));
                }
                (Ok(_), None) => return Err(io::ErrorKind::AddrNotAvailable.into()),
            }
        }
    }

    /// Opens those of the addresses that this network namespace has, all at one port.
    fn present(
        &mut self,
        name: &str,
        addresses: [IpAddr; 2],
        port: u16,
        count: usize,
        options: &SocketOptions,
    ) -> io::Result<Vec<(SocketAddr, Vec<TcpListener>)>> {
        let mut all: Vec<(SocketAddr, Vec<TcpListener>)> = Vec::new();
        for ip in addresses {
            let port = all.first().map_or(port, |(first, _)| first.port());
            match self.open(name, SocketAddr::new(ip, port), count, options) {
                Ok(opened) => all.push(opened),
                Err(error) if net::is_absent(&error) => {
                    tracing::debug!(%ip, name, "this network namespace has no such address; nothing listens there");
                }
                Err(error) => return Err(error),
            }
        }
        if all.is_empty() {
            let [one, other] = addresses;
            let message = format!(
                "cannot listen on port {port} ({name}): this network namespace has neither {one} nor {other}; is its \
                 loopback interface up (`ip link set lo up`)?"
            );
            return Err(io::Error::new(io::ErrorKind::AddrNotAvailable, message));
        }
        Ok(all)
    }
}
