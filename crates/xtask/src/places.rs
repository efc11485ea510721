//! Where things lie: the repository, and the cache folder that all clones on a machine share.

use crate::setup::pins::MLX_VERSION;
use anyhow::{Context as _, Result, bail, ensure};
use std::path::{Path, PathBuf};

/// The folders that every command works in.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    /// The root of this clone.
    pub(crate) repository: PathBuf,
    /// What set-up fetched and built, shared by all clones; absolute.
    pub(crate) cache: PathBuf,
}

impl Places {
    /// Finds both; the cache is `$MLXNODE_DEV_CACHE`, else `mlxnode-dev` in the platform's folder for caches.
    pub(crate) fn find() -> Result<Self> {
        let manifest = std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(
            || PathBuf::from(env!("CARGO_MANIFEST_DIR")), // xtask started without cargo
            PathBuf::from,
        );
        let repository = manifest.ancestors().nth(2).context("xtask lies in crates/xtask")?.to_owned();
        ensure!(repository.join("Cargo.toml").is_file(), "{} is not the repository", repository.display());
        let cache = match std::env::var_os("MLXNODE_DEV_CACHE").filter(|value| !value.is_empty()) {
            Some(named) => PathBuf::from(named),
            None => platform_cache()?.join("mlxnode-dev"),
        };
        let cache = std::path::absolute(cache)?;
        ensure_usable(&cache)?;
        Ok(Self { repository, cache })
    }

    /// Everything of one MLX version.
    pub(crate) fn mlx(&self) -> PathBuf {
        self.cache.join(format!("mlx-{MLX_VERSION}"))
    }

    /// The unpacked wheel: `mlx/lib`, `mlx/include` and, on Linux, `mlx_cpu.libs`.
    pub(crate) fn wheel(&self) -> PathBuf {
        self.mlx().join("wheel")
    }

    /// libmlx and what it loads from beside it.
    pub(crate) fn wheel_libraries(&self) -> PathBuf {
        self.wheel().join("mlx/lib")
    }

    /// The licence files that the wheel carries.
    pub(crate) fn wheel_licences(&self) -> Result<PathBuf> {
        let wheel = crate::setup::wheel::for_this_machine()?;
        Ok(self.wheel().join(format!("{}-{MLX_VERSION}.dist-info/licenses", wheel.package.replace('-', "_"))))
    }

    /// Programs that only some commands need (bindgen, cargo-deny, libclang).
    pub(crate) fn tools(&self) -> PathBuf {
        self.cache.join("tools")
    }

    /// Cargo's build folder.
    pub(crate) fn target(&self) -> PathBuf {
        match std::env::var_os("CARGO_TARGET_DIR") {
            Some(folder) => self.repository.join(folder),
            None => self.repository.join("target"),
        }
    }
}

fn platform_cache() -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()) {
        return Ok(PathBuf::from(folder));
    }
    let Some(home) = std::env::home_dir() else {
        bail!("no home folder is known; name a cache folder in MLXNODE_DEV_CACHE");
    };
    Ok(home.join(if cfg!(target_os = "macos") { "Library/Caches" } else { ".cache" }))
}

/// The path goes into linker arguments (`-Wl,a,b` and `a:b`) and TOML strings, where these characters mean something.
fn ensure_usable(cache: &Path) -> Result<()> {
    let text = cache.to_str().with_context(|| format!("{} is not UTF-8", cache.display()))?;
    if let Some(bad) = text.chars().find(|letter| ",:\"\\$".contains(*letter) || letter.is_control()) {
        bail!(
            "the cache folder {text:?} has {bad:?} in its name, which a linker cannot take; name another in MLXNODE_DEV_CACHE"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_a_cache_folder_that_a_linker_cannot_take() {
        assert!(ensure_usable(Path::new("/home/a b/cache")).is_ok());
        for bad in ["/home/a,b", "/a:b", "/a\"b", "/a$b"] {
            assert!(ensure_usable(Path::new(bad)).unwrap_err().to_string().contains("MLXNODE_DEV_CACHE"));
        }
    }
}
