//! The texts, word for word: what a reader of `redirect print` sees and what the kernel is given. After a change that is
//! meant, `redirect print` writes the new ones.

use outrigger_runtime::settings::{self, Stop};

use super::{Own, Rules, iptables, nft};

fn parse(line: &str) -> Result<Rules, Stop> {
    let words = line.split_whitespace().map(Into::into);
    settings::parse_checked("redirect", words, [], |args: super::Args, mistakes| args.check(mistakes))
}

fn mistakes(line: &str) -> String {
    match parse(line) {
        Err(Stop::Usage(error)) => error.to_string(),
        other => panic!("{line}: {other:?}"),
    }
}

const ALL: &str = "--exclude-inbound-ports 9100,22 --exclude-inbound-ports 22 --exclude-outbound-ports 5432,3306 \
                   --exclude-cidrs 10.1.2.3/8,10.0.0.0/9,fd00::/8 --exclude-cidrs 192.0.2.7,2001:db8::7 \
                   --exclude-uids 104,0 --uid 4711 --dns";

#[test]
fn the_nft_scripts() {
    for (line, golden) in [
        ("", include_str!("testdata/default.nft")),
        (ALL, include_str!("testdata/all.nft")),
        ("--mark 1337", include_str!("testdata/mark.nft")),
        ("--keep-source-address", include_str!("testdata/kept.nft")),
    ] {
        assert_eq!(nft::script(&parse(line).unwrap()), golden, "{line}");
    }
    assert_eq!(nft::removal(), "table inet outrigger {}\ndelete table inet outrigger\n");
}

#[test]
fn the_iptables_scripts() {
    for (line, golden) in [
        ("", include_str!("testdata/default.sh")),
        (ALL, include_str!("testdata/all.sh")),
        ("--mark 1337", include_str!("testdata/mark.sh")),
        ("--keep-source-address", include_str!("testdata/kept.sh")),
    ] {
        assert_eq!(iptables::script(&parse(line).unwrap()), golden, "{line}");
    }
}

#[test]
fn flags_become_rules() {
    assert_eq!(parse("").unwrap(), Rules::default());
    assert_eq!(parse("--mark 7").unwrap().own, Own::Mark(7));
    assert_eq!(parse("--uid 0").unwrap().own, Own::Uid(0));
    assert!(parse("--keep-source-address").unwrap().keep_source_address);
    let all = parse(ALL).unwrap();
    assert_eq!(all.exclude_inbound_ports, [22, 9100]);
    assert_eq!(all.exclude_uids, [0, 104]);
    assert_eq!(all.exclude_v4.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.0.0.0/8", "192.0.2.7/32"]);
}

#[test]
fn mistakes_are_told_all_at_once_with_what_was_expected() {
    let said =
        mistakes("--exclude-inbound-ports 22,ssh --exclude-cidrs 10.0.0.0/33 --exclude-uids root --mark 0 --pid 3");
    for part in ["22,ssh", "1 to 65535", "10.0.0.0/33", "10.0.0.0/8 or", "root", "--mark=0", "--pid"] {
        assert!(said.contains(part), "{part} in {said}");
    }
    assert!(mistakes("--uid 1 --mark 2").contains("contradicts --uid"));
    assert!(mistakes("--exclude-outbound-ports 0").contains("1 to 65535"));
}
