//! Which waiting message a stage works on next: decode steps before prefill chunks, and nobody starves.
//!
//! The same rule in every stage, because a slow stage in the middle is where a queue forms. Rounds make it fair: a decode step
//! waits for at most one prefill chunk, and a prefill chunk for at most one round of the decode steps that waited before it.
//! Closing a sequence drops its waiting steps, so that a cancellation takes effect within the step under way.
//!
//! Pure: the compute thread fills and empties it.

use crate::message::Message;
use mlxnode_compute::{SequenceId, Step};
use std::collections::VecDeque;

/// Waiting messages. `T` travels along with each: the credit that is returned once the message is worked on.
pub(crate) struct StepQueue<T> {
    /// Opens, closes and failures: cheap, and the steps of their sequences depend on them.
    controls: VecDeque<(Message, T)>,
    decodes: VecDeque<(Step, T)>,
    prefills: VecDeque<(Step, T)>,
    /// How many decode steps go before the next prefill chunk. `None` until the first choice after a chunk.
    decodes_in_round: Option<usize>,
}

impl<T> StepQueue<T> {
    pub(crate) fn new() -> Self {
        Self {
            controls: VecDeque::new(),
            decodes: VecDeque::new(),
            prefills: VecDeque::new(),
            decodes_in_round: None,
        }
    }

    pub(crate) fn push(&mut self, message: Message, companion: T) {
        match message {
            Message::Step(step) => self.push_step(step, companion),
            Message::Close { sequence } | Message::Failed { sequence, .. } => {
                self.decodes.retain(|(step, _)| step.sequence != sequence);
                self.prefills.retain(|(step, _)| step.sequence != sequence);
                self.controls.push_back((message, companion));
            }
            Message::Open { .. } | Message::Opened { .. } | Message::Sampled(_) | Message::Done { .. } => {
                self.controls.push_back((message, companion));
            }
        }
    }

    /// A single token counts as a decode step, unless it is the rest of a prompt whose earlier chunks still wait.
    fn push_step(&mut self, step: Step, companion: T) {
        let waits_in = |queue: &VecDeque<(Step, T)>, sequence: SequenceId| {
            queue.iter().any(|(waiting, _)| waiting.sequence == sequence)
        };
        let is_decode = if waits_in(&self.prefills, step.sequence) {
            false
        } else {
            step.tokens.len() == 1 || waits_in(&self.decodes, step.sequence)
        };
        if is_decode { &mut self.decodes } else { &mut self.prefills }.push_back((step, companion));
    }

    pub(crate) fn pop(&mut self) -> Option<(Message, T)> {
        if let Some(control) = self.controls.pop_front() {
            return Some(control);
        }
        let decodes_left = *self.decodes_in_round.get_or_insert(self.decodes.len());
        if (decodes_left > 0 || self.prefills.is_empty())
            && let Some((step, companion)) = self.decodes.pop_front()
        {
            self.decodes_in_round = Some(decodes_left.saturating_sub(1));
            return Some((Message::Step(step), companion));
        }
        self.decodes_in_round = None;
        self.prefills.pop_front().map(|(step, companion)| (Message::Step(step), companion))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlxnode_compute::StepInput;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn step(sequence: u64, position: usize, tokens: usize) -> Message {
        Message::Step(Step {
            sequence: SequenceId(sequence),
            position,
            tokens: vec![0; tokens],
            input: StepInput::Tokens,
            sample: true,
        })
    }

    fn popped(queue: &mut StepQueue<()>) -> Vec<u64> {
        let sequence = |(message, ())| match message {
            Message::Step(step) => step.sequence.0,
            Message::Close { sequence } => 1000 + sequence.0,
            other => panic!("{other:?}"),
        };
        std::iter::from_fn(|| queue.pop()).map(sequence).collect()
    }

    #[test]
    fn decodes_go_before_prefill_but_a_round_of_them_only() {
        let mut queue = StepQueue::new();
        for (sequence, tokens) in [(10, 512), (11, 512), (1, 1), (2, 1)] {
            queue.push(step(sequence, 0, tokens), ());
        }
        assert_eq!(queue.pop().map(|(message, ())| message), Some(step(1, 0, 1)));
        queue.push(step(1, 1, 1), ()); // its next token: belongs to the next round
        assert_eq!(popped(&mut queue), [2, 10, 1, 11]);
    }

    #[test]
    fn the_rest_of_a_prompt_stays_behind_its_chunks() {
        let mut queue = StepQueue::new();
        queue.push(step(1, 0, 512), ());
        queue.push(step(1, 512, 1), ());
        queue.push(step(2, 7, 1), ());
        assert_eq!(popped(&mut queue), [2, 1, 1]);
    }

    #[test]
    fn closing_drops_what_waits() {
        let mut queue = StepQueue::new();
        for (sequence, tokens) in [(1, 512), (1, 512), (2, 1)] {
            queue.push(step(sequence, 0, tokens), ());
        }
        queue.push(Message::Close { sequence: SequenceId(1) }, ());
        assert_eq!(popped(&mut queue), [1001, 2]);
    }

    /// Pushes and pops against what must hold whatever the order of both.
    #[derive(Default)]
    struct Checked {
        pushed: HashMap<u64, usize>,
        popped: HashMap<u64, usize>,
        /// Decode steps that wait with nothing of their sequence before them, and the chunks that went past them.
        waits: HashMap<u64, usize>,
    }

    impl Checked {
        fn push(&mut self, queue: &mut StepQueue<()>, sequence: u64, tokens: usize) {
            if self.waits.contains_key(&sequence) {
                return; // a decode step's successor is known only when it is through
            }
            let position = self.pushed.entry(sequence).or_default();
            if tokens == 1 && *position == self.popped.get(&sequence).copied().unwrap_or(0) {
                self.waits.insert(sequence, 0);
            }
            queue.push(step(sequence, *position, tokens), ());
            *position += tokens;
        }

        fn pop(&mut self, queue: &mut StepQueue<()>) -> Result<bool, TestCaseError> {
            let Some((Message::Step(step), ())) = queue.pop() else { return Ok(false) };
            let position = self.popped.entry(step.sequence.0).or_default();
            prop_assert_eq!(*position, step.position, "order within a sequence");
            *position += step.tokens.len();
            self.waits.remove(&step.sequence.0);
            if step.tokens.len() > 1 {
                for chunks in self.waits.values_mut() {
                    *chunks += 1;
                    prop_assert!(*chunks <= 1, "a decode step waited for two chunks");
                }
            }
            Ok(true)
        }
    }

    proptest! {
        #[test]
        fn keeps_order_and_starves_nobody(
            actions in prop::collection::vec((0_u64..6, 0_usize..5), 1..200),
        ) {
            let (mut queue, mut checked) = (StepQueue::new(), Checked::default());
            for (sequence, tokens) in actions {
                if tokens == 0 {
                    checked.pop(&mut queue)?;
                } else {
                    checked.push(&mut queue, sequence, tokens);
                }
            }
            while checked.pop(&mut queue)? {}
            for (sequence, position) in &checked.pushed {
                prop_assert_eq!(Some(position), checked.popped.get(sequence), "all of it was worked on");
            }
        }
    }
}
