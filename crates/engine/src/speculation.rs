//! Several tokens at once: they are guessed cheaply and verified in one step of the model.
//!
//! A guess comes from a smaller model with the same tokens (Leviathan et al. 2023, with mlx-lm's acceptance rule) or from what
//! followed the same few tokens earlier in the text (prompt lookup, Saxena 2023). The model computes the logits after all guesses
//! at once and draws a token at each; a guess is accepted while it is the token that was drawn. What is drawn is a function of
//! the logits, the seed and the token's number, so the result is the one without guessing, also when sampling; guesses are drawn
//! with the same random keys, which makes them agree more often.
//!
//! What the caches took up beyond the accepted tokens is taken back. Where that cannot be done (recurrent states) they return to
//! the state before the step, and the accepted tokens go through again with the next ones. Once a limit on tokens is reached nothing
//! is guessed: several tokens at once would see other keys than one after the other.

use crate::caches::{SequenceCache, Snapshot};
use crate::decoder::last_token;
use crate::draws::Draws;
use crate::generator::{GenerateError, OnToken, Progress, check_whole};
use crate::model::Model;
use crate::penalties::History;
use crate::sampler::Sampler;
use crate::sequence::{Sequence, fill, forward};
use mlxnode_compute::{CacheOptions, Sampling, SequenceSpec};
use mlxnode_mlx::{Array, Device, Error};

/// How tokens are guessed.
pub enum Speculation {
    /// By a smaller model with the same tokenizer.
    Draft {
        /// The model, all of its layers.
        model: Box<Model>,
        /// Tokens per guess.
        tokens: usize,
    },
    /// By what followed the last tokens when they came before.
    PromptLookup {
        /// Most tokens that must have come before; fewer are tried when they have not.
        ngram: usize,
        /// Tokens per guess.
        tokens: usize,
    },
}

/// Most tokens per guess. More are never all right, and caches with a window keep this many to take back.
const MOST_TOKENS: usize = mlxnode_compute::Row::MOST_GUESSES;
/// Longest sequence of tokens that is looked up.
const LONGEST_NGRAM: usize = 16;
/// By how much the embeddings of models with the same tokenizer may differ: some are padded.
const PADDING: usize = 1024;
/// Tokens that wait to go through again before they go by themselves.
const MOST_PENDING: usize = 8;
/// Rounds between two clean-ups of the device's cache of free buffers.
const ROUNDS_PER_CLEAN_UP: usize = 256;

impl Speculation {
    /// Can it guess for this model?
    pub(crate) fn check(&self, model: &Model) -> Result<(), GenerateError> {
        let range = |name, value, most| match (1..=most).contains(&value) {
            true => Ok(()),
            false => Err(GenerateError::Speculation { name, value, most }),
        };
        match self {
            Self::Draft { model: draft, tokens } => {
                check_whole(draft)?;
                range("draft tokens", *tokens, MOST_TOKENS)?;
                let (draft, model) = (draft.info().vocabulary, model.info().vocabulary);
                if draft.abs_diff(model) > PADDING {
                    return Err(GenerateError::DraftVocabulary { draft, model });
                }
                Ok(())
            }
            Self::PromptLookup { ngram, tokens } => {
                range("the n-gram", *ngram, LONGEST_NGRAM)?;
                range("draft tokens", *tokens, MOST_TOKENS)
            }
        }
    }

    pub(crate) fn tokens(&self) -> usize {
        match self {
            Self::Draft { tokens, .. } | Self::PromptLookup { tokens, .. } => *tokens,
        }
    }
}

/// A model's caches, and the tokens that they do not hold yet.
struct Follower<'a> {
    model: &'a Model,
    cache: SequenceCache,
    /// Known tokens to go through next.
    pending: Vec<u32>,
    before: Snapshot,
}

impl<'a> Follower<'a> {
    fn new(model: &'a Model, cache: SequenceCache, first: u32) -> Self {
        let before = cache.snapshot();
        Self { model, cache, pending: vec![first], before }
    }

    /// The pending tokens and then those of `guesses`, `[n]` each; hidden vectors of all of them.
    fn forward(&mut self, guesses: &[Array]) -> Result<Array, Error> {
        let device = &self.model.device;
        let pending = Array::from_u32(&self.pending, &[self.pending.len() as i32])?;
        let ids = match guesses.is_empty() {
            true => pending,
            false => device.concatenate([&pending].into_iter().chain(guesses), 0)?,
        };
        self.before = self.cache.snapshot();
        forward(self.model, &mut self.cache, &device.reshape(&ids, &[1, -1])?)
    }

    /// Of what went through since [`Self::forward`], the pending tokens and these `accepted` ones stay.
    fn keep(&mut self, accepted: &[u32]) -> Result<(), Error> {
        self.pending.extend_from_slice(accepted);
        let total = self.before.tokens() + i32::try_from(self.pending.len()).unwrap_or(i32::MAX);
        if self.cache.truncate(total) {
            self.pending.clear();
        } else if !self.cache.restore(&self.before) {
            return Err(Error::Mlx("the caches cannot be taken back".to_owned()));
        } else if self.pending.len() > MOST_PENDING {
            self.flush()?;
        }
        Ok(())
    }

    /// Puts all pending tokens but the last into the caches, one by one.
    fn replay(&mut self) -> Result<(), Error> {
        let before = self.pending.len().saturating_sub(1);
        for token in self.pending.drain(..before) {
            fill(self.model, &mut self.cache, &[token])?;
        }
        Ok(())
    }

    /// Puts what is pending into the caches.
    fn flush(&mut self) -> Result<(), Error> {
        if !self.pending.is_empty() {
            fill(self.model, &mut self.cache, &self.pending)?;
            self.pending.clear();
        }
        Ok(())
    }
}

/// Where guesses come from.
enum Guesser<'a> {
    Draft {
        follower: Box<Follower<'a>>,
        sampler: Box<Sampler>,
    },
    Lookup {
        ngram: usize,
    },
    /// A token came that the draft model does not have.
    Nothing,
}

/// A guess: tokens `[1]` each, which may still be computed.
struct Guess {
    tokens: Vec<Array>,
}

/// Generates with guesses. The prompt goes through as without.
pub(crate) fn run(
    sequence: &mut Sequence<'_>,
    speculation: &Speculation,
    prompt: &[u32],
    prefill_step: usize,
    spec: &SequenceSpec,
    on_token: OnToken<'_>,
    progress: &mut Progress,
) -> Result<(), GenerateError> {
    let Some((last, before)) = prompt.split_last() else { return Err(GenerateError::EmptyPrompt) };
    let (model, device) = (sequence.model, &sequence.model.device);
    let options = sequence.options;
    let mut guesser = Guesser::new(speculation, model, &options, prompt, prefill_step, &spec.sampling)?;
    for chunk in before.chunks(prefill_step) {
        sequence.prefill(chunk)?;
    }
    let cache = std::mem::replace(&mut sequence.cache, model.decoder.new_cache(&options));
    let mut target = Follower::new(model, cache, *last);
    let mut known = prompt.to_vec();
    let mut rounds = 0;
    loop {
        let newest = [*known.last().unwrap_or(last)];
        let mut history = sequence.history.clone();
        history.extend(device, &newest)?;
        // The round itself gives one token more than it guesses.
        let mut most = speculation.tokens().min(spec.max_tokens.saturating_sub(progress.generated + 1));
        let at_once = usize::try_from(target.cache.most_at_once()).unwrap_or(1);
        if target.pending.len() > at_once {
            target.replay()?;
        }
        most = most.min(at_once.saturating_sub(target.pending.len()));
        let guess = guesser.guess(model, &known, most, &history, sequence.index)?;
        let hidden = target.forward(&guess.tokens)?;
        let draws = verify(sequence, hidden, &guess, &history)?;
        device.async_eval(draws.arrays().chain(&guess.tokens))?;
        let guessed = guess.tokens.iter().map(Array::item_u32).collect::<Result<Vec<_>, _>>()?;
        progress.drafted += guessed.len();
        let mut accepted = 0;
        let mut is_done = false;
        for sampled in draws.read(device)? {
            let sampled = sampled.ok_or(GenerateError::NotANumber)?;
            let token = sampled.token;
            let is_right = guessed.get(accepted) == Some(&token);
            known.push(token);
            sequence.index += 1;
            is_done = progress.report(sampled, is_right, spec, on_token);
            if is_done || !is_right {
                break;
            }
            accepted += 1;
        }
        target.keep(&guessed[..accepted])?;
        if is_done {
            target.flush()?;
            break;
        }
        sequence.history.extend(device, &newest)?;
        sequence.history.extend(device, &guessed[..accepted])?;
        let next = *known.last().unwrap_or(last);
        target.pending.push(next);
        guesser.learn(&guessed, accepted, next)?;
        rounds += 1;
        if rounds % ROUNDS_PER_CLEAN_UP == 1 {
            device.clear_cache()?;
        }
    }
    sequence.cache = target.cache;
    Ok(())
}

/// Draws a token after the newest one and after each of the guesses.
fn verify(
    sequence: &mut Sequence<'_>,
    hidden: Array,
    guess: &Guess,
    history: &History,
) -> Result<Draws, Error> {
    let (device, decoder) = (&sequence.model.device, &sequence.model.decoder);
    let (all, count) = (hidden.dim(1), guess.tokens.len() as i32 + 1);
    let hidden = match all == count {
        true => hidden,
        false => device.slice(&hidden, &[0, all - count, 0], &[1, all, hidden.dim(2)])?,
    };
    let logits = decoder.logits(device, &hidden)?;
    if sequence.sampler.is_plainly_greedy() {
        return Draws::greedy(device, &logits);
    }
    let mut history = history.clone();
    let mut draws = Draws::default();
    for row in 0..count {
        let number = row as usize;
        if let Some(token) = number.checked_sub(1).and_then(|before| guess.tokens.get(before)) {
            history.push(device, token)?;
        }
        let logits = device.slice(&logits, &[row, 0], &[row + 1, logits.dim(1)])?;
        let index = sequence.index + number as u64;
        draws.push(sequence.sampler.draw(device, logits, history.tokens(), index)?);
    }
    draws.close(device)?;
    Ok(draws)
}

impl<'a> Guesser<'a> {
    fn new(
        speculation: &'a Speculation,
        model: &Model,
        options: &CacheOptions,
        prompt: &[u32],
        prefill_step: usize,
        sampling: &Sampling,
    ) -> Result<Self, GenerateError> {
        let draft = match speculation {
            Speculation::PromptLookup { ngram, .. } => return Ok(Self::Lookup { ngram: *ngram }),
            Speculation::Draft { model, .. } => model,
        };
        let Some((last, before)) = prompt.split_last() else { return Err(GenerateError::EmptyPrompt) };
        let vocabulary = draft.info().vocabulary;
        if prompt.iter().any(|token| *token as usize >= vocabulary) {
            return Ok(Self::Nothing);
        }
        // What the draft model cannot pack or limit in the same way it keeps as computed.
        let mut cache = match draft.new_cache(options) {
            Ok(cache) => cache,
            Err(_) => draft.new_cache(&CacheOptions::default())?,
        };
        for chunk in before.chunks(prefill_step) {
            fill(draft, &mut cache, chunk)?;
        }
        let sampling = draft_sampling(sampling, vocabulary, model.info().vocabulary);
        let sampler = Sampler::new(sampling, vocabulary)?;
        let follower = Box::new(Follower::new(draft, cache, *last));
        Ok(Self::Draft { follower, sampler: Box::new(sampler) })
    }

    /// At most `most` tokens after the `known` ones; `index` is the number of the first.
    fn guess(
        &mut self,
        model: &Model,
        known: &[u32],
        most: usize,
        history: &History,
        index: u64,
    ) -> Result<Guess, Error> {
        let mut tokens = Vec::with_capacity(most);
        match self {
            _ if most == 0 => {}
            Self::Nothing => {}
            Self::Lookup { ngram } => {
                for token in look_up(known, *ngram, most) {
                    tokens.push(Array::from_u32(&[*token], &[1])?);
                }
            }
            Self::Draft { follower, sampler } => {
                let device = &model.device;
                let mut history = history.clone();
                for number in 0..most {
                    let hidden = match tokens.last() {
                        None => follower.forward(&[])?,
                        Some(token) => {
                            let ids = device.reshape(token, &[1, 1])?;
                            forward(follower.model, &mut follower.cache, &ids)?
                        }
                    };
                    let hidden = last_token(device, &hidden)?;
                    let logits = follower.model.decoder.logits(device, &hidden)?;
                    let logits = narrowed(device, logits, model.info().vocabulary)?;
                    let history = if sampler.penalties().are_none() {
                        None
                    } else {
                        history_of(&mut history, device, tokens.last())?
                    };
                    let draw = sampler.draw(device, logits, history.as_ref(), index + number as u64)?;
                    device.async_eval([&draw.token])?;
                    tokens.push(draw.token);
                }
            }
        }
        Ok(Guess { tokens })
    }

    /// After a round: of the `guessed` tokens the first `accepted` were right, and `next` came after them.
    fn learn(&mut self, guessed: &[u32], accepted: usize, next: u32) -> Result<(), Error> {
        let Self::Draft { follower, .. } = self else { return Ok(()) };
        if next as usize >= follower.model.info().vocabulary {
            *self = Self::Nothing;
            return Ok(());
        }
        if !guessed.is_empty() {
            // The last guess has not been through the draft model itself.
            let through = accepted.min(guessed.len() - 1);
            follower.keep(&guessed[..through])?;
            follower.pending.extend_from_slice(&guessed[through..accepted]);
        }
        follower.pending.push(next);
        Ok(())
    }
}

/// How a draft model of `draft` tokens chooses, so that it agrees with a model of `model` tokens that chooses by `sampling`.
pub(crate) fn draft_sampling(sampling: &Sampling, draft: usize, model: usize) -> Sampling {
    match draft == model {
        true => Sampling { logprobs: None, ..sampling.clone() },
        // Penalised and preferred tokens might be ones that the draft model does not have.
        false => Sampling {
            logprobs: None,
            logit_bias: Default::default(),
            repetition: None,
            presence: None,
            frequency: None,
            ..sampling.clone()
        },
    }
}

/// The ids that penalties look at, after one more token.
fn history_of(history: &mut History, device: &Device, token: Option<&Array>) -> Result<Option<Array>, Error> {
    if let Some(token) = token {
        history.push(device, token)?;
    }
    Ok(history.tokens().cloned())
}

/// Logits of the tokens that the model has, when the draft model has more.
pub(crate) fn narrowed(device: &Device, logits: Array, vocabulary: usize) -> Result<Array, Error> {
    let vocabulary = i32::try_from(vocabulary).unwrap_or(i32::MAX);
    match logits.dim(1) <= vocabulary {
        true => Ok(logits),
        false => device.slice(&logits, &[0, 0], &[logits.dim(0), vocabulary]),
    }
}

/// What followed the longest of the last `ngram` tokens that came before, at most `most` tokens, from the latest such place.
pub(crate) fn look_up(known: &[u32], ngram: usize, most: usize) -> &[u32] {
    for length in (1..=ngram.min(known.len().saturating_sub(1))).rev() {
        let end = known.len() - length;
        let last = &known[end..];
        if let Some(start) = (0..end).rev().find(|start| known[*start..].starts_with(last)) {
            let from = start + length;
            return &known[from..known.len().min(from + most)];
        }
    }
    &[]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_up_the_longest_and_latest() {
        assert_eq!(look_up(&[1, 2, 3, 9, 1, 2, 3, 8, 7, 1, 2, 3], 3, 2), [8, 7]);
        assert_eq!(look_up(&[1, 2, 3, 9, 5, 3, 7, 2, 3], 3, 2), [9, 5], "two tokens beat one");
        assert_eq!(look_up(&[4, 4, 4], 2, 5), [4], "no further than what is known");
        assert!(look_up(&[1, 2, 3], 3, 2).is_empty());
        assert!(look_up(&[1], 3, 2).is_empty() && look_up(&[], 3, 2).is_empty());
    }
}
