//! The facts of a decision as an expression sees them, and the labels of callers.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::form::ByAccount;
use super::rule::Look;
use crate::expression::{Expression, Facts, Field, Map, Value};
use crate::facts::Claims;

impl Look<'_, '_> {
    /// What the table has for the caller's account.
    pub(super) fn label<'t>(&self, accounts: &'t ByAccount<String>) -> Option<&'t str> {
        let identity = self.connection.identity?;
        accounts.get(identity.namespace())?.get(identity.account()).map(String::as_str)
    }

    /// Whether an expression holds; the error says why it has no answer.
    pub(super) fn evaluate(
        &self,
        expression: &Expression,
        accounts: &ByAccount<BTreeMap<String, String>>,
    ) -> Result<bool, String> {
        let identity = self.connection.identity;
        let labels = identity.and_then(|identity| accounts.get(identity.namespace())?.get(identity.account()));
        expression.holds(&Seen { look: self, labels })
    }
}

struct Seen<'s> {
    look: &'s Look<'s, 's>,
    /// Of the caller.
    labels: Option<&'s BTreeMap<String, String>>,
}

impl Facts for Seen<'_> {
    fn field(&self, field: Field) -> Option<Value<'_>> {
        let (connection, request) = (self.look.connection, self.look.request);
        match field {
            Field::Method => request.map(|request| Value::text(request.method)),
            Field::Path => request.map(|request| Value::text(&request.path.text)),
            Field::Host => request.map(|request| Value::Text(Cow::Owned(crate::facts::normal_host(request.host)))),
            Field::Principal => connection.identity.map(|identity| Value::text(identity.as_str())),
            Field::Namespace => connection.identity.map(|identity| Value::text(identity.namespace())),
            Field::ServiceAccount => connection.identity.map(|identity| Value::text(identity.account())),
            Field::SourceIp => connection.source_ip.map(|ip| Value::Text(Cow::Owned(ip.to_canonical().to_string()))),
            Field::Service => connection.service.map(|service| Value::Text(Cow::Owned(service.to_string()))),
            Field::Port => Some(Value::Int(i64::from(connection.destination_port))),
            Field::Now => Some(Value::Timestamp(i64::try_from(connection.now.unix).unwrap_or(i64::MAX))),
        }
    }

    fn entry(&self, map: Map, key: &str) -> Result<Option<Value<'_>>, String> {
        let of = |labels: Option<&'_ BTreeMap<String, String>>| labels.and_then(|labels| labels.get(key)).cloned();
        let text = |text: String| Value::Text(Cow::Owned(text));
        match map {
            Map::DestinationLabels => Ok(of(Some(self.look.connection.labels)).map(text)),
            Map::SourceLabels => Ok(of(self.labels).map(text)),
            Map::Headers => self.header(key).map(|found| found.map(text)),
            Map::Query => self.parameter(key).map(|found| found.map(text)),
            Map::Claims => Ok(self.claims().and_then(|claims| claims.values().get(key)).map(Value::json)),
        }
    }

    fn keys<'f>(&'f self, map: Map, each: &mut dyn FnMut(Cow<'f, str>)) {
        if map == Map::Claims {
            let claims = self.claims().into_iter().flat_map(|claims| claims.values().keys());
            return claims.for_each(|key| each(Cow::Borrowed(key)));
        }
        let labels = match map {
            Map::DestinationLabels => Some(self.look.connection.labels),
            Map::SourceLabels => self.labels,
            Map::Headers | Map::Query | Map::Claims => None,
        };
        labels.into_iter().flatten().for_each(|(key, _)| each(Cow::Borrowed(key)));
    }
}

impl<'s> Seen<'s> {
    /// Those of the request's verified token.
    fn claims(&self) -> Option<&'s Claims> {
        self.look.request.and_then(|request| request.claims)
    }

    /// One line is one value. Several lines have no answer: which of them counts, an application alone knows.
    fn header(&self, name: &str) -> Result<Option<String>, String> {
        let Some(request) = self.look.request else { return Ok(None) };
        let (mut first, mut count) = (None, 0);
        request.headers.each_value(&name.to_ascii_lowercase(), &mut |value| {
            count += 1;
            first.get_or_insert_with(|| String::from_utf8_lossy(value).into_owned());
            count < 2
        });
        if count > 1 { Err(format!("the header {name} comes several times")) } else { Ok(first) }
    }

    /// A parameter of the query, decoded.
    fn parameter(&self, name: &str) -> Result<Option<String>, String> {
        let query = self.look.request.and_then(|request| request.query).unwrap_or_default();
        let mut found = query.split('&').filter(|pair| !pair.is_empty()).filter_map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decoded(key) == name).then(|| decoded(value))
        });
        let first = found.next();
        if found.next().is_some() { Err(format!("the parameter {name} comes several times")) } else { Ok(first) }
    }
}

fn decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let escape = (*byte == b'%').then(|| text.get(at + 1..at + 3)).flatten();
        let value = escape.filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
        match value.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(value) => {
                out.push(value);
                at += 3;
            }
            None => {
                out.push(if *byte == b'+' { b' ' } else { *byte });
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}
