//! `outrigger-sidecar redirect`: the packet filter's rules that bring an application's connections to the sidecar, and
//! the check that they do. The texts are made by pure functions ([`nft`], [`iptables`]); `apply` is the thin part that
//! runs `nft`. Nothing here is on the walk but what `probe` has.

mod apply;
mod args;
mod check;
mod command;
mod hooks;
mod iptables;
mod netlink;
mod nft;
mod probe;
mod routes;
mod way_back;

pub use args::Args;
pub use command::{main, variables_of_run};
pub use probe::{
    PROBE_PORT, PROBE_V4, PROBE_V6, answer, complaint, exempt_target, is_exempt_target, is_inbound_probe, is_probe,
    no_way_back_answer,
};
pub use way_back::{way_back, way_back_in};

use ipnet::{Ipv4Net, Ipv6Net};

use crate::config::{INBOUND_PORT, OUTBOUND_PORT};

/// Where the rules send the application's questions about names, when asked to.
pub const RESOLVER_PORT: u16 = 15053;
/// Metrics and health: whoever asks for these means the sidecar.
const NEVER_REDIRECTED: [u16; 2] = [15020, 15021];
/// The sidecar's user, unless said otherwise.
const SIDECAR_UID: u32 = 1337;

/// What is to be redirected: all TCP but this. Lists are sorted and without doubles, CIDRs without overlap, as an nft set
/// wants them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    pub own: Own,
    pub exclude_inbound_ports: Vec<u16>,
    pub exclude_outbound_ports: Vec<u16>,
    /// Of destinations outbound, of sources inbound.
    pub exclude_v4: Vec<Ipv4Net>,
    pub exclude_v6: Vec<Ipv6Net>,
    /// Users whose connections are left alone, outbound.
    pub exclude_uids: Vec<u32>,
    /// Questions about names go to the resolver, too.
    pub dns: bool,
    /// The sidecar connects to the application with the client's address; what is answered comes back to it.
    pub keep_source_address: bool,
}

impl Default for Rules {
    fn default() -> Rules {
        Rules {
            own: Own::Uid(SIDECAR_UID),
            exclude_inbound_ports: Vec::new(),
            exclude_outbound_ports: Vec::new(),
            exclude_v4: Vec::new(),
            exclude_v6: Vec::new(),
            exclude_uids: Vec::new(),
            dns: false,
            keep_source_address: false,
        }
    }
}

/// By what the rules know the sidecar's own connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Own {
    /// The user that it runs as.
    Uid(u32),
    /// SO_MARK of its sockets: for where all run as one user.
    Mark(u32),
}

#[cfg(test)]
mod tests;
