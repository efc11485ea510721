//! Which replica of a deployment gets a request: the one that has seen most of its prompt, unless too much is under way there.
//!
//! After the cache-aware routing of SGLang's router (Zheng et al. 2024) and Preble (Srivatsa et al. 2024): a front remembers what it
//! sent where, as chained hashes of blocks of tokens, and takes that for what is in the replicas' prompt caches. What is worth a detour is at
//! least half of the prompt; what is too much is a whole batch more than the least busy replica has. Without such a prefix the least
//! busy one is taken. A replica that was lost gets nothing until it is formed again.
//!
//! [`Router`] is plain; several fronts know nothing of each other, which costs some hits and no correctness.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::{Arc, Mutex, PoisonError};

/// Tokens of a block. Caches keep blocks of this order, and shorter prefixes save little.
const BLOCK: usize = 64;
/// Blocks that are remembered in each of two generations: together at most some 10 MiB.
const GENERATION: usize = 65_536;

/// A replica that could take a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// What nodes call it.
    pub instance: String,
    /// Of its present attempt: another attempt has empty caches.
    pub epoch: u64,
    /// Sequences that it runs at the same time.
    pub places: usize,
}

/// Names a replica in one attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReplicaId(u32);

/// What a front knows of the replicas.
#[derive(Debug, Default)]
pub struct Router {
    ids: HashMap<String, (u64, ReplicaId)>,
    next_id: u32,
    known: HashMap<ReplicaId, Known>,
    /// Which replicas have seen a block after those before it. What was asked for lately is in the first generation.
    young: HashMap<u64, Vec<ReplicaId>>,
    old: HashMap<u64, Vec<ReplicaId>>,
    state: RandomState,
}

#[derive(Debug, Default)]
struct Known {
    under_way: usize,
    taken: u64,
    is_lost: bool,
}

impl Router {
    /// The place in `candidates` (at least one) of the replica that shall have the prompt. `kind` tells apart what shares no cache:
    /// deployments, adapters, tenants. Counts as under way until [`Router::ended`].
    pub fn choose(
        &mut self,
        candidates: &[Candidate],
        kind: &(&str, Option<&str>, &str),
        prompt: &[u32],
    ) -> (usize, ReplicaId) {
        let ids: Vec<ReplicaId> = candidates.iter().map(|candidate| self.id(candidate)).collect();
        let blocks = self.blocks(kind, prompt);
        let is_lost = |id: &ReplicaId| self.known.get(id).is_some_and(|known| known.is_lost);
        let all_lost = ids.iter().all(is_lost);
        let alive: Vec<usize> = (0..ids.len()).filter(|place| all_lost || !is_lost(&ids[*place])).collect();
        let busy =
            |place: usize| self.known.get(&ids[place]).map_or((0, 0), |known| (known.under_way, known.taken));
        let idlest = alive.iter().copied().min_by_key(|place| busy(*place)).unwrap_or(0);
        let seen = |place: usize| {
            let has = |block: &&u64| self.holders(**block).any(|holder| holder == ids[place]);
            blocks.iter().take_while(has).count()
        };
        let warmest =
            alive.iter().copied().max_by_key(|place| (seen(*place), std::cmp::Reverse(busy(*place))));
        let chosen = warmest
            .filter(|place| 2 * seen(*place) > blocks.len())
            .filter(|place| busy(*place).0 < busy(idlest).0 + candidates[*place].places.max(1))
            .unwrap_or(idlest);
        let id = ids[chosen];
        for block in blocks {
            self.remember(block, id);
        }
        if let Some(known) = self.known.get_mut(&id) {
            known.under_way += 1;
            known.taken += 1;
        }
        (chosen, id)
    }

    /// A request that it had has ended.
    pub fn ended(&mut self, id: ReplicaId) {
        if let Some(known) = self.known.get_mut(&id) {
            known.under_way = known.under_way.saturating_sub(1);
        }
    }

    /// It does not answer: it gets nothing more while there are others, until it is formed again.
    pub fn lost(&mut self, id: ReplicaId) {
        if let Some(known) = self.known.get_mut(&id) {
            known.is_lost = true;
        }
    }

    fn id(&mut self, candidate: &Candidate) -> ReplicaId {
        let Candidate { instance, epoch, .. } = candidate;
        match self.ids.get(instance) {
            Some((known, id)) if known == epoch => *id,
            earlier => {
                if let Some((_, id)) = earlier {
                    self.known.remove(id);
                }
                let id = ReplicaId(self.next_id);
                self.next_id = self.next_id.wrapping_add(1);
                self.ids.insert(instance.clone(), (*epoch, id));
                self.known.insert(id, Known::default());
                id
            }
        }
    }

    /// Forgets replicas that are gone.
    pub fn retain(&mut self, is_there: impl Fn(&str) -> bool) {
        let known = &mut self.known;
        self.ids.retain(|instance, (_, id)| {
            let stays = is_there(instance) || known.get(id).is_some_and(|known| known.under_way > 0);
            if !stays {
                known.remove(id);
            }
            stays
        });
    }

    /// Whole blocks only: each hash stands for its block and all before it.
    fn blocks(&self, kind: &(&str, Option<&str>, &str), prompt: &[u32]) -> Vec<u64> {
        let mut hash = self.state.hash_one(kind);
        let whole = prompt.chunks_exact(BLOCK);
        whole
            .map(|block| {
                hash = self.state.hash_one((hash, block));
                hash
            })
            .collect()
    }

    fn holders(&self, block: u64) -> impl Iterator<Item = ReplicaId> {
        let both = [&self.young, &self.old].into_iter().filter_map(move |map| map.get(&block));
        both.flatten().copied()
    }

    fn remember(&mut self, block: u64, id: ReplicaId) {
        if self.young.len() >= GENERATION {
            self.old = std::mem::take(&mut self.young);
        }
        let holders = self.young.entry(block).or_insert_with(|| {
            let known = self.old.get(&block).cloned().unwrap_or_default();
            known.into_iter().filter(|id| self.known.contains_key(id)).collect()
        });
        if !holders.contains(&id) {
            holders.push(id);
        }
    }
}

/// [`Router`] for many requests at a time. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Routing {
    router: Arc<Mutex<Router>>,
}

impl Routing {
    pub(super) fn with<T>(&self, work: impl FnOnce(&mut Router) -> T) -> T {
        work(&mut self.router.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// See [`Router::choose`].
    pub(super) fn choose(
        &self,
        candidates: &[Candidate],
        kind: &(&str, Option<&str>, &str),
        prompt: &[u32],
    ) -> (usize, Ticket) {
        let (place, id) = self.with(|router| router.choose(candidates, kind, prompt));
        (place, Ticket { routing: self.clone(), id })
    }
}

/// A request under way on a replica. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Ticket {
    routing: Routing,
    id: ReplicaId,
}

impl Ticket {
    /// The replica does not answer.
    pub(super) fn lost(&self) {
        self.routing.with(|router| router.lost(self.id));
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.routing.with(|router| router.ended(self.id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: (&str, Option<&str>, &str) = ("m", None, "");

    fn candidates(count: usize) -> Vec<Candidate> {
        let candidate = |number| Candidate { instance: format!("m#{number}"), epoch: 1, places: 4 };
        (1..=count).map(candidate).collect()
    }

    fn prompt(kind: u32, tokens: usize) -> Vec<u32> {
        (0..tokens as u32).map(|token| token * 3 + kind * 1_000_000).collect()
    }

    #[test]
    fn a_prompt_goes_where_its_beginning_was() {
        let (mut router, replicas) = (Router::default(), candidates(3));
        let homes: Vec<usize> =
            (0..3).map(|kind| router.choose(&replicas, &KIND, &prompt(kind, 200)).0).collect();
        let mut sorted = homes.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, [0, 1, 2], "without a prefix the work is spread");
        for (kind, home) in homes.iter().enumerate() {
            for tokens in [200, 250, 320] {
                let (place, id) = router.choose(&replicas, &KIND, &prompt(kind as u32, tokens));
                assert_eq!(place, *home, "{kind} of {tokens}");
                router.ended(id);
            }
        }
        // Another adapter's and another tenant's prefix is another one, and less than half is not worth it.
        let taken: Vec<u64> = router.known.values().map(|known| known.taken).collect();
        assert_eq!(taken.iter().sum::<u64>(), 12);
        for kind in [("m", Some("poet"), ""), ("m", None, "ann")] {
            assert!(router.blocks(&kind, &prompt(0, 64)) != router.blocks(&KIND, &prompt(0, 64)));
        }
    }

    #[test]
    fn too_much_in_one_place_goes_elsewhere() {
        let (mut router, replicas) = (Router::default(), candidates(2));
        let places: Vec<usize> =
            (0..12).map(|_| router.choose(&replicas, &KIND, &prompt(0, 640)).0).collect();
        assert_eq!(places[..4], [places[0]; 4], "a batch of its own stays together");
        assert!(places.iter().any(|place| *place != places[0]), "{places:?}");
        let busy = |place: usize| places.iter().filter(|other| **other == place).count();
        assert!(busy(0).abs_diff(busy(1)) <= 4, "{places:?}");
    }

    #[test]
    fn a_lost_replica_gets_nothing_until_it_is_formed_again() {
        let (mut router, mut replicas) = (Router::default(), candidates(2));
        let (home, id) = router.choose(&replicas, &KIND, &prompt(0, 640));
        router.ended(id);
        router.lost(id);
        for _ in 0..9 {
            assert_ne!(router.choose(&replicas, &KIND, &prompt(0, 640)).0, home);
        }
        replicas[home].epoch = 2;
        let (place, id) = router.choose(&replicas, &KIND, &prompt(7, 10));
        assert_eq!(place, home, "it is idle and there again");
        router.lost(id);
        let only = &replicas[home..=home];
        assert_eq!(
            router.choose(only, &KIND, &prompt(0, 640)).0,
            0,
            "the only one is asked whatever is known"
        );
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (mut router, replicas) = (Router::default(), candidates(2));
        for kind in 0..400 {
            let (_, id) = router.choose(&replicas, &KIND, &prompt(kind, 640 * 64));
            router.ended(id);
        }
        assert!(router.young.len() + router.old.len() <= 2 * GENERATION + 640);
        router.retain(|_| false);
        assert!(router.ids.is_empty() && router.known.is_empty());
    }
}
