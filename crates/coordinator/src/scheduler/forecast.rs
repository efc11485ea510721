//! How much KV memory the sequences that run will take, and what one token of it costs.
//!
//! Requests ask for far more tokens than they generate: a reservation of the whole keeps memory empty. So a request is admitted when what
//! it and all others will *probably* take fits at every moment to come, from the lengths of answers that were seen lately: the estimate
//! of Gong et al., "Past-Future Scheduler for LLM Serving under SLA Guarantees" (ASPLOS 2025). What is really held is counted
//! exactly; should the estimate turn out too low, a sequence gives its memory back and is computed again later (the machine's part).

use std::collections::VecDeque;

/// How many answers are remembered.
const REMEMBERED: usize = 512;
/// With fewer answers of at least the present length than that, nothing is known but what was asked for.
const ENOUGH: usize = 16;
/// So much of the remembered answers are no longer than the estimate. Too low an estimate costs a prompt, too high a one an idle place.
const QUANTILE: f64 = 0.8;
/// The device gets its memory in pieces of so many tokens of a sequence.
const PIECE: usize = 256;
/// Sequences that run side by side are padded to the longest of them, which is at most twice as long as the shortest or longer by this.
const PADDING: usize = 512;

/// What sequences take of the memory that was reserved for a number of whole contexts, in tokens of a whole context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Footprint {
    context_tokens: usize,
    /// What a sequence takes whatever its length: states, windows.
    fixed_tokens: usize,
}

impl Footprint {
    pub(super) fn new(context_tokens: usize, fixed_tokens: usize) -> Self {
        Self { context_tokens, fixed_tokens: fixed_tokens.min(context_tokens) }
    }

    /// Of a sequence with so many tokens; never more than a whole context, never less than of a shorter one.
    pub(super) fn of(&self, tokens: usize) -> usize {
        let padded = tokens.saturating_mul(2).max(tokens.saturating_add(PADDING));
        let pieces = padded.div_ceil(PIECE).saturating_mul(PIECE).min(self.context_tokens);
        let growing = self.context_tokens - self.fixed_tokens;
        self.fixed_tokens + (growing.saturating_mul(pieces)).div_ceil(self.context_tokens.max(1))
    }
}

/// A sequence, as far as its memory goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Growing {
    /// Tokens that it holds, or will with its prompt.
    pub(super) held: usize,
    /// Tokens that will probably come.
    pub(super) coming: usize,
}

/// The most that these sequences take at any moment to come, when each gets a token at a time and frees its memory at its end.
pub(super) fn peak(sequences: &mut [Growing], footprint: Footprint) -> usize {
    sequences.sort_unstable_by_key(|sequence| std::cmp::Reverse(sequence.coming));
    let mut most = 0;
    // It is highest when one is about to end: those that end later hold as many tokens more by then.
    for (place, ending) in sequences.iter().enumerate() {
        let there = &sequences[..=place];
        let held = there.iter().map(|sequence| footprint.of(sequence.held + ending.coming)).sum();
        most = most.max(held);
    }
    most
}

/// How long answers were lately.
#[derive(Clone, Debug, Default)]
pub(super) struct Lengths {
    recent: VecDeque<u32>,
    sorted: Vec<u32>,
}

impl Lengths {
    /// An answer ended by itself or at its limit, with so many tokens.
    pub(super) fn ended(&mut self, tokens: usize) {
        let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
        if self.recent.len() == REMEMBERED
            && let Some(oldest) = self.recent.pop_front()
            && let Ok(place) = self.sorted.binary_search(&oldest)
        {
            self.sorted.remove(place);
        }
        self.recent.push_back(tokens);
        let place = self.sorted.partition_point(|length| *length < tokens);
        self.sorted.insert(place, tokens);
    }

    /// How many tokens of at most `most` will probably come in all, when `there` are there already. At least one more than that.
    pub(super) fn forecast(&self, there: usize, most: usize) -> usize {
        let there_exactly = u32::try_from(there).unwrap_or(u32::MAX);
        let longer = &self.sorted[self.sorted.partition_point(|length| *length <= there_exactly)..];
        if longer.len() < ENOUGH {
            return most;
        }
        let place = ((longer.len() as f64 * QUANTILE) as usize).min(longer.len() - 1);
        (longer[place] as usize).clamp(there + 1, most.max(there + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_estimate_follows_what_was_seen_and_what_is_there_already() {
        let mut lengths = Lengths::default();
        assert_eq!(lengths.forecast(0, 1000), 1000, "nothing is known");
        for length in 1..=100 {
            lengths.ended(length);
        }
        assert_eq!(lengths.forecast(0, 1000), 81);
        assert_eq!(lengths.forecast(0, 50), 50);
        assert_eq!(lengths.forecast(60, 1000), 93, "four fifths of those above 60");
        assert_eq!(lengths.forecast(95, 1000), 1000, "too few were that long");
        for _ in 0..REMEMBERED {
            lengths.ended(7);
        }
        assert_eq!(lengths.forecast(0, 1000), 7, "what is long ago does not count");
        assert_eq!((lengths.recent.len(), lengths.sorted.len()), (REMEMBERED, REMEMBERED));
    }

    #[test]
    fn a_short_sequence_takes_pieces_and_padding_and_a_long_one_a_context() {
        let plain = Footprint::new(4096, 0);
        assert_eq!(
            [1, 400, 1000, 2048, 4096, 9999].map(|tokens| plain.of(tokens)),
            [768, 1024, 2048, 4096, 4096, 4096]
        );
        let states_only = Footprint::new(4096, 4096);
        assert_eq!([1, 4096].map(|tokens| states_only.of(tokens)), [4096, 4096]);
        let half = Footprint::new(4096, 2048);
        assert_eq!([1, 4096].map(|tokens| half.of(tokens)), [2048 + 384, 4096]);
    }

    #[test]
    fn the_peak_is_where_one_is_about_to_end() {
        let footprint = Footprint::new(1 << 30, 0);
        let of = |held, coming| Growing { held, coming };
        assert_eq!(peak(&mut [], footprint), 0);
        // The long one alone at its end, or both at the short one's.
        let both = footprint.of(2000) + footprint.of(11_000);
        assert_eq!(peak(&mut [of(1000, 1000), of(10_000, 1000)], footprint), both);
        assert_eq!(peak(&mut [of(1000, 100_000), of(10_000, 10)], footprint), footprint.of(101_000));
    }

    proptest! {
        /// By the token: nothing is ever above what was foretold.
        #[test]
        fn no_moment_is_above_the_peak(
            sequences in proptest::collection::vec((1usize..2000, 0usize..600), 0..12),
            fixed in 0usize..1500,
        ) {
            let footprint = Footprint::new(1500, fixed);
            let mut growing: Vec<Growing> =
                sequences.iter().map(|(held, coming)| Growing { held: *held, coming: *coming }).collect();
            let foretold = peak(&mut growing, footprint);
            let mut most = 0;
            for moment in 0..600 {
                let there = sequences.iter().filter(|(_, coming)| *coming >= moment);
                most = most.max(there.map(|(held, _)| footprint.of(held + moment)).sum());
            }
            prop_assert_eq!(foretold, most);
        }
    }
}
