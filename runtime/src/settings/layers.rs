//! The three layers in which a setting can be spelled, brought to one form: occurrences of flags. Each occurrence is
//! checked by its flag's own clap parser, then the highest layer that spells a flag wins it. Called by `parse` alone.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, ArgMatches, Command};

use super::file::{self, Value};
use super::mistake::{Mistakes, Origin, nearest, shown};

/// What environment variables of ours start with.
pub const VARIABLE_PREFIX: &str = "OUTRIGGER_";
/// Variables with the prefix that are not settings: where tests find binaries, and what they may not skip.
pub const OUTSIDE_VARIABLES: [&str; 2] = ["OUTRIGGER_BIN_DIR", "OUTRIGGER_REQUIRE"];
pub(super) const SETTINGS: &str = "settings";

/// The variable of a flag.
pub(super) fn variable(long: &str) -> String {
    format!("{VARIABLE_PREFIX}{}", long.replace('-', "_").to_ascii_uppercase())
}

/// What was asked for instead of running.
pub(super) enum Asked {
    Help,
    Version,
}

/// How often a flag may be spelled, and whether with a value.
#[derive(Clone, Copy, PartialEq)]
enum Shape {
    Switch,
    One,
    Many,
}

impl Shape {
    fn of(arg: &Arg) -> Shape {
        match arg.get_action() {
            ArgAction::SetTrue => Shape::Switch,
            ArgAction::Append => Shape::Many,
            _ => Shape::One,
        }
    }
}

/// The values of each flag that one layer spells: only those without a mistake, so possibly none.
type Layer = BTreeMap<String, Vec<OsString>>;

pub(super) struct Layers<'a> {
    command: &'a Command,
    /// The same with nothing required, to parse one occurrence by itself.
    lenient: Command,
    shapes: BTreeMap<String, Shape>,
    mistakes: &'a mut Mistakes,
    flags: Layer,
    variables: Layer,
    file: Layer,
    file_origins: BTreeMap<String, Origin>,
}

impl<'a> Layers<'a> {
    pub(super) fn new(command: &'a Command, mistakes: &'a mut Mistakes) -> Layers<'a> {
        let shapes = command
            .get_arguments()
            .filter_map(|arg| arg.get_long().map(|long| (long.to_owned(), Shape::of(arg))))
            .collect();
        let lenient = command
            .clone()
            .no_binary_name(true)
            .disable_help_flag(true)
            .disable_version_flag(true)
            .mut_args(|arg| arg.required(false));
        Layers {
            command,
            lenient,
            shapes,
            mistakes,
            flags: Layer::new(),
            variables: Layer::new(),
            file: Layer::new(),
            file_origins: BTreeMap::new(),
        }
    }

    /// Takes the command line apart. Values that start with `--` need the form `--flag=value`.
    pub(super) fn flags(&mut self, argv: impl IntoIterator<Item = OsString>) -> Option<Asked> {
        let mut argv = argv.into_iter().peekable();
        while let Some(word) = argv.next() {
            match word.to_str() {
                Some("--help" | "-h") => return Some(Asked::Help),
                Some("--version" | "-V") => return Some(Asked::Version),
                _ => {}
            }
            let Some((long, value)) = split_flag(&word) else {
                let reason = "is not expected here: settings are flags, as in --name=value".to_owned();
                self.mistakes.push_spelled(shown(&word), None, Origin::Flag, reason);
                continue;
            };
            let Some(shape) = self.shapes.get(&long).copied() else {
                let known = self.shapes.keys().map(String::as_str);
                let reason = unknown("flag", nearest(&long, known).map(|near| format!("--{near}")));
                self.mistakes.push_spelled(format!("--{long}"), value.as_deref().map(shown), Origin::Flag, reason);
                // The value of a flag that does not exist is not a second mistake.
                if value.is_none() {
                    argv.next_if(|next| !is_flag(next));
                }
                continue;
            };
            let value = match (shape, value) {
                (_, Some(value)) => value,
                (Shape::Switch, None) => OsString::from("true"),
                (Shape::One | Shape::Many, None) => match argv.next_if(|next| !is_flag(next)) {
                    Some(value) => value,
                    None => {
                        self.mistakes.push(&long, None, Origin::Flag, "needs a value".to_owned());
                        self.flags.entry(long).or_default();
                        continue;
                    }
                },
            };
            if shape != Shape::Many && self.flags.contains_key(&long) {
                self.mistakes.push(&long, Some(shown(&value)), Origin::Flag, "is given more than once".to_owned());
                continue;
            }
            let good = self.check(&long, shape, value, &Origin::Flag);
            self.flags.entry(long).or_default().extend(good);
        }
        None
    }

    /// Takes the variables that start with our prefix; all others are none of our business.
    pub(super) fn variables(&mut self, environment: impl IntoIterator<Item = (OsString, OsString)>) {
        let by_variable: BTreeMap<String, String> =
            self.shapes.keys().map(|long| (variable(long), long.clone())).collect();
        let ours: BTreeMap<String, OsString> = environment
            .into_iter()
            .map(|(key, value)| (shown(&key), value))
            .filter(|(key, _)| key.starts_with(VARIABLE_PREFIX) && !OUTSIDE_VARIABLES.contains(&key.as_str()))
            .collect();
        for (key, value) in ours {
            let Some(long) = by_variable.get(&key) else {
                let near = nearest(&key, by_variable.keys().map(String::as_str)).map(str::to_owned);
                let reason = unknown("setting", near);
                self.mistakes.push_spelled(key, Some(shown(&value)), Origin::Variable, reason);
                continue;
            };
            let shape = self.shapes.get(long).copied().unwrap_or(Shape::One);
            let values = match (shape, value.to_str()) {
                (Shape::Many, Some(list)) => {
                    list.split(',').map(str::trim).filter(|item| !item.is_empty()).map(OsString::from).collect()
                }
                _ => vec![value],
            };
            let good = values.into_iter().filter_map(|value| self.check(long, shape, value, &Origin::Variable));
            let good = good.collect();
            self.variables.insert(long.clone(), good);
        }
    }

    /// Reads the file that a flag or a variable names, if one does.
    pub(super) fn file(&mut self, read: impl FnOnce(&Path) -> std::io::Result<String>) {
        let (path, origin) = match (one(&self.flags, SETTINGS), one(&self.variables, SETTINGS)) {
            (Some(path), _) => (PathBuf::from(path), Origin::Flag),
            (None, Some(path)) => (PathBuf::from(path), Origin::Variable),
            (None, None) => return,
        };
        let shown_path = Some(path.display().to_string());
        let text = match read(&path) {
            Ok(text) => text,
            Err(error) => return self.mistakes.push(SETTINGS, shown_path, origin, format!("cannot be read: {error}")),
        };
        let entries = match file::parse(&text) {
            Ok(entries) => entries,
            Err(error) => return self.mistakes.push(SETTINGS, shown_path, origin, format!("is not YAML: {error}")),
        };
        let mut seen = BTreeMap::new();
        for (key, value) in entries {
            let occurrence = seen.entry(key.clone()).and_modify(|count| *count += 1).or_insert(0_usize);
            let origin = Origin::File(path.clone(), file::line_of(&text, &key, *occurrence));
            if *occurrence > 0 {
                self.mistakes.push(&key, Some(value.to_string()), origin, "stands in the file twice".to_owned());
                continue;
            }
            self.entry(&key, value, origin);
        }
    }

    fn entry(&mut self, key: &str, value: Value, origin: Origin) {
        let Some(shape) = self.shapes.get(key).copied().filter(|_| key != SETTINGS) else {
            let known = self.shapes.keys().map(String::as_str).filter(|known| *known != SETTINGS);
            let reason = unknown("setting", nearest(key, known).map(str::to_owned));
            return self.mistakes.push(key, Some(value.to_string()), origin, reason);
        };
        let texts = match (shape, &value) {
            (_, Value::One(text)) => vec![text.clone()],
            (Shape::Many, Value::List(items)) => {
                let texts: Option<Vec<String>> = items.iter().map(text_of).collect();
                texts.unwrap_or_default()
            }
            _ => Vec::new(),
        };
        let whole = match &value {
            Value::List(items) => texts.len() == items.len() && shape == Shape::Many,
            _ => texts.len() == 1,
        };
        if !whole {
            let expected = match shape {
                Shape::Switch => "expected true or false",
                Shape::One => "expected one value",
                Shape::Many => "expected a value or a list of values",
            };
            self.mistakes.push(key, Some(value.to_string()), origin.clone(), expected.to_owned());
        }
        let good = texts.into_iter().filter_map(|text| self.check(key, shape, text.into(), &origin)).collect();
        self.file.insert(key.to_owned(), good);
        self.file_origins.insert(key.to_owned(), origin);
    }

    /// One occurrence through its flag's own parser; what comes back may be given to clap again.
    fn check(&mut self, long: &str, shape: Shape, value: OsString, origin: &Origin) -> Option<OsString> {
        let wrong = if shape == Shape::Switch {
            let known = matches!(value.to_str(), Some("true" | "false"));
            (!known).then(|| "expected true or false".to_owned())
        } else {
            let parsed = self.lenient.clone().try_get_matches_from([joined(long, &value)]);
            parsed.err().and_then(|error| what_is_wrong(&error))
        };
        match wrong {
            None => Some(value),
            Some(reason) => {
                self.mistakes.push(long, Some(shown(&value)), origin.clone(), reason);
                None
            }
        }
    }

    /// Flags over variables over the file, parsed by clap as one command line, defaults filled in. Reports what is
    /// required and was given nowhere. None when clap refuses the whole, as for flags that exclude each other.
    pub(super) fn resolve(self) -> Option<ArgMatches> {
        let Layers { command, lenient, shapes, mistakes, flags, variables, file, file_origins } = self;
        let mut words = Vec::new();
        let given: BTreeSet<&String> = flags.keys().chain(variables.keys()).chain(file.keys()).collect();
        for long in given {
            let (values, origin) = match (flags.get(long), variables.get(long)) {
                (Some(values), _) => (values.as_slice(), Origin::Flag),
                (None, Some(values)) => (values.as_slice(), Origin::Variable),
                (None, None) => (
                    file.get(long).map(Vec::as_slice).unwrap_or_default(),
                    file_origins.get(long).cloned().unwrap_or(Origin::Nowhere),
                ),
            };
            mistakes.note_origin(long, origin);
            let is_switch = shapes.get(long) == Some(&Shape::Switch);
            for value in values {
                if !is_switch {
                    words.push(joined(long, value));
                } else if value == "true" {
                    words.push(OsString::from(format!("--{long}")));
                }
            }
        }
        for arg in command.get_arguments().filter(|arg| arg.is_required_set()) {
            if let Some(long) = arg.get_long().filter(|long| !mistakes.was_given(long)) {
                mistakes.missing(
                    long,
                    format!("is required: give --{long}, {} or `{long}` in the settings file", variable(long)),
                );
            }
        }
        match lenient.try_get_matches_from(words) {
            Ok(matches) => Some(matches),
            Err(error) => {
                mistakes.general_unless_any(&error);
                None
            }
        }
    }
}

fn one(layer: &Layer, long: &str) -> Option<OsString> {
    layer.get(long).and_then(|values| values.first()).cloned()
}

fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::One(text) => Some(text.clone()),
        Value::List(_) | Value::Nothing | Value::Mapping => None,
    }
}

fn is_flag(word: &OsStr) -> bool {
    word.as_encoded_bytes().starts_with(b"--")
}

/// `--long` and `--long=value`.
fn split_flag(word: &OsStr) -> Option<(String, Option<OsString>)> {
    use std::os::unix::ffi::OsStrExt;
    let rest = word.as_bytes().strip_prefix(b"--").filter(|rest| !rest.is_empty())?;
    let (long, value) = match rest.iter().position(|byte| *byte == b'=') {
        Some(at) => (&rest[..at], Some(OsStr::from_bytes(&rest[at + 1..]).to_owned())),
        None => (rest, None),
    };
    Some((String::from_utf8_lossy(long).into_owned(), value))
}

fn joined(long: &str, value: &OsStr) -> OsString {
    let mut word = OsString::from(format!("--{long}="));
    word.push(value);
    word
}

fn unknown(what: &str, near: Option<String>) -> String {
    match near {
        Some(near) => format!("there is no such {what}; the nearest is {near}"),
        None => format!("there is no such {what}"),
    }
}

/// The parser's own words about one value; None for what concerns several flags, which is asked at the end.
fn what_is_wrong(error: &clap::Error) -> Option<String> {
    let text = |context: &ContextValue| match context {
        ContextValue::Strings(values) => values.join(", "),
        other => other.to_string(),
    };
    match error.kind() {
        ErrorKind::MissingRequiredArgument | ErrorKind::ArgumentConflict => None,
        ErrorKind::InvalidValue => match error.get(ContextKind::ValidValue).map(text) {
            Some(valid) if !valid.is_empty() => Some(format!("expected one of {valid}")),
            _ => Some("needs a value".to_owned()),
        },
        ErrorKind::InvalidUtf8 => Some("is not UTF-8".to_owned()),
        _ => match std::error::Error::source(error) {
            Some(source) => Some(source.to_string()),
            None => Some(error.to_string().lines().next().unwrap_or_default().replacen("error: ", "", 1)),
        },
    }
}
