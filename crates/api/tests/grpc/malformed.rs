//! Hundreds of calls that are wrong, from the frame to the field: each ends soon with a status, and the services go on.

use crate::descriptors::contract;
use crate::raw::{Ended, call, frame, framed, send, start};
use anyhow::{Result, ensure};
use axum::http::Method as HttpMethod;
use bytes::Bytes;
use mlxnode_api::keys::KeysView;
use mlxnode_cluster::Role;
use mlxnode_proto::v1::generate_request::Input;
use mlxnode_proto::v1::response_format::Kind;
use mlxnode_proto::v1::tool_choice::Choice;
use mlxnode_proto::v1::{
    Chat, ChatMessage, EmbedInput, EmbedRequest, GenerateBatchRequest, GenerateRequest, ResponseFormat,
    SamplingParameters, TokenIds, TokenizeRequest, ToolCall, ToolChoice, embed_input,
};
use prost::Message as _;
use prost_types::DescriptorProto;
use prost_types::field_descriptor_proto::Type;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use tonic::transport::Channel;

/// Refusals come at once; a busy machine gets a few more tries.
const SOON: Duration = Duration::from_millis(50);
const GENERATE: &str = "/mlxnode.v1.Inference/Generate";

async fn services() -> Result<crate::raw::Rpcs> {
    let rpcs = start(Some(Role::Client), KeysView { keys: Vec::new(), is_known: true }).await?;
    goes_on(&rpcs.channel, "the start").await?; // the first request of a model reads its tokenizer
    Ok(rpcs)
}

async fn goes_on(channel: &Channel, after: &str) -> Result<()> {
    let request = GenerateRequest { max_tokens: 2, ..plain("SAY hi") };
    let ended = call(channel, GENERATE, &[], framed(&request.encode_to_vec())).await?;
    ensure!(ended.code == Some(0) && ended.bytes > 0, "after {after}: {ended:?}");
    Ok(())
}

async fn refused(
    channel: &Channel,
    path: &str,
    headers: &[(&str, &str)],
    body: &Bytes,
    what: &str,
) -> Result<Ended> {
    let mut took = Duration::MAX;
    for _ in 0..8 {
        let started = Instant::now();
        let ended = call(channel, path, headers, body.clone())
            .await
            .map_err(|error| error.context(what.to_owned()))?;
        took = took.min(started.elapsed());
        ensure!(ended.is_refusal(), "{what}: {ended:?}");
        ensure!(ended.message.len() < 4000, "{what}: {ended:?}");
        if took <= SOON {
            return Ok(ended);
        }
    }
    anyhow::bail!("{what} took {took:?}")
}

/// Bytes that are no message at all, whatever the message.
fn broken_frames() -> Vec<(&'static str, Bytes)> {
    let message = TokenizeRequest { text: "x".repeat(100), ..TokenizeRequest::default() }.encode_to_vec();
    let length = message.len() as u32;
    vec![
        ("nothing", Bytes::new()),
        ("a cut prefix", Bytes::from_static(&[0, 0, 0])),
        ("a cut message", frame(0, length, &message[..50])),
        ("a length beyond the message", frame(0, length + 9, &message)),
        ("a length beyond all limits", frame(0, u32::MAX, &message)),
        ("a length beyond the limit", frame(0, 17 << 20, &message)),
        ("compressed without an encoding", frame(1, length, &message)),
        ("a flag of 2", frame(2, length, &message)),
        ("a flag of 255", frame(255, length, &message)),
        ("field number 0", framed(&[0x02, 0x00])),
        ("a wire type of 7", framed(&[0x0f, 0x00])),
        ("an endless varint", framed(&[0xff; 16])),
        ("a length of a field beyond the message", framed(&[0x0a, 0x7f, 0x61])),
        ("a group that does not end", framed(&[0xfb, 0x7f, 0xfb, 0x7f])),
        ("noise", framed(&[0x9c, 0x31, 0xd7, 0x00, 0xfe, 0x42, 0x10, 0x99, 0xab])),
    ]
}

/// The tag of a field with a wire type.
fn tag(number: i32, wire: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    prost::encoding::encode_varint(u64::from(number.unsigned_abs()) << 3 | u64::from(wire), &mut bytes);
    bytes
}

fn with_length(mut head: Vec<u8>, body: &[u8]) -> Vec<u8> {
    prost::encoding::encode_varint(body.len() as u64, &mut head);
    head.extend_from_slice(body);
    head
}

/// For each field of a message, and of those inside of it: a value of another wire type, text that is no text, a length that lies.
fn broken_fields(
    name: &str,
    messages: &BTreeMap<String, DescriptorProto>,
    around: &dyn Fn(Vec<u8>) -> Vec<u8>,
    path: &str,
    seen: &mut BTreeSet<String>,
    cases: &mut Vec<(String, Vec<u8>)>,
) {
    let Some(message) = messages.get(name).filter(|_| seen.insert(name.to_owned())) else { return };
    for field in &message.field {
        let (number, path) = (field.number(), format!("{path}.{}", field.name()));
        let is_long = matches!(field.r#type(), Type::String | Type::Bytes | Type::Message);
        // A length-delimited field as a varint, a number as 64 bits where it is none.
        let other = if is_long {
            0
        } else if matches!(field.r#type(), Type::Double | Type::Fixed64 | Type::Sfixed64) {
            5
        } else {
            1
        };
        let payload = if other == 0 { vec![1] } else { vec![0; if other == 1 { 8 } else { 4 }] };
        cases.push((format!("{path} of another wire type"), around([tag(number, other), payload].concat())));
        if field.r#type() == Type::String {
            cases.push((
                format!("{path} that is no UTF-8"),
                around(with_length(tag(number, 2), &[0xff, 0xfe, 0xc0])),
            ));
        }
        if is_long {
            cases.push((
                format!("{path} with a length that lies"),
                around([tag(number, 2), vec![0x7f, 0x61]].concat()),
            ));
        }
        if field.r#type() == Type::Message {
            let inner = field.type_name().trim_start_matches('.').to_owned();
            let wrap = |bytes: Vec<u8>| around(with_length(tag(number, 2), &bytes));
            broken_fields(&inner, messages, &wrap, &path, seen, cases);
        }
    }
}

fn plain(prompt: &str) -> GenerateRequest {
    let input = Some(Input::Prompt(prompt.into()));
    GenerateRequest { model: "demo".into(), input, ..GenerateRequest::default() }
}

fn talk(chat: Chat) -> GenerateRequest {
    GenerateRequest { model: "demo".into(), input: Some(Input::Chat(chat)), ..GenerateRequest::default() }
}

fn asks(content: &str) -> Chat {
    let message = ChatMessage { role: "user".into(), content: content.into(), ..ChatMessage::default() };
    Chat { messages: vec![message], ..Chat::default() }
}

/// Messages that are well-formed and wrong: every limit of every field, and what goes together and what does not.
fn wrong_requests() -> Vec<(&'static str, GenerateRequest)> {
    let sampling = |sampling| GenerateRequest { sampling: Some(sampling), ..plain("SAY x") };
    let d = SamplingParameters::default;
    let ids = |ids| GenerateRequest { input: Some(Input::Tokens(TokenIds { ids })), ..plain("") };
    let format = |kind| GenerateRequest { format: Some(ResponseFormat { kind }), ..plain("SAY x") };
    let tool = |json: &str| talk(Chat { tools_json: vec![json.into()], ..asks("SAY x") });
    let choice = |choice| {
        let tools_json = vec![r#"{"type": "function", "function": {"name": "f"}}"#.into()];
        talk(Chat { tools_json, tool_choice: Some(ToolChoice { choice }), ..asks("SAY x") })
    };
    let calls = |arguments_json: &str| {
        let call =
            ToolCall { name: "f".into(), arguments_json: arguments_json.into(), ..ToolCall::default() };
        let message =
            ChatMessage { role: "assistant".into(), tool_calls: vec![call], ..ChatMessage::default() };
        talk(Chat { messages: vec![message], ..Chat::default() })
    };
    let mut cases = vec![
        ("no input", GenerateRequest { input: None, ..plain("") }),
        ("an unknown model", GenerateRequest { model: "nobody".into(), ..plain("x") }),
        ("a model that loads", GenerateRequest { model: "later".into(), ..plain("x") }),
        ("no model of two", GenerateRequest { model: String::new(), ..plain("x") }),
        ("no tokens", ids(Vec::new())),
        ("a token beyond the vocabulary", ids(vec![1, 4_000_000])),
        ("a prompt beyond the context", ids(vec![5; 5000])),
        ("17 samples", GenerateRequest { samples: 17, ..plain("SAY x") }),
        ("17 stops", GenerateRequest { stop: vec!["x".into(); 17], ..plain("SAY x") }),
        ("an empty stop", GenerateRequest { stop: vec![String::new()], ..plain("SAY x") }),
        ("a long stop", GenerateRequest { stop: vec!["x".repeat(257)], ..plain("SAY x") }),
        (
            "an end token that is none",
            GenerateRequest { extra_eos: vec!["nothing of the kind".into()], ..plain("SAY x") },
        ),
        (
            "an end token beyond the vocabulary",
            GenerateRequest { extra_eos: vec!["99999999".into()], ..plain("SAY x") },
        ),
        ("65 end tokens", GenerateRequest { extra_eos: vec!["5".into(); 65], ..plain("SAY x") }),
        ("21 candidates", GenerateRequest { top_logprobs: Some(21), ..plain("SAY x") }),
        ("all candidates", GenerateRequest { top_logprobs: Some(u32::MAX), ..plain("SAY x") }),
        ("21 candidates of the prompt", GenerateRequest { prompt_logprobs: Some(21), ..plain("SAY x") }),
        ("a format that says nothing", format(None)),
        ("a schema that is no JSON", format(Some(Kind::JsonSchema("{".into())))),
        ("a schema that is a number", format(Some(Kind::JsonSchema("7".into())))),
        (
            "a schema that leads outside",
            format(Some(Kind::JsonSchema(r#"{"$ref": "http://x.example/"}"#.into()))),
        ),
        ("an expression that is none", format(Some(Kind::Regex("(".into())))),
        ("an empty grammar", format(Some(Kind::Lark(String::new())))),
        ("a grammar without a start", format(Some(Kind::Lark("a: \"x\"".into())))),
        (
            "a grammar beyond its limit",
            format(Some(Kind::Lark(format!("start: \"{}\"", "x".repeat(300 << 10))))),
        ),
        (
            "an expression for a model that reasons",
            GenerateRequest {
                format: Some(ResponseFormat { kind: Some(Kind::Regex("x".into())) }),
                ..talk(asks("x"))
            },
        ),
        ("a tool that is no JSON", tool("{")),
        ("a tool that is a list", tool("[]")),
        ("a tool without a type", tool("{}")),
        ("a tool of another type", tool(r#"{"type": "web_search"}"#)),
        ("a tool without a function", tool(r#"{"type": "function"}"#)),
        ("a tool without a name", tool(r#"{"type": "function", "function": {}}"#)),
        ("a tool with a strange name", tool(r#"{"type": "function", "function": {"name": "a b"}}"#)),
        ("a tool with a strange field", tool(r#"{"type": "function", "function": {"name": "a"}, "x": 1}"#)),
        (
            "a tool with a schema that is none",
            tool(r#"{"type": "function", "function": {"name": "a", "parameters": 7}}"#),
        ),
        (
            "two tools of one name",
            talk(Chat {
                tools_json: vec![r#"{"type": "function", "function": {"name": "f"}}"#.into(); 2],
                ..asks("x")
            }),
        ),
        ("129 tools", talk(Chat { tools_json: vec!["{}".into(); 129], ..asks("x") })),
        ("a choice that says nothing", choice(None)),
        ("a choice beyond the words", choice(Some(Choice::Mode(99)))),
        ("a choice below the words", choice(Some(Choice::Mode(-1)))),
        ("a choice of a function that is not there", choice(Some(Choice::Function("g".into())))),
        (
            "a choice without tools",
            talk(Chat { tool_choice: Some(ToolChoice { choice: Some(Choice::Mode(3)) }), ..asks("x") }),
        ),
        (
            "template arguments that are no JSON",
            talk(Chat { template_arguments_json: "{".into(), ..asks("x") }),
        ),
        (
            "template arguments that are a list",
            talk(Chat { template_arguments_json: "[]".into(), ..asks("x") }),
        ),
        (
            "template arguments of the template's own",
            talk(Chat { template_arguments_json: r#"{"messages": []}"#.into(), ..asks("x") }),
        ),
        ("a call whose arguments are no JSON", calls("{")),
        ("a call whose arguments are a text", calls("\"x\"")),
        ("10001 messages", talk(Chat { messages: vec![ChatMessage::default(); 10_001], ..Chat::default() })),
        (
            "1001 calls",
            talk(Chat {
                messages: vec![ChatMessage {
                    tool_calls: vec![ToolCall::default(); 1001],
                    ..ChatMessage::default()
                }],
                ..Chat::default()
            }),
        ),
        ("a conversation beyond the context", talk(asks(&"long ".repeat(600)))),
        ("text beyond the limit", plain(&"x".repeat((8 << 20) + 1))),
    ];
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1.0e30, 1.0e30] {
        cases.extend([
            ("a temperature out of range", sampling(SamplingParameters { temperature: bad, ..d() })),
            ("a top_p out of range", sampling(SamplingParameters { top_p: bad, ..d() })),
            ("a min_p out of range", sampling(SamplingParameters { min_p: bad, ..d() })),
            ("an xtc_probability out of range", sampling(SamplingParameters { xtc_probability: bad, ..d() })),
            ("an xtc_threshold out of range", sampling(SamplingParameters { xtc_threshold: bad, ..d() })),
        ]);
    }
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        cases.extend([
            (
                "a repetition_penalty out of range",
                sampling(SamplingParameters { repetition_penalty: bad, ..d() }),
            ),
            (
                "a presence_penalty out of range",
                sampling(SamplingParameters { presence_penalty: bad, ..d() }),
            ),
            (
                "a frequency_penalty out of range",
                sampling(SamplingParameters { frequency_penalty: bad, ..d() }),
            ),
            ("a bias out of range", sampling(SamplingParameters { logit_bias: [(5, bad)].into(), ..d() })),
        ]);
    }
    cases.extend([
        ("a threshold above a half", sampling(SamplingParameters { xtc_threshold: 0.6, ..d() })),
        ("a top_k of all", sampling(SamplingParameters { top_k: 514, ..d() })),
        ("a top_k beyond all", sampling(SamplingParameters { top_k: u32::MAX, ..d() })),
        (
            "a bias beyond the vocabulary",
            sampling(SamplingParameters { logit_bias: [(514, 1.0)].into(), ..d() }),
        ),
        (
            "1025 biases",
            sampling(SamplingParameters { logit_bias: (0..1025).map(|id| (id, 1.0)).collect(), ..d() }),
        ),
    ]);
    cases
}

#[tokio::test]
async fn whatever_is_wrong_with_a_call_it_ends_with_a_status() -> Result<()> {
    let rpcs = services().await?;
    let channel = &rpcs.channel;
    let (methods, messages) = contract()?;
    let mut count = 0;
    for method in &methods {
        // These read streams: what is wrong with a message ends them, and so does their end.
        let is_stream = method.path.contains("ServerReflection");
        for (what, body) in broken_frames() {
            count += 1;
            if is_stream {
                // Whatever the status: nobody is answered.
                let ended = call(channel, &method.path, &[], body).await?;
                ensure!(ended.bytes == 0, "{}: {what}: {ended:?}", method.path);
                continue;
            }
            refused(channel, &method.path, &[], &body, &format!("{}: {what}", method.path)).await?;
        }
        let (mut cases, mut seen) = (Vec::new(), BTreeSet::new());
        broken_fields(&method.input, &messages, &|bytes| bytes, &method.path, &mut seen, &mut cases);
        for (what, bytes) in cases {
            if is_stream {
                let ended = call(channel, &method.path, &[], framed(&bytes)).await?;
                ensure!(ended.bytes == 0, "{what}: {ended:?}");
                continue;
            }
            let ended = refused(channel, &method.path, &[], &framed(&bytes), &what).await?;
            ensure!(matches!(ended.code, Some(3 | 13)), "{what}: {ended:?}");
            count += 1;
        }
        goes_on(channel, &method.path).await?;
    }
    for (what, request) in wrong_requests() {
        let ended = refused(channel, GENERATE, &[], &framed(&request.encode_to_vec()), what).await?;
        // INVALID_ARGUMENT, NOT_FOUND or UNAVAILABLE: whose mistake it is is clear.
        ensure!(matches!(ended.code, Some(3 | 5 | 14)) && !ended.message.is_empty(), "{what}: {ended:?}");
        count += 1;
    }
    let embed = |inputs| EmbedRequest { model: "demo".into(), inputs, adapter: String::new() };
    let text = |text: String| EmbedInput { input: Some(embed_input::Input::Text(text)) };
    for (what, request) in [
        ("nothing to embed", embed(Vec::new())),
        ("129 texts", embed(vec![text("x".into()); 129])),
        ("an input that says nothing", embed(vec![EmbedInput::default()])),
        (
            "tokens beyond the vocabulary",
            embed(vec![EmbedInput {
                input: Some(embed_input::Input::Tokens(TokenIds { ids: vec![u32::MAX] })),
            }]),
        ),
        ("a text beyond the context", embed(vec![text("long ".repeat(600))])),
    ] {
        let ended =
            refused(channel, "/mlxnode.v1.Inference/Embed", &[], &framed(&request.encode_to_vec()), what)
                .await?;
        ensure!(ended.code == Some(3) && !ended.message.is_empty(), "{what}: {ended:?}");
        count += 1;
    }
    for (what, requests) in [("an empty batch", Vec::new()), ("129 requests", vec![plain("x"); 129])] {
        let body = framed(&GenerateBatchRequest { requests }.encode_to_vec());
        refused(channel, "/mlxnode.v1.Inference/GenerateBatch", &[], &body, what).await?;
        count += 1;
    }
    assert!(count >= 500, "only {count}");
    goes_on(channel, "all of it").await?;
    rpcs.stop().await
}

#[tokio::test]
async fn wrong_paths_headers_and_deadlines_end_with_a_status() -> Result<()> {
    let rpcs = services().await?;
    let channel = &rpcs.channel;
    let good = framed(&GenerateRequest { max_tokens: 2, ..plain("SAY hi") }.encode_to_vec());
    for path in [
        "/",
        "/mlxnode.v1.Inference",
        "/mlxnode.v1.Inference/",
        "/mlxnode.v1.Inference/generate",
        "/mlxnode.v1.Inference/Generate/x",
        "/mlxnode.v2.Inference/Generate",
        "/mlxnode.internal.v1.Replica/Run",
        "/../etc/passwd",
        "/%ff%00/x",
        "/grpc.health.v1.Health/check",
    ] {
        refused(channel, path, &[], &good, path).await?;
    }
    let long = "x".repeat(15_000);
    for (what, headers) in [
        ("another content type", vec![("content-type", "application/json")]),
        ("an unknown encoding", vec![("grpc-encoding", "zip")]),
        ("an encoding that is not served", vec![("grpc-encoding", "gzip")]),
    ] {
        // What says nothing about a compressed message does no harm to one that is not compressed; a compressed one cannot be read.
        let body = if what.contains("encoding") { frame(1, 3, b"abc") } else { good.clone() };
        refused(channel, GENERATE, &headers, &body, what).await?;
    }
    for timeout in ["0S", "0n", "1n", "0m"] {
        let body = framed(&GenerateRequest { ignore_eos: true, ..plain("SAY WAIT") }.encode_to_vec());
        // This client counts too, and gives up first as often as not.
        match call(channel, GENERATE, &[("grpc-timeout", timeout)], body).await {
            Ok(ended) => ensure!(matches!(ended.code, Some(1 | 4)), "{timeout}: {ended:?}"),
            Err(error) => ensure!(format!("{error:?}").contains("Timeout expired"), "{timeout}: {error:?}"),
        }
    }
    // What is no timeout is none: the call is served.
    for timeout in ["x", "99999999999S", "-1S", "5"] {
        let ended = call(channel, GENERATE, &[("grpc-timeout", timeout)], good.clone()).await?;
        ensure!(ended.code.is_some(), "{timeout}: {ended:?}");
    }
    for method in [HttpMethod::GET, HttpMethod::PUT, HttpMethod::DELETE, HttpMethod::OPTIONS] {
        let ended = send(channel, method.clone(), GENERATE, &[], Bytes::new()).await?;
        ensure!(ended.is_refusal(), "{method}: {ended:?}");
    }
    let ended = call(channel, GENERATE, &[("x-large", &long), ("x-larger", &long)], good.clone()).await;
    ensure!(ended.as_ref().map_or(true, Ended::is_refusal), "32 kB of metadata: {ended:?}");
    goes_on(channel, "all of it").await?;
    rpcs.stop().await
}

/// The five requests that end mlx_lm.server, and a bias beyond the vocabulary: served, or refused by name.
#[tokio::test]
async fn what_ends_mlx_lms_server_is_served_or_refused() -> Result<()> {
    let rpcs = services().await?;
    let sampling = |sampling| GenerateRequest { sampling: Some(sampling), max_tokens: 2, ..plain("SAY hi") };
    let cases = [
        ("an empty prompt", GenerateRequest { max_tokens: 2, ..plain("") }, None),
        ("a prompt", GenerateRequest { max_tokens: 2, ..plain("SAY hi") }, Some(0)),
        ("the same prompt", GenerateRequest { max_tokens: 2, ..plain("SAY hi") }, Some(0)),
        (
            "a top_k of all",
            sampling(SamplingParameters { top_k: 514, temperature: 1.0, ..SamplingParameters::default() }),
            Some(3),
        ),
        (
            "a prompt as a list",
            GenerateRequest {
                input: Some(Input::Tokens(TokenIds { ids: vec![5, 6, 7] })),
                max_tokens: 2,
                ..plain("")
            },
            Some(0),
        ),
        (
            "a threshold",
            sampling(SamplingParameters {
                xtc_threshold: 0.7,
                xtc_probability: 1.0,
                ..SamplingParameters::default()
            }),
            Some(3),
        ),
        (
            "a bias",
            sampling(SamplingParameters {
                logit_bias: [(1_000_000, 5.0)].into(),
                ..SamplingParameters::default()
            }),
            Some(3),
        ),
    ];
    for (what, request, code) in cases {
        let ended = call(&rpcs.channel, GENERATE, &[], framed(&request.encode_to_vec())).await?;
        ensure!(
            matches!(ended.code, Some(0 | 3)) && code.is_none_or(|code| ended.code == Some(code)),
            "{what}: {ended:?}"
        );
        goes_on(&rpcs.channel, what).await?;
    }
    rpcs.stop().await
}

/// Measured where the system tells it simply; the code is the same everywhere.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn memory_stays_where_it_is() -> Result<()> {
    let resident = || -> Option<u64> {
        let pages =
            std::fs::read_to_string("/proc/self/statm").ok()?.split(' ').nth(1)?.parse::<u64>().ok()?;
        Some(pages * 4096)
    };
    let rpcs = services().await?;
    let large = framed(&plain(&"x".repeat((8 << 20) + 1)).encode_to_vec());
    let lies = frame(0, u32::MAX, &[0; 64]);
    let round = async || -> Result<()> {
        for _ in 0..8 {
            for body in [&large, &lies] {
                ensure!(call(&rpcs.channel, GENERATE, &[], body.clone()).await?.is_refusal());
            }
        }
        Ok(())
    };
    round().await?;
    let before = resident().unwrap_or_default();
    for _ in 0..4 {
        round().await?;
    }
    let grown = resident().unwrap_or_default().saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes more");
    rpcs.stop().await
}
