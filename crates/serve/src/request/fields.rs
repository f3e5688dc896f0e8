use serde_json::{Map, Value};

use crate::refusal::Refusal;

/// The fields of an object, taken one by one: what is left in the end is known to nobody.
#[derive(Debug)]
pub(super) struct Fields {
    /// Where the object is: `messages[0]`; nothing for the whole body.
    place: String,
    map: Map<String, Value>,
}

impl Fields {
    pub(super) fn of(value: Value, place: String) -> Result<Self, Refusal> {
        match value {
            Value::Object(map) => Ok(Self { place, map }),
            _ if place.is_empty() => Err(Refusal::malformed("the body is no JSON object")),
            _ => {
                let message = format!("{place} is an object");
                Err(Refusal::bad(place, message))
            }
        }
    }

    /// A field as messages name it.
    pub(super) fn path(&self, name: &str) -> String {
        match self.place.is_empty() {
            true => name.to_owned(),
            false => format!("{}.{name}", self.place),
        }
    }

    /// A field's value; `null` is none.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name).filter(|value| !value.is_null())
    }

    /// A field's value, which is `what`.
    pub(super) fn read<T>(
        &mut self,
        name: &str,
        what: &str,
        read: impl FnOnce(Value) -> Option<T>,
    ) -> Result<Option<T>, Refusal> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        let value = read(value).map(Some);
        value.ok_or_else(|| {
            let path = self.path(name);
            let message = format!("{path} is {what}");
            Refusal::bad(path, message)
        })
    }

    pub(super) fn text(&mut self, name: &str) -> Result<Option<String>, Refusal> {
        self.read(name, "a text", |value| match value {
            Value::String(text) => Some(text),
            _ => None,
        })
    }

    pub(super) fn flag(&mut self, name: &str) -> Result<bool, Refusal> {
        let flag = self.read(name, "true or false", |value| value.as_bool())?;
        Ok(flag.unwrap_or(false))
    }

    /// Which numbers are in range is for the session to say.
    pub(super) fn number(&mut self, name: &str) -> Result<Option<f32>, Refusal> {
        self.read(name, "a number", |value| Some(value.as_f64()? as f32))
    }

    pub(super) fn count(&mut self, name: &str, least: usize) -> Result<Option<usize>, Refusal> {
        let what = format!("a whole number of {least} or more");
        self.read(name, &what, |value| {
            let count = usize::try_from(value.as_u64()?).ok();
            count.filter(|&count| count >= least)
        })
    }

    /// Refuses what is left.
    pub(super) fn end(self) -> Result<(), Refusal> {
        let left = self.map.iter().find(|(_, value)| !value.is_null());
        match left {
            None => Ok(()),
            Some((name, _)) => {
                let path = self.path(name);
                let message = format!("{path} is not known here: leave it out");
                Err(Refusal::bad(path, message))
            }
        }
    }
}
