//! The one thread that owns the stage, from load to drop.
//!
//! MLX binds arrays and streams to the thread that made them, so nothing else may touch the stage. Messages come in through a
//! bounded channel and go out through another; while the outbox is full the thread waits, which is the pipeline's
//! back-pressure. It ends when every sender of its inbox is gone, or on a fault.

use crate::errand::{Errand, Errands};
use crate::error::{Fault, shortened};
use crate::lifeline::Lifeline;
use crate::link::Received;
use crate::message::Message;
use crate::progress::Progress;
use crate::queue::StepQueue;
use crate::shard::Shard;
use crate::spans::StageSpans;
use mlxnode_compute::{ByteCount, LayerRange, MicroBatch, SpanSink, Stage, StageInfo};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot, watch};

/// Which part of which model to load, and how much room its sequences get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadShard {
    /// The model's folder.
    pub folder: PathBuf,
    /// Which layers.
    pub layers: LayerRange,
    /// Layers of the whole model.
    pub layer_count: usize,
    /// Longest sequence, prompt and answer together.
    pub context_tokens: usize,
    /// Sequences at a time.
    pub max_sequences: usize,
    /// Longest prefill chunk, in tokens.
    pub prefill_chunk: usize,
    /// What blocks of prompts may take; None: they are not kept.
    pub blocks: Option<BlockRoom>,
    /// How the first stage guesses tokens ahead; None: it does not.
    pub guessing: Option<Guessing>,
}

/// How tokens are guessed ahead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guessing {
    /// Folder of a smaller model with the same tokens. None: by what came before in the text.
    pub draft: Option<PathBuf>,
    /// Without a draft model: most tokens that must have come before.
    pub ngram: usize,
    /// Tokens at once.
    pub tokens: usize,
}

/// What blocks of prompts may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockRoom {
    /// In the worker's memory.
    pub memory: ByteCount,
    /// On the disk, those of other workers included; 0: they are not there.
    pub disk: ByteCount,
    /// Where their files lie, with those of other workers.
    pub folder: PathBuf,
}

impl LoadShard {
    /// Most tokens of one batch: a chunk beside a token of every sequence and guesses.
    pub(crate) fn most_tokens(&self) -> usize {
        let chunk = self.prefill_chunk.min(self.context_tokens);
        chunk.saturating_add(self.max_sequences).saturating_add(MicroBatch::MOST_GUESSES)
    }
}

/// Why a stage could not be loaded; its text reaches the person who asked for the model.
pub type LoadFailure = Box<dyn std::error::Error + Send + Sync>;

/// Loads a stage. Called once, on the thread that will own it. Calls its second argument with (bytes done, bytes in all).
pub type StageFactory =
    Box<dyn FnOnce(LoadShard, &mut dyn FnMut(u64, u64)) -> Result<Box<dyn Stage>, LoadFailure> + Send>;

/// The ends of a compute thread.
pub(crate) struct ComputeThread {
    pub(crate) inbox: mpsc::Sender<Received>,
    pub(crate) outbox: mpsc::Receiver<Message>,
    pub(crate) errands: Errands,
    /// (done, total) bytes while loading.
    pub(crate) loading: watch::Receiver<(u64, u64)>,
    /// Facts of the stage once it is loaded.
    pub(crate) loaded: oneshot::Receiver<Result<StageInfo, Fault>>,
    /// Resolves when the thread has dropped the stage.
    pub(crate) dropped: oneshot::Receiver<()>,
}

/// Starts the thread; it begins to load at once.
pub(crate) fn spawn(
    factory: StageFactory,
    shard: LoadShard,
    inbox_messages: usize,
    outbox_messages: usize,
    progress: Arc<Progress>,
    lifeline: Lifeline,
    spans: Option<Arc<dyn SpanSink>>,
) -> std::io::Result<ComputeThread> {
    let (inbox, mut messages) = mpsc::channel(inbox_messages);
    let (results, outbox) = mpsc::channel(outbox_messages);
    let (errands, mut errands_in) = Errands::channel();
    let (loading_sender, loading) = watch::channel((0, 0));
    let (loaded_sender, loaded) = oneshot::channel();
    let (dropped_sender, dropped) = oneshot::channel::<()>();
    std::thread::Builder::new().name("compute".into()).spawn(move || {
        let _dropped = dropped_sender; // its end tells that the thread is through with the stage
        let max_sequences = shard.max_sequences;
        let mut loaded_sender = Some(loaded_sender);
        let mut report = |outcome| {
            if let Some(sender) = loaded_sender.take() {
                let _ = sender.send(outcome); // nobody waits when the node gave up
            }
        };
        let life = || {
            let mut on_progress = |done, total| {
                loading_sender.send_replace((done, total));
            };
            match factory(shard, &mut on_progress) {
                Ok(stage) => {
                    let shard = Shard::new(stage, max_sequences);
                    progress.holds(0, shard.memory());
                    report(Ok(shard.info().clone()));
                    let spans = StageSpans::new(spans, shard.info().layers);
                    work(shard, &mut messages, &mut errands_in, &results, &progress, &lifeline, spans)
                }
                Err(failure) => {
                    report(Err(Fault::Load(shortened(&with_causes(failure.as_ref())))));
                    Ok(())
                }
            }
        };
        let outcome = catch_unwind(AssertUnwindSafe(life)).unwrap_or_else(|panic| {
            Err(Fault::Device(format!("the compute thread panicked: {}", text_of(&*panic))))
        });
        if let Err(fault) = outcome {
            report(Err(fault.clone()));
            lifeline.fail(fault);
        }
        // Only now, or the links would end first and be taken for the cause.
        drop((messages, errands_in, results));
    })?;
    Ok(ComputeThread { inbox, outbox, errands, loading, loaded, dropped })
}

/// Works until the senders are gone.
fn work(
    mut shard: Shard,
    messages: &mut mpsc::Receiver<Received>,
    errands: &mut mpsc::Receiver<Errand>,
    results: &mpsc::Sender<Message>,
    progress: &Progress,
    lifeline: &Lifeline,
    mut spans: StageSpans,
) -> Result<(), Fault> {
    let mut queue = StepQueue::new();
    while !lifeline.is_ended() {
        while let Ok(received) = messages.try_recv() {
            queue.push(received.message, (received.credit, received.arrived));
        }
        if let Ok(errand) = errands.try_recv() {
            shard.errand(errand)?;
            progress.holds(shard.open_sequences(), shard.memory());
            continue;
        }
        let Some((message, (credit, arrived))) = queue.pop() else {
            if shard.rest()? {
                continue; // after a look at the inboxes
            }
            match futures::executor::block_on(next(messages, errands)) {
                Some(Next::Message(received)) => {
                    queue.push(received.message, (received.credit, received.arrived))
                }
                Some(Next::Errand(errand)) => {
                    shard.errand(errand)?;
                    progress.holds(shard.open_sequences(), shard.memory());
                }
                None => break,
            }
            continue;
        };
        drop(credit);
        let step = match &message {
            Message::Batch(batch) => Some(progress.step_begins(&batch.micro, arrived.elapsed())),
            _ => None,
        };
        let sequences = spans.see(&message);
        let result = shard.handle(message);
        let times = step.map(|step| progress.step_ended(step));
        if let Some(times) = times {
            spans.stepped(&sequences, times);
            progress.guessed(shard.guesses());
        }
        progress.holds(shard.open_sequences(), shard.memory());
        for mut message in result? {
            if let Some(times) = times {
                message.took(times);
            }
            if results.blocking_send(message).is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}

#[expect(clippy::large_enum_variant, reason = "messages are the many, and one exists at a time")]
enum Next {
    Message(Received),
    Errand(Errand),
}

/// Waits for either. None: nobody is left who could send messages.
async fn next(messages: &mut mpsc::Receiver<Received>, errands: &mut mpsc::Receiver<Errand>) -> Option<Next> {
    tokio::select! {
        biased;
        message = messages.recv() => message.map(Next::Message),
        Some(errand) = errands.recv() => Some(Next::Errand(errand)),
    }
}

/// An error and what caused it, in one line.
fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}
