//! `cargo xtask test`: every test of the workspace, with all they need: MLX, the binary, the oracle, a calm BLAS.

use crate::environment::{Environment, TemporaryFolder};
use crate::places::Places;
use crate::setup::tools;
use crate::{command, setup};
use anyhow::{Context as _, Result, bail};
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};

/// Runs them; `arguments` go to cargo nextest, or to cargo test when that is not installed.
pub(crate) fn run(places: &Places, arguments: &[String]) -> Result<()> {
    setup::ensure(places)?;
    let oracle = setup::oracle::ensure(places)?;
    let clients = setup::clients::ensure(places)?;
    tools::prepare_for_tests()?;
    let packages = if names_packages(arguments) { vec![] } else { vec!["--workspace"] };
    // One build for all: the test executables, and `mlxnode` itself, which the tests over processes start.
    command::run(command::cargo(&places.repository).args([
        "build",
        "--locked",
        "--workspace",
        "--bins",
        "--tests",
    ]))?;
    let folder = TemporaryFolder::new("test")?;
    let environment =
        Environment { oracle: &oracle, temporary: folder.path(), libraries: &places.wheel_libraries() };
    if arguments.is_empty() {
        let mut documentation = command::cargo(&places.repository);
        documentation.args(["test", "--workspace", "--doc", "--quiet"]).args(command::lock_arguments());
        environment.apply(&mut documentation);
        run_quietly(&mut documentation)?;
    }
    let mut cargo = command::cargo(&places.repository);
    environment.apply(&mut cargo);
    cargo.env("MLXNODE_CLIENTS_PYTHON", &clients);
    if command::succeeds(command::cargo(&places.repository).args(["nextest", "--version"])) {
        cargo
            .args(["nextest", "run", "--no-fail-fast"])
            .args(command::lock_arguments())
            .args(packages)
            .args(arguments);
        command::run(&mut cargo)
    } else {
        eprintln!(
            "cargo-nextest is not installed; running cargo test (cargo install cargo-nextest --locked)"
        );
        cargo.args(["test", "--no-fail-fast", "--tests"]).args(command::lock_arguments());
        run_cargo_test(cargo.args(packages).args(arguments))
    }
}

fn names_packages(arguments: &[String]) -> bool {
    arguments.iter().any(|word| word == "-p" || word.starts_with("--package") || word == "--workspace")
}

/// Runs the documentation tests, and shows what they print only when they fail.
fn run_quietly(command: &mut Command) -> Result<()> {
    let printed = command::output(command).context("documentation tests failed")?;
    let counts: Counts = printed.lines().filter_map(Counts::parse).fold(Counts::default(), Counts::plus);
    eprintln!("documentation tests: {} passed", counts.passed);
    Ok(())
}

/// Runs cargo test and ends with one line that sums up its many.
fn run_cargo_test(cargo: &mut Command) -> Result<()> {
    let mut child = cargo.stdout(Stdio::piped()).spawn().context("cannot run cargo test")?;
    let stdout = child.stdout.take().context("stdout is piped")?;
    let mut counts = Counts::default();
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        writeln!(std::io::stdout(), "{line}")?;
        if let Some(more) = Counts::parse(&line) {
            counts = counts.plus(more);
        }
    }
    let status = child.wait()?;
    let Counts { passed, failed, skipped } = counts;
    if !status.success() && failed == 0 {
        bail!("cargo test failed ({status}) before its tests ended");
    }
    let run = passed + failed;
    if run == 0 {
        bail!("no test ran; the arguments pick none of {skipped}");
    }
    if failed > 0 {
        bail!("{run} tests run: {passed} passed, {failed} failed, {skipped} skipped");
    }
    crate::print(format_args!("Summary: {run} tests run: {passed} passed, {skipped} skipped"));
    Ok(())
}

/// How many tests went how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Counts {
    /// Reads `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.00s`.
    fn parse(line: &str) -> Option<Self> {
        let line = line.trim().strip_prefix("test result: ")?;
        let count = |word: &str| -> Option<u64> {
            let before = line.split(word).next()?.trim_end();
            before.rsplit([' ', '.', ';']).next()?.parse().ok()
        };
        Some(Self {
            passed: count(" passed")?,
            failed: count(" failed")?,
            skipped: count(" ignored")? + count(" filtered out")?,
        })
    }

    fn plus(self, other: Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
            skipped: self.skipped + other.skipped,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_what_cargo_test_prints() {
        let lines = [
            "running 3 tests",
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.00s",
            "test result: FAILED. 10 passed; 4 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.20s",
        ];
        let sum = lines.iter().filter_map(|line| Counts::parse(line)).fold(Counts::default(), Counts::plus);
        assert_eq!(sum, Counts { passed: 13, failed: 4, skipped: 3 });
    }

    #[test]
    fn named_packages_replace_the_whole_workspace() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert!(names_packages(&words("-p mlxnode-engine")));
        assert!(names_packages(&words("--package=mlxnode-engine")));
        assert!(!names_packages(&words("-E package(mlxnode-engine)")));
    }
}
