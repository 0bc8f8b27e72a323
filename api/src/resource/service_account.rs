//! `ServiceAccount` (v1). Optional: identities exist without such documents. None of its fields is acted on.

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ServiceAccount {}
