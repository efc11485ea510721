//! tokenizer.model and tiktoken's files give the ids and texts that mlx-lm's tokenizers give; broken ones end in an error.
//!
//! The judge trains its models itself (crates/testkit/oracle/vocabulary_files.py).

#![allow(clippy::unwrap_used)] // helpers of tests are test code, too

use std::{collections::BTreeMap, path::Path, sync::OnceLock};

use mlxnode_testkit::oracle;
use mlxnode_text::{TextError, TextFiles, Tokenizer};
use proptest::{prelude::*, test_runner::RngSeed};
use serde::Deserialize;

#[derive(Deserialize)]
struct Judged {
    models: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    folder: String,
    judge: String,
    tokens: Vec<Option<String>>,
    bos: Option<u32>,
    eos: Vec<u32>,
    texts: Vec<Text>,
    ids: Vec<Ids>,
}

#[derive(Deserialize)]
struct Text {
    text: String,
    plain: Vec<u32>,
    special: Vec<u32>,
}

#[derive(Deserialize)]
struct Ids {
    ids: Vec<u32>,
    text: String,
    without_special: String,
}

/// Trained once for all tests of this file.
fn judged() -> &'static (tempfile::TempDir, Judged) {
    static JUDGED: OnceLock<(tempfile::TempDir, Judged)> = OnceLock::new();
    JUDGED.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let judged = oracle::run("vocabulary_files.py", &[folder.path().to_str().unwrap()]).unwrap();
        (folder, judged)
    })
}

fn files(name: &str) -> TextFiles {
    TextFiles::read(&judged().0.path().join(name)).unwrap()
}

fn load(folder: &Path) -> Result<Tokenizer, TextError> {
    Tokenizer::from_files(&TextFiles::read(folder)?)
}

fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut detokenizer = tokenizer.detokenizer();
    let mut text: String = ids.iter().map(|id| detokenizer.push(*id)).collect();
    text.push_str(&detokenizer.finish());
    text
}

#[test]
fn vocabularies_are_those_of_the_judge() {
    let (folder, judged) = judged();
    assert!(judged.models.len() >= 54, "{}", judged.models.len());
    for model in &judged.models {
        let name = &model.folder;
        let tokenizer = load(&folder.path().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(tokenizer.vocabulary_size(), model.tokens.len(), "{name}");
        for (id, token) in (0..).zip(&model.tokens) {
            if let Some(token) = token {
                assert_eq!(tokenizer.id_to_token(id).as_ref(), Some(token), "{name}");
            }
        }
        assert_eq!(tokenizer.eos_tokens().iter().copied().collect::<Vec<_>>(), model.eos, "{name}");
        if model.judge != "author" {
            assert_eq!(tokenizer.bos_token_id(), model.bos, "{name}");
        }
    }
}

#[test]
fn texts_become_the_same_ids() {
    let (folder, judged) = judged();
    let mut wrong = Vec::new();
    for model in &judged.models {
        let tokenizer = load(&folder.path().join(&model.folder)).unwrap();
        for row in &model.texts {
            for (special, expected) in [(false, &row.plain), (true, &row.special)] {
                let ids = tokenizer.encode(&row.text, special).unwrap();
                if ids != *expected {
                    let (name, text) = (&model.folder, &row.text);
                    wrong.push(format!("{name} {text:?}\n  got  {ids:?}\n  want {expected:?}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn ids_become_the_same_texts() {
    let (folder, judged) = judged();
    for model in &judged.models {
        let name = &model.folder;
        let tokenizer = load(&folder.path().join(name)).unwrap();
        for row in &model.ids {
            assert_eq!(tokenizer.decode(&row.ids, false).unwrap(), row.text, "{name} {:?}", row.ids);
            assert_eq!(
                tokenizer.decode(&row.ids, true).unwrap(),
                row.without_special,
                "{name} {:?}",
                row.ids
            );
            let byte_level = ["tiktoken", "pairs", "tekken"].iter().any(|kind| name.starts_with(kind));
            let whole = if byte_level { row.text.strip_prefix(' ').unwrap_or(&row.text) } else { &row.text };
            assert_eq!(streamed(&tokenizer, &row.ids), whole, "{name} {:?}", row.ids);
        }
    }
}

/// transformers 5.23 cannot rename tokens of a unigram model; the names that the configuration gives are taken here.
#[test]
fn placeholders_of_a_unigram_model_can_be_renamed() {
    let tokenizer = Tokenizer::from_files(&with(
        "unigram_nmt-bare",
        "tokenizer_config.json",
        br#"{"added_tokens_decoder": {"3": {"content": "<CTL>", "special": true}}}"#,
    ))
    .unwrap();
    assert_eq!(tokenizer.token_to_id("<CTL>"), Some(3));
    assert_eq!(tokenizer.encode("<CTL>", false).unwrap(), [3]);
}

/// The files of one model with one of them replaced.
fn with(name: &str, file: &str, bytes: &[u8]) -> TextFiles {
    let mut map: BTreeMap<String, Vec<u8>> =
        files(name).iter().map(|(name, bytes)| (name.to_owned(), bytes.to_vec())).collect();
    map.insert(file.to_owned(), bytes.to_vec());
    TextFiles::from_map(map).unwrap()
}

#[test]
fn errors_name_the_file_and_the_field() {
    let error = |files: TextFiles| Tokenizer::from_files(&files).unwrap_err().to_string();
    let cases: [(&str, &str, &[u8], &[&str]); 15] = [
        ("bpe-bare", "tokenizer.model", b"", &["tokenizer.model", "pieces"]),
        ("bpe-bare", "tokenizer.model", b"\xFF\xFF\xFF", &["tokenizer.model", "no sentencepiece model"]),
        ("bpe-bare", "tokenizer.model", b"\x0A\x03\x0A\x01", &["tokenizer.model", "no sentencepiece model"]),
        ("bpe-bare", "tokenizer.model", b"IQ== 0\n", &["tokenizer.model", "no token for the byte"]),
        ("tiktoken-bare", "tiktoken.model", b"IQ== 0\nrubbish\n", &["tiktoken.model", "line 2"]),
        ("tiktoken-bare", "tiktoken.model", b"", &["tiktoken.model", "byte 0x00"]),
        (
            "tiktoken-bare",
            "tokenizer_config.json",
            br#"{"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", null]}}"#,
            &["tiktoken.model", "XTokenizer", "tokenizer.json"],
        ),
        (
            "tiktoken-bare",
            "tokenizer_config.json",
            br#"{"added_tokens_decoder": {"4000000000": {"content": "<x>"}}}"#,
            &["tokenizer_config.json", "added_tokens_decoder", "4000000000"],
        ),
        ("bpe-bare", "added_tokens.json", b"[1]", &["added_tokens.json"]),
        ("pairs-gpt2", "vocab.json", b"{}", &["merges.txt", "line 2", "not in vocab.json"]),
        ("pairs-gpt2", "merges.txt", b"#version: 0.2\none\n", &["merges.txt", "line 2", "two tokens"]),
        (
            "pairs-gpt2",
            "tokenizer_config.json",
            br#"{"tokenizer_class": "CohereTokenizer"}"#,
            &["vocab.json", "tokenizer_class", "CohereTokenizer", "GPT2Tokenizer"],
        ),
        ("tekken-plain", "tekken.json", b"{}", &["tekken.json", "config"]),
        (
            "tekken-plain",
            "tekken.json",
            br#"{"config": {"pattern": "."}, "vocab": [], "special_tokens": []}"#,
            &["tekken.json", "vocab", "byte 0x00"],
        ),
        (
            "tekken-plain",
            "tekken.json",
            br#"{"config": {"pattern": "("}, "vocab": [{"token_bytes": "AA=="}], "special_tokens": []}"#,
            &["tekken.json"],
        ),
    ];
    for (name, file, bytes, expected) in cases {
        let error = error(with(name, file, bytes));
        for part in expected {
            assert!(error.contains(part), "{name} {file}: {error}");
        }
    }
    let alone: BTreeMap<String, Vec<u8>> = files("pairs-qwen2")
        .iter()
        .filter(|(name, _)| *name != "merges.txt")
        .map(|(name, bytes)| (name.to_owned(), bytes.to_vec()))
        .collect();
    let alone = error(TextFiles::from_map(alone).unwrap());
    assert!(alone.contains("merges.txt"), "{alone}");
    let none = error(TextFiles::default());
    assert!(none.contains("tokenizer.json"), "{none}");
    let long = format!(r#"{{"added_tokens_decoder": {{"900": {{"content": "{}"}}}}}}"#, "x".repeat(5000));
    let long = error(with("bpe-bare", "tokenizer_config.json", long.as_bytes()));
    assert!(long.contains("added_tokens_decoder") && long.contains("5000 bytes"), "{long}");
}

/// mlx-lm's NewlineTokenizer: the vocabulary has "<n>" where texts have line breaks.
#[test]
fn line_breaks_can_be_marks() {
    let config =
        br#"{"tokenizer_class": "NewlineTokenizer", "added_tokens_decoder": {"900": {"content": "<n>"}}}"#;
    let tokenizer = Tokenizer::from_files(&with("bpe-bare", "tokenizer_config.json", config)).unwrap();
    let mark = tokenizer.token_to_id("<n>").unwrap();
    let ids = tokenizer.encode("fox\n\nfox", false).unwrap();
    assert_eq!(ids.iter().filter(|id| **id == mark).count(), 2);
    assert_eq!(ids, tokenizer.encode("fox<n><n>fox", false).unwrap());
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "fox\n\nfox");
    assert_eq!(streamed(&tokenizer, &ids), "fox\n\nfox");
    let letters: Vec<u32> =
        ["<0x3C>", "n", "<0x3E>", "<0x3C>"].map(|token| tokenizer.token_to_id(token).unwrap()).into();
    assert_eq!(streamed(&tokenizer, &letters), "\n<");
}

/// A tokenizer.json says more, so the vocabulary beside it is not even read.
#[test]
fn a_tokenizer_json_wins() {
    let folder = tempfile::tempdir().unwrap();
    let json = include_bytes!("golden/tokenizers/sentence_piece/tokenizer.json");
    std::fs::write(folder.path().join("tokenizer.json"), json).unwrap();
    std::fs::write(folder.path().join("tokenizer.model"), b"broken").unwrap();
    let files = TextFiles::read(folder.path()).unwrap();
    assert_eq!(files.get("tokenizer.model"), None);
    assert!(files.has_tokenizer() && !TextFiles::default().has_tokenizer());
    assert!(Tokenizer::from_files(&files).is_ok());
}

/// The same cases each time; a failure prints its input.
fn fixed() -> ProptestConfig {
    ProptestConfig {
        cases: 400,
        rng_seed: RngSeed::Fixed(1),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

const DAMAGED: [(&str, &str); 7] = [
    ("bpe-bare", "tokenizer.model"),
    ("unigram_nmt-bare", "tokenizer.model"),
    ("unigram_bytes-author", "tokenizer.model"),
    ("tiktoken-kimi", "tiktoken.model"),
    ("pairs-qwen2", "vocab.json"),
    ("pairs-gpt2", "merges.txt"),
    ("tekken-plain", "tekken.json"),
];

/// One of each way of decoding: without and with a space less at the start, with and without bytes, in parts.
const STREAMED: [&str; 6] =
    ["bpe-llama", "bpe-gemma", "bpe-bare", "unigram_nmt-bare", "unigram_bytes-author", "bpe_nmt-author"];

/// Ids of all kinds: bytes and special tokens are among the first 270, and some are beyond every vocabulary.
fn ids() -> impl Strategy<Value = u32> {
    prop_oneof![4 => 0u32..270, 4 => 0u32..460, 1 => any::<u32>()]
}

/// Built once for all cases of a property.
fn shared(which: usize) -> &'static Tokenizer {
    static TOKENIZERS: OnceLock<Vec<Tokenizer>> = OnceLock::new();
    let load = |name: &&str| Tokenizer::from_files(&files(name)).unwrap();
    &TOKENIZERS.get_or_init(|| STREAMED.iter().map(load).collect())[which]
}

proptest! {
    #![proptest_config(fixed())]

    /// Any damage: a tokenizer or an error that names the file, never a panic; and what loads also encodes and decodes.
    #[test]
    fn damaged_vocabularies_never_panic(
        which in 0..DAMAGED.len(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        cut in prop::option::of(any::<prop::sample::Index>()),
        text in "[ a-z日é😀<>\n]{0,12}",
    ) {
        let (name, file) = DAMAGED[which];
        let mut bytes = files(name).get(file).unwrap().to_vec();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        match Tokenizer::from_files(&with(name, file, &bytes)) {
            Ok(tokenizer) => {
                if let Ok(ids) = tokenizer.encode(&text, true) {
                    let _ = tokenizer.decode(&ids, false);
                    streamed(&tokenizer, &ids);
                }
            }
            Err(error) => {
                let error = error.to_string();
                prop_assert!(error.contains(file) || error.contains("contradict"), "{}", error);
            }
        }
    }

    /// Any ids, also ones that no token has: the pieces together are the whole text, decoded at once.
    #[test]
    fn pieces_make_the_whole(which in 0..STREAMED.len(), ids in prop::collection::vec(ids(), 0..40)) {
        let tokenizer = shared(which);
        prop_assert_eq!(streamed(tokenizer, &ids), tokenizer.decode(&ids, false).unwrap());
    }

    /// Pure noise is refused in the same way.
    #[test]
    fn noise_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        for (name, file) in DAMAGED {
            let _ = Tokenizer::from_files(&with(name, file, &bytes));
        }
    }
}
