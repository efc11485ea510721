//! Token ids to text, one token at a time.
//!
//! A token may hold half a character, and a space may belong to the token after it, so text comes out later than
//! tokens go in. Which rules apply follows from the shape of tokenizer.json's decoder, as in mlx-lm: byte-level BPE,
//! SentencePiece with or without the leading space, or for anything else repeated decoding of the current line.
//!
//! The pieces together are what decoding all tokens at once gives, for every sequence of tokens; with two exceptions that
//! mlx-lm makes for byte-level BPE: one space at the very start is dropped, and a token beyond the vocabulary shows as "!".

mod bytes;
mod naive;
mod newline;
mod pieces;

use bytes::Utf8Stream;
pub(crate) use bytes::{byte_token, of_byte_level, visible_byte};
use naive::LineDecoder;
use newline::MarkStream;
pub(crate) use newline::{marked, unmarked};
use pieces::PieceStream;
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
    /// Where line breaks are written as marks.
    marks: Option<MarkStream>,
}

#[derive(Debug)]
enum State {
    ByteLevel(Utf8Stream),
    SentencePiece(PieceStream),
    Naive(LineDecoder),
}

impl StreamingDetokenizer {
    pub(crate) fn new(tokenizer: Tokenizer, kind: DecoderKind, newline_marks: bool) -> Self {
        let state = match kind {
            DecoderKind::ByteLevel => State::ByteLevel(Utf8Stream::default()),
            DecoderKind::SentencePiece { trim } => State::SentencePiece(PieceStream::new(trim)),
            DecoderKind::Naive => State::Naive(LineDecoder::default()),
        };
        Self { tokenizer, state, marks: newline_marks.then(MarkStream::default) }
    }

    /// Takes the next token; gives the text that is certain now, which may be none.
    pub fn push(&mut self, id: u32) -> String {
        let text = match &mut self.state {
            State::ByteLevel(stream) => {
                // The model's vocabulary may be padded beyond the tokenizer's; mlx-lm shows such a token as "!".
                let token = self.tokenizer.id_to_token(id).unwrap_or_else(|| "!".to_owned());
                stream.push(&bytes::of_byte_level(&token));
                // A lone space waits for its neighbour: it may turn out to be the one at the very start.
                if token == bytes::BYTE_LEVEL_SPACE { String::new() } else { stream.take() }
            }
            State::SentencePiece(stream) => match self.tokenizer.id_to_token(id) {
                Some(token) => stream.push(&token),
                None => String::new(),
            },
            State::Naive(line) => line.push(&self.tokenizer, id),
        };
        match &mut self.marks {
            Some(marks) => marks.push(&text),
            None => text,
        }
    }

    /// Ends the sequence and gives what was held back. The detokenizer is then as new.
    pub fn finish(&mut self) -> String {
        let text = match &mut self.state {
            State::ByteLevel(stream) => stream.finish(),
            State::SentencePiece(stream) => stream.finish(),
            State::Naive(line) => line.finish(&self.tokenizer),
        };
        match &mut self.marks {
            Some(marks) => marks.finish(&text),
            None => text,
        }
    }
}
