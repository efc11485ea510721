//! A process for what strangers' files make us run: chat templates are programs, and a tokenizer can be built to cost
//! gigabytes. The process that carries them out may have 256 MiB and two seconds for a template; when it takes more it ends,
//! and nothing else does. Grammars of clients will come here too.
//!
//! ```text
//! ChatTemplate ──Sandbox──> SandboxProcess ──frames over a socket──> mlxnode sandbox: InProcess, under a limit
//! Tokenizer ────┘             │ one job at a time, a bounded queue, a deadline for each
//!                             └ a process that ended is replaced
//! ```
//!
//! | module | one line |
//! |---|---|
//! | `sandbox` | [`SandboxProcess`]: the node's side: queue, deadline, replacement |
//! | `child` | one child process: start, exchange of frames, end |
//! | `frame` | what goes over the socket, and its sizes |
//! | `serve` | [`serve()`]: the child's side |
//!
//! The limit on memory is the allocator's, not the system's: macOS knows none for a process, and one that the system ends
//! could be any other. So the program that serves brings an allocator with a limit (the crate `cap`) and hands it to [`serve()`].

mod child;
mod frame;
mod sandbox;
mod serve;

pub use sandbox::{SandboxOptions, SandboxProcess};
pub use serve::{ServeError, serve};
