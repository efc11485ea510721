//! What a developer runs: set-up, demo, test, bench, checks.

fn main() {}
