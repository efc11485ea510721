//! What HTTP can do, in typed form.

use crate::raw::{Rpcs, start};
use anyhow::{Context as _, Result, ensure};
use mlxnode_api::keys::KeysView;
use mlxnode_cluster::Role;
use mlxnode_compute::Grammar;
use mlxnode_proto::v1::answer_part::Part;
use mlxnode_proto::v1::generate_batch_response::Event;
use mlxnode_proto::v1::generate_request::Input;
use mlxnode_proto::v1::inference_client::InferenceClient;
use mlxnode_proto::v1::response_format::Kind;
use mlxnode_proto::v1::tool_choice::Choice;
use mlxnode_proto::v1::{
    Chat, ChatMessage, EmbedInput, EmbedRequest, FinishReason, GenerateBatchRequest, GenerateRequest,
    GenerateResponse, JsonObject, RenderChatRequest, ResponseFormat, SamplingParameters, TokenIds, ToolCall,
    ToolChoice, ToolMode, embed_input,
};
use std::time::Duration;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

async fn rpcs() -> Result<(Rpcs, InferenceClient<Channel>)> {
    let rpcs = start(Some(Role::Client), KeysView { keys: Vec::new(), is_known: true }).await?;
    let client = InferenceClient::new(rpcs.channel.clone());
    Ok((rpcs, client))
}

fn plain(words: &str) -> GenerateRequest {
    let input = Some(Input::Prompt(format!("SAY {words}")));
    GenerateRequest { model: "demo".into(), input, ..GenerateRequest::default() }
}

fn chat(words: &str) -> Chat {
    let content = format!("SAY {words}");
    Chat {
        messages: vec![ChatMessage { role: "user".into(), content, ..ChatMessage::default() }],
        ..Chat::default()
    }
}

fn talk(chat: Chat) -> GenerateRequest {
    GenerateRequest { model: "demo".into(), input: Some(Input::Chat(chat)), ..GenerateRequest::default() }
}

fn tools() -> Vec<String> {
    vec![
        r#"{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}},
            "required": ["x"], "additionalProperties": false}}}"#
            .to_owned(),
    ]
}

async fn answer(
    client: &mut InferenceClient<Channel>,
    request: GenerateRequest,
) -> Result<Vec<GenerateResponse>, Status> {
    let mut stream = client.generate(request).await?.into_inner();
    let mut all = Vec::new();
    while let Some(response) = stream.message().await? {
        all.push(response);
    }
    Ok(all)
}

fn parts(responses: &[GenerateResponse]) -> (String, String, Vec<ToolCall>) {
    let (mut content, mut reasoning, mut calls) = (String::new(), String::new(), Vec::new());
    for part in responses.iter().flat_map(|response| &response.parts).filter_map(|part| part.part.clone()) {
        match part {
            Part::Content(text) => content.push_str(&text),
            Part::Reasoning(text) => reasoning.push_str(&text),
            Part::ToolCall(call) => calls.push(call),
            Part::ToolCallStarted(_) | Part::Warning(_) => {}
        }
    }
    (content, reasoning, calls)
}

fn text(responses: &[GenerateResponse]) -> String {
    responses.iter().map(|response| response.text.as_str()).collect()
}

#[tokio::test]
async fn reasoning_and_calls_are_told_apart() -> Result<()> {
    let (rpcs, mut client) = rpcs().await?;
    let call = "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"x\": 1}}\n</tool_call>";
    let said = format!("<think>Hm.</think>{call}\n{call}");
    let request = talk(Chat { tools_json: tools(), ..chat(&said) });
    let all = answer(&mut client, request.clone()).await?;
    assert_eq!(text(&all), said, "the text is as the model wrote it");
    let (_, reasoning, calls) = parts(&all);
    assert_eq!((reasoning.as_str(), calls.len()), ("Hm.", 2));
    assert_eq!((calls[0].name.as_str(), calls[0].arguments_json.as_str()), ("add", "{\"x\":1}"));
    let finish = all.last().and_then(|last| last.finish.clone()).context("finish")?;
    assert_eq!(finish.reason(), FinishReason::ToolCalls);
    let usage = finish.usage.context("usage")?;
    assert_eq!(
        (usage.cached_tokens, usage.prompt_tokens),
        (3, rpcs.desk.replicas.last().prompt.len() as u32)
    );
    ensure!((1..usage.generation_tokens).contains(&usage.reasoning_tokens), "{usage:?}");
    let one = talk(Chat { no_parallel_tool_calls: true, tools_json: tools(), ..chat(&said) });
    assert_eq!(parts(&answer(&mut client, one).await?).2.len(), 1);
    // Calls and their results go back as the template knows them.
    let mut history = chat(&said);
    history.messages.extend([
        ChatMessage { role: "assistant".into(), tool_calls: calls, ..ChatMessage::default() },
        ChatMessage {
            role: "tool".into(),
            content: "2".into(),
            tool_call_id: "1".into(),
            ..ChatMessage::default()
        },
    ]);
    let rendered = RenderChatRequest { model: "demo".into(), chat: Some(history) };
    let rendered = client.render_chat(rendered).await?.into_inner().text;
    ensure!(rendered.contains("\"x\"") && rendered.contains("add"), "{rendered}");
    rpcs.stop().await
}

#[tokio::test]
async fn formats_and_choices_become_grammars() -> Result<()> {
    let (rpcs, mut client) = rpcs().await?;
    let format = |kind| Some(ResponseFormat { kind: Some(kind) });
    let schema = r#"{"type": "object", "properties": {"n": {"type": "integer"}}}"#;
    for (kind, grammar) in [
        (Kind::JsonObject(JsonObject {}), Grammar::JsonObject),
        (Kind::JsonSchema(schema.into()), Grammar::JsonSchema(schema.into())),
        (Kind::Regex("[0-9]+".into()), Grammar::Regex("[0-9]+".into())),
        (Kind::Lark("start: \"x\"".into()), Grammar::Lark("start: \"x\"".into())),
    ] {
        answer(&mut client, GenerateRequest { format: format(kind), ..plain("1") }).await?;
        assert_eq!(rpcs.desk.replicas.last().spec.grammar, Some(grammar));
    }
    // Behind the reasoning of a model that reasons.
    answer(
        &mut client,
        GenerateRequest { format: format(Kind::JsonObject(JsonObject {})), ..talk(chat("{}")) },
    )
    .await?;
    let grammar = rpcs.desk.replicas.last().spec.grammar;
    ensure!(matches!(&grammar, Some(Grammar::Lark(text)) if text.contains("think")), "{grammar:?}");
    for choice in [Choice::Mode(ToolMode::Required.into()), Choice::Function("add".into())] {
        let tool_choice = Some(ToolChoice { choice: Some(choice) });
        answer(&mut client, talk(Chat { tools_json: tools(), tool_choice, ..chat("x") })).await?;
        let grammar = rpcs.desk.replicas.last().spec.grammar;
        ensure!(matches!(&grammar, Some(Grammar::Lark(text)) if text.contains("add")), "{grammar:?}");
    }
    rpcs.stop().await
}

#[tokio::test]
async fn scores_samples_and_vectors() -> Result<()> {
    let (rpcs, mut client) = rpcs().await?;
    let request = GenerateRequest {
        top_logprobs: Some(2),
        prompt_logprobs: Some(1),
        samples: 3,
        sampling: Some(SamplingParameters {
            seed: Some(7),
            temperature: 1.0,
            ..SamplingParameters::default()
        }),
        ..plain("Good day.")
    };
    let all = answer(&mut client, request).await?;
    let prompt = rpcs.desk.replicas.last().prompt;
    for sample in 0..3 {
        let own: Vec<GenerateResponse> = all.iter().filter(|one| one.sample == sample).cloned().collect();
        assert_eq!(text(&own), "Good day.");
        let scores: Vec<u32> =
            own.iter().flat_map(|one| &one.prompt_scores).map(|scored| scored.token_id).collect();
        assert_eq!(scores, prompt[1..]);
        let scored =
            own.iter().flat_map(|one| &one.prompt_scores).filter_map(|scored| scored.logprobs.clone());
        ensure!(scored.count() == prompt.len() - 1);
        ensure!(own.iter().flat_map(|one| &one.logprobs).all(|scored| scored.top.len() == 2));
        assert_eq!(own.iter().filter(|one| one.prompt_tokens > 0).count(), 1);
        let finish = own.last().and_then(|one| one.finish.clone()).context("finish")?;
        assert_eq!((finish.seed, finish.reason()), (7 + u64::from(sample), FinishReason::Stop));
    }
    let ids = vec![5, 6, 7, 8];
    let inputs = [embed_input::Input::Text("abc".into()), embed_input::Input::Tokens(TokenIds { ids })];
    let inputs = inputs.into_iter().map(|input| EmbedInput { input: Some(input) }).collect();
    let embedded = client
        .embed(EmbedRequest { model: "demo".into(), inputs, adapter: String::new() })
        .await?
        .into_inner();
    assert_eq!(embedded.embeddings[1].values, [4.0, 0.5, -1.25, 3.0e-3]);
    assert_eq!((embedded.embeddings.len(), embedded.embeddings[1].tokens), (2, 4));
    rpcs.stop().await
}

#[tokio::test]
async fn requests_of_a_batch_end_each_for_itself() -> Result<()> {
    let (rpcs, mut client) = rpcs().await?;
    let wrong = SamplingParameters { top_p: 2.0, ..SamplingParameters::default() };
    let requests = vec![
        plain("one"),
        GenerateRequest { sampling: Some(wrong), ..plain("two") },
        GenerateRequest { samples: 2, ..talk(chat("three")) },
        plain("four"),
        plain("x BREAK"),
        GenerateRequest { model: "nobody".into(), ..plain("six") },
    ];
    let mut stream = client.generate_batch(GenerateBatchRequest { requests }).await?.into_inner();
    let (mut texts, mut failures, mut ends) = (vec![String::new(); 6], vec![None; 6], vec![0; 6]);
    while let Some(message) = stream.message().await? {
        let index = message.request as usize;
        ensure!(failures[index].is_none(), "nothing comes after a failure");
        match message.event.context("an event")? {
            Event::Response(response) => {
                ends[index] += usize::from(response.finish.is_some());
                texts[index].push_str(&response.text);
            }
            Event::Failure(failure) => {
                failures[index] = Some((Code::from(failure.code), failure.field, failure.retry_seconds > 0.0))
            }
        }
    }
    assert_eq!((texts[0].as_str(), ends.clone()), ("one", vec![1, 0, 2, 1, 0, 0]));
    assert_eq!(texts[2].len(), "threethree".len());
    let failed = |code, field: &str, retry| Some((code, field.to_owned(), retry));
    assert_eq!(failures[1], failed(Code::InvalidArgument, "sampling.top_p", false));
    assert_eq!(failures[4], failed(Code::Unavailable, "", true));
    assert_eq!(failures[5], failed(Code::NotFound, "model", false));
    for requests in [Vec::new(), vec![GenerateRequest { samples: 16, ..plain("x") }; 9]] {
        let status =
            client.generate_batch(GenerateBatchRequest { requests }).await.err().context("went through")?;
        assert_eq!(status.code(), Code::InvalidArgument);
    }
    let full = GenerateBatchRequest { requests: vec![plain("QUEUE FULL")] };
    let told =
        client.generate_batch(full).await?.into_inner().message().await?.and_then(|message| message.event);
    ensure!(
        matches!(&told, Some(Event::Failure(failure)) if failure.code == 8 && failure.retry_seconds >= 1.0),
        "{told:?}"
    );
    tokio::time::sleep(Duration::from_millis(150)).await; // others are refused for a moment too
    // Whoever goes away cancels all of them.
    let requests = vec![plain("a WAIT"), plain("b WAIT")];
    let mut stream = client.generate_batch(GenerateBatchRequest { requests }).await?.into_inner();
    ensure!(stream.message().await?.is_some());
    drop(stream);
    for _ in 0..200 {
        if rpcs.desk.replicas.running() == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(rpcs.desk.replicas.running(), 0);
    rpcs.stop().await
}

#[tokio::test]
async fn errors_name_the_field_and_the_wait() -> Result<()> {
    let (rpcs, mut client) = rpcs().await?;
    let sampling = |sampling| GenerateRequest { sampling: Some(sampling), ..plain("x") };
    let cases = [
        (sampling(SamplingParameters { top_k: 99_999, ..SamplingParameters::default() }), "sampling.top_k"),
        (
            sampling(SamplingParameters { temperature: f32::NAN, ..SamplingParameters::default() }),
            "sampling.temperature",
        ),
        (
            sampling(SamplingParameters {
                logit_bias: [(99_999, 1.0)].into(),
                ..SamplingParameters::default()
            }),
            "sampling.logit_bias",
        ),
        (GenerateRequest { stop: vec![String::new()], ..plain("x") }, "stop"),
        (GenerateRequest { top_logprobs: Some(21), ..plain("x") }, "top_logprobs"),
        (
            GenerateRequest {
                format: Some(ResponseFormat { kind: Some(Kind::Regex("(".into())) }),
                ..plain("x")
            },
            "format",
        ),
        (GenerateRequest { model: "nobody".into(), ..plain("x") }, "model"),
        (talk(Chat { tools_json: vec!["{}".into()], ..chat("x") }), "chat.tools_json[0].type"),
    ];
    for (request, field) in cases {
        let status = client.generate(request).await.err().with_context(|| format!("{field} went through"))?;
        let details = status.get_error_details();
        let named = details.bad_request().map(|bad| bad.field_violations[0].field.clone());
        assert_eq!(named.as_deref(), Some(field), "{status}");
        ensure!(details.error_info().is_some_and(|info| info.domain == "mlxnode"), "{status}");
    }
    let later = GenerateRequest { model: "later".into(), ..plain("x") };
    let status = client.generate(later).await.err().context("went through")?;
    assert_eq!(status.code(), Code::Unavailable);
    ensure!(status.get_error_details().retry_info().is_some(), "{status}");
    rpcs.stop().await
}
