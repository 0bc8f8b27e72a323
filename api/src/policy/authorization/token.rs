//! What a rule sees of the request's token: its principal, audiences, presenter and claims. A claim that is a list matches
//! when any of its texts does, as in Istio. Without a verified token every one of these is absent.

use super::form::{Attribute, Lists};
use crate::facts::Claims;
use crate::policy::pattern::Pattern;

/// Whether the lists hold for what a token says under a key of `request.auth`.
pub(super) fn holds(lists: &Lists<Pattern>, key: &Attribute, claims: Option<&Claims>) -> bool {
    let mut wanted = lists.any_of.is_empty();
    let mut unwanted = false;
    let there = each_text(key, claims, &mut |text| {
        wanted |= lists.any_of.iter().any(|pattern| pattern.matches(text));
        unwanted |= lists.none_of.iter().any(|pattern| pattern.matches(text));
        !unwanted
    });
    if there { wanted && !unwanted } else { lists.any_of.is_empty() }
}

/// The same of `requestPrincipals`.
pub(super) fn principal_holds(lists: &Lists<Pattern>, claims: Option<&Claims>) -> bool {
    lists.hold(claims.and_then(Claims::principal), Pattern::matches)
}

/// For people: what was there.
pub(super) fn seen(key: &Attribute, claims: Option<&Claims>) -> Option<String> {
    let mut values = Vec::new();
    each_text(key, claims, &mut |text| {
        values.push(format!("{text:?}"));
        values.len() < 8
    });
    (!values.is_empty()).then(|| values.join(", "))
}

/// False where nothing is there.
fn each_text(key: &Attribute, claims: Option<&Claims>, each: &mut dyn FnMut(&str) -> bool) -> bool {
    let Some(claims) = claims else { return false };
    let named = |name: &str, each: &mut dyn FnMut(&str) -> bool| claims.each_text(&[name.to_owned()], each);
    match key {
        Attribute::RequestPrincipal => claims.principal().is_some_and(|principal| {
            each(principal);
            true
        }),
        Attribute::Audiences => named("aud", each),
        Attribute::Presenter => named("azp", each),
        Attribute::Claim(path) => claims.each_text(path, each),
        _ => false,
    }
}
