//! The thin part: feeds a script to `nft`, adds or takes away the routes and rules that stand beside, and says in the user's
//! words why it could not. nft applies all of a script or nothing, and what was added is taken back then, so a failure
//! leaves what was there.

use std::io::{ErrorKind, Write};
use std::process::{Command, Stdio};

use super::netlink::{self, Entry};
use super::{Rules, nft, routes, way_back};

/// Why nothing was changed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error(
        "nft is not in PATH: install nftables (the package has that name: `apt-get install nftables`, `apk add \
         nftables`, `dnf install nftables`), or use iptables: `outrigger-sidecar redirect print --iptables` prints a \
         script for it, to be run with `sh`, and with `sh FILE remove` to undo it. Nothing was changed."
    )]
    NoNft,
    #[error("nft cannot be run: {0}. Nothing was changed.")]
    NotRun(std::io::Error),
    #[error(
        "no right to change this network namespace's packet filter (nft: {0}). It takes CAP_NET_ADMIN there: run this as \
         root, in a container with `capabilities: {{add: [NET_ADMIN]}}`, or inside `unshare -Urnm`. Nothing was changed."
    )]
    NoRight(String),
    #[error(
        "the kernel has not all that the rules need (nft: {0}). They take NAT of nftables for the family inet (Linux 5.2 or \
         later; modules nft_chain_nat, nft_redir, nft_fib_inet, nf_conntrack); `outrigger-sidecar redirect print` shows \
         them, and `redirect print --iptables` a script for iptables. Nothing was changed."
    )]
    NotInKernel(String),
    #[error("nft refused the rules, which `outrigger-sidecar redirect print` shows: {0}. Nothing was changed.")]
    Refused(String),
    #[error("{0}. Nothing was changed.")]
    Beside(netlink::Error),
    #[error(
        "{0}. The rules are as they were asked for; only what stands beside them is still there, and does no harm."
    )]
    Left(netlink::Error),
}

/// Puts the rules in force, and what stands beside them; after an error everything is as it was.
pub(super) fn apply(rules: &Rules) -> Result<(), Error> {
    let (wanted, others): (Vec<_>, Vec<_>) = beside(rules.dns, rules.keep_source_address);
    let added = netlink::add(wanted).map_err(Error::Beside)?;
    feed(&nft::script(rules)).inspect_err(|_| netlink::take_back(&added))?;
    netlink::remove(others).map_err(Error::Left)
}

/// Takes away what [`apply`] did, this time or another.
pub(super) fn remove() -> Result<(), Error> {
    feed(&nft::removal())?;
    netlink::remove(beside(false, false).1).map_err(Error::Left)
}

/// What the kernel has to have besides the packet filter's rules, in the order in which it is added, and what it has to lose.
fn beside(dns: bool, keep_source_address: bool) -> (Vec<Entry>, Vec<Entry>) {
    let all = [(dns, Vec::from(routes::entries())), (keep_source_address, way_back::entries().collect())];
    let (mut wanted, mut others) = (Vec::new(), Vec::new());
    for (is_wanted, entries) in all {
        if is_wanted { wanted.extend(entries) } else { others.extend(entries.into_iter().rev()) }
    }
    (wanted, others)
}

/// Runs `nft -f -`.
fn feed(script: &str) -> Result<(), Error> {
    let mut nft = Command::new("nft");
    // Its words are read below, so they have to be in one language.
    nft.args(["-f", "-"]).env("LC_ALL", "C").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = nft.spawn().map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::NoNft,
        _ => Error::NotRun(error),
    })?;
    // nft reads all of it before it says anything; one that ends without reading tells on stderr why.
    let written = child.stdin.take().map(|mut stdin| stdin.write_all(script.as_bytes()));
    let output = child.wait_with_output().map_err(Error::NotRun)?;
    if output.status.success() {
        return match written {
            Some(Err(error)) => Err(Error::NotRun(error)),
            _ => Ok(()),
        };
    }
    Err(reason(&String::from_utf8_lossy(&output.stderr), output.status))
}

/// nft has no exit codes for reasons: its words and the kernel's are all there is.
fn reason(said: &str, status: std::process::ExitStatus) -> Error {
    let lines: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let whole = if lines.is_empty() { status.to_string() } else { lines.join("; ") };
    let first = lines.first().map_or_else(|| whole.clone(), |line| (*line).to_owned());
    let has = |words: &[&str]| words.iter().any(|word| said.contains(word));
    if has(&["Operation not permitted", "Permission denied"]) {
        Error::NoRight(first)
    } else if has(&["No such file or directory", "not supported", "Protocol error", "Protocol not available"]) {
        Error::NotInKernel(first)
    } else {
        Error::Refused(whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn what_nft_says_becomes_what_to_do() {
        let reason = |said| reason(said, std::process::ExitStatus::from_raw(256)).to_string();
        let denied = reason("netlink: Error: cache initialization failed: Operation not permitted\n");
        assert!(denied.contains("CAP_NET_ADMIN") && denied.contains("cache initialization failed"), "{denied}");
        let missing = reason("/dev/stdin:5:1-2: Error: Could not process rule: No such file or directory\nx\n^\n");
        assert!(missing.contains("nft_fib_inet") && missing.contains(":5:1-2"), "{missing}");
        let refused = reason("/dev/stdin:9:1-2: Error: syntax error, unexpected newline\ntable\n     ^\n");
        assert!(refused.contains("syntax error") && refused.contains("redirect print"), "{refused}");
        assert!(reason("").contains("exit status: 1"));
    }
}
