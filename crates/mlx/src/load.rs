//! Tensors from safetensors files, read when they are first needed.

use crate::error::{check, install_handler};
use crate::{Array, Device, Error, Result};
use mlx_sys as sys;
use std::ffi::CString;
use std::path::{Path, PathBuf};

/// An open safetensors file. Only tensors that are evaluated are read, straight into the arrays' memory.
///
/// MLX checks little of a header: validate the file before (`mlxnode-checkpoint` does).
pub struct TensorFile {
    path: PathBuf,
    tensors: sys::mlx_map_string_to_array,
}

impl TensorFile {
    /// Opens `path` and reads its header.
    pub fn open(device: &Device, path: &Path) -> Result<Self> {
        install_handler();
        let native = CString::new(path.as_os_str().as_encoded_bytes())
            .map_err(|_| Error::Mlx(format!("the path {} has a NUL byte", path.display())))?;
        // SAFETY: maps are made here; the metadata is freed here, the tensors by `drop`. The path is NUL-terminated.
        unsafe {
            let mut tensors = sys::mlx_map_string_to_array_new();
            let mut metadata = sys::mlx_map_string_to_string_new();
            let status =
                sys::mlx_load_safetensors(&mut tensors, &mut metadata, native.as_ptr(), device.cpu_stream());
            sys::mlx_map_string_to_string_free(metadata);
            let file = Self { path: path.to_owned(), tensors };
            check(status)?;
            Ok(file)
        }
    }

    /// The tensor of this name; it is read when it is evaluated.
    pub fn tensor(&self, name: &str) -> Result<Array> {
        let missing = || Error::NoTensor { file: self.path.display().to_string(), name: name.to_owned() };
        let native = CString::new(name).map_err(|_| missing())?;
        let mut handle = sys::mlx_array { ctx: std::ptr::null_mut() };
        // SAFETY: a valid map, an empty handle and a NUL-terminated name.
        let status = unsafe { sys::mlx_map_string_to_array_get(&mut handle, self.tensors, native.as_ptr()) };
        let array = Array::own(handle);
        if status != 0 || array.handle().ctx.is_null() {
            return Err(missing());
        }
        Ok(array)
    }
}

impl Drop for TensorFile {
    fn drop(&mut self) {
        // SAFETY: the map is owned by this value alone.
        unsafe { sys::mlx_map_string_to_array_free(self.tensors) };
    }
}
