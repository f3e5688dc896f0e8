/// How prompts of a family are written where its checkpoint does not say.
#[derive(Debug, Clone, Copy)]
pub struct Dialect {
    /// Chat template for folders that bring none: it renders what the published one does, but for
    /// tools.
    pub(crate) template: &'static str,
    /// An image slot, for templates that take a message as one string.
    pub(crate) image: &'static str,
    /// A video slot.
    pub(crate) video: &'static str,
    /// Whether each temporal patch of a video has a slot of its own, after its time.
    pub(crate) timed: bool,
}

impl Dialect {
    /// LLaVA-1.5.
    pub const LLAVA: Self = Self {
        template: include_str!("templates/llava.jinja"),
        image: "<image>\n",
        video: "",
        timed: false,
    };
    /// Qwen2-VL and Qwen2.5-VL.
    pub const QWEN2_VL: Self = Self {
        template: include_str!("templates/qwen2-vl.jinja"),
        image: "<|vision_start|><|image_pad|><|vision_end|>",
        video: "<|vision_start|><|video_pad|><|vision_end|>",
        timed: false,
    };
    /// Qwen3-VL.
    pub const QWEN3_VL: Self = Self {
        template: include_str!("templates/qwen3-vl.jinja"),
        timed: true,
        ..Self::QWEN2_VL
    };

    /// The lengths of a video's slots, for [`Slots`](crate::messages::Slots).
    pub fn video_slots(&self, patches: usize, tokens_per_patch: usize) -> Vec<usize> {
        match self.timed {
            true => vec![tokens_per_patch; patches],
            false => vec![tokens_per_patch.saturating_mul(patches)],
        }
    }
}
