//! Methods of Python's own types that templates call. minijinja-contrib has most; the rest is here.

use minijinja::{
    Error, ErrorKind, State, Value,
    value::{Tuple, ValueKind, from_args},
};
use minijinja_contrib::pycompat;

fn tuple(parts: [&str; 3]) -> Value {
    Value::from(Tuple::from(parts.map(Value::from)))
}

/// `value.method(arguments)` where the value has no such method of its own.
pub(super) fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if value.kind() == ValueKind::String
        && let Some(text) = value.as_str()
    {
        match name {
            "removeprefix" => {
                let (prefix,): (&str,) = from_args(args)?;
                return Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)));
            }
            "removesuffix" => {
                let (suffix,): (&str,) = from_args(args)?;
                return Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)));
            }
            "rsplit" => return rsplit(text, args),
            "partition" => {
                let (separator,): (&str,) = from_args(args)?;
                let (before, after) = text.split_once(nonempty(separator)?).unzip();
                let found = before.is_some();
                let parts = [before.unwrap_or(text), if found { separator } else { "" }, after.unwrap_or("")];
                return Ok(tuple(parts));
            }
            "rpartition" => {
                let (separator,): (&str,) = from_args(args)?;
                let (before, after) = text.rsplit_once(nonempty(separator)?).unzip();
                let found = before.is_some();
                let parts = [before.unwrap_or(""), if found { separator } else { "" }, after.unwrap_or(text)];
                return Ok(tuple(parts));
            }
            // Widths make large strings out of small templates, and chat templates have no use for them.
            "format" | "format_map" | "center" | "ljust" | "rjust" | "zfill" | "expandtabs" | "translate" => {
                return Err(Error::new(
                    ErrorKind::UnknownMethod,
                    format!("string has no method named {name} in a chat template"),
                ));
            }
            _ => {}
        }
    }
    if value.kind() == ValueKind::Seq && name == "index" {
        let (wanted,): (&Value,) = from_args(args)?;
        let at = value.try_iter()?.position(|item| item == *wanted);
        return at.map(Value::from).ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "not in the list"));
    }
    pycompat::unknown_method_callback(state, value, name, args)
}

fn nonempty(separator: &str) -> Result<&str, Error> {
    if separator.is_empty() {
        return Err(Error::new(ErrorKind::InvalidOperation, "empty separator"));
    }
    Ok(separator)
}

fn rsplit(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (separator, most): (Option<&str>, Option<i64>) = from_args(args)?;
    let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
    let mut parts: Vec<&str> = Vec::new();
    let mut rest = if separator.is_none() { text.trim() } else { text };
    while parts.len() < most {
        let split = match separator {
            Some(separator) => rest.rsplit_once(nonempty(separator)?),
            None => rest.rsplit_once(char::is_whitespace).map(|(before, after)| (before.trim_end(), after)),
        };
        let Some((before, after)) = split else { break };
        parts.push(after);
        rest = before;
    }
    if separator.is_some() || !rest.is_empty() {
        parts.push(rest);
    }
    parts.reverse();
    Ok(parts.into_iter().map(Value::from).collect())
}
