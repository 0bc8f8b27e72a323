//! The binaries as processes. `under_test!()` is this package's own binary, which runs both; with OUTRIGGER_BIN_DIR set
//! the installed `outrigger`, `outrigger-sidecar` and `outrigger-control-plane` of that directory run instead.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::eventually::{PATIENCE, eventually, within};

/// The path of the binary under test; only a test of this package knows it.
#[macro_export]
macro_rules! under_test {
    () => {
        env!("CARGO_BIN_EXE_outrigger-under-test")
    };
}

/// Which of the programs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Program {
    Outrigger,
    Sidecar,
    ControlPlane,
}

/// A command for one of the programs, without the `OUTRIGGER_*` variables of the test's own environment.
pub fn command(under_test: &str, program: Program) -> Command {
    let mut command = match std::env::var_os("OUTRIGGER_BIN_DIR") {
        Some(directory) => {
            let name = match program {
                Program::Outrigger => "outrigger",
                Program::Sidecar => "outrigger-sidecar",
                Program::ControlPlane => "outrigger-control-plane",
            };
            Command::new(PathBuf::from(directory).join(name))
        }
        None => {
            let mut command = Command::new(under_test);
            match program {
                Program::Outrigger => {}
                Program::Sidecar => {
                    command.arg("sidecar");
                }
                Program::ControlPlane => {
                    command.arg("control-plane");
                }
            }
            command
        }
    };
    for (name, _) in std::env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"OUTRIGGER_") {
            command.env_remove(name);
        }
    }
    command
}

/// A running process. Killed when it is dropped.
pub struct Process {
    child: Child,
    stdout: Lines,
    stderr: Lines,
}

type Lines = Arc<Mutex<Vec<String>>>;

impl Process {
    pub fn spawn(mut command: Command) -> Process {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = collect(child.stdout.take().unwrap());
        let stderr = collect(child.stderr.take().unwrap());
        Process { child, stdout, stderr }
    }

    pub fn run<S: AsRef<OsStr>>(under_test: &str, program: Program, arguments: impl IntoIterator<Item = S>) -> Process {
        let mut command = command(under_test, program);
        command.args(arguments);
        Process::spawn(command)
    }

    /// Waits for `ready` on stdout. Panics with stderr when the process ends instead.
    pub async fn ready(&mut self) {
        let stdout = self.stdout.clone();
        let is_ready = || stdout.lock().unwrap().iter().any(|line| line == "ready");
        let done = within(PATIENCE, "ready on stdout", async || {
            (is_ready() || self.child.try_wait().unwrap().is_some()).then(is_ready)
        });
        if !done.await {
            panic!("ended before it was ready:\n{}", self.stderr());
        }
    }

    /// The address of a listener, by its name on stdout; waits for the line.
    pub async fn address(&self, name: &str) -> SocketAddr {
        eventually(&format!("listening {name}"), async || self.addresses().get(name).copied()).await
    }

    pub fn addresses(&self) -> HashMap<String, SocketAddr> {
        let lines = self.stdout.lock().unwrap();
        lines.iter().filter_map(|line| line.strip_prefix("listening ")?.rsplit_once(' ')).fold(
            HashMap::new(),
            |mut all, (name, address)| {
                all.insert(name.to_owned(), address.parse().unwrap());
                all
            },
        )
    }

    pub fn stdout(&self) -> String {
        self.stdout.lock().unwrap().join("\n")
    }

    pub fn stderr(&self) -> String {
        self.stderr.lock().unwrap().join("\n")
    }

    /// Waits until it has said so on stderr: a log is written by a thread of its own.
    pub async fn says(&self, text: &str) {
        eventually(&format!("it says {text:?}"), async || self.stderr().contains(text).then_some(())).await;
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal by name: `TERM`, `HUP`, `KILL` ...
    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success(), "kill -s {name}");
    }

    /// Waits for the end and for the last line; gives status, stdout and stderr.
    pub async fn finish(mut self, limit: Duration) -> (ExitStatus, String, String) {
        let status = self.wait(limit).await;
        // Each reader lets go of its lines at the end of its stream.
        within(PATIENCE, "the end of its output", async || {
            (Arc::strong_count(&self.stdout) + Arc::strong_count(&self.stderr) == 2).then_some(())
        })
        .await;
        (status, self.stdout(), self.stderr())
    }

    /// How it ended, if it did.
    pub fn try_wait(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits for the end.
    pub async fn wait(&mut self, limit: Duration) -> ExitStatus {
        within(limit, "the process ends", async || self.child.try_wait().unwrap()).await
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn collect(stream: impl std::io::Read + Send + 'static) -> Lines {
    let lines = Lines::default();
    let collected = lines.clone();
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            collected.lock().unwrap().push(line);
        }
    });
    lines
}
