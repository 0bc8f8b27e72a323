//! Policy decisions: pure functions.
