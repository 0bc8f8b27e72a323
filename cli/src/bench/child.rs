//! Processes of the bench: started with their place among the processors, spoken with over stdin and stdout, read from
//! /proc, and ended by process id when their owner is dropped or dies. Nothing else is ever signalled.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};

const READY: Duration = Duration::from_secs(60);
const GONE: Duration = Duration::from_secs(10);

/// Which processor runs what; `None` leaves it to the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Layout {
    pub proxies: Option<usize>,
    pub others: Option<usize>,
}

impl Layout {
    /// The proxies on one processor, load and application on another: then the proxies of every contender have the same
    /// room, and the load does not steal from them.
    pub fn choose(pin: bool) -> Layout {
        let allowed = fs::read_to_string("/proc/self/status").unwrap_or_default();
        match allowed_processors(&allowed)[..] {
            [first, second, ..] if pin => Layout { proxies: Some(second), others: Some(first) },
            _ => Layout::default(),
        }
    }
}

/// `Cpus_allowed_list: 0-3,8` of /proc/PID/status.
fn allowed_processors(status: &str) -> Vec<usize> {
    let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap_or_default();
    let ranges = line.trim().split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(first.parse::<usize>().ok()?..=last.parse().ok()?)
    });
    ranges.flatten().collect()
}

pub struct Child {
    pub name: &'static str,
    process: std::process::Child,
    lines: Receiver<String>,
    pub listening: BTreeMap<String, SocketAddr>,
    log: PathBuf,
}

impl Child {
    /// Starts `program`; what it says on stderr goes to a file in `directory`.
    pub fn start<A: AsRef<OsStr>>(
        name: &'static str,
        program: &Path,
        arguments: impl IntoIterator<Item = A>,
        processor: Option<usize>,
        directory: &Path,
    ) -> anyhow::Result<Child> {
        let log = directory.join(format!("{name}.log"));
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(fs::File::create(&log)?);
        // The settings of whoever runs the bench are not those of its processes.
        for (variable, _) in
            std::env::vars_os().filter(|(variable, _)| variable.to_string_lossy().starts_with("OUTRIGGER_"))
        {
            command.env_remove(variable);
        }
        place(&mut command, processor);
        let mut process = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
        let stdout = process.stdout.take().ok_or_else(|| anyhow!("{name} has no stdout"))?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Child { name, process, lines, listening: BTreeMap::new(), log })
    }

    /// Notes where it listens, until it says `ready`.
    pub fn ready(mut self) -> anyhow::Result<Child> {
        let until = Instant::now() + READY;
        loop {
            let line = self.line(until.saturating_duration_since(Instant::now()))?;
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                ["ready"] => return Ok(self),
                ["listening", name, address] => {
                    self.listening.insert(name.to_owned(), address.parse()?);
                }
                _ => bail!("{} said {line:?}", self.name),
            }
        }
    }

    pub fn address(&self, listener: &str) -> anyhow::Result<SocketAddr> {
        self.listening.get(listener).copied().ok_or_else(|| anyhow!("{} has no listener {listener}", self.name))
    }

    /// The next line that it says.
    pub fn line(&mut self, patience: Duration) -> anyhow::Result<String> {
        self.lines.recv_timeout(patience).map_err(|error| {
            let what = match error {
                RecvTimeoutError::Timeout => "said nothing in time",
                RecvTimeoutError::Disconnected => "ended",
            };
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(5).collect();
            anyhow!("{} {what}; its last words, newest first:\n{}", self.name, tail.join("\n"))
        })
    }

    pub fn say(&mut self, line: &str) -> anyhow::Result<()> {
        let stdin = self.process.stdin.as_mut().ok_or_else(|| anyhow!("{} has no stdin", self.name))?;
        stdin.write_all(line.as_bytes())?;
        Ok(stdin.flush()?)
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Lets it end by itself, because its stdin does.
    pub fn end(mut self) {
        drop(self.process.stdin.take());
        self.wait();
    }

    fn wait(&mut self) -> bool {
        let until = Instant::now() + GONE;
        while Instant::now() < until {
            if !matches!(self.process.try_wait(), Ok(None)) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        false
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if matches!(self.process.try_wait(), Ok(None)) {
            // A master process takes its workers with it only when it is asked; what is asked has a moment to obey.
            terminate(&self.process);
            if !self.wait() {
                let _ = self.process.kill();
                let _ = self.process.wait();
            }
        }
    }
}

#[expect(unsafe_code, reason = "kill(2) with SIGTERM has no wrapper in std")]
fn terminate(process: &std::process::Child) {
    if let Ok(pid) = libc::pid_t::try_from(process.id()) {
        // SAFETY: a plain system call; the process was not waited for, so the id is still its own.
        unsafe { libc::kill(pid, libc::SIGTERM) };
    }
}

/// Pins what will be started, and has it ended when this process ends without a word.
#[expect(unsafe_code, reason = "sched_setaffinity(2) and prctl(2) in the child have no wrapper in std")]
fn place(command: &mut Command, processor: Option<usize>) {
    // SAFETY: between fork and exec only system calls are made, on a set that lives on the stack.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
            if let Some(processor) = processor {
                let mut set: libc::cpu_set_t = std::mem::zeroed();
                libc::CPU_SET(processor, &mut set);
                if libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
}

// --- what the kernel says of a process --------------------------------------------------------------------------

/// CPU time of a process so far, in nanoseconds, kernel and user.
pub fn cpu_nanos(pid: u32) -> u64 {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let scheduled = threads.filter_map(|thread| fs::read_to_string(thread.path().join("schedstat")).ok());
    let nanos: u64 = scheduled.filter_map(|text| text.split_whitespace().next()?.parse::<u64>().ok()).sum();
    if nanos > 0 {
        return nanos;
    }
    // A kernel without schedstat: in steps of 10 ms.
    fs::read_to_string(format!("/proc/{pid}/stat")).ok().and_then(|stat| ticks(&stat)).unwrap_or(0) * 10_000_000
}

/// utime and stime of /proc/PID/stat; the name in front of them may have spaces.
fn ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

/// Resident memory in bytes.
pub fn rss(pid: u32) -> u64 {
    memory(pid, "VmRSS:")
}

/// The part of it that is not the program's file, which all its processes share.
pub fn private(pid: u32) -> u64 {
    memory(pid, "RssAnon:")
}

fn memory(pid: u32, what: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(what)).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// The processes whose parent this is.
pub fn children(pid: u32) -> Vec<u32> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|child| {
            let stat = fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
            let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse().ok());
            parent == Some(pid)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors() {
        for (text, expected) in [
            ("Name:\tx\nCpus_allowed_list:\t0-1\n", vec![0, 1]),
            ("Cpus_allowed_list:\t3", vec![3]),
            ("Cpus_allowed_list:\t0,2-4,7", vec![0, 2, 3, 4, 7]),
            ("", vec![]),
        ] {
            assert_eq!(allowed_processors(text), expected);
        }
    }

    #[test]
    fn times_of_a_process_with_an_odd_name() {
        assert_eq!(ticks("1 (a) b) S 1 1 1 0 -1 4 1 2 3 4 100 20 0 0 20 0 1 0 5"), Some(120));
        assert_eq!(ticks(""), None);
    }

    #[test]
    fn this_process_has_used_time_and_memory() {
        assert!(cpu_nanos(std::process::id()) > 0 && rss(std::process::id()) > 1024 * 1024);
    }
}
