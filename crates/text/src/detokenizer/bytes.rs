//! Tokens as bytes, and bytes as a stream of UTF-8.

/// How byte-level BPE writes a token of one space.
pub(crate) const BYTE_LEVEL_SPACE: &str = "Ġ";

/// The bytes behind a token of a byte-level BPE.
///
/// GPT-2 gave each byte a visible character: printable Latin-1 stands for itself, the other 68 bytes are the characters
/// from U+0100 on, in order. A character outside of that alphabet (in added tokens) stands for its own UTF-8.
pub(crate) fn of_byte_level(token: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(token.len());
    for character in token.chars() {
        match byte_of(character) {
            Some(byte) => bytes.push(byte),
            None => bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    bytes
}

/// The bytes behind a SentencePiece token: `<0xNN>` is the byte NN.
pub(crate) fn of_sentence_piece(token: &str) -> Vec<u8> {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    let byte = digits
        .filter(|digits| digits.len() == 2 && !digits.starts_with('+'))
        .and_then(|digits| u8::from_str_radix(digits, 16).ok());
    byte.map_or_else(|| token.as_bytes().to_vec(), |byte| vec![byte])
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
pub(crate) struct Utf8Stream {
    pending: Vec<u8>,
    /// Some text came out: from then on a leading space is a real one.
    started: bool,
}

impl Utf8Stream {
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
    }

    /// What is complete, with U+FFFD for what can never be. `trim` drops one space at the start of the whole text.
    pub(crate) fn take(&mut self, trim: bool) -> String {
        self.take_with(trim, |text| text)
    }

    /// The same, with a last change to the text before its start is looked at.
    pub(crate) fn take_with(&mut self, trim: bool, change: impl Fn(String) -> String) -> String {
        let incomplete = incomplete_tail(&self.pending);
        if incomplete > 0 && self.pending.len() < LONGEST_WAIT {
            return String::new(); // whole pieces, as mlx-lm gives them
        }
        let rest = self.pending.split_off(self.pending.len() - incomplete);
        let complete = std::mem::replace(&mut self.pending, rest);
        self.emit(change(String::from_utf8_lossy(&complete).into_owned()), trim)
    }

    /// Everything that is left; the stream starts anew.
    pub(crate) fn finish(&mut self, trim: bool, change: impl Fn(String) -> String) -> String {
        let rest = std::mem::take(&mut self.pending);
        let text = self.emit(change(String::from_utf8_lossy(&rest).into_owned()), trim);
        self.started = false;
        text
    }

    fn emit(&mut self, mut text: String, trim: bool) -> String {
        // As in mlx-lm, several tokens of one space each at the start all go.
        if trim && !self.started && text.starts_with(' ') {
            text.remove(0);
        }
        self.started |= !text.is_empty();
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
        assert_eq!(of_byte_level("Ġa"), b" a");
        assert_eq!(of_byte_level("ĊĀ"), [b'\n', 0]);
        assert_eq!(of_byte_level("<｜end｜>"), "<｜end｜>".as_bytes());
    }

    #[test]
    fn only_well_formed_byte_tokens_are_bytes() {
        assert_eq!(of_sentence_piece("<0xE2>"), [0xE2]);
        for text in ["<0xE>", "<0xEEE>", "<0xZZ>", "<0x", "<0x+1>"] {
            assert_eq!(of_sentence_piece(text), text.as_bytes(), "{text}");
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
