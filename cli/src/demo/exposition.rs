//! Prometheus text, read back: the demo shows what `/metrics` says and nothing that it knows otherwise. Pure.

use std::collections::BTreeMap;

/// One line: a name, labels and a value.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Series {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub value: f64,
}

impl Series {
    /// The label's value; absent and empty are the same.
    pub(super) fn label(&self, name: &str) -> &str {
        self.labels.get(name).map_or("", String::as_str)
    }

    /// A counter's value.
    pub(super) fn count(&self) -> u64 {
        self.value.max(0.0) as u64
    }
}

/// Every series of a page. A line that is none is passed over, as comments are.
pub(super) fn parse(page: &str) -> Vec<Series> {
    page.lines().filter(|line| !line.starts_with('#')).filter_map(series).collect()
}

fn series(line: &str) -> Option<Series> {
    let end = line.find(['{', ' '])?;
    let (name, rest) = line.split_at(end);
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => (BTreeMap::new(), rest),
    };
    // A timestamp may follow.
    let value = rest.split_ascii_whitespace().next()?;
    Some(Series { name: name.to_owned(), labels, value: value.parse().ok()? })
}

/// What stands between the braces, and what behind them.
fn labels(mut rest: &str) -> Option<(BTreeMap<String, String>, &str)> {
    let mut labels = BTreeMap::new();
    loop {
        rest = rest.trim_start_matches([',', ' ']);
        if let Some(rest) = rest.strip_prefix('}') {
            return Some((labels, rest));
        }
        let (name, after) = rest.split_once("=\"")?;
        let (value, after) = quoted(after)?;
        labels.insert(name.trim().to_owned(), value);
        rest = after;
    }
}

/// Up to the closing quote, with escapes resolved.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => match characters.next()?.1 {
                'n' => value.push('\n'),
                other => value.push(other),
            },
            other => value.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_series() {
        let page = "# HELP a b\n# TYPE a counter\na{x=\"1\",y=\"q\\\"\\\\\\n}\"} 12\nb 0.5 1700000000\nc{} +Inf\n\nnoise{x=\"1\nd{x=1} 2\n";
        let all = parse(page);
        let names: Vec<_> = all.iter().map(|series| series.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "c"]);
        assert_eq!((all[0].label("x"), all[0].label("y"), all[0].label("z")), ("1", "q\"\\\n}", ""));
        assert_eq!((all[0].count(), all[1].value, all[2].value), (12, 0.5, f64::INFINITY));
    }
}
