//! What a front holds of its request: a stream of events that cancels the request when it is dropped.

use super::{RequestId, RunError, RunEvent};
use futures::Stream;
use mlxnode_compute::SequenceSpec;
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;
use tokio::sync::{Notify, mpsc};

/// One sequence to run.
#[derive(Clone, Debug, PartialEq)]
pub struct RunRequest {
    /// At least one token. Of a sequence that is continued: the first prompt, and what was generated so far.
    pub prompt: Vec<u32>,
    /// `prompt_tokens` is the length of the first prompt, `max_tokens` counts what was generated so far too.
    pub spec: SequenceSpec,
    /// When to give up.
    pub deadline: Option<Instant>,
    /// Who asks. Empty: the cluster's own people. Tenants get fair shares, and nobody finds what another one computed.
    pub tenant: String,
}

impl RunRequest {
    /// Tokens at the end of the prompt that were generated before.
    pub fn generated(&self) -> usize {
        self.prompt.len().saturating_sub(self.spec.prompt_tokens)
    }
}

/// The events of one request: [`RunEvent::Started`], tokens, the last of them with its end; or an error, also the last item.
/// Dropping it cancels the request within one step.
#[derive(Debug)]
pub struct RunStream {
    events: mpsc::Receiver<Result<RunEvent, RunError>>,
    /// Told when the stream is dropped before its end.
    cancel: Option<(RequestId, Arc<Cancelled>)>,
    is_over: bool,
}

impl RunStream {
    pub(super) fn new(
        events: mpsc::Receiver<Result<RunEvent, RunError>>,
        request: RequestId,
        cancelled: Arc<Cancelled>,
    ) -> Self {
        Self { events, cancel: Some((request, cancelled)), is_over: false }
    }

    /// A request that never began.
    pub(super) fn refused(error: RunError) -> Self {
        let (sender, events) = mpsc::channel(1);
        // The channel is empty and has one place, so this cannot fail.
        let _ = sender.try_send(Err(error));
        Self { events, cancel: None, is_over: false }
    }
}

impl Stream for RunStream {
    type Item = Result<RunEvent, RunError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        let item = match self.events.poll_recv(context) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Some(item)) => item,
            // The task ended with the request still in its hands.
            Poll::Ready(None) => Err(RunError::Unavailable("its scheduler ended".into())),
        };
        if matches!(item, Err(_) | Ok(RunEvent::Token { end: Some(_), .. } | RunEvent::Embedding(_))) {
            self.is_over = true;
            self.cancel = None;
        }
        Poll::Ready(Some(item))
    }
}

impl Drop for RunStream {
    fn drop(&mut self) {
        if let Some((request, cancelled)) = self.cancel.take() {
            cancelled.push(request);
        }
    }
}

/// Requests whose streams were dropped. A drop cannot wait for room in the inbox, and must not be lost either: so the ids
/// are kept here, at most one for each stream that there is.
#[derive(Debug, Default)]
pub(super) struct Cancelled {
    requests: Mutex<VecDeque<RequestId>>,
    changed: Notify,
}

impl Cancelled {
    fn push(&self, request: RequestId) {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).push_back(request);
        self.changed.notify_one();
    }

    /// Waits until there are some.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    pub(super) fn take(&self) -> VecDeque<RequestId> {
        std::mem::take(&mut *self.requests.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
