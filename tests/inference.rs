//! The service `Inference` as a client in Rust sees it: text and tokens, chat templates, log-probabilities, seeds, cancelling, deadlines.

use anyhow::{Context as _, Result, ensure};
use mlxnode_node::{DataDir, connect_to_local_node};
use mlxnode_proto::v1::cluster_client::ClusterClient;
use mlxnode_proto::v1::inference_client::InferenceClient;
use mlxnode_proto::v1::{
    Chat, ChatMessage, DetokenizeRequest, FinishReason, GenerateRequest, GenerateResponse, RenderChatRequest,
    SamplingParameters, StatusRequest, TokenIds, TokenizeRequest, generate_request,
};
use mlxnode_testkit::cluster::LocalCluster;
use mlxnode_testkit::node::NodeProcess;
use std::time::{Duration, Instant};
use tonic::transport::Channel;
use tonic::{Code, Request};

async fn channel(node: &NodeProcess) -> Result<Channel> {
    connect_to_local_node(&DataDir::new(node.data_dir())).await?.context("the node runs")
}

fn chat(text: &str) -> Chat {
    let messages = vec![ChatMessage { role: "user".into(), content: text.into(), ..ChatMessage::default() }];
    Chat { messages, ..Chat::default() }
}

fn question(text: &str) -> GenerateRequest {
    let input = Some(generate_request::Input::Chat(chat(text)));
    GenerateRequest { input, max_tokens: 32, ..GenerateRequest::default() }
}

/// As many tokens as the context holds, whatever the model would like.
fn endless() -> GenerateRequest {
    GenerateRequest { max_tokens: u32::MAX, ignore_eos: true, ..question("Sort 31, 4, 15") }
}

async fn answer(
    client: &mut InferenceClient<Channel>,
    request: GenerateRequest,
) -> Result<Vec<GenerateResponse>> {
    let mut stream = client.generate(request).await?.into_inner();
    let mut all = Vec::new();
    while let Some(response) = stream.message().await? {
        all.push(response);
    }
    Ok(all)
}

fn tokens(responses: &[GenerateResponse]) -> Vec<u32> {
    responses.iter().flat_map(|response| response.token_ids.clone()).collect()
}

#[tokio::test]
async fn story_a_client_asks_in_every_way() -> Result<()> {
    let cluster = LocalCluster::start(2)?;
    cluster.first().json(&["load", "demo", "--stages", "2"])?;
    // The second node is the front: it has no scheduler and gets the tokenizer from the first stage's node.
    let mut client = InferenceClient::new(channel(&cluster.nodes[1]).await?);

    // Text, tokens and the chat template go together.
    let rendered = client
        .render_chat(RenderChatRequest { model: "demo".into(), chat: Some(chat("What is 17 + 25?")) })
        .await?
        .into_inner();
    ensure!(rendered.text.contains("What is 17 + 25?"), "{}", rendered.text);
    let detokenized = client
        .detokenize(DetokenizeRequest { model: "demo".into(), token_ids: rendered.token_ids.clone() })
        .await?
        .into_inner();
    assert_eq!(detokenized.text, rendered.text);
    let tokenized = client
        .tokenize(TokenizeRequest {
            model: "demo".into(),
            text: rendered.text.clone(),
            no_special_tokens: true,
        })
        .await?
        .into_inner();
    assert_eq!(tokenized.token_ids, rendered.token_ids);

    // The same conversation as chat, as text and as token ids gives the same tokens.
    let by_chat = answer(&mut client, question("What is 17 + 25?")).await?;
    let by_text =
        GenerateRequest { input: Some(generate_request::Input::Prompt(rendered.text)), ..question("") };
    let by_ids = GenerateRequest {
        input: Some(generate_request::Input::Tokens(TokenIds { ids: rendered.token_ids.clone() })),
        ..question("")
    };
    assert_eq!(tokens(&by_chat), tokens(&answer(&mut client, by_text).await?));
    assert_eq!(tokens(&by_chat), tokens(&answer(&mut client, by_ids).await?));
    assert_eq!(by_chat[0].prompt_tokens as usize, rendered.token_ids.len());
    let finish =
        by_chat.last().and_then(|last| last.finish.clone()).context("the last message has finish")?;
    assert_eq!(finish.reason(), FinishReason::Stop);
    assert_eq!(finish.usage.context("usage")?.generation_tokens as usize, tokens(&by_chat).len());
    ensure!(finish.timing.context("timing")?.peak_memory_bytes > 1_000_000, "{finish:?}");

    // Log-probabilities: the greedy choice is the best candidate, and all are logarithms of probabilities.
    let with_logprobs = GenerateRequest { top_logprobs: Some(3), ..question("What is 17 + 25?") };
    for response in answer(&mut client, with_logprobs).await? {
        assert_eq!(response.logprobs.len(), response.token_ids.len());
        for (token, logprobs) in response.token_ids.iter().zip(&response.logprobs) {
            assert_eq!(logprobs.top.len(), 3);
            assert_eq!(logprobs.top[0].token_id, *token);
            assert_eq!(logprobs.top[0].logprob, logprobs.logprob);
            ensure!(
                logprobs
                    .top
                    .windows(2)
                    .all(|pair| pair[0].logprob >= pair[1].logprob && pair[0].logprob <= 0.0)
            );
        }
    }

    // A stop string ends the text before it.
    let stopped =
        answer(&mut client, GenerateRequest { stop: vec![",".into()], ..question("Sort 31, 4, 15") }).await?;
    let text: String = stopped.iter().map(|response| response.text.as_str()).collect();
    assert_eq!(text, "4");

    // The same seed gives the same tokens; without one the server says which it took.
    let sampled = |seed| GenerateRequest {
        sampling: Some(SamplingParameters { temperature: 1.5, seed, ..SamplingParameters::default() }),
        ..endless()
    };
    let first = answer(&mut client, sampled(None)).await?;
    let seed = first.last().and_then(|last| last.finish.clone()).context("finish")?.seed;
    assert_eq!(tokens(&first), tokens(&answer(&mut client, sampled(Some(seed))).await?));
    ensure!(tokens(&first) != tokens(&answer(&mut client, sampled(Some(seed + 1))).await?));

    // Wrong requests are refused before any work, with the field's name.
    let refusals = [
        (GenerateRequest { model: "nobody".into(), ..question("hi") }, Code::NotFound, "nobody"),
        (GenerateRequest { input: None, ..question("") }, Code::InvalidArgument, "prompt"),
        (
            GenerateRequest {
                sampling: Some(SamplingParameters { top_p: 2.0, ..SamplingParameters::default() }),
                ..question("hi")
            },
            Code::InvalidArgument,
            "top_p",
        ),
        (
            GenerateRequest {
                input: Some(generate_request::Input::Tokens(TokenIds { ids: vec![1, 4_000_000] })),
                ..question("")
            },
            Code::InvalidArgument,
            "4000000",
        ),
        (
            GenerateRequest {
                input: Some(generate_request::Input::Tokens(TokenIds { ids: vec![5; 5000] })),
                ..question("")
            },
            Code::InvalidArgument,
            "context",
        ),
    ];
    for (request, code, words) in refusals {
        let status = client.generate(request).await.err().context("went through")?;
        assert_eq!(status.code(), code, "{status}");
        ensure!(status.message().contains(words), "{status}");
    }
    Ok(())
}

#[tokio::test]
async fn story_a_cancelled_call_stops_the_work_and_a_deadline_is_kept() -> Result<()> {
    let cluster = LocalCluster::start(2)?;
    cluster.first().json(&["load", "demo", "--stages", "2", "--sequences", "1"])?;
    let channel = channel(cluster.first()).await?;
    let mut client = InferenceClient::new(channel.clone());
    let mut cluster_client = ClusterClient::new(channel);

    // One place, taken by a long answer: a second request waits, and gets its turn when the first one is dropped.
    let mut running = client.generate(endless()).await?.into_inner();
    ensure!(running.message().await?.is_some());
    drop(running);
    let started = Instant::now();
    answer(&mut client, question("What is 17 + 25?")).await?;
    ensure!(started.elapsed() < Duration::from_secs(5), "the place was not freed: {:?}", started.elapsed());
    let status = cluster_client.status(StatusRequest {}).await?.into_inner();
    let end = Instant::now() + Duration::from_secs(2);
    let mut active = status.deployments[0].active_requests;
    while active > 0 && Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(20)).await;
        active = cluster_client.status(StatusRequest {}).await?.into_inner().deployments[0].active_requests;
    }
    assert_eq!(active, 0);

    // A deadline ends the call in time.
    let mut request = Request::new(endless());
    request.set_timeout(Duration::from_millis(60));
    let started = Instant::now();
    let outcome = async {
        let mut stream = client.generate(request).await?.into_inner();
        while stream.message().await?.is_some() {}
        Ok::<_, tonic::Status>(())
    }
    .await;
    let status = outcome.err().context("512 tokens do not fit 60 ms")?;
    ensure!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status}");
    ensure!(started.elapsed() < Duration::from_secs(5));
    // And the replica is fine afterwards.
    answer(&mut client, question("What is 2 + 3?")).await?;
    Ok(())
}

#[tokio::test]
async fn story_unloading_tells_those_who_wait_for_answers() -> Result<()> {
    let cluster = LocalCluster::start(1)?;
    cluster.first().json(&["load", "demo"])?;
    let mut client = InferenceClient::new(channel(cluster.first()).await?);
    let mut running = client.generate(endless()).await?.into_inner();
    ensure!(running.message().await?.is_some());
    cluster.first().json(&["unload", "demo"])?;
    let status = loop {
        match running.message().await {
            Ok(Some(_)) => {}
            Ok(None) => anyhow::bail!("the answer ended as if it were whole"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Unavailable);
    ensure!(status.message().contains("unloaded"), "{status}");
    Ok(())
}

/// `generate` and `chat` say the same whether a node answers or this process does.
#[test]
fn story_the_command_line_says_the_same_here_and_on_the_cluster() -> Result<()> {
    let cluster = LocalCluster::start(2)?;
    let node = cluster.first();
    node.json(&["load", "demo", "--stages", "2"])?;
    let schema = node.data_dir().join("schema.json");
    std::fs::write(&schema, r#"{"type": "integer", "minimum": 10, "maximum": 19}"#)?;
    let schema = schema.to_str().context("utf-8")?;
    let flags: [&[&str]; 6] = [
        &["-p", "What is 17 + 25?", "--logprobs", "2"],
        &[
            "-p",
            "Sort 31, 4, 15",
            "--temp",
            "0.8",
            "--seed",
            "5",
            "--top-k",
            "20",
            "--repetition-penalty",
            "1.2",
        ],
        &["-p", "What is 2 + 3?", "--json-schema", schema],
        &["-p", "What is 2 + 3?", "--regex", "[0-9]{2} (km|m)", "--stop", "k"],
        &["-p", "Sort 31", "--ignore-chat-template", "--logit-bias", "{\"7\": -5}", "--max-tokens", "7"],
        &["-p", "What is 9 + 3?", "--prefill-response", "1", "--system-prompt", "Add."],
    ];
    for flags in flags {
        let arguments = [&["generate"], flags].concat();
        let there = node.json(&[&arguments[..], &["--model", "demo"]].concat())?;
        let here = node.json(&[&arguments[..], &["--local"]].concat())?;
        for field in [
            "text",
            "content",
            "reasoning",
            "tool_calls",
            "token_ids",
            "prompt_tokens",
            "generation_tokens",
            "finish_reason",
        ] {
            assert_eq!(there[field], here[field], "{flags:?}: {field}");
        }
        let count = |answer: &serde_json::Value| answer["logprobs"].as_array().map(Vec::len);
        assert_eq!(count(&there), count(&here), "{flags:?}");
    }
    let refused = node.output(&["generate", "-p", "x", "--adapter", "nobody"])?;
    ensure!(!refused.status.success(), "an adapter that is not there");
    Ok(())
}
