//! A loaded stage and its sequences: messages in, messages out.
//!
//! Knows where in the pipeline the stage stands: the last stage counts tokens, ends sequences and answers round the ring; every
//! other one hands on. Errors of one sequence become `Failed`, before the batch, and spare the others; an error of the device ends
//! the worker.
//! Pure but for the stage: no channel, no clock, no thread.

use crate::errand::Errand;
use crate::error::Fault;
use crate::message::{Batch, Message, Results, RowResult};
use mlxnode_compute::{
    BlockPlan, Keep, MicroBatch, Row, RowOutput, SequenceEnd, SequenceId, SequenceSpec, Stage, StageError,
    StageInfo, StepInput,
};
use std::collections::HashMap;
use tracing::debug;

/// A loaded stage and its sequences.
pub(crate) struct Shard {
    stage: Box<dyn Stage>,
    info: StageInfo,
    max_sequences: usize,
    sequences: HashMap<SequenceId, Sequence>,
    /// The largest id that was ever opened; ids grow.
    newest: Option<SequenceId>,
    guesses: Guesses,
    /// Sequences whose last row had guesses, and one past its last token: where the next row begins says how many were right.
    unsure: HashMap<SequenceId, usize>,
}

/// Guesses that the last stage saw, and right ones that any stage knows of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Guesses {
    pub(crate) made: u64,
    pub(crate) right: u64,
    /// Right ones: tokens that went through this stage besides those of the rows.
    pub(crate) passed: u64,
}

enum Sequence {
    Open(Box<SequenceSpec>),
    /// Given up; further steps are dropped until the close comes.
    Failed,
}

impl Shard {
    pub(crate) fn new(stage: Box<dyn Stage>, max_sequences: usize) -> Self {
        let info = stage.info().clone();
        let sequences = HashMap::new();
        Self {
            stage,
            info,
            max_sequences,
            sequences,
            newest: None,
            guesses: Guesses::default(),
            unsure: HashMap::new(),
        }
    }

    pub(crate) fn info(&self) -> &StageInfo {
        &self.info
    }

    /// Sequences that hold memory.
    pub(crate) fn open_sequences(&self) -> usize {
        self.sequences.values().filter(|sequence| matches!(sequence, Sequence::Open(_))).count()
    }

    /// Guesses so far.
    pub(crate) fn guesses(&self) -> Guesses {
        self.guesses
    }

    pub(crate) fn memory(&self) -> mlxnode_compute::StageMemory {
        self.stage.memory()
    }

    /// Does what the node asks.
    pub(crate) fn errand(&mut self, errand: Errand) -> Result<(), Fault> {
        errand.run(self.stage.as_mut())
    }

    /// Works on one message from the stage before, or from the driver. What comes back is for the stage after.
    pub(crate) fn handle(&mut self, message: Message) -> Result<Vec<Message>, Fault> {
        match message {
            Message::Open { sequence, spec, stages, blocks } => {
                Ok(vec![self.open(sequence, spec, stages, blocks)?])
            }
            Message::Batch(batch) => self.run(batch),
            Message::Close { sequence } => {
                if let Some(Sequence::Open(spec)) = self.sequences.remove(&sequence) {
                    self.tell("closed", sequence, &spec);
                }
                self.unsure.remove(&sequence);
                self.stage.close(sequence);
                Ok(vec![Message::Close { sequence }])
            }
            Message::Failed { sequence, reason } => Ok(vec![self.give_up(sequence, reason)]),
            Message::Missing { sequence } => Ok(vec![self.miss(sequence)]),
            Message::Keep { sequence, keep } => self.keep(sequence, keep),
            Message::Blocks(order) => {
                if let Some(store) = self.stage.blocks() {
                    store.order(order).map_err(|error| Fault::Device(error.to_string()))?;
                }
                Ok(self.handed_on(Message::Blocks(order)))
            }
            Message::Reset { mut capacities } => {
                capacities.push(self.stage.blocks().map(|store| store.reset()).unwrap_or_default());
                Ok(vec![Message::Reset { capacities }])
            }
            Message::Opened { .. } | Message::Results(_) => {
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

    /// Nothing waits for this stage: lets it do what it put off. True when there is more of that.
    pub(crate) fn rest(&mut self) -> Result<bool, Fault> {
        let rested = self.stage.blocks().map_or(Ok(false), |store| store.rest());
        rested.map_err(|error| Fault::Device(error.to_string()))
    }

    fn open(
        &mut self,
        sequence: SequenceId,
        spec: SequenceSpec,
        stages: u32,
        blocks: BlockPlan,
    ) -> Result<Message, Fault> {
        if self.sequences.contains_key(&sequence) {
            return Err(Fault::Protocol(format!("sequence {} was opened twice", sequence.0)));
        }
        if self.sequences.len() >= self.max_sequences {
            let limit = self.max_sequences;
            return Err(Fault::Protocol(format!("more than {limit} sequences were opened at once")));
        }
        self.newest = self.newest.max(Some(sequence));
        let opened = self.stage.open(sequence, spec.clone());
        match opened.and_then(|()| self.begin(sequence, &blocks)) {
            Ok(()) => {
                self.sequences.insert(sequence, Sequence::Open(Box::new(spec.clone())));
                let stages = stages.saturating_add(1);
                self.tell("opened", sequence, &spec);
                if self.info.is_last() {
                    Ok(Message::Opened { sequence, stages })
                } else {
                    Ok(Message::Open { sequence, spec, stages, blocks })
                }
            }
            Err(StageError::MissingBlock(_)) => Ok(self.miss(sequence)),
            Err(error) => self.refuse(sequence, error),
        }
    }

    /// What the sequence begins with, and what is kept of it.
    fn begin(&mut self, sequence: SequenceId, plan: &BlockPlan) -> Result<(), StageError> {
        if plan.is_empty() {
            return Ok(());
        }
        let Some(store) = self.stage.blocks() else {
            return Err(StageError::Input("this stage keeps no blocks of prompts".to_owned()));
        };
        store.begin_with(sequence, &plan.reuse)?;
        plan.keep.iter().try_for_each(|keep| store.keep(sequence, *keep))
    }

    fn keep(&mut self, sequence: SequenceId, keep: Keep) -> Result<Vec<Message>, Fault> {
        let is_open = matches!(self.sequences.get(&sequence), Some(Sequence::Open(_)));
        if let Some(store) = self.stage.blocks().filter(|_| is_open) {
            // Only the device can refuse; a block that could not be taken is missing later.
            store.keep(sequence, keep).map_err(|error| Fault::Device(error.to_string()))?;
        }
        Ok(self.handed_on(Message::Keep { sequence, keep }))
    }

    /// For the next stage, if there is one.
    fn handed_on(&self, message: Message) -> Vec<Message> {
        if self.info.is_last() { Vec::new() } else { vec![message] }
    }

    /// A stage does not have what the sequence was to begin with.
    fn miss(&mut self, sequence: SequenceId) -> Message {
        let _ = self.give_up(sequence, String::new());
        Message::Missing { sequence }
    }

    fn run(&mut self, batch: Batch) -> Result<Vec<Message>, Fault> {
        let Batch { number, mut micro, times } = batch;
        let unknown =
            micro.rows.iter().map(|row| row.sequence).find(|sequence| Some(*sequence) > self.newest);
        if let Some(sequence) = unknown {
            return Err(Fault::Protocol(format!("a row of sequence {} which was never opened", sequence.0)));
        }
        // A row of a sequence that was closed or given up meanwhile, which overtakes batches, is of no use to anybody.
        let is_open = |row: &Row| matches!(self.sequences.get(&row.sequence), Some(Sequence::Open(_)));
        micro.retain(is_open).map_err(|error| Fault::Protocol(error.to_string()))?;
        let is_last = self.info.is_last();
        if micro.rows.is_empty() {
            return Ok(vec![match is_last {
                true => Message::Results(Results { number, rows: Vec::new(), times }),
                false => Message::Batch(Batch { number, micro: no_rows(), times }),
            }]);
        }
        let fault = |error| match error {
            StageError::Device(reason) => Fault::Device(reason),
            error => Fault::Protocol(error.to_string()),
        };
        if self.info.is_first() {
            self.stage.guess(&mut micro).map_err(fault)?;
        }
        if !is_last {
            self.follow_guesses(&micro.rows);
        }
        let output = self.stage.run(&micro).map_err(fault)?;
        if output.rows.len() != micro.rows.len() {
            return Err(Fault::Device("the stage answered with another number of rows".into()));
        }
        let mut messages = Vec::with_capacity(1);
        let (mut results, mut rows) = (Vec::new(), Vec::new());
        for (row, outcome) in micro.rows.into_iter().zip(output.rows) {
            match outcome {
                Ok(output) if is_last => results.push(self.result(&row, output)?),
                Ok(_) => rows.push(row),
                Err(error) => messages.push(self.refuse(row.sequence, error)?),
            }
        }
        messages.push(match (is_last, output.activation) {
            (true, _) => Message::Results(Results { number, rows: results, times }),
            (false, Some(activation)) => {
                let input = StepInput::Activation(activation);
                Message::Batch(Batch { number, micro: MicroBatch { rows, input }, times })
            }
            (false, None) if rows.is_empty() => Message::Batch(Batch { number, micro: no_rows(), times }),
            (false, None) => return Err(Fault::Device("the stage handed nothing on".into())),
        });
        Ok(messages)
    }

    /// A stage before the last one hears with the next row how many guesses were right.
    fn follow_guesses(&mut self, rows: &[Row]) {
        for row in rows {
            if let Some(end) = self.unsure.remove(&row.sequence) {
                self.guesses.passed += row.position.saturating_sub(end) as u64;
            }
            if !row.guesses.is_empty() {
                self.unsure.insert(row.sequence, row.end());
            }
        }
    }

    /// What the last stage tells of a row.
    fn result(&mut self, row: &Row, output: RowOutput) -> Result<RowResult, Fault> {
        let (sequence, position) = (row.sequence, row.end());
        let RowOutput { scores, sampled, further, is_complete, embedding } = output;
        if (sampled.is_some() || embedding.is_some()) != row.sample || further.len() > row.guesses.len() {
            return Err(Fault::Device("the stage answered a row with the wrong kind of output".into()));
        }
        let (mut token, mut tokens) = (None, Vec::new());
        if let (Some(sampled), Some(Sequence::Open(spec))) = (sampled, self.sequences.get(&sequence)) {
            self.guesses.made += row.guesses.len() as u64;
            for (position, sampled) in (position..).zip([sampled].into_iter().chain(further)) {
                let end = end_of(spec, position, sampled.token);
                let end = end.or_else(|| is_complete.then_some(SequenceEnd::Complete));
                tokens.push((sampled, end));
                if end.is_some() {
                    break; // what comes after the end is nobody's wish
                }
            }
            let mut all = tokens.into_iter();
            token = all.next();
            tokens = all.collect();
            self.guesses.right += tokens.len() as u64;
            self.guesses.passed += tokens.len() as u64;
        }
        Ok(RowResult { sequence, position, token, further: tokens, scores, embedding })
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

/// What is left of a batch whose sequences all failed or were closed.
fn no_rows() -> MicroBatch {
    MicroBatch { rows: Vec::new(), input: StepInput::Tokens }
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
