//! Ends a text at the first of some strings, without ever showing a part of one.

use crate::TextError;

const MAX_STRINGS: usize = 16;
const MAX_BYTES: usize = 256;

/// Watches a stream of text for stop strings.
///
/// What may be the beginning of a stop string is held back until it is certain. The string that ends first wins; if
/// two end together, the longer one. The result does not depend on how the text is cut into pieces.
#[derive(Clone, Debug)]
pub struct StopStrings {
    strings: Vec<String>,
    held: String,
    stopped: bool,
    /// Which of the strings ended the text.
    found: Option<usize>,
}

/// What a piece of text led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopStep {
    /// Text to give out now; never holds a stop string.
    pub text: String,
    /// A stop string was found: nothing more will come.
    pub stopped: bool,
}

impl StopStrings {
    /// At most 16 strings of 1 to 256 bytes; none is fine.
    pub fn new(strings: Vec<String>) -> Result<Self, TextError> {
        let refuse = |reason: String| Err(TextError::StopString { reason });
        if strings.len() > MAX_STRINGS {
            return refuse(format!(
                "{} stop strings were given, but at most {MAX_STRINGS} are allowed",
                strings.len()
            ));
        }
        for string in &strings {
            if string.is_empty() {
                return refuse("a stop string is empty; leave it out".to_owned());
            }
            if string.len() > MAX_BYTES {
                return refuse(format!(
                    "a stop string has {} bytes, but at most {MAX_BYTES} are allowed",
                    string.len()
                ));
            }
        }
        Ok(Self { strings, held: String::new(), stopped: false, found: None })
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, text: &str) -> StopStep {
        if self.stopped {
            return StopStep { text: String::new(), stopped: true };
        }
        self.held.push_str(text);
        if let Some((start, found)) = self.first_match() {
            self.stopped = true;
            self.found = Some(found);
            let mut text = std::mem::take(&mut self.held);
            text.truncate(start);
            return StopStep { text, stopped: true };
        }
        let rest = self.held.split_off(self.certain());
        StopStep { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// The text is over: gives out what was held back.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// The string that ended the text, once one has.
    pub fn found(&self) -> Option<&str> {
        self.found.and_then(|index| self.strings.get(index)).map(String::as_str)
    }

    /// Where the stop string that ends first begins, and which it is.
    fn first_match(&self) -> Option<(usize, usize)> {
        let matches = self.strings.iter().enumerate().filter_map(|(index, stop)| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start, index))
        });
        matches.min().map(|(_, start, index)| (start, index))
    }

    /// How many bytes at the start cannot be part of a stop string any more.
    fn certain(&self) -> usize {
        let longest = self.strings.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest.saturating_sub(1));
        let possible = (from..self.held.len()).filter(|&at| self.held.is_char_boundary(at));
        possible
            .into_iter()
            .find(|&at| self.strings.iter().any(|stop| stop.starts_with(&self.held[at..])))
            .unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::{prelude::*, test_runner::RngSeed};

    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut stop = StopStrings::new(stops.iter().map(ToString::to_string).collect()).unwrap();
        let mut text = String::new();
        for piece in pieces {
            let step = stop.push(piece);
            text.push_str(&step.text);
            if step.stopped {
                return (text, true);
            }
        }
        text.push_str(&stop.finish());
        (text, false)
    }

    #[test]
    fn ends_at_the_string_that_ends_first() {
        assert_eq!(run(&["</s>"], &["a<", "/", "s>b"]), ("a".into(), true));
        assert_eq!(run(&["abc", "b"], &["abc"]), ("a".into(), true));
        assert_eq!(run(&["abc", "bc"], &["abc"]), (String::new(), true));
        assert_eq!(run(&["</s>"], &["a</", "t"]), ("a</t".into(), false));
        assert_eq!(run(&[], &["a", "b"]), ("ab".into(), false));
        assert_eq!(run(&["é🦀"], &["né", "🦀x"]), ("n".into(), true));
    }

    #[test]
    fn says_what_is_wrong_with_a_stop_string() {
        let error = |strings: Vec<String>| StopStrings::new(strings).unwrap_err().to_string();
        assert_eq!(error(vec![String::new()]), "a stop string is empty; leave it out");
        assert_eq!(error(vec!["x".into(); 17]), "17 stop strings were given, but at most 16 are allowed");
        assert_eq!(error(vec!["x".repeat(257)]), "a stop string has 257 bytes, but at most 256 are allowed");
    }

    /// The rule, said in the plainest way: grow the text character by character until it ends with a stop string.
    fn by_definition(stops: &[String], text: &str) -> (String, bool) {
        for (at, character) in text.char_indices() {
            let seen = &text[..at + character.len_utf8()];
            if let Some(stop) =
                stops.iter().filter(|stop| seen.ends_with(stop.as_str())).max_by_key(|stop| stop.len())
            {
                return (seen[..seen.len() - stop.len()].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    proptest! {
        #![proptest_config(ProptestConfig { rng_seed: RngSeed::Fixed(1), failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn cutting_the_text_changes_nothing(
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            pieces in prop::collection::vec("[abcé]{0,5}", 0..12),
        ) {
            let stops_by_reference: Vec<&str> = stops.iter().map(String::as_str).collect();
            let pieces_by_reference: Vec<&str> = pieces.iter().map(String::as_str).collect();
            prop_assert_eq!(run(&stops_by_reference, &pieces_by_reference), by_definition(&stops, &pieces.concat()));
        }
    }
}
