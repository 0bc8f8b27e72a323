//! The control plane: issues certificates, keeps the registry and hands out what sidecars need to know.
//! Modules import only from those to their left:
//! `config <- ca registry policy <- distribute <- admin <- app`.

pub mod config;

pub mod ca;
pub mod policy;
pub mod registry;

pub mod distribute;

pub mod admin;

pub mod app;
