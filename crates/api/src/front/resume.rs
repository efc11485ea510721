//! The events of a sequence, whatever becomes of its replica: on a loss the sequence is asked for again, from where the client is.
//!
//! ```text
//!          ┌────────── loss, while nothing says that it is in vain ─────────┐
//!          ▼                                                                │
//!  waiting for a replica ──Verdict::Try──▶ asked ──Started──▶ running ──────┤
//!      └── Verdict::GiveUp, deadline ─────────────────────────────────────▶ over
//! ```
//!
//! [`Continuation`] knows what to ask for, [`Patience`] when. The client sees no gap and no repeat, only that it takes longer.

use super::continuation::Continuation;
use super::patience::{MAX_FRUITLESS, Patience, Seen, Verdict};
use super::routing::Ticket;
use super::{Front, RunEvents};
use crate::deployments::{DeploymentView, State};
use futures::StreamExt as _;
use mlxnode_coordinator::scheduler::{RunError, RunEvent, RunRequest};
use std::time::{Duration, Instant};
use tracing::info;

/// A sequence that survives its replica.
struct Running {
    front: Front,
    /// Whose replica runs it, or ran it last.
    deployment: DeploymentView,
    /// Its place among the replicas, where there are several.
    ticket: Option<Ticket>,
    sequence: Continuation,
    /// None while there is no replica.
    events: Option<RunEvents>,
    /// While there is none: why, and how long that is borne.
    waiting: Option<Waiting>,
    /// Losses since the last token.
    fruitless: usize,
    /// Tokens that were there at the last loss.
    emitted_at_loss: usize,
    is_over: bool,
}

struct Waiting {
    reason: String,
    patience: Patience,
    has_waited: bool,
}

/// A replica that says nothing at all for so long when it is asked counts as gone.
const ANSWER_TIME: Duration = Duration::from_secs(10);

impl Front {
    /// Runs a sequence and asks for the rest of it again when its replica is lost. Dropping the stream cancels it within one step.
    ///
    /// # Errors
    /// When the replica refuses it at once.
    pub(super) async fn run(
        &self,
        deployment: &DeploymentView,
        request: RunRequest,
    ) -> Result<RunEvents, RunError> {
        let (deployment, ticket) = self.route(deployment.clone(), &request);
        let sequence = Continuation::new(request);
        let mut running = Box::new(Running {
            front: self.clone(),
            deployment: deployment.clone(),
            ticket,
            sequence,
            events: None,
            waiting: None,
            fruitless: 0,
            emitted_at_loss: 0,
            is_over: false,
        });
        match self.replicas.run(&deployment, running.sequence.request()).await {
            Ok(events) => running.events = Some(events),
            Err(error) => running.lost(error)?,
        }
        // Boxed: the state moves into and out of the stream with every event.
        let next = |mut running: Box<Running>| async move {
            let event = running.next().await?;
            Some((event, running))
        };
        Ok(futures::stream::unfold(running, next).boxed())
    }
}

impl Running {
    /// The next event for the client; none after the last one.
    async fn next(&mut self) -> Option<Result<RunEvent, RunError>> {
        while !self.is_over {
            let taken = match &mut self.events {
                None => match self.find().await {
                    Ok(()) => continue,
                    Err(error) => Err(error),
                },
                Some(events) => match events.next().await {
                    Some(Ok(event)) => {
                        if self.waiting.take().is_some() && self.sequence.has_started() {
                            self.front.metrics.resumed();
                        }
                        self.sequence.take(event)
                    }
                    Some(Err(error)) => self.lost(error).map(|()| None),
                    None => self.lost(RunError::Unavailable("its scheduler ended".into())).map(|()| None),
                },
            };
            match taken {
                Ok(None) => {}
                Ok(Some(event)) => {
                    self.is_over =
                        matches!(event, RunEvent::Token { end: Some(_), .. } | RunEvent::Embedding(_));
                    return Some(Ok(event));
                }
                Err(error) => {
                    self.is_over = true;
                    return Some(Err(error));
                }
            }
        }
        None
    }

    /// A replica does not have the sequence any more, or did not take it. An error when another one would not help.
    fn lost(&mut self, error: RunError) -> Result<(), RunError> {
        let reason = match error {
            RunError::Unavailable(reason) => reason,
            // It had its place already: those that come with it fill the queue of a new replica.
            RunError::QueueFull { .. } if self.sequence.has_started() => error.to_string(),
            error => return Err(error),
        };
        self.events = None;
        if let Some(ticket) = self.ticket.take() {
            ticket.lost();
        }
        if self.waiting.is_some() {
            return Ok(());
        }
        let emitted = self.sequence.emitted();
        if self.sequence.has_started() {
            self.fruitless = if emitted > self.emitted_at_loss { 1 } else { self.fruitless + 1 };
        }
        self.emitted_at_loss = emitted;
        if self.fruitless > MAX_FRUITLESS {
            return Err(RunError::Unavailable(format!(
                "{reason}; {MAX_FRUITLESS} replicas were lost with this request before, without a token in between"
            )));
        }
        let patience = Patience::new(self.front.resume_within, self.deployment.epoch, Instant::now());
        self.waiting = Some(Waiting { reason, patience, has_waited: false });
        Ok(())
    }

    /// What is to be done by what this node knows of the deployment, and the deployment.
    fn look(&mut self, now: Instant) -> (Verdict, Option<DeploymentView>) {
        let Some(waiting) = &mut self.waiting else { return (Verdict::Try, None) };
        if self.front.ending.is_cancelled() {
            return (Verdict::GiveUp, None);
        }
        let view = self.front.deployments.borrow();
        // Another replica that is ready, or else this one when it is back.
        let own = (self.deployment.replica, self.deployment.epoch);
        let same = view.deployments.iter().filter(|deployment| deployment.name == self.deployment.name);
        let found = same.min_by_key(|it| (it.state != State::Ready, (it.replica, it.epoch) == own));
        let seen = match found {
            // Another model under this name would go on with something else.
            Some(found) if found.source != self.deployment.source => Seen::Gone,
            Some(found) => Seen::Deployment(found),
            None if view.is_current => Seen::Gone,
            None => Seen::Unknown,
        };
        (waiting.patience.verdict(seen, now), found.cloned())
    }

    /// Waits for a replica and asks it.
    async fn find(&mut self) -> Result<(), RunError> {
        let mut deployments = self.front.deployments.clone();
        loop {
            let now = Instant::now();
            if self.sequence.deadline().is_some_and(|deadline| deadline <= now) {
                return Err(RunError::DeadlineExceeded);
            }
            deployments.mark_unchanged();
            let (verdict, found) = self.look(now);
            let until = match verdict {
                Verdict::GiveUp => return Err(self.given_up()),
                Verdict::Try => {
                    self.deployment = found.unwrap_or_else(|| self.deployment.clone());
                    break;
                }
                Verdict::Wait(until) => until,
            };
            self.note_waiting();
            let until = self.sequence.deadline().map_or(until, |deadline| deadline.min(until));
            tokio::select! {
                changed = deployments.changed() => if changed.is_err() {
                    return Err(self.given_up());
                },
                () = tokio::time::sleep_until(until.into()) => {}
                () = self.front.ending.cancelled() => return Err(self.given_up()),
            }
        }
        let request = self.sequence.request();
        let (chosen, ticket) = self.front.route(self.deployment.clone(), &request);
        (self.deployment, self.ticket) = (chosen, ticket);
        let asked = self.front.replicas.run(&self.deployment, request);
        match tokio::time::timeout(ANSWER_TIME, asked).await {
            Ok(Ok(events)) => {
                self.events = Some(events);
                Ok(())
            }
            Ok(Err(error)) => self.lost(error),
            Err(_) => self.lost(RunError::Unavailable("its scheduler does not answer".into())),
        }
    }

    /// Tells the operator once that a request waits.
    fn note_waiting(&mut self) {
        let Some(waiting) = &mut self.waiting else { return };
        if !std::mem::replace(&mut waiting.has_waited, true) {
            info!(
                trace = self.sequence.trace(),
                model = self.deployment.name,
                epoch = self.deployment.epoch,
                emitted = self.sequence.emitted(),
                reason = waiting.reason,
                "an answer lost its replica; it goes on with the next one"
            );
        }
    }

    fn given_up(&self) -> RunError {
        let (reason, has_waited) = match &self.waiting {
            Some(waiting) => (waiting.reason.as_str(), waiting.has_waited),
            None => ("", false),
        };
        RunError::Unavailable(match has_waited {
            true => format!("{reason}; no replica that could go on with the answer was formed in time"),
            false => reason.to_owned(),
        })
    }
}
