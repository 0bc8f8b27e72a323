//! `outrigger policy report`: what policies in Shadow mode would have refused, by caller and shape of the request, since
//! when, and what to do next. Reads `/policy-report` of the control plane's admin address and changes nothing.

use std::process::ExitCode;

use outrigger_api::policy::authorization::Action;
use outrigger_control_plane::admin::view::{PolicyReport, ShadowCaller, ShadowPolicy};
use outrigger_runtime::stdout;

use crate::fetch;
use crate::status::{ControlPlane, complain, run};
use crate::table::{Align, Table, cut, printable, span};

/// Characters of a line.
const WIDEST: usize = 1_000;
/// A policy in whose time nobody was refused for so long has seen a day of every caller.
const LONG_ENOUGH: u64 = 24 * 3_600;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// One policy alone; else every policy in Shadow mode
    #[arg(value_name = "KIND/NAMESPACE/NAME")]
    policy: Option<String>,
    #[command(flatten)]
    control_plane: ControlPlane,
    #[arg(short, long, value_name = "FORMAT", default_value = "text", value_parser = ["text", "json"])]
    output: String,
}

pub(crate) fn command(args: &Args) -> ExitCode {
    let asked = run(async { fetch::json::<PolicyReport>(&args.control_plane.admin, "/policy-report").await });
    let mut report = match asked {
        Ok(Ok(report)) => report,
        Ok(Err(error)) => return complain("policy report", &error),
        Err(error) => return complain("policy report", &error),
    };
    if let Some(wanted) = &args.policy {
        report.policies.retain(|policy| policy.policy == *wanted);
        if report.policies.is_empty() {
            let hint = "without a name `outrigger policy report` shows all that are";
            stdout::complain(&format!("outrigger policy report: no policy {wanted} is in Shadow mode; {hint}"));
            return ExitCode::FAILURE;
        }
    }
    stdout::say(&match args.output.as_str() {
        "json" => serde_json::to_string_pretty(&json(&report)).unwrap_or_default(),
        _ => text(&report).join("\n"),
    });
    ExitCode::SUCCESS
}

/// The report with the next step of each policy.
fn json(report: &PolicyReport) -> serde_json::Value {
    let policies = report.policies.iter().map(|policy| {
        let mut value = serde_json::to_value(policy).unwrap_or_default();
        value["next"] = next(policy, report.now).into();
        value
    });
    serde_json::json!({ "now": report.now, "policies": policies.collect::<Vec<_>>() })
}

fn text(report: &PolicyReport) -> Vec<String> {
    if report.policies.is_empty() {
        return vec!["No policy is in Shadow mode. `mode: Shadow` in a policy counts what it would refuse.".to_owned()];
    }
    let mut lines = Vec::new();
    for policy in &report.policies {
        if !lines.is_empty() {
            lines.push(String::new());
        }
        lines.extend(of_policy(policy, report.now));
    }
    lines.into_iter().map(|line| cut(printable(line), WIDEST)).collect()
}

fn of_policy(policy: &ShadowPolicy, now: u64) -> Vec<String> {
    let action = match policy.action {
        Action::Allow => "ALLOW",
        Action::Deny => "DENY",
        Action::Audit => "AUDIT",
    };
    let selects = if policy.selects == 1 { "1 workload".to_owned() } else { format!("{} workloads", policy.selects) };
    let mut lines = vec![format!(
        "{}  {action}, in Shadow mode for {}, selects {selects}",
        policy.policy,
        span(now.saturating_sub(policy.since))
    )];
    if !policy.callers.is_empty() {
        let mut table = Table::new(&[
            ("  WOULD BE", Align::Left),
            ("CALLER", Align::Left),
            ("REQUEST", Align::Left),
            ("CALLED", Align::Left),
            ("TIMES", Align::Right),
            ("FIRST", Align::Right),
            ("LAST", Align::Right),
        ]);
        let mut callers: Vec<&ShadowCaller> = policy.callers.iter().collect();
        callers.sort_by_key(|caller| std::cmp::Reverse(caller.count));
        for caller in callers {
            table.row([
                format!("  {}", caller.would),
                account(&caller.caller),
                if caller.request.is_empty() { "(bytes)".to_owned() } else { caller.request.clone() },
                account(&caller.called),
                caller.count.to_string(),
                format!("{} ago", span(now.saturating_sub(caller.first))),
                format!("{} ago", span(now.saturating_sub(caller.last))),
            ]);
        }
        lines.extend(table.lines());
    }
    lines.push(format!("  next: {}", next(policy, now)));
    lines
}

/// `NAMESPACE/ACCOUNT` of a SPIFFE id.
fn account(id: &str) -> String {
    match outrigger_api::identity::SpiffeId::parse(id) {
        Ok(id) => format!("{}/{}", id.namespace(), id.account()),
        Err(_) if id.is_empty() => "(no identity)".to_owned(),
        Err(_) => id.to_owned(),
    }
}

fn next(policy: &ShadowPolicy, now: u64) -> String {
    let last = policy.callers.iter().map(|caller| caller.last).max();
    let quiet = now.saturating_sub(last.unwrap_or(policy.since));
    let what = if policy.action == Action::Allow { "add them to a rule" } else { "take them out of the rule" };
    if policy.selects == 0 {
        return "it selects no registered workload, so nothing can be said: look at its selector and namespace"
            .to_owned();
    }
    match last {
        None if quiet < LONG_ENOUGH => format!(
            "nobody would have been refused for {}, which is not long: wait until all callers had their turn, then take \
             `mode: Shadow` away",
            span(quiet)
        ),
        Some(_) if quiet < LONG_ENOUGH => format!(
            "these callers would be refused: {what}, or change what they send; when the list stays still, take `mode: \
             Shadow` away"
        ),
        None | Some(_) => {
            format!("nobody would have been refused for {}: enforce it by taking `mode: Shadow` away", span(quiet))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(caller: &str, request: &str, last: u64) -> ShadowCaller {
        ShadowCaller {
            called: "spiffe://outrigger.local/ns/shop/sa/payments".into(),
            caller: caller.into(),
            request: request.into(),
            would: "denied".into(),
            count: 17,
            first: 1_000,
            last,
        }
    }

    fn policy(action: Action, selects: usize, callers: Vec<ShadowCaller>) -> ShadowPolicy {
        ShadowPolicy { policy: "AuthorizationPolicy/shop/trial".into(), action, since: 1_000, selects, callers }
    }

    #[test]
    fn what_to_do_next() {
        let day = LONG_ENOUGH;
        let web = || vec![caller("spiffe://outrigger.local/ns/shop/sa/web", "GET /v1/{*}", 1_000 + day)];
        let cases = [
            (policy(Action::Allow, 2, vec![]), 1_000 + 60, "for 1m 0s, which is not long"),
            (policy(Action::Allow, 2, vec![]), 1_000 + 3 * day, "nobody would have been refused for 3d 0h: enforce it"),
            (policy(Action::Allow, 2, web()), 1_060 + day, "add them to a rule, or change"),
            (policy(Action::Deny, 2, web()), 1_060 + day, "take them out of the rule, or change"),
            (policy(Action::Deny, 2, web()), 1_000 + 4 * day, "for 3d 0h: enforce it"),
            (policy(Action::Deny, 0, vec![]), 1_000 + 4 * day, "selects no registered workload"),
        ];
        for (policy, now, expected) in cases {
            let said = next(&policy, now);
            assert!(said.contains(expected), "{said}");
        }
    }

    #[test]
    fn a_table_per_policy() {
        let callers =
            vec![caller("spiffe://outrigger.local/ns/shop/sa/web", "GET /v1/{*}", 1_100), caller("", "", 1_100)];
        let report = PolicyReport { now: 1_200, policies: vec![policy(Action::Allow, 1, callers)] };
        let lines = text(&report);
        assert_eq!(lines[0], "AuthorizationPolicy/shop/trial  ALLOW, in Shadow mode for 3m 20s, selects 1 workload");
        assert_eq!(lines[2], "  denied    shop/web       GET /v1/{*}  shop/payments     17  3m 20s ago  1m 40s ago");
        assert_eq!(lines[3], "  denied    (no identity)  (bytes)      shop/payments     17  3m 20s ago  1m 40s ago");
        assert!(lines[4].starts_with("  next: these callers"), "{lines:?}");
        assert!(json(&report)["policies"][0]["next"].as_str().is_some());
        let none = PolicyReport { now: 1, policies: vec![] };
        assert_eq!(text(&none).len(), 1);
    }
}
