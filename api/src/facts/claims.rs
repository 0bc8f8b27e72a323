//! The claims of a verified token, as rules and headers look at them. Whoever makes one has verified the token, or says
//! in an `explain` that it was: nothing here looks at a signature.

use serde_json::{Map, Value};

/// Claims whose text is a list of words with spaces between them, as in OAuth 2.0 (RFC 6749 section 3.3) and in Istio.
const WORDS: [&str; 2] = ["scope", "permission"];

#[derive(Clone, PartialEq, Debug, Default)]
pub struct Claims {
    values: Map<String, Value>,
    /// `ISSUER/SUBJECT`; None where one of the two is absent.
    principal: Option<String>,
}

impl Claims {
    pub fn new(values: Map<String, Value>) -> Claims {
        let text = |name: &str| values.get(name).and_then(Value::as_str);
        let principal = text("iss").zip(text("sub")).map(|(issuer, subject)| format!("{issuer}/{subject}"));
        Claims { values, principal }
    }

    pub fn values(&self) -> &Map<String, Value> {
        &self.values
    }

    /// `request.auth.principal`: `ISSUER/SUBJECT`.
    pub fn principal(&self) -> Option<&str> {
        self.principal.as_deref()
    }

    /// The value at a path of names, one of them per level.
    pub fn at<'c>(&'c self, path: &[String]) -> Option<&'c Value> {
        let (first, rest) = path.split_first()?;
        rest.iter().try_fold(self.values.get(first)?, |value, name| value.get(name))
    }

    /// The texts of a claim: of a list each element, of a number or boolean its JSON text, of `scope` and `permission`
    /// each word. False where the claim is absent or has no text. Ends when `each` answers false.
    pub fn each_text(&self, path: &[String], each: &mut dyn FnMut(&str) -> bool) -> bool {
        let Some(value) = self.at(path) else { return false };
        if let ([name], Value::String(words)) = (path, value)
            && WORDS.contains(&name.as_str())
        {
            let mut any = false;
            for word in words.split(' ').filter(|word| !word.is_empty()) {
                any = true;
                if !each(word) {
                    break;
                }
            }
            return any;
        }
        let mut any = false;
        let one = std::slice::from_ref(value);
        for value in value.as_array().map_or(one, Vec::as_slice) {
            let goes_on = match value {
                Value::String(text) => each(text),
                Value::Number(_) | Value::Bool(_) => each(&value.to_string()),
                Value::Null | Value::Array(_) | Value::Object(_) => continue,
            };
            any = true;
            if !goes_on {
                break;
            }
        }
        any
    }

    /// The value of a claim as the text of a header field: of text, numbers and booleans alone.
    pub fn field(&self, path: &[String]) -> Option<String> {
        match self.at(path)? {
            Value::String(text) => Some(text.clone()),
            value @ (Value::Number(_) | Value::Bool(_)) => Some(value.to_string()),
            Value::Null | Value::Array(_) | Value::Object(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn claims(value: Value) -> Claims {
        Claims::new(value.as_object().unwrap().clone())
    }

    fn texts(claims: &Claims, path: &[&str]) -> Option<Vec<String>> {
        let path: Vec<String> = path.iter().map(|name| (*name).to_owned()).collect();
        let mut found = Vec::new();
        let any = claims.each_text(&path, &mut |text| {
            found.push(text.to_owned());
            true
        });
        any.then_some(found)
    }

    #[test]
    fn texts_of_claims() {
        let claims = claims(json!({
            "iss": "https://a", "sub": "b", "scope": "read  write", "groups": ["x", 1, null, ["y"]], "note": "a b",
            "level": 5, "admin": true, "realm": {"roles": ["r"], "scope": "a b"}, "a.b": "dotted", "none": null, "empty": [],
        }));
        assert_eq!(claims.principal(), Some("https://a/b"));
        let cases: [(&[&str], Option<&[&str]>); 11] = [
            (&["scope"], Some(&["read", "write"])),
            (&["groups"], Some(&["x", "1"])),
            (&["note"], Some(&["a b"])),
            (&["level"], Some(&["5"])),
            (&["admin"], Some(&["true"])),
            (&["realm", "roles"], Some(&["r"])),
            (&["realm", "scope"], Some(&["a b"])),
            (&["a.b"], Some(&["dotted"])),
            (&["a", "b"], None),
            (&["none"], None),
            (&["empty"], None),
        ];
        for (path, expected) in cases {
            assert_eq!(
                texts(&claims, path).as_deref().map(|texts| texts.iter().map(String::as_str).collect::<Vec<_>>()),
                expected.map(<[&str]>::to_vec),
                "{path:?}"
            );
        }
        assert_eq!(texts(&claims, &[]), None);
        assert_eq!(Claims::new(Map::new()).principal(), None);
        assert_eq!(super::tests::claims(json!({"sub": "b"})).principal(), None, "no issuer");
    }

    #[test]
    fn fields_are_of_single_values() {
        let claims = claims(json!({"a": {"b": "c"}, "n": 1.5, "t": true, "l": ["x"], "o": {}}));
        let field = |path: &[&str]| claims.field(&path.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
        assert_eq!(field(&["a", "b"]).as_deref(), Some("c"));
        assert_eq!(field(&["n"]).as_deref(), Some("1.5"));
        assert_eq!(field(&["t"]).as_deref(), Some("true"));
        assert_eq!((field(&["l"]), field(&["o"]), field(&["x"])), (None, None, None));
    }
}
