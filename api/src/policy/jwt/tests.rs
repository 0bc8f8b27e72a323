//! Which tokens count: tables written from RFC 7515, 7517, 7519 and 8725 and from what went wrong elsewhere. Every token
//! is made with a real key.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};

use super::{
    Asked, Authentication, ClaimHeader, Flaw, KeySet, KeySetUrl, Keys, MOST_TOKEN_BYTES, Place, Policy, Refusal,
    RemoteKeys, Rule, Verified,
};
use crate::facts::{Connection, Moment};
use crate::name::ServiceName;
use crate::policy::trace::Step;

#[path = "../../../../tests/src/issuer.rs"]
mod issuer;

use issuer::{SigningKey, encoded, key_set};

const NOW: u64 = 1_800_000_000;
const ISSUER: &str = "https://issuer.test";

fn rule(keys: &[Value]) -> Rule {
    Rule {
        issuer: ISSUER.to_owned(),
        audiences: Vec::new(),
        keys: Keys::Inline(KeySet::parse(&key_set(keys)).unwrap()),
        from: vec![Place::authorization()],
        forward: false,
        claim_headers: Vec::new(),
        payload_header: None,
    }
}

fn policy(name: &str, rules: Vec<Rule>) -> Policy {
    Policy { namespace: "shop".into(), name: name.into(), services: Vec::new(), required: false, rules }
}

fn one(rule: Rule) -> Authentication {
    Authentication { policies: vec![policy("a", vec![rule])] }
}

fn claims(more: &Value) -> Value {
    let mut claims = json!({"iss": ISSUER, "sub": "alice", "exp": NOW + 600});
    for (name, value) in more.as_object().unwrap() {
        claims[name] = value.clone();
    }
    claims.as_object_mut().unwrap().retain(|_, value| !value.is_null());
    claims
}

#[derive(Default)]
struct Fetched {
    sets: BTreeMap<String, Arc<KeySet>>,
    asked: RefCell<Vec<String>>,
}

impl RemoteKeys for Fetched {
    fn of(&self, url: &KeySetUrl) -> Option<Arc<KeySet>> {
        self.asked.borrow_mut().push(url.to_string());
        self.sets.get(&url.to_string()).cloned()
    }
}

type Outcome = Result<Option<Verified>, (Refusal, Flaw, Option<String>)>;

/// Decides about `METHOD TARGET` with these fields, with a trace and without one.
fn ask(authentication: &Authentication, request: &str, fields: &[(&str, &str)], keys: &Fetched) -> Outcome {
    let labels = BTreeMap::new();
    let service = ServiceName::new("payments", "shop").unwrap();
    let connection = Connection {
        identity: None,
        source_ip: None,
        destination_ip: None,
        destination_port: 80,
        service: Some(&service),
        labels: &labels,
        now: Moment::default(),
        sni: None,
    };
    // What travels is what decides.
    let wire = serde_json::to_string(authentication).unwrap();
    let authentication: Authentication = serde_json::from_str(&wire).unwrap();
    let (method, target) = request.split_once(' ').unwrap();
    let fields: Vec<(String, String)> =
        fields.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let query = target.split_once('?').map(|(_, query)| query);
    let asked = Asked { method, headers: &fields, query };
    let told = |outcome: Result<Option<Verified>, super::Refused<'_>>| {
        outcome.map_err(|refused| {
            let by =
                refused.by.map(|by| format!("{by}{}", by.rule.map(|rule| format!(" rule {rule}")).unwrap_or_default()));
            (refused.refusal, refused.flaw, by)
        })
    };
    let mut steps: Vec<Step> = Vec::new();
    let outcome = told(authentication.authenticate(&connection, &asked, keys, NOW, &mut steps));
    assert_eq!(
        told(authentication.authenticate(&connection, &asked, keys, NOW, &mut ())),
        outcome,
        "a trace changes nothing"
    );
    assert!(outcome.is_ok() || !steps.is_empty(), "a refusal has a step");
    outcome
}

fn bearer(authentication: &Authentication, token: &str) -> Outcome {
    ask(authentication, "GET /", &[("authorization", &format!("Bearer {token}"))], &Fetched::default())
}

fn flaw(outcome: Outcome) -> String {
    match outcome {
        Ok(Some(verified)) => format!("verified {}", verified.claims.principal().unwrap_or_default()),
        Ok(None) => "no token".to_owned(),
        Err((refusal, flaw, _)) => format!("{refusal:?}: {flaw}"),
    }
}

#[test]
fn every_algorithm_with_its_own_key_and_no_other() {
    let rsa = SigningKey::new("RSA", "r");
    let algorithms = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"];
    for algorithm in algorithms {
        let token = rsa.token_with(&json!({"alg": algorithm, "kid": "r"}), &claims(&json!({})));
        assert!(bearer(&one(rule(&[rsa.jwk()])), &token).is_ok(), "{algorithm}");
        // A key that says which algorithm it is for is for no other.
        for limited in algorithms {
            let mut jwk = rsa.jwk();
            jwk["alg"] = json!(limited);
            assert_eq!(bearer(&one(rule(&[jwk])), &token).is_ok(), limited == algorithm, "{algorithm} with {limited}");
        }
    }
    for kind in ["P-256", "P-384", "P-521", "Ed25519"] {
        let (key, other) = (SigningKey::new(kind, "k"), SigningKey::new(kind, "k"));
        let token = key.token(&claims(&json!({})));
        assert!(bearer(&one(rule(&[key.jwk()])), &token).is_ok(), "{kind}");
        assert_eq!(
            flaw(bearer(&one(rule(&[other.jwk()])), &token)),
            "Invalid: the signature is not that of a key of the issuer",
            "{kind}"
        );
        // No algorithm is taken from the token: a key of another kind does not become one of this.
        assert!(bearer(&one(rule(&[rsa.jwk()])), &token).is_err(), "{kind}");
    }
}

#[test]
fn confusions_about_the_algorithm() {
    let (rsa, ec) = (SigningKey::new("RSA", "k"), SigningKey::new("P-256", "k"));
    let good = claims(&json!({}));
    let (by_rsa, by_ec) = (one(rule(&[rsa.jwk()])), one(rule(&[ec.jwk()])));
    for alg in
        [json!("none"), json!("None"), json!("nOnE"), json!("HS256"), json!("rs256"), json!(""), json!(1), json!(null)]
    {
        let token = rsa.token_with(&json!({"alg": alg}), &good);
        assert_eq!(flaw(bearer(&by_rsa, &token)).split(' ').next(), Some("Invalid:"), "{alg}");
        let unsigned = token.rsplit_once('.').unwrap().0;
        assert!(bearer(&by_rsa, &format!("{unsigned}.")).is_err(), "{alg} unsigned");
        assert!(bearer(&by_rsa, unsigned).is_err(), "{alg} without a third part");
    }
    // HS256 with the public key as its secret.
    let signed = format!("{}.{}", encoded(br#"{"alg":"HS256","kid":"k"}"#), encoded(good.to_string().as_bytes()));
    let secret = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, rsa.jwk()["n"].as_str().unwrap().as_bytes());
    let forged = format!("{signed}.{}", encoded(aws_lc_rs::hmac::sign(&secret, signed.as_bytes()).as_ref()));
    assert_eq!(
        flaw(bearer(&by_rsa, &forged)),
        "Invalid: the token's alg \"HS256\" is not a signature with a public key"
    );
    // r = s = 0, and other lengths.
    let signed = format!("{}.{}", encoded(br#"{"alg":"ES256","kid":"k"}"#), encoded(good.to_string().as_bytes()));
    for length in [0, 1, 63, 64, 65, 96, 128] {
        let zeros = format!("{signed}.{}", encoded(&vec![0; length]));
        assert!(bearer(&by_ec, &zeros).is_err(), "{length}");
    }
    // An ES256 signature of P-256 says nothing where the key is of another curve.
    let p384 = one(rule(&[SigningKey::new("P-384", "k").jwk()]));
    assert_eq!(flaw(bearer(&p384, &ec.token(&good))), "Invalid: no key of that name allows ES256");
}

#[test]
fn what_a_token_says_of_its_own_key_is_not_heard() {
    let (trusted, own) = (SigningKey::new("P-256", "k"), SigningKey::new("P-256", "k"));
    let authentication = one(rule(&[trusted.jwk()]));
    let keys = Fetched::default();
    for (name, value) in [
        ("jwk", own.jwk()),
        ("jku", json!("http://127.0.0.1:1/keys")),
        ("x5u", json!("http://127.0.0.1:1/cert")),
        ("x5c", json!(["AAAA"])),
    ] {
        let mut header = json!({"alg": "ES256", "kid": "k"});
        header[name] = value;
        let token = own.token_with(&header, &claims(&json!({})));
        let fields = format!("Bearer {token}");
        assert!(ask(&authentication, "GET /", &[("authorization", &fields)], &keys).is_err(), "{name}");
        // Neither does it harm a token that is good without it.
        let token = trusted.token_with(&header, &claims(&json!({})));
        assert!(bearer(&authentication, &token).is_ok(), "{name}");
    }
    assert!(keys.asked.borrow().is_empty(), "nothing was asked for");
    for kid in
        [json!("../../etc/passwd"), json!("k\0"), json!("' OR 1=1 --"), json!(""), json!(["k"]), json!(7), json!("K")]
    {
        let token = trusted.token_with(&json!({"alg": "ES256", "kid": kid}), &claims(&json!({})));
        assert!(bearer(&authentication, &token).is_err(), "{kid}");
    }
    for critical in
        [json!({"crit": ["b64"], "b64": false}), json!({"crit": []}), json!({"b64": true}), json!({"zip": "DEF"})]
    {
        let mut header = json!({"alg": "ES256", "kid": "k"});
        header.as_object_mut().unwrap().extend(critical.as_object().unwrap().clone());
        assert!(bearer(&authentication, &trusted.token_with(&header, &claims(&json!({})))).is_err(), "{critical}");
    }
}

#[test]
fn names_of_keys() {
    let [a, b, bare] = [("P-256", "a"), ("P-256", "b"), ("P-256", "")].map(|(kind, id)| SigningKey::new(kind, id));
    let good = claims(&json!({}));
    let all = one(rule(&[a.jwk(), b.jwk()]));
    assert!(bearer(&all, &b.token(&good)).is_ok());
    assert!(bearer(&all, &b.token_with(&json!({"alg": "ES256"}), &good)).is_ok(), "without kid all are tried");
    assert_eq!(
        flaw(bearer(&all, &b.token_with(&json!({"alg": "ES256", "kid": "a"}), &good))),
        "Invalid: the signature is not that of a key of the issuer"
    );
    assert_eq!(
        flaw(bearer(&all, &bare.token_with(&json!({"alg": "ES256", "kid": "c"}), &good))),
        "Invalid: the key set has no key c"
    );
    assert!(
        bearer(&one(rule(&[a.jwk(), bare.jwk()])), &bare.token_with(&json!({"alg": "ES256", "kid": "c"}), &good))
            .is_ok()
    );
}

#[test]
fn key_sets() {
    let (rsa, ec) = (SigningKey::new("RSA", "r"), SigningKey::new("P-256", "k"));
    let with = |key: &SigningKey, name: &str, value: Value| {
        let mut jwk = key.jwk();
        jwk[name] = value;
        jwk
    };
    let unusable = [
        with(&rsa, "use", json!("enc")),
        with(&rsa, "key_ops", json!(["encrypt"])),
        with(&rsa, "alg", json!("HS256")),
        with(&rsa, "alg", json!("ES256")),
        with(&rsa, "alg", json!("RSA-OAEP")),
        with(&rsa, "n", json!(encoded(&[255; 128]))),
        with(&rsa, "n", json!(encoded(&[1; 4096]))),
        with(&rsa, "n", json!("!")),
        with(&rsa, "e", json!("AQ")),
        with(&rsa, "e", json!("Ag")),
        with(&rsa, "kty", json!("oct")),
        with(&ec, "crv", json!("secp256k1")),
        with(&ec, "crv", json!("P-384")),
        with(&ec, "x", json!("AAAA")),
        with(&ec, "alg", json!("ES384")),
        json!({"kty": "oct", "k": "AAAA"}),
        json!({"kty": "OKP", "crv": "X25519", "x": encoded(&[1; 32])}),
        json!({}),
        json!("key"),
    ];
    for key in unusable {
        assert!(KeySet::parse(&key_set(std::slice::from_ref(&key))).is_err(), "{key}");
        let set = KeySet::parse(&key_set(&[key.clone(), ec.jwk()])).unwrap();
        assert_eq!(set.unusable().len(), 1, "{key}");
    }
    for text in ["", "{}", "[]", "{\"keys\": {}}", "{\"keys\": []}"] {
        assert!(KeySet::parse(text).is_err(), "{text}");
    }
    assert!(KeySet::parse(&key_set(&vec![ec.jwk(); 65])).is_err());
    assert!(KeySet::parse(&" ".repeat(super::MOST_KEY_SET_BYTES + 1)).is_err());
    let padded = with(&rsa, "n", json!(encoded(&[&[0, 0], modulus(&rsa).as_slice()].concat())));
    assert!(bearer(&one(rule(&[padded])), &rsa.token(&claims(&json!({})))).is_ok());
}

fn modulus(key: &SigningKey) -> Vec<u8> {
    use base64::Engine;
    base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(key.jwk()["n"].as_str().unwrap()).unwrap()
}

#[test]
fn times() {
    let key = SigningKey::new("Ed25519", "k");
    let authentication = one(rule(&[key.jwk()]));
    let cases = [
        (json!({}), true),
        (json!({"exp": null}), false),
        (json!({"exp": (NOW + 600).to_string()}), false),
        (json!({"exp": -1}), false),
        (json!({"exp": [NOW + 600]}), false),
        (json!({"exp": true}), false),
        (json!({"exp": NOW as f64 + 600.5}), true),
        (json!({"exp": 1e300}), true),
        (json!({"exp": NOW}), true),
        (json!({"exp": NOW - 59}), true),
        (json!({"exp": NOW - 60}), false),
        (json!({"exp": 0}), false),
        (json!({"nbf": NOW}), true),
        (json!({"nbf": NOW + 60}), true),
        (json!({"nbf": NOW + 61}), false),
        (json!({"nbf": "now"}), false),
        (json!({"nbf": 1e300}), false),
        (json!({"iat": NOW + 3600}), true),
    ];
    for (more, expected) in cases {
        let outcome = bearer(&authentication, &key.token(&claims(&more)));
        assert_eq!(outcome.is_ok(), expected, "{more}: {}", flaw(outcome.clone()));
    }
    let verified = bearer(&authentication, &key.token(&claims(&json!({})))).unwrap().unwrap();
    assert_eq!(verified.until, NOW + 660);
}

#[test]
fn issuers_and_audiences() {
    let key = SigningKey::new("Ed25519", "k");
    let for_us = Rule { audiences: vec!["payments".into(), "shop".into()], ..rule(&[key.jwk()]) };
    let cases = [
        (json!({"aud": "payments"}), true),
        (json!({"aud": ["x", "shop"]}), true),
        (json!({"aud": "payment"}), false),
        (json!({"aud": "payments "}), false),
        (json!({"aud": "Payments"}), false),
        (json!({"aud": "payments shop"}), false),
        (json!({"aud": []}), false),
        (json!({"aud": {"payments": 1}}), false),
        (json!({}), false),
        (json!({"aud": "payments", "iss": "https://issuer.test/"}), false),
        (json!({"aud": "payments", "iss": "https://issuer.tes"}), false),
        (json!({"aud": "payments", "iss": ["https://issuer.test"]}), false),
        (json!({"aud": "payments", "iss": null}), false),
    ];
    for (more, expected) in cases {
        let outcome = bearer(&one(for_us.clone()), &key.token(&claims(&more)));
        assert_eq!(outcome.is_ok(), expected, "{more}: {}", flaw(outcome.clone()));
    }
    assert!(bearer(&one(rule(&[key.jwk()])), &key.token(&claims(&json!({"aud": "anybody"})))).is_ok());
    // Several issuers, in one object and in several; the same one with other keys.
    let second = SigningKey::new("Ed25519", "k");
    let other = Rule { issuer: "https://second.test".into(), ..rule(&[second.jwk()]) };
    let rotated = rule(&[second.jwk()]);
    let both =
        Authentication { policies: vec![policy("a", vec![rule(&[key.jwk()]), other]), policy("b", vec![rotated])] };
    assert!(bearer(&both, &key.token(&claims(&json!({})))).is_ok());
    assert!(bearer(&both, &second.token(&claims(&json!({"iss": "https://second.test"})))).is_ok());
    let verified = bearer(&both, &second.token(&claims(&json!({})))).unwrap().unwrap();
    assert_eq!((verified.policy, verified.rule), (1, 0));
    assert!(
        bearer(&both, &key.token(&claims(&json!({"iss": "https://second.test"})))).is_err(),
        "a key signs for its issuer alone"
    );
    assert_eq!(
        flaw(bearer(&both, &key.token(&claims(&json!({"iss": "https://third.test"}))))),
        "Invalid: no rule takes tokens of the issuer \"https://third.test\" from the header authorization; the rules say \
         https://issuer.test, https://second.test"
    );
}

#[test]
fn forms_of_tokens() {
    let key = SigningKey::new("Ed25519", "k");
    let authentication = one(rule(&[key.jwk()]));
    let good = key.token(&claims(&json!({})));
    assert!(bearer(&authentication, &good).is_ok());
    let parts: Vec<&str> = good.split('.').collect();
    let wrong = [
        String::new(),
        "opaque".to_owned(),
        format!("{good}.x"),
        format!("{good}="),
        format!("{good}, Bearer {good}"),
        format!("{}.{}", parts[0], parts[1]),
        format!("{}..{}", parts[0], parts[2]),
        format!("{}.{}.{}", parts[0], parts[1], parts[1]),
        format!(".{}.{}", parts[1], parts[2]),
        format!("{}.{}.{}", encoded(b"[]"), parts[1], parts[2]),
        format!("{}.{}.{}", encoded(b"{\"alg\":\"EdDSA\"} x"), parts[1], parts[2]),
        format!("{}.{}.{}", parts[0], encoded(b"\"x\""), parts[2]),
        format!("{}.{}.{}", parts[0], parts[1], parts[2].replace(['-', '_'], "+")) + "+",
        good.replace('.', "\u{2024}"),
        "a".repeat(1 << 20),
        "a".repeat(MOST_TOKEN_BYTES + 1),
        format!("{}.{}.{}", "[".repeat(9000), parts[1], parts[2]),
    ];
    for token in wrong {
        assert!(bearer(&authentication, &token).is_err(), "{}", token.chars().take(100).collect::<String>());
    }
    // A JWS in JSON form with two signatures is no compact one.
    assert!(bearer(&authentication, &json!({"payload": parts[1], "signatures": [{}, {}]}).to_string()).is_err());
    // One bit of any part.
    for index in [parts[0].len() - 1, parts[0].len() + 10, good.len() - 2] {
        let mut changed = good.clone().into_bytes();
        changed[index] = if changed[index] == b'A' { b'B' } else { b'A' };
        assert!(bearer(&authentication, &String::from_utf8(changed).unwrap()).is_err(), "{index}");
    }
}

#[test]
fn where_a_token_stands() {
    let key = SigningKey::new("Ed25519", "k");
    let named = Rule {
        from: vec![
            Place::Header { name: "x-jwt".into(), prefix: String::new() },
            Place::Parameter("access_token".into()),
        ],
        ..rule(&[key.jwk()])
    };
    let good = key.token(&claims(&json!({})));
    let bearer = format!("Bearer {good}");
    let (bearer, good) = (bearer.as_str(), good.as_str());
    let by_header = one(rule(&[key.jwk()]));
    let by_name = one(named.clone());
    let query = format!("GET /?access_token={good}");
    let twice = format!("GET /?access_token={good}&access_token={good}");
    type Case<'c> = (&'c Authentication, &'c str, &'c [(&'c str, &'c str)], &'c str);
    let cases: &[Case<'_>] = &[
        (&by_header, "GET /", &[("authorization", bearer)], "verified https://issuer.test/alice"),
        (&by_header, "GET /", &[("Authorization", bearer)], "verified https://issuer.test/alice"),
        (&by_header, "GET /", &[], "no token"),
        (&by_header, "GET /", &[("authorization", "Basic YTpi")], "no token"),
        (&by_header, &query, &[], "no token"),
        (
            &by_header,
            "GET /",
            &[("authorization", bearer), ("authorization", bearer)],
            "Invalid: authorization has more than one value",
        ),
        (
            &by_header,
            "GET /",
            &[("authorization", "Basic a"), ("authorization", bearer)],
            "Invalid: authorization has more than one value",
        ),
        (&by_header, "GET /", &[("authorization", "Bearer")], "Invalid: the token is empty"),
        (
            &by_header,
            "GET /",
            &[("authorization", "bearer x")],
            "Invalid: the token is not three parts of base64url with dots between: another number of dots",
        ),
        // What a rule names takes the place of Authorization.
        (&by_name, "GET /", &[("authorization", bearer)], "no token"),
        (&by_name, "GET /", &[("x-jwt", good)], "verified https://issuer.test/alice"),
        (&by_name, &query, &[], "verified https://issuer.test/alice"),
        (&by_name, &twice, &[], "Invalid: access_token has more than one value"),
        (&by_name, &query, &[("x-jwt", good)], "Invalid: the request has 2 tokens, and one may be there"),
    ];
    for (authentication, request, fields, expected) in cases {
        assert_eq!(
            flaw(ask(authentication, request, fields, &Fetched::default())),
            *expected,
            "{request:.40} {fields:?}"
        );
    }
    // A rule takes its tokens from its own places alone.
    let second = SigningKey::new("Ed25519", "k");
    let other = Rule { issuer: "https://second.test".into(), ..rule(&[second.jwk()]) };
    let both = Authentication { policies: vec![policy("a", vec![named, other])] };
    assert!(ask(&both, "GET /", &[("authorization", bearer)], &Fetched::default()).is_err());
}

#[test]
fn required_tokens() {
    let key = SigningKey::new("Ed25519", "k");
    let token = format!("Bearer {}", key.token(&claims(&json!({}))));
    let with: &[(&str, &str)] = &[("authorization", &token)];
    let must = |name: &str, rules: Vec<Rule>| Policy { required: true, ..policy(name, rules) };
    let required = Authentication { policies: vec![policy("b", vec![]), must("a", vec![rule(&[key.jwk()])])] };
    let none = Fetched::default();
    assert!(ask(&required, "GET /", with, &none).is_ok());
    let (refusal, _, by) = ask(&required, "GET /", &[], &none).unwrap_err();
    assert_eq!((refusal, by.as_deref()), (Refusal::Missing, Some("RequestAuthentication/shop/a")));
    // A CORS preflight needs none; other OPTIONS do.
    let preflight: &[(&str, &str)] = &[("origin", "https://a"), ("access-control-request-method", "PUT")];
    assert_eq!(ask(&required, "OPTIONS /", preflight, &none), Ok(None));
    assert!(ask(&required, "GET /", preflight, &none).is_err());
    assert!(ask(&required, "OPTIONS /", &preflight[..1], &none).is_err());
    // Without rules nothing is valid, whatever another object says.
    let broken = Authentication { policies: vec![policy("a", vec![rule(&[key.jwk()])]), must("~x", vec![])] };
    assert_eq!(ask(&broken, "GET /", with, &none).unwrap_err().1, Flaw::Broken);
    assert_eq!(ask(&broken, "GET /", &[], &none).unwrap_err().0, Refusal::Missing);
    // An object of another Service's ports is none here.
    let elsewhere = Policy { services: vec!["other.shop".into()], ..must("a", vec![]) };
    assert_eq!(ask(&Authentication { policies: vec![elsewhere] }, "GET /", &[], &none), Ok(None));
    let here = Policy { services: vec!["payments.shop".into()], ..must("a", vec![]) };
    assert!(ask(&Authentication { policies: vec![here] }, "GET /", &[], &none).is_err());
}

#[test]
fn key_sets_behind_a_url() {
    let (key, next) = (SigningKey::new("Ed25519", "k"), SigningKey::new("Ed25519", "next"));
    let url = KeySetUrl::parse("https://issuer.test/keys").unwrap();
    let remote = Rule { keys: Keys::Remote { url: url.clone(), timeout_ms: 5000 }, ..rule(&[key.jwk()]) };
    let authentication = one(remote.clone());
    let token = |key: &SigningKey| format!("Bearer {}", key.token(&claims(&json!({}))));
    let ask =
        |keys: &Fetched, token: &str| super::tests::ask(&authentication, "GET /", &[("authorization", token)], keys);
    let mut keys = Fetched::default();
    let (refusal, _, by) = ask(&keys, &token(&key)).unwrap_err();
    assert_eq!((refusal, by.as_deref()), (Refusal::KeysUnavailable, Some("RequestAuthentication/shop/a rule 0")));
    // What is wrong without any key is wrong.
    let ended = format!("Bearer {}", key.token(&claims(&json!({"exp": 1}))));
    assert_eq!(ask(&keys, &ended).unwrap_err().0, Refusal::Invalid);
    keys.sets.insert(url.to_string(), Arc::new(KeySet::parse(&key_set(&[key.jwk()])).unwrap()));
    assert!(ask(&keys, &token(&key)).is_ok());
    assert_eq!(ask(&keys, &token(&next)).unwrap_err().1, Flaw::UnknownKey("next".into()));
    // A set that is not known may be the one that says yes.
    let inline = rule(&[next.jwk()]);
    let both = Authentication { policies: vec![policy("a", vec![remote, inline])] };
    let none = Fetched::default();
    assert_eq!(
        super::tests::ask(&both, "GET /", &[("authorization", &token(&key))], &none).unwrap_err().0,
        Refusal::KeysUnavailable
    );
    assert!(super::tests::ask(&both, "GET /", &[("authorization", &token(&next))], &none).is_ok());
}

#[test]
fn what_travels_is_whole_or_nothing() {
    let key = SigningKey::new("Ed25519", "k");
    let told = ClaimHeader { header: "x-sub".into(), claim: vec!["sub".into()] };
    let authentication =
        one(Rule { claim_headers: vec![told], payload_header: Some("x-payload".into()), ..rule(&[key.jwk()]) });
    assert_eq!(authentication.told_fields().collect::<Vec<_>>(), ["x-sub", "x-payload"]);
    let wire = serde_json::to_value(&authentication).unwrap();
    assert_eq!(serde_json::from_value::<Authentication>(wire.clone()).unwrap(), authentication);
    for pointer in ["", "/policies/0", "/policies/0/rules/0", "/policies/0/rules/0/claimHeaders/0"] {
        let mut newer = wire.clone();
        newer.pointer_mut(pointer).unwrap()["newer"] = json!(1);
        assert!(serde_json::from_value::<Authentication>(newer).is_err(), "{pointer}");
    }
    let mut newer = wire;
    newer["policies"][0]["rules"][0]["keys"] = json!({"newer": {}});
    assert!(serde_json::from_value::<Authentication>(newer).is_err());
}
