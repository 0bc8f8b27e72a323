//! The state directory: private files that are written whole (temporary file, fsync, rename) and a lock that keeps
//! a second control plane out. Every module that keeps something does it through here.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use outrigger_runtime::ownership::{self, Exposed};

const LOCK: &str = "lock";
/// The trust domain of this directory, written by the control plane at its first start.
pub const TRUST_DOMAIN: &str = "trust-domain";
/// Where files lie besides the directory itself.
const FOLDERS: &[&str] = &["ca", "ca/trust"];

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("cannot {action} {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "the state directory {path} is in use by another control plane ({holder}); stop that one, or give this one \
         its own --state"
    )]
    Locked { path: PathBuf, holder: String },
    #[error(transparent)]
    Exposed(#[from] Exposed),
    #[error("there is no directory {0}; give the --state of the control plane, which makes it at its first start")]
    Absent(PathBuf),
    #[error("{0} is not the state of a control plane; give the --state with which the control plane was started")]
    Foreign(PathBuf),
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Io { action, path, source }
}

/// A state directory. Cheap to clone.
#[derive(Clone, Debug)]
pub struct State {
    root: PathBuf,
}

/// Held while a control plane runs; the lock goes with the process, however it ends.
#[derive(Debug)]
pub struct StateLock {
    _file: File,
}

impl State {
    /// Opens the directory and makes it, readable by its owner alone, when it is absent. One that another user can change
    /// is refused: that user could put keys there which would be taken for ours.
    pub fn open(root: &Path) -> Result<State, StateError> {
        make_directory(root)?;
        ownership::check(root, FOLDERS)?;
        Ok(State { root: root.to_owned() })
    }

    /// Opens the directory of a control plane that has run, and makes nothing.
    pub fn of_control_plane(root: &Path) -> Result<State, StateError> {
        if !root.is_dir() {
            return Err(StateError::Absent(root.to_owned()));
        }
        ownership::check(root, FOLDERS)?;
        let state = State { root: root.to_owned() };
        match state.read(TRUST_DOMAIN)? {
            Some(_) => Ok(state),
            None => Err(StateError::Foreign(root.to_owned())),
        }
    }

    /// Keeps other control planes out of this directory for as long as the lock lives.
    pub fn lock(&self) -> Result<StateLock, StateError> {
        let path = self.root.join(LOCK);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed("open", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                let mut holder = String::new();
                let _ = (&mut file).take(200).read_to_string(&mut holder);
                let holder = if holder.trim().is_empty() { "unknown process".to_owned() } else { holder.trim().into() };
                return Err(StateError::Locked { path: self.root.clone(), holder });
            }
            Err(fs::TryLockError::Error(source)) => return Err(failed("lock", &path)(source)),
        }
        // Who holds it is for people only, so a failure to write it is no failure to lock.
        let _ = file.set_len(0);
        let _ = writeln!(file, "process {}", std::process::id());
        Ok(StateLock { _file: file })
    }

    pub fn directory(&self) -> &Path {
        &self.root
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// None when there is no such file.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, StateError> {
        let path = self.path(name);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("read", &path)(error)),
        }
    }

    /// Replaces a file, whole or not at all. Mode 0600.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), StateError> {
        self.replace(name, bytes, 0o600)
    }

    /// The same for what anybody may read.
    pub fn write_public(&self, name: &str, bytes: &[u8]) -> Result<(), StateError> {
        self.replace(name, bytes, 0o644)
    }

    fn replace(&self, name: &str, bytes: &[u8], mode: u32) -> Result<(), StateError> {
        let path = self.path(name);
        let temporary = write_temporary(&path, bytes, mode)?;
        fs::rename(&temporary, &path).map_err(|source| {
            let _ = fs::remove_file(&temporary);
            failed("write", &path)(source)
        })?;
        sync_parent(&path)
    }

    /// Makes a file that must not exist yet; false when it does (its content stays as it was).
    pub fn create(&self, name: &str, bytes: &[u8]) -> Result<bool, StateError> {
        let path = self.path(name);
        let temporary = write_temporary(&path, bytes, 0o600)?;
        // A hard link, unlike a rename, never replaces what another process made meanwhile.
        let linked = fs::hard_link(&temporary, &path);
        let _ = fs::remove_file(&temporary);
        match linked {
            Ok(()) => sync_parent(&path).map(|()| true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(failed("create", &path)(error)),
        }
    }

    /// Renames within the directory, durably.
    pub fn rename(&self, from: &str, to: &str) -> Result<(), StateError> {
        let path = self.path(to);
        fs::rename(self.path(from), &path).map_err(failed("write", &path))?;
        sync_parent(&path)
    }

    /// Names of the files in a sub-directory, sorted; none when it does not exist.
    pub fn list(&self, directory: &str) -> Result<Vec<String>, StateError> {
        let path = self.path(directory);
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed("read", &path)(error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed("read", &path))?;
            names.extend(entry.file_name().into_string());
        }
        names.sort();
        Ok(names)
    }
}

fn write_temporary(path: &Path, bytes: &[u8], mode: u32) -> Result<PathBuf, StateError> {
    static SEQUENCE: AtomicU64 = AtomicU64::new(0);
    if let Some(parent) = path.parent() {
        make_directory(parent)?;
    }
    let sequence = SEQUENCE.fetch_add(1, Ordering::Relaxed);
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}-{sequence}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    // A file of that name can only be left from a process with our id that died.
    let _ = fs::remove_file(&temporary);
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temporary)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()));
    if let Err(source) = written {
        let _ = fs::remove_file(&temporary);
        return Err(failed("write", path)(source));
    }
    Ok(temporary)
}

fn make_directory(path: &Path) -> Result<(), StateError> {
    if path.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed("create the directory", path))
}

/// A rename survives a power cut only when the directory is on disk too.
fn sync_parent(path: &Path) -> Result<(), StateError> {
    let Some(parent) = path.parent() else { return Ok(()) };
    File::open(parent).and_then(|directory| directory.sync_all()).map_err(failed("sync", parent))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn files_are_private_and_whole() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::open(&directory.path().join("state")).unwrap();
        state.write("ca/root.key", b"one").unwrap();
        state.write("ca/root.key", b"two").unwrap();
        assert_eq!(state.read("ca/root.key").unwrap().unwrap(), b"two");
        assert_eq!(state.list("ca").unwrap(), ["root.key"], "no temporary file stays behind");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&state.path("ca/root.key")), 0o600);
        assert_eq!(mode(&state.path("ca")), 0o700);
        assert_eq!(mode(&state.path(".")), 0o700);
    }

    #[test]
    fn a_directory_that_others_can_change_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::open(directory.path()).unwrap();
        state.write("ca/root.key", b"ours").unwrap();
        for file in [".", "ca"] {
            fs::set_permissions(state.path(file), fs::Permissions::from_mode(0o777)).unwrap();
            let said = State::open(directory.path()).unwrap_err().to_string();
            assert!(said.contains("mode 0777") && said.contains("chmod go-w"), "{said}");
            fs::set_permissions(state.path(file), fs::Permissions::from_mode(0o700)).unwrap();
        }
        State::open(directory.path()).unwrap();
    }

    #[test]
    fn what_no_control_plane_has_used_is_not_its_state_and_stays_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let absent = directory.path().join("stat");
        assert!(State::of_control_plane(&absent).unwrap_err().to_string().contains("there is no directory"));
        assert!(!absent.exists());
        let said = State::of_control_plane(directory.path()).unwrap_err().to_string();
        assert!(said.contains("is not the state of a control plane"), "{said}");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        State::open(directory.path()).unwrap().write(TRUST_DOMAIN, b"outrigger.local\n").unwrap();
        State::of_control_plane(directory.path()).unwrap();
    }

    #[test]
    fn create_never_replaces() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::open(directory.path()).unwrap();
        assert!(state.create("key", b"first").unwrap());
        assert!(!state.create("key", b"second").unwrap());
        assert_eq!(state.read("key").unwrap().unwrap(), b"first");
        assert_eq!(state.read("absent").unwrap(), None);
    }

    #[test]
    fn one_control_plane_per_state_and_the_error_says_who() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::open(directory.path()).unwrap();
        let lock = state.lock().unwrap();
        let error = state.lock().unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        assert!(error.contains("--state"), "{error}");
        drop(lock);
        state.lock().unwrap();
    }

    #[test]
    fn a_failed_write_leaves_the_old_content() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::open(directory.path()).unwrap();
        state.write("a", b"old").unwrap();
        // A directory in the way of the rename's target makes it fail after the temporary file is complete.
        fs::create_dir(state.path("b")).unwrap();
        fs::write(state.path("b").join("x"), b"").unwrap();
        assert!(state.write("b", b"new").is_err());
        assert_eq!(state.list(".").unwrap(), ["a", "b"]);
    }
}
