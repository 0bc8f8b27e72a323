//! `outrigger status`: who is connected to the control plane, and what is wrong. Reads `/status` of its admin address
//! and changes nothing. Ends with 1 when there is an error, so that a script sees it too.

use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use outrigger_control_plane::admin::view::{Event, Sidecar, Status};
use outrigger_runtime::stdout;

use crate::fetch;
use crate::table::{Align, Table, cut, printable, span};

/// Characters of a line.
const WIDEST: usize = 1_000;
/// Of each kind of event; `/status` has them all.
const MAX_EVENTS: usize = 20;
/// Seconds for which two connections of one sidecar may stand beside each other.
const RENEWING: u64 = 30;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    control_plane: ControlPlane,
}

/// Which control plane is asked.
#[derive(clap::Args)]
pub(crate) struct ControlPlane {
    /// The control plane's admin address (its --admin-listen)
    #[arg(long = "control-plane-admin", value_name = "HOST:PORT", default_value = "127.0.0.1:15014")]
    pub(crate) admin: String,
}

pub(crate) fn command(args: &Args) -> ExitCode {
    let address = &args.control_plane.admin;
    let asked = run(async { fetch::json::<Status>(address, "/status").await });
    match asked {
        Ok(Ok(status)) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            stdout::say(&text(&status, now).join("\n"));
            if has_errors(&status) { ExitCode::FAILURE } else { ExitCode::SUCCESS }
        }
        Ok(Err(error)) => complain("status", &error),
        Err(error) => complain("status", &error),
    }
}

/// Runs `work` on a runtime of its own.
pub(crate) fn run<T>(work: impl Future<Output = T>) -> std::io::Result<T> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work))
}

/// Exit code 1, with what to do about it.
pub(crate) fn complain(command: &str, error: &dyn std::fmt::Display) -> ExitCode {
    stdout::complain(&format!(
        "outrigger {command}: {error}\nIs the control plane running? Name its admin address (`listening admin ...` on \
         its stdout) with --control-plane-admin."
    ));
    ExitCode::FAILURE
}

/// A configuration with errors, or an update that a sidecar does not take: the mesh is not as it was meant to be.
fn has_errors(status: &Status) -> bool {
    !status.config.errors.is_empty() || status.sidecars.iter().any(|sidecar| !sidecar.refusals.is_empty())
}

fn text(status: &Status, now: u64) -> Vec<String> {
    let authority = &status.authority;
    let mut lines = vec![
        format!("control plane  {}, trust domain {}", status.version, status.trust_domain),
        format!(
            "authority      issuer ends in {}, {} in the trust bundle (generation {})",
            left(authority.not_after, now),
            plural(authority.roots, "root"),
            authority.generation
        ),
        format!("workloads      {} registered", status.leases),
        format!("configuration  {}", configuration(status)),
        String::new(),
    ];
    if status.sidecars.is_empty() {
        lines.push("No sidecar is connected.".to_owned());
    } else {
        lines.extend(sidecars(&status.sidecars, now));
    }
    let wrong = wrong(status, now);
    if !wrong.is_empty() {
        lines.push(String::new());
        lines.extend(wrong);
    }
    lines.into_iter().map(|line| cut(printable(line), WIDEST)).collect()
}

fn configuration(status: &Status) -> String {
    let (errors, warnings) = (status.config.errors.len(), status.config.warnings.len());
    match (errors, warnings) {
        (0, 0) => "good".to_owned(),
        (0, warnings) => format!("good, {}", plural(warnings, "warning")),
        (errors, warnings) => {
            format!(
                "{}, {}; of files with errors the last good text is in force",
                plural(errors, "error"),
                plural(warnings, "warning")
            )
        }
    }
}

fn sidecars(sidecars: &[Sidecar], now: u64) -> Vec<String> {
    let mut table = Table::new(&[
        ("SIDECAR", Align::Left),
        ("NAMESPACE", Align::Left),
        ("VERSION", Align::Left),
        ("CONNECTED", Align::Right),
        ("CERTIFICATE", Align::Right),
        ("KNOWS", Align::Right),
        ("CONNECTIONS", Align::Right),
        ("REFUSED", Align::Right),
    ]);
    for sidecar in sidecars {
        table.row([
            sidecar.instance.clone(),
            sidecar.namespace.clone(),
            sidecar.version.clone(),
            span(now.saturating_sub(sidecar.connected_since)),
            left(sidecar.certificate_not_after, now),
            match sidecar.unacknowledged {
                0 => sidecar.subscriptions.to_string(),
                waiting => format!("{} of {}", sidecar.subscriptions.saturating_sub(waiting), sidecar.subscriptions),
            },
            sidecar.connections.map_or("-".to_owned(), |connections| connections.to_string()),
            sidecar.refusals.len().to_string(),
        ]);
    }
    table.lines()
}

/// Everything that somebody should look at, a line each.
fn wrong(status: &Status, now: u64) -> Vec<String> {
    let mut lines = Vec::new();
    lines.extend(status.config.errors.iter().map(|problem| format!("error    {problem}")));
    lines.extend(status.config.warnings.iter().map(|problem| format!("warning  {problem}")));
    lines.extend(status.warnings.iter().map(|warning| format!("warning  {warning}")));
    if status.authority.overdue {
        lines.push(
            "warning  the issuing certificate is due and the root's key is not here: replace ca/intermediate.pem and \
             ca/intermediate.key"
                .to_owned(),
        );
    }
    for service in &status.stale_services {
        lines.push(format!(
            "warning  {service}: more than half of its endpoints went at once; the last known are still listed"
        ));
    }
    for (number, sidecar) in status.sidecars.iter().enumerate() {
        let name = format!("{}.{}", sidecar.instance, sidecar.namespace);
        lines.extend(sidecar.troubles.iter().map(|trouble| format!("warning  {name}: {trouble}")));
        // A renewed connection stands beside the one before for a moment.
        let same = |other: &&Sidecar| (&other.instance, &other.identity) == (&sidecar.instance, &sidecar.identity);
        let long = |other: &&Sidecar| now.saturating_sub(other.connected_since) > RENEWING;
        if long(&sidecar) && status.sidecars[..number].iter().filter(long).any(|other| same(&other)) {
            lines.push(format!("warning  {name} is connected more than once; give each instance its own --name"));
        }
        for refusal in &sidecar.refusals {
            lines.push(format!(
                "refused  {}.{} refused {} (version {}): {}",
                sidecar.instance, sidecar.namespace, refusal.key, refusal.version, refusal.reason
            ));
        }
    }
    let events = |kind: &'static str, events: &[Event]| -> Vec<String> {
        let line = |event: &Event| {
            let ago = span(now.saturating_sub(event.last));
            let times = if event.count > 1 { format!(", {} times", event.count) } else { String::new() };
            format!("{kind}{}{times}, {ago} ago", event.what)
        };
        let more = events.len().saturating_sub(MAX_EVENTS);
        let more = (more > 0).then(|| format!("{kind}and {more} more"));
        events.iter().take(MAX_EVENTS).map(line).chain(more).collect()
    };
    lines.extend(events("refused  no certificate for ", &status.refused_joins));
    lines.extend(events("refused  not registered: ", &status.refused_registrations));
    lines.extend(events("gone     ", &status.gone));
    lines
}

fn left(end: u64, now: u64) -> String {
    match end.checked_sub(now) {
        Some(left) => span(left),
        None => format!("ended {} ago", span(now - end)),
    }
}

fn plural(count: usize, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrigger_control_plane::admin::view;

    #[test]
    fn says_who_is_there_and_what_is_wrong() {
        let problem =
            |message: &str| view::Problem { file: "web.yaml".into(), line: 3, column: 5, message: message.into() };
        let status = Status {
            version: "0.1.0".into(),
            trust_domain: "outrigger.local".into(),
            authority: view::Authority {
                not_after: 1_000 + 86_400 * 90,
                overdue: false,
                roots: 1,
                generation: 1,
                serving_not_after: 2_000,
            },
            sidecars: vec![Sidecar {
                instance: "web-1".into(),
                namespace: "shop".into(),
                identity: "spiffe://outrigger.local/ns/shop/sa/web".into(),
                version: "0.1.0".into(),
                connected_since: 940,
                certificate_not_after: 1_000 + 3_600,
                subscriptions: 3,
                unacknowledged: 1,
                connections: None,
                refusals: vec![view::Refusal { key: "cart.shop:80".into(), version: 7, reason: "no such mode".into() }],
                troubles: vec!["the collector at http://jaeger:4317 does not take spans: refused".into()],
            }],
            leases: 1,
            config: view::Config { errors: vec![problem("unknown field \"hots\"")], warnings: vec![] },
            stale_services: vec![],
            warnings: vec![],
            refused_joins: vec![view::Event { what: "10.0.0.5 (web-2): token_replayed".into(), count: 3, last: 880 }],
            refused_registrations: (0..25)
                .map(|number| view::Event { what: format!("web-{number}.shop: taken"), count: 1, last: 990 })
                .collect(),
            gone: vec![view::Event { what: "pay-1.shop".into(), count: 1, last: 940 }],
        };
        assert!(has_errors(&status));
        let lines = text(&status, 1_000);
        let all = lines.join("\n");
        assert!(all.contains("issuer ends in 90d 0h, 1 root in the trust bundle"), "{all}");
        let row = lines.iter().find(|line| line.starts_with("web-1")).unwrap();
        let cells: Vec<&str> = row.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect();
        assert_eq!(cells, ["web-1", "shop", "0.1.0", "1m 0s", "1h 0m", "2 of 3", "-", "1"]);
        assert!(all.contains("error    web.yaml:3:5: unknown field \"hots\""), "{all}");
        assert!(all.contains("refused  web-1.shop refused cart.shop:80 (version 7): no such mode"), "{all}");
        assert!(lines.iter().all(|line| line.chars().count() <= 100), "{all}");
        for line in [
            "warning  web-1.shop: the collector at http://jaeger:4317 does not take spans: refused",
            "refused  no certificate for 10.0.0.5 (web-2): token_replayed, 3 times, 2m 0s ago",
            "refused  not registered: web-0.shop: taken, 10s ago",
            "refused  not registered: and 5 more",
            "gone     pay-1.shop, 1m 0s ago",
        ] {
            assert!(lines.iter().any(|other| other == line), "{line} in\n{all}");
        }
        // Past joins are no errors of now, and two of one name are told once both have stayed.
        let mut status = status;
        status.config.errors.clear();
        status.sidecars[0].refusals.clear();
        assert!(!has_errors(&status));
        status.sidecars.push(status.sidecars[0].clone());
        assert!(text(&status, 1_000).iter().any(|line| line.contains("web-1.shop is connected more than once")));
        status.sidecars[1].connected_since = 990;
        assert!(!text(&status, 1_000).iter().any(|line| line.contains("more than once")));
    }
}
