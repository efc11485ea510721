//! The promises that hold everywhere (ARCHITECTURE.md, "Invariants"), as far as manifests and source text can show them.
//!
//! Dependencies come from `cargo metadata`; the rest is read from the sources, with comments, strings and test modules
//! taken out. A failure names the file and the rule; where a rule is wrong, change it here and in ARCHITECTURE.md together.

use anyhow::{Context as _, Result};
use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package, PackageId};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Which of our crates may depend on which, by short name. `proto` is the package at the top.
const ALLOWED: [(&str, &[&str]); 21] = [
    ("proto", &[]),
    ("compute", &[]),
    ("collective", &["compute"]),
    ("text", &["compute"]),
    ("sandbox", &["text"]),
    ("hub", &[]),
    ("xtask", &[]),
    ("cluster", &["proto"]),
    ("checkpoint", &["compute"]),
    ("mlx", &["compute"]),
    ("engine", &["mlx", "checkpoint", "compute"]),
    ("training", &["mlx", "engine", "checkpoint", "text", "compute"]),
    ("quantization", &["mlx", "engine", "checkpoint", "compute"]),
    ("traces", &["compute"]),
    ("worker", &["cluster", "collective", "compute", "proto"]),
    ("coordinator", &["cluster", "collective", "compute", "checkpoint", "hub", "proto"]),
    ("api", &["coordinator", "cluster", "text", "hub", "compute", "proto"]),
    (
        "node",
        &[
            "api",
            "coordinator",
            "worker",
            "cluster",
            "collective",
            "hub",
            "sandbox",
            "text",
            "traces",
            "checkpoint",
            "compute",
            "proto",
        ],
    ),
    ("cli", &["*"]),
    // Nothing of ours is built on these: developers and tests use them.
    ("parity", &["engine", "checkpoint", "compute"]),
    ("testkit", &["proto", "cluster", "checkpoint", "compute", "text", "hub", "worker"]),
];

/// Sync crates: none of them may reach a runtime, not even through others.
const WITHOUT_RUNTIME: [&str; 9] =
    ["collective", "compute", "mlx", "engine", "training", "quantization", "text", "sandbox", "checkpoint"];
const RUNTIMES: [&str; 4] = ["tokio", "tonic", "ractor", "async-std"];

/// Decisions: events and `now` in, effects out. No clock, channel or async inside.
const PURE: [&str; 4] = [
    "crates/collective/src",
    "crates/compute/src",
    "crates/coordinator/src/placement",
    "crates/coordinator/src/scheduler/machine.rs",
];
// (The simulated stage in compute may sleep: its time is what it simulates.)

/// Where generated messages may be named, besides files whose own name says that they face the wire.
const MESSAGES_IN: [&str; 5] = [
    "proto",
    // Frames are what these pass on: a copy into a type of our own would be all they add.
    "crates/worker/src",
    "crates/cluster/src",
    // They speak the protocol from outside.
    "crates/testkit/src",
    "crates/cli/src",
];
const FACES_THE_WIRE: [&str; 3] = ["service", "wire", "client"];

// === Dependencies ===

#[test]
fn dependencies_go_down_only() -> Result<()> {
    let metadata = metadata()?;
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.into_iter().collect();
    let mut wrong = Vec::new();
    for package in metadata.workspace_packages() {
        let name = short_name(package);
        let may = allowed
            .get(name)
            .with_context(|| format!("{name} is not in the table of allowed dependencies"))?;
        for dependency in needed(package) {
            let Some(other) = our_short_name(&dependency) else { continue };
            if !may.contains(&other) && !may.contains(&"*") {
                wrong.push(format!("{name} depends on {other}"));
            }
        }
    }
    assert_none(&wrong, "dependencies go down only");
    assert_eq!(metadata.workspace_packages().len(), ALLOWED.len(), "the table has every crate");
    Ok(())
}

#[test]
fn only_tests_use_the_testkit_and_the_proof_of_parity() -> Result<()> {
    let metadata = metadata()?;
    let mut wrong = Vec::new();
    for package in metadata.workspace_packages() {
        for used in &package.dependencies {
            let for_tests = ["mlxnode-testkit", "mlxnode-parity"].contains(&used.name.as_str());
            if for_tests && used.kind != DependencyKind::Development {
                wrong.push(format!("{} depends on {}", package.name, used.name));
            }
        }
    }
    assert_none(&wrong, "testkit and parity are for tests");
    Ok(())
}

#[test]
fn mlx_stays_with_the_crates_that_compute() -> Result<()> {
    let metadata = metadata()?;
    let mut wrong = Vec::new();
    for package in metadata.workspace_packages() {
        let name = short_name(package);
        for dependency in &package.dependencies {
            let may = match dependency.name.as_str() {
                "mlx-rs" => ["mlx", "engine", "training", "quantization"].contains(&name),
                "mlx-sys" => name == "mlx",
                _ => true,
            };
            if !may {
                wrong.push(format!("{name} depends on {}", dependency.name));
            }
        }
    }
    assert_none(&wrong, "only mlx, engine, training, quantization use mlx-rs; only mlx uses mlx-sys");
    Ok(())
}

#[test]
fn the_compute_side_has_no_async_runtime() -> Result<()> {
    let metadata = metadata()?;
    let resolve = metadata.resolve.as_ref().context("cargo metadata resolves dependencies")?;
    let used: HashMap<&PackageId, Vec<&PackageId>> = resolve
        .nodes
        .iter()
        .map(|node| {
            let normal = node
                .deps
                .iter()
                .filter(|used| used.dep_kinds.iter().any(|kind| kind.kind == DependencyKind::Normal));
            (&node.id, normal.map(|used| &used.pkg).collect())
        })
        .collect();
    let mut wrong = Vec::new();
    for package in metadata.workspace_packages() {
        if !WITHOUT_RUNTIME.contains(&short_name(package)) {
            continue;
        }
        let mut reached = BTreeSet::new();
        let mut next = vec![&package.id];
        while let Some(id) = next.pop() {
            if reached.insert(id) {
                next.extend(used.get(id).into_iter().flatten());
            }
        }
        for id in reached {
            if RUNTIMES.contains(&metadata[id].name.as_str()) {
                wrong.push(format!("{} reaches {}", short_name(package), metadata[id].name));
            }
        }
    }
    assert_none(&wrong, "the compute side is synchronous");
    Ok(())
}

#[test]
fn every_crate_is_named_for_its_folder_and_takes_the_workspace_lints() -> Result<()> {
    let mut wrong = Vec::new();
    for package in metadata()?.workspace_packages() {
        let manifest = package.manifest_path.as_std_path();
        let folder = manifest.parent().and_then(Path::file_name).and_then(|name| name.to_str());
        let expected = match short_name(package) {
            "proto" => continue, // the top folder may have any name
            name => Some(name),
        };
        if folder != expected {
            wrong.push(format!("{} lies in {folder:?}", package.name));
        }
        if !fs::read_to_string(manifest)?.contains("[lints]\nworkspace = true") {
            wrong.push(format!("{} has lints of its own", package.name));
        }
    }
    assert_none(&wrong, "folders carry the short name, and lints are the workspace's");
    Ok(())
}

// === Sources ===

#[test]
fn only_the_mlx_crate_has_unsafe_code() -> Result<()> {
    let wrong = offences(
        |path| !path.starts_with("crates/mlx"),
        |line| line.contains("unsafe_code") || words(line).any(|word| word == "unsafe"),
    )?;
    assert_none(&wrong, "unsafe code is in crates/mlx only");
    Ok(())
}

#[test]
fn every_queue_is_bounded() -> Result<()> {
    let wrong = offences(
        |_| true,
        |line| {
            let unbounded = |word: &str| word.starts_with("unbounded") || word.starts_with("Unbounded");
            words(line).any(unbounded) || line.contains("mpsc::channel()")
        },
    )?;
    assert_none(&wrong, "every queue is bounded");
    Ok(())
}

#[test]
fn only_the_command_line_and_the_node_read_the_environment() -> Result<()> {
    const MAY: [&str; 4] = ["crates/cli", "crates/node", "crates/xtask", "crates/testkit"];
    const READS: [&str; 6] =
        ["env::var(", "env::var_os(", "env::vars(", "env::vars_os(", "env::args(", "env::args_os("];
    let wrong = offences(
        |path| {
            path.to_str().is_some_and(|path| path.contains("/src/"))
                && !MAY.iter().any(|may| path.starts_with(may))
        },
        |line| READS.iter().any(|read| line.contains(read)),
    )?;
    assert_none(&wrong, "only cli and node read environment and arguments; others take an Options value");
    Ok(())
}

#[test]
fn generated_messages_stay_at_the_edge() -> Result<()> {
    let faces_the_wire = |path: &Path| {
        path.components().filter_map(|part| Path::new(part.as_os_str()).file_stem()?.to_str()).any(|name| {
            FACES_THE_WIRE.iter().any(|face| name == *face || name.ends_with(&format!("_{face}")))
        })
    };
    let wrong = offences(
        |path| {
            let inner =
                path.starts_with("tests") || path.components().any(|part| part.as_os_str() == "tests");
            !inner && !faces_the_wire(path) && !MESSAGES_IN.iter().any(|may| path.starts_with(may))
        },
        |line| line.contains("mlxnode_proto") && !only_calls_or_mounts(line),
    )?;
    assert_none(&wrong, "generated messages stay in service.rs, wire.rs and clients");
    Ok(())
}

/// Whether a line names nothing generated but what it takes to make a call or to mount a service: no message that carries
/// data any further.
fn only_calls_or_mounts(line: &str) -> bool {
    let named: Vec<&str> = words(line).filter(|word| word.starts_with(char::is_uppercase)).collect();
    let harmless = |word: &&str| {
        *word == "DESCRIPTORS" || ["Client", "Server", "Request"].iter().any(|end| word.ends_with(end))
    };
    !named.is_empty() && named.iter().all(harmless)
}

#[test]
fn decisions_are_apart_from_clocks_and_channels() -> Result<()> {
    for path in PURE {
        assert!(root().join(path).exists(), "{path} is gone; correct the list of pure modules");
    }
    const IMPURE: [&str; 6] = ["Instant::now", "SystemTime::now", "tokio", "async fn", ".await", "mpsc"];
    let wrong = offences(
        |path| PURE.iter().any(|pure| path.starts_with(pure)),
        |line| IMPURE.iter().any(|word| line.contains(word)),
    )?;
    assert_none(&wrong, "decisions take events and `now`, and return effects");
    Ok(())
}

#[test]
fn every_file_says_what_it_is_for() -> Result<()> {
    let mut wrong = Vec::new();
    for path in sources()? {
        // Tests beside the code, and parts of a test program, are explained by the file that names them.
        let is_part_of_tests = path.file_stem().is_some_and(|name| name == "tests")
            || path.ancestors().skip(2).any(|folder| folder.ends_with("tests"));
        let text = fs::read_to_string(root().join(&path))?;
        if !is_part_of_tests && !text.starts_with("//!") {
            wrong.push(path.display().to_string());
        }
    }
    assert_none(&wrong, "a file begins with //! and what it is for");
    Ok(())
}

// === How the sources are read ===

/// Fails with every offence on a line of its own.
fn assert_none(wrong: &[String], rule: &str) {
    assert!(wrong.is_empty(), "{rule}:\n  {}", wrong.join("\n  "));
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Asked once, and only for this platform: crates of others need not be on the machine, and nothing is downloaded.
fn metadata() -> Result<&'static Metadata> {
    static METADATA: OnceLock<Metadata> = OnceLock::new();
    if let Some(known) = METADATA.get() {
        return Ok(known);
    }
    let host = match (cfg!(target_os = "macos"), cfg!(target_arch = "aarch64")) {
        (true, _) => "aarch64-apple-darwin",
        (false, true) => "aarch64-unknown-linux-gnu",
        (false, false) => "x86_64-unknown-linux-gnu",
    };
    let asked = MetadataCommand::new()
        .manifest_path(root().join("Cargo.toml"))
        .other_options(["--offline", "--filter-platform", host].map(str::to_owned))
        .exec()
        .context("cargo metadata")?;
    Ok(METADATA.get_or_init(|| asked))
}

/// `engine` for `mlxnode-engine`; the binary's package is `cli`.
fn short_name(package: &Package) -> &str {
    our_short_name(&package.name).unwrap_or(&package.name)
}

fn our_short_name(name: &str) -> Option<&str> {
    if name == "mlxnode" { Some("cli") } else { name.strip_prefix("mlxnode-") }
}

/// Names of what a package needs outside its tests.
fn needed(package: &Package) -> Vec<String> {
    let outside_tests = |kind| matches!(kind, DependencyKind::Normal | DependencyKind::Build);
    package
        .dependencies
        .iter()
        .filter(|used| outside_tests(used.kind))
        .map(|used| used.name.clone())
        .collect()
}

/// Every Rust file that we wrote, relative to the root, sorted.
fn sources() -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for folder in ["crates", "proto", "tests"] {
        collect(&root().join(folder), &mut found)?;
    }
    let ours = found.into_iter().map(|path| Ok(path.strip_prefix(root())?.to_owned()));
    let mut ours = ours.collect::<Result<Vec<_>>>()?;
    ours.retain(|path| path != Path::new("crates/mlx/bindings/bindings.rs")); // generated
    ours.sort();
    assert!(ours.len() > 20, "the sources were not found");
    Ok(ours)
}

fn collect(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            if !path.ends_with("target") {
                collect(&path, found)?;
            }
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            found.push(path);
        }
    }
    Ok(())
}

/// `path:line: text` of every line of code that breaks a rule, in the files that the rule is for.
fn offences(concerns: impl Fn(&Path) -> bool, breaks: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    for path in
        sources()?.into_iter().filter(|path| path != Path::new("tests/architecture.rs") && concerns(path))
    {
        let text = fs::read_to_string(root().join(&path))?;
        for (number, line) in code(&text) {
            if breaks(&line) {
                wrong.push(format!("{}:{number}: {}", path.display(), line.trim()));
            }
        }
    }
    Ok(wrong)
}

/// The numbered lines of a file without comments and string contents, up to its test module.
fn code(text: &str) -> Vec<(usize, String)> {
    let mut lines = Vec::new();
    let mut all = text.lines().enumerate().peekable();
    while let Some((index, line)) = all.next() {
        let tests_follow =
            all.peek().is_some_and(|(_, next)| next.starts_with("mod ") && next.ends_with('{'));
        if line == "#[cfg(test)]" && tests_follow {
            break;
        }
        lines.push((index + 1, without_strings_and_comment(line)));
    }
    lines
}

/// Good enough for one line of formatted Rust: a string that spans lines is read as code.
fn without_strings_and_comment(line: &str) -> String {
    let mut kept = String::new();
    let mut letters = line.chars().peekable();
    let mut in_string = false;
    while let Some(letter) = letters.next() {
        match letter {
            '\\' if in_string => {
                letters.next();
            }
            '\'' if !in_string && letters.peek() == Some(&'"') => {
                letters.next(); // the character '"'
            }
            '"' => in_string = !in_string,
            '/' if !in_string && letters.peek() == Some(&'/') => break,
            _ if in_string => {}
            _ => kept.push(letter),
        }
    }
    kept
}

fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|letter: char| !letter.is_alphanumeric() && letter != '_').filter(|word| !word.is_empty())
}

#[test]
fn a_call_is_told_from_a_message() {
    assert!(only_calls_or_mounts(
        "use mlxnode_proto::v1::{models_client::ModelsClient, WatchModelsRequest};"
    ));
    assert!(only_calls_or_mounts(".register_encoded_file_descriptor_set(mlxnode_proto::DESCRIPTORS)"));
    assert!(!only_calls_or_mounts("use mlxnode_proto::v1::{Deployment, WatchModelsRequest};"));
    assert!(!only_calls_or_mounts("use mlxnode_proto::v1::{"));
}

#[test]
fn comments_strings_and_test_modules_are_not_code() {
    let text = "//! unsafe\nlet a = \"unsafe // \\\" still\"; // unsafe\nlet b = '\"'; run();\n#[cfg(test)]\nmod tests {\nunsafe\n}\n";
    let lines: Vec<String> = code(text).into_iter().map(|(_, line)| line).collect();
    assert_eq!(lines, ["", "let a = ; ", "let b = '; run();"]);
    assert_eq!(
        words("pub unsafe fn f_2(x: &u8)").collect::<Vec<_>>(),
        ["pub", "unsafe", "fn", "f_2", "x", "u8"]
    );
}
