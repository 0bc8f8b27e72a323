//! Takes one update into the directory, or says why not. What is refused changes nothing: what was known stays.

use outrigger_api::snapshot::{Destination, Key, Workload};
use outrigger_api::wire::{self, WatchResponse, watch_response::Resource};

use super::directory::{Applied, Directory};
use super::{DiscoverySettings, Known};
use crate::tls::{Bundle, Tls};
use std::sync::Arc;

/// The answer for the control plane, and whether anything is different now.
pub(super) struct Outcome {
    pub(super) ack: wire::Ack,
    pub(super) changed: bool,
}

pub(super) fn apply(
    response: WatchResponse,
    directory: &Directory,
    tls: &Tls,
    settings: &DiscoverySettings,
) -> Outcome {
    let version = response.version;
    let applied = take(&response, directory, tls, settings).and_then(|applied| match applied {
        Applied::New => Ok(true),
        Applied::Same | Applied::Forgotten => Ok(false),
        Applied::Older(current) => Err(format!("version {version} is older than {current}, which is in use")),
    });
    let (changed, refusal) = match applied {
        Ok(changed) => (changed, String::new()),
        Err(refusal) => {
            let key = response.key.as_ref().and_then(|key| Key::try_from(key).ok());
            let key = key.map_or_else(|| "an unreadable key".to_owned(), |key| key.to_string());
            tracing::warn!(key, version, refusal, "an update was refused; what was known stays in use");
            (false, refusal)
        }
    };
    Outcome { ack: wire::Ack { key: response.key, version, refusal }, changed }
}

fn take(
    response: &WatchResponse,
    directory: &Directory,
    tls: &Tls,
    settings: &DiscoverySettings,
) -> Result<Applied, String> {
    let key = response.key.as_ref().ok_or("the update names no key")?;
    let key = Key::try_from(key).map_err(|error| error.to_string())?;
    match (key, response.resource.as_ref().ok_or("the update is of a kind that this build does not know")?) {
        (Key::Own, Resource::Workload(wire)) => {
            let workload = wire.decode().map_err(|error| error.to_string())?;
            check_is_ours(&workload, settings)?;
            take_bundle(wire.trust_bundle.as_ref(), tls, settings)?;
            Ok(directory.set_own(response.version, workload))
        }
        (key @ (Key::Service(_) | Key::Address(_)), Resource::Destination(wire)) => {
            let destination = Destination::try_from(wire).map_err(|error| error.to_string())?;
            check_is_asked_for(&key, &destination)?;
            Ok(directory.set_destination(&key, response.version, Known::Registered(Arc::new(destination))))
        }
        (key @ Key::Name(_), Resource::ServiceAddresses(wire)) => {
            let addresses = Vec::try_from(wire).map_err(|error| error.to_string())?;
            Ok(directory.set_destination(&key, response.version, Known::Named(addresses.into())))
        }
        (key @ (Key::Service(_) | Key::Address(_) | Key::Name(_)), Resource::Unregistered(_)) => {
            Ok(directory.set_destination(&key, response.version, Known::Unregistered))
        }
        (key, _) => Err(format!("the resource is not of the kind that {key} has")),
    }
}

pub(super) fn check_is_ours(workload: &Workload, settings: &DiscoverySettings) -> Result<(), String> {
    let DiscoverySettings { name, namespace, service_account, .. } = settings;
    if (&workload.name, &workload.namespace, &workload.service_account) == (name, namespace, service_account) {
        return Ok(());
    }
    Err(format!(
        "the workload is {}.{} with the service account {}, this sidecar is {name}.{namespace} with {service_account}",
        workload.name, workload.namespace, workload.service_account
    ))
}

fn check_is_asked_for(key: &Key, destination: &Destination) -> Result<(), String> {
    match key {
        Key::Service(asked) if asked.service != destination.service || asked.port != destination.port => {
            Err(format!("the destination is {}:{}, asked for was {asked}", destination.service, destination.port))
        }
        Key::Own | Key::Service(_) | Key::Address(_) | Key::Name(_) => Ok(()),
    }
}

/// A workload without a bundle leaves the one in force alone; one that cannot be used refuses the whole update.
fn take_bundle(wire: Option<&wire::TrustBundle>, tls: &Tls, settings: &DiscoverySettings) -> Result<(), String> {
    let Some(wire) = wire else { return Ok(()) };
    let bundle = Bundle::from_wire(wire, &settings.trust_domain).map_err(|error| error.to_string())?;
    let generation = bundle.generation();
    if tls.install_bundle(bundle).map_err(|error| error.to_string())? {
        tracing::info!(generation, "new trust bundle");
    }
    Ok(())
}
