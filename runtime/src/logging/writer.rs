//! The thread that writes log lines. Everybody else pushes whole lines into a queue bounded by bytes and goes on: a
//! stderr that nobody reads (a full pipe) costs lines, which are counted and reported, never a data worker's time.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::time::Duration;

use outrigger_api::peer_text::breaks_lines;
use tracing_subscriber::fmt::MakeWriter;

/// What may wait to be written; some thousand lines.
const QUEUE_BYTES: usize = 1 << 20;
/// A line in text form; what is longer is cut. In JSON values are cut where they come from.
const LONGEST_TEXT: usize = 16 << 10;
/// What a waiting line costs besides its own bytes.
const LINE_COST: usize = 64;

enum Message {
    Line(Vec<u8>),
    /// Answered when everything before it is written.
    Flush(SyncSender<()>),
}

#[derive(Default)]
struct Counts {
    queued_bytes: AtomicUsize,
    dropped: AtomicU64,
}

/// The queue's entrance.
#[derive(Clone)]
pub(super) struct Lines {
    /// None: lines go nowhere.
    queue: Option<Sender<Message>>,
    json: bool,
    counts: Arc<Counts>,
}

impl Lines {
    /// Starts the thread. It ends when the last clone of the entrance is gone.
    pub(super) fn start(to: impl Write + Send + 'static, json: bool) -> io::Result<Lines> {
        let (queue, messages) = channel();
        let counts = Arc::new(Counts::default());
        let counted = Arc::clone(&counts);
        std::thread::Builder::new().name("log".to_owned()).spawn(move || write_all(to, json, &messages, &counted))?;
        Ok(Lines { queue: Some(queue), json, counts })
    }

    pub(super) fn nowhere() -> Lines {
        Lines { queue: None, json: false, counts: Arc::default() }
    }

    /// One line; its end is added when it is missing.
    pub(super) fn push(&self, mut line: Vec<u8>) {
        let Some(queue) = &self.queue else { return };
        if line.last() != Some(&b'\n') {
            line.push(b'\n');
        }
        let cost = line.len() + LINE_COST;
        let before = self.counts.queued_bytes.fetch_add(cost, Ordering::Relaxed);
        if before + cost > QUEUE_BYTES || queue.send(Message::Line(line)).is_err() {
            self.counts.queued_bytes.fetch_sub(cost, Ordering::Relaxed);
            self.counts.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn dropped(&self) -> u64 {
        self.counts.dropped.load(Ordering::Relaxed)
    }

    pub(super) fn flush(&self, longest: Duration) {
        let Some(queue) = &self.queue else { return };
        let (done, written) = sync_channel(1);
        if queue.send(Message::Flush(done)).is_ok() {
            // A stderr that takes nothing must not keep the process from ending.
            let _ = written.recv_timeout(longest);
        }
    }
}

/// The thread's life. Errors of the writer are ignored: there is nowhere left to report them.
fn write_all(mut to: impl Write, json: bool, messages: &Receiver<Message>, counts: &Counts) {
    let mut reported = 0;
    while let Ok(message) = messages.recv() {
        match message {
            Message::Line(line) => {
                let _ = to.write_all(&line);
                counts.queued_bytes.fetch_sub(line.len() + LINE_COST, Ordering::Relaxed);
            }
            Message::Flush(done) => {
                let _ = to.flush();
                let _ = done.try_send(());
            }
        }
        let dropped = counts.dropped.load(Ordering::Relaxed);
        // Reported when the queue has room again, not between every two lines of a burst.
        if dropped != reported && counts.queued_bytes.load(Ordering::Relaxed) < QUEUE_BYTES / 2 {
            let text = format!("{} log lines were dropped because stderr took them too slowly", dropped - reported);
            reported = dropped;
            let line = if json {
                format!("{{\"level\":\"WARN\",\"message\":\"{text}\",\"target\":\"outrigger_runtime::logging\"}}\n")
            } else {
                format!("WARN outrigger_runtime::logging: {text}\n")
            };
            let _ = to.write_all(line.as_bytes());
        }
    }
}

/// What `tracing` writes one event into; the line is queued whole when it is dropped.
pub(super) struct Line<'a> {
    lines: &'a Lines,
    bytes: Vec<u8>,
}

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        if !self.bytes.is_empty() {
            let bytes = std::mem::take(&mut self.bytes);
            self.lines.push(if self.lines.json { escape_json(bytes) } else { escape_text(bytes) });
        }
    }
}

/// One event is one line, whatever stands in its message: a line end of a peer's would begin a line of the peer's own.
fn escape_text(bytes: Vec<u8>) -> Vec<u8> {
    let Ok(text) = std::str::from_utf8(&bytes) else { return bytes };
    let line = text.strip_suffix('\n').unwrap_or(text);
    if line.len() <= LONGEST_TEXT && !line.contains(breaks_lines) {
        return bytes;
    }
    let kept = &line[..line.floor_char_boundary(LONGEST_TEXT)];
    let mut escaped = String::with_capacity(kept.len() + 64);
    for character in kept.chars() {
        if breaks_lines(character) { escaped.extend(character.escape_default()) } else { escaped.push(character) }
    }
    if kept.len() < line.len() {
        escaped.push_str(&format!("\u{2026} ({} bytes more)", line.len() - kept.len()));
    }
    escaped.into_bytes()
}

/// The same for a line of JSON, in which the control characters of ASCII are escaped already. The others can stand only
/// within strings.
pub fn escape_json(bytes: Vec<u8>) -> Vec<u8> {
    let Ok(text) = std::str::from_utf8(&bytes) else { return bytes };
    let line = text.strip_suffix('\n').unwrap_or(text);
    if !line.contains(breaks_lines) {
        return bytes;
    }
    let mut escaped = String::with_capacity(line.len() + 64);
    for character in line.chars() {
        if breaks_lines(character) {
            escaped.push_str(&format!("\\u{:04x}", u32::from(character)));
        } else {
            escaped.push(character);
        }
    }
    escaped.into_bytes()
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line { lines: self, bytes: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Condvar, Mutex};

    use super::*;

    /// A stderr that takes nothing until the gate opens.
    #[derive(Clone, Default)]
    struct Gate(Arc<Inner>);

    #[derive(Default)]
    struct Inner {
        opened: Mutex<bool>,
        opens: Condvar,
        written: Mutex<Vec<u8>>,
    }

    impl Gate {
        fn open(&self) {
            *self.0.opened.lock().unwrap() = true;
            self.0.opens.notify_all();
        }

        fn text(&self) -> String {
            String::from_utf8(self.0.written.lock().unwrap().clone()).unwrap()
        }
    }

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let opened = self.0.opened.lock().unwrap();
            let _opened = self.0.opens.wait_while(opened, |opened| !*opened).unwrap();
            self.0.written.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn one_event_is_one_line() {
        let text = |line: &str| String::from_utf8(escape_text(line.as_bytes().to_vec())).unwrap();
        assert_eq!(text("WARN refused: no\n"), "WARN refused: no\n");
        assert_eq!(text("WARN refused: a\n2026 ERROR ca: read\r\u{1b}[2J\u{9b}\n").matches('\n').count(), 0);
        assert_eq!(text("a\nb\n"), "a\\nb");
        let long = text(&"ä".repeat(1 << 20));
        assert!(long.len() < LONGEST_TEXT + 100 && long.ends_with("bytes more)"), "{}", long.len());
        let value = serde_json::json!({ "message": "a\n\u{7f}\u{9b}\u{2028}\u{202e}ä" });
        let line = String::from_utf8(escape_json(serde_json::to_vec(&value).unwrap())).unwrap();
        assert!(!line.contains(breaks_lines), "{line:?}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&line).unwrap(), value);
    }

    #[test]
    fn a_stuck_stderr_costs_lines_and_not_time() {
        let gate = Gate::default();
        let lines = Lines::start(gate.clone(), false).unwrap();
        let line = vec![b'x'; 1_000];
        let pushed = 3 * QUEUE_BYTES / line.len();
        for _ in 0..pushed {
            lines.push(line.clone());
        }
        let dropped = lines.dropped();
        assert!(dropped as usize >= pushed / 2, "{dropped} of {pushed}");
        assert!(lines.counts.queued_bytes.load(Ordering::Relaxed) <= QUEUE_BYTES);
        // It returns although nothing can be written.
        lines.flush(Duration::ZERO);
        gate.open();
        lines.push(b"last".to_vec());
        lines.flush(Duration::from_secs(30));
        let text = gate.text();
        assert_eq!(text.lines().filter(|line| line.starts_with('x')).count(), pushed - dropped as usize);
        assert!(text.contains(&format!("{dropped} log lines were dropped")), "{}", &text[text.len() - 200..]);
        assert!(text.contains("\nlast\n"));
    }
}
