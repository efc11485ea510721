//! safetensors headers, read strictly: MLX opens a file only after this has accepted it.
//!
//! MLX's own reader trusts the header. It takes shapes whose product overflows, negative dimensions, dimensions cut to
//! 32 bits and tensors that share bytes; so everything it assumes is checked here, with limits on what is read at all.

use crate::dtype::TensorDtype;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::collections::HashSet;
use std::fmt;
use std::ops::Range;

/// Largest header that is read: some 200 bytes for each of the most tensors there may be.
pub(crate) const MAX_HEADER_BYTES: u64 = 32 << 20;
/// Most tensors in a file; the largest models of experts have some 90,000 over all files.
pub(crate) const MAX_TENSORS: usize = 200_000;
/// Longest tensor name.
pub(crate) const MAX_NAME_BYTES: usize = 512;
/// Most dimensions. MLX has no kernel for more.
pub(crate) const MAX_RANK: usize = 8;

/// Bytes before the header: its length.
pub(crate) const PREFIX_BYTES: u64 = 8;

/// A tensor as the header describes it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct StoredTensor {
    /// Its name in the file.
    pub(crate) name: String,
    /// Element type.
    pub(crate) dtype: TensorDtype,
    /// Dimensions, each at most `i32::MAX`.
    pub(crate) shape: Vec<usize>,
    /// Where its elements lie, counted from the start of the file.
    pub(crate) bytes: Range<u64>,
}

/// A file that is not safetensors, or is damaged, or would mislead MLX.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum HeaderError {
    /// Not even the length of the header.
    #[error("it has {actual} bytes, fewer than any safetensors file")]
    TooShort {
        /// Bytes in the file.
        actual: u64,
    },
    /// The header would end behind the file.
    #[error(
        "its header claims {claimed} bytes but the file has {actual}; it is truncated or not a safetensors file"
    )]
    Truncated {
        /// What the first eight bytes say.
        claimed: u64,
        /// Bytes in the file.
        actual: u64,
    },
    /// The header is larger than we read.
    #[error("its header of {claimed} bytes is larger than the limit of {MAX_HEADER_BYTES}")]
    TooLarge {
        /// What the first eight bytes say.
        claimed: u64,
    },
    /// The header is not UTF-8.
    #[error("its header is not UTF-8")]
    NotUtf8,
    /// The header is not the JSON that it should be.
    #[error("its header is malformed: {reason}")]
    Malformed {
        /// What the parser says.
        reason: String,
    },
    /// One tensor's description cannot be.
    #[error("tensor \"{name}\" {problem}")]
    Tensor {
        /// Its name, cut short.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Bytes that belong to no tensor.
    #[error("bytes {start}..{end} of its data belong to no tensor")]
    Gap {
        /// First of them, counted from the start of the data.
        start: u64,
        /// One past the last.
        end: u64,
    },
}

/// How many bytes of header follow the first eight, given the first eight and the length of the file.
pub(crate) fn header_length(prefix: [u8; 8], file_bytes: u64) -> Result<usize, HeaderError> {
    let claimed = u64::from_le_bytes(prefix);
    if claimed > file_bytes.saturating_sub(PREFIX_BYTES) {
        return Err(HeaderError::Truncated { claimed, actual: file_bytes });
    }
    if claimed > MAX_HEADER_BYTES {
        return Err(HeaderError::TooLarge { claimed });
    }
    usize::try_from(claimed).map_err(|_| HeaderError::TooLarge { claimed })
}

/// Reads a header (the bytes between the first eight and the data) of a file of `file_bytes` bytes.
///
/// The tensors come in the order of their bytes, and together they cover all of the data, none twice.
pub(crate) fn parse(header: &[u8], file_bytes: u64) -> Result<Vec<StoredTensor>, HeaderError> {
    let text = std::str::from_utf8(header).map_err(|_| HeaderError::NotUtf8)?;
    let Entries(entries) = serde_json::from_str(text).map_err(|error| {
        // Depth and size are bounded by the parser and the limit above; the message may quote the file, so cut it.
        HeaderError::Malformed { reason: error.to_string().chars().take(200).collect() }
    })?;
    let data_start = PREFIX_BYTES + header.len() as u64;
    let data_bytes = file_bytes.saturating_sub(data_start);
    let mut names = HashSet::with_capacity(entries.len());
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, entry) in entries {
        let tensor = check(&name, &entry, data_bytes)
            .map_err(|problem| HeaderError::Tensor { name: short(&name), problem })?;
        if !names.insert(name.clone()) {
            return Err(HeaderError::Tensor { name: short(&name), problem: "is there twice".into() });
        }
        tensors.push(StoredTensor { name, ..tensor });
    }
    tensors.sort_by_key(|tensor| (tensor.bytes.start, tensor.bytes.end));
    let mut covered = 0;
    for tensor in &mut tensors {
        if tensor.bytes.start < covered {
            let problem = "lies on the bytes of another tensor".into();
            return Err(HeaderError::Tensor { name: short(&tensor.name), problem });
        }
        if tensor.bytes.start > covered {
            return Err(HeaderError::Gap { start: covered, end: tensor.bytes.start });
        }
        covered = tensor.bytes.end;
        tensor.bytes = tensor.bytes.start + data_start..tensor.bytes.end + data_start;
    }
    if covered != data_bytes {
        return Err(HeaderError::Gap { start: covered, end: data_bytes });
    }
    Ok(tensors)
}

/// Checks one description against the data's length; the bytes of the result count from the start of the data.
fn check(name: &str, entry: &Entry, data_bytes: u64) -> Result<StoredTensor, String> {
    if name.is_empty() || name.len() > MAX_NAME_BYTES {
        return Err(format!("has a name of {} bytes; 1 to {MAX_NAME_BYTES} are allowed", name.len()));
    }
    let dtype = TensorDtype::parse(&entry.dtype)
        .ok_or_else(|| format!("has dtype \"{}\", which MLX cannot load", short(&entry.dtype)))?;
    let mut elements: u64 = 1;
    let mut shape = Vec::with_capacity(entry.shape.0.len());
    for dimension in &entry.shape.0 {
        let allowed = i32::try_from(*dimension).ok().and_then(|dimension| u32::try_from(dimension).ok());
        let Some(dimension) = allowed else {
            return Err(format!("has a dimension of {dimension}; 0 to {} are allowed", i32::MAX));
        };
        elements = elements
            .checked_mul(u64::from(dimension))
            .ok_or_else(|| format!("has a shape of more elements than can be: {:?}", entry.shape.0))?;
        shape.push(dimension as usize);
    }
    let expected = elements
        .checked_mul(dtype.size() as u64)
        .ok_or_else(|| format!("has a shape of more bytes than can be: {:?}", entry.shape.0))?;
    let [start, end] = entry.data_offsets;
    if start > end || end > data_bytes {
        return Err(format!("lies at {start}..{end}, outside the file's {data_bytes} bytes of data"));
    }
    if end - start != expected {
        return Err(format!("needs {expected} bytes for {dtype} {shape:?} but has {}", end - start));
    }
    Ok(StoredTensor { name: String::new(), dtype, shape, bytes: start..end })
}

/// A name as messages show it.
fn short(name: &str) -> String {
    name.chars().take(80).collect()
}

/// The header's object, in file order and with repeated keys, which a map would hide.
struct Entries(Vec<(String, Entry)>);

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Shape,
    data_offsets: [u64; 2],
}

/// Dimensions as written; i128 holds every number that JSON integers here can be, so that negative ones can be shown.
struct Shape(Vec<i128>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Entries;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    if entries.len() == MAX_TENSORS {
                        return Err(serde::de::Error::custom(format!("more than {MAX_TENSORS} tensors")));
                    }
                    // Without the name the parser's message would not say which tensor.
                    let entry = map.next_value::<Entry>().map_err(|error| {
                        serde::de::Error::custom(format!("tensor \"{}\": {error}", short(&name)))
                    })?;
                    entries.push((name, entry));
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Dimensions;
        impl<'de> Visitor<'de> for Dimensions {
            type Value = Shape;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(out, "a list of at most {MAX_RANK} whole numbers")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Shape, A::Error> {
                let mut dimensions = Vec::new();
                while let Some(dimension) = list.next_element::<i128>()? {
                    if dimensions.len() == MAX_RANK {
                        return Err(serde::de::Error::invalid_length(MAX_RANK + 1, &self));
                    }
                    dimensions.push(dimension);
                }
                Ok(Shape(dimensions))
            }
        }
        deserializer.deserialize_seq(Dimensions)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_file(header: &str, data_bytes: u64) -> Result<Vec<StoredTensor>, HeaderError> {
        parse(header.as_bytes(), PREFIX_BYTES + header.len() as u64 + data_bytes)
    }

    #[test]
    fn reads_tensors_in_the_order_of_their_bytes() {
        let header = r#"{"__metadata__": {"format": "mlx"},
            "b": {"dtype": "U32", "shape": [], "data_offsets": [12, 16]},
            "empty": {"dtype": "F32", "shape": [0, 7], "data_offsets": [12, 12]},
            "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}  "#;
        let tensors = parse_file(header, 16).unwrap();
        let start = 8 + header.len() as u64;
        let found: Vec<_> =
            tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.bytes.clone())).collect();
        assert_eq!(
            found,
            [("a", start..start + 12), ("empty", start + 12..start + 12), ("b", start + 12..start + 16)]
        );
        assert_eq!(tensors[0].shape, [2, 3]);
        assert_eq!(parse_file("{}", 0), Ok(vec![]));
    }

    #[test]
    fn refuses_what_would_mislead_mlx() {
        let cases = [
            (
                r#"{"w": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}}"#,
                16,
                "\"w\" has a dimension of -2",
            ),
            (
                r#"{"w": {"dtype": "F32", "shape": [4294967300], "data_offsets": [0, 16]}}"#,
                16,
                "\"w\" has a dimension of 4294967300",
            ),
            (
                r#"{"w": {"dtype": "F32", "shape": [2147483647, 2147483647, 2147483647], "data_offsets": [0, 16]}}"#,
                16,
                "\"w\" has a shape of more elements",
            ),
            (
                r#"{"w": {"dtype": "F64", "shape": [2147483647, 2147483647], "data_offsets": [0, 16]}}"#,
                16,
                "\"w\" has a shape of more bytes",
            ),
            (
                r#"{"w": {"dtype": "F32", "shape": [4611686018427387912], "data_offsets": [0, 32]}}"#,
                32,
                "\"w\" has a dimension of 4611686018427387912",
            ),
            (r#"{"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}"#, 12, "\"w\" needs 16 bytes"),
            (r#"{"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}"#, 15, "\"w\" lies at 0..16"),
            (r#"{"w": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}"#, 16, "\"w\" lies at 16..0"),
            (r#"{"w": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}"#, 16, "tensor \"w\""),
            (r#"{"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}"#, 2, "\"w\" has dtype \"F4\""),
            (
                r#"{"w": {"dtype": "F32", "shape": [1,1,1,1,1,1,1,1,1], "data_offsets": [0, 4]}}"#,
                4,
                "tensor \"w\"",
            ),
            (r#"{"w": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}}"#, 4, "tensor \"w\""),
            (r#"{"w": {"dtype": "F32", "shape": [1]}}"#, 4, "tensor \"w\""),
            (r#"{"w": 7}"#, 4, "tensor \"w\""),
            (r#"{"": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}"#, 4, "name of 0 bytes"),
            (
                r#"{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}"#,
                8,
                "\"w\" is there twice",
            ),
            (
                r#"{"v": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}"#,
                12,
                "\"w\" lies on the bytes",
            ),
            (
                r#"{"v": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}"#,
                8,
                "lies on the bytes",
            ),
            (
                r#"{"v": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "w": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}"#,
                12,
                "4..8",
            ),
            (r#"{"v": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}"#, 6, "4..6"),
            ("[]", 0, "malformed"),
            ("{", 0, "malformed"),
            ("", 0, "malformed"),
        ];
        for (header, data_bytes, part) in cases {
            let message = parse_file(header, data_bytes).expect_err(header).to_string();
            assert!(message.contains(part), "{header}: {message}");
        }
        assert_eq!(parse(b"{\"\xff\": 1}", 100), Err(HeaderError::NotUtf8));
        let long = "n".repeat(MAX_NAME_BYTES + 1);
        let header = format!(r#"{{"{long}": {{"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}}}"#);
        assert!(parse_file(&header, 1).unwrap_err().to_string().contains("513 bytes"));
    }

    #[test]
    fn refuses_headers_that_are_longer_than_the_file_or_the_limit() {
        assert_eq!(header_length(10u64.to_le_bytes(), 18), Ok(10));
        assert_eq!(
            header_length(11u64.to_le_bytes(), 18),
            Err(HeaderError::Truncated { claimed: 11, actual: 18 })
        );
        assert!(matches!(header_length([0xff; 8], 18), Err(HeaderError::Truncated { .. })));
        let large = MAX_HEADER_BYTES + 1;
        assert_eq!(
            header_length(large.to_le_bytes(), u64::MAX),
            Err(HeaderError::TooLarge { claimed: large })
        );
    }

    #[test]
    fn stops_at_the_limit_of_tensors() {
        let mut header = String::from("{");
        for tensor in 0..=MAX_TENSORS {
            let comma = if tensor == 0 { "" } else { "," };
            header += &format!(r#"{comma}"{tensor}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#);
        }
        header.push('}');
        assert!(parse_file(&header, 0).unwrap_err().to_string().contains("more than 200000 tensors"));
    }
}
