//! Does what was built work? A small C++ program against libmlxc.a and libmlx: right version, right arithmetic.

use super::mlxc;
use super::pins::MLX_VERSION;
use super::tools::Tools;
use super::wheel::remove;
use crate::command;
use crate::places::Places;
use anyhow::{Context as _, Result, ensure};
use std::path::Path;
use std::process::Command;

/// Prints the version and the trace of [[1, 2], [3, 4]] squared, which is 7 + 22, computed on the default device (the
/// GPU on a Mac).
pub(super) const PROGRAM: &str = r#"
#include "mlx/c/mlx.h"
#include <cstdio>
int main() {
  mlx_string version = mlx_string_new();
  if (mlx_version(&version)) return 1;
  mlx_device device = mlx_device_new();
  mlx_stream stream = mlx_stream_new();
  if (mlx_get_default_device(&device) || mlx_get_default_stream(&stream, device)) return 2;
  const float values[] = {1, 2, 3, 4};
  const int shape[] = {2, 2};
  mlx_array matrix = mlx_array_new_data(values, shape, 2, MLX_FLOAT32);
  mlx_array product = mlx_array_new();
  if (mlx_matmul(&product, matrix, matrix, stream) || mlx_array_eval(product)) return 3;
  const float *result = mlx_array_data_float32(product);
  if (!result) return 4;
  std::printf("%s %g\n", mlx_string_data(version), result[0] + result[3]);
  return mlx_synchronize(stream) ? 5 : 0;
}
"#;

/// Compiles, links and runs the program.
pub(crate) fn test(places: &Places, tools: &Tools, sources: &Path) -> Result<()> {
    let work = places.mlx().join("smoke");
    remove(&work)?;
    std::fs::create_dir_all(&work)?;
    let program = work.join("smoke.cpp");
    std::fs::write(&program, PROGRAM)?;
    let binary = work.join("smoke");
    let libraries = places.wheel_libraries();
    let mut link = Command::new(&tools.compiler);
    link.args(mlxc::flags(places, sources)).arg(&program).arg("-o").arg(&binary);
    link.arg(places.mlx().join("lib/libmlxc.a")).arg("-L").arg(&libraries).arg("-lmlx");
    link.arg(format!("-Wl,-rpath,{}", libraries.display()));
    if cfg!(target_os = "macos") {
        link.args(["-framework", "Foundation", "-framework", "Metal", "-framework", "Accelerate"]);
    }
    command::output(&mut link).context("the smoke test of MLX does not link")?;
    let printed =
        command::output(&mut Command::new(&binary)).context("the smoke test of MLX does not run")?;
    ensure!(
        printed.trim() == format!("{MLX_VERSION} 29"),
        "the smoke test of MLX printed {:?} instead of \"{MLX_VERSION} 29\"",
        printed.trim()
    );
    remove(&work)
}
