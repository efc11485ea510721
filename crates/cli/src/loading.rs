//! A model's folder, loaded into this process.

use crate::adapter::AdapterFlag;
use crate::{progress, warnings};
use anyhow::{Context as _, Result};
use mlxnode_checkpoint::Checkpoint;
use mlxnode_engine::Model;
use mlxnode_text::{ChatTemplate, Sandbox, TextFiles, Tokenizer};
use std::path::Path;
use std::sync::Arc;

/// A model and what turns text into its tokens. MLX belongs to the thread that loaded it.
pub struct Loaded {
    pub model: Model,
    pub files: TextFiles,
    pub tokenizer: Tokenizer,
    pub template: Option<ChatTemplate>,
}

/// Where a model's chat template is carried out. Its process starts while the tokenizer is read.
#[cfg(not(test))]
fn sandbox() -> Result<Arc<dyn Sandbox>> {
    use mlxnode_sandbox::{SandboxOptions, SandboxProcess};
    let command = std::env::current_exe().context("cannot find my own executable for the sandbox")?;
    let sandbox = SandboxProcess::new(SandboxOptions::new(command));
    let starting = sandbox.clone();
    std::thread::spawn(move || starting.prepare());
    Ok(Arc::new(sandbox))
}

/// The program of the unit tests is none that could be started as a sandbox.
#[cfg(test)]
fn sandbox() -> Result<Arc<dyn Sandbox>> {
    Ok(Arc::new(mlxnode_text::InProcess::default()))
}

/// What turns text into a model's tokens, and the model itself, of which only what describes it was read.
pub struct Opened {
    pub tokenizer: Tokenizer,
    pub template: Option<ChatTemplate>,
    pub checkpoint: Checkpoint,
}

/// Reads all but the weights.
pub fn open(folder: &Path) -> Result<Opened> {
    let unusable = || format!("cannot use the model in {}", folder.display());
    let files = TextFiles::read(folder).with_context(unusable)?;
    let sandbox = sandbox()?;
    let checkpoint = Checkpoint::open(folder).with_context(unusable)?;
    let tokenizer = Tokenizer::from_files(&files).with_context(unusable)?;
    let template = ChatTemplate::from_files(&files, &tokenizer, sandbox).with_context(unusable)?;
    Ok(Opened { tokenizer, template, checkpoint })
}

/// Loads all of it, changed by an adapter if there is one, with a bar on stderr.
pub fn load(folder: &Path, adapter: &AdapterFlag, quiet: bool) -> Result<Loaded> {
    let unusable = || format!("cannot use the model in {}", folder.display());
    // The small files first: what is wrong with them shows before gigabytes are read.
    let files = TextFiles::read(folder).with_context(unusable)?;
    let sandbox = sandbox()?;
    let checkpoint = Checkpoint::open(folder).with_context(unusable)?;
    let tokenizer = Tokenizer::from_files(&files).with_context(unusable)?;
    let template = ChatTemplate::from_files(&files, &tokenizer, sandbox).with_context(unusable)?;
    let opened = adapter.open(&checkpoint)?;
    let mut model = weights(&checkpoint, quiet).with_context(unusable)?;
    adapter.apply(opened.as_ref(), &checkpoint, &mut model)?;
    Ok(Loaded { model, files, tokenizer, template })
}

/// Loads only the weights.
pub fn weights(checkpoint: &Checkpoint, quiet: bool) -> Result<Model> {
    let bar = progress::Bar::new("loading", quiet);
    let model = Model::load_whole(checkpoint, &mut |done, total| bar.show(done, total))?;
    drop(bar);
    warnings::notes(checkpoint.notes(), quiet);
    Ok(model)
}
