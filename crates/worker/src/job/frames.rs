//! What goes over the pipes: a length of four bytes (little endian), then that many bytes of postcard.

use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, Read, Write};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Longest message: a configuration and a few paths.
const LONGEST: usize = 1 << 20;

fn bytes_of(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut frame = postcard::to_extend(message, vec![0; 4]).map_err(io::Error::other)?;
    let length = frame.len() - 4;
    if length > LONGEST {
        return Err(io::Error::other(format!("a message of {length} bytes is too long")));
    }
    frame[..4].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(frame)
}

fn length_of(head: [u8; 4]) -> io::Result<usize> {
    match u32::from_le_bytes(head) as usize {
        length if length <= LONGEST => Ok(length),
        length => {
            Err(io::Error::other(format!("a message of {length} bytes is announced, which is too long")))
        }
    }
}

pub(super) fn write(pipe: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    pipe.write_all(&bytes_of(message)?)?;
    pipe.flush()
}

/// `None` when the other side has closed.
pub(super) fn read<T: DeserializeOwned>(pipe: &mut impl Read) -> io::Result<Option<T>> {
    let mut head = [0; 4];
    match pipe.read_exact(&mut head) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let mut bytes = vec![0; length_of(head)?];
    pipe.read_exact(&mut bytes)?;
    postcard::from_bytes(&bytes).map(Some).map_err(io::Error::other)
}

pub(super) async fn send(pipe: &mut (impl AsyncWrite + Unpin), message: &impl Serialize) -> io::Result<()> {
    pipe.write_all(&bytes_of(message)?).await?;
    pipe.flush().await
}

pub(super) async fn receive<T: DeserializeOwned>(pipe: &mut (impl AsyncRead + Unpin)) -> io::Result<T> {
    let mut head = [0; 4];
    pipe.read_exact(&mut head).await?;
    let mut bytes = vec![0; length_of(head)?];
    pipe.read_exact(&mut bytes).await?;
    postcard::from_bytes(&bytes).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Order;

    #[test]
    fn what_is_written_is_read_and_nothing_longer() {
        let mut bytes = Vec::new();
        write(&mut bytes, &Order::Save("/a".into())).unwrap();
        let mut pipe = bytes.as_slice();
        assert!(matches!(read::<Order>(&mut pipe), Ok(Some(Order::Save(path))) if path == *"/a"));
        assert!(matches!(read::<Order>(&mut pipe), Ok(None)));
        assert!(read::<Order>(&mut [255; 8].as_slice()).is_err());
        assert!(read::<Order>(&mut [1, 0, 0, 0, 99].as_slice()).is_err());
        assert!(read::<Order>(&mut [9, 0, 0, 0, 99].as_slice()).is_err(), "cut off");
    }
}
