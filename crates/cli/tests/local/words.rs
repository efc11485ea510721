//! Help, flags, and wishes that cannot be.

use super::{User, check_sentence, demo_folder, stderr};

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
fn completions_know_commands_and_flags() {
    let user = User::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = user.says(&["completions", shell]);
        assert!(script.contains("generate") && script.contains("prefill-response"), "{shell}");
    }
}
