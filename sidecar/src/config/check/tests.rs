use std::ffi::OsString;
use std::time::Duration;

use outrigger_api::name::Protocol;
use outrigger_runtime::settings::{self, Stop};

use super::*;

const NEEDED: [&str; 6] = [
    "--control-plane=127.0.0.1:15012",
    "--trust-bundle=bundle.pem",
    "--token-file=token",
    "--name=cart-1",
    "--namespace=shop",
    "--service-account=cart",
];

fn run(argv: &[&str], file: &str) -> Result<Config, Vec<String>> {
    let parsed = settings::parse_with(
        "outrigger-sidecar run",
        argv.iter().map(OsString::from),
        [],
        |_| Ok(file.to_owned()),
        |args: Args, mistakes| check(args, 8, mistakes),
    );
    parsed.map_err(|stop| match stop {
        Stop::Usage(error) => error.mistakes.iter().map(ToString::to_string).collect(),
        Stop::Said(text) => panic!("{text}"),
    })
}

fn with(more: &[&str]) -> Result<Config, Vec<String>> {
    run(&[&NEEDED, more].concat(), "")
}

#[test]
fn the_least_command_line_has_the_defaults_of_the_contract() {
    let config = with(&[]).unwrap();
    assert_eq!(config.workload, "cart-1");
    assert_eq!(config.trust_domain.as_str(), "outrigger.local");
    let listen = [config.admin_listen, config.metrics_listen, config.health_listen].map(|address| address.to_string());
    assert_eq!(listen, ["127.0.0.1:15000", "127.0.0.1:15020", "127.0.0.1:15021"]);
    assert_eq!((config.drain_delay, config.workers), (Duration::from_secs(5), 2));
    assert_eq!((config.http_proxy, config.state, config.mark, config.workload_address), (None, None, None, vec![]));
    assert_eq!(config.log, outrigger_runtime::logging::Settings::default());
}

#[test]
fn a_transparent_sidecar_is_scraped_and_probed_from_outside_unless_told_otherwise() {
    let config = with(&["--transparent", "--mark=1337", "--health-listen=127.0.0.1:15021"]).unwrap();
    assert!(config.transparent && !config.keep_source_address);
    assert!(with(&["--transparent", "--keep-source-address"]).unwrap().keep_source_address);
    assert_eq!((config.mark, config.workload_address, config.ports.len()), (Some(1337), vec![], 0));
    let listen = [config.admin_listen, config.metrics_listen, config.health_listen].map(|address| address.to_string());
    assert_eq!(listen, ["127.0.0.1:15000", "0.0.0.0:15020", "127.0.0.1:15021"]);
    let both = with(&["--transparent", "--inbound=0.0.0.0:9080=127.0.0.1:8080", "--http-proxy=127.0.0.1:3128"]);
    assert_eq!(both.unwrap().inbound.len(), 1);
}

#[test]
fn a_full_command_line() {
    let config = with(&[
        "--workload=cart",
        "--label=app=cart",
        "--label=version=v1",
        "--workload-address=10.0.0.7",
        "--port=9000/grpc",
        "--port=8080/http",
        "--inbound=0.0.0.0:9080=127.0.0.1:8080",
        "--inbound=0.0.0.0:9081=127.0.0.1:8081",
        "--outbound=127.0.0.1:7001=catalog:80",
        "--outbound=127.0.0.1:7002=db.data.svc.cluster.local:5432",
        "--http-proxy=127.0.0.1:3128",
        "--mark=1337",
        "--workers=4",
        "--admin-listen=[::1]:0",
        "--state=/var/lib/outrigger",
        "--drain-delay=1s500ms",
        "--log-level=debug",
        "--log-format=json",
    ])
    .unwrap();
    let declared = |port, protocol| DeclaredPort { port, protocol };
    assert_eq!(
        config.ports,
        [declared(8080, Some(Protocol::Http)), declared(8081, None), declared(9000, Some(Protocol::Grpc))]
    );
    let destinations: Vec<String> = config.outbound.iter().map(|outbound| outbound.destination.to_string()).collect();
    assert_eq!(destinations, ["catalog.shop:80", "db.data:5432"]);
    assert_eq!(config.labels.len(), 2);
    assert_eq!((config.workers, config.drain_delay), (4, Duration::from_millis(1_500)));
    assert_eq!(config.workload, "cart");
}

#[test]
fn the_same_from_a_file() {
    let file = "control-plane: 127.0.0.1:15012\ntrust-bundle: b\nstate: s\nname: cart-1\nnamespace: shop\n\
                service-account: cart\nlabel: [app=cart, tier=web]\noutbound: 127.0.0.1:0=catalog:80\nworkers: 1\n";
    let config = run(&["--settings=s.yaml"], file).unwrap();
    assert_eq!((config.workers, config.labels.len(), config.outbound.len()), (1, 2, 1));
    assert_eq!(config.token_file, None);
}

#[test]
fn workers_follow_the_processors() {
    for (processors, workers) in [(0, 1), (1, 1), (2, 2), (64, 2)] {
        let argv = NEEDED.map(OsString::from);
        let checked = settings::parse_with(
            "run",
            argv,
            [],
            |_| Ok(String::new()),
            |args: Args, mistakes| check(args, processors, mistakes),
        );
        assert_eq!(checked.unwrap().workers, workers);
    }
}

#[test]
fn everything_that_is_required_and_absent_is_said_at_once() {
    let mistakes = run(&[], "").unwrap_err();
    let keys: Vec<&str> = mistakes.iter().filter_map(|mistake| mistake.split(':').next()).collect();
    let mut expected =
        ["--control-plane", "--trust-bundle", "--name", "--namespace", "--service-account", "--token-file"].to_vec();
    assert_eq!(keys, expected);
    // A mistaken value is not absent as well, and the rest is still checked.
    let mistakes = run(&["--name=A", "--http-proxy=0.0.0.0:3128", "--token-file=t"], "").unwrap_err();
    assert!(mistakes.iter().any(|mistake| mistake.starts_with("--http-proxy=0.0.0.0:3128 (flag): would serve")));
    let keys: Vec<&str> = mistakes.iter().filter_map(|mistake| mistake.split([':', '=']).next()).collect();
    expected.retain(|key| !["--name", "--token-file"].contains(key));
    expected.insert(0, "--name");
    expected.push("--http-proxy");
    assert_eq!(keys, expected);
}

#[test]
fn mistakes_that_concern_several_flags() {
    let listen_twice = ["--outbound=127.0.0.1:7001=a:80", "--outbound=127.0.0.1:7001=b:80"];
    for (more, expected) in [
        (&listen_twice[..], "--outbound=127.0.0.1:7001=b:80 (flag): --outbound listens at 127.0.0.1:7001 already"),
        (
            &["--metrics-listen=0.0.0.0:15000"],
            "--metrics-listen=0.0.0.0:15000 (flag): --admin-listen listens at 127.0.0.1:15000 already",
        ),
        (
            &["--inbound=127.0.0.1:9080=127.0.0.1:8080", "--inbound=127.0.0.1:9081=127.0.0.2:8080"],
            "--inbound=127.0.0.1:9081=127.0.0.2:8080 (flag): another --inbound leads to the application's port 8080 already",
        ),
        (
            &["--inbound=0.0.0.0:8080=127.0.0.1:8080"],
            "--inbound=0.0.0.0:8080=127.0.0.1:8080 (flag): the application's address is the sidecar's own (--inbound), \
             which would loop",
        ),
        (
            &["--inbound=127.0.0.1:9080=127.0.0.1:15000"],
            "--inbound=127.0.0.1:9080=127.0.0.1:15000 (flag): the application's address is the sidecar's own \
             (--admin-listen), which would loop",
        ),
        (
            &["--admin-listen=0.0.0.0:15000"],
            "--admin-listen=0.0.0.0:15000 (flag): admin is for this machine alone: expected a loopback address",
        ),
        (&["--port=80/http", "--port=80"], "--port=80 (flag): port 80 is declared with http already"),
        (&["--label=a=b", "--label=a=c"], "--label=a=c (flag): a has the value \"b\" already"),
        (
            &["--keep-source-address"],
            "--keep-source-address=true (flag): needs --transparent: the rules of `redirect apply --keep-source-address` \
             lead back what the application answers",
        ),
        (&["--drain-delay=31s"], "--drain-delay=31s (flag): is more than 30s, in which a drain ends"),
        (
            &["--transparent", "--http-proxy=127.0.0.1:15001"],
            "--http-proxy=127.0.0.1:15001 (flag): --transparent listens at 127.0.0.1:15001 already",
        ),
        (
            &["--transparent", "--inbound=0.0.0.0:15006=127.0.0.1:8080"],
            "--inbound=0.0.0.0:15006=127.0.0.1:8080 (flag): --transparent listens at 0.0.0.0:15006 already",
        ),
        (
            &["--transparent", "--inbound=0.0.0.0:9080=127.0.0.1:15001"],
            "--inbound=0.0.0.0:9080=127.0.0.1:15001 (flag): the application's address is the sidecar's own \
             (--transparent), which would loop",
        ),
        (
            &["--dns-upstream=10.0.0.2"],
            "--dns-upstream=10.0.0.2:53 (flag): nothing is forwarded without a resolver: add --dns-listen 127.0.0.1:15053",
        ),
        (
            &["--dns-listen=127.0.0.1:15000"],
            "--dns-listen=127.0.0.1:15000 (flag): --admin-listen listens at 127.0.0.1:15000 already",
        ),
        (&["--namespace=outrigger-system"], "--namespace=outrigger-system (flag): is given more than once"),
    ] {
        assert_eq!(with(more).unwrap_err(), [expected], "{more:?}");
    }
}

#[test]
fn what_looks_like_a_collision_and_is_none() {
    for more in [
        &["--outbound=127.0.0.1:0=a:80", "--outbound=127.0.0.1:0=b:80"][..],
        &["--inbound=10.0.0.7:8080=127.0.0.1:8080"],
        &["--http-proxy=0.0.0.0:3128", "--http-proxy-allow=10.0.0.0/8"],
        &["--label=a=b", "--label=a=b"],
        &["--port=80/http", "--port=80/http"],
        &["--admin-listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0", "--health-listen=0.0.0.0:0"],
        &["--drain-delay=0"],
    ] {
        with(more).unwrap();
    }
}

#[test]
fn the_root_namespace_is_refused() {
    let argv = NEEDED.map(|word| if word.starts_with("--namespace") { "--namespace=outrigger-system" } else { word });
    let mistakes = run(&argv, "").unwrap_err();
    assert_eq!(mistakes.len(), 1, "{mistakes:?}");
    assert!(mistakes[0].contains("namespace of the mesh's own parts"), "{mistakes:?}");
}
