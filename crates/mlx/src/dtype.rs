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
    /// Numbers of groups of token ids.
    I64,
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
    /// As mlx-rs names it; single precision for [`Self::Other`], which no call asks for.
    pub(crate) fn native(self) -> mlx_rs::Dtype {
        match self {
            Self::Bool => mlx_rs::Dtype::Bool,
            Self::U8 => mlx_rs::Dtype::Uint8,
            Self::U32 => mlx_rs::Dtype::Uint32,
            Self::I32 => mlx_rs::Dtype::Int32,
            Self::I64 => mlx_rs::Dtype::Int64,
            Self::F16 => mlx_rs::Dtype::Float16,
            Self::BF16 => mlx_rs::Dtype::Bfloat16,
            Self::F32 | Self::Other => mlx_rs::Dtype::Float32,
        }
    }

    /// As mlx-c numbers it.
    pub(crate) fn raw(self) -> sys::mlx_dtype {
        self.native().into()
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::Bool | Self::U8 => 1,
            Self::F16 | Self::BF16 => 2,
            Self::I64 => 8,
            Self::U32 | Self::I32 | Self::F32 | Self::Other => 4,
        }
    }

    /// The lowest finite number of a floating-point type.
    pub fn lowest(self) -> f32 {
        match self {
            Self::F16 => half::f16::MIN.to_f32(),
            Self::BF16 => half::bf16::MIN.to_f32(),
            _ => f32::MIN,
        }
    }

    /// As MLX spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bool => "bool",
            Self::U8 => "uint8",
            Self::U32 => "uint32",
            Self::I32 => "int32",
            Self::I64 => "int64",
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

impl From<mlx_rs::Dtype> for Dtype {
    fn from(dtype: mlx_rs::Dtype) -> Self {
        match dtype {
            mlx_rs::Dtype::Bool => Self::Bool,
            mlx_rs::Dtype::Uint8 => Self::U8,
            mlx_rs::Dtype::Uint32 => Self::U32,
            mlx_rs::Dtype::Int32 => Self::I32,
            mlx_rs::Dtype::Int64 => Self::I64,
            mlx_rs::Dtype::Float16 => Self::F16,
            mlx_rs::Dtype::Bfloat16 => Self::BF16,
            mlx_rs::Dtype::Float32 => Self::F32,
            _ => Self::Other,
        }
    }
}
