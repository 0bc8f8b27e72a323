//! The order in which matches are tried, so that the first that holds is the most specific one of Gateway API.

use std::cmp::Reverse;

use super::{Match, PathMatch, Rule, Text};

/// `rules` stand in the order that counts between equals: the oldest route first, then by name, then as they are written.
pub fn order(rules: &[Rule]) -> Vec<(usize, usize)> {
    let numbers = |(rule, of): (usize, &Rule)| (0..of.matches.len()).map(move |number| (rule, number));
    let mut order: Vec<(usize, usize)> = rules.iter().enumerate().flat_map(numbers).collect();
    // Stable: what is equally specific stays in order.
    order.sort_by_key(|(rule, number)| Reverse(specificity(&rules[*rule].matches[*number])));
    order
}

/// Greater is more specific. HTTP: an exact path, a prefix, the longer first; then the regular expressions, the longer
/// first; then one with a method, with more headers, with more query parameters. gRPC: by service, then by method, then
/// by headers. TLS: by the server name.
fn specificity(one: &Match) -> [usize; 7] {
    let (headers, query) = (one.headers.len(), one.query.len());
    match &one.path {
        Some(PathMatch::Grpc { service, method }) => {
            let [service, service_length] = of_text(service.as_ref());
            let [method, method_length] = of_text(method.as_ref());
            [service, service_length, method, method_length, headers, query, 0]
        }
        path => {
            let [kind, length] = match path {
                Some(PathMatch::Exact(text)) => [3, text.len()],
                Some(PathMatch::Prefix(text)) => [2, text.len()],
                Some(PathMatch::Regex(pattern)) => [1, pattern.as_str().len()],
                Some(PathMatch::Grpc { .. }) | None => match &one.server_name {
                    Some(name) if name.starts_with('*') => [1, name.len()],
                    Some(name) => [2, name.len()],
                    None => [0, 0],
                },
            };
            [kind, length, usize::from(one.method.is_some()), headers, query, 0, 0]
        }
    }
}

fn of_text(text: Option<&Text>) -> [usize; 2] {
    match text {
        Some(Text::Exact(text)) => [2, text.len()],
        Some(Text::Regex(pattern)) => [1, pattern.as_str().len()],
        None => [0, 0],
    }
}
