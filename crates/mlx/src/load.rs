//! Tensors from safetensors files, read when they are first needed.

use crate::error::{check, install_handler};
use crate::{Array, Device, Error, Result};
use mlx_sys as sys;
use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::path::{Path, PathBuf};

/// An open safetensors file. Only tensors that are evaluated are read, straight into the arrays' memory.
///
/// MLX checks little of a header: validate the file before (`mlxnode-checkpoint` does).
pub struct TensorFile {
    path: PathBuf,
    /// Those that were not taken yet. A file that kept them all would keep every tensor in memory that was read from it.
    tensors: HashMap<String, Array>,
}

impl TensorFile {
    /// Opens `path` and reads its header.
    pub fn open(device: &Device, path: &Path) -> Result<Self> {
        install_handler();
        let native = CString::new(path.as_os_str().as_encoded_bytes())
            .map_err(|_| Error::Mlx(format!("the path {} has a NUL byte", path.display())))?;
        // SAFETY: maps are made and freed here. The path is NUL-terminated.
        unsafe {
            let mut tensors = sys::mlx_map_string_to_array_new();
            let mut metadata = sys::mlx_map_string_to_string_new();
            let status =
                sys::mlx_load_safetensors(&mut tensors, &mut metadata, native.as_ptr(), device.cpu_stream());
            sys::mlx_map_string_to_string_free(metadata);
            let taken = check(status).map(|()| entries(tensors));
            sys::mlx_map_string_to_array_free(tensors);
            Ok(Self { path: path.to_owned(), tensors: taken? })
        }
    }

    /// Takes the tensor of this name out; it is read when it is evaluated.
    pub fn take(&mut self, name: &str) -> Result<Array> {
        self.tensors
            .remove(name)
            .ok_or_else(|| Error::NoTensor { file: self.path.display().to_string(), name: name.to_owned() })
    }
}

/// The entries of a native map, with references of their own.
///
/// # Safety
/// `map` must be valid.
unsafe fn entries(map: sys::mlx_map_string_to_array) -> HashMap<String, Array> {
    let mut entries = HashMap::new();
    // SAFETY: the iterator lives within the map's life; keys belong to the map and are copied; an array handle that was filled is
    // taken over by `Array`.
    unsafe {
        let iterator = sys::mlx_map_string_to_array_iterator_new(map);
        loop {
            let mut key = std::ptr::null();
            let mut handle = sys::mlx_array { ctx: std::ptr::null_mut() };
            let status = sys::mlx_map_string_to_array_iterator_next(&mut key, &mut handle, iterator);
            let array = Array::own(handle);
            if status != 0 || key.is_null() {
                break;
            }
            entries.insert(CStr::from_ptr(key).to_string_lossy().into_owned(), array);
        }
        sys::mlx_map_string_to_array_iterator_free(iterator);
    }
    entries
}
