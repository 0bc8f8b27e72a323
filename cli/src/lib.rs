//! placeholder

pub mod validate;
