//! Gets a model onto this Mac: Hugging Face, peers, local store; only the byte ranges a shard needs.
