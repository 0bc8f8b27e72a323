//! From files to resources: the order of the checks, what concerns several objects at once, and the report.

use std::cell::RefCell;
use std::collections::BTreeMap;

use serde::de::DeserializeSeed;

use super::authorization_policy::RawAuthorizationPolicy;
use super::decode::{UnknownField, decode};
use super::findings::{Finding, Findings, Severity, prefixed};
use super::kind::{Kind, Verdict, classify};
use super::mesh_config::{self, RawMeshConfig};
use super::metadata::{RawMetadata, STANDARD_FIELDS};
use super::nearest::nearest;
use super::path::{Path, Shortened};
use super::peer_authentication::RawPeerAuthentication;
use super::policy_test::RawPolicyTest;
use super::position::{At, locate};
use super::rate_limit_policy::RawRateLimitPolicy;
use super::report::{Found, Place, located, position_of, without_position};
use super::request_authentication::RawRequestAuthentication;
use super::route::{RawGrpcRoute, RawHttpRoute, RawReferenceGrant, RawStreamRoute};
use super::service::{self, RawService};
use super::tree::{Budget, Node, TreeSeed, safe_prefix};
use super::workload::RawWorkload;
use super::{Metadata, Parsed, Remark, Resource, Resources, ServiceAccount, SourceFile};
use crate::route;

/// Longer files are refused unread.
pub const MAX_FILE_BYTES: usize = 1 << 20;
/// The parser's work grows with the square of their number.
const MAX_DIRECTIVES: usize = 16;

/// Reads a set of files as one configuration. Never fails as a whole and never panics: what is wrong is in `errors`,
/// in the order of the files and their lines. What objects say together is not looked at here: `compile::load` does both.
pub fn parse(files: &[SourceFile]) -> Parsed {
    parse_and_check(files, |_| Vec::new())
}

/// The same, and warnings for what `check` remarks about the objects as a whole.
pub fn parse_and_check(files: &[SourceFile], check: impl FnOnce(&Resources) -> Vec<Remark>) -> Parsed {
    let mut loader =
        Loader { files, origins: BTreeMap::new(), resources: Resources::default(), objects: 0, found: Vec::new() };
    for file in 0..files.len() {
        loader.read_file(file);
    }
    let remarks = check(&loader.resources);
    loader.keep_remarks(remarks);
    loader.report()
}

struct Loader<'f> {
    files: &'f [SourceFile],
    /// Every object with a name, also those with errors: kind, namespace, name.
    origins: Origins,
    resources: Resources,
    objects: usize,
    found: Vec<Found>,
}

/// Where an object stands.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Origin {
    file: usize,
    document: usize,
    path: Path,
}

/// The objects that have a name, by kind, namespace and name.
pub(super) type Origins = BTreeMap<(Kind, String, String), Origin>;

impl Origin {
    /// File and line of the object's name.
    pub(super) fn place(&self, files: &[SourceFile]) -> Option<(String, usize)> {
        let file = files.get(self.file)?;
        let (line, _) = locate(file.body(), self.document, &self.path.key("metadata").key("name"), At::Value);
        Some((file.name.clone(), line))
    }
}

impl<'f> Loader<'f> {
    fn read_file(&mut self, file: usize) {
        let text = self.files[file].body();
        if text.len() > MAX_FILE_BYTES {
            self.refuse_file(file, (1, 1), format!("the file is larger than {MAX_FILE_BYTES} bytes: split it"));
            return;
        }
        if text.lines().filter(|line| line.starts_with('%')).count() > MAX_DIRECTIVES {
            self.refuse_file(file, (1, 1), "too many directives (lines that start with `%`): remove them".to_owned());
            return;
        }
        if let Some(offset) = text.find('\u{fffd}') {
            let position = position_of(text, offset);
            self.refuse_file(file, position, "these bytes are not UTF-8 text".to_owned());
            return;
        }
        let budget = Budget::new();
        for (document, deserializer) in serde_yaml::Deserializer::from_str(safe_prefix(text)).enumerate() {
            match TreeSeed::new(&budget).deserialize(deserializer) {
                Ok(tree) => self.read_document(file, document, &tree),
                Err(error) => {
                    // Behind an error of the parser it has lost its way: nothing more can be read from this file.
                    let position = error.location().map(|location| (location.line(), location.column()));
                    let position = position.unwrap_or_else(|| locate(text, document, &Path::default(), At::Value));
                    self.refuse_file(file, position, without_position(&error.to_string(), position));
                    return;
                }
            }
        }
    }

    fn refuse_file(&mut self, file: usize, (line, column): (usize, usize), message: String) {
        self.found.push(Found { file, place: Place::Exact(line, column), severity: Severity::Error, message });
    }

    fn read_document(&mut self, file: usize, document: usize, tree: &Node<'_>) {
        let origin = Origin { file, document, path: Path::default() };
        let mut findings = Findings::default();
        for path in tree.repeated_keys() {
            let message = prefixed(&path, "this key stands here a second time".to_owned());
            findings.add(&path, At::RepeatedKey, Severity::Error, message);
        }
        if findings.has_errors() {
            // Which of the two was meant nobody knows, so the document says nothing.
            self.keep(&origin, findings);
        } else {
            self.read_object(&origin, tree);
        }
    }

    fn read_object(&mut self, origin: &Origin, object: &Node<'_>) {
        let mut findings = Findings::default();
        let path = &origin.path;
        match object {
            Node::Null => return,
            Node::Map(_) => {}
            other => {
                let message =
                    format!("expected an object with apiVersion, kind and metadata, got {}", other.described());
                findings.error(path, message);
                return self.keep(origin, findings);
            }
        }
        let (Some(api_version), Some(kind)) =
            (type_field("apiVersion", object, path, &mut findings), type_field("kind", object, path, &mut findings))
        else {
            return self.keep(origin, findings);
        };
        match classify(api_version, kind) {
            Verdict::Read(kind) => {
                self.read_resource(origin, kind, object, &mut findings);
            }
            Verdict::List => self.read_list(origin, object, &mut findings),
            Verdict::Refuse { about_version, message } => {
                let field = if about_version { "apiVersion" } else { "kind" };
                findings.add(&path.key(field), At::Value, Severity::Error, message);
            }
            Verdict::Ignore(message) => findings.add(&path.key("kind"), At::Value, Severity::Warning, message),
        }
        self.keep(origin, findings);
    }

    /// `kind: List`, what `kubectl get -o yaml` writes.
    fn read_list(&mut self, origin: &Origin, list: &Node<'_>, findings: &mut Findings) {
        let path = origin.path.key("items");
        match list.field("items") {
            Some(Node::List(items)) => {
                for (index, item) in items.iter().enumerate() {
                    self.read_object(&Origin { path: path.index(index), ..origin.clone() }, item);
                }
            }
            None | Some(Node::Null) => {}
            Some(other) => findings.error(&path, format!("expected a list, got {}", other.described())),
        }
    }

    fn read_resource(&mut self, origin: &Origin, kind: Kind, object: &Node<'_>, findings: &mut Findings) {
        let unknown = RefCell::new(Vec::new());
        let sections = Sections { object, origin, unknown: &unknown };
        let path = origin.path.key("metadata");
        let metadata = sections.read::<RawMetadata>("metadata", findings);
        let metadata = metadata.and_then(|metadata| metadata.check(kind, &path, findings));
        if let Some(metadata) = &metadata {
            self.remember(kind, metadata, origin, findings);
        }
        // Without a name the spec is still looked at, so that all mistakes are told at once.
        let metadata = metadata.unwrap_or_default();
        let spec = sections.read_spec(kind, &metadata, findings);
        sections.report_unknown(kind, findings);
        if let Some(spec) = spec
            && !findings.has_errors()
        {
            self.objects += 1;
            spec(&mut self.resources, metadata);
        }
    }

    /// An object that exists already is an error of the second one.
    fn remember(&mut self, kind: Kind, metadata: &Metadata, origin: &Origin, findings: &mut Findings) {
        let key = (kind, metadata.namespace.clone(), metadata.name.clone());
        let Some(first) = self.origins.get(&key) else {
            self.origins.insert(key, origin.clone());
            return;
        };
        let message = format!(
            "{} {}/{} stands already in {}",
            kind.name(),
            metadata.namespace,
            metadata.name,
            self.name_of_place(first)
        );
        findings.add(&origin.path.key("metadata").key("name"), At::Value, Severity::Error, message);
    }

    fn keep_remarks(&mut self, remarks: Vec<Remark>) {
        let found = remarks.into_iter().filter_map(|remark| {
            let at = self.origins.get(&remark.object.key()?)?;
            let other = remark.other.as_ref().and_then(|other| self.origins.get(&other.key()?));
            let place = other.map(|other| self.name_of_place(other)).unwrap_or_default();
            Some(Found {
                file: at.file,
                place: Place::In { document: at.document, path: at.path.key("spec"), at: At::Key },
                severity: Severity::Warning,
                message: remark.message.replace(Remark::PLACE, &place),
            })
        });
        let found: Vec<Found> = found.collect();
        self.found.extend(found);
    }

    /// `FILE:LINE` of an object's name.
    fn name_of_place(&self, origin: &Origin) -> String {
        origin.place(self.files).map_or_else(String::new, |(file, line)| format!("{file}:{line}"))
    }

    fn keep(&mut self, origin: &Origin, findings: Findings) {
        let found = findings.into_vec().into_iter().map(|Finding { path, at, severity, message }| Found {
            file: origin.file,
            place: Place::In { document: origin.document, path, at },
            severity,
            message,
        });
        self.found.extend(found);
    }

    /// Finds the lines, sorts, and cuts what would be too long to read.
    fn report(self) -> Parsed {
        let mut parsed =
            Parsed { resources: self.resources, objects: self.objects, origins: self.origins, ..Parsed::default() };
        let mut by_file: Vec<[Vec<Found>; 2]> = self.files.iter().map(|_| Default::default()).collect();
        for found in self.found {
            by_file[found.file][found.severity as usize].push(found);
        }
        for (file, [errors, warnings]) in self.files.iter().zip(by_file) {
            parsed.errors.extend(located(file, errors, "errors"));
            parsed.warnings.extend(located(file, warnings, "warnings"));
        }
        parsed
    }
}

/// Puts a spec that is right where it belongs.
type Store = Box<dyn FnOnce(&mut Resources, Metadata)>;
type Objects<S> = BTreeMap<(String, String), Resource<S>>;

/// Stores among the objects of its kind.
fn among<S: 'static>(objects: fn(&mut Resources) -> &mut Objects<S>, spec: S) -> Store {
    Box::new(move |resources, metadata| {
        let key = (metadata.namespace.clone(), metadata.name.clone());
        objects(resources).insert(key, Resource { metadata, spec });
    })
}

/// The parts of one object.
struct Sections<'o, 'u> {
    object: &'o Node<'o>,
    origin: &'o Origin,
    unknown: &'u RefCell<Vec<UnknownField<'o>>>,
}

impl<'o> Sections<'o, '_> {
    fn read<T: serde::Deserialize<'o> + Default>(&self, section: &str, findings: &mut Findings) -> Option<T> {
        let Some(node) = self.object.field(section) else { return Some(T::default()) };
        match decode(node, &self.origin.path.key(section), self.unknown) {
            Ok(value) => Some(value),
            Err(mismatch) => {
                let (path, at) = mismatch.place.unwrap_or_else(|| (self.origin.path.key(section), At::Value));
                let message = prefixed(&path, mismatch.message);
                findings.add(&path, at, Severity::Error, message);
                None
            }
        }
    }

    fn read_spec(&self, kind: Kind, metadata: &Metadata, findings: &mut Findings) -> Option<Store> {
        let path = self.origin.path.key("spec");
        let metadata_path = self.origin.path.key("metadata");
        Some(match kind {
            Kind::MeshConfig => {
                mesh_config::check_name(metadata, &metadata_path, findings);
                let mesh = self.read::<RawMeshConfig>("spec", findings)?.check(&path, findings);
                Box::new(move |resources, _| resources.mesh = mesh)
            }
            Kind::Workload => {
                let raw: RawWorkload = self.read("spec", findings)?;
                among(|all| &mut all.workloads, raw.check(metadata, &path, findings)?)
            }
            Kind::PeerAuthentication => {
                let raw: RawPeerAuthentication = self.read("spec", findings)?;
                among(|all| &mut all.peer_authentications, raw.check(metadata, &path, findings))
            }
            Kind::PolicyTest => {
                let raw: RawPolicyTest = self.read("spec", findings)?;
                among(|all| &mut all.policy_tests, raw.check(metadata, &path, findings))
            }
            Kind::AuthorizationPolicy => {
                let raw: RawAuthorizationPolicy = self.read("spec", findings)?;
                among(|all| &mut all.authorization_policies, raw.check(metadata, &path, findings))
            }
            Kind::HttpRoute => {
                let raw: RawHttpRoute = self.read("spec", findings)?;
                among(|all| &mut all.http_routes, raw.check(metadata, &path, findings))
            }
            Kind::GrpcRoute => {
                let raw: RawGrpcRoute = self.read("spec", findings)?;
                among(|all| &mut all.grpc_routes, raw.check(metadata, &path, findings))
            }
            Kind::TlsRoute => {
                let raw: RawStreamRoute = self.read("spec", findings)?;
                among(|all| &mut all.tls_routes, raw.check(route::Kind::Tls, metadata, &path, findings))
            }
            Kind::TcpRoute => {
                let raw: RawStreamRoute = self.read("spec", findings)?;
                among(|all| &mut all.tcp_routes, raw.check(route::Kind::Tcp, metadata, &path, findings))
            }
            Kind::ReferenceGrant => {
                let raw: RawReferenceGrant = self.read("spec", findings)?;
                among(|all| &mut all.reference_grants, raw.check(&path, findings))
            }
            Kind::RequestAuthentication => {
                let raw: RawRequestAuthentication = self.read("spec", findings)?;
                among(|all| &mut all.request_authentications, raw.check(metadata, &path, findings))
            }
            Kind::RateLimitPolicy => {
                let raw: RawRateLimitPolicy = self.read("spec", findings)?;
                among(|all| &mut all.rate_limit_policies, raw.check(metadata, &path, findings))
            }
            Kind::Service => {
                service::check_annotations(metadata, &metadata_path, findings);
                let raw: RawService = self.read("spec", findings)?;
                among(|all| &mut all.services, raw.check(&path, findings))
            }
            Kind::ServiceAccount => among(|all| &mut all.service_accounts, ServiceAccount {}),
        })
    }

    /// In own kinds unknown fields are errors; in adopted ones warnings, unless they change nothing.
    fn report_unknown(&self, kind: Kind, findings: &mut Findings) {
        self.collect_top_level(kind);
        for field in self.unknown.take() {
            let path = field.parent.key(field.field);
            let shape = path.shape_below(&self.origin.path);
            if STANDARD_FIELDS.contains(&shape.as_str()) {
                continue;
            }
            if kind.facts().strict {
                findings.add(&path, At::Key, Severity::Error, prefixed(&field.parent, field.message()));
            } else if !changes_nothing(kind, &shape, field.value) {
                let hint = match nearest(field.field, field.known) {
                    Some((name, true)) => format!("; did you mean `{name}`?"),
                    Some((_, false)) | None => String::new(),
                };
                let message = format!("field {} is not acted on{hint}", Shortened(field.field));
                findings.add(&path, At::Key, Severity::Warning, prefixed(&field.parent, message));
            }
        }
    }

    fn collect_top_level(&self, kind: Kind) {
        let known: &'static [&'static str] = match kind.facts().spec {
            true => &["apiVersion", "kind", "metadata", "spec"],
            false => &["apiVersion", "kind", "metadata"],
        };
        let Node::Map(entries) = self.object else { return };
        for (field, value) in entries.iter().filter(|(field, _)| !known.contains(&field.as_ref())) {
            let parent = self.origin.path.clone();
            self.unknown.borrow_mut().push(UnknownField { parent, field, value, known });
        }
    }
}

fn changes_nothing(kind: Kind, shape: &str, value: &Node<'_>) -> bool {
    let facts = kind.facts();
    let standard =
        |(field, standard): &(&str, &str)| *field == shape && matches!(value, Node::Text(text) if text == standard);
    facts.silent_fields.contains(&shape) || facts.silent_values.iter().any(standard)
}

/// `apiVersion` or `kind`: text that must be there.
fn type_field<'o>(name: &str, object: &'o Node<'_>, path: &Path, findings: &mut Findings) -> Option<&'o str> {
    match object.field(name) {
        Some(Node::Text(text)) => Some(text),
        Some(other) => {
            findings.error(&path.key(name), format!("expected text, got {}", other.described()));
            None
        }
        None => {
            findings.error(path, format!("`{name}` is missing: every document says its apiVersion and kind"));
            None
        }
    }
}
