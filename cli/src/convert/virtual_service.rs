//! Istio's VirtualService becomes an HTTPRoute on the Services of its hosts. A rule whose conditions or destinations cannot be
//! said here is left out whole, since what is left of it would route other requests, or elsewhere.

use serde_json::{Map, Value, json};

use super::fields::{Fields, Left, service_of};
use super::{Document, GATEWAY};

pub(super) fn route(document: &Document, left: &mut Left) -> Option<Value> {
    let mut spec = Fields::new("spec", document.spec(), left);
    let mut parents = Vec::new();
    for host in spec.texts("hosts", left).unwrap_or_default() {
        match service_of(&host, &document.namespace) {
            Some((name, namespace)) => {
                let mut parent = json!({ "group": "", "kind": "Service", "name": name });
                if namespace != document.namespace {
                    parent["namespace"] = namespace.into();
                }
                parents.push(parent);
            }
            None => left.tell(format!("spec.hosts: {host} is no Service")),
        }
    }
    let gateways = spec.texts("gateways", left).unwrap_or_default();
    for gateway in gateways.iter().filter(|gateway| *gateway != "mesh") {
        left.tell(format!("spec.gateways: {gateway}: routes of a gateway are not this mesh's"));
    }
    let is_for_the_mesh = gateways.is_empty() || gateways.iter().any(|gateway| gateway == "mesh");
    let mut rules = Vec::new();
    for http in spec.maps("http", left).unwrap_or_default() {
        let at = http.path("");
        let mut whole = Left::default();
        match rule(http, &document.namespace, &mut whole, left) {
            Some(rule) if whole.is_empty() => rules.push(rule),
            Some(_) | None => {
                whole.into_lines().into_iter().for_each(|line| left.tell(line));
                left.tell(format!("{} is left out", at.trim_end_matches('.')));
            }
        }
    }
    spec.end(left);
    if parents.is_empty() || rules.is_empty() || !is_for_the_mesh {
        return None;
    }
    let mut ours = Map::new();
    ours.insert("parentRefs".to_owned(), parents.into());
    ours.insert("rules".to_owned(), rules.into());
    Some(document.becomes(GATEWAY, "HTTPRoute", ours))
}

/// `whole` gets what the rule cannot do without.
fn rule(mut http: Fields, namespace: &str, whole: &mut Left, left: &mut Left) -> Option<Value> {
    http.take("name");
    let mut ours = Map::new();
    let mut prefix = None;
    if let Some(all) = http.maps("match", whole) {
        let matches: Vec<Value> = all.into_iter().map(|one| matched(one, &mut prefix, whole, left)).collect();
        ours.insert("matches".to_owned(), matches.into());
    }
    let mut filters = filters(&mut http, prefix.is_some(), namespace, whole, left);
    if let Some(redirect) = http.map("redirect", whole) {
        filters.push(redirected(redirect, whole));
    }
    let mut backends = Vec::new();
    for destination in http.maps("route", whole).unwrap_or_default() {
        backends.extend(backend(destination, namespace, whole));
    }
    for (name, list) in [("filters", filters), ("backendRefs", backends)] {
        if !list.is_empty() {
            ours.insert(name.to_owned(), list.into());
        }
    }
    let mut timeouts = Map::new();
    if let Some(timeout) = http.text("timeout", left) {
        timeouts.insert("request".to_owned(), duration(&timeout).into());
    }
    if let Some(retries) = http.map("retries", left) {
        ours.insert("retry".to_owned(), retry(retries, &mut timeouts, left));
    }
    if !timeouts.is_empty() {
        ours.insert("timeouts".to_owned(), timeouts.into());
    }
    // Answers of its own would be lost, and requests would go on instead.
    for name in ["directResponse", "delegate"] {
        if http.take(name).is_some() {
            whole.tell(format!("{} has no counterpart here", http.path(name)));
        }
    }
    http.end(left);
    Some(ours.into())
}

/// One of `match`; `prefix` is set where a path prefix was matched.
fn matched(mut one: Fields, prefix: &mut Option<()>, whole: &mut Left, left: &mut Left) -> Value {
    one.take("name");
    let mut ours = Map::new();
    if let Some(mut uri) = one.map("uri", whole) {
        let at = uri.path("prefix");
        for (theirs, kind) in [("exact", "Exact"), ("prefix", "PathPrefix"), ("regex", "RegularExpression")] {
            let Some(value) = uri.text(theirs, whole) else { continue };
            if theirs == "prefix" {
                *prefix = Some(());
                if value != "/" {
                    left.tell(format!(
                        "{at} {value}: a PathPrefix ends at a `/`, so that {value}x does not match any more"
                    ));
                }
            }
            ours.insert("path".to_owned(), json!({ "type": kind, "value": value }));
        }
        uri.end(whole);
    }
    if let Some(mut method) = one.map("method", whole) {
        ours.extend(method.text("exact", whole).map(|method| ("method".to_owned(), method.into())));
        method.end(whole);
    }
    for name in ["headers", "queryParams"] {
        let at = one.path(name);
        let Some(Value::Object(values)) = one.take(name) else { continue };
        let all: Vec<Value> =
            values.into_iter().filter_map(|(field, value)| text_match(&at, field, value, whole)).collect();
        ours.insert(name.to_owned(), all.into());
    }
    one.end(whole);
    ours.into()
}

fn text_match(at: &str, field: String, value: Value, whole: &mut Left) -> Option<Value> {
    let mut value = Fields::new(format!("{at}.{field}"), value, whole);
    let exact = value.text("exact", whole).map(|text| ("Exact", text));
    let found = exact.or_else(|| value.text("regex", whole).map(|text| ("RegularExpression", text)));
    if found.is_none() {
        whole.tell(format!("{at}.{field}: only `exact` and `regex` can be said here"));
    }
    value.end(whole);
    found.map(|(kind, text)| json!({ "name": field, "type": kind, "value": text }))
}

fn filters(http: &mut Fields, is_prefix: bool, namespace: &str, whole: &mut Left, left: &mut Left) -> Vec<Value> {
    let mut filters = Vec::new();
    if let Some(mut headers) = http.map("headers", left) {
        for (theirs, ours) in [("request", "RequestHeaderModifier"), ("response", "ResponseHeaderModifier")] {
            let Some(change) = headers.map(theirs, left) else { continue };
            let field = format!("{}{}", ours[..1].to_lowercase(), &ours[1..]);
            let mut filter = json!({ "type": ours });
            filter[field] = header_change(change, left);
            filters.push(filter);
        }
        headers.end(left);
    }
    if let Some(mut rewrite) = http.map("rewrite", whole) {
        let mut ours = Map::new();
        if let Some(uri) = rewrite.text("uri", whole) {
            let path = if is_prefix {
                json!({ "type": "ReplacePrefixMatch", "replacePrefixMatch": uri })
            } else {
                json!({ "type": "ReplaceFullPath", "replaceFullPath": uri })
            };
            ours.insert("path".to_owned(), path);
        }
        ours.extend(rewrite.text("authority", whole).map(|host| ("hostname".to_owned(), host.into())));
        rewrite.end(whole);
        filters.push(json!({ "type": "URLRewrite", "urlRewrite": ours }));
    }
    if let Some(mirror) = http.map("mirror", left) {
        let mut target = Left::default();
        match reference(mirror, namespace, &mut target) {
            Some(to) => {
                let mut filter = json!({ "type": "RequestMirror", "requestMirror": { "backendRef": to } });
                if let Some(mut percentage) = http.map("mirrorPercentage", left) {
                    filter["requestMirror"]["percent"] = percentage.take("value").unwrap_or_default();
                    percentage.end(left);
                }
                filters.push(filter);
            }
            None => target.into_lines().into_iter().for_each(|line| left.tell(line)),
        }
    }
    filters
}

fn header_change(mut change: Fields, left: &mut Left) -> Value {
    let mut ours = Map::new();
    for name in ["set", "add"] {
        if let Some(Value::Object(values)) = change.take(name) {
            let all: Vec<Value> =
                values.into_iter().map(|(field, value)| json!({ "name": field, "value": value })).collect();
            ours.insert(name.to_owned(), all.into());
        }
    }
    change.rename("remove", "remove", &mut ours);
    change.end(left);
    ours.into()
}

fn redirected(mut redirect: Fields, whole: &mut Left) -> Value {
    let mut ours = Map::new();
    redirect.rename("authority", "hostname", &mut ours);
    redirect.rename("scheme", "scheme", &mut ours);
    redirect.rename("port", "port", &mut ours);
    redirect.rename("redirectCode", "statusCode", &mut ours);
    // Istio's default; the other's is 302.
    ours.entry("statusCode").or_insert_with(|| 301.into());
    if let Some(uri) = redirect.text("uri", whole) {
        ours.insert("path".to_owned(), json!({ "type": "ReplaceFullPath", "replaceFullPath": uri }));
    }
    redirect.end(whole);
    json!({ "type": "RequestRedirect", "requestRedirect": ours })
}

/// One of `route`, with its weight.
fn backend(mut route: Fields, namespace: &str, whole: &mut Left) -> Option<Value> {
    let weight = route.take("weight");
    let at = route.path("destination");
    let Some(destination) = route.map("destination", whole) else {
        whole.tell(format!("{at} is missing"));
        return None;
    };
    route.end(whole);
    let mut backend = reference(destination, namespace, whole)?;
    if let Some(weight) = weight {
        backend["weight"] = weight;
    }
    Some(backend)
}

fn reference(mut destination: Fields, namespace: &str, whole: &mut Left) -> Option<Value> {
    let host = destination.text("host", whole).unwrap_or_default();
    let at = destination.path("port.number");
    let port = destination.map("port", whole).and_then(|mut port| port.take("number"));
    if let Some(subset) = destination.text("subset", whole) {
        let at = destination.path("subset");
        whole.tell(format!("{at} {subset}: make it a Service of its own, with the subset's labels in its selector"));
    }
    destination.end(whole);
    let Some((name, of)) = service_of(&host, namespace) else {
        whole.tell(format!("{} {host:?} is no Service", at.trim_end_matches("port.number").to_owned() + "host"));
        return None;
    };
    let Some(port) = port else {
        whole.tell(format!("{at} is missing: a backend names the port of its Service"));
        return None;
    };
    let mut reference = json!({ "name": name, "port": port });
    if of != namespace {
        reference["namespace"] = of.into();
    }
    Some(reference)
}

fn retry(mut retries: Fields, timeouts: &mut Map<String, Value>, left: &mut Left) -> Value {
    let mut ours = Map::new();
    retries.rename("attempts", "attempts", &mut ours);
    if let Some(each) = retries.text("perTryTimeout", left) {
        timeouts.insert("backendRequest".to_owned(), duration(&each).into());
    }
    let mut codes: Vec<u64> = Vec::new();
    let at = retries.path("retryOn");
    for word in
        retries.text("retryOn", left).unwrap_or_default().split(',').map(str::trim).filter(|word| !word.is_empty())
    {
        match word {
            "5xx" => codes.extend([500, 502, 503, 504]),
            "gateway-error" => codes.extend([502, 503, 504]),
            // What is tried again without a code.
            "connect-failure" | "refused-stream" | "reset" | "unavailable" => {}
            _ => match word.parse() {
                Ok(code) => codes.push(code),
                Err(_) => left.tell(format!("{at}: {word} has no counterpart here")),
            },
        }
    }
    codes.sort_unstable();
    codes.dedup();
    if !codes.is_empty() {
        ours.insert("codes".to_owned(), codes.into());
    }
    retries.end(left);
    ours.into()
}

/// Gateway API's durations have no fractions.
fn duration(text: &str) -> String {
    let units = [("ms", 1.0), ("s", 1_000.0), ("m", 60_000.0), ("h", 3_600_000.0)];
    let fraction = units.iter().find_map(|(unit, milliseconds)| {
        let number = text.strip_suffix(unit)?.parse::<f64>().ok()?;
        text.contains('.').then(|| format!("{}ms", (number * milliseconds).round()))
    });
    fraction.unwrap_or_else(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_without_fractions() {
        for (theirs, ours) in
            [("5s", "5s"), ("0.5s", "500ms"), ("1.5m", "90000ms"), ("250ms", "250ms"), ("x.5s", "x.5s")]
        {
            assert_eq!(duration(theirs), ours);
        }
    }
}
