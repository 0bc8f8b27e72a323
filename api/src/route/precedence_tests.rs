//! Which of several matches wins, case by case, and against a matcher that looks at all of them.

use super::*;
use crate::facts::Request;
use crate::path::NormalPath;

fn exact(text: &str) -> Text {
    Text::Exact(text.to_owned())
}

/// `= /a`, `^ /a` or `~ /a.*`, then `GET`, `h=v` for a header and `?q=v` for a query parameter.
fn one(written: &str) -> Match {
    let mut words = written.split(' ');
    let mut found = Match::default();
    while let Some(word) = words.next() {
        let mut next = || words.next().unwrap();
        match word {
            "=" => found.path = Some(PathMatch::Exact(next().into())),
            "^" => found.path = Some(PathMatch::Prefix(next().trim_end_matches('/').into())),
            "~" => found.path = Some(PathMatch::Regex(Pattern::new(next()).unwrap())),
            word => match (word.strip_prefix('?'), word.split_once('=')) {
                (Some(pair), _) => {
                    let (name, value) = pair.split_once('=').unwrap();
                    found.query.push(QueryMatch { name: name.to_owned(), value: exact(value) });
                }
                (None, Some((name, value))) => {
                    found.headers.push(HeaderMatch { name: name.to_owned(), value: exact(value) });
                }
                (None, None) => found.method = Some(word.to_owned()),
            },
        }
    }
    found
}

fn routes(kind: Kind, matches: &[Match]) -> Routes {
    let rule = |(index, one): (usize, &Match)| Rule {
        object: format!("{kind}/shop/r").into(),
        index,
        name: None,
        matches: vec![one.clone()],
        filters: Filters::default(),
        backends: Vec::new(),
        timeouts: Timeouts::default(),
        retry: None,
    };
    let rules: Vec<Rule> = matches.iter().enumerate().map(rule).collect();
    Routes { kind, order: order(&rules), rules }
}

fn chosen(routes: &Routes, method: &str, target: &str, headers: &[(&str, &str)]) -> Option<usize> {
    let path = NormalPath::of(target);
    let headers: Vec<(String, String)> =
        headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let grpc = headers.iter().any(|(_, value)| value == "application/grpc");
    let request = Request { method, path: &path, query: None, host: "pay.shop", headers: &headers, claims: None };
    let query = target.split_once('?').map(|(_, query)| query);
    routes.decide(&Asked { request: &request, query, grpc }, &mut ()).map(|found| found.rule.index)
}

#[test]
fn the_most_specific_match_wins() {
    /// What is asked, and which of the matches answers.
    type Asks = &'static [(&'static str, &'static [(&'static str, &'static str)], Option<usize>)];
    let cases: [(&[&str], Asks); 12] = [
        (&["^ /", "= /a", "^ /a"], &[("GET /a", &[], Some(1)), ("GET /a/", &[], Some(2)), ("GET /b", &[], Some(0))]),
        (&["^ /a", "^ /a/b", "^ /a/b/c"], &[("GET /a/b/c/d", &[], Some(2)), ("GET /a/b/cd", &[], Some(1))]),
        (
            &["~ /a.*", "^ /a", "= /a"],
            &[("GET /a", &[], Some(2)), ("GET /a/x", &[], Some(1)), ("GET /ab", &[], Some(0))],
        ),
        (&["~ /a.*", "~ /a[b-z]*"], &[("GET /abc", &[], Some(1)), ("GET /a1", &[], Some(0))]),
        (&["^ /a", "^ /a GET"], &[("GET /a", &[], Some(1)), ("PUT /a", &[], Some(0))]),
        (&["^ /a h=1", "^ /a GET"], &[("GET /a", &[("h", "1")], Some(1)), ("PUT /a", &[("h", "1")], Some(0))]),
        (
            &["^ /a h=1", "^ /a h=1 i=2"],
            &[("GET /a", &[("h", "1"), ("i", "2")], Some(1)), ("GET /a", &[("h", "1")], Some(0))],
        ),
        (&["^ /a ?q=1", "^ /a h=1"], &[("GET /a?q=1", &[("h", "1")], Some(1)), ("GET /a?q=1", &[], Some(0))]),
        (&["^ /a ?q=1", "^ /a ?q=1 ?r=2"], &[("GET /a?r=2&q=1", &[], Some(1)), ("GET /a?q=1", &[], Some(0))]),
        (&["^ /a h=1", "^ /a h=1"], &[("GET /a", &[("h", "1")], Some(0))]),
        (&["^ /a GET h=1 ?q=1", "^ /a/b"], &[("GET /a/b?q=1", &[("h", "1")], Some(1))]),
        (&["= /a", "^ /b h=1"], &[("GET /c", &[], None), ("GET /b", &[], None), ("GET /b", &[("H", "1")], Some(1))]),
    ];
    for (matches, asks) in cases {
        let routes = routes(Kind::Http, &matches.iter().map(|text| one(text)).collect::<Vec<_>>());
        for (asked, headers, expected) in asks {
            let (method, target) = asked.split_once(' ').unwrap();
            assert_eq!(chosen(&routes, method, target, headers), *expected, "{matches:?} {asked} {headers:?}");
        }
    }
}

#[test]
fn paths_are_compared_in_their_normal_form() {
    let spaced = Match { path: Some(PathMatch::Exact("/a b".into())), ..Match::default() };
    let routes = routes(Kind::Http, &[spaced, one("^ /x")]);
    for (target, expected) in [
        ("/a%20b", Some(0)),
        ("/x/../a%20b", Some(0)),
        ("//x", Some(1)),
        ("/y/%2e%2e/x/z", Some(1)),
        ("/x%2fz", None),
        ("/a%2520b", None),
    ] {
        assert_eq!(chosen(&routes, "GET", target, &[]), expected, "{target}");
    }
}

#[test]
fn a_field_with_several_lines_is_one_with_commas() {
    let routes = routes(Kind::Http, &[one("^ / h=1,2"), one("^ / host=pay.shop")]);
    assert_eq!(chosen(&routes, "GET", "/", &[("h", "1"), ("H", "2")]), Some(0));
    assert_eq!(chosen(&routes, "GET", "/", &[("h", "1")]), Some(1));
}

#[test]
fn grpc_by_service_then_method_then_headers() {
    let call = |service: Option<&str>, method: Option<&str>, headers: &str| {
        let path = PathMatch::Grpc { service: service.map(exact), method: method.map(exact) };
        Match { path: Some(path), ..one(headers) }
    };
    let plain = |service, method| call(service, method, "x=1").without_headers();
    let all = [plain(None, None), plain(None, Some("C")), plain(Some("a.B"), None), plain(Some("a.B"), Some("C"))];
    let routes = routes(Kind::Grpc, &[&all[..], &[call(Some("a.B"), Some("C"), "h=1")]].concat());
    const GRPC: (&str, &str) = ("content-type", "application/grpc");
    for (path, headers, expected) in [
        ("/a.B/C", vec![GRPC, ("h", "1")], Some(4)),
        ("/a.B/C", vec![GRPC], Some(3)),
        ("/a.B/D", vec![GRPC], Some(2)),
        ("/x.Y/C", vec![GRPC], Some(1)),
        ("/x.Y/D", vec![GRPC], Some(0)),
        ("/a.B/C", vec![], None),
    ] {
        assert_eq!(chosen(&routes, "POST", path, &headers), expected, "{path} {headers:?}");
    }
}

impl Match {
    fn without_headers(self) -> Match {
        Match { headers: Vec::new(), ..self }
    }
}

#[test]
fn tls_by_the_server_name() {
    let name = |name: Option<&str>| Match { server_name: name.map(str::to_owned), ..Match::default() };
    let names = [None, Some("*.test"), Some("*.a.test"), Some("b.a.test")];
    let routes = routes(Kind::Tls, &names.map(name));
    for (asked, expected) in
        [(Some("b.a.test"), 3), (Some("c.a.test"), 2), (Some("c.test"), 1), (Some("other"), 0), (None, 0)]
    {
        let found = routes.decide_connection(asked, &mut ()).map(|found| found.rule.index);
        assert_eq!(found, Some(expected), "{asked:?}");
    }
}

/// All that hold, the best of them by the words of Gateway API, with nothing sorted beforehand.
fn naive(matches: &[Match], method: &str, path: &str, headers: &[(&str, &str)]) -> Option<usize> {
    let mut best: Option<(usize, Vec<usize>)> = None;
    for (index, one) in matches.iter().enumerate() {
        let (rank, length, holds) = match one.path.as_ref().unwrap() {
            PathMatch::Exact(text) => (3, text.len(), **text == *path),
            PathMatch::Prefix(text) => (2, text.len(), format!("{path}/").starts_with(&format!("{text}/"))),
            PathMatch::Regex(pattern) => (1, pattern.as_str().len(), pattern.is_match(path)),
            PathMatch::Grpc { .. } => unreachable!(),
        };
        let has = |wanted: &HeaderMatch| headers.contains(&(wanted.name.as_str(), wanted.value.as_str()));
        let holds = holds && one.method.as_deref().is_none_or(|wanted| wanted == method) && one.headers.iter().all(has);
        let score = vec![rank, length, usize::from(one.method.is_some()), one.headers.len()];
        if holds && best.as_ref().is_none_or(|(_, before)| score > *before) {
            best = Some((index, score));
        }
    }
    best.map(|(index, _)| index)
}

#[test]
fn any_set_of_matches_is_decided_as_a_naive_matcher_would() {
    let mut state = 7_u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as usize % below
    };
    let paths = ["/", "/a", "/a/b", "/a/b/c", "/ab", "/b"];
    let expressions = ["/a.*", "/[ab]", ".*", "/a/b/c"];
    for _ in 0..3_000 {
        let matches: Vec<Match> = (0..1 + random(6))
            .map(|_| {
                let mut text = match random(3) {
                    0 => format!("= {}", paths[random(paths.len())]),
                    1 => format!("^ {}", paths[random(paths.len())]),
                    _ => format!("~ {}", expressions[random(expressions.len())]),
                };
                if random(3) == 0 {
                    text += ["", " GET", " PUT"][random(3)];
                }
                for header in [" h=1", " i=2"] {
                    if random(4) == 0 {
                        text += header;
                    }
                }
                one(text.trim())
            })
            .collect();
        let routes = routes(Kind::Http, &matches);
        let (method, path) = (["GET", "PUT"][random(2)], paths[random(paths.len())]);
        let all = [("h", "1"), ("i", "2")];
        let headers: Vec<(&str, &str)> = all.into_iter().filter(|_| random(2) == 0).collect();
        let expected = naive(&matches, method, path, &headers);
        assert_eq!(chosen(&routes, method, path, &headers), expected, "{matches:?} {method} {path} {headers:?}");
    }
}

#[test]
fn an_unknown_field_refuses_the_whole() {
    let known = serde_json::to_string(&routes(Kind::Http, &[one("^ /a h=1 ?q=1"), one("~ /x.* GET")])).unwrap();
    assert_eq!(
        serde_json::from_str::<Routes>(&known).unwrap(),
        routes(Kind::Http, &[one("^ /a h=1 ?q=1"), one("~ /x.* GET")])
    );
    for (from, to) in [
        (r#""kind":"#, r#""newer":1,"kind":"#),
        (r#""index":0"#, r#""index":0,"newer":1"#),
        (r#""method":"GET""#, r#""method":"GET","newer":1"#),
        (r#"{"Prefix":"/a"}"#, r#"{"Newer":"/a"}"#),
        (r#""HTTPRoute""#, r#""UDPRoute""#),
        (r#""/x.*""#, r#""(""#),
    ] {
        let newer = known.replacen(from, to, 1);
        assert_ne!(newer, known, "{from}");
        assert!(serde_json::from_str::<Routes>(&newer).is_err(), "{newer}");
    }
}
