//! The flags of `redirect`: the same for all its verbs, so that a script keeps them in one variable. `remove` and `check`
//! do not act on them.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use outrigger_runtime::settings::Mistakes;

use super::{Own, Rules, SIDECAR_UID};

/// Which connections are brought to the sidecar
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Ports of the application that peers reach without the sidecar; lists divided by commas, may be repeated
    #[arg(long, value_name = "PORT,...", value_delimiter = ',', value_parser = port)]
    pub exclude_inbound_ports: Vec<u16>,
    /// Ports of others that the application reaches without the sidecar
    #[arg(long, value_name = "PORT,...", value_delimiter = ',', value_parser = port)]
    pub exclude_outbound_ports: Vec<u16>,
    /// Networks that are left alone: as destination of what the application opens, as source of what reaches it
    #[arg(long, value_name = "CIDR,...", value_delimiter = ',', value_parser = cidr)]
    pub exclude_cidrs: Vec<IpNet>,
    /// Users whose connections are left alone
    #[arg(long, value_name = "UID,...", value_delimiter = ',')]
    pub exclude_uids: Vec<u32>,
    /// The user that the sidecar runs as, whose connections are left alone [default: 1337]
    #[arg(long, value_name = "UID")]
    pub uid: Option<u32>,
    /// Instead of --uid: the mark of the sidecar's own sockets, as in `run --mark`
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub mark: Option<u32>,
    /// Send questions about names (port 53, UDP and TCP) to the sidecar's resolver
    #[arg(long)]
    pub dns: bool,
    /// For a sidecar with `run --keep-source-address`: lead back to it what the application answers to its clients' addresses
    #[arg(long)]
    pub keep_source_address: bool,
}

impl Args {
    pub(super) fn check(self, mistakes: &mut Mistakes) -> Option<Rules> {
        let own = match (self.uid, self.mark) {
            (Some(_), Some(mark)) => {
                mistakes.add("mark", mark, "contradicts --uid: the sidecar is known by its user or by its mark");
                return None;
            }
            (uid, None) => Own::Uid(uid.unwrap_or(SIDECAR_UID)),
            (None, Some(mark)) => Own::Mark(mark),
        };
        let v4: Vec<Ipv4Net> = self
            .exclude_cidrs
            .iter()
            .filter_map(|net| if let IpNet::V4(net) = net { Some(*net) } else { None })
            .collect();
        let v6: Vec<Ipv6Net> = self
            .exclude_cidrs
            .iter()
            .filter_map(|net| if let IpNet::V6(net) = net { Some(*net) } else { None })
            .collect();
        Some(Rules {
            own,
            exclude_inbound_ports: sorted(self.exclude_inbound_ports),
            exclude_outbound_ports: sorted(self.exclude_outbound_ports),
            exclude_v4: Ipv4Net::aggregate(&v4),
            exclude_v6: Ipv6Net::aggregate(&v6),
            exclude_uids: sorted(self.exclude_uids),
            dns: self.dns,
            keep_source_address: self.keep_source_address,
        })
    }
}

/// `print` alone can write for iptables.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct PrintArgs {
    #[command(flatten)]
    pub rules: Args,
    /// Print a shell script for iptables and ip6tables instead, for machines without nftables
    #[arg(long)]
    pub iptables: bool,
}

fn sorted<T: Ord>(mut list: Vec<T>) -> Vec<T> {
    list.sort_unstable();
    list.dedup();
    list
}

fn port(text: &str) -> Result<u16, &'static str> {
    text.trim().parse().ok().filter(|port| *port != 0).ok_or("expected ports, 1 to 65535, divided by commas")
}

/// A single address is a network of its own.
fn cidr(text: &str) -> Result<IpNet, &'static str> {
    let text = text.trim();
    let address = || text.parse::<IpAddr>().map(IpNet::from);
    text.parse()
        .or_else(|_| address())
        .map_err(|_| "expected networks such as 10.0.0.0/8 or fd00::/8, divided by commas")
}
