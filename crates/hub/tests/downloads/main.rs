//! Downloads from a small server that speaks the hub's protocol, as well and as badly as servers do.

// `cfg(test)` is always on here; it tells clippy that helpers are test code, too.
#[cfg(test)]
mod refusals;
#[cfg(test)]
mod server;
#[cfg(test)]
mod stories;
