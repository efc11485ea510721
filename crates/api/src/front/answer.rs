//! The answer to a request as a stream of pieces, with its times.

use crate::deployments::DeploymentView;
use crate::front::account::Account;
use crate::front::{End, FrontError, Output, Piece, RunEvents};
use crate::metrics::Finished;
use futures::StreamExt as _;
use mlxnode_compute::Sampled;
use mlxnode_coordinator::scheduler::{RunError, RunEvent};
use std::time::{Duration, Instant};

/// A running answer. Dropping it cancels the sequence.
pub struct Answer {
    /// Whose answer it is.
    pub deployment: DeploymentView,
    events: RunEvents,
    output: Output,
    account: Account,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// The seed in use.
    pub seed: u64,
    cached_tokens: usize,
    generated: usize,
    arrived: Instant,
    started: Option<Instant>,
    first: Option<Instant>,
    ended: bool,
}

/// What happens in an answer.
#[derive(Clone, Debug)]
pub enum AnswerEvent {
    /// Tokens of the prompt with their log-probabilities, in order, when asked for; several of these, before the first piece.
    Prompt(Vec<Sampled>),
    /// New text; several of these.
    Piece(Piece),
    /// The last event.
    Ended {
        /// The last text.
        piece: Piece,
        /// What it took.
        summary: Summary,
    },
}

/// What an answer took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Why it ended.
    pub end: End,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that needed no work, because another request had the same beginning.
    pub cached_tokens: usize,
    /// Tokens generated, a stop token included.
    pub generation_tokens: usize,
    /// From arrival to the first step.
    pub queue: Duration,
    /// From the first step to the first token.
    pub prompt: Duration,
    /// From the first token to the last one.
    pub generation: Duration,
    /// The seed that was used.
    pub seed: u64,
}

impl Answer {
    pub(super) fn new(
        deployment: DeploymentView,
        events: RunEvents,
        output: Output,
        account: Account,
        seed: u64,
    ) -> Self {
        Self {
            deployment,
            events,
            output,
            prompt_tokens: account.prompt_tokens(),
            account,
            seed,
            cached_tokens: 0,
            generated: 0,
            arrived: Instant::now(),
            started: None,
            first: None,
            ended: false,
        }
    }

    /// The next event; `None` after the last one.
    pub async fn next(&mut self) -> Option<Result<AnswerEvent, FrontError>> {
        while !self.ended {
            let event = match self.events.next().await {
                Some(Ok(event)) => event,
                Some(Err(error)) => {
                    self.ended = true;
                    return Some(Err(self.account.failed(error)));
                }
                None => {
                    self.ended = true;
                    let error = RunError::Unavailable("the scheduler ended the sequence".into());
                    return Some(Err(self.account.failed(error)));
                }
            };
            match event {
                RunEvent::Started { cached_tokens } => {
                    self.started = Some(Instant::now());
                    self.account.started(cached_tokens);
                    self.cached_tokens = cached_tokens;
                }
                RunEvent::Scores { scores, .. } => return Some(Ok(AnswerEvent::Prompt(scores))),
                // Only a request for a vector gets one.
                RunEvent::Embedding(_) => {}
                RunEvent::Token { sampled, end, .. } => {
                    self.first.get_or_insert_with(Instant::now);
                    self.generated += 1;
                    self.account.token();
                    let piece = self.output.push(sampled, end);
                    return Some(Ok(match piece.end {
                        None => AnswerEvent::Piece(piece),
                        Some(end) => {
                            self.ended = true;
                            self.account.ended(match end {
                                End::Stop => Finished::Stop,
                                End::Length => Finished::Length,
                            });
                            AnswerEvent::Ended { piece, summary: self.summary(end) }
                        }
                    }));
                }
            }
        }
        None
    }

    fn summary(&self, end: End) -> Summary {
        let now = Instant::now();
        let first = self.first.unwrap_or(now);
        let started = self.started.unwrap_or(first);
        Summary {
            end,
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached_tokens,
            generation_tokens: self.generated,
            queue: started.saturating_duration_since(self.arrived),
            prompt: first.saturating_duration_since(started),
            generation: now.saturating_duration_since(first),
            seed: self.seed,
        }
    }
}
