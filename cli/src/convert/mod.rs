//! `outrigger convert FILE...`: rewrites documents of other meshes into this one's kinds, on stdout, and says on stderr what it
//! could not. Everything else passes as it is. What it makes is read by the parser of the control plane before it is printed:
//! a kind that this version does not act on counts as not converted. What is not understood never lets anybody more in, nor
//! sends anything elsewhere: a rule that cannot be rewritten whole is left out.

mod destination_rule;
mod fields;
mod linkerd;
mod service_entry;
mod virtual_service;

use std::io::{self, Read as _, Write};
use std::path::PathBuf;

use outrigger_api::resource::{SourceFile, parse};
use serde::Deserialize as _;
use serde_json::{Map, Value, json};

use fields::Left;

/// Everything was rewritten.
pub const WHOLE: u8 = 0;
/// Something was not; it is told.
pub const IN_PART: u8 = 1;
/// A file that cannot be read.
pub const USAGE: u8 = 2;

/// One document, as it was read.
#[derive(Clone, Debug)]
struct Document {
    file: String,
    group: String,
    kind: String,
    namespace: String,
    name: String,
    value: Value,
}

/// What comes out.
#[derive(Debug, Default)]
struct Output {
    documents: Vec<String>,
    /// A line each.
    told: Vec<String>,
}

/// Converts the files, `-` being stdin; returns the exit code.
pub fn convert(paths: &[PathBuf]) -> u8 {
    let mut files = Vec::new();
    for path in paths {
        let name = path.display().to_string();
        let mut text = String::new();
        let read = if name == "-" {
            io::stdin().read_to_string(&mut text).map(|_| text)
        } else {
            std::fs::read_to_string(path)
        };
        match read {
            Ok(text) => files.push(SourceFile { name, text }),
            Err(error) => {
                let _ = writeln!(io::stderr().lock(), "outrigger convert: {name}: {error}");
                return USAGE;
            }
        }
    }
    let (documents, broken) = documents(&files);
    let mut output = converted(documents);
    output.told.splice(0..0, broken);
    let (mut out, mut err) = (io::stdout().lock(), io::stderr().lock());
    // A reader that went away is no reason to fail: the exit code still tells.
    let _ = out.write_all(output.documents.join("---\n").as_bytes());
    for line in &output.told {
        let _ = writeln!(err, "{line}");
    }
    if output.told.is_empty() { WHOLE } else { IN_PART }
}

/// Every document of the files, those of lists one by one; and what cannot be read.
fn documents(files: &[SourceFile]) -> (Vec<Document>, Vec<String>) {
    let (mut all, mut broken) = (Vec::new(), Vec::new());
    for file in files {
        for document in serde_yaml::Deserializer::from_str(&file.text) {
            match Value::deserialize(document) {
                Ok(Value::Null) => {}
                Ok(value) => collect(&file.name, value, &mut all),
                Err(error) => {
                    broken.push(format!("{}: {error}; what stands behind it was not read", file.name));
                    break;
                }
            }
        }
    }
    (all, broken)
}

fn collect(file: &str, value: Value, all: &mut Vec<Document>) {
    let text = |value: &Value, path: &str| value.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
    if text(&value, "/kind") == "List"
        && let Some(items) = value.get("items").and_then(Value::as_array)
    {
        return items.iter().for_each(|item| collect(file, item.clone(), all));
    }
    let namespace = text(&value, "/metadata/namespace");
    let api_version = text(&value, "/apiVersion");
    all.push(Document {
        file: file.to_owned(),
        group: api_version.split_once('/').map_or(String::new(), |(group, _)| group.to_owned()),
        kind: text(&value, "/kind"),
        namespace: if namespace.is_empty() { "default".to_owned() } else { namespace },
        name: text(&value, "/metadata/name"),
        value,
    });
}

impl Document {
    fn says(&self, what: &str) -> String {
        format!("{}: {} {}/{}: {what}", self.file, self.kind, self.namespace, self.name)
    }

    fn spec(&self) -> Value {
        self.value.get("spec").cloned().unwrap_or_default()
    }

    /// A document of ours with its name.
    fn becomes(&self, api_version: &str, kind: &str, spec: Map<String, Value>) -> Value {
        made(api_version, kind, &self.namespace, &self.name, spec)
    }
}

/// A document of ours.
fn made(api_version: &str, kind: &str, namespace: &str, name: &str, spec: Map<String, Value>) -> Value {
    json!({ "apiVersion": api_version, "kind": kind, "metadata": { "name": name, "namespace": namespace }, "spec": spec })
}

const OURS: &str = "outrigger.dev/v1alpha1";
const GATEWAY: &str = "gateway.networking.k8s.io/v1";

fn converted(documents: Vec<Document>) -> Output {
    let mut output = Output::default();
    let (linkerd, others): (Vec<Document>, Vec<Document>) =
        documents.into_iter().partition(|document| document.group == linkerd::GROUP);
    for document in others {
        let mut left = Left::default();
        let becomes = match (&*document.group, &*document.kind) {
            ("networking.istio.io", "VirtualService") => virtual_service::route(&document, &mut left),
            ("networking.istio.io", "DestinationRule") => destination_rule::policy(&document, &mut left),
            ("networking.istio.io", "ServiceEntry") => service_entry::entry(&document, &mut left),
            ("networking.istio.io", _) => {
                left.tell("there is no counterpart here");
                None
            }
            _ => {
                output.print(&document.value);
                continue;
            }
        };
        output.told.extend(left.into_lines().iter().map(|what| document.says(what)));
        match becomes {
            Some(becomes) => output.check(&document, &becomes),
            None => output.told.push(document.says("not converted")),
        }
    }
    for (document, becomes, left) in linkerd::policies(&linkerd) {
        output.told.extend(left.into_lines().iter().map(|what| document.says(what)));
        if let Some(becomes) = becomes {
            output.check(document, &becomes);
        }
    }
    output
}

impl Output {
    /// Prints it, if this version acts on it.
    fn check(&mut self, document: &Document, becomes: &Value) {
        let Ok(text) = serde_yaml::to_string(becomes) else { return };
        let kind = becomes.get("kind").and_then(Value::as_str).unwrap_or_default().to_owned();
        let parsed = parse(&[SourceFile { name: String::new(), text: text.clone() }]);
        match parsed.errors.first() {
            None if parsed.objects == 1 => {
                self.told.extend(parsed.warnings.iter().map(|warning| document.says(&warning.message)));
                self.documents.push(text);
            }
            error => {
                let why = error.map_or("it is passed over", |error| &error.message);
                let what = format!("not converted: this version does not take the {kind} that it becomes: {why}");
                self.told.push(document.says(&what));
            }
        }
    }

    fn print(&mut self, value: &Value) {
        self.documents.extend(serde_yaml::to_string(value));
    }
}

#[cfg(test)]
mod tests;
