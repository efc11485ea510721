//! `mlxnode cache-prompt`: processes a prompt once, for `mlxnode generate` to go on from.

use crate::adapter::AdapterFlag;
use crate::arguments::Global;
use crate::caching::CacheFlags;
use crate::familiar::FamiliarFlags;
use crate::loading::{self, Loaded};
use crate::prefill::PrefillFlags;
use crate::{hub, output, progress, prompt, warnings};
use anyhow::{Context as _, Result};
use clap::Args;
use mlxnode_compute::ByteCount;
use mlxnode_engine::{Generator, GeneratorOptions, PromptCacheNotes};
use mlxnode_text::{ChatRequest, Message};
use serde::Serialize;
use std::path::PathBuf;
use std::time::Instant;

/// Process a prompt and keep what the model remembers of it in a file.
///
/// `mlxnode generate --prompt-cache-file FILE` goes on from there any number of times, without processing the prompt again; mlx-lm
/// reads the file too. The prompt becomes the beginning of the user's message. Runs in this process.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mlxnode cache-prompt --model mlx-community/Qwen3-0.6B-4bit --prompt - --prompt-cache-file book.safetensors < book.txt
  mlxnode generate --prompt-cache-file book.safetensors -p \"\\nWho is the narrator?\"")]
pub struct CachePrompt {
    /// A folder, a Hugging Face id (OWNER/NAME or OWNER/NAME@REVISION), or demo.
    #[arg(long, value_name = "MODEL", default_value = "demo")]
    model: String,
    /// The file to write, *.safetensors.
    #[arg(long, value_name = "FILE", value_parser = safetensors)]
    prompt_cache_file: PathBuf,
    /// The prompt. "-" reads it from stdin.
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: String,
    /// A token that ends answers, noted in the file.
    #[arg(long, value_name = "TOKEN")]
    eos_token: Option<String>,
    #[command(flatten)]
    prefill: PrefillFlags,
    #[command(flatten)]
    cache: CacheFlags,
    #[command(flatten)]
    adapter: AdapterFlag,
    #[command(flatten)]
    familiar: FamiliarFlags,
}

/// What `--json` prints. The names are a contract: scripts rely on them.
#[derive(Serialize)]
struct Report {
    file: PathBuf,
    model: String,
    prompt_tokens: usize,
    prompt_tps: f64,
    bytes: u64,
    peak_memory_bytes: u64,
}

impl CachePrompt {
    pub fn run(self, global: &Global) -> Result<()> {
        self.familiar.check(global)?;
        let text = if self.prompt == "-" { prompt::stdin()? } else { self.prompt.clone() };
        let folder = hub::folder(&self.model, global.quiet)?;
        let loaded = loading::load(&folder, &self.adapter, global.quiet)?;
        let tokens = tokens(&text, &loaded)?;
        let eos_token = self.eos_token.as_deref();
        if let Some(token) = eos_token {
            loaded.tokenizer.parse_token(token).context("--eos-token cannot be used")?;
        }
        let options = GeneratorOptions { prefill_step: self.prefill.step(), cache: self.cache.options() };
        let mut generator = Generator::new(loaded.model, options)?;
        let mut cache = generator.new_cache()?;
        let bar = progress::Bar::counting("processing", global.quiet);
        let started = Instant::now();
        generator.fill(&mut cache, &tokens, &mut |done, total| bar.show(done as u64, total as u64))?;
        let seconds = started.elapsed().as_secs_f64();
        drop(bar);

        let mut config = serde_json::json!({"trust_remote_code": false});
        if let Some(token) = eos_token {
            config["eos_token"] = token.into();
        }
        let notes = PromptCacheNotes {
            model: Some(self.model.clone()),
            tokenizer_config: Some(config.to_string()),
            ..PromptCacheNotes::default()
        };
        cache.save(generator.model(), &notes, &self.prompt_cache_file)?;
        let bytes = self.prompt_cache_file.metadata().context("cannot look at the file")?.len();
        let report = Report {
            file: self.prompt_cache_file,
            model: self.model,
            prompt_tokens: tokens.len(),
            prompt_tps: tokens.len() as f64 / seconds.max(f64::MIN_POSITIVE),
            bytes,
            peak_memory_bytes: generator.model().device().memory()?.peak as u64,
        };
        if global.json {
            return output::json(&report);
        }
        if !global.quiet {
            warnings::text(&format!(
                "Prompt: {} tokens, {:.3} tokens-per-sec\nPeak memory: {:.3} GB\n",
                report.prompt_tokens,
                report.prompt_tps,
                report.peak_memory_bytes as f64 / 1e9
            ));
        }
        output::line(&format!("{}: {} tokens, {}", report.file.display(), tokens.len(), ByteCount(bytes)))
    }
}

/// The beginning of the user's message as the model sees it, left open. mlx-lm's rule.
fn tokens(text: &str, loaded: &Loaded) -> Result<Vec<u32>> {
    let Some(template) = &loaded.template else { return Ok(loaded.tokenizer.encode(text, true)?) };
    let request = ChatRequest { messages: vec![Message::new("user", text)], ..ChatRequest::default() };
    Ok(loaded.tokenizer.encode(&template.render_open(&request)?, false)?)
}

/// mlx-lm knows the format by the name.
fn safetensors(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    match path.extension() {
        Some(kind) if kind == "safetensors" => Ok(path),
        _ => Err("its name must end in .safetensors".to_owned()),
    }
}
