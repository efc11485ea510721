//! Chat templates render as transformers renders them, and hostile ones end soon and clearly.
//!
//! The expected texts come from golden/regenerate.py.

#![allow(clippy::unwrap_used)] // helpers of tests are test code, too

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use mlxnode_text::{ChatRequest, ChatTemplate, InProcess, Message, TextError, TextFiles, Tokenizer};
use serde::Deserialize;
use serde_json::{Map, Value, json};

const SENTENCE_PIECE: &str = include_str!("golden/tokenizers/sentence_piece/tokenizer.json");

#[derive(Deserialize)]
struct Case {
    name: String,
    template: String,
    request: Request,
}

#[derive(Deserialize)]
struct Request {
    messages: Vec<Message>,
    tools: Option<Vec<Value>>,
    documents: Option<Vec<Value>>,
    #[serde(default)]
    add_generation_prompt: bool,
    continue_final: Option<String>,
    #[serde(default)]
    arguments: Map<String, Value>,
}

fn files(entries: &[(&str, String)]) -> TextFiles {
    let config = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}}).to_string();
    let mut map = BTreeMap::from([
        ("tokenizer.json".to_owned(), SENTENCE_PIECE.as_bytes().to_vec()),
        ("tokenizer_config.json".to_owned(), config.into_bytes()),
    ]);
    map.extend(entries.iter().map(|(name, text)| ((*name).to_owned(), text.clone().into_bytes())));
    TextFiles::from_map(map).unwrap()
}

fn load(entries: &[(&str, String)]) -> Result<ChatTemplate, TextError> {
    let files = files(entries);
    ChatTemplate::from_files(&files, &Tokenizer::from_files(&files)?, Arc::new(InProcess::default()))?
        .ok_or(TextError::NoChatTemplate)
}

fn template(source: &str) -> Result<ChatTemplate, TextError> {
    load(&[("chat_template.jinja", source.to_owned())])
}

fn user(text: &str) -> ChatRequest {
    ChatRequest { messages: vec![Message::new("user", text)], ..ChatRequest::default() }
}

#[test]
fn conversations_render_as_in_transformers() {
    let cases: Vec<Case> = serde_json::from_str(include_str!("golden/conversations.json")).unwrap();
    let expected: BTreeMap<String, BTreeMap<String, String>> =
        serde_json::from_str(include_str!("golden/rendered.json")).unwrap();
    assert_eq!(cases.len(), expected.len(), "run golden/regenerate.py");
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/templates/");
    for case in cases {
        let source = std::fs::read_to_string(format!("{folder}{}.jinja", case.template)).unwrap();
        let request = ChatRequest {
            messages: case.request.messages,
            tools: case.request.tools,
            documents: case.request.documents,
            add_generation_prompt: case.request.add_generation_prompt,
            continue_final: case.request.continue_final,
            thinking: None,
            arguments: case.request.arguments,
        };
        let rendered = template(&source).unwrap().render(&request);
        let expected = &expected[&case.name];
        match (rendered, expected.get("text"), expected.get("error")) {
            (Ok(text), Some(expected), _) => assert_eq!(&text, expected, "{}", case.name),
            (Err(TextError::Refused { reason }), _, Some(expected)) => {
                assert_eq!(&reason, expected, "{}", case.name)
            }
            (Err(TextError::Template { .. }), _, Some(_)) => {}
            (rendered, ..) => panic!("{}: {rendered:?} instead of {expected:?}", case.name),
        }
    }
}

#[test]
fn expressions_mean_what_they_mean_in_python() {
    let expected: BTreeMap<String, Option<String>> =
        serde_json::from_str(include_str!("golden/python_corners.json")).unwrap();
    assert!(expected.len() > 100, "run golden/regenerate.py");
    let mut message = Message::new("user", "Hi \"you\" & <me>");
    message.extra.insert("extra".to_owned(), json!([1, {"a": null}]));
    let request = ChatRequest { messages: vec![message], ..ChatRequest::default() };
    // Known to differ: formatting is left out on purpose (a width of a billion costs a gigabyte), and floats beyond 1e16
    // are printed by minijinja itself.
    let different = ["{{ \"%d items\" % 3 }}", "{{ 1e20 }}"];
    let mut wrong = Vec::new();
    for (source, expected) in expected.into_iter().filter(|(source, _)| !different.contains(&source.as_str()))
    {
        let rendered = template(&source).and_then(|template| template.render(&request));
        match (&rendered, &expected) {
            (Ok(text), Some(expected)) if text == expected => {}
            (Err(_), None) => {}
            _ => wrong.push(format!("{source}\n   got {rendered:?}\n  want {expected:?}")),
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[derive(Deserialize)]
struct Sanitized {
    kind: String,
    content: String,
    plain: Vec<u32>,
    sanitized: Vec<u32>,
}

#[test]
fn control_tokens_in_messages_can_be_words() {
    let cases: Vec<Sanitized> = serde_json::from_str(include_str!("golden/sanitized.json")).unwrap();
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/");
    let source = std::fs::read(format!("{folder}templates/chatml.jinja")).unwrap();
    let mut different = 0;
    for case in &cases {
        let of_kind = TextFiles::read(format!("{folder}tokenizers/{}", case.kind).as_ref()).unwrap();
        let mut files: BTreeMap<String, Vec<u8>> =
            of_kind.iter().map(|(name, bytes)| (name.to_owned(), bytes.to_vec())).collect();
        files.insert("chat_template.jinja".to_owned(), source.clone());
        let files = TextFiles::from_map(files).unwrap();
        let tokenizer = Tokenizer::from_files(&files).unwrap();
        let template =
            ChatTemplate::from_files(&files, &tokenizer, Arc::new(InProcess::default())).unwrap().unwrap();
        let request = ChatRequest {
            messages: vec![Message::new("system", "S"), Message::new("user", &case.content)],
            add_generation_prompt: true,
            ..ChatRequest::default()
        };
        let rendered = template.render(&request).unwrap();
        assert_eq!(
            tokenizer.encode(&rendered, false).unwrap(),
            case.plain,
            "{} {:?}",
            case.kind,
            case.content
        );
        let words = template.encode(&request, &tokenizer).unwrap();
        assert_eq!(words, case.sanitized, "{} {:?}", case.kind, case.content);
        different += usize::from(words != case.plain);
    }
    assert!(different >= 12, "only {different} of {} cases differ", cases.len());
}

#[test]
fn no_message_can_write_a_control_token() {
    let files = files(&[(
        "chat_template.jinja",
        "{{ messages[0].content.split('|')[0] }}{{ bos_token }}".to_owned(),
    )]);
    let tokenizer = Tokenizer::from_files(&files).unwrap();
    let template =
        ChatTemplate::from_files(&files, &tokenizer, Arc::new(InProcess::default())).unwrap().unwrap();
    let eos = tokenizer.token_to_id("</s>").unwrap();
    let bos = tokenizer.bos_token_id().unwrap();
    let attempts = [
        "</s>",
        "\u{10FF00}</s>",
        "</\u{10FF01}s>",
        "<</s>/s>",
        "</s>|</s>",
        "\u{10FF01}</s>\u{10FF00}",
        "<s></s>",
    ];
    for attempt in attempts {
        let ids = template.encode(&user(attempt), &tokenizer).unwrap();
        assert!(!ids.contains(&eos), "{attempt:?} became {ids:?}");
        assert_eq!(ids.iter().filter(|id| **id == bos).count(), 1, "{attempt:?} became {ids:?}");
    }
    let begun = ChatRequest { continue_final: Some("a</s>b".to_owned()), ..user("x") };
    let ids = self::template("{{ messages[-1].content }}").unwrap().encode(&begun, &tokenizer).unwrap();
    assert!(!ids.contains(&eos) && ids.len() > 4, "{ids:?}");
}

#[test]
fn the_file_wins_over_the_configuration() {
    let config = json!({"chat_template": "from the configuration", "bos_token": "<s>"}).to_string();
    let other = json!({"chat_template": "from the other file"}).to_string();
    let places = [
        ("chat_template.jinja", "from the template file".to_owned()),
        ("tokenizer_config.json", config),
        ("chat_template.json", other),
    ];
    let expected = ["from the template file", "from the configuration", "from the other file"];
    for (skip, expected) in expected.iter().enumerate() {
        assert_eq!(load(&places[skip..]).unwrap().render(&user("x")).unwrap(), *expected);
    }
    let error = load(&[]).unwrap_err();
    assert!(error.to_string().contains("use --ignore-chat-template"), "{error}");
}

#[test]
fn a_named_template_serves_tools() {
    let named = |names: &[&str]| {
        let list: Vec<Value> =
            names.iter().map(|name| json!({"name": name, "template": format!("I am {name}")})).collect();
        load(&[("tokenizer_config.json", json!({"chat_template": list}).to_string())]).unwrap()
    };
    let with_tools = ChatRequest { tools: Some(vec![json!({})]), ..user("x") };
    let both = named(&["default", "tool_use", "rag"]);
    assert_eq!(both.render(&user("x")).unwrap(), "I am default");
    assert_eq!(both.render(&with_tools).unwrap(), "I am tool_use");
    let error = named(&["rag", "tool_use"]).render(&user("x")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the model has several chat templates (rag, tool_use) but none named \"default\""
    );
}

#[test]
fn errors_name_the_file_and_the_line() {
    let message = |source: &str| {
        template(source).and_then(|template| template.render(&user("x"))).unwrap_err().to_string()
    };
    let syntax = message("a\nb\n{% if %}");
    assert!(syntax.starts_with("chat_template.jinja, line 3: "), "{syntax}");
    let running = message("{{ bos_token }}\n{{ messages[0].content + 1 }}");
    assert!(running.starts_with("chat_template.jinja, line 2: "), "{running}");
    let unknown = message("{{ 'x' | nonsense }}");
    assert!(
        unknown.starts_with("chat_template.jinja, line 1: ") && unknown.contains("nonsense"),
        "{unknown}"
    );
    let refused = message("{% macro no() %}{{ raise_exception('only cats') }}{% endmacro %}\n{{ no() }}");
    assert_eq!(refused, "the model's chat template refuses the conversation: only cats");
    let config = json!({"chat_template": "x\n{{ 1 + 'a' }}"}).to_string();
    let error =
        load(&[("tokenizer_config.json", config)]).unwrap().render(&user("x")).unwrap_err().to_string();
    assert!(error.starts_with("tokenizer_config.json, line 2: "), "{error}");
}

#[test]
fn arguments_cannot_take_the_place_of_the_request() {
    let echo = template("{{ enable_thinking }} {{ extra }}").unwrap();
    let with = |name: &str, value: Value| ChatRequest {
        arguments: Map::from_iter([(name.to_owned(), value)]),
        ..user("x")
    };
    assert_eq!(echo.render(&with("extra", json!({"a": [1]}))).unwrap(), "False {'a': [1]}");
    assert_eq!(echo.render(&with("enable_thinking", json!("yes"))).unwrap(), "yes ");
    for name in ["messages", "tools", "documents", "add_generation_prompt", "raise_exception"] {
        let error = echo.render(&with(name, json!([]))).unwrap_err();
        assert!(matches!(&error, TextError::ReservedArgument { name: named } if named == name), "{error}");
    }
}

#[test]
fn thinking_is_on_when_the_vocabulary_has_it() {
    let mut tokenizer: Value = serde_json::from_str(SENTENCE_PIECE).unwrap();
    let tokens = tokenizer["added_tokens"].as_array_mut().unwrap();
    for (id, content) in [(1000, "<think>"), (1001, "</think>")] {
        tokens.push(
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": false}),
        );
    }
    let files = [
        ("tokenizer.json", tokenizer.to_string()),
        ("chat_template.jinja", "{{ enable_thinking }}".to_owned()),
    ];
    assert_eq!(load(&files).unwrap().render(&user("x")).unwrap(), "True");
}

#[test]
fn an_answer_that_the_template_loses_cannot_be_continued() {
    let open = ChatRequest { continue_final: Some("Yes".to_owned()), ..user("x") };
    let result = |source| template(source).unwrap().render(&open);
    assert_eq!(result("{{ messages[-1].content }} and more").unwrap(), "Yes");
    assert!(matches!(result("{{ messages[0].content }}"), Err(TextError::Continuation { .. })));
    assert!(matches!(
        result("{{ messages[-1].content | lower | upper }}"),
        Err(TextError::Continuation { .. })
    ));
}

/// Each must end with an error or harmless text, soon, without taking the process with it.
#[test]
fn hostile_templates_end_soon() {
    let nested_parentheses = format!("{{{{ {}1{} }}}}", "(".repeat(20_000), ")".repeat(20_000));
    let nested_blocks = "{% if true %}".repeat(10_000);
    let hostile = [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{{ range(1000000000) | list | length }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ 'a'.ljust(1000000000) }}",
        "{{ 'a' * 10000000000 }}",
        "{% for i in range(100000) %}{{ 'x' * 10000 }}{% endfor %}",
        "{% set ns = namespace(x=[]) %}{% for i in range(90000) %}{% set ns.x = [ns.x] %}{% endfor %}done",
        "{% set ns = namespace(x=[]) %}{% for i in range(90000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[]) %}{% for i in range(90000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}",
        "{% set ns = namespace(x={}) %}{% for i in range(90000) %}{% set ns.x = {'a': ns.x} %}{% endfor %}{{ ns.x == ns.x }}",
        "{% include '/etc/passwd' %}",
        "{% import 'x' as y %}",
        "{% extends 'default' %}",
        "{% include 'default' %}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__ }}",
        "{{ self }}",
        "{{ debug() }}",
        "{{ namespace(_x=1)._x }}",
        "{{ 1 // 0 }}",
        "{{ 1 % 0 }}",
        "{{ 9223372036854775807 + 1 }}",
        "{{ 2 ** 100000 }}",
        "{{ [1][99] }}",
        "{{ 'é'[:1] + 'é'[5:] + 'é'[-9] }}",
        "{{ [1, 2] | batch(0) | list }}",
        "{{ [1, 2] | slice(0) | list }}",
        "{{ range(0, 10, 0) | list }}",
        "{{ 1.5 | round(1000000) }}",
        "{{ 'a'.split('') }}",
        "{{ 'a'.rsplit('') }}",
        "{{ strftime_now('%') }}",
        "{{ strftime_now('%Q%9999999d') }}",
        "{{ [] | tojson(indent=1000000000) }}",
        "{{ messages | tojson(indent='x' * 1000000) }}",
        "{{ raise_exception() }}",
        "{{ raise_exception(1, 2) }}",
        "{% generation %}",
        "{% endgeneration %}",
        "{{",
        "{%",
        "{#",
        "\u{0}",
        nested_parentheses.as_str(),
        nested_blocks.as_str(),
    ];
    for source in hostile {
        let started = Instant::now();
        let result = template(source).and_then(|template| template.render(&user("x")));
        let shown: String = source.chars().take(80).collect();
        assert!(started.elapsed() < Duration::from_secs(5), "{shown} took {:?}", started.elapsed());
        match result {
            Ok(text) => assert!(text.len() < 2 << 20, "{shown} wrote {} bytes", text.len()),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
    let endless =
        template("{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}").unwrap();
    assert!(matches!(endless.render(&user("x")), Err(TextError::TemplateTooSlow { .. })));
    let flood = template("{% for i in range(100000) %}{{ 'x' * 10000 }}{% endfor %}").unwrap();
    assert!(matches!(flood.render(&user("x")), Err(TextError::TemplateOutput { .. })));
    let large = "x".repeat((256 << 10) + 1);
    let config = json!({"chat_template": large}).to_string();
    assert!(matches!(load(&[("tokenizer_config.json", config)]), Err(TextError::FileTooLarge { .. })));
}

/// What transformers does with `continue_final_message`: nothing comes behind the text, and a template that trims eats its spaces.
#[test]
fn a_last_message_of_any_role_can_be_left_open() {
    let keeps = "{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>{% endfor %}";
    let trims = keeps.replace("message.content", "message.content | trim");
    let mut request = user("x x");
    request.messages.push(Message::new("assistant", "y"));
    request.messages.push(Message::new("user", "x "));
    request.add_generation_prompt = true;
    let before = "<user>x x</s><assistant>y</s><user>x";
    assert_eq!(template(keeps).unwrap().render_open(&request).unwrap(), format!("{before} "));
    assert_eq!(template(&trims).unwrap().render_open(&request).unwrap(), before);
    let fixed = template("nothing of it").unwrap();
    assert!(matches!(fixed.render_open(&request), Err(TextError::Continuation { .. })));
    let empty = ChatRequest::default();
    assert!(matches!(fixed.render_open(&empty), Err(TextError::Continuation { .. })));
}

#[test]
fn a_tokenizer_names_the_token_that_ends_a_text() {
    let named = Tokenizer::from_files(&files(&[])).unwrap();
    assert_eq!(named.eos_token_id(), named.token_to_id("</s>"));
    assert!(named.eos_token_id().is_some());
    let unnamed = files(&[("tokenizer_config.json", "{}".to_owned())]);
    assert_eq!(Tokenizer::from_files(&unnamed).unwrap().eos_token_id(), None);
}
