//! `outrigger explain`: what would happen to a request or connection, and why. Offline it reads the YAML that a control
//! plane would read; without a path it asks a running sidecar, which answers with what it knows now. The decisions are
//! those of the data path (`outrigger_api::explain`).

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use outrigger_api::compile::load;
use outrigger_api::explain::{Asked, Question, WrittenQuestion, explain};
use outrigger_api::facts::Claims;
use outrigger_api::identity::{DEFAULT_TRUST_DOMAIN, SpiffeId, TrustDomain};
use outrigger_api::name::ServiceName;
use outrigger_api::resource::time::unix_time;
use outrigger_api::resource::{Parsed, SourceFile};
use outrigger_runtime::{config_dir, stdout};
use serde_json::Value;

use crate::fetch;
use crate::status::run;
use crate::table::{printable, span};

/// It would not arrive.
const NOT_FORWARDED: u8 = 1;
const USAGE: u8 = 2;
/// The YAML has errors.
pub(crate) const INVALID: u8 = 3;

#[derive(clap::Args)]
#[command(
    override_usage = "outrigger explain [PATH]... --from WHO --to SERVICE[.NAMESPACE][:PORT] [METHOD TARGET] [-H 'Name: value']...
       outrigger explain REQUEST-ID [--admin HOST:PORT]",
    after_help = "Without METHOD and TARGET a connection of bytes is meant, which nobody parses. Ends with 0 when an \
                  application would get it, 1 when it is refused or fails, 2 for a mistake on the line, 3 when the YAML \
                  is not valid."
)]
pub(crate) struct Args {
    /// Files or directories as the control plane's --config reads them; then METHOD and TARGET. Without a path the
    /// sidecar at --admin is asked. Alone, without --from and --to: the x-request-id or trace id of a request that this
    /// sidecar refused or could not forward, one of its last 1,000
    #[arg(value_name = "PATH")]
    words: Vec<String>,
    /// Who calls: NAMESPACE/SERVICEACCOUNT, a SPIFFE id, or `plaintext`
    #[arg(long, value_name = "WHO", requires = "to", required_unless_present = "words")]
    from: Option<String>,
    /// The caller's address
    #[arg(long, value_name = "IP")]
    from_ip: Option<IpAddr>,
    /// What is called; without a port the Service's first
    #[arg(long, value_name = "SERVICE[.NAMESPACE][:PORT]", requires = "from")]
    to: Option<String>,
    /// A header of the request; may be repeated
    #[arg(short = 'H', long = "header", value_name = "Name: value")]
    headers: Vec<String>,
    /// Of a connection: the server name that the application's own TLS asks for
    #[arg(long, value_name = "NAME")]
    sni: Option<String>,
    /// What a verified token says: a JSON object, or @FILE with one
    #[arg(long, value_name = "JSON|@FILE", conflicts_with = "token")]
    claims: Option<String>,
    /// The request's token, which is verified, or @FILE with it
    #[arg(long, value_name = "TOKEN|@FILE")]
    token: Option<String>,
    /// Tokens and rules about the time are asked for this moment (RFC 3339); else now
    #[arg(long, value_name = "TIME")]
    at: Option<String>,
    /// The admin address of a running sidecar
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:15000")]
    admin: String,
    #[arg(short, long, value_name = "FORMAT", default_value = "text", value_parser = ["text", "json"])]
    output: String,
}

pub(crate) fn command(args: &Args) -> ExitCode {
    let mut paths: Vec<PathBuf> = Vec::new();
    let words = args.words.as_slice();
    let asked = match words {
        [before @ .., method, target] if is_request(method, target) => {
            paths.extend(before.iter().map(PathBuf::from));
            Some((method.clone(), target.clone()))
        }
        _ => {
            paths.extend(words.iter().map(PathBuf::from));
            None
        }
    };
    let answer = if args.from.is_none() {
        ask_by_id(args)
    } else if paths.is_empty() {
        ask_sidecar(args, asked)
    } else {
        ask_files(args, &paths, asked)
    };
    match answer {
        Ok(answer) => {
            let text = match args.output.as_str() {
                "json" => serde_json::to_string_pretty(&answer).unwrap_or_default(),
                _ => text(&answer),
            };
            stdout::say(&text);
            let arrives = matches!(answer["verdict"].as_str(), Some("forwarded" | "redirected"));
            ExitCode::from(if arrives { 0 } else { NOT_FORWARDED })
        }
        Err((code, message)) => {
            stdout::complain(&message);
            ExitCode::from(code)
        }
    }
}

/// METHOD TARGET are the last two words, when they look like it.
fn is_request(method: &str, target: &str) -> bool {
    !method.is_empty()
        && method.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'-')
        && (target.starts_with('/') || target.starts_with("http"))
}

type Failure = (u8, String);

fn ask_files(args: &Args, paths: &[PathBuf], asked: Option<(String, String)>) -> Result<Value, Failure> {
    let (files, parsed) = read("explain", paths)?;
    let trust_domain = trust_domain(&parsed)?;
    let question = question(args, &trust_domain, asked)?;
    let answer = explain(&parsed, &files, &trust_domain, &question);
    serde_json::to_value(&answer).map_err(|error| (NOT_FORWARDED, error.to_string()))
}

/// All files of `paths` as one configuration without errors, as `validate` reads them.
pub(crate) fn read(command: &str, paths: &[PathBuf]) -> Result<(Vec<SourceFile>, Parsed), Failure> {
    let mut files = Vec::new();
    let mut errors = Vec::new();
    for path in paths {
        let read = config_dir::read(path).map_err(|error| (USAGE, format!("outrigger {command}: {error}")))?;
        files.extend(read.files);
        errors.extend(read.unreadable);
    }
    let mut parsed = load(&files);
    errors.append(&mut parsed.errors);
    if errors.is_empty() {
        return Ok((files, parsed));
    }
    let problems: Vec<String> = errors.iter().map(ToString::to_string).collect();
    Err((INVALID, problems.join("\n")))
}

pub(crate) fn trust_domain(parsed: &Parsed) -> Result<TrustDomain, Failure> {
    let written = parsed.resources.mesh.trust_domain.clone();
    written.map_or_else(|| TrustDomain::new(DEFAULT_TRUST_DOMAIN).map_err(|error| (USAGE, error.to_string())), Ok)
}

fn ask_sidecar(args: &Args, asked: Option<(String, String)>) -> Result<Value, Failure> {
    let trust_domain = TrustDomain::new(DEFAULT_TRUST_DOMAIN).map_err(|error| (USAGE, error.to_string()))?;
    let question = question(args, &trust_domain, asked)?;
    let body = serde_json::to_vec(&WrittenQuestion::from(&question)).map_err(|error| (USAGE, error.to_string()))?;
    let answered = run(async { fetch::post_json::<Value>(&args.admin, "/explain", body).await });
    let hint = "give a PATH to the YAML, or name a sidecar's admin address with --admin";
    match answered {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err((USAGE, format!("outrigger explain: {error}\n{hint}"))),
        Err(error) => Err((USAGE, format!("outrigger explain: {error}"))),
    }
}

/// A request that was refused or failed, by its id.
fn ask_by_id(args: &Args) -> Result<Value, Failure> {
    let usage = |message: &str| (USAGE, format!("outrigger explain: {message}"));
    let [id] = args.words.as_slice() else {
        return Err(usage("--from and --to are missing: who calls what? Or give one REQUEST-ID alone"));
    };
    if std::path::Path::new(id).exists() {
        return Err(usage("--from and --to are missing: who calls what, by the YAML of this path?"));
    }
    let asked = run(async { fetch::json::<Value>(&args.admin, &format!("/explain/{}", escaped(id))).await });
    match asked {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(usage(&format!("{error}\nname another sidecar's admin address with --admin"))),
        Err(error) => Err(usage(&error.to_string())),
    }
}

/// As one segment of a path.
fn escaped(id: &str) -> String {
    let mut out = String::new();
    for byte in id.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'~' => out.push(char::from(byte)),
            byte => out += &format!("%{byte:02X}"),
        }
    }
    out
}

fn question(args: &Args, trust_domain: &TrustDomain, asked: Option<(String, String)>) -> Result<Question, Failure> {
    let usage = |message: String| (USAGE, format!("outrigger explain: {message}"));
    let (Some(from), Some(to)) = (&args.from, &args.to) else {
        return Err(usage("--from and --to are missing: who calls what?".to_owned()));
    };
    let from = match from.as_str() {
        "plaintext" => None,
        text if text.starts_with("spiffe://") => {
            Some(SpiffeId::parse(text).map_err(|error| usage(format!("--from: {error}")))?)
        }
        text => {
            let id = text.split_once('/').map(|(namespace, account)| SpiffeId::new(trust_domain, namespace, account));
            let wrong =
                || usage(format!("--from: {text:?} is not NAMESPACE/SERVICEACCOUNT, a SPIFFE id or `plaintext`"));
            Some(id.ok_or_else(wrong)?.map_err(|_| wrong())?)
        }
    };
    let (name, port) = match to.rsplit_once(':') {
        Some((name, port)) => {
            let wrong = || usage(format!("--to: {port:?} is not a port"));
            (name, Some(port.parse::<u16>().ok().filter(|port| *port != 0).ok_or_else(wrong)?))
        }
        None => (to.as_str(), None),
    };
    // A bare name is of the caller's own namespace, as an application means it.
    let own = from.as_ref().map_or("default", |from| from.namespace());
    let to = ServiceName::parse(name, own).map_err(|error| usage(format!("--to: {error}")))?;
    let mut headers = Vec::new();
    for header in &args.headers {
        let (name, value) =
            header.split_once(':').ok_or_else(|| usage(format!("-H {header:?}: expected `Name: value`")))?;
        headers.push((name.trim().to_owned(), value.trim().to_owned()));
    }
    let request = asked.map(|(method, target)| Asked { method, target, headers });
    let at = match &args.at {
        Some(text) => {
            unix_time(text).ok_or_else(|| usage(format!("--at: {text:?} is not a time: 2026-11-28T14:30:00Z")))?
        }
        None => SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
    };
    let claims =
        args.claims.as_deref().map(written).transpose().map_err(|error| usage(format!("--claims: {error}")))?;
    let claims = claims.map(|text| serde_json::from_str(&text).map(Claims::new));
    let claims =
        claims.transpose().map_err(|error| usage(format!("--claims: it is not a JSON object with claims: {error}")))?;
    let token = args.token.as_deref().map(written).transpose().map_err(|error| usage(format!("--token: {error}")))?;
    let token = token.map(|token| token.trim().to_owned());
    let (from_ip, sni) = (args.from_ip, args.sni.clone());
    Ok(Question { from, from_ip, to, port, request, sni, claims, token, at })
}

/// The word itself, or with `@` in front what is in that file.
fn written(word: &str) -> Result<String, String> {
    match word.strip_prefix('@') {
        Some(file) => std::fs::read_to_string(file).map_err(|error| format!("{file}: {error}")),
        None => Ok(word.to_owned()),
    }
}

/// The verdict, by what, and the fix in the first line; the whole way below it.
fn text(answer: &Value) -> String {
    let word = |value: &Value| value.as_str().map(str::to_owned);
    let mut first = word(&answer["verdict"]).unwrap_or_default();
    if let Some(status) = answer["status"].as_u64() {
        first += &format!(" {status}");
    }
    if let Some(status) = answer["grpc_status"].as_u64() {
        first += &format!(" grpc-status {status}");
    }
    if let Some(reason) = word(&answer["reason"]) {
        first += &format!(" {reason}");
    }
    let by = &answer["by"];
    if let (Some(kind), Some(namespace), Some(name)) = (word(&by["kind"]), word(&by["namespace"]), word(&by["name"])) {
        first += &format!(" by {kind}/{namespace}/{name}");
        if let Some(rule) = by["rule"].as_u64() {
            first += &format!(" rule {rule}");
        }
        if let (Some(file), Some(line)) = (word(&by["file"]), by["line"].as_u64()) {
            first += &format!(" ({file}:{line})");
        }
    }
    if let Some(hint) = word(&answer["hint"]).filter(|hint| !hint.is_empty()) {
        first += &format!(": {hint}");
    }
    let mut lines = vec![first];
    lines.extend(about_request(&answer["request"]));
    lines.extend(about_now(&answer["now"]));
    for step in answer["steps"].as_array().into_iter().flatten() {
        let part = |name: &str| word(&step[name]).unwrap_or_default();
        lines.push(format!("  {:<8} {} -> {}: {}", part("stage"), part("object"), part("result"), part("why")));
    }
    lines.into_iter().map(printable).collect::<Vec<_>>().join("\n")
}

/// Which request of the past it was.
fn about_request(request: &Value) -> Option<String> {
    let word = |name: &str| request[name].as_str();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut line = format!(
        "  {} {} {}, {} ago, from {}",
        word("direction")?,
        word("method")?,
        word("target")?,
        span(now.saturating_sub(request["at"].as_u64()?)),
        word("from").or_else(|| word("client"))?
    );
    if let Some(others) = request["earlier_ones"].as_u64().filter(|others| *others > 0) {
        line += &format!(" (the last of {} with this id)", others + 1);
    }
    Some(line)
}

/// Whether policy would say the same now.
fn about_now(now: &Value) -> Option<String> {
    let verdict = now["verdict"].as_str()?;
    if now["otherwise"] == false {
        return Some("  now: the same request would be decided alike".to_owned());
    }
    let reason = now["reason"].as_str().map(|reason| format!(" {reason}")).unwrap_or_default();
    let by = &now["by"];
    let by = match (by["kind"].as_str(), by["namespace"].as_str(), by["name"].as_str()) {
        (Some(kind), Some(namespace), Some(name)) => format!(" by {kind}/{namespace}/{name}"),
        _ => String::new(),
    };
    Some(format!("  now: the same request would be {verdict}{reason}{by}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_of_the_past() {
        let answer = serde_json::json!({
            "verdict": "refused", "status": 403, "reason": "policy_denied", "hint": "no rule allows shop/web",
            "by": {"kind": "AuthorizationPolicy", "namespace": "shop", "name": "lock", "rule": null},
            "request": {"direction": "inbound", "method": "GET", "target": "/\u{1b}[2J", "at": 0, "from": null,
                "client": "10.0.0.7:1", "earlier_ones": 1},
            "now": {"verdict": "forwarded", "reason": null, "by": null, "otherwise": true}, "steps": [],
        });
        let lines: Vec<String> = text(&answer).lines().map(str::to_owned).collect();
        assert!(
            lines[0].starts_with("refused 403 policy_denied by AuthorizationPolicy/shop/lock: no rule"),
            "{lines:?}"
        );
        assert!(
            lines[1].starts_with("  inbound GET /\u{fffd}[2J, ") && lines[1].contains("from 10.0.0.7:1 (the last of 2")
        );
        assert_eq!(lines[2], "  now: the same request would be forwarded");
        assert_eq!(escaped("a/b c.d"), "a%2Fb%20c%2Ed");
    }

    #[test]
    fn which_words_are_a_request() {
        for (method, target) in [("GET", "/"), ("M-SEARCH", "/x"), ("POST", "http://a/b")] {
            assert!(is_request(method, target));
        }
        for (method, target) in [("get", "/"), ("", "/"), ("GET", "x"), ("dir", "/etc")] {
            assert!(!is_request(method, target));
        }
    }
}
