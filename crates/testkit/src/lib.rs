//! A cluster in a test: tiny checkpoints, local clusters, network lab, golden values.
