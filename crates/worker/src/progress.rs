//! What a shard has done and holds, as counters that any thread may read while it computes.

use mlxnode_compute::StageMemory;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Written by the compute thread, read by the statistics of the worker. Numbers of one moment may differ by a step.
#[derive(Debug)]
pub(crate) struct Progress {
    origin: Instant,
    steps: AtomicU64,
    open_sequences: AtomicU64,
    compute_nanos: AtomicU64,
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
}

impl Progress {
    pub(crate) fn new() -> Self {
        Self {
            origin: Instant::now(),
            steps: AtomicU64::new(0),
            open_sequences: AtomicU64::new(0),
            compute_nanos: AtomicU64::new(0),
            active_bytes: AtomicU64::new(0),
            peak_bytes: AtomicU64::new(0),
            step_began: AtomicU64::new(0),
        }
    }

    pub(crate) fn step_begins(&self) {
        self.step_began.store(self.now() + 1, Relaxed);
    }

    pub(crate) fn step_ended(&self) {
        let began = self.step_began.swap(0, Relaxed).saturating_sub(1);
        self.compute_nanos.fetch_add(self.now().saturating_sub(began), Relaxed);
        self.steps.fetch_add(1, Relaxed);
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
        }
    }

    fn now(&self) -> u64 {
        self.origin.elapsed().as_nanos() as u64
    }
}
