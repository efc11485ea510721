//! What training on this machine needs around the trainer: data, files, checkpoints, figures.

mod checkpoints;
pub mod data;
mod figures;
mod files;
pub mod job;
mod reading;

pub use checkpoints::Checkpoints;
pub use figures::Figures;
pub use files::Files;
pub use reading::{TrainingReader, narrow, seconds_of_saves};
