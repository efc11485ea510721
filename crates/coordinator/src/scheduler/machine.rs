//! The scheduler's decisions: queue, admission, order of tokens, ends.
//!
//! A request goes: submitted → queued → open in the workers → ended → its memory free. It ends exactly once, for its front;
//! its memory is free only when the workers say so, and until then nobody gets the place. Who is next, [`FairQueue`] says; it is
//! never overtaken because it is long, so it cannot starve.
//!
//! Memory is promised by what sequences will probably take ([`forecast`](super::forecast)). Should they take more, the youngest one gives its own back: it
//! is closed in the workers, waits before all others and is opened again with what it generated as part of its prompt, so that its front
//! sees nothing of it. The oldest one is never closed, so every request ends. Who is let in and who gives way is in `admission`, what comes
//! back from the workers in `answers`.

mod admission;
mod answers;

use super::forecast::Lengths;
use super::limits::Limits;
use super::queue::FairQueue;
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

/// After a failure the workers close the sequence. Should they forget to say so, its place is given away after this.
const CLOSING_GRACE: Duration = Duration::from_secs(5);

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

    /// Passes on what the index says.
    fn tell(&mut self, effects: reuse::Effects) {
        self.effects.extend(effects.into_iter().map(|effect| match effect {
            prompt_index::Effect::Keep { sequence, keep } => Effect::Keep { sequence, keep },
            prompt_index::Effect::Order(order) => Effect::Blocks(order),
        }));
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
