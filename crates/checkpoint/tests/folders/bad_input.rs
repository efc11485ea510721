use crate::tiny::{Tensor, config, folder, open_all, plain, tensors, write_weights};
use mlxnode_checkpoint::{Checkpoint, QuantMode, QuantSetting, SafetensorsWriter, TensorDtype};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use tempfile::TempDir;

/// A good folder, then spoiled.
fn spoiled(spoil: impl Fn(&Path)) -> TempDir {
    let config = config("llama");
    let folder = folder(&config, &plain(&config));
    spoil(folder.path());
    folder
}

fn expect_message(what: &str, folder: &Path, parts: &[&str]) {
    let message = open_all(folder).expect_err(what).to_string();
    for part in parts {
        assert!(message.contains(part), "{what}: no {part:?} in {message}");
    }
    assert!(message.len() < 2000, "{what}: a message of {} bytes", message.len());
}

fn edit_weights(folder: &Path, edit: impl Fn(&mut Vec<u8>)) {
    let path = folder.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    edit(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// Changes the header without changing its length.
fn replace_in_header(folder: &Path, from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    edit_weights(folder, |bytes| {
        let at = bytes.windows(from.len()).position(|part| part == from.as_bytes()).unwrap();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    });
}

fn edit_config(folder: &Path, edit: impl Fn(&mut Value)) {
    let path = folder.join("config.json");
    let mut value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

#[test]
fn damaged_files_are_named() {
    type Spoil = Box<dyn Fn(&Path)>;
    let weights: &str = "model.safetensors";
    let cases: Vec<(&str, Spoil, Vec<&str>)> = vec![
        ("no config", Box::new(|f| fs::remove_file(f.join("config.json")).unwrap()), vec!["no config.json"]),
        (
            "no weights",
            Box::new(|f| fs::remove_file(f.join("model.safetensors")).unwrap()),
            vec!["model*.safetensors"],
        ),
        (
            "empty weights",
            Box::new(|f| fs::write(f.join("model.safetensors"), b"").unwrap()),
            vec![weights, "0 bytes"],
        ),
        (
            "truncated header",
            Box::new(|f| edit_weights(f, |bytes| bytes.truncate(100))),
            vec![weights, "truncated"],
        ),
        (
            "truncated data",
            Box::new(|f| edit_weights(f, |bytes| bytes.truncate(bytes.len() - 1))),
            vec![weights, "outside the file"],
        ),
        (
            "data behind the end",
            Box::new(|f| edit_weights(f, |bytes| bytes.push(0))),
            vec![weights, "belong to no tensor"],
        ),
        (
            "header length beyond the file",
            Box::new(|f| edit_weights(f, |bytes| bytes[..8].fill(0xff))),
            vec![weights, "header claims"],
        ),
        ("header not UTF-8", Box::new(|f| edit_weights(f, |bytes| bytes[20] = 0xff)), vec![weights, "UTF-8"]),
        (
            "header not JSON",
            Box::new(|f| edit_weights(f, |bytes| bytes[8] = b'[')),
            vec![weights, "malformed"],
        ),
        (
            "git-lfs pointer",
            Box::new(|f| {
                fs::write(f.join("model.safetensors"), "version https://git-lfs.github.com/spec/v1\n")
                    .unwrap()
            }),
            vec![weights, "not a safetensors file"],
        ),
        (
            "other shape",
            Box::new(|f| replace_in_header(f, r#""shape":[96,64]"#, r#""shape":[96,99]"#)),
            vec![weights, "needs 19008 bytes"],
        ),
        (
            "negative shape",
            Box::new(|f| replace_in_header(f, r#""shape":[96,64]"#, r#""shape":[-6,64]"#)),
            vec![weights, "dimension of -6"],
        ),
        (
            "unknown dtype",
            Box::new(|f| replace_in_header(f, r#""dtype":"BF16""#, r#""dtype":"XX16""#)),
            vec![weights, "XX16"],
        ),
        (
            "config not JSON",
            Box::new(|f| fs::write(f.join("config.json"), "{").unwrap()),
            vec!["config.json is not valid JSON"],
        ),
        (
            "config not UTF-8",
            Box::new(|f| fs::write(f.join("config.json"), b"{\"a\": \"\xff\"}").unwrap()),
            vec!["config.json is not valid JSON"],
        ),
        (
            "config a list",
            Box::new(|f| fs::write(f.join("config.json"), "[]").unwrap()),
            vec!["config.json", "not an object"],
        ),
        (
            "config huge",
            Box::new(|f| fs::write(f.join("config.json"), vec![b' '; (16 << 20) + 1]).unwrap()),
            vec!["config.json", "limit"],
        ),
        (
            "config deep",
            Box::new(|f| fs::write(f.join("config.json"), "[".repeat(100_000)).unwrap()),
            vec!["config.json", "recursion"],
        ),
        (
            "config a folder",
            Box::new(|f| {
                fs::remove_file(f.join("config.json")).unwrap();
                fs::create_dir(f.join("config.json")).unwrap()
            }),
            vec!["config.json is not a regular file"],
        ),
        (
            "weights a folder",
            Box::new(|f| fs::create_dir(f.join("model-2.safetensors")).unwrap()),
            vec!["model-2.safetensors is not a regular file"],
        ),
        (
            "a link to nothing",
            Box::new(|f| std::os::unix::fs::symlink("nowhere", f.join("model-2.safetensors")).unwrap()),
            vec!["model-2.safetensors cannot be read"],
        ),
        (
            "missing field",
            Box::new(|f| edit_config(f, |config| config["hidden_size"] = Value::Null)),
            vec!["config.json: hidden_size is missing"],
        ),
        (
            "absurd field",
            Box::new(|f| edit_config(f, |config| config["num_attention_heads"] = json!(0))),
            vec!["config.json: num_attention_heads is 0"],
        ),
        (
            "huge layer count",
            Box::new(|f| edit_config(f, |config| config["num_hidden_layers"] = json!(1u64 << 60))),
            vec!["config.json: num_hidden_layers is 1152921504606846976"],
        ),
        (
            "unknown architecture",
            Box::new(|f| edit_config(f, |config| config["model_type"] = json!("gpt9"))),
            vec!["gpt9", "qwen3"],
        ),
        (
            "more layers than stored",
            Box::new(|f| edit_config(f, |config| config["num_hidden_layers"] = json!(4))),
            vec!["missing", "model.layers.3.mlp.gate_proj.weight", "and 1 more"],
        ),
        (
            "fewer layers than stored",
            Box::new(|f| edit_config(f, |config| config["num_hidden_layers"] = json!(2))),
            vec!["unexpected", "model.layers.2.input_layernorm.weight in model.safetensors"],
        ),
        (
            "wider than stored",
            Box::new(|f| edit_config(f, |config| config["hidden_size"] = json!(128))),
            vec![
                "model.embed_tokens.weight in model.safetensors is BF16 [96, 64]",
                "expected F32, F16 or BF16 [96, 128]",
            ],
        ),
        (
            "a tensor twice",
            Box::new(|f| write_weights(&f.join("model-2.safetensors"), &plain(&config("llama"))[..1])),
            vec!["model.embed_tokens.weight", "model-2.safetensors", "model.safetensors"],
        ),
        (
            "index not JSON",
            Box::new(|f| fs::write(f.join("model.safetensors.index.json"), "{}").unwrap()),
            vec!["model.safetensors.index.json", "weight_map"],
        ),
        (
            "index out of the folder",
            Box::new(|f| {
                fs::write(
                    f.join("model.safetensors.index.json"),
                    r#"{"weight_map": {"w": "../model.safetensors"}}"#,
                )
                .unwrap()
            }),
            vec!["index.json", "../model.safetensors", "\"w\""],
        ),
        (
            "index with a missing shard",
            Box::new(|f| {
                fs::write(
                    f.join("model.safetensors.index.json"),
                    r#"{"weight_map": {"w": "model-00007.safetensors"}}"#,
                )
                .unwrap()
            }),
            vec!["index.json", "model-00007.safetensors", "lacks it"],
        ),
        (
            "index with a broken promise",
            Box::new(|f| {
                fs::write(
                    f.join("model.safetensors.index.json"),
                    r#"{"weight_map": {"w": "model.safetensors"}}"#,
                )
                .unwrap()
            }),
            vec!["index.json", "\"w\"", "model.safetensors"],
        ),
    ];
    for (what, spoil, parts) in cases {
        expect_message(what, spoiled(spoil).path(), &parts);
    }
    expect_message("no folder", Path::new("/nowhere/at/all"), &["/nowhere/at/all"]);
}

#[test]
fn a_pipe_is_refused_without_waiting_for_it() {
    let folder = spoiled(|folder| {
        let pipe = folder.join("model-2.safetensors");
        assert!(std::process::Command::new("mkfifo").arg(pipe).status().unwrap().success());
    });
    expect_message("pipe", folder.path(), &["model-2.safetensors is not a regular file"]);
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let config = config("llama");
    let all = plain(&config);
    let other = |name: &str, dtype, shape: &[usize]| {
        let mut all = all.clone();
        let tensor = all.iter_mut().find(|tensor| tensor.name == name).unwrap();
        (tensor.dtype, tensor.shape) = (dtype, shape.to_vec());
        all
    };
    let without = |name: &str| all.iter().filter(|tensor| tensor.name != name).cloned().collect::<Vec<_>>();
    let with = |name: &str| {
        let extra = Tensor { name: name.into(), dtype: TensorDtype::F32, shape: vec![2] };
        all.iter().cloned().chain([extra]).collect::<Vec<_>>()
    };
    let norm = "model.layers.1.input_layernorm.weight";
    for (all, parts) in [
        (without(norm), ["missing", norm]),
        (without("lm_head.weight"), ["missing", "lm_head.weight"]),
        (
            with("model.layers.0.self_attn.k_scale"),
            ["unexpected", "model.layers.0.self_attn.k_scale in model.safetensors"],
        ),
        (with("model.layers.3.mlp.up_proj.weight"), ["unexpected", "model.layers.3.mlp.up_proj.weight in"]),
        (with("model.embed_tokens.scales"), ["unexpected", "model.embed_tokens.scales in"]),
        (with("extra"), ["unexpected", "extra in model.safetensors"]),
        (
            other(norm, TensorDtype::BF16, &[65]),
            [norm, "in model.safetensors is BF16 [65], expected F32, F16 or BF16 [64]"],
        ),
        (other(norm, TensorDtype::I32, &[64]), [norm, "is I32 [64]"]),
        (other(norm, TensorDtype::F64, &[64]), [norm, "is F64 [64]"]),
        (
            other("lm_head.weight", TensorDtype::BF16, &[64, 96]),
            ["lm_head.weight", "expected F32, F16 or BF16 [96, 64]"],
        ),
    ] {
        expect_message(parts[1], folder(&config, &all).path(), &parts);
    }
}

#[test]
fn packed_tensors_that_do_not_fit_are_named() {
    let mut config = config("llama");
    config["quantization"] = json!({ "group_size": 32, "bits": 4 });
    let four_bits = QuantSetting { group_size: 32, bits: 4, mode: QuantMode::Affine };
    let all = tensors(&config, TensorDtype::BF16, |module| module.matrix().map(|_| four_bits));
    let other = |name: &str, dtype, shape: &[usize]| {
        let mut all = all.clone();
        let tensor = all.iter_mut().find(|tensor| tensor.name == name).unwrap();
        (tensor.dtype, tensor.shape) = (dtype, shape.to_vec());
        all
    };
    let without = |name: &str| all.iter().filter(|tensor| tensor.name != name).cloned().collect::<Vec<_>>();
    let (weight, scales, biases) = ("lm_head.weight", "lm_head.scales", "lm_head.biases");
    for (what, all, parts) in [
        ("packed rows", other(weight, TensorDtype::U32, &[96, 9]), [weight, "U32 [96, 9]"]),
        (
            "packed type",
            other(weight, TensorDtype::I32, &[96, 8]),
            [weight, "is I32 [96, 8], expected U32 [96, 8]"],
        ),
        (
            "scales",
            other(scales, TensorDtype::BF16, &[95, 2]),
            [scales, "is BF16 [95, 2], expected F32, F16 or BF16 [96, 2]"],
        ),
        ("scales of bytes", other(scales, TensorDtype::U8, &[96, 3]), [weight, "scales U8 [96, 3]"]),
        ("no biases", without(biases), ["missing", biases]),
        ("no scales", without(scales), [weight, "is U32 [96, 8], expected F32, F16 or BF16 [96, 64]"]),
        ("no weight", without(weight), ["missing", weight]),
    ] {
        expect_message(what, folder(&config, &all).path(), &parts);
    }
    // The config's own word about a module counts more than the shapes.
    config["quantization"]["lm_head"] = json!({ "group_size": 64, "bits": 8 });
    expect_message("named", folder(&config, &all).path(), &[weight, "expected U32 [96, 16]"]);
    config["quantization"]["lm_head"] = json!({ "group_size": 128, "bits": 4 });
    expect_message(
        "rows too short",
        folder(&config, &all).path(),
        &["lm_head.weight in config.json", "groups of 128"],
    );
}

#[test]
fn a_file_that_changed_since_is_an_error() {
    let config = config("llama");
    let folder = folder(&config, &plain(&config));
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    edit_weights(folder.path(), |bytes| bytes.truncate(bytes.len() / 2));
    let last = checkpoint.tensors().map(|(_, entry)| entry).max_by_key(|entry| entry.bytes.end).unwrap();
    let message = checkpoint.read_tensor(last).unwrap_err().to_string();
    assert!(message.contains("model.safetensors cannot be read"), "{message}");
}

#[test]
fn the_writer_refuses_wrong_tensors() {
    let mut writer = SafetensorsWriter::new();
    let message = writer.add("w", TensorDtype::F32, &[2, 2], vec![0; 15]).unwrap_err().to_string();
    assert!(message.contains("\"w\"") && message.contains("15 bytes"), "{message}");
    assert!(writer.add("w", TensorDtype::F32, &[usize::MAX, 2], vec![]).is_err());
    writer.add("w", TensorDtype::F32, &[1], vec![0; 4]).unwrap();
    assert!(writer.add("w", TensorDtype::F32, &[1], vec![0; 4]).is_err());
    assert!(writer.write(Path::new("/nowhere/at/all/model.safetensors")).is_err());
}
