//! Frames back into messages, checked against what this stage expects. What does not fit strikes the sender.

use super::FRAME_BYTES;
use crate::message::Message;
use crate::wire::{WireError, dtype_from_proto, sampled_token_from_proto, sequence_spec_from_proto};
use bytes::{Bytes, BytesMut};
use mlxnode_compute::{Activation, ActivationError, Dtype, SequenceId, Step, StepInput};
use mlxnode_proto::internal::v1 as proto;
use mlxnode_proto::internal::v1::frame::Body;

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
    pub(crate) prefill_chunk: usize,
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
    #[error("a step has {actual} tokens, expected 1 to {limit}")]
    Tokens { actual: usize, limit: usize },
    #[error("a step ends at position {end}, beyond the context of {limit} tokens")]
    Position { end: usize, limit: usize },
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
    /// The step but for its input.
    step: Step,
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
                Body::Step(frame) => self.continue_step(partial, &frame),
                _ => Err(FrameError::Interrupted),
            };
        }
        match (body, self.plan.direction) {
            (Body::Open(open), Direction::Down) => {
                let spec = open.spec.ok_or(WireError::Missing("the sequence's parameters"))?;
                let spec = sequence_spec_from_proto(spec, open.prompt_tokens as usize)?;
                Ok(Some(Message::Open { sequence: SequenceId(open.sequence), spec, stages: open.stages }))
            }
            (Body::Step(frame), Direction::Down) => self.begin_step(frame),
            (Body::Close(close), _) => Ok(Some(Message::Close { sequence: SequenceId(close.sequence) })),
            (Body::Failed(failed), _) => {
                let reason = crate::error::shortened(&failed.reason);
                Ok(Some(Message::Failed { sequence: SequenceId(failed.sequence), reason }))
            }
            (Body::Opened(opened), Direction::Ring) => {
                let (sequence, stages) = (SequenceId(opened.sequence), opened.stages);
                Ok(Some(Message::Opened { sequence, stages }))
            }
            (Body::Token(token), Direction::Ring) => {
                Ok(Some(Message::Sampled(sampled_token_from_proto(token)?)))
            }
            (Body::Done(done), Direction::Ring) => {
                let (sequence, position) = (SequenceId(done.sequence), done.position as usize);
                Ok(Some(Message::Done { sequence, position }))
            }
            (Body::Open(_), Direction::Ring) => Err(FrameError::Direction("a new sequence")),
            (Body::Step(_), Direction::Ring) => Err(FrameError::Direction("a step")),
            (Body::Opened(_), Direction::Down) => Err(FrameError::Direction("an opened sequence")),
            (Body::Token(_), Direction::Down) => Err(FrameError::Direction("a token")),
            (Body::Done(_), Direction::Down) => Err(FrameError::Direction("a finished step")),
        }
    }

    fn begin_step(&mut self, frame: proto::StepFrame) -> Result<Option<Message>, FrameError> {
        let plan = &self.plan;
        let tokens = frame.tokens.len();
        if tokens == 0 || tokens > plan.prefill_chunk {
            return Err(FrameError::Tokens { actual: tokens, limit: plan.prefill_chunk });
        }
        let end = frame.position as usize + tokens;
        if end > plan.context_tokens {
            return Err(FrameError::Position { end, limit: plan.context_tokens });
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
        let step = Step {
            sequence: SequenceId(frame.sequence),
            position: frame.position as usize,
            tokens: frame.tokens,
            input: StepInput::Tokens, // replaced when the activation is complete
            sample: frame.sample,
        };
        if frame.data.len() == total {
            return self.complete(step, frame.data);
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
        self.partial = Some(Partial { step, bytes, total });
        Ok(None)
    }

    fn continue_step(
        &mut self,
        mut partial: Partial,
        frame: &proto::StepFrame,
    ) -> Result<Option<Message>, FrameError> {
        let (sequence, position) = (SequenceId(frame.sequence), frame.position as usize);
        if (sequence, position) != (partial.step.sequence, partial.step.position) {
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
            return self.complete(partial.step, partial.bytes.freeze());
        }
        self.partial = Some(partial);
        Ok(None)
    }

    fn complete(&self, step: Step, bytes: Bytes) -> Result<Option<Message>, FrameError> {
        let activation = Activation::new(step.tokens.len(), self.plan.hidden, self.plan.dtype, bytes)?;
        Ok(Some(Message::Step(Step { input: StepInput::Activation(activation), ..step })))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Frames;
    use super::*;
    use mlxnode_compute::{Sampled, SequenceSpec};

    const PLAN: LinkPlan = LinkPlan {
        epoch: 7,
        direction: Direction::Down,
        hidden: 1024,
        dtype: Dtype::F32,
        prefill_chunk: 700,
        context_tokens: 10_000,
    };
    const RING: LinkPlan = LinkPlan { direction: Direction::Ring, ..PLAN };

    fn step(tokens: usize) -> Message {
        let bytes: Vec<u8> = (0..tokens * 4096).map(|at| (at % 251) as u8).collect();
        let activation = Activation::new(tokens, 1024, Dtype::F32, Bytes::from(bytes)).unwrap();
        Message::Step(Step {
            sequence: SequenceId(3),
            position: 11,
            tokens: (0..tokens as u32).collect(),
            input: StepInput::Activation(activation),
            sample: tokens == 1,
        })
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
        let token = SampledToken { sequence, position: 5, sampled, end: None };
        let both = [Message::Close { sequence }, Message::Failed { sequence, reason: "full".into() }];
        let down = [Message::Open { sequence, spec, stages: 1 }, step(1), step(256), step(257), step(700)];
        let ring = [
            Message::Opened { sequence, stages: 3 },
            Message::Sampled(token),
            Message::Done { sequence, position: 512 },
        ];
        for (plan, messages) in [(PLAN, down.iter().chain(&both)), (RING, ring.iter().chain(&both))] {
            for message in messages {
                let frames: Vec<_> = Frames::of(7, message.clone()).unwrap().collect();
                let largest = frames.iter().filter_map(|frame| match &frame.body {
                    Some(Body::Step(step)) => Some(step.data.len()),
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

    use crate::message::SampledToken;

    /// The frames of a step of 700 tokens (three of them), with one changed.
    fn spoiled(which: usize, change: impl Fn(&mut proto::Frame, &mut proto::StepFrame)) -> FrameError {
        let mut frames: Vec<_> = Frames::of(7, step(700)).unwrap().collect();
        let Some(Body::Step(mut body)) = frames[which].body.take() else { panic!("a step") };
        change(&mut frames[which], &mut body);
        if frames[which].body.is_none() {
            frames[which].body = Some(Body::Step(body));
        }
        assembled(PLAN, frames).expect_err("spoiled frames")
    }

    #[test]
    fn refuses_what_does_not_fit_the_plan() {
        let bytes = |length| Bytes::from(vec![0; length]);
        assert_eq!(spoiled(0, |frame, _| frame.epoch = 6), FrameError::Epoch { frame: 6, worker: 7 });
        assert_eq!(spoiled(2, |frame, _| frame.epoch = 8), FrameError::Epoch { frame: 8, worker: 7 });
        assert!(matches!(spoiled(0, |_, step| step.shape[1] = 1 << 30), FrameError::Shape { .. }));
        assert!(matches!(spoiled(0, |_, step| step.shape.clear()), FrameError::Shape { .. }));
        assert!(matches!(spoiled(0, |_, step| step.tokens.push(0)), FrameError::Tokens { actual: 701, .. }));
        assert!(matches!(spoiled(0, |_, step| step.tokens.clear()), FrameError::Tokens { actual: 0, .. }));
        assert!(matches!(spoiled(0, |_, step| step.position = u32::MAX), FrameError::Position { .. }));
        assert!(matches!(spoiled(0, |_, step| step.dtype = 2), FrameError::Dtype { .. }));
        assert!(matches!(spoiled(0, |_, step| step.dtype = 99), FrameError::Wire(_)));
        assert!(matches!(spoiled(0, |_, step| step.offset = 4), FrameError::Continuation { .. }));
        assert!(matches!(spoiled(0, |_, step| step.data = bytes(0)), FrameError::Continuation { .. }));
        assert!(matches!(
            spoiled(0, |_, step| step.data = bytes(FRAME_BYTES + 1)),
            FrameError::FrameTooLarge(_)
        ));
        assert!(matches!(spoiled(1, |_, step| step.data = bytes(0)), FrameError::Continuation { .. }));
        assert!(matches!(spoiled(1, |_, step| step.offset += 1), FrameError::Continuation { .. }));
        assert!(matches!(
            spoiled(1, |_, step| step.data = bytes(FRAME_BYTES + 1)),
            FrameError::FrameTooLarge(_)
        ));
        assert!(matches!(
            spoiled(2, |_, step| step.data = bytes(FRAME_BYTES)),
            FrameError::Continuation { .. }
        ));
        assert_eq!(spoiled(1, |_, step| step.sequence = 4), FrameError::Interrupted);
        assert_eq!(spoiled(1, |_, step| step.position = 4), FrameError::Interrupted);
        let interrupting = Body::Close(proto::CloseSequence { sequence: 3 });
        assert_eq!(spoiled(1, |frame, _| frame.body = Some(interrupting.clone())), FrameError::Interrupted);
        assert_eq!(assembled(PLAN, [proto::Frame { epoch: 7, body: None }]), Err(FrameError::Empty));
    }
}
