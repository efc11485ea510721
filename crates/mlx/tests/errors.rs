//! One handler for the errors of the process, whoever called MLX first. A process of its own, since a handler is installed once.
#![allow(clippy::unwrap_used, clippy::panic)]

use mlxnode_mlx::{Array, Device, Error};

fn text(error: &Error) -> &str {
    match error {
        Error::Mlx(text) => text,
        other => panic!("{other:?} is not MLX's"),
    }
}

/// Errors through mlx-rs (`sort`) and past it (`matmul`), in turns. That a process lives to say so is part of the test: mlx-c's own
/// handler ends it.
fn fail_in_turns() {
    let device = Device::open().unwrap();
    let a = Array::from_f32(&[1.0; 6], &[2, 3]).unwrap();
    for _ in 0..100 {
        let through = device.sort(&a, 7).unwrap_err();
        assert!(text(&through).starts_with("[sort]"), "{through}");
        let past = device.matmul(&a, &a).unwrap_err();
        assert!(text(&past).starts_with("[matmul]"), "{past}");
        assert_eq!(device.sum(&a, 1, false).unwrap().to_f32().unwrap(), [3.0; 2]);
    }
}

#[test]
fn errors_keep_their_reason_through_mlx_rs_and_past_it_on_every_thread() {
    // Somebody calls mlx-rs before any device is opened, and its handler is installed.
    let theirs = mlx_rs::Array::from_f32(1.0);
    let error = mlx_rs::ops::sort_axis(&theirs, 7).unwrap_err();
    assert!(error.what().starts_with("[sort]"), "{error}");

    fail_in_turns();
    let threads = [std::thread::spawn(fail_in_turns), std::thread::spawn(fail_in_turns)];
    for thread in threads {
        thread.join().unwrap();
    }

    // What others call of mlx-rs afterwards has its reason when it becomes an error of ours.
    let error = Error::from(mlx_rs::ops::sort_axis(&theirs, 7).unwrap_err());
    assert!(text(&error).starts_with("[sort]"), "{error}");
}
