use std::iter::repeat_n;

/// How prompts of a family are written where its checkpoint does not say.
#[derive(Debug, Clone, Copy)]
pub struct Dialect {
    /// Chat template for folders that bring none: it renders what the published one does, but for
    /// tools.
    pub template: &'static str,
    /// The placeholder of an image, for templates that take a message as one string.
    pub image: &'static str,
    /// The placeholder of a video.
    pub video: &'static str,
    /// The time before each temporal patch of a video, with `{seconds}` in it, if every patch has a
    /// placeholder of its own; seconds have one decimal.
    pub time: Option<&'static str>,
}

impl Dialect {
    /// The visual tokens of each placeholder of a video.
    pub fn video_placeholders(
        &self,
        patches: usize,
        tokens_per_patch: usize,
    ) -> impl Iterator<Item = usize> + use<> {
        match self.time {
            Some(_) => repeat_n(tokens_per_patch, patches),
            None => repeat_n(tokens_per_patch.saturating_mul(patches), 1),
        }
    }

    /// What stands before the placeholder of a temporal patch; nothing if patches have none of their own.
    pub fn time_text(&self, seconds: f64) -> String {
        let time = self.time.unwrap_or_default();
        time.replace("{seconds}", &format!("{seconds:.1}"))
    }
}
