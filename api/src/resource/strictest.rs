//! What a file protects although it cannot be used. A PeerAuthentication with a typo is no reason to take plaintext, and an
//! AuthorizationPolicy or RequestAuthentication with one no reason to let everybody in: where no good version of the file is known, each document of a security kind in it counts as the strictest that it could mean.
//! Pure; called by the control plane for files that are not in force, and by `outrigger validate` to say so beforehand.

use serde::de::DeserializeSeed;

use super::load::parse;
use super::nearest::nearest;
use super::tree::{Budget, Node, TreeSeed, safe_prefix};
use super::{
    Attachment, AuthorizationPolicy, Labels, Metadata, PeerAuthentication, Problem, RequestAuthentication, Resource,
    Selector, SourceFile,
};
use crate::identity::ROOT_NAMESPACE;
use crate::name::is_label;
use crate::policy::authorization::{Action, Rule};
use crate::snapshot::MtlsMode;

/// See [`strictest`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Strictest {
    /// Documents that are right, as they are, and STRICT for the scope of those that are not. The names of the latter are
    /// no names of objects.
    pub policies: Vec<Resource<PeerAuthentication>>,
    /// The same of AuthorizationPolicies: those that are right, and a DENY of everything for the scope of those that are not.
    pub authorization: Vec<Resource<AuthorizationPolicy>>,
    /// The same of RequestAuthentications: those that are right, and for the scope of those that are not one that requires a
    /// token and takes none.
    pub authentication: Vec<Resource<RequestAuthentication>>,
    /// A MeshConfig that may have said `defaultAction: Deny`.
    pub deny_by_default: bool,
    /// A MeshConfig that may have said `outbound.mode: RegistryOnly`.
    pub registry_only: bool,
    /// What is in force because of it, for people; each stands where its document begins.
    pub notes: Vec<Problem>,
}

/// Reads a file that has errors. A document that cannot even be parsed is one of a security kind when its text says so.
pub fn strictest(file: &SourceFile) -> Strictest {
    let mut found = Strictest::default();
    // UTF-16, which is no text here, has a zero beside each letter.
    let text = file.body().replace('\0', "");
    for (line, document) in documents(&text) {
        let reader = Reader { file, line };
        match tree(document) {
            Some(tree) => reader.read(document, &tree, &mut found),
            None => reader.guess(document, &mut found),
        }
    }
    found
}

/// What holds for a file of which nothing can be read, not even its kind: STRICT for the mesh.
pub fn unreadable(file: &str) -> Strictest {
    let mut found = Strictest::default();
    let file = SourceFile { name: file.to_owned(), text: String::new() };
    Reader { file: &file, line: 1 }.strict(Scope::mesh(), "this file", &mut found);
    found
}

/// The documents of a text and the lines at which they begin. A line of `---` separates two wherever it stands, so that one
/// broken document does not hide those behind it.
fn documents(text: &str) -> Vec<(usize, &str)> {
    let mut documents = Vec::new();
    let (mut start, mut start_line) = (0, 1);
    let mut offset = 0;
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let separates =
            line.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace));
        if separates && offset > start {
            documents.push((start_line, &text[start..offset]));
            (start, start_line) = (offset, number + 1);
        }
        offset += line.len();
    }
    documents.push((start_line, &text[start..]));
    documents.retain(|(_, document)| !document.trim().is_empty());
    documents
}

fn tree(document: &str) -> Option<Node<'_>> {
    if document.contains('\u{fffd}') {
        return None;
    }
    let budget = Budget::new();
    let mut deserializers = serde_yaml::Deserializer::from_str(safe_prefix(document));
    let tree = TreeSeed::new(&budget).deserialize(deserializers.next()?).ok()?;
    // What stands behind it is its own document's affair only where a separator says so.
    deserializers
        .all(|rest| TreeSeed::new(&budget).deserialize(rest).is_ok_and(|rest| rest == Node::Null))
        .then_some(tree)
}

/// Whom a policy concerns.
#[derive(Clone, Debug, PartialEq)]
struct Scope {
    namespace: String,
    selector: Option<Labels>,
}

impl Scope {
    fn mesh() -> Scope {
        Scope { namespace: ROOT_NAMESPACE.to_owned(), selector: None }
    }

    fn attachment(&self) -> Attachment {
        let selector = self.selector.clone().map(|match_labels| Selector { match_labels });
        Attachment { selector, services: Vec::new() }
    }
}

impl std::fmt::Display for Scope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.selector {
            None if self.namespace == ROOT_NAMESPACE => f.write_str("the whole mesh"),
            None => write!(f, "namespace {}", self.namespace),
            Some(labels) => {
                let labels: Vec<String> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
                write!(f, "workloads with {} in namespace {}", labels.join(","), self.namespace)
            }
        }
    }
}

/// Reads one document.
struct Reader<'f> {
    file: &'f SourceFile,
    line: usize,
}

impl Reader<'_> {
    fn read(&self, document: &str, tree: &Node<'_>, found: &mut Strictest) {
        let alone = SourceFile { name: self.file.name.clone(), text: document.to_owned() };
        let good = parse(&[alone]).resources;
        let (good, good_authorization, good_authentication) =
            (good.peer_authentications, good.authorization_policies, good.request_authentications);
        let is_among = |keys: &dyn Fn(&(String, String)) -> bool, object: &Node<'_>| {
            let name = object.field("metadata").and_then(|metadata| text(metadata, "name"));
            namespace(object).zip(name).is_some_and(|(namespace, name)| keys(&(namespace, name.to_owned())))
        };
        let objects = match tree {
            Node::List(items) => items.iter().collect(),
            object => match object.field("items") {
                Some(Node::List(items)) => items.iter().collect(),
                _ => vec![object],
            },
        };
        let mut kept = false;
        for object in objects {
            if is_mesh_config(object) {
                self.outbound(object, found);
                self.default_action(object, found);
            }
            if is_of_kind(object, "RequestAuthentication") {
                if !is_among(&|key| good_authentication.contains_key(key), object) {
                    self.take_no_token(scope(object), "this RequestAuthentication", found);
                }
                continue;
            }
            if is_of_kind(object, "AuthorizationPolicy") {
                let good = is_among(&|key| good_authorization.contains_key(key), object);
                if !good && !is_surely_no_refusal(object) {
                    self.deny(scope(object), "this AuthorizationPolicy", found);
                }
                continue;
            }
            if !is_peer_authentication(object) {
                continue;
            }
            let name = (namespace(object), object.field("metadata").and_then(|metadata| text(metadata, "name")));
            match name {
                (Some(namespace), Some(name)) if good.contains_key(&(namespace.clone(), name.to_owned())) => {
                    kept = true
                }
                _ if is_surely_not_strict(object) => {}
                _ => self.strict(scope(object), "this PeerAuthentication", found),
            }
        }
        if kept {
            found.policies.extend(good.into_values());
        }
        found.authorization.extend(good_authorization.into_values());
        found.authentication.extend(good_authentication.into_values());
    }

    /// The text of a document that is no YAML.
    fn guess(&self, document: &str, found: &mut Strictest) {
        let lower = document.to_lowercase();
        let mentions = |words: &[&str]| words.iter().any(|word| lower.contains(word));
        let kinds = lower.lines().filter_map(|line| line.trim_start_matches(['-', ' ', '{']).split_once(':'));
        let kinds = kinds.filter(|(key, _)| is_like(key.trim().trim_matches('"'), "kind"));
        let mut kinds = kinds.map(|(_, value)| value.trim().trim_matches(['"', '\'', ',']));
        if mentions(&["peerauth", "mtls", "strict"]) || kinds.any(|kind| names(kind, "PeerAuthentication")) {
            self.strict(Scope::mesh(), "this document", found);
        }
        if mentions(&["authorizationpolic"]) {
            self.deny(Scope::mesh(), "this document", found);
        }
        if mentions(&["requestauth", "jwtrules"]) {
            self.take_no_token(Scope::mesh(), "this document", found);
        }
        if mentions(&["meshconfig"]) && mentions(&["defaultaction"]) && mentions(&["deny"]) {
            self.deny_by_default(found);
        }
        if mentions(&["meshconfig"]) && mentions(&["registryonly", "outbound"]) {
            self.registry_only(found);
        }
    }

    fn strict(&self, scope: Scope, what: &str, found: &mut Strictest) {
        self.note(format!("until {what} is mended, mTLS is STRICT for {scope}, because it may have said so"), found);
        // No object can have such a name.
        let name = format!("~{}:{}#{}", self.file.name, self.line, found.policies.len());
        let metadata = Metadata { name, namespace: scope.namespace, ..Metadata::default() };
        let selector = scope.selector.map(|match_labels| Selector { match_labels });
        let spec = PeerAuthentication { selector, mode: Some(MtlsMode::Strict), port_level: Default::default() };
        found.policies.push(Resource { metadata, spec });
    }

    fn deny(&self, scope: Scope, what: &str, found: &mut Strictest) {
        let message = format!("until {what} is mended, every call to {scope} is refused, because it may have said so");
        self.note(message, found);
        // No object can have such a name.
        let name = format!("~{}:{}#{}", self.file.name, self.line, found.authorization.len());
        let attachment = scope.attachment();
        let metadata = Metadata { name, namespace: scope.namespace, ..Metadata::default() };
        let spec =
            AuthorizationPolicy { attachment, action: Action::Deny, shadow: false, rules: vec![Rule::default()] };
        found.authorization.push(Resource { metadata, spec });
    }

    fn take_no_token(&self, scope: Scope, what: &str, found: &mut Strictest) {
        let message = format!(
            "until {what} is mended, every request to {scope} is refused as one without a valid token, because it may have \
             said so"
        );
        self.note(message, found);
        // No object can have such a name.
        let name = format!("~{}:{}#{}", self.file.name, self.line, found.authentication.len());
        let spec = RequestAuthentication { attachment: scope.attachment(), required: true, rules: Vec::new() };
        let metadata = Metadata { name, namespace: scope.namespace, ..Metadata::default() };
        found.authentication.push(Resource { metadata, spec });
    }

    fn default_action(&self, object: &Node<'_>, found: &mut Strictest) {
        let Some(spec) = once(object, "spec") else {
            if holds(object, "spec") {
                self.deny_by_default(found);
            }
            return;
        };
        match once(spec, "defaultAction") {
            Some(Node::Text(action)) if action == "Allow" => {}
            None if !holds(spec, "defaultAction") => {}
            Some(_) | None => self.deny_by_default(found),
        }
    }

    fn deny_by_default(&self, found: &mut Strictest) {
        if !std::mem::replace(&mut found.deny_by_default, true) {
            let message = "until this MeshConfig is mended, defaultAction is Deny, because it may have said so";
            self.note(message.to_owned(), found);
        }
    }

    /// A mode that can be read is the one that is meant.
    fn outbound(&self, object: &Node<'_>, found: &mut Strictest) {
        let Some(spec) = once(object, "spec") else {
            if holds(object, "spec") {
                self.registry_only(found);
            }
            return;
        };
        let mode = once(spec, "outbound").and_then(|outbound| once(outbound, "mode"));
        match mode {
            Some(Node::Text(mode)) if mode == "AllowAny" => {}
            None if !holds(spec, "outbound") => {}
            Some(_) | None => self.registry_only(found),
        }
    }

    fn registry_only(&self, found: &mut Strictest) {
        if !std::mem::replace(&mut found.registry_only, true) {
            let message = "until this MeshConfig is mended, outbound.mode is RegistryOnly, because it may have said so";
            self.note(message.to_owned(), found);
        }
    }

    fn note(&self, message: String, found: &mut Strictest) {
        let (file, line) = (self.file.name.clone(), self.line);
        found.notes.push(Problem { file, line, column: 1, message });
    }
}

/// The value of a key that stands there once.
fn once<'n, 't>(node: &'n Node<'t>, key: &str) -> Option<&'n Node<'t>> {
    let Node::Map(entries) = node else { return None };
    let mut values = entries.iter().filter(|(name, _)| name == key).map(|(_, value)| value);
    let value = values.next()?;
    values.next().is_none().then_some(value)
}

/// Whether a key is there, or one that is probably a slip for it.
fn holds(node: &Node<'_>, key: &str) -> bool {
    match node {
        Node::Map(entries) => entries.iter().any(|(name, _)| is_like(name, key)),
        Node::Null => false,
        _ => true,
    }
}

fn is_like(word: &str, known: &str) -> bool {
    nearest(word, &[known]).is_some_and(|(_, near)| near)
}

fn text<'n>(node: &'n Node<'_>, key: &str) -> Option<&'n str> {
    match once(node, key)? {
        Node::Text(text) => Some(text),
        _ => None,
    }
}

fn is_peer_authentication(object: &Node<'_>) -> bool {
    let Node::Map(entries) = object else { return false };
    if is_of_kind(object, "PeerAuthentication") {
        return true;
    }
    let names_a_kind = entries.iter().any(|(key, value)| key == "kind" && matches!(value, Node::Text(_)));
    !names_a_kind
        && entries.iter().any(|(_, section)| {
            once(section, "mtls").is_some() || holds(section, "portLevelMtls") && matches!(section, Node::Map(_))
        })
}

/// Whether an object says its kind, or nearly, under whatever key: that may be what is wrong.
fn is_of_kind(object: &Node<'_>, kind: &str) -> bool {
    let Node::Map(entries) = object else { return false };
    entries.iter().any(|(_, value)| matches!(value, Node::Text(text) if names(text, kind)))
}

/// Whether a word is a security kind's name, or nearer to it than to another one's.
fn names(word: &str, kind: &str) -> bool {
    const KINDS: [&str; 3] = ["PeerAuthentication", "AuthorizationPolicy", "RequestAuthentication"];
    nearest(word, &KINDS) == Some((kind, true))
}

/// Whether the document says that it refuses nothing, whatever is wrong with the rest of it.
fn is_surely_no_refusal(object: &Node<'_>) -> bool {
    let says = |key: &str, word: &str| {
        let value = once(object, "spec").and_then(|spec| once(spec, key));
        matches!(value, Some(Node::Text(text)) if text == word)
    };
    says("mode", "Shadow") || says("action", "AUDIT")
}

fn is_mesh_config(object: &Node<'_>) -> bool {
    let Node::Map(entries) = object else { return false };
    entries.iter().any(|(_, value)| matches!(value, Node::Text(text) if is_like(text, "MeshConfig")))
}

/// None: it cannot be told which is meant.
fn namespace(object: &Node<'_>) -> Option<String> {
    let metadata = once(object, "metadata").filter(|metadata| matches!(metadata, Node::Map(_)))?;
    match once(metadata, "namespace") {
        Some(Node::Text(namespace)) if is_label(namespace) => Some(namespace.clone().into_owned()),
        None if !holds(metadata, "namespace") => Some("default".to_owned()),
        Some(_) | None => None,
    }
}

fn scope(object: &Node<'_>) -> Scope {
    let Some(namespace) = namespace(object) else { return Scope::mesh() };
    // A selector that cannot be read may have meant any workload of the namespace.
    let labels = || {
        let selector = once(once(object, "spec")?, "selector")?;
        let Node::Map(parts) = selector else { return None };
        let Some(Node::Map(labels)) = once(selector, "matchLabels") else { return None };
        let pairs = labels.iter().map(|(key, value)| match value {
            Node::Text(value) => Some((key.clone().into_owned(), value.clone().into_owned())),
            _ => None,
        });
        let labels: Labels = pairs.collect::<Option<_>>()?;
        (parts.len() == 1 && !labels.is_empty() && selector.repeated_keys().is_empty()).then_some(labels)
    };
    Scope { selector: labels(), namespace }
}

/// Whether the document says PERMISSIVE, DISABLE or nothing, whatever is wrong with the rest of it. It then makes nothing
/// stricter, and what it would have loosened stays.
fn is_surely_not_strict(object: &Node<'_>) -> bool {
    let Some(spec @ Node::Map(fields)) = once(object, "spec") else { return false };
    let loose =
        |mode: &Node<'_>| matches!(mode, Node::Text(mode) if ["PERMISSIVE", "DISABLE", "UNSET"].contains(&&**mode));
    let mode = once(spec, "mtls").is_some_and(|mtls| match mtls {
        Node::Map(parts) => parts.len() == 1 && once(mtls, "mode").is_some_and(loose),
        _ => false,
    });
    let others = fields.iter().filter(|(key, _)| key != "mtls" && key != "selector");
    mode && others.into_iter().all(|(key, _)| !is_like(key, "mtls") && !is_like(key, "portLevelMtls"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "apiVersion: outrigger.dev/v1alpha1\nkind: PeerAuthentication\nmetadata: {name: a, namespace: shop}\n\
                        spec: {mtls: {mode: STRICT}}\n";

    /// The scopes, as people read them, that are STRICT because of a text.
    fn strict(text: &str) -> Vec<String> {
        let found = strictest(&SourceFile { name: "a.yaml".into(), text: text.to_owned() });
        let scope = |policy: &Resource<PeerAuthentication>| {
            let selector = policy.spec.selector.as_ref().map(|selector| selector.match_labels.clone());
            let scope = Scope { namespace: policy.metadata.namespace.clone(), selector };
            if policy.spec.mode == Some(MtlsMode::Strict) {
                scope.to_string()
            } else {
                format!("{:?}", policy.spec.mode)
            }
        };
        found.policies.iter().map(scope).collect()
    }

    #[test]
    fn a_broken_policy_is_strict_for_the_scope_that_it_names() {
        let root = GOOD.replace("shop", "outrigger-system");
        let labelled = GOOD.replace("spec: {", "spec: {selector: {matchLabels: {app: cart}}, ");
        let (mesh, shop) = ("the whole mesh", "namespace shop");
        let cart = "workloads with app=cart in namespace shop";
        for (what, text, expected) in [
            ("a mode that is none", GOOD.replace("STRICT", "STRCIT"), &[shop][..]),
            ("a field that is none", GOOD.replace("mode:", "mod:"), &[shop]),
            ("another's group", GOOD.replace("outrigger.dev/v1alpha1", "security.istio.io/v1"), &[shop]),
            ("a misspelt kind", GOOD.replace("PeerAuthentication", "PeerAuthentcation"), &[shop]),
            ("no kind", GOOD.replace("kind: PeerAuthentication\n", ""), &[shop]),
            ("a misspelt key of the kind", GOOD.replace("kind:", "knid:"), &[shop]),
            ("the mesh's own", root.replace("STRICT", "STRCIT"), &[mesh]),
            ("labels", labelled.replace("STRICT", "STRCIT"), &[cart]),
            ("a misspelt selector", labelled.replace("selector", "selectr"), &[shop]),
            ("labels that are none", labelled.replace("{app: cart}", "[app, cart]"), &[shop]),
            ("a misspelt namespace key", GOOD.replace("namespace:", "namespce:").replace("STRICT", "X"), &[mesh]),
            ("a namespace that is none", GOOD.replace("shop", "Shop_1"), &[mesh]),
            ("no metadata", GOOD.replace("metadata:", "metdata:"), &[mesh]),
            ("two namespaces", GOOD.replace("namespace: shop", "namespace: shop, namespace: web"), &[mesh]),
            ("no namespace", GOOD.replace(", namespace: shop", "").replace("STRICT", "X"), &["namespace default"]),
            ("no YAML", GOOD.replace("}}", "}"), &[mesh]),
            ("no YAML, upper case", GOOD.replace("}}", "}").to_uppercase(), &[mesh]),
            ("no UTF-8", GOOD.replace("name: a", "name: \u{fffd}"), &[mesh]),
            ("UTF-16", GOOD.chars().flat_map(|c| [c, '\0']).collect::<String>() + "\u{fffd}", &[mesh]),
            ("a tab", GOOD.replace("spec: ", "spec:\n\t"), &[mesh]),
            ("a right one beside a wrong Service", format!("kind: [\n---\n{GOOD}---\nkind: Service\n"), &[shop]),
            ("wrong ones behind a broken one", format!("{{\n---\n{}", GOOD.replace("STRICT", "X")), &[shop]),
            (
                "in a list",
                "apiVersion: v1\nkind: List\nitems:\n- {kind: PeerAuthentication, metadata: {namespace: shop}, spec: 1}\n".into(),
                &[shop],
            ),
            ("surely permissive", GOOD.replace("STRICT}", "PERMISSIVE}, foo: 1"), &[]),
            ("permissive, ports unknown", GOOD.replace("STRICT}", "PERMISSIVE}, portLevelMtl: {80: 1}"), &[shop]),
            (
                "permissive and right",
                format!("{}---\nkind: [\n", GOOD.replace("STRICT", "PERMISSIVE")),
                &["Some(Permissive)"],
            ),
            ("a Service", "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {prts: 1}\n".to_owned(), &[]),
            ("a Service that is no YAML", "kind: Service\nspec: {\n".to_owned(), &[]),
            ("no object at all", "no: document\n".to_owned(), &[]),
            ("text", "hello\n".to_owned(), &[]),
            ("nothing", String::new(), &[]),
        ] {
            assert_eq!(strict(&text), expected, "{what}:\n{text}");
        }
    }

    #[test]
    fn a_broken_authorization_policy_refuses_everything_in_its_scope() {
        let good = "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: a, namespace: shop}\n\
                    spec: {selector: {matchLabels: {app: pay}}, action: DENY, rules: [{}]}\n";
        let other = good.replace("name: a", "name: b").replace("DENY", "ALLOW");
        for (text, expected) in [
            (good.replace("DENY", "DENNY"), &["workloads with app=pay in namespace shop"][..]),
            (good.replace("selector", "selectr"), &["namespace shop"]),
            (
                good.replace("namespace: shop", "namespace: outrigger-system").replace("selector", "s"),
                &["the whole mesh"],
            ),
            (good.replace("AuthorizationPolicy", "AuthorizationPolcy"), &["workloads with app=pay in namespace shop"]),
            (good.replace("[{}]}", "[{}]"), &["the whole mesh"]),
            (good.replace("DENY", "DENNY, mode: Shadow"), &[]),
            (good.replace("DENY", "AUDIT, x: 1"), &[]),
            (
                format!("{}---\n{other}", good.replace("DENY", "DENNY")),
                &["workloads with app=pay in namespace shop", "kept"],
            ),
        ] {
            let found = strictest(&SourceFile { name: "a.yaml".into(), text: text.clone() });
            let scope = |policy: &Resource<AuthorizationPolicy>| match policy.metadata.name.starts_with('~') {
                true => {
                    let selector =
                        policy.spec.attachment.selector.as_ref().map(|selector| selector.match_labels.clone());
                    Scope { namespace: policy.metadata.namespace.clone(), selector }.to_string()
                }
                false => "kept".to_owned(),
            };
            assert_eq!(found.authorization.iter().map(scope).collect::<Vec<_>>(), expected, "{text}");
        }
    }

    #[test]
    fn a_broken_request_authentication_takes_no_token_in_its_scope() {
        let good = "apiVersion: outrigger.dev/v1alpha1\nkind: RequestAuthentication\nmetadata: {name: a, namespace: shop}\n\
                    spec: {selector: {matchLabels: {app: pay}}, jwtRules: [{issuer: a, jwksUri: 'https://a.test'}]}\n";
        let other = good.replace("name: a", "name: b");
        for (text, expected) in [
            (good.replace("issuer", "isuer"), &["workloads with app=pay in namespace shop"][..]),
            (good.replace("selector", "selectr"), &["namespace shop"]),
            (good.replace("https", "http"), &["workloads with app=pay in namespace shop"]),
            (
                good.replace("RequestAuthentication", "RequestAuthentcation"),
                &["workloads with app=pay in namespace shop"],
            ),
            (good.replace("}]}", "}}"), &["the whole mesh"]),
            (
                format!("{}---\n{other}", good.replace("issuer", "i")),
                &["workloads with app=pay in namespace shop", "kept"],
            ),
        ] {
            let found = strictest(&SourceFile { name: "a.yaml".into(), text: text.clone() });
            let scope = |policy: &Resource<RequestAuthentication>| match policy.metadata.name.starts_with('~') {
                true => {
                    assert!(policy.spec.required && policy.spec.rules.is_empty());
                    let selector =
                        policy.spec.attachment.selector.as_ref().map(|selector| selector.match_labels.clone());
                    Scope { namespace: policy.metadata.namespace.clone(), selector }.to_string()
                }
                false => "kept".to_owned(),
            };
            assert_eq!(found.authentication.iter().map(scope).collect::<Vec<_>>(), expected, "{text}");
            assert!(found.policies.is_empty() && found.authorization.is_empty(), "{text}");
        }
    }

    #[test]
    fn a_broken_mesh_config_may_have_denied_by_default() {
        let config = "apiVersion: outrigger.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: default, namespace: \
                      outrigger-system}\nspec: {defaultAction: Deny, x: 1}\n";
        for (text, expected) in [
            (config.to_owned(), true),
            (config.replace("Deny", "Dny"), true),
            (config.replace("defaultAction", "defaultActon"), true),
            (config.replace("x: 1}", ""), true),
            (config.replace("Deny", "Allow"), false),
            (config.replace("defaultAction: Deny", "tracing: {rate: 3}"), false),
        ] {
            let found = strictest(&SourceFile { name: "a.yaml".into(), text: text.clone() });
            assert_eq!(found.deny_by_default, expected, "{text}");
        }
    }

    #[test]
    fn a_broken_mesh_config_may_have_closed_the_way_out() {
        let config = "apiVersion: outrigger.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: default, namespace: \
                      outrigger-system}\nspec: {outbound: {mode: RegistryOnly}, x: 1}\n";
        for (text, expected) in [
            (config.to_owned(), true),
            (config.replace("RegistryOnly", "RegstryOnly"), true),
            (config.replace("outbound", "outbund"), true),
            (config.replace("mode", "mod"), true),
            (config.replace("x: 1}", ""), true),
            (config.replace("RegistryOnly", "AllowAny"), false),
            (config.replace("outbound: {mode: RegistryOnly}", "tracing: {rate: 3}"), false),
        ] {
            let found = strictest(&SourceFile { name: "a.yaml".into(), text: text.clone() });
            assert_eq!((found.registry_only, found.notes.len()), (expected, usize::from(expected)), "{text}");
        }
    }

    #[test]
    fn a_note_says_where_and_what() {
        let text = format!("kind: Service\n---\n# why\n{}", GOOD.replace("mode:", "mod:"));
        let found = strictest(&SourceFile { name: "a.yaml".into(), text });
        let notes: Vec<String> = found.notes.iter().map(ToString::to_string).collect();
        let expected = "a.yaml:2:1: until this PeerAuthentication is mended, mTLS is STRICT for namespace shop, because it may have said so";
        assert_eq!(notes, [expected]);
        let nothing = unreadable("b.yaml");
        assert_eq!(nothing.policies[0].metadata.namespace, ROOT_NAMESPACE);
        assert!(nothing.notes[0].to_string().starts_with("b.yaml:1:1: until this file"), "{:?}", nothing.notes);
    }
}
