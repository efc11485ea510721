//! Who may use the cluster over HTTP: its API keys.
//!
//! [`Keys`] is a plain struct: wishes in, [`Record`]s out; the coordinator makes a record durable and then applies it. The text of a key
//! exists once, in the answer to whoever made it; what is kept and what goes to the other nodes is its hash. A person's key has
//! 256 random bits, so that a plain hash is enough: there is nothing to guess, and no salt to slow a guess down with.

mod text;

pub use text::{KeyHash, KeyText};

use crate::Error;
use crate::deployments::check_name;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Most keys at a time. Every presented key is compared with all of them.
pub const MAX_KEYS: usize = 1000;
/// Most models that a key can be held to.
pub const MAX_MODELS: usize = 64;
/// Longest name.
const MAX_NAME_BYTES: usize = 64;
/// Largest limits: beyond these a limit limits nothing.
const MAX_REQUESTS_PER_MINUTE: u32 = 1_000_000;
const MAX_TOKENS_PER_MINUTE: u32 = 1_000_000_000;

/// What a key is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyRole {
    /// Ask models.
    #[default]
    User,
    /// The same, and fine-tune models that are loaded: with files and jobs of its own.
    Trainer,
    /// All that there is: also load and unload models, keys, jobs.
    Admin,
    /// Read `/metrics` and nothing else: for the monitoring.
    Metrics,
}

impl KeyRole {
    /// As people write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Trainer => "trainer",
            Self::Admin => "admin",
            Self::Metrics => "metrics",
        }
    }
}

/// How much a key may ask. Each node counts by itself what is asked of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyLimits {
    /// Requests within any minute. None: as many as the cluster takes.
    pub requests_per_minute: Option<u32>,
    /// Tokens within any minute, of prompts and answers together. None: as many as the cluster makes.
    pub tokens_per_minute: Option<u32>,
}

/// A key that somebody wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyWish {
    /// Whose or what for; unique in the cluster.
    pub name: String,
    /// What it may do.
    pub role: KeyRole,
    /// Names of the deployments that it may ask; empty: all.
    pub models: Vec<String>,
    /// How much it may ask.
    pub limits: KeyLimits,
}

/// A key as the cluster knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyEntry {
    /// Whose or what for; unique in the cluster.
    pub name: String,
    /// Of its text.
    pub hash: KeyHash,
    /// What it may do.
    pub role: KeyRole,
    /// Names of the deployments that it may ask; empty: all.
    #[serde(default)]
    pub models: Vec<String>,
    /// How much it may ask.
    #[serde(flatten)]
    pub limits: KeyLimits,
    /// When it was made, in seconds since 1970.
    pub created_unix: u64,
}

impl KeyEntry {
    /// May it ask this deployment? An adapter of a deployment (`base:adapter`) is the deployment's.
    pub fn may_ask(&self, model: &str) -> bool {
        let is_meant = |allowed: &String| {
            model == allowed || model.strip_prefix(allowed.as_str()).is_some_and(|rest| rest.starts_with(':'))
        };
        self.models.is_empty() || self.models.iter().any(is_meant)
    }

    /// Who asks with this key, as schedulers and prompt caches tell clients apart. Not the name: a later key of the same name must not
    /// find out what this one asked.
    pub fn tenant(&self) -> String {
        format!("key-{}", self.hash.id())
    }
}

/// The key that this text is, if it is one of `keys`. Takes the same time wherever in the list it stands, and however much of a
/// hash is right.
pub fn find<'a>(keys: &'a [KeyEntry], presented: &str) -> Option<&'a KeyEntry> {
    let hash = KeyHash::of_text(presented)?;
    keys.iter().fold(None, |found, key| if key.hash.is(&hash) { Some(key) } else { found })
}

/// A durable decision. Replayed in order; the last one about a name counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// Valid from now on.
    Created {
        /// The key.
        key: KeyEntry,
    },
    /// Not valid any more.
    Revoked {
        /// Which.
        name: String,
    },
}

/// All keys of the cluster.
#[derive(Debug, Default)]
pub struct Keys {
    by_name: BTreeMap<String, KeyEntry>,
}

impl Keys {
    /// The keys that the records leave valid.
    pub fn restore(records: impl IntoIterator<Item = Record>) -> Self {
        let mut keys = Self::default();
        for record in records {
            keys.apply(record);
        }
        keys
    }

    /// Records that say the same as all those applied so far, for a snapshot.
    pub fn records(&self) -> Vec<Record> {
        self.by_name.values().map(|key| Record::Created { key: key.clone() }).collect()
    }

    /// All of them, by name.
    pub fn list(&self) -> Vec<KeyEntry> {
        self.by_name.values().cloned().collect()
    }

    /// A key for this wish, from 32 random bytes. Valid once a record of it is applied.
    ///
    /// # Errors
    /// When the wish makes no sense, the name is taken, or there are too many keys.
    pub fn create(
        &self,
        wish: KeyWish,
        random: &[u8; 32],
        created_unix: u64,
    ) -> Result<(KeyText, KeyEntry), Error> {
        check(&wish)?;
        if self.by_name.contains_key(&wish.name) {
            return Err(Error::Refused(format!(
                "there is a key named {:?} already; revoke it first (`mlxnode keys revoke {0}`), or give this one another name",
                wish.name
            )));
        }
        if self.by_name.len() >= MAX_KEYS {
            return Err(Error::TooMany(format!(
                "the cluster has {MAX_KEYS} keys, which is the most; revoke one that nobody uses"
            )));
        }
        let text = KeyText::new(random);
        let KeyWish { name, role, models, limits } = wish;
        let key = KeyEntry { name, hash: text.hash(), role, models, limits, created_unix };
        Ok((text, key))
    }

    /// The end of a key. It is valid until the record is applied.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn revoke(&self, name: &str) -> Result<Record, Error> {
        match self.by_name.contains_key(name) {
            true => Ok(Record::Revoked { name: name.to_owned() }),
            false => {
                let shown: String = name.chars().take(MAX_NAME_BYTES).collect();
                Err(Error::NotFound(format!(
                    "there is no key named {shown:?}; `mlxnode keys list` shows all"
                )))
            }
        }
    }

    /// Makes a durable record count.
    pub fn apply(&mut self, record: Record) {
        match record {
            Record::Created { key } => {
                self.by_name.insert(key.name.clone(), key);
            }
            Record::Revoked { name } => {
                self.by_name.remove(&name);
            }
        }
    }
}

fn check(wish: &KeyWish) -> Result<(), Error> {
    let allowed = |character: char| character.is_ascii_alphanumeric() || "._-@".contains(character);
    let is_name = (1..=MAX_NAME_BYTES).contains(&wish.name.len())
        && wish.name.chars().all(allowed)
        && wish.name.starts_with(|character: char| character.is_ascii_alphanumeric());
    if !is_name {
        let shown: String = wish.name.chars().take(MAX_NAME_BYTES).collect();
        return Err(Error::Invalid(format!(
            "{shown:?} cannot be a key's name: use 1 to {MAX_NAME_BYTES} letters, digits and . _ - @, beginning with a \
             letter or a digit"
        )));
    }
    if wish.models.len() > MAX_MODELS {
        return Err(Error::Invalid(format!(
            "a key can be held to at most {MAX_MODELS} models, but {} are named; name none to allow all",
            wish.models.len()
        )));
    }
    for model in &wish.models {
        check_name(model)?;
    }
    let limits = [
        ("requests_per_minute", wish.limits.requests_per_minute, MAX_REQUESTS_PER_MINUTE),
        ("tokens_per_minute", wish.limits.tokens_per_minute, MAX_TOKENS_PER_MINUTE),
    ];
    for (name, value, most) in limits {
        if value.is_some_and(|value| value == 0 || value > most) {
            return Err(Error::Invalid(format!("{name} must be 1 to {most}, or left away for no limit")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(name: &str) -> KeyWish {
        KeyWish { name: name.into(), ..KeyWish::default() }
    }

    fn add(keys: &mut Keys, name: &str, byte: u8) -> KeyText {
        let (text, key) = keys.create(wish(name), &[byte; 32], 7).unwrap();
        assert!(find(&keys.list(), text.reveal()).is_none(), "not before it is durable");
        keys.apply(Record::Created { key });
        text
    }

    #[test]
    fn a_key_is_found_by_its_text_until_it_is_revoked() {
        let mut keys = Keys::default();
        let ann = add(&mut keys, "ann", 1);
        let bob = add(&mut keys, "bob", 2);
        assert_eq!(find(&keys.list(), ann.reveal()).map(|key| key.name.clone()), Some("ann".into()));
        assert_eq!(find(&keys.list(), bob.reveal()).map(|key| key.name.clone()), Some("bob".into()));
        let record = keys.revoke("ann").unwrap();
        assert!(find(&keys.list(), ann.reveal()).is_some(), "valid until the record is durable");
        keys.apply(record);
        assert!(find(&keys.list(), ann.reveal()).is_none());
        assert!(find(&keys.list(), bob.reveal()).is_some());
        assert!(matches!(keys.revoke("ann"), Err(Error::NotFound(_))));
    }

    #[test]
    fn a_text_that_is_nearly_a_key_is_none() {
        let mut keys = Keys::default();
        let text = add(&mut keys, "ann", 9).reveal().to_owned();
        let mut other_letter = text.clone();
        other_letter.replace_range(10..11, if &text[10..11] == "a" { "b" } else { "a" });
        let cases =
            ["", "mlx-", &text[..46], &format!("{text}a"), &text.to_uppercase(), &other_letter, &text[4..]];
        for presented in cases {
            assert!(find(&keys.list(), presented).is_none(), "{presented:?}");
        }
    }

    #[test]
    fn records_say_the_same_after_a_fold_and_hold_no_text() {
        let mut keys = Keys::default();
        let ann = add(&mut keys, "ann", 1);
        add(&mut keys, "bob", 2);
        keys.apply(keys.revoke("bob").unwrap());
        let written = serde_json::to_string(&keys.records()).unwrap();
        assert!(!written.contains(&ann.reveal()[4..]), "{written}");
        let read: Vec<Record> = serde_json::from_str(&written).unwrap();
        assert_eq!(Keys::restore(read).list(), keys.list());
    }

    #[test]
    fn wishes_that_make_no_sense_are_refused_by_name() {
        let mut keys = Keys::default();
        add(&mut keys, "taken", 1);
        let models = |models: &[&str]| KeyWish {
            models: models.iter().map(|model| (*model).to_owned()).collect(),
            ..wish("a")
        };
        let limits = |requests, tokens| KeyWish {
            limits: KeyLimits { requests_per_minute: requests, tokens_per_minute: tokens },
            ..wish("a")
        };
        let cases = [
            (wish(""), "name"),
            (wish("two words"), "name"),
            (wish("-a"), "name"),
            (wish(&"a".repeat(65)), "name"),
            (wish("taken"), "taken"),
            (models(&["../x"]), "../x"),
            (models(&vec!["m"; 65]), "64"),
            (limits(Some(0), None), "requests_per_minute"),
            (limits(None, Some(2_000_000_000)), "tokens_per_minute"),
        ];
        for (wish, word) in cases {
            let error = keys.create(wish, &[0; 32], 0).unwrap_err().to_string();
            assert!(error.contains(word), "{word}: {error}");
        }
    }

    #[test]
    fn there_are_only_so_many_keys() {
        let mut keys = Keys::default();
        for number in 0..MAX_KEYS {
            let mut random = [0; 32];
            random[..8].copy_from_slice(&number.to_le_bytes());
            let (_, key) = keys.create(wish(&format!("key{number}")), &random, 0).unwrap();
            keys.apply(Record::Created { key });
        }
        assert!(matches!(keys.create(wish("more"), &[3; 32], 0), Err(Error::TooMany(_))));
    }

    #[test]
    fn a_key_may_be_held_to_some_models_and_their_adapters() {
        let keys = Keys::default();
        let (_, key) =
            keys.create(KeyWish { models: vec!["small".into()], ..wish("a") }, &[1; 32], 0).unwrap();
        for (model, may) in
            [("small", true), ("small:poet", true), ("smaller", false), ("large", false), ("", false)]
        {
            assert_eq!(key.may_ask(model), may, "{model}");
        }
    }

    #[test]
    fn a_new_key_of_an_old_name_is_somebody_else() {
        let mut keys = Keys::default();
        add(&mut keys, "ann", 1);
        let first = keys.list()[0].tenant();
        keys.apply(keys.revoke("ann").unwrap());
        add(&mut keys, "ann", 2);
        assert_ne!(keys.list()[0].tenant(), first);
    }
}
