//! `mlxnode lora` on the demo model: figures, files, an interruption, going on, and the adapter in use.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests are test code, too

use serde_json::{Value, json};
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

const WORDS: [&str; 6] = ["red", "green", "blue", "cat", "dog", "sun"];

fn data(folder: &Path) {
    std::fs::create_dir_all(folder).unwrap();
    for (name, count) in [("train", 12), ("valid", 4), ("test", 4)] {
        let rows = (0..count).map(|index| {
            let word = WORDS[index % WORDS.len()];
            json!({"prompt": format!("Say {word} twice."), "completion": format!("{word} {word}")})
                .to_string()
        });
        let text = rows.collect::<Vec<_>>().join("\n");
        std::fs::write(folder.join(format!("{name}.jsonl")), text).unwrap();
    }
}

fn command(home: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mlxnode"));
    for name in ["RUST_LOG", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN", "MLXNODE_DATA_DIR"] {
        command.env_remove(name);
    }
    command.env("HF_HOME", home.join("huggingface")).env("HF_HUB_OFFLINE", "1").current_dir(home);
    command.args(["lora", "--model", "demo", "--batch-size", "2"]);
    command.args(arguments);
    for (flag, value) in [("--data", "rows"), ("--num-layers", "2")] {
        if !arguments.contains(&flag) {
            command.args([flag, value]);
        }
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(home: &Path, arguments: &[&str]) -> Output {
    command(home, arguments).output().unwrap()
}

fn events(output: &Output) -> Vec<Value> {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn of<'e>(events: &'e [Value], name: &str) -> Vec<&'e Value> {
    events.iter().filter(|event| event["event"] == name).collect()
}

#[test]
fn a_run_that_was_interrupted_goes_on_to_the_same_adapter() {
    let home = TempDir::new().unwrap();
    data(&home.path().join("rows"));
    const TRAIN: [&str; 12] = [
        "--train",
        "--iters",
        "8",
        "--steps-per-report",
        "1",
        "--save-every",
        "4",
        "--learning-rate",
        "1e-3",
        "--steps-per-eval",
        "1000",
        "--json",
    ];
    let figures = events(&run(home.path(), &[&TRAIN[..], &["--adapter-path", "whole"]].concat()));
    let losses: Vec<f64> =
        of(&figures, "train").iter().map(|event| event["loss"].as_f64().unwrap()).collect();
    assert_eq!(losses.len(), 8);
    assert!(losses[7] < losses[0], "{losses:?}");
    assert_eq!(of(&figures, "validation").len(), 2, "before the first and before the last");
    assert_eq!(of(&figures, "saved").len(), 2);
    let folder = home.path().join("whole");
    for name in ["adapters.safetensors", "0000004_adapters.safetensors", "0000008_adapters.safetensors"] {
        assert!(folder.join(name).is_file(), "{name}");
    }
    let config: Value =
        serde_json::from_slice(&std::fs::read(folder.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!((&config["num_layers"], &config["fine_tune_type"]), (&json!(2), &json!("lora")));

    // The other one is interrupted after its second figure.
    let broken = [&TRAIN[..], &["--adapter-path", "broken"]].concat();
    let mut child = command(home.path(), &broken).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut seen = 0;
    while seen < 2 {
        let line: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        seen += usize::from(line["event"] == "train");
    }
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), nix::sys::signal::Signal::SIGINT)
        .unwrap();
    let rest: Vec<Value> = lines.map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let stopped = of(&rest, "interrupted")[0]["iteration"].as_u64().unwrap();
    assert!((2..8).contains(&stopped), "{stopped}");
    let resumed = events(&run(home.path(), &[&broken[..], &["--resume"]].concat()));
    assert_eq!(of(&resumed, "resumed")[0]["iteration"], json!(stopped));
    let bytes = |name: &str| std::fs::read(home.path().join(name).join("adapters.safetensors")).unwrap();
    assert!(bytes("broken") == bytes("whole"), "the adapters differ");

    // Measured, and used.
    let measured = events(&run(home.path(), &["--test", "--adapter-path", "whole", "--json"]));
    let plain = events(&run(home.path(), &["--test", "--adapter-path", "", "--json"]));
    let loss = |events: &[Value]| of(events, "test")[0]["loss"].as_f64().unwrap();
    assert!(loss(&measured) < loss(&plain), "{} {}", loss(&measured), loss(&plain));
    let mut generate = Command::new(env!("CARGO_BIN_EXE_mlxnode"));
    generate.env("HF_HUB_OFFLINE", "1").current_dir(home.path()).args([
        "generate",
        "--model",
        "demo",
        "--local",
        "--prompt",
        "Say cat twice.",
        "--adapter-path",
        "whole",
        "--max-tokens",
        "4",
    ]);
    let answer = generate.output().unwrap();
    assert!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stderr));
}

#[test]
fn another_run_in_the_folder_keeps_its_own_checkpoints_and_the_adapter_until_it_has_one() {
    let home = TempDir::new().unwrap();
    data(&home.path().join("rows"));
    let folder = home.path().join("adapters");
    let numbers = |name: &str| {
        let mut numbers: Vec<u64> = std::fs::read_dir(folder.join(name))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap())
            .collect();
        numbers.sort_unstable();
        numbers
    };
    const TRAIN: [&str; 7] =
        ["--train", "--steps-per-eval", "1000", "--save-every", "1", "--report-to", "csv"];
    let train = |more: &[&str]| run(home.path(), &[&TRAIN[..], more].concat());
    let first = train(&["--iters", "6"]);
    assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
    assert_eq!(numbers("checkpoints"), [4, 5, 6]);
    assert!(!String::from_utf8_lossy(&first.stderr).contains("checkpoints-before"));
    for name in ["training.csv", "loss.svg", "loss.png"] {
        assert!(folder.join(name).is_file(), "{name}");
    }

    // Shorter, and without --resume.
    let second = train(&["--iters", "2", "--seed", "5"]);
    let words = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(second.status.success() && words.contains("checkpoints-before-1"), "{words}");
    assert_eq!((numbers("checkpoints"), numbers("checkpoints-before-1")), (vec![1, 2], vec![4, 5, 6]));
    // It is this one that is gone on from.
    let resumed = events(&train(&["--iters", "2", "--seed", "5", "--resume", "--json"]));
    assert_eq!(of(&resumed, "resumed")[0]["iteration"], json!(2));

    // One that fails before it has saved anything leaves what is there, and what says what it is.
    let read = || {
        ["adapters.safetensors", "adapter_config.json"].map(|name| std::fs::read(folder.join(name)).unwrap())
    };
    let before = read();
    std::fs::write(home.path().join("wild.yaml"), "optimizer: sgd\nlearning_rate: 1.0e+38\n").unwrap();
    let failed = run(
        home.path(),
        &["--train", "-c", "wild.yaml", "--iters", "9", "--num-layers", "1", "--save-every", "9"],
    );
    assert_eq!(failed.status.code(), Some(1), "{}", String::from_utf8_lossy(&failed.stderr));
    assert!(read() == before, "an adapter and its configuration stay together");
}

#[test]
fn what_cannot_be_is_said_with_what_to_do() {
    let home = TempDir::new().unwrap();
    data(&home.path().join("rows"));
    std::fs::write(home.path().join("wrong.yaml"), "train: true\nlearnin_rate: 1\n").unwrap();
    for (arguments, words) in [
        (&["--adapter-path", "none"][..], "train"),
        (&["--test", "--adapter-path", "none"][..], "--adapter-path"),
        (&["--train", "--num-layers", "99"][..], "num_layers"),
        (&["--train", "--data", "nowhere"][..], "nowhere"),
        (&["--resume", "--adapter-path", "none"][..], "leave --resume out"),
        (&["-c", "wrong.yaml"][..], "learning_rate"),
        (&["--train", "--resume-adapter-file", "rows/train.jsonl"][..], "rows/train.jsonl"),
    ] {
        let output = run(home.path(), arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {stderr}");
        assert!(stderr.contains(words), "{arguments:?}: {stderr}");
        assert!(!home.path().join("none").exists(), "{arguments:?} left a folder");
    }
}
