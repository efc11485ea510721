//! Who computes which micro-batches.

use mlxnode_compute::nodes_of;
use std::ops::Range;

/// Most members of a group: a direct exchange needs a stream between any two.
pub const MOST_MEMBERS: usize = 8;

/// Cuts the micro-batches of a step into one run per member, in the members' order.
///
/// No member gets more than one micro-batch more than another, since the slowest one decides. Among the ways to do that it is the one
/// with the fewest subtrees (every subtree of a member travels by itself), and among those the first.
pub fn deal(micro_batches: u32, members: usize) -> Vec<Range<u32>> {
    let members = members.clamp(1, MOST_MEMBERS);
    let each = micro_batches / members as u32;
    let larger = (micro_batches % members as u32) as usize;
    // At most C(8, 4) = 70 ways to choose those with one more: bit i stands for member i.
    let ways = (0_u32..1 << members).filter(|way| way.count_ones() as usize == larger);
    let runs_of = |way: u32| -> Vec<Range<u32>> {
        let mut start = 0;
        let lengths = (0..members).map(|member| each + (way >> member & 1));
        lengths
            .map(|length| {
                let run = start..start + length;
                start = run.end;
                run
            })
            .collect()
    };
    let subtrees =
        |way: &u32| -> usize { runs_of(*way).iter().map(|run| nodes_of(run, micro_batches).len()).sum() };
    ways.min_by_key(subtrees).map(runs_of).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE_RUN: [Range<u32>; 1] = [Range { start: 0, end: 2 }];

    #[test]
    fn runs_are_even_and_few_subtrees() {
        let cases: [(u32, usize, &[Range<u32>]); 6] = [
            (2, 1, &ONE_RUN),
            (8, 2, &[0..4, 4..8]),
            (8, 3, &[0..3, 3..6, 6..8]),
            (6, 2, &[0..3, 3..6]),
            (2, 3, &[0..1, 1..2, 2..2]),
            (0, 2, &[0..0, 0..0]),
        ];
        for (micro_batches, members, runs) in cases {
            assert_eq!(deal(micro_batches, members), runs, "{micro_batches} among {members}");
        }
    }

    #[test]
    fn every_micro_batch_is_dealt_once() {
        for micro_batches in 0..40 {
            for members in 1..=MOST_MEMBERS {
                let runs = deal(micro_batches, members);
                assert_eq!(runs.len(), members);
                assert_eq!(
                    runs.iter().flat_map(Clone::clone).collect::<Vec<_>>(),
                    (0..micro_batches).collect::<Vec<_>>()
                );
                let longest = runs.iter().map(ExactSizeIterator::len).max().unwrap_or_default();
                assert!(runs.iter().all(|run| run.len() + 1 >= longest));
            }
        }
    }
}
