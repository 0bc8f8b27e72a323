//! Keeps the virtual addresses in the state directory. An address is given out only after it is there: over a restart
//! it would otherwise become another service's.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use outrigger_api::resource::Resources;
use tokio::sync::watch;

use super::StartError;
use crate::config::{Configuration, State, StateError};
use crate::distribute::Publisher;
use crate::registry::VirtualAddresses;

const FILE: &str = "virtual-addresses.json";
/// How long after a failure to write it is tried again.
const RETRY: Duration = Duration::from_secs(10);

pub(super) struct Keeper {
    state: State,
    kept: VirtualAddresses,
}

impl Keeper {
    /// Reads what earlier runs gave out. What cannot be read is not passed over: new numbers would collide with those
    /// that clients still remember.
    pub(super) fn open(state: &State) -> Result<Keeper, StartError> {
        let kept = match state.read(FILE)? {
            Some(bytes) => VirtualAddresses::parse(&bytes)
                .map_err(|source| StartError::VirtualAddresses { path: state.path(FILE), source })?,
            None => VirtualAddresses::default(),
        };
        Ok(Keeper { state: state.clone(), kept })
    }

    /// Those of a configuration, written before they are told. When they cannot be written, those from before.
    pub(super) fn settle(
        &mut self,
        resources: &Resources,
        now: SystemTime,
    ) -> (VirtualAddresses, Result<(), StateError>) {
        let settled = self.kept.settled(resources, now);
        if !settled.same_on_disk(&self.kept)
            && let Err(error) = self.state.write(FILE, &settled.to_bytes())
        {
            return (self.kept.clone(), Err(error));
        }
        self.kept = settled.clone();
        (settled, Ok(()))
    }
}

/// Takes each configuration that the directory gives.
pub(super) async fn configure(
    publisher: Arc<Publisher>,
    mut configuration: watch::Receiver<Arc<Configuration>>,
    mut keeper: Keeper,
) {
    let mut failed = false;
    loop {
        let changed = configuration.changed();
        let changed = if failed { tokio::time::timeout(RETRY, changed).await.unwrap_or(Ok(())) } else { changed.await };
        if changed.is_err() {
            return;
        }
        let resources = configuration.borrow_and_update().resources.clone();
        let settling = {
            let resources = resources.clone();
            move || {
                let settled = keeper.settle(&resources, SystemTime::now());
                (keeper, settled)
            }
        };
        // The write waits for the disk. It panics as little as the rest, so there is always something to go on with.
        let Ok((back, (settled, written))) = tokio::task::spawn_blocking(settling).await else { return };
        keeper = back;
        failed = written.is_err();
        if let Err(error) = written {
            tracing::error!("services that are new have no virtual address until this is mended: {error}");
        }
        publisher.configure(resources, settled);
    }
}

#[cfg(test)]
mod tests {
    use outrigger_api::name::ServiceName;
    use outrigger_api::resource::{Metadata, Resource, Service};

    use super::*;

    fn resources(name: &str) -> Resources {
        let mut resources = Resources::default();
        let metadata = Metadata { name: name.into(), namespace: "shop".into(), ..Metadata::default() };
        let key = ("shop".to_owned(), name.to_owned());
        resources.services.insert(key, Resource { metadata, spec: Service::default() });
        resources
    }

    fn of(addresses: &VirtualAddresses, name: &str) -> Option<String> {
        addresses.of(&ServiceName::new(name, "shop").unwrap()).map(|ips| ips[0].to_string())
    }

    #[test]
    fn what_was_given_out_is_given_out_after_a_restart() {
        let root = tempfile::tempdir().unwrap();
        let state = State::open(root.path()).unwrap();
        let mut keeper = Keeper::open(&state).unwrap();
        let (first, written) = keeper.settle(&resources("a"), SystemTime::now());
        written.unwrap();
        let mut keeper = Keeper::open(&state).unwrap();
        let (second, _) = keeper.settle(&resources("b"), SystemTime::now());
        assert_eq!((of(&first, "a"), of(&second, "b")), (Some("240.240.0.1".into()), Some("240.240.0.2".into())));
    }

    #[test]
    fn what_cannot_be_kept_is_not_given_out() {
        let root = tempfile::tempdir().unwrap();
        let state = State::open(root.path()).unwrap();
        let mut keeper = Keeper::open(&state).unwrap();
        // A folder stands where the file should be: it can neither be written nor renamed over.
        std::fs::create_dir_all(root.path().join(FILE).join("x")).unwrap();
        let (settled, written) = keeper.settle(&resources("a"), SystemTime::now());
        assert!(written.is_err());
        assert_eq!(of(&settled, "a"), None);
        std::fs::remove_dir_all(root.path().join(FILE)).unwrap();
        let (settled, written) = keeper.settle(&resources("a"), SystemTime::now());
        written.unwrap();
        assert!(of(&settled, "a").is_some());
    }

    #[test]
    fn a_damaged_file_is_named() {
        let root = tempfile::tempdir().unwrap();
        let state = State::open(root.path()).unwrap();
        state.write(FILE, b"[").unwrap();
        let error = Keeper::open(&state).err().unwrap();
        assert!(error.to_string().contains(FILE), "{error}");
        assert_eq!(error.exit_code(), 2);
    }
}
