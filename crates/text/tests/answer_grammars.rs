//! Required calls in every notation: the grammar has the notation's own examples for sentences, no others, and every sentence that it
//! leads to is read as a call with the right arguments.

use mlxnode_compute::Grammar;
use mlxnode_text::grammar::{AnswerWish, Matcher, ToolChoice, Vocabulary, answer_grammar};
use mlxnode_text::{AnswerFormat, Delta, TextFiles, Tokenizer, ToolFormat};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const SIZE: usize = 512;

/// The demo model with another notation of tool calls.
fn model(notation: ToolFormat) -> Result<(Tokenizer, AnswerFormat)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../hub/demo-model/model");
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    for name in ["tokenizer.json", "tokenizer_config.json", "config.json"] {
        files.insert(name.to_owned(), std::fs::read(folder.join(name))?);
    }
    let config = files.get_mut("tokenizer_config.json").ok_or("tokenizer_config.json")?;
    let mut written: Value = serde_json::from_slice(config)?;
    written["tool_parser_type"] = notation.name().into();
    if notation == ToolFormat::MuseSpark {
        written["chat_template_type"] = "muse_spark".into();
    }
    *config = serde_json::to_vec(&written)?;
    let files = TextFiles::from_map(files)?;
    let tokenizer = Tokenizer::from_files(&files)?;
    let answers = AnswerFormat::from_files(&files, &tokenizer, None)?;
    Ok((tokenizer, answers))
}

fn tools() -> Vec<Value> {
    let parameters = json!({"type": "object", "required": ["city", "days"], "additionalProperties": false, "properties": {
        "city": {"type": "string"}, "days": {"type": "integer", "minimum": 0, "maximum": 99}, "unit": {"enum": ["C", "F"]}, "exact": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 2}}});
    vec![
        json!({"type": "function", "function": {"name": "weather", "parameters": parameters}}),
        json!({"type": "function", "function": {"name": "stop"}}),
    ]
}

/// A call of `weather` in each notation, as its models write it.
fn example(notation: ToolFormat) -> &'static str {
    match notation {
        ToolFormat::JsonTools => {
            "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\", \"days\": 3}}\n</tool_call>"
        }
        ToolFormat::Qwen3Coder => {
            "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n\
            </function>\n</tool_call>"
        }
        ToolFormat::Glm47 => {
            "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n\
            <arg_value>3</arg_value>\n</tool_call>"
        }
        ToolFormat::KimiK2 => {
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>\
            {\"city\": \"Paris\", \"days\": 3}<|tool_call_end|><|tool_calls_section_end|>"
        }
        ToolFormat::KimiK3 => {
            "<|open|>tools<|sep|><|open|>call tool=\"weather\"<|sep|><|open|>argument key=\"city\" type=\"string\"<|sep|>\
            Paris<|close|>argument<|sep|><|open|>argument key=\"days\" type=\"json\"<|sep|>3<|close|>argument<|sep|><|close|>call<|sep|>\
            <|close|>tools<|sep|>"
        }
        ToolFormat::MinimaxM2 => {
            "<minimax:tool_call>\n<invoke name=\"weather\">\n<parameter name=\"city\">Paris</parameter>\n\
            <parameter name=\"days\">3</parameter>\n</invoke>\n</minimax:tool_call>"
        }
        ToolFormat::Mistral => {
            "[TOOL_CALLS][{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\", \"days\": 3}}]"
        }
        ToolFormat::Pythonic => "<|tool_call_start|>[weather(city=\"Paris\", days=3)]<|tool_call_end|>",
        ToolFormat::Gemma4 => "<|tool_call>call:weather{city:<|\"|>Paris<|\"|>,days:3}<tool_call|>",
        ToolFormat::FunctionGemma => {
            "<start_function_call>call:weather{city:<escape>Paris<escape>,days:3}<end_function_call>"
        }
        ToolFormat::Longcat => {
            "<longcat_tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\", \"days\": 3}}\n\
            </longcat_tool_call>"
        }
        ToolFormat::Minicpm5 => {
            "<function name=\"weather\"><param name=\"city\">Paris</param><param name=\"days\">3</param></function>"
        }
        ToolFormat::MuseSpark => {
            "<atem:function_calls>\n<atem:invoke name=\"weather\">\n<atem:parameter name=\"city\">\"Paris\"\
            </atem:parameter>\n<atem:parameter name=\"days\">3</atem:parameter>\n</atem:invoke>\n</atem:function_calls>"
        }
        ToolFormat::Llama3 => "{\"name\": \"weather\", \"parameters\": {\"city\": \"Paris\", \"days\": 3}}",
        ToolFormat::Harmony => {
            "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{\"city\": \"Paris\", \"days\": 3}<|call|>"
        }
        ToolFormat::DeepSeek => {
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n\
            {\"city\": \"Paris\", \"days\": 3}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        }
        ToolFormat::DeepSeekV32 => {
            "<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"weather\">\n<｜DSML｜parameter name=\"city\" string=\"true\">\
            Paris</｜DSML｜parameter>\n<｜DSML｜parameter name=\"days\" string=\"false\">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n\
            </｜DSML｜function_calls>"
        }
    }
}

fn grammar(
    tokenizer: &Tokenizer,
    answers: &AnswerFormat,
    choice: &ToolChoice,
    parallel: bool,
) -> Result<Grammar> {
    let tools = tools();
    let wish = AnswerWish { format: None, tools: &tools, choice, parallel };
    Ok(answer_grammar(tokenizer, answers, &wish, &[])?.ok_or("a grammar")?)
}

/// Is the text a sentence of the grammar?
fn allows(tokenizer: &Tokenizer, matcher: &mut Matcher, text: &str) -> Result<bool> {
    for token in tokenizer.encode(text, false)? {
        if matcher.accept(token).is_err() {
            return Ok(false);
        }
    }
    Ok(matcher.is_complete())
}

/// The calls that a whole answer holds; an error when there is anything else in it.
fn read(answers: &AnswerFormat, text: &str) -> Result<Vec<(String, Map<String, Value>)>> {
    let mut parser = answers.parser(&tools(), &[])?;
    let mut deltas = parser.push(text);
    deltas.extend(parser.finish());
    let mut calls = Vec::new();
    for delta in deltas {
        match delta {
            Delta::ToolCall(call) => calls.push((call.name, call.arguments)),
            Delta::ToolCallStarted => {}
            Delta::Content(text) if text.trim().is_empty() => {}
            other => return Err(format!("{other:?} in {text:?}").into()),
        }
    }
    Ok(calls)
}

#[test]
fn every_notation_has_its_own_example_for_a_sentence() -> Result<()> {
    for notation in ToolFormat::ALL {
        let (tokenizer, answers) = model(notation)?;
        let vocabulary = Vocabulary::new(&tokenizer, SIZE)?;
        let text = example(notation);
        let expected = json!({"city": "Paris", "days": 3});
        let calls = read(&answers, text).map_err(|error| format!("{notation:?}: {error}"))?;
        assert_eq!(
            calls,
            [("weather".to_owned(), expected.as_object().cloned().unwrap_or_default())],
            "{notation:?}"
        );
        let required = grammar(&tokenizer, &answers, &ToolChoice::Required, true)?;
        let mut matcher = vocabulary
            .compile((&required).into())
            .map_err(|error| format!("{notation:?}: {error}\n{required:?}"))?;
        assert!(allows(&tokenizer, &mut matcher, text)?, "{notation:?}: {required:?}");
        for wrong in [
            "Hello",
            &text.replace("weather", "winter"),
            &text.replace('3', "\"x\""),
            &text[..text.len() / 2],
        ] {
            let mut matcher = vocabulary.compile((&required).into())?;
            assert!(!allows(&tokenizer, &mut matcher, wrong)?, "{notation:?} allows {wrong}");
        }
        let named = grammar(&tokenizer, &answers, &ToolChoice::Named("stop".into()), true)?;
        let mut matcher = vocabulary.compile((&named).into())?;
        assert!(!allows(&tokenizer, &mut matcher, text)?, "{notation:?}");
    }
    Ok(())
}

/// What ends a text in one notation or another.
const CLOSERS: [&str; 9] = [
    "\n</parameter>\n",
    "</arg_value>\n",
    "<|close|>argument<|sep|>",
    "</parameter>\n",
    "</param>",
    "<|\"|>",
    "<escape>",
    "</｜DSML｜parameter>\n",
    "\"",
];

/// Walks at random through what the masks allow, and ends as soon as that is allowed. None when it got lost in a text.
fn sentence(tokenizer: &Tokenizer, mut matcher: Matcher, seed: u64) -> Result<Option<String>> {
    let (mut tokens, mut state) = (Vec::new(), seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let allowed = |matcher: &mut Matcher| -> Result<Vec<u32>> {
        let mask = matcher.mask()?;
        Ok((0..SIZE as u32).filter(|token| mask[*token as usize / 32] >> (token % 32) & 1 == 1).collect())
    };
    let mut free = 0;
    while tokens.len() < 600 {
        let some = allowed(&mut matcher)?;
        assert!(!some.is_empty());
        if some.contains(&2) {
            return Ok(Some(tokenizer.decode(&tokens, false)?));
        }
        // Where any text may come, a random one would never end: after a few tokens it is closed.
        free = if some.len() > 100 { free + 1 } else { 0 };
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        if free > 4 {
            for closer in CLOSERS {
                let mut closed = matcher.clone();
                let ids = tokenizer.encode(closer, false)?;
                if ids.iter().all(|id| closed.accept(*id).is_ok()) && allowed(&mut closed)?.len() < 100 {
                    (matcher, free) = (closed, 0);
                    tokens.extend(ids);
                    break;
                }
            }
            if free == 0 {
                continue;
            }
        }
        let token = some[(state >> 33) as usize % some.len()];
        tokens.push(token);
        if matcher.accept(token)? {
            return Ok(Some(tokenizer.decode(&tokens, false)?));
        }
    }
    Ok(None)
}

#[test]
fn every_sentence_is_read_as_a_call_of_the_function() -> Result<()> {
    for notation in ToolFormat::ALL {
        let (tokenizer, answers) = model(notation)?;
        let vocabulary = Vocabulary::new(&tokenizer, SIZE)?;
        let required = grammar(&tokenizer, &answers, &ToolChoice::Named("weather".into()), false)?;
        let matcher = vocabulary.compile((&required).into())?;
        let mut whole = 0;
        for seed in 0..5 {
            let Some(text) = sentence(&tokenizer, matcher.clone(), seed)? else { continue };
            whole += 1;
            let calls = read(&answers, &text).map_err(|error| format!("{notation:?}: {error}"))?;
            assert_eq!(calls.len(), 1, "{notation:?}: {text:?}");
            let (name, arguments) = &calls[0];
            assert_eq!(name, "weather", "{notation:?}: {text:?}");
            assert!(
                arguments["days"].as_u64().is_some_and(|days| days <= 99),
                "{notation:?}: {text:?}: {arguments:?}"
            );
            assert!(arguments.contains_key("city"), "{notation:?}: {text:?}: {arguments:?}");
            assert!(
                arguments.get("exact").is_none_or(Value::is_boolean),
                "{notation:?}: {text:?}: {arguments:?}"
            );
            assert!(
                arguments.get("tags").is_none_or(Value::is_array),
                "{notation:?}: {text:?}: {arguments:?}"
            );
        }
        assert!(whole >= 2, "{notation:?}: only {whole} sentences ended");
    }
    Ok(())
}
