//! The scheduler's decisions: queue, admission, order of tokens, ends.
//!
//! A request goes: submitted → queued → open in the workers → ended → its memory free. It ends exactly once, for its front;
//! its memory is free only when the workers say so, and until then nobody gets the place. Who is next, [`FairQueue`] says; it is
//! never overtaken because it is long, so it cannot starve.
//!
//! Memory is promised by what sequences will probably take ([`forecast`](super::forecast)). Should they take more, the youngest one gives its own back: it
//! is closed in the workers, waits before all others and is opened again with what it generated as part of its prompt, so that its front
//! sees nothing of it. The oldest one is never closed, so every request ends.

use super::forecast::{Footprint, Growing, Lengths, peak};
use super::queue::{ANSWER_TOKEN, FairQueue};
use super::request::Request;
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
    /// What of them is promised to a sequence.
    pub promise: Promise,
    /// Requests that may wait.
    pub max_queued: usize,
    /// Prompt tokens that may wait. A single request is taken even if it has more, so that long prompts have a chance.
    pub max_queued_tokens: usize,
    /// What one tenant may fill of both, in hundredths: whatever one does, others find a place.
    pub tenant_percent: usize,
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
            promise: Promise::Whole,
            max_queued: 256,
            max_queued_tokens: 1_000_000,
            tenant_percent: 75,
            stall_after: Duration::from_secs(30),
            stall_per_prompt_token: Duration::from_millis(100),
        }
    }
}

/// What of the reserved memory a sequence counts for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promise {
    /// All that it may ever take: its prompt and `max_tokens`.
    Whole,
    /// What it takes now. It is opened when what all will probably take fits too.
    Probable {
        /// What a sequence takes whatever its length (states, windows), in tokens of a whole context.
        fixed_tokens: usize,
    },
}

/// How many sequences may be open for each whole context that is reserved.
const SEQUENCES_PER_CONTEXT: usize = 4;
/// A worker keeps something for each sequence, and a step of more rows than that gains nothing.
const MOST_SEQUENCES: usize = 256;

impl Limits {
    /// The limits of a plan that reserves memory for so many whole contexts and shares it among more sequences than that, as long as they
    /// are short. The workers must take [`Limits::sequences_for`] of them.
    pub fn shared(contexts: usize, context_tokens: usize, fixed_tokens: usize) -> Self {
        Self {
            max_sequences: Self::sequences_for(contexts),
            promise: Promise::Probable { fixed_tokens },
            ..Self::new(contexts, context_tokens)
        }
    }

    /// Most sequences that are open at the same time where memory for so many whole contexts is reserved.
    pub fn sequences_for(contexts: usize) -> usize {
        contexts.saturating_mul(SEQUENCES_PER_CONTEXT).min(MOST_SEQUENCES).max(contexts)
    }
}

/// Tokens that a sequence may get before another one that is closed now has given its memory back.
const AHEAD: usize = 64;

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
    waiting: FairQueue<Request>,
    open: BTreeMap<SequenceId, Open>,
    failing: VecDeque<Failing>,
    /// What open sequences count for, by [`Limits::promise`].
    taken: usize,
    /// How long answers were.
    lengths: Lengths,
    /// The next one, for which there was no room when something was freed last.
    too_large: Option<RequestId>,
    preemptions: u64,
    next_sequence: u64,
    last_heard: Instant,
    lost: Option<String>,
    reuse: Reuse,
    effects: Vec<Effect>,
}

#[derive(Debug)]
struct Open {
    /// `None` once the request ended or waits again: only the memory is still to be freed.
    request: Option<Box<Request>>,
    /// It is not known yet that all stages have the blocks that it begins with.
    is_unsure: bool,
    /// Tokens of the prompt that need no work.
    cached_tokens: usize,
    /// Tokens of the prompt that were scored since it was opened.
    scored: usize,
    /// Did a token come since it was opened?
    has_token: bool,
    /// What it counts for.
    taken: usize,
    /// Give the place away then, even if the workers say nothing.
    forget_at: Option<Instant>,
}

impl Open {
    fn is(&self, request: RequestId) -> bool {
        self.request.as_ref().is_some_and(|own| own.id == request)
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
            waiting: FairQueue::default(),
            open: BTreeMap::new(),
            failing: VecDeque::new(),
            taken: 0,
            lengths: Lengths::default(),
            too_large: None,
            preemptions: 0,
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

    /// A front wants a sequence, or the rest of one: then `prompt` has what was generated at its end, behind the `spec.prompt_tokens` of the
    /// first prompt. `request` must be new and larger than those before; one that is known is left as it is.
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
        let tokens = spec.prompt_tokens.saturating_add(spec.max_tokens);
        let generated = prompt.len().checked_sub(spec.prompt_tokens);
        let request = Request {
            id: request,
            tenant: tenant.to_owned(),
            tokens: prompt,
            spec,
            deadline,
            awaited: None,
            has_started: false,
            scored: 0,
        };
        let refusal = if let Some(reason) = &self.lost {
            Some(RunError::Unavailable(reason.clone()))
        } else if request.spec.prompt_tokens == 0
            || generated.is_none_or(|generated| generated >= request.spec.max_tokens)
        {
            Some(RunError::Invalid("a request needs a prompt and room for at least one token".into()))
        } else if tokens > self.limits.context_tokens || tokens > self.limits.kv_tokens {
            Some(RunError::TooLong { tokens, context: self.limits.context_tokens.min(self.limits.kv_tokens) })
        } else if deadline.is_some_and(|deadline| deadline <= now) {
            Some(RunError::DeadlineExceeded)
        } else if !self.has_place(&request) {
            Some(RunError::QueueFull { queued: self.waiting.len(), tokens: self.waiting.tokens() })
        } else {
            None
        };
        if let Some(error) = refusal {
            self.end(request.id, Err(error));
            return self.take_effects();
        }
        match request.generated() {
            0 => self.waiting.push(request),
            _ => self.waiting.push_continued(request.id.0, request),
        }
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
        let waiting = self.waiting.drain().into_iter().map(|waiting| waiting.id);
        let open = std::mem::take(&mut self.open).into_values().filter_map(|open| Some(open.request?.id));
        let failing = std::mem::take(&mut self.failing).into_iter().map(|failing| failing.request);
        // Those that run are older than those that wait.
        for request in failing.chain(open).chain(waiting).collect::<Vec<_>>() {
            self.end(request, Err(RunError::Unavailable(reason.to_owned())));
        }
        self.taken = 0;
        self.take_effects()
    }

    /// Time passed. To be called at [`Scheduler::next_wake`]; calling it more often changes nothing.
    pub fn tick(&mut self, now: Instant) -> Vec<Effect> {
        if self.stalls_at().is_some_and(|at| at <= now) {
            let silence = now.duration_since(self.last_heard).as_secs();
            return self.on_driver_lost(&format!("its workers said nothing for {silence} s"));
        }
        let passed = |deadline: Option<Instant>| deadline.is_some_and(|deadline| deadline <= now);
        let waiting = self.waiting.iter();
        let open = self.open.values().filter_map(|it| it.request.as_deref());
        let late = open.chain(waiting).filter(|it| passed(it.deadline)).map(|it| it.id);
        for request in late.collect::<Vec<_>>() {
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
        let deadlines = self.open.values().filter_map(|open| open.request.as_ref()?.deadline);
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
            reserved_tokens: self.taken,
            preemptions: self.preemptions,
            prompts: self.reuse.statistics(),
        }
    }

    /// Why the replica is gone, when it is.
    pub fn lost(&self) -> Option<&str> {
        self.lost.as_deref()
    }

    fn is_known(&self, request: RequestId) -> bool {
        self.waiting.find(|waiting| waiting.id == request).is_some()
            || self.open.values().any(|open| open.is(request))
            || self.failing.iter().any(|failing| failing.request == request)
    }

    /// Can it run at once, or else wait?
    fn has_place(&self, request: &Request) -> bool {
        let limits = &self.limits;
        if request.generated() > 0 {
            // It had its place before: those that come with it have places of their own, as many as others.
            return self.waiting.continued() < limits.max_queued;
        }
        if self.waiting.len() == 0 {
            return limits.max_queued > 0 || self.can_open(request);
        }
        let fits = |(requests, tokens): (usize, usize), percent: usize| {
            requests < (limits.max_queued * percent).div_ceil(100)
                && tokens.saturating_add(request.tokens.len())
                    <= limits.max_queued_tokens.saturating_mul(percent) / 100
        };
        let all = (self.waiting.len() - self.waiting.continued(), self.waiting.tokens());
        let own = self.waiting.of(&request.tenant);
        fits(all, 100) && (own.0 == 0 || fits(own, limits.tenant_percent.min(100)))
    }

    fn can_open(&self, request: &Request) -> bool {
        let taken = self.takes(request);
        if self.open.len() >= self.limits.max_sequences
            || self.taken.saturating_add(taken) > self.limits.kv_tokens
        {
            return false;
        }
        let Some(footprint) = self.footprint() else { return true };
        let growing = |request: &Request| {
            let (there, most) = (request.generated(), request.spec.max_tokens);
            let coming = self.lengths.forecast(there, most) - there;
            Growing { held: request.tokens.len() + AHEAD, coming }
        };
        let running = self.open.values().filter_map(|open| open.request.as_deref());
        let mut all: Vec<Growing> = running.chain([request]).map(growing).collect();
        let closing: usize = self.closing().map(|open| open.taken).sum();
        peak(&mut all, footprint).saturating_add(closing) <= self.limits.kv_tokens
    }

    /// Those whose memory is about to be free.
    fn closing(&self) -> impl Iterator<Item = &Open> {
        self.open.values().filter(|open| open.request.is_none())
    }

    fn footprint(&self) -> Option<Footprint> {
        match self.limits.promise {
            Promise::Whole => None,
            Promise::Probable { fixed_tokens } => {
                Some(Footprint::new(self.limits.context_tokens, fixed_tokens))
            }
        }
    }

    /// What a request counts for while it is open.
    fn takes(&self, request: &Request) -> usize {
        match self.footprint() {
            None => request.spec.prompt_tokens + request.spec.max_tokens,
            Some(footprint) => footprint.of(request.tokens.len() + AHEAD),
        }
    }

    /// Opens waiting requests, in order, while there is room. Not while a failure settles: the pipeline may be breaking. Who waits for
    /// what another sequence is computing lets others pass: it loses nothing by that, as its turn comes when that is done.
    fn admit(&mut self, now: Instant) {
        while self.failing.is_empty() && self.waiting.len() > 0 && self.open.len() < self.limits.max_sequences
        {
            let reuse = &self.reuse;
            let Some(place) = self.waiting.next(|request| !request.is_awaited(reuse)) else { return };
            let Some(next) = self.waiting.get(&place) else { return };
            // Those that run only grow: until one of them gives memory back there is no room for who had none.
            if self.too_large == Some(next.id) {
                return;
            }
            if !self.can_open(next) {
                self.too_large = Some(next.id);
                return;
            }
            let Some(request) = self.waiting.take(&place, true) else { return };
            self.open(request, now);
        }
    }

    fn open(&mut self, request: Request, now: Instant) {
        if self.open.is_empty() {
            self.last_heard = now; // the workers owed no word before
        }
        let sequence = SequenceId(self.next_sequence);
        self.next_sequence += 1;
        let spec = request.spec_from_here();
        let (blocks, effects) = self.reuse.begin(sequence, &request.tenant, &request.tokens, &spec);
        self.tell(effects);
        let cached_tokens = blocks.cached_tokens();
        if request.generated() == 0 {
            // What is computed again is nobody's wish.
            let tokens = request.tokens.len().saturating_sub(cached_tokens);
            self.waiting.charge(&request.tenant, tokens as u64);
        }
        let taken = self.takes(&request);
        self.taken += taken;
        let prompt = request.tokens.clone();
        let open = Open {
            is_unsure: !blocks.reuse.is_empty(),
            cached_tokens,
            scored: 0,
            has_token: false,
            taken,
            forget_at: None,
            request: Some(Box::new(request)),
        };
        self.open.insert(sequence, open);
        self.effects.push(Effect::Open { sequence, prompt, spec, blocks });
    }

    /// A sequence got longer. When the memory does not do any more, the youngest ones give theirs back.
    fn grew(&mut self, sequence: SequenceId) {
        let Some(open) = self.open.get(&sequence) else { return };
        let Some(takes) = open.request.as_deref().map(|request| self.takes(request)) else { return };
        if let Some(open) = self.open.get_mut(&sequence) {
            self.taken = self.taken - open.taken + takes;
            open.taken = takes;
        }
        loop {
            let closing: usize = self.closing().map(|open| open.taken).sum();
            if self.taken - closing <= self.limits.kv_tokens {
                return;
            }
            let running = || {
                self.open.iter().filter_map(|(sequence, open)| Some((open.request.as_ref()?.id, *sequence)))
            };
            let Some((_, youngest)) = running().max().filter(|_| running().count() > 1) else { return };
            self.preempt(youngest);
        }
    }

    /// Closes a sequence in the workers and lets its request wait for room, before all others.
    fn preempt(&mut self, sequence: SequenceId) {
        let Some(request) = self.open.get_mut(&sequence).and_then(|open| open.request.take()) else { return };
        self.preemptions += 1;
        self.effects.push(Effect::Cancel { sequence });
        self.waiting.push_continued(request.id.0, *request);
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
        let Some(open) = self.open.get_mut(&sequence).filter(|open| open.is_unsure) else { return };
        if let Some(request) = open.request.take() {
            self.waiting.push_continued(request.id.0, *request);
        }
    }

    /// The first step of a sequence entered the pipeline. Whoever begins with blocks is started when a result comes: then all stages
    /// have them.
    fn begun(&mut self, sequence: SequenceId) {
        if self.open.get(&sequence).is_some_and(|open| !open.is_unsure) {
            self.started(sequence);
        }
    }

    fn started(&mut self, sequence: SequenceId) {
        let Some(open) = self.open.get_mut(&sequence) else { return };
        open.is_unsure = false;
        let Some(request) = &mut open.request else { return };
        if !std::mem::replace(&mut request.has_started, true) {
            let (request, cached_tokens) = (request.id, open.cached_tokens);
            self.effects.push(Effect::Emit { request, event: RunEvent::Started { cached_tokens } });
        }
    }

    fn scores(&mut self, sequence: SequenceId, position: usize, mut scores: Vec<mlxnode_compute::Sampled>) {
        self.started(sequence);
        let Some(open) = self.open.get_mut(&sequence) else { return };
        let Some(request) = &mut open.request else { return };
        let id = request.id;
        // The token at 0 has no score. The front's channel has room for one event per token, so more than that are not passed on.
        if scores.is_empty()
            || position != open.scored + 1
            || open.scored + scores.len() >= request.tokens.len()
        {
            let reason = format!("scores of the prompt came at {position}, after {} were there", open.scored);
            self.stop(id, RunError::Failed(reason));
            return;
        }
        open.scored += scores.len();
        // Opened again, it is scored again; its front hears what it has not heard.
        let known = request.scored.saturating_sub(position - 1).min(scores.len());
        scores.drain(..known);
        if !scores.is_empty() {
            request.scored = open.scored;
            let event = RunEvent::Scores { position: position + known, scores };
            self.effects.push(Effect::Emit { request: id, event });
        }
    }

    fn embedding(&mut self, sequence: SequenceId, values: Vec<f32>) {
        self.started(sequence);
        let Some(request) = self.open.get_mut(&sequence).and_then(|open| open.request.take()) else { return };
        self.effects.push(Effect::Emit { request: request.id, event: RunEvent::Embedding(values) });
        self.end(request.id, Ok(SequenceEnd::Length));
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
        let Some(request) = &mut open.request else { return };
        let id = request.id;
        let expected = request.tokens.len();
        if position < expected {
            return; // a repetition: the front has it
        }
        if position > expected {
            let reason = format!("a token was lost: position {position} came where {expected} was next");
            self.stop(id, RunError::Failed(reason));
            return;
        }
        request.tokens.push(sampled.token);
        open.has_token = true;
        self.waiting.charge(&request.tenant, ANSWER_TOKEN);
        let generated = request.generated();
        // The workers end a sequence at its limit; should they not, it ends here.
        let is_overdue = end.is_none() && generated == request.spec.max_tokens;
        let end = if is_overdue { Some(SequenceEnd::Length) } else { end };
        self.effects.push(Effect::Emit { request: id, event: RunEvent::Token { position, sampled, end } });
        match end {
            None => self.grew(sequence),
            Some(end) => {
                open.request = None;
                self.lengths.ended(generated);
                self.too_large = None;
                self.end(id, Ok(end));
            }
        }
        if is_overdue {
            self.effects.push(Effect::Cancel { sequence });
        }
    }

    /// Ends a request before its time: out of the queue, or out of the workers.
    fn stop(&mut self, request: RequestId, error: RunError) {
        if let Some(place) = self.waiting.find(|waiting| waiting.id == request) {
            self.waiting.take(&place, false);
            self.end(request, Err(error));
            return;
        }
        if let Some(index) = self.failing.iter().position(|failing| failing.request == request) {
            self.failing.remove(index);
            self.end(request, Err(error));
            return;
        }
        let found = self.open.iter_mut().find(|(_, open)| open.is(request));
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
            self.failing.push_back(Failing {
                request: request.id,
                reason,
                settles_at: now + FAILURE_SETTLES,
            });
        }
    }

    fn free(&mut self, sequence: SequenceId) {
        let effects = self.reuse.end(sequence);
        self.tell(effects);
        if let Some(open) = self.open.remove(&sequence) {
            self.taken -= open.taken;
            self.too_large = None;
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
        let prefilling = self.open.values().filter(|open| !open.has_token);
        let tokens: usize = prefilling.filter_map(|open| Some(open.request.as_ref()?.tokens.len())).sum();
        let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
        let patience = self.limits.stall_after + self.limits.stall_per_prompt_token.saturating_mul(tokens);
        self.last_heard.checked_add(patience)
    }

    fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }
}
