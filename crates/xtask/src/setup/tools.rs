//! The programs of the system that set-up needs: finds them, and for a missing one says which command installs it.

use crate::command;
use crate::places::Places;
use anyhow::{Result, bail};
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// The programs found on this machine.
#[derive(Clone, Debug)]
pub(crate) struct Tools {
    /// A Python that has pip.
    pub(crate) python: PathBuf,
    /// A C++20 compiler.
    pub(crate) compiler: String,
}

/// Something that is not installed.
#[derive(Debug, PartialEq, Eq)]
struct Missing {
    what: &'static str,
    why: &'static str,
    debian: &'static str,
    mac: &'static str,
}

const PYTHON: Missing = Missing {
    what: "python3 with pip",
    why: "fetches the MLX library",
    debian: "python3 python3-pip",
    mac: "brew install python",
};
const COMPILER: Missing =
    Missing { what: "a C++20 compiler", why: "compiles mlx-c", debian: "g++", mac: "xcode-select --install" };
const ARCHIVER: Missing =
    Missing { what: "ar", why: "packs mlx-c", debian: "binutils", mac: "xcode-select --install" };
const FMT: Missing = Missing {
    what: "the fmt library",
    why: "stands in for std::format, which this compiler lacks",
    debian: "libfmt-dev",
    mac: "brew install fmt",
};

/// What the tests of a Linux machine use beyond set-up: network namespaces, packet captures, a fast BLAS, a browser.
const TEST_PACKAGES: [&str; 5] = ["libopenblas0-pthread", "iproute2", "nftables", "tcpdump", "chromium"];

impl Tools {
    /// Finds everything; installs it first where a machine is ours to change (root on Debian with `CI` set).
    pub(crate) fn find() -> Result<Self> {
        if may_install() {
            install_missing_packages()?;
        }
        let python = python();
        let compiler = compiler();
        // gcc 12 has no std::format; the fmt library stands in. Asked only of a compiler that is there.
        let fmt = compiler.as_deref().is_none_or(|name| {
            compiles(name, "#include <format>") || compiles(name, "#include <fmt/format.h>")
        });
        let mut missing = Vec::new();
        missing.extend(python.is_none().then_some(PYTHON));
        missing.extend(compiler.is_none().then_some(COMPILER));
        missing.extend((!command::exists("ar")).then_some(ARCHIVER));
        missing.extend((!fmt).then_some(FMT));
        match (python, compiler) {
            (Some(python), Some(compiler)) if missing.is_empty() => Ok(Self { python, compiler }),
            _ => bail!("{}", advice(&missing, cfg!(target_os = "macos"), is_root())),
        }
    }
}

/// What is missing, and one command that installs it.
fn advice(missing: &[Missing], mac: bool, root: bool) -> String {
    let mut text = "this machine lacks:\n".to_owned();
    for item in missing {
        text += &format!("  {} ({})\n", item.what, item.why);
    }
    text += "install with:\n";
    if mac {
        let mut commands: Vec<_> = missing.iter().map(|item| item.mac).collect();
        commands.dedup();
        for command in commands {
            text += &format!("  {command}\n");
        }
    } else {
        let packages: Vec<_> = missing.iter().map(|item| item.debian).collect();
        text += &format!("  {}apt-get install {}\n", if root { "" } else { "sudo " }, packages.join(" "));
        text += "(Debian and Ubuntu; on other systems the packages of the same purpose)\n";
    }
    text += "and run the command again";
    text
}

/// A Python interpreter that can run pip.
pub(crate) fn python() -> Option<PathBuf> {
    pythons().find(|python| command::succeeds(Command::new(python).args(["-m", "pip", "--version"])))
}

/// Interpreters to try, the usual name first.
pub(crate) fn pythons() -> impl Iterator<Item = PathBuf> {
    let versions = (10..=14).rev().map(|minor| format!("python3.{minor}"));
    std::iter::once("python3".to_owned())
        .chain(versions)
        .chain(["python".to_owned(), "/usr/bin/python3".to_owned()])
        .map(PathBuf::from)
}

/// `$CXX`, or the system's C++ compiler.
fn compiler() -> Option<String> {
    let named = std::env::var("CXX").ok().filter(|name| !name.is_empty());
    let usual = if cfg!(target_os = "macos") { ["clang++", "c++"] } else { ["g++", "clang++"] };
    named.into_iter().chain(usual.map(str::to_owned)).find(|name| compiles(name, "#include <vector>"))
}

/// Whether the compiler takes this text as C++20.
fn compiles(compiler: &str, text: &str) -> bool {
    use std::io::Write as _;
    let child = Command::new(compiler)
        .args(["-std=c++20", "-fsyntax-only", "-x", "c++", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = child else { return false };
    let written = child.stdin.take().is_some_and(|mut stdin| writeln!(stdin, "{text}").is_ok());
    child.wait().is_ok_and(|status| status.success()) && written
}

/// A program for cargo from its registry: the one on the search path, else our own in the cache, installed when it is missing.
pub(crate) fn installed(places: &Places, name: &str, version: &str) -> Result<PathBuf> {
    if command::exists(name) {
        return Ok(name.into());
    }
    let root = places.tools().join(format!("{name}-{version}"));
    let program = root.join("bin").join(name);
    let _lock = super::lock(&places.cache.join("tools.lock"), &format!("installation of {name}"))?;
    if !program.is_file() {
        eprintln!("setup: installing {name} {version} (once, a few minutes)");
        // --debug: it builds in half the time, and none of these has much to compute.
        let arguments = ["install", "--quiet", "--locked", "--debug", "--version", version, "--root"];
        command::run(command::cargo(&places.cache).args(arguments).arg(&root).arg(name))?;
    }
    Ok(program)
}

/// On a CI machine, which is new each time and ours, packages are installed without asking.
fn may_install() -> bool {
    std::env::var_os("CI").is_some() && is_root() && is_debian()
}

pub(crate) fn is_debian() -> bool {
    command::exists("apt-get") && command::exists("dpkg-query")
}

pub(crate) fn is_root() -> bool {
    command::output(Command::new("id").arg("-u")).is_ok_and(|id| id.trim() == "0")
}

fn install_missing_packages() -> Result<()> {
    let mut wanted = Vec::new();
    if python().is_none() {
        wanted.extend(["python3", "python3-pip"]);
    }
    if compiler().is_none() {
        wanted.extend(["g++", "binutils"]);
    }
    let others = std::iter::once("libfmt-dev").chain(TEST_PACKAGES);
    wanted.extend(others.filter(|package| !is_installed(package)));
    if wanted.is_empty() {
        return Ok(());
    }
    eprintln!("setup: installing {}", wanted.join(" "));
    command::output(&mut apt_get(&["update"]))?;
    command::output(apt_get(&["install", "-y", "--no-install-recommends"]).args(wanted))?;
    Ok(())
}

/// An apt-get that waits for another one instead of failing, and asks nothing.
pub(crate) fn apt_get(arguments: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command
        .args(["-qq", "-o", "DPkg::Lock::Timeout=300", "-o", "APT::Sandbox::User=root"])
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive");
    command
}

fn is_installed(package: &str) -> bool {
    command::output(Command::new("dpkg-query").args(["-W", "-f=${Status}", package]))
        .is_ok_and(|status| status.trim() == "install ok installed")
}

/// Packages that some tests need beyond set-up: installed where the machine is ours, else named with the command that
/// installs them. The rest of the tests runs without.
pub(crate) fn prepare_for_tests() -> Result<()> {
    if !cfg!(target_os = "linux") || !is_debian() {
        return Ok(());
    }
    if may_install() {
        return install_missing_packages();
    }
    let missing: Vec<_> = TEST_PACKAGES.into_iter().filter(|package| !is_installed(package)).collect();
    if !missing.is_empty() {
        let sudo = if is_root() { "" } else { "sudo " };
        eprintln!("some tests need more: {sudo}apt-get install {}", missing.join(" "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_names_what_is_missing_and_the_command() {
        let linux = advice(&[PYTHON, FMT], false, false);
        assert!(linux.contains("python3 with pip") && linux.contains("the fmt library"), "{linux}");
        assert!(linux.contains("sudo apt-get install python3 python3-pip libfmt-dev"), "{linux}");
        let mac = advice(&[COMPILER, ARCHIVER], true, false);
        assert_eq!(mac.matches("xcode-select --install").count(), 1, "{mac}");
    }

    #[test]
    fn a_compiler_is_asked_and_not_guessed() {
        let compiler = compiler().expect("the tests are linked with a compiler");
        assert!(compiles(&compiler, "#include <vector>"));
        assert!(!compiles(&compiler, "#include <no_such_header>"));
        assert!(!compiles("no-such-compiler", ""));
    }
}
