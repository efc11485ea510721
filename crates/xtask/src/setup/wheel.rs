//! libmlx from the MLX project's own wheel: downloaded by pip, accepted by its checksum, unpacked.

use super::pins::{MLX_VERSION, Wheel, wheel_for};
use super::tools::Tools;
use crate::command;
use crate::places::Places;
use anyhow::{Context as _, Result, ensure};
use ring::digest::{SHA256, digest};
use std::path::Path;
use std::process::Command;

/// Makes `places.wheel()` hold the pinned wheel; does nothing when it already does.
pub(crate) fn provide(places: &Places, tools: &Tools) -> Result<()> {
    let wheel = for_this_machine()?;
    let folder = places.wheel();
    let unpacked = folder.join(".sha256"); // written last, inside the folder that is renamed into place
    if std::fs::read_to_string(&unpacked).is_ok_and(|text| text == wheel.sha256) {
        return Ok(());
    }
    let downloads = places.mlx().join("download");
    let file = downloads.join(wheel.file_name());
    if !file.is_file() || check(&file, wheel.sha256).is_err() {
        std::fs::create_dir_all(&downloads)?;
        eprintln!("setup: fetching {} {MLX_VERSION}", wheel.package);
        command::output(
            Command::new(&tools.python)
                .args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"])
                .args(["--only-binary=:all:", "--platform", wheel.platform])
                .arg("--dest")
                .arg(&downloads)
                .arg(format!("{}=={MLX_VERSION}", wheel.package)),
        )
        .context("cannot fetch the MLX library; is the Python package index reachable?")?;
    }
    check(&file, wheel.sha256)?;
    let fresh = places.mlx().join("wheel.new");
    remove(&fresh)?;
    command::output(Command::new(&tools.python).args(["-m", "zipfile", "-e"]).arg(&file).arg(&fresh))?;
    std::fs::write(fresh.join(".sha256"), wheel.sha256)?;
    remove(&folder)?;
    std::fs::rename(&fresh, &folder)?;
    remove(&downloads)
}

/// The wheel that this machine can load.
pub(crate) fn for_this_machine() -> Result<&'static Wheel> {
    let macos = if cfg!(target_os = "macos") {
        let version = command::output(Command::new("sw_vers").arg("-productVersion"))?;
        version.trim().split('.').next().and_then(|major| major.parse().ok())
    } else {
        None
    };
    wheel_for(std::env::consts::OS, std::env::consts::ARCH, macos)
}

/// Fails unless the file's SHA-256 is the pinned one.
fn check(file: &Path, sha256: &str) -> Result<()> {
    let bytes = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let found = hex(digest(&SHA256, &bytes).as_ref());
    ensure!(
        found == sha256,
        "{} has the SHA-256 {found}, but {sha256} is pinned; it was damaged or changed on its way, so delete it and try again",
        file.display()
    );
    Ok(())
}

/// Bytes as lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Removes a folder that may not be there.
pub(crate) fn remove(folder: &Path) -> Result<()> {
    if folder.exists() {
        std::fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_only_the_pinned_bytes() {
        let file = std::env::temp_dir().join(format!("xtask-checksum-{}", std::process::id()));
        std::fs::write(&file, "abc").unwrap();
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        check(&file, abc).unwrap();
        std::fs::write(&file, "abd").unwrap();
        let error = check(&file, abc).unwrap_err().to_string();
        std::fs::remove_file(&file).unwrap();
        assert!(error.contains(abc) && error.contains("pinned"), "{error}");
    }
}
