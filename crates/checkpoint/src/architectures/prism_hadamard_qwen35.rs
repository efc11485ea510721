//! Hadamard packs of Qwen3.5: its maps are packed with 2 bits after their inputs were turned by a signed Walsh-Hadamard transform, so
//! that no element stands out; the hidden vectors go through the same turn (QuIP#, Tseng et al. 2024, has the idea).
//!
//! `modules` in config.json lists what is packed. Of the multimodal repositories only the text model runs.

use super::{Architecture, qwen3_5};
use crate::config::{Config, ConfigError, missing, shown};
use crate::layout::{Module, ModuleKind};
use crate::quantization::{PerPath, QuantMode, QuantSetting};
use crate::spec::ModelSpec;
use mlxnode_compute::LayerRange;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

pub(super) const ARCHITECTURE: Architecture =
    Architecture::new("prism_hadamard_qwen35", spec).weights(qwen3_5::weights).without_vision();

/// How everything in the list is packed.
const PACKING: QuantSetting = QuantSetting { group_size: 128, bits: 2, mode: QuantMode::Affine };
/// Elements that are turned together; 0 is a map that is packed only.
const BLOCKS: [u64; 6] = [0, 512, 1024, 2048, 4096, 8192];

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let mut model = qwen3_5::spec(config, "prism_hadamard_qwen35")?;
    announced(config)?;
    let parts = model.modules(LayerRange::new(0, model.layer_count()));
    let parts: BTreeMap<&str, &Module> = parts.iter().map(|module| (module.path.as_str(), module)).collect();
    let records = config.array("modules")?.unwrap_or_default();
    if records.is_empty() {
        return Err(missing("modules"));
    }
    for (index, record) in records.iter().enumerate() {
        let record = Record { config, field: format!("modules[{index}]"), values: record };
        let path = record.path()?;
        if model.quantization.per_path.insert(path.to_owned(), PerPath::Setting(PACKING)).is_some() {
            return Err(record.refuse("path", "one that is not in the list before"));
        }
        let Some(module) = parts.get(path) else {
            return Err(record.refuse("path", "a linear map or the embedding of the model"));
        };
        let block = record.block(module)?;
        if block > 0 {
            model.turned.insert(path.to_owned(), block);
        }
    }
    Ok(model)
}

/// Errs unless the config says that it is a pack of a known layout.
fn announced(config: &Config) -> Result<(), ConfigError> {
    let schema = config.optional_usize("schema_version", 1..=2)?.unwrap_or(2);
    let namespace = if schema == 1 { "mlx-lm-text" } else { "mlx-vlm-qwen3_5" };
    let given = config.str("tensor_namespace")?.unwrap_or_default();
    if given != namespace {
        let allowed = format!("\"{namespace}\", as schema_version is {schema}");
        return Err(config.refuse("tensor_namespace", &shown(&given.into()), &allowed));
    }
    let layout = config.str("gdn_activation_layout")?.unwrap_or("grouped");
    if layout != "grouped" {
        return Err(config.refuse("gdn_activation_layout", &shown(&layout.into()), "\"grouped\""));
    }
    let object = config.object("quantization")?.cloned().unwrap_or_default();
    let needed =
        serde_json::json!({"bits": PACKING.bits, "group_size": PACKING.group_size, "mode": "affine"});
    let object = Value::Object(object);
    if object != needed {
        return Err(config.refuse("quantization", &shown(&object), &needed.to_string()));
    }
    Ok(())
}

/// An entry of the list.
struct Record<'a> {
    config: &'a Config,
    field: String,
    values: &'a Value,
}

impl<'a> Record<'a> {
    fn get(&self, name: &str) -> Option<&'a Value> {
        self.values.as_object().and_then(|values: &Map<_, _>| values.get(name))
    }

    fn refuse(&self, name: &str, allowed: &str) -> ConfigError {
        let field = format!("{}.{name}", self.field);
        match self.get(name) {
            Some(value) => self.config.refuse(&field, &shown(value), allowed),
            None => missing(&field),
        }
    }

    fn path(&self) -> Result<&'a str, ConfigError> {
        self.get("path").and_then(Value::as_str).ok_or_else(|| self.refuse("path", "a path of the model"))
    }

    /// The elements that are turned together before this module's matrix.
    fn block(&self, module: &Module) -> Result<usize, ConfigError> {
        let is_embedding = match module.kind {
            ModuleKind::Embedding { .. } => true,
            ModuleKind::Linear { bias: false, .. } => false,
            ModuleKind::Linear { .. } => return Err(self.refuse("path", "a map without a bias")),
            _ => return Err(self.refuse("path", "a linear map or the embedding of the model")),
        };
        if self.get("embedding").and_then(Value::as_bool) != Some(is_embedding) {
            return Err(self.refuse("embedding", &format!("{is_embedding} for this path")));
        }
        if self.get("dtype").and_then(Value::as_str) != Some("float16") {
            return Err(self.refuse("dtype", "\"float16\""));
        }
        let width = module.matrix().map_or(0, |(_, width)| width);
        if !width.is_multiple_of(PACKING.group_size) {
            return Err(self.refuse("path", &format!("a map whose width, {width}, is divisible by 128")));
        }
        let block = self.get("block").and_then(Value::as_u64).filter(|block| BLOCKS.contains(block));
        let block = block.and_then(|block| usize::try_from(block).ok());
        match block {
            Some(block) if block == 0 || width.is_multiple_of(block) => Ok(block),
            _ => Err(self.refuse(
                "block",
                &format!("0, 512, 1024, 2048, 4096 or 8192, and divide the width, which is {width}"),
            )),
        }
    }
}
