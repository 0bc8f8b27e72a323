//! Text tables for a terminal: columns as wide as what stands in them. Used by `demo`, `stat` and `status`; pure.

/// Where a column's text stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Align {
    Left,
    Right,
}

/// Rows under headings.
pub(crate) struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

/// Between two columns.
const GAP: &str = "  ";
/// Characters of one cell; longer than any name of ours, `name.namespace` included, needs to be read.
const WIDEST: usize = 64;

impl Table {
    pub(crate) fn new(columns: &[(&'static str, Align)]) -> Table {
        Table { columns: columns.to_vec(), rows: Vec::new() }
    }

    /// One text per column; what is missing is empty.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|cell| cut(printable(cell), WIDEST)).collect());
    }

    /// The heading first, then a line per row, without line ends and without trailing blanks.
    pub(crate) fn lines(&self) -> Vec<String> {
        let headings: Vec<String> = self.columns.iter().map(|(heading, _)| (*heading).to_owned()).collect();
        let all = || std::iter::once(&headings).chain(&self.rows);
        let width = |column: usize| all().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
        let widths: Vec<usize> = (0..self.columns.len()).map(|column| width(column).unwrap_or(0)).collect();
        all().map(|row| self.line(row, &widths)).collect()
    }

    fn line(&self, row: &[String], widths: &[usize]) -> String {
        let cells = self.columns.iter().zip(widths).enumerate().map(|(column, ((_, align), width))| {
            let cell = row.get(column).map_or("", String::as_str);
            match align {
                Align::Left => format!("{cell:<width$}"),
                Align::Right => format!("{cell:>width$}"),
            }
        });
        cells.collect::<Vec<_>>().join(GAP).trim_end().to_owned()
    }
}

/// What a sidecar said of itself may be anything; a terminal acts on control characters.
pub(crate) fn printable(text: String) -> String {
    if text.contains(char::is_control) { text.replace(char::is_control, "\u{fffd}") } else { text }
}

/// At most so many characters, the last one an ellipsis where something is missing.
pub(crate) fn cut(text: String, widest: usize) -> String {
    match text.char_indices().nth(widest) {
        None => text,
        Some(_) => text.chars().take(widest.saturating_sub(1)).chain(['\u{2026}']).collect(),
    }
}

/// Seconds as a person reads them: `0.85 ms`, `12.3 ms`, `1.25 s`; `-` for what is not known.
pub(crate) fn seconds(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(value) if value < 0.01 => format!("{:.2} ms", value * 1e3),
        Some(value) if value < 1.0 => format!("{:.1} ms", value * 1e3),
        Some(value) => format!("{value:.2} s"),
    }
}

/// `100.0 %`; never 100 when something failed, and never below 0.
pub(crate) fn percent(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(value) if value < 100.0 => format!("{:.1} %", (value.max(0.0) * 10.0).floor() / 10.0),
        Some(value) if value.is_nan() => "-".to_owned(),
        Some(_) => "100.0 %".to_owned(),
    }
}

/// A span of time, in its two largest units: `23h 59m`, `4m 10s`, `9s`.
pub(crate) fn span(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, minutes) => format!("{minutes}m {}s", seconds % 60),
        (0, hours, minutes) => format!("{hours}h {minutes}m"),
        (days, hours, _) => format!("{days}d {hours}h"),
    }
}

pub(crate) fn yes_no(yes: bool) -> String {
    if yes { "yes" } else { "no" }.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_fit_what_stands_in_them() {
        let mut table = Table::new(&[("EDGE", Align::Left), ("RATE", Align::Right), ("MTLS", Align::Left)]);
        table.row(["load -> web".to_owned(), "50.0".to_owned(), "yes".to_owned()]);
        table.row(["a".to_owned(), "1000.0".to_owned()]);
        assert_eq!(table.lines(), ["EDGE           RATE  MTLS", "load -> web    50.0  yes", "a            1000.0"]);
    }

    #[test]
    fn what_a_terminal_would_act_on_is_not_printed() {
        let mut table = Table::new(&[("SIDECAR", Align::Left)]);
        table.row(["a\u{1b}[2J\nb".to_owned()]);
        assert_eq!(table.lines(), ["SIDECAR", "a\u{fffd}[2J\u{fffd}b"]);
    }

    #[test]
    fn a_cell_of_any_length_is_printed() {
        let mut table = Table::new(&[("FROM", Align::Left), ("TO", Align::Right), ("N", Align::Right)]);
        table.row(["ä".repeat(100_000), "\u{1b}".repeat(1 << 20), "1".to_owned()]);
        let lines = table.lines();
        assert!(lines.iter().all(|line| line.chars().count() <= 2 * WIDEST + 6), "{}", lines[1].len());
        assert!(lines[1].starts_with(&format!("{}\u{2026}  ", "ä".repeat(WIDEST - 1))), "{}", lines[1]);
        assert_eq!(cut("abc".to_owned(), 3), "abc");
        assert_eq!(cut("abcd".to_owned(), 3), "ab\u{2026}");
    }

    #[test]
    fn numbers_read_well() {
        for (value, text) in
            [(None, "-"), (Some(0.00085), "0.85 ms"), (Some(0.0123), "12.3 ms"), (Some(1.25), "1.25 s")]
        {
            assert_eq!(seconds(value), text);
        }
        for (value, text) in [
            (None, "-"),
            (Some(100.0), "100.0 %"),
            (Some(99.99), "99.9 %"),
            (Some(0.0), "0.0 %"),
            (Some(-3.0), "0.0 %"),
            (Some(f64::NAN), "-"),
        ] {
            assert_eq!(percent(value), text);
        }
        for (value, text) in [(9, "9s"), (250, "4m 10s"), (86_399, "23h 59m"), (90_000, "1d 1h")] {
            assert_eq!(span(value), text);
        }
    }
}
