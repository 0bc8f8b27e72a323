//! The standard `process_*` metrics, read from /proc/self each time that somebody scrapes. What cannot be read keeps
//! its last value: a scrape never fails for it.

use std::fs;

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Counter, Gauge, IntGauge, Registry};

/// Ticks per second in /proc/<pid>/stat: USER_HZ, which the kernel's ABI fixes on the platforms we run on.
const TICKS_PER_SECOND: f64 = 100.0;

/// Registers them.
pub fn register(registry: &Registry) -> Result<(), prometheus::Error> {
    registry.register(Box::new(ProcessMetrics::new()?))
}

struct ProcessMetrics {
    cpu_seconds: Counter,
    resident_bytes: IntGauge,
    virtual_bytes: IntGauge,
    open_fds: IntGauge,
    max_fds: IntGauge,
    start_time_seconds: Gauge,
    threads: IntGauge,
}

impl ProcessMetrics {
    fn new() -> Result<ProcessMetrics, prometheus::Error> {
        Ok(ProcessMetrics {
            cpu_seconds: Counter::new("process_cpu_seconds_total", "User and system CPU time spent, in seconds")?,
            resident_bytes: IntGauge::new("process_resident_memory_bytes", "Resident memory in bytes")?,
            virtual_bytes: IntGauge::new("process_virtual_memory_bytes", "Virtual memory in bytes")?,
            open_fds: IntGauge::new("process_open_fds", "Open file descriptors")?,
            max_fds: IntGauge::new("process_max_fds", "File descriptors that may be open at once")?,
            start_time_seconds: Gauge::new(
                "process_start_time_seconds",
                "Start of the process, in seconds since 1970",
            )?,
            threads: IntGauge::new("process_threads", "Threads of the process")?,
        })
    }

    fn all(&self) -> [&dyn Collector; 7] {
        [
            &self.cpu_seconds,
            &self.resident_bytes,
            &self.virtual_bytes,
            &self.open_fds,
            &self.max_fds,
            &self.start_time_seconds,
            &self.threads,
        ]
    }

    fn read(&self) {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        if let Some(stat) = Stat::parse(&text("/proc/self/stat")) {
            // A counter only grows; two scrapes at once may read in either order.
            self.cpu_seconds.inc_by((stat.cpu_seconds - self.cpu_seconds.get()).max(0.0));
            if let Some(boot) = number_behind(&text("/proc/stat"), "btime") {
                self.start_time_seconds.set(boot as f64 + stat.start_seconds_after_boot);
            }
        }
        let status = text("/proc/self/status");
        let set = |gauge: &IntGauge, value: Option<u64>| {
            if let Some(value) = value {
                gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
            }
        };
        set(&self.resident_bytes, number_behind(&status, "VmRSS:").map(|kib| kib * 1024));
        set(&self.virtual_bytes, number_behind(&status, "VmSize:").map(|kib| kib * 1024));
        set(&self.threads, number_behind(&status, "Threads:"));
        set(&self.max_fds, number_behind(&text("/proc/self/limits"), "Max open files"));
        // Less the one that reads the directory.
        set(
            &self.open_fds,
            fs::read_dir("/proc/self/fd").ok().map(|entries| (entries.count() as u64).saturating_sub(1)),
        );
    }
}

impl Collector for ProcessMetrics {
    fn desc(&self) -> Vec<&Desc> {
        self.all().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.read();
        self.all().into_iter().flat_map(Collector::collect).collect()
    }
}

/// What is used of /proc/self/stat (proc(5)).
#[derive(Debug, PartialEq)]
struct Stat {
    cpu_seconds: f64,
    start_seconds_after_boot: f64,
}

impl Stat {
    fn parse(text: &str) -> Option<Stat> {
        // The second field is the program's name in parentheses and may contain anything, spaces and ')' too.
        let fields: Vec<&str> = text.get(text.rfind(')')? + 1..)?.split_whitespace().collect();
        // Field n of the manual stands at n - 3 here.
        let ticks = |field: usize| fields.get(field - 3)?.parse::<f64>().ok();
        Some(Stat {
            cpu_seconds: (ticks(14)? + ticks(15)?) / TICKS_PER_SECOND,
            start_seconds_after_boot: ticks(22)? / TICKS_PER_SECOND,
        })
    }
}

/// The first number behind a word at the start of a line; "unlimited" is none.
pub(crate) fn number_behind(text: &str, word: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(word))?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::time::{SystemTime, UNIX_EPOCH};

    use super::*;

    #[test]
    fn stat_survives_a_program_with_a_strange_name() {
        let text = "7 (a) b (c)) S 1 7 7 0 -1 4194560 9 0 0 0 150 50 3 4 20 0 5 0 4242 1000 10 18446744073709551615";
        assert_eq!(Stat::parse(text), Some(Stat { cpu_seconds: 2.0, start_seconds_after_boot: 42.42 }));
        for text in ["", "7 (a", "7 (a) S 1 2"] {
            assert_eq!(Stat::parse(text), None, "{text}");
        }
    }

    #[test]
    fn numbers_behind_words() {
        let text = "Max open files            1024                 524288               files\nVmRSS:\t    300 kB\n";
        assert_eq!(number_behind(text, "Max open files"), Some(1024));
        assert_eq!(number_behind(text, "VmRSS:"), Some(300));
        assert_eq!(number_behind("Max open files  unlimited", "Max open files"), None);
        assert_eq!(number_behind(text, "Threads:"), None);
    }

    #[test]
    fn this_process_is_described() {
        let registry = Registry::new();
        register(&registry).unwrap();
        let text = crate::metrics::encode(&registry);
        let value = |name: &str| -> f64 {
            let line = text.lines().find(|line| line.starts_with(&format!("{name} "))).unwrap();
            line.rsplit(' ').next().unwrap().parse().unwrap()
        };
        assert!(text.contains("# TYPE process_cpu_seconds_total counter"), "{text}");
        assert!(value("process_resident_memory_bytes") > 100_000.0);
        assert!(value("process_virtual_memory_bytes") >= value("process_resident_memory_bytes"));
        assert!(value("process_threads") >= 1.0);
        assert!(value("process_open_fds") >= 3.0 && value("process_open_fds") < value("process_max_fds"));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        assert!((now - value("process_start_time_seconds")).abs() < 3_600.0);
    }
}
