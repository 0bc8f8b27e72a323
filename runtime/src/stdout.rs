//! The only writers to stdout. A process says there which listener got which address, then that it is ready, and
//! nothing else, so that whoever started it can read those lines; logs go to stderr. Somebody who stopped reading is
//! no reason to stop serving: a failure to write is ignored.

use std::fmt::Display;
use std::io::Write;

/// `listening <name> <address>`: a listener is bound.
pub fn listening(name: impl Display, address: impl Display) {
    say(&format!("listening {name} {address}"));
}

/// `ready`: every listener is bound and what is needed to serve is there.
pub fn ready() {
    say("ready");
}

/// What was asked for and is an answer by itself: help, a version, a token.
pub fn say(text: &str) {
    write_line(std::io::stdout().lock(), text);
}

/// For what ends a process before there is a log: stderr.
pub fn complain(text: &str) {
    write_line(std::io::stderr().lock(), text);
}

/// One write per line, so that lines of several threads never mix.
fn write_line(mut to: impl Write, text: &str) {
    let mut line = String::with_capacity(text.len() + 1);
    line.push_str(text);
    if !line.ends_with('\n') {
        line.push('\n');
    }
    let _ = to.write_all(line.as_bytes()).and_then(|()| to.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Closed;

    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
    }

    #[test]
    fn lines_end_once_and_a_closed_pipe_is_ignored() {
        let mut written = Vec::new();
        write_line(&mut written, "ready");
        write_line(&mut written, "help\n");
        assert_eq!(written, b"ready\nhelp\n");
        write_line(Closed, "ready");
    }
}
