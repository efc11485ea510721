//! What travels from stage to stage.

use bytes::Bytes;

/// The element types a model computes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16.
    BF16,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }
}

/// Hidden vectors of consecutive tokens of one sequence, outside MLX: `[tokens, hidden]`, row-major, little-endian.
#[derive(Clone, Debug, PartialEq)]
pub struct Activation {
    tokens: usize,
    hidden: usize,
    dtype: Dtype,
    bytes: Bytes,
}

impl Activation {
    /// Largest activation that is accepted: 64 MiB, i.e. 4096 tokens of width 8192 in bf16.
    pub const MAX_BYTES: usize = 64 << 20;

    /// Checks that `bytes` is exactly `[tokens, hidden]` of `dtype`, and not larger than [`Self::MAX_BYTES`].
    pub fn new(tokens: usize, hidden: usize, dtype: Dtype, bytes: Bytes) -> Result<Self, ActivationError> {
        let expected = tokens
            .checked_mul(hidden)
            .and_then(|elements| elements.checked_mul(dtype.size()))
            .filter(|size| *size <= Self::MAX_BYTES)
            .ok_or(ActivationError::TooLarge { tokens, hidden })?;
        if expected != bytes.len() {
            return Err(ActivationError::Length { tokens, hidden, expected, actual: bytes.len() });
        }
        Ok(Self { tokens, hidden, dtype, bytes })
    }

    /// Number of rows.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Width of a row.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The elements.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }
}

/// Bytes that are not the activation they claim to be.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ActivationError {
    /// The shape is larger than any step may be.
    #[error("an activation of {tokens} x {hidden} is larger than 64 MiB")]
    TooLarge {
        /// Rows.
        tokens: usize,
        /// Width.
        hidden: usize,
    },
    /// Shape and length disagree.
    #[error("an activation of {tokens} x {hidden} needs {expected} bytes but has {actual}")]
    Length {
        /// Rows.
        tokens: usize,
        /// Width.
        hidden: usize,
        /// Bytes by the shape.
        expected: usize,
        /// Bytes that came.
        actual: usize,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_only_the_bytes_that_its_shape_needs() {
        assert!(Activation::new(2, 3, Dtype::BF16, Bytes::from(vec![0; 12])).is_ok());
        assert!(matches!(
            Activation::new(2, 3, Dtype::F32, Bytes::from(vec![0; 12])),
            Err(ActivationError::Length { expected: 24, actual: 12, .. })
        ));
        assert!(matches!(
            Activation::new(usize::MAX, 2, Dtype::F32, Bytes::new()),
            Err(ActivationError::TooLarge { .. })
        ));
    }
}
