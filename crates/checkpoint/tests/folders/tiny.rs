//! Small model folders on disk.

use mlxnode_checkpoint::layout::{Elements, Module};
use mlxnode_checkpoint::{
    Checkpoint, CheckpointError, Config, QuantSetting, SafetensorsWriter, TensorDtype, architectures,
};
use mlxnode_compute::LayerRange;
use serde_json::{Value, json};
use std::path::Path;
use tempfile::TempDir;

/// A tensor to be written.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: TensorDtype,
    pub(crate) shape: Vec<usize>,
}

/// The config of a model of 3 layers.
pub(crate) fn config(model_type: &str) -> Value {
    json!({
        "model_type": model_type, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-6, "vocab_size": 96,
        "max_position_embeddings": 4096, "rope_theta": 500000.0, "tie_word_embeddings": false, "eos_token_id": 2
    })
}

/// All tensors of the model of a config; `setting` says how to pack the module of a path.
pub(crate) fn tensors(
    config: &Value,
    dtype: TensorDtype,
    setting: impl Fn(&Module) -> Option<QuantSetting>,
) -> Vec<Tensor> {
    let config = Config::from_json(config.to_string().as_bytes()).unwrap();
    let spec = architectures::spec(&config).unwrap();
    let modules = spec.modules(LayerRange::new(0, spec.layer_count()));
    modules
        .iter()
        .flat_map(|module| module.tensors(setting(module)).unwrap())
        .map(|tensor| Tensor {
            name: tensor.name,
            shape: tensor.shape,
            dtype: match tensor.elements {
                Elements::Floating => dtype,
                Elements::Packed => TensorDtype::U32,
                Elements::ByteScales => TensorDtype::U8,
            },
        })
        .collect()
}

/// Unpacked tensors of the default type.
pub(crate) fn plain(config: &Value) -> Vec<Tensor> {
    tensors(config, TensorDtype::BF16, |_| None)
}

/// Writes tensors whose bytes count up from the length of their name.
pub(crate) fn write_weights<'a>(path: &Path, tensors: impl IntoIterator<Item = &'a Tensor>) {
    let mut writer = SafetensorsWriter::new();
    for Tensor { name, dtype, shape } in tensors {
        let length = shape.iter().product::<usize>() * dtype.size();
        let bytes = (0..length).map(|index| (index + name.len()) as u8).collect();
        writer.add(name, *dtype, shape, bytes).unwrap();
    }
    writer.write(path).unwrap();
}

/// A folder with a config and these tensors in one file.
pub(crate) fn folder(config: &Value, tensors: &[Tensor]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    write_weights(&folder.path().join("model.safetensors"), tensors);
    folder
}

/// Opens a folder and checks all of its tensors.
pub(crate) fn open_all(folder: &Path) -> Result<Checkpoint, CheckpointError> {
    let checkpoint = Checkpoint::open(folder)?;
    checkpoint.shard_tensors(LayerRange::new(0, checkpoint.spec().layer_count()))?;
    Ok(checkpoint)
}
