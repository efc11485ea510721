//! Tokens ahead of what is known, so that one step gives several: by a draft model, or by what came before in the text.
//!
//! The first stage guesses, before a row of a single token goes through the layers, and the guesses go with it through all stages. A draft
//! model keeps a cache of its own for each sequence. It follows the prompt chunk by chunk, so that it is ready when the model is; where
//! it has fallen behind (a prompt that began with remembered blocks, a time with many sequences) it catches up a chunk in each step.
//!
//! With many sequences at once nothing is guessed: their tokens fill the device already, and steps that are queued ahead gain more.

use super::{EngineStage, device_error};
use crate::caches::{SequenceCache, Snapshot};
use crate::decoder::last_token;
use crate::generator::GenerateError;
use crate::model::Model;
use crate::sampler::Sampler;
use crate::sequence::{fill, forward};
use crate::speculation::{Speculation, draft_sampling, look_up, narrowed};
use mlxnode_checkpoint::ModelProfile;
use mlxnode_compute::{
    BLOCK_TOKENS, CacheOptions, LayerRange, MicroBatch, Row, Sampling, SequenceId, StageError,
};
use mlxnode_mlx::{Array, Device, Error};
use std::collections::HashMap;

/// With more sequences than that, nothing is guessed.
const MOST_SEQUENCES: usize = 4;
/// Tokens that a draft model catches up by in a step.
const CATCH_UP: usize = 512;
/// Known tokens that go through a draft model again, where it cannot take guesses back, before they go by themselves.
const MOST_PENDING: usize = 8;

/// Guesses for the sequences of a stage.
pub(super) struct Guesser {
    speculation: Speculation,
    drafts: HashMap<SequenceId, Draft>,
}

/// What the draft model keeps of a sequence.
struct Draft {
    sampler: Sampler,
    cache: SequenceCache,
    /// Where the cache was before the guesses.
    before: Snapshot,
    /// Guesses that are in the cache.
    ahead: Vec<u32>,
    /// A token came that the draft model does not have.
    is_lost: bool,
}

impl Guesser {
    /// A sequence whose tokens may be guessed; `vocabulary` is the model's.
    pub(super) fn open(
        &mut self,
        id: SequenceId,
        sampling: Sampling,
        vocabulary: usize,
    ) -> Result<(), Error> {
        let Speculation::Draft { model, .. } = &self.speculation else { return Ok(()) };
        let own = model.info().vocabulary;
        let sampler = Sampler::new(draft_sampling(&sampling, own, vocabulary), own)?;
        let cache = model.decoder.new_cache(&CacheOptions::default());
        let before = cache.snapshot();
        self.drafts.insert(id, Draft { sampler, cache, before, ahead: Vec::new(), is_lost: false });
        Ok(())
    }

    /// Forgets a sequence.
    pub(super) fn close(&mut self, id: SequenceId) {
        self.drafts.remove(&id);
    }

    /// At most `most` tokens after the `known` ones; `index` is the number of the first.
    fn guess(
        &mut self,
        device: &Device,
        id: SequenceId,
        known: &[u32],
        most: usize,
        index: u64,
        vocabulary: usize,
    ) -> Result<Vec<u32>, Error> {
        match &self.speculation {
            Speculation::PromptLookup { ngram, .. } => Ok(look_up(known, *ngram, most).to_vec()),
            Speculation::Draft { model, .. } => match self.drafts.get_mut(&id) {
                Some(draft) => draft.guess(model, device, known, most, index, vocabulary),
                None => Ok(Vec::new()),
            },
        }
    }

    /// A draft model takes up known tokens, as far as it gets in a step.
    fn follow(&mut self, id: SequenceId, known: &[u32]) -> Result<(), Error> {
        let Speculation::Draft { model, .. } = &self.speculation else { return Ok(()) };
        match self.drafts.get_mut(&id) {
            Some(draft) => draft.follow(model, known).map(drop),
            None => Ok(()),
        }
    }
}

impl Draft {
    /// Leaves in the cache what is a beginning of `known`, and not all of it.
    fn cut(&mut self, known: &[u32]) -> Result<(), Error> {
        let held = usize::try_from(self.cache.tokens()).unwrap_or(0);
        let sure = held.saturating_sub(self.ahead.len());
        let pairs = self.ahead.drain(..).zip(known.iter().skip(sure));
        let right = pairs.take_while(|(guess, token)| guess == *token).count();
        let stays = (sure + right).min(known.len().saturating_sub(1));
        if stays == held || self.cache.truncate(i32::try_from(stays).unwrap_or(i32::MAX)) {
            return Ok(());
        }
        match self.cache.restore(&self.before) {
            true => Ok(()),
            false => Err(Error::Mlx("the draft model's caches cannot be taken back".to_owned())),
        }
    }

    /// Takes up what of `known` is not in the cache, but for the last token. False when there is more.
    fn follow(&mut self, model: &Model, known: &[u32]) -> Result<bool, Error> {
        let vocabulary = model.info().vocabulary;
        self.cut(known)?;
        let held = usize::try_from(self.cache.tokens()).unwrap_or(0);
        let Some(missing) = known.get(held..).filter(|_| !self.is_lost) else { return Ok(false) };
        if missing.iter().any(|token| *token as usize >= vocabulary) {
            self.is_lost = true;
            return Ok(false);
        }
        let before = missing.len().saturating_sub(1);
        if before > MOST_PENDING {
            fill(model, &mut self.cache, &missing[..before.min(CATCH_UP)])?;
        }
        Ok(before <= CATCH_UP)
    }

    fn guess(
        &mut self,
        model: &Model,
        device: &Device,
        known: &[u32],
        most: usize,
        index: u64,
        vocabulary: usize,
    ) -> Result<Vec<u32>, Error> {
        if !self.follow(model, known)? {
            return Ok(Vec::new());
        }
        let held = usize::try_from(self.cache.tokens()).unwrap_or(0);
        let Some(pending) = known.get(held..).filter(|pending| !pending.is_empty()) else {
            return Ok(Vec::new());
        };
        self.before = self.cache.snapshot();
        let keep = self.sampler.penalties().history();
        let looks_back = !self.sampler.penalties().are_none() && keep != Some(0);
        let from = known.len().saturating_sub(keep.unwrap_or(known.len()));
        let mut history = match looks_back {
            true => Some(Array::from_u32(&known[from..], &[(known.len() - from) as i32])?),
            false => None,
        };
        let mut next = Array::from_u32(pending, &[1, pending.len() as i32])?;
        let mut tokens: Vec<Array> = Vec::with_capacity(most);
        for number in 0..most {
            let hidden = last_token(device, &forward(model, &mut self.cache, &next)?)?;
            let logits = narrowed(device, model.decoder.logits(device, &hidden)?, vocabulary)?;
            let draw = self.sampler.draw(device, logits, history.as_ref(), index + number as u64)?;
            device.async_eval([&draw.token])?;
            if let Some(before) = &history {
                history = Some(device.concatenate([before, &draw.token], 0)?);
            }
            next = device.reshape(&draw.token, &[1, 1])?;
            tokens.push(draw.token);
        }
        let guesses = tokens.iter().map(Array::item_u32).collect::<Result<Vec<_>, _>>()?;
        // The last one has not been through the draft model itself.
        self.ahead = guesses[..guesses.len().saturating_sub(1)].to_vec();
        Ok(guesses)
    }
}

impl EngineStage {
    /// A first stage that guesses tokens, so that a step gives several.
    ///
    /// # Errors
    /// When the means do not fit the model, or the model cannot take wrong guesses back.
    pub fn with_speculation(mut self, speculation: Speculation) -> Result<Self, GenerateError> {
        speculation.check(&self.model)?;
        let all = LayerRange::new(0, self.model.info().layer_count);
        let (_, states) = ModelProfile::stretch_bytes(self.model.spec(), all, BLOCK_TOKENS);
        if states.0 > 0 {
            return Err(GenerateError::KeepsStates);
        }
        if self.model.spec().layers.iter().any(|layer| layer.mixer.depends_on_step()) {
            return Err(GenerateError::DependsOnStep);
        }
        self.guesser = Some(Guesser { speculation, drafts: HashMap::new() });
        Ok(self)
    }

    /// Are this sequence's next tokens guessed?
    pub(super) fn guesses_for(&self, id: SequenceId) -> bool {
        self.guesser.is_some() && self.sequences.get(&id).is_some_and(|it| it.may_guess) && !self.is_busy()
    }

    fn is_busy(&self) -> bool {
        self.sequences.values().filter(|sequence| sequence.may_guess).count() > MOST_SEQUENCES
    }

    /// Puts guesses into the rows that may have some.
    pub(super) fn put_guesses(&mut self, batch: &mut MicroBatch) -> Result<(), StageError> {
        for row in &batch.rows {
            self.settle(row.sequence, row.position)?;
        }
        if self.is_busy() {
            return Ok(());
        }
        let Some(mut guesser) = self.guesser.take() else { return Ok(()) };
        let singles = batch.rows.iter().filter(|row| row.tokens.len() == 1 && row.sample).count();
        let most = guesser.speculation.tokens().min(MicroBatch::MOST_GUESSES / singles.max(1));
        let guessed = batch.rows.iter_mut().try_for_each(|row| self.guess_for(&mut guesser, row, most));
        self.guesser = Some(guesser);
        guessed.map_err(device_error)
    }

    fn guess_for(&mut self, guesser: &mut Guesser, row: &mut Row, most: usize) -> Result<(), Error> {
        let Some(sequence) = self.sequences.get(&row.sequence) else { return Ok(()) };
        if !sequence.may_guess || row.position != sequence.position || self.is_queued(row.sequence) {
            return Ok(());
        }
        let known = [sequence.ids.as_slice(), &row.tokens].concat();
        if row.tokens.len() != 1 || !row.sample {
            return guesser.follow(row.sequence, &known);
        }
        let most = most.min(self.room(row));
        if most == 0 {
            return Ok(());
        }
        let index = row.end().saturating_sub(sequence.prompt) as u64;
        let (device, vocabulary) = (&self.model.device, self.model.info().vocabulary);
        row.guesses = guesser.guess(device, row.sequence, &known, most, index, vocabulary)?;
        Ok(())
    }

    /// How many guesses a row may have: none that nobody needs or wants, and none beyond the end of a block, where states may be kept.
    fn room(&self, row: &Row) -> usize {
        let Some(sequence) = self.sequences.get(&row.sequence) else { return 0 };
        let end = row.end();
        let in_block = match end % BLOCK_TOKENS {
            0 => 0,
            taken => BLOCK_TOKENS - taken,
        };
        let needed = (sequence.prompt + sequence.max_tokens).saturating_sub(end + 1);
        let in_context = self.options.context_tokens.saturating_sub(end);
        let at_once = self.caches.of(row.sequence).map_or(1, SequenceCache::most_at_once);
        let at_once = usize::try_from(at_once - 1).unwrap_or(0);
        needed.min(in_context).min(in_block).min(at_once).min(sequence.most_guesses)
    }
}
