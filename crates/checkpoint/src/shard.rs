//! The tensors of a layer range: exactly those, of exactly the shapes that the spec asks for.

use crate::TensorDtype;
use crate::checkpoint::{Checkpoint, CheckpointError, TensorEntry, listed};
use crate::layout::{Elements, ExpectedTensor, Module};
use crate::methods::PackedBy;
use crate::names;
use crate::quantization::{PerPath, QuantSetting};
use crate::tensor::Tensor;
use mlxnode_compute::{ByteCount, LayerRange};
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};

/// What a stage with these layers loads. All shapes and types have been checked against the spec.
#[derive(Clone, Debug)]
pub struct ShardTensors {
    /// The layers.
    pub layers: LayerRange,
    /// The modules and how each is packed, in the order of computation.
    pub modules: Vec<ShardModule>,
    /// The tensors by our names, each with what it is made from.
    pub tensors: BTreeMap<String, Tensor>,
}

/// A module of a shard.
#[derive(Clone, Debug, PartialEq)]
pub struct ShardModule {
    /// Path and kind.
    pub module: Module,
    /// How its weight is packed, if it is.
    pub quantization: Option<QuantSetting>,
    /// Its inputs, or a table's vectors, are turned in blocks of so many elements, see [`crate::ModelSpec::turned`].
    pub turned: Option<usize>,
}

impl ShardTensors {
    /// The stored tensors that have to be read, of each file, in the order of their bytes.
    pub fn by_file(&self) -> BTreeMap<&Path, Vec<&TensorEntry>> {
        let mut files: BTreeMap<&Path, BTreeMap<(u64, &str), &TensorEntry>> = BTreeMap::new();
        for tensor in self.tensors.values() {
            tensor.for_each_stored(&mut |entry| {
                let place = (entry.bytes.start, entry.stored_name.as_str());
                files.entry(&entry.file).or_default().insert(place, entry);
            });
        }
        files.into_iter().map(|(file, entries)| (file, entries.into_values().collect())).collect()
    }

    /// How a module's weight is packed, by the module's path; None for one that is not packed or not here.
    pub fn quantization_of(&self, path: &str) -> Option<QuantSetting> {
        self.modules.iter().find(|shard| shard.module.path == path)?.quantization
    }

    /// The blocks in which a module's inputs are turned, by the module's path; None for one whose inputs are taken as they are.
    pub fn turned(&self, path: &str) -> Option<usize> {
        self.modules.iter().find(|shard| shard.module.path == path)?.turned
    }

    /// Bytes of all its tensors once they are loaded.
    pub fn bytes(&self) -> ByteCount {
        self.tensors.values().map(|tensor| ByteCount(tensor.byte_count())).sum()
    }

    /// Bytes that have to be read to make them.
    pub fn stored_bytes(&self) -> ByteCount {
        self.by_file().into_values().flatten().map(|entry| ByteCount(entry.byte_count())).sum()
    }
}

/// The files' tensors are not those of the model. Lists all problems of a shard at once.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub struct TensorsError {
    /// The model's folder.
    pub folder: PathBuf,
    /// The layers that were asked for.
    pub layers: LayerRange,
    /// Our names of tensors that no file has.
    pub missing: Vec<String>,
    /// Tensors that the model has no use for, as "name in file".
    pub unexpected: Vec<String>,
    /// Tensors of the wrong shape or type.
    pub wrong: Vec<WrongTensor>,
}

/// A tensor that is not what the spec asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct WrongTensor {
    /// Its name as stored.
    pub name: String,
    /// Its file's name.
    pub file: String,
    /// Type and shape that it should have.
    pub expected: String,
    /// Type and shape that it has.
    pub actual: String,
}

impl fmt::Display for TensorsError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "the weights in {} do not fit its config.json:", self.folder.display())?;
        let mut separator = " ";
        if !self.missing.is_empty() {
            write!(out, "{separator}missing {}", listed(&self.missing))?;
            separator = "; ";
        }
        if !self.unexpected.is_empty() {
            write!(out, "{separator}unexpected {}", listed(&self.unexpected))?;
            separator = "; ";
        }
        if !self.wrong.is_empty() {
            let wrong: Vec<_> = self.wrong.iter().map(ToString::to_string).collect();
            write!(out, "{separator}{}", listed(&wrong))?;
        }
        Ok(())
    }
}

impl fmt::Display for WrongTensor {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, file, expected, actual } = self;
        write!(out, "{name} in {file} is {actual}, expected {expected}")
    }
}

impl Checkpoint {
    /// Exactly the tensors that a stage with `layers` needs: its layers; the embedding for the first stage, and for the last
    /// when the embeddings are tied; norm and head for the last.
    ///
    /// Errs when `layers` is empty or outside the model, and lists every tensor that is missing, of the wrong shape or type,
    /// or of no use (of those that belong to these layers or to no layer).
    pub fn shard_tensors(&self, layers: LayerRange) -> Result<ShardTensors, CheckpointError> {
        let count = self.spec().layer_count();
        let mut problems = TensorsError {
            folder: self.folder().into(),
            layers,
            missing: Vec::new(),
            unexpected: Vec::new(),
            wrong: Vec::new(),
        };
        if layers.is_empty() || layers.end > count {
            problems.missing.push(format!("layers {layers} of a model of {count}"));
            return Err(problems.into());
        }
        let mut shard = ShardTensors { layers, modules: Vec::new(), tensors: BTreeMap::new() };
        for module in self.spec().modules(layers) {
            let Some((quantization, expected)) = self.expected(&module, &mut problems) else { continue };
            for tensor in expected {
                let Some(found) = self.weights().get(&tensor.name) else {
                    match self.weights().absent_parts(&tensor.name) {
                        [] => problems.missing.push(tensor.name),
                        parts => problems.missing.extend_from_slice(parts),
                    }
                    continue;
                };
                if !fits(&tensor, found) {
                    problems
                        .wrong
                        .push(WrongTensor::new(found, format!("{} {:?}", tensor.elements, tensor.shape)));
                    continue;
                }
                shard.tensors.insert(tensor.name, found.clone());
            }
            let turned = self.spec().turned.get(&module.path).copied();
            shard.modules.push(ShardModule { module, quantization, turned });
        }
        problems.unexpected = self.unexpected(layers, &shard, &problems);
        if problems.missing.is_empty() && problems.unexpected.is_empty() && problems.wrong.is_empty() {
            return Ok(shard);
        }
        Err(problems.into())
    }

    /// How a module is packed and what it is stored as; None, with the problem noted, when that cannot be told.
    fn expected(
        &self,
        module: &Module,
        problems: &mut TensorsError,
    ) -> Option<(Option<QuantSetting>, Vec<ExpectedTensor>)> {
        let setting = match self.setting(module) {
            Ok(setting) => setting,
            Err(wrong) => {
                problems.wrong.push(wrong);
                return None;
            }
        };
        let tensors = module.tensors(setting);
        if tensors.is_none()
            && let (Some(setting), Some((rows, columns))) = (setting, module.matrix())
        {
            problems.wrong.push(WrongTensor {
                name: format!("{}.weight", module.path),
                file: "config.json".into(),
                expected: format!("rows of whole words and groups for [{rows}, {columns}]"),
                actual: setting.to_string(),
            });
        }
        tensors.map(|tensors| (setting, tensors))
    }

    /// How a module's weight is packed: what the config says of it, else what the shapes of its scales say, as in mlx-lm.
    fn setting(&self, module: &Module) -> Result<Option<QuantSetting>, WrongTensor> {
        let quantization = &self.spec().quantization;
        let (Some((_, columns)), Some(default)) = (module.matrix(), quantization.default) else {
            return Ok(None);
        };
        match quantization.per_path.get(&module.path) {
            Some(PerPath::Off) => return Ok(None),
            Some(PerPath::Setting(setting)) => return Ok(Some(*setting)),
            None => {}
        }
        let Some(scales) = self.weights().get(&format!("{}.scales", module.path)) else { return Ok(None) };
        let Some(weight) = self.weights().get(&format!("{}.weight", module.path)) else {
            return Ok(Some(default)); // the weight will be reported as missing
        };
        let width = |tensor: &Tensor| tensor.shape().last().copied().unwrap_or(0);
        // Half the words would also be weights of half the bits; other tools say how many bits theirs have.
        let affine_of_others = quantization.packed_by != PackedBy::Mlx && default.has_biases();
        let announced = |setting: &QuantSetting| !affine_of_others || setting.bits == default.bits;
        match QuantSetting::infer(columns, width(weight), width(scales), scales.dtype()).filter(announced) {
            Some(setting) => Ok(Some(setting)),
            None => Err(WrongTensor {
                actual: format!("{} with scales {}", weight.described(), scales.described()),
                ..WrongTensor::new(weight, format!("weights of {columns} columns packed as MLX can"))
            }),
        }
    }

    /// Tensors that nothing needs. Those of other layers, and of the other end of the model, are other stages' business.
    fn unexpected(&self, layers: LayerRange, shard: &ShardTensors, problems: &TensorsError) -> Vec<String> {
        let count = self.spec().layer_count();
        let paths = |layers| self.spec().modules(layers).into_iter().map(|module| module.path);
        let here: HashSet<String> = paths(layers).collect();
        let ends: HashSet<String> =
            paths(LayerRange::new(0, 0)).chain(paths(LayerRange::new(count, count))).collect();
        // One complaint about a module is enough.
        let wrong: HashSet<&str> = problems.wrong.iter().map(|wrong| module_of(&wrong.name)).collect();
        self.weights()
            .iter()
            .filter(|(name, tensor)| {
                let path = module_of(name);
                let ours = match names::layer_of(name) {
                    Some(layer) => layers.contains(layer) || layer >= count,
                    // A bare parameter is called like its module.
                    None => {
                        let is_of = |paths: &HashSet<String>| paths.contains(path) || paths.contains(*name);
                        is_of(&here) || !is_of(&ends)
                    }
                };
                ours && !shard.tensors.contains_key(*name)
                    && !wrong.contains(path)
                    && !wrong.contains(module_of(&tensor.origin().stored_name))
            })
            .map(|(name, tensor)| format!("{name} in {}", tensor.origin().file_name()))
            .collect()
    }
}

/// The path of the module that a tensor belongs to.
fn module_of(tensor: &str) -> &str {
    tensor.rsplit_once('.').map_or(tensor, |(path, _)| path)
}

impl WrongTensor {
    fn new(tensor: &Tensor, expected: String) -> Self {
        let origin = tensor.origin();
        let (name, file) = (origin.stored_name.clone(), origin.file_name());
        Self { name, file, expected, actual: tensor.described() }
    }
}

fn fits(expected: &ExpectedTensor, tensor: &Tensor) -> bool {
    let elements = match expected.elements {
        Elements::Floating => tensor.dtype().compute().is_some(),
        Elements::Packed => tensor.dtype() == TensorDtype::U32,
        Elements::ByteScales => tensor.dtype().is_byte(),
    };
    elements && expected.shape == tensor.shape()
}

impl fmt::Display for Elements {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Floating => "F32, F16 or BF16",
            Self::Packed => "U32",
            Self::ByteScales => "U8",
        })
    }
}
