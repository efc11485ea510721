//! The device: one stream on one thread, and the frame that every operation runs in.

use crate::error::{check, install_handler, last, through};
use crate::fused::FusedChains;
use crate::{Array, Error, Result, counts};
use mlx_sys as sys;
use std::cell::RefCell;
use std::ffi::{CStr, c_int};
use std::rc::{Rc, Weak};

/// The libmlx that this crate was written and tested for.
pub const MLX_VERSION: &str = "0.32.2";

/// MLX on the current thread: the GPU on a Mac, the CPU elsewhere. Operations are its methods. Clones share the stream.
///
/// Open it once per thread and keep the thread for long: every thread that used MLX leaves a native stream thread behind. When the
/// last clone is dropped the work in flight is awaited; without that the process may crash at its end.
#[derive(Clone)]
pub struct Device {
    inner: Rc<Streams>,
}

struct Streams {
    /// Where operations run.
    main: sys::mlx_stream,
    /// The thread's default stream of the CPU, where files are read: the GPU cannot. The main one on the CPU backend.
    cpu: sys::mlx_stream,
    is_gpu: bool,
    chains: FusedChains,
}

thread_local! {
    /// The streams of this thread while somebody holds the device.
    static OPEN: RefCell<Weak<Streams>> = const { RefCell::new(Weak::new()) };
    /// This thread's native streams: made once, never freed (MLX cannot), so kept for the next `open`.
    static NATIVE: RefCell<Option<(sys::mlx_stream, sys::mlx_stream, bool)>> = const { RefCell::new(None) };
}

impl Device {
    /// The device of this thread. Checks the version of libmlx the first time.
    pub fn open() -> Result<Self> {
        if let Some(inner) = OPEN.with_borrow(Weak::upgrade) {
            return Ok(Self { inner });
        }
        install_handler();
        let found = version()?;
        if found != MLX_VERSION {
            return Err(Error::Version { found, needed: MLX_VERSION });
        }
        let known = NATIVE.with_borrow(|native| *native);
        let (main, cpu, is_gpu) = match known {
            Some(native) => native,
            None => native_streams()?,
        };
        NATIVE.with_borrow_mut(|native| *native = Some((main, cpu, is_gpu)));
        let inner = Rc::new(Streams { main, cpu, is_gpu, chains: FusedChains::default() });
        OPEN.with_borrow_mut(|open| *open = Rc::downgrade(&inner));
        Ok(Self { inner })
    }

    /// Does the arithmetic run on a GPU?
    pub fn is_gpu(&self) -> bool {
        self.inner.is_gpu
    }

    /// Waits until everything that was started is done.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream lives as long as the thread.
        check(unsafe { sys::mlx_synchronize(self.inner.main) })
    }

    /// Computes the arrays and waits for them.
    pub fn eval<'a>(&self, arrays: impl IntoIterator<Item = &'a Array>) -> Result<()> {
        counts::evaluation();
        through(|| mlx_rs::transforms::eval(arrays.into_iter().map(Array::native)))
    }

    /// Starts to compute the arrays and returns at once.
    pub fn async_eval<'a>(&self, arrays: impl IntoIterator<Item = &'a Array>) -> Result<()> {
        counts::evaluation();
        through(|| mlx_rs::transforms::async_eval(arrays.into_iter().map(Array::native)))
    }

    pub(crate) fn stream(&self) -> sys::mlx_stream {
        self.inner.main
    }

    pub(crate) fn chains(&self) -> &FusedChains {
        &self.inner.chains
    }

    /// Where files are read.
    pub(crate) fn reading_stream(&self) -> sys::mlx_stream {
        self.inner.cpu
    }

    /// Runs one operation of mlx-rs. Without a stream of its own it takes the default one of the thread, which is ours.
    pub(crate) fn through(
        &self,
        operation: impl FnOnce() -> mlx_rs::error::Result<mlx_rs::Array>,
    ) -> Result<Array> {
        counts::operation();
        through(operation).map(Array::wrap)
    }

    /// Runs one mlx-c function: it fills the handle it is given and returns 0, or reports an error.
    #[inline]
    pub(crate) fn run(
        &self,
        operation: impl FnOnce(*mut sys::mlx_array, sys::mlx_stream) -> c_int,
    ) -> Result<Array> {
        counts::operation();
        let mut handle = sys::mlx_array { ctx: std::ptr::null_mut() };
        let status = operation(&mut handle, self.inner.main);
        // SAFETY: the handle is new; when it stayed empty it is dropped below.
        let array = unsafe { Array::own(handle) };
        if status != 0 || array.handle().ctx.is_null() {
            return Err(last());
        }
        Ok(array)
    }

    /// The same for a function with several results.
    #[inline]
    pub(crate) fn run_many(
        &self,
        operation: impl FnOnce(*mut sys::mlx_vector_array, sys::mlx_stream) -> c_int,
    ) -> Result<Vec<Array>> {
        counts::operation();
        // SAFETY: the vector is made, filled by MLX and freed here.
        unsafe {
            let mut vector = sys::mlx_vector_array_new();
            let arrays = match operation(&mut vector, self.inner.main) {
                0 => Array::of_vector(vector),
                _ => Err(last()),
            };
            sys::mlx_vector_array_free(vector);
            arrays
        }
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        // SAFETY: the streams were made on this thread (the type is not Send) and live as long as it.
        unsafe {
            sys::mlx_synchronize(self.main);
            sys::mlx_synchronize(self.cpu);
        }
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(if self.inner.is_gpu { "Device(gpu)" } else { "Device(cpu)" })
    }
}

/// The version that libmlx reports.
fn version() -> Result<String> {
    // SAFETY: the string is made, filled, read and freed here.
    unsafe {
        let mut text = sys::mlx_string_new();
        let status = sys::mlx_version(&mut text);
        let data = sys::mlx_string_data(text);
        let version =
            if data.is_null() { String::new() } else { CStr::from_ptr(data).to_string_lossy().into_owned() };
        sys::mlx_string_free(text);
        check(status)?;
        Ok(version)
    }
}

/// A new stream on the default device, made the default of this thread, and a stream that can read files.
fn native_streams() -> Result<(sys::mlx_stream, sys::mlx_stream, bool)> {
    // SAFETY: handles are made, filled and freed here; streams are kept for the thread's life.
    unsafe {
        let mut device = sys::mlx_device_new();
        check(sys::mlx_get_default_device(&mut device))?;
        let mut kind = sys::mlx_device_type__MLX_CPU;
        check(sys::mlx_device_get_type(&mut kind, device))?;
        let main = sys::mlx_stream_new_device(device);
        sys::mlx_device_free(device);
        if main.ctx.is_null() {
            return Err(last());
        }
        check(sys::mlx_set_default_stream(main))?;
        let is_gpu = kind == sys::mlx_device_type__MLX_GPU;
        let cpu = if is_gpu { sys::mlx_default_cpu_stream_new() } else { main };
        if cpu.ctx.is_null() { Err(last()) } else { Ok((main, cpu, is_gpu)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opening_twice_gives_the_same_stream() {
        let first = Device::open().unwrap();
        let second = Device::open().unwrap();
        assert!(Rc::ptr_eq(&first.inner, &second.inner));
        let stream = first.inner.main.ctx;
        drop((first, second));
        assert_eq!(Device::open().unwrap().inner.main.ctx, stream, "a thread has one stream for life");
    }

    #[test]
    fn operations_of_mlx_rs_run_on_the_stream_of_the_device() {
        let device = Device::open().unwrap();
        let theirs = mlx_rs::Stream::thread_local_or_default();
        // SAFETY: both streams are valid.
        assert!(unsafe { sys::mlx_stream_equal(theirs.as_ptr(), device.inner.main) });
        let reading = mlx_rs::Stream::thread_local_or_cpu();
        // SAFETY: both streams are valid.
        assert!(unsafe { sys::mlx_stream_equal(reading.as_ptr(), device.inner.cpu) });
    }

    #[test]
    fn an_error_nobody_asked_about_is_not_the_reason_of_the_next() {
        let device = Device::open().unwrap();
        let a = Array::from_f32(&[1.0; 6], &[2, 3]).unwrap();
        let mut result = crate::fast::NONE;
        // SAFETY: valid handles; the result stays empty.
        assert_ne!(unsafe { sys::mlx_matmul(&mut result, a.handle(), a.handle(), device.stream()) }, 0);
        let own = mlx_rs::error::Exception::custom("something else");
        assert_eq!(through(|| Err::<(), _>(own)).unwrap_err().to_string(), "mlx: something else");
    }

    #[test]
    fn a_bad_shape_is_an_error_and_the_device_stays_usable() {
        let device = Device::open().unwrap();
        let a = Array::from_f32(&[1.0; 6], &[2, 3]).unwrap();
        let error = device.matmul(&a, &a).unwrap_err();
        assert!(error.to_string().starts_with("mlx: [matmul]"), "{error}");
        assert!(!error.to_string().contains(".cpp"), "{error}");
        assert_eq!(device.add(&a, &a).unwrap().to_f32().unwrap(), [2.0; 6]);
    }
}
