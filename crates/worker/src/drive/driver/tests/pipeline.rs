//! The driver and the stages of a replica, without network, threads or time: each moves when the test says.

use super::*;

pub(super) const VOCABULARY: usize = 50;

pub(super) fn limits(prefill_chunk: usize) -> Limits {
    Limits { context_tokens: 64, max_sequences: 4, prefill_chunk, vocabulary: VOCABULARY }
}

pub(super) fn spec(max_tokens: usize, stop_tokens: Vec<u32>) -> SequenceSpec {
    SequenceSpec { stop_tokens, ..SequenceSpec::new(0, max_tokens, Sampling::default()) }
}

/// For a prompt of three tokens.
pub(super) fn three(max_tokens: usize) -> SequenceSpec {
    SequenceSpec { prompt_tokens: 3, ..spec(max_tokens, vec![]) }
}

/// What a sequence should generate: to its stop token, its `max_tokens` or the end of the context.
pub(super) fn expected(prompt: &[u32], max_tokens: usize, stop_tokens: &[u32]) -> (Vec<u32>, SequenceEnd) {
    let count = max_tokens.min(limits(1).context_tokens - prompt.len());
    let mut tokens = SimulatedStage::expected_tokens(prompt, count, VOCABULARY);
    match tokens.iter().position(|token| stop_tokens.contains(token)) {
        Some(at) => {
            tokens.truncate(at + 1);
            (tokens, SequenceEnd::Stop)
        }
        None => (tokens, SequenceEnd::Length),
    }
}

/// What a batch of these rows takes.
pub(super) fn times([fixed, single, token]: [u64; 3], rows: &[Row]) -> StageTimes {
    let singles = rows.iter().filter(|row| row.tokens.len() == 1).count() as u64;
    let tokens: usize = rows.iter().map(|row| row.tokens.len()).filter(|tokens| *tokens > 1).sum();
    let compute = Duration::from_micros(fixed + single * singles + token * tokens as u64);
    StageTimes { compute, ..StageTimes::default() }
}

pub(super) struct Pipeline {
    pub(super) driver: Driver,
    pub(super) stages: Vec<(StepQueue<()>, Shard)>,
    /// What a batch, a row of a single token and a token of a chunk take in each stage, in microseconds. Nothing is waited for.
    pub(super) costs: Vec<[u64; 3]>,
    pub(super) ring: VecDeque<Message>,
    pub(super) heard: HashMap<u64, Heard>,
    /// What each scheduler was told of the stages' room for blocks.
    pub(super) capacities: Vec<Vec<BlockCapacity>>,
}

#[derive(Debug, Default)]
pub(super) struct Heard {
    pub(super) started: usize,
    pub(super) tokens: Vec<u32>,
    pub(super) scores: Vec<Sampled>,
    pub(super) embeddings: Vec<Vec<f32>>,
    pub(super) end: Option<SequenceEnd>,
    pub(super) failures: Vec<String>,
    pub(super) progress: Vec<usize>,
    pub(super) missing: usize,
    pub(super) closed: usize,
}

impl Pipeline {
    pub(super) fn new(stage_count: usize, prefill_chunk: usize) -> Self {
        Self::guessing(stage_count, prefill_chunk, 0)
    }

    /// With a first stage that guesses so many tokens at once.
    pub(super) fn guessing(stage_count: usize, prefill_chunk: usize, guesses: usize) -> Self {
        let stage = |index: usize| {
            let info = StageInfo {
                layers: LayerRange::new(index, index + 1),
                layer_count: stage_count,
                hidden: 2,
                dtype: Dtype::F32,
                vocabulary: VOCABULARY,
                weights: ByteCount(0),
            };
            let limit = limits(prefill_chunk).max_sequences;
            let stage = SimulatedStage::new(info, Duration::ZERO).guessing(guesses);
            (StepQueue::new(), Shard::new(Box::new(stage), limit))
        };
        Self {
            driver: Driver::new(limits(prefill_chunk)),
            stages: (0..stage_count).map(stage).collect(),
            costs: vec![[1000, 100, 20]; stage_count],
            ring: VecDeque::new(),
            heard: HashMap::new(),
            capacities: Vec::new(),
        }
    }

    pub(super) fn open(&mut self, sequence: u64, prompt: Vec<u32>, spec: SequenceSpec) {
        self.open_with(sequence, prompt, spec, BlockPlan::default());
    }

    /// A spec without a prompt's length gets that of the whole prompt.
    pub(super) fn open_with(
        &mut self,
        sequence: u64,
        prompt: Vec<u32>,
        spec: SequenceSpec,
        blocks: BlockPlan,
    ) {
        let spec = match spec.prompt_tokens {
            0 => SequenceSpec { prompt_tokens: prompt.len(), ..spec },
            _ => spec,
        };
        self.open_as_it_is(sequence, prompt, spec, blocks);
    }

    pub(super) fn open_as_it_is(
        &mut self,
        sequence: u64,
        prompt: Vec<u32>,
        spec: SequenceSpec,
        blocks: BlockPlan,
    ) {
        let sequence = SequenceId(sequence);
        self.driver.command(DriveCommand::Open { sequence, prompt, spec, blocks }).unwrap();
    }

    pub(super) fn cancel(&mut self, sequence: u64) {
        self.driver.command(DriveCommand::Cancel { sequence: SequenceId(sequence) }).unwrap();
    }

    /// Lets part number `part` do one thing: the driver's work, a stage, the ring, or the scheduler's reading. Did it?
    pub(super) fn advance(&mut self, part: usize) -> bool {
        let last = self.stages.len();
        if part == last {
            let Some(message) = self.ring.pop_front() else { return false };
            self.driver.ring(message).unwrap();
        } else if part == last + 1 {
            let Some(work) = self.driver.next_work() else { return false };
            if let Message::Batch(batch) = &work {
                // What links admit, without guesses.
                let limits = &self.driver.limits;
                assert!(batch.micro.tokens() <= limits.prefill_chunk.max(2) + limits.max_sequences);
            }
            self.stages[0].0.push(work, ());
            assert!(self.driver.flights.len() <= last + 1, "more batches than stages and one");
        } else if part == last + 2 {
            let Some(event) = self.driver.next_event() else { return false };
            self.hear(event);
        } else {
            let (queue, shard) = &mut self.stages[part];
            let Some((message, ())) = queue.pop() else { return false };
            let times = match &message {
                Message::Batch(batch) => times(self.costs[part], &batch.micro.rows),
                _ => StageTimes::default(),
            };
            for mut message in shard.handle(message).unwrap() {
                message.took(times);
                match self.stages.get_mut(part + 1) {
                    Some((queue, _)) => queue.push(message, ()),
                    None => self.ring.push_back(message),
                }
            }
        }
        true
    }

    pub(super) fn hear(&mut self, event: DriveEvent) {
        match event {
            DriveEvent::Started { sequence, .. } => self.heard.entry(sequence.0).or_default().started += 1,
            DriveEvent::Token(token) => {
                let heard = self.heard.entry(token.sequence.0).or_default();
                assert_eq!((heard.started, heard.closed, heard.end), (1, 0, None), "{token:?}");
                heard.tokens.push(token.sampled.token);
                heard.end = token.end;
            }
            DriveEvent::Scores { sequence, position, scores } => {
                let heard = self.heard.entry(sequence.0).or_default();
                assert_eq!((heard.started, position), (1, 1 + heard.scores.len()));
                heard.scores.extend(scores);
            }
            DriveEvent::Embedding { sequence, values } => {
                self.heard.entry(sequence.0).or_default().embeddings.push(values);
            }
            DriveEvent::Failed { sequence, reason } => {
                self.heard.entry(sequence.0).or_default().failures.push(reason);
            }
            DriveEvent::Closed { sequence } => self.heard.entry(sequence.0).or_default().closed += 1,
            DriveEvent::Capacity { stages } => self.capacities.push(stages),
            DriveEvent::Progress { sequence, tokens } => {
                let heard = self.heard.entry(sequence.0).or_default();
                assert_eq!((heard.started, heard.closed, heard.tokens.len()), (1, 0, 0));
                heard.progress.push(tokens);
            }
            DriveEvent::Missing { sequence } => self.heard.entry(sequence.0).or_default().missing += 1,
        }
    }

    /// Everything that can still happen, in a fixed order.
    pub(super) fn finish(&mut self) {
        while (0..self.stages.len() + 3).any(|part| self.advance(part)) {}
        assert_eq!(self.driver.flights.len(), 0);
        assert!(self.driver.sequences.is_empty());
        assert!(self.stages.iter().all(|(_, shard)| shard.open_sequences() == 0));
    }
}
