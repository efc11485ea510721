//! The caches of open sequences by their keys. Those that run together come to lie side by side, a lane each, so that a step of all
//! of them is about as many operations as a step of one.
//!
//! ```text
//! insert ──▶ alone: chunks of the prompt ──▶ side by side with those that it ran with ──▶ alone ──▶ take
//! ```
//!
//! Whether sequences lie alone or side by side changes no token, only the speed. Lanes are joined when their sequences ran in the same
//! steps, one token each, and stay together until one of them does not run with the others. A shorter lane is padded to the longest, so
//! lengths that differ much stay apart.

use crate::batch::Row;
use crate::caches::{Part, SequenceCache};
use mlxnode_mlx::{Device, Result};

/// Lanes may differ by so many tokens, whatever their lengths.
const NEAR: i32 = 512;

/// Caches by key.
pub(crate) struct CachePool<K> {
    /// Can the model work on sequences side by side?
    joins: bool,
    entries: Vec<Entry<K>>,
    /// Steps so far.
    step: u64,
}

/// One sequence, or several side by side.
struct Entry<K> {
    /// By lane; None when it was taken out.
    keys: Vec<Option<K>>,
    cache: SequenceCache,
    /// The last step in which each sequence got one token; 0 for none.
    ran: u64,
}

impl<K: Copy + Eq> CachePool<K> {
    /// Empty. `joins` says whether the model can work on sequences side by side.
    pub(crate) fn new(joins: bool) -> Self {
        Self { joins, entries: Vec::new(), step: 0 }
    }

    /// Adds a sequence, which must not be there yet.
    pub(crate) fn insert(&mut self, key: K, cache: SequenceCache) {
        self.entries.push(Entry { keys: vec![Some(key)], cache, ran: 0 });
    }

    /// Where the sequence is: entry and lane.
    fn find(&self, key: K) -> Option<(usize, usize)> {
        self.entries.iter().enumerate().find_map(|(place, entry)| Some((place, entry.lane_of(key)?)))
    }

    /// The cache of a sequence that lies alone: of one whose prompt is not done yet.
    pub(crate) fn alone(&self, key: K) -> Option<&SequenceCache> {
        let (place, _) = self.find(key)?;
        self.entries.get(place).map(|entry| &entry.cache).filter(|cache| cache.lanes() == 1)
    }

    /// The cache that a sequence lies in, alone or with others.
    pub(crate) fn of(&self, key: K) -> Option<&SequenceCache> {
        self.find(key).and_then(|(place, _)| self.entries.get(place)).map(|entry| &entry.cache)
    }

    /// The cache that a sequence lies in, and its lane.
    pub(crate) fn lane_of(&self, key: K) -> Option<(&SequenceCache, usize)> {
        let (place, lane) = self.find(key)?;
        self.entries.get(place).map(|entry| (&entry.cache, lane))
    }

    /// Forgets a sequence.
    pub(crate) fn remove(&mut self, key: K) {
        let Some((place, lane)) = self.find(key) else { return };
        self.entries[place].keys[lane] = None;
        if self.entries[place].keys.iter().all(Option::is_none) {
            self.entries.remove(place);
        }
    }

    /// Takes a sequence out; its cache is its own again. None when there is no such sequence.
    pub(crate) fn take(&mut self, device: &Device, key: K) -> Result<Option<SequenceCache>> {
        let Some((place, lane)) = self.find(key) else { return Ok(None) };
        let entry = &mut self.entries[place];
        if entry.keys.len() == 1 {
            return Ok(Some(self.entries.remove(place).cache));
        }
        let cache = entry.lane(device, lane)?;
        entry.keys[lane] = None;
        if entry.keys.iter().all(Option::is_none) {
            self.entries.remove(place);
        }
        Ok(Some(cache))
    }

    /// Prepares a step in which these sequences get one token each: brings together what runs together, and parts what does not.
    /// Returns the order in which they go through.
    pub(crate) fn arrange(&mut self, device: &Device, running: &[K]) -> Result<Vec<K>> {
        self.step += 1;
        self.part(device, running)?;
        let (mut chosen, rest): (Vec<_>, Vec<_>) =
            self.entries.drain(..).partition(|entry| entry.first().is_some_and(|key| running.contains(&key)));
        // Stable: newcomers go behind those that run already.
        let place = |entry: &Entry<K>| running.iter().position(|key| Some(*key) == entry.first());
        chosen.sort_by_key(|entry| (std::cmp::Reverse(entry.keys.len()), place(entry)));
        if self.joins {
            chosen = join(device, chosen)?;
        }
        let mut order = Vec::with_capacity(running.len());
        for entry in &mut chosen {
            entry.ran = self.step;
            order.extend(entry.keys.iter().flatten());
        }
        self.entries = chosen;
        self.entries.extend(rest);
        Ok(order)
    }

    /// The rows of the step that was arranged, of which these sequences, alone, get so many tokens.
    pub(crate) fn rows(&mut self, chunks: &[(K, i32)]) -> Vec<Row<'_>> {
        let mut singles = Vec::new();
        let mut others: Vec<Option<Row<'_>>> = chunks.iter().map(|_| None).collect();
        for entry in &mut self.entries {
            let place = chunks.iter().position(|(key, _)| Some(*key) == entry.first());
            match place {
                Some(place) => others[place] = Some(Row { tokens: chunks[place].1, cache: &mut entry.cache }),
                None if entry.ran == self.step => {
                    singles.push(Row { tokens: 1, cache: &mut entry.cache });
                }
                None => {}
            }
        }
        singles.into_iter().chain(others.into_iter().flatten()).collect()
    }

    /// Takes lanes out of their company when they do not run although others of it do, and forgets those that were taken.
    fn part(&mut self, device: &Device, running: &[K]) -> Result<()> {
        let mut parted = Vec::new();
        for entry in &mut self.entries {
            let runs = |key: &Option<K>| key.is_some_and(|key| running.contains(&key));
            if !entry.keys.iter().any(runs) || entry.keys.iter().all(runs) {
                continue;
            }
            for (lane, key) in entry.keys.iter().enumerate() {
                if let (Some(key), false) = (key, runs(key)) {
                    let cache = entry.lane(device, lane)?;
                    parted.push(Entry { keys: vec![Some(*key)], cache, ran: entry.ran });
                }
            }
            let lanes: Vec<usize> = (0..entry.keys.len()).filter(|lane| runs(&entry.keys[*lane])).collect();
            entry.keys.retain(runs);
            let cache = std::mem::take(&mut entry.cache);
            entry.cache = SequenceCache::of_lanes(device, vec![Part { cache, lanes }])?;
        }
        self.entries.append(&mut parted);
        Ok(())
    }
}

impl<K: Copy + Eq> Entry<K> {
    fn lane_of(&self, key: K) -> Option<usize> {
        self.keys.iter().position(|lane| *lane == Some(key))
    }

    fn first(&self) -> Option<K> {
        self.keys.iter().flatten().next().copied()
    }

    /// The cache of one lane, as its own.
    fn lane(&self, device: &Device, lane: usize) -> Result<SequenceCache> {
        SequenceCache::of_lanes(device, vec![Part { cache: self.cache.clone(), lanes: vec![lane] }])
    }

    /// Shortest and longest sequence.
    fn span(&self) -> (i32, i32) {
        let shortest = self.cache.lengths().min().unwrap_or(0);
        (shortest, self.cache.tokens())
    }

    /// Did both run in the same steps, and does little padding bring them together?
    fn goes_with(&self, other: &Self) -> bool {
        let ((shortest, longest), (short, long)) = (self.span(), other.span());
        let (shortest, longest) = (shortest.min(short), longest.max(long));
        self.ran > 0
            && self.ran == other.ran
            && longest <= shortest.saturating_mul(2).max(shortest.saturating_add(NEAR))
            && self.cache.can_join(&other.cache)
    }
}

/// Brings entries together that may be.
fn join<K: Copy + Eq>(device: &Device, entries: Vec<Entry<K>>) -> Result<Vec<Entry<K>>> {
    let mut groups: Vec<Vec<Entry<K>>> = Vec::new();
    for entry in entries {
        match groups.iter_mut().find(|group| group.iter().all(|other| other.goes_with(&entry))) {
            Some(group) => group.push(entry),
            None => groups.push(vec![entry]),
        }
    }
    let together = |group: Vec<Entry<K>>| {
        let ran = group.first().map_or(0, |entry| entry.ran);
        let keys = group.iter().flat_map(|entry| entry.keys.iter().copied()).collect();
        let part = |entry: Entry<K>| Part { lanes: (0..entry.keys.len()).collect(), cache: entry.cache };
        let cache = SequenceCache::of_lanes(device, group.into_iter().map(part).collect())?;
        Ok(Entry { keys, cache, ran })
    };
    let each = groups.into_iter().map(|mut group| match (group.len(), group.pop()) {
        (1, Some(only)) => Ok(only),
        (_, last) => together(group.into_iter().chain(last).collect()),
    });
    each.collect()
}
