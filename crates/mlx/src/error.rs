//! Errors of MLX: the text that mlx-c hands to its error handler, caught instead of ending the process.
//!
//! mlx-c has one handler per process. mlx-rs installs its own at its first checked call, once per process; what that one keeps
//! cannot be read from outside mlx-rs, so calls past mlx-rs would lose their reason. Therefore ours is installed after mlx-rs's,
//! for good. mlx-rs then knows only *that* a call failed; the reason is here, on the thread of the call, for both kinds of calls.

use mlx_rs::error::{AsSliceError, ConversionError, Exception, IoError};
use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::Once;

/// What an operation gives.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation was refused or failed.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum Error {
    /// MLX said no; its words.
    #[error("mlx: {0}")]
    Mlx(String),
    /// The library that was found is not the one this program was built for.
    #[error(
        "libmlx is version {found}, but this program needs {needed}: run `cargo xtask setup`, or install mlxnode again"
    )]
    Version {
        /// What was loaded.
        found: String,
        /// What would do.
        needed: &'static str,
    },
    /// Bytes and shape disagree.
    #[error("{bytes} bytes are not an array of shape {shape:?} with {size} bytes per element")]
    Bytes {
        /// How many came.
        bytes: usize,
        /// What they should be.
        shape: Vec<i32>,
        /// Bytes per element.
        size: usize,
    },
    /// An array has another element type than the call needs.
    #[error("the array is {found}, not {needed}")]
    Dtype {
        /// What it is.
        found: &'static str,
        /// What it must be.
        needed: &'static str,
    },
    /// A file of tensors cannot be opened.
    #[error("cannot open {file}")]
    Open {
        /// The file.
        file: String,
        /// Why not.
        #[source]
        source: Box<Error>,
    },
    /// A file does not have a tensor.
    #[error("{file} has no tensor {name}")]
    NoTensor {
        /// The file.
        file: String,
        /// The tensor.
        name: String,
    },
}

thread_local! {
    static LAST: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Called by mlx-c on the thread whose call failed, before that call returns.
unsafe extern "C" fn remember(message: *const c_char, _data: *mut c_void) {
    if message.is_null() {
        return;
    }
    // SAFETY: mlx-c passes a NUL-terminated string that lives until this function returns.
    let text = unsafe { CStr::from_ptr(message) }.to_string_lossy();
    // A panic must not leave this function, so a thread whose variables are gone already (it is ending) forgets the message.
    let _ = LAST.try_with(|last| {
        if let Ok(mut last) = last.try_borrow_mut() {
            *last = Some(without_source_place(&text).to_owned());
        }
    });
}

/// mlx-c ends its messages with " at /where/it/was/built/ops.cpp:123", which tells a reader nothing.
fn without_source_place(message: &str) -> &str {
    match message.rfind(" at /") {
        Some(place) if message[place..].contains(".cpp:") => &message[..place],
        _ => message,
    }
}

/// Replaces mlx-c's handler, which prints and exits. Must run before any other call, of mlx-rs too.
pub(crate) fn install_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // Any checked call makes mlx-rs install its handler, which it never does again. If this one fails, so will the next.
        drop(mlx_rs::Device::try_default());
        // SAFETY: the handler is a plain function without data; it lives as long as the process.
        unsafe { mlx_sys::mlx_set_error_handler(Some(remember), std::ptr::null_mut(), None) };
    });
}

/// Runs a call of mlx-rs, with MLX's own words when it fails.
pub(crate) fn through<T, E: Into<Error>>(call: impl FnOnce() -> std::result::Result<T, E>) -> Result<T> {
    install_handler();
    // What an earlier call left, whose failure nobody asked about, is not the reason of this one.
    LAST.set(None);
    call().map_err(Into::into)
}

impl From<Exception> for Error {
    fn from(exception: Exception) -> Self {
        let message = LAST.with_borrow_mut(Option::take);
        Self::Mlx(message.unwrap_or_else(|| exception.what().to_owned()))
    }
}

impl From<IoError> for Error {
    fn from(error: IoError) -> Self {
        match error {
            IoError::Exception(exception) => exception.into(),
            other => Self::Mlx(other.to_string()),
        }
    }
}

impl From<AsSliceError> for Error {
    fn from(error: AsSliceError) -> Self {
        match error {
            AsSliceError::Exception(exception) => exception.into(),
            other => Self::Mlx(other.to_string()),
        }
    }
}

impl From<ConversionError> for Error {
    fn from(error: ConversionError) -> Self {
        match error {
            ConversionError::Exception(exception) => exception.into(),
            ConversionError::ArraySlice(error) => error.into(),
            other => Self::Mlx(other.to_string()),
        }
    }
}

/// The status of an mlx-c call as a result.
pub(crate) fn check(status: c_int) -> Result<()> {
    if status == 0 { Ok(()) } else { Err(last()) }
}

/// The message of the call that just failed on this thread.
pub(crate) fn last() -> Error {
    let message = LAST.with_borrow_mut(Option::take);
    Error::Mlx(message.unwrap_or_else(|| "the operation failed without a reason".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_lose_the_place_in_the_library_but_nothing_else() {
        assert_eq!(without_source_place("[matmul] no at /build/mlx-c/ops.cpp:12"), "[matmul] no");
        assert_eq!(without_source_place("cannot read at /data/model"), "cannot read at /data/model");
    }
}
