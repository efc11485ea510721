//! The families we know: one small file each, which says how its config.json maps to a [`ModelSpec`].
//!
//! Field names, defaults and what is ignored follow mlx-lm 0.32.2, so that a folder that runs there means the same here.

mod afm7;
mod afmoe;
mod apertus;
mod baichuan_m1;
mod bailing_hybrid;
mod bailing_moe;
mod bailing_moe_linear;
mod bailing_moe_v3;
mod bitnet;
mod capabilities;
mod cohere;
mod cohere2;
mod dbrx;
mod deepseek;
mod deepseek_v2;
mod deepseek_v3;
mod deepseek_v32;
mod dense;
mod dots1;
mod ernie4_5;
mod ernie4_5_moe;
mod exaone;
mod exaone4;
mod exaone_moe;
mod falcon_h1;
mod gear;
mod gemma;
mod gemma2;
mod gemma3;
mod gemma3_text;
mod gemma3n;
mod gemma4;
mod gemma4_text;
mod glm;
mod glm4;
mod glm4_moe;
mod glm4_moe_lite;
mod glm_moe_dsa;
mod gpt2;
mod gpt_bigcode;
mod gpt_neox;
mod gpt_oss;
mod gptj;
mod granite;
mod granitemoe;
mod granitemoehybrid;
mod helium;
mod hunyuan;
mod hunyuan_v1_dense;
mod internlm2;
mod internlm3;
mod iquestloopcoder;
mod jamba;
mod kimi_k25;
mod kimi_k3;
mod kimi_linear;
mod kimi_vl;
mod klear;
mod laguna;
mod latent;
mod lfm2;
mod lfm2_moe;
mod lfm2_vl;
mod lille_130m;
mod llama;
mod llama4;
mod llama4_text;
mod longcat_flash;
mod longcat_flash_ngram;
mod mamba;
mod mamba2;
mod mellum;
mod mimo;
mod mimo_v2_flash;
mod minicpm;
mod minicpm3;
mod minimax;
mod minimax_m3_vl;
mod ministral3;
mod mistral;
mod mistral3;
mod mistral4;
mod mixtral;
mod mixture;
mod muse_glimmer;
mod nanbeige;
mod nanochat;
mod nemotron;
mod nemotron_h;
mod nemotron_nas;
mod olmo2;
mod olmo3;
mod olmo_hybrid;
mod olmoe;
mod openelm;
mod phi;
mod phi3;
mod phimoe;
mod phixtral;
mod pixtral;
mod plamo;
mod plamo2;
mod plamo3;
mod prism_hadamard_qwen35;
mod qwen;
mod qwen2;
mod qwen2_moe;
mod qwen2_vl;
mod qwen3;
mod qwen3_5;
mod qwen3_5_moe;
mod qwen3_moe;
mod qwen3_next;
mod qwen3_vl;
mod qwen3_vl_moe;
mod recurrent;
mod recurrent_gemma;
mod rope;
mod rwkv7;
mod seed_oss;
mod smollm3;
mod solar_open;
mod spark2_5;
mod spelling;
mod stablelm;
mod starcoder2;
mod step3p5;
mod talkie;
mod telechat3;
mod youtu_llm;

pub use capabilities::Capabilities;

use crate::config::{Config, ConfigError};
use crate::spec::ModelSpec;
use crate::weights::{Weights, WeightsError};
use serde_json::Value;

/// A family of models.
#[derive(Clone, Copy, Debug)]
pub struct Architecture {
    /// Its name: the `model_type` of its configs.
    pub name: &'static str,
    /// Other values of `model_type` that mean the same.
    pub aliases: &'static [&'static str],
    /// Describes a model of this family.
    pub spec: fn(&Config) -> Result<ModelSpec, ConfigError>,
    /// Puts weights that are stored in other layouts than the spec's into it, MLX's own folders and Hugging Face's alike. Runs on
    /// the whole model, after names and packing were made ours; what it leaves under an unknown name is reported as unexpected.
    pub weights: fn(&Config, &ModelSpec, &mut Weights) -> Result<(), WeightsError>,
    /// Paths of MLX's folders that we call otherwise, and what we call them; applied in this order, after `weights`. Paths that are
    /// split by `weights` stand here once for each part, for the settings of packed weights.
    pub names: &'static [(&'static str, &'static str)],
    /// What can be done with its models.
    pub capabilities: Capabilities,
}

impl Architecture {
    /// A family whose tensors are stored as its spec has them.
    const fn new(name: &'static str, spec: fn(&Config) -> Result<ModelSpec, ConfigError>) -> Self {
        let capabilities = Capabilities::DECODER;
        Self { name, aliases: &[], spec, weights: |_, _, _| Ok(()), names: &[], capabilities }
    }

    /// With other values of `model_type` that mean the same.
    const fn aliases(mut self, aliases: &'static [&'static str]) -> Self {
        self.aliases = aliases;
        self
    }

    /// With a rule for tensors that are stored otherwise.
    const fn weights(
        mut self,
        weights: fn(&Config, &ModelSpec, &mut Weights) -> Result<(), WeightsError>,
    ) -> Self {
        self.weights = weights;
        self
    }

    /// With other names for what every model has.
    const fn names(mut self, names: &'static [(&'static str, &'static str)]) -> Self {
        self.names = names;
        self
    }

    /// Puts a model's weights into the layout of its spec and under its names.
    pub(crate) fn arrange(
        &self,
        config: &Config,
        spec: &ModelSpec,
        weights: &mut Weights,
    ) -> Result<(), WeightsError> {
        (self.weights)(config, spec, weights)?;
        self.names.iter().try_for_each(|(theirs, ours)| weights.rename(theirs, ours))
    }

    /// Its layers need each other's keys and values, so that none can be on another node.
    const fn in_one_piece(mut self) -> Self {
        self.capabilities.pipeline = false;
        self
    }

    /// Without keys and values: there is nothing to pack.
    const fn without_keys(mut self) -> Self {
        self.capabilities.quantized_kv = false;
        self
    }

    /// Made for images too, which are not used.
    const fn without_vision(mut self) -> Self {
        self.capabilities.vision_unused = true;
        self
    }
}

/// All families, in alphabetical order.
pub fn known() -> &'static [Architecture] {
    &[
        afm7::ARCHITECTURE,
        afmoe::ARCHITECTURE,
        apertus::ARCHITECTURE,
        baichuan_m1::ARCHITECTURE,
        bailing_hybrid::ARCHITECTURE,
        bailing_moe::ARCHITECTURE,
        bailing_moe_linear::ARCHITECTURE,
        bailing_moe_v3::ARCHITECTURE,
        bitnet::ARCHITECTURE,
        cohere::ARCHITECTURE,
        cohere2::ARCHITECTURE,
        dbrx::ARCHITECTURE,
        deepseek::ARCHITECTURE,
        deepseek_v2::ARCHITECTURE,
        deepseek_v3::ARCHITECTURE,
        deepseek_v32::ARCHITECTURE,
        dots1::ARCHITECTURE,
        ernie4_5::ARCHITECTURE,
        ernie4_5_moe::ARCHITECTURE,
        exaone::ARCHITECTURE,
        exaone4::ARCHITECTURE,
        exaone_moe::ARCHITECTURE,
        falcon_h1::ARCHITECTURE,
        gear::ARCHITECTURE,
        gemma::ARCHITECTURE,
        gemma2::ARCHITECTURE,
        gemma3::ARCHITECTURE,
        gemma3_text::ARCHITECTURE,
        gemma3n::ARCHITECTURE,
        gemma4::ARCHITECTURE,
        gemma4_text::ARCHITECTURE,
        glm::ARCHITECTURE,
        glm4::ARCHITECTURE,
        glm4_moe::ARCHITECTURE,
        glm4_moe_lite::ARCHITECTURE,
        glm_moe_dsa::ARCHITECTURE,
        gpt2::ARCHITECTURE,
        gpt_bigcode::ARCHITECTURE,
        gpt_neox::ARCHITECTURE,
        gpt_oss::ARCHITECTURE,
        gptj::ARCHITECTURE,
        granite::ARCHITECTURE,
        granitemoe::ARCHITECTURE,
        granitemoehybrid::ARCHITECTURE,
        helium::ARCHITECTURE,
        hunyuan::ARCHITECTURE,
        hunyuan_v1_dense::ARCHITECTURE,
        internlm2::ARCHITECTURE,
        internlm3::ARCHITECTURE,
        iquestloopcoder::ARCHITECTURE,
        jamba::ARCHITECTURE,
        kimi_k25::ARCHITECTURE,
        kimi_k3::ARCHITECTURE,
        kimi_linear::ARCHITECTURE,
        kimi_vl::ARCHITECTURE,
        klear::ARCHITECTURE,
        laguna::ARCHITECTURE,
        lfm2::ARCHITECTURE,
        lfm2_moe::ARCHITECTURE,
        lfm2_vl::ARCHITECTURE,
        lille_130m::ARCHITECTURE,
        llama::ARCHITECTURE,
        llama4::ARCHITECTURE,
        llama4_text::ARCHITECTURE,
        longcat_flash::ARCHITECTURE,
        longcat_flash_ngram::ARCHITECTURE,
        mamba::ARCHITECTURE,
        mamba2::ARCHITECTURE,
        mellum::ARCHITECTURE,
        mimo::ARCHITECTURE,
        mimo_v2_flash::ARCHITECTURE,
        minicpm::ARCHITECTURE,
        minicpm3::ARCHITECTURE,
        minimax::ARCHITECTURE,
        minimax_m3_vl::ARCHITECTURE,
        ministral3::ARCHITECTURE,
        mistral::ARCHITECTURE,
        mistral3::ARCHITECTURE,
        mistral4::ARCHITECTURE,
        mixtral::ARCHITECTURE,
        muse_glimmer::ARCHITECTURE,
        nanbeige::ARCHITECTURE,
        nanochat::ARCHITECTURE,
        nemotron::ARCHITECTURE,
        nemotron_h::ARCHITECTURE,
        nemotron_nas::ARCHITECTURE,
        olmo2::ARCHITECTURE,
        olmo3::ARCHITECTURE,
        olmo_hybrid::ARCHITECTURE,
        olmoe::ARCHITECTURE,
        openelm::ARCHITECTURE,
        phi::ARCHITECTURE,
        phi3::ARCHITECTURE,
        phimoe::ARCHITECTURE,
        phixtral::ARCHITECTURE,
        pixtral::ARCHITECTURE,
        plamo::ARCHITECTURE,
        plamo2::ARCHITECTURE,
        plamo3::ARCHITECTURE,
        prism_hadamard_qwen35::ARCHITECTURE,
        qwen::ARCHITECTURE,
        qwen2::ARCHITECTURE,
        qwen2_moe::ARCHITECTURE,
        qwen2_vl::ARCHITECTURE,
        qwen3::ARCHITECTURE,
        qwen3_5::ARCHITECTURE,
        qwen3_5_moe::ARCHITECTURE,
        qwen3_moe::ARCHITECTURE,
        qwen3_next::ARCHITECTURE,
        qwen3_vl::ARCHITECTURE,
        qwen3_vl_moe::ARCHITECTURE,
        recurrent_gemma::ARCHITECTURE,
        rwkv7::ARCHITECTURE,
        seed_oss::ARCHITECTURE,
        smollm3::ARCHITECTURE,
        solar_open::ARCHITECTURE,
        spark2_5::ARCHITECTURE,
        stablelm::ARCHITECTURE,
        starcoder2::ARCHITECTURE,
        step3p5::ARCHITECTURE,
        talkie::ARCHITECTURE,
        telechat3::ARCHITECTURE,
        youtu_llm::ARCHITECTURE,
    ]
}

/// The family that a config names.
pub fn find(config: &Config) -> Result<&'static Architecture, ConfigError> {
    let model_type = match remapped(config) {
        Some(model_type) => model_type,
        None => config.model_type()?,
    };
    known().iter().find(|known| known.name == model_type || known.aliases.contains(&model_type)).ok_or_else(
        || ConfigError::UnknownArchitecture {
            model_type: model_type.chars().take(60).collect(),
            known: names().join(", "),
        },
    )
}

/// The family of a config whose `model_type` is another family's, told by the names in `architectures`.
fn remapped(config: &Config) -> Option<&'static str> {
    let (model_type, architecture) = bailing_moe_v3::REMAPPED;
    let is_named = match config.get("architectures")? {
        Value::String(name) => name == architecture,
        Value::Array(names) => names.iter().any(|name| name.as_str() == Some(architecture)),
        _ => false,
    };
    let is_remapped = is_named && config.model_type().is_ok_and(|named| named == model_type);
    is_remapped.then_some(bailing_moe_v3::ARCHITECTURE.name)
}

/// Describes the model of a config.
pub fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    if let Some(file) = config.str("model_file")? {
        // Python code in the repository; nothing that we could or should run.
        return Err(config.refuse(
            "model_file",
            file,
            "absent: models with code of their own are not supported",
        ));
    }
    let architecture = find(config)?;
    let mut spec = (architecture.spec)(config)?;
    spec.quantization.rename(architecture.names);
    Ok(spec)
}

fn names() -> Vec<&'static str> {
    let mut names: Vec<_> = known()
        .iter()
        .flat_map(|known| [known.name].into_iter().chain(known.aliases.iter().copied()))
        .collect();
    names.sort_unstable();
    names
}

#[cfg(test)]
mod tests;
