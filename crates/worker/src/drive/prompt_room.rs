//! How the tokens of prompts that a batch may have are divided among the prompts that wait.
//!
//! Short prompts go first, in the order in which they came, since they are over soon. Long ones have a part that is theirs whatever
//! the short ones would take, so that both always get on.

/// Tokens of prompts that a batch may have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PromptRoom {
    /// The batch never has more.
    whole: usize,
    /// Behind so many no further prompt joins.
    enough: usize,
    /// Of those, what is kept for long prompts.
    kept: usize,
}

impl PromptRoom {
    /// Room for `whole` tokens, where no further prompt joins behind `enough`. `has_short`, `has_long`: such prompts wait.
    pub(super) fn new(whole: usize, enough: usize, has_short: bool, has_long: bool) -> Self {
        if !(has_short && has_long) || whole == 0 {
            return Self { whole, enough: enough.min(whole), kept: 0 };
        }
        // With room for one token there still is one for each.
        let whole = whole.max(2);
        let enough = enough.clamp(2, whole);
        Self { whole, enough, kept: enough.div_ceil(2) }
    }

    /// What the next short prompt may take behind `taken` tokens of others.
    pub(super) fn for_short(&self, taken: usize) -> usize {
        let most = if taken == 0 { self.whole } else { self.enough };
        most.min(self.whole - self.kept).saturating_sub(taken)
    }

    /// What the next long prompt may take behind so many tokens of short ones and of other long ones.
    pub(super) fn for_long(&self, of_short: usize, of_long: usize) -> usize {
        let taken = of_short + of_long;
        if taken == 0 {
            return self.whole;
        }
        let joining = self.enough.saturating_sub(taken).max(self.kept.saturating_sub(of_long));
        joining.min(self.whole.saturating_sub(taken))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What prompts with so many tokens left get of a batch.
    fn divided(room: PromptRoom, short: &[usize], long: &[usize]) -> (Vec<usize>, Vec<usize>) {
        let (mut of_short, mut of_long) = (0, 0);
        let short = short.iter().map(|left| {
            let taken = room.for_short(of_short).min(*left);
            of_short += taken;
            taken
        });
        let short: Vec<usize> = short.collect();
        let long = long.iter().map(|left| {
            let taken = room.for_long(of_short, of_long).min(*left);
            of_long += taken;
            taken
        });
        let long = long.collect();
        (short, long)
    }

    #[test]
    fn both_kinds_get_on_whatever_the_room_and_it_is_never_exceeded() {
        for whole in 0..40 {
            for enough in 0..=whole {
                for (short, long) in [(&[5, 5, 90][..], &[500, 500][..]), (&[500], &[500]), (&[1], &[1])] {
                    let room = PromptRoom::new(whole, enough, true, true);
                    let (of_short, of_long) = divided(room, short, long);
                    let told = format!("{whole} {enough}: {of_short:?} {of_long:?}");
                    let all = of_short.iter().chain(&of_long).sum::<usize>();
                    assert!(all <= if whole == 1 { 2 } else { whole }, "{told}");
                    assert_eq!((of_short[0] > 0, of_long[0] > 0), (whole > 0, whole > 0), "{told}");
                }
            }
        }
    }

    #[test]
    fn what_one_kind_does_not_take_the_other_does() {
        let room = PromptRoom::new(20, 20, true, true);
        assert_eq!(divided(room, &[64], &[2000]), (vec![10], vec![10]));
        assert_eq!(divided(room, &[3, 4], &[2000]), (vec![3, 4], vec![13]));
        assert_eq!(divided(room, &[64, 64], &[6]), (vec![10, 0], vec![6]));
        let alone = PromptRoom::new(20, 20, true, false);
        assert_eq!(divided(alone, &[16, 64], &[]), (vec![16, 4], vec![]));
        // While nobody decodes one prompt may fill the batch, and few join.
        let calm = PromptRoom::new(512, 128, false, true);
        assert_eq!(divided(calm, &[], &[2000, 2000]), (vec![], vec![512, 0]));
        assert_eq!(divided(calm, &[], &[100, 2000]), (vec![], vec![100, 28]));
        let calm = PromptRoom::new(512, 128, true, true);
        assert_eq!(divided(calm, &[500], &[2000]), (vec![448], vec![64]));
        assert_eq!(divided(calm, &[30, 30], &[2000]), (vec![30, 30], vec![68]));
    }
}
