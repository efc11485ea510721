//! The flags that say what an answer has to look like, which functions it may call, and which adapter gives it.

use crate::generation::Shape;
use crate::prompt;
use anyhow::{Context as _, Result, bail};
use clap::Args;
use mlxnode_compute::Grammar;
use mlxnode_text::grammar::{ToolChoice, functions};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Schemas, grammars and lists of functions are written by hand, more or less.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// Such flags.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Form of the answer")]
pub struct ShapeFlags {
    /// The answer is JSON by the JSON Schema in this file. "-" reads it from stdin.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["regex", "lark"])]
    json_schema: Option<String>,
    /// The whole answer matches this regular expression. For models that do not reason, or with --ignore-chat-template.
    #[arg(long, value_name = "PATTERN", conflicts_with = "lark", allow_hyphen_values = true)]
    regex: Option<String>,
    /// The whole answer follows the grammar in this file, in llguidance's dialect of Lark; for the same models.
    #[arg(long, value_name = "FILE")]
    lark: Option<PathBuf>,
    /// Functions that the model may call: a file with a JSON list, as OpenAI's `tools` has it.
    #[arg(long, value_name = "FILE")]
    tools: Option<PathBuf>,
    /// Whether it has to: auto, none, required, or the name of the function.
    #[arg(long, value_name = "WORD", requires = "tools")]
    tool_choice: Option<String>,
    /// Name of an adapter of the loaded model; on a cluster only, --adapter-path is for this process.
    #[arg(long, value_name = "NAME")]
    adapter: Option<String>,
}

impl ShapeFlags {
    /// The functions, and everything else, read.
    pub fn read(&self) -> Result<(Option<Vec<Value>>, Shape)> {
        let tools = self.tools.as_deref().map(tools).transpose()?;
        let format = match (&self.json_schema, &self.regex, &self.lark) {
            (Some(file), ..) => Some(Grammar::JsonSchema(schema(file)?)),
            (_, Some(pattern), _) => Some(Grammar::Regex(pattern.clone())),
            (.., Some(file)) => Some(Grammar::Lark(text(file)?)),
            _ => None,
        };
        let choice = match (self.tool_choice.as_deref(), &tools) {
            (_, None) | (Some("none"), _) => ToolChoice::None,
            (None | Some("auto"), _) => ToolChoice::Auto,
            (Some("required"), _) => ToolChoice::Required,
            (Some(name), Some(tools)) => {
                if !functions(tools).any(|(function, _)| function == name) {
                    bail!(
                        "--tool-choice is {name}, but must be auto, none, required or a function of --tools"
                    );
                }
                ToolChoice::Named(name.to_owned())
            }
        };
        Ok((tools, Shape { format, choice, adapter: self.adapter.clone() }))
    }

    /// The schema comes from stdin.
    pub fn reads_stdin(&self) -> bool {
        self.json_schema.as_deref() == Some("-")
    }

    /// Functions are given, which only conversations have.
    pub fn has_tools(&self) -> bool {
        self.tools.is_some()
    }
}

fn schema(file: &str) -> Result<String> {
    let text = if file == "-" { prompt::stdin()? } else { text(Path::new(file))? };
    let schema: Value = serde_json::from_str(&text)
        .with_context(|| format!("the schema of --json-schema {file} is not JSON"))?;
    if !schema.is_object() && !schema.is_boolean() {
        bail!("the schema of --json-schema {file} is no JSON object");
    }
    Ok(schema.to_string())
}

fn tools(file: &Path) -> Result<Vec<Value>> {
    let list: Vec<Value> = serde_json::from_str(&text(file)?)
        .with_context(|| format!("--tools {}: not a JSON list of functions", file.display()))?;
    let named = functions(&list).count();
    if named != list.len() || list.is_empty() {
        bail!(
            "--tools {}: each entry must be {{\"type\": \"function\", \"function\": {{\"name\": …, \"parameters\": …}}}}",
            file.display()
        );
    }
    Ok(list)
}

fn text(file: &Path) -> Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    let opened = std::fs::File::open(file).with_context(|| format!("cannot read {}", file.display()))?;
    opened
        .take(MAX_FILE_BYTES + 1)
        .read_to_string(&mut text)
        .with_context(|| format!("cannot read {} as text", file.display()))?;
    if text.len() as u64 > MAX_FILE_BYTES {
        bail!("{} is larger than {} MiB", file.display(), MAX_FILE_BYTES >> 20);
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOOLS: &str =
        r#"[{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]"#;

    #[derive(clap::Parser)]
    struct Flags {
        #[command(flatten)]
        shape: ShapeFlags,
    }

    fn read(flags: &[&str]) -> Result<(Option<Vec<Value>>, Shape)> {
        let words = ["x"].iter().chain(flags).copied();
        <Flags as clap::Parser>::try_parse_from(words)?.shape.read()
    }

    #[test]
    fn files_become_formats_and_functions() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let (schema, tools) = (write("schema.json", "{\"type\": \"object\"}\n"), write("tools.json", TOOLS));
        let (lark, list) = (write("x.lark", "start: \"x\""), write("list.json", "[1]"));
        assert_eq!(read(&[]).unwrap().1, Shape::default());
        let format = |flags: &[&str]| read(flags).unwrap().1.format.unwrap();
        assert_eq!(format(&["--json-schema", &schema]), Grammar::JsonSchema("{\"type\":\"object\"}".into()));
        assert_eq!(format(&["--regex", "-?[0-9]"]), Grammar::Regex("-?[0-9]".into()));
        assert_eq!(format(&["--lark", &lark]), Grammar::Lark("start: \"x\"".into()));
        for (word, choice) in [
            ("auto", ToolChoice::Auto),
            ("none", ToolChoice::None),
            ("required", ToolChoice::Required),
            ("add", ToolChoice::Named("add".into())),
        ] {
            let (offered, shape) = read(&["--tools", &tools, "--tool-choice", word]).unwrap();
            assert_eq!((offered.map(|tools| tools.len()), shape.choice), (Some(1), choice));
        }
        let wrong: [(&[&str], &str); 5] = [
            (&["--json-schema", &lark], "is not JSON"),
            (&["--json-schema", &list], "is no JSON object"),
            (&["--tools", &list], "each entry must be"),
            (&["--tools", &tools, "--tool-choice", "divide"], "divide"),
            (&["--lark", "/no/such/file"], "/no/such/file"),
        ];
        for (flags, words) in wrong {
            let error = format!("{:#}", read(flags).unwrap_err());
            assert!(error.contains(words), "{flags:?}: {error}");
        }
        assert!(read(&["--regex", "x", "--lark", &lark]).is_err(), "one format at a time");
    }
}
