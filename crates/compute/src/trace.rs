//! Which request a sequence belongs to, for the logs and traces of all nodes that work on it.
//!
//! The identifiers are those of the W3C recommendation "Trace Context" (level 1): a client's `traceparent` is taken over, so that its
//! trace goes on through the cluster. They say nothing about what was asked.

use std::fmt;

/// A request as tracing tools know it, and the span that the next one is part of.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceContext {
    trace: [u8; 16],
    span: [u8; 8],
    is_sampled: bool,
}

impl TraceContext {
    /// A new trace from random bytes.
    pub fn new(random: [u8; 24]) -> Self {
        let (mut trace, mut span) = ([0; 16], [0; 8]);
        trace.copy_from_slice(&random[..16]);
        span.copy_from_slice(&random[16..]);
        // All zeros mean that there is none.
        trace[15] |= u8::from(trace == [0; 16]);
        span[7] |= u8::from(span == [0; 8]);
        Self { trace, span, is_sampled: true }
    }

    /// As a client's or another node's `traceparent` has it; none when it is malformed, which is to be treated as if it were absent.
    pub fn parse(traceparent: &str) -> Option<Self> {
        let mut parts = traceparent.split('-');
        let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let version = hex::<1>(version)?[0];
        // A later version may have more parts, and means the same by the first four.
        if version == 0xff || (version == 0 && parts.next().is_some()) {
            return None;
        }
        let (trace, span) = (hex::<16>(trace)?, hex::<8>(span)?);
        let is_sampled = hex::<1>(flags)?[0] & 1 == 1;
        (trace != [0; 16] && span != [0; 8]).then_some(Self { trace, span, is_sampled })
    }

    /// The same trace with another span.
    #[must_use]
    pub fn with_span(self, span: [u8; 8]) -> Self {
        Self { span, ..self }
    }

    /// The request, on all nodes.
    pub fn trace_id(&self) -> [u8; 16] {
        self.trace
    }

    /// The span that the next one is part of.
    pub fn span_id(&self) -> [u8; 8] {
        self.span
    }

    /// Does the one who began the trace record it?
    pub fn is_sampled(&self) -> bool {
        self.is_sampled
    }

    /// The trace's id alone, as logs name the request.
    pub fn id(&self) -> String {
        self.trace.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// As `traceparent`.
impl fmt::Display for TraceContext {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("00-")?;
        self.trace.iter().try_for_each(|byte| write!(out, "{byte:02x}"))?;
        out.write_str("-")?;
        self.span.iter().try_for_each(|byte| write!(out, "{byte:02x}"))?;
        write!(out, "-{:02x}", u8::from(self.is_sampled))
    }
}

impl fmt::Debug for TraceContext {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, out)
    }
}

/// Lower-case hex digits, exactly so many.
fn hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let value = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = value(pair[0])? << 4 | value(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENTS: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_clients_trace_goes_on() {
        let context = TraceContext::parse(CLIENTS).unwrap();
        assert_eq!(context.to_string(), CLIENTS);
        assert_eq!(context.id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert!(context.is_sampled());
        let inner = context.with_span([1; 8]);
        assert_eq!((inner.trace_id(), inner.span_id()), (context.trace_id(), [1; 8]));
        let silent = TraceContext::parse(&CLIENTS.replace("-01", "-00")).unwrap();
        assert!(!silent.is_sampled());
        let later = TraceContext::parse(&format!("{}-more", CLIENTS.replacen("00", "01", 1))).unwrap();
        assert_eq!(later.trace_id(), context.trace_id());
    }

    #[test]
    fn what_is_no_trace_is_as_if_it_were_absent() {
        let upper = CLIENTS.to_uppercase();
        let no_trace = format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32));
        let no_span = format!("00-4bf92f3577b34da6a3ce929d0e0e4736-{}-01", "0".repeat(16));
        let cases = [
            "",
            "-",
            "00",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "00-4bf92f3577b34da6a3ce929d0e0e47é-00f067aa0ba902b7-01",
            &upper,
            &no_trace,
            &no_span,
        ];
        for text in cases {
            assert_eq!(TraceContext::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_new_trace_is_never_empty() {
        let context = TraceContext::new([0; 24]);
        assert_eq!(TraceContext::parse(&context.to_string()), Some(context));
        assert_ne!(TraceContext::new([3; 24]), context);
    }
}
