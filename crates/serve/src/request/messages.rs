use reroute_zoo::messages::Role;
use serde_json::Value;

use super::fields::Fields;
use crate::refusal::Refusal;

/// Frames of a video in a second, where nobody says how many.
const FPS: f64 = 2.0;

/// What somebody says, and shows.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) role: Role,
    pub(crate) pieces: Vec<Piece>,
}

/// A piece of what is said.
#[derive(Debug)]
pub(crate) enum Piece {
    Text(String),
    Picture(Picture),
}

/// An image or a video, by its URL.
#[derive(Debug)]
pub(crate) struct Picture {
    pub(crate) url: String,
    /// Frames in a second, if it is a video.
    pub(crate) fps: Option<f64>,
    /// Where it stands: `messages[0].content[1].image_url.url`.
    pub(crate) place: String,
}

/// Kinds of parts that others know.
const ELSEWHERE: &[(&str, &str)] = &[
    ("file", "files are not read: show pages as images"),
    ("input_audio", "these models do not hear"),
    ("refusal", "leave refused answers out"),
];

/// Fields of messages that others know.
const FIELDS_ELSEWHERE: &[(&str, &str)] = &[
    ("audio", "these models do not hear"),
    ("function_call", "there are no functions here"),
    ("name", "speakers have no names here"),
    ("refusal", "leave refused answers out"),
    ("tool_call_id", "there are no tools here"),
];

pub(super) fn read(value: Option<Value>, most_text: usize) -> Result<Vec<Said>, Refusal> {
    let list = match value {
        Some(Value::Array(list)) if !list.is_empty() => list,
        _ => {
            let message = "messages is a list of what has been said, and the last is the user's";
            return Err(Refusal::bad("messages", message));
        }
    };
    let mut messages = Vec::new();
    for (index, message) in list.into_iter().enumerate() {
        messages.push(one(message, format!("messages[{index}]"))?);
    }
    let texts = messages.iter().flat_map(|message| &message.pieces);
    let bytes: usize = { texts }
        .map(|piece| match piece {
            Piece::Text(text) => text.len(),
            Piece::Picture(_) => 0,
        })
        .sum();
    if bytes > most_text {
        let message = format!("{bytes} bytes of text are more than {most_text}: shorten it");
        return Err(Refusal::bad("messages", message));
    }
    match messages.last().is_some_and(|last| last.role == Role::User) {
        true => Ok(messages),
        false => Err(Refusal::bad(
            "messages",
            "the last message is the user's: it is what gets an answer",
        )),
    }
}

fn one(message: Value, place: String) -> Result<Said, Refusal> {
    let mut fields = Fields::of(message, place)?;
    let role_path = fields.path("role");
    let role = match fields.text("role")?.as_deref() {
        Some("system" | "developer") => Role::System,
        Some("user") => Role::User,
        Some("assistant") => Role::Assistant,
        Some(other @ ("tool" | "function")) => {
            let message =
                format_args!("the role {other} is not supported: there are no tools here");
            return Err(Refusal::unsupported(role_path, message));
        }
        _ => {
            let message = "a role is system, user or assistant";
            return Err(Refusal::bad(role_path, message));
        }
    };
    for (name, why) in FIELDS_ELSEWHERE {
        if fields.take(name).is_some() {
            let message = format_args!("{name} is not supported: {why}");
            return Err(Refusal::unsupported(fields.path(name), message));
        }
    }
    // What answers carry, and clients send back with them.
    for name in ["annotations", "tool_calls"] {
        let is_empty = |value: Value| value.as_array().is_some_and(Vec::is_empty);
        if fields.take(name).is_some_and(|value| !is_empty(value)) {
            let message = format_args!("{name} is not supported: leave it out");
            return Err(Refusal::unsupported(fields.path(name), message));
        }
    }
    let content_path = fields.path("content");
    let pieces = match fields.take("content") {
        Some(Value::String(text)) => vec![Piece::Text(text)],
        Some(Value::Array(parts)) => {
            let mut pieces = Vec::new();
            for (index, part) in parts.into_iter().enumerate() {
                pieces.push(piece(part, format!("{content_path}[{index}]"), role)?);
            }
            pieces
        }
        _ => {
            let message = "a content is a text or a list of parts";
            return Err(Refusal::bad(content_path, message));
        }
    };
    fields.end()?;
    Ok(Said { role, pieces })
}

fn piece(part: Value, place: String, role: Role) -> Result<Piece, Refusal> {
    let mut fields = Fields::of(part, place)?;
    let type_path = fields.path("type");
    let kind = fields.text("type")?.unwrap_or_default();
    let piece = match kind.as_str() {
        "text" => {
            let path = fields.path("text");
            let text = fields.text("text")?;
            Piece::Text(text.ok_or_else(|| Refusal::bad(path, "a part of text has its text"))?)
        }
        "image_url" | "video_url" if role == Role::User => {
            Piece::Picture(picture(&mut fields, &kind)?)
        }
        "image_url" | "video_url" => {
            let message = "pictures are the user's: move it into a message of the user";
            return Err(Refusal::bad(type_path, message));
        }
        other => {
            let known = ELSEWHERE.iter().find(|(name, _)| *name == other);
            return Err(match known {
                Some((name, why)) => Refusal::unsupported(
                    type_path,
                    format_args!("parts of type {name} are not supported: {why}"),
                ),
                None => Refusal::bad(type_path, "a part is text, image_url or video_url"),
            });
        }
    };
    fields.end()?;
    Ok(piece)
}

/// `{"url": …, "detail": "auto"}`, or the URL alone; of a video `{"url": …, "fps": 2}`.
fn picture(part: &mut Fields, kind: &str) -> Result<Picture, Refusal> {
    let is_video = kind == "video_url";
    let path = part.path(kind);
    let (mut fields, place) = match part.take(kind) {
        Some(Value::String(url)) => {
            let fps = is_video.then_some(FPS);
            let place = path;
            return Ok(Picture { url, fps, place });
        }
        Some(value @ Value::Object(_)) => {
            let fields = Fields::of(value, path)?;
            let place = fields.path("url");
            (fields, place)
        }
        _ => {
            let message = format_args!("{kind} is {{\"url\": …}}");
            return Err(Refusal::bad(path, message));
        }
    };
    let Some(url) = fields.text("url")? else {
        return Err(Refusal::bad(place, "a picture has its url"));
    };
    let fps = match is_video {
        false => None,
        true => {
            let read = |value: Value| value.as_f64().filter(|fps| *fps > 0.0 && *fps <= 1000.0);
            let fps = fields.read("fps", "frames in a second, above 0", read)?;
            Some(fps.unwrap_or(FPS))
        }
    };
    if !is_video {
        let detail = fields.text("detail")?;
        if detail.is_some_and(|detail| detail != "auto" && detail != "high") {
            let message =
                "pictures are seen in full: leave detail out, and spend less by \"routing\"";
            return Err(Refusal::unsupported(fields.path("detail"), message));
        }
    }
    fields.end()?;
    Ok(Picture { url, fps, place })
}
