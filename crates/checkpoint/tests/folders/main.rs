//! Whole model folders: good ones, damaged ones, and ones damaged at random.

mod bad_input;
mod good;
mod mutations;
mod tiny;
