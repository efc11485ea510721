//! Fused models are those that mlx-lm's `fuse` makes: the same tensors, bit by bit, the same config and index.

#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

use mlxnode_checkpoint::{Checkpoint, TensorFileHeader};
use mlxnode_hub::{Hub, ModelSource};
use mlxnode_testkit::oracle;
use mlxnode_training::{FuseError, fuse};
use serde_json::{Value, json};
use std::path::Path;

fn llama() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 512, "tie_word_embeddings": false, "attention_bias": true,
        "_name_or_path": "somewhere",
    })
}

fn experts() -> Value {
    json!({
        "model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "vocab_size": 512, "tie_word_embeddings": true,
        "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 64,
        "norm_topk_prob": true, "rope_theta": 10000.0, "max_position_embeddings": 512,
    })
}

/// The tensors of a folder's weight files with their types, shapes and bytes.
fn tensors(folder: &Path) -> Vec<(String, String, Vec<u8>)> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let described = |entry: &mlxnode_checkpoint::TensorEntry| format!("{} {:?}", entry.dtype, entry.shape);
    let mut tensors: Vec<_> = checkpoint
        .tensors()
        .map(|(_, entry)| {
            (entry.stored_name.clone(), described(entry), checkpoint.read_tensor(entry).unwrap())
        })
        .collect();
    tensors.sort();
    tensors
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn fused_models_are_those_of_mlx_lm() {
    let place = tempfile::tempdir().unwrap();
    let options = mlxnode_hub::Options::from_lookup(|_| None);
    let hub = Hub::new(mlxnode_hub::Options { cache: place.path().join("cache"), ..options });
    let tokenizer = hub.resolve(&ModelSource::Demo, &|_| {}).unwrap();
    let plain = json!({"rank": 4, "scale": 8.0, "dropout": 0.0});
    let ends = json!({"rank": 4, "scale": 8.0, "dropout": 0.0, "keys": ["self_attn.v_proj", "model.embed_tokens", "lm_head"]});
    let affine = |bits: u32, group: u32| json!({"group_size": group, "bits": bits});
    let cases = [
        (llama(), "float32", Value::Null, "lora", &plain, false),
        (llama(), "bfloat16", Value::Null, "lora", &ends, false),
        (llama(), "float32", Value::Null, "dora", &plain, false),
        (llama(), "float16", Value::Null, "dora", &plain, false),
        (llama(), "float32", affine(4, 32), "lora", &ends, false),
        (llama(), "bfloat16", affine(3, 64), "lora", &plain, false),
        (llama(), "float16", affine(4, 64), "dora", &plain, false),
        (llama(), "float32", affine(8, 32), "lora", &plain, true),
        (llama(), "float32", json!({"group_size": 32, "bits": 4, "mode": "mxfp4"}), "lora", &plain, false),
        (llama(), "float32", Value::Null, "full", &plain, false),
        (llama(), "float32", affine(4, 32), "full", &plain, true),
        (experts(), "float32", Value::Null, "lora", &plain, false),
        (experts(), "float32", affine(4, 32), "lora", &plain, false),
        (experts(), "float32", affine(4, 32), "lora", &plain, true),
    ];
    let request: Vec<Value> = cases
        .iter()
        .enumerate()
        .map(|(number, (config, dtype, quantize, kind, parameters, dequantize))| {
            let folder = |name: &str| place.path().join(format!("{number}-{name}"));
            json!({
                "config": config, "dtype": dtype, "quantize": quantize, "kind": kind, "parameters": parameters,
                "dequantize": dequantize, "layers": 2, "tokenizer": tokenizer, "model": folder("model"),
                "adapter": folder("adapter"), "fused": folder("theirs"),
            })
        })
        .collect();
    let file = place.path().join("request.json");
    std::fs::write(&file, json!({"cases": request}).to_string()).unwrap();
    let _: Value = oracle::run("fuse.py", &[file.to_str().unwrap()]).unwrap();
    for (number, (config, dtype, quantize, kind, _, dequantize)) in cases.iter().enumerate() {
        let case = format!("{number}: {} {dtype} {quantize} {kind} {dequantize}", config["model_type"]);
        let folder = |name: &str| place.path().join(format!("{number}-{name}"));
        let checkpoint = Checkpoint::open(&folder("model")).unwrap();
        let (ours, theirs) = (folder("ours"), folder("theirs"));
        let fused = fuse(&checkpoint, &folder("adapter"), &ours, *dequantize, &|_, _| {}).unwrap();
        assert!(fused.changed > 0, "{case}");
        for (one, other) in tensors(&ours).iter().zip(&tensors(&theirs)) {
            assert_eq!((&one.0, &one.1), (&other.0, &other.1), "{case}");
            assert!(one.2 == other.2, "{case}: {} has other values", one.0);
        }
        assert_eq!(tensors(&ours).len(), tensors(&theirs).len(), "{case}");
        for file in ["config.json", "model.safetensors.index.json"] {
            let (ours, theirs) = (read(&ours.join(file)), read(&theirs.join(file)));
            assert_eq!(ours, theirs, "{case} {file}");
        }
        assert!(ours.join("tokenizer.json").is_file() && ours.join("tokenizer_config.json").is_file());
        let error = fuse(&checkpoint, &folder("adapter"), &ours, *dequantize, &|_, _| {}).unwrap_err();
        assert!(matches!(error, FuseError::Taken { .. }), "{error}");
    }
    let left: Vec<_> = place.path().read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().contains("partial")), "{left:?}");
}

#[test]
fn an_adapter_of_another_model_is_refused_and_leaves_nothing() {
    let place = tempfile::tempdir().unwrap();
    let options = mlxnode_hub::Options::from_lookup(|_| None);
    let hub = Hub::new(mlxnode_hub::Options { cache: place.path().join("cache"), ..options });
    let demo = hub.resolve(&ModelSource::Demo, &|_| {}).unwrap();
    let checkpoint = Checkpoint::open(&demo).unwrap();
    let adapter = place.path().join("adapter");
    std::fs::create_dir(&adapter).unwrap();
    std::fs::write(adapter.join("adapter_config.json"), r#"{"fine_tune_type": "full"}"#).unwrap();
    let mut writer = mlxnode_checkpoint::SafetensorsWriter::new();
    writer.add("model.nothing.weight", mlxnode_checkpoint::TensorDtype::F32, &[1], vec![0; 4]).unwrap();
    writer.add("model.norm.weight", mlxnode_checkpoint::TensorDtype::F32, &[1], vec![0; 4]).unwrap();
    let file = adapter.join("adapters.safetensors");
    writer.write(&file).unwrap();
    assert_eq!(TensorFileHeader::read(&file).unwrap().tensors.len(), 2);
    let target = place.path().join("fused");
    let error = fuse(&checkpoint, &adapter, &target, false, &|_, _| {}).unwrap_err().to_string();
    for part in [
        "the model has no model.nothing.weight",
        "model.norm.weight has shape [1], but the model's has [128]",
    ] {
        assert!(error.contains(part), "{error}");
    }
    assert!(!target.exists());
}
