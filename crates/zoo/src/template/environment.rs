//! What templates can call: that which `transformers` gives them, and `fromjson`, which published
//! templates use beyond.

use std::time::SystemTime;

use jiff::civil::DateTime;
use jiff::fmt::strtime::{BrokenDownTime, Config, PosixCustom};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ZonedDateTime};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Rest;
use minijinja::{Environment, Error, ErrorKind, Value};

use super::{FUEL, json};

/// An environment without templates.
pub(super) fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    // White space around blocks is dropped, as Hugging Face configures Jinja.
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()?;
    environment.set_syntax(syntax);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    minijinja_contrib::add_to_environment(&mut environment);
    // Python's takes its items one by one.
    environment.add_function("cycler", |items: Rest<Value>| {
        minijinja_contrib::globals::cycler(items.0)
    });
    environment.add_filter("tojson", json::dumps);
    environment.add_filter("fromjson", json::loads);
    environment.add_function("raise_exception", |message: String| {
        Err::<String, _>(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| {
        strftime(ZonedDateTime::now().datetime(), &format)
    });
    Ok(environment)
}

/// Stops the clock that templates read, at this time in UTC.
pub(super) fn set_now(environment: &mut Environment, now: SystemTime) {
    let now = Timestamp::try_from(now).map(|now| now.to_zoned_datetime(TimeZone::UTC).datetime());
    environment.add_function("strftime_now", move |format: String| match &now {
        Ok(now) => strftime(*now, &format),
        Err(error) => Err(unknown(error.clone())),
    });
}

/// Python's `strftime` of a time without a time zone.
fn strftime(now: DateTime, format: &str) -> Result<String, Error> {
    let config = Config::new().custom(PosixCustom::new());
    let time = BrokenDownTime::from(now);
    time.to_string_with_config(&config, directives(format))
        .map_err(unknown)
}

/// Python's spelling of directives: the zone is empty, fractions of a second have six digits.
fn directives(format: &str) -> String {
    let mut chars = format.chars();
    let mut directives = String::with_capacity(format.len());
    while let Some(c) = chars.next() {
        match if c == '%' { chars.next() } else { None } {
            Some('f') => directives.push_str("%6f"),
            Some('z' | 'Z') => {}
            other => directives.extend([Some(c), other].into_iter().flatten()),
        }
    }
    directives
}

fn unknown(error: jiff::Error) -> Error {
    Error::new(
        ErrorKind::InvalidOperation,
        format!("strftime_now: {error}"),
    )
}
