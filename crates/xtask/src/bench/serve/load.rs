//! Many clients at once: a number of them that each ask one thing after the other, or arrivals as of people who do not wait for each
//! other (a Poisson process: an open loop, which does not slow down with the server).

use super::client::{Answer, Line, Question, Server, Times};
use anyhow::{Result, anyhow};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Clients that asked together.
#[derive(Debug, Default)]
pub(super) struct Round {
    pub(super) answers: Vec<Times>,
    /// How soon each refusal came.
    pub(super) refusals: Vec<Duration>,
    /// Clients that hung up at the end.
    pub(super) hung_up: usize,
    pub(super) wall: Duration,
}

impl Round {
    fn add(&mut self, answer: Option<Answer>) {
        match answer {
            Some(Answer::Whole(times)) => self.answers.push(times),
            Some(Answer::Refused(after)) => self.refusals.push(after),
            None => self.hung_up += 1,
        }
    }

    /// Generated tokens per second, over all of it.
    pub(super) fn tokens_per_second(&self, tokens_each: usize) -> f64 {
        (self.answers.len() * tokens_each) as f64 / self.wall.as_secs_f64()
    }

    /// Of the times to the first token, in milliseconds.
    pub(super) fn first_tokens(&self) -> Vec<f64> {
        self.answers.iter().map(|times| millis(times.first())).collect()
    }
}

/// Each of `clients` asks `each` questions, one after the other. `question` gets the number of the question.
pub(super) fn closed(
    server: &Server,
    clients: usize,
    each: usize,
    question: impl Fn(usize) -> Question + Sync,
) -> Result<Round> {
    let start = Instant::now();
    let asked: Vec<Result<Vec<Option<Answer>>>> = std::thread::scope(|scope| {
        let question = &question;
        let client = |client: usize| {
            scope.spawn(move || {
                let questions = (0..each).map(|turn| question(client * each + turn));
                questions.map(|question| server.ask(&question, &Line::default())).collect()
            })
        };
        let threads: Vec<_> = (0..clients).map(client).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("a client panicked"))))
            .collect()
    });
    let mut round = Round { wall: start.elapsed(), ..Round::default() };
    for answers in asked {
        answers?.into_iter().for_each(|answer| round.add(answer));
    }
    Ok(round)
}

/// Clients arrive at `per_second` for `time` and then all hang up who still wait or read.
pub(super) fn open(
    server: &Server,
    per_second: f64,
    time: Duration,
    seed: u64,
    question: impl Fn(usize) -> Question + Sync,
) -> Result<Round> {
    let start = Instant::now();
    let asked: Vec<Result<Option<Answer>>> = std::thread::scope(|scope| {
        let question = &question;
        let (mut threads, mut lines) = (Vec::new(), Vec::new());
        for (number, at) in arrivals(per_second, time, seed).into_iter().enumerate() {
            std::thread::sleep((start + at).saturating_duration_since(Instant::now()));
            let line = Arc::new(Line::default());
            lines.push(line.clone());
            let client = move || server.ask(&question(number), &line);
            // A thread that cannot be started is a client that could not come: the machine of the generator is the limit.
            let builder = std::thread::Builder::new().stack_size(256 << 10);
            threads.push(builder.spawn_scoped(scope, client));
        }
        std::thread::sleep((start + time).saturating_duration_since(Instant::now()));
        lines.iter().for_each(|line| line.hang_up());
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<Option<Answer>>>| {
            thread.join().unwrap_or_else(|_| Err(anyhow!("a client panicked")))
        };
        threads.into_iter().map(|thread| thread.map_err(anyhow::Error::from).and_then(join)).collect()
    });
    let mut round = Round { wall: time, ..Round::default() };
    for answer in asked {
        round.add(answer?);
    }
    Ok(round)
}

/// When the clients of a Poisson process come: the times between them are exponentially distributed.
pub(super) fn arrivals(per_second: f64, time: Duration, seed: u64) -> Vec<Duration> {
    let mut state = seed;
    let mut at = 0.0;
    let mut all = Vec::new();
    loop {
        // SplitMix64 (Steele, Lea, Flood 2014): the same arrivals in every run.
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut bits = state;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        let uniform = ((bits ^ (bits >> 31)) >> 11) as f64 / (1u64 << 53) as f64;
        at -= (1.0 - uniform).ln() / per_second;
        if at >= time.as_secs_f64() {
            return all;
        }
        all.push(Duration::from_secs_f64(at));
    }
}

pub(super) fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The value below which this part of the values lies.
pub(super) fn quantile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = ((sorted.len() as f64 * part).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(place).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_have_the_rate_and_the_spread_of_a_poisson_process() {
        let times = arrivals(50.0, Duration::from_secs(100), 7);
        assert!((4700..5300).contains(&times.len()), "{}", times.len());
        assert_eq!(times, arrivals(50.0, Duration::from_secs(100), 7));
        assert!(times.is_sorted());
        let gaps: Vec<f64> = times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        // An exponential distribution's standard deviation is its mean.
        assert!((variance.sqrt() / mean - 1.0).abs() < 0.1, "{}", variance.sqrt() / mean);
    }

    #[test]
    fn quantiles_are_values_that_were_there() {
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!([0.5, 0.95, 0.99, 1.0].map(|part| quantile(&values, part)), [50.0, 95.0, 99.0, 100.0]);
        assert_eq!(quantile(&[3.0], 0.99), 3.0);
        assert!(quantile(&[], 0.5).is_nan());
    }
}
