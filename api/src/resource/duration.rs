//! Durations as Go writes them: `80s`, `1h30m`, `1.5h`, `250ms`. Every duration in YAML and on command lines is read
//! here.

use std::fmt;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

/// Why a text is no duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DurationError {
    #[error("{0:?} is not a duration: expected numbers with units, as in 80s, 1h30m or 250ms")]
    Form(String),
    #[error("{0:?} has no unit: write {0}s for seconds")]
    NoUnit(String),
    #[error("{text:?} has the unit {unit:?}: known are h, m, s, ms, us and ns")]
    Unit { text: String, unit: String },
    #[error("{0:?} is negative")]
    Negative(String),
    #[error("{0:?} is longer than 292 years, the longest duration of Go")]
    TooLong(String),
}

/// Parses a duration of at least zero, exact to the nanosecond (what is below is cut off).
pub fn parse(text: &str) -> Result<Duration, DurationError> {
    let wrong = || DurationError::Form(text.chars().take(64).collect());
    if text.len() > 64 {
        return Err(wrong());
    }
    if text.starts_with('-') {
        return Err(DurationError::Negative(text.to_owned()));
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    if rest.is_empty() {
        return Err(wrong());
    }
    let mut nanoseconds: u128 = 0;
    while !rest.is_empty() {
        let (whole, after) = digits(rest);
        let (fraction, after) = match after.strip_prefix('.') {
            Some(after) => digits(after),
            None => ("", after),
        };
        if whole.is_empty() && fraction.is_empty() {
            return Err(wrong());
        }
        let (unit, after) = after.split_at(after.find(|c: char| c == '.' || c.is_ascii_digit()).unwrap_or(after.len()));
        if unit.is_empty() {
            return Err(DurationError::NoUnit(text.to_owned()));
        }
        let scale = scale(unit).ok_or_else(|| DurationError::Unit { text: text.to_owned(), unit: unit.to_owned() })?;
        let amount = amount(whole, fraction, scale).and_then(|amount| nanoseconds.checked_add(amount));
        nanoseconds =
            amount.filter(|total| *total <= i64::MAX as u128).ok_or_else(|| DurationError::TooLong(text.to_owned()))?;
        rest = after;
    }
    Ok(Duration::from_nanos(nanoseconds as u64))
}

/// A duration in YAML. A bare number is refused with the unit that it lacks, not for being no text.
pub(super) struct WrittenDuration(pub(super) Duration);

impl<'de> Deserialize<'de> for WrittenDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<WrittenDuration, D::Error> {
        deserializer.deserialize_any(WrittenDurationVisitor)
    }
}

struct WrittenDurationVisitor;

impl Visitor<'_> for WrittenDurationVisitor {
    type Value = WrittenDuration;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a duration such as 80s or 1h30m")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<WrittenDuration, E> {
        parse(text).map(WrittenDuration).map_err(E::custom)
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<WrittenDuration, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<WrittenDuration, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<WrittenDuration, E> {
        self.visit_str(&number.to_string())
    }
}

fn digits(text: &str) -> (&str, &str) {
    text.split_at(text.bytes().position(|b| !b.is_ascii_digit()).unwrap_or(text.len()))
}

/// Nanoseconds of one unit. Both micro signs (U+00B5, U+03BC) are Go's too.
fn scale(unit: &str) -> Option<u128> {
    Some(match unit {
        "ns" => 1,
        "us" | "\u{b5}s" | "\u{3bc}s" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "m" => 60 * 1_000_000_000,
        "h" => 3_600 * 1_000_000_000,
        _ => return None,
    })
}

fn amount(whole: &str, fraction: &str, scale: u128) -> Option<u128> {
    let whole = if whole.is_empty() { 0 } else { whole.parse::<u128>().ok()? };
    // Eighteen digits are finer than a nanosecond of an hour, and their product with the scale fits.
    let fraction = &fraction[..fraction.len().min(18)];
    let numerator = if fraction.is_empty() { 0 } else { fraction.parse::<u128>().ok()? };
    whole.checked_mul(scale)?.checked_add(scale * numerator / 10_u128.pow(fraction.len() as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_go_reads_them() {
        let cases = [
            ("0", 0),
            ("0s", 0),
            ("80s", 80_000_000_000),
            ("1h30m", 5_400_000_000_000),
            ("24h", 86_400_000_000_000),
            ("1.5h", 5_400_000_000_000),
            ("+5s", 5_000_000_000),
            (".5s", 500_000_000),
            ("1.s", 1_000_000_000),
            ("250ms", 250_000_000),
            ("1m0.25s", 60_250_000_000),
            ("3us", 3_000),
            ("3\u{b5}s", 3_000),
            ("7ns", 7),
            ("0.000000001s", 1),
            ("0.0000000001s", 0),
        ];
        for (text, nanoseconds) in cases {
            assert_eq!(parse(text), Ok(Duration::from_nanos(nanoseconds)), "{text}");
        }
    }

    #[test]
    fn what_is_none_says_why() {
        for text in ["", "+", ".", "s", "1h ", " 1h", "h1", "1h-1m", "1..5s", "1e3s", "eighty", "\u{661}s"] {
            assert!(parse(text).is_err(), "{text:?}: {:?}", parse(text));
        }
        assert_eq!(parse("80"), Err(DurationError::NoUnit("80".into())));
        assert_eq!(parse("-1s"), Err(DurationError::Negative("-1s".into())));
        assert_eq!(parse("1d"), Err(DurationError::Unit { text: "1d".into(), unit: "d".into() }));
        assert_eq!(parse("9999999999h"), Err(DurationError::TooLong("9999999999h".into())));
        assert!(parse(&"9".repeat(60)).is_err());
        assert!(parse(&"1s".repeat(1 << 20)).is_err());
    }
}
