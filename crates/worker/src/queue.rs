//! What waits for a stage: what concerns sequences first, then batches in the order in which they came.
//!
//! Which tokens go together, and when, is the driver's matter; batches that it sent keep their order in every stage, so that a stage
//! in the middle changes nothing about it. Opens, closes and failures are cheap and go first: a cancellation takes effect with the
//! next batch, whose rows of a closed sequence are dropped.
//!
//! Pure: the compute thread fills and empties it.

use crate::message::Message;
use std::collections::VecDeque;

/// Waiting messages. `T` travels along with each: the credit that is returned once the message is worked on.
pub(crate) struct StepQueue<T> {
    controls: VecDeque<(Message, T)>,
    batches: VecDeque<(Message, T)>,
}

impl<T> StepQueue<T> {
    pub(crate) fn new() -> Self {
        Self { controls: VecDeque::new(), batches: VecDeque::new() }
    }

    pub(crate) fn push(&mut self, message: Message, companion: T) {
        let is_batch = matches!(message, Message::Batch(_) | Message::Results(_));
        if is_batch { &mut self.batches } else { &mut self.controls }.push_back((message, companion));
    }

    pub(crate) fn pop(&mut self) -> Option<(Message, T)> {
        self.controls.pop_front().or_else(|| self.batches.pop_front())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Batch;
    use mlxnode_compute::{MicroBatch, SequenceId, StepInput};

    #[test]
    fn a_close_overtakes_batches_which_keep_their_order() {
        let batch = |number| {
            let micro = MicroBatch { rows: vec![], input: StepInput::Tokens };
            Message::Batch(Batch { number, micro, times: vec![] })
        };
        let close = |sequence| Message::Close { sequence: SequenceId(sequence) };
        let mut queue = StepQueue::new();
        for message in [batch(1), batch(2), close(1), batch(3), close(2)] {
            queue.push(message, ());
        }
        let popped: Vec<_> = std::iter::from_fn(|| queue.pop()).map(|(message, ())| message).collect();
        assert_eq!(popped, [close(1), close(2), batch(1), batch(2), batch(3)]);
    }
}
