//! A model cut in two: the gradients of both parts are those of the whole, and only hidden vectors and their gradients travel.
#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

mod support;

use mlxnode_checkpoint::Checkpoint;
use mlxnode_compute::LayerRange;
use mlxnode_engine::tuning::{Tuner, Tuning};
use mlxnode_mlx::{Array, Device, Gradient};
use mlxnode_training::loss::{Precision, masked_sum};
use mlxnode_training::parameters;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;
use support::*;

const COLUMNS: i32 = 12;
const ROWS: i32 = 3;

/// A layer range with changes that are not zero.
fn part(model: &Path, layers: LayerRange, checkpointing: bool) -> (Tuner, Vec<Array>) {
    let checkpoint = Checkpoint::open(model).unwrap();
    let tuning = Tuning::load(&checkpoint, layers, &mut |_, _| {}).unwrap();
    let config = training("num_layers: -1\nlora_parameters: {rank: 4, scale: 10.0, dropout: 0.0}\n");
    let plan = parameters::plan(&tuning, &config).unwrap();
    let tuner = tuning.tune(plan).unwrap();
    let tuner = if checkpointing { tuner.with_checkpointing().unwrap() } else { tuner };
    let arrays = tuner.trained().iter().map(|trained| {
        let shape: Vec<i32> = trained.shape.iter().map(|size| *size as i32).collect();
        let count: i32 = shape.iter().product();
        let seed =
            trained.name.bytes().fold(0_u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(u32::from(byte)));
        let values: Vec<f32> =
            (0..count).map(|index| ((index as f32 + (seed % 97) as f32) * 0.7).sin() * 0.1).collect();
        Array::from_f32(&values, &shape).unwrap()
    });
    let arrays = arrays.collect();
    (tuner, arrays)
}

/// The loss behind the last layers as a function of what is trained and what comes in.
fn end(tuner: &Tuner, differentiated: usize) -> Gradient {
    let (tuner, count) = (tuner.clone(), tuner.trained().len());
    Gradient::new(differentiated, move |device, inputs| {
        let (trained, rest) = inputs.split_at(count);
        let [input, targets, mask] = rest else { panic!("a batch has three parts") };
        let logits = tuner.logits(trained, input, &[COLUMNS; ROWS as usize], None, None)?;
        Ok(vec![masked_sum(device, &logits, targets, mask, Precision::Single)?])
    })
    .unwrap()
}

#[test]
fn two_stages_have_the_gradients_of_the_whole() {
    let folder = tempfile::tempdir().unwrap();
    let device = Device::open().unwrap();
    let tokens = COLUMNS * ROWS;
    let ids = Array::from_u32(&row(tokens as usize, 4), &[1, tokens]).unwrap();
    let targets = Array::from_u32(&row(tokens as usize, 5), &[tokens]).unwrap();
    let mask: Vec<f32> = (0..tokens).map(|token| f32::from(u8::from(token % 5 != 0))).collect();
    let mask = Array::from_f32(&mask, &[tokens]).unwrap();
    let moe = json!({"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [],
        "decoder_sparse_step": 1, "norm_topk_prob": true});
    for (name, family) in [("llama", config("llama", json!({}))), ("qwen3_moe", config("qwen3_moe", moe))] {
        let model = folder.path().join(name);
        write(&model, &family, 3);
        let (whole, arrays) = part(&model, LayerRange::new(0, 3), false);
        let inputs: Vec<&Array> = arrays.iter().chain([&ids, &targets, &mask]).collect();
        let (value, gradients) = end(&whole, arrays.len()).apply(&inputs).unwrap();
        let names = whole.trained().iter().map(|trained| trained.name.clone());
        let expected: BTreeMap<String, Vec<f32>> =
            names.zip(gradients.iter().map(|gradient| numbers(&device, gradient))).collect();
        for checkpointing in [false, true] {
            let lengths = [COLUMNS; ROWS as usize];
            let (first, of_first) = part(&model, LayerRange::new(0, 2), checkpointing);
            let (last, of_last) = part(&model, LayerRange::new(2, 3), checkpointing);
            let trained: Vec<&Array> = of_first.iter().collect();
            let hidden = first.forward(&trained, &ids, &lengths, None).unwrap();
            hidden.eval().unwrap();
            let inputs: Vec<&Array> = of_last.iter().chain([&hidden, &targets, &mask]).collect();
            let (loss, mut behind) = end(&last, of_last.len() + 1).apply(&inputs).unwrap();
            let cotangent = behind.pop().unwrap();
            let before = first.backward(&trained, &ids, &lengths, None, &cotangent, true).unwrap();
            assert!(before.input.is_none(), "ids have no gradient");
            let (loss, value) = (numbers(&device, &loss[0])[0], numbers(&device, &value[0])[0]);
            assert!((loss - value).abs() < 1e-4 * value.abs(), "{name}: {loss} and {value}");
            let mut seen = 0;
            let parts = [(&first, &before.trained), (&last, &behind)];
            for (tuner, gradients) in parts {
                for (trained, gradient) in tuner.trained().iter().zip(gradients) {
                    let apart = distance(&numbers(&device, gradient), &expected[&trained.name]);
                    assert!(apart < 2e-4, "{name}: {} is {apart} away", trained.name);
                    seen += 1;
                }
            }
            assert_eq!(seen, expected.len(), "{name}");
            // A stage in the middle gives the gradient of what came in, too.
            let (middle, of_middle) = part(&model, LayerRange::new(1, 2), checkpointing);
            let trained: Vec<&Array> = of_middle.iter().collect();
            let made = middle.backward(&trained, &hidden, &lengths, None, &cotangent, true).unwrap();
            assert_eq!(made.input.unwrap().shape(), hidden.shape());
        }
    }
}
