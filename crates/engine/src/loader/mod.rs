//! From a checkpoint's tensors to modules, layer by layer.
//!
//! Tensors are read lazily, one layer ahead, so that loading never holds much more than the weights themselves. Projections of the
//! same input become one matrix: their rows are read straight to where they belong.

mod attention;
mod convolved_keys;
mod feed_forward;
mod gated_delta;
mod gated_recurrence;
mod latent;
mod layer;
mod lightning;
mod mamba;
mod mamba2;
mod matrices;
mod plamo_mamba;
mod rwkv7;
mod short_convolution;
mod shortcut;
mod turn;
mod weights;
mod widening;

pub use weights::WeightReader;

use crate::adapters::{Registry, Slot, Target};
use crate::decoder::{Decoder, Head, Layer, Positions};
use crate::widening::{Blocks, Widened};
use mlxnode_checkpoint::layout::{EMBEDDING, FINAL_NORM, HEAD, HEAD_GAIN, POSITIONS};
use mlxnode_checkpoint::{
    Checkpoint, CheckpointError, Logits, ModelSpec, QuantMode, QuantSetting, ShardTensors, TensorDtype,
};
use mlxnode_compute::LayerRange;
use mlxnode_mlx::{Array, Device, Dtype, Error, QuantizationMode, Quantized, QuantizedLayout};
use std::cell::RefCell;
use std::collections::HashMap;

/// Why a layer range could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The folder holds no model that we can use, or not these layers.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// MLX refused.
    #[error(transparent)]
    Device(#[from] Error),
    /// A tensor could not be read.
    #[error("{tensor} in {file} cannot be read; fetch the model again")]
    Read {
        /// Our name for it.
        tensor: String,
        /// Its file's name.
        file: String,
        /// Why.
        #[source]
        source: Error,
    },
    /// A file could not be opened or read.
    #[error("{file} cannot be read; fetch the model again")]
    File {
        /// The file.
        file: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// MLX has no kernel for experts of this element type on the CPU backend; it would end the process.
    #[error(
        "{tensor} has elements of type {dtype}, but the CPU backend computes unpacked experts in f32 only; take a quantized version of the model"
    )]
    ExpertsOnCpu {
        /// Our name for the tensor.
        tensor: String,
        /// Its element type.
        dtype: &'static str,
    },
    /// The layers were cut where layers behind the cut see the keys and values of layers before it.
    #[error(
        "layers {layers} cannot run by themselves: layers from {cut} on see the keys and values of layers before; cut the model elsewhere"
    )]
    Cut {
        /// The layers that were asked for.
        layers: LayerRange,
        /// The first layer behind the cut.
        cut: usize,
    },
    /// The signs of a map whose inputs are turned are none.
    #[error("{tensor} in {file} holds numbers other than 1 and -1; fetch the model again")]
    Signs {
        /// Our name for the tensor.
        tensor: String,
        /// Its file's name.
        file: String,
    },
    /// A file is not the one whose header was checked.
    #[error("{file} changed while it was being loaded: {tensor} is not what it was; load the model again")]
    Changed {
        /// Our name for the tensor.
        tensor: String,
        /// Its file's name.
        file: String,
    },
}

/// Loads the modules of `layers`. `progress` gets the bytes loaded so far and in all.
pub(crate) fn load(
    device: &Device,
    checkpoint: &Checkpoint,
    layers: LayerRange,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(Decoder, Registry), LoadError> {
    let spec = checkpoint.spec();
    for cut in [layers.start, layers.end] {
        if cut < spec.layer_count() && !spec.can_split_before(cut) {
            return Err(LoadError::Cut { layers, cut });
        }
    }
    let shard = checkpoint.shard_tensors(layers)?;
    let mut source = Source::open(device, &shard, spec.dtype.into())?;
    source.kept = (spec.passes > 1).then(HashMap::new);
    source.decoder(spec, layers, progress)
}

/// All tensors of `shard`, computed, by our names for them. `progress` gets the bytes loaded so far and in all.
pub(crate) fn tensors(
    device: &Device,
    shard: &ShardTensors,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<HashMap<String, Array>, LoadError> {
    /// Read together.
    const PORTION: u64 = 64 << 20;
    let mut weights = WeightReader::open(device, shard.tensors.values())?;
    let (total, mut loaded, mut waiting) = (shard.bytes().0, 0, 0);
    progress(0, total);
    let mut tensors = HashMap::new();
    let mut portion = Vec::new();
    for (name, tensor) in &shard.tensors {
        let array = weights.compute(name, tensor)?;
        portion.push(array.clone());
        tensors.insert(name.clone(), array);
        waiting += tensor.byte_count();
        if waiting >= PORTION {
            device.eval(&portion)?;
            weights.check_reads()?;
            portion.clear();
            loaded += std::mem::take(&mut waiting);
            progress(loaded, total);
        }
    }
    device.eval(&portion)?;
    weights.check_reads()?;
    device.clear_cache()?;
    progress(total, total);
    Ok(tensors)
}

/// The modules of `layers` made of `given` tensors, by our names, every module a map of its own. Nothing is read or computed, so that
/// the tensors may be traced.
pub(crate) fn assemble(
    device: &Device,
    spec: &ModelSpec,
    shard: &ShardTensors,
    given: HashMap<String, Array>,
) -> Result<(Decoder, Registry), LoadError> {
    let source = Source::of(device, shard, spec.dtype.into(), given)?;
    source.decoder(spec, shard.layers, &mut |_, _| {})
}

/// Layer `index` of the model, made of `given` tensors, which are its own at least.
pub(crate) fn assemble_layer(
    device: &Device,
    spec: &ModelSpec,
    shard: &ShardTensors,
    given: HashMap<String, Array>,
    index: usize,
) -> Result<Layer, LoadError> {
    let mut source = Source::of(device, shard, spec.dtype.into(), given)?;
    let Some(layer) = spec.layers.get(index) else {
        return Err(Error::Mlx(format!("the model has no layer {index}")).into());
    };
    source.layer(index, layer, spec)
}

impl Source<'_> {
    fn decoder(
        mut self,
        spec: &ModelSpec,
        layers: LayerRange,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(Decoder, Registry), LoadError> {
        let (device, shard) = (self.device, self.shard);
        let source = &mut self;
        let total = shard.bytes().0;
        progress(0, total);
        let embedding = match shard.tensors.contains_key(&format!("{EMBEDDING}.weight")) {
            true => Some(source.embedding(EMBEDDING)?),
            false => None,
        };
        let ngrams = if layers.is_first() { source.ngrams(spec)? } else { None };
        let positions = match spec.positions.filter(|_| layers.is_first()) {
            Some(rows) => Some(Positions { table: source.embedding(POSITIONS)?, rows: size(rows) }),
            None => None,
        };
        let entrance = if layers.is_first() { source.entrance(spec)? } else { None };
        source.advance()?;
        let mut modules = Vec::with_capacity(layers.len());
        for (index, layer) in spec.layers.iter().enumerate().take(layers.end).skip(layers.start) {
            modules.push(source.layer(index, layer, spec)?);
            progress(source.loaded, total);
            source.advance()?;
        }
        let is_last = layers.is_last(spec.layer_count());
        let head = match is_last {
            false => None,
            true => {
                let mut norm = source.norm_of(spec.last_norm(), FINAL_NORM, spec.norm_eps)?;
                norm.eps = spec.final_norm_eps.unwrap_or(norm.eps);
                source.queue(norm.arrays());
                let linear = match &embedding {
                    Some(embedding) if spec.tied_embeddings => {
                        let changes = Slot::new(source.active());
                        let target = Target::TiedHead { slot: changes.clone(), path: EMBEDDING.to_owned() };
                        source.registry.borrow_mut().push(target);
                        embedding.as_linear(device, changes)?
                    }
                    _ => source.linear(HEAD)?,
                };
                let exit = source.exit(spec)?;
                let gain = match spec.logits {
                    Logits::Gained => Some(source.number(HEAD_GAIN)?),
                    _ => None,
                };
                let mixture = match spec.widening.block {
                    Some(_) => Some(source.mixture("model.output_attn_res", spec)?),
                    None => None,
                };
                Some(Head { exit, norm, linear, logits: spec.logits, gain, mixture })
            }
        };
        source.advance()?;
        source.advance()?;
        if source.given.is_none() {
            device.clear_cache()?;
        }
        progress(total, total);
        let decoder = Decoder {
            embedding: embedding.filter(|_| layers.is_first()),
            ngrams,
            embedding_scale: spec.embedding_scale,
            embedding_norm: spec.embedding_norm.then_some(spec.norm_eps),
            positions,
            entrance,
            widened: widened(spec, layers),
            layers: modules,
            head,
        };
        Ok((decoder, source.registry.take()))
    }
}

/// What travels between the layers of a range.
pub(crate) fn widened(spec: &ModelSpec, layers: LayerRange) -> Widened {
    Widened {
        streams: size(spec.widening.streams),
        hidden: size(spec.hidden),
        input: spec.widening.layer_inputs.map_or(0, |inputs| size(inputs.width)),
        embedding: spec.widening.embedding,
        blocks: spec.widening.block.map(|block| Blocks {
            before: size(layers.start.div_ceil(block.max(1))),
            all: size(spec.layer_count().div_ceil(block.max(1))),
            eps: spec.norm_eps,
        }),
        handed: size(spec.widening.handed),
        first: size(layers.start),
    }
}

/// What modules are made from.
struct Source<'a> {
    device: &'a Device,
    shard: &'a ShardTensors,
    weights: WeightReader<'a>,
    /// Element type of the hidden vectors.
    dtype: Dtype,
    /// Where the modules lie in the maps.
    registry: RefCell<Registry>,
    /// What is to be computed next.
    queued: RefCell<Vec<Array>>,
    /// What is being computed.
    started: Vec<Array>,
    /// Bytes of the tensors that were asked for so far.
    loaded: u64,
    /// What inputs go through before packed maps.
    turns: Vec<turn::KnownTurn>,
    /// What was loaded, by name, of a model that goes through its layers several times: the weights exist once.
    kept: Option<HashMap<String, Array>>,
    /// All tensors, where none is to be read.
    given: Option<HashMap<String, Array>>,
}

impl<'a> Source<'a> {
    /// Of these tensors, by our names.
    fn of(
        device: &'a Device,
        shard: &'a ShardTensors,
        dtype: Dtype,
        given: HashMap<String, Array>,
    ) -> Result<Self, LoadError> {
        let weights = WeightReader::open(device, [])?;
        let (registry, queued, started) = (RefCell::default(), RefCell::default(), Vec::new());
        let (turns, kept, given) = (Vec::new(), None, Some(given));
        Ok(Self { device, shard, weights, dtype, registry, queued, started, loaded: 0, turns, kept, given })
    }

    fn open(device: &'a Device, shard: &'a ShardTensors, dtype: Dtype) -> Result<Self, LoadError> {
        let weights = WeightReader::open(device, shard.tensors.values())?;
        let (registry, queued, started) = (RefCell::default(), RefCell::default(), Vec::new());
        Ok(Self {
            device,
            shard,
            weights,
            dtype,
            registry,
            queued,
            started,
            loaded: 0,
            turns: Vec::new(),
            kept: None,
            given: None,
        })
    }

    /// A tensor that is there by the checkpoint's checks; it is read and computed when it is evaluated.
    fn tensor(&mut self, name: &str) -> Result<Array, LoadError> {
        if let Some(array) = self.kept.as_ref().and_then(|kept| kept.get(name)) {
            return Ok(array.clone());
        }
        if let Some(given) = &self.given {
            return given.get(name).cloned().ok_or_else(|| self.missing(name));
        }
        let Some(tensor) = self.shard.tensors.get(name) else { return Err(self.missing(name)) };
        let array = self.weights.compute(name, tensor)?;
        self.loaded += tensor.byte_count();
        self.keep(name, &array);
        Ok(array)
    }

    fn optional(&mut self, name: &str) -> Result<Option<Array>, LoadError> {
        match self.shard.tensors.contains_key(name) {
            true => Ok(Some(self.tensor(name)?)),
            false => Ok(None),
        }
    }

    /// The rows of these tensors one under the other; None when there are none.
    fn joined(&mut self, parts: &[(String, i32)], suffix: &str) -> Result<Option<Array>, LoadError> {
        let shard = self.shard;
        let names: Vec<String> = parts.iter().map(|(path, _)| format!("{path}.{suffix}")).collect();
        let found: Option<Vec<_>> =
            names.iter().map(|name| Some((name.as_str(), shard.tensors.get(name)?))).collect();
        let Some(found) = found else { return Ok(None) };
        // Nobody else calls anything so.
        let key = names.join("+");
        if let Some(array) = self.kept.as_ref().and_then(|kept| kept.get(&key)) {
            return Ok(Some(array.clone()));
        }
        let array = self.weights.joined(&found)?;
        self.loaded += found.iter().map(|(_, tensor)| tensor.byte_count()).sum::<u64>();
        self.keep(&key, &array);
        Ok(Some(array))
    }

    /// Keeps an array for the next pass through the layers, if there is one.
    fn keep(&mut self, name: &str, array: &Array) {
        if let Some(kept) = &mut self.kept {
            kept.insert(name.to_owned(), array.clone());
        }
    }

    /// A single learned number `[1]` in the model's element type, read.
    fn number(&mut self, name: &str) -> Result<Array, LoadError> {
        let number = self.device.cast(&self.tensor(name)?, self.dtype)?;
        self.queue([&number]);
        Ok(number)
    }

    fn missing(&self, name: &str) -> LoadError {
        let file = "the checkpoint".to_owned();
        let source = Error::NoTensor { file: file.clone(), name: name.to_owned() };
        LoadError::Read { tensor: name.to_owned(), file, source }
    }

    /// Has these computed together with all else of the layer, before anything is computed with them.
    fn queue<'b>(&self, arrays: impl IntoIterator<Item = &'b Array>) {
        self.queued.borrow_mut().extend(arrays.into_iter().cloned());
    }

    /// Starts to read what was queued since the last call, and waits for what was started then: MLX reads with several threads, but
    /// only what it was asked for together, so that one layer is read while the last one is put together.
    fn advance(&mut self) -> Result<(), LoadError> {
        let queued = self.queued.take();
        if self.given.is_some() {
            return Ok(());
        }
        self.device.async_eval(&queued)?;
        let started = std::mem::replace(&mut self.started, queued);
        self.device.eval(&started)?;
        self.weights.check_reads()
    }
}

fn arrays(matrix: &Quantized) -> impl Iterator<Item = &Array> {
    [&matrix.weight, &matrix.scales].into_iter().chain(&matrix.biases)
}

/// Sizes in a spec are far below 2^31: its architecture has checked them.
fn size(size: usize) -> i32 {
    i32::try_from(size).unwrap_or(i32::MAX)
}

/// The element type of the hidden vectors.
fn dtype_of_model(model: &ModelSpec) -> Dtype {
    model.dtype.into()
}

fn layout(setting: QuantSetting) -> QuantizedLayout {
    let mode = match setting.mode {
        QuantMode::Affine => QuantizationMode::Affine,
        QuantMode::Mxfp4 => QuantizationMode::Mxfp4,
        QuantMode::Mxfp8 => QuantizationMode::Mxfp8,
        QuantMode::Nvfp4 => QuantizationMode::Nvfp4,
    };
    QuantizedLayout { mode, bits: size(setting.bits), group_size: size(setting.group_size) }
}

fn dtype(stored: TensorDtype) -> Dtype {
    match stored {
        TensorDtype::F32 => Dtype::F32,
        TensorDtype::F16 => Dtype::F16,
        TensorDtype::BF16 => Dtype::BF16,
        TensorDtype::U32 => Dtype::U32,
        TensorDtype::I32 => Dtype::I32,
        TensorDtype::U8 | TensorDtype::F8E4M3 | TensorDtype::F8E8M0 => Dtype::U8,
        TensorDtype::Bool => Dtype::Bool,
        _ => Dtype::Other,
    }
}
