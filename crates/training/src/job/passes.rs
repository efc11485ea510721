//! In which order a stage takes the micro-batches of an update: one forward, one backward (PipeDream-Flush, Narayanan et al. 2021, "Memory-Efficient
//! Pipeline-Parallel DNN Training"; the schedule 1F1B of Megatron-LM).
//!
//! ```text
//! stage 0   F1 F2 F3 B1 F4 B2 B3 B4
//! stage 1      F1 F2 B1 F3 B2 F4 B3 B4
//! stage 2         F1 B1 F2 B2 F3 B3 F4 B4
//! ```
//! A stage has at most as many micro-batches on their way as there are stages from it on, whatever their number in all.

/// What a stage does with a micro-batch, numbered from 0 in its update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    Forward(u64),
    Backward(u64),
}

/// All passes of stage `stage` of `stages` for so many micro-batches.
pub(super) fn passes(stage: usize, stages: usize, micro_batches: u64) -> impl Iterator<Item = Pass> {
    let ahead = (stages.saturating_sub(1).saturating_sub(stage) as u64).min(micro_batches);
    let first = (0..ahead).map(Pass::Forward);
    let steady =
        (0..micro_batches - ahead).flat_map(move |done| [Pass::Forward(done + ahead), Pass::Backward(done)]);
    let last = (micro_batches - ahead..micro_batches).map(Pass::Backward);
    first.chain(steady).chain(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    #[test]
    fn every_micro_batch_goes_there_and_back_and_few_are_on_their_way() {
        for (stages, micro_batches) in (1..7).flat_map(|stages| (0..12).map(move |count| (stages, count))) {
            for stage in 0..stages {
                let (mut forward, mut backward) = (0, 0);
                for pass in passes(stage, stages, micro_batches) {
                    match pass {
                        Pass::Forward(number) => {
                            assert_eq!(number, forward, "in order");
                            forward += 1;
                        }
                        Pass::Backward(number) => {
                            assert_eq!(number, backward, "in order");
                            assert!(number < forward, "back after there");
                            backward += 1;
                        }
                    }
                    assert!(forward - backward <= (stages - stage) as u64, "{stage} of {stages}");
                }
                assert_eq!((forward, backward), (micro_batches, micro_batches));
            }
        }
        let second: Vec<Pass> = passes(1, 3, 4).collect();
        use Pass::{Backward as B, Forward as F};
        assert_eq!(second, [F(0), F(1), B(0), F(2), B(1), F(3), B(2), B(3)]);
    }

    /// All stages at once, with queues that take `room` hand-overs between neighbours in each direction: does it come to its end?
    fn ends(stages: usize, micro_batches: u64, room: usize) -> bool {
        let mut left: Vec<VecDeque<Pass>> =
            (0..stages).map(|stage| passes(stage, stages, micro_batches).collect()).collect();
        // Behind each stage: what waits for the next one, and what waits for itself.
        let (mut down, mut up) = (vec![0_usize; stages], vec![0_usize; stages]);
        // Computed, but there was no room for it.
        let mut held: Vec<Option<Pass>> = vec![None; stages];
        loop {
            let mut moved = false;
            for stage in 0..stages {
                if let Some(pass) = held[stage] {
                    let queue = match pass {
                        Pass::Forward(_) => &mut down[stage],
                        Pass::Backward(_) => &mut up[stage - 1],
                    };
                    if *queue == room {
                        continue;
                    }
                    *queue += 1;
                    held[stage] = None;
                    moved = true;
                }
                let Some(pass) = left[stage].front().copied() else { continue };
                let (is_first, is_last) = (stage == 0, stage + 1 == stages);
                let from = match pass {
                    Pass::Forward(_) if !is_first => Some(&mut down[stage - 1]),
                    Pass::Backward(_) if !is_last => Some(&mut up[stage]),
                    _ => None,
                };
                match from {
                    Some(0) => continue,
                    Some(queue) => *queue -= 1,
                    None => {}
                }
                left[stage].pop_front();
                let goes_on = match pass {
                    Pass::Forward(_) => !is_last,
                    Pass::Backward(_) => !is_first,
                };
                held[stage] = goes_on.then_some(pass);
                moved = true;
            }
            if left.iter().all(VecDeque::is_empty) && held.iter().all(Option::is_none) {
                return true;
            }
            if !moved {
                return false;
            }
        }
    }

    #[test]
    fn with_room_for_one_micro_batch_nobody_waits_for_ever() {
        for (stages, micro_batches) in (1..9).flat_map(|stages| (0..20).map(move |count| (stages, count))) {
            assert!(ends(stages, micro_batches, 1), "{stages} stages, {micro_batches} micro-batches");
        }
        assert!(!ends(2, 2, 0), "without any room neighbours that both give wait for each other");
    }
}
