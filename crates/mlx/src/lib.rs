//! MLX made safe: [`Array`], the [`Device`] whose methods are the operations, memory figures and random keys.
//!
//! A thin layer over mlx-rs, and over mlx-sys (mlx-c) for what mlx-rs lacks or does slowly ([`Device`]'s operations say which and
//! why). It is the only crate with `unsafe`. Three decisions shape it:
//! - **One thread.** MLX's streams belong to the thread that made them, so [`Device`] and [`Array`] are neither `Send` nor
//!   `Sync`: that no array leaves the compute thread is checked by the compiler. What leaves are bytes ([`Array::to_bytes`]).
//! - **No panics.** Every operation returns a [`Result`]; there are no operators and no indexing, which panic in mlx-rs.
//!   mlx-c's own error handler would end the process, so ours is installed before the first call.
//! - **One stream.** The device makes it, keeps it for life and makes it the thread's default, which mlx-rs takes; calls of mlx-c
//!   name it. A second stream would be a second native thread that is never freed.
//!
//! Two things MLX does not check are left to the caller, because a check would need a wait for the device: indices given to
//! [`Device::take`] must be in range, and an allocation that is too large ends the process on the CPU backend.
#![allow(unsafe_code)]

mod array;
mod counts;
mod device;
mod dtype;
mod error;
mod fast;
mod fused;
mod gather;
mod gradient;
mod layouts;
mod load;
mod memory;
mod metal;
mod nonlinear;
mod operations;
mod quantized;
mod random;
mod scan;
mod stretches;

pub use array::Array;
pub use counts::Counts;
pub use device::{Device, MLX_VERSION};
pub use dtype::Dtype;
pub use error::{Error, Result};
pub use fast::{Mask, Rope};
pub use fused::{Chain, Function};
pub use gradient::Gradient;
pub use load::TensorFile;
pub use memory::Memory;
pub use metal::{Constant, Launch, MetalKernel};
pub use quantized::{QuantizationMode, Quantized, QuantizedLayout};
pub use random::RandomKey;
pub use stretches::{ReadFailures, Stretch, WeightFile};
