//! `cargo xtask setup`: MLX for this machine, without Xcode, cmake or a long build.
//!
//! libmlx comes from the MLX project's own wheel ([`wheel`]), mlx-c is compiled from the sources that the mlx-sys crate
//! carries ([`mlxc`]), the bindings are the committed ones (`crates/mlx/bindings`, made by `cargo xtask bindings`), and
//! [`cargo_config`] tells cargo to take these instead of running mlx-sys's build script. A small program proves it
//! ([`smoke`]). Should that fail on a Mac, mlx-sys's own build takes over.
//!
//! All of it lies in a cache folder that clones share. A stamp, written last, says for which recipe it is complete; a
//! lock keeps two set-ups apart. Every command that needs MLX calls [`ensure`], which then costs milliseconds.

mod cargo_config;
pub(crate) mod clients;
pub(crate) mod evaluation;
mod mlxc;
pub(crate) mod oracle;
pub(crate) mod pins;
mod python_environment;
mod smoke;
pub(crate) mod stamp;
pub(crate) mod tools;
pub(crate) mod wheel;

pub(crate) use cargo_config::INSTALLED_LIBRARIES;
pub(crate) use mlxc::sources as mlx_c_sources;
pub(crate) use stamp::lock;

use crate::places::Places;
use anyhow::{Context as _, Result};
use stamp::{Outcome, Stamp};
use std::path::PathBuf;
use tools::Tools;

/// The target that this machine builds for, as cargo names it.
pub(crate) const HOST: &str = if cfg!(target_os = "macos") {
    "aarch64-apple-darwin"
} else if cfg!(target_arch = "aarch64") {
    "aarch64-unknown-linux-gnu"
} else {
    "x86_64-unknown-linux-gnu"
};

/// `cargo xtask setup`: sets up and says how it ended.
pub(crate) fn run(places: &Places, again: bool) -> Result<()> {
    let outcome = if again { self::again(places)? } else { ensure(places)? };
    match outcome {
        Outcome::Wheel => {
            crate::print(format_args!("MLX {} is ready in {}", pins::MLX_VERSION, places.mlx().display()))
        }
        Outcome::OwnBuild => crate::print("cargo will build MLX by itself, through the crate mlx-sys"),
    }
    Ok(())
}

/// Sets up what is missing; returns how MLX is linked.
pub(crate) fn ensure(places: &Places) -> Result<Outcome> {
    let wanted = stamp::fingerprint(places)?;
    if let Some(outcome) = done(places, &wanted)? {
        return Ok(outcome);
    }
    let _lock = lock(&places.cache.join("setup.lock"), "set-up")?;
    if let Some(outcome) = done(places, &wanted)? {
        return Ok(outcome); // another process did it while this one waited
    }
    set_up(places, wanted)
}

/// Does everything again, whatever the stamp says.
fn again(places: &Places) -> Result<Outcome> {
    let wanted = stamp::fingerprint(places)?;
    let _lock = lock(&places.cache.join("setup.lock"), "set-up")?;
    set_up(places, wanted)
}

/// How an earlier set-up ended, if it is complete and of this recipe. A new clone then only needs cargo's file.
fn done(places: &Places, wanted: &str) -> Result<Option<Outcome>> {
    let Some(stamp) = Stamp::read(places).filter(|stamp| stamp.fingerprint == wanted) else {
        return Ok(None);
    };
    match stamp.outcome {
        Outcome::Wheel => {
            let kept = [places.mlx().join("lib/libmlxc.a"), bindings_in_cache(places), library(places)];
            if !kept.iter().all(|file| file.is_file()) {
                return Ok(None);
            }
        }
        Outcome::OwnBuild => {}
    }
    cargo_config::write(places, stamp.outcome)?;
    Ok(Some(stamp.outcome))
}

fn set_up(places: &Places, fingerprint: String) -> Result<Outcome> {
    let tools = Tools::find()?;
    Stamp::remove(places)?;
    std::fs::create_dir_all(places.mlx())?;
    let outcome = match link_the_wheel(places, &tools) {
        Ok(()) => Outcome::Wheel,
        Err(error) if cfg!(target_os = "macos") => {
            eprintln!("setup: {error:#}\nsetup: {FALL_BACK}");
            Outcome::OwnBuild
        }
        Err(error) => return Err(error),
    };
    cargo_config::write(places, outcome)?;
    Stamp { fingerprint, outcome }.write(places)?;
    Ok(outcome)
}

const FALL_BACK: &str = "\
so MLX will be built by mlx-sys itself, which takes many minutes once. It needs full Xcode with its Metal toolchain
  (xcodebuild -downloadComponent MetalToolchain), cmake (brew install cmake) and the network.
  `cargo xtask setup --again` tries the quick way once more.";

fn link_the_wheel(places: &Places, tools: &Tools) -> Result<()> {
    wheel::provide(places, tools)?;
    let sources = mlxc::sources(places)?;
    mlxc::compile(places, tools, &sources)?;
    copy_bindings(places)?;
    smoke::test(places, tools, &sources)
}

/// The bindings that are committed.
pub(crate) fn committed_bindings(places: &Places) -> PathBuf {
    places.repository.join("crates/mlx/bindings/bindings.rs")
}

fn bindings_in_cache(places: &Places) -> PathBuf {
    places.mlx().join("bindings/bindings.rs")
}

/// Copies them where mlx-sys includes them from; not when they are the same, since a new date rebuilds mlx-rs.
fn copy_bindings(places: &Places) -> Result<()> {
    let committed = std::fs::read(committed_bindings(places)).context("crates/mlx/bindings/bindings.rs")?;
    let copy = bindings_in_cache(places);
    if std::fs::read(&copy).ok().as_ref() != Some(&committed) {
        std::fs::create_dir_all(places.mlx().join("bindings"))?;
        std::fs::write(copy, committed)?;
    }
    Ok(())
}

/// The Metal kernels when mlx-sys builds MLX: cargo's file tells its build script to put them here.
pub(crate) fn own_metallib(places: &Places) -> PathBuf {
    places.mlx().join("metallib/mlx.metallib")
}

/// libmlx itself.
pub(crate) fn library(places: &Places) -> PathBuf {
    places.wheel_libraries().join(if cfg!(target_os = "macos") { "libmlx.dylib" } else { "libmlx.so" })
}
