//! Whether a request has a chance, before anything is done for it.
//!
//! Under overload most requests are refused, so a refusal has to be cheap: it comes before the prompt is tokenized. What is known here is
//! what this front has under way and what replicas answered; from the measured speed of prompts it follows when it is worth trying again.
//! [`Admission`] is plain: events and `now` in, a verdict out.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Requests of one model that this front takes before their first step, those being tokenized included.
const MAX_WAITING: usize = 512;
/// Nobody waits longer than this for a first token; so much of prompts may wait.
const MAX_WAIT: Duration = Duration::from_secs(60);
/// The longest and the shortest that a client is told to wait.
const LONGEST_RETRY: Duration = MAX_WAIT;
const SHORTEST_RETRY: Duration = Duration::from_secs(1);
/// After a replica refused, others are refused here for this long, then one is let through to see.
const REFUSES_FOR: Duration = Duration::from_millis(100);
/// Weight of a new measurement.
const NEWEST: f64 = 0.2;

/// What waits, by deployment.
#[derive(Debug, Default)]
pub struct Admission {
    by_model: HashMap<String, Load>,
}

#[derive(Debug, Default)]
struct Load {
    /// Requests that are being prepared and sequences before their first step.
    waiting: usize,
    /// Tokens of their prompts, as far as they are submitted.
    waiting_tokens: usize,
    /// Tokens of prompts per second that go through, smoothed; none before the first measurement.
    speed: Option<f64>,
    refuses_until: Option<Instant>,
}

impl Load {
    /// How long so many tokens of prompts take.
    fn time_for(&self, tokens: f64) -> Option<Duration> {
        let seconds = tokens / self.speed.filter(|speed| *speed > 0.0)?;
        Duration::try_from_secs_f64(seconds).ok()
    }
}

fn smooth(value: &mut Option<f64>, newest: f64) {
    *value = Some(value.map_or(newest, |old| old + NEWEST * (newest - old)));
}

impl Admission {
    /// A request arrives.
    ///
    /// # Errors
    /// How long to wait before the next try.
    pub fn arrives(&mut self, model: &str, now: Instant) -> Result<(), Duration> {
        if !self.by_model.contains_key(model) {
            self.by_model.insert(model.to_owned(), Load::default());
        }
        let Some(load) = self.by_model.get_mut(model) else { return Ok(()) };
        let time = load.time_for(load.waiting_tokens as f64).unwrap_or_default();
        let is_refusing = load.refuses_until.is_some_and(|until| now < until);
        if is_refusing || load.waiting >= MAX_WAITING || time > MAX_WAIT {
            return Err(time.clamp(SHORTEST_RETRY, LONGEST_RETRY));
        }
        load.waiting += 1;
        Ok(())
    }

    /// A sequence with so many tokens of prompt is submitted for a request that arrived; one request may have several.
    pub fn joins(&mut self, model: &str, tokens: usize) {
        if !self.by_model.contains_key(model) {
            self.by_model.insert(model.to_owned(), Load::default());
        }
        if let Some(load) = self.by_model.get_mut(model) {
            load.waiting += 1;
            load.waiting_tokens += tokens;
        }
    }

    /// It does not wait any more: it is prepared (no tokens), its first step begins, or it is gone.
    pub fn leaves(&mut self, model: &str, tokens: usize) {
        if let Some(load) = self.by_model.get_mut(model) {
            load.waiting = load.waiting.saturating_sub(1);
            load.waiting_tokens = load.waiting_tokens.saturating_sub(tokens);
        }
    }

    /// So many tokens of a prompt took so long, from the first step to the first token.
    pub fn measured(&mut self, model: &str, tokens: usize, took: Duration) {
        let seconds = took.as_secs_f64();
        if let Some(load) = self.by_model.get_mut(model)
            && tokens > 0
            && seconds > 0.0
        {
            smooth(&mut load.speed, tokens as f64 / seconds);
        }
    }

    /// The replica refused, because prompts of so many tokens wait there, of this and of other fronts. Answers how long they take.
    pub fn refused(&mut self, model: &str, tokens: usize, now: Instant) -> Duration {
        let Some(load) = self.by_model.get_mut(model) else { return SHORTEST_RETRY };
        load.refuses_until = Some(now + REFUSES_FOR);
        load.time_for(tokens as f64).unwrap_or_default().clamp(SHORTEST_RETRY, LONGEST_RETRY)
    }

    /// Forgets deployments that are gone and for which nothing waits.
    pub fn retain(&mut self, is_there: impl Fn(&str) -> bool) {
        self.by_model.retain(|model, load| load.waiting > 0 || is_there(model));
    }
}

/// [`Admission`] for many requests at a time. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Door {
    admission: Arc<Mutex<Admission>>,
}

impl Door {
    pub(super) fn with<T>(&self, work: impl FnOnce(&mut Admission) -> T) -> T {
        work(&mut self.admission.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The place of a request while it is prepared.
    pub(super) fn enter(&self, model: &str, now: Instant) -> Result<Place, Duration> {
        self.with(|admission| admission.arrives(model, now))?;
        Ok(self.place(model, 0))
    }

    /// The place of a sequence until its first step.
    pub(super) fn join(&self, model: &str, tokens: usize) -> Place {
        self.with(|admission| admission.joins(model, tokens));
        self.place(model, tokens)
    }

    fn place(&self, model: &str, tokens: usize) -> Place {
        Place { door: self.clone(), model: model.to_owned(), tokens, waits: true }
    }
}

/// A place among those that wait. Dropping it gives it back.
#[derive(Debug)]
pub(super) struct Place {
    door: Door,
    model: String,
    tokens: usize,
    waits: bool,
}

impl Place {
    pub(super) fn model(&self) -> &str {
        &self.model
    }

    /// The first step begins.
    pub(super) fn started(&mut self) {
        if std::mem::take(&mut self.waits) {
            self.door.with(|admission| admission.leaves(&self.model, self.tokens));
        }
    }

    /// The first token came so long after the first step, and so many tokens of the prompt needed no work.
    pub(super) fn measured(&self, cached_tokens: usize, took: Duration) {
        let tokens = self.tokens.saturating_sub(cached_tokens);
        self.door.with(|admission| admission.measured(&self.model, tokens, took));
    }

    /// The replica's queue is full.
    pub(super) fn refused(&self, tokens: usize, now: Instant) -> Duration {
        self.door.with(|admission| admission.refused(&self.model, tokens, now))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.started();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn a_client_is_told_how_long_what_waits_will_take() {
        let mut admission = Admission::default();
        let now = Instant::now();
        // 1000 tokens a second.
        admission.arrives("m", now).unwrap();
        admission.joins("m", 500);
        admission.measured("m", 500, seconds(0.5));
        assert_eq!(admission.refused("m", 10_000, now), seconds(10.0));
        assert_eq!(admission.refused("m", 0, now), SHORTEST_RETRY);
        assert_eq!(admission.refused("m", 100_000_000, now), LONGEST_RETRY);
        // Nothing is known about a model that nobody asked.
        assert_eq!(admission.refused("other", 20, now), SHORTEST_RETRY);
    }

    #[test]
    fn after_a_refusal_others_are_refused_without_work_for_a_moment() {
        let mut admission = Admission::default();
        let now = Instant::now();
        admission.arrives("m", now).unwrap();
        admission.refused("m", 9, now);
        assert_eq!(admission.arrives("m", now + REFUSES_FOR / 2), Err(SHORTEST_RETRY));
        assert_eq!(admission.arrives("other", now + REFUSES_FOR / 2), Ok(()));
        assert_eq!(admission.arrives("m", now + REFUSES_FOR), Ok(()));
    }

    #[test]
    fn prompts_wait_for_a_minute_at_most() {
        let mut admission = Admission::default();
        let now = Instant::now();
        admission.arrives("m", now).unwrap();
        admission.joins("m", 100);
        admission.measured("m", 100, seconds(1.0));
        // One enormous prompt is taken, whatever it takes; nobody waits behind it.
        admission.arrives("m", now).unwrap();
        admission.joins("m", 100_000);
        assert_eq!(admission.arrives("m", now), Err(LONGEST_RETRY));
        admission.leaves("m", 100_000);
        assert_eq!(admission.arrives("m", now), Ok(()));
    }

    #[test]
    fn places_are_bounded_and_given_back() {
        let door = Door::default();
        let now = Instant::now();
        let mut places: Vec<Place> = (0..MAX_WAITING).map(|_| door.enter("m", now).unwrap()).collect();
        assert!(door.enter("m", now).is_err());
        places[0].started();
        places.push(door.join("m", 9));
        assert!(door.enter("m", now).is_err());
        places[1].started();
        let one_more = door.enter("m", now);
        assert!(one_more.is_ok());
        assert!(door.enter("m", now).is_err());
        drop((places, one_more));
        door.with(|admission| {
            assert_eq!((admission.by_model["m"].waiting, admission.by_model["m"].waiting_tokens), (0, 0));
            admission.retain(|_| false);
            assert!(admission.by_model.is_empty());
        });
    }
}
