//! The normal form of a request's path, which policy and routes look at, and what makes a path ambiguous: spellings
//! that two servers may read as two resources. What is forwarded is never the normal form but what came.

use std::borrow::Cow;

/// Why two servers may read a path differently. A rule about paths cannot be applied to such a path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ambiguity {
    EncodedSlash,
    EncodedBackslash,
    Nul,
    Backslash,
    /// `%2541`: decoded once it is an escape again.
    DoubleEncoding,
    /// `%` without two hexadecimal digits behind it.
    BrokenEscape,
    NotUtf8,
    AboveRoot,
    /// `//..`: does `..` take away the empty segment, or the one before it?
    EmptySegmentBeforeDots,
    /// `/..;x/`: some servers cut `;x` off first.
    DotsWithParameters,
}

impl Ambiguity {
    /// What a person is told about it.
    pub fn as_str(self) -> &'static str {
        match self {
            Ambiguity::EncodedSlash => "it contains %2f",
            Ambiguity::EncodedBackslash => "it contains %5c",
            Ambiguity::Nul => "it contains a NUL",
            Ambiguity::Backslash => "it contains a backslash",
            Ambiguity::DoubleEncoding => "it is percent-encoded twice",
            Ambiguity::BrokenEscape => "it contains a % without two hexadecimal digits behind it",
            Ambiguity::NotUtf8 => "decoded it is not UTF-8",
            Ambiguity::AboveRoot => "its .. leaves the root",
            Ambiguity::EmptySegmentBeforeDots => "it contains .. behind an empty segment",
            Ambiguity::DotsWithParameters => "it contains a dot segment with parameters",
        }
    }
}

/// A path as policy sees it: decoded once, dot segments resolved, slashes merged, without query and fragment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NormalPath<'a> {
    pub text: Cow<'a, str>,
    /// The first thing about it that is ambiguous. `text` is then the best reading, in which `%2F` and `%5C` stay
    /// encoded: routes match it, a rule about who may does not.
    pub ambiguous: Option<Ambiguity>,
}

impl<'a> NormalPath<'a> {
    /// The normal form of a request target: of the path, or of the path of an absolute-form target. `*` stays `*`.
    pub fn of(target: &'a str) -> NormalPath<'a> {
        let path = target.find(['?', '#']).map_or(target, |end| &target[..end]);
        if path == "*" {
            return NormalPath { text: Cow::Borrowed(path), ambiguous: None };
        }
        let path = match path.split_once("://") {
            Some((scheme, rest)) if !scheme.is_empty() && scheme.bytes().all(|b| b.is_ascii_alphanumeric()) => {
                rest.find('/').map_or("/", |begin| &rest[begin..])
            }
            _ => path,
        };
        if path.is_empty() {
            return NormalPath { text: Cow::Borrowed("/"), ambiguous: None };
        }
        if is_normal(path.as_bytes()) {
            return NormalPath { text: Cow::Borrowed(path), ambiguous: None };
        }
        normalized(path)
    }

    /// The text with the `;parameters` of every segment cut off, where there are any.
    pub fn without_parameters(&self) -> Option<String> {
        let text = self.text.as_ref();
        text.contains(';').then(|| {
            let segments = text.split('/').map(|segment| segment.split(';').next().unwrap_or(""));
            let bare = segments.collect::<Vec<_>>().join("/");
            NormalPath::of(&bare).text.into_owned()
        })
    }
}

/// True for what cannot change: the common case, which must cost one walk and no allocation.
fn is_normal(path: &[u8]) -> bool {
    let mut before = 0;
    for byte in path {
        let special = match byte {
            b'%' | b'\\' | 0 | 0x80.. => true,
            b'/' | b'.' => before == b'/',
            _ => false,
        };
        if special {
            return false;
        }
        before = *byte;
    }
    path.first() == Some(&b'/')
}

fn normalized(path: &str) -> NormalPath<'static> {
    let mut ambiguous = None;
    let mut note = |what: Ambiguity| {
        ambiguous.get_or_insert(what);
    };
    let mut kept: Vec<Vec<u8>> = Vec::new();
    let mut ends_in_slash = false;
    let mut empty_before = false;
    let body = path.strip_prefix('/').unwrap_or(path);
    for raw in body.split('/') {
        let segment = decoded(raw.as_bytes(), &mut note);
        let bare = segment.split(|byte| *byte == b';').next().unwrap_or_default();
        let dots = matches!(bare, b"." | b"..");
        if dots && bare.len() != segment.len() {
            note(Ambiguity::DotsWithParameters);
        }
        ends_in_slash = true;
        match segment.as_slice() {
            b"" => {
                empty_before = true;
                continue;
            }
            b"." => {}
            b".." => {
                if empty_before {
                    note(Ambiguity::EmptySegmentBeforeDots);
                }
                if kept.pop().is_none() {
                    note(Ambiguity::AboveRoot);
                }
            }
            _ => {
                ends_in_slash = false;
                kept.push(segment);
            }
        }
        empty_before = false;
    }
    let mut bytes = Vec::with_capacity(path.len() + 1);
    for segment in &kept {
        bytes.push(b'/');
        bytes.extend_from_slice(segment);
    }
    if ends_in_slash || kept.is_empty() {
        bytes.push(b'/');
    }
    let text = String::from_utf8(bytes).unwrap_or_else(|error| {
        note(Ambiguity::NotUtf8);
        String::from_utf8_lossy(error.as_bytes()).into_owned()
    });
    NormalPath { text: Cow::Owned(text), ambiguous }
}

/// Decodes one segment once. What would become a slash, a backslash or an escape stays as it is.
fn decoded(raw: &[u8], note: &mut impl FnMut(Ambiguity)) -> Vec<u8> {
    let mut out = Vec::with_capacity(raw.len());
    let mut at = 0;
    while let Some(&byte) = raw.get(at) {
        match byte {
            b'%' => {
                let Some(value) = escape(&raw[at..]) else {
                    note(Ambiguity::BrokenEscape);
                    out.push(byte);
                    at += 1;
                    continue;
                };
                let stays = match value {
                    b'/' => Some(Ambiguity::EncodedSlash),
                    b'\\' => Some(Ambiguity::EncodedBackslash),
                    0 => Some(Ambiguity::Nul),
                    b'%' if is_hex(raw.get(at + 3)) && is_hex(raw.get(at + 4)) => Some(Ambiguity::DoubleEncoding),
                    _ => None,
                };
                match stays {
                    Some(what) => {
                        note(what);
                        out.extend(raw[at..at + 3].iter().map(u8::to_ascii_uppercase));
                    }
                    None => out.push(value),
                }
                at += 3;
                continue;
            }
            b'\\' => note(Ambiguity::Backslash),
            0 => note(Ambiguity::Nul),
            _ => {}
        }
        out.push(byte);
        at += 1;
    }
    out
}

fn escape(at: &[u8]) -> Option<u8> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16);
    let value = digit(at.get(1)?)? * 16 + digit(at.get(2)?)?;
    u8::try_from(value).ok()
}

fn is_hex(byte: Option<&u8>) -> bool {
    byte.is_some_and(u8::is_ascii_hexdigit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Ambiguity::{
        AboveRoot, Backslash, BrokenEscape, DotsWithParameters, DoubleEncoding, EmptySegmentBeforeDots,
        EncodedBackslash, EncodedSlash, NotUtf8, Nul,
    };

    #[test]
    fn normal_forms() {
        let cases = [
            ("/", "/", None),
            ("", "/", None),
            ("*", "*", None),
            ("/admin", "/admin", None),
            ("/admin/", "/admin/", None),
            ("//admin", "/admin", None),
            ("///admin//x", "/admin/x", None),
            ("/./admin", "/admin", None),
            ("/x/../admin", "/admin", None),
            ("/x/%2e%2e/admin", "/admin", None),
            ("/x/.%2E/admin", "/admin", None),
            ("/%61dmin", "/admin", None),
            ("/admin?x=/../y", "/admin", None),
            ("/admin#x", "/admin", None),
            ("/admin%3fx", "/admin?x", None),
            ("/admin;a=b", "/admin;a=b", None),
            ("/admin/.", "/admin/", None),
            ("/admin/x/..", "/admin/", None),
            ("/.well-known/x", "/.well-known/x", None),
            ("/a/.b/..c", "/a/.b/..c", None),
            ("/...", "/...", None),
            ("/%C3%BC", "/ü", None),
            ("/ü", "/ü", None),
            ("/a%20b", "/a b", None),
            ("/a%25", "/a%", None),
            ("/a%25zz", "/a%zz", None),
            ("http://shop/admin/../x?y", "/x", None),
            ("http://shop", "/", None),
            ("HTTP://shop//a", "/a", None),
            ("/a://b", "/a:/b", None),
            ("admin", "/admin", None),
            ("/a%2Fb", "/a%2Fb", Some(EncodedSlash)),
            ("/a%2fb", "/a%2Fb", Some(EncodedSlash)),
            ("/a%5cb", "/a%5Cb", Some(EncodedBackslash)),
            ("/a\\b", "/a\\b", Some(Backslash)),
            ("/a%00", "/a%00", Some(Nul)),
            ("/a\0", "/a\0", Some(Nul)),
            ("/%2561", "/%2561", Some(DoubleEncoding)),
            ("/%252fadmin", "/%252fadmin", Some(DoubleEncoding)),
            ("/a%", "/a%", Some(BrokenEscape)),
            ("/a%2", "/a%2", Some(BrokenEscape)),
            ("/a%zz", "/a%zz", Some(BrokenEscape)),
            ("/a%+1", "/a%+1", Some(BrokenEscape)),
            ("/..", "/", Some(AboveRoot)),
            ("/../admin", "/admin", Some(AboveRoot)),
            ("/a/../../admin", "/admin", Some(AboveRoot)),
            ("/%2e%2e/admin", "/admin", Some(AboveRoot)),
            ("/a//../b", "/b", Some(EmptySegmentBeforeDots)),
            ("//../b", "/b", Some(EmptySegmentBeforeDots)),
            ("/a/..;/b", "/a/..;/b", Some(DotsWithParameters)),
            ("/a/.;x/b", "/a/.;x/b", Some(DotsWithParameters)),
            ("/a/..%3bx/b", "/a/..;x/b", Some(DotsWithParameters)),
            ("/a/%2e%2e;x/b", "/a/..;x/b", Some(DotsWithParameters)),
            ("/%ff", "/\u{fffd}", Some(NotUtf8)),
            ("/%c0%af", "/\u{fffd}\u{fffd}", Some(NotUtf8)),
        ];
        for (target, text, ambiguous) in cases {
            let path = NormalPath::of(target);
            assert_eq!((path.text.as_ref(), path.ambiguous), (text, ambiguous), "{target:?}");
        }
    }

    #[test]
    fn what_is_normal_costs_nothing() {
        for target in ["/", "/a/b.c/d;e?f=%2f", "/v1/charges", "*"] {
            assert!(matches!(NormalPath::of(target).text, Cow::Borrowed(_)), "{target}");
        }
    }

    #[test]
    fn a_normal_form_is_its_own_normal_form() {
        for target in ["//a/./b/../c%20d", "/a;b/c", "/x/%2e%2e/y/", "/a%2525"] {
            let once = NormalPath::of(target).text.into_owned();
            if !once.contains('%') && !once.contains('?') {
                assert_eq!(NormalPath::of(&once).text, once, "{target}");
            }
        }
    }

    #[test]
    fn parameters_are_cut() {
        let cases = [
            ("/admin;x/y;z=1", Some("/admin/y")),
            ("/admin", None),
            ("/admin%3bx", Some("/admin")),
            ("/;x/admin", Some("/admin")),
        ];
        for (target, expected) in cases {
            assert_eq!(NormalPath::of(target).without_parameters().as_deref(), expected, "{target}");
        }
    }
}
