//! Token ids to text, one token at a time.
//!
//! A token may hold half a character, and a space may belong to the token after it, so text comes out later than
//! tokens go in. Which rules apply follows from the shape of tokenizer.json's decoder, as in mlx-lm: byte-level BPE,
//! SentencePiece with or without the leading space, or for anything else repeated decoding of the current line.

mod bytes;
mod naive;

use bytes::Utf8Stream;
use naive::LineDecoder;
use serde_json::json;
use tokenizers::DecoderWrapper;

use crate::Tokenizer;

/// Which of the ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DecoderKind {
    /// GPT-2's alphabet of visible characters for bytes.
    ByteLevel,
    /// "▁" for spaces and `<0xNN>` for bytes.
    SentencePiece { trim: bool },
    /// Anything else.
    Naive,
}

/// mlx-lm compares the decoder with these shapes literally, so we do.
pub(crate) fn decoder_kind(decoder: Option<&DecoderWrapper>) -> DecoderKind {
    let Some(Ok(shape)) = decoder.map(serde_json::to_value) else { return DecoderKind::Naive };
    if shape.get("type").is_some_and(|kind| kind == "ByteLevel") {
        return DecoderKind::ByteLevel;
    }
    let spaces = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
    let (bytes, fuse) = (json!({"type": "ByteFallback"}), json!({"type": "Fuse"}));
    let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
    if shape == json!({"type": "Sequence", "decoders": [&spaces, &bytes, &fuse, strip]}) {
        DecoderKind::SentencePiece { trim: true }
    } else if shape == json!({"type": "Sequence", "decoders": [spaces, bytes, fuse]}) {
        DecoderKind::SentencePiece { trim: false }
    } else {
        DecoderKind::Naive
    }
}

/// Turns the tokens of one sequence into text as they come. Never fails: what is not text becomes U+FFFD.
#[derive(Debug)]
pub struct StreamingDetokenizer {
    tokenizer: Tokenizer,
    state: State,
}

#[derive(Debug)]
enum State {
    ByteLevel(Utf8Stream),
    SentencePiece { stream: Utf8Stream, trim: bool },
    Naive(LineDecoder),
}

impl StreamingDetokenizer {
    pub(crate) fn new(tokenizer: Tokenizer, kind: DecoderKind) -> Self {
        let state = match kind {
            DecoderKind::ByteLevel => State::ByteLevel(Utf8Stream::default()),
            DecoderKind::SentencePiece { trim } => {
                State::SentencePiece { stream: Utf8Stream::default(), trim }
            }
            DecoderKind::Naive => State::Naive(LineDecoder::default()),
        };
        Self { tokenizer, state }
    }

    /// Takes the next token; gives the text that is certain now, which may be none.
    pub fn push(&mut self, id: u32) -> String {
        match &mut self.state {
            State::ByteLevel(stream) => {
                // The model's vocabulary may be padded beyond the tokenizer's; mlx-lm shows such a token as "!".
                let token = self.tokenizer.id_to_token(id).unwrap_or_else(|| "!".to_owned());
                stream.push(&bytes::of_byte_level(&token));
                // A lone space waits for its neighbour: it may turn out to be the one at the very start.
                if token == bytes::BYTE_LEVEL_SPACE { String::new() } else { stream.take(true) }
            }
            State::SentencePiece { stream, trim } => {
                if let Some(token) = self.tokenizer.id_to_token(id) {
                    stream.push(&bytes::of_sentence_piece(&token));
                }
                let trim = *trim;
                stream.take_with(trim, |text| text.replace('▁', " "))
            }
            State::Naive(line) => line.push(&self.tokenizer, id),
        }
    }

    /// Ends the sequence and gives what was held back. The detokenizer is then as new.
    pub fn finish(&mut self) -> String {
        match &mut self.state {
            State::ByteLevel(stream) => stream.finish(true, |text| text),
            State::SentencePiece { stream, trim } => {
                let trim = *trim;
                stream.finish(trim, |text| text.replace('▁', " "))
            }
            State::Naive(line) => line.finish(&self.tokenizer),
        }
    }
}
