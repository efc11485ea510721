//! The sandbox with real children: hostile templates, kill -9, the death of the parent.
//!
//! This program is all three parties: without arguments the test, with `sandbox` the child that `mlxnode sandbox` is, with
//! `node` a parent that holds one child until it is killed.
#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop
#![allow(clippy::print_stdout)] // it speaks for the test harness, and as a parent to the test

use cap::Cap;
use mlxnode_sandbox::{SandboxOptions, SandboxProcess};
use mlxnode_text::{ChatRequest, ChatTemplate, InProcess, Message, Sandbox, TextError, TextFiles, Tokenizer};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::alloc::System;
use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, usize::MAX);

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("sandbox") => {
            return match mlxnode_sandbox::serve(|bytes| MEMORY.set_limit(bytes).is_ok()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            };
        }
        Some("node") => node(),
        _ => {}
    }
    let tests: [(&str, fn()); 12] = [
        ("renders_as_in_one_process", renders_as_in_one_process),
        ("a_string_that_doubles_ends_the_child_and_not_us", a_string_that_doubles_ends_the_child_and_not_us),
        ("hostile_templates_end_soon_and_clearly", hostile_templates_end_soon_and_clearly),
        ("what_runs_too_long_is_ended", what_runs_too_long_is_ended),
        ("an_innocent_request_survives_kill_9", an_innocent_request_survives_kill_9),
        ("many_at_once_get_their_own_text", many_at_once_get_their_own_text),
        ("who_finds_the_queue_full_is_told", who_finds_the_queue_full_is_told),
        ("mistakes_show_when_a_template_is_loaded", mistakes_show_when_a_template_is_loaded),
        ("the_death_of_the_parent_ends_the_child", the_death_of_the_parent_ends_the_child),
        ("the_last_handle_ends_the_child", the_last_handle_ends_the_child),
        ("what_is_no_sandbox_is_refused", what_is_no_sandbox_is_refused),
        ("tokenizers_are_tried_first", tokenizers_are_tried_first),
    ];
    let names: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    for (name, test) in tests {
        if names.is_empty() || names.iter().any(|wanted| name.contains(wanted.as_str())) {
            test(); // a failure panics, and the program ends with it
            println!("test {name} ... ok");
        }
    }
    ExitCode::SUCCESS
}

/// Prints its child's process id and waits to be killed.
fn node() {
    let sandbox = sandbox();
    sandbox.prepare();
    println!("{}", sandbox.child_id().unwrap());
    loop {
        std::thread::park();
    }
}

fn options() -> SandboxOptions {
    SandboxOptions::new(std::env::current_exe().unwrap())
}

fn sandbox() -> SandboxProcess {
    SandboxProcess::new(options())
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../text/tests/golden")
}

fn files(template: &str) -> TextFiles {
    let tokenizer = std::fs::read(golden().join("tokenizers/byte_level/tokenizer.json")).unwrap();
    let files = [("tokenizer.json", tokenizer), ("chat_template.jinja", template.as_bytes().to_vec())];
    TextFiles::from_map(files.map(|(name, bytes)| (name.to_owned(), bytes)).into()).unwrap()
}

fn template(source: &str, sandbox: impl Sandbox + 'static) -> Result<ChatTemplate, TextError> {
    let files = files(source);
    let tokenizer = Tokenizer::from_files(&files)?;
    ChatTemplate::from_files(&files, &tokenizer, Arc::new(sandbox))?.ok_or(TextError::NoChatTemplate)
}

fn user(text: &str) -> ChatRequest {
    ChatRequest { messages: vec![Message::new("user", text)], ..ChatRequest::default() }
}

fn is_running(pid: u32) -> bool {
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), None) != Err(Errno::ESRCH)
}

fn eventually(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// About so many copies of eight megabytes: work that costs no fuel.
fn copies(count: u32) -> String {
    format!(
        "{{% set ns = namespace(x='é' * 4000000) %}}{{% for i in range({count}) %}}{{% set ns.y = ns.x ~ 'a' %}}{{% endfor %}}\
         {{{{ messages[0].content }}}}"
    )
}

/// A thousand renderings of the golden conversations, refusals included.
fn renders_as_in_one_process() {
    let cases: Vec<Value> =
        serde_json::from_slice(&std::fs::read(golden().join("conversations.json")).unwrap()).unwrap();
    let sandbox = sandbox();
    let mut pairs = Vec::new();
    for case in &cases {
        let name = case["template"].as_str().unwrap();
        let source = std::fs::read_to_string(golden().join(format!("templates/{name}.jinja"))).unwrap();
        let written = &case["request"];
        let request = ChatRequest {
            messages: serde_json::from_value(written["messages"].clone()).unwrap(),
            tools: serde_json::from_value(written["tools"].clone()).unwrap(),
            documents: serde_json::from_value(written["documents"].clone()).unwrap(),
            add_generation_prompt: written["add_generation_prompt"] == json!(true),
            continue_final: serde_json::from_value(written["continue_final"].clone()).unwrap(),
            arguments: written["arguments"].as_object().cloned().unwrap_or_default(),
            ..ChatRequest::default()
        };
        let here = template(&source, InProcess::default()).unwrap();
        pairs.push((here, template(&source, sandbox.clone()).unwrap(), request));
    }
    let (mut count, mut here, mut there) = (0, Duration::ZERO, Duration::ZERO);
    while count < 1000 {
        for (at_home, abroad, request) in &pairs {
            let times = 8; // in a row, as a model's conversations come
            for _ in 0..times {
                let started = Instant::now();
                let expected = at_home.render(request);
                here += started.elapsed();
                let started = Instant::now();
                let rendered = abroad.render(request);
                there += started.elapsed();
                match (rendered, expected) {
                    (Ok(text), Ok(expected)) => assert_eq!(text, expected),
                    (Err(error), Err(expected)) => assert_eq!(error.to_string(), expected.to_string()),
                    (rendered, expected) => panic!("{rendered:?} instead of {expected:?}"),
                }
            }
            count += times;
        }
    }
    let more = there.saturating_sub(here) / count;
    println!("{count} renderings, each {more:?} longer than in one process ({:?})", here / count);
    assert!(more < Duration::from_millis(20), "each took {more:?} longer"); // on the busiest machine
}

fn a_string_that_doubles_ends_the_child_and_not_us() {
    let sandbox = sandbox();
    let doubling =
        "{% set ns = namespace(x='ab') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}";
    let honest = template("{{ messages[0].content }}", sandbox.clone()).unwrap();
    for _ in 0..3 {
        let error = template(doubling, sandbox.clone()).unwrap().render(&user("x")).unwrap_err();
        assert!(matches!(error, TextError::TemplateMemory { mebibytes: 256, .. }), "{error}");
        let text = error.to_string();
        let begins = "the model's chat template (chat_template.jinja) asked for more than 256 MiB of memory";
        assert!(text.starts_with(begins), "{text}");
        assert_eq!(honest.render(&user("still here")).unwrap(), "still here");
    }
}

/// Each ends in an error that names the template, and the next rendering is as if nothing had been.
fn hostile_templates_end_soon_and_clearly() {
    let sandbox = sandbox();
    let honest = template("{{ messages[0].content }}", sandbox.clone()).unwrap();
    let lists = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x|list|length }}";
    let nested = "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}";
    let deep = format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000));
    let sources = [
        lists,
        nested,
        deep.as_str(),
        "{% set ns = namespace(x='ab') %}{% for i in range(40) %}{% set ns.x = ns.x|replace('a', ns.x) %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x]|join(ns.x) %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(40) %}{% set ns.x = ns.x|tojson ~ ns.x|urlencode %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|tojson }}",
        "{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f('ab') }}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{% for i in range(100000) %}{{ 'x' * 10000 }}{% endfor %}",
        "{{ ('x' * 10000000) ~ ('y' * 10000000) }}",
        "{{ range(100000)|list|batch(1)|list|tojson * 900 }}",
        "{{ 'x' | indent(1000000000) }}",
        "{% include 'chat template' %}",
    ];
    for source in sources {
        let started = Instant::now();
        let error = template(source, sandbox.clone()).and_then(|template| template.render(&user("x")));
        let took = started.elapsed();
        let shown: String = source.chars().take(100).collect();
        let error = error.map(|text| text.len()).unwrap_err();
        assert!(took < Duration::from_secs(15), "{shown}: {took:?}");
        let is_clear = matches!(
            error,
            TextError::Template { .. }
                | TextError::TemplateMemory { .. }
                | TextError::TemplateTooSlow { .. }
                | TextError::TemplateOutput { .. }
        );
        assert!(is_clear, "{shown}: {error:?}");
        println!("   {shown}: {error} ({took:?})");
        assert_eq!(honest.render(&user("next")).unwrap(), "next");
    }
}

fn what_runs_too_long_is_ended() {
    let sandbox =
        SandboxProcess::new(SandboxOptions { template_time: Duration::from_millis(300), ..options() });
    let endless = template(&copies(90_000), sandbox.clone()).unwrap();
    let before = sandbox.child_id().unwrap();
    let started = Instant::now();
    let error = endless.render(&user("x")).unwrap_err();
    assert!(matches!(error, TextError::TemplateTooSlow { .. }), "{error}");
    let took = started.elapsed();
    assert!(took >= Duration::from_millis(300) && took < Duration::from_secs(10), "{took:?}");
    assert!(!is_running(before), "the child is waited for");
    let honest = template("{{ messages[0].content }}", sandbox).unwrap();
    assert_eq!(honest.render(&user("next")).unwrap(), "next");
}

fn an_innocent_request_survives_kill_9() {
    let sandbox = SandboxProcess::new(SandboxOptions { template_time: Duration::from_secs(60), ..options() });
    let slow = template(&copies(100), sandbox.clone()).unwrap();
    let first = sandbox.child_id().unwrap();
    let rendering = std::thread::spawn(move || slow.render(&user("mine")));
    // Who renders has taken it from the desk.
    eventually("the rendering begins", || sandbox.child_id().is_none());
    kill(Pid::from_raw(i32::try_from(first).unwrap()), Signal::SIGKILL).unwrap();
    assert_eq!(rendering.join().unwrap().unwrap(), "mine");
    let second = sandbox.child_id().unwrap();
    assert_ne!(first, second);

    // And one that is killed while nobody needs it.
    kill(Pid::from_raw(i32::try_from(second).unwrap()), Signal::SIGKILL).unwrap();
    let honest = template("{{ messages[0].content }}", sandbox.clone()).unwrap();
    assert_eq!(honest.render(&user("next")).unwrap(), "next");
    assert_ne!(sandbox.child_id().unwrap(), second);
}

fn many_at_once_get_their_own_text() {
    let sandbox = sandbox();
    let templates: Vec<ChatTemplate> = (0..4)
        .map(|number| template(&format!("{number}: {{{{ messages[0].content }}}}"), sandbox.clone()).unwrap())
        .collect();
    std::thread::scope(|scope| {
        for worker in 0..16 {
            let templates = &templates;
            scope.spawn(move || {
                for turn in 0..25 {
                    let number = (worker + turn) % templates.len();
                    let content = format!("{worker} {turn} {}", "x".repeat(worker * turn * 40));
                    let text = templates[number].render(&user(&content)).unwrap();
                    assert_eq!(text, format!("{number}: {content}"));
                }
            });
        }
    });
}

fn who_finds_the_queue_full_is_told() {
    let time = Duration::from_secs(1);
    let sandbox = SandboxProcess::new(SandboxOptions { template_time: time, queue: 1, ..options() });
    let endless = template(&copies(90_000), sandbox.clone()).unwrap();
    let honest = template("{{ messages[0].content }}", sandbox.clone()).unwrap();
    let first = std::thread::spawn(move || endless.render(&user("x")));
    eventually("the rendering begins", || sandbox.child_id().is_none());
    let waiting: Vec<_> = (0..2)
        .map(|_| {
            let honest = honest.clone();
            std::thread::spawn(move || honest.render(&user("y")))
        })
        .collect();
    assert!(matches!(first.join().unwrap(), Err(TextError::TemplateTooSlow { .. })));
    let mut outcomes: Vec<_> = waiting.into_iter().map(|thread| thread.join().unwrap()).collect();
    outcomes.sort_by_key(Result::is_ok);
    assert!(matches!(outcomes[0], Err(TextError::SandboxBusy)), "{outcomes:?}");
    assert_eq!(outcomes[1].as_deref().unwrap(), "y");
}

fn mistakes_show_when_a_template_is_loaded() {
    let error = template("a\n{% if %}", sandbox()).unwrap_err();
    assert!(matches!(error, TextError::Template { line: 2, .. }), "{error}");
}

fn the_death_of_the_parent_ends_the_child() {
    let mut node =
        Command::new(std::env::current_exe().unwrap()).arg("node").stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(node.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let child: u32 = line.trim().parse().unwrap();
    assert!(is_running(child));
    node.kill().unwrap();
    node.wait().unwrap();
    // It is nobody's child then, so that where process 1 does not wait for it, it stays as a zombie.
    eventually("the child's end", || !is_running(child) || is_zombie(child));
}

fn is_zombie(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    status.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z'))
}

fn the_last_handle_ends_the_child() {
    let sandbox = sandbox();
    sandbox.prepare();
    let child = sandbox.child_id().unwrap();
    let clone = sandbox.clone();
    drop(sandbox);
    assert!(is_running(child));
    drop(clone);
    assert!(!is_running(child));
}

fn what_is_no_sandbox_is_refused() {
    let garbled = ["-c", r"printf '\001\000\000\000\007' >&0; exec sleep 60"].map(Into::into).to_vec();
    let too_long = ["-c", r"printf '\377\377\377\177\000' >&0; exec sleep 60"].map(Into::into).to_vec();
    for (command, arguments, words) in [
        ("/bin/sh", garbled, "it sent a frame that is no message"),
        ("/bin/sh", too_long, "it sent a frame of 2147483647 bytes where 65536 are the most"),
        ("/usr/bin/true", Vec::new(), "it ended (exit status: 0); if it was updated"),
        ("/nowhere/mlxnode", Vec::new(), "cannot start /nowhere/mlxnode"),
    ] {
        let options = SandboxOptions { arguments, ..SandboxOptions::new(command.into()) };
        let sandbox = SandboxProcess::new(options);
        let error = template("x", sandbox).unwrap_err();
        assert!(matches!(error, TextError::Sandbox { .. }), "{error:?}");
        assert!(error.to_string().contains(words), "{error}");
    }
}

fn tokenizers_are_tried_first() {
    let files = files("x");
    let once = sandbox();
    let (first, second) = (Instant::now(), once.try_tokenizer(&files).map(|()| Instant::now()).unwrap());
    once.try_tokenizer(&files).unwrap();
    assert!(second.elapsed() < second - first, "the second time needs no child");
    // A file that is wrong is the matter of whoever reads it next.
    let nothing = TextFiles::from_map(BTreeMap::new()).unwrap();
    sandbox().try_tokenizer(&nothing).unwrap();
    let error = Tokenizer::from_untrusted_files(&nothing, &sandbox()).unwrap_err();
    assert!(matches!(error, TextError::MissingFile { .. }), "{error}");

    let cost = |files: &TextFiles, options: SandboxOptions| {
        let error = Tokenizer::from_untrusted_files(files, &SandboxProcess::new(options)).unwrap_err();
        assert!(matches!(error, TextError::TokenizerCost { .. }), "{error}");
        error.to_string()
    };
    let error = cost(&files, SandboxOptions { tokenizer_time: Duration::ZERO, ..options() });
    assert!(error.contains("takes more than the time that it may take"), "{error}");

    let vocabulary: serde_json::Map<String, Value> =
        (0..100_000).map(|id| (format!("token{id}"), json!(id))).collect();
    let model = json!({"type": "WordLevel", "vocab": vocabulary, "unk_token": "token0"});
    let large = json!({"version": "1.0", "added_tokens": [], "model": model}).to_string();
    let large = TextFiles::from_map([("tokenizer.json".to_owned(), large.into_bytes())].into()).unwrap();
    assert_eq!(Tokenizer::from_untrusted_files(&large, &sandbox()).unwrap().vocabulary_size(), 100_000);
    let error = cost(&large, SandboxOptions { tokenizer_mebibytes: 72, ..options() });
    assert!(error.contains("takes more than 72 MiB of memory"), "{error}");
}
