//! Times of day as people write them: RFC 3339 in UTC. Documents and command lines are read here alike.

/// RFC 3339 in UTC (`Z`), to seconds since the Unix epoch.
pub fn unix_time(text: &str) -> Option<u64> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let mut date = date.splitn(3, '-').map(str::parse::<i64>);
    let mut time = time.split('.').next()?.splitn(3, ':').map(str::parse::<i64>);
    let next = |parts: &mut dyn Iterator<Item = Result<i64, _>>| parts.next()?.ok();
    let (year, month, day) = (next(&mut date)?, next(&mut date)?, next(&mut date)?);
    let (hour, minute, second) = (next(&mut time)?, next(&mut time)?, next(&mut time)?);
    let valid = (1..=12).contains(&month) && (1..=31).contains(&day) && hour < 24 && minute < 60 && second < 61;
    // Days since the epoch, counting years from March so that leap days come last.
    let shifted = if month > 2 { year } else { year - 1 };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let era = shifted.div_euclid(400);
    let year_of_era = shifted.rem_euclid(400);
    let days = era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468;
    let seconds = ((days * 24 + hour) * 60 + minute) * 60 + second;
    u64::try_from(seconds).ok().filter(|_| valid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        let cases = [
            ("1970-01-01T00:00:00Z", Some(0)),
            ("2026-11-28T14:30:00Z", Some(1_795_876_200)),
            ("2024-02-29T23:59:59.5Z", Some(1_709_251_199)),
            ("2026-13-01T00:00:00Z", None),
            ("yesterday", None),
            ("2026-11-28T14:30:00+01:00", None),
        ];
        for (text, expected) in cases {
            assert_eq!(unix_time(text), expected, "{text}");
        }
    }
}
