//! Runs one program to its end and says what it took: time on the wall, time on the cores, memory.

use crate::command::last_lines;
use anyhow::{Context as _, Result, bail, ensure};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use wait4::Wait4 as _;

/// What a program printed and took.
#[derive(Debug)]
pub(super) struct Measured {
    pub(super) stdout: String,
    /// From the start of the process until it closed its output.
    pub(super) wall: Duration,
    /// Of all its threads, in user and system mode.
    pub(super) cpu: Duration,
    /// The most memory it held, in bytes.
    pub(super) peak_rss: u64,
}

/// Runs to the end; kills it and fails after `patience`.
pub(super) fn measure(command: &mut Command, patience: Duration) -> Result<Measured> {
    let program = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let start = Instant::now();
    let mut child = command.spawn().with_context(|| format!("cannot start {program}"))?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let messages = std::thread::spawn(move || read_all(stderr));
    let (sender, receiver) = mpsc::sync_channel(1);
    let output = std::thread::spawn(move || {
        let printed = read_all(stdout);
        let _ = sender.send((printed, Instant::now())); // nobody waits any more once patience ended
    });
    let Ok((stdout, end)) = receiver.recv_timeout(patience) else {
        let _ = child.kill(); // it may just have ended
        let _ = child.wait();
        bail!("{program} was still running after {} s", patience.as_secs());
    };
    let used = child.wait4().with_context(|| format!("cannot wait for {program}"))?;
    let _ = output.join(); // it has sent all it read
    let messages = messages.join().unwrap_or_default();
    ensure!(used.status.success(), "{program} failed ({}): {}", used.status, last_lines(&messages, 20));
    let used = used.rusage;
    Ok(Measured { stdout, wall: end - start, cpu: used.utime + used.stime, peak_rss: used.maxrss })
}

fn read_all(source: Option<impl std::io::Read>) -> String {
    let mut bytes = Vec::new();
    if let Some(mut source) = source {
        let _ = source.read_to_end(&mut bytes); // what was read before an error still helps
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Variables for every program that is measured, ours and others alike: one thread for BLAS, the same BLAS, and one
/// folder for the kernels that MLX compiles.
pub(super) fn environment(kernels: &Path) -> Result<Vec<(&'static str, OsString)>> {
    std::fs::create_dir_all(kernels)?;
    let mut variables = vec![
        ("OPENBLAS_NUM_THREADS", "1".into()),
        ("OMP_NUM_THREADS", "1".into()),
        ("HF_HUB_OFFLINE", "1".into()),
        ("TMPDIR", kernels.into()),
    ];
    if let Some(library) = blas() {
        variables.push(("LD_PRELOAD", library.into()));
    }
    Ok(variables)
}

/// CPU time that a running process took so far; none where the system does not tell by files (macOS).
pub(super) fn cpu_of(process_id: u32) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{process_id}/stat")).ok()?;
    // The name in parentheses may hold anything; behind it the fields 3 and on are plain. User time is 14, system time 15.
    let mut times =
        stat.rsplit_once(')')?.1.split_whitespace().skip(11).map_while(|field| field.parse::<u64>().ok());
    let ticks = times.next()? + times.next()?;
    Some(Duration::from_millis(ticks * 10)) // Linux tells them in hundredths of a second on every machine
}

/// The most memory that a running process held, in bytes; none where the system does not tell by files (macOS).
pub(super) fn peak_memory_of(process_id: u32) -> Option<u64> {
    memory_of(process_id, "VmHWM:")
}

/// The memory that a running process holds now, likewise.
pub(super) fn resident_memory_of(process_id: u32) -> Option<u64> {
    memory_of(process_id, "VmRSS:")
}

fn memory_of(process_id: u32, field: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process_id}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    let kibibytes: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

/// The end of what a process wrote.
pub(super) fn last_lines_of(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    last_lines(&String::from_utf8_lossy(&text), 20)
}

/// OpenBLAS of this system. The reference BLAS in MLX's wheel for Linux is 10 times slower, which would hide all else.
pub(super) fn blas() -> Option<PathBuf> {
    if !cfg!(target_os = "linux") {
        return None; // macOS has Accelerate
    }
    let machine = std::env::consts::ARCH;
    let folders = [
        format!("/usr/lib/{machine}-linux-gnu/openblas-pthread"),
        format!("/usr/lib/{machine}-linux-gnu"),
        "/usr/lib64".to_owned(),
        "/usr/lib".to_owned(),
    ];
    folders.iter().map(|folder| Path::new(folder).join("libopenblas.so.0")).find(|library| library.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_a_program_printed_and_took() {
        let patience = Duration::from_secs(20);
        let measured = measure(Command::new("sh").args(["-c", "sleep 0.05; echo done"]), patience).unwrap();
        assert_eq!(measured.stdout, "done\n");
        assert!(measured.wall >= Duration::from_millis(50) && measured.peak_rss > 100_000, "{measured:?}");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn reads_what_a_running_process_took() {
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(60) {} // burns CPU of this process
        assert!(cpu_of(std::process::id()).unwrap() > Duration::ZERO);
        let peak = peak_memory_of(std::process::id()).unwrap();
        let now = resident_memory_of(std::process::id()).unwrap();
        assert!(now > 100_000 && now <= peak + 10_000_000, "{now} of {peak}");
        assert!(cpu_of(u32::MAX).is_none());
    }

    #[test]
    fn a_failure_shows_the_reason_and_a_hang_ends() {
        let patience = Duration::from_secs(20);
        let error =
            measure(Command::new("sh").args(["-c", "echo reason >&2; exit 3"]), patience).unwrap_err();
        assert!(error.to_string().contains("reason") && error.to_string().contains('3'), "{error}");
        let error = measure(Command::new("sleep").arg("60"), Duration::from_millis(50)).unwrap_err();
        assert!(error.to_string().contains("still running"), "{error}");
    }
}
