//! Which files of a folder are for what: mlx-lm's `train.jsonl`, `valid.jsonl`, `test.jsonl`, or what a data set of the hub says.
//!
//! A data set of the hub says it in the head of its README (`configs`, each with `data_files`), or by the names of files and folders
//! (`data/train-00000-of-00002.parquet`). Splits have one name here: train, valid (also validation, val, dev), test.

use super::DataError;
use super::records::{Kind, unreadable};
use crate::config::Settings;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A data set of the hub has some hundred files; what has more is no data set.
const MAX_FILES: usize = 50_000;
const MAX_DEPTH: usize = 6;
const MAX_README_BYTES: u64 = 4 << 20;

/// A folder (or a file) of data.
#[derive(Clone, Debug)]
pub struct DataFolder {
    path: PathBuf,
    splits: BTreeMap<String, Vec<PathBuf>>,
}

impl DataFolder {
    /// Looks which splits it has. A file is the split train. `subset` names a configuration of a data set that has several.
    ///
    /// # Errors
    /// [`DataError`] when there is nothing, or nothing that is data.
    pub fn open(path: &Path, subset: Option<&str>) -> Result<Self, DataError> {
        let metadata = path.metadata().map_err(unreadable(path))?;
        if metadata.is_file() {
            Kind::of(path).ok_or_else(|| DataError::Kind { path: path.into() })?;
            let splits = BTreeMap::from([("train".to_owned(), vec![path.to_owned()])]);
            return Ok(Self { path: path.into(), splits });
        }
        let mut splits = BTreeMap::new();
        for name in ["train", "valid", "test"] {
            let file = PathBuf::from(format!("{name}.jsonl"));
            if subset.is_none() && path.join(&file).is_file() {
                splits.insert(name.to_owned(), vec![file]);
            }
        }
        if splits.is_empty() {
            let mut files = Vec::new();
            collect(path, path, 0, &mut files)?;
            files.sort();
            splits = match described(path, subset, &files)? {
                Some(splits) => splits,
                None => by_name(&files, subset),
            };
        }
        for files in splits.values_mut() {
            *files = files.iter().map(|file| path.join(file)).collect();
        }
        splits.retain(|_, files| !files.is_empty());
        if splits.is_empty() {
            return Err(DataError::NoData { path: path.into() });
        }
        Ok(Self { path: path.into(), splits })
    }

    /// The files of a split, in order; None when there is no such split.
    pub fn files(&self, name: &str) -> Option<&[PathBuf]> {
        let files = self.splits.get(name).or_else(|| self.splits.get(canonical(name)?));
        files.map(Vec::as_slice)
    }

    /// The files of a split that has to be there.
    pub(super) fn needed(&self, name: &str) -> Result<&[PathBuf], DataError> {
        self.files(name).ok_or_else(|| DataError::NoSplit {
            path: self.path.clone(),
            name: name.to_owned(),
            known: self.splits.keys().cloned().collect(),
        })
    }
}

/// Our name for a split, if the word is one.
fn canonical(word: &str) -> Option<&'static str> {
    match word.to_ascii_lowercase().as_str() {
        "train" | "training" => Some("train"),
        "valid" | "validation" | "val" | "dev" => Some("valid"),
        "test" | "testing" | "eval" | "evaluation" => Some("test"),
        _ => None,
    }
}

/// All data files below a folder, as paths within the root.
fn collect(root: &Path, folder: &Path, depth: usize, files: &mut Vec<PathBuf>) -> Result<(), DataError> {
    for entry in folder.read_dir().map_err(unreadable(folder))? {
        let entry = entry.map_err(unreadable(folder))?;
        let path = entry.path();
        let is_hidden = entry.file_name().to_string_lossy().starts_with('.');
        if is_hidden || files.len() >= MAX_FILES {
            continue;
        }
        if path.is_dir() {
            if depth < MAX_DEPTH {
                collect(root, &path, depth + 1, files)?;
            }
        } else if Kind::of(&path).is_some()
            && let Ok(within) = path.strip_prefix(root)
        {
            files.push(within.to_owned());
        }
    }
    Ok(())
}

/// Splits by the words in paths; everything is for training when no word says otherwise. A subset is a folder.
fn by_name(files: &[PathBuf], subset: Option<&str>) -> BTreeMap<String, Vec<PathBuf>> {
    let within = |file: &&PathBuf| {
        subset.is_none_or(|subset| file.components().any(|part| part.as_os_str() == subset))
    };
    let files: Vec<&PathBuf> = files.iter().filter(within).collect();
    let mut splits: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for file in &files {
        let text = file.to_string_lossy();
        // The last word that is one: the file's own name says more than its folder's.
        let words = text.split(|letter: char| !letter.is_ascii_alphanumeric());
        if let Some(split) = words.filter_map(canonical).next_back() {
            splits.entry(split.to_owned()).or_default().push((*file).clone());
        }
    }
    if splits.is_empty() && !files.is_empty() {
        splits.insert("train".to_owned(), files.into_iter().cloned().collect());
    }
    splits
}

/// The splits that the head of README.md describes; None when it describes none.
fn described(
    path: &Path,
    subset: Option<&str>,
    files: &[PathBuf],
) -> Result<Option<BTreeMap<String, Vec<PathBuf>>>, DataError> {
    let Some(configs) = configs(&path.join("README.md")) else { return Ok(None) };
    let name_of = |config: &Map<String, Value>| {
        config.get("config_name").and_then(Value::as_str).unwrap_or("default").to_owned()
    };
    let is_default = |config: &&Map<String, Value>| {
        name_of(config) == "default" || config.get("default").and_then(Value::as_bool) == Some(true)
    };
    let chosen = match subset {
        Some(subset) => configs.iter().find(|config| name_of(config) == subset),
        None if configs.len() == 1 => configs.first(),
        None => configs.iter().find(is_default),
    };
    let Some(chosen) = chosen else {
        let known = configs.iter().map(name_of).collect();
        return Err(DataError::Subset { path: path.into(), name: subset.map(str::to_owned), known });
    };
    let matching = |patterns: &Value| -> Vec<PathBuf> {
        let patterns = match patterns {
            Value::Array(list) => list.iter().filter_map(Value::as_str).collect(),
            Value::String(text) => vec![text.as_str()],
            _ => Vec::new(),
        };
        let fits = |file: &&PathBuf| {
            let file = file.to_string_lossy();
            patterns.iter().any(|pattern| fits(pattern.trim_start_matches("./").as_bytes(), file.as_bytes()))
        };
        files.iter().filter(fits).cloned().collect()
    };
    let mut splits: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    match chosen.get("data_files") {
        Some(Value::Array(list)) if list.iter().all(Value::is_object) => {
            for entry in list {
                let split = entry.get("split").and_then(Value::as_str).unwrap_or("train");
                let split = canonical(split).unwrap_or(split).to_owned();
                splits.entry(split).or_default().extend(entry.get("path").map(matching).unwrap_or_default());
            }
        }
        Some(patterns) => drop(splits.insert("train".to_owned(), matching(patterns))),
        None => {
            let folder = chosen.get("data_dir").and_then(Value::as_str).unwrap_or("");
            let inside: Vec<PathBuf> =
                files.iter().filter(|file| file.starts_with(folder)).cloned().collect();
            splits = by_name(&inside, None);
        }
    }
    Ok(Some(splits))
}

/// `configs` of the YAML between the first lines of dashes. What cannot be read describes nothing: it is written for others, too.
fn configs(readme: &Path) -> Option<Vec<Map<String, Value>>> {
    if readme.metadata().ok()?.len() > MAX_README_BYTES {
        return None;
    }
    let text = std::fs::read_to_string(readme).ok()?;
    let (head, _) = text.strip_prefix("---")?.split_once("\n---")?;
    let settings = Settings::from_yaml(head, "README.md").ok()?;
    let list = settings.get("configs")?.as_array()?;
    let configs: Vec<_> = list.iter().filter_map(Value::as_object).cloned().collect();
    (!configs.is_empty()).then_some(configs)
}

/// Does a path fit a pattern in which `*` stands for anything but a slash and `**` for anything?
fn fits(pattern: &[u8], path: &[u8]) -> bool {
    // Where each star may end, step by step: time is the product of both lengths, whatever the pattern.
    let mut reached = vec![false; path.len() + 1];
    reached[0] = true;
    let mut index = 0;
    while index < pattern.len() {
        let mut next = vec![false; path.len() + 1];
        if pattern[index] == b'*' {
            let is_double = pattern.get(index + 1) == Some(&b'*');
            let mut open = false;
            for place in 0..=path.len() {
                if place > 0 && path[place - 1] == b'/' && !is_double {
                    open = false;
                }
                open |= reached[place];
                next[place] = open;
            }
            index += if is_double { 2 } else { 1 };
        } else {
            for place in 0..path.len() {
                next[place + 1] = reached[place] && path[place] == pattern[index];
            }
            index += 1;
        }
        reached = next;
    }
    reached[path.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        folder
    }

    fn splits(files: &[(&str, &str)], subset: Option<&str>) -> Vec<(String, Vec<String>)> {
        let folder = folder(files);
        let data = DataFolder::open(folder.path(), subset).unwrap();
        let shown = |file: &PathBuf| file.strip_prefix(folder.path()).unwrap().to_string_lossy().into_owned();
        data.splits.iter().map(|(name, files)| (name.clone(), files.iter().map(shown).collect())).collect()
    }

    #[test]
    fn splits_are_found_by_name_or_description() {
        let of = |list: &[(&str, &[&str])]| -> Vec<(String, Vec<String>)> {
            list.iter()
                .map(|(name, files)| {
                    ((*name).to_owned(), files.iter().map(|file| (*file).to_owned()).collect())
                })
                .collect()
        };
        let plain = [("train.jsonl", ""), ("valid.jsonl", ""), ("other.jsonl", "")];
        assert_eq!(splits(&plain, None), of(&[("train", &["train.jsonl"]), ("valid", &["valid.jsonl"])]));
        let hub = [
            ("data/train-00001-of-00002.parquet", ""),
            ("data/train-00000-of-00002.parquet", ""),
            ("data/validation-00000-of-00001.parquet", ""),
            (".cache/train.parquet", ""),
            ("README.md", "no head"),
        ];
        let train = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"];
        let expected = of(&[("train", &train), ("valid", &["data/validation-00000-of-00001.parquet"])]);
        assert_eq!(splits(&hub, None), expected);
        assert_eq!(
            splits(&[("a.jsonl", ""), ("b.json", "")], None),
            of(&[("train", &["a.jsonl", "b.json"])])
        );
        let head = "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: one/*.parquet\n\
                    \x20 - split: dev\n    path: [one/x/*]\n- config_name: two\n  data_files: 'two/**'\n---\n# Text\n";
        let described = [
            ("README.md", head),
            ("one/a.parquet", ""),
            ("one/x/b.parquet", ""),
            ("two/y/c.jsonl", ""),
            ("train.parquet", ""),
        ];
        assert_eq!(
            splits(&described, None),
            of(&[("train", &["one/a.parquet"]), ("valid", &["one/x/b.parquet"])])
        );
        assert_eq!(splits(&described, Some("two")), of(&[("train", &["two/y/c.jsonl"])]));
        let folder = folder(&described);
        let error = DataFolder::open(folder.path(), Some("three")).unwrap_err().to_string();
        assert!(
            error.ends_with("has several configurations (default, two); none is named \"three\""),
            "{error}"
        );
    }

    #[test]
    fn what_is_not_there_is_said() {
        let empty = folder(&[("README.txt", "")]);
        let error = DataFolder::open(empty.path(), None).unwrap_err().to_string();
        assert!(error.ends_with("holds no data: no .jsonl or .parquet file"), "{error}");
        let error = DataFolder::open(&empty.path().join("x"), None).unwrap_err().to_string();
        assert!(error.starts_with("there is no file or folder "), "{error}");
        let error = DataFolder::open(&empty.path().join("README.txt"), None).unwrap_err().to_string();
        assert!(error.contains("is no data that can be read"), "{error}");
    }

    #[test]
    fn stars_stay_within_a_folder() {
        for (pattern, path, expected) in [
            ("data/train-*", "data/train-0.parquet", true),
            ("data/*", "data/x/y", false),
            ("**", "data/x/y", true),
            ("data/**/y", "data/x/z/y", true),
            ("*.jsonl", "a.jsonl", true),
            ("*.jsonl", "d/a.jsonl", false),
            ("a", "ab", false),
            ("", "", true),
        ] {
            assert_eq!(fits(pattern.as_bytes(), path.as_bytes()), expected, "{pattern} {path}");
        }
    }
}
