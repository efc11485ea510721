//! Losses and gradients are mlx-lm's, on the same batch with the same adapter.
#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

mod support;

use mlxnode_mlx::{Device, TensorFile};
use mlxnode_training::parameters::{self, Beginning};
use mlxnode_training::trainer::{Trainer, TrainerOptions};
use serde_json::{Value, json};
use std::path::Path;
use support::*;

struct Case {
    name: &'static str,
    config: Value,
    quantize: Option<Value>,
    kind: &'static str,
    layers: i64,
    parameters: Value,
    checkpoint: bool,
    /// How far gradients may be apart, against the largest of the tensor.
    tolerance: f32,
    /// The order in which mlx-lm draws first values is known.
    has_order: bool,
}

impl Case {
    fn in_any_order(self) -> Self {
        Self { has_order: false, ..self }
    }
}

fn cases() -> Vec<Case> {
    let low_rank = json!({"rank": 4, "scale": 10.0, "dropout": 0.0});
    let moe = json!({"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [],
        "decoder_sparse_step": 1, "norm_topk_prob": true});
    let keyed = |keys: &[&str]| json!({"rank": 4, "scale": 10.0, "dropout": 0.0, "keys": keys});
    let affine = |bits: u32| Some(json!({"group_size": 32, "bits": bits}));
    let case = |name, config, quantize, kind, layers, parameters: &Value, checkpoint| Case {
        name,
        config,
        quantize,
        kind,
        layers,
        parameters: parameters.clone(),
        checkpoint,
        tolerance: 2e-4,
        has_order: true,
    };
    let llama = || config("llama", json!({}));
    let qwen3 = || config("qwen3", json!({"tie_word_embeddings": true}));
    let experts = || config("qwen3_moe", moe.clone());
    let gemma3 = config(
        "gemma3_text",
        json!({"query_pre_attn_scalar": 20, "sliding_window": 12, "sliding_window_pattern": 3, "rope_theta": 1e6}),
    );
    let phi3 = config("phi3", json!({"head_dim": 16, "partial_rotary_factor": 0.5}));
    let tables = keyed(&["self_attn.q_proj", "model.embed_tokens", "lm_head"]);
    let tied = keyed(&["self_attn.q_proj", "model.embed_tokens"]);
    let chosen = keyed(&["self_attn.v_proj", "mlp.switch_mlp.down_proj", "mlp.gate"]);
    vec![
        case("llama", llama(), None, "lora", 2, &low_rank, false),
        case("llama checkpointed", llama(), None, "lora", -1, &low_rank, true),
        case("llama dora", llama(), None, "dora", 2, &low_rank, false),
        case("llama full", llama(), None, "full", 2, &Value::Null, false),
        case("llama full checkpointed", llama(), None, "full", -1, &Value::Null, true),
        case("llama 4 bits", llama(), affine(4), "lora", 2, &low_rank, false),
        case("llama 3 bits", llama(), affine(3), "lora", 2, &low_rank, false),
        case("llama 5 bits", llama(), affine(5), "lora", 2, &low_rank, false),
        case("llama 6 bits", llama(), affine(6), "lora", 2, &low_rank, false),
        case("llama 8 bits", llama(), affine(8), "lora", 2, &low_rank, false),
        case("llama 4 bits dora", llama(), affine(4), "dora", 2, &low_rank, false),
        case("llama tables", llama(), None, "lora", 2, &tables, false),
        case("qwen3 tied", qwen3(), None, "lora", 2, &tied, false),
        case("qwen3 full", qwen3(), None, "full", 1, &Value::Null, false),
        case("qwen3_moe", experts(), None, "lora", 2, &low_rank, false),
        case("qwen3_moe full", experts(), None, "full", 2, &Value::Null, false),
        case("qwen3_moe 4 bits", experts(), affine(4), "lora", 2, &low_rank, false),
        case("qwen3_moe keys", experts(), None, "lora", -1, &chosen, true),
        case("gemma3", gemma3, None, "lora", -1, &low_rank, false),
        case("phi3", phi3, None, "lora", 2, &low_rank, false),
        case("gpt2", parity_config("gpt2"), None, "lora", -1, &low_rank, false).in_any_order(),
        case("qwen3_5", parity_config("qwen3_5"), None, "lora", -1, &low_rank, false).in_any_order(),
        case("mistral3", parity_config("mistral3"), None, "lora", 2, &low_rank, false).in_any_order(),
        case("nemotron_h", parity_config("nemotron_h"), None, "lora", -1, &low_rank, false).in_any_order(),
    ]
}

fn yaml(case: &Case) -> String {
    let parameters = match &case.parameters {
        Value::Null => String::new(),
        some => format!("lora_parameters: {some}\n"),
    };
    format!(
        "fine_tune_type: {}\nnum_layers: {}\nparity: true\nseed: 11\ngrad_checkpoint: {}\n{parameters}",
        case.kind, case.layers, case.checkpoint
    )
}

#[test]
fn gradients_and_first_values_are_mlx_lms() {
    let folder = tempfile::tempdir().unwrap();
    let rows = [(row(20, 1), 0), (row(31, 2), 7), (row(9, 3), 3)];
    let micro_batch = batch(&rows, 33);
    let lengths: Vec<_> = rows.iter().map(|(tokens, offset)| [*offset as usize, tokens.len()]).collect();
    let place = |name: &str, what: &str| folder.path().join(name.replace(' ', "-")).join(what);
    let mut requests = Vec::new();
    for case in cases() {
        let is_theirs = !case.has_order;
        if !is_theirs {
            write(&place(case.name, "model"), &case.config, 3);
        }
        requests.push(
            json!({"kind": "gradients", "make": is_theirs.then_some(&case.config), "model": place(case.name, "model"), "quantize": case.quantize,
            "quantized": place(case.name, "quantized"), "type": case.kind, "layers": case.layers,
            "parameters": case.parameters, "seed": 11, "batch": padded(&micro_batch), "lengths": lengths,
            "shake": true, "checkpoint": case.checkpoint, "file": place(case.name, "arrays.safetensors")}),
        );
    }
    let answers = ask(folder.path(), &requests);
    let device = Device::open().unwrap();
    for (case, answer) in cases().iter().zip(answers) {
        let packed = place(case.name, "quantized");
        let model = if case.quantize.is_some() { packed } else { place(case.name, "model") };
        check(&device, case, &answer, &model, &place(case.name, "arrays.safetensors"), &micro_batch);
    }
}

fn check(
    device: &Device,
    case: &Case,
    answer: &Value,
    model: &Path,
    arrays: &Path,
    micro_batch: &mlxnode_training::MicroBatch,
) {
    let name = case.name;
    let config = training(&yaml(case));
    let tuning = tuning(model);
    let plan = parameters::plan(&tuning, &config).unwrap();
    let tuner = tuning.tune(plan).unwrap();
    let tuner = if config.grad_checkpoint { tuner.with_checkpointing().unwrap() } else { tuner };
    let mut file = TensorFile::open(device, arrays).unwrap();
    let mut theirs: Vec<String> =
        file.names().filter_map(|name| name.strip_prefix("p.")).map(str::to_owned).collect();
    let mut ours: Vec<String> = tuner.trained().iter().map(|trained| trained.stored.clone()).collect();
    theirs.sort();
    ours.sort();
    assert_eq!(ours, theirs, "{name}: what is trained");
    let begun = parameters::begin(&tuner, 11).unwrap();
    for (trained, array) in tuner.trained().iter().zip(&begun.arrays) {
        let first = file.take(&format!("f.{}", trained.stored)).unwrap();
        let apart = distance(&numbers(device, array), &numbers(device, &first));
        assert!(apart < 1e-6 || !case.has_order, "{name}: {} begins {apart} away", trained.name);
    }
    let taken = tuner.trained().iter().map(|trained| file.take(&format!("p.{}", trained.stored)).unwrap());
    let arrays: Vec<mlxnode_mlx::Array> = taken.collect();
    let beginning = Beginning { reference: arrays.clone(), arrays };
    let wanted: Vec<_> = tuner
        .trained()
        .iter()
        .map(|trained| (trained.name.clone(), file.take(&format!("g.{}", trained.stored)).unwrap()))
        .collect();
    for compile in [false, true] {
        let optimizer = config.optimizer;
        let options =
            TrainerOptions { optimizer, clip: None, parity: true, preference: None, seed: 0, compile };
        let arrays = beginning.arrays.clone();
        let mut trainer =
            Trainer::new(tuner.clone(), Beginning { arrays, reference: Vec::new() }, options).unwrap();
        let made = trainer.gradients(micro_batch, 1).unwrap();
        let loss = answer["loss"].as_f64().unwrap();
        assert!((made.loss - loss).abs() < 1e-4 * loss.abs(), "{name}: loss {} and {loss}", made.loss);
        assert_eq!(Some(made.tokens), answer["tokens"].as_u64(), "{name}: tokens");
        for ((path, theirs), ours) in wanted.iter().zip(&made.gradients) {
            let theirs = numbers(device, theirs);
            let apart = distance(&numbers(device, ours), &theirs);
            assert!(
                apart < case.tolerance,
                "{name}: gradient of {path} is {apart} away (compiled: {compile})"
            );
        }
        let (sum, tokens) = trainer.loss(micro_batch).unwrap();
        assert!((sum / tokens as f64 - loss).abs() < 1e-4 * loss.abs(), "{name}: measured loss");
    }
}

/// mlx-lm fails here, so the judge is the same model with its matrices unpacked.
#[test]
fn dora_on_three_five_and_six_bits_is_that_of_the_unpacked_model() {
    let folder = tempfile::tempdir().unwrap();
    let device = Device::open().unwrap();
    let micro_batch = batch(&[(row(20, 1), 0), (row(31, 2), 7)], 33);
    let plain = folder.path().join("model");
    write(&plain, &config("llama", json!({})), 3);
    let packed = |bits: i32| folder.path().join(format!("packed-{bits}"));
    let requests = [3, 5, 6].map(|bits| {
        json!({"kind": "gradients", "model": plain, "quantize": {"group_size": 32, "bits": bits}, "quantized": packed(bits),
            "type": "lora", "layers": 1, "parameters": {"rank": 4, "scale": 10.0, "dropout": 0.0}, "seed": 1,
            "batch": padded(&micro_batch), "lengths": [[0, 20], [7, 31]], "file": folder.path().join("unused.safetensors")})
    });
    ask(folder.path(), &requests);
    for bits in [3, 5, 6] {
        let unpacked = folder.path().join(format!("unpacked-{bits}"));
        unpack(&device, &packed(bits), &unpacked, &plain, bits);
        let gradients = [packed(bits), unpacked].map(|model| {
            let config = training(
                "fine_tune_type: dora\nnum_layers: 2\nlora_parameters: {rank: 4, scale: 10.0, dropout: 0.0}\n",
            );
            let tuning = tuning(&model);
            let plan = parameters::plan(&tuning, &config).unwrap();
            let tuner = tuning.tune(plan).unwrap();
            let mut begun = parameters::begin(&tuner, 5).unwrap();
            for (trained, array) in tuner.trained().iter().zip(&mut begun.arrays) {
                if trained.name.ends_with(".lora_b") {
                    let half = mlxnode_mlx::Array::scalar(0.02, mlxnode_mlx::Dtype::F32).unwrap();
                    *array = device.add(array, &half).unwrap();
                }
            }
            let optimizer = config.optimizer;
            let options =
                TrainerOptions { optimizer, clip: None, parity: false, preference: None, seed: 0, compile: false };
            let made = Trainer::new(tuner, begun, options).unwrap().gradients(&micro_batch, 1).unwrap();
            made.gradients.iter().map(|gradient| numbers(&device, gradient)).collect::<Vec<_>>()
        });
        assert_eq!(gradients[0].len(), 3 * 14, "of each of seven maps in two layers");
        for (packed, unpacked) in gradients[0].iter().zip(&gradients[1]) {
            assert!(distance(packed, unpacked) < 5e-4, "{bits} bits: {}", distance(packed, unpacked));
        }
    }
}

/// The same model with matrices of numbers.
fn unpack(device: &Device, packed: &Path, unpacked: &Path, plain: &Path, bits: i32) {
    use mlxnode_mlx::{QuantizationMode, Quantized, QuantizedLayout};
    std::fs::create_dir_all(unpacked).unwrap();
    std::fs::copy(plain.join("config.json"), unpacked.join("config.json")).unwrap();
    let mut file = TensorFile::open(device, &packed.join("model.safetensors")).unwrap();
    let names: Vec<String> = file.names().map(str::to_owned).collect();
    let mut writer = mlxnode_checkpoint::SafetensorsWriter::new();
    for name in names.iter().filter(|name| !name.ends_with(".scales") && !name.ends_with(".biases")) {
        let mut array = file.take(name).unwrap();
        let path = name.strip_suffix(".weight").unwrap_or(name);
        if names.contains(&format!("{path}.scales")) {
            let layout = QuantizedLayout { mode: QuantizationMode::Affine, bits, group_size: 32 };
            let scales = file.take(&format!("{path}.scales")).unwrap();
            let biases = Some(file.take(&format!("{path}.biases")).unwrap());
            array = device.dequantize(&Quantized { weight: array, scales, biases, layout }).unwrap();
        }
        let shape: Vec<usize> = array.shape().iter().map(|size| *size as usize).collect();
        let bytes = device.contiguous(&array).unwrap().to_bytes().unwrap();
        writer.add(name, mlxnode_checkpoint::TensorDtype::F32, &shape, bytes).unwrap();
    }
    writer.write(&unpacked.join("model.safetensors")).unwrap();
}
