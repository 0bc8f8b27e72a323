//! The prepared decision against the one that looks at every rule, over policies and requests that are drawn.

use std::collections::BTreeMap;

use super::form::{
    Account, Action, Attribute, Condition, DefaultAction, Operation, Policy, Prepared, Rule, Source, Values,
};
use super::{Authorization, Lists};
use crate::facts::{Connection, Moment, Request};
use crate::identity::{SpiffeId, TrustDomain};
use crate::name::ServiceName;
use crate::path::NormalPath;
use crate::policy::pattern::Pattern;

struct Dice(u64);

impl Dice {
    fn draw(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % below.max(1)
    }

    fn of<'t>(&mut self, texts: &[&'t str]) -> &'t str {
        texts[self.draw(texts.len())]
    }

    /// Mostly few, sometimes none.
    fn some<T>(&mut self, most: usize, mut one: impl FnMut(&mut Dice) -> T) -> Vec<T> {
        (0..self.draw(most + 1)).map(|_| one(self)).collect()
    }
}

const PATHS: [&str; 16] = [
    "/", "/a", "/a/b", "/a/b/c", "/a*", "/a/*", "*/c", "*", "*b", "/x*", "/x/y", "/{*}/b", "/a/{**}", "/{**}/c",
    "/{*}", "/x/{*}/z",
];
const ASKED: [&str; 15] = [
    "/", "/a", "/a/", "/a/b", "/a/b/c", "/ab", "/x/y", "/x/y/z", "//a/./b", "/a;p/b", "/a/b;q", "/%61", "/a%2fb", "/c",
    "/x?y=/a",
];
const METHODS: [&str; 4] = ["GET", "PUT", "P*", "*"];
const HOSTS: [&str; 5] = ["a.test", "b.test", "*.test", "a*", "*"];
const NAMESPACES: [&str; 3] = ["shop", "bank", "s*"];
const PRINCIPALS: [&str; 5] =
    ["outrigger.local/ns/shop/sa/a", "outrigger.local/ns/bank/sa/b", "outrigger.local/ns/shop/*", "*/sa/a", "*"];

fn lists<T>(dice: &mut Dice, one: impl Fn(&mut Dice) -> T) -> Lists<T> {
    let any_of = if dice.draw(2) == 0 { dice.some(3, &one) } else { Vec::new() };
    let none_of = if dice.draw(8) == 0 { dice.some(2, &one) } else { Vec::new() };
    Lists { any_of, none_of }
}

fn texts(dice: &mut Dice, from: &[&str]) -> Lists<Pattern> {
    lists(dice, |dice| Pattern::for_path(dice.of(from)).unwrap())
}

fn rule(dice: &mut Dice) -> Rule {
    let from = dice.some(2, |dice| Source {
        principals: if dice.draw(2) == 0 { texts(dice, &PRINCIPALS) } else { Lists::default() },
        namespaces: if dice.draw(2) == 0 { texts(dice, &NAMESPACES) } else { Lists::default() },
        service_accounts: lists(dice, |dice| Account {
            namespace: dice.of(&["shop", "bank"]).to_owned(),
            name: dice.of(&["a", "b"]).to_owned(),
        }),
        request_principals: Lists::default(),
        ip_blocks: if dice.draw(6) == 0 { lists(dice, |_| "10.0.0.0/8".parse().unwrap()) } else { Lists::default() },
    });
    let to = dice.some(2, |dice| Operation {
        hosts: if dice.draw(3) == 0 { texts(dice, &HOSTS) } else { Lists::default() },
        ports: if dice.draw(6) == 0 { lists(dice, |dice| [80, 8080][dice.draw(2)]) } else { Lists::default() },
        methods: if dice.draw(2) == 0 { texts(dice, &METHODS) } else { Lists::default() },
        paths: if dice.draw(3) != 0 { texts(dice, &PATHS) } else { Lists::default() },
    });
    let when = dice.some(1, |dice| match dice.draw(4) {
        0 => Condition { key: Attribute::Path, values: Values::Texts(texts(dice, &PATHS)) },
        1 => Condition { key: Attribute::Method, values: Values::Texts(texts(dice, &METHODS)) },
        2 => Condition { key: Attribute::Host, values: Values::Texts(texts(dice, &HOSTS)) },
        _ => Condition { key: Attribute::Header("x".into()), values: Values::Texts(texts(dice, &["1", "2"])) },
    });
    Rule { from, to, when }
}

fn authorization(dice: &mut Dice, policies: usize, rules: usize) -> Authorization {
    let policies = (0..policies).map(|number| Policy {
        namespace: "shop".into(),
        name: format!("p{number}"),
        action: [Action::Allow, Action::Deny, Action::Audit][dice.draw(3)],
        shadow: dice.draw(4) == 0,
        services: dice.some(1, |dice| dice.of(&["pay.shop", "other.shop"]).to_owned()).into_iter().take(1).collect(),
        rules: (0..rules).map(|_| rule(dice)).collect(),
    });
    let policies = policies.collect();
    let default_action = [DefaultAction::Allow, DefaultAction::Deny][dice.draw(2)];
    Authorization { policies, default_action, prepared: Prepared::default() }
}

/// Asks both and compares; says whether any policy decided.
fn compare(dice: &mut Dice, naive: &Authorization, prepared: &Authorization) -> bool {
    let domain = TrustDomain::new("outrigger.local").unwrap();
    let identity = SpiffeId::new(&domain, dice.of(&["shop", "bank", "shops"]), dice.of(&["a", "b"])).unwrap();
    let service = ServiceName::new("pay", "shop").unwrap();
    let labels = BTreeMap::new();
    let connection = Connection {
        identity: Some(&identity).filter(|_| dice.draw(5) != 0),
        source_ip: Some("10.0.0.7".parse().unwrap()),
        destination_ip: None,
        destination_port: [80, 8080][dice.draw(2)],
        service: Some(&service).filter(|_| dice.draw(5) != 0),
        labels: &labels,
        now: Moment::default(),
        sni: None,
    };
    let path = NormalPath::of(dice.of(&ASKED));
    let headers: Vec<(String, String)> = dice.some(2, |dice| ("x".to_owned(), dice.of(&["1", "2", "3"]).to_owned()));
    let long = "x".repeat(300);
    let request = Request {
        method: dice.of(&["GET", "PUT", "POST"]),
        path: &path,
        query: None,
        host: dice.of(&["a.test", "A.TEST:80", "c.test.", "", &long]),
        headers: &headers,
        claims: None,
    };
    let request = Some(&request).filter(|_| dice.draw(6) != 0);
    let expected = naive.decide(&connection, request, &mut ());
    let got = prepared.decide(&connection, request, &mut ());
    let said = |verdict: &super::Verdict<'_>| format!("{verdict:?}");
    assert_eq!(said(&got), said(&expected), "{} {request:?}", serde_json::to_string(naive).unwrap());
    assert_eq!(said(&prepared.decide(&connection, request, &mut Vec::new())), said(&expected), "with a trace");
    expected.by.is_some() || !expected.shadow.is_empty()
}

impl std::fmt::Debug for Request<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {}", self.method, self.path.text, self.host)
    }
}

#[test]
fn prepared_decisions_are_those_of_every_rule() {
    let mut dice = Dice(7);
    let mut decided = 0;
    for round in 0..400 {
        let (policies, rules) = (1 + dice.draw(6), dice.draw(5));
        let naive = authorization(&mut dice, policies, rules);
        let prepared = naive.clone();
        prepared.prepare();
        for _ in 0..60 {
            decided += usize::from(compare(&mut dice, &naive, &prepared));
        }
        assert!(round < 20 || decided > 100, "{decided}");
    }
}

/// More rules than one set holds.
#[test]
fn thousands_of_rules_are_decided_alike() {
    let mut dice = Dice(11);
    let mut naive = authorization(&mut dice, 30, 100);
    naive
        .policies
        .iter_mut()
        .for_each(|policy| policy.rules.iter_mut().for_each(|rule| rule.from = vec![only("bank")]));
    let prepared = naive.clone();
    prepared.prepare();
    for _ in 0..300 {
        compare(&mut dice, &naive, &prepared);
    }
    assert!(prepared.prepared_bytes() > 0);
}

fn only(namespace: &str) -> Source {
    Source { namespaces: Lists { any_of: vec![Pattern::new(namespace)], none_of: Vec::new() }, ..Source::default() }
}
