//! A loaded stage and its sequences: one message in, at most one message out.
//!
//! Knows where in the pipeline the stage stands: the last stage counts tokens, ends sequences and answers round the ring; every
//! other one hands on. Errors of one sequence become `Failed` and spare the others; an error of the device ends the worker.
//! Pure but for the stage: no channel, no clock, no thread.

use crate::error::Fault;
use crate::message::{Message, SampledToken};
use mlxnode_compute::{
    SequenceEnd, SequenceId, SequenceSpec, Stage, StageError, StageInfo, Step, StepInput, StepOutput,
};
use std::collections::HashMap;
use tracing::debug;

/// A loaded stage and its sequences.
pub(crate) struct Shard {
    stage: Box<dyn Stage>,
    info: StageInfo,
    max_sequences: usize,
    sequences: HashMap<SequenceId, Sequence>,
}

enum Sequence {
    Open(Box<SequenceSpec>),
    /// Given up; further steps are dropped until the close comes.
    Failed,
}

impl Shard {
    pub(crate) fn new(stage: Box<dyn Stage>, max_sequences: usize) -> Self {
        let info = stage.info().clone();
        Self { stage, info, max_sequences, sequences: HashMap::new() }
    }

    pub(crate) fn info(&self) -> &StageInfo {
        &self.info
    }

    /// Sequences that hold memory.
    pub(crate) fn open_sequences(&self) -> usize {
        self.sequences.values().filter(|sequence| matches!(sequence, Sequence::Open(_))).count()
    }

    pub(crate) fn memory(&self) -> mlxnode_compute::StageMemory {
        self.stage.memory()
    }

    /// Works on one message from the stage before, or from the driver. What comes back is for the stage after.
    pub(crate) fn handle(&mut self, message: Message) -> Result<Option<Message>, Fault> {
        match message {
            Message::Open { sequence, spec, stages } => self.open(sequence, spec, stages).map(Some),
            Message::Step(step) => self.step(step),
            Message::Close { sequence } => {
                if let Some(Sequence::Open(spec)) = self.sequences.remove(&sequence) {
                    self.tell("closed", sequence, &spec);
                }
                self.stage.close(sequence);
                Ok(Some(Message::Close { sequence }))
            }
            Message::Failed { sequence, reason } => Ok(Some(self.give_up(sequence, reason))),
            Message::Opened { .. } | Message::Sampled(_) | Message::Done { .. } => {
                Err(Fault::Protocol("a message of the ring came down the pipeline".into()))
            }
        }
    }

    /// Writes down what happens to a request, by the trace that it has on all nodes.
    fn tell(&self, what: &'static str, sequence: SequenceId, spec: &SequenceSpec) {
        let Some(trace) = spec.trace else { return };
        let layers = self.info.layers;
        debug!(trace = trace.id(), sequence = sequence.0, %layers, prompt_tokens = spec.prompt_tokens, "sequence {what}");
    }

    fn open(&mut self, sequence: SequenceId, spec: SequenceSpec, stages: u32) -> Result<Message, Fault> {
        if self.sequences.contains_key(&sequence) {
            return Err(Fault::Protocol(format!("sequence {} was opened twice", sequence.0)));
        }
        if self.sequences.len() >= self.max_sequences {
            let limit = self.max_sequences;
            return Err(Fault::Protocol(format!("more than {limit} sequences were opened at once")));
        }
        match self.stage.open(sequence, spec.clone()) {
            Ok(()) => {
                self.sequences.insert(sequence, Sequence::Open(Box::new(spec.clone())));
                let stages = stages.saturating_add(1);
                self.tell("opened", sequence, &spec);
                if self.info.is_last() {
                    Ok(Message::Opened { sequence, stages })
                } else {
                    Ok(Message::Open { sequence, spec, stages })
                }
            }
            Err(error) => self.refuse(sequence, error),
        }
    }

    fn step(&mut self, step: Step) -> Result<Option<Message>, Fault> {
        let (sequence, position, sample) = (step.sequence, step.position, step.sample);
        let spec = match self.sequences.get(&sequence) {
            Some(Sequence::Open(spec)) => spec,
            Some(Sequence::Failed) => return Ok(None),
            None => {
                return Err(Fault::Protocol(format!("a step of sequence {} which is not open", sequence.0)));
            }
        };
        // Later stages need the ids; the first stage's own input is replaced by the activation below.
        let tokens = step.tokens.clone();
        let next_position = position + tokens.len();
        let output = match self.stage.step(step) {
            Ok(output) => output,
            Err(error) => return self.refuse(sequence, error).map(Some),
        };
        let message = match (output, self.info.is_last()) {
            (StepOutput::Activation(activation), false) => {
                let input = StepInput::Activation(activation);
                Message::Step(Step { sequence, position, tokens, input, sample })
            }
            (StepOutput::Sampled(sampled), true) if sample => {
                let end = end_of(spec, next_position, sampled.token);
                Message::Sampled(SampledToken { sequence, position: next_position, sampled, end })
            }
            (StepOutput::Nothing, true) if !sample => Message::Done { sequence, position: next_position },
            _ => return Err(Fault::Device("the stage answered a step with the wrong kind of output".into())),
        };
        Ok(Some(message))
    }

    /// An error of the device ends the worker, any other one only this sequence.
    fn refuse(&mut self, sequence: SequenceId, error: StageError) -> Result<Message, Fault> {
        match error {
            StageError::Device(reason) => Err(Fault::Device(reason)),
            error => Ok(self.give_up(sequence, error.to_string())),
        }
    }

    fn give_up(&mut self, sequence: SequenceId, reason: String) -> Message {
        self.stage.close(sequence);
        if self.sequences.len() < self.max_sequences || self.sequences.contains_key(&sequence) {
            self.sequences.insert(sequence, Sequence::Failed);
        }
        Message::Failed { sequence, reason }
    }
}

/// Does the sequence end with `token` at `position`?
fn end_of(spec: &SequenceSpec, position: usize, token: u32) -> Option<SequenceEnd> {
    let generated = position + 1 - spec.prompt_tokens.min(position);
    if spec.stop_tokens.contains(&token) {
        Some(SequenceEnd::Stop)
    } else if generated >= spec.max_tokens {
        Some(SequenceEnd::Length)
    } else {
        None
    }
}
