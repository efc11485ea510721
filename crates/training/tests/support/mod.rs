//! Tiny models of any family, and mlx-lm's answers on training them.
#![allow(dead_code, unreachable_pub)] // each test binary uses its part
#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

use mlxnode_checkpoint::{
    Checkpoint, Config, QuantMode, QuantSetting, SafetensorsWriter, TensorDtype, architectures,
};
use mlxnode_compute::LayerRange;
use mlxnode_engine::tuning::Tuning;
use mlxnode_mlx::{Array, Device};
use mlxnode_training::{BatchRow, MicroBatch, TrainingConfig};
use serde_json::{Value, json};
use std::path::Path;

pub mod exchange;
pub mod line;

pub const VOCABULARY: usize = 300;

/// A config with what all families need, and `extra`.
pub fn config(model_type: &str, extra: Value) -> Value {
    let mut config = json!({"model_type": model_type, "hidden_size": 64, "num_hidden_layers": 3,
        "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "rms_norm_eps": 1e-5, "vocab_size": VOCABULARY, "max_position_embeddings": 512, "rope_theta": 10000.0,
        "tie_word_embeddings": false});
    for (key, value) in extra.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

/// The parity suite's config of a family, with this vocabulary.
pub fn parity_config(model_type: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../parity/cases/{model_type}.json"));
    let cases: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let mut config = cases["base"].clone();
    let config_of_text =
        if config["text_config"].is_object() { &mut config["text_config"] } else { &mut config };
    config_of_text["vocab_size"] = VOCABULARY.into();
    config
}

/// Writes a model; the same one for the same seed.
pub fn write(folder: &Path, config: &Value, seed: u64) {
    write_in(folder, config, seed, TensorDtype::F32);
}

/// The same in F32 or BF16.
pub fn write_in(folder: &Path, config: &Value, seed: u64, dtype: TensorDtype) {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let spec = architectures::spec(&Config::from_json(config.to_string().as_bytes()).unwrap()).unwrap();
    let mut writer = SafetensorsWriter::new();
    for module in spec.modules(LayerRange::new(0, spec.layer_count())) {
        // Families of which there are packed models only.
        let is_packed = spec.turned.contains_key(&module.path);
        let bits = config["quantization"]["bits"].as_u64().unwrap_or_default() as usize;
        let setting = is_packed.then_some(QuantSetting { bits, group_size: 128, mode: QuantMode::Affine });
        for tensor in module.tensors(setting).unwrap() {
            let count: usize = tensor.shape.iter().product();
            let mut state =
                tensor.name.bytes().fold(seed + 7, |state, byte| state.wrapping_mul(31) + u64::from(byte));
            if is_packed && tensor.name.ends_with(".weight") {
                let words = (0..count).flat_map(|_| {
                    state =
                        state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    ((state >> 32) as u32).to_le_bytes()
                });
                writer.add(&tensor.name, TensorDtype::U32, &tensor.shape, words.collect()).unwrap();
                continue;
            }
            let is_vector = tensor.shape.len() < 2;
            let scale =
                if is_vector { 0.2 } else { 1.5 / (tensor.shape[tensor.shape.len() - 1] as f32).sqrt() };
            let offset = if is_vector { 1.0 } else { 0.0 };
            let mut bytes = Vec::with_capacity(4 * count);
            for _ in 0..count {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let unit = (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0;
                // By which inputs are turned.
                let is_sign = tensor.name.ends_with(".signs");
                let value = if is_sign { unit.signum() } else { offset + scale * unit }.to_le_bytes();
                bytes.extend(if dtype == TensorDtype::F32 { &value[..] } else { &value[2..] });
            }
            writer.add(&tensor.name, dtype, &tensor.shape, bytes).unwrap();
        }
    }
    writer.write(&folder.join("model.safetensors")).unwrap();
}

/// All layers of a model.
pub fn tuning(folder: &Path) -> Tuning {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let layers = LayerRange::new(0, checkpoint.spec().layer_count());
    Tuning::load(&checkpoint, layers, &mut |_, _| {}).unwrap()
}

/// Asks mlx-lm.
pub fn ask(folder: &Path, cases: &[Value]) -> Vec<Value> {
    let request = folder.join("request.json");
    std::fs::write(&request, json!({ "cases": cases }).to_string()).unwrap();
    let answer: Value = mlxnode_testkit::oracle::run("training.py", &[request.to_str().unwrap()]).unwrap();
    answer["cases"].as_array().unwrap().clone()
}

/// Token ids of a row, the same for the same seed.
pub fn row(length: usize, seed: u64) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) + 1;
    (0..length)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % VOCABULARY as u64) as u32
        })
        .collect()
}

/// Rows as mlx-lm would put them together, its slip included: of each the offset from which on targets count.
pub fn batch(rows: &[(Vec<u32>, u32)], width: usize) -> MicroBatch {
    let rows = rows.iter().enumerate().map(|(number, (tokens, offset))| {
        let length = tokens.len() as u32;
        BatchRow {
            tokens: tokens.clone(),
            counted: std::iter::once((*offset).max(1)..(length + 1).min(width as u32)).collect(),
            segments: vec![length],
            numbers: vec![number as u32],
        }
    });
    MicroBatch { rows: rows.collect(), width, is_preference: false }
}

/// The rows filled up, as mlx-lm gets them.
pub fn padded(batch: &MicroBatch) -> Vec<Vec<i32>> {
    batch.ids().chunks(batch.width).map(<[i32]>::to_vec).collect()
}

/// A configuration out of YAML.
pub fn training(yaml: &str) -> TrainingConfig {
    TrainingConfig::from_yaml(&format!("train: true\n{yaml}"), "test.yaml").unwrap()
}

pub fn numbers(device: &Device, array: &Array) -> Vec<f32> {
    device.contiguous(array).unwrap().to_f32().unwrap()
}

/// How far apart they are, against the largest of the second.
pub fn distance(one: &[f32], other: &[f32]) -> f32 {
    assert_eq!(one.len(), other.len());
    let largest = other.iter().fold(1e-12_f32, |most, value| most.max(value.abs()));
    one.iter().zip(other).map(|(one, other)| (one - other).abs() / largest).fold(0.0, f32::max)
}
