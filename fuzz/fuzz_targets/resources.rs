//! The control plane's YAML: whatever is in the files, it is told what is wrong and where, and reading twice says the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use outrigger_api::resource::{SourceFile, parse};

fuzz_target!(|text: &str| {
    let texts = text.split_once('\0').unwrap_or((text, ""));
    let file = |name: &str, text: &str| SourceFile { name: name.to_owned(), text: text.to_owned() };
    let files = [file("a.yaml", texts.0), file("b.yaml", texts.1)];
    let parsed = parse(&files);
    for problem in parsed.errors.iter().chain(&parsed.warnings) {
        let file = files.iter().find(|file| file.name == problem.file).expect("a problem is in a file that was given");
        assert!(problem.line >= 1 && problem.column >= 1, "{problem}");
        // YAML's line breaks, not only LF.
        let lines = file.text.matches(['\r', '\n', '\u{85}', '\u{2028}', '\u{2029}']).count() + 1;
        assert!(problem.line <= lines + 1, "{problem}");
        assert!(!problem.message.is_empty());
    }
    assert_eq!(parse(&files), parsed);
});
