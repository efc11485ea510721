//! Tokens as bytes, and bytes as a stream of UTF-8.

/// How byte-level BPE writes a token of one space.
pub(super) const BYTE_LEVEL_SPACE: &str = "Ġ";

/// The bytes behind a token of a byte-level BPE.
///
/// GPT-2 gave each byte a visible character: printable Latin-1 stands for itself, the other 68 bytes are the characters
/// from U+0100 on, in order. A token with a character outside of that alphabet (an added one) stands for its own UTF-8.
pub(crate) fn of_byte_level(token: &str) -> Vec<u8> {
    token.chars().map(byte_of).collect::<Option<Vec<u8>>>().unwrap_or_else(|| token.as_bytes().to_vec())
}

/// The visible character that a byte has in that alphabet.
pub(crate) fn visible_byte(byte: u8) -> char {
    let code = u32::from(byte);
    let code = match byte {
        0..=0x20 => code + 0x100,
        0x7F..=0xA0 => code - 0x7F + 0x121,
        0xAD => 0x143,
        _ => code,
    };
    char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// The byte NN that the token `<0xNN>` of a SentencePiece vocabulary stands for, by the rules of the tokenizers library.
pub(crate) fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    u8::from_str_radix(digits, 16).ok().filter(|_| digits.len() == 2)
}

fn byte_of(character: char) -> Option<u8> {
    let code = u32::from(character);
    match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => u8::try_from(code).ok(),
        // The bytes without a printable character: 0 to 0x20, 0x7F to 0xA0, 0xAD.
        0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        0x121..=0x142 => u8::try_from(code - 0x121 + 0x7F).ok(),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// A character that is never completed does not hold back the text before it for ever.
const LONGEST_WAIT: usize = 64;

/// Bytes in, text out, as soon as it is complete. Holds little more than the start of one character.
#[derive(Debug, Default)]
pub(super) struct Utf8Stream {
    pending: Vec<u8>,
    /// Some text came out: from then on a leading space is a real one.
    started: bool,
}

impl Utf8Stream {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
    }

    /// What is complete, with U+FFFD for what can never be, without one space at the start of the whole text.
    pub(super) fn take(&mut self) -> String {
        let incomplete = incomplete_tail(&self.pending);
        if incomplete > 0 && self.pending.len() < LONGEST_WAIT {
            return String::new(); // whole pieces, as mlx-lm gives them
        }
        let rest = self.pending.split_off(self.pending.len() - incomplete);
        let complete = std::mem::replace(&mut self.pending, rest);
        self.emit(&complete)
    }

    /// Everything that is left; the stream starts anew.
    pub(super) fn finish(&mut self) -> String {
        let rest = std::mem::take(&mut self.pending);
        let text = self.emit(&rest);
        self.started = false;
        text
    }

    fn emit(&mut self, bytes: &[u8]) -> String {
        let mut text = String::from_utf8_lossy(bytes).into_owned();
        let first = !self.started && !text.is_empty();
        if first && text.starts_with(' ') {
            text.remove(0);
        }
        self.started |= first;
        text
    }
}

/// How many bytes at the end (0 to 3) begin a character that may still be completed.
fn incomplete_tail(bytes: &[u8]) -> usize {
    let mut rest = bytes;
    loop {
        match std::str::from_utf8(rest) {
            Ok(_) => return 0,
            Err(error) => match error.error_len() {
                None => return rest.len() - error.valid_up_to(),
                Some(length) => rest = &rest[error.valid_up_to() + length..],
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_covers_every_byte_once() {
        let mut seen = [0; 256];
        for character in (0..0x300).filter_map(char::from_u32) {
            if let Some(byte) = byte_of(character) {
                seen[usize::from(byte)] += 1;
            }
        }
        assert_eq!(seen, [1; 256]);
        for byte in 0..=u8::MAX {
            assert_eq!(byte_of(visible_byte(byte)), Some(byte));
        }
        assert_eq!(of_byte_level("Ġa"), b" a");
        assert_eq!(of_byte_level("ĊĀ"), [b'\n', 0]);
        assert_eq!(of_byte_level("<｜end｜>"), "<｜end｜>".as_bytes());
        assert_eq!(of_byte_level("é｜"), "é｜".as_bytes());
    }

    #[test]
    fn only_well_formed_byte_tokens_are_bytes() {
        assert_eq!(byte_token("<0xE2>"), Some(0xE2));
        assert_eq!(byte_token("<0xe2>"), Some(0xE2));
        for text in ["<0xE>", "<0xEEE>", "<0xZZ>", "<0x", "<0xé>", "0xE2", ""] {
            assert_eq!(byte_token(text), None, "{text}");
        }
    }

    #[test]
    fn holds_only_what_may_still_become_a_character() {
        assert_eq!(incomplete_tail("aé".as_bytes()), 0);
        assert_eq!(incomplete_tail(&"aé".as_bytes()[..2]), 1);
        assert_eq!(incomplete_tail(b"\xF0\x9F\x98"), 3);
        assert_eq!(incomplete_tail(b"\xFF\xFF"), 0);
        assert_eq!(incomplete_tail(b"\xF0\x9F\xFF\xC3"), 1);
    }
}
