//! Runs layers on MLX; implements Stage: decoder, architectures, KV caches, sampling, local generation.
