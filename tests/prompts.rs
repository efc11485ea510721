//! What nodes remember of prompts: over a pipeline of two nodes, for each key by itself, over restarts and losses; and never another answer.

use anyhow::{Context as _, Result, ensure};
use mlxnode_testkit::cluster::LocalCluster;
use mlxnode_testkit::eventually::eventually;
use mlxnode_testkit::node::NodeProcess;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::Duration;

/// Long enough for a loaded machine to start two workers.
const PATIENCE: Duration = Duration::from_secs(60);
/// Tokens of a block, as many as are found of a prompt of 300.
const BLOCK: u64 = 256;

/// An answer: its text and the tokens of the prompt that needed no work.
#[derive(Clone, Debug, PartialEq)]
struct Answer {
    text: String,
    cached: u64,
}

fn ask(node: &NodeProcess, key: &str, prompt: &[u32]) -> Result<Answer> {
    let url = node.ready.http.as_deref().context("the node serves HTTP")?;
    let address = url.strip_prefix("http://").context("a URL")?;
    let body = json!({"model": "demo", "prompt": prompt, "max_tokens": 12, "temperature": 0}).to_string();
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(
        stream,
        "POST /v1/completions HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\nauthorization: Bearer {key}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("a body")?;
    ensure!(head.starts_with("HTTP/1.1 200"), "{answer}");
    let body: Value = serde_json::from_str(body)?;
    let text = body["choices"][0]["text"].as_str().context("text")?.to_owned();
    let cached = body["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().context("cached_tokens")?;
    Ok(Answer { text, cached })
}

fn prompt(seed: u32) -> Vec<u32> {
    (0..300).map(|place| 40 + (place * 7 + seed * 31) % 300).collect()
}

fn key(cluster: &LocalCluster, name: &str) -> Result<String> {
    let made = cluster.first().json(&["keys", "create", name])?;
    Ok(made["key"].as_str().context("key")?.to_owned())
}

/// The files of blocks on a node.
fn files(node: &NodeProcess) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(node.data_dir().join("blocks"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|ending| ending == "safetensors") {
            found.push(path);
        }
    }
    Ok(found)
}

fn restart(cluster: &mut LocalCluster) -> Result<()> {
    // The coordinator last: it learns where the others are now.
    for node in (0..cluster.nodes.len()).rev() {
        cluster.restart(node)?;
    }
    cluster.wait_until_all_alive()
}

fn ask_when_ready(node: &NodeProcess, key: &str, prompt: &[u32]) -> Result<Answer> {
    eventually(PATIENCE, || ask(node, key, prompt))
}

#[test]
fn story_prompts_are_remembered_for_their_key_over_restarts_and_never_change_an_answer() -> Result<()> {
    let mut cluster = LocalCluster::start_with(2, &["--prompt-cache-disk", "50MB"])?;
    cluster.first().json(&["load", "demo", "--stages", "2"])?;
    let (ann, bob) = (key(&cluster, "ann")?, key(&cluster, "bob")?);
    let cold = ask_when_ready(cluster.first(), &ann, &prompt(1))?;
    assert_eq!(cold.cached, 0);
    let warm = Answer { cached: BLOCK, ..cold.clone() };
    // Whichever node is asked, and as often as one likes.
    for node in [&cluster.nodes[0], &cluster.nodes[1], &cluster.nodes[0]] {
        assert_eq!(ask_when_ready(node, &ann, &prompt(1))?, warm);
    }
    // The beginning is enough.
    let mut other = prompt(1);
    other.truncate(280);
    assert_eq!(ask(cluster.first(), &ann, &other)?.cached, BLOCK);
    // Another key learns nothing of it, but has its own.
    assert_eq!(ask(cluster.first(), &bob, &prompt(1))?, cold);
    assert_eq!(ask(cluster.first(), &bob, &prompt(1))?, warm);
    // Two at once compute it once.
    let both = std::thread::scope(|scope| {
        let asked = [0, 1].map(|node| {
            let (node, ann) = (&cluster.nodes[node], &ann);
            scope.spawn(move || ask(node, ann, &prompt(2)))
        });
        asked.map(|asked| asked.join().map_err(|_| anyhow::anyhow!("asking panicked")).flatten())
    });
    let mut both = both.into_iter().collect::<Result<Vec<_>>>()?;
    both.sort_by_key(|answer| answer.cached);
    assert_eq!(both.iter().map(|answer| answer.cached).collect::<Vec<_>>(), [0, BLOCK]);
    assert_eq!(both[0].text, both[1].text);

    // Every stage wrote its part of the three, and a node that starts again finds them.
    for node in &cluster.nodes {
        eventually(PATIENCE, || {
            let written = files(node)?.len();
            ensure!(written == 3, "{written} files");
            Ok(())
        })?;
    }
    restart(&mut cluster)?;
    assert_eq!(ask_when_ready(&cluster.nodes[1], &ann, &prompt(1))?, warm);
    assert_eq!(ask(cluster.first(), &bob, &prompt(1))?, warm);
    assert_eq!(ask(cluster.first(), &bob, &prompt(2))?.cached, 0, "that was ann's");

    // What is damaged on one of them is computed anew.
    restart(&mut cluster)?;
    for path in files(&cluster.nodes[1])? {
        let mut bytes = std::fs::read(&path)?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x40;
        std::fs::write(&path, bytes)?;
    }
    assert_eq!(ask_when_ready(cluster.first(), &ann, &prompt(1))?, cold);
    assert_eq!(ask(cluster.first(), &ann, &prompt(1))?, warm);

    // A worker is lost, and with it what it had in memory.
    let status = cluster.first().json(&["status"])?;
    let pid = status["deployments"][0]["stages"][1]["worker_pid"].as_i64().context("a worker's pid")?;
    kill(Pid::from_raw(pid.try_into()?), Signal::SIGKILL)?;
    let after = ask_when_ready(cluster.first(), &ann, &prompt(1))?;
    assert_eq!(after.text, cold.text);
    assert_eq!(ask_when_ready(cluster.first(), &ann, &prompt(1))?, warm);
    Ok(())
}

#[test]
fn story_a_node_without_room_for_prompts_remembers_none() -> Result<()> {
    let cluster = LocalCluster::start_with(1, &["--prompt-cache-memory", "0"])?;
    cluster.first().json(&["load", "demo"])?;
    let cold = ask_when_ready(cluster.first(), "", &prompt(1))?;
    assert_eq!((cold.cached, ask(cluster.first(), "", &prompt(1))?), (0, cold.clone()));
    ensure!(!cluster.first().data_dir().join("blocks").exists(), "nothing is written");
    Ok(())
}
