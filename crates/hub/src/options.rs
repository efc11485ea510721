//! What the hub needs to know, and how Hugging Face's environment variables say it.

use std::fmt;
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// Settings of a [`Hub`](crate::Hub).
#[derive(Clone, Debug)]
pub struct Options {
    /// The hub's cache, shared with Python's huggingface_hub (`~/.cache/huggingface/hub`).
    pub cache: PathBuf,
    /// Where the hub is, without a slash at the end (`https://huggingface.co`).
    pub endpoint: String,
    /// Access token for private and gated models.
    pub token: Option<Secret>,
    /// Use what the cache has and touch no network.
    pub offline: bool,
}

/// A string that is not shown and is wiped when dropped.
#[derive(Clone)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Takes a secret.
    pub fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    /// The text itself.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Secret(…)")
    }
}

impl Options {
    /// Reads the settings from environment variables by way of `lookup`, as huggingface_hub does:
    ///
    /// - cache: `HF_HUB_CACHE`, else `$HF_HOME/hub`; `HF_HOME` is `$XDG_CACHE_HOME/huggingface`, or else
    ///   `~/.cache/huggingface`
    /// - endpoint: `HF_ENDPOINT`, else `https://huggingface.co`
    /// - token: `HF_TOKEN`, else the file `HF_TOKEN_PATH`, else the file `$HF_HOME/token`
    /// - offline: `HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE` is 1, on, yes or true
    ///
    /// Empty variables count as absent.
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Self {
        let get =
            |name: &str| lookup(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        let user = get("HOME")
            .map(PathBuf::from)
            .or_else(|| directories::BaseDirs::new().map(|directories| directories.home_dir().to_path_buf()));
        let path = |name: &str| get(name).map(|value| expand(&value, user.as_deref()));
        let home = path("HF_HOME").unwrap_or_else(|| {
            let caches = path("XDG_CACHE_HOME")
                .unwrap_or_else(|| user.clone().unwrap_or_else(std::env::temp_dir).join(".cache"));
            caches.join("huggingface")
        });
        let cache = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .unwrap_or_else(|| home.join("hub"));
        let endpoint = get("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let token = get("HF_TOKEN")
            .or_else(|| get("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| read_token(&path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"))));
        let on = |name: &str| {
            get(name).is_some_and(|value| {
                ["1", "on", "yes", "true"].iter().any(|yes| value.eq_ignore_ascii_case(yes))
            })
        };
        Self {
            cache,
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token.map(Secret::new),
            offline: on("HF_HUB_OFFLINE") || on("TRANSFORMERS_OFFLINE"),
        }
    }
}

/// `~/x` is in the user's home.
fn expand(path: &str, home: Option<&Path>) -> PathBuf {
    match (path.strip_prefix("~/"), home) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => PathBuf::from(path),
    }
}

/// The token that `hf auth login` stored. A file that is not one is no token.
fn read_token(path: &Path) -> Option<String> {
    const MAX_TOKEN_BYTES: u64 = 4096;
    let metadata = path.metadata().ok()?;
    if !metadata.is_file() || metadata.len() > MAX_TOKEN_BYTES {
        return None;
    }
    let text = Zeroizing::new(std::fs::read_to_string(path).ok()?);
    let token = text.trim();
    (!token.is_empty()).then(|| token.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(variables: &[(&str, &str)]) -> Options {
        Options::from_lookup(|name| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_cache_is_where_huggingface_hub_has_it() {
        let cases: [(&[(&str, &str)], &str); 6] = [
            (&[("HOME", "/u")], "/u/.cache/huggingface/hub"),
            (&[("HOME", "/u"), ("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (&[("HOME", "/u"), ("HF_HOME", "/h")], "/h/hub"),
            (&[("HOME", "/u"), ("HF_HOME", "~/models")], "/u/models/hub"),
            (&[("HOME", "/u"), ("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")], "/c"),
            (&[("HOME", "/u"), ("HF_HOME", " ")], "/u/.cache/huggingface/hub"),
        ];
        for (variables, expected) in cases {
            assert_eq!(options(variables).cache, Path::new(expected), "{variables:?}");
        }
    }

    #[test]
    fn endpoint_and_offline_follow_the_variables() {
        let plain = options(&[("HOME", "/nowhere")]);
        assert_eq!((plain.endpoint.as_str(), plain.offline), ("https://huggingface.co", false));
        assert!(plain.token.is_none());
        let other = options(&[("HF_ENDPOINT", "http://mirror:8080/"), ("HF_HUB_OFFLINE", "True")]);
        assert_eq!((other.endpoint.as_str(), other.offline), ("http://mirror:8080", true));
        assert!(!options(&[("HF_HUB_OFFLINE", "0")]).offline);
    }

    #[test]
    fn the_token_comes_from_the_variable_or_the_file_and_is_never_shown() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "hf_file\n").unwrap();
        let home = home.path().to_str().unwrap();
        let from_file = options(&[("HF_HOME", home)]);
        assert_eq!(from_file.token.as_ref().unwrap().expose(), "hf_file");
        let from_variable = options(&[("HF_HOME", home), ("HF_TOKEN", "hf_variable")]);
        assert_eq!(from_variable.token.as_ref().unwrap().expose(), "hf_variable");
        assert!(!format!("{from_variable:?} {from_file:?}").contains("hf_"));
    }
}
