use std::net::SocketAddr;
use std::path::PathBuf;

use super::*;

#[derive(clap::Args, Debug, PartialEq)]
struct Example {
    /// Who it is.
    #[arg(long, required = true)]
    name: Option<String>,
    #[arg(long, default_value = "127.0.0.1:15000")]
    admin_listen: SocketAddr,
    #[arg(long)]
    workers: Option<u16>,
    #[arg(long)]
    label: Vec<String>,
    #[arg(long)]
    transparent: bool,
    #[arg(long)]
    state: Option<PathBuf>,
    #[arg(long, default_value = "text")]
    log_format: crate::logging::Format,
}

const COMMAND: &str = "example run";

fn run(argv: &[&str], environment: &[(&str, &str)], file: &str) -> Result<Example, Stop> {
    parse_with(
        COMMAND,
        argv.iter().map(OsString::from),
        environment.iter().map(|(key, value)| (OsString::from(key), OsString::from(value))),
        |_| Ok(file.to_owned()),
        |args: Example, mistakes| {
            if args.workers == Some(13) {
                mistakes.add("workers", 13, "is unlucky");
            }
            Some(args)
        },
    )
}

fn mistakes(argv: &[&str], environment: &[(&str, &str)], file: &str) -> Vec<String> {
    match run(argv, environment, file) {
        Err(Stop::Usage(error)) => error.mistakes.iter().map(Mistake::to_string).collect(),
        other => panic!("expected mistakes, got {other:?}"),
    }
}

#[test]
fn a_flag_wins_over_a_variable_over_the_file() {
    let file = "name: file\nworkers: 1\nlabel: [a=file, b=file]\nstate: /file\ntransparent: true\n";
    let environment =
        [("OUTRIGGER_WORKERS", "2"), ("OUTRIGGER_LABEL", "a=env, b=env"), ("OUTRIGGER_TRANSPARENT", "false")];
    let got = run(&["--settings=x.yaml", "--workers", "3"], &environment, file).unwrap();
    assert_eq!(
        got,
        Example {
            name: Some("file".to_owned()),
            admin_listen: "127.0.0.1:15000".parse().unwrap(),
            workers: Some(3),
            label: vec!["a=env".to_owned(), "b=env".to_owned()],
            transparent: false,
            state: Some("/file".into()),
            log_format: crate::logging::Format::Text,
        }
    );
    let got = run(&["--label", "c", "--label=d"], &[("OUTRIGGER_SETTINGS", "x.yaml")], file).unwrap();
    assert_eq!((got.label, got.transparent), (vec!["c".to_owned(), "d".to_owned()], true));
    let got = run(&["--name=a", "--transparent=false"], &[("OUTRIGGER_TRANSPARENT", "true")], "").unwrap();
    assert!(!got.transparent);
}

#[test]
fn all_mistakes_at_once_with_key_value_and_origin() {
    let file = "# settings\nworkers: many\nadmin-listne: 127.0.0.1:0\nlabel: {a: b}\nlabel: x\nstate: [a]\ntransparent: maybe\nlog-format: xml\n";
    let argv = [
        "--settings=/etc/o.yaml",
        "--wrokers",
        "2",
        "--workers=-1",
        "--workers=1",
        "stray",
        "--admin-listen",
        "--transparent=yes",
    ];
    let environment = [
        ("OUTRIGGER_WORKER", "9"),
        ("OUTRIGGER_WORKERS", "70000"),
        ("OUTRIGGER_BIN_DIR", "/bin"),
        ("OUTRIGGER_REQUIRE", "netns"),
        ("OTHER", "x"),
    ];
    let expected = [
        "--wrokers (flag): there is no such flag; the nearest is --workers",
        "--workers=-1 (flag): -1 is not in 0..=65535",
        "--workers=1 (flag): is given more than once",
        "stray (flag): is not expected here: settings are flags, as in --name=value",
        "--admin-listen (flag): needs a value",
        "--transparent=yes (flag): expected true or false",
        "OUTRIGGER_WORKER=9 (environment variable): there is no such setting; the nearest is OUTRIGGER_WORKERS",
        "OUTRIGGER_WORKERS=70000 (environment variable): 70000 is not in 0..=65535",
        "workers: many (/etc/o.yaml, line 2): invalid digit found in string",
        "admin-listne: 127.0.0.1:0 (/etc/o.yaml, line 3): there is no such setting; the nearest is admin-listen",
        "label: (a mapping) (/etc/o.yaml, line 4): expected a value or a list of values",
        "label: x (/etc/o.yaml, line 5): stands in the file twice",
        "state: [a] (/etc/o.yaml, line 6): expected one value",
        "transparent: maybe (/etc/o.yaml, line 7): expected true or false",
        "log-format: xml (/etc/o.yaml, line 8): expected one of text, json",
        "--name: is required: give --name, OUTRIGGER_NAME or `name` in the settings file",
    ];
    assert_eq!(mistakes(&argv, &environment, file), expected);
}

#[test]
fn checks_of_the_command_join_the_others_and_name_the_origin() {
    assert_eq!(
        mistakes(&["--settings=o.yaml", "--state"], &[("OUTRIGGER_NAME", "a")], "workers: 13"),
        ["--state (flag): needs a value", "workers: 13 (o.yaml, line 1): is unlucky"]
    );
    assert_eq!(
        mistakes(&[], &[("OUTRIGGER_WORKERS", "13"), ("OUTRIGGER_NAME", "a")], ""),
        ["OUTRIGGER_WORKERS=13 (environment variable): is unlucky"]
    );
}

#[test]
fn a_file_that_is_no_mapping_is_one_mistake() {
    for file in ["- a", "a: [", "just text", "a: 1\n---\nb: 2\n"] {
        let found = mistakes(&["--settings=o.yaml", "--name=a"], &[], file);
        assert_eq!(found.len(), 1, "{file}: {found:?}");
        assert!(found[0].starts_with("--settings=o.yaml (flag): is not YAML"), "{found:?}");
    }
    for file in ["", "\n  # nothing\n"] {
        run(&["--settings=o.yaml", "--name=a"], &[], file).unwrap();
    }
}

#[test]
fn a_file_that_cannot_be_read_is_a_mistake() {
    let argv = ["--settings=/does/not/exist", "--name=a"].map(OsString::from);
    match parse::<Example>(COMMAND, argv, []) {
        Err(Stop::Usage(error)) => assert!(error.to_string().contains("--settings=/does/not/exist (flag): cannot be")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn help_and_version_are_not_mistakes() {
    let said = |argv: &[&str]| match run(argv, &[("OUTRIGGER_NONSENSE", "1")], "") {
        Err(Stop::Said(text)) => text,
        other => panic!("{other:?}"),
    };
    let help = said(&["--help"]);
    assert!(help.contains("example run") && help.contains("Who it is") && help.contains("--settings"), "{help}");
    assert!(said(&["--name", "a", "-V"]).contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn nearest_is_fewest_edits_away() {
    for (word, expected) in [("wrokers", "workers"), ("stat", "state"), ("admin_listen", "admin-listen"), ("", "name")]
    {
        assert_eq!(nearest(word, ["admin-listen", "name", "state", "workers"]), Some(expected), "{word}");
    }
    assert_eq!(nearest("x", []), None);
}

#[test]
fn paths_need_not_be_utf_8() {
    use std::os::unix::ffi::OsStringExt;
    let path = OsString::from_vec(b"/\xff".to_vec());
    let argv = [OsString::from("--name=a"), OsString::from("--state"), path.clone()];
    let got: Example = parse(COMMAND, argv, []).unwrap();
    assert_eq!(got.state, Some(path.into()));
}
