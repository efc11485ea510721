//! The first words between a node and its worker: one line of JSON each way over the worker's stdin and stdout.
//!
//! The node says who it is, the worker makes its own key (which never leaves its process), listens and answers where.

use mlxnode_cluster::KeyPin;
use mlxnode_proto::PROTOCOL_VERSION;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt};

/// Longest line that either side reads.
const LONGEST_LINE: u64 = 4096;

/// From the node.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub(crate) struct Hello {
    /// Hash of the node's public key: it alone may load and link the worker.
    pub(crate) parent_key_pin: KeyPin,
    /// The address to listen on; the port is the worker's choice.
    pub(crate) listen: IpAddr,
    pub(crate) protocol: u32,
    pub(crate) release: String,
}

/// From the worker.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(untagged)]
pub(crate) enum Answer {
    Ready(Ready),
    Refused { error: String },
}

/// The worker listens.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub(crate) struct Ready {
    pub(crate) address: SocketAddr,
    pub(crate) key_pin: KeyPin,
    pub(crate) pid: u32,
    pub(crate) protocol: u32,
}

impl Hello {
    pub(crate) fn new(parent_key_pin: KeyPin, listen: IpAddr) -> Self {
        let release = env!("CARGO_PKG_VERSION").to_owned();
        Self { parent_key_pin, listen, protocol: PROTOCOL_VERSION, release }
    }
}

/// What is wrong with a first line.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HelloError {
    #[error("cannot read it")]
    Read(#[source] std::io::Error),
    #[error("the pipe was closed before it")]
    Closed,
    #[error("it is longer than {LONGEST_LINE} bytes")]
    TooLong,
    #[error("it is not understood")]
    Parse(#[source] serde_json::Error),
    #[error("it is of protocol {0}, this release speaks {PROTOCOL_VERSION}: install the same release again")]
    Protocol(u32),
}

/// Reads one line of JSON.
pub(crate) async fn read_line<T: for<'a> Deserialize<'a>>(
    pipe: &mut (impl AsyncBufRead + Unpin),
) -> Result<T, HelloError> {
    let mut line = Vec::new();
    pipe.take(LONGEST_LINE).read_until(b'\n', &mut line).await.map_err(HelloError::Read)?;
    if line.last() != Some(&b'\n') {
        return Err(if line.len() as u64 == LONGEST_LINE { HelloError::TooLong } else { HelloError::Closed });
    }
    serde_json::from_slice(&line).map_err(HelloError::Parse)
}

/// One line of JSON.
pub(crate) fn line_of(value: &impl Serialize) -> String {
    let mut line = serde_json::to_string(value).expect("a plain struct is always JSON");
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn reads_what_it_writes_and_nothing_else() {
        let hello = Hello::new(KeyPin::from_bytes([7; 32]), IpAddr::from([127, 0, 0, 1]));
        let line = line_of(&hello);
        assert_eq!(read_line::<Hello>(&mut line.as_bytes()).await.unwrap(), hello);
        let refused = Answer::Refused { error: "no".into() };
        assert_eq!(read_line::<Answer>(&mut line_of(&refused).as_bytes()).await.unwrap(), refused);
        let cut_off = &line.as_bytes()[..line.len() - 1];
        assert!(matches!(read_line::<Hello>(&mut &cut_off[..]).await, Err(HelloError::Closed)));
        assert!(matches!(read_line::<Hello>(&mut &b"hi\n"[..]).await, Err(HelloError::Parse(_))));
        let endless = vec![b' '; 10_000];
        assert!(matches!(read_line::<Hello>(&mut &endless[..]).await, Err(HelloError::TooLong)));
    }
}
