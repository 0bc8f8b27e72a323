//! placeholder

pub mod config_dir;
