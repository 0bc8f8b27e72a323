//! A second reader of a request's body: it gets all of it when it has ended, if it was short enough. The first reader never
//! waits for it.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use bytes::Bytes;
use tokio::sync::Notify;

/// Longer bodies are not kept.
const MOST: usize = 64 << 10;

#[derive(Default)]
pub struct Tap {
    kept: RefCell<Kept>,
    ended: Notify,
}

#[derive(Default)]
struct Kept {
    frames: VecDeque<Bytes>,
    bytes: usize,
    /// Whether all of it is there.
    end: Option<bool>,
}

impl Tap {
    /// All of the body; None when it is too long, or broke off.
    pub async fn whole(&self) -> Option<VecDeque<Bytes>> {
        loop {
            let end = self.kept.borrow().end;
            match end {
                Some(true) => return Some(std::mem::take(&mut self.kept.borrow_mut().frames)),
                Some(false) => return None,
                None => self.ended.notified().await,
            }
        }
    }

    fn end(&self, whole: bool) {
        let mut kept = self.kept.borrow_mut();
        if kept.end.is_none() {
            kept.end = Some(whole);
            if !whole {
                kept.frames.clear();
            }
            self.ended.notify_waiters();
            self.ended.notify_one();
        }
    }
}

/// The first reader's end of it.
pub struct Tapped(Rc<Tap>);

impl Tapped {
    pub fn new() -> (Tapped, Rc<Tap>) {
        let tap = Rc::<Tap>::default();
        (Tapped(tap.clone()), tap)
    }

    pub fn data(&self, data: &Bytes) {
        let mut kept = self.0.kept.borrow_mut();
        if kept.end.is_some() {
            return;
        }
        kept.bytes += data.len();
        if kept.bytes > MOST {
            drop(kept);
            return self.0.end(false);
        }
        kept.frames.push_back(data.clone());
    }

    pub fn ended(&self) {
        self.0.end(true);
    }
}

impl Drop for Tapped {
    fn drop(&mut self) {
        self.0.end(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_whole_or_nothing() {
        type Case = (&'static [usize], bool, Option<usize>);
        let cases: [Case; 5] = [
            (&[], true, Some(0)),
            (&[1, 2], true, Some(3)),
            (&[1, 2], false, None),
            (&[MOST], true, Some(MOST)),
            (&[MOST, 1], true, None),
        ];
        for (frames, ends, expected) in cases {
            let (tapped, tap) = Tapped::new();
            for length in frames {
                tapped.data(&Bytes::from(vec![0; *length]));
            }
            if ends {
                tapped.ended();
            }
            drop(tapped);
            let got = tap.whole().await.map(|frames| frames.iter().map(Bytes::len).sum::<usize>());
            assert_eq!(got, expected, "{frames:?}");
        }
    }
}
