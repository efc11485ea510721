//! What a node says about itself.

use serde::{Deserialize, Serialize};

/// A node's own account: shown to people and used for placement. Nothing here is a matter of trust.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFacts {
    /// What it wants to be called. The roster may add a suffix.
    pub name: String,
    /// Where its listener can be reached (HOST:PORT), best first.
    pub addresses: Vec<String>,
    /// Memory of the machine, in bytes.
    pub memory_total_bytes: u64,
    /// How much of it models may take, in bytes.
    pub memory_budget_bytes: u64,
    /// How much of it models take now, in bytes.
    pub memory_used_bytes: u64,
    /// Most that blocks of prompts may take of the budget in each worker, in bytes.
    pub prompt_cache_bytes: u64,
    /// Such as "Apple M4 Pro".
    pub chip: String,
    /// Version of mlxnode.
    pub version: String,
}

/// Longest name, chip or version that is kept, in characters.
const MAX_TEXT: usize = 64;
/// Longest address, in characters: a DNS name has at most 253, and a port follows.
const MAX_ADDRESS: usize = 260;
/// Most addresses that are kept.
const MAX_ADDRESSES: usize = 16;

impl NodeFacts {
    /// The facts as they may be kept and shown: bounded, and without characters that would upset a terminal.
    #[must_use]
    pub fn tamed(mut self) -> Self {
        for text in [&mut self.name, &mut self.chip, &mut self.version] {
            *text = tame(text, MAX_TEXT);
        }
        self.addresses = tame_addresses(self.addresses);
        self
    }
}

pub(crate) fn tame_name(name: &str) -> String {
    let name = tame(name, MAX_TEXT);
    if name.is_empty() { "node".to_owned() } else { name }
}

pub(crate) fn tame_addresses(addresses: Vec<String>) -> Vec<String> {
    let usable = |address: &String| {
        address.len() <= MAX_ADDRESS && address.chars().all(|c| c.is_ascii_graphic()) && address.contains(':')
    };
    addresses.into_iter().filter(usable).take(MAX_ADDRESSES).collect()
}

fn tame(text: &str, longest: usize) -> String {
    let shown: String = text.chars().filter(|c| !c.is_control()).take(longest).collect();
    shown.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_from_elsewhere_are_bounded_and_printable() {
        let facts = NodeFacts {
            name: format!("\u{1b}[31m studio {}", "x".repeat(1000)),
            addresses: (0..100).map(|n| format!("10.0.0.{n}:7070")).chain(["no port".into()]).collect(),
            ..NodeFacts::default()
        };
        let tamed = facts.tamed();
        assert!(tamed.name.starts_with("[31m studio x") && tamed.name.len() <= MAX_TEXT);
        assert_eq!(tamed.addresses.len(), MAX_ADDRESSES);
        assert_eq!(tame_name(" \n"), "node");
    }
}
