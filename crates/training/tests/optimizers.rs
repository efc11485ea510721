//! Optimizers do what those of mlx do.
#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

mod support;

use mlxnode_mlx::{Array, Device, Dtype, TensorFile};
use mlxnode_training::OptimizerConfig;
use mlxnode_training::optimizer::{Optimizer, Pace};
use serde_json::{Value, json};
use support::*;

const STEPS: u64 = 20;
const RATE: f32 = 0.003;

/// mlx's class and arguments, and ours.
fn optimizers() -> Vec<(&'static str, Value, OptimizerConfig)> {
    let betas = (0.9, 0.999);
    let adam = |bias_correction| OptimizerConfig::Adam { betas, eps: 1e-8, bias_correction };
    let adamw =
        |bias_correction| OptimizerConfig::AdamW { betas, eps: 1e-8, weight_decay: 0.1, bias_correction };
    let sgd = |momentum, weight_decay, dampening, nesterov| OptimizerConfig::Sgd {
        momentum,
        weight_decay,
        dampening,
        nesterov,
    };
    let muon = |nesterov, weight_decay| OptimizerConfig::Muon {
        momentum: 0.95,
        weight_decay,
        nesterov,
        ns_steps: 5,
    };
    let adafactor = |beta_1, relative_step, warmup_init, weight_decay| OptimizerConfig::Adafactor {
        eps: (1e-30, 1e-3),
        clip_threshold: 1.0,
        decay_rate: -0.8,
        beta_1,
        weight_decay,
        scale_parameter: true,
        relative_step,
        warmup_init,
    };
    vec![
        ("Adam", json!({}), adam(false)),
        ("Adam", json!({"bias_correction": true}), adam(true)),
        ("AdamW", json!({"weight_decay": 0.1}), adamw(false)),
        ("AdamW", json!({"weight_decay": 0.1, "bias_correction": true}), adamw(true)),
        ("SGD", json!({}), sgd(0.0, 0.0, 0.0, false)),
        ("SGD", json!({"momentum": 0.9, "weight_decay": 0.1, "dampening": 0.3}), sgd(0.9, 0.1, 0.3, false)),
        ("SGD", json!({"momentum": 0.9, "nesterov": true}), sgd(0.9, 0.0, 0.0, true)),
        ("Muon", json!({}), muon(true, 0.01)),
        ("Muon", json!({"nesterov": false, "weight_decay": 0.0}), muon(false, 0.0)),
        ("Adafactor", json!({}), adafactor(None, true, false, 0.0)),
        (
            "Adafactor",
            json!({"beta_1": 0.9, "weight_decay": 0.1, "warmup_init": true}),
            adafactor(Some(0.9), true, true, 0.1),
        ),
        ("Adafactor", json!({"relative_step": false}), adafactor(None, false, false, 0.0)),
    ]
}

#[test]
fn twenty_steps_are_those_of_mlx() {
    let folder = tempfile::tempdir().unwrap();
    let shapes = json!([[12, 5], [4, 9], [7], [3, 4, 6]]);
    let file = |index: usize| folder.path().join(format!("{index}.safetensors"));
    let requests = optimizers().into_iter().enumerate().map(|(index, (name, arguments, _))| {
        json!({"kind": "optimizer", "name": name, "arguments": arguments, "rate": RATE, "steps": STEPS,
            "shapes": shapes, "seed": index, "file": file(index)})
    });
    ask(folder.path(), &requests.collect::<Vec<_>>());
    let device = Device::open().unwrap();
    let number = |value: f32| Array::scalar(value, Dtype::F32).unwrap();
    for (index, (name, arguments, config)) in optimizers().into_iter().enumerate() {
        let optimizer = Optimizer::new(config);
        let mut tensors = TensorFile::open(&device, &file(index)).unwrap();
        for parameter in 0..shapes.as_array().unwrap().len() {
            let mut value = tensors.take(&format!("p.0.{parameter}")).unwrap();
            let mut memories: Vec<Array> = optimizer
                .memories(value.shape())
                .iter()
                .map(|memory| device.zeros(&memory.shape, Dtype::F32).unwrap())
                .collect();
            for step in 0..STEPS {
                let gradient = tensors.take(&format!("g.{step}.{parameter}")).unwrap();
                let pace = Pace { rate: &number(RATE), step: &number(step as f32 + 1.0) };
                (value, memories) = optimizer.update(&device, &gradient, &value, &memories, pace).unwrap();
                let expected = tensors.take(&format!("p.{}.{parameter}", step + 1)).unwrap();
                let apart = distance(&numbers(&device, &value), &numbers(&device, &expected));
                assert!(
                    apart < 2e-6,
                    "{name} {arguments}: parameter {parameter} is {apart} away at step {step}"
                );
            }
        }
    }
}
