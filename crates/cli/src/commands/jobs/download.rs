//! `mlxnode jobs download`: what a job made, into a folder.

use crate::arguments::Global;
use crate::connection::Connection;
use crate::{output, progress};
use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use mlxnode_proto::v1::DownloadJobRequest;
use serde_json::json;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// Download what a job made (so far): an adapter as mlx-lm reads it.
#[derive(Debug, Args)]
pub struct Download {
    /// The job's id.
    id: String,
    /// The folder, which is made. Default: the job's id.
    #[arg(long, value_name = "FOLDER")]
    to: Option<PathBuf>,
    /// The checkpoint after so many steps. Default: the newest.
    #[arg(long, value_name = "N")]
    step: Option<u64>,
    /// All that the job would go on from as well.
    #[arg(long)]
    state: bool,
}

/// A file on its way.
struct Incoming {
    name: String,
    bytes: u64,
    hash: Vec<u8>,
    received: u64,
    hasher: blake3::Hasher,
    file: File,
}

impl Download {
    pub async fn run(self, connection: &Connection, global: &Global) -> Result<()> {
        let folder = self.to.unwrap_or_else(|| PathBuf::from(&self.id));
        let request = DownloadJobRequest {
            id: self.id.clone(),
            step: self.step.unwrap_or_default(),
            state: self.state,
        };
        let mut pieces = connection.jobs().download(request).await?.into_inner();
        let bar = progress::Bar::new(&self.id, global.quiet || global.json);
        let (mut names, mut open) = (Vec::new(), None::<Incoming>);
        while let Some(piece) = pieces.message().await? {
            if !piece.name.is_empty() {
                finish(open.take())?;
                names.push(piece.name.clone());
                let path = folder.join(checked(&piece.name)?);
                let parent = path.parent().unwrap_or(&folder);
                fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
                let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
                open = Some(Incoming {
                    name: piece.name,
                    bytes: piece.bytes,
                    hash: piece.hash.to_vec(),
                    received: 0,
                    hasher: blake3::Hasher::new(),
                    file,
                });
            }
            if let Some(incoming) = &mut open {
                let written = incoming.file.write_all(&piece.data);
                written.with_context(|| format!("cannot write {}", incoming.name))?;
                incoming.hasher.update(&piece.data);
                incoming.received += piece.data.len() as u64;
                bar.show(incoming.received, incoming.bytes);
                bar.say(&incoming.name);
            }
        }
        finish(open)?;
        drop(bar);
        match global.json {
            true => output::json(&json!({ "folder": folder, "files": names })),
            false => output::line(&format!("{} files are in {}.", names.len(), folder.display())),
        }
    }
}

/// A name that stays in the folder.
fn checked(name: &str) -> Result<&Path> {
    let parts: Vec<&str> = name.split('/').collect();
    let is_plain = |part: &&str| !part.is_empty() && !part.starts_with('.') && !part.contains(['\\', '\0']);
    if parts.len() > 2 || !parts.iter().all(is_plain) {
        bail!("the node sends a file named {name:?}");
    }
    Ok(Path::new(name))
}

fn finish(incoming: Option<Incoming>) -> Result<()> {
    let Some(Incoming { name, bytes, hash, received, hasher, .. }) = incoming else { return Ok(()) };
    ensure!(
        received == bytes && hasher.finalize().as_bytes().as_slice() == hash,
        "{name} came damaged: download it again"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_stays_in_its_folder() {
        assert!(checked("adapters.safetensors").is_ok() && checked("state/moments").is_ok());
        for name in ["../x", "/etc/passwd", "a/b/c", "", ".ssh", "state/.x"] {
            assert!(checked(name).is_err(), "{name}");
        }
    }
}
