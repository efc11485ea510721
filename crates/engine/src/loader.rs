//! From a checkpoint's tensors to modules, layer by layer.
//!
//! Tensors are opened lazily and evaluated one layer at a time, so that loading never holds much more than the weights
//! themselves: projections of the same input are stacked into one matrix, the originals are dropped before the next layer.

use crate::attention::{Attention, QkNorms};
use crate::decoder::{Decoder, Head, Layer};
use crate::experts::{Experts, Matrices, SharedExpert};
use crate::feed_forward::{FeedForward, Network, Up};
use crate::linear::{Embedding, Linear, Stacked, Weight};
use crate::norm::{Kind as NormForm, Norm};
use crate::rope::RotaryEmbedding;
use mlxnode_checkpoint::layout::{EMBEDDING, FINAL_NORM, HEAD};
use mlxnode_checkpoint::{
    Activation, AttentionSpec, Checkpoint, CheckpointError, ExpertsSpec, FeedForward as FeedForwardSpec,
    LayerSpec, Mixer, ModelSpec, NormKind, QkNormKind, QuantMode, QuantSetting, ShardTensors,
    SinglePrecision, TensorDtype,
};
use mlxnode_compute::LayerRange;
use mlxnode_mlx::{Array, Device, Dtype, Error, QuantizationMode, Quantized, QuantizedLayout, TensorFile};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// On the CPU backend one token times a dense matrix is a general matrix product. OpenBLAS has a direct kernel for up to 10^6
/// multiplications; beyond it copies the whole matrix first, which took 8% of all CPU time at 400 M parameters. So matrices are
/// stacked only up to 10^6 single-precision elements; below that it saves half the host's work. Packed matrices have no such limit.
const LARGEST_DENSE_STACK_ON_CPU: usize = 4_000_000;

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
) -> Result<Decoder, LoadError> {
    let shard = checkpoint.shard_tensors(layers)?;
    let spec = checkpoint.spec();
    let mut source = Source::open(device, &shard)?;
    let total = shard.bytes().0;
    progress(0, total);
    let embedding = match shard.tensors.contains_key(&format!("{EMBEDDING}.weight")) {
        true => Some(source.embedding()?),
        false => None,
    };
    progress(source.loaded, total);
    let mut modules = Vec::with_capacity(layers.len());
    for (index, layer) in spec.layers.iter().enumerate().take(layers.end).skip(layers.start) {
        // What a layer's stacking leaves in the device's cache, the next layer's reading takes again.
        modules.push(source.layer(index, layer, spec)?);
        progress(source.loaded, total);
    }
    let is_last = layers.is_last(spec.layer_count());
    let head = match is_last {
        false => None,
        true => {
            let norm = source.norm(FINAL_NORM, spec)?;
            source.eval(FINAL_NORM, norm.arrays())?;
            let linear = match &embedding {
                Some(embedding) if spec.tied_embeddings => embedding.as_linear(device)?,
                _ => source.linear(HEAD)?,
            };
            Some(Head { norm, linear, logits: spec.logits })
        }
    };
    device.clear_cache()?;
    progress(total, total);
    Ok(Decoder {
        embedding: embedding.filter(|_| layers.is_first()),
        embedding_scale: spec.embedding_scale,
        layers: modules,
        head,
    })
}

/// The open files of a shard.
struct Source<'a> {
    device: &'a Device,
    shard: &'a ShardTensors,
    files: BTreeMap<Arc<Path>, TensorFile>,
    /// Bytes of the tensors that were asked for so far.
    loaded: u64,
}

/// A matrix as it is stored.
enum Matrix {
    Dense(Array),
    Quantized(Quantized),
}

impl<'a> Source<'a> {
    fn open(device: &'a Device, shard: &'a ShardTensors) -> Result<Self, LoadError> {
        let mut files = BTreeMap::new();
        for entry in shard.tensors.values() {
            if !files.contains_key(&entry.file) {
                files.insert(Arc::clone(&entry.file), TensorFile::open(device, &entry.file)?);
            }
        }
        Ok(Self { device, shard, files, loaded: 0 })
    }

    /// A tensor that is there by the checkpoint's checks; it is read when it is evaluated.
    fn tensor(&mut self, name: &str) -> Result<Array, LoadError> {
        let read = |file: String, source| LoadError::Read { tensor: name.to_owned(), file, source };
        let Some(entry) = self.shard.tensors.get(name) else {
            let file = "the checkpoint".to_owned();
            let missing = Error::NoTensor { file: file.clone(), name: name.to_owned() };
            return Err(read(file, missing));
        };
        let Some(file) = self.files.get_mut(&entry.file) else {
            let missing = Error::NoTensor { file: entry.file_name(), name: name.to_owned() };
            return Err(read(entry.file_name(), missing));
        };
        let array = file.take(&entry.stored_name).map_err(|source| read(entry.file_name(), source))?;
        let same_shape = array.shape().iter().map(|size| usize::try_from(*size).ok());
        let same_shape = same_shape.eq(entry.shape.iter().map(|size| Some(*size)));
        if !same_shape || array.dtype() != dtype(entry.dtype) {
            return Err(LoadError::Changed { tensor: name.to_owned(), file: entry.file_name() });
        }
        self.loaded += entry.byte_count();
        Ok(array)
    }

    fn optional(&mut self, name: &str) -> Result<Option<Array>, LoadError> {
        match self.shard.tensors.contains_key(name) {
            true => Ok(Some(self.tensor(name)?)),
            false => Ok(None),
        }
    }

    /// Evaluates, naming `path` when a file cannot be read.
    fn eval<'b>(&self, path: &str, arrays: impl IntoIterator<Item = &'b Array>) -> Result<(), LoadError> {
        self.device.eval(arrays).map_err(|source| {
            let entry = self.shard.tensors.iter().find(|(name, _)| name.starts_with(path));
            let file = entry.map_or_else(|| "the checkpoint".to_owned(), |(_, entry)| entry.file_name());
            LoadError::Read { tensor: path.to_owned(), file, source }
        })
    }

    fn matrix(&mut self, path: &str) -> Result<Matrix, LoadError> {
        let weight = self.tensor(&format!("{path}.weight"))?;
        let Some(setting) = self.shard.quantization_of(path) else { return Ok(Matrix::Dense(weight)) };
        let scales = self.tensor(&format!("{path}.scales"))?;
        let biases = self.optional(&format!("{path}.biases"))?;
        Ok(Matrix::Quantized(Quantized { weight, scales, biases, layout: layout(setting) }))
    }

    fn embedding(&mut self) -> Result<Embedding, LoadError> {
        let embedding = match self.matrix(EMBEDDING)? {
            Matrix::Dense(matrix) => Embedding::Dense(matrix),
            Matrix::Quantized(matrix) => Embedding::Quantized(matrix),
        };
        match &embedding {
            Embedding::Dense(matrix) => self.eval(EMBEDDING, [matrix])?,
            Embedding::Quantized(matrix) => self.eval(EMBEDDING, arrays(matrix))?,
        }
        Ok(embedding)
    }

    fn norm(&mut self, path: &str, spec: &ModelSpec) -> Result<Norm, LoadError> {
        let weight = self.tensor(&format!("{path}.weight"))?;
        let (weight, kind) = match spec.norm {
            NormKind::Rms => (weight, NormForm::Rms),
            NormKind::RmsPlusOne => (self.plus_one(&weight)?, NormForm::Rms),
            NormKind::Layer { bias } => {
                let bias = bias.then(|| self.tensor(&format!("{path}.bias"))).transpose()?;
                (weight, NormForm::Layer { bias })
            }
            NormKind::LayerPlusOne => {
                let bias = Some(self.tensor(&format!("{path}.bias"))?);
                (self.plus_one(&weight)?, NormForm::Layer { bias })
            }
        };
        Ok(Norm { kind, weight, eps: spec.norm_eps })
    }

    /// A weight that counts from one, in its own element type.
    fn plus_one(&self, weight: &Array) -> Result<Array, LoadError> {
        Ok(self.device.add(&Array::scalar(1.0, weight.dtype())?, weight)?)
    }

    /// A linear map, read.
    fn linear(&mut self, path: &str) -> Result<Linear, LoadError> {
        let bias = self.optional(&format!("{path}.bias"))?;
        let matrix = self.matrix(path)?;
        self.eval(path, bias.iter())?;
        self.linear_of(path, matrix, bias)
    }

    fn linear_of(&self, path: &str, matrix: Matrix, bias: Option<Array>) -> Result<Linear, LoadError> {
        let weight = match matrix {
            Matrix::Dense(matrix) => {
                self.eval(path, [&matrix])?;
                let weight = Weight::dense(self.device, &matrix)?;
                if let Weight::Dense(view) = &weight {
                    view.eval()?;
                }
                weight
            }
            Matrix::Quantized(matrix) => {
                self.eval(path, arrays(&matrix))?;
                Weight::Quantized(matrix)
            }
        };
        Ok(Linear { weight, bias })
    }

    /// Maps of the same input with these numbers of outputs, stacked when they are of one kind.
    fn stacked(&mut self, parts: &[(String, i32)]) -> Result<Stacked, LoadError> {
        let mut matrices = Vec::new();
        let mut biases = Vec::new();
        for (path, _) in parts {
            matrices.push(self.matrix(path)?);
            biases.push(self.optional(&format!("{path}.bias"))?);
        }
        let path = parts.first().map_or("", |(path, _)| path);
        let all_biases: Option<Vec<Array>> = biases.iter().cloned().collect();
        let uniform_biases = all_biases.is_some() || biases.iter().all(Option::is_none);
        let Some(matrix) = self.stack(&matrices)?.filter(|_| uniform_biases) else {
            let mut linears = Vec::new();
            for (((path, _), matrix), bias) in parts.iter().zip(matrices).zip(biases) {
                self.eval(path, bias.iter())?;
                linears.push(self.linear_of(path, matrix, bias)?);
            }
            return Ok(Stacked { whole: None, parts: linears });
        };
        // From here on only the stacked matrix and views of it live.
        let bias = all_biases.map(|biases| self.device.concatenate(&biases, 0)).transpose()?;
        match &matrix {
            Matrix::Dense(matrix) => self.eval(path, [matrix].into_iter().chain(&bias))?,
            Matrix::Quantized(matrix) => self.eval(path, arrays(matrix).chain(&bias))?,
        }
        drop((matrices, biases));
        let views = self.views(parts, &matrix, bias.as_ref())?;
        Ok(Stacked { whole: Some(self.linear_of(path, matrix, bias)?), parts: views })
    }

    /// Maps with these numbers of outputs that are stored as one matrix.
    fn fused(&mut self, path: &str, outputs: &[i32]) -> Result<Stacked, LoadError> {
        let bias = self.optional(&format!("{path}.bias"))?;
        let matrix = self.matrix(path)?;
        self.eval(path, bias.iter())?;
        let pays = match &matrix {
            Matrix::Dense(matrix) => {
                self.eval(path, [matrix])?;
                self.device.is_gpu() || matrix.byte_size() <= LARGEST_DENSE_STACK_ON_CPU
            }
            Matrix::Quantized(matrix) => {
                self.eval(path, arrays(matrix))?;
                true
            }
        };
        let parts: Vec<_> = outputs.iter().map(|outputs| (path.to_owned(), *outputs)).collect();
        let views = self.views(&parts, &matrix, bias.as_ref())?;
        let whole = if pays { Some(self.linear_of(path, matrix, bias)?) } else { None };
        Ok(Stacked { whole, parts: views })
    }

    /// The maps whose rows lie one under the other in `matrix`.
    fn views(
        &self,
        parts: &[(String, i32)],
        matrix: &Matrix,
        bias: Option<&Array>,
    ) -> Result<Vec<Linear>, LoadError> {
        let mut views = Vec::new();
        let mut start = 0;
        for (path, outputs) in parts {
            let (matrix, bias) = self.rows(matrix, bias, start, start + outputs)?;
            self.eval(path, bias.iter())?;
            views.push(self.linear_of(path, matrix, bias)?);
            start += outputs;
        }
        Ok(views)
    }

    /// The matrices one under the other; None when they differ in kind.
    fn stack(&self, matrices: &[Matrix]) -> Result<Option<Matrix>, LoadError> {
        let mut dense: Vec<&Array> = Vec::new();
        let mut quantized: Vec<&Quantized> = Vec::new();
        for matrix in matrices {
            match matrix {
                Matrix::Dense(matrix) => dense.push(matrix),
                Matrix::Quantized(matrix) => quantized.push(matrix),
            }
        }
        let same_type = dense.windows(2).all(|pair| pair[0].dtype() == pair[1].dtype());
        let bytes: usize = dense.iter().map(|matrix| matrix.byte_size()).sum();
        let pays = self.device.is_gpu() || bytes <= LARGEST_DENSE_STACK_ON_CPU;
        if dense.len() == matrices.len() && same_type && pays {
            return Ok(Some(Matrix::Dense(self.device.concatenate(dense, 0)?)));
        }
        let alike = |pair: &[&Quantized]| {
            pair[0].layout == pair[1].layout && pair[0].scales.dtype() == pair[1].scales.dtype()
        };
        if quantized.len() == matrices.len() && quantized.windows(2).all(alike) {
            return Ok(Some(Matrix::Quantized(self.device.stack_rows(&quantized)?)));
        }
        Ok(None)
    }

    /// Views of the rows `start..stop`.
    fn rows(
        &self,
        matrix: &Matrix,
        bias: Option<&Array>,
        start: i32,
        stop: i32,
    ) -> Result<(Matrix, Option<Array>), LoadError> {
        let cut = |array: &Array| self.device.slice(array, &[start, 0], &[stop, array.dim(1)]);
        let matrix = match matrix {
            Matrix::Dense(matrix) => Matrix::Dense(cut(matrix)?),
            Matrix::Quantized(matrix) => Matrix::Quantized(Quantized {
                weight: cut(&matrix.weight)?,
                scales: cut(&matrix.scales)?,
                biases: matrix.biases.as_ref().map(cut).transpose()?,
                layout: matrix.layout,
            }),
        };
        let bias = bias.map(|bias| self.device.slice(bias, &[start], &[stop])).transpose()?;
        Ok((matrix, bias))
    }

    fn layer(&mut self, index: usize, layer: &LayerSpec, spec: &ModelSpec) -> Result<Layer, LoadError> {
        let path = |name: &str| format!("model.layers.{index}.{name}");
        let mut norm = |name: Option<&str>| {
            let Some(name) = name else { return Ok(None) };
            let norm = self.norm(&path(name), spec)?;
            self.eval(&path(name), norm.arrays())?;
            Ok::<_, LoadError>(Some(norm))
        };
        let before_mixer = norm(layer.norms.before_mixer)?;
        let after_mixer = norm(layer.norms.after_mixer)?;
        let before_feed_forward = norm(layer.norms.before_feed_forward)?;
        let after_feed_forward = norm(layer.norms.after_feed_forward)?;
        let attention = match &layer.mixer {
            Mixer::Attention(attention) => self.attention(&path("self_attn"), attention, spec)?,
        };
        let feed_forward = match layer.feed_forward {
            FeedForwardSpec::Gated { intermediate, activation, fused, .. } => {
                FeedForward::Network(self.gated(&path("mlp"), intermediate, activation, fused)?)
            }
            FeedForwardSpec::Plain { activation, names: [up, down], .. } => FeedForward::Network(Network {
                up: Up::Plain(self.linear(&path(up))?),
                activation,
                down: self.linear(&path(down))?,
            }),
            FeedForwardSpec::Experts(experts) => {
                FeedForward::Experts(Box::new(self.experts(&path(experts.block), &experts)?))
            }
        };
        let flow = layer.flow;
        Ok(Layer {
            before_mixer,
            attention,
            after_mixer,
            before_feed_forward,
            feed_forward,
            after_feed_forward,
            flow,
        })
    }

    fn gated(
        &mut self,
        path: &str,
        intermediate: usize,
        activation: Activation,
        fused: bool,
    ) -> Result<Network, LoadError> {
        let width = size(intermediate);
        let gate_up = match fused {
            true => self.fused(&format!("{path}.gate_up_proj"), &[width, width])?,
            false => {
                self.stacked(&[(format!("{path}.gate_proj"), width), (format!("{path}.up_proj"), width)])?
            }
        };
        let up = Up::Gated { gate_up, intermediate: width };
        Ok(Network { up, activation, down: self.linear(&format!("{path}.down_proj"))? })
    }

    fn experts(&mut self, path: &str, spec: &ExpertsSpec) -> Result<Experts, LoadError> {
        let shared = match spec.shared {
            None => None,
            Some(width) => Some(SharedExpert {
                network: self.gated(&format!("{path}.shared_expert"), width, spec.activation, false)?,
                gate: self.linear(&format!("{path}.shared_expert_gate"))?,
            }),
        };
        Ok(Experts {
            router: self.linear(&format!("{path}.gate"))?,
            routing: spec.routing,
            per_token: size(spec.per_token),
            activation: spec.activation,
            gate: self.matrices(&format!("{path}.switch_mlp.gate_proj"))?,
            up: self.matrices(&format!("{path}.switch_mlp.up_proj"))?,
            down: self.matrices(&format!("{path}.switch_mlp.down_proj"))?,
            shared,
        })
    }

    /// One matrix for each expert, read.
    fn matrices(&mut self, path: &str) -> Result<Matrices, LoadError> {
        Ok(match self.matrix(path)? {
            Matrix::Dense(matrices) if !self.device.is_gpu() && matrices.dtype() != Dtype::F32 => {
                let dtype = matrices.dtype().name();
                return Err(LoadError::ExpertsOnCpu { tensor: format!("{path}.weight"), dtype });
            }
            Matrix::Dense(matrices) => {
                self.eval(path, [&matrices])?;
                let turned = self.device.transpose(&matrices, &[0, 2, 1])?;
                turned.eval()?;
                Matrices::Dense(turned)
            }
            Matrix::Quantized(matrices) => {
                self.eval(path, arrays(&matrices))?;
                Matrices::Quantized(matrices)
            }
        })
    }

    fn attention(
        &mut self,
        path: &str,
        attention: &AttentionSpec,
        spec: &ModelSpec,
    ) -> Result<Attention, LoadError> {
        let (heads, kv_heads) = (size(attention.heads), size(attention.kv_heads));
        let head_dim = size(attention.head_dim);
        let widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim];
        let projections = match attention.fused {
            true => self.fused(&format!("{path}.qkv_proj"), &widths)?,
            false => {
                let names = ["q_proj", "k_proj", "v_proj"].map(|name| format!("{path}.{name}"));
                let parts: Vec<_> = names.into_iter().zip(widths).collect();
                self.stacked(&parts)?
            }
        };
        let single_precision = match attention.single_precision {
            SinglePrecision::Never => false,
            SinglePrecision::ForF16 => spec.dtype == mlxnode_compute::Dtype::F16,
            SinglePrecision::Always => spec.dtype != mlxnode_compute::Dtype::F32,
        };
        let rope = attention.rope.as_ref();
        Ok(Attention {
            projections,
            output: self.linear(&format!("{path}.o_proj"))?,
            norms: self.qk_norms(path, attention, spec)?,
            rope: rope.map(|rope| RotaryEmbedding::new(self.device, rope)).transpose()?,
            heads,
            kv_heads,
            head_dim,
            scale: attention.scale,
            window: attention.window.map(|window| i32::try_from(window).unwrap_or(i32::MAX)),
            score_cap: attention.score_cap,
            single_precision,
        })
    }

    fn qk_norms(
        &mut self,
        path: &str,
        attention: &AttentionSpec,
        spec: &ModelSpec,
    ) -> Result<Option<QkNorms>, LoadError> {
        let Some(norm) = attention.qk_norm else { return Ok(None) };
        let mut weight = |name: &str| {
            let weight = self.tensor(&format!("{path}.{name}.weight"))?;
            match (norm.kind, spec.norm) {
                (QkNormKind::PerHead, NormKind::RmsPlusOne) => self.plus_one(&weight),
                _ => Ok(weight),
            }
        };
        let (query, key) = (weight(norm.names[0])?, weight(norm.names[1])?);
        self.eval(path, [&query, &key])?;
        Ok(Some(QkNorms { kind: norm.kind, query, key, eps: spec.norm_eps, after_rope: norm.after_rope }))
    }
}

fn arrays(matrix: &Quantized) -> impl Iterator<Item = &Array> {
    [&matrix.weight, &matrix.scales].into_iter().chain(&matrix.biases)
}

/// Sizes in a spec are far below 2^31: its architecture has checked them.
fn size(size: usize) -> i32 {
    i32::try_from(size).unwrap_or(i32::MAX)
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
        TensorDtype::U8 => Dtype::U8,
        _ => Dtype::Other,
    }
}
