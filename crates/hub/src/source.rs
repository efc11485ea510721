//! What people call a model: the demo, a folder, or a Hugging Face id.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Where a model comes from. Displays as the text that parses to it again.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ModelSource {
    /// The model inside this program: "demo".
    Demo,
    /// A folder of this machine, as an absolute path.
    Folder(PathBuf),
    /// A repository of the hub: "OWNER/NAME" or "OWNER/NAME@REVISION".
    Hub(HubId),
}

/// A repository of the hub.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HubId {
    owner: String,
    name: String,
    revision: Option<String>,
    /// Data, not a model: both may have the same name.
    is_dataset: bool,
}

/// A text that names no model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// Nothing at all.
    #[error("no model is named; give a folder, a Hugging Face id OWNER/NAME, or demo")]
    Empty,
    /// A path to nothing.
    #[error("there is no folder {0}")]
    NoFolder(String),
    /// A path to a file.
    #[error("{0} is a file; give the folder of the model")]
    NotAFolder(String),
    /// Neither path nor id.
    #[error("{0:?} is neither a folder here nor a Hugging Face id like OWNER/NAME or OWNER/NAME@REVISION")]
    Unknown(String),
}

/// Longest part of an id; Hugging Face's limit.
const MAX_PART: usize = 96;
const MAX_REVISION: usize = 128;

impl ModelSource {
    /// Reads "demo", the path of an existing folder, or "`OWNER/NAME[@REVISION]`", in this order. A folder called demo is "./demo".
    pub fn parse(text: &str) -> Result<Self, SourceError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(SourceError::Empty);
        }
        if text == "demo" {
            return Ok(Self::Demo);
        }
        let path = Path::new(text);
        if path.is_dir() {
            // Absolute, so that it means the same to a node with another working directory. Links are kept as they are.
            let absolute = std::path::absolute(path).map_err(|_| SourceError::NoFolder(shown(text)))?;
            return Ok(Self::Folder(absolute));
        }
        if path.is_file() {
            return Err(SourceError::NotAFolder(shown(text)));
        }
        if text.starts_with(['/', '.', '~']) {
            return Err(SourceError::NoFolder(shown(text)));
        }
        HubId::parse(text).map(Self::Hub).ok_or_else(|| SourceError::Unknown(shown(text)))
    }
}

impl HubId {
    /// An id of checked parts; None when one of them is not what the hub allows.
    pub fn new(owner: &str, name: &str, revision: Option<&str>) -> Option<Self> {
        let valid = is_part(owner) && is_part(name) && revision.is_none_or(is_revision);
        valid.then(|| Self {
            owner: owner.into(),
            name: name.into(),
            revision: revision.filter(|revision| *revision != MAIN).map(Into::into),
            is_dataset: false,
        })
    }

    /// A data set by its name, "`OWNER/NAME[@REVISION]`"; None when it is not one. A revision beside the name wins.
    pub fn dataset(text: &str, revision: Option<&str>) -> Option<Self> {
        let named = Self::parse(text.trim())?;
        let revision = revision.or(named.revision.as_deref());
        let id = Self::new(&named.owner, &named.name, revision)?;
        Some(Self { is_dataset: true, ..id })
    }

    pub(crate) fn is_dataset(&self) -> bool {
        self.is_dataset
    }

    /// Where the hub has its pages and files, below the endpoint: "OWNER/NAME", "datasets/OWNER/NAME".
    pub(crate) fn path(&self) -> String {
        let kind = if self.is_dataset { DATASETS } else { "" };
        format!("{kind}{}/{}", self.owner, self.name)
    }

    fn parse(text: &str) -> Option<Self> {
        let (id, revision) = match text.split_once('@') {
            Some((id, revision)) => (id, Some(revision)),
            None => (text, None),
        };
        let (owner, name) = id.split_once('/')?;
        Self::new(owner, name, revision)
    }

    /// "OWNER/NAME".
    pub fn repository(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }

    /// The branch, tag or commit; "main" when none was named.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or(MAIN)
    }
}

const MAIN: &str = "main";
/// In front of the names of data sets, where models have nothing.
pub(crate) const DATASETS: &str = "datasets/";

/// Letters, digits, dot, dash, underscore; no dot in front. No "--" and "..", as on the hub, whose cache folders use "--" for "/".
fn is_part(part: &str) -> bool {
    (1..=MAX_PART).contains(&part.len())
        && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        && !part.starts_with('.')
        && !part.contains("--")
        && !part.contains("..")
}

/// Like parts, with slashes between ("refs/pr/1").
fn is_revision(revision: &str) -> bool {
    revision.len() <= MAX_REVISION && revision.split('/').all(is_part)
}

fn shown(text: &str) -> String {
    text.chars().take(200).collect()
}

impl fmt::Display for ModelSource {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Demo => out.write_str("demo"),
            Self::Folder(path) => path.display().fmt(out),
            Self::Hub(id) => id.fmt(out),
        }
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.path())?;
        match &self.revision {
            Some(revision) => write!(out, "@{revision}"),
            None => Ok(()),
        }
    }
}

impl FromStr for ModelSource {
    type Err = SourceError;

    fn from_str(text: &str) -> Result<Self, SourceError> {
        Self::parse(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_parse_and_display_as_themselves() {
        for text in ["demo", "a/b", "mlx-community/Qwen3-0.6B-4bit", "o_o/x.y@v1.0", "o/n@refs/pr/1"] {
            assert_eq!(ModelSource::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(ModelSource::parse(" o/n@main ").unwrap().to_string(), "o/n");
    }

    #[test]
    fn data_sets_have_names_of_their_own() {
        let id = HubId::dataset(" o/n@v1 ", None).unwrap();
        assert_eq!((id.to_string().as_str(), id.revision()), ("datasets/o/n@v1", "v1"));
        assert_eq!(HubId::dataset("o/n@v1", Some("v2")).unwrap().revision(), "v2");
        assert_ne!(HubId::dataset("o/n", None), HubId::new("o", "n", None));
        for text in ["n", "a/b/c", "../x", "a/b@"] {
            assert_eq!(HubId::dataset(text, None), None, "{text}");
        }
        assert_eq!(HubId::dataset("a/b", Some("x/../y")), None);
    }

    #[test]
    fn folders_become_absolute() {
        let folder = tempfile::tempdir().unwrap();
        let text = folder.path().to_str().unwrap();
        let source = ModelSource::parse(text).unwrap();
        assert_eq!(source, ModelSource::Folder(folder.path().into()));
        assert_eq!(ModelSource::parse(&source.to_string()).unwrap(), source);
        let here = ModelSource::parse(".").unwrap();
        assert!(matches!(&here, ModelSource::Folder(path) if path.is_absolute()));
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = ModelSource::parse(file.to_str().unwrap()).unwrap_err();
        assert!(matches!(error, SourceError::NotAFolder(_)));
    }

    #[test]
    fn what_names_no_model_is_refused() {
        let long = format!("o/{}", "n".repeat(97));
        let unknown = [
            "name",
            "a/b/c",
            "a/",
            "/b@",
            "a/..",
            "a/b..c",
            "a/.b",
            "a/b--c",
            "a b/c",
            "a/b@",
            "a/b@x/../y",
            "a/b@.x",
            "a/b?x=1",
            "a/b#c",
            "a/ü",
            "a\\b/c",
            &long,
        ];
        for text in unknown {
            let error = ModelSource::parse(text).expect_err(text);
            assert!(matches!(error, SourceError::Unknown(_) | SourceError::NoFolder(_)), "{text}: {error}");
        }
        for text in ["/nowhere/at/all", "./nowhere", "~/nowhere", "../nowhere/x"] {
            assert_eq!(ModelSource::parse(text), Err(SourceError::NoFolder(text.into())));
        }
        assert_eq!(ModelSource::parse("  "), Err(SourceError::Empty));
    }
}
