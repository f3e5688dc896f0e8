/// How prompts of a family are written where its checkpoint does not say.
#[derive(Debug, Clone, Copy)]
pub struct Dialect {
    /// Chat template for folders that bring none: it renders what the published one does, but for
    /// tools.
    pub template: &'static str,
    /// An image slot, for templates that take a message as one string.
    pub image: &'static str,
    /// A video slot.
    pub video: &'static str,
    /// Whether each temporal patch of a video has a slot of its own, after its time.
    pub timed: bool,
}

impl Dialect {
    /// The lengths of a video's slots, for the slots of a prompt.
    pub fn video_slots(&self, patches: usize, tokens_per_patch: usize) -> Vec<usize> {
        match self.timed {
            true => vec![tokens_per_patch; patches],
            false => vec![tokens_per_patch.saturating_mul(patches)],
        }
    }
}
