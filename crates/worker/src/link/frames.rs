//! A message as the frames that carry it.

use super::FRAME_BYTES;
use crate::message::Message;
use crate::wire::{WireError, dtype_to_proto, number, sampled_token_to_proto, sequence_spec_to_proto};
use bytes::Bytes;
use mlxnode_compute::{Step, StepInput};
use mlxnode_proto::internal::v1 as proto;
use mlxnode_proto::internal::v1::frame::Body;

/// The frames of one message, in order. Nearly always one; an activation above 1 MiB has more, each a slice of the same bytes.
pub(crate) struct Frames {
    epoch: u64,
    first: Option<Body>,
    /// Sequence, position and what is left of the activation.
    rest: Option<(u64, u32, Bytes)>,
    offset: u64,
}

impl Frames {
    pub(crate) fn of(epoch: u64, message: Message) -> Result<Self, WireError> {
        let mut rest = None;
        let first = match message {
            Message::Step(step) => {
                let (frame, bytes) = step_frame(step)?;
                rest = bytes.map(|bytes| (frame.sequence, frame.position, bytes));
                Body::Step(frame)
            }
            Message::Open { sequence, spec, stages } => Body::Open(proto::OpenSequence {
                sequence: sequence.0,
                spec: Some(sequence_spec_to_proto(&spec)?),
                prompt_tokens: number("prompt_tokens", spec.prompt_tokens)?,
                stages,
            }),
            Message::Close { sequence } => Body::Close(proto::CloseSequence { sequence: sequence.0 }),
            Message::Failed { sequence, reason } => {
                Body::Failed(proto::SequenceFailed { sequence: sequence.0, reason })
            }
            Message::Opened { sequence, stages } => {
                Body::Opened(proto::SequenceOpened { sequence: sequence.0, stages })
            }
            Message::Sampled(token) => Body::Token(sampled_token_to_proto(&token)?),
            Message::Done { sequence, position } => {
                let position = number("position", position)?;
                Body::Done(proto::StepDone { sequence: sequence.0, position })
            }
        };
        Ok(Self { epoch, first: Some(first), rest, offset: FRAME_BYTES as u64 })
    }
}

impl Iterator for Frames {
    type Item = proto::Frame;

    fn next(&mut self) -> Option<proto::Frame> {
        let body = match self.first.take() {
            Some(body) => body,
            None => {
                let (sequence, position, mut rest) = self.rest.take()?;
                let data = rest.split_to(rest.len().min(FRAME_BYTES));
                let offset = self.offset;
                self.offset += data.len() as u64;
                self.rest = (!rest.is_empty()).then_some((sequence, position, rest));
                Body::Step(proto::StepFrame { sequence, position, offset, data, ..Default::default() })
            }
        };
        Some(proto::Frame { epoch: self.epoch, body: Some(body) })
    }
}

/// A step's first frame, and the bytes that did not fit it.
fn step_frame(step: Step) -> Result<(proto::StepFrame, Option<Bytes>), WireError> {
    let StepInput::Activation(activation) = &step.input else {
        return Err(WireError::Missing("the activation"));
    };
    let mut data = activation.bytes().clone();
    let rest = (data.len() > FRAME_BYTES).then(|| data.split_off(FRAME_BYTES));
    let frame = proto::StepFrame {
        sequence: step.sequence.0,
        position: number("position", step.position)?,
        sample: step.sample,
        dtype: dtype_to_proto(activation.dtype()) as i32,
        shape: vec![number("tokens", activation.tokens())?, number("hidden", activation.hidden())?],
        data,
        offset: 0,
        tokens: step.tokens,
    };
    Ok((frame, rest))
}
