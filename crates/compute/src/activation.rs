//! What travels from stage to stage.

use bytes::{Bytes, BytesMut};
use std::ops::Range;

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

/// Hidden vectors of the tokens of one or several sequences, outside MLX: `[tokens, hidden]`, row-major, little-endian.
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

    /// Some of the rows, in order. No copy when it is a single range.
    ///
    /// # Errors
    /// [`ActivationError::Rows`] when there are no such rows.
    pub fn rows(&self, ranges: &[Range<usize>]) -> Result<Self, ActivationError> {
        if let Some(range) = ranges.iter().find(|range| range.start > range.end || range.end > self.tokens) {
            return Err(ActivationError::Rows { end: range.end, tokens: self.tokens });
        }
        let width = self.hidden * self.dtype.size();
        let tokens = ranges.iter().map(ExactSizeIterator::len).sum();
        let bytes = match ranges {
            [range] => self.bytes.slice(range.start * width..range.end * width),
            ranges => {
                let mut bytes = BytesMut::with_capacity(tokens * width);
                for range in ranges {
                    bytes.extend_from_slice(&self.bytes[range.start * width..range.end * width]);
                }
                bytes.freeze()
            }
        };
        Self::new(tokens, self.hidden, self.dtype, bytes)
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
    /// Rows that are not there.
    #[error("rows up to {end} of an activation that has {tokens}")]
    Rows {
        /// One past the last one that was asked for.
        end: usize,
        /// How many there are.
        tokens: usize,
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
        let rows = Activation::new(3, 1, Dtype::F16, Bytes::from(vec![1, 1, 2, 2, 3, 3])).unwrap();
        assert_eq!(rows.rows(&[0..1, 2..3]).unwrap().bytes(), &[1, 1, 3, 3][..]);
        assert_eq!(rows.rows(&[1..3]).unwrap().bytes(), &[2, 2, 3, 3][..]);
        assert_eq!(rows.rows(&[]).unwrap().tokens(), 0);
        assert_eq!(rows.rows(&[2..4]), Err(ActivationError::Rows { end: 4, tokens: 3 }));
        assert!(matches!(
            Activation::new(usize::MAX, 2, Dtype::F32, Bytes::new()),
            Err(ActivationError::TooLarge { .. })
        ));
    }
}
