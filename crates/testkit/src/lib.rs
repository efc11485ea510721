//! A cluster in a test: local clusters of real processes, a network lab, the oracle's scripts.
//!
//! - [`browser`]: a real browser without a screen, for the web page
//! - [`binary`]: the `mlxnode` that the tests run
//! - [`node`]: one node as a process, by the machine-readable contracts of the command line
//! - [`cluster`]: several nodes on this machine, paired
//! - [`eventually`]: waiting with a bound instead of sleeping
//! - [`jobs`]: what jobs do and leave behind
//! - [`clients`]: the official clients of the HTTP dialects
//! - [`oracle`]: the Python environment whose numbers are the judge
//! - [`netlab`]: hosts of a network of their own (Linux network namespaces)

pub mod binary;
pub mod browser;
pub mod clients;
pub mod cluster;
pub mod eventually;
pub mod jobs;
#[cfg(target_os = "linux")]
pub mod netlab;
pub mod node;
pub mod oracle;
