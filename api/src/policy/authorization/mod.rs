//! Who may: AuthorizationPolicies as they are in force for one workload (`form`), and the decision (`decide`, of one rule
//! `rule`, of what a token says `token`, for people `words`). The control plane makes the form (`compile`), sends it, and the sidecar decides with it;
//! `explain` and `test` do both.
//!
//! Semantics are Istio's. A value that is absent matches no positive list and every negative one. Opaque bytes have no
//! HTTP attributes: a condition on one holds in DENY and does not in ALLOW, so that what cannot be looked at is refused.

mod affix;
mod decide;
mod evaluated;
mod form;
mod index;
mod rule;
mod token;
mod words;

#[cfg(test)]
mod index_tests;

pub use decide::{By, Denial, Verdict};
pub use form::{
    Account, Action, Attribute, Authorization, ByAccount, Condition, DefaultAction, Lists, Operation, Policy, Prepared,
    Rule, Source, Values,
};
