//! `/v1/completions` and `/v1/embeddings`.

use crate::client::{good, refused, streamed};
use crate::desk::Desk;
use anyhow::{Context as _, Result};
use serde_json::{Value, json};

const PATH: &str = "/v1/completions";

#[tokio::test]
async fn prompts_come_in_four_kinds() -> Result<()> {
    let desk = Desk::start().await?;
    let ids = desk.replicas.tokenizer.encode("SAY Hi.", false)?;
    let cases = [
        (json!("SAY Hi."), 1),
        (json!(["SAY Hi.", "SAY Hi."]), 2),
        (json!(ids), 1),
        (json!([ids, ids, ids]), 3),
    ];
    for (prompt, count) in cases {
        let answer = good(desk.address, PATH, json!({"model": "demo", "prompt": prompt})).await?;
        assert_eq!(answer["object"], "text_completion");
        let choices = answer["choices"].as_array().context("choices")?;
        assert_eq!(choices.len(), count, "{prompt}");
        for (index, choice) in choices.iter().enumerate() {
            assert_eq!(
                (&choice["index"], &choice["text"], &choice["finish_reason"]),
                (&json!(index), &json!("Hi."), &json!("stop"))
            );
        }
    }
    assert_eq!(desk.replicas.last().prompt, ids, "token ids are taken as they are");
    assert_eq!(desk.replicas.last().spec.max_tokens, 16);
    let several =
        good(desk.address, PATH, json!({"model": "demo", "prompt": ["SAY a", "SAY b"], "n": 2})).await?;
    let texts: Vec<&Value> =
        several["choices"].as_array().context("choices")?.iter().map(|choice| &choice["text"]).collect();
    assert_eq!(texts, ["a", "a", "b", "b"]);
    desk.stop().await
}

/// What lm-evaluation-harness sends, and what it reads.
#[tokio::test]
async fn echo_scores_the_prompt() -> Result<()> {
    let desk = Desk::start().await?;
    let ids = desk.replicas.tokenizer.encode("SAY Hi.", false)?;
    let body = json!({"model": "demo", "prompt": [ids], "max_tokens": 1, "logprobs": 1, "echo": true, "temperature": 0, "seed": 7});
    let answer = good(desk.address, PATH, body).await?;
    let logprobs = &answer["choices"][0]["logprobs"];
    let length = |field: &str| logprobs[field].as_array().map(Vec::len);
    for field in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(length(field), Some(ids.len() + 1), "{field}");
    }
    assert_eq!(
        (&logprobs["token_logprobs"][0], &logprobs["token_logprobs"][1]),
        (&Value::Null, &json!(-0.5))
    );
    let second = logprobs["tokens"][1].as_str().context("token")?;
    assert_eq!(logprobs["top_logprobs"][1][second], -0.5);
    assert_eq!(answer["choices"][0]["text"], "SAY Hi.Hi");
    let offsets: Vec<u64> =
        logprobs["text_offset"].as_array().context("offsets")?.iter().filter_map(Value::as_u64).collect();
    assert!(offsets.is_sorted() && offsets[0] == 0 && offsets.last() == Some(&7), "{offsets:?}");
    // A model that would end at once has an entry for that, which the harness cuts off like any other.
    let ids = desk.replicas.tokenizer.encode("SAY ", false)?;
    let ends = json!({"model": "demo", "prompt": [ids], "max_tokens": 1, "logprobs": 1, "echo": true, "temperature": 0});
    let answer = good(desk.address, PATH, ends).await?;
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("SAY "), &json!("stop")));
    assert_eq!(choice["logprobs"]["token_logprobs"].as_array().map(Vec::len), Some(ids.len() + 1));
    // Only the prompt.
    let silent = json!({"model": "demo", "prompt": "SAY Hi.", "max_tokens": 0, "logprobs": 0, "echo": true});
    let answer = good(desk.address, PATH, silent).await?;
    assert_eq!(
        (&answer["choices"][0]["text"], &answer["choices"][0]["finish_reason"]),
        (&json!("SAY Hi."), &json!("length"))
    );
    assert_eq!(answer["usage"]["completion_tokens"], 0);
    desk.stop().await
}

#[tokio::test]
async fn a_stream_adds_up_to_the_whole() -> Result<()> {
    let desk = Desk::start().await?;
    let body = json!({"model": "demo", "prompt": "SAY a b c", "echo": true, "logprobs": 2, "stream_options": {"include_usage": true}});
    let chunks = streamed(desk.address, PATH, body.clone()).await?;
    let mut whole = body;
    whole["stream_options"] = Value::Null;
    let whole = good(desk.address, PATH, whole).await?;
    let joined = |field: &str| -> Vec<Value> {
        let lists = chunks.iter().filter_map(|chunk| chunk["choices"][0]["logprobs"][field].as_array());
        lists.flatten().cloned().collect()
    };
    for field in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(Value::from(joined(field)), whole["choices"][0]["logprobs"][field], "{field}");
    }
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, "SAY a b ca b c");
    assert_eq!(chunks.last().context("chunks")?["usage"], whole["usage"]);
    desk.stop().await
}

/// The five requests that end mlx_lm.server 0.32.2, and the one that makes it crash.
#[tokio::test]
async fn what_kills_mlx_lm_is_served_or_refused() -> Result<()> {
    let desk = Desk::start().await?;
    let base = json!({"model": "demo", "prompt": "SAY Hi.", "temperature": 1.0});
    let cases = [
        (json!({"prompt": ""}), 200), // the tokenizer puts its beginning in front
        (json!({"prompt": []}), 400),
        (json!({"prompt": "SAY Hi."}), 200),
        (json!({"top_k": 514}), 400),
        (json!({"top_k": 513}), 200),
        (json!({"prompt": ["SAY Hi."]}), 200),
        (json!({"xtc_threshold": 0.6, "xtc_probability": 1.0}), 400),
        (json!({"logit_bias": {"4294967295": 1}}), 400),
        (json!({"logit_bias": {"-1": 1}}), 400),
        (json!({"prompt": [514]}), 400),
        (json!({"prompt": "x ".repeat(600)}), 400),
    ];
    for (more, status) in cases {
        let mut body = base.clone();
        body.as_object_mut().context("object")?.extend(more.as_object().cloned().context("object")?);
        let reply = crate::client::post(desk.address, PATH, &body).await?;
        assert_eq!(reply.status, status, "{more}: {}", reply.body);
    }
    desk.stop().await
}

#[tokio::test]
async fn what_is_not_served_is_refused_by_name() -> Result<()> {
    let desk = Desk::start().await?;
    for (more, param) in [
        (json!({"suffix": "x"}), "suffix"),
        (json!({"best_of": 3}), "best_of"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"prompt": [["x"]]}), "prompt[0][0]"),
        (json!({"prompt": [1, "x"]}), "prompt[0]"),
        (json!({"prompt": {}}), "prompt"),
        (json!({"prompt": vec!["x"; 129]}), "prompt"),
        (json!({"prompt": vec!["x"; 20], "n": 16}), "n"),
        (json!({"messages": []}), "messages"),
    ] {
        let mut body = json!({"model": "demo", "prompt": "x"});
        body.as_object_mut().context("object")?.extend(more.as_object().cloned().context("object")?);
        let (status, found, message) = refused(desk.address, PATH, body).await?;
        assert_eq!((status, found), (400, json!(param)), "{more}: {message}");
    }
    desk.stop().await
}

#[tokio::test]
async fn texts_become_vectors() -> Result<()> {
    let desk = Desk::start().await?;
    let path = "/v1/embeddings";
    let answer = good(desk.address, path, json!({"model": "demo", "input": ["a", "SAY Hi."]})).await?;
    assert_eq!((&answer["object"], &answer["data"][1]["index"]), (&json!("list"), &json!(1)));
    let vector = &answer["data"][0]["embedding"];
    assert_eq!((&vector[1], &vector[2]), (&json!(0.5), &json!(-1.25)));
    let total: f64 = (0..2).filter_map(|index| answer["data"][index]["embedding"][0].as_f64()).sum();
    assert_eq!(answer["usage"]["prompt_tokens"].as_f64(), Some(total));
    let packed =
        good(desk.address, path, json!({"model": "demo", "input": "a", "encoding_format": "base64"})).await?;
    let bytes =
        data_encoding::BASE64.decode(packed["data"][0]["embedding"].as_str().context("text")?.as_bytes())?;
    assert_eq!((bytes.len(), &bytes[4..8]), (16, &0.5f32.to_le_bytes()[..]));
    for (more, param) in [("dimensions", json!(4)), ("encoding_format", json!("int8")), ("input", json!([]))]
    {
        let mut body = json!({"model": "demo", "input": "a"});
        body[more] = param;
        let (status, found, _) = refused(desk.address, path, body).await?;
        assert_eq!((status, found), (400, json!(more)));
    }
    desk.stop().await
}
