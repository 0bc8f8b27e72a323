//! Words of an expression with their positions.

use super::Mistake;

#[derive(Clone, PartialEq, Debug)]
pub(super) enum Token {
    Name(String),
    Int(u64),
    Double(f64),
    Text(String),
    Sign(&'static str),
    End,
}

/// Longer signs stand before their beginnings.
const SIGNS: [&str; 26] = [
    "||", "&&", "==", "!=", "<=", ">=", "<", ">", "!", "+", "-", "*", "/", "%", "?", ":", ".", ",", "(", ")", "[", "]",
    "{", "}", "=", "&",
];

/// All words with the character at which each begins, from 1; the last is `End`.
pub(super) fn tokens(text: &str) -> Result<Vec<(usize, Token)>, Mistake> {
    let chars: Vec<char> = text.chars().collect();
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(&first) = chars.get(at) {
        let begin = at;
        if first.is_whitespace() {
            at += 1;
            continue;
        }
        let token = if first == '"' || first == '\'' {
            quoted(&chars, &mut at)?
        } else if first.is_ascii_digit() {
            number(&chars, &mut at)?
        } else if first.is_ascii_alphabetic() || first == '_' {
            while chars.get(at).is_some_and(|c| c.is_ascii_alphanumeric() || *c == '_') {
                at += 1;
            }
            Token::Name(chars[begin..at].iter().collect())
        } else {
            let starts = |sign: &&&str| sign.chars().enumerate().all(|(n, c)| chars.get(at + n) == Some(&c));
            let Some(sign) = SIGNS.iter().find(starts) else {
                return Err(Mistake { at: at + 1, message: format!("{first:?} means nothing here") });
            };
            at += sign.len();
            Token::Sign(sign)
        };
        found.push((begin + 1, token));
    }
    found.push((chars.len() + 1, Token::End));
    Ok(found)
}

fn number(chars: &[char], at: &mut usize) -> Result<Token, Mistake> {
    let begin = *at;
    let mut double = false;
    while let Some(&c) = chars.get(*at) {
        let fraction = c == '.' && !double && chars.get(*at + 1).is_some_and(char::is_ascii_digit);
        double |= fraction;
        if !(c.is_ascii_alphanumeric() || fraction) {
            break;
        }
        *at += 1;
    }
    let text: String = chars[begin..*at].iter().collect();
    let wrong = || Mistake { at: begin + 1, message: format!("{text} is no number here: write decimal digits") };
    if double {
        return text.parse().map(Token::Double).map_err(|_| wrong());
    }
    match text.parse::<u64>() {
        Ok(number) if number <= 1 << 63 => Ok(Token::Int(number)),
        Ok(_) | Err(_) => Err(wrong()),
    }
}

fn quoted(chars: &[char], at: &mut usize) -> Result<Token, Mistake> {
    let (begin, quote) = (*at, chars[*at]);
    *at += 1;
    let mut text = String::new();
    loop {
        match chars.get(*at) {
            None | Some('\n') => {
                return Err(Mistake { at: begin + 1, message: "this text has no closing quote".to_owned() });
            }
            Some(&c) if c == quote => {
                *at += 1;
                return Ok(Token::Text(text));
            }
            Some('\\') => {
                let escape = chars.get(*at + 1).copied();
                text.push(match escape {
                    Some(c @ ('\\' | '"' | '\'' | '`' | '?')) => c,
                    Some('n') => '\n',
                    Some('t') => '\t',
                    Some('r') => '\r',
                    _ => {
                        let message = "this escape is not supported: \\\\, \\\", \\', \\n, \\t, \\r are".to_owned();
                        return Err(Mistake { at: *at + 1, message });
                    }
                });
                *at += 2;
            }
            Some(&c) => {
                text.push(c);
                *at += 1;
            }
        }
    }
}
