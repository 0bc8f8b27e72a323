//! Whether memory is short, looked at several times a second on the control thread. When it is, new connections are
//! refused before they cost anything; what is open goes on, but for streams that stand still, which the workers end. An
//! allocation that fails ends a process, and a control group at its limit is killed: this is what keeps both from
//! happening. Looking is too slow for buffers, which fill within milliseconds: they are counted (`memory::Budget`).

use std::sync::Arc;
use std::time::Duration;

use outrigger_runtime::memory::{Budget, Memory};

use crate::config::Limits;
use crate::connection::Places;
use crate::telemetry::Telemetry;

const AGAIN: Duration = Duration::from_millis(250);
/// While nothing moves nothing takes memory.
const IDLE: Duration = Duration::from_secs(10);

/// Bytes in use, and how many may be.
#[derive(Clone, Copy, Debug)]
struct Use {
    resident: u64,
    limit: u64,
}

/// The budget of all buffers, for the limit that is in force now.
pub(super) fn budget(limits: &Limits) -> Arc<Budget> {
    Budget::new(limits.memory_buffers.unwrap_or_else(|| Budget::share(Memory::of_this_process().limit())))
}

/// Refuses connections while memory is short, and keeps the budget's limit.
pub(super) async fn watch(limits: Limits, budget: Arc<Budget>, places: Arc<Places>, telemetry: Arc<Telemetry>) {
    let memory = Memory::of_this_process();
    let mut had = None;
    let mut look = || {
        let limit = memory.limit();
        if std::mem::replace(&mut had, limit) != limit && limits.memory_buffers.is_none() {
            budget.set_limit(Budget::share(limit));
        }
        Some(Use { resident: Memory::resident()?, limit: limit? })
    };
    let mut short = false;
    loop {
        let seen = look();
        budget.set_process_short(seen.is_some_and(|seen| seen.reaches(limits.memory_accept_percent)));
        let now = budget.is_used_up() || seen.is_some_and(|seen| is_short(seen, short, &limits));
        if now != short {
            tell(seen, &budget, now, &limits);
        }
        short = now;
        places.refuse(short);
        telemetry.set_memory_pressure(short);
        places.pause(AGAIN, IDLE).await;
    }
}

impl Use {
    fn reaches(self, percent: u32) -> bool {
        u128::from(self.resident) * 100 >= u128::from(self.limit) * u128::from(percent)
    }
}

/// It begins at one share of the limit and ends at a lower one, so that it does not begin again at once.
fn is_short(seen: Use, was: bool, limits: &Limits) -> bool {
    seen.reaches(if was { limits.memory_accept_percent } else { limits.memory_refuse_percent })
}

fn tell(seen: Option<Use>, budget: &Budget, short: bool, limits: &Limits) {
    let (resident, limit) = (seen.map(|seen| seen.resident >> 20), seen.map(|seen| seen.limit >> 20));
    let buffers = budget.held() >> 20;
    if short {
        tracing::warn!(
            resident_mib = resident,
            limit_mib = limit,
            buffers_mib = buffers,
            "memory is short: new connections are refused until less than {} % of the limit is in use; what is open goes \
             on, but for HTTP/2 streams that stand still. Raise the memory limit of this container or control group",
            limits.memory_accept_percent
        );
    } else {
        tracing::info!(resident_mib = resident, limit_mib = limit, "memory is no longer short");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_begins_at_a_share_and_ends_at_a_lower_one() {
        let limits = Limits { memory_refuse_percent: 90, memory_accept_percent: 80, ..Limits::default() };
        let mut short = false;
        for (resident, expected) in
            [(10, false), (89, false), (90, true), (89, true), (80, true), (79, false), (89, false), (120, true)]
        {
            short = is_short(Use { resident, limit: 100 }, short, &limits);
            assert_eq!(short, expected, "{resident}");
        }
        assert!(!is_short(Use { resident: u64::MAX / 2, limit: u64::MAX }, false, &limits), "no overflow");
    }
}
