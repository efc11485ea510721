//! What a person can get wrong at a running cluster: each ends in one sentence, a status that is not 0, and nothing lost.

use anyhow::{Context as _, Result, ensure};
use mlxnode_testkit::binary;
use mlxnode_testkit::cluster::LocalCluster;
use mlxnode_testkit::node::{NodeProcess, NodeSetup};
use std::path::Path;
use std::time::Duration;

/// Runs a command that must fail, and checks that its error says all of `words`.
fn refused(node: &NodeProcess, arguments: &[&str], words: &[&str]) -> Result<()> {
    let output = node.output(arguments)?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success(), "{arguments:?} went through");
    ensure!(
        output.stdout.is_empty(),
        "{arguments:?} wrote to stdout: {}",
        String::from_utf8_lossy(&output.stdout)
    );
    for word in words {
        ensure!(text.to_lowercase().contains(&word.to_lowercase()), "{arguments:?}: no {word:?} in: {text}");
    }
    ensure!(!text.contains("panicked"), "{text}");
    Ok(())
}

#[test]
fn story_wrong_wishes_are_refused_with_a_sentence() -> Result<()> {
    let cluster = LocalCluster::start(1)?;
    let node = cluster.first();
    refused(node, &["generate", "--prompt", "hi", "--model", "nobody-loaded-this"], &["nobody-loaded-this"])?;
    refused(node, &["load", "/no/such/folder"], &["/no/such/folder"])?;
    refused(node, &["load", "demo", "--stages", "5"], &["5"])?;
    refused(node, &["unload", "nothing"], &["nothing"])?;
    refused(node, &["forget", "nobody"], &["nobody"])?;
    node.json(&["load", "demo"])?;
    refused(node, &["generate", "--prompt", "hi", "--top-p", "7"], &["top"])?;
    refused(node, &["generate", "--prompt", "hi", "--max-tokens", "0"], &["max"])?;
    refused(node, &["load", "demo", "--name", "demo/../x"], &["name"])?;
    refused(node, &["load", "demo", "--context", "64"], &["demo", "settings", "unload"])?;
    // What only this process can do is not silently left out on a cluster.
    for flags in
        [&["--kv-bits", "8"][..], &["--max-kv-size", "64"], &["--draft-model", "demo"], &["--prompt-lookup"]]
    {
        let words = [flags[0], "works only in this process", "--local"];
        refused(node, &[&["generate", "--prompt", "hi"], flags].concat(), &words)?;
    }
    // After all that the model still answers.
    let answer = node.json(&["generate", "--prompt", "What is 2 + 3?", "--no-thinking"])?;
    assert_eq!((&answer["content"], answer["reasoning"].is_null()), (&answer["text"], true), "{answer}");
    ensure!(answer["text"].as_str().context("text")?.contains('5'), "{answer}");
    Ok(())
}

#[test]
fn story_damaged_model_folders_are_refused_by_file_when_they_are_loaded() -> Result<()> {
    let cluster = LocalCluster::start(1)?;
    let node = cluster.first();
    let folder = tempfile::tempdir()?;
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("crates/hub/demo-model/model");
    let damaged = |name: &str, damage: &dyn Fn(&Path) -> Result<()>| -> Result<String> {
        let copy = folder.path().join(name);
        std::fs::create_dir(&copy)?;
        for file in std::fs::read_dir(&model)? {
            let file = file?;
            std::fs::copy(file.path(), copy.join(file.file_name()))?;
        }
        damage(&copy)?;
        Ok(copy.to_str().context("utf-8")?.to_owned())
    };
    let cut = |file: &'static str, bytes: u64| {
        move |copy: &Path| -> Result<()> {
            let file = std::fs::File::options().write(true).open(copy.join(file))?;
            Ok(file.set_len(bytes)?)
        }
    };
    let weights = damaged("weights", &cut("model.safetensors", 1_000_000))?;
    refused(node, &["load", &weights], &["model.safetensors"])?;
    let header = damaged("header", &cut("model.safetensors", 100))?;
    refused(node, &["load", &header], &["model.safetensors"])?;
    let config = damaged("config", &cut("config.json", 20))?;
    refused(node, &["load", &config], &["config.json"])?;
    let tokenizer = damaged("tokenizer", &cut("tokenizer.json", 1000))?;
    refused(node, &["load", &tokenizer], &["tokenizer.json"])?;
    // Without a tokenizer.json there may be another vocabulary.
    let vocabulary = damaged("vocabulary", &|copy| {
        std::fs::remove_file(copy.join("tokenizer.json"))?;
        Ok(std::fs::write(copy.join("qwen.tiktoken"), "no vocabulary")?)
    })?;
    refused(node, &["load", &vocabulary], &["qwen.tiktoken"])?;
    let family = damaged("family", &|copy| {
        let path = copy.join("config.json");
        Ok(std::fs::write(&path, std::fs::read_to_string(&path)?.replace("\"llama\"", "\"lama\""))?)
    })?;
    refused(node, &["load", &family], &["lama", "llama", "qwen3"])?;
    let status = node.json(&["status"])?;
    assert_eq!(status["deployments"].as_array().map(Vec::len), Some(0), "nothing is left over: {status}");
    // The same folder, whole, loads.
    let whole = damaged("whole", &|_| Ok(()))?;
    assert_eq!(node.json(&["load", &whole])?["state"], "ready");
    Ok(())
}

#[test]
fn story_a_model_that_is_too_large_is_refused_with_numbers() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let setup = NodeSetup {
        name: "tiny".into(),
        arguments: vec!["--memory-budget".into(), "3MB".into()],
        ..Default::default()
    };
    let node = NodeProcess::start(&folder.path().join("tiny"), &setup)?;
    let plan = node.json(&["plan", "demo"])?;
    assert_eq!(plan["fits"], false, "{plan}");
    refused(&node, &["load", "demo"], &["MB", "tiny"])?;
    node.stop(Duration::from_secs(10))
}

#[test]
fn story_invites_that_are_wrong_used_or_foreign_are_refused() -> Result<()> {
    let mut cluster = LocalCluster::start(1)?;
    let invite = cluster.first().json(&["invite"])?;
    let address = cluster.first().ready.grpc.clone();
    let folder = tempfile::tempdir()?;
    let join = |invite: &str, name: &str| -> Result<String> {
        let output = binary::command()?
            .args([
                "join",
                "--json",
                "--listen",
                "127.0.0.1:0",
                "--invite",
                invite,
                "--peer",
                &address,
                "--data-dir",
            ])
            .arg(folder.path().join(name))
            .output()?;
        ensure!(!output.status.success(), "{invite} was accepted");
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let wrong = join("AAAA-AAAA", "wrong")?;
    ensure!(wrong.contains("code"), "{wrong}");
    let nonsense = join("not an invite!", "nonsense")?;
    ensure!(nonsense.contains("invite"), "{nonsense}");
    // The same token twice: the second use is refused.
    cluster.add()?;
    let used = join(invite["token"].as_str().context("token")?, "used")?;
    ensure!(used.contains("invite"), "{used}");
    // A port that is taken is named.
    let output = binary::command()?
        .args(["join", "--json", "--listen", &address, "--data-dir"])
        .arg(folder.path().join("taken"))
        .output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && text.contains(&address), "{text}");
    // So is a data directory that is in use.
    let output = binary::command()?
        .args(["join", "--json", "--listen", "127.0.0.1:0", "--data-dir"])
        .arg(cluster.first().data_dir())
        .output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && text.contains("running"), "{text}");
    cluster.wait_until_all_alive()
}

#[test]
fn story_two_nodes_of_one_name_are_told_apart() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let first = NodeProcess::start(
        &folder.path().join("a"),
        &NodeSetup { name: "studio".into(), ..NodeSetup::default() },
    )?;
    let invite = first.json(&["invite"])?;
    let second = NodeProcess::start(
        &folder.path().join("b"),
        &NodeSetup {
            name: "studio".into(),
            invite: invite["token"].as_str().map(str::to_owned),
            peers: vec![first.ready.grpc.clone()],
            ..NodeSetup::default()
        },
    )?;
    assert_eq!(second.ready.name, "studio-2");
    Ok(())
}
