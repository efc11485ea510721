//! Which of a repository's files make a model: those that mlx-lm takes, without Python code.

/// Which files are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// The whole model.
    All,
    /// Config, tokenizer and templates, no weights.
    Text,
    /// What changes a model: an adapter's config and tensors.
    Adapter,
    /// Rows of a data set, and its description.
    Data,
}

/// The files of an adapter, as mlx-lm and PEFT write them.
pub(crate) const ADAPTER_CONFIG: &str = "adapter_config.json";
const ADAPTER_TENSORS: [&str; 2] = ["adapters.safetensors", "adapter_model.safetensors"];

/// Tensors of an adapter.
pub(crate) fn is_adapter(file: &str) -> bool {
    ADAPTER_TENSORS.contains(&file)
}

impl Wanted {
    /// Is this file of the repository wanted?
    pub(crate) fn takes(self, file: &str) -> bool {
        match self {
            Self::All => is_text(file) || is_weights(file),
            Self::Text => is_text(file),
            Self::Adapter => file == ADAPTER_CONFIG || is_adapter(file),
            Self::Data => file == "README.md" || is_data(file),
        }
    }
}

/// Rows: JSON lines and Parquet.
pub(crate) fn is_data(file: &str) -> bool {
    const NOTES: [&str; 2] = ["dataset_infos.json", "dataset_info.json"];
    let name = file.rsplit('/').next().unwrap_or(file);
    let is_rows = [".jsonl", ".json", ".ndjson", ".parquet"].iter().any(|suffix| name.ends_with(suffix));
    is_rows && !NOTES.contains(&name) && !file.split('/').any(|part| part.starts_with('.'))
}

/// Weights, at the top of the repository only.
pub(crate) fn is_weights(file: &str) -> bool {
    file.starts_with("model") && file.ends_with(".safetensors")
}

/// mlx-lm's patterns; a star there matches slashes, too.
fn is_text(file: &str) -> bool {
    const SUFFIXES: [&str; 5] = [".json", ".tiktoken", ".txt", ".jsonl", ".jinja"];
    matches!(file, "tokenizer.model" | "tiktoken.model")
        || SUFFIXES.iter().any(|suffix| file.ends_with(suffix))
}

/// A file's name from the network that stays inside the folder it is put in.
pub(crate) fn is_safe_path(file: &str) -> bool {
    const MAX_BYTES: usize = 512;
    file.len() <= MAX_BYTES
        && file.split('/').all(|part| {
            !part.is_empty()
                && part != "."
                && part != ".."
                && !part.contains(['\\', '\0', ':'])
                && !part.contains(char::is_control)
        })
}

/// A name from the network (an etag or a commit) that becomes one part of a path.
pub(crate) fn is_safe_part(part: &str) -> bool {
    const MAX_BYTES: usize = 128;
    (1..=MAX_BYTES).contains(&part.len())
        && !part.starts_with('.')
        && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_mlx_lm_takes_except_code() {
        for (file, all, text) in [
            ("config.json", true, true),
            ("model.safetensors", true, false),
            ("model-00001-of-00002.safetensors", true, false),
            ("model.safetensors.index.json", true, true),
            ("tokenizer.model", true, true),
            ("chat_template.jinja", true, true),
            ("additional_chat_templates/tools.jinja", true, true),
            ("merges.txt", true, true),
            ("modeling_x.py", false, false),
            ("pytorch_model.bin", false, false),
            ("consolidated.safetensors", false, false),
            ("original/model.safetensors", false, false),
            ("README.md", false, false),
        ] {
            assert_eq!((Wanted::All.takes(file), Wanted::Text.takes(file)), (all, text), "{file}");
            assert!(!Wanted::Adapter.takes(file), "{file}");
        }
        for file in ["adapter_config.json", "adapters.safetensors", "adapter_model.safetensors"] {
            assert!(Wanted::Adapter.takes(file), "{file}");
        }
    }

    #[test]
    fn data_is_rows_and_their_description() {
        for (file, expected) in [
            ("data/train-00000-of-00001.parquet", true),
            ("train.jsonl", true),
            ("README.md", true),
            ("dataset_infos.json", false),
            (".huggingface/x.json", false),
            ("script.py", false),
            ("data/README.md", false),
        ] {
            assert_eq!(Wanted::Data.takes(file), expected, "{file}");
        }
    }

    #[test]
    fn names_from_the_network_cannot_leave_the_folder() {
        for file in ["config.json", "a/b.json"] {
            assert!(is_safe_path(file), "{file}");
        }
        for file in
            ["", "/etc/x.json", "../x.json", "a/../../x.json", "a//b", "./x", "a\\b", "a\n.json", "c:x"]
        {
            assert!(!is_safe_path(file), "{file:?}");
        }
        assert!(is_safe_part("0123abcdef"));
        for part in ["", "..", ".hidden", "a/b", "a b", "../../x", &"x".repeat(129)] {
            assert!(!is_safe_part(part), "{part:?}");
        }
    }
}
