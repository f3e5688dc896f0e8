//! What a checkpoint folder may hold, and what it must never do to us.

mod burnpack;
mod fixture;
mod folder;
mod header;
mod index;
mod load;
mod names;
mod never_panics;
mod save;
mod tensors;
