//! Runs a future on the worker that it belongs to.

use std::future::Future;

use super::streams::StreamTask;

/// The executor that HTTP/2 connections get: never another thread, so nothing needs to be `Send`.
#[derive(Clone, Copy, Debug)]
pub struct Local;

impl<F> hyper::rt::Executor<F> for Local
where
    F: Future + 'static,
    F::Output: 'static,
{
    fn execute(&self, future: F) {
        tokio::task::spawn_local(StreamTask::new(future));
    }
}
