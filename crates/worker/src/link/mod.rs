//! The stream from one stage to the next: frames one way, credits the other.
//!
//! ```text
//!  compute thread ─▶ outbox ─▶ sender ══ Stage.Link ══▶ receiver ─▶ inbox ─▶ compute thread (or driver, on the ring)
//!                     (8)        ▲                         ▲                      │ takes a message:
//!                                └───────── credits ◀══════╧══════ ledger ◀───────┘ one credit comes free
//! ```
//!
//! The receiver grants as many frames as it has room for; the sender sends no more, its outbox fills, and the compute thread
//! before it stops. So every queue between two stages is bounded, and a slow stage slows those before it.

mod assembler;
mod credit;
mod frames;
mod receiver;
mod sender;

pub(crate) use assembler::{Assembler, Direction, FrameError, LinkPlan};
pub(crate) use credit::{CreditLedger, Granted};
pub(crate) use frames::Frames;
pub(crate) use receiver::{Received, receive};
pub(crate) use sender::{LinkTarget, send};

/// Largest piece of an activation in one frame: HTTP/2 and TLS work on pieces far smaller, and a decode step must not wait long
/// behind one of them (1 MiB takes 0.8 ms at 10 Gbit/s).
pub(crate) const FRAME_BYTES: usize = 1 << 20;

/// Frames that may be on their way or waiting at the receiver. Enough for a decode step of 32 sequences and the prefill chunks
/// beside them, so that a sender rarely waits for credits; a bound on memory for a hostile or a runaway neighbour.
pub(crate) const WINDOW_FRAMES: u32 = 64;

/// Messages between the compute thread and the sender. Few: what waits here cannot be overtaken any more.
pub(crate) const OUTBOX_MESSAGES: usize = 8;
