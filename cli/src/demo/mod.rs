//! `outrigger demo`: a whole mesh in one process, with services that call each other through it.

pub mod services;
