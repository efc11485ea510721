//! Prompt caches in files: mlx-lm's safetensors, both layouts to read, the one of 0.32.2 to write.
//!
//! What mlx-lm has no class for, packed keys of a layer with a window or a limit, is written under a class name of our own, which
//! mlx-lm refuses by name.

use super::PromptCache;
use super::error::PromptCacheError;
use super::stored::{Failure, Value, described, layer_cache, understand};
use super::tree;
use crate::caches::SequenceCache;
use crate::mixers::Keeps;
use crate::model::Model;
use mlxnode_checkpoint::{SafetensorsWriter, TensorDtype, TensorFileHeader};
use mlxnode_compute::CacheOptions;
use mlxnode_mlx::{Array, Device, Dtype};
use std::collections::BTreeMap;
use std::path::Path;

/// Our own note: how many tokens went through. mlx-lm's files of recurrent models do not say.
const TOKENS: &str = "mlxnode_tokens";

/// What a prompt cache file says about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PromptCacheNotes {
    /// The model that made it, as the user named it.
    pub model: Option<String>,
    /// The options of its tokenizer, in JSON.
    pub tokenizer_config: Option<String>,
    /// Whatever else was noted.
    pub others: BTreeMap<String, String>,
}

impl PromptCacheNotes {
    /// Reads only the notes of a file.
    pub fn read(path: &Path) -> Result<Self, PromptCacheError> {
        let header = TensorFileHeader::read(path)?;
        let (notes, _) = tree::notes(&header).map_err(|problem| problem.of(path))?;
        Ok(Self::of(notes))
    }

    fn of(mut notes: BTreeMap<String, String>) -> Self {
        notes.remove(TOKENS);
        Self {
            model: notes.remove("model"),
            tokenizer_config: notes.remove("tokenizer_config"),
            others: notes,
        }
    }
}

impl PromptCache {
    /// Reads a file that this model made, here or in mlx-lm. Caches that the file has packed or limited stay so; `options` say
    /// whether the others are packed from now on.
    pub fn load(
        model: &Model,
        options: CacheOptions,
        path: &Path,
    ) -> Result<(Self, PromptCacheNotes), PromptCacheError> {
        let foreign = |problem: String| PromptCacheError::Foreign { path: path.into(), problem };
        // A limit on tokens is a matter of the file.
        let options = CacheOptions { max_kv_size: None, ..options };
        model.check_cache(&options).map_err(|error| foreign(error.to_string()))?;
        let header = TensorFileHeader::read(path)?;
        let device = &model.device;
        let file = tree::read(device, path, &header)?;
        let noted =
            file.notes.get(TOKENS).and_then(|tokens| tokens.parse().ok()).filter(|tokens| *tokens > 0);
        let keeping: Vec<(usize, Keeps)> = keeping(model);
        if keeping.len() != file.caches.len() {
            return Err(foreign(format!(
                "it has {} caches, but {} layers of the model keep one",
                file.caches.len(),
                keeping.len()
            )));
        }
        let mut sequence = SequenceCache::new(model.decoder.layers.len(), &options);
        let mut tokens = None;
        for (place, ((class, state, info), (layer, keeps))) in
            file.caches.into_iter().zip(&keeping).enumerate()
        {
            let stored = understand(&class, state, info.as_deref(), &place.to_string());
            let stored = stored.map_err(|problem| problem.of(path))?;
            let filled = layer_cache(device, stored, keeps, &options, place, noted);
            let (cache, count) = filled.map_err(|failure| match failure {
                Failure::Malformed(problem) => problem.of(path),
                Failure::Foreign(problem) => foreign(problem),
                Failure::Device(error) => PromptCacheError::Device(error),
            })?;
            if let (Some(before), Some(count)) = (tokens, count)
                && before != count
            {
                return Err(foreign(format!("cache {place} has {count} tokens, one before it {before}")));
            }
            tokens = tokens.or(count);
            let kept = &mut sequence.layers[*layer];
            if keeps.states {
                kept.states = cache.states;
            }
            if keeps.kv {
                (kept.kv, kept.indexer) = (cache.kv, cache.indexer);
            }
        }
        let is_empty = sequence.state().next().is_none();
        sequence.advance(if is_empty { 0 } else { tokens.or(noted).unwrap_or(1) });
        // The tensors are read now: the file may change later.
        device.eval(sequence.state())?;
        Ok((Self::of(sequence, options), PromptCacheNotes::of(file.notes)))
    }

    /// Writes a file that mlx-lm 0.32.2 reads too. The cache must be one of `model`.
    pub fn save(&self, model: &Model, notes: &PromptCacheNotes, path: &Path) -> Result<(), PromptCacheError> {
        if self.tokens() == 0 {
            return Err(PromptCacheError::Empty);
        }
        self.check(model)
            .map_err(|error| PromptCacheError::Foreign { path: path.into(), problem: error.to_string() })?;
        let mut output = Output::default();
        let mut own = notes.others.clone();
        own.extend(notes.model.clone().map(|model| ("model".to_owned(), model)));
        own.extend(notes.tokenizer_config.clone().map(|config| ("tokenizer_config".to_owned(), config)));
        own.insert(TOKENS.to_owned(), self.tokens().to_string());
        output.notes.extend(own.into_iter().map(|(key, value)| (format!("0.{key}"), value)));
        for (place, (layer, keeps)) in keeping(model).into_iter().enumerate() {
            let (class, state) = described(&model.device, &self.sequence.layers[layer], &keeps)?;
            output.notes.insert(format!("1.{place}"), class.to_owned());
            output.add(&model.device, &place.to_string(), state)?;
        }
        output.write(path)
    }
}

/// The layers that keep something, and what.
fn keeping(model: &Model) -> Vec<(usize, Keeps)> {
    let layers = model.decoder.layers.iter().enumerate();
    let keeps = layers.map(|(layer, parts)| (layer, parts.mixer.keeps()));
    // The last ids of a model that looks up groups of tokens, which lie in the first layer's cache, have an entry of their own.
    let ids = model.decoder.ngrams.as_ref().map(|_| (0, Keeps { states: true, ..Keeps::default() }));
    ids.into_iter().chain(keeps.filter(|(_, keeps)| keeps.kv || keeps.states)).collect()
}

/// A file in the making.
#[derive(Default)]
struct Output {
    notes: BTreeMap<String, String>,
    tensors: Vec<(String, TensorDtype, Vec<usize>, Vec<u8>)>,
    /// Tensors that stand for something else, and for what.
    kinds: Vec<(String, &'static str)>,
}

impl Output {
    fn add(&mut self, device: &Device, name: &str, value: Value) -> Result<(), PromptCacheError> {
        match value {
            Value::Array(array) => {
                let shape = array.shape().iter().map(|size| usize::try_from(*size).unwrap_or(0)).collect();
                let dtype = match array.dtype() {
                    Dtype::F32 => TensorDtype::F32,
                    Dtype::F16 => TensorDtype::F16,
                    Dtype::BF16 => TensorDtype::BF16,
                    Dtype::U32 => TensorDtype::U32,
                    Dtype::I32 => TensorDtype::I32,
                    Dtype::I64 => TensorDtype::I64,
                    Dtype::U8 => TensorDtype::U8,
                    Dtype::Bool => TensorDtype::Bool,
                    Dtype::Other => {
                        let error = format!("tensor {name} has a type that files do not have");
                        return Err(mlxnode_mlx::Error::Mlx(error).into());
                    }
                };
                self.tensors.push((name.to_owned(), dtype, shape, bytes(device, &array)?));
            }
            Value::Whole(number) => {
                self.kinds.push((name.to_owned(), "scalar"));
                self.tensors.push((name.to_owned(), TensorDtype::I32, vec![], number.to_le_bytes().to_vec()));
            }
            Value::Text(text) => {
                self.kinds.push((name.to_owned(), "string"));
                let letters: Vec<u8> =
                    text.chars().flat_map(|letter| u32::from(letter).to_le_bytes()).collect();
                self.tensors.push((name.to_owned(), TensorDtype::I32, vec![letters.len() / 4], letters));
            }
            Value::Nothing => {
                self.kinds.push((name.to_owned(), "none"));
                self.tensors.push((name.to_owned(), TensorDtype::F32, vec![0], vec![]));
            }
            Value::List(values) => {
                for (place, value) in values.into_iter().enumerate() {
                    self.add(device, &format!("{name}.{place}"), value)?;
                }
            }
        }
        Ok(())
    }

    fn write(mut self, path: &Path) -> Result<(), PromptCacheError> {
        // An empty first entry, as mlx-lm writes it.
        self.notes.insert("2.0".to_owned(), String::new());
        for (number, (tensor, kind)) in (1..).zip(self.kinds) {
            self.notes.insert(format!("2.{number}.0"), tensor);
            self.notes.insert(format!("2.{number}.1"), kind.to_owned());
        }
        let mut writer = SafetensorsWriter::with_notes(self.notes);
        for (name, dtype, shape, bytes) in self.tensors {
            writer.add(&name, dtype, &shape, bytes)?;
        }
        Ok(writer.write(path)?)
    }
}

fn bytes(device: &Device, array: &Array) -> mlxnode_mlx::Result<Vec<u8>> {
    match array.is_empty() {
        true => Ok(Vec::new()),
        false => device.contiguous(array)?.to_bytes(),
    }
}
