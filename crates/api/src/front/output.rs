//! From sampled tokens to the text that a client sees: detokenized piece by piece, cut at stop strings.

use crate::front::ModelText;
use mlxnode_compute::{Sampled, SequenceEnd};
use mlxnode_text::{AnswerParser, Delta, StopStrings, StreamingDetokenizer, TextError};

/// A piece of an answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Piece {
    /// New text; may be empty.
    pub text: String,
    /// The tokens behind it.
    pub tokens: Vec<Sampled>,
    /// What the text means, when the request asked to tell that; otherwise empty.
    pub deltas: Vec<Delta>,
    /// Set in the last piece.
    pub end: Option<End>,
    /// The stop string that ended the answer, if one did; likewise.
    pub stopped_by: Option<String>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// A stop token or a stop string.
    Stop,
    /// No tokens left to generate.
    Length,
}

/// The state of one answer's text.
pub struct Output {
    detokenizer: StreamingDetokenizer,
    stops: StopStrings,
    reader: Option<AnswerParser>,
}

impl Output {
    /// The text of an answer by this model's tokenizer that ends at any of `stop`. `reader` tells what it means.
    ///
    /// # Errors
    /// When there are too many stop strings, or one is too long.
    pub fn new(text: &ModelText, stop: Vec<String>, reader: Option<AnswerParser>) -> Result<Self, TextError> {
        Ok(Self { detokenizer: text.tokenizer.detokenizer(), stops: StopStrings::new(stop)?, reader })
    }

    /// Takes one token. `end` is what the model's last stage said about it; a stop token has no text of its own.
    pub fn push(&mut self, sampled: Sampled, end: Option<SequenceEnd>) -> Piece {
        let mut text = String::new();
        let mut stopped = false;
        if end != Some(SequenceEnd::Stop) {
            let step = self.stops.push(&self.detokenizer.push(sampled.token));
            text = step.text;
            stopped = step.stopped;
        }
        let end = match end {
            _ if stopped => Some(End::Stop),
            None => None,
            Some(end) => {
                // What the detokenizer and the stop strings still hold back belongs to the answer now.
                let rest = self.stops.push(&self.detokenizer.finish());
                text.push_str(&rest.text);
                if !rest.stopped {
                    text.push_str(&self.stops.finish());
                }
                let by_length = end == SequenceEnd::Length && !rest.stopped;
                Some(if by_length { End::Length } else { End::Stop })
            }
        };
        let mut deltas = self.reader.as_mut().map_or_else(Vec::new, |reader| reader.push(&text));
        if end.is_some()
            && let Some(reader) = self.reader.take()
        {
            deltas.extend(reader.finish());
        }
        let stopped_by = end.and_then(|_| self.stops.found()).map(str::to_owned);
        Piece { text, tokens: vec![sampled], deltas, end, stopped_by }
    }
}
