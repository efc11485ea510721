//! The plan of what training takes of memory lies above what MLX's allocator then holds, and not far above. One test, because the allocator's figures
//! are the process's.
#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

mod support;

use bytes::Bytes;
use mlxnode_checkpoint::{Checkpoint, StageMemory, TrainingCost};
use mlxnode_compute::{Activation, Dtype, Job, LayerRange, LinkError, StageLink, StageOrder, Way};
use mlxnode_engine::tuning::Tuning;
use mlxnode_mlx::Device;
use mlxnode_training::{Dataset, FineTuning, Row, Sequence, Sets, StagedFineTuning};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use support::*;

/// The plan is at least so much of what was measured, and at most.
const LEAST: f64 = 1.0;
const MOST: f64 = 1.5;

const TOKENS: usize = 129;
const ROWS: usize = 3;
const WIDTH: usize = 128;
const LAYERS: usize = 6;

fn sets() -> Sets {
    let mut dataset = Dataset::default();
    for index in 0..12 {
        let tokens = row(TOKENS, index);
        dataset.push(
            Row::Single(Sequence { counted: std::iter::once(0..TOKENS as u32).collect(), tokens }),
            2,
            2048,
        );
    }
    Sets { train: Arc::new(dataset), ..Sets::default() }
}

/// Another stage of two that has all that is asked for, and gives zeros.
struct Other {
    stage: usize,
    cut: usize,
    exchanges: usize,
    orders: Vec<StageOrder>,
}

impl StageLink for Other {
    fn stage(&self) -> usize {
        self.stage
    }

    fn stages(&self) -> usize {
        2
    }

    fn lead(&mut self, _: &StageOrder) -> Result<(), LinkError> {
        Ok(())
    }

    fn follow(&mut self) -> Result<StageOrder, LinkError> {
        self.orders.pop().ok_or_else(|| LinkError::Over("no more orders".to_owned()))
    }

    fn send(&mut self, _: Way, _: u64, _: Activation) -> Result<(), LinkError> {
        Ok(())
    }

    fn receive(&mut self, _: Way, _: u64) -> Result<Activation, LinkError> {
        let tokens = ROWS * (TOKENS - 1);
        Ok(Activation::new(tokens, WIDTH, Dtype::F32, Bytes::from(vec![0; 4 * tokens * WIDTH])).unwrap())
    }

    fn exchange(&mut self, numbers: &[f64]) -> Result<Vec<Vec<f64>>, LinkError> {
        self.exchanges += 1;
        let mut other = numbers.to_vec();
        let ranges = [[0, self.cut], [self.cut, LAYERS]];
        match self.exchanges {
            2 => other[8..]
                .iter_mut()
                .zip(ranges[1 - self.stage])
                .for_each(|(number, layer)| *number = layer as f64),
            // All that this one does not have.
            3 => other.iter_mut().for_each(|bits| *bits = ((1_u64 << 48) - 1) as f64 - *bits),
            _ => {}
        }
        Ok(if self.stage == 0 { vec![numbers.to_vec(), other] } else { vec![other, numbers.to_vec()] })
    }

    fn gather(&mut self, _: &Path) -> Result<Vec<PathBuf>, LinkError> {
        Ok(Vec::new())
    }

    fn scatter(&mut self, _: Option<&Path>) -> Result<PathBuf, LinkError> {
        Err(LinkError::Over("nothing to give".to_owned()))
    }
}

/// The most that arrays held while an update was made.
fn peak(job: impl FnOnce() -> Box<dyn Job>) -> u64 {
    let device = Device::open().unwrap();
    device.clear_cache().unwrap();
    let before = device.memory().unwrap().active;
    device.reset_peak_memory().unwrap();
    let mut job = job();
    job.advance().unwrap();
    (device.memory().unwrap().peak - before) as u64
}

#[test]
fn plans_lie_above_what_is_measured_and_not_far() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    let extra = json!({"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "intermediate_size": 256, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32});
    write(&model, &config("llama", extra), 5);
    let checkpoint = Checkpoint::open(&model).unwrap();
    let cost = TrainingCost::of(&checkpoint).unwrap();
    let mut shares = Vec::new();
    for (name, part) in [
        ("lora", ""),
        ("lora, checkpointed", "grad_checkpoint: true\n"),
        ("dora", "fine_tune_type: dora\n"),
        ("full", "fine_tune_type: full\n"),
        ("full, checkpointed", "fine_tune_type: full\ngrad_checkpoint: true\n"),
    ] {
        let yaml = format!(
            "{part}iters: 3\nbatch_size: {ROWS}\ngrad_accumulation_steps: 3\nnum_layers: -1\nmax_seq_length: {TOKENS}\n"
        );
        let config = training(&yaml);
        let demand = config.demand();
        let load = |layers| Tuning::load(&checkpoint, layers, &mut |_, _| {}).unwrap();
        let mut check = |stage: &str, plan: StageMemory, measured: u64| {
            let planned = plan.total() - plan.process;
            let share = planned.0 as f64 / measured as f64;
            println!("{name}, {stage}: {planned} planned, {measured} measured: {share:.2}; {plan:?}");
            shares.push((format!("{name}, {stage}"), share));
        };
        let whole = LayerRange::new(0, LAYERS);
        let measured =
            peak(|| Box::new(FineTuning::new(load(whole), config.clone(), sets(), [1; 32], false).unwrap()));
        check("whole", cost.stages(&demand, &[])[0], measured);
        let cut = 3;
        let plans = cost.stages(&demand, &[cut]);
        for (stage, plan) in plans.into_iter().enumerate() {
            let orders = vec![StageOrder::Update(1..=3)];
            let link = Other { stage, cut, exchanges: 0, orders };
            let measured = peak(|| {
                let tuning = load(plan.layers());
                let folder = folder.path().join("files");
                let made = StagedFineTuning::new(
                    tuning,
                    config.clone(),
                    sets(),
                    [1; 32],
                    false,
                    Box::new(link),
                    &folder,
                );
                Box::new(made.unwrap())
            });
            check(&format!("stage {stage}"), plan, measured);
        }
    }
    for (name, share) in shares {
        assert!((LEAST..MOST).contains(&share), "{name}: the plan is {share:.2} of what was measured");
    }
}
