//! The CORS filter of a route: it answers preflights, and says on answers which pages of other origins may read them
//! (Fetch, section 3.3). Pure.

use http::Method;
use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, HeaderMap, HeaderName, HeaderValue, ORIGIN, VARY,
};
use http::request::Parts;
use outrigger_api::route::Cors;

/// The fields of the answer to a preflight; None: the request is none.
pub(super) fn preflight(cors: &Cors, parts: &Parts) -> Option<HeaderMap> {
    let wanted = parts.headers.get(ACCESS_CONTROL_REQUEST_METHOD).filter(|_| parts.method == Method::OPTIONS)?;
    let mut fields = HeaderMap::new();
    // An origin that is not meant gets an answer without a word about it, which its browser takes for a no.
    if !allow(cors, parts.headers.get(ORIGIN)?, &mut fields) {
        return Some(fields);
    }
    listed(cors, &cors.allow_methods, ACCESS_CONTROL_ALLOW_METHODS, Some(wanted), &mut fields);
    let asked = parts.headers.get(ACCESS_CONTROL_REQUEST_HEADERS);
    listed(cors, &cors.allow_headers, ACCESS_CONTROL_ALLOW_HEADERS, asked, &mut fields);
    fields.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from(cors.max_age));
    Some(fields)
}

/// Says on an answer that the page may read it.
pub(super) fn note(cors: &Cors, origin: &HeaderValue, fields: &mut HeaderMap) {
    for name in [ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_EXPOSE_HEADERS] {
        fields.remove(name);
    }
    if allow(cors, origin, fields) {
        listed(cors, &cors.expose_headers, ACCESS_CONTROL_EXPOSE_HEADERS, None, fields);
    }
}

fn allow(cors: &Cors, origin: &HeaderValue, fields: &mut HeaderMap) -> bool {
    if !origin.to_str().is_ok_and(|origin| cors.allows(origin)) {
        return false;
    }
    if cors.allow_credentials {
        fields.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
    }
    match !cors.allow_credentials && cors.allow_origins.iter().any(|allowed| allowed == "*") {
        true => drop(fields.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"))),
        false => {
            fields.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
            fields.append(VARY, HeaderValue::from_static("Origin"));
        }
    }
    true
}

/// With credentials `*` is a word like any other for browsers: what was asked for is named instead.
fn listed(cors: &Cors, words: &[String], name: HeaderName, asked: Option<&HeaderValue>, fields: &mut HeaderMap) {
    let all = words.iter().any(|word| word == "*");
    let value = match asked {
        Some(asked) if all && cors.allow_credentials => Some(asked.clone()),
        _ if words.is_empty() => None,
        _ => HeaderValue::from_str(&words.join(", ")).ok(),
    };
    fields.extend(value.map(|value| (name, value)));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cors(origins: &[&str], credentials: bool) -> Cors {
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        Cors {
            allow_origins: words(origins),
            allow_credentials: credentials,
            allow_methods: words(&["GET", "PUT"]),
            allow_headers: words(&["*"]),
            expose_headers: words(&["x-a"]),
            max_age: 60,
        }
    }

    fn parts(method: &str, fields: &[(&'static str, &'static str)]) -> Parts {
        let request = fields
            .iter()
            .fold(http::Request::builder().method(method), |request, (name, value)| request.header(*name, *value));
        request.body(()).unwrap().into_parts().0
    }

    fn shown(fields: &HeaderMap) -> String {
        let mut all: Vec<String> = fields
            .iter()
            .map(|(name, value)| {
                format!("{}={}", name.as_str().replace("access-control-", ""), value.to_str().unwrap())
            })
            .collect();
        all.sort();
        all.join(" ")
    }

    const ASKED: [(&str, &str); 3] = [
        ("origin", "https://a.test"),
        ("access-control-request-method", "PUT"),
        ("access-control-request-headers", "x-b"),
    ];

    #[test]
    fn preflights() {
        let asked = parts("OPTIONS", &ASKED);
        let cases = [
            (cors(&["*"], false), "allow-headers=* allow-methods=GET, PUT allow-origin=* max-age=60"),
            (
                cors(&["https://*.test"], true),
                "allow-credentials=true allow-headers=x-b allow-methods=GET, PUT allow-origin=https://a.test max-age=60 \
                 vary=Origin",
            ),
            (cors(&["https://b.test"], true), ""),
        ];
        for (cors, expected) in cases {
            assert_eq!(shown(&preflight(&cors, &asked).unwrap()), expected, "{cors:?}");
        }
        let any = cors(&["*"], false);
        assert!(preflight(&any, &parts("GET", &ASKED)).is_none());
        assert!(preflight(&any, &parts("OPTIONS", &ASKED[..1])).is_none());
        assert!(preflight(&any, &parts("OPTIONS", &ASKED[1..])).is_none());
    }

    #[test]
    fn answers() {
        let origin = HeaderValue::from_static("https://a.test");
        for (cors, expected) in [
            (cors(&["*"], false), "allow-origin=* expose-headers=x-a"),
            (cors(&["https://a.test"], false), "allow-origin=https://a.test expose-headers=x-a vary=Origin"),
            (cors(&["https://b.test"], true), ""),
        ] {
            let mut fields = HeaderMap::new();
            fields.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("https://evil.test"));
            note(&cors, &origin, &mut fields);
            assert_eq!(shown(&fields), expected, "{cors:?}");
        }
    }
}
