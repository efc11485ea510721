//! Why an adapter could not be fused into a model.

use crate::config::ConfigError;
use mlxnode_checkpoint::{AdapterError, CheckpointError, WriteError};
use std::path::PathBuf;

/// A model that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum FuseError {
    /// There would be two models in one folder.
    #[error("{} has files already; name another folder, or empty it", path.display())]
    Taken {
        /// The folder.
        path: PathBuf,
    },
    /// The adapter cannot be read or does not fit.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// Its config cannot be.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The base cannot be read.
    #[error(transparent)]
    Base(#[from] CheckpointError),
    /// A file cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The weights of a full fine-tune are not those of this model.
    #[error("the weights in {} do not fit the model: {}", path.display(), problems.join("; "))]
    Unfit {
        /// The file.
        path: PathBuf,
        /// Names, with what is wrong.
        problems: Vec<String>,
    },
    /// A changed matrix is not one tensor of the files.
    #[error(
        "{module} is not stored as MLX has it in {}; convert the model for MLX first (`mlx_lm.convert`) and fuse the adapter into that",
        folder.display()
    )]
    Layout {
        /// The module.
        module: String,
        /// The model.
        folder: PathBuf,
    },
    /// A folder or file cannot be made.
    #[error("cannot write {}", path.display())]
    Disk {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// MLX refused.
    #[error(transparent)]
    Device(#[from] mlxnode_mlx::Error),
}

pub(super) fn disk(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> FuseError + '_ {
    |source| FuseError::Disk { path: path.into(), source }
}
