//! What the tests of the whole share. Each promise is a file in `tests/`.

pub mod arrows;
