//! Answers whose replica dies in the middle: the client sees no gap and no repeat, over HTTP and gRPC, greedy and drawn, with a grammar and
//! penalties, several at a time.
//!
//! Real processes on the loopback, killed by signal 9. What an answer has to be is what it is when nobody disturbs it.

use anyhow::{Context as _, Result, ensure};
use mlxnode_node::{DataDir, connect_to_local_node};
use mlxnode_proto::v1::inference_client::InferenceClient;
use mlxnode_proto::v1::{GenerateRequest, SamplingParameters, generate_request};
use mlxnode_testkit::cluster::LocalCluster;
use mlxnode_testkit::eventually::eventually;
use mlxnode_testkit::node::NodeProcess;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Long enough to be killed in.
const TOKENS: u32 = 440;

/// What is asked, and how.
#[derive(Clone, Debug)]
enum Question {
    /// A path and a body.
    Http(&'static str, Value),
    Grpc(Box<GenerateRequest>),
}

fn questions() -> Vec<Question> {
    let chat = |more: Value| {
        let mut body = json!({
            "model": "demo", "stream": true, "stream_options": {"include_usage": true}, "ignore_eos": true, "max_tokens": TOKENS,
            "messages": [{"role": "user", "content": "Sort 31, 4, 15"}],
        });
        if let (Some(body), Value::Object(more)) = (body.as_object_mut(), more) {
            body.extend(more);
        }
        Question::Http("/v1/chat/completions", body)
    };
    let penalties = json!({"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1});
    let seeded = json!({"temperature": 1.3, "top_p": 0.9, "seed": 11});
    let grpc = GenerateRequest {
        input: Some(generate_request::Input::Prompt("What is 17 + 25?".into())),
        max_tokens: TOKENS,
        ignore_eos: true,
        sampling: Some(SamplingParameters {
            temperature: 1.5,
            seed: Some(7),
            ..SamplingParameters::default()
        }),
        ..GenerateRequest::default()
    };
    vec![
        chat(json!({"logprobs": true, "top_logprobs": 2, "temperature": 0})),
        chat(merged(seeded.clone(), penalties)),
        // The grammar's automaton has to be where it was.
        chat(merged(seeded, json!({"guided_regex": "([0-9]{3}-[a-f]{2} ){60,70}"}))),
        Question::Grpc(Box::new(grpc)),
    ]
}

fn merged(mut into: Value, more: Value) -> Value {
    if let (Some(into), Value::Object(more)) = (into.as_object_mut(), more) {
        into.extend(more);
    }
    into
}

/// Everything that came, piece by piece, without what is new in every answer. `pieces` counts along.
async fn ask(
    question: Question,
    http: String,
    channel: tonic::transport::Channel,
    pieces: watch::Sender<usize>,
) -> Result<Vec<String>> {
    let mut heard = Vec::new();
    match question {
        Question::Grpc(request) => {
            let mut stream = InferenceClient::new(channel).generate(*request).await?.into_inner();
            while let Some(response) = stream.message().await? {
                heard.push(format!("{:?} {:?}", response.text, response.token_ids));
                if let Some(finish) = response.finish {
                    let usage = finish.usage.context("usage")?;
                    heard.push(format!(
                        "{} {:?}",
                        finish.reason,
                        (usage.prompt_tokens, usage.generation_tokens)
                    ));
                }
                pieces.send_modify(|pieces| *pieces += 1);
            }
        }
        Question::Http(path, body) => {
            let address = http.strip_prefix("http://").context("http")?.to_owned();
            let mut stream = BufReader::new(TcpStream::connect(&address).await?);
            let body = body.to_string();
            let request = format!(
                "POST {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-type: application/json\r\n\
                 content-length: {}\r\n\r\n{body}",
                body.len()
            );
            stream.write_all(request.as_bytes()).await?;
            let mut line = String::new();
            while stream.read_line(&mut line).await? > 0 {
                if let Some(data) =
                    line.strip_prefix("data: ").map(str::trim).filter(|data| *data != "[DONE]")
                {
                    let mut event: Value = serde_json::from_str(data)?;
                    // The fingerprint names the replica that began.
                    for name in ["id", "created", "system_fingerprint"] {
                        event.as_object_mut().context("an object")?.remove(name);
                    }
                    ensure!(event.get("error").is_none(), "{event} after {} pieces", heard.len());
                    heard.push(event.to_string());
                    pieces.send_modify(|pieces| *pieces += 1);
                } else {
                    ensure!(!line.starts_with("HTTP/1.1 ") || line.contains(" 200 "), "{line}");
                }
                line.clear();
            }
        }
    }
    Ok(heard)
}

/// Asks at once on this node. `disturb` runs as soon as each of them got its first pieces.
async fn ask_all(node: &NodeProcess, disturb: impl AsyncFnOnce() -> Result<()>) -> Result<Vec<Vec<String>>> {
    ask_these(questions(), node, disturb).await
}

async fn ask_these(
    questions: Vec<Question>,
    node: &NodeProcess,
    disturb: impl AsyncFnOnce() -> Result<()>,
) -> Result<Vec<Vec<String>>> {
    let http = node.ready.http.clone().context("an HTTP listener")?;
    let channel = connect_to_local_node(&DataDir::new(node.data_dir())).await?.context("the node runs")?;
    let mut asked = JoinSet::new();
    let mut begun = Vec::new();
    for (index, question) in questions.into_iter().enumerate() {
        let (pieces, seen) = watch::channel(0);
        begun.push(seen);
        let (http, channel) = (http.clone(), channel.clone());
        asked.spawn(async move { (index, ask(question, http, channel, pieces).await) });
    }
    for seen in &mut begun {
        // An error: it ended already, and says below why.
        let _ = seen.wait_for(|pieces| *pieces >= 2).await;
    }
    disturb().await?;
    let mut answers = vec![Vec::new(); begun.len()];
    let all = async {
        while let Some(answer) = asked.join_next().await {
            let (index, answer) = answer?;
            answers[index] = answer.with_context(|| format!("question {index}"))?;
        }
        Ok::<_, anyhow::Error>(())
    };
    tokio::time::timeout(Duration::from_secs(90), all).await.context("the answers never ended")??;
    Ok(answers)
}

async fn resumed(node: &NodeProcess) -> Result<u64> {
    Ok(figures(node, "mlxnode_answers_resumed_total").await? as u64)
}

/// The sum of a node's figures of this name.
async fn figures(node: &NodeProcess, name: &str) -> Result<f64> {
    let http = node.ready.http.clone().context("an HTTP listener")?;
    let address = http.strip_prefix("http://").context("http")?.to_owned();
    let mut stream = TcpStream::connect(&address).await?;
    let request = format!("GET /metrics HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    let lines = text.lines().filter_map(|line| line.strip_prefix(name));
    let values = lines.map(|rest| rest.rsplit(' ').next().unwrap_or_default().parse::<f64>());
    let values = values.collect::<Result<Vec<_>, _>>().with_context(|| format!("{name} in {text}"))?;
    ensure!(!values.is_empty(), "{name} is not in {text}");
    Ok(values.into_iter().sum())
}

fn ready_deployment(node: &NodeProcess) -> Result<Value> {
    let status = node.json(&["status"])?;
    let deployment = status["deployments"][0].clone();
    ensure!(deployment["state"] == "ready", "not ready: {status}");
    Ok(deployment)
}

fn same(answers: &[Vec<String>], undisturbed: &[Vec<String>]) {
    for (answer, undisturbed) in answers.iter().zip(undisturbed) {
        for (place, (piece, expected)) in answer.iter().zip(undisturbed).enumerate() {
            assert_eq!(piece, expected, "piece {place}");
        }
        assert_eq!(answer.len(), undisturbed.len());
    }
}

#[tokio::test]
async fn story_answers_survive_a_killed_worker_and_a_killed_node() -> Result<()> {
    let mut cluster = LocalCluster::start(2)?;
    cluster.first().json(&["load", "demo", "--stages", "2", "--sequences", "8"])?;
    let undisturbed = ask_all(cluster.first(), async || Ok(())).await?;
    assert_eq!(resumed(cluster.first()).await?, 0);
    ensure!(undisturbed.iter().all(|answer| answer.len() > 100), "{undisturbed:?}");

    // A worker: each stage once, seen from either node.
    for (stage, front) in [(0, 1), (1, 0)] {
        let node = &cluster.nodes[front];
        let before = resumed(node).await?;
        let pid =
            ready_deployment(cluster.first())?["stages"][stage]["worker_pid"].as_u64().context("pid")?;
        let answers = ask_all(node, async || Ok(kill(Pid::from_raw(pid as i32), Signal::SIGKILL)?)).await?;
        same(&answers, &undisturbed);
        ensure!(resumed(node).await? > before, "stage {stage} was killed and nobody noticed");
        eventually(Duration::from_secs(20), || ready_deployment(cluster.first()).map(drop))?;
    }

    // The node of the other stage, which comes back. The first one coordinates and is the front.
    let before = resumed(cluster.first()).await?;
    let data_dir = cluster.nodes[1].data_dir().to_owned();
    let second = cluster.nodes.remove(1);
    let (answers, second) = {
        let mut restarted = None;
        let answers = ask_all(cluster.first(), async || {
            drop(second); // SIGKILL
            let setup = cluster.setup(1);
            restarted =
                Some(tokio::task::spawn_blocking(move || NodeProcess::start(&data_dir, &setup)).await??);
            Ok(())
        })
        .await?;
        (answers, restarted.context("the node is back")?)
    };
    cluster.nodes.push(second);
    same(&answers, &undisturbed);
    ensure!(resumed(cluster.first()).await? > before, "the node was killed and nobody noticed");
    Ok(())
}

/// What an answer says, how it ended and how many tokens that took; how its tokens were put together into pieces does not count.
fn said(answer: &[String]) -> Result<(String, Vec<Value>)> {
    let (mut text, mut facts) = (String::new(), Vec::new());
    for piece in answer {
        let event: Value = serde_json::from_str(piece)?;
        let choice = &event["choices"][0];
        text.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        facts.extend(
            [&choice["finish_reason"], &event["usage"]["completion_tokens"]]
                .into_iter()
                .filter(|it| !it.is_null())
                .cloned(),
        );
    }
    Ok((text, facts))
}

/// Whoever goes on with an answer has to know which of the guesses counted: none of them twice, none left out.
#[tokio::test]
async fn story_answers_whose_tokens_are_guessed_survive_a_killed_worker() -> Result<()> {
    let cluster = LocalCluster::start(2)?;
    let node = cluster.first();
    let asked = || {
        let over_http = |question: &Question| matches!(question, Question::Http(..));
        questions().into_iter().filter(over_http).collect::<Vec<_>>()
    };
    let load = ["load", "demo", "--stages", "2", "--sequences", "8"];
    node.json(&load)?;
    let plain = ask_these(asked(), node, async || Ok(())).await?;
    node.json(&["unload", "demo"])?;
    node.json(&[&load[..], &["--draft-model", "demo", "--num-draft-tokens", "4"]].concat())?;
    // The stage that guesses, and the one that says which guesses are right; seen from the other node.
    for (stage, front) in [(0, 1), (1, 0)] {
        let front = &cluster.nodes[front];
        let before = resumed(front).await?;
        let pid = ready_deployment(node)?["stages"][stage]["worker_pid"].as_u64().context("pid")?;
        let answers =
            ask_these(asked(), front, async || Ok(kill(Pid::from_raw(pid as i32), Signal::SIGKILL)?)).await?;
        for (place, (answer, plain)) in answers.iter().zip(&plain).enumerate() {
            assert_eq!(said(answer)?, said(plain)?, "answer {place}, stage {stage}");
        }
        ensure!(resumed(front).await? > before, "stage {stage} was killed and nobody noticed");
        let mut right = 0.0;
        for node in &cluster.nodes {
            right += figures(node, "vllm:spec_decode_num_accepted_tokens_total").await.unwrap_or_default();
        }
        ensure!(right > 0.0, "nothing was guessed");
        eventually(Duration::from_secs(20), || ready_deployment(node).map(drop))?;
    }
    Ok(())
}

#[tokio::test]
async fn story_an_answer_ends_with_a_clear_error_when_its_node_stays_away() -> Result<()> {
    let mut cluster = LocalCluster::start_with(2, &["--resume-within", "2"])?;
    cluster.first().json(&["load", "demo", "--stages", "2"])?;
    let second = cluster.nodes.remove(1);
    let started = Instant::now();
    let answers = ask_all(cluster.first(), async || {
        drop(second); // SIGKILL
        Ok(())
    })
    .await;
    let error = format!("{:#}", answers.err().context("nobody holds the other half of the model")?);
    ensure!(error.contains("lost") && error.contains("formed in time"), "{error}");
    ensure!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
    Ok(())
}
