//! Adapters that mlx-lm made do here what they do there; and rows of one batch with different adapters do not see each other.

#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

mod random_model;
mod support;

use mlxnode_checkpoint::{Adapter, AdapterError, Checkpoint, SafetensorsWriter, TensorDtype};
use mlxnode_compute::{LogprobRequest, Sampling, SequenceSpec};
use mlxnode_engine::{
    BatchEvent, BatchGenerator, BatchOptions, GenerateError, Generator, GeneratorOptions, Model,
};
use random_model::VOCABULARY;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::path::Path;
use support::{ask, folder, prompt};

const NEW_TOKENS: usize = 12;

#[derive(Deserialize)]
struct Answers {
    cases: Vec<Answer>,
}

#[derive(Deserialize)]
struct Answer {
    runs: Vec<Run>,
}

#[derive(Deserialize)]
struct Run {
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
}

fn prompts() -> Vec<Vec<u32>> {
    [1, 9, 70].map(|length| prompt(length, VOCABULARY as u64, length as u64)).into()
}

fn spec(input: &[u32], adapter: Option<&str>) -> SequenceSpec {
    let sampling = Sampling { logprobs: Some(LogprobRequest { top: 5 }), ..Sampling::default() };
    SequenceSpec {
        adapter: adapter.map(str::to_owned),
        ..SequenceSpec::new(input.len(), NEW_TOKENS, sampling)
    }
}

/// The model of a folder with its adapters.
fn load(model: &Path, adapters: &[(&str, &Path)]) -> Model {
    let checkpoint = Checkpoint::open(model).unwrap();
    let mut loaded = Model::load_whole(&checkpoint, &mut |_, _| {}).unwrap();
    for (name, folder) in adapters {
        let adapter = Adapter::open(folder, &checkpoint).unwrap();
        loaded.add_adapter(&checkpoint, name, &adapter).unwrap();
    }
    loaded
}

fn generate(generator: &mut Generator, input: &[u32], adapter: Option<&str>) -> (Vec<u32>, Vec<(u32, f32)>) {
    let (mut tokens, mut first) = (Vec::new(), Vec::new());
    let on_token = &mut |event: mlxnode_engine::TokenEvent| {
        if tokens.is_empty() {
            first = event.sampled.top.iter().map(|it| (it.token, it.logprob)).collect();
        }
        tokens.push(event.sampled.token);
        ControlFlow::Continue(())
    };
    generator.generate(input, &spec(input, adapter), on_token).unwrap();
    (tokens, first)
}

/// A family, how it is packed, the kind of adapter, what it changes (default: all in the layers) and in how many layers.
fn cases() -> Vec<(&'static str, Value, Value, &'static str, Option<Vec<&'static str>>, i32)> {
    let attention = || Some(vec!["self_attn.q_proj", "self_attn.v_proj"]);
    let ends = || Some(vec!["self_attn.q_proj", "model.embed_tokens", "lm_head"]);
    let table = || Some(vec!["mlp.down_proj", "model.embed_tokens"]);
    let plain = |name: &'static str| (name, random_model::config(name, json!({})));
    let tied = ("qwen3", random_model::config("qwen3", json!({"tie_word_embeddings": true})));
    let experts = ("qwen3_moe", random_model::parity_config("qwen3_moe"));
    let latent = ("deepseek_v2", random_model::parity_config("deepseek_v2"));
    let delta = ("qwen3_next", random_model::parity_config("qwen3_next"));
    let fused = ("phi3", random_model::parity_config("phi3"));
    let packed = |bits: i32| json!({"bits": bits, "group_size": 32});
    let with = |(name, config), quantize, kind, keys, layers| (name, config, quantize, kind, keys, layers);
    vec![
        with(plain("qwen3"), Value::Null, "lora", None, 2),
        with(plain("qwen3"), Value::Null, "lora", attention(), -1),
        with(plain("qwen3"), Value::Null, "lora", ends(), 3),
        with(tied, Value::Null, "lora", table(), 3),
        with(plain("qwen3"), packed(4), "lora", None, -1),
        with(plain("qwen3"), Value::Null, "dora", None, -1),
        with(plain("qwen3"), packed(8), "dora", attention(), -1),
        with(plain("qwen2"), Value::Null, "dora", attention(), -1),
        with(experts, Value::Null, "lora", None, -1),
        with(latent, Value::Null, "lora", Some(vec!["self_attn.o_proj", "mlp.down_proj"]), -1),
        with(delta, Value::Null, "lora", None, -1),
        with(fused, Value::Null, "lora", None, -1),
    ]
}

#[test]
fn adapters_of_mlx_lm_do_the_same_here() {
    let root = folder();
    let mut requests = Vec::new();
    for (number, (_, config, quantize, kind, keys, layers)) in cases().into_iter().enumerate() {
        let model = root.path().join(format!("model-{number}"));
        random_model::write(&model, &config, number as u64 + 1);
        let mut parameters = json!({"rank": 4, "scale": 3.0, "dropout": 0.0});
        if let Some(keys) = keys {
            parameters["keys"] = keys.into();
        }
        requests.push(json!({"model": model, "adapter": root.path().join(format!("adapter-{number}")),
            "kind": kind, "parameters": parameters, "layers": layers, "seed": number, "prompts": prompts(),
            "tokens": NEW_TOKENS, "quantize": quantize, "quantized": root.path().join(format!("packed-{number}"))}));
    }
    let answers: Answers = ask("adapters.py", root.path(), &json!({ "cases": requests }));
    for (number, (case, answer)) in cases().into_iter().zip(answers.cases).enumerate() {
        let (name, _, quantize, kind, keys, _) = case;
        let is_packed = !quantize.is_null();
        let model = root.path().join(format!("{}-{number}", if is_packed { "packed" } else { "model" }));
        let adapter = root.path().join(format!("adapter-{number}"));
        let loaded = load(&model, &[("a", &adapter)]);
        let mut generator = Generator::new(loaded, GeneratorOptions::default()).unwrap();
        for (input, expected) in prompts().iter().zip(answer.runs) {
            let what = format!("{name} {kind} {keys:?} {quantize}, a prompt of {}", input.len());
            let (tokens, first) = generate(&mut generator, input, Some("a"));
            for (token, logprob) in first {
                let theirs = expected.logprobs[token as usize];
                assert!((logprob - theirs).abs() < 2e-3, "{what}: {logprob} for {token}, {theirs} there");
            }
            assert_eq!(tokens, expected.tokens, "{what}");
            let (without, _) = generate(&mut generator, input, None);
            let mut plain = Generator::new(load(&model, &[]), GeneratorOptions::default()).unwrap();
            assert_eq!(without, generate(&mut plain, input, None).0, "{what}: without it nothing changes");
        }
    }
}

#[test]
fn rows_of_a_batch_do_not_see_each_others_adapters() {
    let root = folder();
    for (name, config) in [
        ("qwen3", random_model::config("qwen3", json!({}))),
        ("qwen3_moe", random_model::parity_config("qwen3_moe")),
    ] {
        let model = root.path().join(name);
        random_model::write(&model, &config, 3);
        let case = |number: u32, rank: u32| {
            json!({"model": model, "adapter": root.path().join(format!("{name}-{number}")), "kind": "lora",
                "parameters": {"rank": rank, "scale": 4.0, "dropout": 0.0}, "layers": -1, "seed": number,
                "prompts": [], "tokens": 1})
        };
        let _: Answers = ask("adapters.py", root.path(), &json!({"cases": [case(1, 2), case(2, 5)]}));
        let folders = [root.path().join(format!("{name}-1")), root.path().join(format!("{name}-2"))];
        let adapters = [("one", folders[0].as_path()), ("two", folders[1].as_path())];
        let mut alone = Generator::new(load(&model, &adapters), GeneratorOptions::default()).unwrap();
        let options = BatchOptions { step_tokens: 16, ..BatchOptions::default() };
        let mut batch = BatchGenerator::new(load(&model, &adapters), options).unwrap();
        let rows = [None, Some("one"), Some("two"), Some("one"), None, Some("two")];
        let mut expected = HashMap::new();
        let mut heard: HashMap<_, Vec<u32>> = HashMap::new();
        for (number, adapter) in rows.into_iter().enumerate() {
            let input = prompt(3 + 11 * number, VOCABULARY as u64, 7);
            let id = batch.insert(&input, &spec(&input, adapter)).unwrap();
            expected.insert(id, generate(&mut alone, &input, adapter).0);
            if number % 2 == 1 {
                collect(&mut batch, &mut heard);
            }
        }
        while batch.rows() > 0 {
            collect(&mut batch, &mut heard);
        }
        assert_eq!(heard, expected, "{name}");
        let distinct: std::collections::BTreeSet<_> = expected.values().collect();
        assert!(distinct.len() > 2, "the adapters change nothing: {expected:?}");
        let unknown = batch.insert(&[1], &spec(&[1], Some("three"))).unwrap_err();
        assert_eq!(unknown.to_string(), "the adapter \"three\" is not loaded; loaded: one, two");
        assert!(matches!(unknown, GenerateError::Adapter(_)));
    }
}

fn collect(batch: &mut BatchGenerator, heard: &mut HashMap<mlxnode_engine::RowId, Vec<u32>>) {
    for event in batch.step().unwrap() {
        if let BatchEvent::Token { row, event } = event {
            heard.entry(row).or_default().push(event.sampled.token);
        }
    }
}

#[test]
fn adapters_that_do_not_fit_are_refused_by_name() {
    let root = folder();
    let model = root.path().join("model");
    random_model::write(&model, &random_model::config("qwen3", json!({})), 3);
    let checkpoint = Checkpoint::open(&model).unwrap();
    let empty = root.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    assert!(matches!(Adapter::open(&empty, &checkpoint), Err(AdapterError::NoConfig { .. })));
    let config = |text: &str| std::fs::write(empty.join("adapter_config.json"), text).unwrap();
    config("{}");
    assert!(matches!(Adapter::open(&empty, &checkpoint), Err(AdapterError::NoFile { .. })));
    let tensors = |tensors: &[(&str, &[usize])]| {
        let mut writer = SafetensorsWriter::with_notes(BTreeMap::new());
        for (name, shape) in tensors {
            let bytes = vec![0; 4 * shape.iter().product::<usize>()];
            writer.add(name, TensorDtype::F32, shape, bytes).unwrap();
        }
        writer.write(&empty.join("adapters.safetensors")).unwrap();
    };
    let path = "model.layers.1.self_attn.q_proj";
    let (a, b) = (format!("{path}.lora_a"), format!("{path}.lora_b"));
    tensors(&[(&a, &[64, 4]), (&b, &[4, 128])]);
    let problem = || Adapter::open(&empty, &checkpoint).unwrap_err().to_string();
    let configs = [
        ("{}", "lora_parameters.scale is missing"),
        (r#"{"lora_parameters": {"scale": "2"}}"#, "lora_parameters.scale must be a number"),
        (r#"{"fine_tune_type": "full"}"#, "fuse it into a model first"),
        (r#"{"fine_tune_type": "ia3"}"#, "fine_tune_type is \"ia3\""),
    ];
    for (text, part) in configs {
        config(text);
        assert!(problem().contains(part), "{}", problem());
    }
    config(r#"{"lora_parameters": {"scale": 2.0}}"#);
    assert!(Adapter::open(&empty, &checkpoint).is_ok());
    let lengths = format!("{path}.m");
    let files: [(&[(&str, &[usize])], &str); 6] = [
        (&[(&a, &[64, 4])], "has only one of its two matrices"),
        (&[(&a, &[64, 4]), (&b, &[4, 127])], "lora_b has shape [4, 127], but the model needs [4, 128]"),
        (&[(&a, &[64, 0]), (&b, &[0, 128])], "lora_a has shape [64, 0]"),
        (
            &[("model.layers.9.self_attn.q_proj.lora_a", &[64, 4])],
            "the model has no model.layers.9.self_attn.q_proj",
        ),
        (&[("model.norm.weight", &[64])], "model.norm.weight is no part of a LoRA or DoRA adapter"),
        (
            &[(&a, &[64, 4]), (&b, &[4, 128]), (&lengths, &[64])],
            "m has shape [64], but the model needs [128]",
        ),
    ];
    for (file, part) in files {
        tensors(file);
        assert!(problem().contains(part), "{} lacks {part}", problem());
    }
}
