//! The turn in which a thread handles what came. What goes to an application of this machine leaves behind it, one message
//! right behind the other: an application that sleeps on another processor is woken once for several, and on a virtual
//! machine each such wake-up costs as much as the rest of a request. Where nothing else is ready the turn ends at once.

use std::future::poll_fn;
use std::task::Poll;

/// Ready when the tasks that are ready now have run. The scheduler's queue is first in, first out.
pub async fn end() {
    let mut waited = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut waited, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    #[tokio::test(flavor = "local")]
    async fn it_ends_behind_the_tasks_that_are_ready() {
        let ran = Rc::new(Cell::new(0));
        for _ in 0..3 {
            let ran = ran.clone();
            tokio::task::spawn_local(async move {
                // Those that wait for the end themselves do not keep each other.
                super::end().await;
                ran.set(ran.get() + 1);
            });
        }
        assert_eq!(ran.get(), 0);
        super::end().await;
        super::end().await;
        assert_eq!(ran.get(), 3);
    }
}
