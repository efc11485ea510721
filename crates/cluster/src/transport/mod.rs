//! Links: gRPC over mutual TLS with pinned keys, and nothing else.
//!
//! [`serve`] listens, [`connect`] dials. Both set TCP_NODELAY (without it a small call waits 44 ms for an acknowledgement)
//! and large HTTP/2 windows (a window of 64 KiB would stall an activation of a prompt four times per megabyte).

mod connect;
mod io;
mod serve;

pub(crate) use connect::open_tls;
pub use connect::{ConnectError, ConnectOptions, Link, connect, dial};
pub use serve::{ServeError, ServeOptions, serve, server_builder};

use std::time::Duration;

/// How much one stream may have in flight: four frames of 1 MiB, the largest that we send.
const STREAM_WINDOW: u32 = 4 << 20;
/// The same for all streams of a connection together.
const CONNECTION_WINDOW: u32 = 16 << 20;
/// HTTP/2 frames. The default of 16 KiB costs 64 headers and as many wake-ups for a frame of ours.
const HTTP2_FRAME: u32 = 1 << 20;
/// A silent connection is asked for a sign of life this often, and given up when it takes as long to answer.
const KEEPALIVE: Duration = Duration::from_secs(5);
