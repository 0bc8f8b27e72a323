//! The `--config` directory: read when something in it changes (notify), every second in case the notice was lost,
//! and at once on [`Directory::reload`]. A file that does not parse leaves its own last good text in force; the
//! other files take effect. Subscribers get whole, valid configurations and never half of one.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::Watcher;
use outrigger_api::resource::{Parsed, Problem, Resources, SourceFile};
use tokio::sync::{Notify, watch};
use tokio::time::MissedTickBehavior;

/// How often the directory is read when nobody says that it changed.
const SCAN: Duration = Duration::from_secs(1);
/// An editor writes a file in several steps: wait for the burst to end.
const SETTLE: Duration = Duration::from_millis(20);
/// A file beyond this is a mistake, and reading it each second a burden.
const MAX_FILE: u64 = 8 * 1024 * 1024;

/// The parser: one rule for the control plane and for `outrigger validate`.
pub type Parse = fn(&[SourceFile]) -> Parsed;

/// What is in force, and what is wrong with the files as they are now.
#[derive(Clone, Debug, Default)]
pub struct Configuration {
    pub resources: Arc<Resources>,
    pub errors: Vec<Problem>,
    pub warnings: Vec<Problem>,
}

impl Configuration {
    fn log(&self) {
        for error in &self.errors {
            tracing::error!("{error}");
        }
        for warning in &self.warnings {
            tracing::warn!("{warning}");
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
    /// Reads the directory once, so that the first configuration is there at once, and goes on watching.
    pub fn watch(path: &Path, parse: Parse) -> std::io::Result<Directory> {
        // The first read fails loudly: a directory that does not exist is a mistake in the command line.
        std::fs::read_dir(path)?;
        let mut reader = Reader { path: path.to_owned(), parse, good: BTreeMap::new(), seen: None };
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

/// Reads and parses; knows the last good text of each file.
struct Reader {
    path: PathBuf,
    parse: Parse,
    good: BTreeMap<String, String>,
    /// Hash of what was read last; None: parse whatever is there.
    seen: Option<u64>,
}

impl Reader {
    /// None when nothing changed since the last read.
    fn read(&mut self) -> Option<Configuration> {
        let (files, mut unreadable) = match read_files(&self.path) {
            Ok(read) => read,
            Err(error) => {
                let file = self.path.display().to_string();
                let problem = Problem { file, line: 1, column: 1, message: format!("cannot read: {error}") };
                // The directory as a whole is out of reach: what was good stays.
                let files = sources(&self.good);
                (files, vec![problem])
            }
        };
        let mut hasher = DefaultHasher::new();
        files.iter().for_each(|file| (&file.name, &file.text).hash(&mut hasher));
        unreadable.iter().for_each(|problem| problem.to_string().hash(&mut hasher));
        let hash = hasher.finish();
        if self.seen.replace(hash) == Some(hash) {
            return None;
        }
        let (parsed, good) = parse_with_last_good(self.parse, files, &unreadable, &self.good);
        self.good = good;
        unreadable.extend(parsed.errors);
        Some(Configuration { resources: Arc::new(parsed.resources), errors: unreadable, warnings: parsed.warnings })
    }
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
        let parsed = parse(&sources(&chosen));
        let mut progress = false;
        for problem in &parsed.errors {
            if !errors.contains(problem) {
                errors.push(problem.clone());
            }
            let Some(current) = chosen.remove(&problem.file) else { continue };
            progress = true;
            if let Some(text) = good.get(&problem.file).filter(|text| **text != current) {
                chosen.insert(problem.file.clone(), text.clone());
            }
        }
        // Each round replaces or drops at least one text, and a last good one only once: this ends.
        if !progress {
            return (Parsed { errors, ..parsed }, chosen);
        }
    }
}

fn sources(texts: &BTreeMap<String, String>) -> Vec<SourceFile> {
    texts.iter().map(|(name, text)| SourceFile { name: name.clone(), text: text.clone() }).collect()
}

type Files = (Vec<SourceFile>, Vec<Problem>);

fn read_files(directory: &Path) -> std::io::Result<Files> {
    let mut files = Vec::new();
    let mut problems = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let is_yaml = path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        // Kubernetes swaps mounted files through names that begin with two dots; editors use one dot.
        if !is_yaml || name.starts_with('.') {
            continue;
        }
        match read_text(&path) {
            Ok(Some(text)) => files.push(SourceFile { name: path.display().to_string(), text }),
            Ok(None) => {}
            Err(message) => {
                problems.push(Problem { file: path.display().to_string(), line: 1, column: 1, message });
            }
        }
    }
    files.sort_by(|one, other| one.name.cmp(&other.name));
    problems.sort_by(|one, other| one.file.cmp(&other.file));
    Ok((files, problems))
}

/// None for what is no file, or is gone since the directory was listed.
fn read_text(path: &Path) -> Result<Option<String>, String> {
    let metadata = match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|error| format!("cannot read: {error}"))?,
    };
    if !metadata.is_file() {
        return Ok(None);
    }
    if metadata.len() > MAX_FILE {
        return Err(format!("the file has {} bytes; at most {MAX_FILE} are read", metadata.len()));
    }
    let bytes = std::fs::read(path).map_err(|error| format!("cannot read: {error}"))?;
    String::from_utf8(bytes).map(Some).map_err(|error| format!("not UTF-8: {error}"))
}

#[cfg(test)]
mod tests {
    use outrigger_api::resource::{Metadata, Resource, Service};

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
            let reader = Reader { path: directory.path().to_owned(), parse: toy, good: BTreeMap::new(), seen: None };
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
        let watched = Directory::watch(directory.path(), toy).unwrap();
        let mut current = watched.subscribe();
        assert!(current.borrow_and_update().resources.services.is_empty());
        std::fs::write(directory.path().join("a.yaml"), "one").unwrap();
        current.changed().await.unwrap();
        assert_eq!(current.borrow().resources.services.len(), 1);
    }
}
