//! `cargo xtask install` and `dist`: the binary with the MLX library beside it, independent of clone and cache.
//!
//! ```text
//! bin/mlxnode
//! lib/mlxnode/mlx/lib/libmlx.so             on macOS libmlx.dylib, libjaccl.dylib, mlx.metallib
//! lib/mlxnode/mlx_cpu.libs/…                the BLAS that the Linux libmlx loads from there
//! lib/mlxnode/licenses/…                    theirs
//! ```
//!
//! The binary looks for libmlx relative to itself. During development it also looks in the cache; that second path is
//! taken out of the installed copy, so that running it proves that the folder is complete.

use crate::places::Places;
use crate::setup::stamp::Outcome;
use crate::setup::wheel::remove;
use crate::{build, command, setup};
use anyhow::{Context as _, Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Builds, installs below `prefix` (`~/.local` by default), and prints the binary's path.
pub(crate) fn run(places: &Places, prefix: Option<PathBuf>) -> Result<()> {
    let prefix = match prefix {
        Some(prefix) => std::path::absolute(prefix)?,
        None => std::env::home_dir().context("no home folder is known; say --prefix DIR")?.join(".local"),
    };
    let version = fill(places, &prefix)?;
    eprintln!("installed {version}; put {} on your PATH if it is not there", prefix.join("bin").display());
    crate::print(prefix.join("bin/mlxnode").display());
    Ok(())
}

/// Builds and makes `mlxnode-VERSION-SYSTEM-ARCHITECTURE/` and its .tar.gz in `out`; prints the archive's path.
pub(crate) fn dist(places: &Places, out: Option<PathBuf>) -> Result<()> {
    let out = std::path::absolute(out.unwrap_or_else(|| places.target().join("dist")))?;
    let name =
        format!("mlxnode-{}-{}-{}", env!("CARGO_PKG_VERSION"), std::env::consts::OS, std::env::consts::ARCH);
    let folder = out.join(&name);
    remove(&folder)?;
    fill(places, &folder)?;
    for file in ["LICENSE-MIT", "LICENSE-APACHE", "README.md", "CHANGELOG.md"] {
        let source = places.repository.join(file);
        if source.is_file() {
            std::fs::copy(source, folder.join(file))?;
        }
    }
    copy_files(&places.repository.join("deploy"), &folder.join("deploy"), |_| true)?;
    prove_relocatable(&folder)?;
    let archive = out.join(format!("{name}.tar.gz"));
    command::output(Command::new("tar").arg("-czf").arg(&archive).arg("-C").arg(&out).arg(&name))?;
    crate::print(archive.display());
    Ok(())
}

/// Puts binary and libraries into `folder` and runs the result; returns what `--version` says.
fn fill(places: &Places, folder: &Path) -> Result<String> {
    let built = build::binary(places, true)?;
    let linked = setup::ensure(places)?;
    let binary = folder.join("bin/mlxnode");
    std::fs::create_dir_all(folder.join("bin"))?;
    // Prepared beside and renamed: a running mlxnode keeps its file, a broken copy never takes its place.
    let fresh = folder.join("bin/.mlxnode.new");
    std::fs::copy(&built, &fresh).with_context(|| format!("cannot write below {}", folder.display()))?;
    let libraries = folder.join("lib/mlxnode");
    remove(&libraries)?;
    match linked {
        Outcome::Wheel => {
            copy_libraries(places, &libraries)?;
            forget_cache(places, &fresh)?;
        }
        // MLX is inside the binary; its Metal kernels are looked for beside it.
        Outcome::OwnBuild => {
            std::fs::copy(setup::own_metallib(places), folder.join("bin/mlx.metallib"))
                .context("cannot copy the Metal kernels that mlx-sys built")?;
        }
    }
    std::fs::rename(fresh, &binary)?;
    prove(&binary, folder, linked)
}

fn copy_libraries(places: &Places, libraries: &Path) -> Result<()> {
    let is_library = |name: &str| {
        name.ends_with(".so")
            || name.ends_with(".dylib")
            || name.ends_with(".metallib")
            || name.contains(".so.")
    };
    copy_files(&places.wheel_libraries(), &libraries.join("mlx/lib"), is_library)?;
    if cfg!(target_os = "linux") {
        let name = "mlx_cpu.libs";
        copy_files(&places.wheel().join(name), &libraries.join(name), is_library)?;
    }
    copy_files(&places.wheel_licences()?, &libraries.join("licenses"), |_| true)
}

/// Copies the files of a folder whose names are wanted, none of its sub-folders.
fn copy_files(from: &Path, to: &Path, wanted: impl Fn(&str) -> bool) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
        let entry = entry?;
        let name = entry.file_name();
        if entry.path().is_file() && name.to_str().is_some_and(&wanted) {
            std::fs::copy(entry.path(), to.join(&name))
                .with_context(|| format!("cannot copy {}", entry.path().display()))?;
        }
    }
    Ok(())
}

/// Takes the cache out of the binary's search path.
fn forget_cache(places: &Places, binary: &Path) -> Result<()> {
    let cache = places.wheel_libraries();
    if cfg!(target_os = "macos") {
        command::output(Command::new("install_name_tool").arg("-delete_rpath").arg(&cache).arg(binary))?;
        // Apple silicon runs only signed code, and the change broke the linker's signature.
        command::output(Command::new("codesign").args(["--force", "--sign", "-"]).arg(binary))?;
        return Ok(());
    }
    let mut bytes = std::fs::read(binary)?;
    let installed = format!("$ORIGIN/{}", setup::INSTALLED_LIBRARIES);
    ensure!(
        shorten_search_path(&mut bytes, &installed, &format!(":{}", cache.display())),
        "{} does not search {installed}; was it built with RUSTFLAGS set? unset it and try again",
        binary.display()
    );
    std::fs::write(binary, bytes)?;
    Ok(())
}

/// Ends the string `keep` + `drop` after `keep`, by NULs, wherever an ELF file has it. A shorter string in a string
/// table is always valid.
fn shorten_search_path(file: &mut [u8], keep: &str, drop: &str) -> bool {
    let whole = format!("{keep}{drop}\0").into_bytes();
    let mut found = false;
    let mut start = 0;
    while let Some(position) = file[start..].windows(whole.len()).position(|window| window == whole) {
        let end = start + position + whole.len();
        file[start + position + keep.len()..end].fill(0);
        found = true;
        start = end;
    }
    found
}

/// Runs the installed binary and checks that every library of ours came from `folder`.
fn prove(binary: &Path, folder: &Path, linked: Outcome) -> Result<String> {
    let mut version = Command::new(binary);
    version.arg("--version").env_remove("LD_LIBRARY_PATH").env_remove("DYLD_LIBRARY_PATH");
    let version = command::output(&mut version).context("the installed mlxnode does not start")?;
    if linked == Outcome::Wheel && cfg!(target_os = "linux") {
        let loaded = command::output(Command::new("ldd").arg(binary).env_remove("LD_LIBRARY_PATH"))?;
        ensure_loads_from(&loaded, &folder.canonicalize()?)?;
    }
    Ok(version.trim().to_owned())
}

/// Reads what `ldd` prints.
fn ensure_loads_from(loaded: &str, folder: &Path) -> Result<()> {
    let mut seen = 0;
    for line in loaded.lines() {
        let Some((name, path)) = line.trim().split_once(" => ") else { continue };
        if path.starts_with("not found") {
            bail!("the installed mlxnode does not find {name}");
        }
        let ours = ["libmlx.", "libblas-", "liblapack-", "libgfortran-", "libquadmath-"];
        if ours.iter().any(|prefix| name.starts_with(prefix)) {
            let path = Path::new(path.split(" (").next().unwrap_or(path)).canonicalize()?;
            ensure!(path.starts_with(folder), "the installed mlxnode loads {name} from {}", path.display());
            seen += 1;
        }
    }
    ensure!(seen > 0, "the installed mlxnode does not load libmlx:\n{loaded}");
    Ok(())
}

/// Runs a copy of the folder from another place.
fn prove_relocatable(folder: &Path) -> Result<()> {
    let elsewhere = std::env::temp_dir().join(format!("mlxnode-dist-{}", std::process::id()));
    remove(&elsewhere)?;
    let result = command::output(Command::new("cp").arg("-R").arg(folder).arg(&elsewhere))
        .and_then(|_| command::output(Command::new(elsewhere.join("bin/mlxnode")).arg("--version")));
    remove(&elsewhere)?;
    result.map(drop).context("the release folder does not run from another place")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shortens_only_the_whole_string() {
        let mut file = b"..$ORIGIN/lib:/cache/lib\0next\0$ORIGIN/lib:/cache/library\0".to_vec();
        assert!(shorten_search_path(&mut file, "$ORIGIN/lib", ":/cache/lib"));
        assert_eq!(file, b"..$ORIGIN/lib\0\0\0\0\0\0\0\0\0\0\0\0next\0$ORIGIN/lib:/cache/library\0");
        assert!(!shorten_search_path(&mut file, "$ORIGIN/lib", ":/cache/lib"));
    }

    #[test]
    fn a_library_from_elsewhere_or_from_nowhere_is_refused() {
        let folder =
            std::env::temp_dir().canonicalize().unwrap().join(format!("xtask-ldd-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("lib")).unwrap();
        let library = folder.join("lib/libmlx.so");
        std::fs::write(&library, "").unwrap();
        let line =
            format!("\tlibc.so.6 => /lib/libc.so.6 (0x1)\n\tlibmlx.so => {} (0x2)\n", library.display());
        ensure_loads_from(&line, &folder).unwrap();
        assert!(ensure_loads_from(&line, Path::new("/opt")).unwrap_err().to_string().contains("libmlx.so"));
        let lost = ensure_loads_from("\tlibmlx.so => not found\n", &folder).unwrap_err().to_string();
        assert!(lost.contains("does not find libmlx.so"), "{lost}");
        assert!(ensure_loads_from("\tlinux-vdso.so.1 (0x1)\n", &folder).is_err());
        std::fs::remove_dir_all(folder).unwrap();
    }
}
