//! Frames back into messages, checked against what this stage expects. What does not fit strikes the sender.

use super::FRAME_BYTES;
use crate::blocks_wire::{
    block_order_from_proto, block_plan_from_proto, capacities_from_proto, keep_from_proto,
};
use crate::message::{Batch, Message, Results};
use crate::wire::{
    WireError, dtype_from_proto, row_result_from_proto, sequence_spec_from_proto, times_from_proto,
};
use bytes::{Bytes, BytesMut};
use mlxnode_compute::{Activation, ActivationError, Dtype, MicroBatch, Row, SequenceId, StepInput};
use mlxnode_proto::internal::v1 as proto;
use mlxnode_proto::internal::v1::frame::Body;
use std::collections::HashSet;

/// Which way a link goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// To a later stage: sequences and activations.
    Down,
    /// From the last stage to the first: tokens and acknowledgements.
    Ring,
}

/// What a stage accepts from the stage before it. Bounds the memory that a message may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinkPlan {
    pub(crate) epoch: u64,
    pub(crate) direction: Direction,
    pub(crate) hidden: usize,
    pub(crate) dtype: Dtype,
    /// Most tokens of a batch.
    pub(crate) most_tokens: usize,
    /// Most sequences of a batch.
    pub(crate) most_rows: usize,
    pub(crate) context_tokens: usize,
}

/// Why a frame is refused.
#[derive(Debug, thiserror::Error, PartialEq)]
pub(crate) enum FrameError {
    #[error("a frame of epoch {frame} at a worker of epoch {worker}")]
    Epoch { frame: u64, worker: u64 },
    #[error("a frame has no body")]
    Empty,
    #[error("{0} does not travel in this direction")]
    Direction(&'static str),
    #[error("a batch has {actual} tokens, expected 1 to {limit}")]
    Tokens { actual: usize, limit: usize },
    #[error("a batch has {actual} rows, expected at most {limit}, each of another sequence and with a token")]
    Rows { actual: usize, limit: usize },
    #[error("a row ends at position {end}, beyond the context of {limit} tokens")]
    Position { end: usize, limit: usize },
    #[error("a row has {actual} guesses; only a single sampled token may have some, and at most {limit}")]
    Guesses { actual: usize, limit: usize },
    #[error("an activation has shape {actual:?}, expected {expected:?}")]
    Shape { actual: Vec<u32>, expected: [usize; 2] },
    #[error("an activation is {actual:?}, this stage computes in {expected:?}")]
    Dtype { actual: Dtype, expected: Dtype },
    #[error("a frame carries {0} bytes, at most {FRAME_BYTES} are accepted")]
    FrameTooLarge(usize),
    #[error(
        "a frame of {actual} bytes at offset {offset} does not continue an activation at {expected} of {total}"
    )]
    Continuation { offset: u64, actual: usize, expected: usize, total: usize },
    #[error("another frame came before an activation was complete")]
    Interrupted,
    #[error(transparent)]
    Activation(#[from] ActivationError),
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// Makes messages of frames. Holds at most one incomplete activation.
pub(crate) struct Assembler {
    plan: LinkPlan,
    partial: Option<Partial>,
}

struct Partial {
    /// The batch but for its activation.
    batch: Batch,
    bytes: BytesMut,
    total: usize,
}

impl Assembler {
    pub(crate) fn new(plan: LinkPlan) -> Self {
        Self { plan, partial: None }
    }

    /// Takes the next frame. `None`: the activation goes on in the next frame.
    pub(crate) fn accept(&mut self, frame: proto::Frame) -> Result<Option<Message>, FrameError> {
        if frame.epoch != self.plan.epoch {
            return Err(FrameError::Epoch { frame: frame.epoch, worker: self.plan.epoch });
        }
        let body = frame.body.ok_or(FrameError::Empty)?;
        if let Some(partial) = self.partial.take() {
            return match body {
                Body::Batch(frame) => self.continue_batch(partial, &frame),
                _ => Err(FrameError::Interrupted),
            };
        }
        match (body, self.plan.direction) {
            (Body::Open(open), Direction::Down) => {
                let spec = open.spec.ok_or(WireError::Missing("the sequence's parameters"))?;
                let spec = sequence_spec_from_proto(spec, open.prompt_tokens as usize)?;
                let (sequence, blocks) = (SequenceId(open.sequence), block_plan_from_proto(open.blocks)?);
                Ok(Some(Message::Open { sequence, spec, stages: open.stages, blocks }))
            }
            (Body::Keep(keep), Direction::Down) => {
                let (sequence, keep) = keep_from_proto(&keep)?;
                Ok(Some(Message::Keep { sequence, keep }))
            }
            (Body::Blocks(order), Direction::Down) => {
                Ok(Some(Message::Blocks(block_order_from_proto(order)?)))
            }
            (Body::Capacities(capacities), _) => {
                Ok(Some(Message::Reset { capacities: capacities_from_proto(&capacities)? }))
            }
            (Body::Missing(missing), _) => {
                Ok(Some(Message::Missing { sequence: SequenceId(missing.sequence) }))
            }
            (Body::Batch(frame), Direction::Down) => self.begin_batch(frame),
            (Body::Close(close), _) => Ok(Some(Message::Close { sequence: SequenceId(close.sequence) })),
            (Body::Failed(failed), _) => {
                let reason = crate::error::shortened(&failed.reason);
                Ok(Some(Message::Failed { sequence: SequenceId(failed.sequence), reason }))
            }
            (Body::Opened(opened), Direction::Ring) => {
                let (sequence, stages) = (SequenceId(opened.sequence), opened.stages);
                Ok(Some(Message::Opened { sequence, stages }))
            }
            (Body::Results(results), Direction::Ring) => self.results(results).map(Some),
            (Body::Keep(_) | Body::Blocks(_), Direction::Ring) => {
                Err(FrameError::Direction("an order for a block"))
            }
            (Body::Open(_), Direction::Ring) => Err(FrameError::Direction("a new sequence")),
            (Body::Batch(_), Direction::Ring) => Err(FrameError::Direction("a batch")),
            (Body::Opened(_), Direction::Down) => Err(FrameError::Direction("an opened sequence")),
            (Body::Results(_), Direction::Down) => Err(FrameError::Direction("what became of a batch")),
        }
    }

    fn results(&self, results: proto::BatchResults) -> Result<Message, FrameError> {
        let (actual, limit) = (results.rows.len(), self.plan.most_rows);
        if actual > limit {
            return Err(FrameError::Rows { actual, limit });
        }
        let rows = results.rows.into_iter().map(row_result_from_proto).collect::<Result<_, _>>()?;
        let times = times_from_proto(&results.times)?;
        Ok(Message::Results(Results { number: results.number, rows, times }))
    }

    fn begin_batch(&mut self, frame: proto::BatchFrame) -> Result<Option<Message>, FrameError> {
        let plan = &self.plan;
        let times = times_from_proto(&frame.times)?;
        if frame.rows.is_empty() && frame.data.is_empty() {
            let micro = MicroBatch { rows: Vec::new(), input: StepInput::Tokens };
            return Ok(Some(Message::Batch(Batch { number: frame.number, micro, times })));
        }
        let mut tokens = 0_usize;
        let mut sequences = HashSet::with_capacity(frame.rows.len().min(plan.most_rows));
        for row in &frame.rows {
            if row.tokens.is_empty() || sequences.len() >= plan.most_rows || !sequences.insert(row.sequence) {
                return Err(FrameError::Rows { actual: frame.rows.len(), limit: plan.most_rows });
            }
            let guesses = row.guesses.len();
            let may_guess = row.sample && row.tokens.len() == 1 && guesses <= Row::MOST_GUESSES;
            if guesses > 0 && !may_guess {
                return Err(FrameError::Guesses { actual: guesses, limit: Row::MOST_GUESSES });
            }
            let end = row.position as usize + row.tokens.len() + guesses;
            if end > plan.context_tokens {
                return Err(FrameError::Position { end, limit: plan.context_tokens });
            }
            tokens += row.tokens.len() + guesses;
        }
        if tokens == 0 || tokens > plan.most_tokens {
            return Err(FrameError::Tokens { actual: tokens, limit: plan.most_tokens });
        }
        let expected = [tokens, plan.hidden];
        if frame.shape.len() != 2
            || frame.shape.iter().zip(expected).any(|(have, want)| *have as usize != want)
        {
            return Err(FrameError::Shape { actual: frame.shape.into_iter().take(4).collect(), expected });
        }
        let dtype = dtype_from_proto(frame.dtype)?;
        if dtype != plan.dtype {
            return Err(FrameError::Dtype { actual: dtype, expected: plan.dtype });
        }
        let total = tokens
            .checked_mul(plan.hidden)
            .and_then(|elements| elements.checked_mul(dtype.size()))
            .filter(|total| *total <= Activation::MAX_BYTES)
            .ok_or(ActivationError::TooLarge { tokens, hidden: plan.hidden })?;
        if frame.data.len() > FRAME_BYTES {
            return Err(FrameError::FrameTooLarge(frame.data.len()));
        }
        let row = |row: proto::BatchRow| Row {
            sequence: SequenceId(row.sequence),
            position: row.position as usize,
            tokens: row.tokens,
            sample: row.sample,
            guesses: row.guesses,
        };
        let rows = frame.rows.into_iter().map(row).collect();
        // The input is replaced when the activation is complete.
        let micro = MicroBatch { rows, input: StepInput::Tokens };
        let batch = Batch { number: frame.number, micro, times };
        if frame.data.len() == total {
            return self.complete(batch, frame.data);
        }
        if frame.offset != 0 || frame.data.is_empty() || frame.data.len() > total {
            return Err(FrameError::Continuation {
                offset: frame.offset,
                actual: frame.data.len(),
                expected: 0,
                total,
            });
        }
        let mut bytes = BytesMut::with_capacity(total);
        bytes.extend_from_slice(&frame.data);
        self.partial = Some(Partial { batch, bytes, total });
        Ok(None)
    }

    fn continue_batch(
        &mut self,
        mut partial: Partial,
        frame: &proto::BatchFrame,
    ) -> Result<Option<Message>, FrameError> {
        if frame.number != partial.batch.number {
            return Err(FrameError::Interrupted);
        }
        if frame.data.len() > FRAME_BYTES {
            return Err(FrameError::FrameTooLarge(frame.data.len()));
        }
        let fits = partial.bytes.len() + frame.data.len() <= partial.total;
        if frame.offset != partial.bytes.len() as u64 || frame.data.is_empty() || !fits {
            return Err(FrameError::Continuation {
                offset: frame.offset,
                actual: frame.data.len(),
                expected: partial.bytes.len(),
                total: partial.total,
            });
        }
        partial.bytes.extend_from_slice(&frame.data);
        if partial.bytes.len() == partial.total {
            return self.complete(partial.batch, partial.bytes.freeze());
        }
        self.partial = Some(partial);
        Ok(None)
    }

    fn complete(&self, mut batch: Batch, bytes: Bytes) -> Result<Option<Message>, FrameError> {
        let activation = Activation::new(batch.micro.tokens(), self.plan.hidden, self.plan.dtype, bytes)?;
        batch.micro.input = StepInput::Activation(activation);
        Ok(Some(Message::Batch(batch)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Frames;
    use super::*;
    use crate::message::{RowResult, StageTimes};
    use mlxnode_compute::{
        BlockCapacity, BlockHash, BlockId, BlockOrder, BlockPlan, ByteCount, Keep, Sampled, SequenceEnd,
        SequenceSpec,
    };
    use std::time::Duration;

    const PLAN: LinkPlan = LinkPlan {
        epoch: 7,
        direction: Direction::Down,
        hidden: 1024,
        dtype: Dtype::F32,
        most_tokens: 700,
        most_rows: 4,
        context_tokens: 10_000,
    };
    const RING: LinkPlan = LinkPlan { direction: Direction::Ring, ..PLAN };

    /// A chunk, and two rows of single tokens when there are more than two.
    fn batch(tokens: usize) -> Message {
        let bytes: Vec<u8> = (0..tokens * 4096).map(|at| (at % 251) as u8).collect();
        let activation = Activation::new(tokens, 1024, Dtype::F32, Bytes::from(bytes)).unwrap();
        let row = |sequence: u64, tokens: std::ops::Range<usize>| Row {
            sequence: SequenceId(sequence),
            position: 11,
            sample: tokens.len() == 1,
            tokens: tokens.map(|token| token as u32).collect(),
            guesses: Vec::new(),
        };
        let rows = match tokens {
            1 | 2 => vec![row(3, 0..tokens)],
            _ => vec![row(3, 0..1), row(4, 1..2), row(5, 2..tokens)],
        };
        let times = vec![StageTimes { compute: Duration::from_micros(5), ..StageTimes::default() }];
        let micro = MicroBatch { rows, input: StepInput::Activation(activation) };
        Message::Batch(Batch { number: 8, micro, times })
    }

    fn assembled(
        plan: LinkPlan,
        frames: impl IntoIterator<Item = proto::Frame>,
    ) -> Result<Option<Message>, FrameError> {
        let mut assembler = Assembler::new(plan);
        let mut last = Ok(None);
        for frame in frames {
            assert_eq!(last, Ok(None), "frames after the message was complete");
            last = assembler.accept(frame);
            if last.is_err() {
                break;
            }
        }
        last
    }

    #[test]
    fn messages_survive_the_link() {
        let sequence = SequenceId(9);
        let spec = SequenceSpec { stop_tokens: vec![1], ..SequenceSpec::new(5, 6, Default::default()) };
        let sampled = Sampled { token: 4, logprob: None, top: vec![] };
        let token = Some((sampled.clone(), Some(SequenceEnd::Stop)));
        let scores = vec![Sampled { logprob: Some(-1.5), ..sampled }];
        let row = |token: Option<_>, scores, embedding| {
            let further = token.iter().cloned().collect();
            RowResult { sequence, position: 5, token, further, scores, embedding }
        };
        let rows = vec![row(token, scores, None), row(None, vec![], Some(vec![0.5]))];
        let times = vec![StageTimes::default(); 3];
        let none = MicroBatch { rows: vec![], input: StepInput::Tokens };
        let keep = Keep { number: 2, block: BlockId(9), checkpoint: true };
        let hash = BlockHash([5; 32]);
        let capacity =
            BlockCapacity { block: ByteCount(3), fingerprint: [7; 32], ..BlockCapacity::default() };
        let both = [
            Message::Missing { sequence },
            Message::Reset { capacities: vec![capacity; 2] },
            Message::Close { sequence },
            Message::Failed { sequence, reason: "full".into() },
        ];
        let down = [
            Message::Open {
                sequence,
                spec,
                stages: 1,
                blocks: BlockPlan { reuse: vec![BlockId(4), BlockId(u64::MAX)], keep: vec![keep] },
            },
            Message::Keep { sequence, keep },
            Message::Blocks(BlockOrder::Drop { block: BlockId(1) }),
            Message::Blocks(BlockOrder::Spill { block: BlockId(2), hash }),
            Message::Blocks(BlockOrder::Restore { block: BlockId(3), hash }),
            Message::Blocks(BlockOrder::Erase { hash }),
            batch(1),
            batch(256),
            batch(257),
            batch(700),
            Message::Batch(Batch { number: 9, micro: none, times: vec![] }),
        ];
        let ring = [
            Message::Opened { sequence, stages: 3 },
            Message::Results(Results { number: 8, rows, times }),
            Message::Results(Results { number: 9, rows: vec![], times: vec![] }),
        ];
        for (plan, messages) in [(PLAN, down.iter().chain(&both)), (RING, ring.iter().chain(&both))] {
            for message in messages {
                let frames: Vec<_> = Frames::of(7, message.clone()).unwrap().collect();
                let largest = frames.iter().filter_map(|frame| match &frame.body {
                    Some(Body::Batch(batch)) => Some(batch.data.len()),
                    _ => None,
                });
                assert!(largest.max().unwrap_or(0) <= FRAME_BYTES);
                assert_eq!(assembled(plan, frames).as_ref(), Ok(&Some(message.clone())));
            }
        }
        for (plan, messages) in [(RING, down.to_vec()), (PLAN, ring.to_vec())] {
            for message in messages {
                let frame = Frames::of(7, message).unwrap().next();
                assert!(matches!(assembled(plan, frame), Err(FrameError::Direction(_))));
            }
        }
    }

    /// The frames of a batch of 700 tokens (three of them), with one changed.
    fn spoiled(which: usize, change: impl Fn(&mut proto::Frame, &mut proto::BatchFrame)) -> FrameError {
        let mut frames: Vec<_> = Frames::of(7, batch(700)).unwrap().collect();
        let Some(Body::Batch(mut body)) = frames[which].body.take() else { panic!("a batch") };
        change(&mut frames[which], &mut body);
        if frames[which].body.is_none() {
            frames[which].body = Some(Body::Batch(body));
        }
        assembled(PLAN, frames).expect_err("spoiled frames")
    }

    #[test]
    fn refuses_what_does_not_fit_the_plan() {
        let bytes = |length| Bytes::from(vec![0; length]);
        assert_eq!(spoiled(0, |frame, _| frame.epoch = 6), FrameError::Epoch { frame: 6, worker: 7 });
        assert_eq!(spoiled(2, |frame, _| frame.epoch = 8), FrameError::Epoch { frame: 8, worker: 7 });
        assert!(matches!(spoiled(0, |_, batch| batch.shape[1] = 1 << 30), FrameError::Shape { .. }));
        assert!(matches!(spoiled(0, |_, batch| batch.shape.clear()), FrameError::Shape { .. }));
        assert!(matches!(
            spoiled(0, |_, batch| batch.rows[0].tokens.push(0)),
            FrameError::Tokens { actual: 701, .. }
        ));
        assert!(matches!(
            spoiled(0, |_, batch| batch.rows[1].tokens.clear()),
            FrameError::Rows { actual: 3, .. }
        ));
        assert!(
            matches!(spoiled(0, |_, batch| batch.rows[1].sequence = 3), FrameError::Rows { .. }),
            "twice"
        );
        assert!(matches!(
            spoiled(0, |_, batch| batch.rows = vec![batch.rows[0].clone(); 5]),
            FrameError::Rows { actual: 5, limit: 4 }
        ));
        assert!(matches!(
            spoiled(0, |_, batch| batch.rows[2].position = u32::MAX),
            FrameError::Position { .. }
        ));
        assert!(matches!(spoiled(0, |_, batch| batch.dtype = 2), FrameError::Dtype { .. }));
        assert!(matches!(spoiled(0, |_, batch| batch.dtype = 99), FrameError::Wire(_)));
        assert!(matches!(spoiled(0, |_, batch| batch.offset = 4), FrameError::Continuation { .. }));
        assert!(matches!(spoiled(0, |_, batch| batch.data = bytes(0)), FrameError::Continuation { .. }));
        assert!(matches!(
            spoiled(0, |_, batch| batch.data = bytes(FRAME_BYTES + 1)),
            FrameError::FrameTooLarge(_)
        ));
        assert!(matches!(spoiled(1, |_, batch| batch.data = bytes(0)), FrameError::Continuation { .. }));
        assert!(matches!(spoiled(1, |_, batch| batch.offset += 1), FrameError::Continuation { .. }));
        assert!(matches!(
            spoiled(1, |_, batch| batch.data = bytes(FRAME_BYTES + 1)),
            FrameError::FrameTooLarge(_)
        ));
        assert!(matches!(
            spoiled(2, |_, batch| batch.data = bytes(FRAME_BYTES)),
            FrameError::Continuation { .. }
        ));
        assert_eq!(spoiled(1, |_, batch| batch.number = 4), FrameError::Interrupted);
        let interrupting = Body::Close(proto::CloseSequence { sequence: 3 });
        assert_eq!(spoiled(1, |frame, _| frame.body = Some(interrupting.clone())), FrameError::Interrupted);
        assert_eq!(assembled(PLAN, [proto::Frame { epoch: 7, body: None }]), Err(FrameError::Empty));
    }
}
