//! `cargo xtask check-macos`: type-checks the workspace for Apple silicon on a Debian machine.
//!
//! Nothing is linked or run, and no C is compiled; a wrong type, a missing item or a lint in macOS-only code is found.
//! rustup may have no macOS target at hand, so compiler and standard library (which must be of one version) are Debian's
//! `rustc-web` and `rust-web-src`, unpacked into the cache; rustup's cargo drives them. Stubs stand in for the C compiler
//! and cmake; bindgen is real and reads the macOS headers that the `ziglang` Python package carries.
//!
//! Not found: link errors, missing frameworks, errors that appear only when generic code is compiled, anything at run time.

use crate::bindings::{libclang, pip_install};
use crate::places::Places;
use crate::setup::tools::{apt_get, is_debian, is_root, python};
use crate::setup::wheel::remove;
use crate::{command, setup};
use anyhow::{Context as _, Result, bail, ensure};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "aarch64-apple-darwin";
/// How variables for that target end.
const SUFFIX: &str = "aarch64_apple_darwin";
/// Counted up when a step of [`install`] changes, so that an older installation is made anew.
const RECIPE: u32 = 1;
const ZIGLANG: &str = "ziglang==0.17.0";

/// For cc, c++ and ar: leaves an empty output file, and answers `cc -E`, by which a build script asks for the compiler's family.
const COMPILER_STUB: &str = r#"#!/bin/sh
o= next=
for a; do
    [ "$next" ] && { o=$a next=; continue; }
    case $a in -o) next=1 ;; -E) echo clang; exit 0 ;; *.a) o=$a ;; esac
done
[ -z "$o" ] || : >"$o"
"#;

/// Checks with `arguments` (by default everything); installs what that needs first.
pub(crate) fn run(places: &Places, clippy: bool, arguments: &[String]) -> Result<()> {
    ensure!(
        is_possible(),
        "check-macos works on Debian or Ubuntu on 64-bit x86; on a Mac, `cargo check` is the same and more"
    );
    let root = places.cache.join("check-macos");
    install(places, &root)?;
    let mut cargo = command::cargo(&places.repository);
    cargo.args(["check", "--target", TARGET]).args(command::lock_arguments());
    if arguments.is_empty() {
        cargo.args(["--workspace", "--all-targets"]);
    } else {
        cargo.args(arguments);
    }
    environment(&mut cargo, &root, &libclang(places)?);
    if clippy {
        cargo.env("RUSTC_WORKSPACE_WRAPPER", root.join("bin/clippy-driver"));
        cargo.env("CLIPPY_ARGS", "-Dwarnings__CLIPPY_HACKERY__");
        cargo.env("CLIPPY_CONF_DIR", &places.repository);
    }
    command::run(&mut cargo)
}

/// Whether this machine is one that the recipe is for.
pub(crate) fn is_possible() -> bool {
    cfg!(all(target_os = "linux", target_arch = "x86_64")) && is_debian()
}

fn environment(cargo: &mut Command, root: &Path, libclang: &Path) {
    // The target folder stays with the standard library it was checked against: cargo would not notice another one
    // behind the same compiler version.
    cargo.env("RUSTC", root.join("bin/rustc")).env("CARGO_TARGET_DIR", root.join("target"));
    for tool in ["CC", "CXX", "AR"] {
        cargo.env(format!("{tool}_{SUFFIX}"), root.join("bin/cc"));
    }
    cargo.env(format!("CMAKE_{SUFFIX}"), root.join("bin/cmake"));
    cargo.env("LIBCLANG_PATH", libclang).env("MLX_RS_METAL_PATH", root.join("metallib"));
    let headers = root.join("headers");
    let arguments = format!("-nostdinc -isystem {0}/clang -isystem {0}/darwin", headers.display());
    cargo.env(format!("BINDGEN_EXTRA_CLANG_ARGS_{SUFFIX}"), arguments);
    for foreign in ["RUSTFLAGS", "RUSTC_WRAPPER", "CARGO_ENCODED_RUSTFLAGS", "RUSTUP_TOOLCHAIN"] {
        cargo.env_remove(foreign);
    }
}

/// Fetches compiler, standard library and headers; does nothing when they are there.
fn install(places: &Places, root: &Path) -> Result<()> {
    let ready = root.join(format!("ready-{RECIPE}"));
    let _lock = setup::lock(&places.cache.join("check-macos.lock"), "set-up of check-macos")?;
    if ready.is_file() {
        return Ok(());
    }
    eprintln!(
        "check-macos: fetching Debian's Rust, its library's source and the macOS headers (about a minute)"
    );
    remove(root)?;
    for folder in ["deb", "bin", "src", "headers"] {
        fs::create_dir_all(root.join(folder))?;
    }
    let standard_library = find_standard_library()?;
    unpack_rust(root, &standard_library)?;
    write_tools(root)?;
    fetch_headers(root)?;
    check_standard_library(root)?;
    for folder in ["deb", "std", "python"] {
        remove(&root.join(folder))?;
    }
    fs::write(ready, "")?;
    Ok(())
}

/// Updates apt, installs the LLVM library that rustc needs, and returns the name of the package with rustc's libraries.
fn find_standard_library() -> Result<String> {
    if is_root() {
        command::output(&mut apt_get(&["update"]))?;
    }
    let standard_library = dependency("libstd-rust-web-dev", "libstd-rust-web-")
        .context("this system offers no rustc-web package; Debian 12 with its updates does")?;
    let llvm = dependency(&standard_library, "libllvm")?;
    let present = command::output(Command::new("dpkg-query").args(["-W", "-f=${Status}", &llvm]))
        .is_ok_and(|status| status.trim() == "install ok installed");
    if !present {
        ensure!(
            is_root(),
            "check-macos needs the package {llvm}; install it and try again: sudo apt-get install {llvm}"
        );
        command::output(&mut apt_get(&["install", "-y", "--no-install-recommends", &llvm]))?;
    }
    Ok(standard_library)
}

/// The dependency of a package whose name begins so and goes on with a digit.
fn dependency(package: &str, prefix: &str) -> Result<String> {
    let printed = command::output(Command::new("apt-cache").args(["depends", package]))?;
    named_dependency(&printed, prefix).with_context(|| format!("{package} depends on no {prefix}*"))
}

/// The last line counts: the newest version of a package is named last.
fn named_dependency(printed: &str, prefix: &str) -> Option<String> {
    let with_version = |name: &str| {
        name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with(|letter: char| letter.is_ascii_digit()))
    };
    let mut names = printed.lines().rev().filter_map(|line| line.split_whitespace().nth(1));
    names.find(|name| with_version(name)).map(str::to_owned)
}

fn unpack_rust(root: &Path, standard_library: &str) -> Result<()> {
    let packages = ["rustc-web", "rust-web-clippy", standard_library, "libstd-rust-web-dev", "rust-web-src"];
    let download = root.join("deb");
    command::output(apt_get(&["download"]).args(packages).current_dir(&download))?;
    for entry in fs::read_dir(&download)? {
        let package = entry?.path();
        let is_source =
            package.file_name().is_some_and(|name| name.to_string_lossy().starts_with("rust-web-src_"));
        if is_source {
            // Only the library out of the compiler's whole source.
            let script = "dpkg --fsys-tarfile \"$0\" | tar -x -C \"$1\" --strip-components=4 --wildcards './usr/src/rustc-*/library'";
            command::output(Command::new("sh").args(["-c", script]).arg(package).arg(root.join("src")))?;
        } else {
            command::output(Command::new("dpkg").arg("-x").arg(package).arg(root))?;
        }
    }
    Ok(())
}

/// Wrappers that let rustc find its libraries without build scripts seeing that, and the stubs.
fn write_tools(root: &Path) -> Result<()> {
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    for tool in ["rustc", "clippy-driver"] {
        let program = root.join("usr/bin").join(tool);
        let script = format!(
            "#!/bin/sh\nLD_LIBRARY_PATH='{}' exec '{}' \"$@\"\n",
            libraries.display(),
            program.display()
        );
        write_script(&root.join("bin").join(tool), &script)?;
    }
    write_script(&root.join("bin/cc"), COMPILER_STUB)?;
    write_script(&root.join("bin/cmake"), "#!/bin/sh\nexit 0\n")
}

fn write_script(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text)?;
    fs::set_permissions(file, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// clang's own headers and macOS's C headers, for bindgen.
fn fetch_headers(root: &Path) -> Result<()> {
    let python = python().context("python3 with pip is needed; install with: apt-get install python3-pip")?;
    let packages = root.join("python");
    pip_install(&python, &packages, &[ZIGLANG])?;
    let library = packages.join("ziglang/lib");
    fs::rename(library.join("include"), root.join("headers/clang"))?;
    fs::rename(library.join("libc/include/any-darwin-any"), root.join("headers/darwin"))?;
    Ok(())
}

/// The standard library for macOS as metadata, which is all that a check reads. With the MIR of every function in it, or
/// build scripts that try out code find their features missing.
fn check_standard_library(root: &Path) -> Result<()> {
    let target = root.join("std");
    let mut cargo = command::cargo(&root.join("src/library"));
    cargo.args([
        "check",
        "--quiet",
        "--locked",
        "-p",
        "sysroot",
        "--features",
        "backtrace",
        "--target",
        TARGET,
    ]);
    cargo
        .env("RUSTC", root.join("bin/rustc"))
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_INCREMENTAL", "0")
        .env("CARGO_PROFILE_DEV_DEBUG", "0")
        .env("CARGO_TARGET_DIR", &target)
        .env("RUSTFLAGS", "-Zforce-unstable-if-unmarked -Zalways-encode-mir")
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTUP_TOOLCHAIN");
    command::output(&mut cargo)?;
    let installed = root.join("usr/lib/rustlib").join(TARGET).join("lib");
    fs::create_dir_all(&installed)?;
    let mut copied = 0;
    for entry in fs::read_dir(target.join(TARGET).join("debug/deps"))? {
        let file: PathBuf = entry?.path();
        if file.extension().is_some_and(|ending| ending == "rmeta") {
            fs::copy(&file, installed.join(file.file_name().context("a file has a name")?))?;
            copied += 1;
        }
    }
    if copied == 0 {
        bail!("the standard library for {TARGET} came out empty");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_newest_versioned_dependency() {
        let printed = "libstd-rust-web-dev\n  Depends: libstd-rust-web-1.95\n |Depends: libstd-rust-web-1.96\n  Depends: gcc\n  Suggests: libstd-rust-web-wasm\n";
        assert_eq!(named_dependency(printed, "libstd-rust-web-").unwrap(), "libstd-rust-web-1.96");
        assert_eq!(named_dependency(printed, "libllvm"), None);
    }

    #[test]
    fn the_compiler_stub_leaves_the_output_that_was_asked_for() {
        let folder = std::env::temp_dir().join(format!("xtask-stub-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let stub = folder.join("cc");
        write_script(&stub, COMPILER_STUB).unwrap();
        assert_eq!(command::output(Command::new(&stub).args(["-E", "x.c"])).unwrap().trim(), "clang");
        let object = folder.join("x.o");
        command::output(Command::new(&stub).args(["-c", "x.c", "-o"]).arg(&object)).unwrap();
        let archive = folder.join("x.a");
        command::output(Command::new(&stub).arg("cq").arg(&archive).arg(&object)).unwrap();
        assert!(object.is_file() && archive.is_file());
        fs::remove_dir_all(folder).unwrap();
    }
}
