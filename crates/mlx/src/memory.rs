//! What MLX's allocator holds, in bytes. The figures are of the process, not of a thread.

use crate::error::{check, through};
use crate::{Device, Result};
use mlx_rs::memory;
use mlx_sys as sys;

/// Figures of the allocator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Held by arrays now.
    pub active: usize,
    /// Most that arrays held since the start or [`Device::reset_peak_memory`].
    pub peak: usize,
    /// Freed by arrays and kept for the next ones.
    pub cache: usize,
}

impl Device {
    /// The figures now.
    pub fn memory(&self) -> Result<Memory> {
        Ok(Memory {
            active: through(memory::active_memory)?,
            peak: through(memory::peak_memory)?,
            cache: through(memory::cache_memory)?,
        })
    }

    /// Starts the peak anew.
    pub fn reset_peak_memory(&self) -> Result<()> {
        through(memory::reset_peak_memory)
    }

    /// Gives cached buffers back to the system.
    pub fn clear_cache(&self) -> Result<()> {
        through(memory::clear_cache)
    }

    /// Above this many bytes MLX frees its cache and waits for work before it allocates. Advisory: do not rely on a refusal.
    /// Returns the limit before.
    pub fn set_memory_limit(&self, bytes: usize) -> Result<usize> {
        through(|| memory::set_memory_limit(bytes))
    }

    /// Most bytes kept for reuse. Returns the limit before.
    pub fn set_cache_limit(&self, bytes: usize) -> Result<usize> {
        through(|| memory::set_cache_limit(bytes))
    }

    /// Bytes that stay resident on the GPU; no effect elsewhere. Change it only after [`Device::synchronize`].
    /// Returns the limit before.
    pub fn set_wired_limit(&self, bytes: usize) -> Result<usize> {
        through(|| memory::set_wired_limit(bytes))
    }

    /// Bytes that the GPU can use well, as the system recommends; None on the CPU backend.
    pub fn recommended_working_set(&self) -> Result<Option<usize>> {
        if !self.is_gpu() {
            return Ok(None);
        }
        // mlx-rs does not have it.
        // SAFETY: handles are made, filled, read and freed here; the key is NUL-terminated.
        unsafe {
            let mut device = sys::mlx_device_new();
            let mut info = sys::mlx_device_info_new();
            let key = c"max_recommended_working_set_size";
            let mut bytes = 0;
            let status = check(sys::mlx_get_default_device(&mut device))
                .and_then(|()| check(sys::mlx_device_info_get(&mut info, device)))
                .and_then(|()| check(sys::mlx_device_info_get_size(&mut bytes, info, key.as_ptr())));
            sys::mlx_device_info_free(info);
            sys::mlx_device_free(device);
            status.map(|()| Some(bytes))
        }
    }
}
