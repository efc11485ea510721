//! Generation along a grammar: every token is drawn among those that the grammar allows after the one before, so that none can be queued
//! ahead of it.

use crate::generator::{GenerateError, OnToken, Progress};
use crate::sequence::Sequence;
use mlxnode_compute::{SequenceSpec, TokenConstraint};
use mlxnode_mlx::{Array, Dtype, Error};

/// The tokens whose bits are set in `mask`, as `[1, vocabulary]`.
pub(crate) fn allowed(mask: &[u32], vocabulary: usize) -> Result<Array, Error> {
    let bit = |token: usize| {
        let word = mask.get(token / 32).copied().unwrap_or(0);
        u8::from(word >> (token % 32) & 1 == 1)
    };
    let allowed: Vec<u8> = (0..vocabulary).map(bit).collect();
    Array::from_bytes(&allowed, &[1, vocabulary as i32], Dtype::Bool)
}

/// The prompt in chunks, then one token after the other.
pub(crate) fn run(
    sequence: &mut Sequence<'_>,
    prompt: &[u32],
    prefill_step: usize,
    constraint: &mut dyn TokenConstraint,
    spec: &SequenceSpec,
    on_token: OnToken<'_>,
    progress: &mut Progress,
) -> Result<(), GenerateError> {
    let Some((last, before)) = prompt.split_last() else { return Err(GenerateError::EmptyPrompt) };
    for chunk in before.chunks(prefill_step) {
        sequence.prefill(chunk)?;
    }
    let device = &sequence.model.device;
    let vocabulary = sequence.model.info().vocabulary;
    let mut token = Array::from_u32(&[*last], &[1])?;
    loop {
        let allowed = allowed(constraint.mask()?, vocabulary)?;
        let draw = sequence.step_among(&token, Some(&allowed))?;
        let sampled = draw.read(device)?.ok_or(GenerateError::NotANumber)?;
        // A token that ends answers is no part of them.
        let is_complete = !spec.stop_tokens.contains(&sampled.token) && constraint.accept(sampled.token)?;
        if progress.report_completing(sampled, false, is_complete, spec, on_token) {
            return Ok(());
        }
        token = draw.token;
    }
}
