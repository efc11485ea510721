//! The life of every sequence, as the first stage sees it. Pure: commands and ring messages in, work and events out.
//!
//! ```text
//!          open ──▶ Prefilling ──last chunk──▶ Decoding ──┐ end, cancel, failure
//!  refused: failed, closed   └──────────────────────┴─────▶ Closing ──close came round the ring──▶ closed, forgotten
//! ```
//!
//! A sequence in decoding has one step on its way, so several sequences together keep the stages busy. Prefill chunks do not
//! wait for each other, but at most one per stage plus one are on their way: more would only make decode steps wait. Sequences
//! take turns with their chunks. The order in which a stage works on what it was given is `queue`'s matter.

use crate::message::{DriveCommand, DriveEvent, Message, SampledToken};
use mlxnode_compute::{Output, SequenceId, SequenceSpec, Step, StepInput};
use std::collections::{BTreeMap, VecDeque};

/// What the replica has room for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) context_tokens: usize,
    pub(crate) max_sequences: usize,
    pub(crate) prefill_chunk: usize,
    pub(crate) vocabulary: usize,
}

/// Events that may wait for a slow scheduler before no further step begins.
const WAITING_EVENTS: usize = 64;

/// All sequences of the replica.
pub(crate) struct Driver {
    limits: Limits,
    /// Length of the pipeline; 1 until the last stage told.
    stages: usize,
    sequences: BTreeMap<SequenceId, Sequence>,
    /// Opens and closes for the pipeline, before everything else.
    controls: VecDeque<Message>,
    /// Sequences whose next token can be computed, and that token.
    decodable: VecDeque<(SequenceId, u32)>,
    /// Sequences with chunks left, next one first.
    prefilling: VecDeque<SequenceId>,
    chunks_on_their_way: usize,
    events: VecDeque<DriveEvent>,
}

struct Sequence {
    phase: Phase,
    /// The prompt until all of it is on its way.
    prompt: Vec<u32>,
    /// Tokens that entered the pipeline; where the next step begins.
    entered: usize,
    chunks_on_their_way: usize,
    /// A step that will be sampled is on its way.
    awaits_token: bool,
    /// Its scheduler is gone; the next one does not know it.
    orphaned: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Prefilling,
    Decoding,
    Closing,
}

/// The scheduler or the last stage did what cannot be: the pipeline's state is not what this one believes.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum Violation {
    #[error("sequence {0} was opened twice")]
    OpenedTwice(u64),
    #[error("{what} at position {actual} of sequence {sequence}, expected {expected}")]
    Position { what: &'static str, sequence: u64, expected: usize, actual: usize },
    #[error("{what} of sequence {sequence}, which is not in the pipeline")]
    Unknown { what: &'static str, sequence: u64 },
    #[error("{0} came round the ring")]
    Direction(&'static str),
}

impl Driver {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            stages: 1,
            sequences: BTreeMap::new(),
            controls: VecDeque::new(),
            decodable: VecDeque::new(),
            prefilling: VecDeque::new(),
            chunks_on_their_way: 0,
            events: VecDeque::new(),
        }
    }

    /// Takes the scheduler's command.
    pub(crate) fn command(&mut self, command: DriveCommand) -> Result<(), Violation> {
        match command {
            DriveCommand::Open { sequence, prompt, spec } => self.open(sequence, prompt, spec),
            DriveCommand::Cancel { sequence } => {
                self.close(sequence);
                Ok(())
            }
        }
    }

    /// Takes a message of the ring.
    pub(crate) fn ring(&mut self, message: Message) -> Result<(), Violation> {
        match message {
            Message::Sampled(token) => self.sampled(token),
            Message::Done { sequence, position } => self.done(sequence, position),
            Message::Close { sequence } => self.closed(sequence),
            Message::Failed { sequence, reason } => {
                self.known("a failure", sequence)?;
                self.fail(sequence, reason);
                Ok(())
            }
            Message::Opened { sequence, stages } => {
                self.known("an acknowledgement", sequence)?;
                self.stages = (stages as usize).clamp(1, 1024);
                Ok(())
            }
            Message::Open { .. } => Err(Violation::Direction("a new sequence")),
            Message::Step(_) => Err(Violation::Direction("a step")),
        }
    }

    /// The next message for the pipeline, if any may enter now. Call until `None` after every command, message and taken event.
    pub(crate) fn next_work(&mut self) -> Option<Message> {
        if let Some(control) = self.controls.pop_front() {
            return Some(control);
        }
        if self.events.len() >= WAITING_EVENTS {
            return None;
        }
        if let Some((sequence, token)) = self.decodable.pop_front() {
            return self.decode(sequence, token);
        }
        if self.chunks_on_their_way <= self.stages {
            let sequence = self.prefilling.pop_front()?;
            return self.prefill(sequence);
        }
        None
    }

    /// The next event for the scheduler.
    pub(crate) fn next_event(&mut self) -> Option<DriveEvent> {
        self.events.pop_front()
    }

    pub(crate) fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    /// Is there room for what a command may cause? While not, the scheduler waits.
    pub(crate) fn accepts_commands(&self) -> bool {
        self.events.len() < WAITING_EVENTS
    }

    /// The scheduler is gone: nobody wants the tokens any more.
    pub(crate) fn cancel_all(&mut self) {
        let open: Vec<_> = self.sequences.keys().copied().collect();
        for sequence in open {
            self.close(sequence);
        }
        self.sequences.values_mut().for_each(|state| state.orphaned = true);
        self.events.clear();
    }

    /// The pipeline is broken: every sequence fails and is closed, since its memory goes with the workers.
    pub(crate) fn fail_all(&mut self, reason: &str) {
        for (sequence, state) in std::mem::take(&mut self.sequences) {
            if state.orphaned {
                continue;
            }
            if state.phase != Phase::Closing {
                self.events.push_back(DriveEvent::Failed { sequence, reason: reason.to_owned() });
            }
            self.events.push_back(DriveEvent::Closed { sequence });
        }
        self.controls.clear();
        self.decodable.clear();
        self.prefilling.clear();
        self.chunks_on_their_way = 0;
    }

    fn open(&mut self, sequence: SequenceId, prompt: Vec<u32>, spec: SequenceSpec) -> Result<(), Violation> {
        if self.sequences.contains_key(&sequence) {
            return Err(Violation::OpenedTwice(sequence.0));
        }
        if let Err(reason) = self.check(&prompt, &spec) {
            self.events.push_back(DriveEvent::Failed { sequence, reason });
            self.events.push_back(DriveEvent::Closed { sequence });
            return Ok(());
        }
        let room = self.limits.context_tokens - prompt.len();
        let max_tokens = spec.max_tokens.min(room);
        let spec = SequenceSpec { prompt_tokens: prompt.len(), max_tokens, ..spec };
        self.controls.push_back(Message::Open { sequence, spec, stages: 0 });
        self.prefilling.push_back(sequence);
        let state = Sequence {
            phase: Phase::Prefilling,
            prompt,
            entered: 0,
            chunks_on_their_way: 0,
            awaits_token: false,
            orphaned: false,
        };
        self.sequences.insert(sequence, state);
        Ok(())
    }

    fn check(&self, prompt: &[u32], spec: &SequenceSpec) -> Result<(), String> {
        let limits = &self.limits;
        if prompt.is_empty() {
            return Err("the prompt has no tokens".into());
        }
        if spec.max_tokens == 0 {
            return Err("max_tokens is 0, but must be 1 or more".into());
        }
        let unserved = [
            ("prompt_logprobs", spec.prompt_logprobs.is_some()),
            ("embedding", spec.output == Output::Embedding),
            ("grammar", spec.grammar.is_some()),
            ("adapter", spec.adapter.is_some()),
        ];
        if let Some((field, _)) = unserved.iter().find(|(_, is_asked)| *is_asked) {
            return Err(format!("{field} is not served by this release's workers"));
        }
        if prompt.len() >= limits.context_tokens {
            return Err(format!(
                "the prompt has {} tokens, but the model is loaded with a context of {}: \
                 shorten it, or load the model with a longer context",
                prompt.len(),
                limits.context_tokens
            ));
        }
        if let Some(token) = prompt.iter().find(|token| **token as usize >= limits.vocabulary) {
            return Err(format!(
                "the prompt has token {token}, but the vocabulary has {}",
                limits.vocabulary
            ));
        }
        if self.sequences.len() >= limits.max_sequences {
            return Err(format!(
                "{} sequences are running, which is all there is room for",
                limits.max_sequences
            ));
        }
        Ok(())
    }

    fn prefill(&mut self, sequence: SequenceId) -> Option<Message> {
        let state = self.sequences.get_mut(&sequence)?;
        let chunk_end = state.prompt.len().min(state.entered + self.limits.prefill_chunk);
        let is_last = chunk_end == state.prompt.len();
        let step = Step {
            sequence,
            position: state.entered,
            tokens: state.prompt[state.entered..chunk_end].to_vec(),
            input: StepInput::Tokens,
            sample: is_last,
        };
        if state.entered == 0 {
            self.events.push_back(DriveEvent::Started { sequence, cached_tokens: 0 });
        }
        state.entered = chunk_end;
        state.chunks_on_their_way += 1;
        self.chunks_on_their_way += 1;
        if is_last {
            state.awaits_token = true;
            state.phase = Phase::Decoding;
            state.prompt = Vec::new();
        } else {
            self.prefilling.push_back(sequence);
        }
        Some(Message::Step(step))
    }

    fn decode(&mut self, sequence: SequenceId, token: u32) -> Option<Message> {
        let state = self.sequences.get_mut(&sequence)?;
        let position = state.entered;
        state.entered += 1;
        state.awaits_token = true;
        let tokens = vec![token];
        Some(Message::Step(Step { sequence, position, tokens, input: StepInput::Tokens, sample: true }))
    }

    fn sampled(&mut self, token: SampledToken) -> Result<(), Violation> {
        let sequence = token.sequence;
        let Some(state) = self.sequences.get_mut(&sequence) else {
            return Err(Violation::Unknown { what: "a token", sequence: sequence.0 });
        };
        if state.phase == Phase::Closing {
            return Ok(()); // it was on its way when the sequence was closed
        }
        let expected = state.entered;
        if token.position != expected || !std::mem::take(&mut state.awaits_token) {
            let (sequence, actual) = (sequence.0, token.position);
            return Err(Violation::Position { what: "a token", sequence, expected, actual });
        }
        self.chunk_arrived(sequence); // the prompt's last chunk, if this is the first token
        let (next, end) = (token.sampled.token, token.end);
        self.events.push_back(DriveEvent::Token(token));
        if end.is_some() {
            self.close(sequence);
        } else {
            self.decodable.push_back((sequence, next));
        }
        Ok(())
    }

    fn done(&mut self, sequence: SequenceId, position: usize) -> Result<(), Violation> {
        let state = self.known("a finished chunk", sequence)?;
        if state.phase == Phase::Closing {
            return Ok(());
        }
        if position > state.entered || state.chunks_on_their_way == 0 {
            let (sequence, expected) = (sequence.0, state.entered);
            return Err(Violation::Position {
                what: "a finished chunk",
                sequence,
                expected,
                actual: position,
            });
        }
        self.chunk_arrived(sequence);
        Ok(())
    }

    fn chunk_arrived(&mut self, sequence: SequenceId) {
        if let Some(state) = self.sequences.get_mut(&sequence)
            && state.chunks_on_their_way > 0
        {
            state.chunks_on_their_way -= 1;
            self.chunks_on_their_way -= 1;
        }
    }

    fn fail(&mut self, sequence: SequenceId, reason: String) {
        if self.sequences.get(&sequence).is_some_and(|state| state.phase != Phase::Closing) {
            self.events.push_back(DriveEvent::Failed { sequence, reason });
            self.close(sequence);
        }
    }

    /// Sends a close after the sequence. Its chunks may never arrive now, since stages drop what waits.
    fn close(&mut self, sequence: SequenceId) {
        let Some(state) = self.sequences.get_mut(&sequence) else { return };
        if state.phase == Phase::Closing {
            return;
        }
        state.phase = Phase::Closing;
        state.prompt = Vec::new();
        self.chunks_on_their_way -= std::mem::take(&mut state.chunks_on_their_way);
        self.prefilling.retain(|waiting| *waiting != sequence);
        self.decodable.retain(|(waiting, _)| *waiting != sequence);
        self.controls.push_back(Message::Close { sequence });
    }

    fn closed(&mut self, sequence: SequenceId) -> Result<(), Violation> {
        if self.known("a close", sequence)?.phase != Phase::Closing {
            return Err(Violation::Unknown { what: "an unasked close", sequence: sequence.0 });
        }
        if self.sequences.remove(&sequence).is_some_and(|state| !state.orphaned) {
            self.events.push_back(DriveEvent::Closed { sequence });
        }
        Ok(())
    }

    fn known(&self, what: &'static str, sequence: SequenceId) -> Result<&Sequence, Violation> {
        self.sequences.get(&sequence).ok_or(Violation::Unknown { what, sequence: sequence.0 })
    }
}

#[cfg(test)]
mod tests;
