//! Which crate and which module may import which: reads the workspace's sources and manifests and names every arrow that
//! runs back. The rows are those of ARCHITECTURE.md, read from left to right: a module imports from rows to its left,
//! never from its own row. Std only and line by line in spirit: it follows `crate::` and `super::` paths, in imports and
//! in expressions, in test code too.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A crate whose modules stand in rows.
struct Rows {
    folder: &'static str,
    /// As its own binary calls it.
    library: &'static str,
    rows: &'static [&'static [&'static str]],
    /// The table that everybody reads, its own row included.
    for_all: &'static [&'static str],
}

const ROWS: [Rows; 3] = [
    Rows {
        folder: "api",
        library: "outrigger_api",
        rows: &[
            &["expression", "path", "peer_text"],
            &["name"],
            &["identity", "virtual_address"],
            &["facts"],
            &["policy"],
            &["route"],
            &["snapshot"],
            &["resource"],
            &["compile"],
            &["explain", "wire"],
        ],
        for_all: &[],
    },
    Rows {
        folder: "sidecar",
        library: "outrigger_sidecar",
        rows: &[
            &["connection", "outcome", "config", "net"],
            &["tls"],
            &["telemetry", "policy", "route", "balance", "redirect"],
            &["identity"],
            &["discovery", "key_sets"],
            &["connect"],
            &["protocol"],
            &["inbound", "outbound", "resolver"],
            &["admin"],
            &["app"],
            &["main"],
        ],
        for_all: &["outcome"],
    },
    Rows {
        folder: "control-plane",
        library: "outrigger_control_plane",
        rows: &[&["config"], &["ca", "registry", "policy", "inject"], &["distribute"], &["admin"], &["app"], &["main"]],
        for_all: &[],
    },
];

/// Each crate's folder and the crates of ours that it may depend on.
const CRATES: [(&str, &[&str]); 7] = [
    ("api", &[]),
    ("runtime", &["outrigger-api"]),
    ("sidecar", &["outrigger-api", "outrigger-runtime"]),
    ("control-plane", &["outrigger-api", "outrigger-runtime"]),
    ("cli", &["outrigger-api", "outrigger-runtime", "outrigger-sidecar", "outrigger-control-plane"]),
    ("tests", &["outrigger-api", "outrigger-runtime", "outrigger-sidecar", "outrigger-control-plane", "outrigger"]),
    ("fuzz", &["outrigger-api", "outrigger-sidecar", "outrigger-control-plane"]),
];

/// Who may link Kubernetes' client.
const KUBERNETES: [&str; 2] = ["control-plane", "cli"];

/// Names that say nothing, alone or as a part (`string_utils`).
const EMPTY_NAMES: [&str; 10] =
    ["manager", "managers", "helper", "helpers", "util", "utils", "common", "commons", "misc", "miscellaneous"];

/// Everything that is wrong in the workspace at `root`, one line each; empty is right.
pub fn faults(root: &Path) -> io::Result<Vec<String>> {
    let mut faults = Vec::new();
    manifests(root, &mut faults)?;
    for (folder, _) in CRATES {
        for file in sources(&root.join(folder))? {
            names(root, &file, &mut faults)?;
        }
    }
    for rows in &ROWS {
        modules(root, rows, &mut faults)?;
    }
    Ok(faults)
}

fn manifests(root: &Path, faults: &mut Vec<String>) -> io::Result<()> {
    let known: BTreeMap<&str, &[&str]> = CRATES.into_iter().collect();
    for entry in fs::read_dir(root)? {
        let folder = entry?.file_name().to_string_lossy().into_owned();
        let manifest = root.join(&folder).join("Cargo.toml");
        if !manifest.is_file() {
            continue;
        }
        let Some(allowed) = known.get(folder.as_str()) else {
            faults.push(format!(
                "{folder}/Cargo.toml: the crate has no place among the arrows; add it to tests/src/arrows.rs"
            ));
            continue;
        };
        for (number, dependency) in dependencies(&fs::read_to_string(&manifest)?) {
            let place = format!("{folder}/Cargo.toml:{number}");
            if dependency.starts_with("outrigger") && !allowed.contains(&dependency.as_str()) {
                faults.push(format!("{place}: {folder} must not depend on {dependency}"));
            }
            if matches!(dependency.as_str(), "kube" | "k8s-openapi") && !KUBERNETES.contains(&folder.as_str()) {
                faults.push(format!("{place}: {folder} must not depend on {dependency}, only {KUBERNETES:?} do"));
            }
        }
    }
    Ok(())
}

/// Names of dependencies of every kind (dev, build, by target), with their lines.
fn dependencies(manifest: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut inside = false;
    for (index, line) in manifest.lines().enumerate() {
        let line = line.trim();
        if let Some(table) = line.strip_prefix('[') {
            let table = table.trim_end_matches(']');
            inside = table.ends_with("dependencies");
            // `[dependencies.name]`
            if let Some((before, name)) = table.rsplit_once('.')
                && before.ends_with("dependencies")
            {
                found.push((index + 1, name.to_owned()));
            }
        } else if inside && !line.starts_with('#') {
            let name: String =
                line.chars().take_while(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_')).collect();
            if !name.is_empty() {
                found.push((index + 1, name));
            }
            // `alias = { package = "name" }`
            if let Some(package) = line.split("package = \"").nth(1).and_then(|rest| rest.split('"').next()) {
                found.push((index + 1, package.to_owned()));
            }
        }
    }
    found
}

/// All Rust files of a crate but what is built.
fn sources(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut left = vec![folder.to_owned()];
    while let Some(folder) = left.pop() {
        if !folder.is_dir() {
            continue;
        }
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                if path.file_name().is_some_and(|name| name != "target") {
                    left.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

fn names(root: &Path, file: &Path, faults: &mut Vec<String>) -> io::Result<()> {
    let shown = file.strip_prefix(root).unwrap_or(file);
    let is_empty = |name: &str| name.split(['_', '-']).any(|part| EMPTY_NAMES.contains(&part));
    for part in shown.with_extension("").components() {
        let part = part.as_os_str().to_string_lossy();
        if is_empty(&part) {
            faults.push(format!("{}: {part:?} is a name that says nothing", shown.display()));
        }
    }
    let tokens = tokens(&fs::read_to_string(file)?);
    for pair in tokens.windows(2) {
        if pair[0].text == "mod" && is_empty(&pair[1].text) {
            faults.push(format!(
                "{}:{}: {:?} is a name that says nothing",
                shown.display(),
                pair[1].line,
                pair[1].text
            ));
        }
    }
    Ok(())
}

fn modules(root: &Path, rows: &Rows, faults: &mut Vec<String>) -> io::Result<()> {
    let source = root.join(rows.folder).join("src");
    let row_of: BTreeMap<&str, usize> =
        rows.rows.iter().enumerate().flat_map(|(row, names)| names.iter().map(move |name| (*name, row))).collect();
    for file in sources(&source)? {
        let inside = file.strip_prefix(&source).unwrap_or(&file);
        let path = module_path(inside);
        let shown = format!("{}/src/{}", rows.folder, inside.display());
        let Some(module) = path.first() else { continue };
        let Some(row) = row_of.get(module.as_str()).copied() else {
            faults
                .push(format!("{shown}: the module {module} stands in no row; give it a place in tests/src/arrows.rs"));
            continue;
        };
        for reference in references(&fs::read_to_string(&file)?, &path, rows.library) {
            let place = format!("{shown}:{}", reference.line);
            let target = reference.module.as_str();
            if target == module || rows.for_all.contains(&target) {
                continue;
            }
            match row_of.get(target) {
                None => faults.push(format!(
                    "{place}: {module} imports {target:?} of the crate's root; import it from its own module"
                )),
                Some(other) if *other == row => {
                    faults.push(format!("{place}: {module} must not import {target}, which stands in the same row"));
                }
                Some(other) if *other > row => {
                    faults.push(format!("{place}: {module} must not import {target}: the arrow runs back"));
                }
                Some(_) => {}
            }
        }
    }
    Ok(())
}

/// `tls/verify.rs` is `[tls, verify]`, `tls/mod.rs` and `tls.rs` are `[tls]`, `lib.rs` is the root.
fn module_path(inside: &Path) -> Vec<String> {
    let mut path: Vec<String> =
        inside.with_extension("").components().map(|part| part.as_os_str().to_string_lossy().into_owned()).collect();
    if path.last().is_some_and(|last| last == "mod" || last == "lib") {
        path.pop();
    }
    path
}

struct Reference {
    /// The top-level module that is named.
    module: String,
    line: usize,
}

/// Every path of a file that leads to a top-level module of its crate.
fn references(text: &str, path: &[String], library: &str) -> Vec<Reference> {
    let tokens = tokens(text);
    let mut found = Vec::new();
    // Depths of braces at which inline modules began.
    let mut inline = Vec::new();
    let mut depth = 0_usize;
    let word = |at: usize| tokens.get(at).map_or("", |token| token.text.as_str());
    for at in 0..tokens.len() {
        match word(at) {
            "{" => {
                depth += 1;
                if at >= 2 && word(at - 2) == "mod" {
                    inline.push(depth);
                }
            }
            "}" => {
                if inline.last() == Some(&depth) {
                    inline.pop();
                }
                depth = depth.saturating_sub(1);
            }
            first if (first == "crate" || first == library) && word(at + 1) == "::" => {
                heads(&tokens, at + 2, &mut found);
            }
            // The first `super` of a chain.
            "super" if word(at + 1) == "::" && (at == 0 || word(at - 1) != "::") => {
                let mut next = at;
                let mut climbs = 0;
                while word(next) == "super" && word(next + 1) == "::" {
                    climbs += 1;
                    next += 2;
                }
                if climbs >= path.len() + inline.len() {
                    heads(&tokens, next, &mut found);
                }
            }
            _ => {}
        }
    }
    found
}

/// The first names of what begins at `at`: one, or those of a group in braces.
fn heads(tokens: &[Token], at: usize, found: &mut Vec<Reference>) {
    let Some(first) = tokens.get(at) else { return };
    if first.text != "{" {
        found.push(Reference { module: first.text.clone(), line: first.line });
        return;
    }
    let mut depth = 0_usize;
    let mut begins = false;
    for token in &tokens[at..] {
        match token.text.as_str() {
            "{" => {
                depth += 1;
                begins = depth == 1;
            }
            "}" => {
                depth -= 1;
                if depth == 0 {
                    return;
                }
            }
            "," => begins = depth == 1,
            _ if begins => {
                found.push(Reference { module: token.text.clone(), line: token.line });
                begins = false;
            }
            _ => {}
        }
    }
}

struct Token {
    text: String,
    line: usize,
}

/// Words, `::` and single signs; comments, texts and characters are left out.
fn tokens(text: &str) -> Vec<Token> {
    let chars: Vec<char> = text.chars().collect();
    let mut tokens = Vec::new();
    let mut line = 1;
    let mut at = 0;
    while at < chars.len() {
        let end = skip(&chars, at);
        if end > at {
            line += chars[at..end].iter().filter(|c| **c == '\n').count();
            at = end;
            continue;
        }
        let length = if is_word(chars[at]) {
            chars[at..].iter().take_while(|c| is_word(**c)).count()
        } else if chars[at..].starts_with(&[':', ':']) {
            2
        } else {
            1
        };
        let token: String = chars[at..at + length].iter().collect();
        if chars[at] == '\n' {
            line += 1;
        }
        if !token.trim().is_empty() {
            tokens.push(Token { text: token, line });
        }
        at += length;
    }
    tokens
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Where the comment, text or character that begins at `at` ends; `at` itself when none does.
fn skip(chars: &[char], at: usize) -> usize {
    let rest = &chars[at..];
    let to = |length: Option<usize>| length.map_or(chars.len(), |length| at + length);
    if rest.starts_with(&['/', '/']) {
        return to(rest.iter().position(|c| *c == '\n'));
    }
    if rest.starts_with(&['/', '*']) {
        return to(rest.windows(2).position(|pair| pair == ['*', '/']).map(|end| end + 2));
    }
    let after_word = at > 0 && is_word(chars[at - 1]);
    // r"..." and r#"..."#, with b or c before.
    let raw = rest.iter().take_while(|c| matches!(c, 'b' | 'c' | 'r')).count();
    if !after_word && raw > 0 && rest[raw - 1] == 'r' {
        let hashes = rest[raw..].iter().take_while(|c| **c == '#').count();
        if rest.get(raw + hashes) == Some(&'"') {
            let body = raw + hashes + 1;
            let mut close = vec!['"'];
            close.extend(std::iter::repeat_n('#', hashes));
            let end = rest[body..].windows(close.len()).position(|window| window == close);
            return to(end.map(|end| body + end + close.len()));
        }
    }
    match rest[0] {
        '"' => to(quoted(rest, '"')),
        // A character, and not a lifetime: closed after one character or an escape.
        '\'' if rest.get(1) == Some(&'\\') => to(quoted(rest, '\'')),
        '\'' if rest.get(2) == Some(&'\'') => at + 3,
        _ => at,
    }
}

/// The length of a quoted piece, its quotes included.
fn quoted(rest: &[char], quote: char) -> Option<usize> {
    let mut escaped = false;
    rest.iter().enumerate().skip(1).find_map(|(index, c)| {
        if escaped {
            escaped = false;
            return None;
        }
        escaped = *c == '\\';
        (*c == quote).then_some(index + 1)
    })
}
