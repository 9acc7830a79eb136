//! The Jinja environment that published chat templates expect; transformers' is the model.

use std::error::Error as _;
use std::fmt;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

use super::TemplateError;
use super::strftime::strftime;

/// Steps that a template may take: well under a second, and enough for a conversation that fills
/// the longest context.
const FUEL: u64 = 10_000_000;
/// Nesting of calls and loops.
const RECURSION_MAX: usize = 100;

/// An environment without templates.
pub(super) fn new() -> Environment<'static> {
    let mut environment = Environment::new();
    if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        environment.set_syntax(syntax);
    }
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(RECURSION_MAX);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", raise_exception);
    environment.add_filter("tojson", tojson);
    environment
}

/// The function `strftime_now` of one request.
pub(super) fn strftime_now(now_s: u64) -> Value {
    Value::from_function(move |format: String| {
        strftime(&format, now_s).map_err(|reason| Error::new(ErrorKind::InvalidOperation, reason))
    })
}

/// What a template said through `raise_exception`, carried through the engine's own error.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn raise_exception(message: String) -> Result<String, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raised").with_source(Raised(message)))
}

/// Tells a template that refuses from one that does not work.
pub(super) fn error(error: Error) -> TemplateError {
    let mut cause = error.source();
    while let Some(inner) = cause {
        if let Some(Raised(message)) = inner.downcast_ref() {
            return TemplateError::Raised(message.clone());
        }
        cause = inner.source();
    }
    TemplateError::Failed(error.to_string())
}

/// As Python's `json.dumps(value, ensure_ascii=False, indent=indent)`: models were trained on its
/// spaces, and the engine's own filter escapes for HTML.
fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // HTML was never escaped and nothing else than UTF-8 is ever written.
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    match indent {
        None => write_json(value, PythonFormatter),
        Some(width) => {
            let spaces = " ".repeat(width.min(16));
            write_json(value, PrettyFormatter::with_indent(spaces.as_bytes()))
        }
    }
}

fn write_json(value: &Value, formatter: impl Formatter) -> Result<String, Error> {
    let failed = |error: String| Error::new(ErrorKind::BadSerialization, error);
    let mut json = Vec::new();
    value
        .serialize(&mut Serializer::with_formatter(&mut json, formatter))
        .map_err(|error| failed(error.to_string()))?;
    String::from_utf8(json).map_err(|error| failed(error.to_string()))
}

/// `, ` and `: ` as separators.
struct PythonFormatter;

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}
