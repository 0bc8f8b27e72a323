//! The examples of the pages about policies are complete: each YAML block is valid, and what its PolicyTest expects is what
//! is decided.

#![expect(clippy::unwrap_used, reason = "what is missing here fails the test")]

use std::fs;
use std::path::Path;

use outrigger_api::compile::load;
use outrigger_api::explain::{Asked, Question, explain};
use outrigger_api::identity::{SpiffeId, TrustDomain};
use outrigger_api::resource::{CaseFrom, SourceFile};

/// The YAML blocks of a page.
fn blocks(page: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(page);
    let text = fs::read_to_string(path).unwrap();
    let blocks = text.split("```yaml\n").skip(1).map(|rest| rest.split("```").next().unwrap().to_owned());
    blocks.collect()
}

fn check(page: &str, least_cases: usize) {
    let domain = TrustDomain::new("outrigger.local").unwrap();
    let mut cases = 0;
    for (index, text) in blocks(page).into_iter().enumerate() {
        let files = [SourceFile { name: format!("{page}-{index}.yaml"), text }];
        let parsed = load(&files);
        assert!(parsed.errors.is_empty(), "{page}, block {index}: {:?}", parsed.errors);
        for case in parsed.resources.policy_tests.values().flat_map(|test| &test.spec.cases) {
            if !parsed.resources.services.contains_key(&(case.to.namespace.to_string(), case.to.name.to_string())) {
                continue;
            }
            let from = match &case.from {
                CaseFrom::Plaintext => None,
                CaseFrom::Principal(id) => Some(id.clone()),
                CaseFrom::Account(namespace, account) => Some(SpiffeId::new(&domain, namespace, account).unwrap()),
            };
            let request = case.request.clone();
            let request = request.map(|is| Asked { method: is.method, target: is.target, headers: is.headers });
            let question = Question {
                from,
                from_ip: case.from_ip,
                to: case.to.clone(),
                port: case.port,
                request,
                sni: case.sni.clone(),
                claims: case.claims.clone(),
                token: case.token.clone(),
                at: case.at.unwrap_or_default(),
            };
            let answer = explain(&parsed, &files, &domain, &question);
            let expect = &case.expect;
            let name = format!("{page}: {}: {answer:?}", case.name);
            assert!(expect.verdict.as_deref().is_none_or(|verdict| verdict == answer.verdict.as_str()), "{name}");
            assert!(expect.status.is_none_or(|status| Some(status) == answer.status), "{name}");
            assert!(expect.reason.as_deref().is_none_or(|reason| Some(reason) == answer.reason), "{name}");
            let by = answer.by.as_ref();
            assert!(
                expect.by.as_ref().is_none_or(|expected| by.is_some_and(|by| by.to_string() == *expected)),
                "{name}"
            );
            assert!(expect.rule.is_none_or(|rule| by.and_then(|by| by.rule) == Some(rule)), "{name}");
            cases += 1;
        }
    }
    assert!(cases >= least_cases, "{page} has {cases} cases that were run");
}

#[test]
fn tokens() {
    check("authentication.md", 4);
}

#[test]
fn limits() {
    check("rate-limits.md", 2);
}

#[test]
fn policies() {
    check("authorization.md", 0);
}
