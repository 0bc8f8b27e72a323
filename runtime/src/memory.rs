//! How much memory this process uses and may use: what is resident, and the least limit of the control groups that it is
//! in, of version 2 or 1. Read anew at each call: an orchestrator may change a limit while a process runs. And the budget
//! that buffers share: every thread counts into it what its connections hold.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use crate::process_metrics::number_behind;

/// Where the controllers are mounted, as systemd and container engines do it.
const ROOT: &str = "/sys/fs/cgroup";

/// The files that hold a limit for this process, open: they are read again and again.
#[derive(Debug)]
pub struct Memory {
    limits: Vec<File>,
}

impl Memory {
    /// Of the control groups that this process is in now.
    pub fn of_this_process() -> Memory {
        let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        Memory::of(limit_files(Path::new(ROOT), &groups))
    }

    /// Those of these that there are.
    fn of(limits: Vec<PathBuf>) -> Memory {
        Memory { limits: limits.into_iter().filter_map(|path| File::open(path).ok()).collect() }
    }

    /// The least limit, in bytes; None where there is none.
    pub fn limit(&self) -> Option<u64> {
        self.limits.iter().filter_map(|file| limit_in(&text_of(file)?)).min()
    }

    /// Resident memory of this process, in bytes.
    pub fn resident() -> Option<u64> {
        static STATUS: OnceLock<Option<File>> = OnceLock::new();
        let status = STATUS.get_or_init(|| File::open("/proc/self/status").ok()).as_ref()?;
        number_behind(&text_of(status)?, "VmRSS:").map(|kib| kib * 1024)
    }
}

/// What a file of the kernel's says now; none of these is longer.
fn text_of(file: &File) -> Option<String> {
    let mut text = vec![0; 4096];
    let length = file.read_at(&mut text, 0).ok()?;
    text.truncate(length);
    String::from_utf8(text).ok()
}

/// What all buffers of this process may hold together, and hold. Shares are percent of the limit.
#[derive(Debug)]
pub struct Budget {
    limit: AtomicI64,
    held: AtomicI64,
    /// The process has little memory left, whatever the buffers hold.
    process_short: AtomicBool,
    news: Notify,
}

impl Budget {
    /// Windows grow below this share ...
    const GROW: i64 = 40;
    /// ... and are small from this share on.
    const TIGHT: i64 = 60;
    /// From here on the streams that stand still are ended, down to the share before.
    const SHORT: i64 = 80;
    /// From here on connections that hold much are not read from, and new ones are refused.
    const FULL: i64 = 90;
    /// Buffers below this share are not what a process without memory suffers from.
    const BLAMELESS: i64 = 10;

    pub fn new(limit: u64) -> Arc<Budget> {
        let budget = Budget {
            limit: AtomicI64::new(0),
            held: AtomicI64::new(0),
            process_short: AtomicBool::new(false),
            news: Notify::new(),
        };
        budget.set_limit(limit);
        Arc::new(budget)
    }

    /// How much buffers may hold in a process that may have `limit` bytes: two fifths, because to hold a byte costs up to two,
    /// and the rest of the process needs memory as well. Without a limit, of a quarter of the machine and at most 2 GiB.
    pub fn share(limit: Option<u64>) -> u64 {
        const MOST: u64 = 2 << 30;
        const LEAST: u64 = 64 << 20;
        let machine = || fs::read_to_string("/proc/meminfo").ok().and_then(|text| number_behind(&text, "MemTotal:"));
        let limit =
            limit.unwrap_or_else(|| machine().map_or(MOST, |kib| kib.saturating_mul(1024) / 4).clamp(LEAST, MOST));
        limit / 5 * 2
    }

    pub fn set_limit(&self, limit: u64) {
        self.limit.store(i64::try_from(limit).unwrap_or(i64::MAX).max(1), Relaxed);
    }

    /// Whether the process as a whole has little memory left.
    pub fn set_process_short(&self, short: bool) {
        if !self.process_short.swap(short, Relaxed) && short && self.is_short() {
            self.news.notify_waiters();
        }
    }

    /// So many bytes more, or fewer.
    pub fn add(&self, bytes: i64) {
        let before = self.held.fetch_add(bytes, Relaxed);
        if !self.reaches(before, Budget::SHORT) && self.reaches(before.saturating_add(bytes), Budget::SHORT) {
            self.news.notify_waiters();
        }
    }

    pub fn held(&self) -> i64 {
        self.held.load(Relaxed)
    }

    /// Ends when streams have to be ended; to be asked for before [`Budget::is_short`], so that nothing is missed.
    pub fn news(&self) -> Notified<'_> {
        self.news.notified()
    }

    pub fn may_grow(&self) -> bool {
        !self.holds(Budget::GROW) && !self.process_short.load(Relaxed)
    }

    pub fn is_tight(&self) -> bool {
        self.holds(Budget::TIGHT) || self.process_short.load(Relaxed)
    }

    /// Streams that stand still have to end.
    pub fn is_short(&self) -> bool {
        self.holds(Budget::SHORT) || self.process_short.load(Relaxed) && self.holds(Budget::BLAMELESS)
    }

    /// Connections that hold much have to wait.
    pub fn is_full(&self) -> bool {
        self.holds(Budget::FULL) || self.process_short.load(Relaxed) && self.holds(Budget::BLAMELESS)
    }

    /// New connections have to be refused.
    pub fn is_used_up(&self) -> bool {
        self.holds(Budget::FULL)
    }

    /// A quarter of it: what one connection's windows may add up to at most.
    pub fn quarter(&self) -> u64 {
        self.limit.load(Relaxed).unsigned_abs() / 4
    }

    /// How much is to be given back when it is short.
    pub fn excess(&self) -> i64 {
        let keep = if self.holds(Budget::SHORT) { Budget::TIGHT } else { Budget::BLAMELESS };
        (self.held() - self.limit.load(Relaxed) / 100 * keep).max(0)
    }

    fn holds(&self, percent: i64) -> bool {
        self.reaches(self.held(), percent)
    }

    fn reaches(&self, held: i64, percent: i64) -> bool {
        i128::from(held) * 100 >= i128::from(self.limit.load(Relaxed)) * i128::from(percent)
    }
}

/// Of each group and of all above it. In a container the path may be the host's, which does not exist here; then the
/// root, which is the container's own group, is what is left.
fn limit_files(root: &Path, groups: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else { continue };
        let (root, file) = if controllers.is_empty() {
            (root.to_owned(), "memory.max")
        } else if controllers.split(',').any(|controller| controller == "memory") {
            (root.join("memory"), "memory.limit_in_bytes")
        } else {
            continue;
        };
        files.extend(Path::new(group.trim_start_matches('/')).ancestors().map(|group| root.join(group).join(file)));
    }
    files
}

/// A number; `max`, and in version 1 a number that is larger than any machine's memory, are no limit.
fn limit_in(text: &str) -> Option<u64> {
    const NO_LIMIT: u64 = 1 << 60;
    text.trim().parse().ok().filter(|limit| *limit < NO_LIMIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_a_group_and_of_all_above_it() {
        let found = |groups: &str| -> Vec<String> {
            limit_files(Path::new("/r"), groups).iter().map(|path| path.display().to_string()).collect()
        };
        assert_eq!(found("0::/a/b\n"), ["/r/a/b/memory.max", "/r/a/memory.max", "/r/memory.max"]);
        assert_eq!(found("0::/\n"), ["/r/memory.max"]);
        let version_1 = "5:cpu,cpuacct:/x\n4:memory:/pod\n1:name=systemd:/\n";
        assert_eq!(found(version_1), ["/r/memory/pod/memory.limit_in_bytes", "/r/memory/memory.limit_in_bytes"]);
        assert_eq!(found("broken\n\n7:\n"), [] as [&str; 0]);
    }

    #[test]
    fn the_least_limit_counts() {
        for (text, limit) in
            [("67108864\n", Some(67_108_864)), ("max\n", None), ("9223372036854771712\n", None), ("", None)]
        {
            assert_eq!(limit_in(text), limit, "{text}");
        }
        let root = std::env::temp_dir().join(format!("outrigger-memory-{}", std::process::id()));
        fs::create_dir_all(root.join("a/b")).unwrap();
        let files = || limit_files(&root, "0::/a/b\n");
        assert_eq!(Memory::of(files()).limit(), None);
        fs::write(root.join("a/b/memory.max"), "max\n").unwrap();
        fs::write(root.join("a/memory.max"), "3000\n").unwrap();
        fs::write(root.join("memory.max"), "4000\n").unwrap();
        let memory = Memory::of(files());
        let found = memory.limit();
        // It may be changed while the process runs.
        fs::write(root.join("a/memory.max"), "2000\n").unwrap();
        let later = memory.limit();
        fs::remove_dir_all(&root).unwrap();
        assert_eq!((found, later), (Some(3000), Some(2000)));
    }

    #[test]
    fn a_budget_is_tight_then_short_then_full() {
        let budget = Budget::new(1_000);
        let seen = |budget: &Budget| (budget.may_grow(), budget.is_tight(), budget.is_short(), budget.is_full());
        let mut news = std::pin::pin!(budget.news());
        for (held, expected) in [
            (399, (true, false, false, false)),
            (599, (false, false, false, false)),
            (600, (false, true, false, false)),
            (799, (false, true, false, false)),
            (800, (false, true, true, false)),
            (900, (false, true, true, true)),
        ] {
            budget.add(held - budget.held());
            assert_eq!(seen(&budget), expected, "{held}");
            assert_eq!(news.as_mut().enable(), held >= 800, "{held}");
        }
        assert_eq!(budget.excess(), 300);
        budget.add(-850);
        budget.set_process_short(true);
        assert_eq!(seen(&budget), (false, true, false, false), "the buffers are not to blame");
        budget.add(250);
        assert_eq!((seen(&budget), budget.excess()), ((false, true, true, true), 200));
        budget.set_limit(u64::MAX);
        assert!(!budget.is_short(), "no overflow");
    }

    #[test]
    fn buffers_have_a_share_of_the_limit() {
        assert_eq!(Budget::share(Some(100 << 20)), 40 << 20);
        let without = Budget::share(None);
        assert!((25 << 20..=900 << 20).contains(&without), "{without}");
    }

    #[test]
    fn this_process_uses_some() {
        assert!(Memory::resident().unwrap() > 100_000);
        let _ = Memory::of_this_process().limit();
    }
}
