//! The small files that say how a model reads and writes text, held in memory.
//!
//! They come from a folder, from the hub or from another node, so they are kept by name and without a path: whoever
//! has the bytes can build a tokenizer, and a name can never lead out of a folder.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{ErrorKind, Read},
    path::Path,
};

use serde::de::DeserializeOwned;

use crate::TextError;

const MIB: u64 = 1 << 20;

/// Name and most bytes. The largest honest tokenizer.json has about 35 MiB, the largest honest template about 30 KiB.
const KNOWN_FILES: [(&str, u64); 14] = [
    ("tokenizer.json", 64 * MIB),
    ("tokenizer_config.json", 16 * MIB), // repeats thousands of added tokens in some models, templates too
    ("special_tokens_map.json", MIB),
    ("chat_template.jinja", 256 << 10),
    ("chat_template.json", MIB),
    ("generation_config.json", MIB),
    ("config.json", MIB),
    ("added_tokens.json", 16 * MIB),
    // Vocabularies of models without a tokenizer.json; the largest honest ones have about 5 MiB.
    ("tokenizer.model", 16 * MIB),
    ("tiktoken.model", 16 * MIB),
    ("qwen.tiktoken", 16 * MIB),
    ("tekken.json", 64 * MIB), // 150,000 tokens are 19 MiB
    ("vocab.json", 16 * MIB),
    (MERGES, 16 * MIB),
];

/// Beside vocab.json.
const MERGES: &str = "merges.txt";

/// Those that stand in for a tokenizer.json, in the order in which they are looked for. mlx-lm finds all but qwen.tiktoken,
/// which is that of Qwen's first models: they bring their own Python for it.
pub(crate) const VOCABULARIES: [&str; 5] =
    ["tekken.json", "tokenizer.model", "tiktoken.model", "qwen.tiktoken", "vocab.json"];

/// A model's text files by name. Only known names within their limits get in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TextFiles {
    files: BTreeMap<String, Vec<u8>>,
}

impl TextFiles {
    /// The names that are looked for.
    pub fn names() -> impl Iterator<Item = &'static str> {
        KNOWN_FILES.iter().map(|(name, _)| *name)
    }

    /// Reads what `folder` has of them. Files that are not there are left out; whether one is missed shows later.
    pub fn read(folder: &Path) -> Result<Self, TextError> {
        let mut files = Self::default();
        for (name, limit) in KNOWN_FILES {
            if (VOCABULARIES.contains(&name) || name == MERGES) && files.files.contains_key("tokenizer.json")
            {
                continue; // it says the same and more
            }
            let path = folder.join(name);
            let failed = |source| TextError::Read { path: path.clone(), source };
            // Asked before it is opened: opening a pipe waits for who writes into it.
            let metadata = match path.metadata() {
                Ok(metadata) => metadata,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(failed(error)),
            };
            if !metadata.is_file() {
                return Err(failed(std::io::Error::other("it is not a regular file")));
            }
            let file = File::open(&path).map_err(failed)?;
            let mut bytes = Vec::new();
            file.take(limit + 1).read_to_end(&mut bytes).map_err(failed)?;
            if bytes.len() as u64 > limit {
                return Err(TextError::FileTooLarge { file: name.to_owned(), bytes: metadata.len(), limit });
            }
            files.files.insert(name.to_owned(), bytes);
        }
        Ok(files)
    }

    /// Takes files that came another way. Refuses unknown names and too many bytes.
    pub fn from_map(files: BTreeMap<String, Vec<u8>>) -> Result<Self, TextError> {
        for (name, bytes) in &files {
            let Some((_, limit)) = KNOWN_FILES.iter().find(|(known, _)| known == name) else {
                return Err(TextError::UnknownFile { file: name.clone() });
            };
            if bytes.len() as u64 > *limit {
                let bytes = bytes.len() as u64;
                return Err(TextError::FileTooLarge { file: name.clone(), bytes, limit: *limit });
            }
        }
        Ok(Self { files })
    }

    /// Whether there is a file that a tokenizer can be built from. A model without one still takes token ids.
    pub fn has_tokenizer(&self) -> bool {
        self.files.contains_key("tokenizer.json")
            || VOCABULARIES.iter().any(|name| self.files.contains_key(*name))
    }

    /// The bytes of one file.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.files.get(name).map(Vec::as_slice)
    }

    /// Names and bytes, to send them on.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
    }

    /// One file as UTF-8 text.
    pub(crate) fn text(&self, name: &str) -> Result<Option<&str>, TextError> {
        self.get(name)
            .map(|bytes| {
                std::str::from_utf8(bytes).map_err(|error| TextError::InvalidFile {
                    file: name.to_owned(),
                    reason: format!("it is not UTF-8 after byte {}", error.valid_up_to()),
                })
            })
            .transpose()
    }

    /// One file as JSON of a certain shape.
    pub(crate) fn json<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, TextError> {
        self.get(name)
            .map(|bytes| {
                serde_json::from_slice(bytes).map_err(|error| TextError::InvalidFile {
                    file: name.to_owned(),
                    reason: error.to_string(),
                })
            })
            .transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_only_what_it_knows() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        std::fs::write(folder.path().join("weights.bin"), "x").unwrap();
        let files = TextFiles::read(folder.path()).unwrap();
        assert_eq!(files.iter().collect::<Vec<_>>(), [("config.json", b"{}".as_slice())]);
    }

    #[test]
    fn refuses_what_is_too_large_or_unknown() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), vec![b' '; MIB as usize + 1]).unwrap();
        let refused = TextFiles::read(folder.path()).unwrap_err().to_string();
        assert_eq!(refused, "config.json has 1048577 bytes, more than the 1048576 that are accepted");
        for name in ["../config.json", "a/config.json", ""] {
            let files = BTreeMap::from([(name.to_owned(), Vec::new())]);
            assert!(matches!(TextFiles::from_map(files), Err(TextError::UnknownFile { .. })), "{name}");
        }
    }

    #[test]
    fn refuses_what_is_no_file() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("config.json")).unwrap();
        let error = TextFiles::read(folder.path()).unwrap_err();
        assert!(matches!(&error, TextError::Read { path, .. } if path.ends_with("config.json")), "{error}");
    }

    #[test]
    fn says_where_the_json_is_broken() {
        let files = BTreeMap::from([("config.json".to_owned(), b"{\"a\": 1,\n oops}".to_vec())]);
        let error = TextFiles::from_map(files).unwrap().json::<serde_json::Value>("config.json").unwrap_err();
        assert!(error.to_string().starts_with("config.json is not valid:"), "{error}");
        assert!(error.to_string().contains("line 2"), "{error}");
    }
}
