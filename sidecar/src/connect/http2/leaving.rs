//! The code with which a client reset its stream, for whatever is dropped because of that: the upstream's stream is reset with
//! the same one. Without one, dropping it says CANCEL.

use std::cell::Cell;

use h2::Reason;

thread_local! {
    static CODE: Cell<Option<Reason>> = const { Cell::new(None) };
}

/// Runs `end`, which drops what belongs to a stream that was reset with `code`.
pub fn with(code: Option<Reason>, end: impl FnOnce()) {
    CODE.set(code);
    end();
    CODE.set(None);
}

/// Why the thing that is being dropped is dropped, if a client's reset is why.
pub fn code() -> Option<Reason> {
    CODE.get()
}
