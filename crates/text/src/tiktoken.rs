//! OpenAI's vocabulary format: one token in base64 and its rank on each line. The rank is the id, and the order of merging.
//!
//! The file says nothing about how text is cut before merging nor about special tokens, so that comes from elsewhere:
//!
//! * Kimi's and the first Qwen's tokenizers are Python beside the model, which mlx-lm runs with `--trust-remote-code` only.
//!   What it does is known, and is done here.
//! * Without such Python, transformers 5 cuts text as Llama 3 does.
//! * Any other Python is refused: cut in another way, the model would read nonsense.

use std::collections::HashMap;

use serde_json::json;
use tokenizers::{
    DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    models::bpe::{BPE, Vocab},
};

use crate::{
    TextError,
    detokenizer::visible_byte,
    limits::{MAX_ADDED_TOKENS, MAX_MERGE_WORK, MAX_TOKEN_BYTES, MAX_VOCABULARY},
    special::{AddedToken, SpecialTokens},
    tokenizer::failed,
};

const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Digits one by one.
pub(crate) const QWEN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Chinese characters apart from other letters, and words at changes from lower to upper case.
const KIMI: &str = concat!(
    r"[\p{Han}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
/// Special tokens behind Kimi's vocabulary: 256 and two.
const KIMI_RESERVED: u32 = 258;
/// `<|extra_0|>` to `<|extra_204|>` behind Qwen's three named tokens.
const QWEN_EXTRA: u32 = 205;

/// How a family cuts text, and which tokens it has behind its vocabulary.
struct Family {
    pattern: &'static str,
    composed: bool,
    reserved: Vec<AddedToken>,
}

/// Whether a file is of this kind: sentencepiece uses the same name for its own.
pub(crate) fn looks_like(bytes: &[u8]) -> bool {
    let line = bytes.split(|byte| *byte == b'\n').find(|line| !line.is_empty());
    line.is_some_and(|line| parse_line(line).is_ok())
}

/// Builds the tokenizer with the family's special tokens.
pub(crate) fn build(
    file: &str,
    bytes: &[u8],
    special: &SpecialTokens,
) -> Result<tokenizers::Tokenizer, TextError> {
    let invalid = |reason: String| TextError::InvalidFile { file: file.to_owned(), reason };
    let ranks = parse(bytes).map_err(invalid)?;
    let family = family(file, ranks.len(), special)?;
    let mut backend = tokenizers::Tokenizer::new(model(&ranks, &[]).map_err(invalid)?);

    let level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let split = json!({"type": "Split", "pattern": {"Regex": family.pattern}, "behavior": "Isolated", "invert": false});
    let cut = json!({"type": "Sequence", "pretokenizers": [split, &level]});
    let part = |error: serde_json::Error| TextError::Tokenizer { reason: error.to_string() };
    backend.with_pre_tokenizer(Some(serde_json::from_value::<PreTokenizerWrapper>(cut).map_err(part)?));
    backend.with_decoder(Some(serde_json::from_value::<DecoderWrapper>(level.clone()).map_err(part)?));
    backend.with_post_processor(Some(serde_json::from_value::<PostProcessorWrapper>(level).map_err(part)?));
    if family.composed {
        let composed = serde_json::from_value::<NormalizerWrapper>(json!({"type": "NFC"})).map_err(part)?;
        backend.with_normalizer(Some(composed)).map_err(failed)?;
    }
    backend.add_tokens(family.reserved.iter().map(AddedToken::to_library)).map_err(failed)?;
    Ok(backend)
}

fn family(file: &str, vocabulary: usize, special: &SpecialTokens) -> Result<Family, TextError> {
    let first = u32::try_from(vocabulary).unwrap_or(u32::MAX);
    let class = special.remote_class.as_deref().map(|name| name.rsplit('.').next().unwrap_or(name));
    match (file, class) {
        ("qwen.tiktoken", Some("QWenTokenizer") | None) => {
            let named = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(str::to_owned);
            let reserved = named.into_iter().chain((0..QWEN_EXTRA).map(|at| format!("<|extra_{at}|>")));
            Ok(Family {
                pattern: QWEN,
                composed: true,
                reserved: reserved.map(AddedToken::special).collect(),
            })
        }
        (_, Some("TikTokenTokenizer")) => Ok(Family {
            pattern: KIMI,
            composed: false,
            reserved: (first..first.saturating_add(KIMI_RESERVED)).map(|id| reserved(id, special)).collect(),
        }),
        (_, None) => {
            let last = special.added.keys().next_back().copied().filter(|last| *last >= first);
            let count = last.map_or(0, |last| (last - first) as usize + 1);
            if count > MAX_ADDED_TOKENS {
                return Err(TextError::InvalidFile {
                    file: "tokenizer_config.json".to_owned(),
                    reason: format!(
                        "added_tokens_decoder: id {} is far beyond the {first} tokens of {file}",
                        last.unwrap_or(0)
                    ),
                });
            }
            let mut tokens: Vec<AddedToken> = last.map_or_else(Vec::new, |last| {
                (first..=last).map(|id| AddedToken::special(reserved(id, special).content)).collect()
            });
            let further = special
                .extra
                .iter()
                .flatten()
                .filter(|token| tokens.iter().all(|known| known.content != token.content));
            let further: Vec<AddedToken> =
                further.map(|token| AddedToken::special(token.content.clone())).collect();
            tokens.extend(further);
            Ok(Family { pattern: LLAMA_3, composed: false, reserved: tokens })
        }
        (_, Some(class)) => {
            Err(TextError::OwnTokenizerCode { file: file.to_owned(), class: class.to_owned() })
        }
    }
}

/// The token that the configuration has at this id, or a placeholder.
fn reserved(id: u32, special: &SpecialTokens) -> AddedToken {
    match special.added.get(&id).filter(|token| !token.content.is_empty()) {
        Some(token) => AddedToken { normalized: Some(false), ..token.clone() },
        None => AddedToken::special(format!("<|reserved_token_{id}|>")),
    }
}

/// Token and rank of every line.
fn parse(bytes: &[u8]) -> Result<HashMap<Vec<u8>, u32>, String> {
    let mut ranks = HashMap::new();
    let mut work = 0;
    for (line, at) in bytes.split(|byte| *byte == b'\n').zip(1..) {
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let (token, rank) = parse_line(line).map_err(|reason| format!("line {at}: {reason}"))?;
        work += token.len() * token.len();
        if work > MAX_MERGE_WORK {
            return Err(format!("line {at}: the tokens are too long together"));
        }
        if ranks.insert(token, rank).is_some() {
            return Err(format!("line {at}: the token was there before"));
        }
    }
    let missing = (0..=u8::MAX).find(|byte| !ranks.contains_key([*byte].as_slice()));
    if let Some(missing) = missing {
        return Err(format!("it has no token for the byte 0x{missing:02X}"));
    }
    let mut seen: Vec<u32> = ranks.values().copied().collect();
    seen.sort_unstable();
    match seen.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(format!("two tokens have the rank {}", pair[0])),
        None => Ok(ranks),
    }
}

fn parse_line(line: &[u8]) -> Result<(Vec<u8>, u32), String> {
    let mut words = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
    let (Some(token), Some(rank), None) = (words.next(), words.next(), words.next()) else {
        return Err("it must have a token in base64 and its rank".to_owned());
    };
    let token =
        data_encoding::BASE64.decode(token).map_err(|error| format!("the token is no base64: {error}"))?;
    if token.is_empty() || token.len() > MAX_TOKEN_BYTES {
        return Err(format!("the token has {} bytes, but must have 1 to {MAX_TOKEN_BYTES}", token.len()));
    }
    let rank = std::str::from_utf8(rank).ok().and_then(|rank| rank.parse::<u32>().ok());
    let rank = rank.filter(|rank| (*rank as usize) < MAX_VOCABULARY);
    rank.map(|rank| (token, rank)).ok_or_else(|| format!("the rank must be a number below {MAX_VOCABULARY}"))
}

/// The merges behind the ranks: each way to put a token together from two others, by the token's rank, then the parts'. The
/// tokens in `first` have the ids before all others.
pub(crate) fn model(ranks: &HashMap<Vec<u8>, u32>, first: &[String]) -> Result<BPE, String> {
    let visible = |token: &[u8]| token.iter().map(|byte| visible_byte(*byte)).collect::<String>();
    let mut tokens: Vec<(&Vec<u8>, u32)> = ranks.iter().map(|(token, rank)| (token, *rank)).collect();
    tokens.sort_unstable_by_key(|(_, rank)| *rank);
    let mut merges = Vec::new();
    for (token, _) in &tokens {
        let cuts = (1..token.len()).filter_map(|at| {
            let (left, right) = token.split_at(at);
            Some((*ranks.get(left)?, *ranks.get(right)?, left, right))
        });
        let mut cuts: Vec<_> = cuts.collect();
        cuts.sort_unstable_by_key(|(left, right, ..)| (*left, *right));
        merges.extend(cuts.into_iter().map(|(_, _, left, right)| (visible(left), visible(right))));
    }
    let before = u32::try_from(first.len()).map_err(|error| error.to_string())?;
    let ranked = tokens.into_iter().map(|(token, rank)| (visible(token), before + rank));
    let vocabulary: Vocab = ranked.chain(first.iter().cloned().zip(0..)).collect();
    // A word that is a token is that token, even if merging would not get there.
    let builder = BPE::builder().vocab_and_merges(vocabulary, merges).ignore_merges(true);
    builder.build().map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_lines_are_named() {
        let cases: [(&[u8], &str); 6] = [
            (b"IQ== 0\nIg==", "line 2: it must have a token in base64 and its rank"),
            (b"IQ== 0 1", "line 1: it must have"),
            (b"I! 0", "line 1: the token is no base64"),
            (b"IQ== -1", "line 1: the rank must be a number"),
            (b"IQ== 0\nIQ== 1", "line 2: the token was there before"),
            (b"IQ== 0", "it has no token for the byte 0x00"),
        ];
        for (text, expected) in cases {
            let reason = parse(text).unwrap_err();
            assert!(reason.starts_with(expected), "{reason}");
        }
        assert!(looks_like(b"\nIQ== 0\n"));
        assert!(!looks_like(b"\n\x0E\n\x05<unk>") && !looks_like(b""));
    }
}
