//! Vocabularies of models without a tokenizer.json: sentencepiece's tokenizer.model, those of tiktoken, Mistral's tekken.json, and
//! GPT-2's pair of files.
#![no_main]

use cap::Cap;
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use mlxnode_fuzz::{mutation, panics, parts, text};
use std::alloc::System;

#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, 512 << 20);

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutation::mutate(data, size, max_size, seed, fuzzer_mutate)
});

fuzz_target!(init: panics::let_guards_catch(), |data: &[u8]| {
    let parts = parts::split(data);
    let Ok(files) = text::files(&parts) else { return };
    match text::tokenizer(&files) {
        Ok(tokenizer) => text::use_up(&tokenizer, &text::part(&parts, "text"), &text::ids(&parts)),
        Err(error) => drop(error.to_string()),
    }
});
