//! From a checkpoint's tensors to modules, layer by layer.
//!
//! Tensors are opened lazily and evaluated one layer at a time, so that loading never holds much more than the weights
//! themselves: projections of the same input are stacked into one matrix, the originals are dropped before the next layer.

use crate::attention::Attention;
use crate::decoder::{Decoder, Head, Layer, Norm};
use crate::feed_forward::FeedForward;
use crate::linear::{Embedding, Linear, Stacked, Weight};
use crate::rope::RotaryEmbedding;
use mlxnode_checkpoint::layout::{EMBEDDING, FINAL_NORM, HEAD};
use mlxnode_checkpoint::{
    Activation, AttentionSpec, Checkpoint, CheckpointError, FeedForward as FeedForwardSpec, LayerSpec, Mixer,
    NormPlacement, QuantMode, QuantSetting, ShardTensors, TensorDtype,
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
        modules.push(source.layer(index, layer, spec.norm_eps)?);
        progress(source.loaded, total);
    }
    let is_last = layers.is_last(spec.layer_count());
    let head = match (&embedding, is_last) {
        (_, false) => None,
        (Some(embedding), true) if spec.tied_embeddings => {
            Some(Head { norm: source.norm(FINAL_NORM, spec.norm_eps)?, linear: embedding.as_linear(device)? })
        }
        _ => Some(Head { norm: source.norm(FINAL_NORM, spec.norm_eps)?, linear: source.linear(HEAD)? }),
    };
    if let Some(head) = &head {
        device.eval([&head.norm.weight])?;
    }
    device.clear_cache()?;
    progress(total, total);
    Ok(Decoder { embedding: embedding.filter(|_| layers.is_first()), layers: modules, head })
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

    fn norm(&mut self, path: &str, eps: f32) -> Result<Norm, LoadError> {
        Ok(Norm { weight: self.tensor(&format!("{path}.weight"))?, eps })
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
        let mut views = Vec::new();
        let mut start = 0;
        for (path, outputs) in parts {
            let (matrix, bias) = self.rows(&matrix, bias.as_ref(), start, start + outputs)?;
            self.eval(path, bias.iter())?;
            views.push(self.linear_of(path, matrix, bias)?);
            start += outputs;
        }
        Ok(Stacked { whole: Some(self.linear_of(path, matrix, bias)?), parts: views })
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

    fn layer(&mut self, index: usize, spec: &LayerSpec, eps: f32) -> Result<Layer, LoadError> {
        let path = |name: &str| format!("model.layers.{index}.{name}");
        let (input_norm, post_norm) = match spec.norms {
            NormPlacement::Before => (
                self.norm(&path("input_layernorm"), eps)?,
                self.norm(&path("post_attention_layernorm"), eps)?,
            ),
        };
        self.eval(&path(""), [&input_norm.weight, &post_norm.weight])?;
        let attention = match &spec.mixer {
            Mixer::Attention(attention) => self.attention(&path("self_attn"), attention, eps)?,
        };
        let feed_forward = match spec.feed_forward {
            FeedForwardSpec::Gated { intermediate, activation: Activation::Silu, .. } => {
                let width = size(intermediate);
                let parts = [(path("mlp.gate_proj"), width), (path("mlp.up_proj"), width)];
                FeedForward {
                    gate_up: self.stacked(&parts)?,
                    down: self.linear(&path("mlp.down_proj"))?,
                    intermediate: width,
                }
            }
        };
        Ok(Layer { input_norm, attention, post_norm, feed_forward })
    }

    fn attention(&mut self, path: &str, spec: &AttentionSpec, eps: f32) -> Result<Attention, LoadError> {
        let (heads, kv_heads, head_dim) = (size(spec.heads), size(spec.kv_heads), size(spec.head_dim));
        let parts = [
            (format!("{path}.q_proj"), heads * head_dim),
            (format!("{path}.k_proj"), kv_heads * head_dim),
            (format!("{path}.v_proj"), kv_heads * head_dim),
        ];
        let norms = match spec.qk_norm {
            Some(mlxnode_checkpoint::QkNorm::PerHead) => (
                Some(self.tensor(&format!("{path}.q_norm.weight"))?),
                Some(self.tensor(&format!("{path}.k_norm.weight"))?),
            ),
            None => (None, None),
        };
        self.eval(path, norms.0.iter().chain(&norms.1))?;
        Ok(Attention {
            projections: self.stacked(&parts)?,
            output: self.linear(&format!("{path}.o_proj"))?,
            query_norm: norms.0,
            key_norm: norms.1,
            norm_eps: eps,
            rope: spec.rope.as_ref().map(|rope| RotaryEmbedding::new(self.device, rope)).transpose()?,
            heads,
            kv_heads,
            head_dim,
            scale: spec.scale,
            window: spec.window.map(|window| i32::try_from(window).unwrap_or(i32::MAX)),
        })
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
