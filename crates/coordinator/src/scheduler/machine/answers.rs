//! What comes of open sequences: tokens, scores, vectors, and their ends.

use super::{Effect, Failing, RequestId, Scheduler};
use crate::scheduler::queue::ANSWER_TOKEN;
use crate::scheduler::{RunError, RunEvent};
use mlxnode_compute::{SequenceEnd, SequenceId};
use std::time::{Duration, Instant};

/// Workers whose pipeline breaks fail every sequence and then end the connection. A failure is passed on only after this, so that
/// it becomes [`RunError::Unavailable`] (which may be tried again) when it was the pipeline's and not the sequence's.
const FAILURE_SETTLES: Duration = Duration::from_millis(100);

impl Scheduler {
    /// A stage does not have what the sequence was to begin with: it waits once more, before all others, and is computed from its first
    /// token, or from what is left.
    pub(super) fn missing(&mut self, sequence: SequenceId) {
        let effects = self.reuse.missed(sequence);
        self.tell(effects);
        let Some(open) = self.open.get_mut(&sequence).filter(|open| open.is_unsure) else { return };
        if let Some(request) = open.request.take() {
            self.waiting.push_continued(request.id.0, *request);
        }
    }

    /// The first step of a sequence entered the pipeline. Whoever begins with blocks is started when a result comes: then all stages
    /// have them.
    pub(super) fn begun(&mut self, sequence: SequenceId) {
        if self.open.get(&sequence).is_some_and(|open| !open.is_unsure) {
            self.started(sequence);
        }
    }

    pub(super) fn started(&mut self, sequence: SequenceId) {
        let Some(open) = self.open.get_mut(&sequence) else { return };
        open.is_unsure = false;
        let Some(request) = &mut open.request else { return };
        if !std::mem::replace(&mut request.has_started, true) {
            let (request, cached_tokens) = (request.id, open.cached_tokens);
            self.effects.push(Effect::Emit { request, event: RunEvent::Started { cached_tokens } });
        }
    }

    pub(super) fn scores(
        &mut self,
        sequence: SequenceId,
        position: usize,
        mut scores: Vec<mlxnode_compute::Sampled>,
    ) {
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

    pub(super) fn embedding(&mut self, sequence: SequenceId, values: Vec<f32>) {
        self.started(sequence);
        let Some(request) = self.open.get_mut(&sequence).and_then(|open| open.request.take()) else { return };
        self.effects.push(Effect::Emit { request: request.id, event: RunEvent::Embedding(values) });
        self.end(request.id, Ok(SequenceEnd::Length));
    }

    pub(super) fn token(
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
    pub(super) fn stop(&mut self, request: RequestId, error: RunError) {
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
    pub(super) fn fail(&mut self, sequence: SequenceId, reason: String, now: Instant) {
        if let Some(request) = self.open.get_mut(&sequence).and_then(|open| open.request.take()) {
            self.failing.push_back(Failing {
                request: request.id,
                reason,
                settles_at: now + FAILURE_SETTLES,
            });
        }
    }
}
