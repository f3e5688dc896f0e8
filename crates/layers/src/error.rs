/// What data from outside can get wrong in a building block. Shapes that do not fit each other are
/// the caller's mistake, and panic as they do in Burn.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// An id has no vector in the table.
    #[error("id {id} is outside of the table, which has {entries} entries")]
    Id {
        /// The id.
        id: u32,
        /// Vectors of the table.
        entries: usize,
    },
    /// There is nothing to look up.
    #[error("there is no id to look up; give at least one")]
    NoIds,
    /// Rows do not fit into a buffer.
    #[error("rows {rows} do not fit from {start} on into a buffer {buffer}")]
    Rows {
        /// Shape and type of the rows.
        rows: String,
        /// Shape and type of the buffer.
        buffer: String,
        /// The first row to overwrite.
        start: usize,
    },
}
