//! An update of many micro-batches: what it keeps in memory, and what becomes of the group around it.
#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

mod support;

use mlxnode_checkpoint::TensorDtype;
use mlxnode_compute::{Advance, Alone, Deal, Job, Partial, Reduce, ReduceError, Reduced, Turn};
use mlxnode_training::{Dataset, FineTuning, Row, Sequence, Sets};
use serde_json::json;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use support::*;

fn job(model: &Path, yaml: &str) -> FineTuning {
    let mut train = Dataset::default();
    for seed in 0..8 {
        let counted = std::iter::once(1..12).collect();
        train.push(Row::Single(Sequence { tokens: row(12, seed), counted }), 2, 2048);
    }
    let sets = Sets { train: Arc::new(train), ..Sets::default() };
    FineTuning::new(tuning(model), training(yaml), sets, [7; 32], false).unwrap()
}

/// Until nothing comes any more: the most memory that was in use, in bytes.
fn finish(job: &mut FineTuning) -> u64 {
    let mut peak = 0;
    loop {
        match job.advance().unwrap() {
            Advance::Step(report) => peak = report.peak_memory,
            Advance::Finished => return peak,
            _ => {}
        }
    }
}

#[test]
fn gradients_of_many_micro_batches_do_not_pile_up() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &config("llama", json!({"vocab_size": VOCABULARY, "intermediate_size": 2048})), 5);
    let yaml = |micro_batches: u32| {
        format!(
            "fine_tune_type: full\nnum_layers: -1\nbatch_size: 1\niters: {micro_batches}\noptimizer: sgd\n\
             grad_accumulation_steps: {micro_batches}\n"
        )
    };
    // The peak is the process's: the smaller run comes first, and this is the only test here that asks for it.
    let mut few = job(folder.path(), &yaml(2));
    let gradient: usize = few.trainer().parameters().iter().map(|parameter| 4 * parameter.len()).sum();
    let of_few = finish(&mut few);
    drop(few);
    let of_many = finish(&mut job(folder.path(), &yaml(32)));
    // Two leaves wait at most as 1 + 1; thirty-two as 16 + 8 + 4 + 2 + 1 + 1, which are six.
    let more = (of_many - of_few) as f64 / gradient as f64;
    assert!(more < 6.0, "{more} gradients more were kept, of {gradient} bytes");
}

/// One worker, and whether it is gone.
struct Watched {
    alone: Alone,
    is_gone: Arc<AtomicBool>,
}

impl Reduce for Watched {
    fn begin(&mut self, applied: u64) -> Result<Turn, ReduceError> {
        self.alone.begin(applied)
    }

    fn is_over(&self, deal: &Deal) -> bool {
        self.alone.is_over(deal)
    }

    fn reduce(&mut self, deal: &Deal, partials: Vec<Partial>) -> Result<Reduced, ReduceError> {
        self.alone.reduce(deal, partials)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.is_gone.store(true, Ordering::Relaxed);
    }
}

#[test]
fn the_last_gradients_that_go_nowhere_do_not_end_the_group() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &config("llama", json!({})), 5);
    let yaml = "parity: true\nnum_layers: 1\nbatch_size: 2\niters: 3\ngrad_accumulation_steps: 2\n";
    let is_gone = Arc::new(AtomicBool::new(false));
    let group = Watched { alone: Alone::new(2), is_gone: Arc::clone(&is_gone) };
    let mut job = job(folder.path(), yaml).with_group(Box::new(group)).unwrap();
    finish(&mut job);
    assert_eq!((job.iteration(), job.trainer().updates()), (3, 1));
    assert!(!is_gone.load(Ordering::Relaxed), "the others still count on this worker");
    drop(job);
    assert!(is_gone.load(Ordering::Relaxed));
}

/// mlx-lm adds up in the parameters' element type, several workers in single precision.
#[test]
fn halves_are_not_added_up_in_two_ways() {
    let folder = tempfile::tempdir().unwrap();
    write_in(folder.path(), &config("llama", json!({})), 5, TensorDtype::BF16);
    let full = "fine_tune_type: full\nnum_layers: 1\nbatch_size: 2\niters: 2\ngrad_accumulation_steps: 2\n";
    let grouped = |yaml: &str| job(folder.path(), yaml).with_group(Box::new(Alone::new(2)));
    let error = grouped(&format!("parity: true\n{full}")).err().unwrap().to_string();
    assert!(error.contains("bf16") && error.contains("parity"), "{error}");
    // Ours adds up in single precision in either case, and so does mlx-lm an adapter, whose numbers are single.
    let lora = "parity: true\nnum_layers: 1\nbatch_size: 2\niters: 2\ngrad_accumulation_steps: 2\n";
    for yaml in [full, lora] {
        let (mut one, mut other) = (job(folder.path(), yaml), grouped(yaml).unwrap());
        finish(&mut one);
        finish(&mut other);
        let bytes = |job: &FineTuning| {
            job.trainer().parameters().iter().flat_map(|array| array.to_bytes().unwrap()).collect::<Vec<u8>>()
        };
        assert!(bytes(&one) == bytes(&other), "{yaml}");
    }
}
