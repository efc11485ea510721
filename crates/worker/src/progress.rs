//! What a shard has done and holds, as counters that any thread may read while it computes.

use crate::message::StageTimes;
use crate::shard::Guesses;
use crate::time_counts::{TimeCounter, TimeCounts};
use mlxnode_compute::{MicroBatch, StageMemory};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Written by the compute thread, read by the statistics of the worker. Numbers of one moment may differ by a step.
#[derive(Debug)]
pub(crate) struct Progress {
    origin: Instant,
    steps: AtomicU64,
    open_sequences: AtomicU64,
    compute_nanos: AtomicU64,
    wait_nanos: AtomicU64,
    send_nanos: AtomicU64,
    sent_bytes: AtomicU64,
    /// What the last message took to the next stage.
    last_send_nanos: AtomicU64,
    prompt_tokens: AtomicU64,
    decode_tokens: AtomicU64,
    guessed_tokens: AtomicU64,
    accepted_tokens: AtomicU64,
    computes: TimeCounter,
    waits: TimeCounter,
    sends: TimeCounter,
    /// Right guesses that went through besides the tokens of rows.
    passed_tokens: AtomicU64,
    active_bytes: AtomicU64,
    peak_bytes: AtomicU64,
    /// Nanoseconds after `origin` at which the step under way began, plus one; 0 when none is.
    step_began: AtomicU64,
}

/// The counters at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ShardStats {
    /// Held by the device now, in bytes.
    pub active_bytes: u64,
    /// Largest value of `active_bytes` so far.
    pub peak_bytes: u64,
    /// Steps computed.
    pub steps: u64,
    /// Sequences that hold memory.
    pub open_sequences: u32,
    /// Total time spent in steps.
    pub compute_time: Duration,
    /// How long the step under way has been running; zero when none is.
    pub step_time: Duration,
    /// Total time that batches waited before they were computed.
    pub wait_time: Duration,
    /// Total time that they took to the next stage.
    pub send_time: Duration,
    /// Tokens of prompts that went through.
    pub prompt_tokens: u64,
    /// Generated tokens that went through.
    pub decode_tokens: u64,
    /// Bytes of the messages to the next stage: the activations and what goes with them.
    pub sent_bytes: u64,
    /// On the last stage: tokens that were guessed ahead, and those of them that were right.
    pub guessed_tokens: u64,
    /// See `guessed_tokens`.
    pub accepted_tokens: u64,
    /// How long steps took, batches waited before theirs, and messages took to the next stage.
    pub computes: TimeCounts,
    /// See `computes`.
    pub waits: TimeCounts,
    /// See `computes`.
    pub sends: TimeCounts,
}

/// A step under way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepUnderWay {
    began: u64,
    waited: Duration,
}

impl Progress {
    pub(crate) fn new() -> Self {
        Self {
            origin: Instant::now(),
            steps: AtomicU64::new(0),
            open_sequences: AtomicU64::new(0),
            compute_nanos: AtomicU64::new(0),
            wait_nanos: AtomicU64::new(0),
            send_nanos: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
            last_send_nanos: AtomicU64::new(0),
            prompt_tokens: AtomicU64::new(0),
            decode_tokens: AtomicU64::new(0),
            guessed_tokens: AtomicU64::new(0),
            accepted_tokens: AtomicU64::new(0),
            computes: TimeCounter::default(),
            waits: TimeCounter::default(),
            sends: TimeCounter::default(),
            passed_tokens: AtomicU64::new(0),
            active_bytes: AtomicU64::new(0),
            peak_bytes: AtomicU64::new(0),
            step_began: AtomicU64::new(0),
        }
    }

    /// A batch is begun that waited for so long.
    pub(crate) fn step_begins(&self, batch: &MicroBatch, waited: Duration) -> StepUnderWay {
        let began = self.now();
        self.step_began.store(began + 1, Relaxed);
        let chunks = batch.rows.iter().filter(|row| row.tokens.len() > 1 || !row.sample);
        let prompt: usize = chunks.map(|row| row.tokens.len()).sum();
        let all: usize = batch.rows.iter().map(|row| row.tokens.len()).sum();
        self.prompt_tokens.fetch_add(prompt as u64, Relaxed);
        self.decode_tokens.fetch_add((all - prompt) as u64, Relaxed);
        StepUnderWay { began, waited }
    }

    /// It is done; what it took.
    pub(crate) fn step_ended(&self, step: StepUnderWay) -> StageTimes {
        self.step_began.store(0, Relaxed);
        let compute = self.now().saturating_sub(step.began);
        self.compute_nanos.fetch_add(compute, Relaxed);
        self.wait_nanos.fetch_add(nanos(step.waited), Relaxed);
        self.steps.fetch_add(1, Relaxed);
        self.computes.add(Duration::from_nanos(compute));
        self.waits.add(step.waited);
        StageTimes {
            compute: Duration::from_nanos(compute),
            wait: step.waited,
            send: Duration::from_nanos(self.last_send_nanos.load(Relaxed)),
        }
    }

    /// A message of so many bytes took so long to the next stage.
    pub(crate) fn sent(&self, bytes: u64, within: Duration) {
        self.sent_bytes.fetch_add(bytes, Relaxed);
        self.last_send_nanos.store(nanos(within), Relaxed);
        self.send_nanos.fetch_add(nanos(within), Relaxed);
        self.sends.add(within);
    }

    /// So many tokens were guessed so far, and those that were right went through as tokens do.
    pub(crate) fn guessed(&self, guesses: Guesses) {
        self.accepted_tokens.store(guesses.right, Relaxed);
        self.guessed_tokens.store(guesses.made, Relaxed);
        self.passed_tokens.store(guesses.passed, Relaxed);
    }

    pub(crate) fn holds(&self, open_sequences: usize, memory: StageMemory) {
        self.open_sequences.store(open_sequences as u64, Relaxed);
        self.active_bytes.store(memory.active.0, Relaxed);
        self.peak_bytes.store(memory.peak.0, Relaxed);
    }

    pub(crate) fn stats(&self) -> ShardStats {
        let began = self.step_began.load(Relaxed);
        let step_nanos = if began == 0 { 0 } else { self.now().saturating_sub(began - 1) };
        ShardStats {
            active_bytes: self.active_bytes.load(Relaxed),
            peak_bytes: self.peak_bytes.load(Relaxed),
            steps: self.steps.load(Relaxed),
            open_sequences: self.open_sequences.load(Relaxed).min(u64::from(u32::MAX)) as u32,
            compute_time: Duration::from_nanos(self.compute_nanos.load(Relaxed)),
            step_time: Duration::from_nanos(step_nanos),
            wait_time: Duration::from_nanos(self.wait_nanos.load(Relaxed)),
            send_time: Duration::from_nanos(self.send_nanos.load(Relaxed)),
            prompt_tokens: self.prompt_tokens.load(Relaxed),
            decode_tokens: self.decode_tokens.load(Relaxed) + self.passed_tokens.load(Relaxed),
            guessed_tokens: self.guessed_tokens.load(Relaxed),
            accepted_tokens: self.accepted_tokens.load(Relaxed),
            computes: self.computes.counts(),
            waits: self.waits.counts(),
            sends: self.sends.counts(),
            sent_bytes: self.sent_bytes.load(Relaxed),
        }
    }

    fn now(&self) -> u64 {
        self.origin.elapsed().as_nanos() as u64
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
