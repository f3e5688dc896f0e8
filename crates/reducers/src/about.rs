use crate::encoder::Tower;

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
    /// The towers that its settings were published for; none if it needs nothing of a tower.
    pub towers: &'static [Tower],
}

impl About {
    /// Nothing said yet, of a method that needs nothing of a tower.
    pub(crate) const NOTHING: About = About {
        description: "",
        source: "",
        exact: "",
        interpretation: "",
        towers: &[],
    };
}

/// Whether a method works behind a tower.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Support {
    /// It does.
    Yes,
    /// It does, though its settings were published for other towers: see [`Tower::Other`].
    Adapted,
    /// It does not, and why.
    No(String),
}
