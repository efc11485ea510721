//! The scheduler's decisions: queue, admission, order of tokens, ends.
//!
//! A request goes: submitted → queued → open in the workers → ended → its memory free. It ends exactly once, for its front;
//! its memory is free only when the workers say so, and until then nobody gets the place. Strictly first come, first served: a
//! long request at the head of the queue is never overtaken, so it cannot starve.

use super::reuse::{self, Reuse};
use super::{DriveEvent, RunError, RunEvent, Statistics};
use crate::prompt_index;
use mlxnode_compute::{BlockOrder, BlockPlan, Keep, SequenceEnd, SequenceId, SequenceSpec};
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// Names a request within its scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// What a replica can take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sequences at the same time in the workers.
    pub max_sequences: usize,
    /// Longest sequence, prompt and answer together.
    pub context_tokens: usize,
    /// KV tokens reserved over all sequences.
    pub kv_tokens: usize,
    /// Requests that may wait.
    pub max_queued: usize,
    /// Prompt tokens that may wait. A single request is taken even if it has more, so that long prompts have a chance.
    pub max_queued_tokens: usize,
    /// With open sequences and no word from the workers for this long (and `stall_per_prompt_token` for each prompt token
    /// that is being worked on), they count as lost.
    pub stall_after: Duration,
    /// See `stall_after`.
    pub stall_per_prompt_token: Duration,
}

impl Limits {
    /// The limits of a plan: `max_sequences` sequences of `context_tokens` tokens, 256 waiting requests with a million prompt
    /// tokens (4 MB), 30 s of silence and 0.1 s for each prompt token (a Mac that prefills at 10 tokens per second is of no use).
    pub fn new(max_sequences: usize, context_tokens: usize) -> Self {
        Self {
            max_sequences,
            context_tokens,
            kv_tokens: max_sequences.saturating_mul(context_tokens),
            max_queued: 256,
            max_queued_tokens: 1_000_000,
            stall_after: Duration::from_secs(30),
            stall_per_prompt_token: Duration::from_millis(100),
        }
    }
}

/// After a failure the workers close the sequence. Should they forget to say so, its place is given away after this.
const CLOSING_GRACE: Duration = Duration::from_secs(5);

/// Workers whose pipeline breaks fail every sequence and then end the connection. A failure is passed on only after this, so that
/// it becomes [`RunError::Unavailable`] (which may be tried again) when it was the pipeline's and not the sequence's.
const FAILURE_SETTLES: Duration = Duration::from_millis(100);

/// What the task has to do.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "few exist at a time, and each is moved once")]
pub enum Effect {
    /// Tell the workers to run a sequence.
    Open {
        /// Its name, never used before.
        sequence: SequenceId,
        /// Its tokens.
        prompt: Vec<u32>,
        /// Its parameters.
        spec: SequenceSpec,
        /// What it begins with, and what is kept of it.
        blocks: BlockPlan,
    },
    /// Tell the workers to keep one more block of an open sequence.
    Keep {
        /// Its name.
        sequence: SequenceId,
        /// Which block.
        keep: Keep,
    },
    /// Tell the workers what becomes of a block.
    Blocks(BlockOrder),
    /// Tell the workers to stop a sequence.
    Cancel {
        /// Its name.
        sequence: SequenceId,
    },
    /// Tell the front.
    Emit {
        /// Whose front.
        request: RequestId,
        /// What.
        event: RunEvent,
    },
    /// The request is over; nothing follows for it. `Ok` comes after the token that says so.
    End {
        /// Which.
        request: RequestId,
        /// How.
        result: Result<SequenceEnd, RunError>,
    },
}

/// The state machine. Every method returns what to do next, in order.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    waiting: VecDeque<Waiting>,
    waiting_tokens: usize,
    open: BTreeMap<SequenceId, Open>,
    failing: VecDeque<Failing>,
    reserved_tokens: usize,
    next_sequence: u64,
    last_heard: Instant,
    lost: Option<String>,
    reuse: Reuse,
    effects: Vec<Effect>,
}

#[derive(Clone, Debug)]
struct Waiting {
    request: RequestId,
    tenant: String,
    /// Does another sequence compute what it begins with? As of that version of the index.
    awaited: Option<(u64, bool)>,
    prompt: Vec<u32>,
    spec: SequenceSpec,
    deadline: Option<Instant>,
}

#[derive(Debug)]
struct Open {
    /// `None` once the request ended: only the memory is still to be freed.
    request: Option<RequestId>,
    prompt_tokens: usize,
    max_tokens: usize,
    emitted: usize,
    /// Tokens of the prompt whose scores went to the front.
    scored: usize,
    started: bool,
    /// Tokens of the prompt that need no work.
    cached_tokens: usize,
    /// Until it is known that the workers have the blocks it begins with: what it takes to begin anew.
    again: Option<Box<Waiting>>,
    deadline: Option<Instant>,
    reserved: usize,
    /// Give the place away then, even if the workers say nothing.
    forget_at: Option<Instant>,
}

impl Waiting {
    /// Is it better to wait? Asked at every event, so the answer is kept until the index changes.
    fn is_awaited(&mut self, reuse: &Reuse) -> bool {
        let version = reuse.version();
        if let Some((_, known)) = self.awaited.filter(|(of, _)| *of == version) {
            return known;
        }
        let is_awaited = reuse.is_awaited(&self.tenant, &self.prompt, &self.spec);
        self.awaited = Some((version, is_awaited));
        is_awaited
    }
}

/// A request whose sequence failed, until it is known whether the pipeline did.
#[derive(Debug)]
struct Failing {
    request: RequestId,
    reason: String,
    settles_at: Instant,
}

impl Scheduler {
    /// Idle, with a driver.
    pub fn new(limits: Limits, now: Instant) -> Self {
        Self {
            limits,
            waiting: VecDeque::new(),
            waiting_tokens: 0,
            open: BTreeMap::new(),
            failing: VecDeque::new(),
            reserved_tokens: 0,
            next_sequence: 1,
            last_heard: now,
            lost: None,
            reuse: Reuse::default(),
            effects: Vec::new(),
        }
    }

    /// With what an earlier scheduler of the same model knew of prompts, see [`Scheduler::stored_prompts`].
    #[must_use]
    pub fn with_stored_prompts(mut self, stored: Option<Vec<u8>>) -> Self {
        self.reuse = Reuse::with_stored(stored);
        self
    }

    /// What is known of prompts whose blocks are on the workers' disks, for the next scheduler of the same model. None when there are
    /// none.
    pub fn stored_prompts(&self) -> Option<Vec<u8>> {
        self.reuse.store()
    }

    /// A front wants a sequence. `request` must be new; one that is known is left as it is.
    pub fn submit(
        &mut self,
        request: RequestId,
        tenant: &str,
        prompt: Vec<u32>,
        spec: SequenceSpec,
        deadline: Option<Instant>,
        now: Instant,
    ) -> Vec<Effect> {
        if self.is_known(request) {
            return Vec::new();
        }
        let tokens = prompt.len().saturating_add(spec.max_tokens);
        let refusal = if let Some(reason) = &self.lost {
            Some(RunError::Unavailable(reason.clone()))
        } else if prompt.is_empty() || spec.max_tokens == 0 || spec.prompt_tokens != prompt.len() {
            Some(RunError::Invalid("a request needs a prompt and room for at least one token".into()))
        } else if tokens > self.limits.context_tokens || tokens > self.limits.kv_tokens {
            Some(RunError::TooLong { tokens, context: self.limits.context_tokens.min(self.limits.kv_tokens) })
        } else if deadline.is_some_and(|deadline| deadline <= now) {
            Some(RunError::DeadlineExceeded)
        } else if !self.has_room(tokens, prompt.len()) {
            Some(RunError::QueueFull { queued: self.waiting.len() })
        } else {
            None
        };
        if let Some(error) = refusal {
            self.end(request, Err(error));
            return self.take_effects();
        }
        self.waiting_tokens += prompt.len();
        let tenant = tenant.to_owned();
        self.waiting.push_back(Waiting { request, tenant, awaited: None, prompt, spec, deadline });
        self.admit(now);
        self.take_effects()
    }

    /// The front went away. Unknown and ended requests are fine.
    pub fn cancel(&mut self, request: RequestId, now: Instant) -> Vec<Effect> {
        self.stop(request, RunError::Cancelled);
        self.admit(now);
        self.take_effects()
    }

    /// The workers said something.
    pub fn on_drive(&mut self, event: DriveEvent, now: Instant) -> Vec<Effect> {
        if self.lost.is_some() {
            return Vec::new();
        }
        self.last_heard = now;
        match event {
            DriveEvent::Capacity { stages } => {
                let effects = self.reuse.set_capacity(stages);
                self.tell(effects);
            }
            DriveEvent::Started { sequence } => self.begun(sequence),
            DriveEvent::Progress { sequence, tokens } => {
                self.started(sequence);
                let effects = self.reuse.went_through(sequence, tokens);
                self.tell(effects);
            }
            DriveEvent::Missing { sequence } => self.missing(sequence),
            DriveEvent::Scores { sequence, position, scores } => self.scores(sequence, position, scores),
            DriveEvent::Embedding { sequence, values } => self.embedding(sequence, values),
            DriveEvent::Token { sequence, position, sampled, end } => {
                let token = sampled.token;
                self.token(sequence, position, sampled, end);
                let effects = self.reuse.generated(sequence, position, token);
                self.tell(effects);
            }
            DriveEvent::Lost { reason } => return self.on_driver_lost(&reason),
            DriveEvent::Closed { sequence } => {
                self.fail(sequence, "the workers closed the sequence before its end".into(), now);
                self.free(sequence);
            }
            DriveEvent::Failed { sequence, reason } => {
                self.fail(sequence, reason, now);
                if let Some(open) = self.open.get_mut(&sequence) {
                    open.forget_at = Some(now + CLOSING_GRACE);
                }
            }
        }
        self.admit(now);
        self.take_effects()
    }

    /// The way to the workers is gone: every request ends, and new ones are refused. For good: a new epoch has a new scheduler.
    pub fn on_driver_lost(&mut self, reason: &str) -> Vec<Effect> {
        if self.lost.is_some() {
            return Vec::new();
        }
        self.lost = Some(reason.to_owned());
        let waiting = std::mem::take(&mut self.waiting).into_iter().map(|waiting| waiting.request);
        let open = std::mem::take(&mut self.open).into_values().filter_map(|open| open.request);
        let failing = std::mem::take(&mut self.failing).into_iter().map(|failing| failing.request);
        // Those that run are older than those that wait.
        for request in failing.chain(open).chain(waiting).collect::<Vec<_>>() {
            self.end(request, Err(RunError::Unavailable(reason.to_owned())));
        }
        self.waiting_tokens = 0;
        self.reserved_tokens = 0;
        self.take_effects()
    }

    /// Time passed. To be called at [`Scheduler::next_wake`]; calling it more often changes nothing.
    pub fn tick(&mut self, now: Instant) -> Vec<Effect> {
        if self.stalls_at().is_some_and(|at| at <= now) {
            let silence = now.duration_since(self.last_heard).as_secs();
            return self.on_driver_lost(&format!("its workers said nothing for {silence} s"));
        }
        let passed = |deadline: Option<Instant>| deadline.is_some_and(|deadline| deadline <= now);
        let waiting = self.waiting.iter().filter(|it| passed(it.deadline)).map(|it| it.request);
        let open = self.open.values().filter(|it| passed(it.deadline)).filter_map(|it| it.request);
        for request in open.chain(waiting).collect::<Vec<_>>() {
            self.stop(request, RunError::DeadlineExceeded);
        }
        while self.failing.front().is_some_and(|failing| failing.settles_at <= now) {
            if let Some(Failing { request, reason, .. }) = self.failing.pop_front() {
                self.end(request, Err(RunError::Failed(reason)));
            }
        }
        let forgotten: Vec<SequenceId> =
            self.open.iter().filter(|(_, it)| passed(it.forget_at)).map(|(sequence, _)| *sequence).collect();
        for sequence in forgotten {
            self.free(sequence);
        }
        self.admit(now);
        self.take_effects()
    }

    /// When to call [`Scheduler::tick`].
    pub fn next_wake(&self) -> Option<Instant> {
        let waiting = self.waiting.iter().filter_map(|waiting| waiting.deadline);
        let live = self.open.values().filter(|open| open.request.is_some());
        let deadlines = live.filter_map(|open| open.deadline);
        let forgets = self.open.values().filter_map(|open| open.forget_at);
        let failures = self.failing.front().map(|failing| failing.settles_at);
        waiting.chain(deadlines).chain(forgets).chain(failures).chain(self.stalls_at()).min()
    }

    /// How busy it is.
    pub fn statistics(&self) -> Statistics {
        Statistics {
            active: self.open.values().filter(|open| open.request.is_some()).count() + self.failing.len(),
            queued: self.waiting.len(),
            open_sequences: self.open.len(),
            reserved_tokens: self.reserved_tokens,
            prompts: self.reuse.statistics(),
        }
    }

    /// Why the replica is gone, when it is.
    pub fn lost(&self) -> Option<&str> {
        self.lost.as_deref()
    }

    fn is_known(&self, request: RequestId) -> bool {
        self.waiting.iter().any(|waiting| waiting.request == request)
            || self.open.values().any(|open| open.request == Some(request))
            || self.failing.iter().any(|failing| failing.request == request)
    }

    /// Can it run at once, or else wait?
    fn has_room(&self, reserve: usize, prompt_tokens: usize) -> bool {
        if self.waiting.is_empty() {
            return self.can_open(reserve) || self.limits.max_queued > 0;
        }
        self.waiting.len() < self.limits.max_queued
            && self.waiting_tokens.saturating_add(prompt_tokens) <= self.limits.max_queued_tokens
    }

    fn can_open(&self, reserve: usize) -> bool {
        self.open.len() < self.limits.max_sequences
            && self.reserved_tokens.saturating_add(reserve) <= self.limits.kv_tokens
    }

    /// Opens waiting requests, in order, while there is room. Not while a failure settles: the pipeline may be breaking. Who waits for
    /// what another sequence is computing lets others pass: it loses nothing by that, as its turn comes when that is done.
    fn admit(&mut self, now: Instant) {
        if !self.failing.is_empty() {
            return;
        }
        loop {
            let reuse = &self.reuse;
            let Some(place) = self.waiting.iter_mut().position(|it| !it.is_awaited(reuse)) else { return };
            let reserved = self.waiting[place].prompt.len() + self.waiting[place].spec.max_tokens;
            if !self.can_open(reserved) {
                return;
            }
            let Some(waiting) = self.waiting.remove(place) else { return };
            self.waiting_tokens -= waiting.prompt.len();
            self.open(waiting, reserved, now);
        }
    }

    fn open(&mut self, waiting: Waiting, reserved: usize, now: Instant) {
        if self.open.is_empty() {
            self.last_heard = now; // the workers owed no word before
        }
        let sequence = SequenceId(self.next_sequence);
        self.next_sequence += 1;
        self.reserved_tokens += reserved;
        let (blocks, effects) = self.reuse.begin(sequence, &waiting.tenant, &waiting.prompt, &waiting.spec);
        self.tell(effects);
        let again = (!blocks.reuse.is_empty()).then(|| Box::new(waiting.clone()));
        let Waiting { request, prompt, spec, deadline, .. } = waiting;
        let open = Open {
            request: Some(request),
            prompt_tokens: prompt.len(),
            max_tokens: spec.max_tokens,
            emitted: 0,
            scored: 0,
            started: false,
            cached_tokens: blocks.cached_tokens(),
            deadline,
            reserved,
            forget_at: None,
            again,
        };
        self.open.insert(sequence, open);
        self.effects.push(Effect::Open { sequence, prompt, spec, blocks });
    }

    /// Passes on what the index says.
    fn tell(&mut self, effects: reuse::Effects) {
        self.effects.extend(effects.into_iter().map(|effect| match effect {
            prompt_index::Effect::Keep { sequence, keep } => Effect::Keep { sequence, keep },
            prompt_index::Effect::Order(order) => Effect::Blocks(order),
        }));
    }

    /// A stage does not have what the sequence was to begin with: it waits once more, before all others, and is computed from its first
    /// token, or from what is left.
    fn missing(&mut self, sequence: SequenceId) {
        let effects = self.reuse.missed(sequence);
        self.tell(effects);
        let Some(open) = self.open.get_mut(&sequence) else { return };
        let (Some(_), Some(again)) = (open.request, open.again.take()) else { return };
        open.request = None;
        self.waiting_tokens += again.prompt.len();
        self.waiting.push_front(*again);
    }

    /// The first step of a sequence entered the pipeline. Whoever begins with blocks is started when a result comes: then all stages
    /// have them.
    fn begun(&mut self, sequence: SequenceId) {
        if self.open.get(&sequence).is_some_and(|open| open.again.is_none()) {
            self.started(sequence);
        }
    }

    fn started(&mut self, sequence: SequenceId) {
        let Some(open) = self.open.get_mut(&sequence) else { return };
        open.again = None;
        let Some(request) = open.request else { return };
        if !std::mem::replace(&mut open.started, true) {
            let cached_tokens = open.cached_tokens;
            self.effects.push(Effect::Emit { request, event: RunEvent::Started { cached_tokens } });
        }
    }

    fn scores(&mut self, sequence: SequenceId, position: usize, scores: Vec<mlxnode_compute::Sampled>) {
        self.started(sequence);
        let Some(open) = self.open.get_mut(&sequence) else { return };
        let Some(request) = open.request else { return };
        // The token at 0 has no score. The front's channel has room for one event per token, so more than that are not passed on.
        if scores.is_empty()
            || position != open.scored + 1
            || open.scored + scores.len() >= open.prompt_tokens
        {
            let reason = format!("scores of the prompt came at {position}, after {} were there", open.scored);
            self.stop(request, RunError::Failed(reason));
            return;
        }
        open.scored += scores.len();
        self.effects.push(Effect::Emit { request, event: RunEvent::Scores { position, scores } });
    }

    fn embedding(&mut self, sequence: SequenceId, values: Vec<f32>) {
        self.started(sequence);
        let Some(request) = self.open.get_mut(&sequence).and_then(|open| open.request.take()) else { return };
        self.effects.push(Effect::Emit { request, event: RunEvent::Embedding(values) });
        self.end(request, Ok(SequenceEnd::Length));
    }

    fn token(
        &mut self,
        sequence: SequenceId,
        position: usize,
        sampled: mlxnode_compute::Sampled,
        end: Option<SequenceEnd>,
    ) {
        self.started(sequence);
        let Some(open) = self.open.get_mut(&sequence) else { return };
        let Some(request) = open.request else { return };
        let expected = open.prompt_tokens + open.emitted;
        if position < expected {
            return; // a repetition: the front has it
        }
        if position > expected {
            let reason = format!("a token was lost: position {position} came where {expected} was next");
            self.stop(request, RunError::Failed(reason));
            return;
        }
        open.emitted += 1;
        // The workers end a sequence at its limit; should they not, it ends here.
        let is_overdue = end.is_none() && open.emitted == open.max_tokens;
        let end = if is_overdue { Some(SequenceEnd::Length) } else { end };
        self.effects.push(Effect::Emit { request, event: RunEvent::Token { position, sampled, end } });
        if let Some(end) = end {
            open.request = None;
            self.end(request, Ok(end));
        }
        if is_overdue {
            self.effects.push(Effect::Cancel { sequence });
        }
    }

    /// Ends a request before its time: out of the queue, or out of the workers.
    fn stop(&mut self, request: RequestId, error: RunError) {
        if let Some(index) = self.waiting.iter().position(|waiting| waiting.request == request) {
            if let Some(waiting) = self.waiting.remove(index) {
                self.waiting_tokens -= waiting.prompt.len();
            }
            self.end(request, Err(error));
            return;
        }
        if let Some(index) = self.failing.iter().position(|failing| failing.request == request) {
            self.failing.remove(index);
            self.end(request, Err(error));
            return;
        }
        let found = self.open.iter_mut().find(|(_, open)| open.request == Some(request));
        if let Some((sequence, open)) = found {
            let sequence = *sequence;
            open.request = None;
            self.effects.push(Effect::Cancel { sequence });
            self.end(request, Err(error));
        }
    }

    /// The workers gave up a sequence: its request ends soon, if it has not ended.
    fn fail(&mut self, sequence: SequenceId, reason: String, now: Instant) {
        if let Some(request) = self.open.get_mut(&sequence).and_then(|open| open.request.take()) {
            self.failing.push_back(Failing { request, reason, settles_at: now + FAILURE_SETTLES });
        }
    }

    fn free(&mut self, sequence: SequenceId) {
        let effects = self.reuse.end(sequence);
        self.tell(effects);
        if let Some(open) = self.open.remove(&sequence) {
            self.reserved_tokens -= open.reserved;
        }
    }

    fn end(&mut self, request: RequestId, result: Result<SequenceEnd, RunError>) {
        self.effects.push(Effect::End { request, result });
    }

    /// When silence becomes a loss.
    fn stalls_at(&self) -> Option<Instant> {
        if self.open.is_empty() {
            return None;
        }
        let prefilling = self.open.values().filter(|open| open.emitted == 0);
        let tokens: usize = prefilling.map(|open| open.prompt_tokens).sum();
        let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
        let patience = self.limits.stall_after + self.limits.stall_per_prompt_token.saturating_mul(tokens);
        self.last_heard.checked_add(patience)
    }

    fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }
}
