//! The command line; one file per command, output in one place.
//!
//! `main` reads like the way of a command: parse the words, set up logging, run the command, say what went wrong.
//! Data goes to stdout through [`output`]; progress, hints and errors go to stderr.

#![allow(unreachable_pub)] // nothing of a program can be reached from outside

mod adapter;
mod answer;
mod arguments;
mod caching;
mod commands;
mod connection;
mod corpus;
mod error;
mod familiar;
mod generation;
mod grammars;
mod guessing;
mod hub;
mod interrupts;
mod lines;
mod loading;
mod logging;
mod output;
mod prefill;
mod progress;
mod prompt;
mod sampling;
mod shape;
mod target;
mod top;
mod training;
mod view;
mod warnings;
mod wire;

use cap::Cap;
use clap::Parser as _;
use std::alloc::System;
use std::process::ExitCode;

/// Without a limit in all processes but `mlxnode sandbox`: see `commands::sandbox`.
#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, usize::MAX);

fn main() -> ExitCode {
    let arguments = arguments::Arguments::parse();
    logging::start(&arguments);
    match commands::run(arguments) {
        Ok(code) => code,
        Err(error) => error::report(&error),
    }
}
