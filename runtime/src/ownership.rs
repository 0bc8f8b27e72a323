//! Whether the files of a state directory are this user's alone, as ssh asks of its keys: a process that used a directory
//! which others can write would take their keys for its own. Called once at start, before anything is read.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Write permission of group and others.
const WRITE: u32 = 0o022;
/// Every permission of group and others.
const ALL: u32 = 0o077;
/// Read permission of the group.
const GROUP_READ: u32 = 0o040;

/// A file or directory that another user could change, or a key that another user could read.
#[derive(Debug, thiserror::Error)]
pub enum Exposed {
    #[error(
        "{} belongs to uid {owner}, and this process runs as uid {own}: the owner could replace what is in it. If you trust \
         its content run `chown -R {own} {}`, otherwise name another --state", .path.display(), .path.display()
    )]
    Owner { path: PathBuf, owner: u32, own: u32 },
    #[error(
        "{} can be written by other users (mode {mode:04o}), who could replace what is in it. If you trust its content run \
         `chmod go-w {}`, otherwise name another --state", .path.display(), .path.display()
    )]
    Writable { path: PathBuf, mode: u32 },
    #[error(
        "the key {} can be read by other users (mode {mode:04o}): run `chmod 600 {}`, and replace the key if another user may \
         have read it", .path.display(), .path.display()
    )]
    Readable { path: PathBuf, mode: u32 },
    #[error("cannot look at {}: {source}", .path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// Checks a state directory, those of its `folders` that exist, and every file in them. Files that end in `.key` may not
/// even be readable by others. A directory that is absent is in order: the process will make it.
pub fn check(state: &Path, folders: &[&str]) -> Result<(), Exposed> {
    let own = effective_user();
    let folders = folders.iter().map(|folder| state.join(folder));
    for folder in std::iter::once(state.to_owned()).chain(folders) {
        if !look(&folder, WRITE, own)? {
            continue;
        }
        let failed = |source| Exposed::Io { path: folder.clone(), source };
        for entry in std::fs::read_dir(&folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let key = path.extension().is_some_and(|extension| extension == "key");
            if path.is_file() {
                look(&path, if key { ALL } else { WRITE }, own)?;
            }
        }
    }
    Ok(())
}

/// False when there is no such file. Root may own it, too: root can change every file anyway.
fn look(path: &Path, refused: u32, own: u32) -> Result<bool, Exposed> {
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        // A temporary file may be gone again.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(source) => return Err(Exposed::Io { path: path.to_owned(), source }),
    };
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    if owner != own && owner != 0 {
        return Err(Exposed::Owner { path: path.to_owned(), owner, own });
    }
    // Root gives a key to the group of a process without privileges: mounted secrets are like that.
    let refused = if owner == 0 && own != 0 { refused & !GROUP_READ } else { refused };
    match mode & refused {
        0 => Ok(true),
        exposed if exposed & WRITE != 0 => Err(Exposed::Writable { path: path.to_owned(), mode }),
        _ => Err(Exposed::Readable { path: path.to_owned(), mode }),
    }
}

#[expect(unsafe_code, reason = "geteuid has no safe form in std")]
fn effective_user() -> u32 {
    // SAFETY: geteuid has no preconditions and cannot fail.
    unsafe { libc::geteuid() }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, chown};

    use super::*;

    fn state() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("ca")).unwrap();
        for (file, mode) in [("ca/root.key", 0o600), ("ca/root.pem", 0o644), ("trust-bundle.pem", 0o644)] {
            fs::write(directory.path().join(file), "x").unwrap();
            fs::set_permissions(directory.path().join(file), fs::Permissions::from_mode(mode)).unwrap();
        }
        directory
    }

    fn place(state: &tempfile::TempDir, file: &str) -> PathBuf {
        if file == "." { state.path().to_owned() } else { state.path().join(file) }
    }

    #[test]
    fn what_others_can_change_is_refused_and_the_fix_is_named() {
        let cases = [
            (".", 0o700, None),
            (".", 0o755, None),
            (".", 0o777, Some("chmod go-w")),
            (".", 0o770, Some("chmod go-w")),
            (".", 0o1777, Some("chmod go-w")),
            ("ca", 0o775, Some("chmod go-w")),
            ("ca/root.pem", 0o666, Some("chmod go-w")),
            ("ca/root.key", 0o400, None),
            ("ca/root.key", 0o620, Some("chmod go-w")),
            ("ca/root.key", 0o640, Some("chmod 600")),
            ("ca/root.key", 0o604, Some("chmod 600")),
            ("trust-bundle.pem", 0o664, Some("chmod go-w")),
        ];
        for (file, mode, fix) in cases {
            let state = state();
            let path = place(&state, file);
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let said = check(state.path(), &["ca"]).err().map(|error| error.to_string());
            match fix {
                None => assert_eq!(said, None, "{file} {mode:o}"),
                Some(fix) => {
                    let said = said.unwrap_or_else(|| panic!("{file} {mode:o} was let pass"));
                    assert!(said.contains(&format!("{fix} {}", path.display())), "{said}");
                }
            }
        }
    }

    #[test]
    fn what_belongs_to_another_user_is_refused() {
        for file in [".", "ca", "ca/root.key"] {
            let state = state();
            let path = place(&state, file);
            if chown(&path, Some(12_345), None).is_err() {
                println!("DID NOT RUN: only root can give files away");
                return;
            }
            // What another user owns may not even be readable by us.
            let said = check(state.path(), &["ca"]).unwrap_err().to_string();
            assert!(said.contains("uid 12345") && said.contains(&format!("chown -R 0 {}", path.display())), "{said}");
        }
    }

    #[test]
    fn root_may_give_a_key_to_the_group_of_another_user() {
        let state = state();
        let path = place(&state, "ca/root.key");
        if chown(&path, Some(0), None).is_err() {
            println!("DID NOT RUN: only root has files of root");
            return;
        }
        for (mode, own, expected) in
            [(0o440, 1000, true), (0o444, 1000, false), (0o460, 1000, false), (0o440, 0, false)]
        {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(look(&path, ALL, own).is_ok(), expected, "{mode:o} for uid {own}");
        }
    }

    #[test]
    fn what_is_not_there_is_in_order() {
        let state = state();
        assert!(check(&state.path().join("absent"), &["ca"]).is_ok());
        assert!(check(state.path(), &["ca", "ca/trust"]).is_ok());
    }
}
