//! `outrigger test`: runs the PolicyTest documents of a configuration against the policies beside them, by the same
//! decisions as the data path, and says at the end which rules no case reached.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use outrigger_api::explain::{Asked, Explanation, Question, explain};
use outrigger_api::identity::{SpiffeId, TrustDomain};
use outrigger_api::resource::{Case, CaseFrom, CaseRequest, Metadata, Resources};
use outrigger_runtime::stdout;
use serde::Serialize;

use crate::explain::{read, trust_domain};

const FAILED: u8 = 1;

#[derive(clap::Args)]
#[command(
    after_help = "Ends with 0 when all is as expected, 1 when something is not, 2 for a mistake on the line, 3 when the \
                  YAML is not valid."
)]
pub(crate) struct Args {
    /// Files or directories as the control plane's --config reads them, with PolicyTest documents among them
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    #[arg(short, long, value_name = "FORMAT", default_value = "text", value_parser = ["text", "json", "junit"])]
    output: String,
}

/// One case and what became of it.
#[derive(Serialize)]
struct Ran {
    /// `NAMESPACE/NAME` of the PolicyTest.
    test: String,
    case: String,
    passed: bool,
    /// `field: expected X, got Y`
    differences: Vec<String>,
    /// The steps of the decision, for a case that failed.
    steps: Vec<String>,
}

#[derive(Serialize)]
struct Report {
    cases: Vec<Ran>,
    /// `AuthorizationPolicy/NAMESPACE/NAME rule N`
    unreached: Vec<String>,
}

pub(crate) fn command(args: &Args) -> ExitCode {
    let report = match run(&args.paths) {
        Ok(report) => report,
        Err((code, message)) => {
            stdout::complain(&message);
            return ExitCode::from(code);
        }
    };
    stdout::say(&match args.output.as_str() {
        "json" => serde_json::to_string_pretty(&report).unwrap_or_default(),
        "junit" => junit(&report),
        _ => text(&report),
    });
    let good = !report.cases.is_empty() && report.cases.iter().all(|case| case.passed);
    ExitCode::from(if good { 0 } else { FAILED })
}

fn run(paths: &[PathBuf]) -> Result<Report, (u8, String)> {
    let (files, parsed) = read("test", paths)?;
    let trust_domain = trust_domain(&parsed)?;
    let mut reached = BTreeSet::new();
    let mut cases = Vec::new();
    let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    for test in parsed.resources.policy_tests.values() {
        for case in &test.spec.cases {
            let question = question(case, &trust_domain, at)?;
            let answer = explain(&parsed, &files, &trust_domain, &question);
            let matched =
                answer.steps.iter().filter(|step| step.object.contains(" rule ") && step.result != "no match");
            reached.extend(matched.map(|step| step.object.clone()));
            cases.push(judge(&test.metadata, case, &answer));
        }
    }
    let unreached = rules(&parsed.resources).into_iter().filter(|rule| !reached.contains(rule)).collect();
    Ok(Report { cases, unreached })
}

fn question(case: &Case, trust_domain: &TrustDomain, at: u64) -> Result<Question, (u8, String)> {
    let from = match &case.from {
        CaseFrom::Plaintext => None,
        CaseFrom::Principal(id) => Some(id.clone()),
        CaseFrom::Account(namespace, account) => {
            Some(SpiffeId::new(trust_domain, namespace, account).map_err(|error| (FAILED, error.to_string()))?)
        }
    };
    let request = case.request.clone();
    let request = request.map(|CaseRequest { method, target, headers }| Asked { method, target, headers });
    Ok(Question {
        from,
        from_ip: case.from_ip,
        to: case.to.clone(),
        port: case.port,
        request,
        sni: case.sni.clone(),
        claims: case.claims.clone(),
        token: case.token.clone(),
        at: case.at.unwrap_or(at),
    })
}

fn judge(metadata: &Metadata, case: &Case, answer: &Explanation) -> Ran {
    let mut differences = Vec::new();
    let mut compare = |field: &str, expected: Option<String>, got: Option<String>| {
        let Some(expected) = expected else { return };
        let got = got.unwrap_or_else(|| "nothing".to_owned());
        if expected != got {
            differences.push(format!("{field}: expected {expected}, got {got}"));
        }
    };
    let expect = &case.expect;
    compare("verdict", expect.verdict.clone(), Some(answer.verdict.as_str().to_owned()));
    compare("status", text_of(expect.status), text_of(answer.status));
    compare("grpcStatus", text_of(expect.grpc_status), text_of(answer.grpc_status));
    compare("reason", expect.reason.clone(), answer.reason.map(str::to_owned));
    compare("by", expect.by.clone(), text_of(answer.by.as_ref()));
    compare("rule", text_of(expect.rule), text_of(answer.by.as_ref().and_then(|by| by.rule)));
    let route = answer.route.as_ref().map(|taken| {
        let rule = if expect.route.as_ref().is_some_and(|expected| expected.contains(" rule ")) {
            format!(" rule {}", taken.rule)
        } else {
            String::new()
        };
        format!("{}/{}/{}{rule}", taken.kind, taken.namespace, taken.name)
    });
    compare("route", expect.route.clone(), route);
    let timeout = expect.timeout.map(|timeout| format!("{timeout:?}"));
    compare("timeout", timeout, answer.timeouts.get("request").cloned());
    if let Some(backends) = &expect.backends {
        let shown = |name: &str, weight: u32| format!("{name}: {weight}");
        let got = answer.backends.iter().map(|backend| {
            let name = format!("{}:{}", backend.service, backend.port);
            shown(&name, backend.weight)
        });
        let mut got: Vec<String> = got.collect();
        got.sort();
        let mut expected: Vec<String> = backends.iter().map(|(name, weight)| shown(name, *weight)).collect();
        expected.sort();
        compare("backends", Some(expected.join(", ")), Some(got.join(", ")));
    }
    let passed = differences.is_empty();
    let steps = answer.steps.iter().filter(|_| !passed);
    let steps = steps.map(|step| format!("{} {} -> {}: {}", step.stage, step.object, step.result, step.why)).collect();
    let test = format!("{}/{}", metadata.namespace, metadata.name);
    Ran { test, case: case.name.clone(), passed, differences, steps }
}

fn text_of<T: ToString>(value: Option<T>) -> Option<String> {
    value.map(|value| value.to_string())
}

/// Every rule that could be reached.
fn rules(resources: &Resources) -> Vec<String> {
    let policies = resources.authorization_policies.values();
    let rules = policies.flat_map(|policy| {
        let (namespace, name) = (&policy.metadata.namespace, &policy.metadata.name);
        (0..policy.spec.rules.len()).map(move |rule| format!("AuthorizationPolicy/{namespace}/{name} rule {rule}"))
    });
    let routes = resources.routes().flat_map(|route| route.spec.rules.iter().map(ToString::to_string));
    let tokens = resources.request_authentications.values();
    let tokens = tokens.flat_map(|policy| {
        let (namespace, name) = (&policy.metadata.namespace, &policy.metadata.name);
        (0..policy.spec.rules.len()).map(move |rule| format!("RequestAuthentication/{namespace}/{name} rule {rule}"))
    });
    let limits = resources.rate_limit_policies.values();
    let limits = limits.flat_map(|policy| {
        let (namespace, name) = (&policy.metadata.namespace, &policy.metadata.name);
        (0..policy.spec.limits.len()).map(move |rule| format!("RateLimitPolicy/{namespace}/{name} rule {rule}"))
    });
    rules.chain(tokens).chain(limits).chain(routes).collect()
}

fn text(report: &Report) -> String {
    let mut out = String::new();
    for case in &report.cases {
        let word = if case.passed { "ok  " } else { "FAIL" };
        let _ = writeln!(out, "{word} {}: {}", case.test, case.case);
        for difference in &case.differences {
            let _ = writeln!(out, "       {difference}");
        }
        for step in &case.steps {
            let _ = writeln!(out, "         {step}");
        }
    }
    if !report.unreached.is_empty() {
        let _ = writeln!(out, "rules that no case reached:");
        for rule in &report.unreached {
            let _ = writeln!(out, "  {rule}");
        }
    }
    let failed = report.cases.iter().filter(|case| !case.passed).count();
    let passed = report.cases.len() - failed;
    match report.cases.len() {
        0 => out + "no PolicyTest document is among the files: nothing was tested",
        _ => out + &format!("{passed} as expected, {failed} not"),
    }
}

fn junit(report: &Report) -> String {
    let failed = report.cases.iter().filter(|case| !case.passed).count();
    let total = report.cases.len();
    let mut out = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites tests=\"{total}\" failures=\"{failed}\">\n  <testsuite \
         name=\"outrigger test\" tests=\"{total}\" failures=\"{failed}\">\n"
    );
    for case in &report.cases {
        let (test, name) = (escaped(&case.test), escaped(&case.case));
        if case.passed {
            let _ = writeln!(out, "    <testcase classname=\"{test}\" name=\"{name}\"/>");
            continue;
        }
        let message = escaped(&case.differences.join("; "));
        let _ = writeln!(
            out,
            "    <testcase classname=\"{test}\" name=\"{name}\">\n      <failure message=\"{message}\">{}</failure>\n    \
             </testcase>",
            escaped(&case.steps.join("\n"))
        );
    }
    for rule in &report.unreached {
        let _ = writeln!(out, "    <system-out>not reached: {}</system-out>", escaped(rule));
    }
    out + "  </testsuite>\n</testsuites>"
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\n' | '\t' => out.push(character),
            other if other.is_control() => out.push('\u{fffd}'),
            other => out.push(other),
        }
    }
    out
}
