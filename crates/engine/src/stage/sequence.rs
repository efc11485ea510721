//! What a stage keeps of an open sequence, besides its caches.

use super::scores::{Scoring, VectorSum};
use crate::adapters::AdapterId;
use crate::sampler::Sampler;
use mlxnode_compute::{GrammarError, Keep, SequenceId, TokenConstraint};
use mlxnode_mlx::{Array, Device, Error};

/// An open sequence.
pub(super) struct Sequence {
    /// Tokens that went through and that somebody asked for. The caches may be one ahead.
    pub(super) position: usize,
    /// Length of the prompt: token number n is sampled when `prompt + n` tokens went through.
    pub(super) prompt: usize,
    /// Most tokens to generate.
    pub(super) max_tokens: usize,
    /// May its next tokens be guessed?
    pub(super) may_guess: bool,
    /// So many of them at once.
    pub(super) most_guesses: usize,
    /// Guesses that went through behind `position`, until it is known which of them are right.
    pub(super) unsure: Vec<u32>,
    /// What changes the weights for it.
    pub(super) adapter: Option<AdapterId>,
    /// What the last stage does with it; None on the others.
    pub(super) purpose: Option<Purpose>,
    /// On the last stage, while the prompt's tokens are to be scored.
    pub(super) scoring: Option<Scoring>,
    /// The ids that went through, for the blocks that are kept.
    pub(super) ids: Vec<u32>,
    /// Blocks to keep once their tokens went through.
    pub(super) keeps: Vec<Keep>,
}

/// What comes out of a sequence.
pub(super) enum Purpose {
    Tokens(Box<Sampling>),
    Vector(VectorSum),
}

/// How tokens are drawn.
pub(super) struct Sampling {
    pub(super) sampler: Sampler,
    /// The last ids, as many as the penalties look at.
    tail: Vec<u32>,
    /// How many those are; None for all.
    keep: Option<usize>,
    /// What the answer has to look like.
    pub(super) constraint: Option<Constraint>,
}

/// A grammar on its way through the answer.
pub(super) struct Constraint {
    tokens: Box<dyn TokenConstraint>,
    /// Position of the first token that it has not seen.
    next: usize,
}

impl Sequence {
    /// Number of the token that is drawn now.
    pub(super) fn index(&self) -> u64 {
        self.position.saturating_sub(self.prompt) as u64
    }

    pub(super) fn sampling(&self) -> Option<&Sampling> {
        match &self.purpose {
            Some(Purpose::Tokens(sampling)) => Some(sampling),
            _ => None,
        }
    }

    pub(super) fn sampling_mut(&mut self) -> Option<&mut Sampling> {
        match &mut self.purpose {
            Some(Purpose::Tokens(sampling)) => Some(sampling),
            _ => None,
        }
    }

    /// Can its chunks go through without anybody looking at what comes out?
    pub(super) fn is_plain(&self) -> bool {
        self.scoring.is_none() && !matches!(self.purpose, Some(Purpose::Vector(_)))
    }

    /// These tokens go through now.
    pub(super) fn advance(&mut self, tokens: &[u32]) -> Result<(), GrammarError> {
        let start = self.position;
        self.position += tokens.len();
        self.ids.extend_from_slice(tokens);
        let prompt = self.prompt;
        let Some(sampling) = self.sampling_mut() else { return Ok(()) };
        sampling.remember(tokens);
        let Some(constraint) = &mut sampling.constraint else { return Ok(()) };
        // A sequence that is taken up again brings tokens of its answer along.
        for (position, token) in (start..).zip(tokens) {
            if position >= prompt.max(constraint.next) {
                constraint.accept(position, *token)?;
            }
        }
        Ok(())
    }
}

impl Constraint {
    pub(super) fn new(tokens: Box<dyn TokenConstraint>) -> Self {
        Self { tokens, next: 0 }
    }

    /// The token at this position. True: nothing may follow.
    pub(super) fn accept(&mut self, position: usize, token: u32) -> Result<bool, GrammarError> {
        self.next = position + 1;
        self.tokens.accept(token)
    }

    /// Which tokens may come next, `[1, vocabulary]`.
    pub(super) fn allowed(&mut self, vocabulary: usize) -> Result<Result<Array, Error>, GrammarError> {
        let mask = self.tokens.mask()?;
        Ok(crate::constrained::allowed(mask, vocabulary))
    }
}

impl Sampling {
    pub(super) fn new(sampler: Sampler, constraint: Option<Constraint>) -> Self {
        let keep = sampler.penalties().history();
        Self { sampler, tail: Vec::new(), keep, constraint }
    }

    fn remember(&mut self, tokens: &[u32]) {
        let keep = self.keep.unwrap_or(usize::MAX);
        self.tail.extend_from_slice(&tokens[tokens.len().saturating_sub(keep)..]);
        let excess = self.tail.len().saturating_sub(keep);
        self.tail.drain(..excess);
    }

    /// The ids that the penalties look at, and one more, `[1]`, that may still be computed; None when they look at none.
    pub(super) fn history(&self, device: &Device, more: Option<&Array>) -> Result<Option<Array>, Error> {
        if self.keep == Some(0) {
            return Ok(None);
        }
        let before = match self.tail.is_empty() {
            true => None,
            false => Some(Array::from_u32(&self.tail, &[self.tail.len() as i32])?),
        };
        match (before, more) {
            (Some(before), Some(more)) => device.concatenate([&before, more], 0).map(Some),
            (before, more) => Ok(before.or_else(|| more.cloned())),
        }
    }
}

/// Tokens of a sequence that go into a forward pass.
pub(super) struct Part {
    pub(super) sequence: SequenceId,
    pub(super) tokens: Tokens,
}

/// What the host knows of tokens.
#[derive(Clone)]
pub(super) enum Tokens {
    Known(Vec<u32>),
    /// One that may still be computed: a column of several, which are the `source`-th.
    Drawn {
        of: Array,
        source: usize,
        column: i32,
    },
}

impl Part {
    /// How many.
    pub(super) fn count(&self) -> i32 {
        match &self.tokens {
            Tokens::Known(tokens) => tokens.len() as i32,
            Tokens::Drawn { .. } => 1,
        }
    }
}

/// The ids of these parts in this order, `[1, tokens]`.
pub(super) fn ids(device: &Device, parts: &[Part], order: &[usize]) -> Result<Array, Error> {
    if let Some(tokens) = as_drawn(parts, order) {
        return device.reshape(&tokens, &[1, -1]);
    }
    let mut arrays = Vec::new();
    let mut known: Vec<u32> = Vec::new();
    let flush = |known: &mut Vec<u32>, arrays: &mut Vec<Array>| -> Result<(), Error> {
        if !known.is_empty() {
            arrays.push(Array::from_u32(known, &[known.len() as i32])?);
            known.clear();
        }
        Ok(())
    };
    for part in order.iter().map(|place| &parts[*place]) {
        match &part.tokens {
            Tokens::Known(tokens) => known.extend_from_slice(tokens),
            Tokens::Drawn { of, column, .. } => {
                flush(&mut known, &mut arrays)?;
                arrays.push(device.slice(of, &[*column], &[*column + 1])?);
            }
        }
    }
    flush(&mut known, &mut arrays)?;
    let ids = match arrays.as_slice() {
        [only] => only.clone(),
        _ => device.concatenate(&arrays, 0)?,
    };
    device.reshape(&ids, &[1, -1])
}

/// The tokens of one draw, when exactly those go on, in their order.
fn as_drawn(parts: &[Part], order: &[usize]) -> Option<Array> {
    let mut drawn = None;
    for (expected, place) in (0..).zip(order) {
        let Tokens::Drawn { of, source, column } = &parts[*place].tokens else { return None };
        let (_, first) = *drawn.get_or_insert((of, *source));
        if *source != first || *column != expected {
            return None;
        }
    }
    let (tokens, _) = drawn?;
    (tokens.dim(0) == order.len() as i32).then(|| tokens.clone())
}
