//! A handle to an array of MLX: lazily computed, reference-counted, bound to its thread.
//!
//! It is mlx-rs's array without what panics (operators, indexing, `as_slice`, `item`, `dim`, `from_slice`) and without `Send`: the
//! array may be moved, but not what it is still to be computed from.

use crate::error::{check, last, through};
use crate::{Dtype, Error, Result, counts};
use half::{bf16, f16};
use mlx_rs::ArrayElement;
use mlx_rs::error::AsSliceError;
use mlx_sys as sys;
use std::ffi::c_void;
use std::marker::PhantomData;

/// An n-dimensional array. Cloning is cheap: it clones the handle. Not `Send`: see the crate's documentation.
#[derive(Clone)]
pub struct Array {
    native: mlx_rs::Array,
    bound_to_thread: PhantomData<*const ()>,
}

impl Array {
    /// Takes over a handle that mlx-c filled.
    ///
    /// # Safety
    /// Nobody else may own the handle. An empty one may only be dropped.
    #[inline]
    pub(crate) unsafe fn own(handle: sys::mlx_array) -> Self {
        // SAFETY: as the caller promises.
        Self::wrap(unsafe { mlx_rs::Array::from_ptr(handle) })
    }

    /// The arrays of a vector, each with a reference of its own.
    ///
    /// # Safety
    ///
    /// The vector is one that MLX filled.
    pub(crate) unsafe fn of_vector(vector: sys::mlx_vector_array) -> Result<Vec<Self>> {
        // SAFETY: as the caller promises; indices are below the size, and each handle is new.
        unsafe {
            (0..sys::mlx_vector_array_size(vector))
                .map(|index| {
                    let mut handle = sys::mlx_array { ctx: std::ptr::null_mut() };
                    let status = sys::mlx_vector_array_get(&mut handle, vector, index);
                    let array = Self::own(handle);
                    check(status).map(|()| array)
                })
                .collect()
        }
    }

    /// Takes over an array of mlx-rs that was made on this thread.
    #[inline]
    pub(crate) fn wrap(native: mlx_rs::Array) -> Self {
        Self { native, bound_to_thread: PhantomData }
    }

    /// As mlx-rs takes it.
    #[inline]
    pub(crate) fn native(&self) -> &mlx_rs::Array {
        &self.native
    }

    /// As mlx-c takes it; valid as long as `self`.
    #[inline]
    pub(crate) fn handle(&self) -> sys::mlx_array {
        self.native.as_ptr()
    }

    /// Copies little-endian elements into a new array of `shape`.
    pub fn from_bytes(bytes: &[u8], shape: &[i32], dtype: Dtype) -> Result<Self> {
        let elements = shape.iter().try_fold(1_usize, |product, size| {
            usize::try_from(*size).ok().and_then(|size| product.checked_mul(size))
        });
        let wanted = elements.and_then(|elements| elements.checked_mul(dtype.size()));
        if wanted != Some(bytes.len()) || dtype == Dtype::Other {
            return Err(Error::Bytes { bytes: bytes.len(), shape: shape.to_vec(), size: dtype.size() });
        }
        if !bytes.as_ptr().addr().is_multiple_of(dtype.size()) {
            // MLX copies element by element through a typed pointer. u64 is aligned for every element type.
            let mut aligned = vec![0_u64; bytes.len().div_ceil(8)];
            // SAFETY: the vector has at least `bytes.len()` bytes and u64 has no invalid values.
            let target =
                unsafe { std::slice::from_raw_parts_mut(aligned.as_mut_ptr().cast::<u8>(), bytes.len()) };
            target.copy_from_slice(bytes);
            return Self::copy_from(aligned.as_ptr().cast(), shape, dtype);
        }
        Self::copy_from(bytes.as_ptr().cast(), shape, dtype)
    }

    /// `data` must hold the elements of `shape`.
    fn copy_from(data: *const c_void, shape: &[i32], dtype: Dtype) -> Result<Self> {
        crate::error::install_handler();
        // SAFETY: callers pass as many elements as the shape has; MLX copies them before it returns.
        let native = unsafe { mlx_rs::Array::from_raw_data(data, shape, dtype.native()) };
        if native.as_ptr().ctx.is_null() { Err(last()) } else { Ok(Self::wrap(native)) }
    }

    /// Unsigned integers of `shape`.
    pub fn from_u32(values: &[u32], shape: &[i32]) -> Result<Self> {
        // SAFETY: any u32 is four valid bytes.
        let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) };
        Self::from_bytes(bytes, shape, Dtype::U32)
    }

    /// Single-precision numbers of `shape`.
    pub fn from_f32(values: &[f32], shape: &[i32]) -> Result<Self> {
        // SAFETY: any f32 is four valid bytes.
        let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) };
        Self::from_bytes(bytes, shape, Dtype::F32)
    }

    /// A number without dimensions, rounded to `dtype` as a number literal beside an array of that type would be.
    pub fn scalar(value: f32, dtype: Dtype) -> Result<Self> {
        match dtype {
            Dtype::F16 => Self::from_bytes(&f16::from_f32(value).to_le_bytes(), &[], dtype),
            Dtype::BF16 => Self::from_bytes(&bf16::from_f32(value).to_le_bytes(), &[], dtype),
            Dtype::U32 => Self::from_bytes(&(value as u32).to_le_bytes(), &[], dtype),
            Dtype::I32 => Self::from_bytes(&(value as i32).to_le_bytes(), &[], dtype),
            Dtype::I64 => Self::from_bytes(&(value as i64).to_le_bytes(), &[], dtype),
            Dtype::Bool | Dtype::U8 => Self::from_bytes(&[u8::from(value != 0.0)], &[], dtype),
            Dtype::F32 | Dtype::Other => Self::from_bytes(&value.to_le_bytes(), &[], Dtype::F32),
        }
    }

    /// The sizes of the dimensions.
    pub fn shape(&self) -> &[i32] {
        self.native.shape()
    }

    /// Size of the dimension at `axis`; negative counts from the last. 0 when there is no such axis.
    pub fn dim(&self, axis: i32) -> i32 {
        let shape = self.shape();
        let index = if axis < 0 { axis + shape.len() as i32 } else { axis };
        usize::try_from(index).ok().and_then(|index| shape.get(index).copied()).unwrap_or(0)
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.native.dtype().into()
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.native.size()
    }

    /// No elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of the elements.
    pub fn byte_size(&self) -> usize {
        self.native.nbytes()
    }

    /// Computes the array and waits for it.
    pub fn eval(&self) -> Result<()> {
        counts::evaluation();
        through(|| self.native.eval())
    }

    /// The single element of a `uint32` array. Waits for it.
    pub fn item_u32(&self) -> Result<u32> {
        self.expect(Dtype::U32)?;
        counts::read();
        through(|| self.native.try_item_exact())
    }

    /// The single element of a `bool` array. Waits for it.
    pub fn item_bool(&self) -> Result<bool> {
        self.expect(Dtype::Bool)?;
        counts::read();
        through(|| self.native.try_item_exact())
    }

    /// The elements, which must lie in row-major order in memory: callers make it so with [`crate::Device::contiguous`].
    fn elements<T: ArrayElement>(&self) -> Result<&[T]> {
        if self.is_empty() {
            self.eval()?;
            return Ok(&[]);
        }
        counts::read();
        through(|| self.native.try_as_slice())
    }

    /// A copy of the elements, row-major, little-endian. Waits for them.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        self.eval()?;
        let mut row_major = false;
        // SAFETY: the handle is valid. mlx-rs asks this only where the element type is known at compile time.
        check(unsafe { sys::_mlx_array_is_row_contiguous(&mut row_major, self.handle()) })?;
        if !row_major {
            return Err(AsSliceError::NotContiguous.into());
        }
        if self.is_empty() {
            return Ok(Vec::new());
        }
        // SAFETY: the handle is valid.
        let data = unsafe { sys::mlx_array_data_uint8(self.handle()) };
        if data.is_null() {
            return Err(AsSliceError::Null.into());
        }
        // SAFETY: the array was evaluated and lies row-major, so `byte_size` bytes follow; `self` keeps them alive while they are copied.
        counts::read();
        Ok(unsafe { std::slice::from_raw_parts(data, self.byte_size()) }.to_vec())
    }

    /// The elements as single-precision numbers, from any floating-point type. Waits for them.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        match self.dtype() {
            Dtype::F32 => Ok(self.elements::<f32>()?.to_vec()),
            Dtype::F16 => Ok(self.elements::<f16>()?.iter().copied().map(f16::to_f32).collect()),
            Dtype::BF16 => Ok(self.elements::<bf16>()?.iter().copied().map(bf16::to_f32).collect()),
            other => Err(Error::Dtype { found: other.name(), needed: "floating point" }),
        }
    }

    /// The elements of a `uint32` array. Waits for them.
    pub fn to_u32(&self) -> Result<Vec<u32>> {
        self.expect(Dtype::U32)?;
        Ok(self.elements::<u32>()?.to_vec())
    }

    fn expect(&self, needed: Dtype) -> Result<()> {
        if self.dtype() == needed {
            return Ok(());
        }
        Err(Error::Dtype { found: self.dtype().name(), needed: needed.name() })
    }
}

impl std::fmt::Debug for Array {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "Array({} {:?})", self.dtype().name(), self.shape())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_in_and_come_out_even_when_they_lie_oddly() {
        let bytes: Vec<u8> = (0..25).collect();
        let array = Array::from_bytes(&bytes[1..], &[2, 3], Dtype::F32).unwrap();
        assert_eq!(array.shape(), [2, 3]);
        assert_eq!(array.to_bytes().unwrap(), &bytes[1..]);
        assert!(matches!(Array::from_bytes(&bytes, &[2, 3], Dtype::F32), Err(Error::Bytes { .. })));
        assert!(matches!(Array::from_bytes(&bytes, &[-5, -5], Dtype::U8), Err(Error::Bytes { .. })));
    }

    #[test]
    fn numbers_are_read_in_their_own_type() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            assert_eq!(Array::scalar(1.5, dtype).unwrap().to_f32().unwrap(), [1.5]);
        }
        let error = Array::from_u32(&[1], &[1]).unwrap().to_f32().unwrap_err();
        assert_eq!(error.to_string(), "the array is uint32, not floating point");
    }
}
