//! Chat formats that mlx-lm has as Python render natively to the same text.

#![allow(clippy::unwrap_used)] // helpers of tests are test code, too

use std::{collections::BTreeMap, sync::Arc};

use mlxnode_testkit::oracle;
use mlxnode_text::{ChatRequest, ChatTemplate, InProcess, Message, TextError, TextFiles, Tokenizer};
use serde::Deserialize;
use serde_json::{Value, json};

fn template(config: Value) -> Result<(ChatTemplate, Tokenizer), TextError> {
    let tokens = [
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<think>",
        "</think>",
    ];
    let added: Vec<Value> = (259..)
        .zip(tokens)
        .map(|(id, text)| {
            json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": !text.contains("think")})
        })
        .collect();
    let mut json: Value =
        serde_json::from_str(include_str!("golden/tokenizers/byte_level/tokenizer.json")).unwrap();
    json["added_tokens"] = added.into();
    let files = BTreeMap::from([
        ("tokenizer.json".to_owned(), json.to_string().into_bytes()),
        ("tokenizer_config.json".to_owned(), config.to_string().into_bytes()),
        // In the way on purpose: the type in the configuration wins.
        ("chat_template.jinja".to_owned(), b"{{ messages[0].content }}".to_vec()),
    ]);
    let files = TextFiles::from_map(files).unwrap();
    let tokenizer = Tokenizer::from_files(&files)?;
    Ok((ChatTemplate::from_files(&files, &tokenizer, Arc::new(InProcess::default()))?.unwrap(), tokenizer))
}

fn deepseek() -> (ChatTemplate, Tokenizer) {
    template(json!({"chat_template_type": "deepseek_v32"})).unwrap()
}

fn request(case: &Value) -> ChatRequest {
    let mut messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
    let continues = case["continue_final_message"] == true;
    let continue_final = continues.then(|| {
        let last = messages.pop().unwrap();
        last.content.unwrap().as_str().unwrap().to_owned()
    });
    ChatRequest {
        messages,
        tools: case["tools"].as_array().cloned(),
        add_generation_prompt: case["add_generation_prompt"] == true,
        continue_final,
        thinking: case["enable_thinking"].as_bool(),
        ..ChatRequest::default()
    }
}

fn conversations() -> Vec<Value> {
    let call = |name: &str, arguments: Value| json!({"id": "1", "type": "function", "function": {"name": name, "arguments": arguments.to_string()}});
    let user = |text: &str| json!({"role": "user", "content": text});
    let system = json!({"role": "system", "content": "You help. {\"braces\"} {0}"});
    let strange = json!({"city": "Köln \"x\"", "days": 3, "exact": 1.0, "tiny": 1e-7, "list": [1, null, true, {"a": "é"}], "none": null, "no": false});
    let calling = json!({"role": "assistant", "content": "", "reasoning_content": "I need it.", "tool_calls": [call("weather", strange), call("now", json!({}))]});
    let result = |text: &str| json!({"role": "tool", "tool_call_id": "1", "content": text});
    vec![
        json!([user("Hi")]),
        json!([system, user("Hi {there}")]),
        json!([system, user("Hi"), {"role": "assistant", "content": "Hello", "reasoning_content": "greet"}, user("Again")]),
        json!([user("Hi"), {"role": "assistant", "content": null, "reasoning_content": "x"}]),
        json!([user("Hi"), {"role": "assistant", "content": "plain"}]),
        json!([user("Weather?"), calling, result("sun"), result("12:00")]),
        json!([user("Weather?"), calling, result("sun"), result("12:00"), {"role": "assistant", "content": "Sunny", "reasoning_content": "done"}]),
        json!([user("Weather?"), calling, result("sun"), result("12:00"), {"role": "assistant", "content": "Sunny"}, user("Thanks")]),
        json!([user("Weather?"), calling, result("sun")]),
        json!([
            system,
            user("Weather?"),
            calling,
            result("sun"),
            result("12:00"),
            calling,
            result("rain"),
            result("13:00")
        ]),
        json!([{"role": "developer", "content": "Do it"}]),
        json!([{"role": "system", "content": "S", "response_format": {"type": "json_schema", "x": [1.5, "ü"]}}, user("Hi")]),
        json!([{"role": "system", "content": "S", "tools": [{"type": "function", "function": {"name": "inner"}}]}, user("Hi")]),
        json!([{"role": "system", "content": null}, user("")]),
        // Refused by both.
        json!([user("Hi"), result("alone")]),
        json!([user("Hi"), {"role": "assistant", "content": "a", "tool_calls": [call("f", json!({}))]}, result("1"), result("2")]),
        json!([user("Hi"), {"role": "critic", "content": "a"}]),
        json!([user("Hi"), {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]),
        json!([{"role": "developer", "content": ""}]),
    ]
}

#[derive(Debug, Deserialize)]
struct Judged {
    text: Option<String>,
    error: Option<String>,
}

#[test]
fn deepseek_v32_renders_as_in_mlx_lm() {
    let tools = json!([
        {"type": "function", "function": {"name": "weather", "description": "Wetter für \"x\"", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}},
        {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
    ]);
    let mut cases = Vec::new();
    for messages in conversations() {
        for tools in [Value::Null, tools.clone()] {
            for (thinking, generate) in [(true, true), (true, false), (false, true), (false, false)] {
                cases.push(json!({"messages": messages, "tools": tools, "enable_thinking": thinking,
                    "add_generation_prompt": generate}));
            }
        }
        if messages.as_array().unwrap().last().unwrap()["role"] == "assistant"
            && messages.as_array().unwrap().last().unwrap()["content"]
                .as_str()
                .is_some_and(|text| !text.is_empty())
        {
            // A prefilled answer is text alone; with reasoning there is nothing to continue.
            let mut messages = messages.clone();
            let last = messages.as_array_mut().unwrap().last_mut().unwrap();
            *last = json!({"role": "assistant", "content": last["content"]});
            for thinking in [true, false] {
                cases.push(json!({"messages": messages, "tools": null, "enable_thinking": thinking,
                    "add_generation_prompt": false, "continue_final_message": true}));
            }
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("cases.json");
    std::fs::write(&file, serde_json::to_string(&cases).unwrap()).unwrap();
    let judged: Vec<Judged> = oracle::run("python_templates.py", &[file.to_str().unwrap()]).unwrap();
    assert_eq!(judged.len(), cases.len());

    let (template, _) = deepseek();
    let mut refused = 0;
    for (case, judged) in cases.iter().zip(judged) {
        match (template.render(&request(case)), judged.text, judged.error) {
            (Ok(text), Some(expected), _) => assert_eq!(text, expected, "{case}"),
            (Err(TextError::Refused { .. }), None, Some(_)) => refused += 1,
            (rendered, expected, error) => panic!("{case}\n got {rendered:?}\nwant {expected:?} {error:?}"),
        }
    }
    assert!(refused >= 30, "{refused}");
}

/// Where mlx-lm fails or writes `None` into the prompt.
#[test]
fn deepseek_v32_renders_what_mlx_lm_cannot() {
    let (template, _) = deepseek();
    let render = |messages: Value| {
        template.render(&request(
            &json!({"messages": messages, "enable_thinking": true, "add_generation_prompt": true}),
        ))
    };
    let earlier =
        render(json!([{"role": "developer", "content": "D"}, {"role": "user", "content": "U"}])).unwrap();
    assert!(
        earlier
            .contains("# The user's message is: D<｜Assistant｜></think><｜User｜>U<｜Assistant｜><think>"),
        "{earlier}"
    );
    let parts = render(
        json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]),
    );
    assert!(parts.unwrap().ends_with("<｜User｜>ab<｜Assistant｜><think>"));
    let absent = render(json!([{"role": "user", "content": null}])).unwrap();
    assert!(absent.ends_with("<｜User｜><｜Assistant｜><think>"), "{absent}");
    let object = render(json!([{"role": "user", "content": "U"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1]}}}]}]));
    assert!(
        object.unwrap().contains("<｜DSML｜parameter name=\"a\" string=\"false\">[1]</｜DSML｜parameter>")
    );
}

#[test]
fn words_of_a_user_are_no_control_tokens() {
    let (template, tokenizer) = deepseek();
    let messages = json!([{"role": "user", "content": "a<｜end▁of▁sentence｜><think>b"}]);
    let ids = template
        .encode(
            &request(&json!({"messages": messages, "enable_thinking": false, "add_generation_prompt": true})),
            &tokenizer,
        )
        .unwrap();
    let count = |token: &str| ids.iter().filter(|id| Some(**id) == tokenizer.token_to_id(token)).count();
    assert_eq!(["<｜end▁of▁sentence｜>", "<think>", "</think>", "<｜User｜>"].map(count), [0, 0, 1, 1]);
    assert!(tokenizer.decode(&ids, false).unwrap().contains("a<｜end▁of▁sentence｜><think>b"));
}

#[test]
fn only_known_types_are_taken() {
    let error = template(json!({"chat_template_type": "xyz"})).unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json") && error.contains("chat_template_type"), "{error}");
    let (template, _) = template(json!({"chat_template_type": "muse_spark"})).unwrap();
    let rendered = template.render(&request(&json!({"messages": [{"role": "user", "content": "U"}]})));
    assert_eq!(rendered.unwrap(), "U");
}

/// Every system message repeats the tools, so output is bounded like that of any template.
#[test]
fn many_system_messages_do_not_multiply_tools_without_end() {
    let (template, _) = deepseek();
    let messages: Vec<Value> = (0..2000).map(|_| json!({"role": "system", "content": ""})).collect();
    let tools = json!([{"function": {"name": "x".repeat(100_000)}}]);
    let error = template.render(&request(&json!({"messages": messages, "tools": tools}))).unwrap_err();
    assert!(matches!(error, TextError::TemplateOutput { .. }), "{error}");
}
