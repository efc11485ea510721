//! Configuration, schedules, rows and batches against mlx-lm's.

#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

use mlxnode_hub::{Hub, ModelSource};
use mlxnode_testkit::oracle;
use mlxnode_text::{ChatTemplate, InProcess, TextFiles, Tokenizer};
use mlxnode_training::{
    BatchOptions, Batches, Count, DataError, Dataset, Encoder, Row, Sequence, Sets, TrainingConfig,
};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;

const CONFIGS: [&str; 3] = [
    "train: true\n",
    "model: a/b\ntrain: yes\nfine_tune_type: dora\noptimizer: adamw\noptimizer_config:\n  adamw: {betas: [0.9, 0.98], weight_decay: 1e-2}\n\
     learning_rate: 1e-5\nnum_layers: -1\nlora_parameters:\n  keys: [self_attn.q_proj, model.embed_tokens]\n  rank: 4\n  scale: 10\n  dropout: .1\n\
     lr_schedule:\n  name: cosine_decay\n  arguments: [2e-4, 100, 1e-6]\n  warmup: 10\nmask_prompt: on\nseed: 0x10\nresume_adapter_file: null\n",
    "test: true\nbatch_size: 010\nhf_dataset:\n  - path: a/b\n    train_split: \"train[:10%]\"\n    prompt_feature: q\n    completion_feature: a\nprompt_feature: question\n",
];

#[test]
fn arguments_are_those_of_mlx_lm() {
    let folder = tempfile::tempdir().unwrap();
    for text in CONFIGS {
        let file = folder.path().join("lora.yaml");
        std::fs::write(&file, text).unwrap();
        let file = file.to_str().unwrap();
        let ours = TrainingConfig::from_yaml(text, file).unwrap();
        let ours: Value = serde_json::from_str(&ours.adapter_config()).unwrap();
        let theirs: Value = oracle::run("training_data.py", &["arguments", file]).unwrap();
        assert_eq!(ours, theirs, "{text}");
        let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&ours), keys(&theirs), "the order of the keys");
    }
}

#[test]
fn schedules_have_the_values_of_mlx() {
    let settings = json!([
        {"name": "exponential_decay", "arguments": [1e-3, 0.97]},
        {"name": "step_decay", "arguments": [1e-3, 0.5, 7]},
        {"name": "cosine_decay", "arguments": [1e-5, 30]},
        {"name": "cosine_decay", "arguments": [2e-4, 20, 1e-6], "warmup": 5, "warmup_init": 1e-7},
        {"name": "linear_schedule", "arguments": [1e-4, 1e-6, 25], "warmup": 8},
        {"name": "step_decay", "arguments": [1, 0.9, 3], "warmup": 1},
    ]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("schedules.json");
    std::fs::write(&file, settings.to_string()).unwrap();
    let theirs: Vec<Vec<f64>> =
        oracle::run("training_data.py", &["schedules", file.to_str().unwrap()]).unwrap();
    for (settings, theirs) in settings.as_array().unwrap().iter().zip(theirs) {
        let text = json!({"train": true, "lr_schedule": settings}).to_string();
        let schedule = TrainingConfig::from_yaml(&text, "a.yaml").unwrap().schedule;
        for (step, value) in theirs.into_iter().enumerate() {
            let ours = schedule.at(step as u64);
            // Powers and cosines may differ in the last bit of single precision; a cosine's is that of 1.
            let (error, first) = ((ours - value).abs(), settings["arguments"][0].as_f64().unwrap());
            assert!(
                error <= 1.5e-7 * value.abs() + 1e-7 * first,
                "{settings} after {step}: {ours} for {value}"
            );
        }
    }
}

/// Rows of chance lengths; the same in JSON.
fn rows(count: u32, seed: u32, longest: u32) -> (Dataset, Value, usize) {
    let (mut dataset, mut written) = (Dataset::default(), Vec::new());
    let mut state = seed;
    let mut chance = |below: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % below
    };
    for _ in 0..count {
        let length = 1 + chance(longest);
        let tokens: Vec<u32> = (0..length).map(|_| 1 + chance(900)).collect();
        let offset = if chance(3) == 0 { 0 } else { chance(length) };
        let fields = 1 + chance(3);
        written.push(json!({"tokens": tokens, "offset": offset, "fields": fields - 1}));
        let counted = std::iter::once(offset.max(1)..length).collect();
        dataset.push(Row::Single(Sequence { tokens, counted }), fields as usize, MAX_SEQ_LENGTH);
    }
    (dataset, Value::Array(written), count as usize)
}

const MAX_SEQ_LENGTH: usize = 90;

#[test]
fn in_parity_batches_are_those_of_mlx_lm() {
    for (seed, train, valid, batch_size, iters, steps_per_eval, val_batches) in
        [(0, 23, 9, 4, 30, 7, 2), (5, 8, 8, 8, 5, 2, -1), (7, 13, 0, 3, 9, 2, 25), (9, 12, 12, 3, 13, 4, 0)]
    {
        let ((train, train_json, _), (valid, valid_json, _)) =
            (rows(train, seed, 100), rows(valid, seed + 1, 100));
        let run = json!({
            "seed": seed, "train": train_json, "valid": valid_json, "batch_size": batch_size, "iters": iters,
            "steps_per_eval": steps_per_eval, "val_batches": val_batches, "max_seq_length": MAX_SEQ_LENGTH,
        });
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("run.json");
        std::fs::write(&file, run.to_string()).unwrap();
        let theirs: Vec<Value> =
            oracle::run("training_data.py", &["batches", file.to_str().unwrap()]).unwrap();
        let options = BatchOptions {
            batch_size,
            max_seq_length: MAX_SEQ_LENGTH,
            seed,
            packing: false,
            parity: true,
            iters,
            steps_per_eval,
            val_batches: u64::try_from(val_batches).map_or(Count::All, Count::Of),
            test_batches: Count::All,
        };
        let sets = Sets { train: Arc::new(train), valid: Arc::new(valid), test: Arc::default() };
        let mut batches = Batches::new(options, sets).unwrap();
        for (theirs, iteration) in theirs.iter().zip(1..) {
            let training = batches.training(iteration);
            let blocks = batches.validation(iteration);
            let validation: Vec<_> = blocks.iter().map(|block| shown(&batches.valid_batch(block))).collect();
            let ours = json!({"training": shown(&training), "validation": validation});
            assert_eq!(&ours, theirs, "seed {seed}, iteration {iteration}");
        }
    }
}

fn shown(batch: &mlxnode_training::MicroBatch) -> Value {
    let rows = |values: Vec<i32>, columns: usize| -> Vec<Vec<i32>> {
        values.chunks(columns).map(<[i32]>::to_vec).collect()
    };
    let mask = batch.mask().into_iter().map(|counts| counts as i32).collect();
    json!({"ids": rows(batch.ids(), batch.width), "mask": rows(mask, batch.width - 1)})
}

/// A template that thinks in its last turn only, as Qwen3's does, and knows tools.
const THINKING: &str = "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}{% for m in messages %}{{ '<|' + m.role + '|>' }}\
    {% if m.role == 'assistant' and loop.last %}<think>{{ m.reasoning_content or '' }}</think>{% endif %}\
    {{ (m.content or '') | trim }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}";

const CHATS: &str = r#"{"messages": [{"role": "user", "content": "What is 1 + 2?"}, {"role": "assistant", "content": "3"}]}
{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello  "}, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Bye", "reasoning_content": "done"}]}
{"messages": [{"role": "user", "content": "Unanswered"}]}
{"tools": [{"type": "function", "function": {"name": "f"}}], "messages": [{"role": "user", "content": "é ü"}, {"role": "assistant", "content": ""}, {"role": "tool", "content": "4"}, {"role": "assistant", "content": "four"}]}
"#;
const PAIRS: &str = "{\"prompt\": \"1 + 1\", \"completion\": \"2\"}\n{\"prompt\": \"Sort 3, 2\", \"completion\": \"2, 3\", \"tools\": null}\n";
const QUESTIONS: &str = "{\"q\": \"1 + 1\", \"a\": \"2\", \"text\": \"no\"}\n";
const TEXTS: &str = "{\"text\": \"One text\"}\n{\"text\": \"ends<|end|>\", \"more\": 1}\n";

/// The demo's tokenizer with this chat template.
fn text_model(folder: &Path, template: Option<&str>) -> (Tokenizer, Option<ChatTemplate>) {
    let options = mlxnode_hub::Options::from_lookup(|_| None);
    let hub = Hub::new(mlxnode_hub::Options { cache: folder.join("cache"), ..options });
    let demo = hub.resolve(&ModelSource::Demo, &|_| {}).unwrap();
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
        std::fs::copy(demo.join(file), folder.join(file)).unwrap();
    }
    if let Some(template) = template {
        std::fs::write(folder.join("chat_template.jinja"), template).unwrap();
    }
    let files = TextFiles::read(folder).unwrap();
    let tokenizer = Tokenizer::from_files(&files).unwrap();
    let template = ChatTemplate::from_files(&files, &tokenizer, Arc::new(InProcess::default())).unwrap();
    (tokenizer, template)
}

#[test]
fn rows_are_those_of_mlx_lm() {
    let names = "prompt_feature: q\ncompletion_feature: a\n";
    for (template, rows, settings) in [
        (None, CHATS, ""),
        (None, CHATS, "mask_prompt: true\n"),
        (Some(THINKING), CHATS, "mask_prompt: true\n"),
        (None, PAIRS, "mask_prompt: true\n"),
        (None, PAIRS, ""),
        (None, QUESTIONS, names),
        (None, TEXTS, ""),
    ] {
        // Of a single message mlx-lm cannot mask what comes before it.
        let is_taken = |line: &&str| !(settings.contains("mask") && line.contains("Unanswered"));
        let rows: String = rows.lines().filter(is_taken).map(|line| format!("{line}\n")).collect();
        let folder = tempfile::tempdir().unwrap();
        let (tokenizer, template) = text_model(folder.path(), template);
        let data = folder.path().join("data");
        std::fs::create_dir(&data).unwrap();
        for name in ["train", "test"] {
            std::fs::write(data.join(format!("{name}.jsonl")), &rows).unwrap();
        }
        let config = TrainingConfig::from_yaml(&format!("train: true\ntest: true\n{settings}"), "a").unwrap();
        std::fs::write(data.join("settings.json"), Value::Object(config.arguments().clone()).to_string())
            .unwrap();
        let encoder = Encoder::new(tokenizer, template, &config);
        let sets = Sets::read(&config, std::slice::from_ref(&data), &encoder, &|_| {}).unwrap();
        let [folder, data] = [folder.path(), &data].map(|path| path.to_str().unwrap().to_owned());
        let theirs: Vec<Vec<(Vec<u32>, u32)>> =
            oracle::run("training_data.py", &["dataset", &folder, &data]).unwrap();
        for (ours, theirs) in [&sets.train, &sets.valid, &sets.test].into_iter().zip(&theirs) {
            assert_eq!(ours.len(), theirs.len(), "{settings} {rows}");
            for (row, (tokens, offset)) in (0..).map_while(|row| ours.row(row)).zip(theirs) {
                let ours = row.sequence();
                assert_eq!(&ours.tokens, tokens, "{settings}");
                let end = tokens.len() as u32;
                let start = (*offset).max(1);
                let counted = (start < end).then_some(start..end);
                assert_eq!(ours.counted, Vec::from_iter(counted), "{settings} {tokens:?}");
            }
        }
    }
}

/// What of a row's tokens counts, as text.
fn counted(tokenizer: &Tokenizer, sequence: &Sequence) -> Vec<String> {
    let text = |range: &std::ops::Range<u32>| {
        tokenizer.decode(&sequence.tokens[range.start as usize..range.end as usize], false).unwrap()
    };
    sequence.counted.iter().map(text).collect()
}

fn read(rows: &str, settings: &str, template: Option<&str>) -> (Tokenizer, Result<Sets, DataError>) {
    let folder = tempfile::tempdir().unwrap();
    let (tokenizer, template) = text_model(folder.path(), template);
    let file = folder.path().join("rows.jsonl");
    std::fs::write(&file, rows).unwrap();
    let config = TrainingConfig::from_yaml(&format!("train: true\n{settings}"), "a").unwrap();
    let encoder = Encoder::new(tokenizer.clone(), template, &config);
    (tokenizer, Sets::read(&config, &[file], &encoder, &|_| {}))
}

#[test]
fn every_answer_can_count() {
    for (template, expected) in [
        (None, [vec!["3<|end|>"], vec!["Hello<|end|>", "Bye<|end|>"]]),
        (
            Some(THINKING),
            [vec!["<think></think>3<|end|>\n"], vec!["Hello<|end|>", "<think>done</think>Bye<|end|>\n"]],
        ),
    ] {
        let rows: String = CHATS.lines().take(2).map(|line| format!("{line}\n")).collect();
        let (tokenizer, sets) = read(&rows, "mask_turns: every\n", template);
        let sets = sets.unwrap();
        for (row, expected) in (0..).zip(expected) {
            let sequence = sets.train.row(row).unwrap().sequence();
            assert_eq!(counted(&tokenizer, sequence), expected);
        }
    }
    let (_, sets) = read(CHATS, "mask_turns: every\n", None);
    let error = sets.unwrap_err().to_string();
    assert!(
        error.ends_with("rows.jsonl line 3: no message of it is an answer (\"assistant\"): nothing to learn"),
        "{error}"
    );
}

#[test]
fn pairs_of_answers_come_in_three_forms() {
    let rows = r#"{"prompt": "1 + 1", "chosen": "2", "rejected": "3"}
{"prompt": [{"role": "user", "content": "1 + 1"}], "chosen": [{"role": "assistant", "content": "2"}], "rejected": "3"}
{"chosen": [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}], "rejected": [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "3"}]}
"#;
    let (tokenizer, sets) = read(rows, "preference: dpo\n", None);
    let sets = sets.unwrap();
    for row in 0..3 {
        let Some(Row::Pair { chosen, rejected }) = sets.train.row(row) else { panic!("no pair") };
        assert_eq!(counted(&tokenizer, chosen), ["2<|end|>"]);
        assert_eq!(counted(&tokenizer, rejected), ["3<|end|>"]);
        assert_eq!(chosen.tokens[..chosen.tokens.len() - 2], rejected.tokens[..rejected.tokens.len() - 2]);
    }
    let options = BatchOptions {
        batch_size: 2,
        max_seq_length: 64,
        seed: 0,
        packing: false,
        parity: false,
        iters: 4,
        steps_per_eval: 2,
        val_batches: Count::All,
        test_batches: Count::All,
    };
    let mut batches = Batches::new(options, sets).unwrap();
    let batch = batches.training(1);
    assert!(batch.is_preference);
    let half = batch.rows.len() / 2;
    for (better, worse) in batch.rows[..half].iter().zip(&batch.rows[half..]) {
        assert_eq!(better.numbers, worse.numbers);
        assert_ne!(better.tokens, worse.tokens);
    }
}

#[test]
fn rows_that_cannot_be_learned_from_are_named() {
    for (rows, settings, expected) in [
        (
            "{\"x\": 1}\n",
            "",
            "rows.jsonl line 1: a row needs \"prompt\" and \"completion\", or \"messages\", or \"text\", but has [\"x\"]",
        ),
        ("{\"text\": \"a\"}\n{\"text\": \"\"}\n", "", "rows.jsonl line 2: \"text\" is empty"),
        ("{\"text\": \"a\"}\n{\"text\": 3}\n", "", "rows.jsonl line 2: \"text\" is not a text"),
        (
            "{\"text\": \"a\"}\n",
            "mask_prompt: true\n",
            "rows.jsonl line 1: rows of plain text have no prompt that could be masked",
        ),
        ("{\"messages\": []}\n", "", "rows.jsonl line 1: \"messages\" is empty"),
        (
            "{\"messages\": [{\"content\": \"x\"}]}\n",
            "",
            "rows.jsonl line 1: message 0 of \"messages\" is not an object with a \"role\"",
        ),
        (
            "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": \"a\"}\n",
            "",
            "rows.jsonl line 2: there is no \"completion\"",
        ),
        (
            "{\"prompt\": \"a\", \"completion\": \"b\", \"tools\": 3}\n",
            "",
            "rows.jsonl line 1: \"tools\" is not a list of objects",
        ),
        (
            "{\"prompt\": \"a\"}\n",
            "preference: orpo\n",
            "rows.jsonl line 1: preference training needs \"chosen\" and \"rejected\"",
        ),
        ("", "", "the training set has no rows: there is nothing to learn from"),
    ] {
        let error = read(rows, settings, None).1.unwrap_err().to_string();
        assert!(error.contains(expected), "{rows}: {error}");
    }
}

#[test]
fn long_rows_are_cut_and_counted() {
    let rows = "{\"prompt\": \"1 + 1 + 1 + 1 + 1 + 1\", \"completion\": \"6\"}\n{\"prompt\": \"1\", \"completion\": \"1\"}\n";
    let (_, sets) = read(rows, "max_seq_length: 8\nmask_prompt: true\n", None);
    let cut = sets.unwrap().train.cut();
    assert_eq!((cut.rows, cut.without_targets), (1, 1));
    assert_eq!(cut.tokens + 8, cut.longest);
}

#[test]
fn the_examples_can_be_trained_on() {
    // A relative path, as people name it.
    for (folder, file, rows) in
        [("successor", "lora.yaml", [410, 40, 50]), ("preference", "orpo.yaml", [240, 32, 0])]
    {
        let data = Path::new("../../examples").join(folder);
        let text = std::fs::read_to_string(data.join(file)).unwrap();
        let config = TrainingConfig::from_yaml(&text, file).unwrap();
        let place = tempfile::tempdir().unwrap();
        let (tokenizer, template) = text_model(place.path(), None);
        let encoder = Encoder::new(tokenizer, template, &config);
        let sets = Sets::read(&config, &[data], &encoder, &|_| {}).unwrap();
        assert_eq!([&sets.train, &sets.valid, &sets.test].map(|set| set.len()), rows, "{folder}");
        assert_eq!(sets.train.cut().rows + sets.train.cut().without_targets, 0, "{folder}");
        let mut batches = Batches::new(BatchOptions::from(&config), sets).unwrap();
        assert!(batches.training(1).counted_tokens() > 0);
    }
}
