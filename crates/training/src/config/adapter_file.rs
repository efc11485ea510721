//! adapter_config.json: what mlx-lm writes beside an adapter, all arguments of the run, and what has to be read of it again.

use super::{ConfigError, FineTuneType, LoraParameters, Settings, TrainingConfig, words};
use serde::Serialize as _;
use serde_json::{Map, Value};

/// What an adapter's config says about its tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// What the tensors are.
    pub fine_tune_type: FineTuneType,
    /// How many blocks at the end have them; -1 or 0: all. None where the file does not say.
    pub num_layers: Option<i64>,
    /// Rank and scale; None for a full fine-tune, whose tensors are weights.
    pub lora: Option<LoraParameters>,
}

impl AdapterConfig {
    /// Reads the text of an adapter_config.json; keys that are not needed may be anything, since other versions write others.
    ///
    /// # Errors
    /// [`ConfigError`] when it is no JSON object, or a needed key is missing or of another type.
    pub fn from_json(text: &str, origin: &str) -> Result<Self, ConfigError> {
        let values: Map<String, Value> = serde_json::from_str(text).map_err(|error| ConfigError::Syntax {
            origin: origin.to_owned(),
            line: error.line(),
            reason: error.to_string(),
        })?;
        let settings = Settings::from_json(values, origin);
        let root = settings.root();
        let known = words::fine_tune_type(&root, "fine_tune_type")?;
        let fine_tune_type = known.unwrap_or(FineTuneType::Lora); // mlx-lm's older files do not say
        let lora = match (fine_tune_type, root.section("lora_parameters")?) {
            (FineTuneType::Full, _) => None,
            (_, Some(parameters)) => Some(LoraParameters::read(&parameters)?),
            (_, None) => return Err(root.wrong("lora_parameters", "is missing")),
        };
        Ok(Self { fine_tune_type, num_layers: root.whole("num_layers", -1, 1 << 20)?, lora })
    }
}

impl TrainingConfig {
    /// The text of adapter_config.json for this run: mlx-lm's arguments, sorted, and ours where they were given.
    pub fn adapter_config(&self) -> String {
        let mut arguments = self.arguments().clone();
        if self.fine_tune_type == FineTuneType::Full {
            arguments.insert("lora_parameters".to_owned(), Value::Null);
        }
        let mut sorted: Vec<_> = arguments.into_iter().collect();
        sorted.sort_by(|(one, _), (other, _)| one.cmp(other));
        let sorted: Map<String, Value> = sorted.into_iter().collect();
        let mut bytes = Vec::new();
        let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
        let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
        // JSON values in memory have nothing that cannot be written.
        let written = Value::Object(sorted).serialize(&mut serializer);
        debug_assert!(written.is_ok(), "{written:?}");
        String::from_utf8(bytes).unwrap_or_default()
    }
}
