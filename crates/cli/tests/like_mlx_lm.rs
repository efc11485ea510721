//! The commands give what mlx-lm 0.32.2's commands give: the same perplexity on the same rows, the same fused models, and prompt cache
//! files that either goes on from.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests are test code, too

use mlxnode_testkit::oracle;
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;

fn demo() -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../hub/demo-model/model");
    folder.canonicalize().unwrap().to_str().unwrap().to_owned()
}

/// What a command of ours prints with --json.
fn ours(arguments: &[&str]) -> Value {
    let home = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_mlxnode"))
        .args(arguments)
        .args(["--json", "--data-dir"])
        .arg(home.path())
        .env_remove("RUST_LOG")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[derive(Deserialize)]
struct Measured {
    perplexity: f64,
    standard_error: f64,
}

#[derive(Deserialize)]
struct Said {
    text: String,
}

#[derive(Deserialize)]
struct Nothing {}

fn write(folder: &Path, name: &str, records: &[Value]) -> PathBuf {
    let lines: Vec<String> = records.iter().map(Value::to_string).collect();
    let path = folder.join(name);
    std::fs::write(&path, lines.join("\n")).unwrap();
    path
}

#[test]
fn fuse_takes_mlx_lms_flags_and_makes_its_model() {
    let place = tempfile::tempdir().unwrap();
    let folder = |name: &str| place.path().join(name).to_str().unwrap().to_owned();
    let config: Value =
        serde_json::from_slice(&std::fs::read(Path::new(&demo()).join("config.json")).unwrap()).unwrap();
    let case = json!({
        "config": config, "dtype": "float32", "quantize": {"group_size": 32, "bits": 4}, "kind": "lora", "layers": 2,
        "parameters": {"rank": 4, "scale": 8.0, "dropout": 0.0}, "dequantize": true, "tokenizer": demo(),
        "model": folder("model"), "adapter": folder("adapter"), "fused": folder("theirs"),
    });
    let request = folder("request.json");
    std::fs::write(&request, json!({"cases": [case]}).to_string()).unwrap();
    let Nothing {} = oracle::run("fuse.py", &[&request]).unwrap();
    let (model, adapter, fused) = (folder("model"), folder("adapter"), folder("ours"));
    let flags = ["fuse", "--model", &model, "--adapter-path", &adapter, "--save-path", &fused];
    let said = ours(&[flags.as_slice(), &["--de-quantize", "--trust-remote-code", "--quiet"]].concat());
    // Seven maps in each of two layers.
    assert_eq!(said, json!({"folder": fused, "changed": 14, "packed_again": 0}));
    let tensors = |folder: &str| {
        let checkpoint = mlxnode_checkpoint::Checkpoint::open(Path::new(folder)).unwrap();
        let read = |entry| checkpoint.read_tensor(entry).unwrap();
        let tensors = checkpoint.tensors().map(|(name, entry)| (name.to_owned(), read(entry)));
        tensors.collect::<Vec<(String, Vec<u8>)>>()
    };
    assert!(tensors(&fused) == tensors(&folder("theirs")), "other tensors than mlx-lm's");
    for (flags, expected) in [
        ([flags.as_slice(), &["--export-gguf"]].concat(), "GGUF files are not written"),
        (flags.to_vec(), "has files already; name another folder, or empty it"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_mlxnode")).args(flags).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(expected), "{said}");
    }
}

#[test]
fn perplexity_is_mlx_lms_on_the_same_rows() {
    let folder = tempfile::tempdir().unwrap();
    let sums = (0..60).map(|number| {
        let (a, b) = (number * 7 % 50, number * 11 % 49);
        (format!("What is {a} + {b}?"), (a + b).to_string())
    });
    let (mut texts, mut chats, mut pairs) = (Vec::new(), Vec::new(), Vec::new());
    for (question, answer) in sums {
        texts.push(json!({"text": format!("{question} It is {answer}.\n")}));
        pairs.push(json!({"prompt": question, "completion": answer}));
        chats.push(json!({"messages": [{"role": "system", "content": "Sums."},
            {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}));
    }
    for (name, records, samples, length, batch, seed) in [
        ("texts.jsonl", texts, "9", "40", "4", "123"),
        ("chats.jsonl", chats, "5", "33", "8", "7"),
        ("pairs.jsonl", pairs, "6", "64", "1", "0"),
    ] {
        let data = write(folder.path(), name, &records);
        let data = data.to_str().unwrap();
        let expected: Measured =
            oracle::run("command_line.py", &["perplexity", &demo(), data, samples, length, batch, seed])
                .unwrap();
        let flags =
            ["--num-samples", samples, "--sequence-length", length, "--batch-size", batch, "--seed", seed];
        let found =
            ours(&[&["perplexity", "--model", &demo(), "--data-path", data], flags.as_slice()].concat());
        for (field, expected) in
            [("perplexity", expected.perplexity), ("standard_error", expected.standard_error)]
        {
            let found = found[field].as_f64().unwrap();
            assert!((found / expected - 1.0).abs() < 1e-4, "{name} {field}: {found}, mlx-lm {expected}");
        }
        // All rows, which mlx-lm fails at.
        let all = ours(&[
            "perplexity",
            "--model",
            &demo(),
            "--data-path",
            data,
            "--num-samples",
            "-1",
            "--sequence-length",
            length,
        ]);
        assert!(all["samples"].as_u64() > samples.parse().ok(), "{all}");
        assert_eq!(
            all["tokens"],
            json!(all["samples"].as_u64().unwrap() * (length.parse::<u64>().unwrap() - 1))
        );
    }
}

#[test]
fn prompt_caches_go_both_ways() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let demo = demo();
    // The question comes in two parts; mlx-lm goes on from the user's words.
    let (beginning, rest) = ("Sort 31, 4, 15", ", 27");
    for (name, kv) in [
        ("plain", &[][..]),
        ("packed", &["--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "0"][..]),
    ] {
        let (own, theirs) =
            (file(&format!("{name}-own.safetensors")), file(&format!("{name}-theirs.safetensors")));
        let make = |path: &str| {
            let words = ["--model", &demo, "--prompt", beginning, "--prompt-cache-file", path];
            words.iter().chain(kv).map(|word| (*word).to_owned()).collect::<Vec<_>>()
        };
        let (make_own, make_theirs) = (make(&own), make(&theirs));
        let make_own: Vec<&str> =
            ["cache-prompt"].into_iter().chain(make_own.iter().map(String::as_str)).collect();
        let make_theirs: Vec<&str> =
            ["cache-prompt"].into_iter().chain(make_theirs.iter().map(String::as_str)).collect();
        let made = ours(&make_own);
        assert!(made["prompt_tokens"].as_u64() > Some(5) && made["bytes"].as_u64() > Some(1000), "{made}");
        let _: Nothing = oracle::run("command_line.py", &make_theirs).unwrap();
        let mut answers = Vec::new();
        for path in [&own, &theirs] {
            let words = ["generate", "--prompt", rest, "--max-tokens", "12", "--prompt-cache-file", path];
            let words: Vec<&str> = words.iter().chain(kv).copied().collect();
            let expected: Said = oracle::run("command_line.py", &words).unwrap();
            let found = ours(&words);
            assert_eq!(found["text"], expected.text, "{name} {path}");
            // The model's name came from the file.
            assert_eq!(found["cached_tokens"], made["prompt_tokens"], "{name} {path}");
            answers.push(expected.text);
        }
        assert_eq!(answers[0], answers[1], "{name}");
        assert!(!answers[0].is_empty(), "{name}");
    }
}
