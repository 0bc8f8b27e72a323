//! What a change may concern, so that not everything is computed again for each lease that comes or goes.

use std::collections::BTreeSet;

use outrigger_api::snapshot::Key;

use super::Topic;
use crate::registry::InstanceId;

#[derive(Debug, Default)]
pub(super) struct Scope {
    everything: bool,
    instances: BTreeSet<InstanceId>,
    namespaces: BTreeSet<String>,
}

impl Scope {
    /// The configuration or the trust bundle changed.
    pub(super) fn everything(&mut self) {
        self.everything = true;
    }

    /// An instance came, changed or went.
    pub(super) fn instance(&mut self, id: &InstanceId) {
        self.instances.insert(id.clone());
        self.namespaces.insert(id.namespace.clone());
    }

    pub(super) fn is_empty(&self) -> bool {
        !self.everything && self.instances.is_empty()
    }

    /// A Service selects within its namespace; an address may be anybody's.
    pub(super) fn concerns(&self, topic: &Topic) -> bool {
        self.everything
            || match topic {
                Topic::Own(id) => self.instances.contains(id),
                Topic::Destination(Key::Service(port)) => self.namespaces.contains(&*port.service.namespace),
                Topic::Destination(Key::Name(service)) => self.namespaces.contains(&*service.namespace),
                Topic::Destination(Key::Address(_)) => true,
                Topic::Destination(Key::Own) => false,
            }
    }
}
