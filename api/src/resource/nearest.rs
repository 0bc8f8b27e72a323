//! The word that somebody probably meant.

/// The nearest of `known` by edit distance, and whether it is near enough to be a slip of the finger.
pub(super) fn nearest<'k>(word: &str, known: &[&'k str]) -> Option<(&'k str, bool)> {
    // Distances to an endless word are work for nothing: it is near to no name.
    let word: Vec<char> = word.chars().take(64).map(|c| c.to_ascii_lowercase()).collect();
    let scored = known.iter().map(|name| (distance(&word, name), *name));
    let (best, name) = scored.min_by_key(|(distance, _)| *distance)?;
    Some((name, best <= 2.max(name.len() / 3)))
}

/// The nearest of `known`, when it is near enough to be a slip of the finger.
pub fn nearest_word<'k>(word: &str, known: &[&'k str]) -> Option<&'k str> {
    nearest(word, known).and_then(|(name, near)| near.then_some(name))
}

/// `; did you mean `x`?`, or with nothing similar the whole choice.
pub(super) fn suggestion(word: &str, known: &[&str]) -> String {
    match nearest(word, known) {
        Some((name, true)) => format!("; did you mean `{name}`?"),
        Some((name, false)) if known.len() > 1 => {
            format!("; the nearest known one is `{name}`, all are: {}", known.join(", "))
        }
        Some((name, false)) => format!("; the only known one is `{name}`"),
        None => String::new(),
    }
}

/// Damerau-Levenshtein distance (insert, delete, replace, swap of neighbours), upper and lower case alike.
fn distance(word: &[char], name: &str) -> usize {
    let name: Vec<char> = name.chars().map(|c| c.to_ascii_lowercase()).collect();
    let mut before_last: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=name.len()).collect();
    for (row, from) in word.iter().enumerate() {
        let mut current = Vec::with_capacity(name.len() + 1);
        current.push(row + 1);
        for (column, to) in name.iter().enumerate() {
            let replaced = last[column] + usize::from(from != to);
            let mut best = replaced.min(last[column + 1] + 1).min(current[column] + 1);
            if row > 0 && column > 0 && *from == name[column - 1] && word[row - 1] == *to {
                best = best.min(before_last[column - 1] + 1);
            }
            current.push(best);
        }
        before_last = std::mem::replace(&mut last, current);
    }
    last[name.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_recognised() {
        let known = ["selector", "mtls", "portLevelMtls", "targetRefs"];
        let cases = [
            ("mtlss", "; did you mean `mtls`?"),
            ("mlts", "; did you mean `mtls`?"),
            ("MTLS", "; did you mean `mtls`?"),
            ("selectors", "; did you mean `selector`?"),
            ("portLevelMTLS", "; did you mean `portLevelMtls`?"),
            ("portLevelMls", "; did you mean `portLevelMtls`?"),
            ("", "; the nearest known one is `mtls`, all are: selector, mtls, portLevelMtls, targetRefs"),
            ("colours", "; the nearest known one is `mtls`, all are: selector, mtls, portLevelMtls, targetRefs"),
        ];
        for (word, expected) in cases {
            assert_eq!(suggestion(word, &known), expected, "{word}");
        }
        assert_eq!(suggestion("x", &["matchLabels"]), "; the only known one is `matchLabels`");
        assert_eq!(suggestion("x", &[]), "");
        assert_eq!(nearest(&"x".repeat(1 << 20), &known).map(|(_, near)| near), Some(false));
    }
}
