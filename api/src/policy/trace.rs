//! Why something was decided: the steps of a decision, for people. The data path passes `()`, which records nothing and
//! costs nothing, so that what `explain` shows is the decision itself and not a second opinion.

use serde::Serialize;

/// One thing that was looked at.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Step {
    pub stage: &'static str,
    /// `KIND/NAMESPACE/NAME`, with `rule N` where it is about one; empty where no object is concerned.
    pub object: String,
    pub result: String,
    pub why: String,
}

impl Step {
    pub fn new(stage: &'static str, object: impl Into<String>, result: impl Into<String>, why: String) -> Step {
        Step { stage, object: object.into(), result: result.into(), why }
    }
}

pub trait Trace {
    /// Whether steps are kept: then every rule has one.
    const RECORDS: bool;

    fn step(&mut self, step: impl FnOnce() -> Step);
}

impl Trace for () {
    const RECORDS: bool = false;

    fn step(&mut self, _: impl FnOnce() -> Step) {}
}

impl Trace for Vec<Step> {
    const RECORDS: bool = true;

    fn step(&mut self, step: impl FnOnce() -> Step) {
        self.push(step());
    }
}
