//! Promise: `redirect check` ends with 0 only when the sidecar answers with the original destination, with 3 without
//! rules and with 4 without a sidecar, for each family that is in use, with no privilege and as any user. What cannot be
//! applied ends with 1, a reason and what to do, and leaves what was there.

use std::net::SocketAddr;
use std::process::Output;

use outrigger_sidecar::redirect::{PROBE_V4, PROBE_V6, answer};
use outrigger_tests::namespace::{Families, installed, only_root};
use outrigger_tests::process::{Program, command};
use outrigger_tests::{Namespace, Network, under_test};
use tokio::io::AsyncWriteExt;
use tokio::task::JoinHandle;

fn redirect(line: &str) -> std::process::Command {
    let mut outside = command(under_test!(), Program::Sidecar);
    outside.arg("redirect").args(line.split_whitespace());
    outside
}

/// Code and all that was said.
async fn run(mut command: std::process::Command) -> (i32, String) {
    let output: Output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().expect("ended by itself"), text(output.stdout) + &text(output.stderr))
}

async fn check(at: &Namespace) -> (i32, String) {
    run(at.inside(&redirect("check"))).await
}

async fn apply(at: &Namespace) {
    let (code, said) = run(at.inside(&redirect("apply"))).await;
    assert_eq!(code, 0, "{said}");
}

/// Listens where the sidecar does, in both directions, and answers as it is told.
fn sidecar(at: &Namespace, address: &str, says: impl Fn(SocketAddr) -> String + Send + 'static) -> JoinHandle<()> {
    let address: SocketAddr = address.parse().unwrap();
    let (outbound, inbound) = (at.listen(address), at.listen((address.ip(), 15006).into()));
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = outbound.accept() => accepted,
                accepted = inbound.accept() => accepted,
            };
            let Ok((mut stream, _)) = accepted else { return };
            let socket = socket2::SockRef::from(&stream);
            let original = if address.is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() };
            let original = original.unwrap().as_socket().unwrap();
            let _ = stream.write_all(says(original).as_bytes()).await;
        }
    })
}

const V4: &str = "127.0.0.1:15001";
const V6: &str = "[::1]:15001";

async fn stop(task: JoinHandle<()>) {
    task.abort();
    let _ = task.await;
}

#[tokio::test]
async fn rules_first_then_the_sidecar_then_both() {
    if !installed(&["nft", "setpriv"]) {
        return;
    }
    let Some(network) = Network::new(&["web"]) else { return };
    let web = network.at("web");
    let (code, said) = check(web).await;
    assert_eq!(code, 3, "{said}");
    for part in ["IPv4: rules absent", "IPv6: rules absent", "redirect apply"] {
        assert!(said.contains(part), "{part} in {said}");
    }
    let running = (sidecar(web, V4, answer), sidecar(web, V6, answer));
    assert_eq!(check(web).await.0, 3, "a sidecar alone");
    apply(web).await;
    let (code, said) = check(web).await;
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("IPv4: works") && said.contains("IPv6: works"), "{said}");
    assert!(said.contains(&PROBE_V4.to_string()) && said.contains(&PROBE_V6.to_string()), "{said}");

    // The sidecar's own user is asked by an operator inside its container. No user needs a privilege.
    if !only_root() {
        let inner = redirect("check");
        let program = web.for_all(inner.get_program());
        for uid in [1337, 1338] {
            let mut asked = web.command_as(uid, &program);
            asked.args(inner.get_args());
            let (code, said) = run(asked).await;
            assert_eq!(code, 0, "uid {uid}: {said}");
        }
    }

    stop(running.1).await;
    let (code, said) = check(web).await;
    assert_eq!(code, 4, "{said}");
    assert!(
        said.contains("IPv4: works") && said.contains("IPv6: sidecar absent") && said.contains("run --transparent")
    );
    stop(running.0).await;
    assert_eq!(check(web).await.0, 4);
    web.run("nft delete table inet outrigger");
    assert_eq!(check(web).await.0, 3);
}

/// Whatever part of the rules is gone: it ends with 3 and not with 0. What takes a privilege to see is in the last place.
#[tokio::test]
async fn no_part_of_the_rules_may_be_missing() {
    if !installed(&["nft", "setpriv"]) {
        return;
    }
    let Some(network) = Network::new(&["web"]) else { return };
    let web = network.at("web");
    let _running = (sidecar(web, V4, answer), sidecar(web, V6, answer));
    let unprivileged = async || {
        let inner = redirect("check");
        let mut asked = web.command("setpriv");
        asked.args(["--bounding-set=-all", "--inh-caps=-all", "--"]).arg(inner.get_program()).args(inner.get_args());
        run(asked).await
    };
    apply(web).await;
    let (code, said) = check(web).await;
    assert_eq!(code, 0, "{said}");
    for part in
        ["127.15.0.1:15007 (inbound)", "[::1]:15007 (inbound)", "dropped since the rules were applied: 0 inbound"]
    {
        assert!(said.contains(part), "{part} in {said}");
    }
    let (code, said) = unprivileged().await;
    assert!(code == 0 && said.contains("not looked at"), "{code}: {said}");
    for (chain, why) in [
        ("outbound", "rules absent"),
        ("inbound", "inbound rules absent"),
        ("bypass_outbound", "absent in part: connections are redirected, and those that get past"),
        ("bypass_inbound", "inbound rules absent in part"),
        ("prerouting", "PREROUTING does not lead to them"),
    ] {
        apply(web).await;
        web.run(&format!("nft flush chain inet outrigger {chain}"));
        let (code, said) = check(web).await;
        assert_eq!(code, 3, "{chain}: {said}");
        for family in ["IPv4: ", "IPv6: "] {
            let line = said.lines().find(|line| line.starts_with(family)).unwrap();
            assert!(line.contains(why), "{chain}: {why} in {line}");
        }
        let (code, said) = unprivileged().await;
        assert_eq!(code, if chain == "prerouting" { 0 } else { 3 }, "{chain}: {said}");
    }
    apply(web).await;
    assert_eq!(check(web).await.0, 0);
}

#[tokio::test]
async fn only_the_right_answer_is_one() {
    if !installed(&["nft", "setpriv"]) {
        return;
    }
    let Some(network) = Network::with(Families::V4, &["web"]) else { return };
    let web = network.at("web");
    apply(web).await;
    type Says = fn(SocketAddr) -> String;
    let wrong: [(Says, &str); 4] = [
        (|_| String::new(), "without an answer"),
        (|_| "HTTP/1.1 400 Bad Request\r\n\r\n".to_owned(), "something else answered"),
        (|_| answer("10.0.0.1:80".parse().unwrap()), "10.0.0.1:80"),
        (|original| answer(original) + &"x".repeat(10_000), "something else answered"),
    ];
    for (says, why) in wrong {
        let running = sidecar(web, V4, says);
        let (code, said) = check(web).await;
        assert_eq!(code, 4, "{said}");
        assert!(said.contains(why), "{why} in {said}");
        stop(running).await;
    }
    let _running = sidecar(web, V4, answer);
    let (code, said) = check(web).await;
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("IPv6: not used here"), "{said}");
}

#[tokio::test]
async fn a_family_that_is_in_use_counts_and_no_route_is_needed() {
    if !installed(&["nft", "setpriv"]) {
        return;
    }
    let Some(network) = Network::with(Families::V6, &["web"]) else { return };
    let web = network.at("web");
    web.run("ip -6 route del default");
    apply(web).await;
    let v4 = sidecar(web, V4, answer);
    assert_eq!(check(web).await.0, 4, "IPv6 is what is used");
    let _v6 = sidecar(web, V6, answer);
    assert_eq!(check(web).await.0, 0);
    stop(v4).await;
    let (code, said) = check(web).await;
    assert!(code == 0 && said.contains("IPv4: not used here"), "{said}");

    // Loopback alone counts where there is nothing else.
    let Some(lone) = Namespace::lone() else { return };
    assert_eq!(check(&lone).await.0, 3);
    apply(&lone).await;
    assert_eq!(check(&lone).await.0, 4);
    let _running = (sidecar(&lone, V4, answer), sidecar(&lone, V6, answer));
    assert_eq!(check(&lone).await.0, 0);
}

#[tokio::test]
async fn checks_at_one_time_do_not_disturb_each_other() {
    if !installed(&["nft", "setpriv"]) {
        return;
    }
    let Some(lone) = Namespace::lone() else { return };
    for expected in [3, 4] {
        let (one, two, three, four) = tokio::join!(check(&lone), check(&lone), check(&lone), check(&lone));
        assert_eq!([one.0, two.0, three.0, four.0], [expected; 4]);
        apply(&lone).await;
    }
}

#[tokio::test]
async fn what_cannot_be_applied_says_what_to_do_and_changes_nothing() {
    if !installed(&["nft", "setpriv"]) {
        return;
    }
    let Some(lone) = Namespace::lone() else { return };
    lone.run("nft add table ip theirs");
    apply(&lone).await;
    let before = lone.run("nft list ruleset");
    for verb in ["apply --dns", "remove"] {
        let inner = redirect(verb);
        let mut without_nft = lone.command("env");
        without_nft.arg("PATH=/nowhere").arg(inner.get_program()).args(inner.get_args());
        let (code, said) = run(without_nft).await;
        assert_eq!(code, 1, "{said}");
        assert!(said.contains("install nftables") && said.contains("redirect print --iptables"), "{said}");

        let mut without_right = lone.command("setpriv");
        without_right.args(["--bounding-set=-all", "--inh-caps=-all", "--"]);
        without_right.arg(inner.get_program()).args(inner.get_args());
        let (code, said) = run(without_right).await;
        assert_eq!(code, 1, "{said}");
        assert!(said.contains("CAP_NET_ADMIN") && said.contains("Nothing was changed"), "{said}");

        let mut refusing = lone.inside(&inner);
        let bin = tempfile::tempdir().unwrap();
        let script =
            "#!/bin/sh\ncat >/dev/null\necho 'Error: Could not process rule: No such file or directory' >&2\nexit 1\n";
        std::fs::write(bin.path().join("nft"), script).unwrap();
        std::fs::set_permissions(bin.path().join("nft"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        refusing.env("PATH", format!("{}:{}", bin.path().display(), std::env::var("PATH").unwrap()));
        let (code, said) = run(refusing).await;
        assert!(code == 1 && said.contains("Linux 5.2"), "{said}");
    }
    assert_eq!(lone.run("nft list ruleset"), before);
}

#[tokio::test]
async fn wrong_lines_end_with_2_and_variables_of_run_are_no_mistake() {
    let (code, said) =
        run(redirect("apply --exclude-cidrs 10.0.0/8 --exclude-inbound-ports 99999 --uid 1 --mark 2")).await;
    assert_eq!(code, 2, "{said}");
    for part in ["10.0.0/8", "99999"] {
        assert!(said.contains(part), "{part} in {said}");
    }
    for line in ["", "aply", "check --iptables", "print extra"] {
        assert_eq!(run(redirect(line)).await.0, 2, "{line}");
    }
    let (code, said) = run(redirect("apply --help")).await;
    assert!(code == 0 && said.contains("--exclude-cidrs"), "{said}");
    let mut in_a_container = redirect("print");
    in_a_container.env("OUTRIGGER_CONTROL_PLANE", "mesh:15012").env("OUTRIGGER_MARK", "77");
    in_a_container.env("OUTRIGGER_SETTINGS", "/nowhere").env("OUTRIGGER_EXCLUDE_UIDS", "3,4");
    let (code, said) = run(in_a_container).await;
    assert!(code == 0 && said.contains("meta mark 77 return") && said.contains("{ 3, 4 }"), "{said}");
    let mut unknown = redirect("print");
    unknown.env("OUTRIGGER_EXCLUDE_UID", "3");
    let (code, said) = run(unknown).await;
    assert!(code == 2 && said.contains("OUTRIGGER_EXCLUDE_UIDS"), "{said}");
}

/// One environment for the container that applies the rules and for the sidecar beside it.
#[tokio::test]
async fn variables_of_redirect_are_no_mistake_for_run() {
    let mut in_a_pod = command(under_test!(), Program::Sidecar);
    in_a_pod
        .arg("run")
        .env("OUTRIGGER_EXCLUDE_UIDS", "3,4")
        .env("OUTRIGGER_UID", "7")
        .env("OUTRIGGER_IPTABLES", "true");
    in_a_pod.env("OUTRIGGER_EXCLUDE_UID", "3");
    let (code, said) = run(in_a_pod).await;
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("OUTRIGGER_NAME"), "what is missing is told: {said}");
    assert!(said.contains("OUTRIGGER_EXCLUDE_UID=3"), "what nobody knows is a mistake: {said}");
    for known in ["OUTRIGGER_EXCLUDE_UIDS=", "OUTRIGGER_UID=", "OUTRIGGER_IPTABLES="] {
        assert!(!said.contains(known), "{known} in {said}");
    }
}
