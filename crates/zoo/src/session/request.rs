use std::sync::Arc;

use burn::tensor::backend::Backend;
use reroute::GenerationOptions;
use vision_encoder::RgbImage;

use super::past::Past;
use crate::messages::{Content, Message, Role};
use crate::{Question, Routing, VideoTime, View, Visual};

/// What one answer, or several to the same prompt, are asked for with.
#[derive(Clone)]
pub struct Request<'a, B: Backend> {
    /// The conversation so far: a system prompt, turns of old, and at last what is to be answered.
    pub turns: Vec<Turn>,
    /// How visual tokens are reduced.
    pub routing: Routing<'a, B>,
    /// How long answers are, how tokens are chosen, what else is returned.
    pub options: GenerationOptions,
    /// An answer ends before the first of these.
    pub stop: Vec<String>,
    /// How many answers: they share the prefill, and draw from streams of random numbers of their own.
    pub answers: usize,
    /// What an earlier request to the same model left behind, to go on from. Under *remove* its pictures
    /// are what that request kept of them.
    pub past: Option<Past<B>>,
    /// Leave something behind for a later request.
    pub keep_past: bool,
}

/// What somebody says, and shows.
#[derive(Debug, Clone)]
pub struct Turn {
    /// Who speaks.
    pub role: Role,
    /// In order.
    pub parts: Vec<Part>,
}

/// A part of a turn.
#[derive(Debug, Clone)]
pub enum Part {
    /// An image or a video.
    Visual(Arc<Visual>),
    /// Text. Special tokens in it are ordinary text.
    Text(String),
}

impl<'a, B: Backend> Request<'a, B> {
    /// A request for one answer.
    pub fn new(
        turns: Vec<Turn>,
        routing: impl Into<Routing<'a, B>>,
        options: GenerationOptions,
    ) -> Self {
        Self {
            turns,
            routing: routing.into(),
            options,
            stop: Vec::new(),
            answers: 1,
            past: None,
            keep_past: false,
        }
    }
}

impl Turn {
    /// A turn of one text.
    pub fn text(role: Role, text: impl Into<String>) -> Self {
        let parts = vec![Part::Text(text.into())];
        Self { role, parts }
    }

    /// A user's turn: pictures and text, each in its place.
    pub fn user(parts: impl Into<Vec<Part>>) -> Self {
        let (role, parts) = (Role::User, parts.into());
        Self { role, parts }
    }

    /// What is shown.
    pub(crate) fn visuals(&self) -> impl Iterator<Item = &Arc<Visual>> {
        self.parts.iter().filter_map(|part| match part {
            Part::Visual(visual) => Some(visual),
            Part::Text(_) => None,
        })
    }

    /// All that is said.
    pub(crate) fn said(&self) -> String {
        let text = self.parts.iter().filter_map(|part| match part {
            Part::Text(text) => Some(text.as_str()),
            Part::Visual(_) => None,
        });
        text.collect()
    }

    /// The turn as templates take it; `views` says how its visuals are seen, in order.
    pub(crate) fn message<'v>(&self, views: &mut impl Iterator<Item = &'v View>) -> Message {
        let mut content: Vec<Content> = Vec::new();
        for part in &self.parts {
            match (part, content.last_mut()) {
                // One text: no special token may come about where two meet.
                (Part::Text(more), Some(Content::Text(text))) => text.push_str(more),
                (Part::Text(text), _) => content.push(Content::Text(text.clone())),
                (Part::Visual(_), _) => content.extend(views.next().map(|view| match &view.time {
                    None => Content::Image,
                    Some(VideoTime { seconds, .. }) => Content::Video {
                        seconds: seconds.clone(),
                    },
                })),
            }
        }
        let role = self.role;
        Message { role, content }
    }
}

impl From<RgbImage> for Part {
    fn from(image: RgbImage) -> Self {
        Self::Visual(Arc::new(Visual::Image(image)))
    }
}

impl From<Arc<Visual>> for Part {
    fn from(visual: Arc<Visual>) -> Self {
        Self::Visual(visual)
    }
}

impl From<Visual> for Part {
    fn from(visual: Visual) -> Self {
        Self::Visual(Arc::new(visual))
    }
}

impl From<&str> for Part {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}

impl From<String> for Part {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

/// What it is about, then the text.
impl From<&Question> for Turn {
    fn from(question: &Question) -> Self {
        let visuals = question.visuals.iter().cloned().map(Part::from);
        Self {
            role: Role::User,
            parts: visuals.chain([question.text.clone().into()]).collect(),
        }
    }
}
