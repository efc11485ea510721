//! What goes over the socket: a length of four bytes (little endian), then that many bytes of postcard.
//!
//! The child is not trusted with lengths: whoever reads says how long the next frame may be.

use mlxnode_text::SandboxError;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::borrow::Cow;
use std::io::{self, ErrorKind, Read, Write};

/// All of a model's text files at their largest have 148 MiB; a conversation has less.
pub(crate) const LARGEST_JOB: usize = 160 << 20;
/// A frame without texts, and what an answer has beyond its text: an error's words.
pub(crate) const ALLOWANCE: usize = 64 << 10;

/// The first frame: what the child may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Terms {
    /// Changes with the frames: parent and child are the same program, unless it was replaced meanwhile.
    pub(crate) version: u32,
    /// Memory of the child without its threads' stacks.
    pub(crate) heap_bytes: u64,
    /// Stack of the thread that works.
    pub(crate) stack_bytes: u64,
    /// Processor time of one job: a bound for a child whose parent is gone.
    pub(crate) job_seconds: u64,
}

/// Of these frames.
pub(crate) const VERSION: u32 = 1;

/// What the child is to do.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Job<'a> {
    /// Compile a template.
    Compile {
        /// Its text.
        source: Cow<'a, str>,
    },
    /// Carry a template out.
    Render {
        /// Its text.
        source: Cow<'a, str>,
        /// A JSON object.
        variables: Cow<'a, str>,
        /// The longest text it may write.
        most_bytes: u64,
    },
    /// Build a tokenizer and use it on a few texts.
    TryTokenizer {
        /// The model's text files by name.
        files: Vec<(Cow<'a, str>, Cow<'a, [u8]>)>,
    },
}

/// What came of it. The answer to the terms is an empty text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// It is done; the text of a rendering, else empty.
    Done(String),
    /// It is not.
    Failed(SandboxError),
}

/// The frame of a message.
pub(crate) fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut frame = postcard::to_extend(message, vec![0; 4]).map_err(io::Error::other)?;
    let length = u32::try_from(frame.len() - 4).map_err(io::Error::other)?;
    frame[..4].copy_from_slice(&length.to_le_bytes());
    Ok(frame)
}

/// Writes one frame.
pub(crate) fn write(to: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    to.write_all(&encode(message)?)
}

/// Reads one frame of at most `most` bytes; none where the stream ends before it.
///
/// # Errors
/// Of reading; [`ErrorKind::InvalidData`] when the frame is too long or is no message.
pub(crate) fn read<T: DeserializeOwned>(from: &mut impl Read, most: usize) -> io::Result<Option<T>> {
    let mut length = [0; 4];
    match from.read(&mut length[..1]) {
        Ok(0) => return Ok(None),
        Ok(_) => from.read_exact(&mut length[1..])?,
        Err(error) => return Err(error),
    }
    let length = u32::from_le_bytes(length) as usize;
    let invalid = |reason: String| io::Error::new(ErrorKind::InvalidData, reason);
    if length > most {
        return Err(invalid(format!("a frame of {length} bytes where {most} are the most")));
    }
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes)?;
    match postcard::take_from_bytes(&bytes) {
        Ok((message, [])) => Ok(Some(message)),
        Ok(_) => Err(invalid("a frame with more behind its message".to_owned())),
        Err(error) => Err(invalid(format!("a frame that is no message: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_out_as_they_went_in() {
        let answers = [
            Answer::Done("é\0".repeat(1000)),
            Answer::Failed(SandboxError::Wrong { line: 7, reason: "no".to_owned() }),
            Answer::Failed(SandboxError::Memory { mebibytes: 256 }),
        ];
        let mut stream = Vec::new();
        for answer in &answers {
            write(&mut stream, answer).unwrap();
        }
        let files = vec![(Cow::Borrowed("config.json"), Cow::Borrowed(b"{}".as_slice()))];
        write(&mut stream, &Job::TryTokenizer { files }).unwrap();
        let mut from = stream.as_slice();
        for answer in answers {
            assert_eq!(read::<Answer>(&mut from, 1 << 20).unwrap(), Some(answer));
        }
        let job = read::<Job<'static>>(&mut from, 1 << 20).unwrap();
        let Some(Job::TryTokenizer { files }) = job else { panic!("{job:?}") };
        assert_eq!(files, [("config.json".into(), b"{}".as_slice().into())]);
        assert!(read::<Answer>(&mut from, 1 << 20).unwrap().is_none());
    }

    /// A child that a template has taken over can write what it likes.
    #[test]
    fn what_is_no_frame_is_refused_without_room_for_it() {
        let cases: [(&[u8], ErrorKind); 6] = [
            (&[1, 0], ErrorKind::UnexpectedEof),
            (&[9, 0, 0, 0, 0, 1], ErrorKind::UnexpectedEof),
            (&[255, 255, 255, 255, 0], ErrorKind::InvalidData),
            (&[1, 0, 0, 0, 9], ErrorKind::InvalidData),
            (&[3, 0, 0, 0, 0, 0, 7], ErrorKind::InvalidData),
            // Text whose length is claimed to be four gigabytes.
            (&[7, 0, 0, 0, 0, 255, 255, 255, 255, 15, 65], ErrorKind::InvalidData),
        ];
        for (mut bytes, kind) in cases {
            assert_eq!(read::<Answer>(&mut bytes, 1 << 20).unwrap_err().kind(), kind, "{bytes:?}");
        }
    }
}
