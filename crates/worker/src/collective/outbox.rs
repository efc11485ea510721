//! What waits to be sent to one other side. Filled without waiting, since it is filled under the member's lock.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use tokio::sync::Notify;

/// A queue between the member and one stream.
#[derive(Debug)]
pub(super) struct Outbox<T> {
    waiting: Mutex<VecDeque<T>>,
    filled: Notify,
    limit: usize,
}

impl<T> Outbox<T> {
    /// For at most `limit` messages. The protocol itself needs far fewer; more means that the other side does not read.
    pub(super) fn new(limit: usize) -> Self {
        Self { waiting: Mutex::default(), filled: Notify::new(), limit }
    }

    /// False when it is full.
    pub(super) fn push(&self, message: T) -> bool {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() >= self.limit {
            return false;
        }
        waiting.push_back(message);
        drop(waiting);
        self.filled.notify_one();
        true
    }

    /// The next one. For one reader.
    pub(super) async fn next(&self) -> T {
        loop {
            let filled = self.filled.notified();
            if let Some(message) = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front() {
                return message;
            }
            filled.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[tokio::test]
    async fn keeps_the_order_and_the_limit() {
        let outbox = Arc::new(Outbox::new(2));
        let reader = tokio::spawn({
            let outbox = outbox.clone();
            async move { (outbox.next().await, outbox.next().await) }
        });
        tokio::task::yield_now().await;
        assert!(outbox.push(1));
        tokio::task::yield_now().await;
        assert!(outbox.push(2));
        assert_eq!(reader.await.unwrap(), (1, 2));
        assert!(outbox.push(3) && outbox.push(4) && !outbox.push(5));
    }
}
