//! Generation of several sequences at once: in every step each running row gets a token, and waiting prompts get a chunk.
//!
//! A row's tokens are those that it would get alone; rows join and leave at any step. Those that run go through side by side, see
//! [`CachePool`], and a prompt's chunk beside them. As with a single sequence the next step is queued before the tokens of this one are read, so a row that a stop token ends has gone one token too
//! far; that token is taken back and its draw is thrown away.
//!
//! ```text
//! insert ──▶ prompt, chunk by chunk ──▶ running, a token per step ──▶ ended: its cache goes out
//!                     └───────── remove: its cache goes out ─────────┘
//! ```

use crate::adapters::{AdapterId, Segment};
use crate::batch::Batch;
use crate::cache_pool::CachePool;
use crate::draws::Draws;
use crate::generator::{GenerateError, TokenEvent, check_tokens, check_whole, most_tokens};
use crate::model::Model;
use crate::penalties::History;
use crate::prompt_cache::PromptCache;
use crate::sampler::Sampler;
use mlxnode_compute::{CacheOptions, Sampled, SequenceEnd, SequenceSpec};
use mlxnode_mlx::{Array, Device, Error};

/// Steps between two clean-ups of the device's cache of free buffers.
const STEPS_PER_CLEAN_UP: u64 = 256;

/// Limits of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchOptions {
    /// Most rows that generate at once; the others wait.
    pub max_rows: usize,
    /// Most tokens of one step, of prompts and of running rows together: how long running rows wait for a prompt. Every running row
    /// gets its token and a prompt at least one, whatever the limit.
    pub step_tokens: usize,
    /// What the caches keep, and how.
    pub cache: CacheOptions,
}

impl Default for BatchOptions {
    fn default() -> Self {
        Self { max_rows: 32, step_tokens: 2048, cache: CacheOptions::default() }
    }
}

/// A row of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RowId(pub u64);

/// What happened to a row.
pub enum BatchEvent {
    /// A part of its prompt went through.
    Prompt {
        /// The row.
        row: RowId,
        /// Tokens of the prompt that are done.
        done: usize,
        /// Tokens of the prompt.
        of: usize,
    },
    /// It got a token.
    Token {
        /// The row.
        row: RowId,
        /// The token; `end` is set on the last one.
        event: TokenEvent,
    },
    /// It got its last token and left the batch. Comes after that token.
    Ended {
        /// The row.
        row: RowId,
        /// Why.
        end: SequenceEnd,
        /// The prompt and the generated tokens but the last, unless that cannot be taken back: [`PromptCache::tokens`] says.
        cache: PromptCache,
    },
    /// It left the batch without a token.
    Failed {
        /// The row.
        row: RowId,
        /// Why.
        error: GenerateError,
    },
}

/// Generates several sequences with a whole model.
pub struct BatchGenerator {
    model: Model,
    options: BatchOptions,
    /// In the order of insertion.
    rows: Vec<Sequence>,
    caches: CachePool<RowId>,
    next_id: u64,
    queued: Option<Queued>,
    /// Steps done, and steps queued so far.
    steps: u64,
    steps_queued: u64,
}

/// One sequence.
struct Sequence {
    id: RowId,
    options: CacheOptions,
    adapter: Option<AdapterId>,
    sampler: Sampler,
    history: History,
    prompt: Vec<u32>,
    /// Tokens of the prompt that are queued.
    done: usize,
    /// Tokens that the cache held before the prompt.
    known: i32,
    /// Number of the first token.
    first_index: u64,
    max_tokens: usize,
    stop_tokens: Vec<u32>,
    /// Draws that are queued, and those that were read.
    drawn: usize,
    read: usize,
    /// Where the token lies that goes through next; None: the last one of the prompt.
    next: Option<Drawn>,
}

/// Tokens of a step that may still be computed.
#[derive(Clone)]
struct Drawn {
    /// `[rows of the step]`.
    tokens: Array,
    column: i32,
    step: u64,
}

/// A step on the device.
struct Queued {
    /// The rows that get a token, in the order of `draws`.
    running: Vec<RowId>,
    draws: Draws,
    /// What happened to prompts.
    chunks: Vec<(RowId, usize, usize)>,
}

impl BatchGenerator {
    /// For a model whose layers are all loaded.
    pub fn new(model: Model, options: BatchOptions) -> Result<Self, GenerateError> {
        check_whole(&model)?;
        model.check_cache(&options.cache)?;
        let caches = CachePool::new(model.decoder.joins());
        Ok(Self {
            model,
            options,
            rows: Vec::new(),
            caches,
            next_id: 0,
            queued: None,
            steps: 0,
            steps_queued: 0,
        })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// How many rows are in it, waiting ones included.
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Adds a sequence. `spec` is read as by [`crate::Generator::generate`].
    pub fn insert(&mut self, prompt: &[u32], spec: &SequenceSpec) -> Result<RowId, GenerateError> {
        let cache = PromptCache::new(&self.model, self.options.cache)?;
        self.insert_after(cache, prompt, spec)
    }

    /// Adds a sequence that goes on after what `cache` remembers.
    pub fn insert_after(
        &mut self,
        cache: PromptCache,
        prompt: &[u32],
        spec: &SequenceSpec,
    ) -> Result<RowId, GenerateError> {
        let vocabulary = self.model.info().vocabulary;
        spec.sampling.check(vocabulary)?;
        check_tokens(&self.model, prompt)?;
        cache.check(&self.model)?;
        if spec.max_tokens == 0 {
            return Err(GenerateError::NoTokens);
        }
        let adapter = self.model.adapters.named(spec.adapter.as_deref())?;
        let most = most_tokens(&self.model, cache.sequence.tokens(), prompt.len())?;
        let sampler = Sampler::new(spec.sampling.clone(), vocabulary)?;
        let id = RowId(self.next_id);
        self.next_id += 1;
        self.rows.push(Sequence {
            id,
            history: History::new(sampler.penalties()),
            sampler,
            prompt: prompt.to_vec(),
            done: 0,
            known: cache.sequence.tokens(),
            adapter,
            options: cache.options(),
            first_index: prompt.len().saturating_sub(spec.prompt_tokens) as u64,
            max_tokens: spec.max_tokens.min(most),
            stop_tokens: spec.stop_tokens.clone(),
            drawn: 0,
            read: 0,
            next: None,
        });
        self.caches.insert(id, cache.sequence);
        Ok(id)
    }

    /// Takes a row out, whatever it is doing. Its cache holds what went through; None when there is no such row.
    pub fn remove(&mut self, row: RowId) -> Result<Option<PromptCache>, GenerateError> {
        let Some(place) = self.rows.iter().position(|sequence| sequence.id == row) else { return Ok(None) };
        Ok(self.leave(place)?)
    }

    /// Does one step and returns what happened. Nothing when there is no row.
    ///
    /// An error is one of the device: no row can go on.
    pub fn step(&mut self) -> Result<Vec<BatchEvent>, GenerateError> {
        let step = match self.queued.take() {
            Some(step) => Some(step),
            None => self.queue()?,
        };
        let Some(step) = step else { return Ok(Vec::new()) };
        // Queue the next step before waiting for this one.
        self.queued = self.queue()?;
        let mut events = Vec::with_capacity(step.running.len() + step.chunks.len());
        for (row, done, of) in step.chunks {
            events.push(BatchEvent::Prompt { row, done, of });
        }
        for (row, sampled) in step.running.into_iter().zip(step.draws.read(&self.model.device)?) {
            self.report(row, sampled, &mut events)?;
        }
        self.steps += 1;
        if self.steps.is_multiple_of(STEPS_PER_CLEAN_UP) {
            self.model.device.clear_cache()?;
        }
        Ok(events)
    }

    /// Queues a step; None when there is nothing to do.
    fn queue(&mut self) -> Result<Option<Queued>, GenerateError> {
        self.steps_queued += 1;
        let step = self.steps_queued;
        let budget = self.options.step_tokens;
        let mut plan = Plan::of(&mut self.rows, budget, self.options.max_rows);
        if plan.running.is_empty() && plan.chunks.is_empty() {
            return Ok(None);
        }
        let (device, decoder) = (&self.model.device, &self.model.decoder);
        let running: Vec<RowId> = plan.running.iter().map(|sequence| sequence.id).collect();
        plan.put_in_order(&self.caches.arrange(device, &running)?);
        let active = &self.model.adapters.active;
        let running_segments = plan.running_segments();
        active.set(running_segments.iter().copied().chain(plan.chunk_segments()));
        let ids = plan.ids(device)?;
        let hidden = decoder.embed(device, &ids)?;
        let chunks: Vec<(RowId, i32)> =
            plan.chunks.iter().map(|(sequence, tokens)| (sequence.id, *tokens as i32)).collect();
        let mut batch = Batch::of(self.caches.rows(&chunks))?;
        let hidden = decoder.forward(device, hidden, &mut batch)?;
        drop(batch);
        active.set(running_segments);
        let draws = plan.draw(&self.model, &hidden)?;
        let states =
            chunks.iter().filter_map(|(row, _)| self.caches.alone(*row)).flat_map(|cache| cache.state());
        device.async_eval(draws.arrays().chain(states))?;
        plan.advance(device, &draws, step)?;
        Ok(Some(Queued {
            running: plan.running.iter().map(|sequence| sequence.id).collect(),
            draws,
            chunks: plan
                .chunks
                .iter()
                .map(|(sequence, _)| (sequence.id, sequence.done, sequence.prompt.len()))
                .collect(),
        }))
    }

    /// One token of a row, unless the row has left.
    fn report(
        &mut self,
        row: RowId,
        sampled: Option<Sampled>,
        events: &mut Vec<BatchEvent>,
    ) -> Result<(), Error> {
        let Some(place) = self.rows.iter().position(|sequence| sequence.id == row) else { return Ok(()) };
        let sequence = &mut self.rows[place];
        let Some(sampled) = sampled else {
            self.leave(place)?;
            events.push(BatchEvent::Failed { row, error: GenerateError::NotANumber });
            return Ok(());
        };
        sequence.read += 1;
        let end = if sequence.stop_tokens.contains(&sampled.token) {
            Some(SequenceEnd::Stop)
        } else if sequence.read >= sequence.max_tokens {
            Some(SequenceEnd::Length)
        } else {
            None
        };
        let event = TokenEvent { index: sequence.read - 1, sampled, from_draft: false, end };
        events.push(BatchEvent::Token { row, event });
        if let Some(end) = end
            && let Some(cache) = self.leave(place)?
        {
            events.push(BatchEvent::Ended { row, end, cache });
        }
        Ok(())
    }

    /// The row at this place leaves; its cache without what was queued ahead, where that can be taken back.
    fn leave(&mut self, place: usize) -> Result<Option<PromptCache>, Error> {
        let sequence = self.rows.remove(place);
        let Some(mut cache) = self.caches.take(&self.model.device, sequence.id)? else { return Ok(None) };
        let sure = sequence.done + sequence.read.saturating_sub(1);
        let _ = cache.truncate(sequence.known.saturating_add(i32::try_from(sure).unwrap_or(i32::MAX)));
        Ok(Some(PromptCache::of(cache, sequence.options)))
    }
}

impl Sequence {
    /// Is only the prompt's last token left of it, or nothing?
    fn is_running(&self) -> bool {
        self.done + 1 >= self.prompt.len()
    }
}

/// Which rows a step has: running ones first, then chunks of prompts.
struct Plan<'a> {
    running: Vec<&'a mut Sequence>,
    /// Sequences and how many tokens of their prompts.
    chunks: Vec<(&'a mut Sequence, usize)>,
}

impl<'a> Plan<'a> {
    fn of(rows: &'a mut [Sequence], step_tokens: usize, max_rows: usize) -> Self {
        let (mut greedy, mut others, mut waiting) = (Vec::new(), Vec::new(), Vec::new());
        for sequence in rows.iter_mut().take(max_rows.max(1)) {
            if !sequence.is_running() {
                waiting.push(sequence);
            } else if sequence.drawn < sequence.max_tokens {
                let kind = if sequence.sampler.is_plainly_greedy() { &mut greedy } else { &mut others };
                kind.push(sequence);
            }
        }
        // Those at the front can be drawn in one go.
        let mut running = greedy;
        running.append(&mut others);
        let mut room = step_tokens.saturating_sub(running.len()).max(1);
        let mut chunks = Vec::new();
        for sequence in waiting {
            let tokens = (sequence.prompt.len() - 1 - sequence.done).min(room);
            if tokens == 0 {
                break;
            }
            room -= tokens;
            chunks.push((sequence, tokens));
        }
        Self { running, chunks }
    }

    /// The order in which the running ones go through.
    fn put_in_order(&mut self, order: &[RowId]) {
        self.running.sort_by_key(|sequence| order.iter().position(|row| *row == sequence.id));
    }

    /// Whose tokens the first ones of the step are.
    fn running_segments(&self) -> Vec<Segment> {
        self.running.iter().map(|sequence| Segment { adapter: sequence.adapter, tokens: 1 }).collect()
    }

    /// And those behind them.
    fn chunk_segments(&self) -> impl Iterator<Item = Segment> {
        let segment = |(sequence, tokens): &(&mut Sequence, usize)| Segment {
            adapter: sequence.adapter,
            tokens: *tokens as i32,
        };
        self.chunks.iter().map(segment)
    }

    /// The ids of all rows, `[1, tokens]`.
    fn ids(&self, device: &Device) -> Result<Array, Error> {
        if let Some(tokens) = self.same_as_drawn() {
            return device.reshape(&tokens, &[1, -1]);
        }
        let mut parts = Vec::new();
        let mut known: Vec<u32> = Vec::new();
        for sequence in &self.running {
            match &sequence.next {
                Some(drawn) => {
                    flush(&mut known, &mut parts)?;
                    parts.push(device.slice(&drawn.tokens, &[drawn.column], &[drawn.column + 1])?);
                }
                None => known.extend(sequence.prompt.last()),
            }
        }
        for (sequence, tokens) in &self.chunks {
            known.extend_from_slice(&sequence.prompt[sequence.done..sequence.done + tokens]);
        }
        flush(&mut known, &mut parts)?;
        let ids = match parts.as_slice() {
            [only] => only.clone(),
            _ => device.concatenate(&parts, 0)?,
        };
        device.reshape(&ids, &[1, -1])
    }

    /// The tokens of the step before, when exactly its rows go on.
    fn same_as_drawn(&self) -> Option<Array> {
        let first = self.running.first()?.next.as_ref()?;
        let is_next = |(column, sequence): (usize, &&mut Sequence)| {
            sequence
                .next
                .as_ref()
                .is_some_and(|drawn| drawn.step == first.step && drawn.column == column as i32)
        };
        let same = self.chunks.is_empty()
            && first.tokens.dim(0) == self.running.len() as i32
            && self.running.iter().enumerate().all(is_next);
        same.then(|| first.tokens.clone())
    }

    /// Draws the next token of each running row from the hidden vectors of all rows.
    fn draw(&mut self, model: &Model, hidden: &Array) -> Result<Draws, Error> {
        let (device, rows) = (&model.device, self.running.len() as i32);
        if rows == 0 {
            return Ok(Draws::default());
        }
        let logits = match hidden.dim(1) == rows {
            true => model.decoder.logits(device, hidden)?,
            false => {
                let hidden = device.slice(hidden, &[0, 0, 0], &[1, rows, hidden.dim(2)])?;
                model.decoder.logits(device, &hidden)?
            }
        };
        let cut = |from: i32, to: i32| match (from, to) == (0, rows) {
            true => Ok(logits.clone()),
            false => device.slice(&logits, &[from, 0], &[to, logits.dim(1)]),
        };
        let greedy =
            self.running.iter().take_while(|sequence| sequence.sampler.is_plainly_greedy()).count() as i32;
        let mut draws = match greedy {
            0 => Draws::default(),
            _ => Draws::greedy(device, &cut(0, greedy)?)?,
        };
        for (row, sequence) in (0..).zip(&mut self.running) {
            match &sequence.next {
                Some(drawn) if sequence.sampler.penalties().history() != Some(0) => {
                    let token = device.slice(&drawn.tokens, &[drawn.column], &[drawn.column + 1])?;
                    sequence.history.push(device, &token)?;
                }
                Some(_) => {}
                None => {
                    sequence.history.extend(device, sequence.prompt.get(sequence.done..).unwrap_or(&[]))?
                }
            }
            if row >= greedy {
                let index = sequence.first_index + sequence.drawn as u64;
                let logits = cut(row, row + 1)?;
                draws.push(sequence.sampler.draw(device, logits, sequence.history.tokens(), index)?);
            }
        }
        draws.close(device)?;
        Ok(draws)
    }

    /// The step is queued: what the sequences do next.
    fn advance(&mut self, device: &Device, draws: &Draws, step: u64) -> Result<(), Error> {
        if !self.running.is_empty() {
            let tokens = draws.tokens(device)?;
            for (column, sequence) in (0..).zip(&mut self.running) {
                sequence.done = sequence.prompt.len();
                sequence.drawn += 1;
                sequence.next = Some(Drawn { tokens: tokens.clone(), column, step });
            }
        }
        for (sequence, tokens) in &mut self.chunks {
            let chunk = &sequence.prompt[sequence.done..sequence.done + *tokens];
            sequence.history.extend(device, chunk)?;
            sequence.done += *tokens;
        }
        Ok(())
    }
}

/// Ids that the host knows become a part.
fn flush(known: &mut Vec<u32>, parts: &mut Vec<Array>) -> Result<(), Error> {
    if !known.is_empty() {
        parts.push(Array::from_u32(known, &[known.len() as i32])?);
        known.clear();
    }
    Ok(())
}
