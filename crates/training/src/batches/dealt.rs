//! Our order of rows: rows of like length share a block, and blocks are dealt by (seed, epoch).
//!
//! Rows are brought into classes of the lengths that they are filled up to, so that within a class any block costs the same; within a
//! class they are mixed anew in every epoch. All of it follows from seed, epoch and the rows' lengths: a run's place in its data is one
//! number, and any worker can say which rows any batch has. Every row is in every epoch once; the last block may have fewer.

use super::micro_batch::{Block, PAD_TO};
use std::collections::BTreeMap;

/// What the order follows from.
pub(super) struct Dealer {
    seed: u32,
    batch_size: usize,
    /// Of each row, in tokens.
    lengths: Vec<u32>,
    /// What short rows are put together up to, if they are.
    packed_to: Option<u32>,
    /// The last epoch that was asked for.
    epoch: Option<(u64, Vec<Block>)>,
    /// Where the epochs begin that were dealt so far, and the one behind them. Packing makes another number of blocks in each.
    begins: Vec<u64>,
    #[cfg(test)]
    dealt: usize,
}

impl Dealer {
    pub(super) fn new(seed: u32, batch_size: usize, lengths: Vec<u32>, packed_to: Option<u32>) -> Self {
        Self {
            seed,
            batch_size: batch_size.max(1),
            lengths,
            packed_to,
            epoch: None,
            begins: vec![0],
            #[cfg(test)]
            dealt: 0,
        }
    }

    /// The block at a place of an endless run through the data, from 0 on.
    pub(super) fn block(&mut self, place: u64) -> Block {
        if self.lengths.is_empty() {
            return Block::new();
        }
        let (epoch, place) = match self.packed_to {
            None => {
                let blocks = self.lengths.len().div_ceil(self.batch_size) as u64;
                (place / blocks, place % blocks)
            }
            Some(_) => {
                let epoch = self.epoch_of(place);
                (epoch as u64, place - self.begins[epoch])
            }
        };
        let blocks = self.blocks(epoch);
        usize::try_from(place).ok().and_then(|place| blocks.get(place)).cloned().unwrap_or_default()
    }

    /// The epoch that a place is in; those before it are dealt once, to be counted.
    fn epoch_of(&mut self, place: u64) -> usize {
        loop {
            let (known, end) = (self.begins.len() - 1, self.begins.last().copied().unwrap_or_default());
            if place < end {
                return self.begins.partition_point(|begin| *begin <= place) - 1;
            }
            // There are rows, so every epoch has a block, and the end moves.
            let blocks = self.blocks(known as u64).len() as u64;
            self.begins.push(end + blocks.max(1));
        }
    }

    /// All blocks of an epoch, in order.
    pub(super) fn blocks(&mut self, epoch: u64) -> &[Block] {
        let is_there = self.epoch.as_ref().is_some_and(|(known, _)| *known == epoch);
        if !is_there {
            let dealt = self.deal(epoch);
            #[cfg(test)]
            {
                self.dealt += 1;
            }
            self.epoch = Some((epoch, dealt));
        }
        self.epoch.as_ref().map_or(&[], |(_, blocks)| blocks)
    }

    fn deal(&self, epoch: u64) -> Vec<Block> {
        let key = mixed(mixed(u64::from(self.seed)) ^ epoch);
        let mut rows: Vec<u32> = (0..self.lengths.len() as u32).collect();
        let class = |row: u32| self.lengths[row as usize].div_ceil(PAD_TO as u32);
        rows.sort_by_cached_key(|row| (class(*row), mixed(key ^ u64::from(*row)), *row));
        let groups = match self.packed_to {
            Some(room) => self.packed(&rows, room),
            None => rows.into_iter().map(|row| vec![row]).collect(),
        };
        let blocks = groups.chunks(self.batch_size).map(<[_]>::to_vec);
        let other = mixed(!key);
        let mut keyed: Vec<_> =
            blocks.enumerate().map(|(place, block)| (mixed(other ^ place as u64), block)).collect();
        keyed.sort_by_key(|(order, _)| *order);
        keyed.into_iter().map(|(_, block)| block).collect()
    }

    /// Rows put together in groups of at most `room` tokens: the longest first, each where it leaves the least room (best fit
    /// decreasing, at most 11/9 of the fewest groups: Johnson et al. 1974).
    fn packed(&self, rows: &[u32], room: u32) -> Vec<Vec<u32>> {
        let mut groups: Vec<Vec<u32>> = Vec::new();
        let mut by_room: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        for row in rows.iter().rev() {
            let length = self.lengths[*row as usize].max(1);
            let fitting = by_room.range(length..).next().map(|(room, _)| *room);
            let (group, left) = match fitting {
                Some(space) => {
                    let open = by_room.get_mut(&space);
                    let group = open.and_then(Vec::pop).unwrap_or(groups.len());
                    if by_room.get(&space).is_some_and(Vec::is_empty) {
                        by_room.remove(&space);
                    }
                    (group, space - length)
                }
                None => (groups.len(), room.saturating_sub(length)),
            };
            if group == groups.len() {
                groups.push(Vec::new());
            }
            groups[group].push(*row);
            if left > 0 {
                by_room.entry(left).or_default().push(group);
            }
        }
        groups
    }
}

/// A number that looks like chance: the last step of SplitMix64 (Steele et al. 2014).
fn mixed(number: u64) -> u64 {
    let number = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    number ^ (number >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(count: u32) -> Vec<u32> {
        (0..count).map(|row| 1 + (mixed(u64::from(row)) % 200) as u32).collect()
    }

    #[test]
    fn every_row_is_in_every_epoch_once() {
        for (rows, batch_size, packed_to) in
            [(1, 4, None), (10, 4, None), (103, 8, None), (103, 4, Some(256))]
        {
            let mut dealer = Dealer::new(5, batch_size, lengths(rows), packed_to);
            let mut place = 0;
            let mut epochs = Vec::new();
            for epoch in 0..3 {
                let blocks = dealer.blocks(epoch).to_vec();
                let mut seen = Vec::new();
                for block in &blocks {
                    assert!((1..=batch_size).contains(&block.len()));
                    assert_eq!(&dealer.block(place), block);
                    place += 1;
                    seen.extend(block.iter().flatten().copied());
                }
                seen.sort_unstable();
                assert!(seen.into_iter().eq(0..rows), "{rows} rows, epoch {epoch}");
                epochs.push(blocks);
            }
            assert!(rows == 1 || epochs[0] != epochs[1], "epochs have orders of their own");
        }
    }

    #[test]
    fn an_epoch_is_dealt_once_on_the_way_through_it() {
        let dealer = || Dealer::new(5, 4, lengths(103), Some(256));
        let mut through = dealer();
        let all: Vec<_> = (0..200).map(|place| through.block(place)).collect();
        let epochs = through.begins.len() - 1;
        assert!(epochs > 5 && through.dealt == epochs, "{} deals of {epochs} epochs", through.dealt);
        // Somewhere in the middle, forth and back.
        let mut resumed = dealer();
        for place in [150, 151, 3, 199, 0] {
            assert_eq!(resumed.block(place), all[place as usize], "{place}");
        }
    }

    #[test]
    fn blocks_hold_rows_of_like_length() {
        let lengths = lengths(1000);
        let mut dealer = Dealer::new(0, 10, lengths.clone(), None);
        let wasted: u32 = dealer
            .blocks(0)
            .iter()
            .map(|block| {
                let of = |group: &Vec<u32>| lengths[group[0] as usize].div_ceil(32);
                let most = block.iter().map(of).max().unwrap_or(0);
                block.iter().map(|group| most - of(group)).sum::<u32>()
            })
            .sum();
        // At most one block in each of the seven classes is mixed.
        assert!(wasted <= 7 * 9, "{wasted} classes of 32 tokens are wasted");
    }

    #[test]
    fn packed_groups_fit_and_are_nearly_full() {
        let lengths = lengths(1000);
        let total: u32 = lengths.iter().sum();
        let mut dealer = Dealer::new(0, 1, lengths.clone(), Some(512));
        let groups: Vec<_> = dealer.blocks(0).iter().map(|block| block[0].clone()).collect();
        for group in &groups {
            assert!(group.iter().map(|row| lengths[*row as usize]).sum::<u32>() <= 512);
        }
        assert!(groups.len() as u32 <= total.div_ceil(512) + 3, "{} groups", groups.len());
    }

    #[test]
    fn the_seed_decides() {
        let of = |seed: u32| Dealer::new(seed, 4, lengths(50), None).blocks(0).to_vec();
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
    }
}
