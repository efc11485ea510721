//! Whole pipelines over real mutual TLS: the tokens are right, a cancelled sequence stops, a lost stage is noticed.
#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

mod replica;

use mlxnode_compute::SequenceId;
use mlxnode_compute::simulated::SimulatedStage;
use mlxnode_compute::{
    BatchOutput, MicroBatch, Row, RowOutput, SequenceEnd, Stage, StageError, StageInfo, StageMemory,
};
use mlxnode_worker::{DriveError, DriveEvent, Fault};
use replica::{Heard, Model, Replica, VOCABULARY, prompt, spec};
use std::time::{Duration, Instant};

async fn tokens_equal_the_oracle(stages: usize, model: Model, lengths: &[usize], max_tokens: usize) {
    let width = model.hidden;
    let replica = Replica::start(stages, model).await;
    let (client, mut events) = replica.drive().await;
    let prompts: Vec<_> =
        lengths.iter().enumerate().map(|(seed, length)| prompt(seed as u32, *length)).collect();
    for (sequence, prompt) in prompts.iter().enumerate() {
        client.open(SequenceId(sequence as u64), prompt.clone(), spec(prompt, max_tokens)).await.unwrap();
    }
    let mut heard = Heard::default();
    heard.until_closed(&mut events, prompts.len()).await;
    assert!(heard.failures.is_empty(), "{:?}", heard.failures);
    for (sequence, prompt) in prompts.iter().enumerate() {
        let sequence = SequenceId(sequence as u64);
        let expected = SimulatedStage::expected_tokens(prompt, max_tokens, VOCABULARY);
        assert_eq!(heard.tokens[&sequence], expected, "prompt of {} tokens, {stages} stages", prompt.len());
        assert_eq!(heard.ends[&sequence], SequenceEnd::Length);
    }
    let mut members = replica.members;
    for (index, member) in members.iter_mut().enumerate() {
        let stats = member.stats().await;
        assert_eq!((stats.open_sequences, stats.active_bytes), (0, 1000));
        // Every token but the last of each answer went through once, and no more batches than that.
        let all: usize = lengths.iter().map(|length| length + max_tokens - 1).sum();
        let through = (stats.prompt_tokens + stats.decode_tokens) as usize;
        match model.guesses {
            0 => {
                assert_eq!((through, stats.guessed_tokens), (all, 0));
                assert!(stats.steps as usize >= max_tokens, "{stats:?}");
            }
            // A stage before the last one does not hear what became of an answer's last guesses.
            _ if index + 1 < stages => assert!(through <= all && 2 * through > all, "{stats:?}"),
            _ => {
                assert_eq!(through, all);
                let accepted = stats.accepted_tokens;
                assert!(0 < accepted && accepted < stats.guessed_tokens, "{stats:?}");
            }
        }
        assert!(stats.steps as usize <= all, "{stats:?}");
        // Hidden vectors of at least two bytes a number go on from every stage but the last.
        if index + 1 < stages {
            assert!(stats.sent_bytes as usize > all * width * 2, "{stats:?}");
            assert!(stats.send_seconds > 0.0, "{stats:?}");
        }
    }
    members[0].worker.stop();
    members[0].worker.ended().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn many_sequences_get_their_tokens_through_one_two_and_three_stages() {
    let lengths: Vec<usize> =
        [1, 2, 3, 511, 512, 513, 1024, 1025, 2000, 7, 64, 1999].iter().cycle().take(24).copied().collect();
    for stages in 1..=3 {
        tokens_equal_the_oracle(stages, Model::default(), &lengths, 20).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn guesses_change_no_token_through_one_two_and_three_stages() {
    let lengths: Vec<usize> =
        [1, 2, 3, 255, 256, 511, 512, 1025, 7, 64].iter().cycle().take(20).copied().collect();
    for (stages, guesses) in [(1, 3), (2, 1), (2, 5), (3, 3)] {
        tokens_equal_the_oracle(stages, Model { guesses, ..Model::default() }, &lengths, 40).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn activations_above_a_frame_go_in_pieces() {
    let model = Model { hidden: 1500, ..Model::default() }; // 512 tokens of 6000 bytes: 3 MB
    tokens_equal_the_oracle(2, model, &[600, 1, 513], 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_steps_than_a_link_has_credits_for_wait_their_turn() {
    let model = Model { max_sequences: 400, step_time: Duration::from_micros(50), ..Model::default() };
    tokens_equal_the_oracle(2, model, &[3; 400], 4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_tokens_end_a_sequence() {
    let replica = Replica::start(2, Model::default()).await;
    let (client, mut events) = replica.drive().await;
    let prompt = prompt(3, 10);
    let expected = SimulatedStage::expected_tokens(&prompt, 20, VOCABULARY);
    let mut spec = spec(&prompt, 20);
    spec.stop_tokens = vec![expected[6]];
    client.open(SequenceId(1), prompt, spec).await.unwrap();
    let mut heard = Heard::default();
    heard.until_closed(&mut events, 1).await;
    let first = expected.iter().position(|token| *token == expected[6]).unwrap();
    assert_eq!(heard.tokens[&SequenceId(1)], expected[..=first]);
    assert_eq!(heard.ends[&SequenceId(1)], SequenceEnd::Stop);
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_stops_decoding_within_a_step() {
    let model = Model { step_time: Duration::from_millis(20), ..Model::default() };
    let mut replica = Replica::start(2, model).await;
    let (client, mut events) = replica.drive().await;
    let sequence = SequenceId(1);
    client.open(sequence, vec![1], spec(&[1], 4000)).await.unwrap();
    let mut heard = Heard::default();
    while heard.tokens.get(&sequence).is_none_or(|tokens| tokens.len() < 5) {
        heard.hear(events.next().await.unwrap());
    }
    let before = heard.tokens[&sequence].len();
    client.cancel(sequence).await.unwrap();
    heard.until_closed(&mut events, 1).await;
    let after = heard.tokens[&sequence].len();
    assert!(after - before <= 2, "{before} tokens, then {after}");
    assert!(!heard.ends.contains_key(&sequence));
    let steps = replica.members[1].stats().await.steps as usize;
    assert!(steps <= after + 2, "{after} tokens took {steps} steps");
    // The slot is free, and the pipeline goes on.
    client.open(SequenceId(2), vec![2], spec(&[2], 2)).await.unwrap();
    heard.until_closed(&mut events, 2).await;
    assert_eq!(heard.tokens[&SequenceId(2)], SimulatedStage::expected_tokens(&[2], 2, VOCABULARY));
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_stops_a_long_prompt_within_a_chunk() {
    let model = Model { step_time: Duration::from_millis(1), prefill_chunk: 50, ..Model::default() };
    let mut replica = Replica::start(2, model).await;
    let (client, mut events) = replica.drive().await;
    let long = prompt(1, 4000); // 80 chunks of 50 ms
    client.open(SequenceId(1), long.clone(), spec(&long, 10)).await.unwrap();
    let mut heard = Heard::default();
    while heard.tokens.is_empty() {
        heard.hear(events.next().await.unwrap());
    }
    client.cancel(SequenceId(1)).await.unwrap();
    heard.until_closed(&mut events, 1).await;
    for member in &mut replica.members {
        let steps = member.stats().await.steps;
        assert!(steps <= 6, "{steps} of 80 chunks were computed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_prompt_does_not_starve_those_who_decode() {
    let model = Model { step_time: Duration::from_micros(200), prefill_chunk: 50, ..Model::default() };
    let replica = Replica::start(2, model).await;
    let (client, mut events) = replica.drive().await;
    client.open(SequenceId(1), vec![1], spec(&[1], 2000)).await.unwrap();
    let mut heard = Heard::default();
    while heard.tokens.get(&SequenceId(1)).is_none_or(|tokens| tokens.len() < 3) {
        heard.hear(events.next().await.unwrap());
    }
    let long = prompt(1, 2000); // 40 chunks of 10 ms
    let before = heard.tokens[&SequenceId(1)].len();
    client.open(SequenceId(2), long.clone(), spec(&long, 1)).await.unwrap();
    while !heard.ends.contains_key(&SequenceId(2)) {
        heard.hear(events.next().await.unwrap());
    }
    // A token for every chunk or two on each of two stages; without turns there would be none.
    let during = heard.tokens[&SequenceId(1)].len() - before;
    assert!(during >= 10, "{during} tokens while 40 chunks went through");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_scheduler_takes_over() {
    let model = Model { step_time: Duration::from_millis(5), ..Model::default() };
    let replica = Replica::start(2, model).await;
    let (old, mut old_events) = replica.drive().await;
    old.open(SequenceId(1), vec![1], spec(&[1], 4000)).await.unwrap();
    // Whichever comes first.
    let begins = [old_events.next().await.unwrap(), old_events.next().await.unwrap()];
    let started = DriveEvent::Started { sequence: SequenceId(1), cached_tokens: 0 };
    assert!(begins.contains(&started), "{begins:?}");
    let is_capacity = |event: &_| matches!(event, DriveEvent::Capacity { stages } if stages.len() == 2);
    assert!(begins.iter().any(is_capacity), "{begins:?}");
    let (client, mut events) = replica.drive().await;
    let lost = async {
        loop {
            match old_events.next().await {
                Ok(_) => {}
                Err(error) => break error,
            }
        }
    };
    client.open(SequenceId(2), vec![2], spec(&[2], 3)).await.unwrap();
    let mut heard = Heard::default();
    heard.until_closed(&mut events, 1).await;
    assert_eq!(heard.tokens.keys().collect::<Vec<_>>(), [&SequenceId(2)]);
    let lost = tokio::time::timeout(Duration::from_secs(5), lost).await.unwrap();
    assert!(matches!(&lost, DriveError::Refused(reason) if reason.contains("took over")), "{lost}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_death_of_a_middle_worker_fails_everything_within_a_second() {
    let model = Model { step_time: Duration::from_millis(2), ..Model::default() };
    let mut replica = Replica::start(3, model).await;
    let (client, mut events) = replica.drive().await;
    for sequence in 0..4 {
        client.open(SequenceId(sequence), vec![1], spec(&[1], 4000)).await.unwrap();
    }
    let mut heard = Heard::default();
    while (0..4).any(|sequence| heard.tokens.get(&SequenceId(sequence)).is_none_or(Vec::is_empty)) {
        heard.hear(events.next().await.unwrap());
    }
    let killed = Instant::now();
    drop(replica.members.remove(1));
    let error = loop {
        match tokio::time::timeout(Duration::from_secs(5), events.next()).await.expect("no answer") {
            Ok(event) => heard.hear(event),
            Err(error) => break error,
        }
    };
    assert!(killed.elapsed() < Duration::from_secs(1), "{:?}", killed.elapsed());
    // Which of its links the first worker misses first is a matter of luck.
    assert!(matches!(&error, DriveError::Lost(reason) if reason.contains("stage is lost")), "{error}");
    assert_eq!((heard.failures.len(), heard.closed.len()), (4, 4));
    for member in &mut replica.members {
        let fault = tokio::time::timeout(Duration::from_secs(5), member.worker.ended()).await.unwrap();
        assert!(matches!(fault, Err(Fault::LinkLost(..))), "{fault:?}");
    }
    let refused = async { while client.cancel(SequenceId(0)).await.is_ok() {} };
    tokio::time::timeout(Duration::from_secs(5), refused).await.expect("commands go nowhere now");
}

/// Works until a row comes to its fifth position, then does its worst with that row.
struct Faulty {
    stage: SimulatedStage,
    fault: fn() -> Result<RowOutput, StageError>,
}

impl Stage for Faulty {
    fn info(&self) -> &StageInfo {
        self.stage.info()
    }
    fn open(&mut self, sequence: SequenceId, spec: mlxnode_compute::SequenceSpec) -> Result<(), StageError> {
        self.stage.open(sequence, spec)
    }
    fn run(&mut self, batch: &MicroBatch) -> Result<BatchOutput, StageError> {
        let is_well = |row: &Row| row.position < 4;
        let mut well = batch.clone();
        well.retain(is_well)?;
        let output = self.stage.run(&well)?;
        let mut outcomes = output.rows.into_iter();
        let mut rows = Vec::new();
        for row in &batch.rows {
            rows.push(match is_well(row) {
                true => outcomes.next().unwrap(),
                false => match (self.fault)() {
                    Err(error @ StageError::Device(_)) => return Err(error),
                    outcome => outcome,
                },
            });
        }
        Ok(BatchOutput { rows, activation: output.activation })
    }
    fn close(&mut self, sequence: SequenceId) {
        self.stage.close(sequence);
    }
    fn blocks(&mut self) -> Option<&mut dyn mlxnode_compute::BlockStore> {
        self.stage.blocks()
    }
    fn load_adapter(&mut self, name: &str, folder: &std::path::Path) -> Result<(), StageError> {
        self.stage.load_adapter(name, folder)
    }
    fn unload_adapter(&mut self, name: &str) {
        self.stage.unload_adapter(name);
    }
    fn memory(&self) -> StageMemory {
        self.stage.memory()
    }
}

/// A replica of three stages whose middle one fails at the fifth position.
async fn with_fault(fault: fn() -> Result<RowOutput, StageError>) -> Replica {
    let model = Model::default();
    let faulty: mlxnode_worker::StageFactory = Box::new(move |shard, _| {
        let info = StageInfo {
            layers: shard.layers,
            layer_count: shard.layer_count,
            hidden: model.hidden,
            dtype: mlxnode_compute::Dtype::F32,
            vocabulary: VOCABULARY,
            weights: mlxnode_compute::ByteCount(0),
        };
        Ok(Box::new(Faulty { stage: SimulatedStage::new(info, Duration::ZERO), fault }))
    });
    Replica::start_with(vec![model.factory(), faulty, model.factory()], model).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sequence_that_fails_in_one_stage_spares_the_others() {
    let replica = with_fault(|| Err(StageError::Full { tokens: 5, limit: 4 })).await;
    let (client, mut events) = replica.drive().await;
    client.open(SequenceId(1), vec![1], spec(&[1], 100)).await.unwrap();
    client.open(SequenceId(2), vec![2], spec(&[2], 4)).await.unwrap();
    let mut heard = Heard::default();
    heard.until_closed(&mut events, 2).await;
    assert_eq!(heard.failures[&SequenceId(1)], "the sequence is full: 5 tokens of 4");
    assert_eq!(heard.tokens[&SequenceId(1)].len(), 4);
    assert_eq!(heard.tokens[&SequenceId(2)], SimulatedStage::expected_tokens(&[2], 4, VOCABULARY));
    client.open(SequenceId(3), vec![3], spec(&[3], 2)).await.unwrap();
    heard.until_closed(&mut events, 3).await;
    assert_eq!(heard.tokens[&SequenceId(3)].len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_fails_or_panics_ends_its_worker_with_the_reason() {
    let failing: fn() -> Result<RowOutput, StageError> = || Err(StageError::Device("out of memory".into()));
    let panicking: fn() -> Result<RowOutput, StageError> = || panic!("index out of range");
    for (fault, reason) in [(failing, "out of memory"), (panicking, "index out of range")] {
        let mut replica = with_fault(fault).await;
        let (client, mut events) = replica.drive().await;
        client.open(SequenceId(1), vec![1], spec(&[1], 100)).await.unwrap();
        let lost = tokio::time::timeout(Duration::from_secs(5), async {
            loop {
                if let Err(error) = events.next().await {
                    break error;
                }
            }
        });
        assert!(matches!(lost.await.expect("no answer"), DriveError::Lost(_)));
        let ended = replica.members[1].worker.ended().await;
        assert!(matches!(&ended, Err(Fault::Device(text)) if text.contains(reason)), "{ended:?}");
        assert_eq!(ended.unwrap_err().exit_code(), 70);
    }
}
