//! What is made of a prompt itself: the log-probability of each of its tokens, or one vector for all of them.

use crate::decoder::Decoder;
use mlxnode_compute::{Candidate, LogprobRequest, Sampled, StageError};
use mlxnode_mlx::{Array, Device, Dtype, Error};

/// Logits that are held at once, in single precision: 256 MiB.
const LOGITS_AT_ONCE: usize = 64 << 20;

/// A prompt whose tokens are scored, chunk by chunk.
pub(super) struct Scoring {
    request: LogprobRequest,
    /// The hidden vector of the last token, `[1, 1, hidden]`: what comes after it is known with the next chunk.
    last: Option<Array>,
}

impl Scoring {
    pub(super) fn new(request: LogprobRequest) -> Self {
        Self { request, last: None }
    }

    /// The scores of these tokens, but for the first one of the sequence. `hidden` is theirs, `[1, tokens, hidden]`.
    pub(super) fn score(
        &mut self,
        device: &Device,
        decoder: &Decoder,
        tokens: &[u32],
        hidden: &Array,
    ) -> Result<Vec<Sampled>, StageError> {
        let (count, width) = (hidden.dim(1), hidden.dim(2));
        let part = |from: i32, to: i32| device.slice(hidden, &[0, from, 0], &[1, to, width]);
        let mut before = || -> Result<(Option<Array>, Vec<u32>), Error> {
            // A copy: a slice would keep the whole chunk.
            let last = device.contiguous(&part(count - 1, count)?)?;
            device.eval([&last])?;
            let earlier = self.last.replace(last);
            let own = if count > 1 { Some(part(0, count - 1)?) } else { None };
            Ok(match (earlier, own) {
                (Some(earlier), Some(own)) => {
                    (Some(device.concatenate([&earlier, &own], 1)?), tokens.to_vec())
                }
                (Some(earlier), None) => (Some(earlier), tokens.to_vec()),
                (None, own) => (own, tokens.get(1..).unwrap_or(&[]).to_vec()),
            })
        };
        let (before, targets) = before().map_err(super::device_error)?;
        let Some(before) = before else { return Ok(Vec::new()) };
        let scores = self.scores(device, decoder, &before, &targets).map_err(super::device_error)?;
        match scores.iter().all(|score| score.logprob.is_some_and(f32::is_finite)) {
            true => Ok(scores),
            false => Err(StageError::NotANumber),
        }
    }

    /// Each of `targets` after the hidden vector of the same number.
    fn scores(
        &self,
        device: &Device,
        decoder: &Decoder,
        before: &Array,
        targets: &[u32],
    ) -> Result<Vec<Sampled>, Error> {
        let width = before.dim(2);
        let vocabulary = decoder.logits(device, &device.slice(before, &[0, 0, 0], &[1, 1, width])?)?.dim(1);
        let at_once = (LOGITS_AT_ONCE / vocabulary.unsigned_abs().max(1) as usize).max(1);
        let mut scored = Vec::with_capacity(targets.len());
        for targets in targets.chunks(at_once) {
            let (start, end) = (scored.len() as i32, (scored.len() + targets.len()) as i32);
            let part = device.slice(before, &[0, start, 0], &[1, end, width])?;
            // [tokens, vocabulary]
            let logits = device.cast(&decoder.logits(device, &part)?, Dtype::F32)?;
            let logprobs = device.subtract(&logits, &device.logsumexp(&logits, -1, true)?)?;
            let chosen = device.take_along(&logprobs, &Array::from_u32(targets, &[end - start, 1])?, -1)?;
            let mut tops = self.likeliest(device, &logprobs)?.into_iter();
            for (token, logprob) in targets.iter().zip(chosen.to_f32()?) {
                let top = tops.next().unwrap_or_default();
                scored.push(Sampled { token: *token, logprob: Some(logprob), top });
            }
        }
        Ok(scored)
    }

    /// The likeliest tokens of each row of `[tokens, vocabulary]`, best first.
    fn likeliest(&self, device: &Device, logprobs: &Array) -> Result<Vec<Vec<Candidate>>, Error> {
        let count = self.request.top;
        if count == 0 {
            return Ok(Vec::new());
        }
        let columns = count as i32;
        let order = device.argpartition(&device.negative(logprobs)?, columns - 1, -1)?;
        let tokens = device.slice(&order, &[0, 0], &[logprobs.dim(0), columns])?;
        let values = device.take_along(logprobs, &tokens, -1)?;
        let (tokens, values) = (device.contiguous(&tokens)?.to_u32()?, device.contiguous(&values)?.to_f32()?);
        let rows = tokens.chunks(count).zip(values.chunks(count));
        let best = rows.map(|(tokens, values)| {
            let pairs = tokens.iter().zip(values);
            let mut top: Vec<_> =
                pairs.map(|(token, logprob)| Candidate { token: *token, logprob: *logprob }).collect();
            top.sort_by(|a, b| b.logprob.total_cmp(&a.logprob).then(a.token.cmp(&b.token)));
            top
        });
        Ok(best.collect())
    }
}

/// The sum of a prompt's hidden vectors after the last norm, for their mean. Summed in single precision whatever the model computes in.
#[derive(Default)]
pub(super) struct VectorSum {
    /// `[1, 1, hidden]`.
    sum: Option<Array>,
    tokens: usize,
}

impl VectorSum {
    /// More hidden vectors, `[1, tokens, hidden]`.
    pub(super) fn add(&mut self, device: &Device, decoder: &Decoder, hidden: &Array) -> Result<(), Error> {
        let normed = device.cast(&decoder.normed(device, hidden)?, Dtype::F32)?;
        let sum = device.sum(&normed, 1, true)?;
        let sum = match &self.sum {
            Some(before) => device.add(before, &sum)?,
            None => sum,
        };
        device.eval([&sum])?;
        self.sum = Some(sum);
        self.tokens += hidden.dim(1).unsigned_abs() as usize;
        Ok(())
    }

    /// Their mean. None when there are none.
    pub(super) fn mean(&self, device: &Device) -> Result<Option<Vec<f32>>, Error> {
        let Some(sum) = &self.sum else { return Ok(None) };
        let mean = device.divide(sum, &Array::scalar(self.tokens as f32, Dtype::F32)?)?;
        device.contiguous(&mean)?.to_f32().map(Some)
    }
}
