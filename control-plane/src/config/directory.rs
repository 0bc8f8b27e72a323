//! The `--config` directory: read when something in it changes (notify), every second in case the notice was lost,
//! and at once on [`Directory::reload`]. A file that does not parse leaves its own last good text in force, also over a
//! restart; the other files take effect. Of a file that never was good, what it may protect is in force at its strictest.
//! Subscribers get whole, valid configurations and never half of one.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::Watcher;
use outrigger_api::resource::{
    MAX_FILE_BYTES, OutboundTraffic, Parsed, Problem, Resources, SourceFile, Strictest, strictest,
};
use outrigger_runtime::config_dir::{self, Files};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio::time::MissedTickBehavior;

use super::state::State;

/// How often the directory is read when nobody says that it changed.
const SCAN: Duration = Duration::from_secs(1);
/// An editor writes a file in several steps: wait for the burst to end.
const SETTLE: Duration = Duration::from_millis(20);
/// What is in force, in STATE.
const LAST_GOOD: &str = "last-good-config.json";

/// The parser: one rule for the control plane and for `outrigger validate`.
pub type Parse = fn(&[SourceFile]) -> Parsed;

/// What is in force, and what is wrong with the files as they are now.
#[derive(Clone, Debug, Default)]
pub struct Configuration {
    pub resources: Arc<Resources>,
    pub errors: Vec<Problem>,
    pub warnings: Vec<Problem>,
    /// Files of which something is in force, and objects in them.
    pub files: usize,
    pub objects: usize,
}

impl Configuration {
    fn log(&self) {
        for error in &self.errors {
            tracing::error!("{error}");
        }
        for warning in &self.warnings {
            tracing::warn!("{warning}");
        }
        let (files, objects) = (self.files, self.objects);
        let (errors, warnings) = (self.errors.len(), self.warnings.len());
        if errors == 0 {
            tracing::info!(files, objects, errors, warnings, "the configuration was read and is in force");
        } else {
            tracing::warn!(
                files,
                objects,
                errors,
                warnings,
                "the configuration was read; of files with errors the last good text stays in force"
            );
        }
    }
}

/// A watched directory. Dropping it ends the watch.
pub struct Directory {
    current: watch::Receiver<Arc<Configuration>>,
    reload: Arc<Notify>,
    task: tokio::task::JoinHandle<()>,
}

impl Directory {
    /// Reads the directory once, so that the first configuration is there at once, and goes on watching. The last good
    /// texts are kept in `state`.
    pub fn watch(path: &Path, parse: Parse, state: &State) -> std::io::Result<Directory> {
        // The first read fails loudly: a directory that does not exist is a mistake in the command line.
        std::fs::read_dir(path)?;
        let mut reader = Reader::new(path, parse, Some(state.clone()));
        let first = reader.read().unwrap_or_default();
        first.log();
        let (sender, current) = watch::channel(Arc::new(first));
        let reload = Arc::new(Notify::new());
        let task = tokio::spawn(follow(reader, sender, reload.clone()));
        Ok(Directory { current, reload, task })
    }

    pub fn subscribe(&self) -> watch::Receiver<Arc<Configuration>> {
        self.current.clone()
    }

    /// Reads now (SIGHUP).
    pub fn reload(&self) -> Arc<Notify> {
        self.reload.clone()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn follow(mut reader: Reader, sender: watch::Sender<Arc<Configuration>>, reload: Arc<Notify>) {
    let changed = Arc::new(Notify::new());
    let notice = changed.clone();
    // Without inotify (its limits are per user) the scan alone still sees every change within a second.
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        if event.is_ok_and(|event| !event.kind.is_access()) {
            notice.notify_one();
        }
    });
    let _watcher = watcher.and_then(|mut watcher| {
        watcher.watch(&reader.path, notify::RecursiveMode::NonRecursive)?;
        Ok(watcher)
    });
    let mut scan = tokio::time::interval(SCAN);
    scan.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = scan.tick() => {}
            () = changed.notified() => tokio::time::sleep(SETTLE).await,
            () = reload.notified() => reader.seen = None,
        }
        let read = tokio::task::spawn_blocking(move || {
            let configuration = reader.read();
            (reader, configuration)
        });
        let Ok((returned, configuration)) = read.await else { return };
        reader = returned;
        if let Some(configuration) = configuration {
            configuration.log();
            let _ = sender.send(Arc::new(configuration));
        }
    }
}

/// What was in force when it was written, by the names of the files within the directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct LastGood {
    files: BTreeMap<String, String>,
    /// Files of which nothing could be read from the very first, and which count as the strictest.
    #[serde(default)]
    unread: BTreeSet<String>,
}

/// Reads and parses; knows the last good text of each file.
struct Reader {
    path: PathBuf,
    parse: Parse,
    /// None: nothing is kept over a restart.
    state: Option<State>,
    good: BTreeMap<String, String>,
    /// What is on disk. None: this state directory has never seen a configuration.
    kept: Option<LastGood>,
    /// By their whole names.
    unread: BTreeSet<String>,
    /// Hash of what was read last; None: parse whatever is there.
    seen: Option<u64>,
}

impl Reader {
    fn new(path: &Path, parse: Parse, state: Option<State>) -> Reader {
        let kept = state.as_ref().and_then(last_good);
        let whole = |name: &String| path.join(name).display().to_string();
        let LastGood { files, unread } = kept.clone().unwrap_or_default();
        let good = files.iter().map(|(name, text)| (whole(name), text.clone())).collect();
        let unread = unread.iter().map(whole).collect();
        Reader { path: path.to_owned(), parse, state, good, kept, unread, seen: None }
    }

    /// None when nothing changed since the last read.
    fn read(&mut self) -> Option<Configuration> {
        let Files { files, unreadable } = config_dir::read(&self.path).unwrap_or_else(|error| {
            let file = self.path.display().to_string();
            // The directory as a whole is out of reach: what was good stays.
            let problem = Problem { file, line: 1, column: 1, message: format!("cannot read: {error}") };
            Files { files: sources(&self.good), unreadable: vec![problem] }
        });
        let mut hasher = DefaultHasher::new();
        files.iter().for_each(|file| (&file.name, &file.text).hash(&mut hasher));
        unreadable.iter().for_each(|problem| problem.to_string().hash(&mut hasher));
        let hash = hasher.finish();
        if self.seen.replace(hash) == Some(hash) {
            return None;
        }
        let (mut parsed, good) = parse_with_last_good(self.parse, files.clone(), &unreadable, &self.good);
        self.good = good;
        let mut errors = unreadable.clone();
        errors.append(&mut parsed.errors);
        for strict in self.strictest(&files, &unreadable, &errors) {
            errors.extend(put_into_force(strict, &mut parsed.resources));
        }
        self.keep();
        Some(Configuration {
            resources: Arc::new(parsed.resources),
            errors,
            warnings: parsed.warnings,
            files: self.good.len(),
            objects: parsed.objects,
        })
    }

    /// What files that are not in force, not even with an older text, may protect.
    fn strictest(&mut self, files: &[SourceFile], unreadable: &[Problem], errors: &[Problem]) -> Vec<Strictest> {
        let out = |name: &String| !self.good.contains_key(name);
        let broken = files.iter().filter(|file| out(&file.name) && errors.iter().any(|error| error.file == file.name));
        let mut found: Vec<Strictest> = broken.clone().map(strictest).collect();
        // Whatever stands in a file that was never read may stand in it for safety. Where a configuration was in force
        // before, it stays as it was.
        let directory = self.path.display().to_string();
        let unread = unreadable.iter().map(|problem| &problem.file).filter(|file| **file != directory && out(file));
        let cut = broken.filter(|file| file.text.len() > MAX_FILE_BYTES).map(|file| &file.name);
        let unread: BTreeSet<String> = unread.chain(cut).cloned().collect();
        let counts = |file: &&String| self.kept.is_none() || self.unread.contains(*file);
        let counting: BTreeSet<String> = unread.iter().filter(counts).cloned().collect();
        found.extend(counting.iter().map(|file| outrigger_api::resource::unreadable(file)));
        self.unread = counting;
        found
    }

    /// Writes what is in force to STATE when it is something else than what stands there.
    fn keep(&mut self) {
        let Some(state) = &self.state else { return };
        let within = |name: &String| {
            let path = Path::new(name);
            path.strip_prefix(&self.path).unwrap_or(path).display().to_string()
        };
        let files = self.good.iter().map(|(name, text)| (within(name), text.clone())).collect();
        let now = LastGood { files, unread: self.unread.iter().map(within).collect() };
        if self.kept.as_ref() == Some(&now) {
            return;
        }
        let written = serde_json::to_vec(&now)
            .map_err(|error| error.to_string())
            .and_then(|bytes| state.write(LAST_GOOD, &bytes).map_err(|error| error.to_string()));
        match written {
            Ok(()) => self.kept = Some(now),
            Err(error) => tracing::error!("the configuration in force would not survive a restart now: {error}"),
        }
    }
}

/// None when nothing was ever kept. Damage is told: with a file that is broken as well, its strictest reading counts.
fn last_good(state: &State) -> Option<LastGood> {
    let bytes = match state.read(LAST_GOOD) {
        Ok(bytes) => bytes?,
        Err(error) => {
            tracing::error!("the last good configuration is not known: {error}");
            return None;
        }
    };
    serde_json::from_slice(&bytes)
        .inspect_err(|error| {
            tracing::error!("the last good configuration is not known: {LAST_GOOD} is damaged ({error})")
        })
        .ok()
}

/// Adds to what is in force; says what people should know of it.
fn put_into_force(strict: Strictest, resources: &mut Resources) -> Vec<Problem> {
    let Strictest { policies, authorization, authentication, deny_by_default, registry_only, notes } = strict;
    for policy in authorization {
        let mut key = (policy.metadata.namespace.clone(), policy.metadata.name.clone());
        if resources.authorization_policies.get(&key).is_some_and(|other| other.spec != policy.spec) {
            // Two of one name: both count, and a DENY of either wins.
            key.1.push('~');
        }
        resources.authorization_policies.insert(key, policy);
    }
    for policy in authentication {
        let mut key = (policy.metadata.namespace.clone(), policy.metadata.name.clone());
        if resources.request_authentications.get(&key).is_some_and(|other| other.spec != policy.spec) {
            // Two of one name: both count, and what either asks for is asked for.
            key.1.push('~');
        }
        resources.request_authentications.insert(key, policy);
    }
    resources.mesh.deny_by_default |= deny_by_default;
    for policy in policies {
        let mut key = (policy.metadata.namespace.clone(), policy.metadata.name.clone());
        if resources.peer_authentications.get(&key).is_some_and(|other| other.spec != policy.spec) {
            // Two of one name: both count, which makes the stricter one win.
            key.1.push('~');
        }
        resources.peer_authentications.insert(key, policy);
    }
    if registry_only {
        resources.mesh.outbound = OutboundTraffic::RegistryOnly;
    }
    notes
}

/// Parses the files; one with errors is replaced by its last good text, and left out when there is none or when
/// that text is what is wrong now (a duplicate of something newer, say). Returns the errors of the files as they
/// are on disk, and the texts that are in force.
fn parse_with_last_good(
    parse: Parse,
    files: Vec<SourceFile>,
    unreadable: &[Problem],
    good: &BTreeMap<String, String>,
) -> (Parsed, BTreeMap<String, String>) {
    let mut chosen: BTreeMap<String, String> = files.into_iter().map(|file| (file.name, file.text)).collect();
    for problem in unreadable {
        if let Some(text) = good.get(&problem.file) {
            chosen.insert(problem.file.clone(), text.clone());
        }
    }
    let mut errors: Vec<Problem> = Vec::new();
    loop {
        let mut parsed = parse(&sources(&chosen));
        let mut progress = false;
        for problem in &parsed.errors {
            if !errors.contains(problem) {
                errors.push(problem.clone());
            }
            let Some(current) = chosen.remove(&problem.file) else { continue };
            progress = true;
            // An empty file is what an editor or a shell leaves for a moment before it writes: it stands for nothing.
            let usable = |text: &&String| **text != current && !text.trim().is_empty();
            if let Some(text) = good.get(&problem.file).filter(usable) {
                chosen.insert(problem.file.clone(), text.clone());
            }
        }
        // Each round replaces or drops at least one text, and a last good one only once: this ends.
        if !progress {
            parsed.errors = errors;
            return (parsed, chosen);
        }
    }
}

fn sources(texts: &BTreeMap<String, String>) -> Vec<SourceFile> {
    texts.iter().map(|(name, text)| SourceFile { name: name.clone(), text: text.clone() }).collect()
}

#[cfg(test)]
mod tests {
    use outrigger_api::resource::{Metadata, Resource, Service};
    use outrigger_api::snapshot::MtlsMode;

    use super::*;

    /// A toy language: each line is the name of a service; `!` is a mistake; so is a name that comes twice.
    fn toy(files: &[SourceFile]) -> Parsed {
        let mut parsed = Parsed::default();
        for SourceFile { name: file, text } in files {
            let problem = |line: usize, message: &str| Problem {
                file: file.clone(),
                line: line + 1,
                column: 1,
                message: message.into(),
            };
            for (number, line) in text.lines().enumerate() {
                if line == "!" {
                    parsed.errors.push(problem(number, "mistake"));
                    continue;
                }
                let key = ("default".to_owned(), line.to_owned());
                if parsed.resources.services.contains_key(&key) {
                    parsed.errors.push(problem(number, "duplicate"));
                    continue;
                }
                let metadata = Metadata { name: line.into(), namespace: "default".into(), ..Metadata::default() };
                parsed.resources.services.insert(key, Resource { metadata, spec: Service::default() });
            }
        }
        parsed
    }

    struct Fixture {
        directory: tempfile::TempDir,
        reader: Reader,
    }

    impl Fixture {
        fn new() -> Fixture {
            let directory = tempfile::tempdir().unwrap();
            let reader = Reader::new(directory.path(), toy, None);
            Fixture { directory, reader }
        }

        fn write(&self, file: &str, text: &str) {
            std::fs::write(self.directory.path().join(file), text).unwrap();
        }

        fn read(&mut self) -> (Vec<String>, Vec<String>) {
            let configuration = self.reader.read().expect("something changed");
            let names = configuration.resources.services.keys().map(|(_, name)| name.clone()).collect();
            (names, configuration.errors.iter().map(|error| error.message.clone()).collect())
        }
    }

    #[test]
    fn a_bad_file_keeps_its_last_good_text_and_the_others_take_effect() {
        let mut fixture = Fixture::new();
        fixture.write("a.yaml", "one");
        fixture.write("b.yml", "!");
        fixture.write("ignored.txt", "three");
        assert_eq!(fixture.read(), (vec!["one".into()], vec!["mistake".into()]));
        fixture.write("b.yml", "two");
        assert_eq!(fixture.read(), (vec!["one".into(), "two".into()], vec![]));
        fixture.write("a.yaml", "four\n!");
        fixture.write("b.yml", "five");
        assert_eq!(fixture.read(), (vec!["five".into(), "one".into()], vec!["mistake".into()]));
        assert!(fixture.reader.read().is_none(), "unchanged");
        std::fs::remove_file(fixture.directory.path().join("a.yaml")).unwrap();
        assert_eq!(fixture.read(), (vec!["five".into()], vec![]));
    }

    #[test]
    fn a_last_good_text_that_clashes_now_gives_way() {
        let mut fixture = Fixture::new();
        fixture.write("a.yaml", "one");
        fixture.write("b.yaml", "two");
        fixture.read();
        // `one` moved to the first file by name while the file that had it broke.
        fixture.write("a.yaml", "!");
        fixture.write("0.yaml", "one");
        let (names, errors) = fixture.read();
        assert_eq!(names, ["one", "two"]);
        assert_eq!(errors, ["mistake", "duplicate"]);
    }

    #[test]
    fn a_directory_out_of_reach_changes_nothing() {
        let mut fixture = Fixture::new();
        fixture.write("a.yaml", "one");
        fixture.read();
        std::fs::remove_dir_all(fixture.directory.path()).unwrap();
        let (names, errors) = fixture.read();
        assert_eq!(names, ["one"]);
        assert!(errors[0].contains("cannot read"), "{errors:?}");
    }

    #[tokio::test]
    async fn changes_reach_subscribers() {
        let directory = tempfile::tempdir().unwrap();
        let kept = tempfile::tempdir().unwrap();
        let state = State::open(kept.path()).unwrap();
        let watched = Directory::watch(directory.path(), toy, &state).unwrap();
        let mut current = watched.subscribe();
        assert!(current.borrow_and_update().resources.services.is_empty());
        std::fs::write(directory.path().join("a.yaml"), "one").unwrap();
        current.changed().await.unwrap();
        assert_eq!(current.borrow().resources.services.len(), 1);
    }

    /// A directory and a state directory; a reader for each start of the control plane.
    struct Restarts {
        directory: tempfile::TempDir,
        state: tempfile::TempDir,
    }

    const STRICT: &str = "apiVersion: outrigger.dev/v1alpha1\nkind: PeerAuthentication\nmetadata: {name: mesh, \
                          namespace: outrigger-system}\nspec: {mtls: {mode: STRICT}}\n";

    impl Restarts {
        fn new() -> Restarts {
            Restarts { directory: tempfile::tempdir().unwrap(), state: tempfile::tempdir().unwrap() }
        }

        fn path(&self, file: &str) -> PathBuf {
            self.directory.path().join(file)
        }

        fn write(&self, file: &str, text: impl AsRef<[u8]>) {
            std::fs::write(self.path(file), text).unwrap();
        }

        fn remove(&self, file: &str) {
            std::fs::remove_file(self.path(file)).unwrap();
        }

        fn start(&self) -> Reader {
            let state = State::open(self.state.path()).unwrap();
            Reader::new(self.directory.path(), outrigger_api::resource::parse, Some(state))
        }

        /// A start, and what it then says of workloads in `shop` and how many errors there are.
        fn started(&self) -> (MtlsMode, usize) {
            said(&self.start().read().expect("a first configuration"))
        }
    }

    fn said(configuration: &Configuration) -> (MtlsMode, usize) {
        let policies = configuration.resources.peer_authentications.values();
        let policies = policies.map(|policy| (&policy.metadata, &policy.spec));
        let modes = outrigger_api::compile::mtls_modes(policies, "shop", &Default::default());
        (modes.default, configuration.errors.len())
    }

    #[test]
    fn the_last_good_text_survives_a_restart() {
        for (what, broken) in [
            ("a typo", STRICT.replace("mode", "mod").into_bytes()),
            ("no YAML", b"kind: [\n".to_vec()),
            ("no UTF-8", b"a: \xff\n".to_vec()),
            ("too large", vec![b'#'; MAX_FILE_BYTES + 1]),
            ("one of two documents", format!("{STRICT}---\nkind: Service\napiVersion: v1\n").into_bytes()),
        ] {
            let mesh = Restarts::new();
            mesh.write("mesh.yaml", STRICT);
            assert_eq!(mesh.started(), (MtlsMode::Strict, 0));
            mesh.write("mesh.yaml", broken);
            for _ in 0..2 {
                let (mode, errors) = mesh.started();
                assert!(mode == MtlsMode::Strict && errors == 1, "{what}: {mode:?}, {errors}");
            }
            // Mended, and taken away on purpose.
            mesh.write("mesh.yaml", STRICT.replace("STRICT", "PERMISSIVE"));
            assert_eq!(mesh.started(), (MtlsMode::Permissive, 0), "{what}");
            mesh.write("mesh.yaml", STRICT);
            assert_eq!(mesh.started(), (MtlsMode::Strict, 0), "{what}");
            mesh.remove("mesh.yaml");
            assert_eq!(mesh.started(), (MtlsMode::Permissive, 0), "{what}");
        }
    }

    #[test]
    fn a_file_that_was_empty_for_a_moment_has_no_last_good_text() {
        let mesh = Restarts::new();
        mesh.write("mesh.yaml", STRICT);
        let mut reader = mesh.start();
        reader.read();
        mesh.write("mesh.yaml", "\n");
        assert_eq!(said(&reader.read().unwrap()), (MtlsMode::Permissive, 0), "emptied on purpose, as far as one knows");
        mesh.write("mesh.yaml", STRICT.replace("mode", "mod"));
        assert_eq!(said(&reader.read().unwrap()).0, MtlsMode::Strict);
        assert_eq!(mesh.started().0, MtlsMode::Strict);
    }

    #[test]
    fn a_link_to_nowhere_keeps_the_last_good_text() {
        let mesh = Restarts::new();
        mesh.write("mesh.yaml", STRICT);
        mesh.started();
        mesh.remove("mesh.yaml");
        std::os::unix::fs::symlink("nowhere", mesh.path("mesh.yaml")).unwrap();
        assert_eq!(mesh.started(), (MtlsMode::Strict, 1));
    }

    #[test]
    fn without_a_last_good_text_the_strictest_counts() {
        let broken = STRICT.replace("mode", "mod");
        // At the very first start, and then at each until it is mended.
        let mesh = Restarts::new();
        mesh.write("mesh.yaml", &broken);
        assert_eq!(mesh.started(), (MtlsMode::Strict, 2), "the mistake, and what follows of it");
        assert_eq!(mesh.started(), (MtlsMode::Strict, 2));
        mesh.write("mesh.yaml", STRICT.replace("STRICT", "PERMISSIVE"));
        assert_eq!(mesh.started(), (MtlsMode::Permissive, 0));
        // Renamed and broken at once.
        let mesh = Restarts::new();
        mesh.write("mesh.yaml", STRICT);
        let mut reader = mesh.start();
        reader.read();
        mesh.remove("mesh.yaml");
        mesh.write("strict.yaml", &broken);
        assert_eq!(said(&reader.read().unwrap()), (MtlsMode::Strict, 2));
        assert_eq!(mesh.started(), (MtlsMode::Strict, 2));
        // A right policy beside a broken Service, in a file that never was good; another namespace's is not ours.
        let mesh = Restarts::new();
        let service = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {ports: 1}\n";
        mesh.write("all.yaml", format!("{service}---\n{STRICT}"));
        assert_eq!(mesh.started(), (MtlsMode::Strict, 1));
        mesh.write("all.yaml", broken.replace("outrigger-system", "bank"));
        let mesh = Restarts::new();
        mesh.write("all.yaml", broken.replace("outrigger-system", "bank"));
        assert_eq!(mesh.started(), (MtlsMode::Permissive, 2));
    }

    #[test]
    fn what_was_never_read_counts_only_where_nothing_is_known() {
        let nowhere = |mesh: &Restarts| std::os::unix::fs::symlink("nowhere", mesh.path("a.yaml")).unwrap();
        let mesh = Restarts::new();
        nowhere(&mesh);
        assert_eq!(mesh.started(), (MtlsMode::Strict, 2));
        assert_eq!(mesh.started(), (MtlsMode::Strict, 2), "a restart makes it no better known");
        mesh.remove("a.yaml");
        assert_eq!(mesh.started(), (MtlsMode::Permissive, 0));
        // A mesh that has been running without that file goes on as it did.
        nowhere(&mesh);
        assert_eq!(mesh.started(), (MtlsMode::Permissive, 1));
    }

    #[test]
    fn a_state_that_cannot_be_read_or_written_ends_nothing() {
        let mesh = Restarts::new();
        mesh.write("mesh.yaml", STRICT);
        mesh.started();
        std::fs::write(mesh.state.path().join(LAST_GOOD), "{").unwrap();
        mesh.write("mesh.yaml", STRICT.replace("mode", "mod"));
        assert_eq!(mesh.started().0, MtlsMode::Strict);
        std::fs::remove_file(mesh.state.path().join(LAST_GOOD)).unwrap();
        std::fs::create_dir(mesh.state.path().join(LAST_GOOD)).unwrap();
        std::fs::write(mesh.state.path().join(LAST_GOOD).join("x"), "").unwrap();
        assert_eq!(mesh.started().0, MtlsMode::Strict);
    }
}
