//! What a deployment may be called, and what it is called when nobody says.

use crate::Error;

/// Longest name.
const MAX_NAME_BYTES: usize = 128;
/// Longest source: a path may be long.
const MAX_SOURCE_BYTES: usize = 4096;

/// What a replica of a deployment is called where nodes speak of it: the first one as the deployment, others `NAME#2` and so on. `#` is in no
/// deployment's name.
pub fn replica_name(name: &str, number: usize) -> String {
    match number {
        0 | 1 => name.to_owned(),
        number => format!("{name}#{number}"),
    }
}

/// The deployment's name and the replica's number, of what [`replica_name`] made.
pub fn replica_of(name: &str) -> (&str, usize) {
    match name.rsplit_once('#') {
        Some((base, number)) => (base, number.parse().unwrap_or(1)),
        None => (name, 1),
    }
}

/// Names appear in URLs, logs, tables and JSON: letters, digits and `. _ - / : @ +`, no part between slashes empty or beginning with a dot.
pub fn check_name(name: &str) -> Result<(), Error> {
    let allowed = |character: char| character.is_ascii_alphanumeric() || "._-/:@+".contains(character);
    let is_valid = (1..=MAX_NAME_BYTES).contains(&name.len())
        && name.chars().all(allowed)
        && name.chars().any(|character| character.is_ascii_alphanumeric())
        // In a URL an empty part or one of dots would be another place.
        && name.split('/').all(|part| !part.is_empty() && !part.starts_with('.'));
    if is_valid {
        return Ok(());
    }
    let shown: String = name.chars().take(MAX_NAME_BYTES).collect();
    Err(Error::Invalid(format!(
        "{shown:?} cannot be a deployment's name: use 1 to {MAX_NAME_BYTES} letters, digits and . _ - / : @ + \
         (no part between slashes empty or beginning with a dot)"
    )))
}

/// An adapter's name, which stands behind the deployment's and a colon: as a deployment's, without a colon.
pub fn check_adapter_name(name: &str) -> Result<(), Error> {
    if !name.contains(':') && check_name(name).is_ok() {
        return Ok(());
    }
    let shown: String = name.chars().take(MAX_NAME_BYTES).collect();
    Err(Error::Invalid(format!(
        "{shown:?} cannot be an adapter's name: use 1 to {MAX_NAME_BYTES} letters, digits and . _ - / @ + \
         (no part between slashes empty or beginning with a dot)"
    )))
}

/// As [`default_name`], for an adapter.
pub fn default_adapter_name(source: &str) -> String {
    let name = default_name(source).replace(':', "-");
    if name == "model" { "adapter".to_owned() } else { name }
}

/// A source is a path, an id or "demo": not empty, not endless, no control characters.
pub(super) fn check_source(source: &str) -> Result<(), Error> {
    let is_valid = (1..=MAX_SOURCE_BYTES).contains(&source.len()) && !source.chars().any(char::is_control);
    if is_valid {
        return Ok(());
    }
    Err(Error::Invalid("a model is a folder, a Hugging Face id (OWNER/NAME), or \"demo\"".into()))
}

/// The folder's name, or the Hugging Face id as it is. Characters that names cannot have become `-`.
pub fn default_name(source: &str) -> String {
    let is_id = !source.starts_with(['/', '.', '~'])
        && !source.contains('\\')
        && source.split('/').count() <= 2
        && source.split('/').all(|part| !part.is_empty());
    let base = if is_id {
        source
    } else {
        source.rsplit('/').find(|part| !part.is_empty() && *part != "." && *part != "..").unwrap_or("model")
    };
    let allowed = |character: char| character.is_ascii_alphanumeric() || "._-/:@+".contains(character);
    let name: String =
        base.chars().map(|it| if allowed(it) { it } else { '-' }).take(MAX_NAME_BYTES).collect();
    if check_name(&name).is_ok() { name } else { "model".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_name_is_the_folder_or_the_id() {
        let cases = [
            ("demo", "demo"),
            ("mlx-community/Qwen3-4B-4bit", "mlx-community/Qwen3-4B-4bit"),
            ("/models/Llama 3/", "Llama-3"),
            ("./tiny", "tiny"),
            ("../..", "model"),
            ("a/b/c", "c"),
            ("/", "model"),
        ];
        for (source, name) in cases {
            assert_eq!(default_name(source), name, "{source}");
            assert_eq!(check_name(&default_name(source)), Ok(()));
        }
    }

    #[test]
    fn a_replica_has_a_name_that_no_deployment_can_have() {
        for (number, name) in [(1, "a/b"), (2, "a/b#2"), (17, "a/b#17")] {
            assert_eq!(replica_name("a/b", number), name);
            assert_eq!(replica_of(name), ("a/b", number));
        }
        assert!(check_name("a#2").is_err());
    }

    #[test]
    fn an_adapters_name_has_no_colon() {
        assert_eq!(default_adapter_name("ann/poet"), "ann/poet");
        assert_eq!(default_adapter_name("/adapters/a:b/"), "a-b");
        assert_eq!(default_adapter_name("../.."), "adapter");
        assert_eq!(check_adapter_name("poet-2"), Ok(()));
        for name in ["a:b", "", "..", "a b"] {
            assert!(matches!(check_adapter_name(name), Err(Error::Invalid(_))), "{name:?}");
        }
    }

    #[test]
    fn names_that_would_break_a_url_or_a_table_are_refused() {
        for name in ["", "a b", "/a", "a/", "a\nb", "ä", "..", &"x".repeat(129)] {
            assert!(matches!(check_name(name), Err(Error::Invalid(_))), "{name:?}");
        }
        assert!(check_source("").is_err());
        assert!(check_source("a\0b").is_err());
        assert!(check_source("/a path/with spaces").is_ok());
    }
}
