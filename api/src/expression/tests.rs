//! Cases of the language, of mistakes with their positions, and of bounds.

use std::borrow::Cow;

use super::*;

struct Asked {
    claims: serde_json::Value,
}

impl Facts for Asked {
    fn field(&self, field: Field) -> Option<Value<'_>> {
        Some(match field {
            Field::Method => Value::text("GET"),
            Field::Path => Value::text("/v1/charges/8371"),
            Field::Host => Value::text("payments.shop"),
            Field::Namespace => Value::text("shop"),
            Field::Port => Value::Int(8080),
            // 2026-11-28T14:30:00Z, a Saturday.
            Field::Now => Value::Timestamp(1_795_876_200),
            Field::Principal | Field::ServiceAccount | Field::SourceIp | Field::Service => return None,
        })
    }

    fn entry(&self, map: Map, key: &str) -> Result<Option<Value<'_>>, String> {
        match (map, key) {
            (Map::Headers, "x-role") => Ok(Some(Value::text("reader"))),
            (Map::Headers, "x-twice") => Err("it comes twice".to_owned()),
            (Map::SourceLabels, "tier") => Ok(Some(Value::text("web"))),
            (Map::Claims, key) => Ok(self.claims.get(key).map(Value::json)),
            _ => Ok(None),
        }
    }

    fn keys<'f>(&'f self, map: Map, each: &mut dyn FnMut(Cow<'f, str>)) {
        if map == Map::SourceLabels {
            each("tier".into());
        }
    }
}

fn facts() -> Asked {
    Asked { claims: serde_json::json!({"scope": ["read", "list"], "tenant": {"id": 7}, "admin": false}) }
}

/// `true`, `false` or the error.
fn said(text: &str) -> String {
    let expression = Expression::new(text).unwrap_or_else(|mistake| panic!("{text}: {mistake}"));
    match expression.holds(&facts()) {
        Ok(holds) => holds.to_string(),
        Err(why) => why,
    }
}

#[test]
fn the_language() {
    let cases = [
        ("true", "true"),
        ("!true", "false"),
        ("request.method == 'GET'", "true"),
        ("request.method in ['PUT', \"GET\",]", "true"),
        ("request.path.startsWith('/v1/') && !request.path.endsWith('x')", "true"),
        ("request.path.contains('charges') ? request.host == 'x' : true", "false"),
        ("size(request.path) == 16 && request.path.size() > 2", "true"),
        ("request.headers['x-role'] == 'reader'", "true"),
        ("request.headers['X-ROLE'.lowerAscii()] == 'reader'", "true"),
        ("'x-role' in request.headers && !('x-none' in request.headers)", "true"),
        ("has(source.principal)", "false"),
        ("has(source.namespace) && source.namespace == 'shop'", "true"),
        ("source.labels.tier == 'web' && has(source.labels.tier) && !has(source.labels.app)", "true"),
        ("source.labels.exists(key, key == 'tier') && size(source.labels) == 1", "true"),
        ("'read' in claims.scope && claims.tenant.id == 7", "true"),
        ("claims['scope'].exists(s, s.startsWith('li')) && claims.scope[0] == 'read'", "true"),
        ("claims.scope.all(s, size(s) == 4)", "true"),
        ("claims.scope.exists_one(s, s == 'read')", "true"),
        ("['a', 'b'].all(x, ['a', 'b', 'c'].exists(y, y == x))", "true"),
        ("claims.admin || destination.port == 8080", "true"),
        ("destination.port + 1 > 8080 && 7 / 2 == 3 && 7 % 2 == 1 && -7 < -6 && 2.5 * 2.0 == 5.0", "true"),
        (
            "now > timestamp('2026-01-01T00:00:00Z') && now - timestamp('2026-11-28T14:00:00Z') == duration('30m')",
            "true",
        ),
        ("now.getHours() == 14 && now.getMinutes() == 30 && now.getDayOfWeek() == 6", "true"),
        ("now.getFullYear() == 2026 && now.getMonth() == 10 && now.getDayOfMonth() == 27", "true"),
        ("int('7') == 7 && string(7) == '7' && double('1.5') < 2.0", "true"),
        ("'a' + 'b' == 'ab' && 'a' < 'b'", "true"),
        ("1 == 1.0 && 1 != 2 && null == null && 'x' != 1", "true"),
        ("[1, 2] == [1, 2] && [1] != [2]", "true"),
        ("true || false && false", "true"),
        ("(true || false) && false", "false"),
        ("1 + 2 * 3 == 7 && 1 - 2 - 3 == -4", "true"),
        // What decides alone decides, whatever the other side is.
        ("source.principal == 'x' || true", "true"),
        ("source.principal == 'x' && false", "false"),
        ("source.principal == 'x' || false", "source.principal is absent"),
        ("[1, 2].exists(x, x / (x - 1) == 2)", "true"),
        // No answer.
        ("request.headers['x-none'] == 'a'", "request.headers has no \"x-none\""),
        ("request.headers['x-twice'] == 'a'", "it comes twice"),
        ("claims.none == 'a'", "claims has no `none`"),
        ("claims.tenant.id", "it is an integer, neither true nor false"),
        ("1 / 0 == 1", "the number is too large, or divided by zero"),
        ("9223372036854775807 + 1 > 0", "the number is too large, or divided by zero"),
        ("-9223372036854775808 < 0", "true"),
        ("request.method > 1", "a text and an integer have no order"),
        ("claims.scope == ['read', 'list']", "maps and lists of claims are not compared as a whole"),
        ("[1][1] == 1", "a list of 1 has no place 1"),
        ("request.method ? true : false", "a text is neither true nor false"),
    ];
    for (text, expected) in cases {
        assert_eq!(said(text), expected, "{text}");
    }
}

#[test]
fn mistakes_have_a_place() {
    let deep = format!("{}true{}", "(".repeat(1_000), ")".repeat(1_000));
    let long = "true && ".repeat(400) + "true";
    let huge = format!("'{}' == 'x'", "x".repeat(MAX_SOURCE));
    let cases = [
        ("", 1, "something is missing at the end"),
        ("request.metod == 'GET'", 9, "unknown field `metod`: `request` has method, path, host, headers, query"),
        ("request == 'GET'", 1, "a field is missing"),
        ("requst.method == 'GET'", 1, "unknown name `requst`"),
        ("true &&", 8, "something is missing at the end"),
        ("true true", 6, "`true` is not expected here"),
        ("(true", 6, "expected `)`, found the end"),
        ("request.path.matches('a')", 13, "matches() is not supported"),
        ("request.path.beginsWith('a')", 13, "unknown function `beginsWith`"),
        ("startsWith('a', 'b')", 1, "unknown function `startsWith`"),
        ("request.path.startsWith()", 13, "another number of arguments"),
        ("'a", 1, "no closing quote"),
        ("'\\q' == 'q'", 2, "escape"),
        ("{'a': 1}.a == 1", 1, "maps of one's own"),
        ("0x7f == 1", 1, "is no number"),
        ("9223372036854775808 > 1", 1, "too large"),
        ("request.method = 'GET'", 16, "`=` is not expected"),
        ("request.method == #", 19, "'#' means nothing"),
        ("1 + 1", 3, "is never true or false"),
        ("request.method", 1, "is never true or false"),
        ("size(request.headers) == 1", 1, "by name only"),
        ("request.headers.exists(h, true)", 16, "by name only"),
        ("has(request.headers['x'])", 1, "write `'y' in x`"),
        ("request.method.length == 3", 15, "no fields"),
        (deep.as_str(), 64, "deeper than 64"),
        (long.as_str(), 0, "deeper than 64"),
        (huge.as_str(), 1, "longer than 4096 bytes"),
    ];
    for (text, at, message) in cases {
        let shown: String = text.chars().take(60).collect();
        let mistake = Expression::new(text).err().unwrap_or_else(|| panic!("{shown}: no mistake"));
        assert!(mistake.message.contains(message), "{shown}: {mistake}");
        assert!(at == 0 || mistake.at.abs_diff(at) <= usize::from(at == 64), "{shown}: {mistake}");
    }
}

#[test]
fn an_evaluation_is_bounded() {
    let list = format!("[{}]", vec!["1"; 100].join(", "));
    let nested = format!("{list}.all(a, {list}.all(b, {list}.all(c, a == b && b == c)))");
    assert_eq!(said(&nested), format!("it takes more than {MAX_STEPS} steps"));
    // Wherever the steps end, the answer is none: not the one that was so far.
    for length in 20..120 {
        let list = format!("[{}]", vec!["1"; length].join(", "));
        let said = said(&format!("{list}.all(a, {list}.all(b, {list}.all(c, a == b)))"));
        assert!(said == "true" && length < 30 || said.contains("steps"), "{length}: {said}");
    }
    let text = format!("'{}'", "x".repeat(1_000));
    let doubled = format!("[{text}].exists(a, size(a + a + a + a + a + a) > 0)");
    assert_eq!(said(&doubled), "true");
    assert_eq!(said(&"!".repeat(60).add_true()), "true");
}

trait AddTrue {
    fn add_true(&self) -> String;
}

impl AddTrue for String {
    fn add_true(&self) -> String {
        format!("{self}true")
    }
}

#[test]
fn what_it_looks_at() {
    let looks = |text: &str| Expression::new(text).unwrap().looks_at().clone();
    let headers = looks("request.headers['X-Role'] == 'a' || 'x-other' in request.headers");
    assert_eq!((headers.request, headers.headers), (true, vec!["x-role".to_owned(), "x-other".to_owned()]));
    let labels = looks("source.labels.tier == 'a' && source.labels['app'] == 'b'");
    assert_eq!((labels.request, labels.all_labels, labels.labels), (false, false, vec!["tier".into(), "app".into()]));
    assert!(looks("source.labels[source.namespace] == 'a'").all_labels);
    assert!(looks("source.labels.exists(x, x == 'a')").all_labels);
    assert!(looks("request.path == '/'").path && looks("now.getHours() > 1").now && looks("has(claims.x)").claims);
}

/// Whatever is written is an expression or a mistake, and whatever is an expression has an answer.
#[test]
fn any_words_in_any_order() {
    const WORDS: [&str; 34] = [
        "true", "false", "null", "1", "-", "2.5", "'a'", "request", ".", "method", "path", "headers", "[", "]", "(",
        ")", "==", "!=", "&&", "||", "!", "in", "?", ":", ",", "size", "has", "exists", "x", "claims", "scope", "now",
        "+", "<",
    ];
    let mut state = 7_u64;
    let mut draw = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let mut expressions = 0;
    for _ in 0..60_000 {
        let text: String = (0..1 + draw(9)).map(|_| WORDS[draw(WORDS.len())].to_owned() + " ").collect();
        if let Ok(expression) = Expression::new(&text) {
            let _ = expression.holds(&facts());
            expressions += 1;
        }
    }
    assert!(expressions > 100, "{expressions}");
}
