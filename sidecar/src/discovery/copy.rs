//! The copy of what is known in `--state`, for a sidecar that starts while no control plane answers. The messages of
//! the wire, one after the other: what can be read from the network can be read from here, by the same rules.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use outrigger_api::snapshot::{Destination, Key};
use outrigger_api::wire::{self, ResourceKey, TrustBundle, WatchResponse, watch_response::Resource};
use prost::Message;

use super::DiscoverySettings;
use super::directory::{Directory, Known};
use super::update::check_is_ours;
use crate::identity::{StateError, replace_file};

const FILE: &str = "snapshot.pb";
/// Changes with the format; another one is not read.
const MAGIC: &[u8] = b"outrigger snapshot 1\n";

pub(super) fn path(state: &Path) -> PathBuf {
    state.join(FILE)
}

/// Everything that the control plane has said, as bytes.
pub(super) fn encode(directory: &Directory) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    let (own_version, destinations) = directory.versions();
    let own = directory.own().borrow().clone();
    let own = own.zip(own_version).map(|(own, version)| {
        // The bundle has a file of its own.
        (Key::Own, version, Resource::Workload(wire::Workload::encode(&own, TrustBundle::default())))
    });
    let destinations = destinations.into_iter().filter_map(|(key, version, known)| match known {
        Known::Pending | Known::Untold => None,
        Known::Unregistered => Some((key, version, Resource::Unregistered(wire::Unregistered {}))),
        Known::Registered(destination) => Some((key, version, Resource::Destination((&*destination).into()))),
        Known::Named(addresses) => Some((key, version, Resource::ServiceAddresses((&*addresses).into()))),
    });
    for (key, version, resource) in own.into_iter().chain(destinations) {
        let response = WatchResponse { key: Some(ResourceKey::from(&key)), version, resource: Some(resource) };
        bytes.extend(response.encode_length_delimited_to_vec());
    }
    bytes
}

/// Puts a copy back. What cannot be read ends it; what was read before that counts.
pub(super) fn restore(directory: &Directory, bytes: &[u8], settings: &DiscoverySettings) -> Result<usize, String> {
    let mut rest = bytes.strip_prefix(MAGIC).ok_or("it is not a snapshot of this version")?;
    let mut count = 0;
    while !rest.is_empty() {
        let response = WatchResponse::decode_length_delimited(&mut rest).map_err(|error| error.to_string())?;
        let key = response.key.as_ref().ok_or("an entry has no key")?;
        let key = Key::try_from(key).map_err(|error| error.to_string())?;
        match (key, response.resource) {
            (Key::Own, Some(Resource::Workload(wire))) => {
                let workload = wire.decode().map_err(|error| error.to_string())?;
                check_is_ours(&workload, settings)?;
                directory.set_own(response.version, workload);
            }
            (Key::Own, _) => return Err("the own workload is of another kind".to_owned()),
            (key, Some(Resource::Destination(wire))) => {
                let destination = Destination::try_from(&wire).map_err(|error| error.to_string())?;
                directory.restore(key, response.version, Known::Registered(destination.into()));
            }
            (key, Some(Resource::ServiceAddresses(wire))) => {
                let addresses = Vec::try_from(&wire).map_err(|error| error.to_string())?;
                directory.restore(key, response.version, Known::Named(addresses.into()));
            }
            (key, _) => directory.restore(key, response.version, Known::Unregistered),
        }
        count += 1;
    }
    Ok(count)
}

/// Reads the copy and puts it back. None: there is none, or it is of no use, which is told.
pub(super) fn load(directory: &Directory, state: &Path, settings: &DiscoverySettings) -> Option<usize> {
    let path = path(state);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the kept snapshot is not used");
            return None;
        }
    };
    let written = std::fs::metadata(&path).and_then(|metadata| metadata.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    match restore(directory, &bytes, settings) {
        Ok(count) => {
            directory.set_confirmed(written);
            Some(count)
        }
        Err(error) => {
            tracing::warn!(path = %path.display(), error, "the kept snapshot is not used, or not all of it");
            None
        }
    }
}

pub(super) fn save(state: &Path, bytes: &[u8]) -> Result<(), StateError> {
    replace_file(&path(state), bytes)
}
