//! How much memory this process uses and may use: what is resident, and the least limit of the control groups that it is
//! in, of version 2 or 1. Read anew at each call: an orchestrator may change a limit while a process runs.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

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
    fn this_process_uses_some() {
        assert!(Memory::resident().unwrap() > 100_000);
        let _ = Memory::of_this_process().limit();
    }
}
