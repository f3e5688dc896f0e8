/// What people should know about a method before they compare it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct About {
    /// One line for tables.
    pub description: &'static str,
    /// Paper, and published code if it was read.
    pub source: &'static str,
    /// What follows the source exactly.
    pub exact: &'static str,
    /// What is our interpretation, or empty.
    pub interpretation: &'static str,
    /// Whether it works with LLaVA-1.5.
    pub llava: Support,
    /// Whether it works with the Qwen-VL family.
    pub qwen: Support,
}

/// Whether a method works with a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Support {
    /// It does.
    Yes,
    /// It does not, and why.
    No(&'static str),
}
