//! The place of `cargo xtask bench`: release build against mlx-lm, interleaved, one file per measurement.
