//! What a matrix is with an adapter's change in it. The order of operations and the element types are mlx-lm's, so that the same bits
//! come out.

use mlxnode_checkpoint::layout::ModuleKind;
use mlxnode_checkpoint::{Change, QuantMode, QuantSetting, StoredMatrix};
use mlxnode_mlx::{Array, Device, Dtype, QuantizationMode, QuantizedLayout, Result, TensorFile};

/// The matrix `weight` (of a linear map `[outputs, inputs]`, of experts `[experts, outputs, inputs]`, of an embedding `[rows, width]`) with
/// the change that `adapter` holds. With lengths of rows (DoRA) the result has their element type.
pub(super) fn changed(
    device: &Device,
    weight: &Array,
    change: &Change,
    scale: f32,
    adapter: &mut TensorFile,
) -> Result<Array> {
    let mut read = |stored: &StoredMatrix| {
        let matrix = adapter.take(&stored.name)?;
        if stored.is_turned { device.transpose(&matrix, &[1, 0]) } else { Ok(matrix) }
    };
    let (a, b) = (read(&change.a)?, read(&change.b)?);
    let scaled = |matrix: &Array| device.multiply(&Array::scalar(scale, matrix.dtype())?, matrix);
    let delta = match change.module.kind {
        ModuleKind::Experts { .. } => device.matmul(&scaled(&b)?, &a)?,
        ModuleKind::Embedding { .. } => device.matmul(&scaled(&a)?, &b)?,
        _ => {
            let (a, b) = (device.transpose(&a, &[1, 0])?, device.transpose(&b, &[1, 0])?);
            device.matmul(&scaled(&b)?, &a)?
        }
    };
    let sum = device.add(weight, &device.cast(&delta, weight.dtype())?)?;
    let Some(name) = &change.magnitudes else { return Ok(sum) };
    let lengths = device.sqrt(&device.sum(&device.multiply(&sum, &sum)?, 1, false)?)?;
    let factors = device.divide(&adapter.take(name)?, &lengths)?;
    device.multiply(&device.expand(&factors, 1)?, &sum)
}

/// MLX's words for how a matrix is packed.
pub(super) fn layout(setting: QuantSetting) -> QuantizedLayout {
    let mode = match setting.mode {
        QuantMode::Affine => QuantizationMode::Affine,
        QuantMode::Mxfp4 => QuantizationMode::Mxfp4,
        QuantMode::Mxfp8 => QuantizationMode::Mxfp8,
        QuantMode::Nvfp4 => QuantizationMode::Nvfp4,
    };
    let size = |size: usize| i32::try_from(size).unwrap_or(i32::MAX);
    QuantizedLayout { mode, bits: size(setting.bits), group_size: size(setting.group_size) }
}

/// The file's word for an element type.
pub(super) fn stored(dtype: Dtype) -> Option<mlxnode_checkpoint::TensorDtype> {
    use mlxnode_checkpoint::TensorDtype;
    Some(match dtype {
        Dtype::Bool => TensorDtype::Bool,
        Dtype::U8 => TensorDtype::U8,
        Dtype::U32 => TensorDtype::U32,
        Dtype::I32 => TensorDtype::I32,
        Dtype::I64 => TensorDtype::I64,
        Dtype::F16 => TensorDtype::F16,
        Dtype::BF16 => TensorDtype::BF16,
        Dtype::F32 => TensorDtype::F32,
        Dtype::Other => return None,
    })
}
