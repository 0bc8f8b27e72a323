//! The client's side of resumption: one client config with its own tickets per endpoint and protocol, so that the
//! tickets of one endpoint never push out another's and each endpoint is verified for its own identity.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use outrigger_api::identity::SpiffeId;
use rustls::client::{ClientSessionStore, Resumption, Tls12ClientSessionValue, Tls13ClientSessionValue};
use rustls::{ClientConfig, NamedGroup};
use rustls_pki_types::ServerName;

use super::MeshAlpn;
use super::credential::Bundle;
use super::verifier::ExpectedServer;

/// Endpoints whose sessions are kept; beyond it the one that was used longest ago is forgotten. With
/// [`TICKETS`] of about 3 KiB each this bounds the memory at 12 MiB, and a sidecar that talks to 50 endpoints uses
/// 600 KiB.
const ENDPOINTS: usize = 1_024;
/// Unused tickets per endpoint: as many connections can be opened at once without a full handshake.
const TICKETS: usize = 4;

/// Client configs by endpoint. Lives as long as a [`super::Material`]: tickets that carry an older certificate of
/// ours, or an older bundle, die with it.
pub(super) struct EndpointConfigs {
    template: ClientConfig,
    bundle: Bundle,
    by_endpoint: Mutex<ByEndpoint>,
}

#[derive(Default)]
struct ByEndpoint {
    configs: HashMap<(SocketAddr, MeshAlpn), Entry>,
    /// Counts uses; an entry's number says when it was used last.
    uses: u64,
}

struct Entry {
    expected: SpiffeId,
    config: Arc<ClientConfig>,
    used: u64,
}

impl EndpointConfigs {
    pub(super) fn new(template: ClientConfig, bundle: Bundle) -> EndpointConfigs {
        EndpointConfigs { template, bundle, by_endpoint: Mutex::default() }
    }

    /// The config for one endpoint. An endpoint that is expected to be somebody else than before starts anew.
    pub(super) fn get(&self, endpoint: SocketAddr, alpn: MeshAlpn, expected: &SpiffeId) -> Arc<ClientConfig> {
        let mut by_endpoint = self.by_endpoint.lock().unwrap_or_else(PoisonError::into_inner);
        by_endpoint.uses += 1;
        let used = by_endpoint.uses;
        let key = (endpoint, alpn);
        if let Some(entry) = by_endpoint.configs.get_mut(&key)
            && entry.expected == *expected
        {
            entry.used = used;
            return Arc::clone(&entry.config);
        }
        if by_endpoint.configs.len() >= ENDPOINTS {
            let oldest = by_endpoint.configs.iter().min_by_key(|(_, entry)| entry.used).map(|(key, _)| *key);
            oldest.and_then(|key| by_endpoint.configs.remove(&key));
        }
        let config = self.config(alpn, expected);
        let entry = Entry { expected: expected.clone(), config: Arc::clone(&config), used };
        by_endpoint.configs.insert(key, entry);
        config
    }

    fn config(&self, alpn: MeshAlpn, expected: &SpiffeId) -> Arc<ClientConfig> {
        let mut config = self.template.clone();
        config.alpn_protocols = vec![alpn.id().to_vec()];
        config.resumption = Resumption::store(Arc::new(Tickets::default()));
        let verifier = ExpectedServer::new(self.bundle.clone(), expected.clone());
        config.dangerous().set_certificate_verifier(Arc::new(verifier));
        Arc::new(config)
    }
}

/// The tickets of one endpoint, newest last. Each is used once (RFC 8446 appendix C.4).
#[derive(Default)]
struct Tickets(Mutex<State>);

#[derive(Default)]
struct State {
    group: Option<NamedGroup>,
    tickets: VecDeque<(ServerName<'static>, Tls13ClientSessionValue)>,
}

impl Tickets {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientSessionStore for Tickets {
    fn set_kx_hint(&self, _: ServerName<'static>, group: NamedGroup) {
        self.state().group = Some(group);
    }

    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        self.state().group
    }

    fn set_tls12_session(&self, _: ServerName<'static>, _: Tls12ClientSessionValue) {}

    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        None
    }

    fn remove_tls12_session(&self, _: &ServerName<'static>) {}

    fn insert_tls13_ticket(&self, name: ServerName<'static>, ticket: Tls13ClientSessionValue) {
        let mut state = self.state();
        if state.tickets.len() == TICKETS {
            state.tickets.pop_front();
        }
        state.tickets.push_back((name, ticket));
    }

    /// A server resumes only under the same name (RFC 6066 section 3): a ticket of another one would be wasted.
    fn take_tls13_ticket(&self, name: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        let mut state = self.state();
        let newest = state.tickets.iter().rposition(|(of, _)| of == name)?;
        state.tickets.remove(newest).map(|(_, ticket)| ticket)
    }
}

impl std::fmt::Debug for Tickets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tickets")
    }
}
