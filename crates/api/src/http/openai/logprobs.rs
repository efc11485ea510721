//! Log-probabilities in OpenAI's two shapes: by token with bytes (chat), and as parallel lists (text completions).

use mlxnode_compute::Sampled;
use mlxnode_text::Tokenizer;
use serde::{Serialize, Serializer};
use std::fmt::Write as _;

/// `choices[].logprobs` of chat completions.
#[derive(Clone, Debug, Default, Serialize)]
pub(in crate::http) struct ChatLogprobs {
    pub(in crate::http) content: Vec<TokenLogprob>,
    refusal: Option<()>,
}

impl ChatLogprobs {
    pub(in crate::http) fn new(content: Vec<TokenLogprob>) -> Self {
        Self { content, refusal: None }
    }
}

/// One token. `id` is mlx_lm.server's addition.
#[derive(Clone, Debug, Serialize)]
pub(in crate::http) struct TokenLogprob {
    #[serde(flatten)]
    chosen: Candidate,
    top_logprobs: Vec<Candidate>,
}

#[derive(Clone, Debug, Serialize)]
struct Candidate {
    id: u32,
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

/// A token's entry; none when it was not asked for.
pub(in crate::http) fn of_token(tokenizer: &Tokenizer, sampled: &Sampled) -> Option<TokenLogprob> {
    let candidate = |id: u32, logprob: f32| {
        let bytes = tokenizer.token_bytes(id).unwrap_or_default();
        Candidate { id, token: String::from_utf8_lossy(&bytes).into_owned(), logprob: finite(logprob), bytes }
    };
    let top = sampled.top.iter().map(|other| candidate(other.token, other.logprob)).collect();
    Some(TokenLogprob { chosen: candidate(sampled.token, sampled.logprob?), top_logprobs: top })
}

/// JSON has no infinities; OpenAI writes -9999 for what cannot happen.
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}

/// The likeliest tokens, best first. Written as the chosen one's number is, digit by digit: lm-evaluation-harness takes a token for the likeliest
/// one when both numbers are equal.
#[derive(Clone, Debug)]
struct Likeliest(Vec<(String, f32)>);

impl Serialize for Likeliest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // Of two tokens with the same text the likelier one counts.
        let first = |(place, (text, _)): &(usize, &(String, f32))| {
            self.0.iter().take(*place).all(|(other, _)| other != text)
        };
        let kept = self.0.iter().enumerate().filter(first);
        serializer.collect_map(kept.map(|(_, (text, logprob))| (text, logprob)))
    }
}

/// `choices[].logprobs` of text completions.
#[derive(Clone, Debug, Default, Serialize)]
pub(in crate::http) struct TextLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<Likeliest>>,
    text_offset: Vec<usize>,
}

impl TextLogprobs {
    /// Adds a token that begins `offset` characters into the text; the next one begins at the number returned.
    pub(in crate::http) fn push(&mut self, tokenizer: &Tokenizer, sampled: &Sampled, offset: usize) -> usize {
        let bytes = tokenizer.token_bytes(sampled.token).unwrap_or_default();
        let characters = String::from_utf8_lossy(&bytes).chars().count();
        self.tokens.push(written(&bytes));
        self.token_logprobs.push(sampled.logprob.map(finite));
        self.top_logprobs.push(sampled.logprob.map(|_| {
            let named = |token: u32| written(&tokenizer.token_bytes(token).unwrap_or_default());
            Likeliest(sampled.top.iter().map(|other| (named(other.token), finite(other.logprob))).collect())
        }));
        self.text_offset.push(offset);
        offset + characters
    }

    /// Adds what came later.
    pub(in crate::http) fn append(&mut self, mut more: Self) {
        self.tokens.append(&mut more.tokens);
        self.token_logprobs.append(&mut more.token_logprobs);
        self.top_logprobs.append(&mut more.top_logprobs);
        self.text_offset.append(&mut more.text_offset);
    }

    pub(in crate::http) fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}

/// A token in a list of texts: part of a character is written by its bytes, as OpenAI does, so that two such tokens stay two.
fn written(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |mut text, byte| {
            let _ = write!(text, "\\x{byte:02x}");
            text
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chosen_one_and_the_likeliest_are_written_alike() {
        let value = -0.002_723_693_8_f32;
        let scores = TextLogprobs {
            tokens: vec!["a".into()],
            token_logprobs: vec![Some(value)],
            top_logprobs: vec![Some(Likeliest(vec![
                ("a".into(), value),
                ("b".into(), -7.0),
                ("a".into(), -9.0),
            ]))],
            text_offset: vec![0],
        };
        let text = serde_json::to_string(&scores).unwrap();
        let number =
            text.split("\"token_logprobs\":[").nth(1).and_then(|rest| rest.split(']').next()).unwrap();
        assert!(text.contains(&format!("\"top_logprobs\":[{{\"a\":{number},\"b\":-7.0}}]")), "{text}");
    }
}
