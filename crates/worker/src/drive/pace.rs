//! How long the stages take, learnt from the batches that came round, and what follows for the next ones.
//!
//! A stage's time for `n` decoding rows and `p` tokens of prompts is taken as `fixed + row * n + token * p`: reading the weights is the
//! fixed part, which is why a batch costs little more than a row, and why splitting one gains nothing while it dominates. The three
//! numbers are fitted to what was measured, later batches counting more, since caches grow and machines warm up.
//!
//! Two decisions follow. **In how many micro-batches** the decoding rows travel: one keeps only one stage busy at a time, as many as
//! there are stages keep all of them busy but read the weights as often; the number with the most tokens per second wins. **How
//! many tokens of prompts** go along: of long prompts as many as keep a decoding row's time from token to token within twice of what it
//! is without. Short prompts are over soon and hold up nobody for long, while everybody gains by more rows in a batch: they may take
//! several times as much, so that many small requests are not answered slower than their work takes.

use crate::message::StageTimes;

/// How much longer a decoding row may take from token to token because of prompts. Less than the factor of 2 that is promised: the
/// promise is about the slowest steps, and with 1.8 these were 2.1 to 2.5 times as long as the usual ones.
const GROWTH: f64 = 1.6;
/// The same because of short prompts.
const SHORT_GROWTH: f64 = 5.0;
/// A prompt is short when its tokens take less than so many of a decoding row's.
const SHORT: f64 = 16.0;
/// What a batch weighs less than the one after it: about the last fifty count.
const FORGETTING: f64 = 0.98;
/// Another number of micro-batches has to promise that much more.
const WORTH: f64 = 1.08;
/// Points whose variance is this part of their squared mean tell a slope.
const SPREAD: f64 = 0.0025;
/// Batches of one size that are watched before another size is tried, to learn what a row takes.
const BEFORE_TRYING: f64 = 3.5;
/// Tokens of a prompt that go beside decoding rows while nothing is known about what they take.
const FIRST_CHUNK: usize = 32;

/// What is known of the stages.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pace {
    stages: Vec<StagePace>,
    /// Did the batch before have tokens of prompts? A stage that works ahead shows what it took one batch later.
    had_chunk: Option<bool>,
    /// The number of micro-batches that was chosen last.
    chosen: usize,
}

#[derive(Clone, Debug, Default)]
struct StagePace {
    decode: Line,
    /// Seconds for each token of a prompt.
    token: Option<f64>,
}

/// A line through points, by least squares with forgetting.
#[derive(Clone, Debug, Default)]
struct Line {
    weight: f64,
    x: f64,
    y: f64,
    xx: f64,
    xy: f64,
    /// As of when the points last lay far enough apart to tell.
    slope: Option<f64>,
}

/// What a batch is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Load {
    /// Rows that decode.
    pub(crate) rows: usize,
    /// Tokens of prompts.
    pub(crate) tokens: usize,
}

impl Pace {
    /// A batch came round.
    pub(crate) fn observe(&mut self, load: Load, times: &[StageTimes]) {
        let had_chunk = self.had_chunk.replace(load.tokens > 0);
        if self.stages.len() != times.len() {
            self.stages = vec![StagePace::default(); times.len()];
        }
        if had_chunk.is_some_and(|before| before != (load.tokens > 0)) {
            return;
        }
        for (stage, times) in self.stages.iter_mut().zip(times) {
            stage.observe(load, times.compute.as_secs_f64());
        }
    }

    /// In how many micro-batches `rows` decoding rows go, at most `most`.
    pub(crate) fn micro_batches(&mut self, rows: usize, most: usize) -> usize {
        let most = most.min(rows).max(1);
        if most > 1 && self.stages.iter().any(|stage| stage.decode.is_a_riddle()) {
            return 2;
        }
        let now = self.chosen.clamp(1, most);
        let rate = |count: usize| Some(rows as f64 / self.cycle(rows, count)?);
        let mut best = (now, rate(now).unwrap_or(0.0));
        for count in 1..=most {
            if let Some(rate) = rate(count)
                && rate > best.1 * WORTH
            {
                best = (count, rate);
            }
        }
        self.chosen = best.0;
        best.0
    }

    /// Seconds from token to token of `rows` decoding rows in `count` micro-batches: a batch goes through all stages, and the slowest
    /// one works on all of them. None while nothing is known.
    fn cycle(&self, rows: usize, count: usize) -> Option<f64> {
        let share = rows.div_ceil(count.max(1));
        let times = self.decode_times(share)?;
        let slowest = times.iter().copied().fold(0.0, f64::max);
        Some((slowest * count as f64).max(times.iter().sum()))
    }

    /// Seconds of each stage for so many decoding rows.
    fn decode_times(&self, rows: usize) -> Option<Vec<f64>> {
        let times: Option<Vec<f64>> = self.stages.iter().map(|stage| stage.decode.at(rows as f64)).collect();
        times.filter(|times| !times.is_empty())
    }

    /// Where tokens of long prompts go while `decoding` rows travel in `count` micro-batches, and how many.
    pub(crate) fn room(&self, decoding: usize, count: usize) -> Room {
        self.room_within(GROWTH, decoding, count)
    }

    /// The same of short prompts, instead.
    pub(crate) fn short_room(&self, decoding: usize, count: usize) -> Room {
        self.room_within(SHORT_GROWTH, decoding, count)
    }

    /// Up to how many tokens a prompt is short while `decoding` rows travel in `count` micro-batches.
    pub(crate) fn short(&self, decoding: usize, count: usize) -> usize {
        let each: Option<f64> = self.stages.iter().map(|stage| stage.token).sum();
        match (self.cycle(decoding.max(1), count), each) {
            (Some(cycle), Some(each)) if each > 0.0 => (SHORT * cycle / each) as usize,
            (Some(_), Some(_)) => usize::MAX,
            _ => FIRST_CHUNK,
        }
    }

    /// Where tokens of prompts go, and how many, when a decoding row's time from token to token may grow by the factor.
    fn room_within(&self, growth: f64, decoding: usize, count: usize) -> Room {
        let share = decoding.div_ceil(count.max(1)).max(1);
        let tokens: Option<Vec<f64>> = self.stages.iter().map(|stage| stage.token).collect();
        let (Some(cycle), Some(times), Some(tokens)) =
            (self.cycle(decoding.max(1), count), self.decode_times(share), tokens)
        else {
            return Room::Along(FIRST_CHUNK);
        };
        let slowest = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
        let (stages, token, all) = (self.stages.len() as f64, slowest(&tokens), tokens.iter().sum::<f64>());
        if token <= 0.0 {
            return Room::Along(usize::MAX); // they cost nothing that can be measured
        }
        // Every batch takes its own along: it takes them through all stages, and the slowest one meets those of all batches.
        let through = (growth - 1.0) * cycle / all;
        let met = (growth * cycle / count as f64 - slowest(&times)) / token;
        let along = through.min(met).max(0.0);
        // Or they follow a single batch by themselves, in stages that would be idle. In the worst case the batch meets them again
        // where it starts, and then it is behind them in every stage.
        let fixed = self.stages.iter().filter_map(|stage| stage.decode.at(0.0)).fold(0.0, f64::max);
        let behind = match count == 1 && stages > 1.0 {
            true => (((growth * cycle - slowest(&times)) / stages - fixed) / token).max(0.0),
            false => 0.0,
        };
        // What goes along makes every round longer, what follows does so hardly ever.
        match behind > along / growth && behind >= 1.0 {
            true => Room::Behind(behind as usize),
            false => Room::Along((along as usize).max(1)),
        }
    }
}

/// Where tokens of prompts go, and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Room {
    /// In the same batches as the decoding rows.
    Along(usize),
    /// In a batch of their own, right behind the only one with decoding rows.
    Behind(usize),
}

impl StagePace {
    fn observe(&mut self, load: Load, seconds: f64) {
        if load.tokens == 0 {
            self.decode.add(load.rows as f64, seconds);
            return;
        }
        let decode = match (self.decode.at(load.rows as f64), load.rows) {
            (Some(seconds), _) => seconds,
            (None, 0) => 0.0,
            (None, _) => return,
        };
        let each = ((seconds - decode) / load.tokens as f64).max(0.0);
        // Slower is believed at once, faster only bit by bit: the promise is about the worst.
        self.token = Some(match self.token {
            Some(before) if each < before => before + (each - before) * 0.2,
            _ => each,
        });
    }
}

impl Line {
    fn add(&mut self, x: f64, y: f64) {
        for sum in [&mut self.weight, &mut self.x, &mut self.y, &mut self.xx, &mut self.xy] {
            *sum *= FORGETTING;
        }
        self.weight += 1.0;
        self.x += x;
        self.y += y;
        self.xx += x * x;
        self.xy += x * y;
        let (mean_x, mean_y) = (self.x / self.weight, self.y / self.weight);
        let variance = self.xx / self.weight - mean_x * mean_x;
        if variance > SPREAD * mean_x * mean_x {
            self.slope = Some(((self.xy / self.weight - mean_x * mean_y) / variance).max(0.0));
        }
    }

    /// Never falling, and never below zero. None without a point.
    fn at(&self, x: f64) -> Option<f64> {
        if self.weight == 0.0 {
            return None;
        }
        let (mean_x, mean_y) = (self.x / self.weight, self.y / self.weight);
        Some((mean_y + self.slope.unwrap_or(0.0) * (x - mean_x)).max(0.0))
    }

    /// Are there points, but all at about the same place?
    fn is_a_riddle(&self) -> bool {
        self.slope.is_none() && self.weight >= BEFORE_TRYING
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// Stages of this fixed time, time a row and time a token, in milliseconds, after they were watched for a while.
    fn watched(stages: &[(f64, f64, f64)]) -> Pace {
        let mut pace = Pace::default();
        let loads =
            [(1, 0), (2, 0), (4, 0), (8, 0), (8, 0), (8, 64), (8, 64), (4, 32), (8, 0), (8, 0), (16, 0)];
        for (rows, tokens) in loads {
            let times: Vec<StageTimes> = stages
                .iter()
                .map(|(fixed, row, token)| {
                    let millis = fixed + row * f64::from(rows) + token * f64::from(tokens);
                    StageTimes { compute: Duration::from_secs_f64(millis / 1000.0), ..StageTimes::default() }
                })
                .collect();
            pace.observe(Load { rows: rows as usize, tokens: tokens as usize }, &times);
        }
        pace
    }

    #[test]
    fn a_batch_that_reads_weights_is_not_split_and_one_that_computes_is() {
        assert_eq!(watched(&[(10.0, 0.0, 1.0); 4]).micro_batches(16, 5), 1, "only the weights count");
        assert_eq!(watched(&[(0.0, 1.0, 1.0); 4]).micro_batches(16, 5), 4, "only the rows count");
        assert_eq!(watched(&[(0.0, 1.0, 1.0)]).micro_batches(16, 2), 1, "one stage");
        assert_eq!(watched(&[(0.0, 1.0, 1.0); 4]).micro_batches(2, 5), 2, "no more than rows");
        assert_eq!(Pace::default().micro_batches(16, 5), 1, "nothing is known");
        // 4 stages, half of a full batch's time is weights: 16 rows take 16 + 16 in each stage. Whole: 128 for 16 rows; in two: 96;
        // in three (6 rows): 88; in four: 80.
        assert_eq!(watched(&[(16.0, 1.0, 1.0); 4]).micro_batches(16, 5), 4);
    }

    #[test]
    fn what_a_row_takes_is_tried_once() {
        let mut pace = Pace::default();
        let mut observe = |rows: usize| {
            let compute = Duration::from_micros(10_000 + 100 * rows as u64);
            pace.observe(Load { rows, tokens: 0 }, &[StageTimes { compute, ..StageTimes::default() }; 2]);
            pace.micro_batches(12, 3)
        };
        assert_eq!([12; 3].map(&mut observe), [1; 3]);
        assert_eq!([12, 6].map(&mut observe), [2, 1], "now it is known to be not worth it");
        assert_eq!([12; 200].map(&mut observe), [1; 200]);
    }

    #[test]
    fn another_split_must_be_worth_it() {
        let mut pace = watched(&[(0.0, 1.0, 1.0); 3]);
        assert_eq!(pace.micro_batches(12, 4), 3);
        assert_eq!(pace.micro_batches(11, 4), 3, "4 would be no better");
        assert_eq!(pace.micro_batches(1, 4), 1);
    }

    #[test]
    fn prompts_take_as_much_as_the_promise_leaves() {
        let along = |pace: &Pace, count| match pace.room(8, count) {
            Room::Along(tokens) => tokens,
            other => panic!("{other:?}"),
        };
        // One stage: 8 rows take 10 + 8 ms; 0.6 times that is left.
        let tokens = along(&watched(&[(10.0, 1.0, 0.5)]), 1);
        assert!((20..=22).contains(&tokens), "{tokens}");
        // Three stages with all of them in one batch: 18 ms each, 54 ms in all. (1.6 * 54 - 18) / 3 = 22.8 ms, 10 of them for the weights.
        let Room::Behind(tokens) = watched(&[(10.0, 1.0, 0.5); 3]).room(8, 1) else { panic!("idle stages") };
        assert!((24..=26).contains(&tokens), "{tokens}");
        // In three batches no stage is idle: 13 ms each for 3 rows, 0.6 of that for each batch.
        let tokens = along(&watched(&[(10.0, 1.0, 0.5); 3]), 3);
        assert!((14..=16).contains(&tokens), "{tokens}");
        // Nothing fits behind a batch that spends its time in one stage.
        let tokens = along(&watched(&[(1.0, 0.1, 0.05), (10.0, 1.0, 0.5), (1.0, 0.1, 0.05)]), 1);
        assert!((20..=22).contains(&tokens), "{tokens}");
        assert_eq!(Pace::default().room(8, 1), Room::Along(FIRST_CHUNK));
    }

    #[test]
    fn what_a_stage_that_works_ahead_shows_too_late_is_not_counted() {
        let mut pace = watched(&[(10.0, 1.0, 0.5)]);
        let before = pace.room(8, 1);
        let millis =
            |millis| [StageTimes { compute: Duration::from_millis(millis), ..StageTimes::default() }];
        pace.observe(Load { rows: 8, tokens: 100 }, &millis(18)); // the chunk is only queued
        pace.observe(Load { rows: 8, tokens: 100 }, &millis(68));
        pace.observe(Load { rows: 8, tokens: 0 }, &millis(68)); // and shows here
        assert_eq!(pace.room(8, 1), before);
    }
}
