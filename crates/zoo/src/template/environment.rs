//! What templates can call: that which `transformers` gives them, and `fromjson`, which published
//! templates use beyond.

use std::time::SystemTime;

use jiff::civil::DateTime;
use jiff::fmt::strtime::{BrokenDownTime, Config, PosixCustom};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ZonedDateTime};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value, escape_formatter, filters};

use super::{FUEL, MAX_OUTPUT, json};

/// Lists in lists that are written; each takes some of the stack.
const MAX_DEPTH: usize = 128;

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
    environment.set_formatter(|out, state, value| {
        bounded(value)?;
        escape_formatter(out, state, value)
    });
    environment.add_filter("string", string);
    environment.add_filter("join", join);
    environment.add_filter("sum", sum);
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

/// The filter, for what is no longer than a prompt may be: it is charged when it is there.
fn string(state: &mut State, value: Value) -> Result<Value, Error> {
    bounded(&value)?;
    filters::string(state, &value)
}

/// The filter, for what is no longer than a prompt may be.
fn join(
    state: &mut State,
    value: Value,
    joiner: Option<Value>,
    attribute: Option<Value>,
    options: Kwargs,
) -> Result<Value, Error> {
    bounded(&value)?;
    let [joiner, attribute] = [joiner, attribute].map(Option::unwrap_or_default);
    let arguments = [value, joiner, attribute, options.into()];
    Value::from_function(filters::join).call(state, &arguments)
}

/// The filter, which as Python's adds no strings: they would be copied once an item.
fn sum(
    state: &mut State,
    values: Value,
    attribute: Option<Value>,
    start: Option<Value>,
    options: Kwargs,
) -> Result<Value, Error> {
    let named = options.peek::<Option<Value>>("start")?;
    if let Some(start) = start.as_ref().or(named.as_ref())
        && start.kind() == ValueKind::String
    {
        let reason = "sum adds no strings, use join";
        return Err(Error::new(ErrorKind::InvalidOperation, reason));
    }
    let [attribute, start] = [attribute, start].map(Option::unwrap_or_default);
    let arguments = [values, attribute, start, options.into()];
    Value::from_function(filters::sum).call(state, &arguments)
}

/// Whether a value is no longer than a prompt may be when it is written, without writing it.
fn bounded(value: &Value) -> Result<(), Error> {
    fn take(value: &Value, left: &mut usize, depth: usize) -> Option<()> {
        let depth = depth.checked_sub(1)?;
        let length = value.as_str().map_or(1, |text| text.len().max(1));
        *left = left.checked_sub(length)?;
        if value.kind() == ValueKind::Map {
            for key in value.try_iter().into_iter().flatten() {
                take(&key, left, depth)?;
                take(&value.get_item(&key).unwrap_or_default(), left, depth)?;
            }
        } else if value.as_str().is_none() {
            for item in value.try_iter().into_iter().flatten() {
                take(&item, left, depth)?;
            }
        }
        Some(())
    }
    let mut left = MAX_OUTPUT;
    match take(value, &mut left, MAX_DEPTH) {
        Some(()) => Ok(()),
        None => Err(Error::new(
            ErrorKind::InvalidOperation,
            format!(
                "a text is longer than {MAX_OUTPUT} bytes, or lists lie in lists {MAX_DEPTH} deep"
            ),
        )),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Found by a template that a file of half a megabyte had: written, they took the whole stack.
    #[test]
    fn lists_too_deep_are_refused_and_not_written() {
        let environment = environment().expect("it is set up");
        let nest = "{% set n = namespace(s=[1]) %}{% for i in range(9000) %}{% set n.s = [n.s] %}{% endfor %}";
        for end in ["{{ n.s }}", "{{ n.s|string }}", "{{ n.s|join }}"] {
            let rendered = environment.render_str(&format!("{nest}{end}"), ());
            let error = rendered.expect_err(end).to_string();
            assert!(error.contains("lists lie in lists"), "{error}");
        }
    }

    #[test]
    fn bounded_filters_are_the_engine_s() {
        let environment = environment().expect("it is set up");
        for (source, expected) in [
            ("{{ [1, 'a']|join }}", "1a"),
            ("{{ [1, 2]|join('-') }}", "1-2"),
            ("{{ [{'a': 1}, {'a': 2}]|join('-', 'a') }}", "1-2"),
            (
                "{{ [{'a': 1}, {'a': 2}]|join(', ', attribute='a') }}",
                "1, 2",
            ),
            ("{{ [1, 2]|sum }}", "3"),
            ("{{ [1, 2]|sum(start=4) }}", "7"),
            ("{{ [{'a': 1}, {'a': 2}]|sum('a', 1) }}", "4"),
            ("{{ [{'a': 1}, {'a': 2}]|sum(attribute='a') }}", "3"),
            ("{{ {'a': [1]}|string|length }}", "10"),
            ("{{ 5|string ~ 'x' }}", "5x"),
        ] {
            let rendered = environment.render_str(source, ());
            assert_eq!(rendered.expect(source), expected, "{source}");
        }
    }
}
