//! What is on the disks, as one file for the next start.
//!
//! ```text
//! magic (8) | fingerprint (32) | entries | BLAKE3 of all before (32)
//! entry: parent (32) | flags (1) | last use (8) | BLOCK_TOKENS ids (4 each), little-endian
//! ```
//!
//! A block's own hash is computed from its parent's and its tokens, so a file cannot say that a block is another one.

use super::tree::Tree;
use mlxnode_compute::{BLOCK_TOKENS, BlockHash};

const MAGIC: &[u8; 8] = b"mlxnpi\0\x01";
const HASH: usize = 32;
const ENTRY: usize = HASH + 1 + 8 + 4 * BLOCK_TOKENS;
const FIRST: u8 = 1;
const CHECKPOINT: u8 = 2;

/// A block on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// The block before, or the root.
    pub(super) parent: BlockHash,
    pub(super) tokens: Box<[u32]>,
    /// The parent is a root.
    pub(super) is_first: bool,
    pub(super) has_checkpoint: bool,
    pub(super) last_use: u64,
}

/// A file that says nothing about this model's blocks. It may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoredError {
    /// Cut off, changed, or of another version.
    #[error("the index of prompts on the disk is damaged or of another version; it is made anew")]
    Damaged,
    /// Of another model or block size.
    #[error("the index of prompts on the disk is another model's; it is made anew")]
    Foreign,
}

pub(super) fn encode(fingerprint: &[u8; 32], tree: &Tree) -> Vec<u8> {
    let entries = tree.entries();
    let mut bytes = Vec::with_capacity(MAGIC.len() + 2 * HASH + ENTRY * entries.len());
    bytes.extend(MAGIC);
    bytes.extend(fingerprint);
    for Entry { parent, tokens, is_first, has_checkpoint, last_use } in entries {
        bytes.extend(parent.0);
        let flags = [(is_first, FIRST), (has_checkpoint, CHECKPOINT)];
        bytes.push(flags.into_iter().filter_map(|(is_set, flag)| is_set.then_some(flag)).sum());
        bytes.extend(last_use.to_le_bytes());
        bytes.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
    }
    let digest = digest(&bytes);
    bytes.extend(digest);
    bytes
}

pub(super) fn decode(fingerprint: &[u8; 32], bytes: &[u8]) -> Result<Vec<Entry>, StoredError> {
    let (rest, found) = bytes.split_last_chunk::<HASH>().ok_or(StoredError::Damaged)?;
    let entries = rest.strip_prefix(MAGIC).ok_or(StoredError::Damaged)?;
    if digest(rest) != *found {
        return Err(StoredError::Damaged);
    }
    let (owner, entries) = entries.split_first_chunk::<HASH>().ok_or(StoredError::Damaged)?;
    if owner != fingerprint {
        return Err(StoredError::Foreign);
    }
    if !entries.len().is_multiple_of(ENTRY) {
        return Err(StoredError::Damaged);
    }
    let entry = |bytes: &[u8]| -> Option<Entry> {
        let (parent, rest) = bytes.split_first_chunk::<HASH>()?;
        let (flags, rest) = rest.split_first()?;
        let (last_use, tokens) = rest.split_first_chunk::<8>()?;
        let tokens = tokens.as_chunks::<4>().0.iter().map(|token| u32::from_le_bytes(*token)).collect();
        Some(Entry {
            parent: BlockHash(*parent),
            tokens,
            is_first: flags & FIRST != 0,
            has_checkpoint: flags & CHECKPOINT != 0,
            // Far from the end of what counts uses from here on.
            last_use: u64::from_le_bytes(*last_use).min(u64::MAX / 2),
        })
    };
    entries.chunks_exact(ENTRY).map(|bytes| entry(bytes).ok_or(StoredError::Damaged)).collect()
}

fn digest(bytes: &[u8]) -> [u8; HASH] {
    *blake3::Hasher::new_derive_key("mlxnode prompt index v1").update(bytes).finalize().as_bytes()
}
