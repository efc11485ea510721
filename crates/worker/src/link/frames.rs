//! A message as the frames that carry it.

use super::FRAME_BYTES;
use crate::blocks_wire::{block_order_to_proto, block_plan_to_proto, capacities_to_proto, keep_to_proto};
use crate::message::{Batch, Message};
use crate::wire::{
    WireError, dtype_to_proto, number, row_result_to_proto, sequence_spec_to_proto, times_to_proto,
};
use bytes::Bytes;
use mlxnode_compute::{Row, StepInput};
use mlxnode_proto::internal::v1 as proto;
use mlxnode_proto::internal::v1::frame::Body;

/// The frames of one message, in order. Nearly always one; an activation above 1 MiB has more, each a slice of the same bytes.
pub(crate) struct Frames {
    epoch: u64,
    first: Option<Body>,
    /// Number and what is left of the activation.
    rest: Option<(u64, Bytes)>,
    offset: u64,
}

impl Frames {
    pub(crate) fn of(epoch: u64, message: Message) -> Result<Self, WireError> {
        let mut rest = None;
        let first = match message {
            Message::Batch(batch) => {
                let (frame, bytes) = batch_frame(batch)?;
                rest = bytes.map(|bytes| (frame.number, bytes));
                Body::Batch(frame)
            }
            Message::Open { sequence, spec, stages, blocks } => Body::Open(proto::OpenSequence {
                sequence: sequence.0,
                spec: Some(sequence_spec_to_proto(&spec)?),
                prompt_tokens: number("prompt_tokens", spec.prompt_tokens)?,
                stages,
                blocks: block_plan_to_proto(&blocks)?,
            }),
            Message::Keep { sequence, keep } => Body::Keep(keep_to_proto(sequence, keep)?),
            Message::Blocks(order) => Body::Blocks(block_order_to_proto(order)),
            Message::Reset { capacities } => Body::Capacities(capacities_to_proto(&capacities)),
            Message::Missing { sequence } => Body::Missing(proto::CloseSequence { sequence: sequence.0 }),
            Message::Close { sequence } => Body::Close(proto::CloseSequence { sequence: sequence.0 }),
            Message::Failed { sequence, reason } => {
                Body::Failed(proto::SequenceFailed { sequence: sequence.0, reason })
            }
            Message::Opened { sequence, stages } => {
                Body::Opened(proto::SequenceOpened { sequence: sequence.0, stages })
            }
            Message::Results(results) => Body::Results(proto::BatchResults {
                number: results.number,
                rows: results.rows.iter().map(row_result_to_proto).collect::<Result<_, _>>()?,
                times: times_to_proto(&results.times),
            }),
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
                let (number, mut rest) = self.rest.take()?;
                let data = rest.split_to(rest.len().min(FRAME_BYTES));
                let offset = self.offset;
                self.offset += data.len() as u64;
                self.rest = (!rest.is_empty()).then_some((number, rest));
                Body::Batch(proto::BatchFrame { number, offset, data, ..Default::default() })
            }
        };
        Some(proto::Frame { epoch: self.epoch, body: Some(body) })
    }
}

/// A batch's first frame, and the bytes that did not fit it.
fn batch_frame(batch: Batch) -> Result<(proto::BatchFrame, Option<Bytes>), WireError> {
    let Batch { number: count, micro, times } = batch;
    let mut frame =
        proto::BatchFrame { number: count, times: times_to_proto(&times), ..proto::BatchFrame::default() };
    if micro.rows.is_empty() {
        return Ok((frame, None));
    }
    let StepInput::Activation(activation) = &micro.input else {
        return Err(WireError::Missing("the activation"));
    };
    let mut data = activation.bytes().clone();
    let rest = (data.len() > FRAME_BYTES).then(|| data.split_off(FRAME_BYTES));
    frame.dtype = dtype_to_proto(activation.dtype()) as i32;
    frame.shape = vec![number("tokens", activation.tokens())?, number("hidden", activation.hidden())?];
    frame.data = data;
    frame.rows = micro.rows.into_iter().map(batch_row).collect::<Result<_, _>>()?;
    Ok((frame, rest))
}

fn batch_row(row: Row) -> Result<proto::BatchRow, WireError> {
    Ok(proto::BatchRow {
        sequence: row.sequence.0,
        position: number("position", row.position)?,
        tokens: row.tokens,
        sample: row.sample,
        guesses: row.guesses,
    })
}
