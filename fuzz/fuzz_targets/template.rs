//! A hostile chat template and a hostile conversation, in the sandbox that nodes use.
//!
//! This program is its own sandbox process, as `mlxnode` is. What the sandbox ends for its memory or its time has ended well.
//! The rest is rendered in this process too: libFuzzer sees only what runs here, and both must say the same.
#![no_main]

use cap::Cap;
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use mlxnode_fuzz::{mutation, panics, parts, text};
use mlxnode_sandbox::{SandboxOptions, SandboxProcess};
use mlxnode_text::{ChatRequest, ChatTemplate, InProcess, Message, Sandbox, TextError, TextFiles, Tokenizer};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::alloc::System;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

/// Here more than the sandbox has: what it carries out fits beside the corpus.
#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, 1 << 30);

static SANDBOX: LazyLock<Arc<dyn Sandbox>> = LazyLock::new(|| {
    let command = std::env::current_exe().unwrap_or_default();
    // A quarter of a node's: time that hostile templates take is not spent on others.
    let template_time = Duration::from_millis(500);
    Arc::new(SandboxProcess::new(SandboxOptions { template_time, ..SandboxOptions::new(command) }))
});

/// A conversation as the seeds write it.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Conversation {
    messages: Vec<Message>,
    tools: Option<Vec<Value>>,
    documents: Option<Vec<Value>>,
    add_generation_prompt: bool,
    continue_final: Option<String>,
    thinking: Option<bool>,
    arguments: Map<String, Value>,
}

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutation::mutate(data, size, max_size, seed, fuzzer_mutate)
});

fuzz_target!(init: begin(), |data: &[u8]| {
    let parts = parts::split(data);
    let Ok(files) = text::files(&parts) else { return };
    let Ok(tokenizer) = text::tokenizer(&files) else { return };
    let written: Conversation = serde_json::from_str(&text::part(&parts, "conversation.json")).unwrap_or_default();
    let request = ChatRequest {
        messages: written.messages,
        tools: written.tools,
        documents: written.documents,
        add_generation_prompt: written.add_generation_prompt,
        continue_final: written.continue_final,
        thinking: written.thinking,
        arguments: written.arguments,
    };

    let Some(rendered) = ended_well(render(&files, &tokenizer, &request, SANDBOX.clone())) else { return };
    if let Ok(Some(prompt)) = &rendered {
        // Four times what went in, the allowance of a mebibyte, and what the context repeats of the reasoning.
        assert!(prompt.len() <= 16 * data.len() + (2 << 20), "a prompt of {} bytes", prompt.len());
    }
    let here = render(&files, &tokenizer, &request, Arc::new(InProcess::default()));
    if !String::from_utf8_lossy(data).contains("strftime_now") {
        let [rendered, here] = [&rendered, &here].map(|one| one.as_ref().map_err(ToString::to_string));
        assert_eq!(rendered, here, "in the sandbox, and in this process");
    }
});

/// Text and, for its own sake, token ids of the conversation; none without a template.
fn render(
    files: &TextFiles,
    tokenizer: &Tokenizer,
    request: &ChatRequest,
    sandbox: Arc<dyn Sandbox>,
) -> Result<Option<String>, TextError> {
    let Some(template) = ChatTemplate::from_files(files, tokenizer, sandbox)? else { return Ok(None) };
    let text = template.render(request)?;
    match template.encode(request, tokenizer) {
        Err(error) if is_of_the_sandbox(&error) => Err(error),
        _ => Ok(Some(text)),
    }
}

/// None for what the sandbox ended, which need not end by itself in this process.
fn ended_well(rendered: Result<Option<String>, TextError>) -> Option<Result<Option<String>, TextError>> {
    match rendered {
        Err(error @ (TextError::Sandbox { .. } | TextError::SandboxBusy)) => panic!("{error}"),
        Err(error) if is_of_the_sandbox(&error) => None,
        other => Some(other),
    }
}

fn is_of_the_sandbox(error: &TextError) -> bool {
    matches!(
        error,
        TextError::TemplateMemory { .. }
            | TextError::TemplateTooSlow { .. }
            | TextError::Sandbox { .. }
            | TextError::SandboxBusy
    )
}

fn begin() {
    if std::env::args().nth(1).as_deref() == Some("sandbox") {
        panics::end_on_ours();
        let served = mlxnode_sandbox::serve(|bytes| MEMORY.set_limit(bytes).is_ok());
        std::process::exit(i32::from(served.is_err()));
    }
    panics::let_guards_catch();
}
