//! Arrays out of stretches of files, read when they are evaluated.
//!
//! MLX's own loading makes one array of one tensor in one file. Here the bytes of one array may lie in several places, one after
//! the other: matrices that are multiplied together, the experts of a layer. They are read straight to where they belong, several
//! arrays at a time on MLX's reading threads, without a copy in between.
//!
//! MLX takes a reader in place of a file. It is given one for a safetensors file that does not exist: a header that describes the
//! one array, then the stretches. A failed read cannot be told to MLX, which does not ask; it is remembered in [`ReadFailures`].

use crate::error::{check, last};
use crate::{Array, Device, Dtype, Error, Result, counts};
use mlx_sys as sys;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// An open file of weights.
#[derive(Debug)]
pub struct WeightFile {
    path: PathBuf,
    file: File,
}

impl WeightFile {
    /// Opens `path` for reading.
    pub fn open(path: &Path) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self { path: path.to_owned(), file: File::open(path)? }))
    }
}

/// Consecutive bytes of a file.
#[derive(Clone, Debug)]
pub struct Stretch {
    /// The file.
    pub file: Arc<WeightFile>,
    /// Where the bytes begin.
    pub start: u64,
    /// How many there are.
    pub length: u64,
}

/// The first read that failed, of all arrays that were given this. Shared with MLX's reading threads.
#[derive(Clone, Debug, Default)]
pub struct ReadFailures {
    first: Arc<Mutex<Option<(PathBuf, io::Error)>>>,
}

impl ReadFailures {
    /// Takes the failure out, if there was one: the file and why it cannot be read. Look after evaluating; an array whose read
    /// failed holds zeros.
    pub fn take(&self) -> Option<(PathBuf, io::Error)> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn remember(&self, path: &Path, error: io::Error) {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert_with(|| (path.to_owned(), error));
    }
}

impl Device {
    /// An array of `shape` whose little-endian elements are these stretches, one after the other. It is read when it is evaluated.
    pub fn read_later(
        &self,
        dtype: Dtype,
        shape: &[i32],
        stretches: Vec<Stretch>,
        failures: &ReadFailures,
    ) -> Result<Array> {
        let elements = shape.iter().try_fold(1_u64, |product, size| {
            u64::try_from(*size).ok().and_then(|size| product.checked_mul(size))
        });
        let wanted = elements.and_then(|elements| elements.checked_mul(dtype.size() as u64));
        let given = stretches.iter().try_fold(0_u64, |sum, stretch| sum.checked_add(stretch.length));
        let (Some(bytes), true, Some(name)) = (wanted, wanted == given, stored_name(dtype)) else {
            let bytes = usize::try_from(given.unwrap_or(u64::MAX)).unwrap_or(usize::MAX);
            return Err(Error::Bytes { bytes, shape: shape.to_vec(), size: dtype.size() });
        };
        counts::operation();
        let header =
            format!(r#"{{"{NAME}":{{"dtype":"{name}","shape":{shape:?},"data_offsets":[0,{bytes}]}}}}"#);
        let mut head = (header.len() as u64).to_le_bytes().to_vec();
        head.extend_from_slice(header.as_bytes());
        let reader = Reader { head, stretches, place: AtomicU64::new(0), failures: failures.clone() };
        load(reader, self.reading_stream())
    }
}

/// The array's name in the file that does not exist.
const NAME: &str = "array";
const NAME_C: &CStr = c"array";

/// What safetensors calls an element type.
fn stored_name(dtype: Dtype) -> Option<&'static str> {
    match dtype {
        Dtype::Bool => Some("BOOL"),
        Dtype::U8 => Some("U8"),
        Dtype::U32 => Some("U32"),
        Dtype::I32 => Some("I32"),
        Dtype::I64 => Some("I64"),
        Dtype::F16 => Some("F16"),
        Dtype::BF16 => Some("BF16"),
        Dtype::F32 => Some("F32"),
        Dtype::Other => None,
    }
}

/// Hands a reader to MLX and takes the array that it makes of it.
fn load(reader: Reader, stream: sys::mlx_stream) -> Result<Array> {
    let vtable = sys::mlx_io_vtable {
        is_open: Some(always),
        good: Some(always),
        tell: Some(tell),
        seek: Some(seek),
        read: Some(read),
        read_at_offset: Some(read_at_offset),
        write: None,
        label: Some(label),
        free: Some(free),
    };
    // SAFETY: all handles are made, filled, read and freed here. The reader belongs to MLX from now on, which calls the functions
    // above with it, on any thread (it is Sync), and frees it after the last of them.
    unsafe {
        let description: *mut Reader = Box::into_raw(Box::new(reader));
        let stream_of_bytes = sys::mlx_io_reader_new(description.cast(), vtable);
        let mut arrays = sys::mlx_map_string_to_array_new();
        let mut metadata = sys::mlx_map_string_to_string_new();
        let loaded =
            check(sys::mlx_load_safetensors_reader(&mut arrays, &mut metadata, stream_of_bytes, stream));
        let mut handle = sys::mlx_array { ctx: std::ptr::null_mut() };
        let found = loaded
            .and_then(|()| check(sys::mlx_map_string_to_array_get(&mut handle, arrays, NAME_C.as_ptr())));
        sys::mlx_map_string_to_string_free(metadata);
        sys::mlx_map_string_to_array_free(arrays);
        sys::mlx_io_reader_free(stream_of_bytes);
        let array = Array::own(handle);
        found?;
        if array.handle().ctx.is_null() { Err(last()) } else { Ok(array) }
    }
}

/// The file that does not exist.
struct Reader {
    /// Length of the header, and the header.
    head: Vec<u8>,
    stretches: Vec<Stretch>,
    place: AtomicU64,
    failures: ReadFailures,
}

impl Reader {
    /// Fills `out` with the bytes from `offset` on; with zeros where there are none or they cannot be read.
    fn fill(&self, out: &mut [u8], offset: u64) {
        let head = self.head.len() as u64;
        let mut done = 0;
        if offset < head {
            let from = &self.head[offset as usize..];
            done = from.len().min(out.len());
            out[..done].copy_from_slice(&from[..done]);
        }
        let mut begin = head;
        for stretch in &self.stretches {
            let end = begin + stretch.length;
            let place = offset + done as u64;
            if done < out.len() && (begin..end).contains(&place) {
                let length = usize::try_from(end - place).unwrap_or(usize::MAX).min(out.len() - done);
                let part = &mut out[done..done + length];
                let file = &stretch.file;
                if let Err(error) = file.file.read_exact_at(part, stretch.start + (place - begin)) {
                    self.failures.remember(&file.path, error);
                    part.fill(0);
                }
                done += length;
            }
            begin = end;
        }
        out[done..].fill(0);
    }
}

/// The reader behind a description.
///
/// # Safety
/// `description` comes from [`load`] and was not freed yet.
unsafe fn reader<'a>(description: *mut c_void) -> &'a Reader {
    // SAFETY: as the caller promises; readers are only ever borrowed shared.
    unsafe { &*description.cast::<Reader>() }
}

/// The bytes that MLX wants filled.
///
/// # Safety
/// `data` points to `length` bytes that nobody else uses during the call.
unsafe fn buffer<'a>(data: *mut c_char, length: usize) -> &'a mut [u8] {
    // SAFETY: as the caller promises; any bytes are valid.
    unsafe { std::slice::from_raw_parts_mut(data.cast::<u8>(), length) }
}

unsafe extern "C" fn always(_description: *mut c_void) -> bool {
    true
}

unsafe extern "C" fn tell(description: *mut c_void) -> usize {
    // SAFETY: called by MLX with what `load` gave it.
    unsafe { reader(description) }.place.load(Ordering::Relaxed) as usize
}

unsafe extern "C" fn seek(description: *mut c_void, offset: i64, whence: c_int) -> c_int {
    // SAFETY: called by MLX with what `load` gave it.
    let reader = unsafe { reader(description) };
    let base = match whence {
        0 => 0,
        1 => reader.place.load(Ordering::Relaxed),
        _ => reader.stretches.iter().fold(reader.head.len() as u64, |sum, stretch| sum + stretch.length),
    };
    reader.place.store(base.saturating_add_signed(offset), Ordering::Relaxed);
    0
}

unsafe extern "C" fn read(description: *mut c_void, data: *mut c_char, length: usize) -> usize {
    // SAFETY: called by MLX with what `load` gave it and a buffer of this length.
    let (reader, out) = unsafe { (reader(description), buffer(data, length)) };
    reader.fill(out, reader.place.fetch_add(length as u64, Ordering::Relaxed));
    length
}

unsafe extern "C" fn read_at_offset(
    description: *mut c_void,
    data: *mut c_char,
    length: usize,
    offset: usize,
) -> usize {
    // SAFETY: called by MLX with what `load` gave it and a buffer of this length.
    let (reader, out) = unsafe { (reader(description), buffer(data, length)) };
    reader.fill(out, offset as u64);
    length
}

unsafe extern "C" fn label(_description: *mut c_void) -> *const c_char {
    c"stretches of files".as_ptr()
}

unsafe extern "C" fn free(description: *mut c_void) {
    // SAFETY: made by `load`; MLX calls this once, after all else.
    drop(unsafe { Box::from_raw(description.cast::<Reader>()) });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("mlxnode-mlx-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn stretches_of_two_files_become_one_array() {
        let device = Device::open().unwrap();
        let folder = folder("stretches");
        let bytes = |numbers: &[f32]| numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>();
        std::fs::write(folder.join("a"), bytes(&[9.0, 1.0, 2.0, 9.0])).unwrap();
        std::fs::write(folder.join("b"), bytes(&[3.0, 4.0, 5.0, 6.0])).unwrap();
        let file = |name: &str| WeightFile::open(&folder.join(name)).unwrap();
        let stretches = vec![
            Stretch { file: file("a"), start: 4, length: 8 },
            Stretch { file: file("b"), start: 0, length: 16 },
        ];
        let failures = ReadFailures::default();
        let array = device.read_later(Dtype::F32, &[3, 2], stretches, &failures).unwrap();
        assert_eq!(array.shape(), [3, 2]);
        device.eval([&array]).unwrap();
        assert_eq!(array.to_f32().unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert!(failures.take().is_none());
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_file_that_ends_too_early_is_named() {
        let device = Device::open().unwrap();
        let folder = folder("short");
        std::fs::write(folder.join("short"), [7; 6]).unwrap();
        let file = WeightFile::open(&folder.join("short")).unwrap();
        let failures = ReadFailures::default();
        let stretch = Stretch { file, start: 2, length: 8 };
        let array = device.read_later(Dtype::U8, &[8], vec![stretch.clone()], &failures).unwrap();
        device.eval([&array]).unwrap();
        let (path, error) = failures.take().unwrap();
        assert!(path.ends_with("short") && error.kind() == io::ErrorKind::UnexpectedEof, "{path:?} {error}");
        assert!(device.read_later(Dtype::F32, &[3], vec![stretch], &failures).is_err(), "12 bytes from 8");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
