//! What `/metrics` says, as samples that can be summed by label.

use std::collections::BTreeMap;

/// One line of the exposition.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub value: f64,
}

impl Sample {
    pub fn label(&self, name: &str) -> &str {
        self.labels.get(name).map_or("", String::as_str)
    }

    fn has(&self, name: &str, labels: &[(&str, &str)]) -> bool {
        self.name == name && labels.iter().all(|(label, value)| self.label(label) == *value)
    }
}

/// All lines of one scrape.
#[derive(Clone, Debug, Default)]
pub struct Samples(pub Vec<Sample>);

impl Samples {
    pub fn parse(text: &str) -> Samples {
        let lines = text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty());
        Samples(lines.map(sample).collect())
    }

    /// The sum of every sample of this name that has all these labels; an absent label is the empty string.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.select(name, labels).map(|sample| sample.value).sum()
    }

    pub fn select<'a>(&'a self, name: &'a str, labels: &'a [(&'a str, &'a str)]) -> impl Iterator<Item = &'a Sample> {
        self.0.iter().filter(move |sample| sample.has(name, labels))
    }

    /// Each different value that `label` has in the samples of one name.
    pub fn values(&self, name: &str, label: &str) -> std::collections::BTreeSet<String> {
        self.select(name, &[]).map(|sample| sample.label(label).to_owned()).collect()
    }
}

fn sample(line: &str) -> Sample {
    let (head, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("not a sample: {line}"));
    let (name, labels) = match head.split_once('{') {
        Some((name, rest)) => (name, labels(rest.strip_suffix('}').unwrap_or(rest))),
        None => (head, BTreeMap::new()),
    };
    let value = value.parse().unwrap_or_else(|_| panic!("not a number: {line}"));
    Sample { name: name.to_owned(), labels, value }
}

fn labels(mut text: &str) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::new();
    while let Some((name, rest)) = text.split_once("=\"") {
        let mut value = String::new();
        let mut chars = rest.char_indices();
        let mut end = rest.len();
        while let Some((at, next)) = chars.next() {
            match next {
                '\\' => match chars.next() {
                    Some((_, 'n')) => value.push('\n'),
                    Some((_, other)) => value.push(other),
                    None => {}
                },
                '"' => {
                    end = at + 1;
                    break;
                }
                other => value.push(other),
            }
        }
        labels.insert(name.to_owned(), value);
        text = rest[end..].trim_start_matches(',');
    }
    labels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_read_and_summed() {
        let text = "# HELP a b\na{x=\"1\",y=\"q\\\"}\"} 2\na{x=\"2\",y=\"\"} 3.5\nb 1e3\n";
        let samples = Samples::parse(text);
        assert_eq!(samples.sum("a", &[]), 5.5);
        assert_eq!(samples.sum("a", &[("x", "1")]), 2.0);
        assert_eq!(samples.sum("a", &[("y", "q\"}")]), 2.0);
        assert_eq!(samples.sum("a", &[("y", "")]), 3.5);
        assert_eq!(samples.sum("b", &[]), 1000.0);
        assert_eq!(samples.values("a", "x").len(), 2);
    }
}
