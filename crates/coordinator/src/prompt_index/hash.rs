//! Names of blocks: the hash of all tokens up to a block's end, of the model, and of whom they were computed for.

use mlxnode_compute::{BLOCK_TOKENS, BlockHash};

/// Where the prompts of one tenant with one adapter begin. Length before each text, so that no two of them run into one.
pub fn root(fingerprint: &[u8; 32], tenant: &str, adapter: Option<&str>) -> BlockHash {
    let mut hasher = blake3::Hasher::new_derive_key("mlxnode prompt root v1");
    hasher.update(fingerprint);
    hasher.update(&(BLOCK_TOKENS as u64).to_le_bytes());
    hasher.update(&[u8::from(adapter.is_some())]);
    for text in [tenant, adapter.unwrap_or("")] {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    }
    BlockHash(*hasher.finalize().as_bytes())
}

/// The block with these tokens after `parent`.
pub(super) fn next(parent: &BlockHash, tokens: &[u32]) -> BlockHash {
    let mut hasher = blake3::Hasher::new_derive_key("mlxnode prompt block v1");
    hasher.update(&parent.0);
    let mut bytes = Vec::with_capacity(4 * tokens.len());
    bytes.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
    hasher.update(&bytes);
    BlockHash(*hasher.finalize().as_bytes())
}

/// The full blocks of a prompt, each with its tokens.
pub(super) fn chain(root: BlockHash, tokens: &[u32]) -> impl Iterator<Item = (BlockHash, &[u32])> {
    tokens.chunks_exact(BLOCK_TOKENS).scan(root, |parent, tokens| {
        *parent = next(parent, tokens);
        Some((*parent, tokens))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_asks_has_a_root_of_their_own() {
        let cases = [
            ([1; 32], "a", None),
            ([2; 32], "a", None),
            ([1; 32], "ab", None),
            ([1; 32], "a", Some("")),
            ([1; 32], "a", Some("b")),
            ([1; 32], "", Some("ab")),
        ];
        let mut roots: Vec<BlockHash> =
            cases.iter().map(|(fingerprint, tenant, adapter)| root(fingerprint, tenant, *adapter)).collect();
        roots.sort_unstable();
        roots.dedup();
        assert_eq!(roots.len(), cases.len());
    }
}
