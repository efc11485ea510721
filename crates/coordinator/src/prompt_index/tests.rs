//! The index against stages that do exactly as they are told.

use super::*;
use mlxnode_compute::BlockCapacity;
use proptest::prelude::*;
use std::collections::BTreeSet;

/// What a stage's block holds: all tokens up to its end, whose they are, and whether the states are there.
type Contents = (String, Vec<u32>, bool);

/// One stage; all are told the same, so one is enough.
#[derive(Default)]
struct Stage {
    memory: HashMap<BlockId, Contents>,
    disk: HashMap<BlockHash, Contents>,
}

struct World {
    index: PromptIndex,
    capacity: Capacity,
    stage: Stage,
    running: BTreeMap<SequenceId, Sequence>,
    names: BTreeSet<BlockId>,
}

struct Sequence {
    tenant: String,
    tokens: Vec<u32>,
    prompt: usize,
    most: usize,
    /// Tokens that went through.
    position: usize,
    keeps: Vec<Keep>,
    reused: Vec<BlockId>,
}

const B: usize = BLOCK_TOKENS;

impl World {
    fn new(blocks: u64, disk_blocks: u64, checkpoint: u64) -> Self {
        let stage = BlockCapacity {
            block: ByteCount(10),
            checkpoint: ByteCount(checkpoint),
            memory: ByteCount(10 * blocks),
            disk: ByteCount(10 * disk_blocks),
            fingerprint: [1; 32],
        };
        let small = BlockCapacity { block: ByteCount(1), checkpoint: ByteCount(0), ..stage };
        let capacity = Capacity::new(vec![small, stage]);
        Self {
            index: PromptIndex::new(capacity.clone()),
            capacity,
            stage: Stage::default(),
            running: BTreeMap::new(),
            names: BTreeSet::new(),
        }
    }

    fn prompt<'a>(tenant: &'a str, tokens: &'a [u32], max_tokens: usize) -> Prompt<'a> {
        Prompt { tenant, adapter: None, tokens, max_tokens }
    }

    fn begin(&mut self, id: u64, tenant: &str, tokens: &[u32], max_tokens: usize) -> BlockPlan {
        let (plan, effects) = self.index.begin(SequenceId(id), Self::prompt(tenant, tokens, max_tokens));
        self.apply(effects);
        for (number, block) in plan.reuse.iter().enumerate() {
            let (owner, held, has_states) = &self.stage.memory[block];
            assert_eq!((owner.as_str(), held.as_slice()), (tenant, &tokens[..(number + 1) * B]));
            if number + 1 == plan.reuse.len() {
                assert!(*has_states || !self.capacity.has_checkpoints(), "cannot go on from there");
            }
        }
        assert!(plan.cached_tokens() < tokens.len(), "something is left to be computed");
        let mut sequence = Sequence {
            tenant: tenant.to_owned(),
            tokens: tokens.to_vec(),
            prompt: tokens.len(),
            most: tokens.len() + max_tokens,
            position: plan.cached_tokens(),
            keeps: Vec::new(),
            reused: plan.reuse.clone(),
        };
        for keep in &plan.keep {
            assert!(self.names.insert(keep.block), "a name is used once");
            sequence.keeps.push(*keep);
        }
        self.running.insert(SequenceId(id), sequence);
        self.check();
        plan
    }

    /// Tokens go through the stages; the index hears of it when `is_told`.
    fn advance(&mut self, id: u64, tokens: usize, is_told: bool) {
        let Some(sequence) = self.running.get_mut(&SequenceId(id)) else { return };
        let end = sequence.prompt.min(sequence.position + tokens);
        sequence.position = end;
        self.take_blocks(id);
        if is_told {
            let effects = self.index.went_through(SequenceId(id), end);
            self.apply(effects);
        }
        self.check();
    }

    /// The rest of the prompt, then `count` tokens.
    fn generate(&mut self, id: u64, count: usize, seed: u32) {
        self.advance(id, usize::MAX / 2, true);
        for number in 0..count {
            let Some(sequence) = self.running.get_mut(&SequenceId(id)) else { return };
            if sequence.tokens.len() >= sequence.most {
                break;
            }
            sequence.position = sequence.tokens.len();
            let token = seed.wrapping_add(number as u32) % 50;
            sequence.tokens.push(token);
            self.take_blocks(id);
            let effects = self.index.generated(SequenceId(id), token);
            self.apply(effects);
        }
        self.check();
    }

    fn end(&mut self, id: u64) {
        self.running.remove(&SequenceId(id));
        let effects = self.index.end(SequenceId(id));
        self.apply(effects);
        self.check();
    }

    fn take_blocks(&mut self, id: u64) {
        let Some(sequence) = self.running.get_mut(&SequenceId(id)) else { return };
        let (tokens, tenant, position) = (&sequence.tokens, &sequence.tenant, sequence.position);
        sequence.keeps.retain(|keep| {
            let end = (keep.number + 1) * B;
            if end <= position {
                self.stage
                    .memory
                    .insert(keep.block, (tenant.clone(), tokens[..end].to_vec(), keep.checkpoint));
            }
            end > position
        });
    }

    fn apply(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Keep { sequence, keep } => {
                    assert!(self.names.insert(keep.block));
                    self.running.get_mut(&sequence).unwrap().keeps.push(keep);
                    self.take_blocks(sequence.0);
                }
                Effect::Order(BlockOrder::Drop { block }) => {
                    self.stage.memory.remove(&block);
                }
                Effect::Order(BlockOrder::Spill { block, hash }) => {
                    let contents = self.stage.memory.get(&block).expect("only what is in memory is spilled");
                    self.stage.disk.insert(hash, contents.clone());
                }
                Effect::Order(BlockOrder::Restore { block, hash }) => {
                    assert!(self.names.insert(block));
                    let contents = self.stage.disk.get(&hash).expect("only what is on the disk is restored");
                    self.stage.memory.insert(block, contents.clone());
                }
                Effect::Order(BlockOrder::Erase { hash }) => {
                    self.stage.disk.remove(&hash);
                }
            }
            // Not even between two effects.
            self.check_limits();
        }
    }

    fn check_limits(&self) {
        let counts = |blocks: &mut dyn Iterator<Item = &Contents>| {
            let mut counts = capacity::Counts::default();
            blocks.for_each(|contents| {
                counts.blocks += 1;
                counts.checkpoints += usize::from(contents.2);
            });
            counts
        };
        let (memory, disk) = (counts(&mut self.stage.memory.values()), counts(&mut self.stage.disk.values()));
        assert!(self.capacity.fits(Tier::Memory, memory, false, 0), "{memory:?} in memory");
        assert!(self.capacity.fits(Tier::Disk, disk, false, 0), "{disk:?} on the disk");
    }

    fn check(&self) {
        self.check_limits();
        let statistics = self.index.statistics();
        assert!(self.stage.memory.len() <= statistics.blocks_in_memory);
        for sequence in self.running.values() {
            for block in &sequence.reused {
                assert!(self.stage.memory.contains_key(block), "in use");
            }
        }
    }
}

/// Prompts that share beginnings: a digit for each block.
fn tokens(digits: &[u32], rest: usize) -> Vec<u32> {
    let mut tokens: Vec<u32> =
        digits.iter().flat_map(|digit| (0..B as u32).map(move |place| digit * 1000 + place % 7)).collect();
    tokens.extend(std::iter::repeat_n(9999, rest));
    tokens
}

#[test]
fn the_second_prompt_begins_where_it_parts_from_the_first() {
    let mut world = World::new(20, 0, 0);
    let plan = world.begin(1, "a", &tokens(&[1, 2, 3], 10), 5);
    assert_eq!((plan.reuse.len(), plan.keep.len()), (0, 3), "the tail cannot get full");
    world.generate(1, 5, 0);
    world.end(1);
    assert_eq!(world.index.statistics().blocks_in_memory, 3);
    assert_eq!(world.index.blocks_in_use(), 0);
    assert_eq!(world.begin(2, "a", &tokens(&[1, 2, 4], 10), 5).reuse.len(), 2);
    assert_eq!(world.begin(3, "a", &tokens(&[1, 2, 3], 0), 5).reuse.len(), 2, "one token is left");
    assert_eq!(world.begin(4, "b", &tokens(&[1, 2, 3], 10), 5).reuse.len(), 0, "another tenant");
    assert_eq!(world.begin(5, "a", &tokens(&[2, 3], 10), 5).reuse.len(), 0, "another beginning");
    assert_eq!(world.index.statistics().cached_tokens, 4 * B as u64);
}

#[test]
fn answers_are_found_by_the_next_turn() {
    let mut world = World::new(20, 0, 0);
    world.begin(1, "a", &tokens(&[1], 250), 600);
    world.generate(1, 600, 3);
    let said = world.running[&SequenceId(1)].tokens.clone();
    world.end(1);
    assert_eq!(said.len(), B + 850);
    // The last token was sampled and did not go through.
    assert_eq!(world.index.statistics().blocks_in_memory, (said.len() - 1) / B);
    let next: Vec<u32> = said.into_iter().chain([5; 20]).collect();
    assert_eq!(world.begin(2, "a", &next, 5).reuse.len(), 4);
}

#[test]
fn a_second_request_waits_for_the_first_ones_blocks() {
    let mut world = World::new(20, 0, 0);
    let prompt = tokens(&[1, 2, 3], 10);
    let other = tokens(&[1, 2, 4], 10);
    let is_awaited =
        |world: &World, prompt: &[u32]| world.index.is_being_computed(World::prompt("a", prompt, 5));
    assert!(!is_awaited(&world, &prompt));
    world.begin(1, "a", &prompt, 5);
    assert!(is_awaited(&world, &prompt) && is_awaited(&world, &other));
    assert!(!world.index.is_being_computed(World::prompt("b", &prompt, 5)));
    world.advance(1, 2 * B, true);
    assert!(is_awaited(&world, &prompt), "the third block comes");
    assert!(!is_awaited(&world, &other), "it has what it can get");
    assert_eq!(world.begin(2, "a", &other, 5).reuse.len(), 2);
    // The first one goes away in the middle of its third block.
    world.end(1);
    assert!(!is_awaited(&world, &prompt));
    let plan = world.begin(3, "a", &prompt, 5);
    assert_eq!((plan.reuse.len(), plan.keep.len()), (2, 1));
}

#[test]
fn what_is_used_least_recently_goes_to_the_disk_and_comes_back() {
    let mut world = World::new(4, 8, 0);
    for (id, digits) in [(1, [1, 2]), (2, [3, 4]), (3, [5, 6])] {
        world.begin(id, "a", &tokens(&digits, 1), 1);
        world.generate(id, 1, 0);
        world.end(id);
    }
    let statistics = world.index.statistics();
    assert_eq!((statistics.blocks_in_memory, statistics.blocks_on_disk), (4, 6));
    let plan = world.begin(4, "a", &tokens(&[1, 2], 1), 1);
    assert_eq!(plan.reuse.len(), 2, "from the disk");
    world.end(4);
    // A start later.
    let bytes = world.index.store();
    let mut next = PromptIndex::new(world.capacity.clone());
    assert_eq!(next.load(&bytes), Ok(vec![]));
    std::mem::swap(&mut world.index, &mut next);
    world.stage.memory.clear();
    world.names.clear();
    assert_eq!(world.begin(9, "a", &tokens(&[1, 2], 1), 1).reuse.len(), 2);
    let other = Capacity::new(vec![BlockCapacity { fingerprint: [2; 32], ..Default::default() }]);
    assert_eq!(PromptIndex::new(other).load(&bytes), Err(StoredError::Foreign));
    for cut in [0, 1, 50, bytes.len() - 1] {
        assert_eq!(PromptIndex::new(world.capacity.clone()).load(&bytes[..cut]), Err(StoredError::Damaged));
    }
    let mut changed = bytes.clone();
    changed[60] ^= 1;
    assert_eq!(PromptIndex::new(world.capacity.clone()).load(&changed), Err(StoredError::Damaged));
    // A smaller disk.
    let mut small = World::new(4, 1, 0);
    let erased = small.index.load(&bytes).unwrap();
    assert_eq!(small.index.statistics().blocks_on_disk, 1);
    assert!(erased.iter().all(|effect| matches!(effect, Effect::Order(BlockOrder::Erase { .. }))));
}

#[test]
fn recurrent_models_begin_where_states_were_kept() {
    let mut world = World::new(100, 0, 20);
    let plan = world.begin(1, "a", &tokens(&[1, 2, 3], 10), 5);
    assert_eq!(plan.keep.iter().map(|keep| keep.checkpoint).collect::<Vec<_>>(), [false, false, true]);
    world.generate(1, 5, 0);
    world.end(1);
    // It parts after two blocks, where no states are: computed anew, and this time they are kept there.
    let plan = world.begin(2, "a", &tokens(&[1, 2, 4], 10), 5);
    let keeps: Vec<(usize, bool)> = plan.keep.iter().map(|keep| (keep.number, keep.checkpoint)).collect();
    assert_eq!((plan.reuse.len(), keeps), (0, vec![(1, true), (2, true)]));
    world.generate(2, 5, 0);
    world.end(2);
    assert_eq!(world.begin(3, "a", &tokens(&[1, 2, 5], 10), 5).reuse.len(), 2);
    assert_eq!(world.begin(4, "a", &tokens(&[1, 2, 3, 6], 10), 5).reuse.len(), 3);
    let plan = world.begin(5, "a", &tokens(&[8; 20], 10), 5);
    let checkpoints = plan.keep.iter().filter(|keep| keep.checkpoint).map(|keep| keep.number);
    assert_eq!(checkpoints.collect::<Vec<_>>(), [7, 15, 19]);
}

#[test]
fn a_missing_block_is_not_found_again() {
    let mut world = World::new(10, 10, 0);
    let prompt = tokens(&[1, 2], 1);
    world.begin(1, "a", &prompt, 1);
    world.generate(1, 1, 0);
    world.end(1);
    assert_eq!(world.begin(2, "a", &prompt, 1).reuse.len(), 2);
    let effects = world.index.missed(SequenceId(2));
    world.running.remove(&SequenceId(2)).unwrap();
    world.apply(effects);
    world.end(2);
    let plan = world.begin(3, "a", &prompt, 1);
    assert_eq!((plan.reuse.len(), plan.keep.len()), (0, 2));
}

#[test]
fn without_room_nothing_is_kept() {
    let mut world = World::new(0, 0, 0);
    assert!(world.begin(1, "a", &tokens(&[1, 2], 1), 1).is_empty());
    // Of a stage that keeps none nothing is known but that.
    for stages in [
        vec![],
        vec![BlockCapacity::default()],
        vec![
            BlockCapacity { block: ByteCount(10), memory: ByteCount(1000), ..Default::default() },
            BlockCapacity::default(),
        ],
    ] {
        let mut index = PromptIndex::new(Capacity::new(stages));
        assert!(index.begin(SequenceId(1), World::prompt("a", &tokens(&[1, 2], 1), 1)).0.is_empty());
    }
    let mut world = World::new(1, 0, 0);
    let plan = world.begin(1, "a", &tokens(&[1, 2], 1), 1);
    assert_eq!(plan.keep.len(), 1, "what fits");
    assert!(world.begin(2, "a", &tokens(&[3, 4], 1), 1).is_empty(), "all of it is in use");
}

#[derive(Clone, Debug)]
enum Action {
    Begin { tenant: bool, digits: Vec<u32>, rest: usize, max_tokens: usize },
    Advance { which: usize, tokens: usize, is_told: bool },
    Generate { which: usize, count: usize, seed: u32 },
    End { which: usize },
    Restart,
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        3 => (any::<bool>(), prop::collection::vec(0_u32..3, 0..6), 0_usize..B, 1_usize..600).prop_map(
            |(tenant, digits, rest, max_tokens)| Action::Begin { tenant, digits, rest, max_tokens }
        ),
        3 => (0_usize..4, 1_usize..700, any::<bool>())
            .prop_map(|(which, tokens, is_told)| Action::Advance { which, tokens, is_told }),
        2 => (0_usize..4, 1_usize..600, 0_u32..3)
            .prop_map(|(which, count, seed)| Action::Generate { which, count, seed }),
        3 => (0_usize..4).prop_map(|which| Action::End { which }),
        1 => Just(Action::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// Everything that `World` asserts, whatever happens in whatever order; and in the end nothing is left over.
    #[test]
    fn stages_hold_what_the_index_says_and_never_more_than_they_may(
        blocks in 0_u64..12, disk in 0_u64..12, checkpoint in prop_oneof![Just(0_u64), 1_u64..30],
        actions in prop::collection::vec(action(), 1..60),
    ) {
        let mut world = World::new(blocks, disk, checkpoint);
        let mut next = 0;
        for action in actions {
            let running: Vec<u64> = world.running.keys().map(|id| id.0).collect();
            let pick = |which: usize| running.get(which % running.len().max(1)).copied().unwrap_or(0);
            match action {
                Action::Begin { tenant, digits, rest, max_tokens } => {
                    let prompt = tokens(&digits, rest.max(usize::from(digits.is_empty())));
                    next += 1;
                    let tenant = if tenant { "a" } else { "b" };
                    world.begin(next, tenant, &prompt, max_tokens);
                }
                Action::Advance { which, tokens, is_told } => world.advance(pick(which), tokens, is_told),
                Action::Generate { which, count, seed } => world.generate(pick(which), count, seed),
                Action::End { which } => world.end(pick(which)),
                Action::Restart => {
                    for id in running {
                        world.end(id);
                    }
                    let bytes = world.index.store();
                    world.index = PromptIndex::new(world.capacity.clone());
                    let effects = world.index.load(&bytes).unwrap();
                    // What the file does not name is not found again; a stage's own limit lets it go.
                    world.stage = Stage { memory: HashMap::new(), disk: std::mem::take(&mut world.stage.disk) };
                    let kept: BTreeSet<BlockHash> = world.index.tree.entries().iter().map(|entry| {
                        hash::next(&entry.parent, &entry.tokens)
                    }).collect();
                    world.stage.disk.retain(|hash, _| kept.contains(hash));
                    world.names.clear();
                    world.apply(effects);
                }
            }
        }
        let running: Vec<u64> = world.running.keys().map(|id| id.0).collect();
        for id in running {
            world.end(id);
        }
        prop_assert_eq!(world.index.blocks_in_use(), 0);
        prop_assert_eq!(world.stage.memory.len(), world.index.statistics().blocks_in_memory);
        prop_assert_eq!(world.stage.disk.len(), world.index.statistics().blocks_on_disk);
        // Two large prompts of a third tenant make everything else go.
        if world.capacity.is_nothing() {
            prop_assert!(world.index.tree.is_empty());
        }
    }
}
