//! `.cargo/mlx.toml`: tells cargo where libmlx lies on this machine, so that mlx-sys's own build script does not run.
//!
//! Where mlx-sys has to build MLX after all (see [`super::FALL_BACK`]), the file only says where the Metal kernels go.
//!
//! The committed `.cargo/config.toml` includes it when it is there. It has absolute paths, so git ignores it.

use super::HOST;
use super::stamp::Outcome;
use crate::places::Places;
use anyhow::Result;
use std::path::PathBuf;

/// Where an installed binary finds libmlx, from the binary's own folder.
pub(crate) const INSTALLED_LIBRARIES: &str = "../lib/mlxnode/mlx/lib";

/// Writes the file unless it says the same already: a new date would not matter, but a new text rebuilds everything.
pub(crate) fn write(places: &Places, outcome: Outcome) -> Result<()> {
    let text = match outcome {
        Outcome::Wheel => wheel(places),
        Outcome::OwnBuild => own_build(places),
    };
    let file = path(places);
    if std::fs::read_to_string(&file).is_ok_and(|found| found == text) {
        return Ok(());
    }
    // Written beside and renamed, so that a cargo that starts meanwhile reads all of it or nothing.
    let fresh = file.with_extension(format!("toml.{}", std::process::id()));
    std::fs::write(&fresh, text)?;
    Ok(std::fs::rename(fresh, file)?)
}

fn path(places: &Places) -> PathBuf {
    places.repository.join(".cargo/mlx.toml")
}

/// The file when mlx-sys builds MLX itself.
fn own_build(places: &Places) -> String {
    let folder = super::own_metallib(places);
    let folder = folder.parent().unwrap_or(&folder).display();
    format!(
        "# Written by `cargo xtask setup`; mlx-sys builds MLX itself.\n[env]\nMLX_RS_METAL_PATH = \"{folder}\"\n"
    )
}

/// The file for this machine with libmlx from the wheel. A binary looks first where `cargo xtask install` puts libmlx, then in the cache.
fn wheel(places: &Places) -> String {
    let wheel = places.wheel_libraries();
    let (wheel, cache) = (wheel.display(), places.mlx());
    let cache = cache.display();
    let (search_paths, libraries) = if cfg!(target_os = "macos") {
        (
            format!(
                "\"-C\", \"link-arg=-Wl,-rpath,@executable_path/{INSTALLED_LIBRARIES}\", \"-C\", \"link-arg=-Wl,-rpath,{wheel}\""
            ),
            r#""static=mlxc", "dylib=mlx", "dylib=c++", "dylib=objc", "framework=Foundation", "framework=Metal", "framework=Accelerate""#,
        )
    } else {
        (
            format!("\"-C\", \"link-arg=-Wl,-rpath,$ORIGIN/{INSTALLED_LIBRARIES}:{wheel}\""),
            r#""static=mlxc", "dylib=mlx", "dylib=stdc++""#,
        )
    };
    format!(
        "# Written by `cargo xtask setup`; delete it to set up again.\n\
         [target.{HOST}]\n\
         rustflags = [{search_paths}]\n\
         \n\
         [target.{HOST}.mlx]\n\
         rustc-link-search = [\"native={cache}/lib\", \"native={wheel}\"]\n\
         rustc-link-lib = [{libraries}]\n\
         rustc-env = {{ OUT_DIR = \"{cache}/bindings\" }}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_every_path_and_prefers_the_installed_library() {
        let places = Places { repository: "/repository".into(), cache: "/a cache".into() };
        let text = wheel(&places);
        assert!(text.contains("rustc-link-lib = [\"static=mlxc\", \"dylib=mlx\""), "{text}");
        assert!(text.contains("OUT_DIR = \"/a cache/mlx-0.32.2/bindings\""), "{text}");
        let installed = text.find(INSTALLED_LIBRARIES).unwrap();
        assert!(installed < text.find("/a cache/mlx-0.32.2/wheel/mlx/lib").unwrap(), "{text}");
    }

    #[test]
    fn writes_only_what_changed() {
        let folder = std::env::temp_dir().join(format!("xtask-config-{}", std::process::id()));
        std::fs::create_dir_all(folder.join(".cargo")).unwrap();
        let places = Places { repository: folder.clone(), cache: "/cache".into() };
        let read = || std::fs::read_to_string(path(&places)).unwrap();
        let date = || std::fs::metadata(path(&places)).unwrap().modified().unwrap();
        write(&places, Outcome::Wheel).unwrap();
        let first = date();
        write(&places, Outcome::Wheel).unwrap();
        assert_eq!((date(), read()), (first, wheel(&places)));
        write(&places, Outcome::OwnBuild).unwrap();
        assert!(
            read().contains("MLX_RS_METAL_PATH = \"/cache/mlx-0.32.2/metallib\"")
                && !read().contains("rpath")
        );
        std::fs::remove_dir_all(folder).unwrap();
    }
}
