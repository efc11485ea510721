//! Adapters that mlx-lm made do here what they do there; and rows of one batch with different adapters do not see each other.

#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

mod random_model;
mod support;

use mlxnode_checkpoint::{Adapter, AdapterError, Checkpoint, SafetensorsWriter, TensorDtype};
use mlxnode_compute::{
    BLOCK_TOKENS, BlockId, Keep, LayerRange, LogprobRequest, MicroBatch, Output, Row, RowOutput, Sampling,
    SequenceId, SequenceSpec, Stage, StageError, StepInput,
};
use mlxnode_engine::{
    BatchEvent, BatchGenerator, BatchOptions, EngineStage, GenerateError, Generator, GeneratorOptions, Model,
    StageOptions,
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

/// A family and its config, how it is packed, the kind of adapter, what it changes (default: all in the layers) and in how many layers.
type Case = (&'static str, Value, Value, &'static str, Option<Vec<&'static str>>, i32);

fn cases() -> Vec<Case> {
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

/// A pipeline of stages that load and unload adapters as they go.
struct Stages(Vec<EngineStage>);

impl Stages {
    fn load(model: &Path, count: usize) -> Self {
        let checkpoint = Checkpoint::open(model).unwrap();
        let layers = checkpoint.spec().layer_count();
        let bounds: Vec<usize> = (0..=count).map(|stage| stage * layers / count).collect();
        let stage = |pair: &[usize]| {
            let range = LayerRange::new(pair[0], pair[1]);
            EngineStage::load(&checkpoint, range, StageOptions::default(), &mut |_, _| {}).unwrap()
        };
        Self(bounds.windows(2).map(stage).collect())
    }

    fn add(&mut self, name: &str, folder: &Path) {
        self.0.iter_mut().for_each(|stage| stage.load_adapter(name, folder).unwrap());
    }

    fn remove(&mut self, name: &str) {
        self.0.iter_mut().for_each(|stage| stage.unload_adapter(name));
    }

    fn open(&mut self, id: u64, spec: &SequenceSpec) -> Result<(), StageError> {
        self.0.iter_mut().try_for_each(|stage| stage.open(SequenceId(id), spec.clone()))
    }

    fn close(&mut self, id: u64) {
        self.0.iter_mut().for_each(|stage| stage.close(SequenceId(id)));
    }

    fn run(&mut self, rows: &[Row]) -> Vec<RowOutput> {
        let mut batch = MicroBatch { rows: rows.to_vec(), input: StepInput::Tokens };
        let mut outputs = Vec::new();
        for stage in &mut self.0 {
            let output = stage.run(&batch).unwrap();
            outputs = output.rows;
            if let Some(activation) = output.activation {
                batch.input = StepInput::Activation(activation);
            }
        }
        outputs.into_iter().map(Result::unwrap).collect()
    }

    /// All of them to their ends, together: one joins with each step.
    fn answers(&mut self, requests: &[(Vec<u32>, SequenceSpec)]) -> Vec<(Vec<u32>, RowOutput)> {
        let mut answers: Vec<(Vec<u32>, RowOutput)> = vec![Default::default(); requests.len()];
        for step in 0..requests.len() + NEW_TOKENS {
            let mut rows = Vec::new();
            for (number, (prompt, spec)) in requests.iter().enumerate() {
                let tokens = &answers[number].0;
                if step < number || tokens.len() >= NEW_TOKENS || answers[number].1.embedding.is_some() {
                    continue;
                }
                let (position, tokens) = match tokens.last() {
                    None => {
                        self.open(number as u64, spec).unwrap();
                        (0, prompt.clone())
                    }
                    Some(last) => (prompt.len() + tokens.len() - 1, vec![*last]),
                };
                rows.push(Row {
                    sequence: SequenceId(number as u64),
                    position,
                    tokens,
                    sample: true,
                    guesses: vec![],
                });
            }
            // As a driver does: single tokens first.
            rows.sort_by_key(|row| row.tokens.len() > 1);
            for (row, output) in rows.iter().zip(self.run(&rows)) {
                let answer = &mut answers[row.sequence.0 as usize];
                answer.0.extend(output.sampled.as_ref().map(|sampled| sampled.token));
                if answer.1.scores.is_empty() {
                    answer.1.scores.clone_from(&output.scores);
                }
                answer.1.embedding = answer.1.embedding.take().or(output.embedding);
                if answer.0.len() >= NEW_TOKENS || answer.1.embedding.is_some() {
                    self.close(row.sequence.0);
                }
            }
        }
        answers
    }
}

#[test]
fn sequences_of_a_pipeline_have_their_own_adapters() {
    let root = folder();
    for (name, config) in [
        ("qwen3", random_model::config("qwen3", json!({}))),
        ("qwen3_moe", random_model::parity_config("qwen3_moe")),
    ] {
        let model = root.path().join(name);
        random_model::write(&model, &config, 3);
        let keys = ["self_attn.q_proj", "mlp.down_proj", "model.embed_tokens", "lm_head"];
        let case = |number: u32| {
            let mut parameters = json!({"rank": 1 + number, "scale": 4.0, "dropout": 0.0});
            if name == "qwen3" {
                parameters["keys"] = json!(keys);
            }
            json!({"model": model, "adapter": root.path().join(format!("{name}-{number}")), "kind": "lora",
                "parameters": parameters, "layers": -1, "seed": number, "prompts": [], "tokens": 1})
        };
        let _: Answers = ask("adapters.py", root.path(), &json!({"cases": [case(1), case(2)]}));
        let folders = [root.path().join(format!("{name}-1")), root.path().join(format!("{name}-2"))];
        let adapters = [("one", folders[0].as_path()), ("two", folders[1].as_path())];
        let mut alone = Generator::new(load(&model, &adapters), GeneratorOptions::default()).unwrap();
        let mut requests = Vec::new();
        for (number, adapter) in [None, Some("one"), Some("two"), Some("one"), None].into_iter().enumerate() {
            let input = prompt(3 + 11 * number, VOCABULARY as u64, 7);
            let scored =
                SequenceSpec { prompt_logprobs: Some(LogprobRequest { top: 0 }), ..spec(&input, adapter) };
            let embedded = SequenceSpec { output: Output::Embedding, ..spec(&input, adapter) };
            requests.push((input.clone(), spec(&input, adapter)));
            requests.push((input.clone(), scored));
            requests.push((input, embedded));
        }
        let mut whole = Stages::load(&model, 1);
        let mut split = Stages::load(&model, 2);
        for stages in [&mut whole, &mut split] {
            for (name, folder) in adapters {
                stages.add(name, folder);
            }
        }
        let answers = whole.answers(&requests);
        for (other, answer) in split.answers(&requests).iter().zip(&answers) {
            assert_eq!(other.0, answer.0, "{name}: two stages");
        }
        for ((input, spec), answer) in requests.iter().zip(&answers) {
            let adapter = spec.adapter.as_deref();
            let what = format!("{name} {adapter:?} {:?}", spec.output);
            if spec.output == Output::Tokens {
                assert_eq!(answer.0, generate(&mut alone, input, adapter).0, "{what}");
            }
            // Scores and vectors in company equal those alone.
            let single = Stages::load(&model, 1).with(&adapters).answers(&[(input.clone(), spec.clone())]);
            let close = |(a, b): (f32, f32)| (a - b).abs() < 1e-4;
            let scores = |output: &RowOutput| -> Vec<f32> {
                output.scores.iter().filter_map(|score| score.logprob).collect()
            };
            let (own, others) = (scores(&single[0].1), scores(&answer.1));
            assert_eq!(own.len(), others.len(), "{what}");
            assert!(own.into_iter().zip(others).all(close), "{what}");
            let vector = |output: &RowOutput| output.embedding.clone().unwrap_or_default();
            assert!(vector(&single[0].1).into_iter().zip(vector(&answer.1)).all(close), "{what}");
        }
    }
}

impl Stages {
    fn with(mut self, adapters: &[(&str, &Path)]) -> Self {
        adapters.iter().for_each(|(name, folder)| self.add(name, folder));
        self
    }
}

#[test]
fn an_adapter_stays_for_those_that_have_it() {
    let root = folder();
    let model = root.path().join("model");
    random_model::write(&model, &random_model::config("qwen3", json!({})), 3);
    let case = |number: u32| {
        json!({"model": model, "adapter": root.path().join(number.to_string()), "kind": "lora",
            "parameters": {"rank": 4, "scale": 4.0, "dropout": 0.0}, "layers": -1, "seed": number,
            "prompts": [], "tokens": 1})
    };
    let _: Answers = ask("adapters.py", root.path(), &json!({"cases": [case(1), case(2)]}));
    let folders = [root.path().join("1"), root.path().join("2")];
    let mut alone =
        Generator::new(load(&model, &[("a", &folders[0]), ("b", &folders[1])]), GeneratorOptions::default())
            .unwrap();
    let input = prompt(9, VOCABULARY as u64, 7);
    let (first, second) =
        (generate(&mut alone, &input, Some("a")).0, generate(&mut alone, &input, Some("b")).0);
    assert_ne!(first, second);

    let mut stages = Stages::load(&model, 2).with(&[("a", &folders[0])]);
    let spec = spec(&input, Some("a"));
    let step = |stages: &mut Stages, id: u64, tokens: &mut Vec<u32>| {
        let (position, row) = match tokens.last() {
            None => (0, input.clone()),
            Some(last) => (input.len() + tokens.len() - 1, vec![*last]),
        };
        let row = Row { sequence: SequenceId(id), position, tokens: row, sample: true, guesses: vec![] };
        tokens.push(stages.run(&[row])[0].sampled.as_ref().unwrap().token);
    };
    stages.open(1, &spec).unwrap();
    let mut old = Vec::new();
    for _ in 0..4 {
        step(&mut stages, 1, &mut old);
    }
    // Another adapter takes the name while the first one is in use.
    stages.remove("a");
    let unknown = stages.open(2, &spec).unwrap_err();
    assert!(matches!(&unknown, StageError::Adapter(text) if text.contains("none is")), "{unknown}");
    stages.0[0].close(SequenceId(2));
    stages.add("a", &folders[1]);
    stages.open(3, &spec).unwrap();
    let mut new = Vec::new();
    for _ in 0..NEW_TOKENS {
        if old.len() < NEW_TOKENS {
            step(&mut stages, 1, &mut old);
        }
        step(&mut stages, 3, &mut new);
    }
    assert_eq!((old, new), (first, second));
    let before = stages.0[0].memory().active;
    stages.close(1);
    assert!(stages.0[0].memory().active < before, "the first adapter's memory is free");
    for wrong in [root.path(), Path::new("/nowhere/at/all")] {
        let refused = stages.0[0].load_adapter("x", wrong).unwrap_err();
        assert!(matches!(&refused, StageError::Adapter(_)), "{refused}");
    }
    let taken = stages.0[0].load_adapter("a", &folders[0]).unwrap_err();
    assert!(matches!(&taken, StageError::Adapter(text) if text.contains("already")), "{taken}");
}

#[test]
fn blocks_of_an_adapter_serve_nobody_else_not_even_another_one_of_its_name() {
    let root = folder();
    let model = root.path().join("model");
    random_model::write(&model, &random_model::config("qwen3", json!({})), 3);
    let case = |number: u32| {
        json!({"model": model, "adapter": root.path().join(number.to_string()), "kind": "lora",
            "parameters": {"rank": 4, "scale": 4.0, "dropout": 0.0}, "layers": -1, "seed": number,
            "prompts": [], "tokens": 1})
    };
    let _: Answers = ask("adapters.py", root.path(), &json!({"cases": [case(1), case(2)]}));
    let folders = [root.path().join("1"), root.path().join("2")];
    let input = prompt(BLOCK_TOKENS + 9, VOCABULARY as u64, 7);
    let mut stages = Stages::load(&model, 2).with(&[("a", &folders[0])]);
    let run = |stages: &mut Stages, id: u64, adapter: Option<&str>, reuse: &[BlockId]| {
        stages.open(id, &spec(&input, adapter)).unwrap();
        let id = SequenceId(id);
        for stage in &mut stages.0 {
            let store = stage.blocks().unwrap();
            if let Err(error) = store.begin_with(id, reuse) {
                stages.close(id.0);
                return Err(error);
            }
            if reuse.is_empty() {
                store.keep(id, Keep { number: 0, block: BlockId(id.0), checkpoint: true }).unwrap();
            }
        }
        let position = reuse.len() * BLOCK_TOKENS;
        let row =
            Row { sequence: id, position, tokens: input[position..].to_vec(), sample: true, guesses: vec![] };
        let sampled = stages.run(&[row]).remove(0).sampled.unwrap();
        stages.close(id.0);
        Ok((sampled.token, sampled.logprob.unwrap()))
    };
    let is_missing = |result: Result<_, StageError>, block: u64| {
        assert!(
            matches!(&result, Err(StageError::MissingBlock(missing)) if missing.0 == block),
            "{result:?}"
        );
    };
    let close = |(token, logprob): (u32, f32), (other, other_logprob): (u32, f32)| {
        assert!(token == other && (logprob - other_logprob).abs() < 1e-4, "{logprob} and {other_logprob}");
    };
    let changed = run(&mut stages, 1, Some("a"), &[]).unwrap();
    let plain = run(&mut stages, 2, None, &[]).unwrap();
    close(run(&mut stages, 3, Some("a"), &[BlockId(1)]).unwrap(), changed);
    close(run(&mut stages, 4, None, &[BlockId(2)]).unwrap(), plain);
    is_missing(run(&mut stages, 5, None, &[BlockId(1)]), 1);
    is_missing(run(&mut stages, 6, Some("a"), &[BlockId(2)]), 2);
    stages.remove("a");
    stages.add("a", &folders[1]);
    is_missing(run(&mut stages, 7, Some("a"), &[BlockId(1)]), 1);
    stages.remove("a");
    stages.add("a", &folders[0]);
    close(run(&mut stages, 8, Some("a"), &[BlockId(1)]).unwrap(), changed);
}

fn collect(batch: &mut BatchGenerator, heard: &mut HashMap<mlxnode_engine::RowId, Vec<u32>>) {
    for event in batch.step().unwrap() {
        if let BatchEvent::Token { row, event } = event {
            heard.entry(row).or_default().push(event.sampled.token);
        }
    }
}

/// Names and shapes.
type Tensors<'a> = &'a [(&'a str, &'a [usize])];

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
    let tensors = |tensors: Tensors<'_>| {
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
    let files: [(Tensors<'_>, &str); 6] = [
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
