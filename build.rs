//! Compiles the .proto files to Rust with protox, so that nobody needs protoc installed.

use prost::Message as _;
use std::path::{Path, PathBuf};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = Path::new("proto");
    println!("cargo:rerun-if-changed=proto");
    let mut files = Vec::new();
    collect(&root.join("mlxnode"), &mut files)?;
    files.sort();
    let descriptors = protox::compile(&files, [root])?;
    // The public API answers gRPC reflection from these bytes.
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .bytes(".") // tensor bytes are shared, never copied
        .compile_fds(descriptors)?;
    Ok(())
}

/// Finds every .proto file under `folder`, so that a new file needs no edit here.
fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|ending| ending == "proto") {
            files.push(path);
        }
    }
    Ok(())
}
