//! Network namespaces of a test's own: a [`Network`] is a few machines, each with an address of both families on one
//! link, and a hub that is everybody's gateway. Nothing has a name on the host: a namespace lives as long as the process
//! that holds it, which ends with the test's end of a pipe, so that even a killed test leaves nothing behind. Within,
//! fixed ports and addresses are nobody else's.
//!
//! Programs run inside by [`Namespace::command`] and [`Namespace::inside`] (then `Process::spawn`), sockets of the test
//! itself come from [`Namespace::connect`] and [`Namespace::listen`].

use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use socket2::SockRef;
use tokio::net::{TcpListener, TcpSocket};

use crate::eventually::{PATIENCE, soon};
use crate::wire::Connection;

/// Which addresses the machines of a network have. Loopback has both in any case.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Families {
    Both,
    V4,
    V6,
}

/// Machines on one link. Ends with everything in it when it is dropped.
pub struct Network {
    members: Vec<Namespace>,
    hub: Namespace,
}

impl Network {
    /// Machines with these names. None where this machine cannot do it, which has then been said on stderr; panics
    /// instead when OUTRIGGER_REQUIRE contains `netns`.
    pub fn new(names: &[&'static str]) -> Option<Network> {
        Network::with(Families::Both, names)
    }

    pub fn with(families: Families, names: &[&'static str]) -> Option<Network> {
        refused(Network::build(families, names).map_err(none_here))
    }

    fn build(families: Families, names: &[&'static str]) -> Result<Network, String> {
        let hub = Namespace::hold("hub", 1)?;
        let members: Vec<Namespace> =
            (2..).zip(names).map(|(number, name)| Namespace::hold(name, number)).collect::<Result<_, _>>()?;
        // What a hub carries on is for nobody: at once unreachable is better than silence.
        let mut script = String::from(
            "echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding\n\
             ip link add link0 type bridge; ip link set link0 up\n\
             ip route add unreachable default; ip -6 route add unreachable default\n",
        );
        script += &addresses(families, &hub, "link0");
        for (index, member) in members.iter().enumerate() {
            let pid = member.holder.id();
            script += &format!(
                "ip link add member{index} type veth peer name eth0 netns {pid}; ip link set member{index} master \
                 link0; ip link set member{index} up\n"
            );
        }
        hub.try_run(&script)?;
        for member in &members {
            let mut script = String::from("ip link set eth0 up\n") + &addresses(families, member, "eth0");
            if families != Families::V6 {
                script += &format!("ip route add default via {}\n", hub.v4());
            }
            if families != Families::V4 {
                script += &format!("ip -6 route add default via {}\n", hub.v6());
            }
            member.try_run(&script)?;
        }
        Ok(Network { members, hub })
    }

    /// A machine by its name.
    pub fn at(&self, name: &str) -> &Namespace {
        self.members.iter().find(|member| member.name == name).unwrap_or_else(|| panic!("no machine {name}"))
    }

    /// The gateway. It forwards nothing; whatever is outside of the mesh may live on it, with addresses that a test
    /// adds to its `link0`.
    pub fn hub(&self) -> &Namespace {
        &self.hub
    }
}

/// No address is tentative: a listener can bind at once.
fn addresses(families: Families, of: &Namespace, device: &str) -> String {
    let mut script = String::new();
    if families != Families::V6 {
        script += &format!("ip addr add {}/24 dev {device}\n", of.v4());
    }
    if families != Families::V4 {
        script += &format!("ip -6 addr add {}/64 dev {device} nodad\n", of.v6());
    }
    script
}

/// One machine: a network namespace and, so that it can have files of its own, a mount namespace.
pub struct Namespace {
    name: &'static str,
    number: u8,
    holder: Child,
    /// Its end ends the holder.
    _pipe: ChildStdin,
    files: tempfile::TempDir,
}

impl Namespace {
    /// A machine without any link: loopback alone. None as for [`Network::new`].
    pub fn lone() -> Option<Namespace> {
        refused(Namespace::hold("lone", 1).map_err(none_here))
    }

    fn hold(name: &'static str, number: u8) -> Result<Namespace, String> {
        let files = tempfile::Builder::new().permissions(PermissionsExt::from_mode(0o755)).tempdir();
        let files = files.map_err(|error| format!("no temporary directory: {error}"))?;
        let mut holder = Command::new("unshare")
            .args(["--net", "--mount", "--", "sh", "-c", "echo up; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("unshare (package util-linux) cannot be run: {error}"))?;
        let pipe = holder.stdin.take().expect("is piped");
        let mut line = String::new();
        let read = BufReader::new(holder.stdout.take().expect("is piped")).read_line(&mut line);
        if read.is_err() || line != "up\n" {
            drop(pipe);
            let said = holder.wait_with_output().map(|output| String::from_utf8_lossy(&output.stderr).into_owned());
            return Err(said.unwrap_or_else(|error| error.to_string()).trim().to_owned());
        }
        let namespace = Namespace { name, number, holder, _pipe: pipe, files };
        // Links that are added later have no tentative addresses either.
        namespace.try_run("echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad; ip link set lo up")?;
        Ok(namespace)
    }

    pub fn name(&self) -> &str {
        self.name
    }

    /// Its address on the network's link.
    pub fn v4(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, self.number)
    }

    pub fn v6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, u16::from(self.number))
    }

    /// Both of them.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4().into(), self.v6().into()]
    }

    /// What `/etc/hosts` says here besides localhost.
    pub fn hosts(&self, entries: &[(IpAddr, &str)]) {
        let mut text = String::from("127.0.0.1 localhost\n::1 localhost\n");
        entries.iter().for_each(|(address, name)| text += &format!("{address} {name}\n"));
        self.file("/etc/hosts", &text);
    }

    /// Another text, here alone, for a file that this machine has.
    pub fn file(&self, path: &str, text: &str) {
        let own = self.files.path().join(path.trim_start_matches('/').replace('/', "-"));
        let is_new = !own.exists();
        std::fs::write(&own, text).unwrap();
        if is_new {
            self.run(&format!("mount --bind {} {path}", own.display()));
        }
    }

    /// A directory of this machine's own that every user may look into.
    pub fn directory(&self) -> &Path {
        self.files.path()
    }

    /// The same program at a path that every user can run here, for binaries that stand in somebody's home.
    pub fn for_all(&self, program: impl AsRef<Path>) -> PathBuf {
        let program = program.as_ref();
        let own = self.files.path().join("for-all");
        std::fs::create_dir_all(&own).unwrap();
        let from = program.parent().expect("a whole path");
        self.run(&format!("mount --bind {} {}", from.display(), own.display()));
        own.join(program.file_name().expect("a file"))
    }

    /// A command that runs here. Its process is the program itself, so that signals reach it.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        self.inside(&Command::new(program))
    }

    /// The same as another user, with no privilege; what it runs and reads must be open to that user.
    pub fn command_as(&self, uid: u32, program: impl AsRef<OsStr>) -> Command {
        self.inside_as(Some(uid), &Command::new(program))
    }

    /// This command, here: program, arguments and variables; anything else is set on what is returned.
    pub fn inside(&self, command: &Command) -> Command {
        self.inside_as(None, command)
    }

    pub fn inside_as(&self, uid: Option<u32>, command: &Command) -> Command {
        let mut inside = Command::new("nsenter");
        // Another user may not be let in where the test is.
        let here = if uid.is_some() { PathBuf::from("/") } else { std::env::current_dir().unwrap() };
        inside.arg(format!("--target={}", self.holder.id())).args(["--net", "--mount"]);
        inside.arg(format!("--wd={}", here.display()));
        if let Some(uid) = uid {
            inside.args([format!("--setuid={uid}"), format!("--setgid={uid}")]);
        }
        inside.arg("--").arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(name, value),
                None => inside.env_remove(name),
            };
        }
        inside
    }

    /// Runs a script of `sh` to its end; gives its stdout. Panics with stderr when it fails.
    pub fn run(&self, script: &str) -> String {
        self.try_run(script).unwrap_or_else(|said| panic!("{}: {script}\n{said}", self.name))
    }

    /// The same; an error is what stderr said.
    pub fn try_run(&self, script: &str) -> Result<String, String> {
        let mut command = self.command("sh");
        let output = command.args(["-ec", script]).stdin(Stdio::null()).output();
        let output = output.map_err(|error| format!("nsenter (package util-linux) cannot be run: {error}"))?;
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()))
        }
    }

    /// Runs `what` on a thread that is in here. Sockets and threads that it makes stay here, wherever they are used.
    pub fn enter<T: Send>(&self, what: impl FnOnce() -> T + Send) -> T {
        let file = std::fs::File::open(self.path()).unwrap();
        let inside = || {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            what()
        };
        std::thread::scope(|scope| match scope.spawn(inside).join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    }

    /// The file that stands for the network namespace, as for `ip netns attach` and `nsenter --net=FILE`.
    pub fn path(&self) -> PathBuf {
        Path::new("/proc").join(self.holder.id().to_string()).join("ns/net")
    }

    /// A socket of this machine, not yet bound or connected.
    pub fn socket(&self, family: IpAddr) -> TcpSocket {
        self.enter(|| if family.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.unwrap())
    }

    /// Connects from here, as the test's own user.
    pub async fn connect(&self, address: SocketAddr) -> Connection {
        self.try_connect(address).await.unwrap_or_else(|error| panic!("{} to {address}: {error}", self.name))
    }

    pub async fn try_connect(&self, address: SocketAddr) -> io::Result<Connection> {
        let stream = soon("connect", self.socket(address.ip()).connect(address)).await?;
        stream.set_nodelay(true)?;
        Ok(stream.into())
    }

    /// Listens here, as the test's own user; at an IPv6 address for that family alone. Where the address was in use a
    /// moment ago, a process that another test is just starting may hold the old socket until it is that program.
    pub fn listen(&self, address: SocketAddr) -> TcpListener {
        let begun = Instant::now();
        loop {
            match self.try_listen(address) {
                Ok(listener) => return listener,
                Err(error) if error.kind() == io::ErrorKind::AddrInUse && begun.elapsed() < PATIENCE => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(error) => panic!("{} listens at {address}: {error}", self.name),
            }
        }
    }

    fn try_listen(&self, address: SocketAddr) -> io::Result<TcpListener> {
        let socket = self.socket(address.ip());
        socket.set_reuseaddr(true)?;
        if address.is_ipv6() {
            SockRef::from(&socket).set_only_v6(true)?;
        }
        socket.bind(address)?;
        socket.listen(1024)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // The namespace is gone when the last process and socket in it are.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// Whether this user namespace has no other user than root, as that of `unshare -Urnm`: [`Namespace::command_as`] cannot
/// do anything there.
pub fn only_root() -> bool {
    std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| map.split_whitespace().nth(2) == Some("1"))
}

/// Whether these programs are there; if not, that is said, or fails the test where it is required.
pub fn installed(programs: &[&str]) -> bool {
    programs.iter().all(|name| refused(crate::pods::find(name)).is_some())
}

fn none_here(why: String) -> String {
    format!("no network namespace can be made here: {why}")
}

/// Says why a test does not run, or fails it where that is asked for.
pub fn refused<T>(tried: Result<T, String>) -> Option<T> {
    let why = match tried {
        Ok(done) => return Some(done),
        Err(why) => why,
    };
    let required = std::env::var("OUTRIGGER_REQUIRE").unwrap_or_default();
    if required.split(',').any(|word| word.trim() == "netns") {
        panic!("cannot run, and OUTRIGGER_REQUIRE={required}: {why}");
    }
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    // Past the test runner, which keeps to itself what a passing test prints.
    let _ = writeln!(io::stderr(), "{test} DID NOT RUN: {why}");
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Process;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn machines_reach_each_other_by_both_families_and_by_name_and_leave_nothing() {
        let Some(network) = Network::new(&["web", "catalog"]) else { return };
        let (web, catalog) = (network.at("web"), network.at("catalog"));
        for address in catalog.addresses() {
            let listener = catalog.listen((address, 80).into());
            let (connected, accepted) = tokio::join!(web.connect((address, 80).into()), listener.accept());
            let (mut stream, peer) = accepted.unwrap();
            let own: IpAddr = if address.is_ipv4() { web.v4().into() } else { web.v6().into() };
            assert_eq!(peer.ip(), own);
            stream.write_all(b"hello").await.unwrap();
            drop(stream);
            let mut heard = Vec::new();
            connected.into_tcp().read_to_end(&mut heard).await.unwrap();
            assert_eq!(heard, b"hello");
            assert!(network.hub().try_connect((address, 81).into()).await.is_err());
            // Behind the gateway is nothing, and that is known at once.
            let beyond = if address.is_ipv4() { "203.0.113.9:80" } else { "[2001:db8::9]:80" };
            let error = web.try_connect(beyond.parse().unwrap()).await.err().expect("nothing is there");
            use std::io::ErrorKind::{HostUnreachable, NetworkUnreachable};
            assert!(matches!(error.kind(), HostUnreachable | NetworkUnreachable), "{beyond}: {error}");
        }
        web.hosts(&[(catalog.v4().into(), "catalog.shop")]);
        assert!(web.run("getent hosts catalog.shop").starts_with(&catalog.v4().to_string()));
        web.hosts(&[(catalog.v6().into(), "catalog.shop")]);
        assert!(web.run("getent hosts catalog.shop").starts_with(&catalog.v6().to_string()));
        assert!(catalog.try_run("grep catalog.shop /etc/hosts").is_err(), "that is a file of one machine");
        if !only_root() {
            let mut id = web.command_as(1234, "sh");
            id.args(["-c", "echo $(id -u) $(grep ^CapEff /proc/self/status)"]);
            let said = String::from_utf8(id.output().unwrap().stdout).unwrap();
            assert!(said.starts_with("1234 ") && said.trim_end().ends_with(" 0000000000000000"), "{said}");
        }

        let mut cat = web.command("sh");
        cat.args(["-c", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done"]);
        let mut process = Process::spawn(cat);
        process.ready().await;
        process.signal("TERM");
        assert_eq!(process.wait(crate::PATIENCE).await.code(), Some(7));
        let path = web.path();
        drop(network);
        assert!(!path.exists());
    }

    #[test]
    fn one_family_alone() {
        let Some(network) = Network::with(Families::V6, &["web"]) else { return };
        assert_eq!(network.at("web").run("ip -4 -o addr show dev eth0"), "");
        let Some(network) = Network::with(Families::V4, &["web"]) else { return };
        assert!(!network.at("web").run("ip -6 -o addr show dev eth0").contains("fd77"));
    }
}
