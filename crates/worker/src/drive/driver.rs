//! The life of every sequence, as the first stage sees it. Pure: commands and ring messages in, work and events out.
//!
//! ```text
//!          open ──▶ Prefilling ──last chunk──▶ Decoding ──┐ end, cancel, failure
//!  refused: failed, closed   └──────────────────────┴─────▶ Closing ──close came round the ring──▶ closed, forgotten
//! ```
//!
//! Sequences go through the pipeline together, in batches that keep their order: a decoding sequence has one row in one batch on its
//! way, a prompt may have a chunk in each. At most one batch per stage and one more are on their way, so that the stages stay busy
//! and a newcomer waits for few. Rows that came back together go on together, so that a stage meets the same ones step after step;
//! newcomers go to the end. How many rows a batch has, and how many tokens of prompts go along, [`Pace`] says.

use super::pace::{Load, Pace, Room};
use super::prompt_room::PromptRoom;
use crate::message::{Batch, DriveCommand, DriveEvent, Message, Results, RowResult, SampledToken};
use mlxnode_compute::{
    BLOCK_TOKENS, BlockPlan, Keep, MicroBatch, Output, Row, SequenceId, SequenceSpec, StepInput,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// What the replica has room for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) context_tokens: usize,
    pub(crate) max_sequences: usize,
    pub(crate) prefill_chunk: usize,
    pub(crate) vocabulary: usize,
}

/// While nobody decodes, tokens of prompts after which no further one joins a batch: more in it would hardly be faster in all, and the
/// first ones would wait for the last.
const ENOUGH_TOKENS: usize = 128;
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
    /// Batches in the pipeline, oldest first.
    flights: VecDeque<Flight>,
    next_batch: u64,
    /// Tokens of prompts may follow the batch that entered last.
    may_follow: bool,
    pace: Pace,
    events: VecDeque<DriveEvent>,
    /// Schedulers that came and that the stages have not all heard of.
    resets: usize,
}

/// A batch in the pipeline.
struct Flight {
    number: u64,
    load: Load,
    /// Its rows: whose, and one past the last token.
    rows: Vec<(SequenceId, usize)>,
}

struct Sequence {
    phase: Phase,
    /// The prompt until all of it is on its way.
    prompt: Vec<u32>,
    /// Tokens that entered the pipeline; where the next step begins.
    entered: usize,
    /// Tokens that need no work.
    cached: usize,
    /// Its first chunk is on its way.
    has_started: bool,
    /// Blocks of its prompt that the scheduler knows to be through.
    progress: usize,
    /// Where a chunk must end, because states are kept there.
    borders: BTreeSet<usize>,
    /// Nothing is sampled.
    is_embedded: bool,
    /// A row that will be sampled is on its way.
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

impl Sequence {
    /// A block of it is kept.
    fn note(&mut self, keep: &Keep) {
        if keep.checkpoint {
            self.borders.insert(keep.number.saturating_add(1).saturating_mul(BLOCK_TOKENS));
        }
    }
}

/// The scheduler or the last stage did what cannot be: the pipeline's state is not what this one believes.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum Violation {
    #[error("sequence {0} was opened twice")]
    OpenedTwice(u64),
    #[error("the results of batch {actual}, expected {expected:?}")]
    Batch { expected: Option<u64>, actual: u64 },
    #[error("a row of sequence {sequence} at position {actual}, expected {expected:?}")]
    Row { sequence: u64, expected: Option<usize>, actual: usize },
    #[error("batch {batch} came back without sequence {sequence}, which neither failed nor was closed")]
    Missing { batch: u64, sequence: u64 },
    #[error("a row of sequence {sequence} came back with {what}")]
    Kind { sequence: u64, what: &'static str },
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
            flights: VecDeque::new(),
            next_batch: 1,
            may_follow: false,
            pace: Pace::default(),
            events: VecDeque::new(),
            resets: 0,
        }
    }

    /// Takes the scheduler's command.
    pub(crate) fn command(&mut self, command: DriveCommand) -> Result<(), Violation> {
        match command {
            DriveCommand::Open { sequence, prompt, spec, blocks } => {
                self.open(sequence, prompt, spec, blocks)
            }
            DriveCommand::Keep { sequence, keep } => {
                let state = self.sequences.get_mut(&sequence);
                if let Some(state) = state.filter(|state| state.phase != Phase::Closing) {
                    state.note(&keep);
                    self.controls.push_back(Message::Keep { sequence, keep });
                }
                Ok(())
            }
            DriveCommand::Blocks(order) => {
                self.controls.push_back(Message::Blocks(order));
                Ok(())
            }
            DriveCommand::Cancel { sequence } => {
                self.close(sequence);
                Ok(())
            }
        }
    }

    /// Takes a message of the ring.
    pub(crate) fn ring(&mut self, message: Message) -> Result<(), Violation> {
        match message {
            Message::Results(results) => self.results(results),
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
            Message::Missing { sequence } => {
                self.known("a missing block", sequence)?;
                self.missing(sequence);
                Ok(())
            }
            Message::Reset { capacities } => {
                self.resets = self.resets.saturating_sub(1);
                // Only what the last scheduler asked for is for it.
                if self.resets == 0 {
                    self.events.push_back(DriveEvent::Capacity { stages: capacities });
                }
                Ok(())
            }
            Message::Keep { .. } | Message::Blocks(_) => Err(Violation::Direction("an order for a block")),
            Message::Open { .. } => Err(Violation::Direction("a new sequence")),
            Message::Batch(_) => Err(Violation::Direction("a batch")),
        }
    }

    /// A scheduler comes: the blocks of the one before mean nothing to it.
    pub(crate) fn welcome(&mut self) {
        self.resets += 1;
        self.controls.push_back(Message::Reset { capacities: Vec::new() });
    }

    /// The next message for the pipeline, if any may enter now. Call until `None` after every command, message and taken event.
    pub(crate) fn next_work(&mut self) -> Option<Message> {
        if let Some(control) = self.controls.pop_front() {
            return Some(control);
        }
        if self.events.len() >= WAITING_EVENTS {
            return None;
        }
        self.batch().map(Message::Batch)
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
        self.flights.clear();
    }

    fn open(
        &mut self,
        sequence: SequenceId,
        prompt: Vec<u32>,
        spec: SequenceSpec,
        blocks: BlockPlan,
    ) -> Result<(), Violation> {
        if self.sequences.contains_key(&sequence) {
            return Err(Violation::OpenedTwice(sequence.0));
        }
        if let Err(reason) = self.check(&prompt, &spec, &blocks) {
            self.events.push_back(DriveEvent::Failed { sequence, reason });
            self.events.push_back(DriveEvent::Closed { sequence });
            return Ok(());
        }
        // A sequence that is continued brings tokens of its answer along; they count.
        let max_tokens = spec.max_tokens.min(self.limits.context_tokens - spec.prompt_tokens);
        let spec = SequenceSpec { max_tokens, ..spec };
        let spec_is_embedded = spec.output == Output::Embedding;
        let entered = blocks.cached_tokens();
        let mut state = Sequence {
            phase: Phase::Prefilling,
            prompt,
            entered,
            cached: entered,
            has_started: false,
            progress: entered / BLOCK_TOKENS,
            borders: BTreeSet::new(),
            is_embedded: spec_is_embedded,
            awaits_token: false,
            orphaned: false,
        };
        blocks.keep.iter().for_each(|keep| state.note(keep));
        self.controls.push_back(Message::Open { sequence, spec, stages: 0, blocks });
        self.prefilling.push_back(sequence);
        self.sequences.insert(sequence, state);
        Ok(())
    }

    fn check(&self, prompt: &[u32], spec: &SequenceSpec, blocks: &BlockPlan) -> Result<(), String> {
        let limits = &self.limits;
        if prompt.is_empty() {
            return Err("the prompt has no tokens".into());
        }
        if blocks.cached_tokens() >= prompt.len() {
            return Err(
                "the sequence begins with blocks of its whole prompt, which leaves nothing to compute".into(),
            );
        }
        if spec.max_tokens == 0 {
            return Err("max_tokens is 0, but must be 1 or more".into());
        }
        let generated = match prompt.len().checked_sub(spec.prompt_tokens) {
            Some(generated) if spec.prompt_tokens > 0 => generated,
            _ => {
                let (own, all) = (spec.prompt_tokens, prompt.len());
                return Err(format!("prompt_tokens is {own}, but must be 1 to {all}, the prompt's length"));
            }
        };
        if generated >= spec.max_tokens {
            return Err(format!("all of max_tokens ({}) were generated before", spec.max_tokens));
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

    /// The next batch, if one may enter now.
    fn batch(&mut self) -> Option<Batch> {
        if self.flights.len() > self.stages {
            return None;
        }
        let decoding = self.sequences.values().filter(|state| state.phase == Phase::Decoding).count();
        let count = self.pace.micro_batches(decoding, self.stages + 1);
        let mut rows = self.decode_rows(decoding, count);
        let load = Load { rows: rows.len(), tokens: 0 };
        let room = self.prompt_room(load.rows, decoding, count);
        self.prompt_rows(room, &mut rows);
        if rows.is_empty() {
            return None;
        }
        let tokens = rows.iter().skip(load.rows).map(|row| row.tokens.len()).sum();
        let load = Load { tokens, ..load };
        let number = self.next_batch;
        self.next_batch += 1;
        self.flights.push_back(Flight {
            number,
            load,
            rows: rows.iter().map(|row| (row.sequence, row.end())).collect(),
        });
        let micro = MicroBatch { rows, input: StepInput::Tokens };
        Some(Batch { number, micro, times: Vec::new() })
    }

    /// The decoding rows of the next batch, none when it is better to wait for others to come back.
    fn decode_rows(&mut self, decoding: usize, count: usize) -> Vec<Row> {
        let on_their_way = self.flights.iter().filter(|flight| flight.load.rows > 0).count();
        let share = decoding.div_ceil(count);
        let is_enough = on_their_way == 0 || (on_their_way < count && 2 * self.decodable.len() >= share);
        if !is_enough {
            return Vec::new();
        }
        let taken: Vec<(SequenceId, u32)> = self.decodable.drain(..share.min(self.decodable.len())).collect();
        let mut rows = Vec::with_capacity(taken.len());
        for (sequence, token) in taken {
            let Some(state) = self.sequences.get_mut(&sequence) else { continue };
            let position = state.entered;
            state.entered += 1;
            state.awaits_token = true;
            rows.push(Row { sequence, position, tokens: vec![token], sample: true, guesses: Vec::new() });
        }
        rows
    }

    /// How many tokens of prompts the next batch may have, and up to how many tokens of work a prompt is short.
    fn prompt_room(&mut self, rows: usize, decoding: usize, count: usize) -> (PromptRoom, usize) {
        let follows = std::mem::take(&mut self.may_follow);
        let chunk = self.limits.prefill_chunk;
        if self.prefilling.is_empty() {
            return (PromptRoom::default(), 0);
        }
        let short = self.pace.short(decoding, count);
        let has_short = self.prefilling.iter().any(|sequence| self.work(*sequence) <= short);
        let has_long = self.prefilling.iter().any(|sequence| self.work(*sequence) > short);
        if decoding == 0 {
            return (PromptRoom::new(chunk, ENOUGH_TOKENS, has_short, has_long), short);
        }
        // What is promised of long prompts holds beside short ones too.
        let room = match has_long {
            true => self.pace.room(decoding, count),
            false => self.pace.short_room(decoding, count),
        };
        let tokens = match room {
            Room::Along(tokens) if rows > 0 => tokens,
            Room::Behind(tokens) if rows == 0 && follows => tokens,
            Room::Behind(_) if rows > 0 => {
                self.may_follow = self.flights.iter().all(|flight| flight.load.rows > 0);
                0
            }
            _ => 0,
        };
        let tokens = tokens.min(chunk);
        (PromptRoom::new(tokens, tokens, has_short, has_long), short)
    }

    /// Tokens of a prompt that need work, those that entered the pipeline included: the end of a long prompt is no short one.
    fn work(&self, sequence: SequenceId) -> usize {
        self.sequences.get(&sequence).map_or(0, |state| state.prompt.len().saturating_sub(state.cached))
    }

    /// Tokens of a prompt that have not entered the pipeline.
    fn left(&self, sequence: SequenceId) -> usize {
        self.sequences.get(&sequence).map_or(0, |state| state.prompt.len().saturating_sub(state.entered))
    }

    /// Chunks of prompts behind the rows that are there: the short ones in the order in which they came, then the long ones by turns.
    fn prompt_rows(&mut self, (room, short): (PromptRoom, usize), rows: &mut Vec<Row>) {
        let waiting = std::mem::take(&mut self.prefilling);
        let (short, long): (Vec<_>, Vec<_>) =
            waiting.into_iter().partition(|sequence| self.work(*sequence) <= short);
        let (mut of_short, mut of_long) = (0, 0);
        for sequence in short {
            of_short += self.chunk(sequence, room.for_short(of_short), rows);
            if self.left(sequence) > 0 {
                self.prefilling.push_back(sequence);
            }
        }
        let mut begun = Vec::new();
        for sequence in long {
            let chunk = self.chunk(sequence, room.for_long(of_short, of_long), rows);
            of_long += chunk;
            match self.left(sequence) {
                0 => {}
                _ if chunk > 0 => begun.push(sequence),
                _ => self.prefilling.push_back(sequence),
            }
        }
        self.prefilling.extend(begun);
    }

    /// Puts the next chunk of a prompt behind the rows, and says how many tokens it has: at most `room`.
    fn chunk(&mut self, sequence: SequenceId, room: usize, rows: &mut Vec<Row>) -> usize {
        let Some(state) = self.sequences.get_mut(&sequence).filter(|_| room > 0) else { return 0 };
        let border = state.borders.range(state.entered + 1..).next().copied().unwrap_or(usize::MAX);
        let end = state.prompt.len().min(state.entered.saturating_add(room)).min(border);
        let (position, sample) = (state.entered, end == state.prompt.len());
        let tokens = state.prompt[position..end].to_vec();
        let count = tokens.len();
        if !std::mem::replace(&mut state.has_started, true) {
            let cached_tokens = state.cached;
            self.events.push_back(DriveEvent::Started { sequence, cached_tokens });
        }
        state.entered = end;
        if sample {
            state.awaits_token = true;
            state.phase = Phase::Decoding;
            state.prompt = Vec::new();
        }
        rows.push(Row { sequence, position, tokens, sample, guesses: Vec::new() });
        count
    }

    /// A batch came round.
    fn results(&mut self, results: Results) -> Result<(), Violation> {
        let Results { number, rows, times } = results;
        let expected = self.flights.front().map(|flight| flight.number);
        let Some(flight) = self.flights.pop_front().filter(|flight| flight.number == number) else {
            return Err(Violation::Batch { expected, actual: number });
        };
        let mut came: BTreeMap<SequenceId, RowResult> =
            rows.into_iter().map(|row| (row.sequence, row)).collect();
        let mut is_whole = true;
        for (sequence, end) in flight.rows {
            let Some(row) = came.remove(&sequence) else {
                is_whole = false;
                // It failed or was closed on the way; otherwise nobody would ever take it further.
                match self.sequences.get(&sequence) {
                    Some(state) if state.phase != Phase::Closing => {
                        return Err(Violation::Missing { batch: number, sequence: sequence.0 });
                    }
                    _ => continue,
                }
            };
            if row.position != end {
                let (sequence, actual) = (sequence.0, row.position);
                return Err(Violation::Row { sequence, expected: Some(end), actual });
            }
            self.row(row)?;
        }
        if let Some((sequence, row)) = came.pop_first() {
            return Err(Violation::Row { sequence: sequence.0, expected: None, actual: row.position });
        }
        if is_whole {
            self.pace.observe(flight.load, &times);
        }
        Ok(())
    }

    /// What became of a row.
    fn row(&mut self, row: RowResult) -> Result<(), Violation> {
        let RowResult { sequence, position, token, further, scores, embedding } = row;
        let Some(state) = self.sequences.get_mut(&sequence) else { return Ok(()) };
        if state.phase == Phase::Closing {
            return Ok(()); // it was on its way when the sequence was closed
        }
        let kind = |what| Err(Violation::Kind { sequence: sequence.0, what });
        let mut last = None;
        if !scores.is_empty() {
            if scores.len() >= position {
                return kind("more scores than tokens");
            }
            self.events.push_back(DriveEvent::Scores { sequence, position: position - scores.len(), scores });
        }
        let is_last = state.awaits_token && position == state.entered;
        if !is_last && position / BLOCK_TOKENS > state.progress {
            state.progress = position / BLOCK_TOKENS;
            self.events.push_back(DriveEvent::Progress { sequence, tokens: position });
        }
        if !further.is_empty() && (further.len() > Row::MOST_GUESSES || token.is_none()) {
            return kind("further tokens");
        }
        match (token, embedding) {
            (None, None) if is_last => return kind("nothing"),
            (None, None) => {}
            (Some(token), None) if is_last && !state.is_embedded => {
                state.awaits_token = false;
                // Guesses that were right went through with the row.
                state.entered += further.len();
                for (position, (sampled, end)) in (position..).zip([token].into_iter().chain(further)) {
                    last = Some((sampled.token, end));
                    self.events.push_back(DriveEvent::Token(SampledToken {
                        sequence,
                        position,
                        sampled,
                        end,
                    }));
                    if end.is_some() {
                        break;
                    }
                }
                match last {
                    Some((next, None)) => self.decodable.push_back((sequence, next)),
                    _ => self.close(sequence),
                }
            }
            (None, Some(values)) if is_last && state.is_embedded => {
                self.events.push_back(DriveEvent::Embedding { sequence, values });
                self.close(sequence);
            }
            _ => return kind("what was not asked for"),
        }
        Ok(())
    }

    fn fail(&mut self, sequence: SequenceId, reason: String) {
        if self.sequences.get(&sequence).is_some_and(|state| state.phase != Phase::Closing) {
            self.events.push_back(DriveEvent::Failed { sequence, reason });
            self.close(sequence);
        }
    }

    fn missing(&mut self, sequence: SequenceId) {
        if self.sequences.get(&sequence).is_some_and(|state| state.phase != Phase::Closing) {
            self.events.push_back(DriveEvent::Missing { sequence });
            self.close(sequence);
        }
    }

    /// Sends a close after the sequence. Its rows may not come back now, since stages drop them.
    fn close(&mut self, sequence: SequenceId) {
        let Some(state) = self.sequences.get_mut(&sequence) else { return };
        if state.phase == Phase::Closing {
            return;
        }
        state.phase = Phase::Closing;
        state.prompt = Vec::new();
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
