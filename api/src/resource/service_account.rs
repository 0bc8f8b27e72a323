//! `ServiceAccount` (v1). Optional: identities exist without such documents.

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ServiceAccount {}
