//! The detokenizer for decoders without a known shape: decodes the current line again with every token.
//!
//! Such a decoder may treat the first token unlike the others (a space less), so a new line keeps a token of the line before
//! as its context, and only what comes behind that is new. mlx-lm forgets the line before, and with it a space.

use super::bytes::byte_token;
use crate::Tokenizer;

/// Tokens of one line at most, where it can be cut. Each token decodes its line again, so a line without end would make
/// every token dearer than the one before.
const LONG_LINE: usize = 64;
/// So many tokens are tried as context.
const MOST_CONTEXT: usize = 4;

/// The current line: its tokens, and the text that they have already given.
#[derive(Debug, Default)]
pub(super) struct LineDecoder {
    tokens: Vec<u32>,
    given: String,
}

impl LineDecoder {
    pub(super) fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        let Some(token) = tokenizer.id_to_token(id) else { return String::new() };
        self.tokens.push(id);
        if byte_token(&token).is_some() {
            return String::new(); // the next byte may make this one part of a character, or of none
        }
        let text = decode(tokenizer, &self.tokens);
        let certain = certain(&text, tokenizer.drops_spaces());
        let Some(fresh) = certain.strip_prefix(self.given.as_str()).map(str::to_owned) else {
            return String::new();
        };
        if certain.len() == text.len() && self.line_ends(&text) {
            self.start_line(tokenizer, &text);
        } else {
            self.given.push_str(&fresh);
        }
        fresh
    }

    pub(super) fn finish(&mut self, tokenizer: &Tokenizer) -> String {
        let line = std::mem::take(self);
        let text = decode(tokenizer, &line.tokens);
        match text.strip_prefix(line.given.as_str()) {
            Some(rest) => rest.to_owned(),
            // A decoder that takes back what it said; what can be kept is the rest by count.
            None => text.chars().skip(line.given.chars().count()).collect(),
        }
    }

    fn line_ends(&self, text: &str) -> bool {
        text.ends_with('\n') || (self.tokens.len() >= LONG_LINE && text.ends_with(char::is_alphanumeric))
    }

    /// Keeps the last tokens of the line, if they mean the same without the others.
    fn start_line(&mut self, tokenizer: &Tokenizer, text: &str) {
        for count in 1..=MOST_CONTEXT.min(self.tokens.len()) {
            let context = self.tokens[self.tokens.len() - count..].to_vec();
            let given = decode(tokenizer, &context);
            if !given.is_empty() && text.ends_with(&given) {
                *self = Self { tokens: context, given };
                return;
            }
        }
        self.given = text.to_owned();
    }
}

fn decode(tokenizer: &Tokenizer, tokens: &[u32]) -> String {
    tokenizer.decode_marked(tokens, false).unwrap_or_default()
}

/// The part of a text that later tokens leave as it is.
fn certain(text: &str, drops_spaces: bool) -> &str {
    let whole = text.trim_end_matches('\u{FFFD}');
    if !drops_spaces {
        return whole;
    }
    // What tidying may still change begins with a space and is written with the letters of " n't", " 've" and the like.
    let head = whole.trim_end_matches([' ', '\'', 'n', 't', 'm', 's', 'v', 'r', 'e']);
    match whole[head.len()..].find(' ') {
        Some(space) => &whole[..head.len() + space],
        None => whole,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_change_is_held_back() {
        let cases = [
            ("abc", "abc"),
            ("ab ", "ab"),
            ("do n'", "do"),
            ("do not", "do not"),
            ("do ten", "do"),
            ("do nox", "do nox"),
            ("it is\u{FFFD}\u{FFFD}", "it is"),
            ("tree", "tree"),
        ];
        for (text, expected) in cases {
            let held = certain(text, text.contains("do") || text.contains("ab"));
            assert_eq!(held, expected, "{text:?}");
        }
    }
}
