//! Many requests through a scheduler's task, with simulated stages behind it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a failing test is supposed to stop"
)]

use futures::StreamExt;
use mlxnode_compute::simulated::{SIMULATED_BLOCKS, SimulatedStage};
use mlxnode_compute::{
    ByteCount, Dtype, LayerRange, Sampling, SequenceEnd, SequenceId, SequenceSpec, Stage, StageInfo, Step,
    StepInput, StepOutput,
};
use mlxnode_coordinator::scheduler::{
    Drive, DriveCommand, DriveEvent, Ended, Limits, RunError, RunEvent, RunRequest, RunStream,
    SchedulerHandle, SchedulerTask, start,
};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

const VOCABULARY: usize = 1000;

/// Runs all open sequences in turn, a token each, through stages that notice whatever is out of order. Ends when the commands
/// do, or after `steps` steps.
async fn workers(
    stage_count: usize,
    steps: usize,
    mut commands: mpsc::Receiver<DriveCommand>,
    events: mpsc::Sender<DriveEvent>,
) -> usize {
    let layers = stage_count * 2;
    let mut stages: Vec<SimulatedStage> = (0..stage_count)
        .map(|stage| {
            let info = StageInfo {
                layers: LayerRange::new(stage * 2, stage * 2 + 2),
                layer_count: layers,
                hidden: 2,
                dtype: Dtype::F32,
                vocabulary: VOCABULARY,
                weights: ByteCount(0),
            };
            SimulatedStage::new(info, Duration::ZERO)
        })
        .collect();
    let capacities = stages.iter_mut().map(|stage| stage.blocks().unwrap().reset()).collect();
    events.send(DriveEvent::Capacity { stages: capacities }).await.unwrap();
    /// Tokens to feed, position, tokens left to generate.
    type Row = (Vec<u32>, usize, usize);
    let mut rows: BTreeMap<SequenceId, Row> = BTreeMap::new();
    let mut most = 0;
    for _ in 0..steps {
        while let Some(command) =
            if rows.is_empty() { commands.recv().await } else { commands.try_recv().ok() }
        {
            match command {
                DriveCommand::Open { sequence, prompt, spec, blocks } => {
                    for stage in &mut stages {
                        stage.open(sequence, spec.clone()).unwrap();
                        let store = stage.blocks().unwrap();
                        store.begin_with(sequence, &blocks.reuse).unwrap();
                        blocks.keep.iter().for_each(|keep| store.keep(sequence, *keep).unwrap());
                    }
                    let cached = blocks.cached_tokens();
                    rows.insert(sequence, (prompt[cached..].to_vec(), cached, spec.max_tokens));
                    events.send(DriveEvent::Started { sequence }).await.unwrap();
                }
                DriveCommand::Keep { sequence, keep } => {
                    if rows.contains_key(&sequence) {
                        stages
                            .iter_mut()
                            .for_each(|stage| stage.blocks().unwrap().keep(sequence, keep).unwrap());
                    }
                }
                DriveCommand::Blocks(order) => {
                    stages.iter_mut().for_each(|stage| stage.blocks().unwrap().order(order).unwrap());
                }
                DriveCommand::Cancel { sequence } => {
                    if rows.remove(&sequence).is_some() {
                        stages.iter_mut().for_each(|stage| stage.close(sequence));
                        events.send(DriveEvent::Closed { sequence }).await.unwrap();
                    }
                }
            }
        }
        if rows.is_empty() {
            return most; // the scheduler is gone
        }
        most = most.max(rows.len());
        let mut ended = Vec::new();
        for (sequence, (tokens, position, left)) in &mut rows {
            let mut input = StepInput::Tokens;
            let mut sampled = None;
            for stage in &mut stages {
                let step = Step {
                    sequence: *sequence,
                    position: *position,
                    tokens: tokens.clone(),
                    input,
                    sample: true,
                };
                input = StepInput::Tokens;
                match stage.step(step).unwrap() {
                    StepOutput::Activation(activation) => input = StepInput::Activation(activation),
                    StepOutput::Sampled(token) => sampled = Some(token),
                    StepOutput::Nothing => panic!("asked to sample"),
                }
            }
            let sampled = sampled.unwrap();
            *position += tokens.len();
            *tokens = vec![sampled.token];
            *left -= 1;
            let end = (*left == 0).then_some(SequenceEnd::Length);
            if end.is_some() {
                ended.push(*sequence);
            }
            let event = DriveEvent::Token { sequence: *sequence, position: *position, sampled, end };
            if events.send(event).await.is_err() {
                return most;
            }
        }
        for sequence in ended {
            rows.remove(&sequence);
            stages.iter_mut().for_each(|stage| stage.close(sequence));
            if events.send(DriveEvent::Closed { sequence }).await.is_err() {
                return most;
            }
        }
        tokio::task::yield_now().await;
    }
    most
}

fn replica(
    limits: Limits,
    stages: usize,
    steps: usize,
) -> (SchedulerHandle, SchedulerTask, JoinHandle<usize>) {
    let (command_sender, commands) = mpsc::channel(2);
    let (event_sender, events) = mpsc::channel(2);
    let workers = tokio::spawn(workers(stages, steps, commands, event_sender));
    let (handle, task) = start(limits, Drive { commands: command_sender, events }, None);
    (handle, task, workers)
}

fn request(prompt: Vec<u32>, max_tokens: usize) -> RunRequest {
    let spec = SequenceSpec::new(prompt.len(), max_tokens, Sampling::default());
    RunRequest { prompt, spec, deadline: None, tenant: String::new() }
}

async fn tokens(mut stream: RunStream) -> Result<Vec<u32>, RunError> {
    let mut tokens = Vec::new();
    let mut started = false;
    while let Some(event) = stream.next().await {
        match event? {
            RunEvent::Started { .. } => assert!(!std::mem::replace(&mut started, true)),
            RunEvent::Token { sampled, .. } => tokens.push(sampled.token),
            other => panic!("nobody asked: {other:?}"),
        }
    }
    assert!(started);
    Ok(tokens)
}

async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), work).await.expect("took too long")
}

#[tokio::test]
async fn many_requests_get_exactly_their_own_tokens() {
    for stages in 1..=3 {
        let (handle, task, workers) = replica(Limits::new(6, 200), stages, usize::MAX);
        let requests: Vec<Vec<u32>> =
            (0..100u32).map(|number| (0..number % 7 + 1).map(|place| number * 7 + place).collect()).collect();
        let answers = requests.iter().enumerate().map(|(number, prompt)| {
            let count = number % 20 + 1;
            let stream = handle.run(request(prompt.clone(), count));
            async move { (prompt, count, tokens(stream).await) }
        });
        for (prompt, count, answer) in within(futures::future::join_all(answers)).await {
            assert_eq!(answer, Ok(SimulatedStage::expected_tokens(prompt, count, VOCABULARY)));
        }
        assert_eq!(handle.statistics().active + handle.statistics().queued, 0);
        drop(handle);
        let mut task = task;
        assert_eq!(within(task.ended()).await, Ended::Stopped);
        drop(task);
        assert_eq!(within(workers).await.unwrap(), 6, "as many at once as allowed");
    }
}

#[tokio::test]
async fn conversations_go_on_where_they_were_and_leave_nothing_behind() {
    let (handle, _task, _workers) = replica(Limits::new(4, 100_000), 2, usize::MAX);
    let mut cached = 0;
    for round in 0..8u32 {
        // Five conversations at a time that share a beginning and part in the second block; each has three turns.
        let talks = (0..5u32).map(|talk| {
            let mut prompt: Vec<u32> = (0..300).collect();
            prompt.extend((0..200).map(|place| (round * 5 + talk + place) % 90));
            let handle = &handle;
            async move {
                let mut cached = 0;
                for turn in 0..3 {
                    let count = 20 + 100 * turn;
                    let mut stream = handle.run(request(prompt.clone(), count));
                    let mut answer = Vec::new();
                    while let Some(event) = stream.next().await {
                        match event.unwrap() {
                            RunEvent::Started { cached_tokens } => cached += cached_tokens,
                            RunEvent::Token { sampled, .. } => answer.push(sampled.token),
                            other => panic!("nobody asked: {other:?}"),
                        }
                    }
                    assert_eq!(answer, SimulatedStage::expected_tokens(&prompt, count, VOCABULARY));
                    prompt.extend(answer);
                    prompt.extend([turn as u32; 9]);
                }
                cached
            }
        });
        cached += within(futures::future::join_all(talks)).await.into_iter().sum::<usize>();
    }
    let mut statistics = handle.watch_statistics();
    let idle = within(statistics.wait_for(|now| now.open_sequences == 0 && now.queued == 0)).await.unwrap();
    assert_eq!(idle.prompts.cached_tokens, cached as u64);
    assert_eq!(idle.prompts.blocks_in_memory as u64, SIMULATED_BLOCKS, "as many as fit");
    // The second and third turns begin with all full blocks of the one before.
    assert!(cached >= 8 * 5 * (256 + 512), "{cached} tokens were there");
}

#[tokio::test]
async fn a_dropped_stream_frees_its_place() {
    let (handle, _task, _workers) = replica(Limits::new(1, 100_000), 1, usize::MAX);
    let mut endless = handle.run(request(vec![1], 90_000));
    let waiting = handle.run(request(vec![2, 3], 3));
    let dropped_while_waiting = handle.run(request(vec![4], 90_000));
    assert_eq!(within(endless.next()).await, Some(Ok(RunEvent::Started { cached_tokens: 0 })));
    drop(dropped_while_waiting);
    drop(endless);
    assert_eq!(within(tokens(waiting)).await, Ok(SimulatedStage::expected_tokens(&[2, 3], 3, VOCABULARY)));
    let mut statistics = handle.watch_statistics();
    within(statistics.wait_for(|now| now.open_sequences == 0 && now.queued == 0)).await.unwrap();
}

#[tokio::test]
async fn a_passed_deadline_ends_the_stream() {
    let (handle, _task, _workers) = replica(Limits::new(1, 100_000_000), 1, usize::MAX);
    let deadline = Some(Instant::now() + Duration::from_millis(50));
    let stream = handle.run(RunRequest { deadline, ..request(vec![1], 90_000_000) });
    assert_eq!(within(tokens(stream)).await, Err(RunError::DeadlineExceeded));
}

#[tokio::test]
async fn lost_workers_end_every_request_with_a_typed_error() {
    let (handle, mut task, workers) = replica(Limits::new(2, 10_000), 2, 40);
    let streams: Vec<_> = (0..5).map(|number| handle.run(request(vec![number], 9_000))).collect();
    for answer in within(futures::future::join_all(streams.into_iter().map(|stream| async {
        let items: Vec<_> = stream.collect().await;
        items.last().cloned()
    })))
    .await
    {
        assert!(matches!(answer, Some(Err(RunError::Unavailable(_)))), "{answer:?}");
    }
    assert!(matches!(within(task.ended()).await, Ended::DriverLost(_)));
    within(workers).await.unwrap();
    let mut late = handle.run(request(vec![1], 1));
    assert!(matches!(within(late.next()).await, Some(Err(RunError::Unavailable(_)))));
    assert_eq!(within(late.next()).await, None);
}

#[tokio::test]
async fn a_full_queue_refuses_and_a_stop_ends_what_runs() {
    let limits = Limits { max_queued: 3, ..Limits::new(1, 10_000) };
    let (handle, task, _workers) = replica(limits, 1, usize::MAX);
    let streams: Vec<_> = (0..6).map(|number| handle.run(request(vec![number], 9_000))).collect();
    let mut statistics = handle.watch_statistics();
    within(statistics.wait_for(|now| now.active == 1 && now.queued == 3)).await.unwrap();
    assert_eq!(within(task.stop()).await, Ended::Stopped);
    let mut errors = Vec::new();
    for stream in streams {
        let items: Vec<_> = within(stream.collect()).await;
        errors.push(items.last().unwrap().clone().unwrap_err());
    }
    assert_eq!(errors[4], RunError::QueueFull { queued: 3, tokens: 3 });
    assert_eq!(errors[5], RunError::QueueFull { queued: 3, tokens: 3 });
    assert!(errors[..4].iter().all(|error| matches!(error, RunError::Unavailable(_))), "{errors:?}");
}
