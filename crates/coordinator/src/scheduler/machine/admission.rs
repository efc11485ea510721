//! Who is let in, and who gives way: what requests take of the memory, now and probably.

use super::{Effect, Open, Scheduler};
use crate::scheduler::forecast::{Footprint, Growing, peak};
use crate::scheduler::limits::Promise;
use crate::scheduler::request::Request;
use mlxnode_compute::SequenceId;
use std::time::Instant;

/// Tokens that a sequence may get before another one that is closed now has given its memory back.
const AHEAD: usize = 64;

impl Scheduler {
    /// Can it run at once, or else wait?
    pub(super) fn has_place(&self, request: &Request) -> bool {
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

    pub(super) fn can_open(&self, request: &Request) -> bool {
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
    pub(super) fn closing(&self) -> impl Iterator<Item = &Open> {
        self.open.values().filter(|open| open.request.is_none())
    }

    pub(super) fn footprint(&self) -> Option<Footprint> {
        match self.limits.promise {
            Promise::Whole => None,
            Promise::Probable { fixed_tokens } => {
                Some(Footprint::new(self.limits.context_tokens, fixed_tokens))
            }
        }
    }

    /// What a request counts for while it is open.
    pub(super) fn takes(&self, request: &Request) -> usize {
        match self.footprint() {
            None => request.spec.prompt_tokens + request.spec.max_tokens,
            Some(footprint) => footprint.of(request.tokens.len() + AHEAD),
        }
    }

    /// Opens waiting requests, in order, while there is room. Not while a failure settles: the pipeline may be breaking. Who waits for
    /// what another sequence is computing lets others pass: it loses nothing by that, as its turn comes when that is done.
    pub(super) fn admit(&mut self, now: Instant) {
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

    pub(super) fn open(&mut self, request: Request, now: Instant) {
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
    pub(super) fn grew(&mut self, sequence: SequenceId) {
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
    pub(super) fn preempt(&mut self, sequence: SequenceId) {
        let Some(request) = self.open.get_mut(&sequence).and_then(|open| open.request.take()) else { return };
        self.preemptions += 1;
        self.effects.push(Effect::Cancel { sequence });
        self.waiting.push_continued(request.id.0, *request);
    }
}
