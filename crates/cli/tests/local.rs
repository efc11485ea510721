//! The command line in one process: help, wrong inputs, and answers of the demo model.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests are test code, too

use serde_json::Value;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Ends that the demo model would choose by itself become impossible with this bias.
const NO_END: [&str; 2] = ["--logit-bias", r#"{"2": -10000}"#];

/// A user of whom nothing is known yet.
struct User {
    home: TempDir,
}

impl User {
    fn new() -> Self {
        Self { home: tempfile::tempdir().unwrap() }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mlxnode"));
        for name in ["RUST_LOG", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN", "MLXNODE_DATA_DIR"] {
            command.env_remove(name);
        }
        command.env("HF_HOME", self.home.path().join("huggingface")).env("HF_HUB_OFFLINE", "1");
        command.args(arguments).arg("--data-dir").arg(self.home.path().join("data"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn run_with_input(&self, arguments: &[&str], input: &str) -> Output {
        let mut child = self.command(arguments).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    }

    /// What a successful command printed.
    fn says(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let said = self.says(&[arguments, &["--json"]].concat());
        serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"))
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn demo_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../hub/demo-model/model")
}

/// What to break in a model's folder.
type Damage = fn(&Path);

/// A copy of the demo model in which something is wrong.
fn damaged(damage: impl FnOnce(&Path)) -> (TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(demo_folder()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    damage(folder.path());
    let name = folder.path().to_str().unwrap().to_owned();
    (folder, name)
}

fn edit(file: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(file, value.to_string()).unwrap();
}

#[test]
fn every_help_teaches_by_example() {
    let user = User::new();
    let commands = [
        "join",
        "invite",
        "leave",
        "forget",
        "status",
        "plan",
        "load",
        "unload",
        "models",
        "generate",
        "chat",
        "cache-prompt",
        "benchmark",
        "perplexity",
        "lora",
        "fuse",
        "jobs",
        "completions",
    ];
    let top = user.says(&["--help"]);
    assert!(top.contains("Exit status:") && top.contains("130"), "{top}");
    assert!(!top.contains("worker"), "{top}");
    for command in commands {
        assert!(top.contains(&format!("  {command} ")), "{command} is not in: {top}");
        let help = user.says(&[command, "--help"]);
        assert!(help.contains(&format!("Examples:\n  mlxnode {command}")), "{help}");
    }
    assert!(user.says(&["--version"]).contains("libmlx"));
    // A heading covers the flags that belong to it and no others.
    for (command, flag, heading) in [
        ("generate", "--prompt <", "Options:"),
        ("generate", "--logprobs", "Options:"),
        ("generate", "--prompt-cache-file", "Options:"),
        ("chat", "--no-history", "Options:"),
        ("generate", "--xtc-threshold", "Sampling:"),
        ("chat", "--kv-bits", "Memory (in this process):"),
        ("chat", "--prompt-lookup", "Speed (in this process):"),
        ("cache-prompt", "--eos-token", "Options:"),
    ] {
        let help = user.says(&[command, "--help"]);
        let before = &help[..help.find(&format!(" {flag}")).unwrap()];
        let last = before.lines().rfind(|line| line.ends_with(':') && !line.starts_with(' '));
        assert_eq!(last, Some(heading), "{command} {flag}");
    }
}

#[test]
fn wrong_command_lines_are_refused_with_status_2() {
    let user = User::new();
    let cases: [(&[&str], &str); 31] = [
        (&[], "Usage"),
        (&["sing"], "sing"),
        (&["generate", "--max-tokens", "0"], "use -1 for no limit"),
        (&["generate", "--max-tokens", "-7"], "--max-tokens"),
        (&["generate", "--temp", "hot"], "--temp"),
        (&["generate", "--top-k", "-1"], "--top-k"),
        (&["generate", "--seed", "x"], "--seed"),
        (&["generate", "--logit-bias", "[1]"], "--logit-bias"),
        (&["generate", "--chat-template-config", "{"], "--chat-template-config"),
        (&["generate", "--verbose", "maybe"], "--verbose"),
        (&["generate", "--logprobs", "2"], "--json"),
        (&["generate", "--prefill-step-size", "0"], "--prefill-step-size"),
        (&["generate", "--max-kv-size", "4"], "--max-kv-size <N>': 4 is not in 5..="),
        (&["generate", "--kv-bits", "7"], "--kv-bits <BITS>': it must be 2, 3, 4, 5, 6 or 8"),
        (&["chat", "--kv-group-size", "48"], "--kv-group-size <N>': it must be 32, 64 or 128"),
        (&["generate", "--quantized-kv-start", "x"], "--quantized-kv-start"),
        (&["generate", "--num-draft-tokens", "0"], "--num-draft-tokens <N>': 0 is not in 1..=32"),
        (&["generate", "--prompt-lookup", "17"], "--prompt-lookup [<N>]': 17 is not in 1..=16"),
        (&["generate", "--prompt-lookup", "--draft-model", "demo"], "--draft-model"),
        (&["generate", "--prompt-cache-file", "x.safetensors", "--max-kv-size", "9"], "--max-kv-size"),
        (&["benchmark", "--batch-size", "0"], "--batch-size <N>': 0 is not in 1..=1024"),
        (&["benchmark", "-p", "0"], "--prompt-tokens"),
        (&["benchmark", "--delay", "-1"], "--delay"),
        (&["perplexity"], "--data-path"),
        (&["perplexity", "--data-path", "x", "--num-samples", "0"], "1 or more, or -1 for all"),
        (&["perplexity", "--data-path", "x", "--sequence-length", "1"], "--sequence-length"),
        (&["perplexity", "--data-path", "x", "--seed", "-1"], "--seed"),
        (&["cache-prompt", "--prompt", "x"], "--prompt-cache-file"),
        (&["cache-prompt", "--prompt-cache-file", "x.safetensors"], "--prompt"),
        (&["cache-prompt", "--prompt", "x", "--prompt-cache-file", "x"], "must end in .safetensors"),
        (&["completions", "tcsh"], "zsh"),
    ];
    for (arguments, named) in cases {
        let output = user.run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(stderr(&output).contains(named), "{arguments:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
}

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
fn wrong_wishes_end_in_one_sentence() {
    let user = User::new();
    let file = user.home.path().join("file");
    std::fs::write(&file, "x").unwrap();
    // Sound, but no prompt cache.
    let model_file = demo_folder().join("model.safetensors");
    let cases: [(&[&str], &str); 24] = [
        (
            &["--adapter-path", "x"],
            "cannot use the adapter in x: x holds no adapter: adapter_config.json is missing",
        ),
        (&["--image", "a.png", "b.png"], "models answer text only"),
        (&["--quantize-activations"], "--quantize-activations is not supported"),
        (&["--kv-bits", "4"], "kv_group_size 64 does not divide the head width 32"),
        (&["--draft-model", "/no/such/folder"], "there is no folder /no/such/folder"),
        (&["--draft-model", "nonsense"], "Hugging Face id"),
        (&["--prompt-cache-file", "/no/such.safetensors"], "/no/such.safetensors"),
        (&["--prompt-cache-file", file.to_str().unwrap()], file.to_str().unwrap()),
        (&["--prompt-cache-file", model_file.to_str().unwrap()], "model.safetensors"),
        (&["--model", "/no/such/folder"], "there is no folder /no/such/folder"),
        (&["--model", "nonsense"], "Hugging Face id"),
        (&["--model", "owner/missing"], "owner/missing"),
        (&["--model", file.to_str().unwrap()], "is a file"),
        (&["--model", user.home.path().to_str().unwrap()], "config.json"),
        (&["--top-p", "7"], "top_p is 7"),
        (&["--temp", "-1"], "temperature is -1"),
        (&["--temp", "nan"], "temperature"),
        (&["--min-p", "2"], "min_p"),
        (&["--top-k", "512"], "top_k"),
        (&["--xtc-probability", "2"], "xtc_probability"),
        (&["--logit-bias", r#"{"600": 1}"#], "logit_bias"),
        (&["--extra-eos-token", "<nope>"], "<nope>"),
        (&["--stop", ""], "stop string is empty"),
        (&["--chat-template-config", r#"{"messages": []}"#], "messages"),
    ];
    for (arguments, named) in cases {
        let output = user.run(&[&["generate"], arguments].concat());
        check_sentence(&output, arguments, named);
    }
}

fn check_sentence(output: &Output, case: &[&str], named: &str) {
    let said = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{case:?}: {said}");
    assert!(said.starts_with("error: ") && said.trim_end().lines().count() == 1, "{case:?}: {said}");
    assert!(said.contains(named), "{case:?}: no {named:?} in: {said}");
    assert!(output.stdout.is_empty(), "{case:?}");
}

#[test]
fn damaged_models_are_named() {
    let user = User::new();
    let cases: [(&str, Damage); 8] = [
        ("config.json", |folder| std::fs::remove_file(folder.join("config.json")).unwrap()),
        ("safetensors", |folder| std::fs::remove_file(folder.join("model.safetensors")).unwrap()),
        ("safetensors", |folder| {
            let file = std::fs::File::options().write(true).open(folder.join("model.safetensors")).unwrap();
            file.set_len(file.metadata().unwrap().len() / 2).unwrap();
        }),
        ("safetensors", |folder| std::fs::write(folder.join("model.safetensors"), [0xFF; 64]).unwrap()),
        ("tokenizer.json", |folder| std::fs::remove_file(folder.join("tokenizer.json")).unwrap()),
        ("tokenizer.json", |folder| std::fs::write(folder.join("tokenizer.json"), "{\"version\": ").unwrap()),
        ("llama", |folder| edit(&folder.join("config.json"), |config| config["model_type"] = "gpt9".into())),
        ("line 1", |folder| std::fs::write(folder.join("chat_template.jinja"), "{% if %}").unwrap()),
    ];
    for (named, damage) in cases {
        let (_folder, model) = damaged(damage);
        check_sentence(&user.run(&["generate", "--model", &model]), &[named], named);
    }
    let (_folder, bare) = damaged(|folder| {
        edit(&folder.join("tokenizer_config.json"), |config| {
            config.as_object_mut().unwrap().remove("chat_template");
        });
        let _ = std::fs::remove_file(folder.join("chat_template.jinja"));
    });
    check_sentence(&user.run(&["generate", "--model", &bare]), &["no template"], "--ignore-chat-template");
    assert!(
        !user.says(&["generate", "--model", &bare, "--ignore-chat-template", "-p", "1 + 1 ="]).is_empty()
    );
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
fn parts_for_images_are_noted_once_unless_only_the_answer_counts() {
    let (_folder, model) = damaged(|folder| {
        let mut writer = mlxnode_checkpoint::SafetensorsWriter::new();
        let dtype = mlxnode_checkpoint::TensorDtype::F32;
        writer.add("vision_tower.patch.weight", dtype, &[2], vec![0; 8]).unwrap();
        writer.write(&folder.join("model-vision.safetensors")).unwrap();
    });
    let user = User::new();
    let note = "note: vision weights are not used: this model answers text only\n";
    let asked = ["generate", "--model", &model, "--prompt", "What is 17 + 25?"];
    let output = user.run(&asked);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "42\n");
    assert_eq!(stderr(&output).matches(note).count(), 1, "{}", stderr(&output));
    assert!(!stderr(&user.run(&[&asked[..], &["-q"]].concat())).contains("note:"));
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
fn a_conversation_comes_through_a_pipe() {
    let user = User::new();
    let input =
        "What is 2 + 3?\n\n/help\n/nonsense\nAnd 17 + 25?\n/reset\nWhat is 17 + 25?\n/quit\nnever read";
    let output = user.run_with_input(&["chat"], input);
    assert!(output.status.success(), "{}", stderr(&output));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!((lines.len(), lines[0], lines[2]), (3, "5", "42"), "{said}");
    assert!(stderr(&output).contains("/reset") && stderr(&output).contains("no command /nonsense"));

    let objects = user.run_with_input(&["chat", "--json"], "What is 2 + 3?\nWhat is 17 + 25?\n");
    let texts: Vec<Value> = String::from_utf8_lossy(&objects.stdout)
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["text"].clone())
        .collect();
    assert_eq!(texts[0], "5");
    assert_eq!(texts.len(), 2);
}

#[test]
fn a_refused_message_does_not_end_the_conversation_but_shows() {
    let user = User::new();
    let (_folder, model) = damaged(|folder| {
        let template = "{% if 'bad' in messages[-1].content %}{{ raise_exception('no bad words') }}{% endif %}\
            {{ messages[-1].content }}";
        std::fs::write(folder.join("chat_template.jinja"), template).unwrap();
    });
    let output = user.run_with_input(&["chat", "--model", &model, "-m", "3"], "bad\ngood\n");
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("refuses the conversation: no bad words"), "{}", stderr(&output));
    assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), 2);
}

#[test]
fn ctrl_c_ends_the_answer_with_status_130() {
    let user = User::new();
    let mut child = endless(&user, &[]);
    let mut first = [0];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    interrupt(&child);
    let output = finish(child);
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    assert!(stderr(&output).contains("Generation: "), "{}", stderr(&output));
}

#[test]
fn a_reader_who_leaves_is_no_failure() {
    let user = User::new();
    let mut child = endless(&user, &["-q"]);
    let mut first = [0];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    drop(child.stdout.take());
    let output = finish(child);
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
}

/// An answer without end.
fn endless(user: &User, flags: &[&str]) -> Child {
    let arguments =
        [&["generate", "--prompt", "Sort 31, 4, 15", "-m", "-1"], NO_END.as_slice(), flags].concat();
    user.command(&arguments).spawn().unwrap()
}

fn interrupt(child: &Child) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
}

/// Waits for the end, but not for ever.
fn finish(mut child: Child) -> Output {
    let begin = Instant::now();
    // Somebody has to read on, or the process waits in its write.
    let mut stdout = child.stdout.take();
    let reader = std::thread::spawn(move || {
        let mut rest = Vec::new();
        stdout.as_mut().map(|stdout| stdout.read_to_end(&mut rest));
        rest
    });
    while child.try_wait().unwrap().is_none() {
        if begin.elapsed() > Duration::from_secs(20) {
            child.kill().unwrap();
            panic!("it does not end");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut output = child.wait_with_output().unwrap();
    output.stdout = reader.join().unwrap();
    output
}

#[test]
fn models_lists_what_is_here() {
    let user = User::new();
    let facts = user.json(&["models"]);
    assert_eq!(facts["models"], Value::Array(Vec::new()));
    for name in ["llama", "mistral", "qwen2", "qwen3"] {
        assert!(facts["architectures"].as_array().unwrap().contains(&name.into()), "{facts}");
    }
    // A model as huggingface_hub caches it.
    let repository = user.home.path().join("huggingface/hub/models--someone--demo");
    let snapshot = repository.join("snapshots/0123456789012345678901234567890123456789");
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(repository.join("refs")).unwrap();
    std::fs::write(repository.join("refs/main"), "0123456789012345678901234567890123456789").unwrap();
    for entry in std::fs::read_dir(demo_folder()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), snapshot.join(entry.file_name())).unwrap();
    }
    let facts = user.json(&["models"]);
    let model = &facts["models"][0];
    assert_eq!(
        (&model["model"], &model["architecture"]),
        (&"someone/demo".into(), &"llama".into()),
        "{facts}"
    );
    assert_eq!(model["supported"], true);
    assert!(user.says(&["models"]).contains("someone/demo"));
    assert_eq!(user.json(&["generate", "--model", "someone/demo", "-p", "What is 17 + 25?"])["text"], "42");
}

#[test]
fn architectures_are_listed_with_what_they_support() {
    let user = User::new();
    let facts = user.json(&["models", "--architectures"]);
    let all = facts["architectures"].as_array().unwrap();
    let find = |name: &str| all.iter().find(|one| one["name"] == name).unwrap_or_else(|| panic!("no {name}"));
    let llama = find("llama");
    let fields: Vec<&str> = llama.as_object().unwrap().keys().map(String::as_str).collect();
    let promised =
        ["name", "aliases", "pipeline", "tensor", "lora", "quantized_kv", "speculative", "vision_unused"];
    assert_eq!(fields, promised);
    assert_eq!(
        (&llama["pipeline"], &llama["tensor"], &llama["lora"]),
        (&true.into(), &false.into(), &false.into())
    );
    assert!(llama["aliases"].as_array().unwrap().contains(&"xverse".into()));
    assert_eq!((&llama["vision_unused"], &find("gemma3")["vision_unused"]), (&false.into(), &true.into()));
    let table = user.says(&["models", "--architectures"]);
    assert!(
        table.starts_with("ARCHITECTURE") && table.contains("\ngemma3* ") && table.contains("QUANTIZED KV")
    );
    assert_eq!(table.lines().filter(|line| line.starts_with("* Made for images")).count(), 1);
    assert_eq!(table.lines().count(), all.len() + 3);
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
fn familiar_flags_are_answered() {
    let user = User::new();
    let said = |arguments: &[&str]| {
        let output = user.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
        (String::from_utf8_lossy(&output.stdout).into_owned(), stderr(&output))
    };
    let flags = [
        "generate",
        "-p",
        "What is 17 + 25?",
        "--verbose",
        "false",
        "--trust-remote-code",
        "--use-default-chat-template",
    ];
    let (answer, notes) = said(&flags);
    assert_eq!(answer, "42\n");
    assert_eq!(notes.lines().count(), 2, "{notes}");
    assert!(notes.starts_with("note: --trust-remote-code has no effect"), "{notes}");
    assert_eq!(said(&[flags.as_slice(), &["-q"]].concat()), (answer, String::new()));
    let (_, notes) = said(&["chat", "--pipeline"]);
    assert!(notes.contains("mlxnode load MODEL --stages N"), "{notes}");
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
fn messages_of_several_lines_and_turns_that_remember() {
    let user = User::new();
    let input = "What is \\\n2 + 3?\n\"\"\"\nAnd\n17 + 25?\n\"\"\"\n";
    let objects = user.run_with_input(&["chat", "--json"], input);
    assert!(objects.status.success(), "{}", stderr(&objects));
    let answers: Vec<Value> = String::from_utf8_lossy(&objects.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(answers.len(), 2);
    assert_eq!(answers[0]["cached_tokens"], 0);
    let first = answers[0]["prompt_tokens"].as_u64().unwrap();
    // All of the first turn but what the template puts behind an answer.
    assert!(answers[1]["cached_tokens"].as_u64().unwrap() >= first, "{answers:?}");
    assert!(answers[1]["prompt_tokens"].as_u64() > answers[1]["cached_tokens"].as_u64());
}

#[test]
fn a_benchmark_prints_what_mlx_lms_prints() {
    let user = User::new();
    for flags in [&["-b", "1"][..], &["-b", "3"]] {
        let sizes = ["benchmark", "-p", "20", "-g", "8", "-n", "2"];
        let output = user.run(&[sizes.as_slice(), flags].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        let lines: Vec<String> = String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect();
        assert_eq!(lines.len(), 3, "{lines:?}");
        let fields = |line: &str| -> Vec<String> {
            line.split([' ', ',']).filter_map(|word| Some(word.split_once('=')?.0.to_owned())).collect()
        };
        assert!(
            lines[0].starts_with("Trial 1:  prompt_tps=") && lines[2].starts_with("Averages: prompt_tps=")
        );
        assert_eq!(fields(&lines[1]), ["prompt_tps", "generation_tps", "peak_memory", "total_time"]);
        assert_eq!(fields(&lines[2]), ["prompt_tps", "generation_tps", "peak_memory"]);
        assert!(stderr(&output).contains("Running warmup..") && stderr(&output).contains("prompt_tokens=20"));

        let facts = user.json(&[sizes.as_slice(), flags].concat());
        assert_eq!((&facts["prompt_tokens"], &facts["generation_tokens"]), (&20.into(), &8.into()));
        let trials = facts["trials"].as_array().unwrap();
        assert_eq!(trials.len(), 2);
        for trial in trials.iter().chain([&facts["average"]]) {
            assert!(trial["prompt_tps"].as_f64() > Some(0.0) && trial["generation_tps"].as_f64() > Some(0.0));
            assert!(
                trial["peak_memory_bytes"].as_u64() > Some(100_000)
                    && trial["total_seconds"].as_f64() > Some(0.0)
            );
        }
    }
}

#[test]
fn perplexity_of_a_text() {
    let user = User::new();
    let text = user.home.path().join("text.txt");
    std::fs::write(&text, "What is 2 + 3? It is 5. ".repeat(20)).unwrap();
    let measure = ["perplexity", "--sequence-length", "32", "--data-path", text.to_str().unwrap()];
    let said = user.says(&measure);
    assert!(
        said.starts_with("Model: demo (") && said.contains("\nPerplexity: ") && said.contains(" ± "),
        "{said}"
    );
    let facts = user.json(&measure);
    let (samples, tokens) = (facts["samples"].as_u64().unwrap(), facts["tokens"].as_u64().unwrap());
    assert_eq!(tokens, samples * 31);
    assert!(
        facts["perplexity"].as_f64() > Some(1.0) && facts["standard_error"].as_f64() > Some(0.0),
        "{facts}"
    );
    assert!((900_000..1_100_000).contains(&facts["parameters"].as_u64().unwrap()), "{facts}");
    let note = stderr(&user.run(&measure));
    assert!(note.contains("note: the data has"), "{note}");

    let bad = user.home.path().join("bad.jsonl");
    std::fs::write(&bad, "{\"text\": \"a\"}\n{\"texts\": \"b\"}\n").unwrap();
    let folder = user.home.path().join("empty");
    std::fs::create_dir(&folder).unwrap();
    for (data, named) in [
        ("/no/such/file", "there is no file /no/such/file"),
        ("allenai/tulu-3-sft-mixture", "data sets of the hub cannot be read yet"),
        (bad.to_str().unwrap(), "bad.jsonl line 2: there is no \"text\""),
        (folder.to_str().unwrap(), "train.jsonl"),
        (text.to_str().unwrap(), "less than one row of 4096"),
    ] {
        let output = user.run(&["perplexity", "--sequence-length", "4096", "--data-path", data]);
        check_sentence(&output, &[data], named);
    }
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

#[test]
fn completions_know_commands_and_flags() {
    let user = User::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = user.says(&["completions", shell]);
        assert!(script.contains("generate") && script.contains("prefill-response"), "{shell}");
    }
}
