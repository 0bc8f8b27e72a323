//! What a proxy weighs when it has nothing to do, and what an idle connection adds. Connections were used once and
//! are then left alone, which is what most connections of most applications are.

use std::time::Duration;

use serde::Serialize;

use super::child::{Child, private, rss};
use super::load::{Mode, Settings};
use super::rounds::{Contender, start_load};

/// So many first, so that what is paid once is not counted as the price of a connection.
const FIRST: u16 = 16;

/// Memory of one process, in bytes.
#[derive(Clone, Debug, Serialize)]
pub struct Weight {
    pub process: &'static str,
    pub idle: u64,
    pub idle_private: u64,
    /// With this many idle connections more, and what each of them added.
    pub connections: u16,
    pub with_connections: u64,
    pub per_connection: f64,
}

/// Memory of each proxy of a contender, idle and with `connections` open.
pub fn measure(contender: &Contender, connections: u16, bench: &super::rounds::Bench) -> anyhow::Result<Vec<Weight>> {
    let idle: Vec<_> = contender.proxies.iter().map(|proxy| (rss(proxy.pid), private(proxy.pid))).collect();
    let first = hold(contender, FIRST, bench)?;
    let before: Vec<u64> = contender.proxies.iter().map(|proxy| private(proxy.pid)).collect();
    let more = hold(contender, connections, bench)?;
    let weights = contender
        .proxies
        .iter()
        .zip(idle.iter().zip(&before))
        .map(|(proxy, (idle, before))| {
            let added = private(proxy.pid).saturating_sub(*before);
            Weight {
                process: proxy.name,
                idle: idle.0,
                idle_private: idle.1,
                connections,
                with_connections: rss(proxy.pid),
                per_connection: added as f64 / f64::from(connections),
            }
        })
        .collect();
    more.end();
    first.end();
    Ok(weights)
}

fn hold(contender: &Contender, connections: u16, bench: &super::rounds::Bench) -> anyhow::Result<Child> {
    let settings =
        Settings { target: contender.address, mode: Mode::Idle, connections, requests: 0, rate: 1, seconds: 0 };
    let mut load = start_load(&settings, bench)?;
    load.say("\n")?;
    load.line(Duration::from_secs(10))?;
    Ok(load)
}
