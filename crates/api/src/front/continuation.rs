//! What a front knows of a sequence that it may have to ask for again: everything that the client has, and nothing else.
//!
//! The prompt, the parameters and the seed do not change, and sampling is a pure function of them, the tokens before and the position.
//! So a sequence is continued by asking for its prompt and what was emitted, as one prompt: the next token is the one that would
//! have come, and what the client has cannot change, because it is input now. (Petals and NVIDIA Dynamo move their sequences likewise.)

use mlxnode_coordinator::scheduler::{RunError, RunEvent, RunRequest};
use std::time::Instant;

/// One sequence, as far as its client has it.
#[derive(Clone, Debug)]
pub(super) struct Continuation {
    /// As it was asked for first.
    request: RunRequest,
    emitted: Vec<u32>,
    /// Tokens of the prompt whose scores the client has; the first one has none.
    scored: usize,
    has_started: bool,
}

impl Continuation {
    pub(super) fn new(request: RunRequest) -> Self {
        Self { request, emitted: Vec::new(), scored: 0, has_started: false }
    }

    /// What to ask a replica for.
    pub(super) fn request(&self) -> RunRequest {
        let mut request = self.request.clone();
        if !self.emitted.is_empty() {
            request.prompt.extend_from_slice(&self.emitted);
            // All scores come before the first token; now they would be those of the answer too.
            request.spec.prompt_logprobs = None;
        }
        request
    }

    /// Takes an event of a replica: what the client is to hear of it, if it has not.
    ///
    /// # Errors
    /// An event that does not follow what came before.
    pub(super) fn take(&mut self, event: RunEvent) -> Result<Option<RunEvent>, RunError> {
        match event {
            RunEvent::Started { .. } if std::mem::replace(&mut self.has_started, true) => Ok(None),
            RunEvent::Scores { position, mut scores } => {
                let expected = self.scored + 1;
                if position > expected {
                    return Err(gap("scores of the prompt", expected, position));
                }
                let known = scores.len().min(expected - position);
                scores.drain(..known);
                if scores.is_empty() {
                    return Ok(None);
                }
                self.scored += scores.len();
                Ok(Some(RunEvent::Scores { position: expected, scores }))
            }
            RunEvent::Token { position, sampled, end } => {
                let expected = self.request.prompt.len() + self.emitted.len();
                if position > expected {
                    return Err(gap("a token", expected, position));
                }
                if position < expected {
                    return Ok(None);
                }
                self.emitted.push(sampled.token);
                Ok(Some(RunEvent::Token { position, sampled, end }))
            }
            event => Ok(Some(event)),
        }
    }

    /// Tokens of the answer that the client has.
    pub(super) fn emitted(&self) -> usize {
        self.emitted.len()
    }

    /// Did a replica ever begin with it?
    pub(super) fn has_started(&self) -> bool {
        self.has_started
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.request.deadline
    }

    /// Its name in logs.
    pub(super) fn trace(&self) -> Option<String> {
        self.request.spec.trace.map(|trace| trace.id())
    }
}

fn gap(what: &str, expected: usize, position: usize) -> RunError {
    RunError::Failed(format!("{what} was lost: position {position} came where {expected} was next"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlxnode_compute::{LogprobRequest, Sampled, Sampling, SequenceEnd, SequenceSpec};

    fn request() -> RunRequest {
        let spec = SequenceSpec {
            prompt_logprobs: Some(LogprobRequest { top: 0 }),
            ..SequenceSpec::new(3, 5, Sampling::default())
        };
        RunRequest { prompt: vec![7, 8, 9], spec, deadline: None, tenant: "k".into() }
    }

    fn sampled(token: u32) -> Sampled {
        Sampled { token, logprob: None, top: vec![] }
    }

    fn token(position: usize, token: u32) -> RunEvent {
        RunEvent::Token { position, sampled: sampled(token), end: None }
    }

    #[test]
    fn the_second_request_is_the_first_one_and_what_was_emitted() {
        let mut sequence = Continuation::new(request());
        assert_eq!(sequence.request(), request());
        for (position, id) in [(3, 40), (4, 41)] {
            assert!(sequence.take(token(position, id)).unwrap().is_some());
        }
        let again = sequence.request();
        assert_eq!(again.prompt, [7, 8, 9, 40, 41]);
        assert_eq!(again.spec, SequenceSpec { prompt_logprobs: None, ..request().spec });
        assert_eq!((again.spec.prompt_tokens, again.spec.max_tokens), (3, 5), "the numbers of the whole");
        // Nothing twice, nothing left out, the end as ever.
        assert_eq!(sequence.take(token(4, 41)), Ok(None));
        assert!(
            matches!(sequence.take(token(6, 43)), Err(RunError::Failed(text)) if text.contains("position 6"))
        );
        let end = Some(SequenceEnd::Stop);
        let last = RunEvent::Token { position: 5, sampled: sampled(2), end };
        assert_eq!(sequence.take(last.clone()), Ok(Some(last)));
    }

    #[test]
    fn the_client_hears_of_its_start_and_of_each_score_once() {
        let mut sequence = Continuation::new(request());
        let started = || RunEvent::Started { cached_tokens: 2 };
        assert_eq!(sequence.take(started()), Ok(Some(started())));
        let scores = |position: usize, tokens: &[u32]| RunEvent::Scores {
            position,
            scores: tokens.iter().map(|token| sampled(*token)).collect(),
        };
        assert_eq!(sequence.take(scores(1, &[8])), Ok(Some(scores(1, &[8]))));
        // Lost here; the next replica scores the prompt from its beginning.
        assert_eq!(sequence.request(), request());
        assert_eq!(sequence.take(started()), Ok(None));
        assert_eq!(sequence.take(scores(1, &[8, 9])), Ok(Some(scores(2, &[9]))));
        assert_eq!(sequence.take(scores(1, &[8, 9])), Ok(None));
        assert!(sequence.take(scores(4, &[1])).is_err());
    }
}
