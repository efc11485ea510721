//! The command line; one file per command, output in one place.

fn main() {}
