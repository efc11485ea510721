//! Lists the files of demo-model/model, which the crate embeds.

use std::fmt::Write;
use std::path::Path;
use std::{env, fs};

/// What a model's folder is made of; anything else there is somebody's work in progress.
const KINDS: [&str; 4] = [".json", ".safetensors", ".txt", ".jinja"];

fn main() {
    let root = env::var("CARGO_MANIFEST_DIR").expect("cargo sets it");
    let folder = Path::new(&root).join("demo-model/model");
    // A path that does not exist would make cargo run this every time, so watch what is there.
    println!("cargo:rerun-if-changed={}", if folder.is_dir() { "demo-model/model" } else { "demo-model" });
    let mut names: Vec<String> = match fs::read_dir(&folder) {
        Ok(entries) => entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| !name.starts_with('.') && KINDS.iter().any(|kind| name.ends_with(kind)))
            .collect(),
        Err(_) => Vec::new(),
    };
    names.sort();
    let mut code = String::from("&[\n");
    for name in names {
        let path = format!("/demo-model/model/{name}");
        writeln!(code, "    ({name:?}, include_bytes!(concat!(env!(\"CARGO_MANIFEST_DIR\"), {path:?}))),")
            .expect("writing to a string");
    }
    code.push_str("]\n");
    let out = env::var("OUT_DIR").expect("cargo sets it");
    fs::write(Path::new(&out).join("demo_files.rs"), code).expect("OUT_DIR can be written");
}
