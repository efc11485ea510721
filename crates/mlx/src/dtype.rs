//! Element types.

use mlx_sys as sys;

/// The element types that models and sampling use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// True or false.
    Bool,
    /// Scales of the floating-point quantization modes.
    U8,
    /// Token ids, indices, packed weights.
    U32,
    /// Indices.
    I32,
    /// Half precision.
    F16,
    /// bfloat16.
    BF16,
    /// Single precision.
    F32,
    /// Anything else MLX has; carried along, never made here.
    Other,
}

impl Dtype {
    pub(crate) fn raw(self) -> sys::mlx_dtype {
        match self {
            Self::Bool => sys::mlx_dtype__MLX_BOOL,
            Self::U8 => sys::mlx_dtype__MLX_UINT8,
            Self::U32 => sys::mlx_dtype__MLX_UINT32,
            Self::I32 => sys::mlx_dtype__MLX_INT32,
            Self::F16 => sys::mlx_dtype__MLX_FLOAT16,
            Self::BF16 => sys::mlx_dtype__MLX_BFLOAT16,
            Self::F32 | Self::Other => sys::mlx_dtype__MLX_FLOAT32,
        }
    }

    pub(crate) fn from_raw(raw: sys::mlx_dtype) -> Self {
        match raw {
            sys::mlx_dtype__MLX_BOOL => Self::Bool,
            sys::mlx_dtype__MLX_UINT8 => Self::U8,
            sys::mlx_dtype__MLX_UINT32 => Self::U32,
            sys::mlx_dtype__MLX_INT32 => Self::I32,
            sys::mlx_dtype__MLX_FLOAT16 => Self::F16,
            sys::mlx_dtype__MLX_BFLOAT16 => Self::BF16,
            sys::mlx_dtype__MLX_FLOAT32 => Self::F32,
            _ => Self::Other,
        }
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::Bool | Self::U8 => 1,
            Self::F16 | Self::BF16 => 2,
            Self::U32 | Self::I32 | Self::F32 | Self::Other => 4,
        }
    }

    /// As MLX spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bool => "bool",
            Self::U8 => "uint8",
            Self::U32 => "uint32",
            Self::I32 => "int32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
            Self::F32 => "float32",
            Self::Other => "another type",
        }
    }

    /// The type of activations in this element type, if models compute in it.
    pub fn activation(self) -> Option<mlxnode_compute::Dtype> {
        match self {
            Self::F16 => Some(mlxnode_compute::Dtype::F16),
            Self::BF16 => Some(mlxnode_compute::Dtype::BF16),
            Self::F32 => Some(mlxnode_compute::Dtype::F32),
            _ => None,
        }
    }
}

impl From<mlxnode_compute::Dtype> for Dtype {
    fn from(dtype: mlxnode_compute::Dtype) -> Self {
        match dtype {
            mlxnode_compute::Dtype::F16 => Self::F16,
            mlxnode_compute::Dtype::BF16 => Self::BF16,
            mlxnode_compute::Dtype::F32 => Self::F32,
        }
    }
}
