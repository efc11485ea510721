//! Figures as people read them. What is not known is a dash, never a zero.

use mlxnode_compute::ByteCount;

const UNKNOWN: &str = "–";

pub fn rate(per_second: Option<f64>) -> String {
    match per_second {
        None => UNKNOWN.to_owned(),
        Some(rate) if rate >= 99.95 => format!("{rate:.0}"),
        Some(rate) => format!("{rate:.1}"),
    }
}

pub fn time(seconds: Option<f64>) -> String {
    match seconds {
        None => UNKNOWN.to_owned(),
        Some(seconds) if seconds <= 0.0 => "0".to_owned(),
        Some(seconds) if seconds < 0.001 => format!("{:.0} µs", seconds * 1e6),
        Some(seconds) if seconds < 0.1 => format!("{:.2} ms", seconds * 1e3),
        Some(seconds) if seconds < 1.0 => format!("{:.0} ms", seconds * 1e3),
        Some(seconds) => format!("{seconds:.1} s"),
    }
}

pub fn loss(loss: Option<f64>) -> String {
    loss.map_or_else(|| UNKNOWN.to_owned(), |loss| format!("{loss:.3}"))
}

/// What people wait for: whole seconds, minutes, hours.
pub fn span(seconds: Option<f64>) -> String {
    match seconds.map(|seconds| seconds.max(0.0).round() as u64) {
        None => UNKNOWN.to_owned(),
        Some(seconds @ 0..90) => format!("{seconds} s"),
        Some(seconds @ 90..5400) => format!("{} min", seconds.div_ceil(60)),
        Some(seconds) => format!("{} h {:02} min", seconds / 3600, seconds % 3600 / 60),
    }
}

pub fn share(part: Option<f64>) -> String {
    part.map_or_else(|| UNKNOWN.to_owned(), |part| format!("{:.0} %", part * 100.0))
}

pub fn bytes(count: u64) -> String {
    ByteCount(count).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_few_digits_and_what_is_unknown_is_no_zero() {
        assert_eq!(
            (rate(None), rate(Some(3.12)), rate(Some(1234.5))),
            ("–".into(), "3.1".into(), "1234".into())
        );
        let times = [0.0, 0.000_25, 0.0123, 0.25, 2.0].map(|seconds| time(Some(seconds)));
        assert_eq!(times, ["0", "250 µs", "12.30 ms", "250 ms", "2.0 s"]);
        let spans = [0.4, 89.0, 754.0, 7384.0].map(|seconds| span(Some(seconds)));
        assert_eq!(spans, ["0 s", "89 s", "13 min", "2 h 03 min"]);
        assert_eq!((loss(Some(1.234_56)), span(None)), ("1.235".into(), "–".into()));
        assert_eq!((share(Some(0.256)), time(None)), ("26 %".into(), "–".into()));
    }
}
