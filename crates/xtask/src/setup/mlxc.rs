//! Compiles mlx-c, MLX's C interface, from the sources inside the mlx-sys crate into `lib/libmlxc.a`.

use super::pins::MLX_SYS_VERSION;
use super::tools::Tools;
use super::wheel::remove;
use crate::command;
use crate::places::Places;
use anyhow::{Context as _, Result, anyhow, ensure};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

/// Forced in front of every mlx-c file on Linux. The first part serves gcc 12, which lacks `std::format`; the second
/// declares half floats where mlx-c itself does so on Arm only.
pub(super) const SHIM: &str = "\
#pragma once
#if __has_include(<format>)
#include <format>
#else
#define FMT_HEADER_ONLY
#include <fmt/format.h>
namespace std { using fmt::format; }
#endif
#if !defined(__aarch64__)
#include <mlx/types/half_types.h>
#define HAS_FLOAT16
#define HAS_BFLOAT16
using mlx::core::float16_t;
using mlx::core::bfloat16_t;
#endif
";

/// mlx-rs seeds its random numbers from this clock of macOS; other systems get one by the same name.
pub(super) const CLOCK: &str = "\
#include <stdint.h>
#include <time.h>
extern \"C\" uint64_t mach_approximate_time(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}
";

/// The folder of mlx-c's sources: `src/mlx-c` of the mlx-sys crate that the lock file names.
pub(crate) fn sources(places: &Places) -> Result<PathBuf> {
    let metadata = command::cargo(&places.repository)
        .args(["metadata", "--format-version", "1", "--filter-platform", super::HOST])
        .args(command::lock_arguments())
        .stderr(std::process::Stdio::inherit()) // the crates that are downloaded on a new machine
        .output()
        .context("cannot run cargo metadata")?;
    ensure!(metadata.status.success(), "cargo metadata failed; the message above says why");
    let metadata: serde_json::Value = serde_json::from_slice(&metadata.stdout)?;
    let packages = metadata["packages"].as_array().context("cargo metadata lists packages")?;
    let package = packages
        .iter()
        .find(|package| package["name"] == "mlx-sys")
        .context("no package depends on mlx-sys")?;
    ensure!(
        package["version"] == MLX_SYS_VERSION,
        "Cargo.lock has mlx-sys {}, but libmlx is pinned for {MLX_SYS_VERSION}; change both together (crates/xtask/src/setup/pins.rs)",
        package["version"]
    );
    let manifest = package["manifest_path"].as_str().context("a package has a manifest")?;
    let folder = Path::new(manifest).with_file_name("src").join("mlx-c");
    ensure!(folder.join("mlx/c/mlx.h").is_file(), "{} holds no mlx-c sources", folder.display());
    Ok(folder)
}

/// Compiles and packs mlx-c, several files at a time.
pub(crate) fn compile(places: &Places, tools: &Tools, sources: &Path) -> Result<()> {
    eprintln!("setup: compiling mlx-c (about a minute)");
    let work = places.mlx().join("obj");
    remove(&work)?;
    std::fs::create_dir_all(&work)?;
    let mut files: VecDeque<PathBuf> = VecDeque::new();
    for entry in std::fs::read_dir(sources.join("mlx/c"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|ending| ending == "cpp") {
            files.push_back(path);
        }
    }
    ensure!(!files.is_empty(), "{} holds no C++ files", sources.display());
    let mut flags = flags(places, sources);
    if cfg!(target_os = "linux") {
        let shim = work.join("shim.hpp");
        std::fs::write(&shim, SHIM)?;
        flags.push("-include".into());
        flags.push(shim.into());
        let clock = work.join("clock.cpp");
        std::fs::write(&clock, CLOCK)?;
        files.push_back(clock);
    }
    let objects: Vec<PathBuf> = files.iter().map(|file| object(&work, file)).collect::<Result<_>>()?;
    compile_all(files, |file| {
        let object = object(&work, file)?;
        command::output(Command::new(&tools.compiler).args(&flags).arg("-c").arg(file).arg("-o").arg(object))
    })?;
    let archive = work.join("libmlxc.a");
    command::output(Command::new("ar").arg("rcs").arg(&archive).args(objects))?;
    std::fs::create_dir_all(places.mlx().join("lib"))?;
    std::fs::rename(archive, places.mlx().join("lib/libmlxc.a"))?;
    remove(&work)
}

/// How everything against MLX's headers is compiled; the smoke test uses the same.
pub(crate) fn flags(places: &Places, sources: &Path) -> Vec<std::ffi::OsString> {
    let mut flags: Vec<std::ffi::OsString> = ["-std=c++20", "-O2", "-fPIC"].map(Into::into).to_vec();
    for folder in [sources.to_owned(), places.wheel().join("mlx/include")] {
        flags.push("-I".into());
        flags.push(folder.into());
    }
    flags
}

fn object(work: &Path, file: &Path) -> Result<PathBuf> {
    let name = file.file_stem().context("a source file has a name")?;
    Ok(work.join(name).with_extension("o"))
}

/// Runs `one` over the files on as many threads as there are cores; the first failure stops the rest.
fn compile_all(files: VecDeque<PathBuf>, one: impl Fn(&Path) -> Result<String> + Sync) -> Result<()> {
    let threads = std::thread::available_parallelism()?.get();
    let left = Mutex::new(files);
    let next = || left.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let work = || -> Result<()> {
        while let Some(file) = next() {
            if let Err(error) = one(&file) {
                left.lock().unwrap_or_else(PoisonError::into_inner).clear();
                return Err(error);
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            worker.join().map_err(|_| anyhow!("a compiling thread panicked"))??;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_is_compiled_once_and_a_failure_is_reported() {
        let files: VecDeque<PathBuf> = (0..20).map(|index| PathBuf::from(format!("{index}.cpp"))).collect();
        let seen = Mutex::new(Vec::new());
        compile_all(files.clone(), |file| {
            seen.lock().unwrap().push(file.to_owned());
            Ok(String::new())
        })
        .unwrap();
        let mut seen = seen.into_inner().unwrap();
        seen.sort();
        let mut all: Vec<_> = files.iter().cloned().collect();
        all.sort();
        assert_eq!(seen, all);
        let error = compile_all(files, |file| Err(anyhow!("{} is bad", file.display()))).unwrap_err();
        assert!(error.to_string().contains("is bad"));
    }
}
