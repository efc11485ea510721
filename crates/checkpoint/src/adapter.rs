//! Adapters on disk: the low-rank changes that LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024) training leaves.
//!
//! Two layouts are read: mlx-lm's (`adapters.safetensors`, the scale in `adapter_config.json`) and PEFT's
//! (`adapter_model.safetensors`, matrices transposed, the scale from `lora_alpha` and `r`). Everything is checked against the model
//! before MLX sees a byte: names, shapes, element types, and that each matrix has its counterpart.

use crate::checkpoint::{CheckpointError, listed, read_text};
use crate::config::MAX_CONFIG_BYTES;
use crate::layout::{Module, ModuleKind};
use crate::template::Template;
use crate::tensor_file::TensorFileHeader;
use crate::{Checkpoint, TensorDtype, architectures, names};
use mlxnode_compute::LayerRange;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const CONFIG: &str = "adapter_config.json";
const MLX_FILE: &str = "adapters.safetensors";
const PEFT_FILE: &str = "adapter_model.safetensors";
/// Ranks beyond this are no low ranks any more.
const LARGEST_RANK: usize = 4096;

/// An adapter that fits a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// The file with the tensors.
    pub file: PathBuf,
    /// Factor on every change.
    pub scale: f32,
    /// What changes which module, by the module's path.
    pub changes: BTreeMap<String, Change>,
}

/// The change of one module: its weight `W` becomes `W + scale * (A B)^T`, in DoRA with rows brought to given lengths.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// The module.
    pub module: Module,
    /// From the inputs to the rank: `[inputs, rank]`, of experts `[experts, rank, inputs]`, of an embedding `[rows, rank]`.
    pub a: StoredMatrix,
    /// From the rank to the outputs: `[rank, outputs]`, of experts `[experts, outputs, rank]`, of an embedding `[rank, width]`.
    pub b: StoredMatrix,
    /// Lengths of the rows, `[outputs]`: the name of the tensor. DoRA has them.
    pub magnitudes: Option<String>,
    /// The rank.
    pub rank: usize,
}

/// A matrix in the adapter's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredMatrix {
    /// Its name there.
    pub name: String,
    /// Stored with its axes the other way round.
    pub is_turned: bool,
}

/// A folder that holds no adapter for this model.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// No config.
    #[error("{folder} holds no adapter: {CONFIG} is missing")]
    NoConfig {
        /// The folder.
        folder: PathBuf,
    },
    /// Neither layout.
    #[error("{folder} holds no adapter: it has neither {MLX_FILE} nor {PEFT_FILE}")]
    NoFile {
        /// The folder.
        folder: PathBuf,
    },
    /// A field of the config cannot be.
    #[error("{path}: {problem}")]
    Config {
        /// The file.
        path: PathBuf,
        /// The field and what is wrong.
        problem: String,
    },
    /// A file is damaged or cannot be read.
    #[error(transparent)]
    File(#[from] CheckpointError),
    /// It is for another model.
    #[error("the adapter {path} does not fit the model: {problems}")]
    Unfit {
        /// The file.
        path: PathBuf,
        /// Names, and the shapes that were found and needed.
        problems: String,
    },
}

/// What a tensor of an adapter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    A,
    B,
    Magnitudes,
}

/// How a name ends, what the tensor is, and whether its axes are turned.
const ENDINGS: [(&str, Role, bool); 9] = [
    (".lora_a", Role::A, false),
    (".lora_b", Role::B, false),
    (".m", Role::Magnitudes, false),
    (".lora_A.weight", Role::A, true),
    (".lora_B.weight", Role::B, true),
    (".lora_embedding_A", Role::A, true),
    (".lora_embedding_B", Role::B, true),
    (".lora_magnitude_vector.weight", Role::Magnitudes, false),
    (".lora_magnitude_vector", Role::Magnitudes, false),
];

#[derive(Default)]
struct Found {
    a: Option<(StoredMatrix, Vec<usize>)>,
    b: Option<(StoredMatrix, Vec<usize>)>,
    magnitudes: Option<(String, Vec<usize>)>,
}

/// Families whose text model mlx-lm keeps within another one, and what its names begin with there.
const WITHIN: [(&str, &[(&str, &str)]); 19] = [
    ("gemma3", TEXT_PART),
    ("gemma3n", &[("model", "model.language_model")]),
    ("gemma4", TEXT_PART),
    ("kimi_k25", TEXT_PART),
    ("kimi_k3", TEXT_PART),
    ("kimi_vl", TEXT_PART),
    ("lfm2-vl", TEXT_PART),
    ("llama4", TEXT_PART),
    ("mamba", BACKBONE),
    ("mamba2", BACKBONE),
    ("minimax_m3_vl", TEXT_PART),
    ("mistral3", TEXT_PART),
    ("nemotron_h", BACKBONE),
    ("pixtral", TEXT_PART),
    ("qwen2_vl", TEXT_PART),
    ("qwen3_5", TEXT_PART),
    ("qwen3_5_moe", TEXT_PART),
    ("qwen3_vl", TEXT_PART),
    ("qwen3_vl_moe", TEXT_PART),
];
const TEXT_PART: &[(&str, &str)] =
    &[("model", "language_model.model"), ("lm_head", "language_model.lm_head")];
const BACKBONE: &[(&str, &str)] = &[
    ("model.layers", "backbone.layers"),
    ("model.embed_tokens", "backbone.embeddings"),
    ("model.norm", "backbone.norm_f"),
];

impl Checkpoint {
    /// mlx-lm's name for a module or a tensor of ours, as its adapters have it. [`Adapter::open`] takes both.
    pub fn name_in_mlx_lm(&self, name: &str) -> String {
        let Ok(architecture) = architectures::find(self.config()) else { return name.to_owned() };
        let theirs = architecture.names.iter().find_map(|(theirs, ours)| {
            let fit = Template::new(ours).fit(name)?;
            Some(Template::new(theirs).fill(&fit.numbers, fit.rest))
        });
        let theirs = theirs.filter(|theirs| path_of(theirs, self) == name);
        let theirs = theirs.unwrap_or_else(|| name.to_owned());
        let within = WITHIN.iter().find(|(family, _)| *family == architecture.name);
        let prefixes = within.map_or(&[][..], |(_, prefixes)| prefixes);
        let replaced = prefixes.iter().find_map(|(ours, within)| {
            let rest = theirs.strip_prefix(ours)?;
            (rest.is_empty() || rest.starts_with('.')).then(|| format!("{within}{rest}"))
        });
        replaced.unwrap_or(theirs)
    }
}

impl Adapter {
    /// Reads the config and the header of the adapter in `folder`, and checks both against the model.
    pub fn open(folder: &Path, checkpoint: &Checkpoint) -> Result<Self, AdapterError> {
        let path = folder.join(CONFIG);
        let Some(text) = read_text(&path, MAX_CONFIG_BYTES)? else {
            return Err(AdapterError::NoConfig { folder: folder.into() });
        };
        let config: Value = serde_json::from_slice(&text)
            .map_err(|error| AdapterError::Config { path: path.clone(), problem: error.to_string() })?;
        let is_there = |name: &str| Some(folder.join(name)).filter(|file| file.is_file());
        let (file, is_peft) = match (is_there(MLX_FILE), is_there(PEFT_FILE)) {
            (Some(file), _) => (file, false),
            (None, Some(file)) => (file, true),
            (None, None) => return Err(AdapterError::NoFile { folder: folder.into() }),
        };
        let scale = match is_peft {
            true => peft_scale(&config),
            false => mlx_scale(&config),
        };
        let scale = scale.map_err(|problem| AdapterError::Config { path, problem })?;
        let header = TensorFileHeader::read(&file)?;
        let changes = changes(&header, checkpoint)
            .map_err(|problems| AdapterError::Unfit { path: file.clone(), problems: listed(&problems) })?;
        if changes.is_empty() {
            let problems = "it changes nothing".to_owned();
            return Err(AdapterError::Unfit { path: file, problems });
        }
        Ok(Self { file, scale, changes })
    }

    /// The changes of the modules of a layer range.
    pub fn within(&self, checkpoint: &Checkpoint, layers: LayerRange) -> BTreeMap<&str, &Change> {
        let modules = checkpoint.spec().modules(layers).into_iter();
        modules
            .filter_map(|module| self.changes.get_key_value(&module.path))
            .map(|(path, change)| (path.as_str(), change))
            .collect()
    }
}

fn mlx_scale(config: &Value) -> Result<f32, String> {
    match config.get("fine_tune_type").and_then(Value::as_str).unwrap_or("lora") {
        "lora" | "dora" => {}
        "full" => {
            return Err("fine_tune_type is \"full\": its tensors are a model's own weights; fuse it into a model first".to_owned());
        }
        other => return Err(format!("fine_tune_type is {other:?}, but must be \"lora\" or \"dora\"")),
    }
    let scale = config.get("lora_parameters").and_then(|parameters| parameters.get("scale"));
    number("lora_parameters.scale", scale)
}

fn peft_scale(config: &Value) -> Result<f32, String> {
    let kind = config.get("peft_type").and_then(Value::as_str).unwrap_or("LORA");
    if kind != "LORA" {
        return Err(format!("peft_type is {kind:?}, but must be \"LORA\""));
    }
    for field in ["alpha_pattern", "rank_pattern"] {
        if config.get(field).and_then(Value::as_object).is_some_and(|pattern| !pattern.is_empty()) {
            return Err(format!("{field} is not empty: scales of single modules are not supported"));
        }
    }
    let (alpha, rank) = (number("lora_alpha", config.get("lora_alpha"))?, number("r", config.get("r"))?);
    if rank < 1.0 {
        return Err(format!("r is {rank}, but must be 1 or more"));
    }
    let by_root = config.get("use_rslora").and_then(Value::as_bool).unwrap_or(false);
    Ok(alpha / if by_root { rank.sqrt() } else { rank })
}

fn number(field: &str, value: Option<&Value>) -> Result<f32, String> {
    let number = value.and_then(Value::as_f64).map(|value| value as f32).filter(|value| value.is_finite());
    number.ok_or_else(|| match value {
        None => format!("{field} is missing"),
        Some(_) => format!("{field} must be a number"),
    })
}

/// What the tensors change; or all that does not fit.
fn changes(
    header: &TensorFileHeader,
    checkpoint: &Checkpoint,
) -> Result<BTreeMap<String, Change>, Vec<String>> {
    let spec = checkpoint.spec();
    let modules = spec.modules(LayerRange::new(0, spec.layer_count())).into_iter();
    let modules: BTreeMap<String, Module> = modules.map(|module| (module.path.clone(), module)).collect();
    let (mut found, mut problems) = (BTreeMap::<String, Found>::new(), Vec::new());
    for (name, (dtype, shape)) in &header.tensors {
        let ending = ENDINGS
            .iter()
            .find_map(|(ending, role, turned)| Some((name.strip_suffix(ending)?, *role, *turned)));
        let Some((path, role, is_turned)) = ending else {
            problems.push(format!("{name} is no part of a LoRA or DoRA adapter"));
            continue;
        };
        let path = path_of(path, checkpoint);
        if !modules.contains_key(&path) {
            problems.push(format!("{name}: the model has no {path}"));
            continue;
        }
        if !matches!(dtype, TensorDtype::F32 | TensorDtype::F16 | TensorDtype::BF16) {
            problems.push(format!("{name} has elements of type {dtype}"));
            continue;
        }
        let found = found.entry(path).or_default();
        let mut shape = shape.clone();
        if is_turned {
            shape.reverse();
        }
        let matrix = (StoredMatrix { name: name.clone(), is_turned }, shape.clone());
        match role {
            Role::A => found.a = Some(matrix),
            Role::B => found.b = Some(matrix),
            Role::Magnitudes => found.magnitudes = Some((name.clone(), shape)),
        }
    }
    let mut changes = BTreeMap::new();
    for (path, found) in found {
        let Some(module) = modules.get(&path) else { continue };
        match change(module, found) {
            Ok(change) => drop(changes.insert(path, change)),
            Err(problem) => problems.push(problem),
        }
    }
    if problems.is_empty() { Ok(changes) } else { Err(problems) }
}

/// Our path for a module that an adapter names.
fn path_of(path: &str, checkpoint: &Checkpoint) -> String {
    let path = path.strip_prefix("base_model.model.").unwrap_or(path);
    let mut path = names::without_wrapper(path).into_owned();
    let Ok(architecture) = architectures::find(checkpoint.config()) else { return path };
    for (theirs, ours) in architecture.names {
        if let Some(fit) = Template::new(theirs).fit(&path) {
            path = Template::new(ours).fill(&fit.numbers, fit.rest);
        }
    }
    path
}

fn change(module: &Module, found: Found) -> Result<Change, String> {
    let path = &module.path;
    let (Some((a, a_shape)), Some((b, b_shape))) = (found.a, found.b) else {
        return Err(format!("{path} has only one of its two matrices"));
    };
    let rank = match module.kind {
        ModuleKind::Experts { .. } => a_shape.get(1),
        _ => a_shape.last(),
    };
    let rank = rank.copied().filter(|rank| (1..=LARGEST_RANK).contains(rank));
    let rank = rank.ok_or_else(|| format!("{} has shape {a_shape:?}", a.name))?;
    let (needed_a, needed_b, outputs) = match module.kind {
        ModuleKind::Linear { inputs, outputs, .. } => {
            (vec![inputs, rank], vec![rank, outputs], Some(outputs))
        }
        ModuleKind::Embedding { rows, width } => (vec![rows, rank], vec![rank, width], None),
        ModuleKind::Experts { experts, inputs, outputs, .. } => {
            (vec![experts, rank, inputs], vec![experts, outputs, rank], None)
        }
        _ => return Err(format!("{path} is no linear map and no embedding")),
    };
    for (name, shape, needed) in [(&a.name, &a_shape, &needed_a), (&b.name, &b_shape, &needed_b)] {
        if shape != needed {
            return Err(format!("{name} has shape {shape:?}, but the model needs {needed:?}"));
        }
    }
    let magnitudes = match (found.magnitudes, outputs) {
        (None, _) => None,
        (Some((name, shape)), Some(outputs)) if shape == [outputs] => Some(name),
        (Some((name, shape)), Some(outputs)) => {
            return Err(format!("{name} has shape {shape:?}, but the model needs [{outputs}]"));
        }
        (Some((name, _)), None) => return Err(format!("{name}: DoRA is supported for linear maps only")),
    };
    Ok(Change { module: module.clone(), a, b, magnitudes, rank })
}
