//! What concerns several flags at once: addresses that collide, settings that need one another. Pure: the number of
//! processors is an input. Every mistake is reported with the flag and the value that has to change.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use outrigger_api::name::ServicePort;
use outrigger_runtime::settings::Mistakes;

use super::value::UnqualifiedOutbound;
use super::{Args, Config, DeclaredPort, INBOUND_PORT, Inbound, Limits, OUTBOUND_PORT, Outbound};

/// More data threads than this want to be asked for: beyond, a sidecar takes what its application needs.
const MOST_WORKERS_BY_DEFAULT: usize = 2;
const METRICS_PORT: u16 = 15020;
const HEALTH_PORT: u16 = 15021;

/// None when something required is absent, which has then been reported.
pub(super) fn check(args: Args, processors: usize, mistakes: &mut Mistakes) -> Option<Config> {
    addresses(&args, mistakes);
    proxy(&args, mistakes);
    if let Some(upstream) = args.dns_upstream.first()
        && args.dns_listen.is_none()
        && !mistakes.was_given("dns-listen")
    {
        mistakes.add(
            "dns-upstream",
            upstream,
            "nothing is forwarded without a resolver: add --dns-listen 127.0.0.1:15053",
        );
    }
    if args.token_file.is_none() && args.state.is_none() && !given(mistakes, &["token-file", "state"]) {
        mistakes.missing("token-file", "is required unless --state holds a certificate from an earlier run");
    }
    if args.drain_delay > Limits::default().drain_total {
        let longest = Limits::default().drain_total.as_secs();
        mistakes.add(
            "drain-delay",
            format_args!("{:?}", args.drain_delay),
            format_args!("is more than {longest}s, in which a drain ends"),
        );
    }
    if args.keep_source_address && !args.transparent && !mistakes.was_given("transparent") {
        mistakes.add(
            "keep-source-address",
            true,
            "needs --transparent: the rules of `redirect apply --keep-source-address` lead back what the application answers",
        );
    }
    let labels = labels(&args.label, mistakes);
    let ports = ports(&args.port, &args.inbound, mistakes);
    let (metrics_listen, health_listen) = (metrics_listen(&args), health_listen(&args));
    let namespace = args.namespace?;
    let name = args.name?;
    let outbound = args.outbound.iter().filter_map(|outbound| qualify(outbound, &namespace, mistakes)).collect();
    Some(Config {
        control_plane: args.control_plane?,
        trust_bundle: args.trust_bundle?,
        token_file: args.token_file,
        workload: args.workload.unwrap_or_else(|| name.clone()),
        name,
        namespace,
        service_account: args.service_account?,
        trust_domain: args.trust_domain,
        labels,
        workload_address: args.workload_address,
        ports,
        inbound: args.inbound,
        outbound,
        http_proxy: args.http_proxy,
        http_proxy_allow: args.http_proxy_allow,
        transparent: args.transparent,
        keep_source_address: args.keep_source_address,
        mark: args.mark,
        workers: args.workers.map_or(processors.clamp(1, MOST_WORKERS_BY_DEFAULT), usize::from),
        admin_listen: args.admin_listen,
        metrics_listen,
        health_listen,
        dns_listen: args.dns_listen,
        dns_upstream: args.dns_upstream,
        jwks_roots: args.jwks_roots,
        state: args.state,
        drain_delay: args.drain_delay,
        log: args.log,
    })
}

fn given(mistakes: &Mistakes, longs: &[&str]) -> bool {
    longs.iter().any(|long| mistakes.was_given(long))
}

fn metrics_listen(args: &Args) -> SocketAddr {
    args.metrics_listen.unwrap_or_else(|| everyone_or_loopback(args, METRICS_PORT))
}

fn health_listen(args: &Args) -> SocketAddr {
    args.health_listen.unwrap_or_else(|| everyone_or_loopback(args, HEALTH_PORT))
}

/// In a pod or container whoever scrapes and probes comes from outside.
fn everyone_or_loopback(args: &Args, port: u16) -> SocketAddr {
    let ip = if args.transparent { Ipv4Addr::UNSPECIFIED } else { Ipv4Addr::LOCALHOST };
    SocketAddr::from((ip, port))
}

/// One address that the sidecar will bind.
struct Listener {
    long: &'static str,
    address: SocketAddr,
    /// The whole value of the flag.
    spelled: String,
}

fn listeners(args: &Args) -> Vec<Listener> {
    let one = |long, address: SocketAddr| Listener { long, address, spelled: address.to_string() };
    let mut all = vec![
        one("admin-listen", args.admin_listen),
        one("metrics-listen", metrics_listen(args)),
        one("health-listen", health_listen(args)),
    ];
    if args.transparent {
        for ip in [Ipv4Addr::LOCALHOST.into(), IpAddr::from(Ipv6Addr::LOCALHOST)] {
            all.push(Listener { long: "transparent", address: (ip, OUTBOUND_PORT).into(), spelled: "true".to_owned() });
        }
        let everywhere = (Ipv4Addr::UNSPECIFIED, INBOUND_PORT).into();
        all.push(Listener { long: "transparent", address: everywhere, spelled: "true".to_owned() });
    }
    all.extend(args.dns_listen.map(|address| one("dns-listen", address)));
    all.extend(args.http_proxy.map(|address| one("http-proxy", address)));
    all.extend(args.inbound.iter().map(|inbound| Listener {
        long: "inbound",
        address: inbound.listen,
        spelled: format!("{}={}", inbound.listen, inbound.app),
    }));
    all.extend(args.outbound.iter().map(|outbound| Listener {
        long: "outbound",
        address: outbound.listen,
        spelled: format!("{}={}", outbound.listen, outbound.destination),
    }));
    all
}

fn addresses(args: &Args, mistakes: &mut Mistakes) {
    let all = listeners(args);
    for (index, listener) in all.iter().enumerate() {
        if let Some(other) = all[..index].iter().find(|other| overlap(other.address, listener.address)) {
            let reason = format!("--{} listens at {} already", other.long, other.address);
            mistakes.add(listener.long, &listener.spelled, reason);
        }
    }
    for inbound in &args.inbound {
        if let Some(own) = all.iter().find(|own| overlap(own.address, inbound.app)) {
            let spelled = format!("{}={}", inbound.listen, inbound.app);
            let reason = format!("the application's address is the sidecar's own (--{}), which would loop", own.long);
            mistakes.add("inbound", spelled, reason);
        }
    }
    if !args.admin_listen.ip().is_loopback() {
        mistakes.add("admin-listen", args.admin_listen, "admin is for this machine alone: expected a loopback address");
    }
}

/// True when both cannot be bound, or when a connection to the one reaches the other. Port 0 is a new port each time.
fn overlap(one: SocketAddr, other: SocketAddr) -> bool {
    let everywhere = |address: SocketAddr| address.ip().is_unspecified();
    one.port() == other.port() && one.port() != 0 && (one.ip() == other.ip() || everywhere(one) || everywhere(other))
}

fn proxy(args: &Args, mistakes: &mut Mistakes) {
    if let Some(listen) = args.http_proxy.filter(|listen| !listen.ip().is_loopback())
        && args.http_proxy_allow.is_empty()
        && !mistakes.was_given("http-proxy-allow")
    {
        mistakes.add(
            "http-proxy",
            listen,
            "would serve whoever reaches this address: say who may with --http-proxy-allow CIDR, or listen on loopback",
        );
    }
}

fn labels(pairs: &[(String, String)], mistakes: &mut Mistakes) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::new();
    for (key, value) in pairs {
        if let Some(before) = labels.insert(key.clone(), value.clone())
            && before != *value
        {
            mistakes.add(
                "label",
                format_args!("{key}={value}"),
                format_args!("{key} has the value {before:?} already"),
            );
        }
    }
    labels
}

/// What `--port` declares, and the ports of `--inbound` that it does not. A port of the application stands for one
/// address of it and one mesh port: Services and policies name it by its number alone.
fn ports(declared: &[DeclaredPort], inbound: &[Inbound], mistakes: &mut Mistakes) -> Vec<DeclaredPort> {
    let mut ports: BTreeMap<u16, DeclaredPort> = BTreeMap::new();
    for port in declared {
        if let Some(before) = ports.insert(port.port, *port)
            && before != *port
        {
            let protocol = |port: DeclaredPort| port.protocol.map_or("no protocol", |protocol| protocol.as_str());
            let spelled = port.protocol.map_or(port.port.to_string(), |protocol| format!("{}/{protocol}", port.port));
            let reason = format!("port {} is declared with {} already", port.port, protocol(before));
            mistakes.add("port", spelled, reason);
        }
    }
    for (index, one) in inbound.iter().enumerate() {
        if inbound[..index].iter().any(|other| other.app.port() == one.app.port()) {
            let spelled = format!("{}={}", one.listen, one.app);
            let reason = format!("another --inbound leads to the application's port {} already", one.app.port());
            mistakes.add("inbound", spelled, reason);
        }
        let port = one.app.port();
        ports.entry(port).or_insert(DeclaredPort { port, protocol: None });
    }
    ports.into_values().collect()
}

fn qualify(outbound: &UnqualifiedOutbound, namespace: &str, mistakes: &mut Mistakes) -> Option<Outbound> {
    match ServicePort::parse(&outbound.destination, namespace) {
        Ok(destination) => Some(Outbound { listen: outbound.listen, destination }),
        Err(error) => {
            mistakes.add("outbound", format_args!("{}={}", outbound.listen, outbound.destination), error);
            None
        }
    }
}

#[cfg(test)]
mod tests;
