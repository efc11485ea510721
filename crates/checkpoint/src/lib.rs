//! A model on disk: config, tensor index, slices of a layer range, writer, GGUF; validates before MLX sees a byte.
