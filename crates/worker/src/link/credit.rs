//! How many frames a receiver lets its sender send.

use mlxnode_proto::internal::v1::Credit;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};
use tokio::sync::mpsc;
use tonic::Status;

/// The receiver's book: `granted but unused + waiting here + free but not yet granted` is always the window.
///
/// Free credits are granted half a window at a time: a grant is a message of its own, and one per frame would double the
/// messages of a decode step. The sender always has the other half.
#[derive(Debug)]
pub(crate) struct CreditLedger {
    unused: AtomicI64,
    free: AtomicU32,
    batch: u32,
    replies: mpsc::Sender<Result<Credit, Status>>,
}

/// The credits of a message's frames; come free when dropped, on whatever thread.
#[derive(Debug)]
pub(crate) struct Granted {
    ledger: Option<Arc<CreditLedger>>,
    frames: u32,
}

impl CreditLedger {
    /// Grants the whole window at once. `replies` needs room for four messages: the window's first grant, and two halves on their
    /// way at most.
    pub(crate) fn open(window: u32, replies: mpsc::Sender<Result<Credit, Status>>) -> Arc<Self> {
        let ledger = Arc::new(Self {
            unused: AtomicI64::new(0),
            free: AtomicU32::new(0),
            batch: (window / 2).max(1),
            replies,
        });
        ledger.grant(window);
        ledger
    }

    /// A frame came. `None`: the sender had no credit for it.
    pub(crate) fn charge(self: &Arc<Self>) -> Option<Granted> {
        let before = self.unused.fetch_sub(1, Ordering::Relaxed);
        (before > 0).then(|| Granted { ledger: Some(self.clone()), frames: 1 })
    }

    fn came_free(&self, frames: u32) {
        if self.free.fetch_add(frames, Ordering::Relaxed) + frames >= self.batch {
            let frames = self.free.swap(0, Ordering::Relaxed);
            if frames > 0 {
                self.grant(frames);
            }
        }
    }

    fn grant(&self, frames: u32) {
        // First the book: the sender may use the credit before `try_send` returns.
        self.unused.fetch_add(i64::from(frames), Ordering::Relaxed);
        // Fails only when the stream has ended: there is room, see `open`.
        let _ = self.replies.try_send(Ok(Credit { frames }));
    }
}

impl Granted {
    /// For a message that came over no link.
    pub(crate) fn without_link() -> Self {
        Self { ledger: None, frames: 0 }
    }

    /// The credits of the frames before, for the same message.
    pub(crate) fn absorb(&mut self, mut earlier: Self) {
        self.frames += std::mem::take(&mut earlier.frames);
    }
}

impl Drop for Granted {
    fn drop(&mut self) {
        if let Some(ledger) = &self.ledger
            && self.frames > 0
        {
            ledger.came_free(self.frames);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sender_that_overdraws_is_found_out() {
        let (replies, mut granted) = mpsc::channel(4);
        let ledger = CreditLedger::open(4, replies);
        let mut held: Vec<_> = (0..4).map(|_| ledger.charge().expect("within the window")).collect();
        assert!(ledger.charge().is_none());
        assert_eq!(granted.try_recv().unwrap().unwrap(), Credit { frames: 4 });
        held.pop();
        assert!(granted.try_recv().is_err(), "half a window at a time");
        held.pop();
        assert_eq!(granted.try_recv().unwrap().unwrap(), Credit { frames: 2 });
        let (mut last, earlier) = (held.pop().expect("two are left"), held.pop().expect("one is left"));
        last.absorb(earlier);
        assert!(granted.try_recv().is_err(), "both are held by one message");
        drop(last);
        assert_eq!(granted.try_recv().unwrap().unwrap(), Credit { frames: 2 });
    }

    #[test]
    fn a_sender_within_its_credits_is_never_stopped_for_good() {
        let (replies, mut granted) = mpsc::channel(4);
        let ledger = CreditLedger::open(5, replies);
        let mut credits = 0;
        for _ in 0..1000 {
            while let Ok(Ok(credit)) = granted.try_recv() {
                credits += credit.frames;
            }
            assert!(credits > 0, "no credit left although nothing is held");
            credits -= 1;
            drop(ledger.charge().expect("a granted credit"));
        }
    }
}
