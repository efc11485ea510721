//! `mlxnode fuse`: makes an adapter part of its model.

use crate::arguments::Global;
use crate::familiar::FamiliarFlags;
use crate::progress::Bar;
use crate::{hub, output, warnings};
use anyhow::{Context as _, Result, bail};
use clap::Args;
use mlxnode_checkpoint::Checkpoint;
use serde_json::json;
use std::path::PathBuf;

/// Fuse an adapter into its model: a model of its own, which needs no adapter any more.
///
/// Takes LoRA and DoRA adapters, as mlx-lm or PEFT write them, and full fine-tunes. Packed matrices are unpacked, changed and packed again as
/// they were; since that rounds, a small change may be lost there: with --dequantize nothing is packed afterwards, or choose the adapter
/// beside the model instead (`mlxnode adapters load`).
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mlxnode fuse --model mlx-community/Qwen3-0.6B-4bit --adapter-path adapters --save-path qwen-poet
  mlxnode load ./qwen-poet")]
pub struct Fuse {
    /// A folder, or a Hugging Face id (OWNER/NAME).
    #[arg(long, value_name = "MODEL", default_value = "mlx_model")]
    model: String,
    /// The folder with the adapter.
    #[arg(long, value_name = "FOLDER", default_value = "adapters")]
    adapter_path: PathBuf,
    /// Where the model goes: a new folder, or an empty one.
    #[arg(long, value_name = "FOLDER", default_value = "fused_model")]
    save_path: PathBuf,
    /// Pack nothing: all weights are floating-point numbers afterwards.
    #[arg(long, alias = "de-quantize")]
    dequantize: bool,
    #[arg(long, hide = true)]
    export_gguf: bool,
    #[arg(long, hide = true, value_name = "FILE")]
    gguf_path: Option<PathBuf>,
    #[arg(long, hide = true, value_name = "REPOSITORY")]
    upload_repo: Option<String>,
    #[command(flatten)]
    familiar: FamiliarFlags,
}

impl Fuse {
    pub fn run(self, global: &Global) -> Result<()> {
        self.familiar.check(global)?;
        if self.export_gguf || self.gguf_path.is_some() {
            bail!(
                "GGUF files are not written; leave --export-gguf out and convert the fused model with llama.cpp's \
                 convert_hf_to_gguf.py (give --dequantize, too, if the model is quantized)"
            );
        }
        if let Some(repository) = &self.upload_repo {
            bail!(
                "nothing is uploaded; leave --upload-repo out and send the folder with `hf upload {repository} {}`",
                self.save_path.display()
            );
        }
        let folder = hub::folder(&self.model, global.quiet)?;
        let checkpoint =
            Checkpoint::open(&folder).with_context(|| format!("cannot use the model {}", self.model))?;
        warnings::notes(checkpoint.notes(), global.quiet);
        let bar = Bar::counting("fusing", global.quiet);
        let fused = mlxnode_training::fuse(
            &checkpoint,
            &self.adapter_path,
            &self.save_path,
            self.dequantize,
            &|done, total| bar.show(done, total),
        );
        drop(bar);
        let fused =
            fused.with_context(|| format!("cannot fuse the adapter in {}", self.adapter_path.display()))?;
        if global.json {
            return output::json(&json!({
                "folder": self.save_path, "changed": fused.changed, "packed_again": fused.packed_again,
            }));
        }
        let again = match fused.packed_again {
            0 => String::new(),
            count => format!(", {count} of them packed again"),
        };
        output::line(&format!("{}: {} changes fused{again}.", self.save_path.display(), fused.changed))
    }
}
