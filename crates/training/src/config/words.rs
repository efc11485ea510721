//! Keys whose words or numbers stand for something: what they may be, and what they mean.

use super::defaults::Values;
use super::settings::Section;
use super::{
    ConfigError, Count, FineTuneType, Layers, LoraParameters, Mask, Preference, PreferenceLoss, Report,
};
use serde_json::Value;

/// Ranks beyond this are no low ranks any more.
const LARGEST_RANK: i64 = 4096;

impl LoraParameters {
    pub(super) fn read(section: &Section<'_>) -> Result<Self, ConfigError> {
        if section.has("alpha") && !section.has("scale") {
            let problem =
                "is not known: the factor on the change is \"scale\" (in other tools' words alpha / rank)";
            return Err(section.wrong("alpha", problem));
        }
        section.only(&["rank", "dropout", "scale", "keys"])?;
        let scale = section.number("scale", "a finite number", |_| true)?;
        let keys = match section.list("keys")? {
            None => None,
            Some(list) => {
                let keys: Option<Vec<String>> =
                    list.iter().map(|key| key.as_str().map(str::to_owned)).collect();
                let problem = "must be a list of paths, such as self_attn.q_proj";
                Some(keys.filter(|keys| !keys.is_empty()).ok_or_else(|| section.wrong("keys", problem))?)
            }
        };
        Ok(Self {
            rank: section.whole("rank", 1, LARGEST_RANK)?.unwrap_or(8) as usize,
            dropout: section
                .number("dropout", "in [0, 1)", |share| (0.0..1.0).contains(&share))?
                .unwrap_or(0.0),
            scale: scale.ok_or_else(|| section.wrong("scale", "is missing: the factor on the change"))?,
            keys,
        })
    }
}

pub(super) fn fine_tune_type(section: &Section<'_>, key: &str) -> Result<Option<FineTuneType>, ConfigError> {
    let types = [("lora", FineTuneType::Lora), ("dora", FineTuneType::Dora), ("full", FineTuneType::Full)];
    section.choice(key, &types)
}

/// -1 is all; 0 is, too, in mlx-lm (a slip: `[-0:]` is everything), and here only where its slips are wanted.
pub(super) fn layers(values: Values<'_>, parity: bool) -> Result<Layers, ConfigError> {
    match values.get("num_layers", |section, key| section.whole(key, -1, 1 << 20))? {
        -1 => Ok(Layers::All),
        0 if parity => Ok(Layers::All),
        0 => Err(values.given.wrong("num_layers", "is 0, but must be 1 or more, or -1 for all blocks")),
        number => Ok(Layers::Last(number as usize)),
    }
}

/// -1 is all.
pub(super) fn batches(values: Values<'_>, key: &str) -> Result<Count, ConfigError> {
    Ok(match values.get(key, |section, key| section.whole(key, -1, 1 << 45))? {
        -1 => Count::All,
        number => Count::Of(number.unsigned_abs()),
    })
}

/// Bytes, or a text such as "2GB": units are decimal, as in mlx-lm.
pub(super) fn bytes(section: &Section<'_>, key: &str) -> Result<Option<u64>, ConfigError> {
    let Some(Value::String(text)) = section.get(key) else { return section.count(key, 0) };
    let end = text.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(text.len());
    let unit = match text[end..].trim().to_uppercase().as_str() {
        "" => Some(1.0),
        "M" | "MB" => Some(1e6),
        "G" | "GB" => Some(1e9),
        _ => None,
    };
    let size = unit.and_then(|unit| Some(text[..end].parse::<f64>().ok()? * unit));
    let size = size.filter(|size| (0.0..1e15).contains(size));
    size.map(|size| Some(size as u64))
        .ok_or_else(|| section.wrong(key, format!("is {text:?}, but must be a size such as 500MB or 2GB")))
}

pub(super) fn mask(root: &Section<'_>) -> Result<Mask, ConfigError> {
    let mask_prompt = root.flag("mask_prompt")?;
    let turns = [("none", Mask::None), ("last", Mask::LastTurn), ("every", Mask::EveryTurn)];
    match (mask_prompt, root.choice("mask_turns", &turns)?) {
        (Some(true), Some(Mask::None)) => {
            Err(root.wrong("mask_turns", "is \"none\", but mask_prompt is true: take one of them out"))
        }
        (Some(false), Some(Mask::LastTurn | Mask::EveryTurn)) => {
            Err(root.wrong("mask_prompt", "is false, but mask_turns masks: take one of them out"))
        }
        (_, Some(turns)) => Ok(turns),
        (Some(true), None) => Ok(Mask::LastTurn),
        (_, None) => Ok(Mask::None),
    }
}

pub(super) fn reports(root: &Section<'_>) -> Result<Vec<Report>, ConfigError> {
    let names: Vec<String> = match root.get("report_to") {
        Some(Value::Array(list)) => {
            let names: Option<Vec<String>> =
                list.iter().map(|name| name.as_str().map(str::to_owned)).collect();
            names.ok_or_else(|| root.wrong("report_to", "must be a list of words"))?
        }
        _ => {
            root.text("report_to")?.map_or_else(Vec::new, |text| text.split(',').map(str::to_owned).collect())
        }
    };
    let mut reports = Vec::new();
    for name in names {
        let report = match name.trim().to_lowercase().as_str() {
            "" => continue,
            "jsonl" => Report::Jsonl,
            "csv" => Report::Csv,
            "tensorboard" => Report::TensorBoard,
            "wandb" | "swanlab" => {
                let problem = format!(
                    "names {name}, a service that is not called from here; use tensorboard, whose files it takes over"
                );
                return Err(root.wrong("report_to", problem));
            }
            _ => {
                let problem = format!("names {name:?}, but must be of jsonl, csv and tensorboard");
                return Err(root.wrong("report_to", problem));
            }
        };
        if !reports.contains(&report) {
            reports.push(report);
        }
    }
    Ok(reports)
}

pub(super) fn preference(root: &Section<'_>) -> Result<Option<Preference>, ConfigError> {
    let losses = [("dpo", PreferenceLoss::Dpo), ("orpo", PreferenceLoss::Orpo)];
    let beta = root.number("beta", "above 0", |beta| beta > 0.0)?.unwrap_or(0.1);
    Ok(root.choice("preference", &losses)?.map(|loss| Preference { loss, beta }))
}
