//! Reads the YAML of a configuration: a directory as `--config` and `outrigger validate` mean it, or one file. The control
//! plane and the CLI both call this, so that they see the same files and the same faults. What the files say is not
//! looked at here.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use outrigger_api::resource::{MAX_FILE_BYTES, Problem, SourceFile};

/// What was read, and what could not be.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Files {
    pub files: Vec<SourceFile>,
    /// Entries of the directory that were meant to be read.
    pub unreadable: Vec<Problem>,
}

/// Reads `path`: a file, or of a directory every `*.yaml` and `*.yml`, sorted by name, not those in folders below.
///
/// Symbolic links are followed, because a mounted ConfigMap consists of them; hidden entries, among them the `..data`
/// of such a mount, are passed over, and so is a file that went while the directory was read. A file that is too large
/// comes back cut just behind the limit and bytes that are not UTF-8 as U+FFFD: the parser refuses both, with the
/// file's name and the place. An error names the path and concerns it as a whole.
pub fn read(path: &Path) -> io::Result<Files> {
    let metadata = fs::metadata(path).map_err(|error| with_path(path, &error))?;
    if !metadata.is_dir() {
        let file = read_file(path).map_err(|error| with_path(path, &error))?;
        return Ok(Files { files: vec![file], unreadable: Vec::new() });
    }
    let mut read = Files::default();
    for path in yaml_entries(path)? {
        match read_entry(&path) {
            Ok(Some(file)) => read.files.push(file),
            Ok(None) => {}
            Err(message) => {
                let file = path.display().to_string();
                read.unreadable.push(Problem { file, line: 1, column: 1, message });
            }
        }
    }
    Ok(read)
}

fn yaml_entries(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory).map_err(|error| with_path(directory, &error))? {
        let entry = entry.map_err(|error| with_path(directory, &error))?;
        let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
        let path = entry.path();
        let is_yaml = path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
        if is_yaml && !hidden {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// None for a folder, which may be called `x.yaml`, and for what is gone.
fn read_entry(path: &Path) -> Result<Option<SourceFile>, String> {
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let link = fs::symlink_metadata(path).is_ok();
            return if link { Err("cannot read: a link to a file that does not exist".to_owned()) } else { Ok(None) };
        }
        Err(error) => return Err(format!("cannot read: {error}")),
    };
    if metadata.is_dir() {
        return Ok(None);
    }
    // A pipe would be waited for.
    if !metadata.is_file() {
        return Err("cannot read: it is no regular file".to_owned());
    }
    match read_file(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("cannot read: {error}")),
    }
}

fn read_file(path: &Path) -> io::Result<SourceFile> {
    let mut bytes = Vec::new();
    let limit = MAX_FILE_BYTES as u64 + 1;
    fs::File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    let text = String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned());
    Ok(SourceFile { name: path.display().to_string(), text })
}

fn with_path(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// A folder of this test, removed at its end.
    struct Folder(PathBuf);

    impl Folder {
        fn new() -> Folder {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let nth = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = std::env::temp_dir().join(format!("outrigger-config-{}-{nth}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Folder(path)
        }

        fn write(&self, name: &str, text: impl AsRef<[u8]>) {
            let path = self.0.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn names(&self) -> Vec<String> {
            let prefix = format!("{}/", self.0.display());
            read(&self.0).unwrap().files.into_iter().map(|file| file.name.replace(&prefix, "")).collect()
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn yaml_files_in_order_and_nothing_else() {
        let folder = Folder::new();
        for name in ["b.yaml", "a.yml", "c.yaml.bak", "d.json", ".e.yaml", "below/f.yaml", "g.yaml/h.yaml", "10.yaml"] {
            folder.write(name, name);
        }
        assert_eq!(folder.names(), ["10.yaml", "a.yml", "b.yaml"]);
        assert_eq!(read(&folder.0).unwrap().files[1].text, "a.yml");
    }

    #[test]
    fn a_config_map_mount_is_followed() {
        let folder = Folder::new();
        folder.write("..2026_01_01/mesh.yaml", "a: 1");
        symlink("..2026_01_01", folder.0.join("..data")).unwrap();
        symlink("..data/mesh.yaml", folder.0.join("mesh.yaml")).unwrap();
        assert_eq!(folder.names(), ["mesh.yaml"]);
        assert_eq!(read(&folder.0).unwrap().files[0].text, "a: 1");
    }

    #[test]
    fn one_file_whatever_its_name() {
        let folder = Folder::new();
        folder.write("list", "a: 1");
        let path = folder.0.join("list");
        assert_eq!(read(&path).unwrap().files, [SourceFile { name: path.display().to_string(), text: "a: 1".into() }]);
    }

    #[test]
    fn what_is_no_text_is_left_to_the_parser() {
        let folder = Folder::new();
        folder.write("a.yaml", b"a: \xff\n");
        folder.write("b.yaml", "#".repeat(MAX_FILE_BYTES * 2));
        let files = read(&folder.0).unwrap().files;
        assert_eq!(files[0].text, "a: \u{fffd}\n");
        assert_eq!(files[1].text.len(), MAX_FILE_BYTES + 1);
        let errors = outrigger_api::compile::load(&files).errors;
        assert_eq!((errors.len(), errors[0].line, errors[0].column), (2, 1, 4));
    }

    #[test]
    fn errors_name_the_path() {
        let folder = Folder::new();
        let absent = folder.0.join("absent");
        let error = read(&absent).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(error.to_string().starts_with(&absent.display().to_string()), "{error}");
    }

    #[test]
    fn what_cannot_be_read_hides_nothing_else() {
        let folder = Folder::new();
        folder.write("good.yaml", "a: 1");
        symlink("nowhere.yaml", folder.0.join("dangling.yaml")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(folder.0.join("socket.yaml")).unwrap();
        let read = read(&folder.0).unwrap();
        assert_eq!(read.files.len(), 1);
        let problems: Vec<String> = read
            .unreadable
            .iter()
            .map(|problem| problem.to_string().replace(&format!("{}/", folder.0.display()), ""))
            .collect();
        assert_eq!(
            problems,
            [
                "dangling.yaml:1:1: cannot read: a link to a file that does not exist",
                "socket.yaml:1:1: cannot read: it is no regular file",
            ]
        );
    }
}
