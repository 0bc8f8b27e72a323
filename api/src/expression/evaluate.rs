//! The evaluation of an expression: bounded in steps, whatever the facts are. `||` and `&&` have an answer where one side
//! decides, also when the other side has none.

use std::borrow::Cow;
use std::cmp::Ordering;

use super::syntax::{Function, Kind, Literal, Node, Operator, Quantifier};
use super::value::{Facts, Value};

/// Steps of one evaluation: a node that is looked at, or 32 bytes of a text that is read.
pub const MAX_STEPS: usize = 10_000;

struct Evaluation<'f> {
    facts: &'f dyn Facts,
    left: usize,
    bound: Vec<Value<'f>>,
}

type Evaluated<'f> = Result<Value<'f>, String>;

pub(super) fn holds(root: &Node, facts: &dyn Facts) -> Result<bool, String> {
    let mut evaluation = Evaluation { facts, left: MAX_STEPS, bound: Vec::new() };
    match evaluation.value(root)? {
        Value::Bool(holds) => Ok(holds),
        other => Err(format!("it is {}, neither true nor false", other.kind())),
    }
}

impl<'f> Evaluation<'f> {
    fn spend(&mut self, steps: usize) -> Result<(), String> {
        match self.left.checked_sub(steps) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => {
                self.left = 0;
                Err(format!("it takes more than {MAX_STEPS} steps"))
            }
        }
    }

    fn value(&mut self, node: &'f Node) -> Evaluated<'f> {
        self.spend(1)?;
        match &node.kind {
            Kind::Literal(literal) => Ok(match literal {
                Literal::Null => Value::Null,
                Literal::Bool(value) => Value::Bool(*value),
                Literal::Int(value) => Value::Int(*value),
                Literal::Double(value) => Value::Double(*value),
                Literal::Text(text) => Value::text(text),
            }),
            Kind::Field(field) => self.facts.field(*field).ok_or_else(|| format!("{} is absent", field.name())),
            Kind::Map(map) => Ok(Value::Map(*map)),
            Kind::Bound(index) => self.bound.get(*index).cloned().ok_or_else(|| "a variable is not there".to_owned()),
            Kind::List(nodes) => nodes.iter().map(|node| self.value(node)).collect::<Result<_, _>>().map(Value::List),
            Kind::Select(of, name) => {
                let of = self.value(of)?;
                self.entry(&of, name)?.ok_or_else(|| format!("{} has no `{name}`", shown(&of)))
            }
            Kind::Index(of, index) => self.index(of, index),
            Kind::Has(of, name) if name.is_empty() => Ok(Value::Bool(self.value(of).is_ok())),
            Kind::Has(of, name) => {
                let of = self.value(of)?;
                Ok(Value::Bool(self.entry(&of, name)?.is_some()))
            }
            Kind::Not(of) => Ok(Value::Bool(!self.truth(of)?)),
            Kind::Minus(of) => match self.value(of)? {
                Value::Int(value) => value.checked_neg().map(Value::Int).ok_or_else(overflow),
                Value::Double(value) => Ok(Value::Double(-value)),
                other => Err(format!("{} has no negative", other.kind())),
            },
            Kind::Binary(operator, one, other) => self.binary(*operator, one, other),
            Kind::Choose(condition, one, other) => {
                if self.truth(condition)? {
                    self.value(one)
                } else {
                    self.value(other)
                }
            }
            Kind::Call(function, arguments) => self.call(*function, arguments),
            Kind::Each(quantifier, range, body) => self.each(*quantifier, range, body),
        }
    }

    fn truth(&mut self, node: &'f Node) -> Result<bool, String> {
        match self.value(node)? {
            Value::Bool(value) => Ok(value),
            other => Err(format!("{} is neither true nor false", other.kind())),
        }
    }

    /// An entry of a map; None when there is none.
    fn entry(&mut self, of: &Value<'f>, key: &str) -> Result<Option<Value<'f>>, String> {
        self.spend(1)?;
        match of {
            Value::Map(map) => self.facts.entry(*map, key),
            Value::Json(serde_json::Value::Object(entries)) => Ok(entries.get(key).map(Value::json)),
            other => Err(format!("{} has no fields", other.kind())),
        }
    }

    fn index(&mut self, of: &'f Node, index: &'f Node) -> Evaluated<'f> {
        let (of, index) = (self.value(of)?, self.value(index)?);
        match (&of, &index) {
            (Value::List(list), Value::Int(at)) => {
                let found = usize::try_from(*at).ok().and_then(|at| list.get(at)).cloned();
                found.ok_or_else(|| format!("a list of {} has no place {at}", list.len()))
            }
            (Value::Json(serde_json::Value::Array(list)), Value::Int(at)) => {
                let found = usize::try_from(*at).ok().and_then(|at| list.get(at)).map(Value::json);
                found.ok_or_else(|| format!("a list of {} has no place {at}", list.len()))
            }
            (_, Value::Text(key)) => self.entry(&of, key)?.ok_or_else(|| format!("{} has no {key:?}", shown(&of))),
            (of, index) => Err(format!("{} cannot be asked for {}", of.kind(), index.kind())),
        }
    }

    fn binary(&mut self, operator: Operator, one: &'f Node, other: &'f Node) -> Evaluated<'f> {
        if let Operator::Or | Operator::And = operator {
            // What decides alone.
            let decisive = operator == Operator::Or;
            let first = self.truth(one);
            if first == Ok(decisive) {
                return Ok(Value::Bool(decisive));
            }
            let second = self.truth(other);
            return match (first, second) {
                (_, Ok(value)) if value == decisive => Ok(Value::Bool(decisive)),
                (Err(why), _) | (_, Err(why)) => Err(why),
                (Ok(_), Ok(_)) => Ok(Value::Bool(!decisive)),
            };
        }
        let (one, other) = (self.value(one)?, self.value(other)?);
        match operator {
            Operator::Equal => self.equal(&one, &other).map(Value::Bool),
            Operator::Unequal => self.equal(&one, &other).map(|equal| Value::Bool(!equal)),
            Operator::In => self.contains(&other, &one).map(Value::Bool),
            Operator::Less => self.order(&one, &other).map(|order| Value::Bool(order == Ordering::Less)),
            Operator::Greater => self.order(&one, &other).map(|order| Value::Bool(order == Ordering::Greater)),
            Operator::LessOrEqual => self.order(&one, &other).map(|order| Value::Bool(order != Ordering::Greater)),
            Operator::GreaterOrEqual => self.order(&one, &other).map(|order| Value::Bool(order != Ordering::Less)),
            Operator::Plus | Operator::Minus | Operator::Times | Operator::Divided | Operator::Modulo => {
                self.arithmetic(operator, one, other)
            }
            // Decided above.
            Operator::Or | Operator::And => Err("not decided".to_owned()),
        }
    }

    /// Values of two kinds are not equal, but for numbers.
    fn equal(&mut self, one: &Value<'f>, other: &Value<'f>) -> Result<bool, String> {
        match (one, other) {
            (Value::Int(one), Value::Double(other)) | (Value::Double(other), Value::Int(one)) => {
                Ok(*one as f64 == *other)
            }
            (Value::Text(one), Value::Text(other)) => {
                self.spend(one.len().min(other.len()) / 32)?;
                Ok(one == other)
            }
            (Value::List(one), Value::List(other)) => {
                self.spend(one.len().max(other.len()))?;
                if one.len() != other.len() {
                    return Ok(false);
                }
                for (one, other) in one.iter().zip(other) {
                    if !self.equal(one, other)? {
                        return Ok(false);
                    }
                }
                Ok(true)
            }
            (Value::Json(_), _) | (_, Value::Json(_)) | (Value::Map(_), _) | (_, Value::Map(_)) => {
                Err("maps and lists of claims are not compared as a whole".to_owned())
            }
            (one, other) => Ok(one == other),
        }
    }

    fn order(&mut self, one: &Value<'f>, other: &Value<'f>) -> Result<Ordering, String> {
        let found = match (one, other) {
            (Value::Int(one), Value::Int(other)) => Some(one.cmp(other)),
            (Value::Double(one), Value::Double(other)) => one.partial_cmp(other),
            (Value::Int(one), Value::Double(other)) => (*one as f64).partial_cmp(other),
            (Value::Double(one), Value::Int(other)) => one.partial_cmp(&(*other as f64)),
            (Value::Text(one), Value::Text(other)) => {
                self.spend(one.len().min(other.len()) / 32)?;
                Some(one.cmp(other))
            }
            (Value::Timestamp(one), Value::Timestamp(other)) | (Value::Duration(one), Value::Duration(other)) => {
                Some(one.cmp(other))
            }
            _ => None,
        };
        found.ok_or_else(|| format!("{} and {} have no order", one.kind(), other.kind()))
    }

    fn contains(&mut self, range: &Value<'f>, wanted: &Value<'f>) -> Result<bool, String> {
        match range {
            Value::List(list) => {
                for value in list {
                    self.spend(1)?;
                    if self.equal(value, wanted)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
            Value::Json(serde_json::Value::Array(list)) => {
                for value in list {
                    self.spend(1)?;
                    let value = Value::json(value);
                    if !matches!(value, Value::Json(_)) && self.equal(&value, wanted)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
            Value::Map(_) | Value::Json(_) => match wanted {
                Value::Text(key) => Ok(self.entry(range, key)?.is_some()),
                other => Err(format!("a map has no key that is {}", other.kind())),
            },
            other => Err(format!("nothing is in {}", other.kind())),
        }
    }

    fn arithmetic(&mut self, operator: Operator, one: Value<'f>, other: Value<'f>) -> Evaluated<'f> {
        use Operator::{Divided, Minus, Modulo, Plus, Times};
        match (one, other) {
            (Value::Int(one), Value::Int(other)) => {
                let value = match operator {
                    Plus => one.checked_add(other),
                    Minus => one.checked_sub(other),
                    Times => one.checked_mul(other),
                    Divided => one.checked_div(other),
                    _ => one.checked_rem(other),
                };
                value.map(Value::Int).ok_or_else(overflow)
            }
            (Value::Double(one), Value::Double(other)) if operator != Modulo => Ok(Value::Double(match operator {
                Plus => one + other,
                Minus => one - other,
                Times => one * other,
                _ => one / other,
            })),
            (Value::Text(one), Value::Text(other)) if operator == Plus => {
                self.spend((one.len() + other.len()) / 32)?;
                Ok(Value::Text(Cow::Owned(format!("{one}{other}"))))
            }
            (Value::Timestamp(one), Value::Timestamp(other)) if operator == Minus => {
                one.checked_sub(other).map(Value::Duration).ok_or_else(overflow)
            }
            (Value::Timestamp(one), Value::Duration(other)) if matches!(operator, Plus | Minus) => {
                let value = if operator == Plus { one.checked_add(other) } else { one.checked_sub(other) };
                value.map(Value::Timestamp).ok_or_else(overflow)
            }
            (one, other) => Err(format!("this is not done with {} and {}", one.kind(), other.kind())),
        }
    }

    fn call(&mut self, function: Function, arguments: &'f [Node]) -> Evaluated<'f> {
        let Some((first, rest)) = arguments.split_first() else { return Err("an argument is missing".to_owned()) };
        let of = self.value(first)?;
        let wrong = |of: &Value<'_>| Err(format!("this function is not for {}", of.kind()));
        match function {
            Function::StartsWith | Function::EndsWith | Function::Contains => {
                let part = match rest.first() {
                    Some(part) => self.value(part)?,
                    None => return Err("an argument is missing".to_owned()),
                };
                let (Value::Text(text), Value::Text(part)) = (&of, &part) else { return wrong(&of) };
                self.spend(text.len() / 32)?;
                Ok(Value::Bool(match function {
                    Function::StartsWith => text.starts_with(part.as_ref()),
                    Function::EndsWith => text.ends_with(part.as_ref()),
                    _ => text.contains(part.as_ref()),
                }))
            }
            Function::Size => self.size(&of),
            Function::LowerAscii => {
                let Value::Text(text) = &of else { return wrong(&of) };
                self.spend(text.len() / 32)?;
                Ok(Value::Text(Cow::Owned(text.to_ascii_lowercase())))
            }
            Function::Int | Function::Double | Function::Text | Function::Timestamp | Function::Duration => {
                converted(function, of)
            }
            Function::Hours
            | Function::Minutes
            | Function::DayOfWeek
            | Function::DayOfMonth
            | Function::Month
            | Function::FullYear => match of {
                Value::Timestamp(at) => Ok(Value::Int(part_of_time(function, at))),
                Value::Duration(seconds) if function == Function::Hours => Ok(Value::Int(seconds / 3_600)),
                Value::Duration(seconds) if function == Function::Minutes => Ok(Value::Int(seconds / 60)),
                other => wrong(&other),
            },
        }
    }

    fn size(&mut self, of: &Value<'f>) -> Evaluated<'f> {
        let size = match of {
            Value::Text(text) => {
                self.spend(text.len() / 32)?;
                text.chars().count()
            }
            Value::List(list) => list.len(),
            Value::Json(serde_json::Value::Array(list)) => list.len(),
            Value::Json(serde_json::Value::Object(entries)) => entries.len(),
            Value::Map(map) => {
                let mut count = 0;
                self.facts.keys(*map, &mut |_| count += 1);
                self.spend(count)?;
                count
            }
            other => return Err(format!("{} has no size", other.kind())),
        };
        Ok(Value::Int(i64::try_from(size).unwrap_or(i64::MAX)))
    }

    fn each(&mut self, quantifier: Quantifier, range: &'f Node, body: &'f Node) -> Evaluated<'f> {
        let values: Vec<Value<'f>> = match self.value(range)? {
            Value::List(list) => list,
            Value::Json(serde_json::Value::Array(list)) => {
                self.spend(list.len())?;
                list.iter().map(Value::json).collect()
            }
            Value::Json(serde_json::Value::Object(entries)) => {
                self.spend(entries.len())?;
                entries.keys().map(|key| Value::text(key)).collect()
            }
            Value::Map(map) => {
                let mut keys = Vec::new();
                self.facts.keys(map, &mut |key| keys.push(Value::Text(key)));
                self.spend(keys.len())?;
                keys
            }
            other => return Err(format!("{} has no members", other.kind())),
        };
        let mut holding = 0_usize;
        let mut unknown = None;
        for value in values {
            self.bound.push(value);
            let held = self.truth(body);
            self.bound.pop();
            match (held, quantifier) {
                (Ok(true), Quantifier::Exists) => return Ok(Value::Bool(true)),
                (Ok(false), Quantifier::All) => return Ok(Value::Bool(false)),
                (Ok(held), _) => holding += usize::from(held),
                (Err(why), _) => unknown = Some(why),
            }
            if self.left == 0 && unknown.is_some() {
                break;
            }
        }
        match (unknown, quantifier) {
            (Some(why), _) => Err(why),
            (None, Quantifier::Exists) => Ok(Value::Bool(false)),
            (None, Quantifier::All) => Ok(Value::Bool(true)),
            (None, Quantifier::ExistsOne) => Ok(Value::Bool(holding == 1)),
        }
    }
}

fn overflow() -> String {
    "the number is too large, or divided by zero".to_owned()
}

fn shown(of: &Value<'_>) -> String {
    match of {
        Value::Map(map) => map.name(),
        other => other.kind().to_owned(),
    }
}

fn converted<'f>(function: Function, of: Value<'f>) -> Evaluated<'f> {
    let wrong = |of: &Value<'_>| format!("{} cannot be converted so", of.kind());
    match (function, of) {
        (Function::Int, Value::Int(value)) => Ok(Value::Int(value)),
        (Function::Int, Value::Double(value)) if value.abs() < 9e18 => Ok(Value::Int(value as i64)),
        (Function::Int, Value::Text(text)) => {
            text.parse().map(Value::Int).map_err(|_| format!("{text:.32?} is no integer"))
        }
        (Function::Int, Value::Timestamp(at)) => Ok(Value::Int(at)),
        (Function::Double, Value::Double(value)) => Ok(Value::Double(value)),
        (Function::Double, Value::Int(value)) => Ok(Value::Double(value as f64)),
        (Function::Double, Value::Text(text)) => {
            text.parse().map(Value::Double).map_err(|_| format!("{text:.32?} is no number"))
        }
        (Function::Text, Value::Text(text)) => Ok(Value::Text(text)),
        (Function::Text, Value::Int(value)) => Ok(Value::Text(Cow::Owned(value.to_string()))),
        (Function::Text, Value::Double(value)) => Ok(Value::Text(Cow::Owned(value.to_string()))),
        (Function::Text, Value::Bool(value)) => Ok(Value::Text(Cow::Owned(value.to_string()))),
        (Function::Timestamp, Value::Text(text)) => timestamp(&text)
            .map(Value::Timestamp)
            .ok_or_else(|| format!("{text:.32?} is no time: 2026-11-28T14:30:00Z")),
        (Function::Timestamp, Value::Int(at)) => Ok(Value::Timestamp(at)),
        (Function::Duration, Value::Text(text)) => {
            duration(&text).map(Value::Duration).ok_or_else(|| format!("{text:.32?} is no duration: 1h30m"))
        }
        (_, of) => Err(wrong(&of)),
    }
}

/// `1h30m`, `90s`.
fn duration(text: &str) -> Option<i64> {
    let (negative, mut rest) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let mut seconds = 0_i64;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit())?;
        let (count, tail) = rest.split_at(end);
        let unit = match tail.chars().next()? {
            'h' => 3_600,
            'm' => 60,
            's' => 1,
            _ => return None,
        };
        seconds = seconds.checked_add(count.parse::<i64>().ok()?.checked_mul(unit)?)?;
        rest = &tail[1..];
    }
    Some(if negative { -seconds } else { seconds })
}

/// RFC 3339 in UTC, to seconds since the Unix epoch.
fn timestamp(text: &str) -> Option<i64> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let mut date = date.splitn(3, '-').map(str::parse::<i64>);
    let mut time = time.splitn(3, ':').map(str::parse::<i64>);
    let next = |parts: &mut dyn Iterator<Item = Result<i64, std::num::ParseIntError>>| parts.next()?.ok();
    let (year, month, day) = (next(&mut date)?, next(&mut date)?, next(&mut date)?);
    let (hour, minute, second) = (next(&mut time)?, next(&mut time)?, next(&mut time)?);
    let valid = (0..10_000).contains(&year)
        && (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && (0..24).contains(&hour)
        && (0..60).contains(&minute)
        && (0..61).contains(&second);
    valid.then(|| ((days_of(year, month, day) * 24 + hour) * 60 + minute) * 60 + second)
}

/// Days since the epoch, counting years from March so that leap days come last.
fn days_of(year: i64, month: i64, day: i64) -> i64 {
    let shifted = if month > 2 { year } else { year - 1 };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let (era, year_of_era) = (shifted.div_euclid(400), shifted.rem_euclid(400));
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

/// In UTC, as CEL counts: months and days of a month from 0, Sunday is 0.
fn part_of_time(function: Function, at: i64) -> i64 {
    let (days, second) = (at.div_euclid(86_400), at.rem_euclid(86_400));
    let shifted = days.saturating_add(719_468);
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5;
    let month = (shifted_month + 2) % 12;
    match function {
        Function::Hours => second / 3_600,
        Function::Minutes => second / 60 % 60,
        Function::DayOfWeek => (days + 4).rem_euclid(7),
        Function::DayOfMonth => day,
        Function::Month => month,
        _ => era * 400 + year_of_era + i64::from(month < 2),
    }
}
