//! `outrigger validate PATH...`: says of YAML what a control plane started with it would say, without one. It refuses
//! exactly what `--config` would refuse, because it reads and parses with the same functions.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::PathBuf;

use outrigger_api::compile::load;
use outrigger_api::resource::{Problem, SourceFile, strictest, unreadable};
use outrigger_runtime::config_dir;

/// Everything is as it should be; warnings may have been printed.
pub const VALID: u8 = 0;
/// At least one error.
pub const INVALID: u8 = 1;
/// No path, or one that cannot be read.
pub const USAGE: u8 = 2;

/// Checks all paths together as one configuration. Problems go to stderr, one line each, as `FILE:LINE:COL: message`
/// or `FILE:LINE:COL: warning: message`; a summary goes to stdout when there is no error. Returns the exit code.
pub fn validate(paths: &[PathBuf]) -> u8 {
    validate_to(paths, &mut io::stdout().lock(), &mut io::stderr().lock())
}

/// The same with the places to write to. A reader that went away is no reason to fail: the exit code still tells.
fn validate_to(paths: &[PathBuf], out: &mut dyn Write, err: &mut dyn Write) -> u8 {
    if paths.is_empty() {
        let _ = writeln!(err, "usage: outrigger validate PATH...   (a directory as for --config, or files)");
        return USAGE;
    }
    let mut files: Vec<SourceFile> = Vec::new();
    let mut errors: Vec<Problem> = Vec::new();
    let mut notes: Vec<Problem> = Vec::new();
    let mut seen = BTreeSet::new();
    for path in paths {
        match config_dir::read(path) {
            // A file may be named beside its directory: it is still one file.
            Ok(read) => {
                files.extend(read.files.into_iter().filter(|file| seen.insert(real_path(&file.name))));
                notes.extend(read.unreadable.iter().flat_map(|problem| unreadable(&problem.file).notes));
                errors.extend(read.unreadable);
            }
            Err(error) => {
                let _ = writeln!(err, "{error}");
                return USAGE;
            }
        }
    }
    let parsed = load(&files);
    errors.extend(parsed.errors);
    for problem in &errors {
        let _ = writeln!(err, "{problem}");
    }
    // What a control plane that never saw a good version of these files would do meanwhile.
    let broken = files.iter().filter(|file| errors.iter().any(|error| error.file == file.name));
    notes.extend(broken.flat_map(|file| strictest(file).notes));
    for problem in parsed.warnings.iter().chain(&notes) {
        let _ = writeln!(err, "{}:{}:{}: warning: {}", problem.file, problem.line, problem.column, problem.message);
    }
    if !errors.is_empty() {
        return INVALID;
    }
    let _ = writeln!(out, "{}, {}: valid", counted(files.len(), "file"), counted(parsed.objects, "resource"));
    VALID
}

fn real_path(name: &str) -> PathBuf {
    std::fs::canonicalize(name).unwrap_or_else(|_| PathBuf::from(name))
}

fn counted(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const GOOD: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {ports: [{port: 80}]}\n";

    fn run(paths: &[PathBuf]) -> (u8, String, String) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = validate_to(paths, &mut out, &mut err);
        (code, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
    }

    #[test]
    fn valid_invalid_usage() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("good.yaml"), GOOD).unwrap();
        let whole = [folder.path().to_owned()];
        assert_eq!(run(&whole), (VALID, "1 file, 1 resource: valid\n".into(), String::new()));
        assert_eq!(run(&[whole[0].clone(), path("good.yaml")]).0, VALID);

        fs::write(path("warned.yaml"), GOOD.replace("name: a", "name: b").replace("spec: {", "spec: {x: 1, ")).unwrap();
        let expected = format!("{}:4:8: warning: spec: field `x` is not acted on\n", path("warned.yaml").display());
        assert_eq!(run(&whole), (VALID, "2 files, 2 resources: valid\n".into(), expected));

        // Each file is fine alone; only the directory as a whole is not.
        fs::write(path("z.yaml"), GOOD).unwrap();
        assert_eq!(run(&[path("z.yaml")]).0, VALID);
        let (code, out, err) = run(&whole);
        assert_eq!((code, out.as_str()), (INVALID, ""));
        assert!(
            err.starts_with(&format!("{}:3:18: Service default/a stands already", path("z.yaml").display())),
            "{err}"
        );

        assert_eq!(run(&[]).0, USAGE);
        let (code, _, err) = run(&[path("absent")]);
        assert_eq!(code, USAGE);
        assert!(err.contains("absent"), "{err}");
    }
}
