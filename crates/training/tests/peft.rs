//! Losses and gradients of adapters are those of PEFT and torch on transformers' models: a judge that shares no code with MLX.
//!
//! Their answers are kept in `golden/`, whose regenerate.py says how they were made; asking anew takes 3 GB of packages.
#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

mod support;

use mlxnode_mlx::{Array, Device, TensorFile};
use mlxnode_training::parameters::{self, Beginning};
use mlxnode_training::trainer::{Trainer, TrainerOptions};
use mlxnode_training::{BatchRow, MicroBatch};
use serde_json::Value;
use std::path::Path;
use support::*;

/// Of the largest number of a gradient: both sides compute in single precision, in another order.
const TOLERANCE: f32 = 1e-4;

fn micro_batch(rows: &[Value]) -> MicroBatch {
    let rows: Vec<BatchRow> = (0..)
        .zip(rows)
        .map(|(number, row)| {
            let numbers = |value: &Value| -> Vec<u32> {
                value.as_array().unwrap().iter().map(|number| number.as_u64().unwrap() as u32).collect()
            };
            let (tokens, counted) = (numbers(&row["ids"]), numbers(&row["counted"]));
            let counted = std::iter::once(counted[0]..counted[1]).collect();
            let segments = vec![tokens.len() as u32];
            BatchRow { tokens, counted, segments, numbers: vec![number] }
        })
        .collect();
    let width = rows.iter().map(|row| row.tokens.len()).max().unwrap();
    MicroBatch { rows, width, is_preference: false }
}

fn check(device: &Device, name: &str) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let case: Value = serde_json::from_slice(&std::fs::read(folder.join("case.json")).unwrap()).unwrap();
    let mut file = TensorFile::open(device, &folder.join("adapter.safetensors")).unwrap();
    let names: Vec<String> = file.names().map(str::to_owned).collect();
    // What PEFT changed, as a list of paths within a block.
    let mut keys: Vec<&str> = names
        .iter()
        .filter_map(|name| name.strip_prefix("p.model.layers.0.")?.rsplit_once('.').map(|(path, _)| path))
        .collect();
    keys.sort_unstable();
    keys.dedup();
    let config = training(&format!(
        "fine_tune_type: {}\nnum_layers: -1\nlora_parameters: {{rank: {}, scale: {}, dropout: 0.0, keys: [{}]}}\n",
        case["kind"].as_str().unwrap(),
        case["rank"],
        case["scale"],
        keys.join(", ")
    ));
    let tuning = tuning(&folder.join("model"));
    let plan = parameters::plan(&tuning, &config).unwrap();
    let tuner = tuning.tune(plan).unwrap();
    assert_eq!(2 * tuner.trained().len(), names.len(), "{name}: what is trained");
    let mut taken = |kind: &str| -> Vec<Array> {
        let trained = tuner.trained().iter();
        trained.map(|trained| file.take(&format!("{kind}.{}", trained.stored)).unwrap()).collect()
    };
    let (arrays, expected) = (taken("p"), taken("g"));
    let batch = micro_batch(case["rows"].as_array().unwrap());
    let loss = case["loss"].as_f64().unwrap();
    for (checkpointed, compile) in [(false, false), (true, false), (false, true)] {
        let tuner = tuner.clone();
        let tuner = if checkpointed { tuner.with_checkpointing().unwrap() } else { tuner };
        let options = TrainerOptions {
            optimizer: config.optimizer,
            clip: None,
            parity: false,
            preference: None,
            seed: 0,
            compile,
        };
        let beginning = Beginning { arrays: arrays.clone(), reference: Vec::new() };
        let mut trainer = Trainer::new(tuner.clone(), beginning, options).unwrap();
        let made = trainer.gradients(&batch, 1).unwrap();
        assert!((made.loss - loss).abs() < 1e-5 * loss, "{name}: loss {} and {loss}", made.loss);
        for ((trained, ours), theirs) in tuner.trained().iter().zip(&made.gradients).zip(&expected) {
            assert_eq!(ours.shape(), theirs.shape(), "{name}: {}", trained.name);
            let theirs = numbers(device, theirs);
            assert!(theirs.iter().any(|number| *number != 0.0), "{name}: {} learns nothing", trained.name);
            let apart = distance(&numbers(device, ours), &theirs);
            assert!(apart < TOLERANCE, "{name}: gradient of {} is {apart} away", trained.name);
        }
    }
}

#[test]
fn gradients_are_those_of_peft_and_torch() {
    let device = Device::open().unwrap();
    for name in ["llama", "llama-dora", "qwen3_moe"] {
        check(&device, name);
    }
}
