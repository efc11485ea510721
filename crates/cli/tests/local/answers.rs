//! What `generate` says, and what changes it.

use super::{NO_END, User, check_sentence, damaged, demo_folder, edit, stderr};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A folder with an adapter for the demo model whose changes are `strength` large.
fn adapter(folder: &Path, strength: f32) -> PathBuf {
    use mlxnode_checkpoint::{SafetensorsWriter, TensorDtype};
    let config: Value =
        serde_json::from_slice(&std::fs::read(demo_folder().join("config.json")).unwrap()).unwrap();
    let hidden = config["hidden_size"].as_u64().unwrap() as usize;
    let folder = folder.join(format!("adapter-{strength}"));
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("adapter_config.json"), r#"{"lora_parameters": {"scale": 1.0}}"#).unwrap();
    let mut writer = SafetensorsWriter::with_notes(std::collections::BTreeMap::new());
    for (name, shape) in [("lora_a", [hidden, 1]), ("lora_b", [1, hidden])] {
        let bytes = (0..hidden).flat_map(|index| (strength * (index % 3) as f32).to_le_bytes()).collect();
        let name = format!("model.layers.0.self_attn.o_proj.{name}");
        writer.add(&name, TensorDtype::F32, &shape, bytes).unwrap();
    }
    writer.write(&folder.join("adapters.safetensors")).unwrap();
    folder
}

#[test]
fn an_adapter_changes_the_answer() {
    let user = User::new();
    let answer = |extra: &[&str]| user.says(&[&["generate", "-p", "What is 17 + 25?"], extra].concat());
    let plain = answer(&[]);
    let of = |strength: f32| {
        let folder = adapter(user.home.path(), strength);
        answer(&["--adapter-path", folder.to_str().unwrap()])
    };
    assert_eq!(of(0.0), plain);
    assert_ne!(of(0.5), plain);
}

#[test]
fn the_demo_model_adds() {
    let user = User::new();
    let output = user.run(&["generate", "--prompt", "What is 17 + 25?"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "42\n");
    let said = stderr(&output);
    for words in ["==========", "Prompt: ", "Generation: ", "Peak memory: ", "tokens-per-sec"] {
        assert!(said.contains(words), "{said}");
    }
    let silent = user.run(&["generate", "--prompt", "What is 17 + 25?", "--verbose", "false"]);
    assert_eq!((String::from_utf8_lossy(&silent.stdout).as_ref(), stderr(&silent).as_str()), ("42\n", ""));
    let from_stdin = user.run_with_input(&["generate", "-q", "--prompt", "-"], "What is 2 + 3?");
    assert_eq!(String::from_utf8_lossy(&from_stdin.stdout), "5\n");
}

#[test]
fn json_has_exactly_the_promised_fields() {
    let user = User::new();
    let plain = [
        "text",
        "content",
        "reasoning",
        "tool_calls",
        "token_ids",
        "prompt_tokens",
        "cached_tokens",
        "generation_tokens",
        "prompt_tps",
        "generation_tps",
        "peak_memory_bytes",
        "finish_reason",
    ];
    let answer = user.json(&["generate", "--prompt", "What is 17 + 25?"]);
    let fields: Vec<&str> = answer.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(fields, plain);
    assert_eq!((&answer["text"], &answer["finish_reason"]), (&"42".into(), &"stop".into()));
    let tokens = answer["token_ids"].as_array().unwrap().len();
    assert_eq!(answer["generation_tokens"], tokens);
    assert!(
        answer["prompt_tokens"].as_u64() > Some(5) && answer["peak_memory_bytes"].as_u64() > Some(100_000)
    );
    assert!(answer["prompt_tps"].as_f64() > Some(0.0) && answer["generation_tps"].as_f64() > Some(0.0));

    let detailed = user.json(&["generate", "--prompt", "What is 17 + 25?", "--logprobs", "3"]);
    let fields: Vec<&str> = detailed.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(fields, [plain.as_slice(), &["logprobs"]].concat());
    let logprobs = detailed["logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), tokens);
    for (entry, token) in logprobs.iter().zip(detailed["token_ids"].as_array().unwrap()) {
        let top = entry["top"].as_array().unwrap();
        assert_eq!((&entry["token_id"], top.len()), (token, 3));
        // Greedy: the chosen token is the most likely one.
        assert_eq!((&top[0]["token_id"], &top[0]["logprob"]), (token, &entry["logprob"]));
        assert!(entry["logprob"].as_f64().unwrap() <= 0.0);
    }
}

#[test]
fn answers_end_where_they_are_told_to() {
    let user = User::new();
    let length = user.json(&["generate", "--prompt", "What is 17 + 25?", "-m", "1"]);
    assert_eq!((&length["finish_reason"], &length["generation_tokens"]), (&"length".into(), &1.into()));
    let stopped = user.json(&["generate", "--prompt", "Sort 31, 4, 15", "--stop", ", 31", "--stop", "zzz"]);
    assert_eq!((&stopped["text"], &stopped["finish_reason"]), (&"4, 15".into(), &"stop".into()));
    let extra =
        user.json(&["generate", "--prompt", "Sort 31, 4, 15", "--extra-eos-token", ",", "--seed", "1"]);
    assert_eq!((&extra["text"], &extra["finish_reason"]), (&"4".into(), &"stop".into()));
    let begun = user.json(&["generate", "--prompt", "Sort 31, 4, 15", "--prefill-response", "4, 15,"]);
    assert_eq!(begun["text"].as_str().unwrap().trim(), "31");
}

#[test]
fn the_same_seed_gives_the_same_answer() {
    let user = User::new();
    let draw = |seed: &str| {
        let flags = [
            "generate",
            "--prompt",
            "Sort 31, 4, 15",
            "--temp",
            "3",
            "--top-p",
            "0.95",
            "--seed",
            seed,
            "-m",
            "40",
        ];
        user.json(&[flags.as_slice(), &NO_END].concat())["token_ids"].clone()
    };
    assert_eq!(draw("7"), draw("7"));
    assert_ne!(draw("7"), draw("8"));
}

#[test]
fn guesses_and_caches_change_the_speed_and_no_word() {
    let user = User::new();
    let question = ["generate", "--prompt", "Sort 31, 4, 15", "--seed", "3"];
    let plain = user.json(&question);
    assert!(plain.get("guessed_tokens").is_none());
    for flags in [
        &["--draft-model", "demo"][..],
        &["--draft-model", "demo", "--num-draft-tokens", "1"],
        &["--prompt-lookup", "1", "--num-draft-tokens", "2"],
        &["--prompt-lookup"],
        &["--max-kv-size", "64"],
        &["--prefill-step-size", "1"],
    ] {
        let found = user.json(&[question.as_slice(), flags].concat());
        assert_eq!(found["token_ids"], plain["token_ids"], "{flags:?}");
        if flags[0] == "--draft-model" {
            // The model itself guesses right; only what comes after the end is of no use.
            let tokens = |field: &str| found[field].as_u64().unwrap();
            let (guessed, accepted) = (tokens("guessed_tokens"), tokens("accepted_tokens"));
            assert!(accepted > 2 && guessed - accepted <= 3, "{flags:?}: {accepted} of {guessed}");
        }
    }
    let packed = user.json(
        &[question.as_slice(), &["--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "0"]]
            .concat(),
    );
    assert_eq!(packed["text"], plain["text"], "8 bits are enough for a sort");
    let said = stderr(&user.run(&["generate", "--draft-model", "demo", "-p", "Sort 31, 4, 15"]));
    assert!(said.contains("\nGuesses: "), "{said}");
}

#[test]
fn thoughts_are_told_from_the_answer() {
    let user = User::new();
    let (_folder, model) = damaged(|folder| {
        // Two tokens that the demo model has no use for become the marks of reasoning.
        let tokenizer = std::fs::read_to_string(folder.join("tokenizer.json")).unwrap();
        let marked = tokenizer.replace("<|system|>", "<think>").replace("<|pad|>", "</think>");
        std::fs::write(folder.join("tokenizer.json"), marked).unwrap();
        let _ = std::fs::remove_file(folder.join("special_tokens_map.json"));
        edit(&folder.join("tokenizer_config.json"), |config| {
            config["pad_token"] = Value::Null;
            config["chat_template"] = "{{ bos_token }}{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}\
                {% if not loop.last or message.role == 'user' %}{{ '<|end|>' }}{% endif %}{% endfor %}\
                {% if add_generation_prompt %}{{ '<|assistant|>' + ('<think>' if enable_thinking else '') }}{% endif %}"
                .into();
        });
    });
    let question = ["generate", "--model", &model, "-m", "6", "--prompt", "What is 17 + 25?"];
    let thought = user.json(&question);
    assert!(!thought["text"].as_str().unwrap().is_empty(), "{thought}");
    assert_eq!((&thought["content"], &thought["reasoning"]), (&"".into(), &thought["text"]));
    assert_eq!(thought["tool_calls"], Value::Array(Vec::new()));
    let said = user.json(&[question.as_slice(), &["--no-thinking"]].concat());
    assert_eq!(
        (&said["text"], &said["content"], &said["reasoning"]),
        (&"42".into(), &"42".into(), &Value::Null)
    );
    let ended = user.json(&[question.as_slice(), &["--prefill-response", "<think>Hm.</think>"]].concat());
    assert_eq!((&ended["content"], &ended["reasoning"]), (&ended["text"], &Value::Null));
    // As text it stays as the model wrote it.
    let raw = user.says(&[question.as_slice(), &["-q"]].concat());
    assert_eq!(raw.trim_end(), thought["text"].as_str().unwrap().trim_end());
}

#[test]
fn a_prompt_is_processed_once_and_gone_on_from() {
    let user = User::new();
    let file = user.home.path().join("sort.safetensors");
    let path = file.to_str().unwrap();
    let said = user.says(&["cache-prompt", "--prompt", "Sort 31, 4", "--prompt-cache-file", path]);
    assert!(said.starts_with(path) && said.contains(" tokens, "), "{said}");
    let on = ["generate", "-p", ", 15", "--prompt-cache-file", path];
    let whole = user.json(&["generate", "-p", "Sort 31, 4, 15"]);
    for _ in 0..2 {
        let found = user.json(&on);
        assert_eq!((&found["text"], &found["prompt_tokens"]), (&whole["text"], &whole["prompt_tokens"]));
        assert!(found["cached_tokens"].as_u64() > Some(5), "{found}");
    }
    let (_folder, other) = damaged(|_| ());
    let refused = user.run(&[on.as_slice(), &["--model", &other]].concat());
    check_sentence(&refused, &["other model"], "was made by the model demo, but --model is");

    let made = user.json(&[
        "cache-prompt",
        "--prompt",
        "Sort 31, 4",
        "--prompt-cache-file",
        path,
        "--kv-bits",
        "8",
        "--kv-group-size",
        "32",
        "--quantized-kv-start",
        "0",
        "--eos-token",
        ",",
    ]);
    let fields: Vec<&str> = made.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(fields, ["file", "model", "prompt_tokens", "prompt_tps", "bytes", "peak_memory_bytes"]);
    let refused = user.run(&[on.as_slice(), &["--kv-bits", "4", "--kv-group-size", "32"]].concat());
    check_sentence(&refused, &["other bits"], "is packed with 8 bits and groups of 32, but --kv-bits is 4");
    // The token that ends answers came with the file.
    assert_eq!(user.json(&on)["text"], "4");
}

#[test]
fn answers_have_the_form_that_was_asked_for() {
    let user = User::new();
    let write = |name: &str, text: &str| {
        let path = user.home.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    // The demo model has never seen JSON; a number is what it would write of it.
    let schema = r#"{"type": "integer", "minimum": 10, "maximum": 19}"#;
    let file = write("schema.json", schema);
    let generate = ["generate", "-p", "What is 2 + 3?"];
    let ask = |flags: &[&str]| user.json(&[&generate, flags].concat());
    let answer = ask(&["--json-schema", &file]);
    let number: u32 = answer["text"].as_str().unwrap().parse().unwrap();
    assert_eq!(((10..20).contains(&number), &answer["finish_reason"]), (true, &"stop".into()), "{answer}");
    let output = user.run_with_input(&[&generate[..], &["--json-schema", "-", "--json"]].concat(), schema);
    let piped: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(piped["token_ids"], answer["token_ids"]);
    let drawn = ask(&["--regex", "(red|green) [0-9]{3}", "--temp", "2", "--seed", "7"]);
    let text = drawn["text"].as_str().unwrap();
    let (colour, number) = text.split_once(' ').unwrap();
    assert!(
        ["red", "green"].contains(&colour) && number.len() == 3 && number.parse::<u32>().is_ok(),
        "{text}"
    );
    let lark = write("grammar.lark", "start: \"yes\" | \"no\"");
    assert!(
        ["yes", "no"].contains(&ask(&["--lark", &lark, "--ignore-chat-template"])["text"].as_str().unwrap())
    );

    let tools = write("tools.json", r#"[{"type": "function", "function": {"name": "add"}}]"#);
    let chat = ["chat", "--json-schema", "-"];
    for (flags, named) in [
        (&["--json-schema", "/no/such/file"][..], "/no/such/file"),
        (&["--json-schema", &lark], "is not JSON"),
        (&["--regex", "("], "regular expression"),
        (&["--tools", &tools], "this model knows no tool calls"),
        (&["--tools", &tools, "--ignore-chat-template"], "--tools needs the model's chat template"),
        (&["--adapter", "mine"], "use --adapter-path FOLDER"),
        (&["--prompt", "-", "--json-schema", "-"], "both read stdin"),
    ] {
        let arguments = if flags.contains(&"--prompt") { flags } else { &[&generate[1..], flags].concat() };
        check_sentence(&user.run(&[&["generate"], arguments].concat()), flags, named);
    }
    check_sentence(&user.run(&chat), &chat, "put the schema into a file");
}
