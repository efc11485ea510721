//! Grammars over the demo model's vocabulary: what is allowed is what the language allows, whatever the tokens.

use mlxnode_text::grammar::{GrammarError, Matcher, Source, Vocabulary};
use mlxnode_text::{TextFiles, Tokenizer};
use std::path::Path;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Some ids more than the tokenizer has, as padded vocabularies have them.
const SIZE: usize = 530;
const END: u32 = 2;

fn vocabulary() -> Result<(Tokenizer, Vocabulary)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../hub/demo-model/model");
    let tokenizer = Tokenizer::from_files(&TextFiles::read(&folder)?)?;
    let vocabulary = Vocabulary::new(&tokenizer, SIZE)?;
    Ok((tokenizer, vocabulary))
}

fn allows(mask: &[u32], token: u32) -> bool {
    mask[token as usize / 32] >> (token % 32) & 1 == 1
}

/// Feeds a text token by token; tells how far it got and whether it may end there.
fn feed(tokenizer: &Tokenizer, matcher: &mut Matcher, text: &str) -> Result<bool> {
    for token in tokenizer.encode(text, false)? {
        if !allows(matcher.mask()?, token) {
            assert!(matcher.accept(token).is_err(), "the mask and the matcher disagree");
            return Ok(false);
        }
        matcher.accept(token)?;
    }
    Ok(allows(matcher.mask()?, END))
}

#[test]
fn sentences_pass_and_others_do_not() -> Result<()> {
    let (tokenizer, vocabulary) = vocabulary()?;
    let schema = r##"{"type": "object", "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/$defs/word"}},
        "required": ["a"], "additionalProperties": false, "$defs": {"word": {"enum": ["x", "yes"]}}}"##;
    let lark = "start: greeting \" \" NAME\ngreeting: \"Hello\" | \"Hi\"\nNAME: /[A-Z][a-z]*/";
    let cases = [
        (Source::JsonObject, r#"{"any": [1, {"thing": null}]}"#, true),
        (Source::JsonObject, "[1]", false),
        (Source::JsonObject, r#"{"any": 1"#, false),
        (Source::JsonSchema(schema), r#"{"a": 12, "b": "yes"}"#, true),
        (Source::JsonSchema(schema), r#"{"a": -3}"#, true),
        (Source::JsonSchema(schema), r#"{"a": "12"}"#, false),
        (Source::JsonSchema(schema), r#"{"b": "x"}"#, false),
        (Source::JsonSchema(schema), r#"{"a": 1, "b": "no"}"#, false),
        (Source::Regex("[0-9]+ (km|m)"), "42 km", true),
        (Source::Regex("[0-9]+ (km|m)"), "km", false),
        (Source::Regex("[0-9]+ (km|m)"), "42", false),
        (Source::Regex("é+ü"), "ééü", true),
        (Source::Lark(lark), "Hello World", true),
        (Source::Lark(lark), "Hi X", true),
        (Source::Lark(lark), "Hey X", false),
    ];
    for (source, text, is_sentence) in cases {
        let mut matcher = vocabulary.compile(source)?;
        assert_eq!(feed(&tokenizer, &mut matcher, text)?, is_sentence, "{source:?} {text}");
        assert_eq!(matcher.is_complete(), is_sentence, "{source:?} {text}");
    }
    Ok(())
}

#[test]
fn whatever_the_mask_allows_leads_to_a_sentence() -> Result<()> {
    let (tokenizer, vocabulary) = vocabulary()?;
    let schema = r#"{"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99},
        "list": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}}, "required": ["n", "list"],
        "additionalProperties": false}"#;
    for seed in 0u64..40 {
        let mut matcher = vocabulary.compile(Source::JsonSchema(schema))?;
        let (mut tokens, mut state) = (Vec::new(), seed);
        loop {
            let mask = matcher.mask()?.to_vec();
            let allowed: Vec<u32> = (0..SIZE as u32).filter(|token| allows(&mask, *token)).collect();
            assert!(!allowed.is_empty() && !allows(&mask, 529), "{allowed:?}");
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let token = if tokens.len() > 60 && allowed.contains(&END) {
                END
            } else {
                allowed[(state >> 33) as usize % allowed.len()]
            };
            if matcher.accept(token)? || token == END {
                if token != END {
                    tokens.push(token);
                }
                break;
            }
            tokens.push(token);
            assert!(tokens.len() < 2000, "it does not end");
        }
        let text = tokenizer.decode(&tokens, false)?;
        let value: serde_json::Value =
            serde_json::from_str(&text).map_err(|error| format!("{text:?}: {error}"))?;
        assert!(value["n"].as_u64().is_some_and(|n| n <= 99) && value["list"].is_array(), "{text}");
    }
    Ok(())
}

#[test]
fn tokens_can_be_taken_back_and_clones_go_their_own_way() -> Result<()> {
    let (tokenizer, vocabulary) = vocabulary()?;
    let mut matcher = vocabulary.compile(Source::Regex("(ab|ac)d"))?;
    let id = |text: &str| tokenizer.token_to_id(text).ok_or("token");
    matcher.accept(id("a")?)?;
    let mut other = matcher.clone();
    matcher.accept(id("b")?)?;
    other.accept(id("c")?)?;
    assert!(matcher.accept(id("c")?).is_err());
    matcher.rollback(1)?;
    matcher.accept(id("c")?)?;
    let complete = matcher.accept(id("d")?)?;
    assert!(complete && matcher.is_complete());
    assert!(matcher.accept(END)?);
    matcher.rollback(2)?;
    assert!(!matcher.is_complete());
    assert!(allows(matcher.mask()?, id("d")?));
    assert!(!allows(other.mask()?, END));
    Ok(())
}

#[test]
fn special_tokens_are_named_and_never_text() -> Result<()> {
    let (tokenizer, vocabulary) = vocabulary()?;
    let mut any = vocabulary.compile(Source::Regex("(?s:.*)"))?;
    for special in 0..6 {
        assert_eq!(allows(any.mask()?, special), special == END, "{special}");
    }
    let mut named = vocabulary.compile(Source::Lark("start: <[4]> \"x\""))?;
    assert!(allows(named.mask()?, 4) && !allows(named.mask()?, 3));
    named.accept(4)?;
    assert!(feed(&tokenizer, &mut named, "x")?);
    Ok(())
}

#[test]
fn what_is_wrong_with_a_grammar_is_said() -> Result<()> {
    let (_, vocabulary) = vocabulary()?;
    let nested = "(".repeat(5000) + &")".repeat(5000);
    let cases = [
        Source::JsonSchema("{"),
        Source::JsonSchema("7"),
        Source::JsonSchema(r#"{"type": "no such type"}"#),
        Source::JsonSchema(r##"{"$ref": "#/nowhere"}"##),
        Source::JsonSchema(r#"{"$ref": "http://example.org/schema"}"#),
        Source::Regex("("),
        Source::Regex(&nested),
        Source::Lark(""),
        Source::Lark("start: nothing"),
        Source::Lark("begin: \"x\""),
    ];
    for source in cases {
        let started = std::time::Instant::now();
        let outcome = vocabulary.compile(source);
        let shown: String = format!("{source:?}").chars().take(60).collect();
        match outcome {
            Err(GrammarError::Invalid { reason, .. }) => {
                assert!(!reason.is_empty() && reason.chars().count() <= 501, "{shown}: {reason}");
            }
            other => panic!("{shown}: {:?}", other.map(|_| "accepted")),
        }
        assert!(started.elapsed().as_secs() < 20, "{shown} took {:?}", started.elapsed());
    }
    Ok(())
}

/// As large as a request may bring them; what they lead to is their business, that it ends soon is ours.
#[test]
fn large_grammars_end_soon() -> Result<()> {
    let (_, vocabulary) = vocabulary()?;
    let words: String = (0..20_000).map(|n| format!("\"w{n}\",")).collect();
    let many = format!("{{\"enum\": [{words}\"x\"]}}");
    let deep = format!("{}{{}}{}", "{\"items\": ".repeat(100), "}".repeat(100));
    let counted = "[ab]{1,1000000000}";
    let product = "(a|b|ab)*".repeat(500);
    for source in [
        Source::JsonSchema(&many),
        Source::JsonSchema(&deep),
        Source::Regex(counted),
        Source::Regex(&product),
    ] {
        let started = std::time::Instant::now();
        let outcome = vocabulary.compile(source).map(drop);
        assert!(started.elapsed().as_secs() < 20, "{:?}: {outcome:?}", started.elapsed());
    }
    Ok(())
}
