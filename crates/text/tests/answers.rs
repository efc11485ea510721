//! Answers are split into content, reasoning and tool calls: as mlx-lm splits them, the same for every way to cut the text
//! into pieces, and without losing any of it.

#![allow(clippy::unwrap_used)] // helpers of tests are test code, too

use std::{
    collections::BTreeMap,
    io::Write,
    sync::{Arc, LazyLock},
};

use mlxnode_testkit::oracle;
use mlxnode_text::{
    AnswerFormat, ChatRequest, ChatTemplate, Delta, InProcess, Message, StopStrings, TextError, TextFiles,
    Tokenizer, ToolCall, ToolFormat,
};
use proptest::{prelude::*, strategy::ValueTree, test_runner::RngSeed};
use serde::Deserialize;
use serde_json::{Value, json};

/// A model of words: these are the whole vocabulary, those with brackets are special.
const WORDS: [&str; 5] = ["[UNK]", "assistant", "thought", "user", "Sure"];

struct Model {
    files: TextFiles,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
}

impl Model {
    fn new(tokens: &[&str], template: &str, config: &Value) -> Self {
        let added = tokens.iter().enumerate().map(|(at, token)| {
            json!({"id": WORDS.len() + at, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        });
        let vocabulary: BTreeMap<&str, usize> =
            WORDS.iter().enumerate().map(|(at, word)| (*word, at)).collect();
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added.collect::<Vec<_>>(),
            "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
        });
        let mut files = BTreeMap::from([
            ("tokenizer.json".to_owned(), tokenizer.to_string().into_bytes()),
            ("tokenizer_config.json".to_owned(), config.to_string().into_bytes()),
        ]);
        if !template.is_empty() {
            files.insert("chat_template.jinja".to_owned(), template.as_bytes().to_vec());
        }
        let files = TextFiles::from_map(files).unwrap();
        let tokenizer = Tokenizer::from_files(&files).unwrap();
        let template = ChatTemplate::from_files(&files, &tokenizer, Arc::new(InProcess::default())).unwrap();
        Self { files, tokenizer, template }
    }

    fn format(&self) -> Result<AnswerFormat, TextError> {
        AnswerFormat::from_files(&self.files, &self.tokenizer, self.template.as_ref())
    }

    /// The answer's deltas, neighbours joined.
    fn read(&self, tools: &[Value], prompt: &str, pieces: &[&str]) -> Vec<Delta> {
        let prompt = self.tokenizer.encode(prompt, false).unwrap();
        let mut parser = self.format().unwrap().parser(tools, &prompt).unwrap();
        let mut deltas: Vec<Delta> = pieces.iter().flat_map(|piece| parser.push(piece)).collect();
        deltas.extend(parser.finish());
        joined(deltas)
    }
}

fn joined(deltas: Vec<Delta>) -> Vec<Delta> {
    let mut all: Vec<Delta> = Vec::new();
    for delta in deltas {
        match (all.last_mut(), delta) {
            (Some(Delta::Content(last)), Delta::Content(more)) => last.push_str(&more),
            (Some(Delta::Reasoning(last)), Delta::Reasoning(more)) => last.push_str(&more),
            (_, delta) => all.push(delta),
        }
    }
    all
}

/// Deltas in short: `c:` content, `r:` reasoning, `+` a call begins, `f{…}` a call, `!` a warning.
fn short(deltas: &[Delta]) -> String {
    let one = |delta: &Delta| match delta {
        Delta::Content(text) => format!("c:{text}"),
        Delta::Reasoning(text) => format!("r:{text}"),
        Delta::ToolCallStarted => "+".to_owned(),
        Delta::ToolCall(ToolCall { name, arguments, .. }) => {
            format!("{name}{}", Value::Object(arguments.clone()))
        }
        Delta::Warning(_) => "!".to_owned(),
    };
    deltas.iter().map(one).collect::<Vec<_>>().join(" | ")
}

const THINK: [&str; 2] = ["<think>", "</think>"];
const HARMONY: [&str; 7] =
    ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>"];
const XTML: [&str; 4] = ["<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"];

fn qwen() -> Model {
    Model::new(&THINK, "<tool_call>{{ tool_call.name }}", &json!({}))
}

fn harmony() -> Model {
    Model::new(&HARMONY, "<|channel|>", &json!({}))
}

fn tools() -> Vec<Value> {
    vec![json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}})]
}

/// Model, prompt, answer, what it means.
type Story = (Model, &'static str, &'static str, &'static str);

static STORIES: LazyLock<Vec<Story>> = LazyLock::new(stories);

fn stories() -> Vec<Story> {
    let llama = || Model::new(&["<|python_tag|>"], "<|python_tag|>", &json!({}));
    let kimi = || Model::new(&XTML, "", &json!({}));
    let muse = || {
        Model::new(&[], "", &json!({"chat_template_type": "muse_spark", "tool_parser_type": "muse_spark"}))
    };
    let mistral = || Model::new(&[], "[TOOL_CALLS]", &json!({}));
    let gemma = || Model::new(&["<|channel>", "<channel|>"], "<|tool_call><tool_call|>", &json!({}));
    let deepseek = || Model::new(&THINK, "<｜tool▁calls▁begin｜>", &json!({}));
    let dsml = || Model::new(&THINK, "", &json!({"chat_template_type": "deepseek_v32"}));
    vec![
        (qwen(), "", "<think>\nhm\n</think>\n\nHi", "r:\nhm\n | c:\n\nHi"),
        (qwen(), "user <think>", "hm</think>Hi", "r:hm | c:Hi"),
        (qwen(), "user <think> </think>", "Hi", "c:Hi"),
        (qwen(), "", "Hi</think>", "c:Hi</think>"),
        (
            qwen(),
            "",
            "a<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>b",
            "c:a | + | f{\"a\":1} | c:b",
        ),
        (qwen(), "<think>", "hm<tool_call>{\"name\": \"f\"}</tool_call>b", "r:hm | + | f{} | c:b"),
        (
            qwen(),
            "",
            "<tool_call>{\"name\": \"f\"}</tool_call>\n<tool_call>{\"name\": \"g\"}</tool_call>",
            "+ | f{} | c:\n | + | g{}",
        ),
        (qwen(), "", "<tool_call>nonsense</tool_call> b", "+ | ! | c:<tool_call>nonsense</tool_call> b"),
        (qwen(), "", "a<tool_call>{\"name\": \"f\", ", "c:a | + | ! | c:<tool_call>{\"name\": \"f\", "),
        (qwen(), "", "<tool_call>{\"name\": \"f\"}", "+ | f{}"),
        (qwen(), "", "<tool_call>{\"name\": \"f\"}</tool_c", "+ | f{}"),
        (qwen(), "", "a <thin", "c:a <thin"),
        (qwen(), "", "a <thin air", "c:a <thin air"),
        (qwen(), "", "", ""),
        (mistral(), "", "ok[TOOL_CALLS]f[ARGS]{\"a\": 1}", "c:ok | + | f{\"a\":1}"),
        (
            mistral(),
            "",
            "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {}}, {\"name\": \"g\"}]",
            "+ | f{} | g{}",
        ),
        (
            gemma(),
            "",
            "<|channel>thought\nhm<channel|>Hi<|tool_call>call:f{a:<|\"|>x<|\"|>}<tool_call|>",
            "r:\nhm | c:Hi | + | f{\"a\":\"x\"}",
        ),
        (gemma(), "user <|channel> thought", "hm<channel|>Hi", "r:hm | c:Hi"),
        (
            kimi(),
            "",
            "<|open|>think<|sep|>hm<|close|>think<|sep|><|open|>response<|sep|>Hi<|close|>response<|sep|><|close|>message<|sep|>",
            "r:hm | c:Hi",
        ),
        (
            kimi(),
            "",
            "<|open|>tools<|sep|><|open|>call tool=\"f\" index=\"1\"<|sep|><|close|>call<|sep|><|close|>tools<|sep|>",
            "+ | f{}",
        ),
        (
            deepseek(),
            "<think>",
            "hm</think>Hi<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "r:hm | c:Hi | + | f{}",
        ),
        (
            dsml(),
            "<think>",
            "</think>\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"f\">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>",
            "c:\n\n | + | f{}",
        ),
        (llama(), "", "{\"name\": \"f\", \"parameters\": {\"a\": 1}}", "+ | f{\"a\":1}"),
        (
            llama(),
            "",
            " {\"name\": \"f\", \"parameters\": {}}; {\"name\": \"f\", \"parameters\": {\"a\": 2}}",
            "+ | f{} | f{\"a\":2}",
        ),
        (llama(), "", "{\"name\": \"Bob\", \"age\": 3}", "c:{\"name\": \"Bob\", \"age\": 3}"),
        (llama(), "", "{\"name\": \"f\", \"param", "c:{\"name\": \"f\", \"param"),
        (llama(), "", "{\"na", "c:{\"na"),
        (llama(), "", "{\"answer\": 1}", "c:{\"answer\": 1}"),
        (llama(), "", "Hello", "c:Hello"),
        (llama(), "", "Hi <|python_tag|>{\"name\": \"f\", \"parameters\": {}}", "c:Hi  | + | f{}"),
        (llama(), "", "<|python_tag|>print(1)", "+ | ! | c:<|python_tag|>print(1)"),
        (
            harmony(),
            "<|start|> user <|message|> x <|end|> <|start|> assistant",
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hi<|return|>",
            "r:hm | c:Hi",
        ),
        (
            harmony(),
            "<|start|> assistant",
            "<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"a\": 1}<|call|>",
            "c:Let me look. | + | f{\"a\":1}",
        ),
        (
            harmony(),
            "<|start|> assistant",
            " to=functions.f<|channel|>commentary json<|message|>{}",
            "+ | f{}",
        ),
        (
            harmony(),
            "<|start|> assistant",
            "<|channel|>commentary to=functions.f<|message|>{\"a\":",
            "+ | ! | c:assistant<|channel|>commentary to=functions.f<|message|>{\"a\":",
        ),
        (harmony(), "<|start|> assistant <|channel|> final <|message|> Sure", ", yes.<|return|>", "c:, yes."),
        (harmony(), "", "Hello there", "c:Hello there"),
        (harmony(), "", "<|channel|>final<|message|>a<|channel|>analysis<|message|>b", "c:a | r:b"),
        (harmony(), "<|start|> assistant", "<|channel|>fin", ""),
        (harmony(), "<|start|> assistant", "<|channel|>final<|message|>Hi<|end|>rest", "c:Hirest"),
        (muse(), "", " to=self<|message|>hm<|eom|> to=user<|message|>Hi<|eot|>", "r:hm | c:Hi"),
        (
            muse(),
            "",
            "<atem:function_calls><atem:invoke name=\"f\"></atem:invoke></atem:function_calls>",
            "+ | f{}",
        ),
    ]
}

#[test]
fn answers_mean_what_their_models_mean() {
    for (model, prompt, answer, wanted) in STORIES.iter() {
        assert_eq!(short(&model.read(&tools(), prompt, &[answer])), *wanted, "{answer:?} behind {prompt:?}");
    }
}

#[test]
fn pieces_of_one_character_mean_the_same() {
    for (model, prompt, answer, wanted) in STORIES.iter() {
        let pieces: Vec<&str> = answer.split("").collect();
        assert_eq!(short(&model.read(&tools(), prompt, &pieces)), *wanted, "{answer:?} behind {prompt:?}");
    }
}

#[test]
fn json_is_json_without_tools_in_the_request() {
    let model = Model::new(&["<|python_tag|>"], "<|python_tag|>", &json!({}));
    let answer = r#"{"name": "f", "parameters": {}}"#;
    assert_eq!(model.read(&[], "", &[answer]), [Delta::Content(answer.to_owned())]);
}

#[test]
fn text_comes_as_soon_as_it_is_certain() {
    let format = qwen().format().unwrap();
    let mut parser = format.parser(&[], &[]).unwrap();
    assert_eq!(short(&parser.push("Hello <")), "c:Hello ");
    assert_eq!(short(&parser.push("b> <think>why")), "c:<b>  | r:why");
    assert_eq!(short(&parser.push("</thi")), "");
    assert_eq!(short(&parser.push("nk><tool_call>{")), "+");
    assert_eq!(short(&parser.push("\"name\": \"f\"}</tool_call>!")), "f{} | c:!");
    assert!(parser.finish().is_empty());
}

#[test]
fn stop_strings_end_reasoning_and_calls_too() {
    let cases = [
        ("<think>one. two", "r:one"),
        ("<tool_call>{\"name\": \"f\"}.</tool_call>", "+ | f{}"),
        ("a</th", "c:a</th"),
    ];
    for (answer, wanted) in cases {
        let mut stops = StopStrings::new(vec![".".to_owned()]).unwrap();
        let mut parser = qwen().format().unwrap().parser(&[], &[]).unwrap();
        let step = stops.push(answer);
        let mut deltas = parser.push(&step.text);
        if !step.stopped {
            deltas.extend(parser.push(&stops.finish()));
        }
        deltas.extend(parser.finish());
        assert_eq!(short(&joined(deltas)), wanted);
    }
}

#[test]
fn the_files_tell_the_format() {
    let format = |tokens: &[&str], template: &str, config: Value| {
        Model::new(tokens, template, &config).format().map(|format| format.tools())
    };
    let declared = json!({"tool_parser_type": "glm47"});
    assert_eq!(format(&[], "[TOOL_CALLS]", declared).unwrap(), Some(ToolFormat::Glm47));
    assert_eq!(
        format(&[], "[TOOL_CALLS]", json!({"tool_parser_type": null})).unwrap(),
        Some(ToolFormat::Mistral)
    );
    assert_eq!(
        format(&["<|tool_call_start|>", "<|tool_call_end|>"], "", json!({})).unwrap(),
        Some(ToolFormat::Pythonic)
    );
    assert_eq!(format(&[], "no tools", json!({})).unwrap(), None);
    let error = format(&[], "", json!({"tool_parser_type": "cobol"})).unwrap_err().to_string();
    assert!(error.starts_with("tokenizer_config.json is not valid: tool_parser_type is \"cobol\", but must be one of json_tools,"), "{error}");
}

#[test]
fn the_thinking_switch_reaches_the_template() {
    let source = "{{ enable_thinking }} {{ thinking is defined and thinking }}";
    let thinking = |tokens: &[&str], thinking: Option<bool>, arguments: Value| {
        let request = ChatRequest {
            messages: vec![Message::new("user", "x")],
            thinking,
            arguments: arguments.as_object().unwrap().clone(),
            ..ChatRequest::default()
        };
        Model::new(tokens, source, &json!({})).template.unwrap().render(&request).unwrap()
    };
    assert_eq!(thinking(&THINK, None, json!({})), "True False");
    assert_eq!(thinking(&[], None, json!({})), "False False");
    assert_eq!(thinking(&["<|channel>", "<channel|>"], None, json!({})), "True False");
    assert_eq!(thinking(&HARMONY, None, json!({})), "False False");
    assert_eq!(thinking(&THINK, Some(false), json!({})), "False False");
    assert_eq!(thinking(&[], Some(true), json!({})), "True True");
    assert_eq!(thinking(&THINK, Some(true), json!({"enable_thinking": false})), "False True");
}

#[test]
fn reasoning_is_marked_as_in_mlx_lm() {
    #[derive(Deserialize)]
    struct Inferred {
        thinking: Option<(String, String)>,
    }
    let tokens = [
        "<think>",
        "</think>",
        "<longcat_think>",
        "</longcat_think>",
        "<|think:start|>",
        "<|think:end|>",
        "<|channel>",
        "<channel|>",
        "<|open|>",
        "<|close|>",
        "<|sep|>",
        "<|end_of_msg|>",
    ];
    // Every beginning and every end of the list, and its pairs.
    let mut vocabularies: Vec<&[&str]> =
        (0..=tokens.len()).flat_map(|at| [&tokens[..at], &tokens[at..]]).collect();
    vocabularies.extend(tokens.chunks(2));
    let questions = vocabularies.iter().map(|tokens| json!({"template": "", "vocabulary": tokens}));
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(questions.collect::<Value>().to_string().as_bytes()).unwrap();
    let theirs: Vec<Inferred> = oracle::run("tool_parsers.py", &[file.path().to_str().unwrap()]).unwrap();
    for (tokens, theirs) in vocabularies.into_iter().zip(theirs) {
        let format = Model::new(tokens, "", &json!({})).format().unwrap();
        let ours = format.reasoning().map(|marks| (marks.start.to_owned(), marks.end.to_owned()));
        assert_eq!(ours, theirs.thinking, "{tokens:?}");
    }
}

#[derive(Deserialize)]
struct Split {
    segments: Vec<(String, String)>,
}

/// mlx-lm's parts in our words: a call that cannot be read is content with its marks, and here none can be.
fn expected(split: Split) -> Vec<Delta> {
    let mut deltas = Vec::new();
    let mut call: Option<String> = None;
    let ended =
        |call: Option<String>, end: &str| call.map(|call| Delta::Content(format!("<tool_call>{call}{end}")));
    for (part, text) in split.segments {
        if part == "tool" {
            call.get_or_insert_default().push_str(&text);
            continue;
        }
        deltas.extend(ended(call.take(), "</tool_call>"));
        let delta = if part == "reasoning" { Delta::Reasoning(text) } else { Delta::Content(text) };
        deltas.push(delta);
    }
    deltas.extend(ended(call, ""));
    let empty =
        |delta: &Delta| matches!(delta, Delta::Content(text) | Delta::Reasoning(text) if text.is_empty());
    deltas.retain(|delta| !empty(delta));
    joined(deltas)
}

/// Answers out of marks, parts of marks and words.
fn confusing_answers() -> impl Strategy<Value = Vec<String>> {
    let parts = [
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<",
        "<th",
        "ink>",
        "</",
        "tool_call>",
        "é",
        " a ",
        "{",
    ];
    prop::collection::vec(prop::sample::select(parts.map(str::to_owned).to_vec()), 0..12)
}

#[test]
fn answers_split_as_in_mlx_lm() {
    let transitions = json!({
        "normal": [["<think>", "reasoning"], ["<tool_call>", "tool"]],
        "reasoning": [["</think>", "normal"], ["<tool_call>", "tool"]],
        "tool": [["</tool_call>", "normal"]],
    });
    let config = ProptestConfig { rng_seed: RngSeed::Fixed(2), ..ProptestConfig::default() };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let answers: Vec<(bool, String)> = (0..500)
        .map(|at| (at % 2 == 1, confusing_answers().new_tree(&mut runner).unwrap().current().concat()))
        .collect();
    let questions = answers.iter().map(|(thinking, text)| {
        let initial = if *thinking { "reasoning" } else { "normal" };
        json!({"transitions": transitions, "initial": initial, "text": text})
    });
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(questions.collect::<Value>().to_string().as_bytes()).unwrap();
    let splits: Vec<Split> = oracle::run("tool_parsers.py", &[file.path().to_str().unwrap()]).unwrap();
    let model = qwen();
    for ((thinking, text), split) in answers.iter().zip(splits) {
        let mut deltas = model.read(&[], if *thinking { "<think>" } else { "" }, &[text]);
        deltas.retain(|delta| !matches!(delta, Delta::ToolCallStarted | Delta::Warning(_)));
        assert_eq!(joined(deltas), expected(split), "{text:?}, thinking {thinking}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { rng_seed: RngSeed::Fixed(3), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn cutting_the_text_changes_nothing(pieces in confusing_answers(), thinking: bool) {
        let prompt = if thinking { "<think>" } else { "" };
        let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
        let model = qwen();
        prop_assert_eq!(model.read(&[], prompt, &pieces), model.read(&[], prompt, &[&pieces.concat()]));
    }

    #[test]
    fn cutting_a_story_changes_nothing(which in 0..STORIES.len(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6)) {
        let (model, prompt, answer, wanted) = &STORIES[which];
        let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(answer.len() + 1)).filter(|at| answer.is_char_boundary(*at)).collect();
        places.extend([0, answer.len()]);
        places.sort_unstable();
        let pieces: Vec<&str> = places.windows(2).map(|pair| &answer[pair[0]..pair[1]]).collect();
        prop_assert_eq!(short(&model.read(&tools(), prompt, &pieces)), *wanted);
    }

    #[test]
    fn cutting_messages_changes_nothing(pieces in prop::collection::vec(prop::sample::select(vec![
        "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "assistant", "analysis", "final", " to=functions.f", "<|mess", "word ", "{}", "0123456789012345678901234567890123456789012345678901234567890123456789",
    ]), 0..14)) {
        let model = harmony();
        let whole = model.read(&[], "<|start|> assistant", &[&pieces.concat()]);
        prop_assert_eq!(model.read(&[], "<|start|> assistant", &pieces), whole);
    }
}
